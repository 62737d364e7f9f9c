"""Train a run and leave it finished: evaluated, with its plots, page and model card."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_cache.config import FinetuneConfig, RepeatConfig, TrainConfig
from cxr_cache.evaluation.evaluate import format_summary, score_run
from cxr_cache.evaluation.scored import read_groups
from cxr_cache.jobs.scoring import tell_of_reads, what_is_left
from cxr_cache.models.run import Run
from cxr_cache.report.report import write_report
from cxr_cache.store.side_by_side import StorePaths, list_stores
from cxr_cache.training.finetune import tune_run
from cxr_cache.training.fit import OnEpoch, telling
from cxr_cache.training.fit_on_cores import release_cores
from cxr_cache.training.outcome import TrainResult
from cxr_cache.training.train import fit_run

if TYPE_CHECKING:  # an ablation's baselines import scikit-learn, which a training does without
    from cxr_cache.training.ablate import Ablation

logger = logging.getLogger(__name__)


def _say_nothing(_text: str) -> None:
    pass


def _count_nothing(_n_done: int, _n_all: int) -> None:
    pass


def train_head(
    store_path: StorePaths,
    run_dir: str | Path,
    config: TrainConfig | None = None,
    *,
    labels: str | Path | None = None,
    groups: str | Path | None = None,
    allow_pending: bool = False,
    overwrite: bool = False,
    n_repeats: int = RepeatConfig.n_repeats,
    tell: Callable[[str], object] = _say_nothing,
    on_progress: Callable[[int, int], None] = _count_nothing,
    on_epoch: OnEpoch | None = None,
) -> TrainResult:
    """Train a head on a store, or on several, test it once, and write its page and model card.

    It leaves the same run folder as ``cxr-cache train``. Test rows take part in nothing but the
    final figures; thresholds come from out-of-fold predictions.

    Parameters
    ----------
    store_path
        Feature store with embeddings; or several stores of the same images, whose features the head
        reads side by side. Labels and split come from the first.
    run_dir
        Folder to write; it may not hold a finished run unless `overwrite`.
    config
        Recipe and protocol; by default the tuned recipe, as on the command line.
    labels
        CSV whose targets replace the store's.
    groups
        CSV of groups that are evaluated one by one, such as sex and age; see
        :func:`cxr_cache.evaluation.scored.join_groups`.
    allow_pending
        Train although extraction has not finished.
    overwrite
        Replace a finished run.
    n_repeats
        Number of trainings on the same split, each from its own seed. The first becomes the run's
        model; ``repeats.csv`` has the test predictions of all.
    tell
        Takes each part of the result in words, as soon as it is known: ``print`` in a notebook.
    on_progress
        Called with (epochs trained, epochs to train), over all folds.
    on_epoch
        Called after every epoch with the name of the training (``"fold 2 of 5"``,
        ``"final model"``) and a dictionary of epoch, lr, train_loss, val_loss, val_auroc and
        seconds. Where it raises, that is logged, it is not called again, and the training goes on.

    Returns
    -------
    TrainResult
        The run, the search and, as ``metrics``, what ``metrics.json`` holds.

    Raises
    ------
    RunError
        `run_dir` holds a finished run, or other files; or the run is trained and could not be
        evaluated or reported: the message says what is left to do.
    TableError
        `labels` or `groups` cannot be read.
    StoreIncompleteError, StoreFormatError
        The store cannot be trained on; see
        :func:`cxr_cache.store.rows.find_labelled_rows`.
    StoreMismatchError
        Two stores hold other images, files or labels; see
        :func:`cxr_cache.store.side_by_side.match_rows`.
    TrainingError
        The loss diverged, or no AUROC is defined in some fold.

    Examples
    --------
    >>> result = train_head("features.h5", "run", TrainConfig(seed=7))  # doctest: +SKIP
    >>> result.metrics["test"]["macro_auroc"]["value"]  # doctest: +SKIP
    0.74
    """
    _require_groups(groups)
    with telling(on_epoch):
        result = fit_run(
            store_path,
            run_dir,
            config,
            labels=labels,
            allow_pending=allow_pending,
            overwrite=overwrite,
            n_repeats=n_repeats,
            on_progress=on_progress,
        )
    release_cores()  # evaluating needs the memory
    tell(result.to_text())
    return _finish(result, groups, tell)


def finetune_tail(
    store_path: StorePaths,
    run_dir: str | Path,
    config: FinetuneConfig | None = None,
    *,
    image_dir: str | Path | None = None,
    from_run: str | Path | None = None,
    labels: str | Path | None = None,
    groups: str | Path | None = None,
    model: str | None = None,
    allow_pending: bool = False,
    overwrite: bool = False,
    n_repeats: int = RepeatConfig.n_repeats,
    echo: Callable[[str], object] = _say_nothing,
    tell: Callable[[str], object] = _say_nothing,
    on_progress: Callable[[int, int], None] = _count_nothing,
    on_epoch: OnEpoch | None = None,
) -> TrainResult:
    """Fine-tune the last blocks with a head, test once, and write the page and model card.

    It leaves the same run folder as ``cxr-cache finetune``. Interrupted, the same call continues
    after the last finished epoch. Under torchrun the processes share every batch, and the first
    one evaluates.

    Parameters
    ----------
    store_path
        Feature store, with tokens unless `image_dir` is given; one alone.
    run_dir
        Folder to write; it may not hold a finished run unless `overwrite`.
    config
        Recipe and protocol. :func:`cxr_cache.training.frozen_start.config_from_run` makes one that
        fits `from_run`.
    image_dir
        Folder with the images, to train end to end.
    from_run
        A run of ``train`` on the same store: its split, and heads to begin with. Its groups are
        evaluated too where `groups` are not given.
    labels, groups, allow_pending, tell
        As in :func:`train_head`.
    model
        The store's encoder, if it has moved; None takes the recorded name.
    overwrite
        Replace a finished run, or start an unfinished one anew.
    n_repeats
        As in :func:`train_head`; every repeat begins with the heads of the same repeat of
        `from_run`, which needs as many.
    echo
        Takes a line that says what trains, before it does.
    on_progress
        Called with (epochs trained, epochs to train), of all folds and the final model.
    on_epoch
        As in :func:`train_head`. Epochs from before an interruption are not told of again; of
        several processes, the first tells.

    Raises
    ------
    RunError
        As in :func:`train_head`; or `run_dir` holds an unfinished run of other options or of
        another store, or `from_run` does not fit.
    TableError, StoreMismatchError, StoreIncompleteError, StoreFormatError, EncoderError
        The tables, the store or the encoder cannot be used.
    TrainingError
        The loss diverged, an image has changed, or no AUROC is defined in some fold.

    Examples
    --------
    >>> config = config_from_run(Run.open("runs/first"))  # doctest: +SKIP
    >>> result = finetune_tail(
    ...     "features.h5", "runs/tuned", config, from_run="runs/first", tell=print
    ... )  # doctest: +SKIP
    """
    _require_groups(groups)
    if from_run is not None and groups is None:
        groups = Run.open(from_run).groups_path
    with telling(None if is_another_process() else on_epoch):
        result = tune_run(
            store_path,
            run_dir,
            config,
            image_dir=image_dir,
            from_run=from_run,
            labels=labels,
            model=model,
            allow_pending=allow_pending,
            overwrite=overwrite,
            n_repeats=n_repeats,
            echo=echo,
            on_progress=on_progress,
        )
    if is_another_process():
        return result
    tell(result.to_text())
    return _finish(result, groups, tell)


def is_another_process() -> bool:
    """Whether torchrun started this process beside the first, which alone evaluates."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


