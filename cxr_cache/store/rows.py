"""Rows of a store that can be trained on, as a head reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cxr_cache.common.wording import count
from cxr_cache.config import TrainConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.flow import Flow
from cxr_cache.datasets.labels import read_labels
from cxr_cache.datasets.studies import Studies, group_by_study
from cxr_cache.errors import StoreFormatError, StoreIncompleteError, TrainingError
from cxr_cache.store.feature_store import EMBEDDED, FAILED, FeatureStore
from cxr_cache.store.side_by_side import Source, match_rows

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
_MUCH: Final = 2**28
"""Bytes from which on the free memory is asked for."""


@dataclass(frozen=True)
class LabelledRows:
    """Rows that hold an undamaged embedding and are labelled at all."""

    rows: NDArray[np.intp]
    """Their numbers in the store, ``(N,)``."""
    cohort: Cohort
    """The N images, or the studies that they make, with the targets to train on."""
    notes: tuple[str, ...]
    """What a reader of the results should know about the rows left out."""
    further: tuple[Source, ...] = ()
    """Other stores with the rows of the same N images, whose features are read beside these."""
    studies: Studies | None = None
    """How the images make studies, where those are trained on."""
    flow: Flow | None = None
    """What became of the other images of the data set's table."""
    files: NDArray[np.uint8] | None = None
    """SHA-256 of the file of each image, ``(N, 32)``; None where they are not known."""

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
    further: Sequence[FeatureStore] = (),
    labels: Path | None = None,
    allow_pending: bool = False,
    level: str = "image",
) -> LabelledRows:
    """Find the rows of a store that can be trained on, and check their digests.

    The targets of the CSV `labels` replace the store's. `allow_pending` takes what is there
    although extraction has not finished. Of `further` stores of the same images those rows are
    found that belong to the images; see :func:`cxr_cache.store.side_by_side.match_rows`. With the
    level ``"study"``, an image without a label is taken where another one of its study has one;
    :meth:`LabelledRows.by` then makes studies.

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
    StoreMismatchError
        A further store holds other images, files or labels.
    """
    done = find_done_rows(store, allow_pending=allow_pending)
    cohort = store.cohort
    if labels is not None:
        cohort = read_labels(labels, cohort)
    is_labelled = cohort.is_labelled
    if not is_labelled[done].any():
        raise TrainingError(
            f"None of the {len(done):,} finished images of {store.path} has a label. Give a CSV "
            "with --labels."
        )
    if level == "study":
        uids = cohort.study_uids
        is_labelled = np.isin(uids, uids[done][is_labelled[done]])
    labelled = is_labelled[done]
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
    notes += store.header.encoder.get("notes", [])
    if labels is not None and cohort.reading is not None:
        notes += cohort.reading.notes
    flow = _follow(store, cohort, is_labelled, level)
    sources: tuple[Source, ...] = ()
    if further:
        kept, sources, of_stores = find_beside(
            (store, rows), further, check_labels=labels is None, allow_pending=allow_pending
        )
        flow = flow.lose("no embedding in all stores", rows[~kept])
        rows, notes = rows[kept], [*notes, *of_stores]
    files = np.asarray(store.read_column("image_sha256"))[rows]
    return LabelledRows(
        rows,
        cohort.take(rows),
        tuple(notes),
        sources,
        flow=flow,
        files=files if files.any() else None,
    )


_MOST_REASONS: Final = 5
"""Reasons of failed rows that a flow tells apart."""


def _follow(
    store: FeatureStore, cohort: Cohort, is_labelled: NDArray[np.bool_], level: str
) -> Flow:
    """Count the images of a store, with the targets of `cohort`, that can be trained on."""
    table = {} if store.cohort.reading is None else store.cohort.reading.counts
    reading = cohort.reading if level == "image" else None  # it counts single images
    flow = Flow.begin(cohort, table, reading)
    flow = flow.lose("no label", ~is_labelled)
    status = store.status
    failed = np.flatnonzero(status == FAILED)
    reasons = np.array(store.read_errors(failed), object)
    often = [reason for reason, _ in Counter(reasons.tolist()).most_common(_MOST_REASONS)]
    for reason in often:
        flow = flow.lose(reason, failed[reasons == reason])
    flow = flow.lose("failed for other reasons", failed)
    return flow.lose("still pending", ~np.isin(status, (*EMBEDDED, FAILED)))


