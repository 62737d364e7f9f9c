"""Rows of a store that can be trained on, as a head reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cxr_cache.common.wording import count
from cxr_cache.config import TrainConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.labels import read_labels
from cxr_cache.datasets.studies import Studies, group_by_study
from cxr_cache.errors import StoreFormatError, StoreIncompleteError, TrainingError
from cxr_cache.store.feature_store import FeatureStore

FEATURES: Final = {
    "projected": ("embeddings",),
    "pooled": ("pooled",),
    "both": ("embeddings", "pooled"),
}
"""What a head may read, and the columns of a store that hold it; the names are those of
:data:`cxr_cache.config.FEATURES`."""


def prepare_embeddings(embeddings: NDArray[np.float32], input_norm: str) -> NDArray[np.float32]:
    """Embeddings as the head reads them: L2-normalised along the last axis, or as they are.

    What is standardised stays as it is: mean and spread belong to the rows that a head is trained
    on, and end up in its first layer.
    """
    return to_unit_length(embeddings) if input_norm == "l2" else embeddings


def to_unit_length(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Divide vectors along the last axis by their Euclidean norms; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: NDArray[np.float32] = vectors / np.maximum(norms, np.float32(1e-12))
    return scaled


def prepare_features(parts: Sequence[NDArray[np.float32]], input_norm: str) -> NDArray[np.float32]:
    """Side by side, each prepared by itself: the encoder's outputs differ in scale."""
    prepared = [prepare_embeddings(part, input_norm) for part in parts]
    return prepared[0] if len(prepared) == 1 else np.concatenate(prepared, axis=-1)


_ROWS_AT_ONCE: Final = 8192


@dataclass(frozen=True)
class LabelledRows:
    """Rows that hold an undamaged embedding and are labelled at all."""

    rows: NDArray[np.intp]
    """Their numbers in the store, ``(N,)``."""
    cohort: Cohort
    """The N images, or the studies that they make, with the targets to train on."""
    notes: tuple[str, ...]
    """What a reader of the results should know about the rows left out."""
    studies: Studies | None = None
    """How the images make studies, where those are trained on."""

    @property
    def images(self) -> Cohort:
        """The N images."""
        return self.cohort if self.studies is None else self.studies.images

    def by(self, level: str) -> LabelledRows:
        """Make studies of the images for the level ``"study"``; for ``"image"``, change nothing."""
        if level == "image":
            return self
        studies = group_by_study(self.cohort)
        notes = self.notes + studies.notes
        return replace(self, cohort=studies.cohort, notes=notes, studies=studies)


