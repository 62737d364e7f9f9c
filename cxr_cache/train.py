"""Store to run folder: split, search, final head, predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cxr_cache.cohort import Cohort, load_labels
from cxr_cache.config import TrainConfig
from cxr_cache.devices import resolve_device
from cxr_cache.errors import StoreFormatError, StoreIncompleteError, TrainingError
from cxr_cache.fit import TrainingData, prepare_embeddings
from cxr_cache.heads import HeadBank, predict_probabilities
from cxr_cache.metrics import choose_thresholds
from cxr_cache.run import Run, SavedModel, require_free
from cxr_cache.search import (
    EpochSearch,
    require_trainable_folds,
    search_epochs,
    train_final,
)
from cxr_cache.splits import Split, count_shared_studies, make_split
from cxr_cache.store import DONE, FAILED, PENDING, FeatureStore
from cxr_cache.tables import hash_file

FINAL: Final = "final"
"""What stands in the column `fold` of history.csv for the final model."""

# -- the rows ---------------------------------------------------------------------------


def load_training_data(
    store: FeatureStore,
    config: TrainConfig,
    *,
    labels: Path | None = None,
    allow_pending: bool = False,
) -> TrainingData:
    """Read the rows of a store that can be trained on, and check their digests.

    Parameters
    ----------
    store
        An open store.
    config
        For the preparation of embeddings.
    labels
        CSV whose targets replace the store's.
    allow_pending
        Train on what is there although extraction has not finished.

    Raises
    ------
    StoreIncompleteError
        Rows are pending, and `allow_pending` is off.
    StoreFormatError
        A row's bytes do not match its digest.
    TableError
        `labels` cannot be read, or names none of the images.
    TrainingError
        No image has a label.
    """
    done = find_done_rows(store, allow_pending=allow_pending)
    cohort = store.cohort
    if labels is not None:
        findings, targets = load_labels(labels, cohort.image_ids)
        cohort = replace(cohort, findings=findings, targets=targets)
    labelled = ~np.isnan(cohort.targets[done]).all(axis=1)
    if not labelled.any():
        raise TrainingError(
            f"None of the {len(done):,} finished images of {store.path} has a label. Give a CSV "
            "with --labels."
        )
    rows = done[labelled]
    n_failed = int((store.status == FAILED).sum())
    left_out = {
        "failed in extraction": n_failed,
        "were still pending": len(store) - len(done) - n_failed,
        "have no label": int((~labelled).sum()),
    }
    embeddings = np.ascontiguousarray(store.embeddings[rows].swapaxes(0, 1))  # (V, N, D)
    return TrainingData(
        prepare_embeddings(embeddings, config.input_norm),
        cohort.take(rows),
        tuple(
            f"{count:,} of {len(store):,} images {why} and are left out."
            for why, count in left_out.items()
            if count
        ),
    )


def find_done_rows(store: FeatureStore, *, allow_pending: bool = False) -> NDArray[np.intp]:
    """Rows of a complete store that hold an embedding, each checked against its digest.

    Raises
    ------
    StoreIncompleteError
        Rows are pending and `allow_pending` is off, or no row is done.
    StoreFormatError
        A row's bytes do not match its digest.
    """
    status = store.status
    done = np.flatnonzero(status == DONE)
    n_pending = int((status == PENDING).sum())
    if not len(done):
        raise StoreIncompleteError(
            f"{store.path} has no finished row: {n_pending:,} are pending and "
            f"{len(store) - n_pending:,} failed. Run `cxr-cache extract` first."
        )
    if n_pending and not allow_pending:
        raise StoreIncompleteError(
            f"{store.path} is not complete: {n_pending:,} of {len(store):,} rows are pending. "
            "Run the `cxr-cache extract` command again to finish them; `cxr-cache train "
            "--allow-pending` trains on the rest."
        )
    if len(damaged := store.find_damaged(done)):
        command = "import --overwrite" if store.header.encoder.get("imported") else "extract"
        raise StoreFormatError(
            f"{store.path}: {len(damaged):,} rows are damaged (their bytes do not match their "
            f"digests); the first is that of {str(store.image_ids[damaged[0]])!r}. "
            f"Run `cxr-cache {command}` again: it writes them anew."
        )
    return done


# -- the whole --------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainResult:
    """A finished training: its folder, and what the search found."""

    run: Run
    search: pd.DataFrame
    chosen_epochs: int
    notes: tuple[str, ...]

    def to_text(self) -> str:
        """The search table, the choice and what to know about the rows, for a terminal."""
        n_folds = sum(str(column).startswith("fold_") for column in self.search)
        lines = [f"Epoch search: macro AUROC, mean and spread over {n_folds} held-out folds"]
        for row in self.search.to_dict("records"):
            mark = "   <- chosen" if row["epochs"] == self.chosen_epochs else ""
            score = f"{row['mean_auroc']:.4f} ± {row['std_auroc']:.4f}"
            lines.append(f"  {row['epochs']:>5} epochs  {score}{mark}")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def train_head(
    store_path: str | Path,
    run_dir: str | Path,
    config: TrainConfig | None = None,
    *,
    labels: str | Path | None = None,
    allow_pending: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Split, search the number of epochs, train the final head and write the run folder.

    Test rows take part in nothing but the final predictions; thresholds come from out-of-fold
    predictions. :func:`cxr_cache.evaluate.evaluate_run` then scores the run.

    Parameters
    ----------
    store_path
        Feature store with embeddings.
    run_dir
        Folder to write; it may not hold a finished run unless `overwrite`.
    config
        Recipe and protocol; the reference's by default.
    labels
        CSV whose targets replace the store's.
    allow_pending
        Train although extraction has not finished.
    overwrite
        Replace a finished run.
    on_progress
        Called with (heads trained, heads to train).

    Raises
    ------
    RunError
        `run_dir` holds a finished run, or other files.
    StoreIncompleteError, StoreFormatError
        The store cannot be trained on; see :func:`load_training_data`.
    TrainingError
        The loss diverged, or no AUROC is defined in some fold.
    """
    config = config or TrainConfig()
    run_dir = Path(run_dir)
    require_free(run_dir, overwrite=overwrite)
    resolve_device(config.device)
    with FeatureStore.open(store_path) as store:
        data = load_training_data(
            store,
            config,
            labels=None if labels is None else Path(labels),
            allow_pending=allow_pending,
        )
        encoder = store.header.encoder
        cohort_source = store.header.cohort
    cohort = data.cohort
    split = make_split(
        cohort.targets,
        cohort.groups,
        cohort.findings,
        by=config.split_by,
        n_folds=config.n_folds,
        test_fraction=config.test_fraction,
        seed=config.seed,
    )
    require_trainable_folds(data, split, config)  # before an old run gives way
    notes = data.notes + _note_split(split, cohort)
    run = Run.create(
        run_dir,
        {
            "kind": "train",
            "train": asdict(config),
            "seed": config.seed,
            "findings": list(cohort.findings),
            "store": {"path": str(store_path), "encoder": encoder, "cohort": cohort_source},
            "labels": None if labels is None else _describe_file(Path(labels)),
            "random_encoder": bool(encoder.get("is_random")),
            "warnings": list(notes),
        },
        overwrite=overwrite,
    )
    search = search_epochs(data, split, config, on_progress=on_progress)
    bank, final_history = train_final(data, split, search, config)
    _write_run(run, data, split, search, bank, final_history, config, encoder)
    run.config["chosen_epochs"] = search.chosen
    run.finish()
    return TrainResult(run, search.table, search.chosen, notes)


