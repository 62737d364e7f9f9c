"""A manifest says of every command that wrote to a place how it was called, and how it ended."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.common import manifest
from cxr_cache.common.manifest import N_KEPT, mark_written, read_manifest, recording
from cxr_cache.models.run import Run
from cxr_cache.training.train import fit_run
from tests.synthetic import QUICK, make_cohort, make_store


def statuses(place: Path) -> list[tuple[str, str, int | None]]:
    return [(e["command"], e["status"], e["exit_status"]) for e in read_manifest(place)]


def test_an_entry_is_there_while_the_command_runs_and_says_how_it_ended(tmp_path):
    with recording(["-q", "train", "a store.h5"]):
        mark_written(tmp_path)
        assert statuses(tmp_path) == [("train", "running", None)], "a killed command stays running"
        mark_written(tmp_path)
    [entry] = read_manifest(tmp_path)
    assert entry["command_line"] == "cxr-cache -q train 'a store.h5'"
    assert entry["folder"] == str(Path.cwd())
    assert (entry["status"], entry["exit_status"]) == ("finished", 0)
    begun, ended = (datetime.fromisoformat(entry[name]) for name in ("started", "ended"))
    assert entry["seconds"] == pytest.approx((ended - begun).total_seconds(), abs=0.1)
    assert {"python", "torch", "numpy"} <= entry["versions"].keys()


@pytest.mark.parametrize(
    ("leaving", "status", "code"),
    [
        (SystemExit(0), "finished", 0),
        (SystemExit(3), "failed", 3),
        (SystemExit("a message"), "failed", 1),
        (SystemExit(143), "stopped", 143),
        (KeyboardInterrupt(), "stopped", 130),
        (ValueError(), "failed", 1),
    ],
)
def test_how_a_command_left_is_told(tmp_path, leaving, status, code):
    def leave() -> None:
        with recording(["extract"]):
            mark_written(tmp_path)
            raise leaving

    with pytest.raises(type(leaving)):
        leave()
    assert statuses(tmp_path) == [("extract", status, code)]


def test_the_manifest_of_a_file_lies_beside_it(tmp_path):
    store = tmp_path / "features.h5"
    store.touch()
    with recording(["merge"]):
        mark_written(store)
    assert (tmp_path / "features.h5.manifest.json").is_file()
    assert statuses(store) == [("merge", "finished", 0)]


def test_commands_follow_each_other_and_only_the_latest_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "N_KEPT", 3)
    for name in "abcde":
        with recording([name]):
            mark_written(tmp_path)
    assert [entry["command"] for entry in read_manifest(tmp_path)] == ["c", "d", "e"]
    assert N_KEPT == 100


def test_python_leaves_none_and_other_processes_of_a_job_neither(tmp_path, monkeypatch):
    mark_written(tmp_path)
    monkeypatch.setenv("RANK", "1")
    with recording(["finetune"]):
        mark_written(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_manifest_that_cannot_be_written_or_read_stops_nothing(tmp_path, caplog, monkeypatch):
    (tmp_path / manifest.FILE).write_text("{ damaged")
    assert read_manifest(tmp_path) == []

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_whole", fail)
    with recording(["train"]):
        mark_written(tmp_path)
    assert "manifest.json could not be written: [Errno 28] No space left" in caplog.text


def test_a_run_lists_its_commands_and_a_refused_one_leaves_no_trace(tmp_path, monkeypatch):
    """A run that is replaced begins a new list; one that is refused is not in it."""
    monkeypatch.setattr("cxr_cache.report.report.write_report", lambda run, **_: run.report_path)
    monkeypatch.setattr("cxr_cache.jobs.runs.write_report", lambda run, **_: run.report_path)
    store, run = tmp_path / "store.h5", tmp_path / "run"
    make_store(store, make_cohort(60))
    options = ["--epochs", "1", "--folds", "2", "--batch-size", "16", "--no-baseline"]
    train = ["train", str(store), "--run-dir", str(run), *options]

    def call(*words: str) -> int:
        return CliRunner().invoke(cli, list(words)).exit_code

    assert call(*train) == 0
    assert call("evaluate", str(run), "--resamples", "10") == 0
    assert call(*train) == 1, "there is a run already"
    assert call("evaluate", str(run), "--threshold-rule", "nonsense") == 1
    assert statuses(run) == [("train", "finished", 0), ("evaluate", "finished", 0)]
    assert call(*train, "--overwrite") == 0
    assert statuses(run) == [("train", "finished", 0)]
    assert json.loads((run / "config.json").read_text())["status"] == "finished"


def test_a_training_that_fails_half_way_says_so(tmp_path, monkeypatch):
    store, run = tmp_path / "store.h5", tmp_path / "run"
    make_store(store, make_cohort(60))
    monkeypatch.setattr(Run, "save_model", lambda *_: np.linalg.inv(np.zeros((2, 2))))
    options = ["--epochs", "1", "--folds", "2", "--batch-size", "16", "--no-baseline"]
    CliRunner().invoke(cli, ["train", str(store), "--run-dir", str(run), *options])
    assert statuses(run) == [("train", "failed", 1)]
    monkeypatch.undo()
    fit_run(store, run, QUICK)
    assert statuses(run) == [], "from Python, the list of the run of before is gone"