def find_labelled_rows(
    store: FeatureStore,
    *,
    labels: Path | None = None,
    allow_pending: bool = False,
    level: str = "image",
) -> LabelledRows:
    """Find the rows of a store that can be trained on, and check their digests.

    The targets of the CSV `labels` replace the store's. `allow_pending` takes what is there
    although extraction has not finished. With the level ``"study"``, an image without a label is
    taken where another one of its study has one; :meth:`LabelledRows.by` then makes studies.

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
        cohort = read_labels(labels, cohort)
    labelled = ~np.isnan(cohort.targets[done]).all(axis=1)
    if not labelled.any():
        raise TrainingError(
            f"None of the {len(done):,} finished images of {store.path} has a label. Give a CSV "
            "with --labels."
        )
    if level == "study":
        uids = cohort.study_uids[done]
        labelled = np.isin(uids, uids[labelled])
    rows = done[labelled]
    n_failed = store.count_rows().n_failed
    left_out = {
        "failed in extraction": n_failed,
        "were still pending": len(store) - len(done) - n_failed,
        "have no label": int((~labelled).sum()),
    }
    notes = [
        f"{n:,} of {len(store):,} images {why} and are left out."
        for why, n in left_out.items()
        if n
    ]
    if labels is not None and cohort.reading is not None:
        notes += cohort.reading.notes
    return LabelledRows(rows, cohort.take(rows), tuple(notes))


def find_done_rows(store: FeatureStore, *, allow_pending: bool = False) -> NDArray[np.intp]:
    """Rows of a complete store that hold an embedding, each checked against its digest.

    Raises
    ------
    StoreIncompleteError
        Rows are pending and `allow_pending` is off, or no row is done.
    StoreFormatError
        A row's bytes do not match its digest.
    """
    done, counts = store.embedded_rows, store.count_rows()
    n_pending = counts.n_pending - counts.n_without_tokens
    if not len(done):
        raise StoreIncompleteError(
            f"{store.path} has no finished row: {n_pending:,} are pending and "
            f"{counts.n_failed:,} failed. Run `cxr-cache extract` first."
        )
    if n_pending and not allow_pending:
        raise StoreIncompleteError(
            f"{store.path} is not complete: {n_pending:,} of {len(store):,} rows are pending. "
            "Run the `cxr-cache extract` command again to finish them; with --allow-pending, "
            "training takes what is there."
        )
    if len(damaged := store.find_damaged(done)):
        command = "import --overwrite" if store.header.encoder.get("imported") else "extract"
        raise StoreFormatError(
            f"{store.path} has {count(len(damaged), 'damaged row')} (bytes that do not match their "
            f"digests); the first is that of {str(store.image_ids[damaged[0]])!r}. "
            f"Run `cxr-cache {command}` again: it writes them anew."
        )
    return done


def require_features(store: FeatureStore, config: TrainConfig) -> None:
    """Raise StoreFormatError unless a store holds what a head of this recipe reads."""
    if lacking := [name for name in FEATURES[config.features] if name not in store.feature_shapes]:
        raise StoreFormatError(
            f"{store.path} holds no {lacking[0]!r}, which --features {config.features} reads; it "
            f"has {', '.join(store.feature_shapes)}. Use --features projected, or extract anew."
        )


def read_features(
    store: FeatureStore, rows: NDArray[np.intp], config: TrainConfig
) -> NDArray[np.float32]:
    """Embeddings of some rows as a head of this recipe reads them, ``(V, N, D)``.

    Errors are those of :func:`require_features`.
    """
    require_features(store, config)
    columns = FEATURES[config.features]
    n_views = store.feature_shapes["embeddings"][0] if config.flip else 1
    width = sum(store.feature_shapes[name][1] for name in columns)
    prepared = np.empty((n_views, len(rows), width), np.float32)
    for start in range(0, len(rows), _ROWS_AT_ONCE):  # so that they are in memory once
        part = rows[start : start + _ROWS_AT_ONCE]
        parts = [store.read_rows(name, part)[:, :n_views].swapaxes(0, 1) for name in columns]
        prepared[:, start : start + len(part)] = prepare_features(parts, config.input_norm)
    return prepared


@dataclass(frozen=True)
class TrainingData:
    """Rows that can be trained on: done in the store, undamaged, and labelled at all."""

    embeddings: NDArray[np.float32]
    """``(V, N, D)``, prepared by :func:`cxr_cache.store.rows.prepare_features`."""
    cohort: Cohort
    """The N images or studies; targets are NaN where unlabelled."""
    notes: tuple[str, ...] = ()
    """What a reader of the results should know about the rows left out."""
    studies: Studies | None = None
    """How images make the studies, where those are trained on."""

    @property
    def targets(self) -> NDArray[np.float32]:
        """``(N, F)``, NaN where unlabelled."""
        return self.cohort.targets


def load_training_data(
    store: FeatureStore,
    config: TrainConfig,
    *,
    labels: Path | None = None,
    allow_pending: bool = False,
) -> TrainingData:
    """Read the embeddings that can be trained on, prepared as the head reads them.

    Of studies they are those of :func:`cxr_cache.store.studies.average_views`. Parameters and
    errors are those of :func:`find_labelled_rows` and :func:`read_features`.
    """
    found = find_labelled_rows(
        store, labels=labels, allow_pending=allow_pending, level=config.level
    ).by(config.level)
    features = read_features(store, found.rows, config)
    if found.studies is not None:
        features = _average(features, found.studies)
    return TrainingData(features, found.cohort, found.notes, found.studies)


def _average(features: NDArray[np.float32], studies: Studies) -> NDArray[np.float32]:
    """What a head reads of studies, of what it reads of their images."""
    import torch  # others need no torch to read features

    from cxr_cache.store.studies import average_views

    rows, slots = studies.pick(np.arange(len(studies.cohort)))
    in_order, of = torch.from_numpy(features[:, rows]), torch.from_numpy(slots)
    averaged: NDArray[np.float32] = average_views(in_order, of).numpy()
    return averaged
