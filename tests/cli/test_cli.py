"""The commands as a person types them: what they print, what they refuse, how they end."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from cxr_cache.cli.main import cli
from cxr_cache.config import TrainConfig
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.errors import TrainingError

ROOT = Path(__file__).resolve().parents[2]
ENCODER = "random:test_vit"
QUICK = ["--epochs", "1,2", "--folds", "2", "--batch-size", "16", "--lr", "1e-3"]
QUICK += ["--calibration", "none"]  # so that predict says what the tables say


@contextmanager
def without_pages() -> Iterator[None]:
    """Pages take seconds, and are not what every test has in mind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cxr_cache.report.report.write_report", lambda run: run.report_path)
        yield


@pytest.fixture
def undrawn() -> Iterator[None]:
    with without_pages():
        yield


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refuse(*arguments: object) -> str:
    """The one message of a command that the user can fix."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), "a traceback instead of a message"
    assert result.output.count("Error: ") == 1
    return result.output


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_phantoms(folder / "phantoms", n_studies=40, image_size_px=96)
    return folder / "phantoms"


@pytest.fixture(scope="module")
def store(data) -> Path:
    path = data.parent / "features.h5"
    succeed(*extraction(data, path))
    return path


@pytest.fixture(scope="module")
def run(store) -> Path:
    path = store.parent / "run"
    succeed("train", store, "--run-dir", path, *QUICK)
    return path


def extraction(data: Path, store: Path) -> list[object]:
    images = data / "images"
    options: list[object] = ["--csv-dir", data, "--image-dir", images, "--store", store]
    return ["extract", *options, "--model", ENCODER, "--num-workers", 0]


# ----------------------------------------------------------------------- help and misuse


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_explains_itself(command):
    output = succeed(command, "--help")
    assert cli.commands[command].help.splitlines()[0] in output


def test_help_lists_every_command_and_says_what_this_is_not_for():
    output = succeed("--help")
    assert "Not for clinical use" in output
    one_line = " ".join(output.split())
    for name, command in cli.commands.items():
        assert f"{name} {command.help.splitlines()[0]}" in one_line


def test_options_of_train_default_to_its_config():
    command = cli.commands["train"]
    with command.make_context("train", ["x.h5", "--run-dir", "run"]) as context:
        parsed = {name: context.params[name] for name in vars(TrainConfig())}
    assert TrainConfig(**parsed) == TrainConfig()


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["train"],
        ["train", "x.h5", "--run-dir", "r", "--epochs", "many"],
        ["train", "x.h5", "--run-dir", "r", "--loss", "hinge"],
        ["extract", "--csv-dir", "x"],
        ["predict", "run"],
    ],
)
def test_misuse_ends_with_status_2(arguments):
    assert invoke(*arguments).exit_code == 2


def test_options_can_come_from_the_environment(store, tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_CACHE_TRAIN_EPOCHS", "0")
    assert "--epochs must be 1 or more" in refuse("train", store, "--run-dir", tmp_path / "r")


def test_several_bad_options_are_named_at_once(store, tmp_path):
    bad = ["--folds", 1, "--dropout", 1.5, "--batch-size", 1]
    output = refuse("train", store, "--run-dir", tmp_path / "r", *bad)
    for option in ("--folds", "--dropout", "--batch-size"):
        assert option in output


# ----------------------------------------------------------------------- looking


def test_describe_prints_counts_and_json_says_the_same(data, tmp_path):
    csv_dir, images = ["--csv-dir", data], ["--image-dir", data / "images"]
    text = succeed("describe", *csv_dir, *images)
    numbers = json.loads(succeed("describe", *csv_dir, *images, "--json"))
    assert f"{numbers['images']:,} images of {numbers['studies']:,} studies" in text
    assert numbers["missing_files"] == 0
    by_name = {row["finding"]: row for row in numbers["findings"]}
    row = by_name["Cardiomegaly"]
    assert re.search(rf"Cardiomegaly\s+{row['images']}\s+{row['studies']}\s+", text)

    plot = tmp_path / "classes.png"
    succeed("describe", *csv_dir, "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_describe_reproduces_the_published_counts(shared_data):
    assert "35 of 35 as published" in succeed("describe", "--csv-dir", shared_data / "indiana_csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["describe", "--csv-dir", "nowhere"], "nowhere is not a folder"),
        (["describe", "--csv-dir", "x", "--format", "indianna"], "Did you mean indiana?"),
        (["inspect", "nowhere.h5"], "no feature store at nowhere.h5"),
        (["train", "nowhere.h5", "--run-dir", "r"], "no feature store at nowhere.h5"),
        (["evaluate", "nowhere"], "nowhere is not a run folder"),
        (["report", "nowhere"], "nowhere is not a run folder"),
        (["predict", "nowhere", "a.png"], "nowhere is not a run folder"),
    ],
)
def test_wrong_paths_are_one_message(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refuse(*arguments)
    assert not list(tmp_path.iterdir()), "a refused command left something behind"


# ----------------------------------------------------------------------- the main job


def test_extract_twice_computes_once(data, store):
    output = succeed(*extraction(data, store))
    assert "nothing was left to compute" in output
    assert re.search(r"(\d+) images = \1 done \+ 0 failed \+ 0 pending", output)


def test_extract_takes_the_encoder_that_the_store_records(data, store, tmp_path):
    """Adding tokens to a store must not ask for its encoder, nor go for the default one."""
    path = shutil.copy(store, tmp_path / "f.h5")
    command = ["extract", "--csv-dir", data, "--image-dir", data / "images", "--store", path]
    output = succeed(*command, "--tokens", "--num-workers", 0)
    assert re.search(r"(\d+) images = \1 done \+ 0 failed \+ 0 pending", output)
    assert "encoder" in refuse(*command, "--tokens", "--model", f"{ENCODER}:7")


def test_extract_warns_of_random_weights(data, tmp_path):
    assert "RANDOM WEIGHTS" in succeed(*extraction(data, tmp_path / "f.h5"), "--limit", 4)


def test_a_shorter_table_does_not_drop_finished_images(data, store):
    """One trial with --limit must not cost hours of extraction."""
    before = store.read_bytes()
    output = refuse(*extraction(data, store), "--limit", 5)
    assert "finished images that this run's table of 5 leaves out" in output
    assert store.read_bytes() == before


def test_inspect_fits_a_screen(store):
    output = succeed("inspect", store)
    assert len(output.splitlines()) <= 50
    assert "RANDOM WEIGHTS" in output
    assert "digests   all" in output
    numbers = json.loads(succeed("inspect", store, "--json"))
    assert numbers["done"] == numbers["images"]


def test_too_many_failures_end_with_1_and_keep_the_rest(data, tmp_path):
    broken = tmp_path / "phantoms"
    shutil.copytree(data, broken)
    victims = sorted((broken / "images").iterdir())[:3]
    for victim in victims:
        victim.write_bytes(b"<html>")
    command = extraction(broken, tmp_path / "f.h5")
    output = refuse(*command, "--max-failures", 2, "--batch-size", 8)
    assert "3 images failed, more than the 2 tolerated" in output
    assert victims[0].name in output

    output = succeed(*command, "--max-failures", 3)
    assert "3 failed + 0 pending" in output


def test_train_writes_a_whole_run_and_prints_what_it_found(run):
    expected = {
        "config.json splits.csv targets.csv epoch_search.csv history.csv model.safetensors",
        "fold_heads.safetensors training_distribution.safetensors manifest.json",
        "predictions.csv out_of_fold.csv logistic.csv metrics.json per_finding.csv plots",
        "report.html model_card.md flow.csv label_counts.csv decision_curves.csv test_reads.json",
        "per_finding_by_study.csv subgroups.csv group_differences.csv curves.csv calibration.csv",
    }
    assert {path.name for path in run.iterdir()} == set(" ".join(expected).split())
    output = succeed("evaluate", run, "--resamples", 100)
    assert "macro AUROC" in output
    assert "predicting nothing scores" in output
    assert "Report: " in succeed("report", run)


def test_report_shows_pictures_and_puts_runs_on_one_page(run, data, tmp_path):
    twin = shutil.copytree(run, tmp_path / "twin")
    images, page = data / "images", tmp_path / "page.html"
    before = "data:image/jpeg" in (run / "report.html").read_text()

    succeed("report", twin, "--image-dir", images, "--license", "apache-2.0")
    assert not before
    assert "data:image/jpeg" in (twin / "report.html").read_text()
    assert "license: apache-2.0" in (twin / "model_card.md").read_text()
    output = succeed("report", run, twin, "--out", page, "--resamples", 20)
    assert output.endswith(f"Report: {page}\n")

    assert "is not a folder" in refuse("report", run, "--image-dir", tmp_path / "nowhere")
    assert "holds none of the" in refuse("report", run, "--image-dir", data)
    assert "A run is given twice" in refuse("report", run, run, "--out", page)
    (tmp_path / "notes.txt").write_text("mine")
    assert "choose another name" in refuse("report", run, twin, "--out", tmp_path / "notes.txt")


def test_thresholds_and_calibration_are_chosen_while_training_or_afterwards(store, tmp_path):
    """The same choice by either way, and on no other predictions than the run's own."""
    early, late = tmp_path / "early", tmp_path / "late"
    choice = ("--threshold-rule", "youden", "--calibration", "platt")
    output = succeed("train", store, "--run-dir", early, *QUICK, *choice)
    assert "calibration     platt: micro log loss" in output
    succeed("train", store, "--run-dir", late, *QUICK)

    output = succeed("evaluate", late, *choice, "--resamples", 20)

    assert "thresholds      youden" in output
    metrics = [json.loads((path / "metrics.json").read_text()) for path in (early, late)]
    for ours, theirs in zip(metrics[0]["test"].values(), metrics[1]["test"].values(), strict=True):
        assert ours["value"] == pytest.approx(theirs["value"], abs=1e-6)
    assert metrics[0]["calibration"]["method"] == "platt"
    output = refuse("evaluate", late, "--threshold-rule", "best")
    assert "'best' is no rule; it is one such as f1, youden, sensitivity=0.9" in output
    assert "'best' is no rule" in refuse(
        "train", store, "--run-dir", tmp_path / "no", "--threshold-rule", "best"
    )
    misuse = CliRunner().invoke(cli, ["evaluate", str(late), "--store", str(store), *choice])
    assert misuse.exit_code == 2
    assert "never on another store" in misuse.output


