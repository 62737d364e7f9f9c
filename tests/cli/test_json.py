"""With --json, stdout of every command is JSON of its schema, and nothing else is on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cxr_cache.cli import main
from cxr_cache.cli.main import cli
from cxr_cache.common.plain import to_plain
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.models.run import Run
from tests.schemas import SCHEMAS, read_valid

SMALL = ["--epochs", "1,2", "--folds", "2", "--batch-size", "16", "--no-baseline"]
COMMANDS = {
    "describe": "describe --data {data}",
    "extract": "extract --data {data} --store new.h5 --model random:test_vit --num-workers 0",
    "features": "features {store} --out features.npz",
    "import": "import {npz} --data {data} --store imported.h5",
    "merge": "merge {part} --store merged.h5",
    "inspect": "inspect {store}",
    "verify": "verify {store}",
    "audit": "audit {store} --run-dir {run}",
    "browse": "browse {store} --run-dir {run} --out map.html",
    "similar": "similar {store} {image}",
    "train": "train {store} --run-dir run {small}",
    "finetune": "finetune {store} --run-dir tuned --from-run {run} --epochs 1 --batch-size 16 "
    "--unfreeze-layers 1",
    "ablate": "ablate {store} --out ablation --set lr=1e-3,1e-4 --set batch_size=8 "
    "--epochs 1 --folds 2 --no-baselines --workers 1",
    "evaluate": "evaluate {run} --resamples 20",
    "compare": "compare {run} {other} --resamples 20 --out compared",
    "report": "report {run}",
    "checklist": "checklist {run}",
    "methods": "methods {run}",
    "encoders": "encoders",
    "predict": "predict {run} {image}",
    "explain": "explain {run} {image} --finding Cardiomegaly --out maps",
    "export": "export {run} --format hub --out hub",
    "doctor": "doctor",
    "demo": "demo demo",
}
ELSEWHERE = {"zero-shot"}  # in tests/evaluation/test_zero_shot.py, which has a text tower


def run_command(line: str, **places: object) -> tuple[str, str]:
    """Stdout and stderr of a command that succeeds."""
    result = CliRunner().invoke(cli, line.format(small=" ".join(SMALL), **places).split())
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("json")
    named = {
        name: folder / file
        for name, file in {
            **{"data": "phantoms", "store": "store.h5", "part": "part.h5", "run": "run"},
            **{"other": "other", "npz": "features.npz"},
        }.items()
    }
    written = write_phantoms(named["data"], n_studies=24, image_size_px=64)
    named["image"] = min(written.image_dir.iterdir())
    extract = "extract --data {data} --model random:test_vit --num-workers 0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cxr_cache.jobs.runs.write_report", lambda run: run.report_path)
        run_command(f"{extract} --store {{store}} --tokens --unfreeze-layers 1", **named)
        run_command(f"{extract} --store {{part}} --part 1/1", **named)
        run_command("features {store} --out {npz}", **named)
        run_command("train {store} --run-dir {run} {small}", **named)
        run_command("train {store} --run-dir {other} --dropout 0.1 {small}", **named)
    return named


@pytest.mark.parametrize("command", sorted(cli.commands.keys() - ELSEWHERE))
def test_stdout_is_json_of_the_schema(command, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if command == "demo":  # its parts are tested in test_cli.py
        monkeypatch.setattr(
            "cxr_cache.cli.demo.run_demo", lambda folder, *_, **__: folder / "page.html"
        )
    for module in ("jobs.runs", "report.report"):  # pages take long, and are tested elsewhere
        monkeypatch.setattr(f"cxr_cache.{module}.write_report", lambda run, **_: run.report_path)
    if command == "export":
        monkeypatch.setattr(Run, "read_model_card", lambda _: "---\nlicense: mit\n---\n")
    stdout, _ = run_command(f"{COMMANDS[command]} --json", **places)
    read_valid(command, stdout)


def test_every_command_has_a_schema_and_the_option():
    assert SCHEMAS["commands"].keys() == cli.commands.keys() == COMMANDS.keys() | ELSEWHERE
    for command in cli.commands.values():
        assert any("--json" in param.opts for param in command.params), command.name


def test_a_schema_can_fail():
    """A schema that lets anything through would prove nothing."""
    jsonschema = pytest.importorskip("jsonschema")
    for command in SCHEMAS["commands"]:
        with pytest.raises(jsonschema.ValidationError):
            read_valid(command, '{"something": "else"}')


def test_json_says_what_the_text_says(places):
    said, _ = run_command("compare {run} {other} --resamples 20", **places)
    printed = json.loads(run_command("compare {run} {other} --resamples 20 --json", **places)[0])
    [macro] = [
        row
        for row in printed["differences"]
        if (row["finding"], row["measure"], row["rows"]) == ("", "auroc", "images")
    ]
    assert f"{macro['first']:.3f}" in said
    assert f"{macro['difference']:+.3f}" in said


def test_what_goes_wrong_leaves_stdout_empty(places):
    result = CliRunner().invoke(cli, ["evaluate", str(places["data"]), "--json"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "is not a run folder" in result.stderr


def test_numbers_that_are_not_finite_are_null():
    values = {"a": np.float32("nan"), "b": [float("inf"), np.array([1.5, -np.inf])], "c": True}
    assert to_plain(values) == {"a": None, "b": [None, [1.5, None]], "c": True}
    with pytest.raises(TypeError, match="object does not go into JSON"):
        to_plain(object())


def test_quiet_writes_results_and_warnings_alone(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = COMMANDS["extract"]
    loud = run_command(f"{line} --limit 2", **places)
    quiet = run_command(f"-q {line} --limit 3", **places)
    assert "encoder: random:test_vit" in loud[1]
    assert "2 images" in loud[0]
    assert "3 images" in quiet[0]
    assert "RANDOM WEIGHTS" in quiet[1], "a warning is not silenced"
    assert "encoder:" not in quiet[1]


def test_quiet_and_verbose_contradict_each_other():
    result = CliRunner().invoke(main.cli, ["-q", "-v", "encoders"])
    assert result.exit_code == 2
    assert "--quiet and --verbose" in result.output
