"""The epoch search over folds, and the final model that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, cpu_count, delayed

from cxr_cache.config import TrainConfig
from cxr_cache.devices import resolve_device
from cxr_cache.errors import TrainingError
from cxr_cache.fit import HeadTask, TrainingData, Trajectory, count_steps, fit_heads
from cxr_cache.heads import HeadBank
from cxr_cache.splits import Split

_WORTH_PROCESSES: Final = 20_000
"""Steps of all heads together from which on starting processes pays."""


@dataclass(frozen=True)
class EpochSearch:
    """Result of the search: every fold's trajectory, and the table of candidates."""

    trajectories: dict[int, list[Trajectory]]
    """Per candidate, one per fold."""
    table: pd.DataFrame
    """Columns epochs, mean_auroc, std_auroc, fold_1 ... fold_K."""
    chosen: int
    """Candidate with the best mean macro AUROC; of equals the smallest."""


def search_epochs(
    data: TrainingData,
    split: Split,
    config: TrainConfig,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> EpochSearch:
    """Score every candidate number of epochs on every held-out fold.

    Where nothing in the recipe depends on the horizon, each fold is trained once, to the largest
    candidate, and the smaller ones are read off the same trajectory: they are exactly what
    separate runs would give. A schedule with a horizon trains each candidate by itself.

    Parameters
    ----------
    on_progress
        Called with (heads trained, heads to train).

    Raises
    ------
    ConfigError, TrainingError
        As :func:`require_trainable_folds`; and TrainingError where a loss diverges.
    """
    require_trainable_folds(data, split, config)
    tasks = _fold_tasks(split, config.seed)
    horizons = config.epochs if config.has_horizon else config.epochs[-1:]
    trajectories: dict[int, list[Trajectory]] = {}
    for i, horizon in enumerate(horizons):
        keep = (horizon,) if config.has_horizon else config.epochs
        trained = _train_over_cores(
            data,
            tasks,
            config,
            horizon,
            keep,
            _shifted(on_progress, i * len(tasks), len(horizons) * len(tasks)),
        )
        trajectories |= dict.fromkeys(keep, trained)
    table = _tabulate(trajectories)
    return EpochSearch(trajectories, table, _choose(table))


def require_trainable_folds(data: TrainingData, split: Split, config: TrainConfig) -> None:
    """Raise unless every fold can be trained and scored; called before the long work.

    Raises
    ------
    ConfigError
        A fold has fewer rows to train on than a batch.
    TrainingError
        No finding has both a positive and a negative among the rows that a fold holds out.
    """
    tasks = _fold_tasks(split, config.seed)
    count_steps(tasks, config.batch_size)
    for k, task in enumerate(tasks, start=1):
        targets = data.cohort.targets[task.held_out_rows]
        if not ((targets == 1).any(axis=0) & (targets == 0).any(axis=0)).any():
            raise TrainingError(
                f"Among the {len(targets):,} images of fold {k}, no finding has both a positive "
                "and a negative one, so no AUROC is defined. Use fewer --folds, or more images."
            )


def _fold_tasks(split: Split, seed: int) -> list[HeadTask]:
    return [
        HeadTask(split.trained_on(k), split.held_out(k), _head_seed(seed, k))
        for k in range(split.n_folds)
    ]


def _head_seed(seed: int, fold: int) -> int:
    """A seed for the head of one fold; the final model's is that of fold -1."""
    return int(np.random.SeedSequence([seed, fold + 1]).generate_state(1)[0])


def _train_over_cores(
    data: TrainingData,
    tasks: Sequence[HeadTask],
    config: TrainConfig,
    n_epochs: int,
    keep: Collection[int],
    on_progress: Callable[[int, int], None],
) -> list[Trajectory]:
    """Train the tasks as one bank, or, on a CPU with enough to do, one per core at a time."""
    n_steps = count_steps(tasks, config.batch_size)
    n_jobs = min(cpu_count() if config.n_jobs < 0 else config.n_jobs, len(tasks))
    work = n_epochs * n_steps * len(tasks)
    if n_jobs <= 1 or work < _WORTH_PROCESSES or resolve_device(config.device).type != "cpu":
        trained = fit_heads(data, tasks, config, n_epochs=n_epochs, n_steps=n_steps, keep=keep)
        on_progress(len(tasks), len(tasks))
        return trained
    pool = Parallel(n_jobs=n_jobs, return_as="generator", mmap_mode="c")
    jobs = (delayed(_train_alone)(data, task, config, n_epochs, n_steps, keep) for task in tasks)
    trained = []
    for trajectory in pool(jobs):
        trained.append(trajectory)
        on_progress(len(trained), len(tasks))
    return trained


def _train_alone(
    data: TrainingData,
    task: HeadTask,
    config: TrainConfig,
    n_epochs: int,
    n_steps: int,
    keep: Collection[int],
) -> Trajectory:
    return fit_heads(data, [task], config, n_epochs=n_epochs, n_steps=n_steps, keep=keep)[0]


def _shifted(
    on_progress: Callable[[int, int], None] | None, done_before: int, total: int
) -> Callable[[int, int], None]:
    return lambda done, _: on_progress and on_progress(done_before + done, total)


def _tabulate(trajectories: dict[int, list[Trajectory]]) -> pd.DataFrame:
    rows = []
    for epochs, folds in trajectories.items():
        scores = [trajectory.auroc_after(epochs) for trajectory in folds]
        rows.append(
            {
                "epochs": epochs,
                "mean_auroc": np.mean(scores),
                "std_auroc": np.std(scores, ddof=1),
                **{f"fold_{k}": score for k, score in enumerate(scores, start=1)},
            }
        )
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def _choose(table: pd.DataFrame) -> int:
    best = int(np.argmax(table["mean_auroc"].to_numpy()))
    return int(table["epochs"].to_numpy()[best])


# -- the final model --------------------------------------------------------------------


def train_final(
    data: TrainingData, split: Split, search: EpochSearch, config: TrainConfig
) -> tuple[HeadBank, list[dict[str, float]]]:
    """The model that test will see, and its history (empty unless it was trained anew)."""
    folds = search.trajectories[search.chosen]
    if config.final != "refit":
        scores = [trajectory.auroc_after(search.chosen) for trajectory in folds]
        members = folds if config.final == "ensemble" else [folds[int(np.argmax(scores))]]
        states = [member.weights[search.chosen] for member in members]
        stacked = {name: torch.cat([state[name] for state in states]) for name in states[0]}
        return HeadBank.from_snapshot(stacked, dropout=config.dropout), []
    rates = _replay_rates(folds, search.chosen)
    task = HeadTask(
        np.flatnonzero(~split.is_test), np.empty(0, np.int64), _head_seed(config.seed, -1)
    )
    trajectory = fit_heads(
        data,
        [task],
        replace(config, early_stopping=None),
        n_epochs=len(rates),
        n_steps=count_steps([task], config.batch_size),
        keep=[len(rates)],
        learning_rates=rates,
    )[0]
    weights = trajectory.weights[len(rates)]
    return HeadBank.from_snapshot(weights, dropout=config.dropout), trajectory.history


def _replay_rates(folds: Sequence[Trajectory], chosen: int) -> list[float]:
    """Learning rate of every epoch: the folds' geometric mean, for a refit has no held-out rows.

    Where folds stopped early, the refit stops after their mean number of epochs.
    """
    histories = [trajectory.history[:chosen] for trajectory in folds]
    n_epochs = round(np.mean([len(history) for history in histories]))
    rates = [
        [history[epoch]["lr"] for history in histories if len(history) > epoch]
        for epoch in range(n_epochs)
    ]
    return [float(np.exp(np.log(at_epoch).mean())) for at_epoch in rates]
