"""A callback of one's own, and trackers whose own readers read back what a training told."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.common import extras
from cxr_cache.jobs import tracking as tracking_module
from cxr_cache.jobs.runs import train_head
from cxr_cache.jobs.tracking import TRACKERS, tracking
from cxr_cache.models.run import Run
from cxr_cache.training.estimator import FocalHeadClassifier
from tests.synthetic import QUICK, make_cohort, make_store

OPTIONS = ["--epochs", "1,3", "--folds", "2", "--batch-size", "16", "--no-baseline"]
FINAL = ["--final", "refit"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tracked") / "store.h5"
    make_store(path, make_cohort(60))
    return path


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No pages, which take seconds, and no tracker of whoever runs the tests."""
    monkeypatch.setattr("cxr_cache.jobs.runs.write_report", lambda run, **_: run.report_path)
    for name in [*os.environ]:
        if name.startswith(("MLFLOW_", "WANDB_")):
            monkeypatch.delenv(name)


def train(store: Path, run: Path, *options: str) -> Any:
    words = ["train", str(store), "--run-dir", str(run), *OPTIONS, *FINAL, *options]
    return CliRunner().invoke(cli, words)


def history_of(run: Path) -> dict[str, pd.DataFrame]:
    """The rows of every training, by the name that trackers have for it."""
    history = Run.open(run).read_table("history")
    slugs = {"1": "fold-1-of-2", "2": "fold-2-of-2", "final": "final-model"}
    return {slugs[fold]: rows for fold, rows in history.groupby("fold")}


def check(told: dict[str, list[tuple[int, float]]], training: str, rows: pd.DataFrame) -> None:
    """The tracker has every finite number of history.csv, at its epoch, to float32."""
    for name in ("lr", "train_loss", "val_loss", "val_auroc"):
        finite = rows.dropna(subset=[name])
        expected = list(zip(finite["epoch"], finite[name], strict=True))
        found = told.get(f"{training}/{name}", [])
        assert [epoch for epoch, _ in found] == [epoch for epoch, _ in expected], name
        np.testing.assert_allclose([v for _, v in found], [v for _, v in expected], rtol=1e-6)


