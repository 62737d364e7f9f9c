"""Heads trained on all cores of this machine, or as one bank on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

from joblib import Parallel, cpu_count, delayed
from joblib.externals import loky

from cxr_cache.common.backends import start_workers
from cxr_cache.common.devices import resolve_device
from cxr_cache.config import TrainConfig
from cxr_cache.training.fit import (
    HeadFit,
    HeadTask,
    PlainRows,
    Rows,
    Trajectory,
    can_compile,
    count_steps,
    estimate_step,
    tell_of_epoch,
)

_WORTH_PROCESSES: Final = 10.0
"""Seconds of training from which on starting processes pays: each imports torch."""


def fit_on_cores(
    data: Rows,
    tasks: Sequence[HeadTask],
    config: TrainConfig,
    *,
    n_epochs: int,
    keep: Collection[int],
    on_epochs: Callable[[int], None] = lambda _n: None,
) -> list[Trajectory]:
    """Train one head per task, as quickly as can be, as :func:`fit_heads` does.

    A CPU with enough to do trains one head per core at a time. Five folds on two cores would leave
    one core idle for a sixth of the time, so heads take turns: those furthest behind go on for some
    of their epochs, on whichever core, and come out the same to the bit. Little work, and one core
    whose steps are not compiled, train all heads as one bank, whose products round otherwise: a
    last digit of float32.
    `on_epochs` is called with the epochs done so far, over all heads.
    """
    n_steps, n_told = count_steps(tasks, config.batch_size), [0] * len(tasks)
    options: dict[str, Any] = {"n_epochs": n_epochs, "n_steps": n_steps, "keep": keep}
    device = resolve_device(config.device)
    n_cores = min(count_cores(config), len(tasks))
    # As many turns as let the cores finish together, and twice that, to show progress.
    turn = -(-n_epochs * math.gcd(len(tasks), n_cores) // (2 * n_cores))
    work = n_epochs * n_steps * len(tasks) * estimate_step(config.batch_size)
    is_short = work < _WORTH_PROCESSES or device.type != "cpu"
    if is_short or (n_cores <= 1 and not can_compile(config, 1, device)):
        fit = HeadFit(data, tasks, [config] * len(tasks), **options)
        while not fit.has_ended:
            fit.run(fit.epoch + turn)
            n_told = _tell_of_epochs(tasks, fit.trajectories, n_told)
            on_epochs(len(tasks) * fit.epoch)
        return fit.trajectories
    rows = PlainRows(data.embeddings, data.targets)  # ids and names stay here
    states: list[dict[str, Any]] = [{"epoch": 0, "has_ended": False} for _ in tasks]
    with Parallel(n_jobs=n_cores, mmap_mode="c") as pool:
        start_workers(pool, n_cores)
        while waiting := [h for h, state in enumerate(states) if not state["has_ended"]]:
            chosen = sorted(waiting, key=lambda h: states[h]["epoch"])[:n_cores]
            advanced = pool(
                delayed(_take_turn)(rows, tasks[h], config, states[h], turn, options)
                for h in chosen
            )
            for h, state in zip(chosen, advanced, strict=True):
                states[h] = state
            reached = [state.get("trajectories", [Trajectory()])[0] for state in states]
            n_told = _tell_of_epochs(tasks, reached, n_told)
            on_epochs(sum(state["epoch"] for state in states))
    return [state["trajectories"][0] for state in states]


def count_cores(config: TrainConfig) -> int:
    """How many cores a training may use at once."""
    return cpu_count() if config.n_jobs < 1 else config.n_jobs


def _tell_of_epochs(
    tasks: Sequence[HeadTask], trajectories: Sequence[Trajectory], n_told: Sequence[int]
) -> list[int]:
    """Log the epochs that have ended since; gives how many of each head have been told of."""
    for task, trajectory, n in zip(tasks, trajectories, n_told, strict=True):
        for row in trajectory.history[n:]:
            tell_of_epoch(task.name, row)
    return [len(trajectory.history) for trajectory in trajectories]


def release_cores() -> None:
    """End the processes that wait for more heads; each holds as much as torch takes.

    They are joblib's, which shares them with whatever else uses it in this process: a library
    leaves them, a command that has no more use for them need not.
    """
    if loky.reusable_executor._executor is not None:  # asking for it by the front door starts one
        loky.get_reusable_executor(reuse=True).shutdown(wait=True)


def _take_turn(
    data: PlainRows,
    task: HeadTask,
    config: TrainConfig,
    state: dict[str, Any],
    turn: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    fit = HeadFit(data, [task], [config], **options)
    if state["epoch"]:
        fit.load_state_dict(state)
    fit.run(fit.epoch + turn)
    return fit.state_dict()
