"""Store to run folder: a head on cached embeddings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cxr_cache.common.devices import resolve_device, resolve_training_dtype
from cxr_cache.common.machine import describe_machine
from cxr_cache.common.wording import count
from cxr_cache.config import RepeatConfig, TrainConfig
from cxr_cache.datasets.cohort import Cohort, finding_table
from cxr_cache.datasets.splits import Split
from cxr_cache.models.heads import predict_probabilities
from cxr_cache.models.run import Run, SavedModel, require_free
from cxr_cache.store.rows import TrainingData, load_training_data
from cxr_cache.store.side_by_side import StorePaths, list_stores, open_stores
from cxr_cache.training.baselines import train_logistic
from cxr_cache.training.fit import told_as
from cxr_cache.training.outcome import (
    TrainResult,
    describe_codes,
    describe_head,
    describe_labels,
    describe_split,
    note_split,
    write_outcome,
)
from cxr_cache.training.search import (
    require_trainable_folds,
    search_epochs,
    split_rows,
    stack_members,
    train_final,
    weigh_findings,
)

logger = logging.getLogger(__name__)


def fit_run(
    store_path: StorePaths,
    run_dir: str | Path,
    config: TrainConfig | None = None,
    *,
    labels: str | Path | None = None,
    allow_pending: bool = False,
    overwrite: bool = False,
    n_repeats: int = RepeatConfig.n_repeats,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> TrainResult:
    """Split, search the number of epochs, train the final head and write the run folder.

    Parameters and errors are those of :func:`cxr_cache.jobs.runs.train_head`, which calls this and
    then evaluates the run. Test rows take part in nothing but the final predictions.
    """
    config, n_repeats = config or TrainConfig(), RepeatConfig(n_repeats).n_repeats
    run_dir = Path(run_dir)
    labels = None if labels is None else Path(labels)
    require_free(run_dir, overwrite=overwrite)
    device = resolve_device(config.device)
    resolve_training_dtype(config.precision, device)  # refuses before anything is read
    with open_stores(store_path) as stores:
        data = load_training_data(
            stores[0], config, further=stores[1:], labels=labels, allow_pending=allow_pending
        )
        described: list[dict[str, Any]] = [
            {"path": str(path), "encoder": one.header.encoder, "cohort": one.header.cohort}
            for path, one in zip(list_stores(store_path), stores, strict=True)
        ]
        reading = stores[0].header.reading
    cohort, encoders = data.cohort, [one["encoder"] for one in described]
    n_rows = count(len(cohort), config.level)
    logger.info("%s: %s on %s, with %s", store_path, n_rows, config.device, config)
    split = split_rows(cohort, data.studies, config)
    require_trainable_folds(cohort.targets, split, config)  # before an old run gives way
    notes = data.notes + note_split(split, cohort, config.level)
    run = Run.create(
        run_dir,
        {
            "kind": "train",
            "train": asdict(config),
            "seed": config.seed,
            "machine": describe_machine(device),
            "findings": list(cohort.findings),
            "store": described[0],
            **({"further_stores": described[1:]} if described[1:] else {}),
            "reading": reading,
            "labels": describe_labels(labels),
            "label_codes": describe_codes(cohort),
            "n_views": len(data.embeddings),
            "random_encoder": any(bool(encoder.get("is_random")) for encoder in encoders),
            "split": describe_split(split, cohort),
            "warnings": list(notes),
        },
        overwrite=overwrite,
    )
    search = search_epochs(
        data,
        split,
        config,
        clusters=cohort.groups,
        on_progress=partial(_count, on_progress, n_repeats, 1),
    )
    bank, final_history = train_final(data, split, search, config)
    probabilities = predict_probabilities(bank, torch.from_numpy(data.embeddings[0]))
    baseline = None
    if config.baseline:
        weighing = weigh_findings(cohort.targets, cohort.groups, split, config.select_by)
        baseline = train_logistic(data, split, weighing, config)
    if n_repeats > 1:
        repeats = _test_repeats(data, split, config, n_repeats, on_progress)
        tested = [probabilities.numpy()[split.is_test], *repeats]
        run.config["n_repeats"] = n_repeats
        run.write_table("repeats", _tabulate_repeats(cohort, split, tested))
    logger.info("The final model is trained; writing %s", run_dir)
    run.save_fold_heads(stack_members(search.trajectories[search.chosen], search.chosen))
    write_outcome(
        run,
        cohort,
        split,
        search,
        config,
        predictions=probabilities.numpy(),
        features=data.embeddings[0],
        final_history=final_history,
        studies=data.studies,
        make_model=lambda thresholds: SavedModel(
            bank.snapshot(),
            cohort.findings,
            thresholds,
            encoders[0],
            describe_head(config),
            further_encoders=tuple(encoders[1:]),
        ),
        baseline=baseline,
        flow=data.flow,
        files=data.files,
    )
    return TrainResult(run, search, notes)


def _count(
    on_progress: Callable[[int, int], None], n_repeats: int, repeat: int, done: int, of: int
) -> None:
    """Count the epochs of all repeats, each of which has as many."""
    on_progress((repeat - 1) * of + done, n_repeats * of)


def _test_repeats(
    data: TrainingData,
    split: Split,
    config: TrainConfig,
    n_repeats: int,
    on_progress: Callable[[int, int], None],
) -> Iterator[NDArray[np.float32]]:
    """Train the recipe again on the same split, with other seeds; test predictions, ``(n, F)``."""
    embeddings = torch.from_numpy(data.embeddings[0])
    for repeat in range(2, n_repeats + 1):
        again = replace(config, seed=_seed_of_repeat(config.seed, repeat))
        progress = partial(_count, on_progress, n_repeats, repeat)
        groups = data.cohort.groups
        with told_as(f"repeat {repeat} of {n_repeats}"):
            found = search_epochs(data, split, again, clusters=groups, on_progress=progress)
            bank, _ = train_final(data, split, found, again)
        yield predict_probabilities(bank, embeddings).numpy()[split.is_test]


def _seed_of_repeat(seed: int, repeat: int) -> int:
    """Derive a seed that no other repeat has; the split keeps the run's own."""
    return int(np.random.SeedSequence([seed, repeat]).generate_state(1)[0])


def _tabulate_repeats(
    cohort: Cohort, split: Split, tested: Sequence[NDArray[np.float32]]
) -> pd.DataFrame:
    """Test predictions of every training, ``(n, F)`` each, numbered from 1."""
    of_test = cohort.take(np.flatnonzero(split.is_test))
    tables = [
        finding_table(of_test, probabilities).assign(repeat=repeat)
        for repeat, probabilities in enumerate(tested, start=1)
    ]
    table: pd.DataFrame = pd.concat(tables, ignore_index=True)
    return table
