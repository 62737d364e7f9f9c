"""Where pieces of work run: processes of this machine, a Dask cluster, or a Ray cluster.

joblib is the engine; this module opens its backends, and says in one message what is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Final

from joblib import Parallel, parallel_config
from joblib.externals.loky.process_executor import BrokenProcessPool

from cxr_cache.config import BACKENDS
from cxr_cache.errors import BackendError, ConfigError, WorkerLostError

_PACKAGES: Final = {"dask": "distributed", "ray": "ray"}
_LEAVE_INTERRUPTS_TO_DRIVER: Final = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)"
"""What workers of a local Dask cluster run first: a terminal interrupts the whole group."""
WAIT_S: Final = 30
"""How long a scheduler may take to answer, and its workers to join."""


@contextmanager
def open_backend(
    name: str, *, n_workers: int, scheduler: str | None = None, **options: Any
) -> Iterator[Parallel]:
    """Open a pool of workers; calling it with ``joblib.delayed`` work runs that there.

    A worker that is lost loses no work under Dask, which runs it again elsewhere. The others
    give up the call; so does Dask when several workers in a row are lost to one piece of work.

    Parameters
    ----------
    name
        ``"loky"``: processes of this machine. ``"dask"``, ``"ray"``: a cluster of that kind.
    n_workers
        Processes to start, at least 1. Of a running Dask cluster all workers are used, as soon as
        so many have joined.
    scheduler
        Address of a running cluster (Dask ``tcp://HOST:8786``, Ray ``HOST:6379``). None starts
        one on this machine, and ends it afterwards.
    options
        Further arguments of :class:`joblib.Parallel`, such as ``mmap_mode``. Ray has no
        ``return_as="generator"``: see :func:`streams_results`.

    Raises
    ------
    ConfigError
        There is no such backend, `n_workers` is less than 1, or loky was given a scheduler.
    BackendError
        A package is not installed, or the scheduler or its workers cannot be reached.
    WorkerLostError
        Raised out of the ``with`` block where a worker was lost and its work with it.
    """
    _require_sensible(name, n_workers, scheduler)
    with _OPENERS[name](n_workers, scheduler) as backend_options:
        # One piece of work at a time: each takes long, and a lost worker loses one only.
        with parallel_config(backend=name, **backend_options):
            parallel = Parallel(n_jobs=n_workers, batch_size=1, **options)
        try:
            yield parallel
        except _losses(name) as error:
            raise WorkerLostError(
                f"A {name} worker was lost ({type(error).__name__}), most likely for want of "
                "memory. What was finished is kept; run the same command again, with fewer "
                "--workers where memory is short."
            ) from error


def check_backend(name: str, *, n_workers: int, scheduler: str | None = None) -> None:
    """Raise what :func:`open_backend` would raise, but start nothing on this machine.

    For callers who do something that takes long, or leaves traces, before they open one.
    """
    _require_sensible(name, n_workers, scheduler)
    if scheduler is not None:
        with _OPENERS[name](n_workers, scheduler):
            pass
    elif name != "loky":
        _import(_PACKAGES[name], name)


def streams_results(name: str) -> bool:
    """Whether the pool takes ``return_as="generator"`` and ``"generator_unordered"``."""
    return name != "ray"


def _require_sensible(name: str, n_workers: int, scheduler: str | None) -> None:
    if name not in BACKENDS:
        raise ConfigError(f"--backend is '{name}'; choose from {', '.join(BACKENDS)}.")
    if n_workers < 1:
        raise ConfigError(f"--workers is {n_workers}; it must be at least 1.")
    if name == "loky" and scheduler is not None:
        raise ConfigError(
            "--scheduler goes with --backend dask or ray; loky runs on this machine alone."
        )


@contextmanager
def _open_loky(_n_workers: int, _scheduler: None) -> Iterator[dict[str, Any]]:
    yield {}


@contextmanager
def _open_dask(n_workers: int, scheduler: str | None) -> Iterator[dict[str, Any]]:
    distributed = _import(_PACKAGES["dask"], "dask")
    with ExitStack() as stack:
        if scheduler is None:
            stack.enter_context(_silenced("distributed"))  # whatever matters is raised as well
            cluster = distributed.LocalCluster(
                n_workers=n_workers,
                threads_per_worker=1,
                dashboard_address=None,
                preload=_LEAVE_INTERRUPTS_TO_DRIVER,
            )
            address: Any = stack.enter_context(cluster)
        else:
            address = scheduler
        try:
            client = distributed.Client(address, timeout=WAIT_S, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise BackendError(
                f"There is no Dask scheduler at {address}: {error}. Start one with `dask "
                "scheduler`, workers with `dask worker ADDRESS`, and give its address."
            ) from error
        stack.enter_context(client)
        try:
            client.wait_for_workers(n_workers, timeout=WAIT_S)
        except TimeoutError as error:
            n_there = len(client.scheduler_info(n_workers=-1)["workers"])
            raise BackendError(
                f"The Dask scheduler at {address} has {n_there} workers after {WAIT_S} s, and "
                f"--workers asks for {n_workers}. Start more with `dask worker {address}`, or ask "
                "for fewer."
            ) from error
        yield {"client": client}


@contextmanager
def _open_ray(n_workers: int, scheduler: str | None) -> Iterator[dict[str, Any]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    ray = _import(_PACKAGES["ray"], "ray")
    local = {"num_cpus": n_workers, "include_dashboard": False} if scheduler is None else {}
    try:
        ray.init(scheduler or "local", log_to_driver=False, logging_level="error", **local)
    except (ConnectionError, OSError, RuntimeError, TimeoutError, ValueError) as error:
        raise BackendError(
            f"There is no Ray cluster at {scheduler or 'this machine'}: {error}. Start one with "
            "`ray start --head`, join it with `ray start --address HOST:6379`, and give its "
            "address."
        ) from error
    try:
        importlib.import_module("ray.util.joblib").register_ray()
        yield {}
    finally:
        ray.shutdown()


_OPENERS: Final[dict[str, Callable[[int, Any], AbstractContextManager[dict[str, Any]]]]] = {
    "loky": _open_loky,
    "dask": _open_dask,
    "ray": _open_ray,
}


@contextmanager
def _silenced(logger_name: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _import(module: str, extra: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise BackendError(
            f"--backend {extra} needs the package {module}, which is not installed. Install it "
            f"with `pip install 'cxr-cache[{extra}]'`, on every machine that works."
        )
    return importlib.import_module(module)


def _losses(name: str) -> tuple[type[Exception], ...]:
    """What a backend raises where a worker took its work with it."""
    if name == "dask":
        return (importlib.import_module("distributed").KilledWorker,)
    if name == "ray":
        return (importlib.import_module("ray.exceptions").RayError,)
    return (BrokenProcessPool,)