def refit_best(
    ablation: Ablation,
    store_path: StorePaths,
    run_dir: str | Path,
    *,
    n_jobs: int = TrainConfig.n_jobs,
    **options: Any,
) -> TrainResult:
    """Train the best setting of an ablation as a run of its own, and test it once.

    Parameters
    ----------
    ablation
        From :func:`cxr_cache.training.ablate.run_ablation` on the same store.
    store_path, run_dir, options
        As in :func:`train_head`.
    n_jobs
        Processes that share the folds.
    """
    config, paths = replace(ablation.best.config, n_jobs=n_jobs), list_stores(store_path)
    chosen = [paths[i] for i in ablation.best.stores]
    return train_head(chosen, run_dir, config, **options)


def _require_groups(groups: str | Path | None) -> None:
    """Refuse a table that cannot be read, before anything takes long."""
    if groups is not None:
        read_groups(Path(groups))


def _finish(
    result: TrainResult, groups: str | Path | None, tell: Callable[[str], object]
) -> TrainResult:
    """Evaluate and report a run that was just trained."""
    run = Run.open(result.run.path)
    with what_is_left(run, ["evaluate", "report"], "trained"):
        metrics = score_run(run, groups=groups, verb=run.config["kind"])
        tell("\n".join([format_summary(metrics), tell_of_reads(run)]))
        tell(f"Report: {write_report(run)}")
    return replace(result, run=run, metrics=metrics)
