"""Where the value of an option comes from: command line, environment, file, default."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.cli.options import Option, options_given, pick
from cxr_cache.cli.output import is_json
from cxr_cache.config import Config, FinetuneConfig, TrainConfig, kinds, option_of
from cxr_cache.errors import ConfigError

COMPAT = Path(__file__).resolve().parents[3] / "shared" / "compat" / "version_0.1.0"

EVERY_OPTION = [
    pytest.param(command, option, id=f"{command.name} {option.opts[-1]}")
    for command in cli.commands.values()
    for option in command.params
    if isinstance(option, click.Option) and option.name != "help"
]


def parse(command: str, *arguments: str) -> dict[str, Any]:
    """What a command would be called with, and which of it the user gave."""
    parent = click.Context(cli, info_name="cxr-cache", **cli.context_settings)
    context = cli.commands[command].make_context(command, list(arguments), parent)
    with context:
        given = options_given(context.params)
        as_json = is_json()
    return {"all": context.params, "given": given, "json": as_json}


def needed(command: click.Command) -> list[str]:
    """Arguments without which the command is refused."""
    words = []
    for param in command.params:
        if isinstance(param, click.Argument):
            words += ["x", "y"] if param.nargs == -1 else ["x"]
        elif param.required and param.name != "file_format":
            words += [param.opts[0], "x"]
        elif param.required:
            words += [param.opts[0], "onnx"]
    return words


def example(option: click.Option) -> tuple[str, Any]:
    """A value other than the default, as it is typed, and as the command gets it."""
    if option.is_flag:
        return ("no", False) if option.default is True else ("yes", True)
    inner = getattr(option.type, "inner", option.type)
    if isinstance(inner, click.Choice):
        other = next(choice for choice in inner.choices if choice != option.default)
        return other, (other,) if option.multiple else other
    if inner.name == "integers":
        separator = inner.separator
        return f"2{separator}3", (2, 3)
    if inner.name == "texts":
        return "this,that", ("this", "that")
    if isinstance(inner, click.Path):
        path = Path("somewhere")
        return "somewhere", (path,) if option.multiple else path
    text = {"integer": "7", "integer range": "7", "float": "0.5"}.get(inner.name, "text")
    value: Any = {"integer": 7, "integer range": 7, "float": 0.5}.get(inner.name, "text")
    return text, (value,) if option.multiple else value


@pytest.mark.parametrize(("command", "option"), EVERY_OPTION)
def test_every_option_answers_to_its_environment_variable(command, option, monkeypatch, tmp_path):
    text, expected = example(option)
    variable = f"CXR_CACHE_{command.name}_{option.opts[-1].lstrip('-')}".replace("-", "_").upper()
    if option.name == "config":
        (tmp_path / "c.json").write_text("{}")
        text = str(tmp_path / "c.json")
    words = needed(command)
    if option.required:
        at = words.index(option.opts[0])
        del words[at : at + 2]
    monkeypatch.setenv(variable, text)
    parsed = parse(command.name, *words)
    if option.name == "json":  # which no command gets: it says how results are written
        assert parsed["json"]
    elif option.name != "config":
        assert parsed["all"][option.name] == expected
        assert option.name in parsed["given"]


@pytest.mark.parametrize(("command", "option"), EVERY_OPTION)
def test_every_help_text_is_a_sentence_for_a_newcomer(command, option):
    text = (option.help or "").split("  [default:")[0]
    assert text.endswith("."), text
    assert len(text.split()) >= 3
    assert text[0].isupper()
    assert not text.startswith("Of ")
    assert isinstance(option, Option), "has no environment variable of its flag's name"


@pytest.mark.parametrize("command", cli.commands.values(), ids=str)
def test_every_command_is_described_in_sentences(command):
    assert all(part.strip().endswith((".", "...)")) for part in command.help.split("\n\n"))


def test_the_negative_flag_and_the_spelling_of_before_have_variables_too(monkeypatch):
    monkeypatch.setenv("CXR_CACHE_TRAIN_NO_FLIP", "1")
    monkeypatch.setenv("CXR_CACHE_TRAIN_LEARNING_RATE", "0.25")
    parsed = parse("train", "x", "--run-dir", "r")["all"]
    assert (parsed["flip"], parsed["learning_rate"]) == (False, 0.25)
    monkeypatch.setenv("CXR_CACHE_TRAIN_NO_FLIP", "0")
    assert parse("train", "x", "--run-dir", "r")["all"]["flip"] is True


def test_findings_in_a_variable_may_have_spaces(monkeypatch):
    monkeypatch.setenv("CXR_CACHE_EXPLAIN_FINDING", "Pleural Effusion;Mass")
    parsed = parse("explain", "run", "a.png", "--out", "o")["all"]
    assert parsed["findings"] == ("Pleural Effusion", "Mass")


@pytest.mark.parametrize("made", [TrainConfig, FinetuneConfig])
def test_a_command_without_options_is_its_config(made):
    command = "train" if made is TrainConfig else "finetune"
    parsed = parse(command, "x", "--run-dir", "r")
    assert made(**pick(made, parsed["all"])) == made()
    assert set(parsed["given"]) == {"stores", "run_dir"}


def test_help_shows_the_value_that_is_used_and_both_where_recipes_differ():
    shown = " ".join(CliRunner().invoke(cli, ["train", "--help"]).output.split())
    assert "[default: 0.001; reference: 2e-05]" in shown
    assert "[default: 5,10,20,30,50; reference: 30,50,75,90,100]" in shown
    assert "[default: 64; reference: 16]" in shown
    assert "[default: ensemble; reference: refit]" in shown


def test_no_option_of_a_config_is_declared_by_a_command_again():
    """Default and help of every field come from config.py."""
    for command, made in (("train", TrainConfig), ("finetune", FinetuneConfig)):
        options = {param.name: param for param in cli.commands[command].params}
        for of in fields(made):
            if not issubclass(kinds(made)[of.name].type, Config):
                assert options[of.name].help.startswith(option_of(of).help)
                assert options[of.name].default == of.default


# ----------------------------------------------------------------------- from a file

TOML = """
folds = 3
[train]
lr = 0.5
epochs = [2, 4]
hidden = "64x32"
clip = "none"
no-such = 1
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.toml", 'folds = 3\n[train]\nlr = 0.5\nepochs = [2, 4]\nclip = "none"\nflip = false\n'),
        ("c.yaml", "folds: 3\ntrain:\n  lr: 5e-1\n  epochs: [2, 4]\n  clip:\n  flip: no\n"),
        ("c.json", '{"n_folds": 3, "train": {"learning_rate": 0.5, "epochs": [2, 4], '
         '"max_grad_norm": null, "flip": false}}'),
    ],
)  # fmt: skip
def test_a_file_fills_what_was_not_given(name, text, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_text(text)
    monkeypatch.setenv("CXR_CACHE_TRAIN_FOLDS", "4")
    parsed = parse("train", "x", "--run-dir", "r", "--config", str(path), "--epochs", "7")
    values = TrainConfig(**pick(TrainConfig, parsed["given"]))
    assert (values.n_folds, values.learning_rate) == (4, 0.5)  # the variable; the file
    assert (values.epochs, values.max_grad_norm, values.flip) == ((7,), None, False)
    assert values.batch_size == TrainConfig.batch_size
    assert "flip" in parsed["given"]
    monkeypatch.delenv("CXR_CACHE_TRAIN_FOLDS")
    assert parse("train", "x", "--run-dir", "r", "--config", str(path))["all"]["n_folds"] == 3
    assert parse("train", "x", "--run-dir", "r", "--config", str(path), "--flip")["all"]["flip"]


def test_sections_of_other_commands_are_left_aside(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[finetune]\nlr = 0.25\n[train]\nlr = 0.5\n[zero-shot]\nseed = 3\n")
    parsed = parse("finetune", "x", "--run-dir", "r", "--config", str(path))
    assert parsed["all"]["learning_rate"] == 0.25
    assert parse("zero-shot", "x", "--config", str(path))["all"]["seed"] == 3


def test_required_options_and_lists_can_stand_in_a_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('run-dir = "r"\n')
    assert parse("train", "x", "--config", str(path))["all"]["run_dir"] == Path("r")
    path.write_text('out = "o"\nset = ["lr=1,2", "hidden=64"]\n')
    assert parse("ablate", "x", "--config", str(path))["all"]["varied"] == ("lr=1,2", "hidden=64")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.toml", b"learning-rat = 1", "train has no option 'learning-rat'. Did you mean l"),
        ("c.toml", b"zzzz = 1", "has no option 'zzzz'. `cxr-cache train --help` lists them."),
        ("c.toml", b"lr = 1\nfolds = \n", "c.toml cannot be read: .* .at line 2, column 9."),
        ("c.yaml", b"lr: 1\nfolds: [\n", "c.yaml cannot be read: .*line 3, column 1"),
        ("c.json", b'{"lr": 1,\n}', "c.json cannot be read: .* line 2 column 1"),
        ("c.json", b"[1]", "holds no options; write them as a table"),
        ("c.toml", b"lr = 1\n# \xe9\n", "c.toml, line 2: this is not UTF-8"),
        ("c.ini", b"lr = 1", "the ending of a file of options is one of .toml, .yaml"),
        ("c.toml", b"lr = 1\nlearning_rate = 2\n", "learning_rate is given twice"),
        ("c.toml", b"[lr]\na = 1\n", "lr is a table; give it a value"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_one_message(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        parse("train", "x", "--run-dir", "r", "--config", str(path))


def test_a_wrong_value_names_its_option_and_its_file(tmp_path):
    path = tmp_path / "c.toml"
    for text, message in (("folds = 2.5", "'--folds'"), ("loss = 'hinge'", "'--loss'")):
        path.write_text(text)
        result = CliRunner().invoke(cli, ["train", "x", "--run-dir", "r", "--config", str(path)])
        assert result.exit_code == 2
        assert message in result.output
        assert f"It stands in {path}." in " ".join(result.output.split())
    missing = CliRunner().invoke(cli, ["train", "x", "--run-dir", "r", "--config", "no.toml"])
    assert missing.exit_code == 1
    assert "no.toml cannot be read: No such file or directory." in missing.output


@pytest.mark.skipif(not COMPAT.is_dir(), reason="needs the run folders of version 0.1.0")
@pytest.mark.parametrize(
    ("folder", "command", "made"),
    [("frozen", "train", TrainConfig), ("finetuned", "finetune", FinetuneConfig)],
)
def test_the_config_of_an_old_run_trains_the_same(folder, command, made):
    path = COMPAT / folder / "config.json"
    recorded = json.loads(path.read_text())
    parsed = parse(command, "x", "--run-dir", "r", "--config", str(path))
    config = made(**pick(made, parsed["given"]))
    now = json.loads(json.dumps(asdict(config)))
    assert {name: now[name] for name in recorded[command]} == recorded[command]
    added = {name: value for name, value in now.items() if name not in recorded[command]}
    # What came later has its default, or does nothing, as before: old stores give no split.
    expected: dict[str, Any] = {"split": "given", "level": "image"}
    expected |= {"min_positives": 0, "select_by": "macro", "within_one_se": False}
    if command == "train":
        expected |= {"baseline": True}
        expected |= {"protocol": "holdout", "n_outer_folds": None}
    if command == "finetune":  # or does nothing, as before
        expected |= {"layer_decay": 1.0, "mixup": 0.0, "ema_decay": 0.0, "patch_dropout": 0.0}
    assert added == expected
    started = (recorded.get("from_run") or {}).get("path")
    assert parsed["all"].get("from_run") == (COMPAT.absolute() / started if started else None)
    other = "finetune" if command == "train" else "train"
    with pytest.raises(ConfigError, match=f"is of a run of `cxr-cache {command}`, not of {other}"):
        parse(other, "x", "--run-dir", "r", "--config", str(path))


@pytest.mark.parametrize("made", [TrainConfig, FinetuneConfig])
def test_the_config_of_a_new_run_trains_the_same(made, tmp_path):
    command = "train" if made is TrainConfig else "finetune"
    changed = {"max_grad_norm": None, "early_stopping": 3, "hidden": (8,), "learning_rate": 3e-4}
    if made is FinetuneConfig:
        changed |= {"augmentation": {"crop_scale": 0.5, "rotation_deg": 5.0}, "half": True}
    config = made(**changed)
    recorded = {"format_version": 1, "kind": command, "store": {}, command: asdict(config)}
    recorded |= {"labels": {"path": "mine.csv", "sha256": "0"}}
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    parsed = parse(command, "x", "--run-dir", "r", "--config", str(tmp_path / "config.json"))
    assert made(**pick(made, parsed["given"])) == config
    assert parsed["all"]["labels"] == Path("mine.csv")
    assert "CXR_CACHE_TRAIN_LR" not in os.environ


@pytest.mark.parametrize("variable", ["CXR_CACHE_TRAIN_LR", "CXR_CACHE_TRAIN_LEARNING_RATE"])
def test_a_bad_value_of_a_variable_names_the_variable(variable, monkeypatch):
    monkeypatch.setenv(variable, "fast")
    with pytest.raises(
        click.BadParameter, match=f"It stands in the environment variable {variable}"
    ):
        parse("train", "x", "--run-dir", "r")


def test_paths_of_a_run_are_found_from_another_folder(monkeypatch, tmp_path):
    """A run records the paths that were typed, which were relative to where it was made."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "runs" / "first").mkdir(parents=True)
    (project / "runs" / "tuned").mkdir()
    elsewhere.mkdir()
    recorded = {
        "format_version": 1,
        "kind": "finetune",
        "store": {"path": "s.h5"},
        "finetune": {},
        "from_run": {"path": "runs/first"},
    }
    config = project / "runs" / "tuned" / "config.json"
    config.write_text(json.dumps(recorded))
    monkeypatch.chdir(elsewhere)
    given = parse("finetune", "s.h5", "--run-dir", "r", "--config", str(config))["given"]
    assert given["from_run"] == project / "runs" / "first"
    monkeypatch.chdir(project)
    given = parse("finetune", "s.h5", "--run-dir", "r", "--config", str(config))["given"]
    assert given["from_run"] == Path("runs/first")


@pytest.mark.parametrize("name", ["c.yaml", "c.toml"])
def test_a_file_of_comments_gives_nothing(name, tmp_path):
    (tmp_path / name).write_text("# lr: later\n")
    parsed = parse("train", "x", "--run-dir", "r", "--config", str(tmp_path / name))
    assert parsed["given"] == {"run_dir": Path("r"), "stores": (Path("x"),)}
