"""The epoch search over folds, and the final model that follows from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxr_cache.common.wording import count
from cxr_cache.config import Recipe, TrainConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.splits import (
    Split,
    has_given_split,
    make_outer_split,
    make_split,
    take_given_split,
)
from cxr_cache.datasets.studies import Studies
from cxr_cache.errors import ConfigError, TrainingError
from cxr_cache.metrics.operating_point import find_rule
from cxr_cache.metrics.scores import (
    Array,
    FloatArray,
    auroc,
    count_clusters,
    has_both_classes,
    support_mean,
)
from cxr_cache.models.heads import HeadBank
from cxr_cache.training.fit import (
    HeadTask,
    Rows,
    Trajectory,
    count_steps,
    fit_heads,
    tell_of_epoch,
    told_as,
)
from cxr_cache.training.fit_on_cores import fit_on_cores

LEARNABLE: Final = 10
"""Positive, and negative, training patients or studies from which on a finding's AUROC counts."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpochSearch:
    """Result of the search: every fold's trajectory, and the table of candidates."""

    trajectories: dict[int, list[Trajectory]]
    """By candidate, the trajectory of each fold."""
    table: pd.DataFrame
    """Columns epochs, mean_auroc, std_auroc, fold_1 ... fold_K, of the AUROC that is weighed."""
    chosen: int
    """Candidate with the best mean over folds, of equal ones the smallest; or the smallest within
    one standard error of the best."""
    weighing: Weighing
    """How much each finding counts in the table."""


def horizons(config: Recipe) -> tuple[int, ...]:
    """How far each fold is trained: once to the largest candidate, if none needs its own way."""
    return config.epochs if config.has_horizon else config.epochs[-1:]


