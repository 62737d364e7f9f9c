"""Store to run folder: a head on cached embeddings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from cxr_cache.common.devices import resolve_device
from cxr_cache.config import TrainConfig
from cxr_cache.models.heads import predict_probabilities
from cxr_cache.models.run import Run, SavedModel, require_free
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import load_training_data
from cxr_cache.training.baselines import train_logistic
from cxr_cache.training.outcome import (
    TrainResult,
    describe_head,
    describe_labels,
    describe_split,
    note_split,
    write_outcome,
)
from cxr_cache.training.search import (
    require_trainable_folds,
    search_epochs,
    split_cohort,
    stack_members,
    train_final,
    weigh_findings,
)

logger = logging.getLogger(__name__)


def fit_run(
    store_path: str | Path,
    run_dir: str | Path,
    config: TrainConfig | None = None,
    *,
    labels: str | Path | None = None,
    allow_pending: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> TrainResult:
    """Split, search the number of epochs, train the final head and write the run folder.

    Parameters and errors are those of :func:`cxr_cache.jobs.runs.train_head`, which calls this and
    then evaluates the run. Test rows take part in nothing but the final predictions.
    """
    config = config or TrainConfig()
    run_dir = Path(run_dir)
    labels = None if labels is None else Path(labels)
    require_free(run_dir, overwrite=overwrite)
    resolve_device(config.device)
    with FeatureStore.open(store_path) as store:
        data = load_training_data(store, config, labels=labels, allow_pending=allow_pending)
        encoder = store.header.encoder
        cohort_source, reading = store.header.cohort, store.header.reading
    cohort = data.cohort
    logger.info("%s: %s images on %s, with %s", store_path, len(cohort), config.device, config)
    split = split_cohort(cohort, config)
    require_trainable_folds(cohort.targets, split, config)  # before an old run gives way
    notes = data.notes + note_split(split, cohort)
    run = Run.create(
        run_dir,
        {
            "kind": "train",
            "train": asdict(config),
            "seed": config.seed,
            "findings": list(cohort.findings),
            "store": {"path": str(store_path), "encoder": encoder, "cohort": cohort_source},
            "reading": reading,
            "labels": describe_labels(labels),
            "random_encoder": bool(encoder.get("is_random")),
            "split": describe_split(split, cohort),
            "warnings": list(notes),
        },
        overwrite=overwrite,
    )
    search = search_epochs(data, split, config, clusters=cohort.groups, on_progress=on_progress)
    bank, final_history = train_final(data, split, search, config)
    baseline = None
    if config.baseline:
        weighing = weigh_findings(cohort.targets, cohort.groups, split, config.select_by)
        baseline = train_logistic(data, split, weighing, config)
    probabilities = predict_probabilities(bank, torch.from_numpy(data.embeddings[0]))
    logger.info("The final model is trained; writing %s", run_dir)
    run.save_fold_heads(stack_members(search.trajectories[search.chosen], search.chosen))
    write_outcome(
        run,
        cohort,
        split,
        search,
        config,
        predictions=probabilities.numpy(),
        final_history=final_history,
        make_model=lambda thresholds: SavedModel(
            bank.snapshot(), cohort.findings, thresholds, encoder, describe_head(config)
        ),
        baseline=baseline,
    )
    return TrainResult(run, search, notes)
