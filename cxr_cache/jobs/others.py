"""Jobs on a run and other data: an external test set, and what prompts alone can tell."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

from cxr_cache.config import EncoderOptions, EvaluateConfig
from cxr_cache.encoders.loading import reload_encoder
from cxr_cache.evaluation.evaluate import Evaluation, evaluate_predictions
from cxr_cache.evaluation.zero_shot import ZeroShot
from cxr_cache.jobs.scoring import refresh_report
from cxr_cache.models.predict import predict_store
from cxr_cache.models.run import Run
from cxr_cache.store.feature_store import FeatureStore

logger = logging.getLogger(__name__)


def evaluate_on_store(
    run: Run,
    store_path: str | Path,
    *,
    groups: str | Path | None = None,
    n_resamples: int = EvaluateConfig.n_resamples,
    seed: int = EvaluateConfig.seed,
    model: str | None = None,
    device: str = EncoderOptions.device,
) -> Evaluation:
    """Score a run on the images of another store: an external test set.

    Thresholds and calibration are the run's own; nothing is chosen on the other store, and nothing
    is written. Images of the run's own data are warned of: their figures are too good.

    Parameters
    ----------
    run
        A finished run.
    store_path
        Feature store of the same encoder, with labels of the run's findings.
    groups, n_resamples, seed
        As in :func:`cxr_cache.evaluation.evaluate.evaluate_predictions`.
    model, device
        For a fine-tuned run, whose last blocks are computed anew: the encoder, if it has moved, and
        the device.

    Raises
    ------
    StoreMismatchError
        The store is of another encoder, or lacks the tokens that the run's blocks read.
    TableError
        Its targets do not fit the run, or there is nothing to evaluate.

    Examples
    --------
    >>> run = Run.open("runs/first")  # doctest: +SKIP
    >>> external = evaluate_on_store(run, "other_hospital.h5")  # doctest: +SKIP
    >>> external.metrics["test"]["macro_auroc"]  # doctest: +SKIP
    """
    with FeatureStore.open(store_path) as features:
        encoder = None
        if run.load_model().tail is not None and not features.header.encoder.get("imported"):
            encoder = reload_encoder(features.header.encoder, model=model, device=device)
        predictions, targets = predict_store(run, features, encoder)
    known = predictions["image_id"].isin(run.read_table("splits")["image_id"])
    if known.any():
        logger.warning(
            "%s of the %s images belong to the run's own data; figures on images that it was "
            "trained on are too good.",
            f"{known.sum():,}",
            f"{len(known):,}",
        )
    return evaluate_predictions(
        predictions,
        targets,
        run.thresholds,
        calibration=run.calibration,
        rule=run.threshold_rule,
        groups=groups,
        n_resamples=n_resamples,
        seed=seed,
    )


def keep_zero_shot(run: Run, found: ZeroShot) -> str:
    """Put a table of prompts into the folder of the run that it belongs to, and on its page.

    Returns
    -------
    str
        Where it is, in a sentence; empty where it belongs to no run.
    """
    if not found.is_of_run:
        return ""
    try:
        kept = run.write_table("zero_shot", found.table)
        page = refresh_report(run)
    except PermissionError as error:  # the run may be someone else's
        return f"Not kept with the run: {error.filename} cannot be written."
    if page is not None:
        return f"Kept as {kept}, and shown on the run's page {page}."
    command = shlex.join(["cxr-cache", "report", str(run.path)])
    return f"Kept as {kept}; `{command}` puts it on the run's page."
