"""Several stores of the same images, so that a head reads the features of several encoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.wording import count, list_names
from cxr_cache.datasets.cohort import GIVEN
from cxr_cache.errors import ConfigError, StoreIncompleteError, StoreMismatchError
from cxr_cache.store.feature_store import FeatureStore

StorePaths: TypeAlias = str | Path | Sequence[str | Path]
"""One store, or several whose features are read side by side."""
Source: TypeAlias = tuple[FeatureStore, NDArray[np.intp]]
"""A store, and the numbers of its rows that are read, ``(N,)``."""


def list_stores(paths: StorePaths) -> list[str | Path]:
    """Return the paths of one store or of several as a list.

    Raises
    ------
    ConfigError
        There is none, or one is given twice.
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    if not listed:
        raise ConfigError("Give a feature store, or several of the same images.")
    resolved = [Path(path).resolve() for path in listed]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise ConfigError(f"{listed[i]} is given twice; its features are read once.")
    return listed


def require_one_store(paths: StorePaths, why: str) -> str | Path:
    """Return the one store that is given, or raise ConfigError with the reason for one."""
    listed = list_stores(paths)
    if len(listed) > 1:
        raise ConfigError(f"{why}, and {len(listed)} stores are given. Give one of them.")
    return listed[0]


@contextmanager
def open_stores(paths: StorePaths) -> Iterator[list[FeatureStore]]:
    """Open one store or several for reading, and close them at the end of the block.

    Errors are those of :func:`list_stores` and
    :meth:`cxr_cache.store.feature_store.FeatureStore.open`.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(FeatureStore.open(path)) for path in list_stores(paths)]


def match_rows(
    first: Source, further: Sequence[Source], *, check_labels: bool = True
) -> tuple[NDArray[np.bool_], list[NDArray[np.intp]], tuple[str, ...]]:
    """Find the images of some rows of a store in further stores of the same images.

    Parameters
    ----------
    first
        A store, and N of its rows.
    further
        Other stores, each with its rows that hold an embedding.
    check_labels
        Also compare labels, patients and given splits; without it only the studies.

    Returns
    -------
    kept
        Which of the N images all stores hold an embedding of, ``(N,)``.
    rows
        Of each further store the rows of the M images kept, in the order of the first's, ``(M,)``.
    notes
        What a reader of the results should know of images left out, or told by their ids alone.

    Raises
    ------
    StoreMismatchError
        Two stores hold other images, or other files or labels of an image.
    StoreIncompleteError
        No image has an embedding in all stores.
    """
    store, rows = first
    kept, notes, found = np.ones(len(rows), bool), [], []
    for other, done in further:
        places = _locate(store, other)
        _require_same_files(store, other, places)
        _require_same_table(store, other, places, check_labels=check_labels)
        is_done = np.isin(places[rows], done)
        if n := int((~is_done).sum()):
            have, are = ("has", "is") if n == 1 else ("have", "are")
            notes.append(
                f"{n:,} of {count(len(rows), 'image')} of {store.path} {have} no embedding in "
                f"{other.path} and {are} left out."
            )
        kept &= is_done
        found.append(places)
    if not kept.any():
        names = ", ".join(str(one.path) for one in (store, *(other for other, _ in further)))
        raise StoreIncompleteError(f"No image has an embedding in all of {names}.")
    aligned = [places[rows[kept]] for places in found]
    for (other, _), of_other in zip(further, aligned, strict=True):
        both = _has_digest(store, rows[kept]) & _has_digest(other, of_other)
        if n := int((~both).sum()):
            notes.append(
                f"{count(n, 'image')} of {store.path} and {other.path} {'is' if n == 1 else 'are'} "
                "taken for the same by the name of the file alone, since imported embeddings come "
                "without its digest."
            )
    return kept, aligned, tuple(notes)


def _locate(store: FeatureStore, other: FeatureStore) -> NDArray[np.intp]:
    """Row in the other store of every image of a store, ``(N,)``."""
    ours, theirs = pd.Index(store.image_ids), pd.Index(other.image_ids)
    lacking, extra = ours.difference(theirs, sort=False), theirs.difference(ours, sort=False)
    if len(lacking) or len(extra):
        parts = [
            f"{count(len(ids), 'image')} only in {where.path} (the first is {str(ids[0])!r})"
            for ids, where in ((lacking, store), (extra, other))
            if len(ids)
        ]
        raise StoreMismatchError(
            f"{store.path} and {other.path} hold different images: {' and '.join(parts)}, "
            f"{len(ours) - len(lacking):,} in both. Features are read side by side only where "
            "stores list the same images: extract or import both from the same table."
        )
    return np.asarray(theirs.get_indexer(ours))


def _has_digest(store: FeatureStore, rows: NDArray[np.intp]) -> NDArray[np.bool_]:
    return np.asarray(np.asarray(store.read_column("image_sha256"))[rows].any(axis=1))


def _require_same_files(store: FeatureStore, other: FeatureStore, places: NDArray[np.intp]) -> None:
    ours = np.asarray(store.read_column("image_sha256"))
    theirs = np.asarray(other.read_column("image_sha256"))[places]
    differs = (ours != theirs).any(axis=1) & ours.any(axis=1) & theirs.any(axis=1)
    if differs.any():
        i = int(differs.argmax())
        raise StoreMismatchError(
            f"{store.path} and {other.path} were made from different files for "
            f"{differs.sum():,} of {count(len(ours), 'image')}; the first is "
            f"{str(store.image_ids[i])!r}, of SHA-256 {ours[i].tobytes().hex()[:12]}... in the "
            f"one and {theirs[i].tobytes().hex()[:12]}... in the other. Extract both from the same "
            "folder of images."
        )


def _require_same_table(
    store: FeatureStore, other: FeatureStore, places: NDArray[np.intp], *, check_labels: bool
) -> None:
    """Raise unless both describe every image alike; labels come from the first store."""
    ours, theirs = store.cohort, other.cohort.take(places)
    names = ("study_uid", "patient_id", *GIVEN) if check_labels else ("study_uid",)
    for name in names:
        mine, others = (
            table[name].to_numpy(str) if name in table else np.full(len(table), "")
            for table in (ours.images, theirs.images)
        )
        _require_equal(store, other, name, mine, others, mine != others)
    if not check_labels:
        return
    if apart := [
        f"only {where.path} has {list_names([f for f in findings if f not in rest], 5)}"
        for where, findings, rest in (
            (store, ours.findings, theirs.findings),
            (other, theirs.findings, ours.findings),
        )
        if set(findings) - set(rest)
    ]:
        raise StoreMismatchError(
            f"{store.path} and {other.path} label different findings: {' and '.join(apart)}. "
            "Extract or import both from the same table, or give the labels of all with --labels."
        )
    for f, finding in enumerate(ours.findings):
        mine, others = ours.targets[:, f], theirs.targets[:, theirs.findings.index(finding)]
        differs = (mine != others) & ~(np.isnan(mine) & np.isnan(others))
        _require_equal(store, other, finding, mine, others, differs)


def _require_equal(
    store: FeatureStore,
    other: FeatureStore,
    what: str,
    ours: NDArray[Any],
    theirs: NDArray[Any],
    differs: NDArray[np.bool_],
) -> None:
    if not differs.any():
        return
    i = int(differs.argmax())
    raise StoreMismatchError(
        f"{store.path} and {other.path} differ in {what} for {differs.sum():,} of "
        f"{count(len(ours), 'image')}; the first is {str(store.image_ids[i])!r}: "
        f"{_describe(ours[i])} in {store.path}, {_describe(theirs[i])} in {other.path}. Extract or "
        "import both from the same table, or give the labels of all with --labels."
    )


def _describe(value: Any) -> str:
    if isinstance(value, str):
        return repr(str(value)) if value else "blank"
    return "unlabelled" if np.isnan(value) else f"{value:g}"
