"""Backends: the same work anywhere, and one message where there is no place to run it."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest
from joblib import delayed

from cxr_cache.common import backends
from cxr_cache.common.backends import check_backend, open_backend, streams_results
from cxr_cache.config import BACKENDS
from cxr_cache.errors import BackendError, ConfigError, WorkerLostError

INSTALLED = {"loky": "joblib", "dask": "distributed", "ray": "ray"}


def square(number: int) -> tuple[int, int]:
    return number**2, os.getpid()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def require(backend: str) -> None:
    if importlib.util.find_spec(INSTALLED[backend]) is None:
        pytest.skip(f"{INSTALLED[backend]} is not installed")


@pytest.mark.parametrize("name", ["loky", "dask", pytest.param("ray", marks=pytest.mark.slow)])
def test_work_runs_in_other_processes_and_comes_back_in_order(name):
    require(name)
    options = {"return_as": "generator"} if streams_results(name) else {}
    with open_backend(name, n_workers=2, **options) as parallel:
        results = list(parallel(delayed(square)(i) for i in range(6)))
    assert [value for value, _ in results] == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in {pid for _, pid in results}


def test_a_lost_worker_is_said_in_one_message():
    with (
        pytest.raises(WorkerLostError, match=r"A loky worker was lost \(.*run the same command"),
        open_backend("loky", n_workers=2) as parallel,
    ):
        parallel([delayed(die)()])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("slurm", {}, "--backend is 'slurm'; choose from loky, dask, ray"),
        ("loky", {"n_workers": 0}, "--workers is 0; it must be at least 1"),
        ("loky", {"scheduler": "tcp://a:1"}, "--scheduler goes with --backend dask or ray"),
    ],
)
def test_options_that_make_no_sense_are_named(name, options, message):
    with (
        pytest.raises(ConfigError, match=message),
        open_backend(name, **{"n_workers": 1, **options}),
    ):
        pass


@pytest.mark.parametrize("name", ["dask", "ray"])
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with (
        pytest.raises(BackendError, match=rf"pip install 'cxr-cache\[{name}\]'"),
        open_backend(name, n_workers=1),
    ):
        pass
    with pytest.raises(BackendError, match=rf"pip install 'cxr-cache\[{name}\]'"):
        check_backend(name, n_workers=1)


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch):
    require("dask")
    monkeypatch.setattr(backends, "WAIT_S", 0.5)
    with (
        pytest.raises(BackendError, match=r"no Dask scheduler at tcp://127\.0\.0\.1:9.*Start one"),
        open_backend("dask", n_workers=1, scheduler="tcp://127.0.0.1:9"),
    ):
        pass


def test_a_cluster_with_too_few_workers_says_how_many_there_are(monkeypatch):
    require("dask")
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster:
        monkeypatch.setattr(backends, "WAIT_S", 1)
        with (
            pytest.raises(BackendError, match=r"has 1 workers after 1 s, and --workers asks for 3"),
            open_backend("dask", n_workers=3, scheduler=cluster.scheduler_address),
        ):
            pass


def test_every_backend_has_an_extra_in_the_project_file():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert all(f"\n{name} = [" in text for name in BACKENDS if name != "loky")