def test_tensorboards_own_reader_finds_every_epoch(store, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(store, tmp_path / "run", "--log-to", "tensorboard")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "run" / "logs" / "tensorboard"
    trainings = history_of(tmp_path / "run")
    assert {path.name for path in folder.iterdir()} == {*trainings, "test", "config"}
    for training, rows in trainings.items():
        reader = EventAccumulator(str(folder / training)).Reload()
        told = {
            f"{training}/{tag}": [(e.step, e.value) for e in reader.Scalars(tag)]
            for tag in reader.Tags()["scalars"]
        }
        check(told, training, rows)
    reader = EventAccumulator(str(folder / "test")).Reload()
    [figure] = reader.Scalars("macro_auroc")
    expected = Run.open(tmp_path / "run").metrics["test"]["macro_auroc"]["value"]
    assert figure.value == pytest.approx(expected, rel=1e-6)


def test_mlflows_own_reader_finds_every_epoch(store, tmp_path):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    result = train(store, tmp_path / "run", "--log-to", "mlflow")
    assert result.exit_code == 0, result.output
    client = MlflowClient(tracking_uri=(tmp_path / "run" / "logs" / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("cxr-cache")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params["epochs"] == "(1, 3)"
    told = {
        key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }
    for training, rows in history_of(tmp_path / "run").items():
        check(told, training, rows)
    metrics = Run.open(tmp_path / "run").metrics["test"]
    assert run.data.metrics["test/macro_auroc"] == metrics["macro_auroc"]["value"]


def read_records(content: bytes) -> Iterator[bytes]:
    """Records of W&B's offline file: a header of 7 bytes, then LevelDB's log in blocks of 32 KiB.

    Each part has a checksum, a length and a kind: 1 whole, 2 first, 3 middle, 4 last.
    """
    at, parts = 7, []
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        n_bytes, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts.append(content[at + 7 : at + 7 + n_bytes])
        at += 7 + n_bytes
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


@pytest.mark.slow  # it starts a service of its own, which takes seconds
def test_weights_and_biases_writes_every_epoch_to_its_offline_file(store, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    result = train(store, tmp_path / "run", "--log-to", "wandb")
    wandb.teardown()
    assert result.exit_code == 0, result.output
    assert "failed" not in result.stderr
    [written] = (tmp_path / "run" / "logs" / "wandb").rglob("run-*.wandb")
    told: dict[str, list[tuple[int, float]]] = {}
    for data in read_records(written.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {
            item.key or "/".join(item.nested_key): float(item.value_json)
            for item in record.history.item
        }
        for key, value in items.items():
            training = key.partition("/")[0]
            if f"{training}/epoch" in items:
                told.setdefault(key, []).append((int(items[f"{training}/epoch"]), value))
    for training, rows in history_of(tmp_path / "run").items():
        check(told, training, rows)


def test_a_missing_package_is_known_before_anything_is_trained(store, tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "package_versions", lambda *_: {})
    for name in TRACKERS:
        result = train(store, tmp_path / "run", "--log-to", name)
        assert result.exit_code == 1
        package = "mlflow-skinny" if name == "mlflow" else name
        assert result.output == (
            f"Error: --log-to {name} needs {package}, which cxr-cache does without otherwise. "
            f"Install with: pip install 'cxr-cache[{name}]'\n"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("moment", ["open", "log", "close"])
def test_a_tracker_that_fails_loses_nothing(store, tmp_path, monkeypatch, moment, caplog):
    """Neither the training nor what the other tracker is told."""
    told: list[tuple[str, int]] = []

    class Good:
        def __init__(self, *_):
            pass

        def log(self, training, epoch, _values):
            told.append((training, epoch))

        def close(self, *, has_finished):
            told.append(("closed", has_finished))

    class Bad(Good):
        def __init__(self, *_):
            self.fail("open")

        def fail(self, at):
            if at == moment:
                raise ConnectionError("the server is gone")

        def log(self, *_):
            self.fail("log")

        def close(self, *, has_finished):
            self.fail("close")

    monkeypatch.setattr(tracking_module, "TRACKERS", {"wandb": Bad, "mlflow": Good})
    monkeypatch.setattr(tracking_module, "require_extra", lambda *_: None)
    result = train(store, tmp_path / "run", "--log-to", "wandb", "--log-to", "mlflow")
    assert result.exit_code == 0, result.output
    assert Run.open(tmp_path / "run").metrics["test"]
    said = "wandb is told of nothing more, since it failed: ConnectionError: the server is gone."
    assert result.stderr.count(said) == 1
    assert told.count(("fold-1-of-2", 3)) == 1
    assert told[-2:] == [("test", 0), ("closed", True)]


def test_nothing_to_tell_is_no_callback(tmp_path):
    with tracking([], tmp_path, QUICK) as on_epoch:
        assert on_epoch is None


# -- a callback of one's own ------------------------------------------------------------------


def test_on_epoch_hears_of_every_epoch_once(store, tmp_path):
    told: list[tuple[str, float]] = []
    train_head(
        store, tmp_path / "run", QUICK, on_epoch=lambda name, row: told.append((name, row["epoch"]))
    )
    n_folds, n_epochs = QUICK.n_folds, max(QUICK.epochs)
    folds = [f"fold {k} of {n_folds}" for k in range(1, n_folds + 1)]
    for fold in folds:
        assert [epoch for name, epoch in told if name == fold] == [*range(1, n_epochs + 1)]
    assert {name for name, _ in told} <= {*folds, "final model"}


def test_repeats_are_told_apart(store, tmp_path):
    told: set[str] = set()
    train_head(
        *(store, tmp_path / "run", QUICK), n_repeats=2, on_epoch=lambda name, _: told.add(name)
    )
    assert {"fold 1 of 3", "repeat 2 of 2, fold 1 of 3"} <= told


def test_an_on_epoch_that_raises_is_named_once_and_the_training_goes_on(store, tmp_path, caplog):
    calls = []

    def boom(name, row):
        calls.append(name)
        raise KeyError("val_acc")

    result = train_head(store, tmp_path / "run", QUICK, on_epoch=boom)
    assert result.metrics["test"]
    assert len(calls) == 1
    assert "boom is not told of further epochs, since it failed at epoch 1 of fold 1" in caplog.text


def test_ctrl_c_in_on_epoch_is_still_ctrl_c(store, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_head(store, tmp_path / "run", QUICK, on_epoch=stop)


def test_the_estimator_tells_too():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(80, 6)), rng.integers(0, 2, (80, 2)).astype(float)
    told: list[str] = []
    model = FocalHeadClassifier(epochs=(1, 2), n_folds=2, batch_size=16, hidden=(8,))
    model.fit(X, y, on_epoch=lambda name, _: told.append(name))
    assert told.count("fold 1 of 2") == 2
    model.fit(X, y)
    assert len(told) == len(set(told)) * 2, "a later fit without it tells nobody"
