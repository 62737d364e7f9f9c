"""Python and the command line do the same whole jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.config import TrainConfig
from cxr_cache.errors import ConfigError, JobStopped, RunError, TableError, TrainingError
from cxr_cache.jobs import runs
from cxr_cache.jobs.external import evaluate_on_store
from cxr_cache.jobs.runs import train_head
from cxr_cache.jobs.scoring import evaluate_run, refresh_report
from cxr_cache.models.run import Run
from cxr_cache.report.report import write_report
from tests import synthetic

CONFIG = TrainConfig(
    epochs=(1, 2), n_folds=2, batch_size=16, learning_rate=3e-3, hidden=(12, 8), n_jobs=1
)
QUICK = ["--epochs", "1,2", "--folds", "2", "--batch-size", "16", "--lr", "3e-3"]
QUICK += ["--hidden", "12x8", "--jobs", "1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return synthetic.make_store(tmp_path_factory.mktemp("s") / "s.h5", synthetic.make_cohort(40))


@pytest.fixture
def run(store, tmp_path) -> Run:
    return train_head(store, tmp_path / "run", CONFIG).run


def test_python_and_the_command_leave_the_same_finished_run(store, tmp_path):
    told: list[str] = []
    result = train_head(store, tmp_path / "python", CONFIG, tell=told.append)
    command = ["train", str(store), "--run-dir", str(tmp_path / "command"), *QUICK]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    ours, theirs = ({p.name for p in (tmp_path / n).iterdir()} for n in ("python", "command"))
    assert ours | {"manifest.json"} == theirs, "which only a command leaves"
    assert {"report.html", "model_card.md", "metrics.json", "plots"} <= ours
    for name in ("predictions.csv", "metrics.json", "per_finding.csv", "model.safetensors"):
        assert (tmp_path / "python" / name).read_bytes() == (
            tmp_path / "command" / name
        ).read_bytes()
    assert result.metrics == json.loads((tmp_path / "python" / "metrics.json").read_text())
    theirs = done.output.replace(str(tmp_path / "command"), str(tmp_path / "python"))
    said = [line for text in told for line in text.splitlines()]
    # The second run reads the same test split once more, and says so.
    assert [line for line in said if line not in theirs and "has been read" not in line] == []


def test_without_options_both_train_the_same_configuration(monkeypatch, store, tmp_path):
    seen = []

    def refuse(_store, _run_dir, config, **_):
        seen.append(config or TrainConfig())
        raise TrainingError("seen enough")

    monkeypatch.setattr("cxr_cache.jobs.runs.fit_run", refuse)
    with pytest.raises(TrainingError, match="seen enough"):
        train_head(store, tmp_path / "r")
    CliRunner().invoke(cli, ["train", str(store), "--run-dir", str(tmp_path / "r")])
    assert seen == [TrainConfig(), TrainConfig()]


def test_evaluating_anew_brings_page_and_card_up_to_date(run):
    write_report(run, license_id="apache-2.0", dataset_id="mine/films")
    page, card = run.report_path, run.path / "model_card.md"
    before = page.read_text()
    evaluate_run(run, threshold_rule="youden", calibration="platt", n_resamples=20)
    assert "youden" in page.read_text()
    assert page.read_text() != before
    assert "youden" in card.read_text()
    assert "license: apache-2.0" in card.read_text()
    assert "mine/films" in card.read_text()


def test_a_run_without_a_page_gets_none(run):
    run.report_path.unlink()
    assert refresh_report(run) is None
    assert not run.report_path.exists()


def test_options_of_evaluation_are_checked(run):
    with pytest.raises(ConfigError, match="n_resamples must not be negative, not -1"):
        evaluate_run(run, n_resamples=-1)


def test_groups_are_read_before_the_training(store, tmp_path):
    (tmp_path / "groups.csv").write_text("study_uid\n1\n")
    with pytest.raises(TableError, match="needs a column image_id or study_uid"):
        train_head(store, tmp_path / "run", CONFIG, groups=tmp_path / "groups.csv")
    assert not (tmp_path / "run").exists()


def test_what_is_left_to_do_is_said(store, tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise OSError(28, "No space left on device", "plots/a.png")

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    path = tmp_path / "run"
    left = f"{path} is trained; what is left to do:\ncxr-cache evaluate {path}\ncxr-cache report"
    monkeypatch.setattr(runs, "write_report", fail)
    with pytest.raises(RunError) as caught:
        train_head(store, path, CONFIG)
    assert str(caught.value).startswith(f"plots/a.png: No space left on device.\n{left}")
    monkeypatch.setattr(runs, "score_run", stop)
    with pytest.raises(JobStopped) as stopped:
        train_head(store, path, CONFIG, overwrite=True)
    assert str(stopped.value).startswith(left)
    result = CliRunner().invoke(
        cli, ["train", str(store), "--run-dir", str(path), *QUICK, "--overwrite"]
    )
    assert result.exit_code == 130
    assert f"Stopped. {left}" in result.output


def test_images_of_the_runs_own_are_warned_of(run, store, caplog):
    evaluation = evaluate_on_store(run, store, n_resamples=0)
    assert evaluation.metrics["test"]["macro_auroc"]["value"] is not None
    assert "80 of the 80 images are near-identical to images of the run's own data" in caplog.text


@pytest.mark.parametrize("wait_s", [0.3, pytest.param(3, marks=pytest.mark.slow)])
def test_ctrl_c_in_an_ablation_says_that_it_continues_and_nothing_else(tmp_path, wait_s):
    """The signal goes to all processes, as a terminal sends it, while they start or work."""
    store = synthetic.make_store(tmp_path / "s.h5", synthetic.make_cohort(150))
    command = [sys.executable, "-m", "cxr_cache", "ablate", str(store), "--out"]
    command += [
        str(tmp_path / "out"),
        "--set",
        "lr=1e-3,1e-4",
        "--epochs",
        "3000",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "finished").is_dir() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(wait_s)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    lines = [line for line in said.splitlines() if line and " folds (" not in line]
    assert lines[0] == "Stopped. What was finished is kept; the same command continues:"
    assert len(lines) == 2, said


def test_v_tells_what_is_read_trained_and_written(store, tmp_path, caplog):
    with caplog.at_level("INFO", logger="cxr_cache"):
        runs.fit_run(store, tmp_path / "run", CONFIG)
    assert f"{store}: 80 images on cpu, with TrainConfig(epochs=(1, 2)" in caplog.text
    assert "2 folds are trained for up to 2 epochs" in caplog.text
    assert f"{tmp_path / 'run' / 'predictions.csv'} is written" in caplog.text