def search_epochs(
    data: Rows,
    split: Split,
    config: TrainConfig,
    *,
    clusters: Array | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> EpochSearch:
    """Score every candidate number of epochs on every held-out fold.

    If nothing in the recipe depends on how many epochs follow, each fold is trained once, up to the
    largest candidate. The smaller candidates are read off this trajectory, and are exactly what
    separate runs would give. With a schedule that has a horizon, each candidate is trained by
    itself. `clusters`, the patient or study of every row, say how many positives a finding has;
    without them every row stands for itself. `on_progress` is called with the numbers of epochs
    that are trained and that are to be trained, of all folds.

    Raises
    ------
    ConfigError, TrainingError
        As :func:`require_trainable_folds`; and TrainingError where a loss diverges.
    """
    require_trainable_folds(data.targets, split, config)
    tasks = fold_tasks(split, config.seed)
    n_done, n_total = 0, len(tasks) * sum(horizons(config))

    def fit(tasks: Sequence[HeadTask], horizon: int, keep: Collection[int]) -> list[Trajectory]:
        nonlocal n_done
        trained = fit_on_cores(
            data,
            tasks,
            config,
            n_epochs=horizon,
            keep=keep,
            on_epochs=lambda n: on_progress(n_done + n, n_total),
        )
        n_done += len(tasks) * horizon
        return trained

    known = weigh_findings(data.targets, clusters, split, config.select_by)
    return search_with(fit, tasks, config, data.targets, known)


FitTasks: TypeAlias = Callable[[Sequence[HeadTask], int, Collection[int]], list[Trajectory]]
"""Trains tasks for a number of epochs, and keeps the weights of each after some of them."""


def search_with(
    fit: FitTasks,
    tasks: Sequence[HeadTask],
    config: Recipe,
    targets: NDArray[np.float32],
    weighing: Weighing,
) -> EpochSearch:
    """Score every candidate on every task's held-out rows, with any function that trains tasks."""
    trajectories: dict[int, list[Trajectory]] = {}
    for horizon in horizons(config):
        keep = (horizon,) if config.has_horizon else config.epochs
        with told_as(count(horizon, "epoch")) if config.has_horizon else nullcontext():
            trajectories |= dict.fromkeys(keep, fit(tasks, horizon, keep))
        logger.info("%s folds are trained for up to %s epochs", len(tasks), horizon)
    scores = np.array(
        [
            [
                score_fold(targets[task.held_out_rows], fold.probabilities[epochs], weighing)
                for task, fold in zip(tasks, folds, strict=True)
            ]
            for epochs, folds in trajectories.items()
        ]
    )  # (C, K)
    table = _tabulate(list(trajectories), scores)
    best = choose_candidate(scores, within_one_se=config.within_one_se)
    return EpochSearch(trajectories, table, list(trajectories)[best], weighing)


@dataclass(frozen=True, eq=False)
class Weighing:
    """How much the AUROC of each finding counts where candidates are compared."""

    weights: FloatArray
    """Not negative, shape ``(F,)``."""
    measure: str
    """What the weighted mean is, in words."""


def weigh_findings(
    targets: NDArray[np.float32], clusters: Array | None, split: Split, select_by: str
) -> Weighing:
    """Weigh findings by what can be known of their AUROC, from the numbers of their training rows.

    ``"macro"`` weighs all alike. ``"learnable"`` leaves out those with fewer than
    :data:`LEARNABLE` positive or negative clusters, whose AUROC is noise. ``"weighted"`` takes the
    inverse of 1 / n+ + 1 / n-, to which the variance of an AUROC is nearly proportional. Where some
    fold can score no finding that counts, all count alike.
    """
    train = ~split.is_test
    own = None if clusters is None else clusters[train]
    n_present, n_absent = (count_clusters(targets[train] == value, own) for value in (1, 0))
    weighing = Weighing(np.ones(targets.shape[1]), "macro AUROC")
    if select_by == "learnable":
        enough = np.minimum(n_present, n_absent) >= LEARNABLE
        weighing = Weighing(
            enough.astype(np.float64),
            f"mean AUROC of the {enough.sum()} of {count(len(enough), 'finding')} with {LEARNABLE} "
            "positive (and negative) training patients or studies",
        )
    elif select_by == "weighted":
        weighing = Weighing(
            n_present * n_absent / np.maximum(n_present + n_absent, 1),
            "mean AUROC, findings weighted by inverse variance",
        )
    folds = [targets[split.held_out(k)] for k in range(split.n_folds)]
    if all((weighing.weights[has_both_classes(fold)] > 0).any() for fold in folds):
        return weighing
    return Weighing(np.ones(targets.shape[1]), "macro AUROC")


def score_fold(targets: Array, probabilities: Array, weighing: Weighing | None) -> float:
    """Compute the weighted mean AUROC over the findings that are defined, of ``(n, F)``."""
    weights = np.ones(targets.shape[1]) if weighing is None else weighing.weights
    return float(support_mean(auroc(targets, probabilities), weights))


def choose_candidate(scores: FloatArray, *, within_one_se: bool = False) -> int:
    """Choose among C candidates by their scores on K folds, ``(C, K)``; gives its number.

    It is the one with the best mean, of equal ones the first. With `within_one_se` it is the first
    whose mean falls short of the best by no more than one standard error of their difference over
    the folds (the rule of Breiman et al. 1984, whose standard error is that of the best mean;
    folds that are hard for one candidate are hard for all, which a difference leaves out).
    """
    best = int(np.argmax(scores.mean(axis=1)))
    if not within_one_se or scores.shape[1] < 2:
        return best
    behind = scores[best] - scores  # (C, K)
    error = behind.std(axis=1, ddof=1) / np.sqrt(scores.shape[1])
    return int(np.argmax(behind.mean(axis=1) <= error))


def require_trainable_folds(targets: NDArray[np.float32], split: Split, config: Recipe) -> None:
    """Raise unless every fold can be trained and scored; called before the long work.

    Raises
    ------
    ConfigError
        A fold has fewer rows to train on than a batch, or there is no such rule for thresholds.
    TrainingError
        No finding has both a positive and a negative among the rows that a fold holds out.
    """
    find_rule(config.threshold_rule)
    tasks = fold_tasks(split, config.seed)
    count_steps(tasks, config.batch_size)
    for k, task in enumerate(tasks, start=1):
        held_out = targets[task.held_out_rows]
        if not ((held_out == 1).any(axis=0) & (held_out == 0).any(axis=0)).any():
            raise TrainingError(
                f"Among the {count(len(held_out), config.level)} of fold {k}, no finding has both "
                "a positive and a negative one, so that no AUROC is defined. Use fewer --folds, or "
                "more data."
            )


def split_cohort(cohort: Cohort, config: Recipe, tested: int | None = None) -> Split:
    """Choose test rows and folds as a recipe asks: those that were given, or new ones.

    Of a nested cross-validation it is the split that tests the outer fold `tested`; see
    :func:`cxr_cache.datasets.splits.make_outer_split`.

    Raises
    ------
    ConfigError
        A split was given, and a nested cross-validation is asked for; or as the splits raise.
    """
    is_given = config.split == "given" and has_given_split(cohort)
    if isinstance(config, TrainConfig) and config.n_outer_folds is not None:
        if is_given:
            raise ConfigError(
                "The data set comes with a split, and --protocol nested makes outer folds of all "
                "its images. Add --split new to leave the given split aside, or test on it with "
                "--protocol holdout."
            )
        return make_outer_split(
            cohort.targets,
            cohort.groups,
            tested,
            n_outer_folds=config.n_outer_folds,
            n_folds=config.n_folds,
            seed=config.seed,
        )
    options: dict[str, Any] = {
        "by": config.split_by,
        **{name: getattr(config, name) for name in ("n_folds", "test_fraction", "seed")},
    }
    if is_given:
        return take_given_split(cohort, **options)
    return make_split(cohort.targets, cohort.groups, cohort.findings, **options)


def split_rows(
    cohort: Cohort, studies: Studies | None, config: Recipe, tested: int | None = None
) -> Split:
    """Split the rows that are trained on: the images of a cohort, or the studies that they make.

    The labelled images are split in either case, so that both have the same test studies and folds.
    """
    if studies is None:
        return split_cohort(cohort, config, tested)
    rows = np.flatnonzero(studies.images.is_labelled)
    split = split_cohort(studies.images.take(rows), config, tested)
    return studies.take_split(split, rows)


def fold_tasks(split: Split, seed: int) -> list[HeadTask]:
    """One task per fold: trained on the others, scored on it."""
    return [
        HeadTask(
            split.trained_on(k),
            split.held_out(k),
            _head_seed(seed, k),
            f"fold {k + 1} of {split.n_folds}",
        )
        for k in range(split.n_folds)
    ]


def final_task(split: Split, seed: int) -> HeadTask:
    """Training on everything but test, with nothing left to score."""
    rows = np.flatnonzero(~split.is_test)
    return HeadTask(rows, np.empty(0, np.int64), _head_seed(seed, -1), "final model")


def seed_of_repeat(seed: int, repeat: int) -> int:
    """Derive the seed of a repeat, counted from 1, that no other has; the first has the run's own.

    The split is that of the run's seed in all of them.
    """
    if repeat == 1:
        return seed
    return int(np.random.SeedSequence([seed, repeat]).generate_state(1)[0])


def count_epochs(
    on_progress: Callable[[int, int], None], n_repeats: int, repeat: int, done: int, of: int
) -> None:
    """Count the epochs of all repeats, each of which has as many."""
    on_progress((repeat - 1) * of + done, n_repeats * of)


def _head_seed(seed: int, fold: int) -> int:
    """Derive the seed for the head of one fold; the final model counts as fold -1."""
    return int(np.random.SeedSequence([seed, fold + 1]).generate_state(1)[0])


def _tabulate(candidates: Sequence[int], scores: FloatArray) -> pd.DataFrame:
    n_folds = scores.shape[1]
    spread = scores.std(axis=1, ddof=1) if n_folds > 1 else np.nan
    folds = {f"fold_{k}": of_fold for k, of_fold in enumerate(scores.T, start=1)}
    described = {"epochs": candidates, "mean_auroc": scores.mean(axis=1), "std_auroc": spread}
    table: pd.DataFrame = pd.DataFrame(described | folds)
    return table


# -- the final model --------------------------------------------------------------------


def train_final(
    data: Rows, split: Split, search: EpochSearch, config: TrainConfig
) -> tuple[HeadBank, list[dict[str, float]]]:
    """Make the model that test will see: one head, or the folds' heads where they are averaged.

    It comes with the history of its epochs; empty where heads of the folds are the final ones.
    """
    if config.final != "refit":
        stacked = stack_members(final_members(search, config), search.chosen)
        return HeadBank.from_snapshot(stacked, dropout=config.dropout), []
    rates = replay_rates(search)
    return refit(data, split, config, n_epochs=len(rates), learning_rates=rates)


def refit(
    data: Rows,
    split: Split,
    config: TrainConfig,
    *,
    n_epochs: int,
    learning_rates: Sequence[float] | None = None,
) -> tuple[HeadBank, list[dict[str, float]]]:
    """Train one head on all rows but test; give it with its history.

    `learning_rates` holds the rate of every epoch; None follows the schedule, which must not ask
    for held-out rows.
    """
    task = final_task(split, config.seed)
    (trajectory,) = fit_heads(
        data,
        [task],
        replace(config, early_stopping=None),
        n_epochs=n_epochs,
        keep=[n_epochs],
        learning_rates=learning_rates,
    )
    for row in trajectory.history:
        tell_of_epoch(task.name, row)
    bank = HeadBank.from_snapshot(trajectory.weights[n_epochs], dropout=config.dropout)
    return bank, trajectory.history


def final_members(search: EpochSearch, config: Recipe) -> list[Trajectory]:
    """Select the folds whose models make the final one: all of them, or the best."""
    folds = search.trajectories[search.chosen]
    if config.final == "ensemble":
        return folds
    scores = search.table.set_index("epochs").loc[search.chosen].filter(like="fold_")
    return [folds[int(np.argmax(scores))]]


def stack_members(members: Sequence[Trajectory], epoch: int) -> dict[str, Tensor]:
    """Stack the weights of several models after `epoch` into tensors with the models on axis 0."""
    states = [member.weights[epoch] for member in members]
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}


def replay_rates(search: EpochSearch) -> list[float]:
    """Compute the learning rates of a refit by :func:`average_rates` of the chosen candidate."""
    folds, chosen = search.trajectories[search.chosen], search.chosen
    return average_rates([trajectory.history[:chosen] for trajectory in folds])


def average_rates(histories: Sequence[Sequence[Mapping[str, float]]]) -> list[float]:
    """Take the geometric mean over folds of each epoch's learning rate.

    A refit uses these rates, since it has no held-out rows to watch. Where folds stopped early, it
    stops after their mean number of epochs. The histories are those of the folds'
    :class:`cxr_cache.training.fit.Trajectory`.
    """
    n_epochs = round(np.mean([len(history) for history in histories]))
    rates = [
        [history[epoch]["lr"] for history in histories if len(history) > epoch]
        for epoch in range(n_epochs)
    ]
    return [float(np.exp(np.log(at_epoch).mean())) for at_epoch in rates]