def find_beside(
    first: Source,
    further: Sequence[FeatureStore],
    *,
    check_labels: bool = True,
    allow_pending: bool = False,
) -> tuple[NDArray[np.bool_], tuple[Source, ...], tuple[str, ...]]:
    """Find the images of some rows of a store in further stores, and check these stores' digests.

    Gives which rows are kept, the further stores with their rows, and notes. Errors are those of
    :func:`find_done_rows` and :func:`cxr_cache.store.side_by_side.match_rows`.
    """
    done = [(one, find_done_rows(one, allow_pending=allow_pending)) for one in further]
    kept, rows, notes = match_rows(first, done, check_labels=check_labels)
    return kept, tuple(zip(further, rows, strict=True)), notes


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
    store: FeatureStore,
    rows: NDArray[np.intp],
    config: TrainConfig,
    further: Sequence[Source] = (),
    studies: Studies | None = None,
) -> NDArray[np.float32]:
    """Embeddings of some rows as a head of this recipe reads them, ``(V, N, D)``.

    Those of further stores follow along D, in the views that all stores hold. With `studies`, the
    images' features become theirs by :func:`cxr_cache.store.studies.average_views`. Errors are
    those of :func:`require_features`, and ConfigError where the features do not fit into memory.
    """
    sources = ((store, rows), *further)
    for one, _ in sources:
        require_features(one, config)
    columns = [(*source, name) for source in sources for name in FEATURES[config.features]]
    n_views = count_views([one for one, _ in sources]) if config.flip else 1
    width = sum(one.feature_shapes[name][1] for one, _, name in columns)
    n_bytes = n_views * len(rows) * width * 4
    if n_bytes >= _MUCH:
        from cxr_cache.common.devices import require_memory  # imports torch

        require_memory(
            n_bytes,
            f"The features of {count(len(rows), 'image')} of {store.path}",
            "Training holds them up to three times: use a machine with so much, or leave images "
            "out by --labels with a CSV of those to train on.",
        )
    prepared = np.empty((n_views, len(rows), width), np.float32)
    for start in range(0, len(rows), _ROWS_AT_ONCE):  # so that they are in memory once
        part = slice(start, start + _ROWS_AT_ONCE)
        parts = [
            one.read_rows(name, of_store[part])[:, :n_views].swapaxes(0, 1)
            for one, of_store, name in columns
        ]
        prepared[:, part] = prepare_features(parts, config.input_norm)
    return prepared if studies is None else _average(prepared, studies)


def count_views(stores: Sequence[FeatureStore]) -> int:
    """Views that all stores hold: 2 where each has the mirrored one, else 1."""
    return min(store.feature_shapes["embeddings"][0] for store in stores)


def note_views(stores: Sequence[FeatureStore], config: TrainConfig) -> tuple[str, ...]:
    """Say where a store's mirrored views are left aside, because another has none."""
    single = [str(one.path) for one in stores if one.feature_shapes["embeddings"][0] == 1]
    if not config.flip or len(single) in (0, len(stores)):
        return ()
    return (f"Mirrored images are not trained on, since {', '.join(single)} has none.",)


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
    flow: Flow | None = None
    """What became of the other images of the data set's table; as :attr:`LabelledRows.flow`."""
    files: NDArray[np.uint8] | None = None
    """SHA-256 of the files of the images, as :attr:`LabelledRows.files`."""

    @property
    def targets(self) -> NDArray[np.float32]:
        """``(N, F)``, NaN where unlabelled."""
        return self.cohort.targets


def load_training_data(
    store: FeatureStore,
    config: TrainConfig,
    *,
    further: Sequence[FeatureStore] = (),
    labels: Path | None = None,
    allow_pending: bool = False,
) -> TrainingData:
    """Read the embeddings that can be trained on, prepared as the head reads them.

    Parameters and errors are those of :func:`find_labelled_rows` and :func:`read_features`.
    """
    found = find_labelled_rows(
        store,
        further=further,
        labels=labels,
        allow_pending=allow_pending,
        level=config.level,
    ).by(config.level)
    embeddings = read_features(store, found.rows, config, found.further, found.studies)
    notes = (*found.notes, *note_views([store, *further], config))
    return TrainingData(embeddings, found.cohort, notes, found.studies, found.flow, found.files)


def _average(features: NDArray[np.float32], studies: Studies) -> NDArray[np.float32]:
    """What a head reads of studies, of what it reads of their images."""
    import torch  # others need no torch to read features

    from cxr_cache.store.studies import average_views

    rows, slots = studies.pick(np.arange(len(studies.cohort)))
    in_order, of = torch.from_numpy(features[:, rows]), torch.from_numpy(slots)
    averaged: NDArray[np.float32] = average_views(in_order, of).numpy()
    return averaged