@pytest.fixture(scope="module")
def sexes(run, tmp_path_factory) -> Path:
    uids = pd.read_csv(run / "predictions.csv", dtype=str)["study_uid"].unique()
    path = tmp_path_factory.mktemp("groups") / "sexes.csv"
    table = pd.DataFrame({"study_uid": uids, "sex": np.where(np.arange(len(uids)) % 2, "F", "M")})
    table.to_csv(path, index=False)
    return path


def groups_of(run: Path) -> dict[str, dict[str, Any]]:
    return json.loads((run / "metrics.json").read_text())["test_by_group"]


def test_groups_come_from_a_table_and_stay_with_the_run(run, sexes, tmp_path):
    run = Path(shutil.copytree(run, tmp_path / "run"))
    assert groups_of(run) == {}
    succeed("evaluate", run, "--groups", sexes, "--resamples", 10)
    assert groups_of(run)["sex"].keys() == {"F", "M"}
    succeed("evaluate", run, "--threshold-rule", "youden", "--resamples", 0)
    assert groups_of(run)["sex"].keys() == {"F", "M"}
    assert "cannot be read" in refuse("evaluate", run, "--groups", tmp_path / "absent.csv")


def test_training_takes_groups_and_refuses_a_broken_table_first(store, sexes, tmp_path):
    path = tmp_path / "run"
    broken, strange = tmp_path / "broken.csv", tmp_path / "strange.csv"
    broken.write_text("study_uid\n1\n")
    strange.write_text("study_uid,sex\nnobody,F\n")
    command = ["train", store, "--run-dir", path, *QUICK, "--groups"]
    assert "needs a column image_id or study_uid" in refuse(*command, broken)
    assert not path.exists()
    output = refuse(*command, strange)
    assert "has no row for any of the" in output
    assert f"{path} is trained; what is left to do:\ncxr-cache evaluate {path}" in output

    succeed(*command, sexes, "--overwrite")
    assert groups_of(path)["sex"].keys() == {"F", "M"}


