"""Extraction by several workers: the store of one, whoever is lost on the way."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.common import backends
from cxr_cache.config import EncoderOptions, ExtractConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import (
    BackendError,
    ConfigError,
    StoreMismatchError,
    TooManyFailuresError,
    WorkerLostError,
)
from cxr_cache.store import workers as extract_workers
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.store.feature_store import DONE, FAILED, FeatureStore
from cxr_cache.store.workers import Workers, extract_on_workers
from tests.store.test_extract import assert_same_store

OPTIONS = EncoderOptions("random:test_vit", device="cpu", precision="fp32")
QUICK = ExtractConfig(batch_size=4, num_workers=0)
TOKENS = dataclasses.replace(QUICK, unfreeze_layers=2)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.set_num_threads(1)
    return load_encoder(**vars(OPTIONS))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, n_studies=12, image_size_px=64, seed=3)
    return folder


@pytest.fixture(scope="module")
def cohort(phantoms) -> Cohort:
    return load_cohort(phantoms)


@pytest.fixture(scope="module")
def reference(phantoms, cohort, encoder, tmp_path_factory) -> FeatureStore:
    """What one process makes."""
    path = tmp_path_factory.mktemp("reference") / "s.h5"
    extract_embeddings(cohort, phantoms / "images", path, encoder, TOKENS)
    return FeatureStore.open(path)


@pytest.fixture
def here(monkeypatch) -> list[Path]:
    """Workers that are this very process; the paths of the parts that were made."""
    made: list[Path] = []

    def make_parts(parts, _workers):
        for part in parts:
            made.append(part.path)
            yield extract_workers._make_part(part)

    monkeypatch.setattr(extract_workers, "_make_parts", make_parts)
    return made


def parts_of(store: Path) -> list[Path]:
    return sorted(Path(f"{store}.parts").glob("*.h5"))


# -- several processes ------------------------------------------------------------------


@pytest.mark.slow  # every process imports torch; the next test does so under Dask
@pytest.mark.parametrize("backend", ["loky", "ray"])
def test_workers_make_the_store_of_one_process(backend, phantoms, cohort, tmp_path, reference):
    if importlib.util.find_spec({"loky": "joblib"}.get(backend, backend)) is None:
        pytest.skip(f"{backend} is not installed")
    path, calls = tmp_path / "s.h5", []
    summary = extract_on_workers(
        cohort,
        phantoms / "images",
        path,
        OPTIONS,
        TOKENS,
        Workers(backend, 2),
        on_progress=lambda *numbers: calls.append(numbers),
    )
    assert_same_store(path, reference)
    assert (summary.n_done, summary.n_computed) == (len(cohort), len(cohort))
    assert [total for _, _, total in calls] == [len(cohort)] * 2
    assert sum(done for done, _, _ in calls) == len(cohort)
    assert "the limit was: " in summary.to_text()
    assert not Path(f"{path}.parts").exists()
    assert not path.with_name("s.h5.lock").exists()


@pytest.mark.slow
def test_a_dask_cluster_that_loses_a_worker_makes_the_same_store(
    phantoms, cohort, tmp_path, reference, monkeypatch
):
    """A real cluster of two processes; one is killed while it holds a part that it has begun."""
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    monkeypatch.setattr(extract_workers, "MAX_PART_ROWS", 4)
    path = tmp_path / "s.h5"
    slow = dataclasses.replace(TOKENS, batch_size=1)
    killed: list[int] = []
    over = threading.Event()

    def kill_one(cluster) -> None:
        """Once a part is half made, kill the process that holds its lock."""
        pids = [worker.pid for worker in cluster.workers.values()]
        while not over.is_set():
            for part in parts_of(path):
                holder = _pid_in(part.with_name(f"{part.name}.lock"))
                if holder in pids and _n_done(part) in (1, 2):
                    os.kill(holder, signal.SIGKILL)
                    killed.append(holder)
                    return
            time.sleep(0.005)

    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as cluster:
        killer = threading.Thread(target=kill_one, args=(cluster,))
        killer.start()
        summary = extract_on_workers(
            cohort,
            phantoms / "images",
            path,
            OPTIONS,
            slow,
            Workers("dask", 2, cluster.scheduler_address),
        )
        over.set()
        killer.join()
    assert killed
    assert summary.n_done == len(cohort)
    assert_same_store(path, reference)
    assert not Path(f"{path}.parts").exists()


def _pid_in(lock: Path) -> int | None:
    try:
        return int(lock.read_text().partition('"pid": ')[2].partition(",")[0])
    except (OSError, ValueError):
        return None


def _n_done(part: Path) -> int:
    try:
        with FeatureStore.open(part) as store:
            return int((store.status == DONE).sum())
    except OSError:
        return -1


# -- what is left of an interruption ----------------------------------------------------


def test_an_interrupted_driver_begins_with_the_parts_that_are_there(
    phantoms, cohort, encoder, tmp_path, reference, monkeypatch
):
    """Killed between two parts, one of them half made: nothing finished is encoded again."""
    path = tmp_path / "s.h5"

    def make_one_and_a_half(parts, _workers):
        yield extract_workers._make_part(parts[0])
        n_calls = iter(range(10))

        def stop(*arguments):
            if next(n_calls) == 1:
                raise KeyboardInterrupt
            return original(*arguments)

        original = FeatureStore.commit
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FeatureStore, "commit", stop)
            extract_workers._make_part(parts[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract_workers, "_make_parts", make_one_and_a_half)
        with pytest.raises(KeyboardInterrupt):
            extract_on_workers(
                cohort, phantoms / "images", path, OPTIONS, TOKENS, Workers(n_workers=2)
            )
    assert len(parts_of(path)) == 1
    with FeatureStore.open(path) as store:
        n_done = int((store.status == DONE).sum())
    assert 0 < n_done < len(cohort)

    monkeypatch.setattr(
        extract_workers,
        "_make_parts",
        lambda parts, _: (extract_workers._make_part(part) for part in parts),
    )
    summary = extract_on_workers(
        cohort, phantoms / "images", path, OPTIONS, TOKENS, Workers(n_workers=3)
    )
    assert summary.n_computed == len(cohort) - n_done - 4  # a batch of the half part was there
    assert_same_store(path, reference)
    again = extract_on_workers(cohort, phantoms / "images", path, OPTIONS, TOKENS)
    assert again.n_computed == 0
    assert "nothing was left to compute" in again.to_text()


def test_parts_without_their_store_are_not_thrown_away(phantoms, cohort, tmp_path, here):
    path = tmp_path / "s.h5"
    (tmp_path / "s.h5.parts").mkdir()
    (tmp_path / "s.h5.parts" / "000000.h5").write_bytes(b"rows")
    with pytest.raises(StoreMismatchError, match=r"holds parts of a store that is not at .*s\.h5"):
        extract_on_workers(cohort, phantoms / "images", path, OPTIONS, QUICK)
    assert here == []


def test_workers_that_are_lost_again_and_again_end_it(
    phantoms, cohort, tmp_path, monkeypatch, caplog
):
    attempts = []

    def lose(parts, _workers):
        attempts.append(len(parts))
        yield extract_workers._make_part(parts[0])
        raise WorkerLostError("A loky worker was lost.")

    monkeypatch.setattr(extract_workers, "_make_parts", lose)
    with pytest.raises(WorkerLostError):
        extract_on_workers(
            cohort, phantoms / "images", tmp_path / "s.h5", OPTIONS, QUICK, Workers(n_workers=4)
        )
    assert attempts == [4, 3, 2]  # what was made stays made
    assert caplog.text.count("done again by new workers") == 2


# -- the rules of an extraction hold ----------------------------------------------------


def test_tokens_given_later_leave_the_embeddings_as_they_are(
    phantoms, cohort, encoder, tmp_path, reference, here
):
    path = tmp_path / "s.h5"
    extract_embeddings(cohort, phantoms / "images", path, encoder, QUICK)
    with FeatureStore.open(path) as store:
        before = np.array(store.embeddings)
    summary = extract_on_workers(
        cohort, phantoms / "images", path, OPTIONS, TOKENS, Workers(n_workers=3)
    )
    assert len(here) == 3
    assert summary.n_taken_over == len(cohort)
    with FeatureStore.open(path) as store:
        np.testing.assert_array_equal(store.embeddings, before)
    assert_same_store(path, reference)


def test_failures_are_counted_over_all_parts(phantoms, cohort, tmp_path, here):
    images = shutil.copytree(phantoms / "images", tmp_path / "images")
    bad = [0, 1, 8, 16]
    for row in bad:
        (images / str(cohort.image_ids[row])).write_bytes(b"")
    path = tmp_path / "s.h5"
    strict = dataclasses.replace(QUICK, max_failures=3)
    with pytest.raises(TooManyFailuresError, match=r"4 images failed, more than the 3 tolerated"):
        extract_on_workers(cohort, images, path, OPTIONS, strict, Workers(n_workers=3))
    summary = extract_on_workers(cohort, images, path, OPTIONS, QUICK, Workers(n_workers=3))
    assert summary.n_failed == 4
    with FeatureStore.open(path) as store:
        assert np.flatnonzero(store.status == FAILED).tolist() == bad
        assert store.read_errors(np.array(bad)) == ["the file is empty (0 bytes)"] * 4


def test_a_worker_that_sees_other_folders_says_so(phantoms, cohort, tmp_path, monkeypatch):
    def elsewhere(parts, _workers):
        yield extract_workers._make_part(
            dataclasses.replace(parts[0], image_dir=tmp_path / "unmounted")
        )

    monkeypatch.setattr(extract_workers, "_make_parts", elsewhere)
    with pytest.raises(BackendError, match=r"does not see .*unmounted.*all workers .* share"):
        extract_on_workers(cohort, phantoms / "images", tmp_path / "s.h5", OPTIONS, QUICK)


def test_a_part_of_another_encoder_is_refused(phantoms, cohort, tmp_path, monkeypatch):
    """A machine whose encoder is another one: other weights under the same name, say."""
    other = dataclasses.replace(OPTIONS, name="random:test_vit:7")

    def make_otherwise(parts, _workers):
        yield extract_workers._make_part(dataclasses.replace(parts[0], encoder=other))

    monkeypatch.setattr(extract_workers, "_make_parts", make_otherwise)
    with pytest.raises(StoreMismatchError, match=r"weights_sha256: '.*' in the store"):
        extract_on_workers(cohort, phantoms / "images", tmp_path / "s.h5", OPTIONS, QUICK)


def test_options_that_contradict_each_other_are_named(phantoms, cohort, tmp_path):
    for given, message in (
        ({"part": (1, 2)}, "--part and --backend both split the image table"),
        ({"compile": True}, "--compile does not go with --backend: .* Leave one of them out"),
    ):
        config = dataclasses.replace(QUICK, **given)
        with pytest.raises(ConfigError, match=message):
            extract_on_workers(cohort, phantoms / "images", tmp_path / "s.h5", OPTIONS, config)
    command = ["extract", "--csv-dir", phantoms, "--image-dir", phantoms / "images"]
    command += ["--store", tmp_path / "s.h5", "--workers", 2]
    result = CliRunner().invoke(cli, list(map(str, command)))
    assert result.exit_code == 2
    assert "--workers and --scheduler go with --backend" in result.output


def test_a_backend_that_cannot_be_reached_leaves_no_trace(phantoms, cohort, tmp_path, monkeypatch):
    pytest.importorskip("distributed", reason="dask is not installed")
    monkeypatch.setattr(backends, "WAIT_S", 0.5)
    with pytest.raises(BackendError, match=r"no Dask scheduler at tcp://127\.0\.0\.1:9"):
        extract_on_workers(
            cohort,
            phantoms / "images",
            tmp_path / "s.h5",
            OPTIONS,
            QUICK,
            Workers("dask", None, "tcp://127.0.0.1:9"),
        )
    assert list(tmp_path.iterdir()) == []


def test_the_command_shares_the_work_out(phantoms, tmp_path, here, reference):
    command = ["extract", "--csv-dir", phantoms, "--image-dir", phantoms / "images"]
    command += ["--store", tmp_path / "s.h5", "--model", OPTIONS.name, "--precision", "fp32"]
    command += ["--tokens", "--num-workers", 0, "--backend", "loky", "--workers", 3]
    result = CliRunner().invoke(cli, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert len(here) == 3
    assert f"{len(reference)} images = {len(reference)} done" in result.output
    assert_same_store(tmp_path / "s.h5", reference)
