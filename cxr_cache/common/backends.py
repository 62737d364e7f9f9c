"""Pools of workers on this machine, a Dask cluster or a Ray cluster.

joblib runs the work. This module opens joblib's backends, and reports in one message what is
missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from multiprocessing import resource_tracker
from typing import Any, Final

from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.backend import resource_tracker as loky_tracker
from joblib.externals.loky.process_executor import BrokenProcessPool

from cxr_cache.common.extras import pip_line
from cxr_cache.config import BACKENDS
from cxr_cache.errors import BackendError, ConfigError, WorkerLostError

_PACKAGES: Final = {"dask": "distributed", "ray": "ray"}
_LEAVE_INTERRUPTS_TO_DRIVER: Final = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)"
"""Code that workers of a local Dask cluster run first.

A terminal sends Ctrl-C to the whole group of processes; only the driver shall react to it.
"""
WAIT_S: Final = 30
"""Seconds that a scheduler may take to answer, and its workers to join."""


@contextmanager
def open_backend(
    name: str, *, n_workers: int, scheduler: str | None = None, **options: Any
) -> Iterator[Parallel]:
    """Open a pool of workers, which is called with pieces of work made by ``joblib.delayed``.

    When a worker is lost, Dask runs its piece of work again elsewhere. It gives up only when
    several workers in a row are lost with the same piece. The other backends give up at once.

    Parameters
    ----------
    name
        ``"loky"`` for processes of this machine, ``"dask"`` or ``"ray"`` for such a cluster.
    n_workers
        Processes to start, at least 1. On a running Dask cluster, work begins when so many workers
        have joined, and uses all that there are.
    scheduler
        Address of a running cluster (Dask ``tcp://HOST:8786``, Ray ``HOST:6379``). None starts
        a cluster on this machine and ends it afterwards.
    options
        Further arguments of :class:`joblib.Parallel`, such as ``mmap_mode``. Ray does not take
        ``return_as="generator"``, see :func:`streams_results`.

    Raises
    ------
    ConfigError
        There is no such backend, `n_workers` is less than 1, or loky was given a scheduler.
    BackendError
        A package is not installed, or the scheduler or its workers cannot be reached.
    WorkerLostError
        A worker was lost with its piece of work; raised out of the ``with`` block.
    """
    _require_sensible(name, n_workers, scheduler)
    with _OPENERS[name](n_workers, scheduler) as backend_options:
        # Workers get one piece of work at a time, so that a lost worker loses no more than one.
        with parallel_config(backend=name, **backend_options):
            parallel = Parallel(n_jobs=n_workers, batch_size=1, **options)
        try:
            if name == "loky":
                start_workers(parallel, n_workers)
            yield parallel
        except _losses(name) as error:
            raise WorkerLostError(
                f"A {name} worker was lost ({type(error).__name__}), most likely for want of "
                "memory. What was finished is kept; run the same command again, with fewer "
                "--workers where memory is short."
            ) from error


def start_workers(pool: Parallel, n_workers: int) -> None:
    """Start a pool's processes so that Ctrl-C, which a terminal sends to all, leaves them be.

    The driver gets it and ends them. Interrupted themselves, they would print tracebacks, and
    nobody would remove the files through which they share arrays.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not hasattr(signal, "pthread_sigmask"):  # on Windows there is none
        return
    for tracker in (resource_tracker, loky_tracker):
        tracker.ensure_running()  # whoever starts them lets all signals through again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes inherit it
    try:
        list(pool(delayed(os.getpid)() for _ in range(n_workers)))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def check_backend(name: str, *, n_workers: int, scheduler: str | None = None) -> None:
    """Raise what :func:`open_backend` would raise, without starting anything on this machine.

    Callers use it before work that takes long or leaves files, and that comes before the pool.
    """
    _require_sensible(name, n_workers, scheduler)
    if scheduler is not None:
        with _OPENERS[name](n_workers, scheduler):
            pass
    elif name != "loky":
        _import(_PACKAGES[name], name)


def streams_results(name: str) -> bool:
    """Tell whether the pool takes ``return_as="generator"`` and ``"generator_unordered"``."""
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
def _open_dask(n_workers: int, scheduler: str | None) -> Iterator[dict[str, Any]]:
    distributed = _import(_PACKAGES["dask"], "dask")
    with ExitStack() as stack:
        if scheduler is None:
            stack.enter_context(_silenced("distributed"))  # what matters is raised as well
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
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray shall not report to its makers
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
    "loky": lambda _n_workers, _scheduler: nullcontext({}),
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
            f"with `{pip_line(extra)}`, on every machine that works."
        )
    return importlib.import_module(module)


def _losses(name: str) -> tuple[type[Exception], ...]:
    """Return the errors that a backend raises when a worker and its piece of work are lost."""
    if name == "dask":
        return (importlib.import_module("distributed").KilledWorker,)
    if name == "ray":
        return (importlib.import_module("ray.exceptions").RayError,)
    return (BrokenProcessPool,)
