"""How often a test split was read: each reading counts once, and the count stops nobody."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pandas as pd
import pytest

from cxr_cache.evaluation.compare import compare_runs
from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.jobs.scoring import tell_of_reads
from cxr_cache.models.run import Run
from cxr_cache.models.split_reads import (
    MEANING,
    SUFFIX,
    SplitReads,
    count_reading,
    count_reading_beside,
    digest_ids,
)
from tests.evaluation.test_evaluate import make_run


@pytest.fixture
def store(tmp_path) -> Path:
    path = tmp_path / "features.h5"
    path.write_bytes(b"only its place counts")
    return path


@pytest.fixture
def run(store, tmp_path) -> Run:
    encoder = {"name": "tiny", "weights_sha256": "3f9c"}
    return make_run(tmp_path / "run", store={"path": str(store), "encoder": encoder})


def make_rival(run: Run, path: Path) -> Run:
    """The same split, other predictions."""
    rival = make_run(path, store=run.config["store"])
    table = rival.read_table("predictions")
    findings = run.config["findings"]
    rival.write_table("predictions", table.assign(**{findings[0]: table[findings[0]].round(2)}))
    return rival


def test_training_evaluating_and_comparing_count_and_runs_are_told_apart(run, tmp_path):
    rival = make_rival(run, tmp_path / "rival")

    score_run(run, n_resamples=0, verb="train")
    assert tell_of_reads(run) == f"This test split has been read once by 1 run. {MEANING}"
    score_run(run, n_resamples=0)
    score_run(rival, n_resamples=0)
    told = compare_runs(run, rival, n_resamples=5).to_text().splitlines()[-1]

    assert told == f"This test split has been read 4 times by 2 runs. {MEANING}"
    assert SplitReads(**run.read_reads()).n_reads == 2, "as it was when its figures were made"
    kept = json.loads((tmp_path / f"features.h5{SUFFIX}").read_text())
    [reads] = kept["splits"].values()
    assert [read["command"] for read in reads] == ["train", "evaluate", "evaluate", "compare"]
    assert len(reads[-1]["runs"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("features.h5", f"features.h5{SUFFIX}", "rival", "run"),
    ], "no lock is left"


def test_another_split_of_the_same_store_is_counted_by_itself(run, tmp_path):
    other = make_rival(run, tmp_path / "other")
    splits = other.read_table("splits")
    other.write_table("splits", splits.assign(split=splits["split"][::-1].to_numpy()))
    count_reading("evaluate", run)
    assert count_reading("evaluate", other).n_reads == 1
    assert count_reading("evaluate", run).n_reads == 2


def test_a_split_is_known_by_its_test_images_in_any_order():
    assert digest_ids(["b", "a"]) == digest_ids(pd.Series(["a", "b"]))
    assert digest_ids(["a", "b"]) != digest_ids(["a,b"]) != digest_ids(["ab"])


def _count(store: str, run: str, n: int) -> None:
    for _ in range(n):
        count_reading_beside(Path(store), ["1", "2"], "evaluate", [Run.open(run)])


def test_readings_of_several_processes_at_once_are_all_counted(run, store):
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_count, args=(str(store), str(run.path), 5)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert count_reading_beside(store, ["2", "1"], "evaluate", [run]).n_reads == 16


def test_a_place_that_cannot_be_written_is_told_and_stops_nothing(
    run, store, tmp_path, monkeypatch
):
    count_reading("evaluate", run)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(store))

    monkeypatch.setattr("cxr_cache.models.split_reads.write_whole", refuse)
    score_run(run, n_resamples=0)

    told = tell_of_reads(run)
    assert told.startswith("This reading of the test split was not counted: ")
    assert "Permission denied" in told
    assert told.endswith("Before, it had been read once by 1 run.")


def test_a_store_that_has_moved_and_a_damaged_count_are_told(run, store):
    count_reading("evaluate", run)
    beside = store.with_name(store.name + SUFFIX)
    beside.write_text('{"splits": 3}')
    reads = count_reading("evaluate", run)
    assert reads.to_text() == (
        f"This reading of the test split was not counted: {beside} is damaged. Delete it to begin "
        "to count anew."
    )
    assert beside.read_text() == '{"splits": 3}', "what is there is left"
    store.unlink()
    reads = count_reading("evaluate", run)
    assert reads.problem == f"it is counted beside the store, and {store} is not there."


def test_a_store_named_from_elsewhere_is_found_beside_the_run(run, store, monkeypatch, tmp_path):
    moved = Run(run.path, {**run.config, "store": {"path": store.name}})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert count_reading("evaluate", moved).n_reads == 1
