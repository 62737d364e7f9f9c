"""How unlike the training images an image is: a distance between what the head reads of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

MAX_WIDTH: Final = 2048
"""Width of what the head reads up to which a run keeps this: 16 MB."""
_MAX_ROWS: Final = 20_000
_N_QUANTILES: Final = 1001
UNUSUAL: Final = 0.99
"""Quantile from which on an image is pointed out."""


@dataclass(frozen=True)
class TrainingDistribution:
    """Mean and covariance of what a head reads of its training images, and their own distances.

    The distance is Mahalanobis's, as Lee et al. (2018, "A simple unified framework for detecting
    out-of-distribution samples and adversarial attacks") use it, with one Gaussian for all images,
    since findings overlap. Covariances are shrunk (Ledoit & Wolf 2004): there may be fewer images
    than dimensions.
    """

    mean: NDArray[np.float32]
    """``(D,)``"""
    whitening: NDArray[np.float32]
    """``(D, D)``: what makes the distance a length, by ``(x - mean) @ whitening``."""
    quantiles: NDArray[np.float32]
    """Distances of training images, each to the images of other folds, at 1,001 even shares of
    them from 0 to 1. Those to a mean that an image has its part in would be too small, and every
    new image would seem unlike."""

    def distances(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Distance of each row of ``(N, D)``; NaN where one of its values is not finite."""
        usable = np.isfinite(features).all(axis=1)
        found = np.full(len(features), np.nan)
        centred = features[usable].astype(np.float64) - self.mean
        found[usable] = np.linalg.norm(centred @ self.whitening, axis=1)
        return found

    def quantiles_of(self, distances: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of training images that are no further away: 0 to 1; NaN for NaN."""
        shares = np.linspace(0, 1, len(self.quantiles))
        found: NDArray[np.float64] = np.interp(distances, self.quantiles, shares)
        return np.where(np.isnan(distances), np.nan, found)


def fit_distribution(
    features: NDArray[np.float32], folds: NDArray[np.int64], *, seed: int = 0
) -> TrainingDistribution | None:
    """Describe training images by what the head reads of them.

    Parameters
    ----------
    features
        Of training images alone, ``(n, D)``, as the head reads them.
    folds
        Fold of each, ``(n,)``, which keeps patients together.
    seed
        Chooses 20,000 images where there are more.

    Returns
    -------
    TrainingDistribution | None
        None where D is above 2,048, or there are not two folds with two images each.
    """
    if len(features) > _MAX_ROWS:
        chosen = np.random.default_rng(seed).choice(len(features), _MAX_ROWS, replace=False)
        features, folds = features[chosen], folds[chosen]
    names, counts = np.unique(folds, return_counts=True)
    if features.shape[1] > MAX_WIDTH or len(names) < 2 or counts.min() < 2:
        return None
    apart = measure_apart(features, folds, seed=seed)
    whole = _fit(features)
    quantiles = np.quantile(apart, np.linspace(0, 1, _N_QUANTILES)).astype(np.float32)
    return TrainingDistribution(whole.mean, whole.whitening, quantiles)


def measure_apart(
    features: NDArray[np.float32], folds: NDArray[np.int64], *, seed: int = 0
) -> NDArray[np.float64]:
    """Distance of each image to the images of the other folds, ``(n,)``.

    Parameters
    ----------
    features
        Finite, ``(n, D)``.
    folds
        Fold of each, ``(n,)``; in every fold the others have two images or more.
    seed
        Chooses 20,000 images of the other folds where there are more.
    """
    rng = np.random.default_rng(seed)
    apart = np.empty(len(features))
    for name in np.unique(folds):
        held_out = folds == name
        others = np.flatnonzero(~held_out)
        if len(others) > _MAX_ROWS:
            others = np.sort(rng.choice(others, _MAX_ROWS, replace=False))
        apart[held_out] = _fit(features[others]).distances(features[held_out])
    return apart


def _fit(features: NDArray[np.float32]) -> TrainingDistribution:
    mean, covariance = shrink_covariance(features.astype(np.float64))
    # The covariance may be singular where a value never varies; no image differs there from
    # the others, and a tiny variance says so of one that does.
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, max(values.max(), np.finfo(np.float32).tiny) * 1e-9)
    whitening = (vectors / np.sqrt(values)).astype(np.float32)
    return TrainingDistribution(mean.astype(np.float32), whitening, np.empty(0, np.float32))


def shrink_covariance(
    x: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean ``(D,)`` and covariance ``(D, D)`` of ``(N, D)``, shrunk (Ledoit & Wolf 2004, eq. 14).

    The same as ``sklearn.covariance.ledoit_wolf``, in a sixth of its time: that sums the fourth
    moments of all pairs of dimensions, which together are the squared lengths, squared.
    """
    n, n_dimensions = x.shape
    mean = x.mean(axis=0)
    centred = x - mean
    covariance = centred.T @ centred / n
    variance = np.trace(covariance) / n_dimensions  # mu
    spread = (np.square(covariance).sum() - n_dimensions * variance**2) / n_dimensions  # d^2
    fourth = np.square(np.square(centred).sum(axis=1)).sum() / n
    error = (fourth - np.square(covariance).sum()) / (n_dimensions * n)  # b^2
    share = min(error / spread, 1.0) if error > 0 and spread > 0 else 0.0
    covariance *= 1 - share
    covariance[np.diag_indices(n_dimensions)] += share * variance
    return mean, covariance
