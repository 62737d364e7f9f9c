"""Embeddings -> their places on a map of two axes, and how far each lies from the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cxr_cache.common.extras import require_extra
from cxr_cache.config import MapMethod
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.splits import assign_folds
from cxr_cache.errors import StoreFormatError, StoreIncompleteError
from cxr_cache.models.unlikeness import MAX_WIDTH, measure_apart
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import to_unit_length

MIN_ROWS: Final = 3
"""Fewer points are no map."""
N_FOLDS: Final = 5
"""Parts of the images of which each is measured against the others."""
_SEED: Final = 0


@dataclass(frozen=True, eq=False)
class Places:
    """Where the n images of a map lie."""

    coordinates: NDArray[np.float64]
    """``(n, 2)``"""
    variance: tuple[float, float] | None
    """Shares of the variance of all images along the two axes, 0 to 1; None for UMAP, whose axes
    have none."""


def read_unit_embeddings(store: FeatureStore, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """Embeddings of rows at length 1, ``(N, D)``, read once and block by block.

    Raises
    ------
    StoreFormatError
        A row holds NaN or infinity.
    """
    found = np.empty((len(rows), store.feature_shapes["embeddings"][1]), np.float32)
    start = 0
    for chunk in store.split_rows(rows, ["embeddings"]):
        block = store.read_views("embeddings", chunk, np.zeros_like(chunk))
        require_finite(store, chunk, block)
        found[start : start + len(chunk)] = to_unit_length(block)
        start += len(chunk)
    return found


def require_finite(
    store: FeatureStore, rows: NDArray[np.intp], embeddings: NDArray[np.float32]
) -> None:
    """Raise StoreFormatError where an embedding ``(B, D)`` of these rows holds NaN or infinity."""
    odd = rows[~np.isfinite(embeddings).all(axis=1)]
    if len(odd):
        raise StoreFormatError(
            f"{store.path}: the embedding of {str(store.image_ids[odd[0]])!r} holds NaN or "
            "infinity. `cxr-cache verify` tells which rows are damaged, and --repair has extract "
            "compute them anew."
        )


def require_embedded(store: FeatureStore, n_wanted: int, what: str) -> NDArray[np.intp]:
    """Rows that hold an embedding; StoreIncompleteError where they are fewer than `n_wanted`."""
    rows = store.embedded_rows
    if len(rows) < n_wanted:
        counts = store.count_rows()
        raise StoreIncompleteError(
            f"{store.path} has embeddings of {len(rows):,} of its {len(store):,} images "
            f"({counts.n_failed:,} failed, {counts.n_pending:,} pending), and {what} needs "
            f"{n_wanted}. Run `cxr-cache extract` first."
        )
    return rows


def place(
    embeddings: NDArray[np.float32], shown: NDArray[np.intp], method: MapMethod = "pca"
) -> Places:
    """Place images on a map.

    Parameters
    ----------
    embeddings
        Of all images, at length 1, ``(N, D)``.
    shown
        Which of them are placed, ``(n,)``. Principal components are those of all N images; UMAP
        is fitted to the n.
    method
        ``"pca"`` or ``"umap"``.

    Raises
    ------
    ConfigError
        UMAP is not installed.
    """
    if method == "umap":
        require_extra("umap", "--method umap")
        import umap

        # A seed makes it run on one core; the same command then draws the same map.
        fitted = umap.UMAP(metric="cosine", random_state=_SEED, n_jobs=1)
        return Places(np.asarray(fitted.fit_transform(embeddings[shown]), np.float64), None)
    from sklearn.decomposition import PCA  # a second to import, and few commands need it

    # Less their mean in double precision: unit vectors have a long one, and float32 sums of
    # squares would lose digits to it.
    centred = embeddings - embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
    is_tall = centred.shape[0] >= centred.shape[1]
    solver = "covariance_eigh" if is_tall else "full"
    n_axes = min(2, *centred.shape)
    fitted = PCA(n_axes, svd_solver=solver).fit(centred)
    coordinates, shares = np.zeros((len(shown), 2)), np.zeros(2)
    coordinates[:, :n_axes] = fitted.transform(centred[shown])
    shares[:n_axes] = np.nan_to_num(fitted.explained_variance_ratio_)  # 0 / 0 of equal images
    return Places(coordinates, (float(shares[0]), float(shares[1])))


def measure_unlikeness(
    embeddings: NDArray[np.float32], cohort: Cohort
) -> NDArray[np.float64] | None:
    """Share of images that lie no further from the others than each one does, ``(N,)``, up to 1.

    The distance is that of :mod:`cxr_cache.models.unlikeness`, of each image to the images of four
    other fifths, which hold none of its patient. None where the embeddings are wider than
    2,048 numbers, or there are too few patients or studies for five parts.
    """
    groups = cohort.groups
    if embeddings.shape[1] > MAX_WIDTH or len(np.unique(groups)) < N_FOLDS:
        return None
    folds = assign_folds(cohort.targets, groups, N_FOLDS, _SEED)
    if len(cohort) - np.bincount(folds).max() < 2:
        return None
    distances = measure_apart(embeddings, folds)
    n_no_further = np.searchsorted(np.sort(distances), distances, "right")
    shares: NDArray[np.float64] = n_no_further / len(distances)
    return shares
