"""The demo: its commands are those that it shows, it goes on where it stopped, and says what is."""

from __future__ import annotations

import re
import shlex
import webbrowser
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result

from cxr_cache.cli import demo
from cxr_cache.cli.main import cli
from cxr_cache.common.manifest import mark_written, read_manifest, recording

STEPS = ["extract", "train", "finetune", "extract", "evaluate", "evaluate", "report"]
STEPS += ["compare", "compare"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def shown(output: str) -> list[list[str]]:
    """The words of every command that the demo showed, behind `cxr-cache`."""
    return [shlex.split(line)[1:] for line in re.findall(r"^ *\$ (cxr-cache .*)$", output, re.M)]


class Fake:
    """Commands that only leave the folder or file, and the manifest, that the real ones leave."""

    def __init__(self) -> None:
        self.taken: list[list[str]] = []
        self.stops_at = ""

    def __call__(self, words: list[str]) -> None:
        self.taken.append(words)
        options = {"extract": "--store", "train": "--run-dir", "finetune": "--run-dir"}
        place = Path(words[words.index(options.get(words[0], "--out")) + 1])
        with recording(words):
            if place.suffix in (".h5", ".html"):
                place.touch()
            else:
                place.mkdir(parents=True, exist_ok=True)
            mark_written(place)
            if words[0] == self.stops_at:
                raise KeyboardInterrupt

    @property
    def verbs(self) -> list[str]:
        return [words[0] for words in self.taken]


@pytest.fixture
def fake(monkeypatch) -> Fake:
    commands = Fake()
    figures = {"first": 0.5, "second": 0.6, "difference": 0.1, "low": 0.05, "high": 0.15}
    monkeypatch.setattr("cxr_cache.cli.use._run_command", commands)
    monkeypatch.setattr(demo, "_tested", lambda folder: f"{folder.name} tested")
    monkeypatch.setattr(demo, "_read_macro", lambda folder: figures)
    return commands


def test_it_runs_what_it_shows_and_keeps_what_is_finished(fake, tmp_path):
    command = ["demo", tmp_path / "demo", "--studies", 4]

    first = invoke(*command).output
    assert shown(first)[:-3] == fake.taken  # the last three are for the user's own data
    assert fake.verbs == STEPS
    again = invoke(*command).output

    assert again.count("finished before, and kept") == 6
    assert fake.verbs[len(STEPS) :] == ["report", "compare", "compare"]


def test_ctrl_c_says_what_is_done_and_the_same_command_goes_on(fake, tmp_path):
    folder = tmp_path / "demo"
    command = ["demo", folder, "--studies", 4, "--seed", 3]
    fake.stops_at = "finetune"

    stopped = invoke(*command)

    assert stopped.exit_code == 130
    assert "Done: phantoms drawn, features.h5 extracted, frozen head. The same" in stopped.output
    assert f"cxr-cache demo {folder} --studies 4 --seed 3\n" in stopped.output
    fake.stops_at, fake.taken = "", []
    went_on = invoke(*command)
    assert fake.verbs == STEPS[2:]
    assert "--overwrite" not in fake.taken[0]  # the fine-tuning continues after its last epoch
    assert went_on.exit_code == 0


def test_runs_of_other_options_are_made_anew_and_all_that_rests_on_them(
    fake, tmp_path, monkeypatch
):
    command = ["demo", tmp_path / "demo", "--studies", 4]
    invoke(*command)
    fake.taken = []
    monkeypatch.setattr(demo, "FROZEN", ("--epochs", "1"))

    output = invoke(*command).output

    assert fake.verbs == STEPS[1:]
    assert all(words[-1] == "--overwrite" for words in fake.taken[:2])
    assert shown(output)[1:-3] == fake.taken


def test_another_number_of_studies_does_not_mix_with_the_first(fake, tmp_path):
    invoke("demo", tmp_path / "demo", "--studies", 4)
    refused = invoke("demo", tmp_path / "demo", "--studies", 5)
    assert refused.exit_code == 1
    assert "would mix with them" in refused.output


@pytest.mark.parametrize(
    ("own", "other", "says"),
    [
        ((0.6, 0.5, 0.7), (0.3, 0.2, 0.4), ["better", r"\+0.600, \+0.300 \(50%\) is left"]),
        (
            (0.6, 0.5, 0.7),
            (0.1, -0.1, 0.3),
            ["better", "hospital's no difference is shown"],
        ),
        ((0.1, -0.1, 0.3), (0.3, 0.2, 0.4), ["images no difference is shown", "hospital's .*bett"]),
        ((-0.3, -0.4, -0.2), (0.0, float("nan"), float("nan")), ["worse", "no interval"]),
    ],
)
def test_the_words_follow_the_intervals(own, other, says):
    def figures(difference: float, low: float, high: float) -> dict[str, float]:
        both = {"first": 0.2, "second": 0.2 + difference}
        return both | {"difference": difference, "low": low, "high": high}

    text = "\n".join(demo.describe(figures(*own), figures(*other)))

    for words in says:
        assert re.search(words, text), text
    assert ("is left" in text) == ("is left" in "".join(says))


@pytest.mark.parametrize("has_browser", [True, False])
def test_open_shows_the_page_or_says_where_it_is(fake, tmp_path, monkeypatch, has_browser):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda uri: opened.append(uri) or has_browser)

    output = invoke("demo", tmp_path / "demo", "--studies", 2, "--open").output

    page = tmp_path / "demo" / "comparison.html"
    assert opened == [page.as_uri()]
    assert (f"Open this file in one: {page}" in output) != has_browser


@pytest.mark.slow
def test_all_of_it(tmp_path, monkeypatch):
    """With fewer of the epochs that make its figures worth looking at."""
    monkeypatch.setattr(demo, "FROZEN", ("--epochs", "1,2", "--batch-size", "32"))
    monkeypatch.setattr(demo, "TUNED", (*demo.TUNED, "--epochs", "1"))
    folder = tmp_path / "demo"

    result = invoke("demo", folder, "--studies", 40)

    assert result.exit_code == 0, result.output
    assert "RANDOM WEIGHTS" in result.output
    assert [words[0] for words in shown(result.output)[:-3]] == STEPS
    assert shown((folder / "log.txt").read_text()) == shown(result.output)[:-3]
    table = pd.read_csv(folder / "external" / "compared" / "comparison.csv")
    macro = table[table["finding"].isna() & (table["measure"] == "auroc")].iloc[0]
    assert f"other hospital's: frozen {macro['first']:.3f}, fine-tuned {macro['second']:.3f}" in (
        result.output
    )
    assert b"data:image/jpeg" in (folder / "comparison.html").read_bytes()
    assert read_manifest(folder / "frozen")[-1]["command_line"] == shlex.join(
        ["cxr-cache", *shown(result.output)[1]]
    )
