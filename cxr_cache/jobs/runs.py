"""Train a run and leave it finished: evaluated, with its plots, page and model card."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_cache.config import EvaluateConfig, FinetuneConfig, TrainConfig
from cxr_cache.errors import CxrCacheError, JobStopped, RunError
from cxr_cache.evaluation.evaluate import format_summary, score_run
from cxr_cache.evaluation.scored import read_groups
from cxr_cache.models.run import Run
from cxr_cache.report.model_card import read_card
from cxr_cache.report.report import write_report
from cxr_cache.training.finetune import tune_run
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
    store_path: str | Path,
    run_dir: str | Path,
    config: TrainConfig | None = None,
    *,
    labels: str | Path | None = None,
    groups: str | Path | None = None,
    allow_pending: bool = False,
    overwrite: bool = False,
    tell: Callable[[str], object] = _say_nothing,
    on_progress: Callable[[int, int], None] = _count_nothing,
) -> TrainResult:
    """Train a head on a store, test it once, and write its page and model card.

    It leaves the same run folder as ``cxr-cache train``. Test rows take part in nothing but the
    final figures; thresholds come from out-of-fold predictions.

    Parameters
    ----------
    store_path
        Feature store with embeddings.
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
    tell
        Takes each part of the result in words, as soon as it is known: ``print`` in a notebook.
    on_progress
        Called with (epochs trained, epochs to train), over all folds.

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
    TrainingError
        The loss diverged, or no AUROC is defined in some fold.

    Examples
    --------
    >>> result = train_head("features.h5", "run", TrainConfig(seed=7))  # doctest: +SKIP
    >>> result.metrics["test"]["macro_auroc"]["value"]  # doctest: +SKIP
    0.74
    """
    _require_groups(groups)
    result = fit_run(
        store_path,
        run_dir,
        config,
        labels=labels,
        allow_pending=allow_pending,
        overwrite=overwrite,
        on_progress=on_progress,
    )
    release_cores()  # evaluating needs the memory
    tell(result.to_text())
    return _finish(result, groups, tell)


def finetune_tail(
    store_path: str | Path,
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
    echo: Callable[[str], object] = _say_nothing,
    tell: Callable[[str], object] = _say_nothing,
    on_progress: Callable[[int, int], None] = _count_nothing,
) -> TrainResult:
    """Fine-tune the last blocks with a head, test once, and write the page and model card.

    It leaves the same run folder as ``cxr-cache finetune``. Interrupted, the same call continues
    after the last finished epoch. Under torchrun the processes share every batch, and the first
    one evaluates.

    Parameters
    ----------
    store_path
        Feature store, with tokens unless `image_dir` is given.
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
    echo
        Takes a line that says what trains, before it does.
    on_progress
        Called with (epochs trained, epochs to train), of all folds and the final model.

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
    store_path: str | Path,
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
    config = replace(ablation.best.config, n_jobs=n_jobs)
    return train_head(store_path, run_dir, config, **options)


def evaluate_run(
    run: Run,
    *,
    threshold_rule: str | None = EvaluateConfig.threshold_rule,
    calibration: str | None = EvaluateConfig.calibration,
    groups: str | Path | None = None,
    n_resamples: int = EvaluateConfig.n_resamples,
    seed: int = EvaluateConfig.seed,
) -> dict[str, Any]:
    """Evaluate a run, store its figures, and bring its plots, page and card up to date.

    Parameters
    ----------
    run
        A finished run.
    threshold_rule, calibration
        Choose thresholds and calibration anew, on out-of-fold predictions; None keeps them.
    groups, n_resamples, seed
        As in :func:`cxr_cache.evaluation.evaluate.evaluate_predictions`. Groups are kept with the
        run.

    Returns
    -------
    dict[str, Any]
        What ``metrics.json`` holds; see :func:`cxr_cache.evaluation.evaluate.score_run`.

    Raises
    ------
    ConfigError
        An option is out of range.
    RunError, TableError
        The run's tables are missing or do not fit each other; or the page could not be written:
        the message says what is left to do.

    Examples
    --------
    >>> run = Run.open("runs/first")  # doctest: +SKIP
    >>> metrics = evaluate_run(run, calibration="platt", threshold_rule="sensitivity=0.9")
    ... # doctest: +SKIP
    """
    options: Any = {"threshold_rule": threshold_rule, "calibration": calibration}
    config = EvaluateConfig(n_resamples=n_resamples, seed=seed, **options)
    metrics = score_run(run, groups=groups, **vars(config))
    refresh_report(run)
    return metrics


def refresh_report(run: Run) -> Path | None:
    """Write a run's plots, page and card again, if it has a page, so that none shows old figures.

    The card keeps its licence and data set. Small pictures of images are left out, because the page
    does not know where the images lie; `cxr-cache report --image-dir` shows them again.

    Returns
    -------
    Path | None
        The page; None where the run has none.
    """
    if not run.report_path.is_file():
        return None
    had_pictures = b"data:image/jpeg" in run.report_path.read_bytes()
    with what_is_left(run, ["report"], "evaluated; its page still shows the figures of before"):
        card: Any = read_card(run)
        page = write_report(run, **card)
    logger.info("%s shows the new figures", page)
    if had_pictures:
        command = shlex.join(["cxr-cache", "report", str(run.path)])
        logger.warning(
            "%s had pictures, which other thresholds may sort otherwise. They were left out; "
            "`%s --image-dir FOLDER` draws them again.",
            page,
            command,
        )
    return page


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
        metrics = score_run(run, groups=groups)
        tell(format_summary(metrics))
        tell(f"Report: {write_report(run)}")
    return replace(result, run=run, metrics=metrics)


@contextmanager
def what_is_left(run: Run, verbs: Sequence[str], done: str) -> Iterator[None]:
    """Add to whatever ends the block early what is done, and which commands are left."""
    commands = [shlex.join(["cxr-cache", verb, str(run.path)]) for verb in verbs]
    left = f"{run.path} is {done}; what is left to do:\n" + "\n".join(commands)
    try:
        yield
    except CxrCacheError as error:
        raise RunError(f"{error}\n{left}") from error
    except OSError as error:
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise RunError(f"{where}{error.strerror}.\n{left}") from error
    except KeyboardInterrupt as stop:
        raise JobStopped(left) from stop