def _describe_file(path: Path) -> dict[str, str]:
    return {"path": str(path), "sha256": hash_file(path)}


def _note_split(split: Split, cohort: Cohort) -> tuple[str, ...]:
    """What the split does to the figures: rare findings, and studies on both sides."""
    notes = []
    n_positive = (cohort.targets[~split.is_test] == 1).sum(axis=0)
    rare = np.flatnonzero((n_positive > 0) & (n_positive < split.n_folds))
    if len(rare):
        notes.append(
            f"{len(rare)} findings have fewer positive train images than folds, so some folds "
            f"cannot score them: {', '.join(cohort.findings[f] for f in rare)}."
        )
    if split.by == "image":
        shared = count_shared_studies(split.is_test, cohort.study_uids)
        n_test = int(split.is_test.sum())
        notes.append(
            f"Split by image: {shared:,} of {n_test:,} test images ({shared / n_test:.0%}) have "
            "another image of the same study in train, so test figures are too good; those of the "
            "folds, split alike, too. Use --split-by study."
        )
    return tuple(notes)


def _write_run(
    run: Run,
    data: TrainingData,
    split: Split,
    search: EpochSearch,
    bank: HeadBank,
    final_history: list[dict[str, float]],
    config: TrainConfig,
    encoder: dict[str, Any],
) -> None:
    cohort = data.cohort
    out_of_fold = np.full(cohort.targets.shape, np.nan, np.float32)
    for k, trajectory in enumerate(search.trajectories[search.chosen]):
        out_of_fold[split.held_out(k)] = trajectory.probabilities[search.chosen]
    trained_on = ~split.is_test
    thresholds = choose_thresholds(cohort.targets[trained_on], out_of_fold[trained_on])
    member_probabilities = predict_probabilities(bank, torch.from_numpy(data.embeddings[0]))
    predictions = member_probabilities.mean(dim=0).numpy()  # (H, N, F) -> (N, F)

    run.save_model(
        SavedModel(
            bank.snapshot(),
            cohort.findings,
            dict(zip(cohort.findings, thresholds.tolist(), strict=True)),
            encoder,
            {"input_norm": config.input_norm, "hidden": config.hidden, "dropout": config.dropout},
        )
    )
    run.write_table("splits", _split_table(cohort, split))
    run.write_table("targets", finding_table(cohort, cohort.targets, ("image_id",)))
    run.write_table("epoch_search", search.table)
    run.write_table("history", _history_table(search, final_history, config))
    sides = np.where(split.is_test, "test", "train")
    run.write_table("predictions", _prediction_table(cohort, predictions, sides))
    run.write_table(
        "out_of_fold",
        _prediction_table(cohort.take(trained_on), out_of_fold[trained_on], sides[trained_on]),
    )