def test_fine_tuning_takes_over_the_groups_of_the_run_it_starts_from(
    with_tokens, run, sexes, tmp_path
):
    frozen = Path(shutil.copytree(run, tmp_path / "frozen"))
    succeed("evaluate", frozen, "--groups", sexes, "--resamples", 0)
    path = tmp_path / "run"
    succeed("finetune", with_tokens, "--run-dir", path, "--from-run", frozen, *TUNING)
    assert groups_of(path)["sex"].keys() == {"F", "M"}


@pytest.mark.parametrize("command", ["evaluate", "compare", "zero-shot", "verify", "demo"])
def test_a_seed_below_zero_is_refused_by_name(command, tmp_path):
    arguments = ["y"] if command == "compare" else []
    output = refuse(command, tmp_path / "x", *arguments, "--seed", "-1")
    assert "--seed must not be negative, not -1." in output


def test_a_finished_run_is_not_replaced_unasked(store, run):
    before = (run / "model.safetensors").read_bytes()
    assert "--overwrite" in refuse("train", store, "--run-dir", run, *QUICK)
    assert (run / "model.safetensors").read_bytes() == before


def test_a_run_scores_on_another_store(store, run, tmp_path):
    out = tmp_path / "external.json"
    output = succeed("evaluate", run, "--store", store, "--out", out, "--resamples", 50)
    assert re.search(r"Warning: (\d+) of the \1 images belong to the run's own data", output)
    assert "macro AUROC" in output
    assert json.loads(out.read_text())["test"]["macro_auroc"]["value"] is not None


