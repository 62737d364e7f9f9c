"""Evaluate a finished run, and keep its plots, page and model card in step with its figures."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cxr_cache.config import EvaluateConfig
from cxr_cache.errors import CxrCacheError, JobStopped, RunError
from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.models.run import Run
from cxr_cache.models.split_reads import SplitReads
from cxr_cache.report.model_card import read_card
from cxr_cache.report.report import write_report

logger = logging.getLogger(__name__)


def evaluate_run(
    run: Run,
    *,
    threshold_rule: str | None = EvaluateConfig.threshold_rule,
    calibration: str | None = EvaluateConfig.calibration,
    min_positives: int | None = EvaluateConfig.min_positives,
    groups: str | Path | None = None,
    n_resamples: int = EvaluateConfig.n_resamples,
    seed: int = EvaluateConfig.seed,
) -> dict[str, Any]:
    """Evaluate a run, store its figures, and bring its plots, page and card up to date.

    Parameters
    ----------
    run
        A finished run.
    threshold_rule, calibration, min_positives
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
    options: Any = {
        "threshold_rule": threshold_rule,
        "calibration": calibration,
        "min_positives": min_positives,
    }
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


def tell_of_reads(run: Run) -> str:
    """Say how often the test split of an evaluated run has been read; empty where nobody knows."""
    reads = SplitReads.of_run(run)
    return "" if reads is None else reads.to_text()


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
