"""What the package computes in one go, in the plain form that tests compare it with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cxr_cache.metrics.resampled import draw_weights
from cxr_cache.metrics.scores import Array, FloatArray, _count, _per_matrix, divide
from cxr_cache.training.losses import WeightedFocal


def focal_loss(
    logits: Tensor, targets: Tensor, *, gamma: float = 2.0, alpha: float | None = None
) -> Tensor:
    """Focal loss as its paper has it; without `alpha`, both classes weigh the same."""
    if alpha is None:
        return WeightedFocal(gamma)(logits, targets)
    return WeightedFocal(gamma, alpha, 1 - alpha)(logits, targets)


def reference_focal_loss(
    logits: Tensor, targets: Tensor, *, gamma: float = 2.0, alpha: float = 0.25
) -> Tensor:
    """The reference system's variant: positives and negatives are both multiplied by `alpha`."""
    return WeightedFocal(gamma, alpha, alpha)(logits, targets)


def bce_loss(logits: Tensor, targets: Tensor, *, positive_weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, with a factor on the positives of each finding, ``(F,)``."""
    weight = 1.0 if positive_weight is None else positive_weight
    return WeightedFocal(0.0, weight)(logits, targets)


def bootstrap_weights(
    groups: Array, n_resamples: int, seed: int, *, first: int = 0
) -> NDArray[np.float32]:
    """Weights of rows by their groups' names, ``(N,)`` -> ``(R, N)``, from resample `first` on."""
    names, codes = np.unique(groups, return_inverse=True)
    return draw_weights(codes, len(names), range(first, first + n_resamples), seed)


def average_precision(targets: Array, scores: Array) -> FloatArray:
    """Average precision of every finding, tied scores taken as one step.

    Equal to ``sklearn.metrics.average_precision_score`` on the labelled rows of each finding: the
    mean, over positives, of the precision among the rows that score at least as high.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, shape ``(N, F)``.
    scores
        Logits or probabilities, finite, shape ``(..., N, F)``.

    Returns
    -------
    FloatArray
        Shape ``(..., F)``; NaN where :func:`auroc` is, so that both are means over the same
        findings.

    Raises
    ------
    ValueError
        A score is NaN or infinite.
    """
    present, n_present, n_absent = _count(targets)
    labelled = ~np.isnan(targets)

    def precision_sum(matrix: Array) -> FloatArray:
        sums = np.zeros(matrix.shape[1])
        for f, scores in enumerate(matrix.T):
            everything, positives = (np.sort(scores[of[:, f]]) for of in (labelled, present))
            n_called = len(everything) - np.searchsorted(everything, positives)
            n_found = len(positives) - np.searchsorted(positives, positives)
            sums[f] = (n_found / n_called).sum()
        return sums

    return divide(_per_matrix(precision_sum, scores), np.where(n_absent > 0, n_present, 0))