def test_predict_prints_a_table_or_writes_a_csv(run, data, tmp_path):
    images = sorted((data / "images").iterdir())[:3]
    assert str(images[0]) in succeed("predict", run, *images)

    out = tmp_path / "predictions.csv"
    succeed("predict", run, *images, "--out", out)
    table = pd.read_csv(out).set_index("image")
    stored = pd.read_csv(run / "predictions.csv").set_index("image_id")
    for image in images:  # the same images, through the whole pipeline again
        np.testing.assert_allclose(
            table.loc[str(image), "Cardiomegaly"], stored.loc[image.name, "Cardiomegaly"], atol=1e-5
        )


def test_predict_names_files_that_cannot_be_used(run, data, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    good = next(iter(sorted((data / "images").iterdir())))
    output = refuse("predict", run, good, broken)
    assert "not usable: " in output
    assert "1 of 2 images could not be used" in output


def test_predict_says_early_what_it_cannot_do(run, data, tmp_path):
    assert "no files" in refuse("predict", run, tmp_path)
    image = next((data / "images").iterdir())
    assert "not a folder" in refuse("predict", run, image, "--out", tmp_path / "no" / "p.csv")


def test_predict_refuses_another_encoder(run, data):
    image = next((data / "images").iterdir())
    output = refuse("predict", run, image, "--model", f"{ENCODER}:7")
    assert "another encoder" in output
    assert "weights_sha256" in output


def test_imported_features_train_and_cannot_predict(data, tmp_path, undrawn):
    ids = pd.read_csv(data / "indiana_projections.csv")["filename"].to_numpy(dtype=str)
    features = np.random.default_rng(0).normal(size=(len(ids), 24)).astype(np.float16)
    np.savez(tmp_path / "features.npz", image_id=ids, embeddings=features)
    store, run = tmp_path / "mine.h5", tmp_path / "run"
    command = ["import", tmp_path / "features.npz", "--csv-dir", data, "--store", store]
    assert "embeddings are 24 wide" in succeed(*command)
    assert "--overwrite" in refuse(*command)
    succeed("train", store, "--run-dir", run, *QUICK)
    image = next((data / "images").iterdir())
    assert "cxr-cache evaluate" in refuse("predict", run, image)


# ----------------------------------------------------------------------- fine-tuning

TUNING = [
    *("--epochs", "2", "--batch-size", "16", "--lr", "1e-3", "--precision", "fp32"),
    *("--device", "cpu"),
]


@pytest.fixture(scope="module")
def with_tokens(data, store) -> Path:
    """The store of before, given its tokens."""
    path = Path(shutil.copy(store, data.parent / "tokens.h5"))
    output = succeed(*extraction(data, path), "--tokens")
    assert re.search(r"tokens.h5 takes .* MB \(tokens .* MB\); .* GB are free\.", output)
    return path


@pytest.fixture(scope="module")
def tuned(with_tokens, run) -> Path:
    path = with_tokens.parent / "tuned"
    command = ["finetune", with_tokens, "--run-dir", path, "--from-run", run, *TUNING]
    with without_pages():
        output = succeed(*command)
    assert "Training 83,456 parameters of visual.trunk.blocks.4, visual.trunk.blocks.5" in output
    assert "RANDOM WEIGHTS" in output
    assert re.search(r"run +tuned +difference\n  macro AUROC  ", output)
    return path


def test_a_fine_tuned_run_is_used_as_any_other(tuned, with_tokens, data, tmp_path):
    image = next(iter(sorted((data / "images").iterdir())))
    out = tmp_path / "predictions.csv"
    succeed("predict", tuned, image, "--out", out)
    stored = pd.read_csv(tuned / "predictions.csv").set_index("image_id")
    predicted = pd.read_csv(out).set_index("image").loc[str(image), "Cardiomegaly"]
    assert predicted == pytest.approx(stored.loc[image.name, "Cardiomegaly"], abs=2e-4)
    output = succeed("evaluate", tuned, "--store", with_tokens, "--resamples", 20)
    assert "belong to the run's own data" in output
    assert "Report: " in succeed("report", tuned)


def test_compare_prints_paired_differences(run, tuned, with_tokens, tmp_path, undrawn):
    output = succeed("compare", run, tuned, "--resamples", 50)
    assert re.search(r"macro AUROC .* [+-]0\.\d+ \[[+-]0\.\d+, [+-]0\.\d+\]", output)
    other = tmp_path / "other"
    succeed("train", with_tokens, "--run-dir", other, *QUICK, "--seed", 1)
    assert "Only runs with the same split can be compared" in refuse("compare", run, other)
    folder = tmp_path / "comparison"
    output = succeed("compare", run, tuned, "--resamples", 20, "--out", folder)
    assert f"{folder / 'comparison.png'} written" in output
    assert pd.read_csv(folder / "comparison.csv")["against"].unique().tolist() == [run.name]
    assert CliRunner().invoke(cli, ["compare", str(run)]).exit_code == 2


def test_fine_tuning_refuses_in_one_message(store, with_tokens, tuned, tmp_path):
    path = tmp_path / "run"
    command = ["finetune", store, "--run-dir", path, *TUNING]
    assert "has no tokens to train from. Add them with" in refuse(*command)
    command[1] = with_tokens
    assert "unfreeze_layers: 2 in the store, 3 in this run" in refuse(
        *command, "--unfreeze-layers", 3
    )
    assert "is a run of `cxr-cache finetune`" in refuse(*command, "--from-run", tuned)
    assert "--accumulate must be 1 or more" in refuse(*command, "--accumulate", 0)
    assert "--crop-scale must lie in (0, 1]" in refuse(*command, "--crop-scale", 2)
    assert not path.exists()


def test_fine_tuning_takes_over_how_a_run_is_read(with_tokens, run, tmp_path, monkeypatch):
    """Unless the command line says otherwise, be it the default that it says."""
    configs = []

    def refuse_to_train(_store, _run_dir, config, **_):
        configs.append(config)
        raise TrainingError("seen enough")

    monkeypatch.setattr("cxr_cache.jobs.runs.tune_run", refuse_to_train)
    frozen = Path(shutil.copytree(run, tmp_path / "frozen"))
    succeed("evaluate", frozen, "--threshold-rule", "youden", "--calibration", "platt")
    command = ["finetune", with_tokens, "--run-dir", tmp_path / "run", "--from-run", frozen]
    for choice in ((), ("--threshold-rule", "f1"), ("--calibration", "none")):
        assert "seen enough" in refuse(*command, *choice)

    chosen = [(config.threshold_rule, config.calibration) for config in configs]
    assert chosen == [("youden", "platt"), ("f1", "platt"), ("youden", "none")]


def test_ctrl_c_keeps_the_finished_epochs(with_tokens, tmp_path):
    """The real process, the real signal; the same command continues."""
    path = tmp_path / "run"
    command = [sys.executable, "-m", "cxr_cache", "finetune", str(with_tokens)]
    command += ["--run-dir", str(path), *TUNING[2:], "--epochs", "300"]
    # Whoever starts the tests in the background has Ctrl-C ignored, and children inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    try:
        deadline = time.monotonic() + 120
        while not list(path.glob("unfinished/*.pt")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "Stopped. What was finished is kept; the same command continues:" in said
    assert "Traceback" not in said
    assert list(path.glob("unfinished/fold-1-of-300-epochs.pt"))
    config = json.loads((path / "config.json").read_text())
    assert config["status"] == "running"


# ----------------------------------------------------------------------- the README


def test_commands_in_the_documentation_exist():
    """Each `cxr-cache COMMAND --option` in README and docs is one that this version has."""
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for line in re.findall(
            r"(?:^|`)cxr-cache ([a-z]+ [^`\n]*)", path.read_text(), re.MULTILINE
        ):
            command, *words = line.split("#")[0].split()
            assert command in cli.commands, f"{path.name}: {line}"
            known = {name for option in cli.commands[command].params for name in option.opts}
            used = {word.split("=")[0] for word in words if word.startswith("--")}
            assert used <= known | {"--help"}, f"{path.name}: {line}"


def test_the_file_tree_of_the_readme_is_complete():
    text = (ROOT / "README.md").read_text()
    for module in (ROOT / "cxr_cache").glob("[a-z]*.py"):
        name = "phantom_*.py" if module.stem.startswith("phantom_") else module.name
        assert name in text, f"{module.name} is missing from the README's file tree"