def _split_table(cohort: Cohort, split: Split) -> pd.DataFrame:
    table: pd.DataFrame = pd.DataFrame(
        {
            "image_id": cohort.image_ids,
            "study_uid": cohort.study_uids,
            "split": np.where(split.is_test, "test", "train"),
            "fold": pd.Series(split.fold + 1, dtype="Int64").mask(split.is_test),
        }
    )
    return table


def finding_table(
    cohort: Cohort, values: NDArray[np.float32], columns: Sequence[str]
) -> pd.DataFrame:
    """Columns that say which image, then one per finding with `values`, ``(N, F)``."""
    described = {
        "image_id": cohort.image_ids,
        "study_uid": cohort.study_uids,
        "projection": cohort.projections,
    }
    left = pd.DataFrame({name: described[name] for name in columns})
    table: pd.DataFrame = pd.concat(
        [left, pd.DataFrame(values, columns=list(cohort.findings))], axis=1
    )
    return table


def _prediction_table(
    cohort: Cohort, probabilities: NDArray[np.float32], sides: NDArray[np.str_]
) -> pd.DataFrame:
    table = finding_table(cohort, probabilities, ("image_id", "study_uid", "projection"))
    table.insert(3, "split", sides)
    return table


def _history_table(
    search: EpochSearch, final_history: list[dict[str, float]], config: TrainConfig
) -> pd.DataFrame:
    """Every epoch that was trained: of each fold up to the largest candidate, and of the final."""
    longest = max(search.trajectories)
    horizons = list(search.trajectories) if config.has_horizon else [longest]
    rows = [
        {"fold": str(k), "horizon": horizon, **row}
        for horizon in horizons
        for k, trajectory in enumerate(search.trajectories[horizon], start=1)
        for row in trajectory.history
    ]
    rows += [{"fold": FINAL, "horizon": search.chosen, **row} for row in final_history]
    table: pd.DataFrame = pd.DataFrame(rows)
    return table if config.has_horizon else table.drop(columns="horizon")
