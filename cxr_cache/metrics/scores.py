"""Scores of predictions: ranking, decisions and calibration, on plain arrays.

N is rows (images, or studies), F findings, R bootstrap resamples. Targets are 1 present, 0 absent,
NaN unlabelled. Unlabelled cells are left out, finding by finding.

One rule says everywhere what is undefined: AUROC and AP are NaN without a labelled positive or
without a labelled negative, F1 is NaN without a positive, and a rate is NaN where its denominator
is zero. Means over findings leave NaN out. (scikit-learn gives AP and F1 of 0.0 instead, which
lowers every macro mean for findings that nobody could have scored on.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
FloatArray: TypeAlias = NDArray[np.float64]

NEVER: Final = 2.0
"""Threshold of a finding that is never called present, since no probability reaches it."""
UNDECIDED: Final = 3.0
"""Threshold of a finding that is ranked only, since it had too few positives to choose one by."""
CONFUSION_COLUMNS: Final = ("tp", "fp", "fn", "tn")
N_BINS: Final = 10
"""Bins of equal width over [0, 1] for calibration."""
N_SETS: Final = 50
"""Sets of findings that are tried as a constant answer, where some cells are unlabelled."""
_RANKED_AT_ONCE = 2**17  # scores


# --- ranking --------------------------------------------------------------------------------------


def auroc(targets: Array, scores: Array) -> FloatArray:
    """Compute the area under the ROC curve of every finding; ties count half.

    It equals ``sklearn.metrics.roc_auc_score`` on the labelled rows of each finding. It is computed
    as the Mann-Whitney statistic: the ranks of the positives say how many negatives lie below them.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, shape ``(N, F)``.
    scores
        Logits or probabilities, finite, shape ``(..., N, F)``. Leading axes (epochs, heads) share
        the targets.

    Returns
    -------
    FloatArray
        Shape ``(..., F)``; NaN where a finding has no labelled positive or no labelled negative.

    Raises
    ------
    ValueError
        A score is NaN or infinite. A diverged model must not look like an undefined finding.

    Examples
    --------
    >>> auroc(np.array([[0.0], [1.0], [1.0]]), np.array([[0.2], [0.2], [0.9]]))
    array([0.75])
    """
    present, n_present, n_absent = _count(targets)
    unlabelled = np.isnan(targets).T
    by_finding = np.ascontiguousarray(present.T)

    def rank_sum(matrix: Array) -> FloatArray:
        # Unlabelled rows get the highest ranks, so that they change no other rank.
        filled = np.where(unlabelled, np.inf, matrix.T).astype(matrix.dtype)
        return _rank_sums(np.ascontiguousarray(filled), by_finding)

    n_won = _per_matrix(rank_sum, scores) - n_present * (n_present + 1) / 2
    return divide(n_won, n_present * n_absent)


def _rank_sums(scores: Array, chosen: NDArray[np.bool_]) -> FloatArray:
    """Sum the ranks of the chosen scores in each row, ``(F, N)`` -> ``(F,)``; ties share a mean.

    Takes a third of the time of ``scipy.stats.rankdata``, which counts because an epoch search does
    little else besides training. Large matrices are ranked a few rows at a time, because the
    temporary arrays are seven times as large as their rows.
    """
    n_rows = max(1, _RANKED_AT_ONCE // max(1, scores.shape[1]))
    if len(scores) > n_rows:
        starts = range(0, len(scores), n_rows)
        parts = [_rank_sums(scores[i : i + n_rows], chosen[i : i + n_rows]) for i in starts]
        return np.concatenate(parts)
    order = np.argsort(scores, axis=1)
    chosen = np.take_along_axis(chosen, order, axis=1)
    ordered = np.take_along_axis(scores, order, axis=1)
    summed = chosen.astype(np.float64) @ np.arange(1.0, scores.shape[1] + 1)
    tied = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    if len(tied):
        summed[tied] = (_mean_ranks(ordered[tied]) * chosen[tied]).sum(axis=1)
    return summed


def mean_ranks(scores: Array) -> FloatArray:
    """Rank scores from 1, ``(N,)`` -> ``(N,)``; equal scores share the mean of their ranks.

    Does what ``scipy.stats.rankdata`` does, without the second that importing scipy.stats takes.
    """
    order = np.argsort(scores)
    ranks = np.empty(len(scores))
    ranks[order] = _mean_ranks(scores[order][None])[0]
    return ranks


def _mean_ranks(ordered: Array) -> FloatArray:
    """Rank the scores of rows in ascending order, ``(F, N)`` -> ``(F, N)``."""
    differs = ordered[:, 1:] != ordered[:, :-1]
    edge = np.ones((len(ordered), 1), dtype=bool)
    places = np.arange(ordered.shape[1])
    begins, ends = np.append(edge, differs, axis=1), np.append(differs, edge, axis=1)
    first = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    last = np.minimum.accumulate(np.where(ends, places, places[-1])[:, ::-1], axis=1)[:, ::-1]
    ranks: FloatArray = (first + last) / 2 + 1
    return ranks


def _per_matrix(statistic: Callable[[Array], FloatArray], scores: Array) -> FloatArray:
    """Apply ``(N, F) -> (F,)`` to each matrix by itself, which is quicker and takes less memory."""
    require_finite(scores)
    *leading, N, F = scores.shape
    matrices = scores.reshape(math.prod(leading), N, F)
    return np.array([statistic(matrix) for matrix in matrices]).reshape(*leading, F)


def _count(targets: Array) -> tuple[NDArray[np.bool_], FloatArray, FloatArray]:
    """Return where a finding is present and how many positives and negatives it has.

    The shapes are ``(N, F)``, ``(F,)`` and ``(F,)``.
    """
    present = targets == 1
    n_present = present.sum(axis=0, dtype=np.float64)
    return present, n_present, (targets == 0).sum(axis=0, dtype=np.float64)


def average_precision_of_chance(n_positive: Array, n_labelled: Array) -> FloatArray:
    """Compute the average precision that labelled rows in random order are expected to have.

    At place k the precision of a positive counts the positive itself and the share of positives
    among the k - 1 rows before it; every place k is equally likely. The result lies above the
    prevalence, and far above it where positives are few: one positive among N rows has H(N) / N,
    the harmonic number over N, not 1 / N. All shapes are ``(...)``; NaN without a positive.
    """
    positive, n = np.asarray(n_positive, np.float64), np.asarray(n_labelled)
    # SciPy has harmonic numbers too, but every process that trains would have to import it.
    harmonic = np.append(0, np.cumsum(1 / np.arange(1, n.max(initial=0) + 1)))[n]
    share_of_others = divide(positive - 1, n - 1)
    others = np.where(n > 1, share_of_others * (n - harmonic), 0)
    return np.where(positive > 0, divide(harmonic + others, n), np.nan)


# --- means over findings --------------------------------------------------------------------------


def macro_mean(values: Array) -> FloatArray:
    """Average over the findings that are defined, ``(..., F)`` -> ``(...)``; NaN if none is."""
    defined = ~np.isnan(values)
    return divide(np.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1))


def support_mean(values: Array, n_positive: Array) -> FloatArray:
    """Average over the defined findings, weighted by their numbers of positives.

    scikit-learn calls this ``average="weighted"``. Shapes ``(..., F)`` -> ``(...)``; NaN if no
    defined finding has a positive.
    """
    support = np.where(np.isnan(values), 0.0, n_positive)
    return divide((np.nan_to_num(values) * support).sum(axis=-1), support.sum(axis=-1))


# --- decisions ------------------------------------------------------------------------------------


def confusion_counts(
    targets: Array, decisions: NDArray[np.bool_], weights: Array | None = None
) -> FloatArray:
    """Count true and false calls of every finding, over its labelled rows.

    Decisions, ``(N, F)``, say where a finding is called present; weights are those of
    :func:`weighted_mean`. Gives whole numbers, columns as :data:`CONFUSION_COLUMNS`, ``(F, 4)``,
    with weights ``(R, F, 4)``.
    """
    present, absent = targets == 1, targets == 0
    cells = (present & decisions, absent & decisions, present & ~decisions, absent & ~decisions)
    if weights is None:
        return np.stack([cell.sum(axis=0, dtype=np.float64) for cell in cells], axis=-1)
    # BLAS multiplies if both have the weights' type; float32 counts are exact below 2**24 rows.
    return np.stack([weights @ cell.astype(weights.dtype) for cell in cells], axis=-1).astype(
        np.float64
    )


class Rates(NamedTuple):
    """Rates that follow from the four counts, each of shape ``(...)`` and NaN where undefined."""

    f1: FloatArray
    sensitivity: FloatArray
    specificity: FloatArray
    ppv: FloatArray
    npv: FloatArray
    balanced_accuracy: FloatArray


def rates(confusion: FloatArray) -> Rates:
    """Derive F1, sensitivity, specificity, PPV, NPV and balanced accuracy from counts.

    Counts, ``(..., 4)``, are as :func:`confusion_counts` gives them: of single findings, or summed
    over findings for micro averages.
    """
    tp, fp, fn, tn = np.moveaxis(confusion, -1, 0)
    sensitivity, specificity = divide(tp, tp + fn), divide(tn, tn + fp)
    return Rates(
        f1=f1_score(tp, fp, fn),
        sensitivity=sensitivity,
        specificity=specificity,
        ppv=divide(tp, tp + fp),
        npv=divide(tn, tn + fn),
        balanced_accuracy=(sensitivity + specificity) / 2,
    )


def f1_score(tp: Array, fp: Array, fn: Array) -> FloatArray:
    """Compute F1 from counts; NaN without a positive."""
    return divide(2 * tp, np.where(tp + fn > 0, 2 * tp + fp + fn, 0))


def f1_of_calling_all(n_positive: Array, n_labelled: Array) -> FloatArray:
    """Compute the F1 of calling a finding present in every row: ``2 p / (1 + p)`` at prevalence p.

    Both counts are of labelled rows; shapes ``(...)``.
    """
    return divide(2 * np.asarray(n_positive, np.float64), n_positive + n_labelled)


def label_accuracy(confusion: FloatArray) -> FloatArray:
    """Compute the share of labelled cells decided rightly, ``(..., F, 4)`` -> ``(...)``."""
    tp, _, _, tn = np.moveaxis(confusion.sum(axis=-2), -1, 0)
    return divide(tp + tn, confusion.sum(axis=(-2, -1)))


def label_accuracy_all_negative(confusion: FloatArray) -> FloatArray:
    """Compute the label accuracy of calling nothing present, ``(..., F, 4)`` -> ``(...)``.

    It is the share of labelled cells that are absent.
    """
    _, fp, _, tn = np.moveaxis(confusion.sum(axis=-2), -1, 0)
    return divide(fp + tn, confusion.sum(axis=(-2, -1)))


def exact_matches(targets: Array, decisions: NDArray[np.bool_]) -> FloatArray:
    """Mark the rows of which all labelled findings are decided rightly, ``(N, F)`` -> ``(N,)``.

    1 where they are, 0 where not, NaN where no finding is labelled. The :func:`weighted_mean` of
    these marks is the exact match ratio. Decisions may be ``(F,)``, the same for all rows.
    """
    labelled = ~np.isnan(targets)
    is_right = (~labelled | (decisions == (targets == 1))).all(axis=1)
    return np.where(labelled.any(axis=1), is_right, np.nan)


def find_best_constant(targets: Array) -> NDArray[np.bool_]:
    """Find the set of findings that is exactly right for most rows, ``(N, F)`` -> ``(F,)``.

    Where some cells are unlabelled, only the :data:`N_SETS` most frequent sets are tried, in which
    what is unlabelled is absent.
    """
    sets, n_rows = np.unique(targets == 1, axis=0, return_counts=True)
    tried = sets[np.argsort(-n_rows, kind="stable")[:N_SETS]]
    if not len(tried):
        return np.zeros(targets.shape[1], np.bool_)
    ratios = [np.nan_to_num(float(weighted_mean(exact_matches(targets, of)))) for of in tried]
    best: NDArray[np.bool_] = np.asarray(tried[int(np.argmax(ratios))])
    return best


# --- probabilities --------------------------------------------------------------------------------


def squared_errors(targets: Array, probabilities: Array) -> FloatArray:
    """Compute the squared error of every cell, ``(N, F)``, NaN where unlabelled.

    Their mean is the Brier score.
    """
    return np.square(np.asarray(probabilities, dtype=np.float64) - targets)


def log_losses(targets: Array, probabilities: Array) -> FloatArray:
    """Compute the cross-entropy of every cell in nats, ``(N, F)``, NaN where unlabelled.

    As in scikit-learn, probabilities are kept a rounding step of float64 away from 0 and 1, so that
    one confident mistake costs 36 nats and not infinitely many.
    """
    step = np.finfo(np.float64).eps
    clipped = np.clip(np.asarray(probabilities, dtype=np.float64), step, 1 - step)
    losses = -np.log(np.where(targets == 1, clipped, 1 - clipped))
    return np.where(np.isnan(targets), np.nan, losses)


def errors_of_prevalence(n_positive: Array, n_labelled: Array) -> dict[str, FloatArray]:
    """Compute what stating the prevalence p for every row scores, each ``(...)``.

    The ``"brier"`` score is p (1 - p); the ``"log_loss"`` is the entropy of p, in nats. No constant
    scores better on the same rows. Skill scores are 1 minus a model's error over these.
    """
    p = divide(np.asarray(n_positive, np.float64), n_labelled)
    entropy = -sum(q * np.log(np.maximum(q, np.finfo(np.float64).tiny)) for q in (p, 1 - p))
    return {"brier": p * (1 - p), "log_loss": entropy}


@dataclass(frozen=True, eq=False)
class Reliability:
    """Contents of each of the B bins of a calibration curve, per finding."""

    n: FloatArray
    """Number of labelled cells, shape ``(F, B)``."""
    mean_probability: FloatArray
    """Mean predicted probability, shape ``(F, B)``; NaN in an empty bin."""
    observed: FloatArray
    """Share of positives, shape ``(F, B)``; NaN in an empty bin."""


def reliability(targets: Array, probabilities: Array, n_bins: int = N_BINS) -> Reliability:
    """Sort cells, ``(N, F)``, into bins of equal width over [0, 1], `n_bins` of them.

    An edge belongs to the bin below it.
    """
    edges = np.linspace(0, 1, n_bins + 1)[1:-1]
    sums = np.zeros((3, targets.shape[1], n_bins))
    for f, (t, p) in enumerate(
        zip(targets.T, np.asarray(probabilities, np.float64).T, strict=True)
    ):
        labelled = ~np.isnan(t)
        bins = np.searchsorted(edges, p[labelled], side="left")
        for values, summed in zip((None, p[labelled], t[labelled]), sums[:, f], strict=True):
            summed[:] = np.bincount(bins, weights=values, minlength=n_bins)
    n, probability, n_positive = sums
    return Reliability(n, divide(probability, n), divide(n_positive, n))


def expected_calibration_error(
    targets: Array, probabilities: Array, n_bins: int = N_BINS
) -> FloatArray:
    """Compute the mean gap between predicted probability and observed frequency, per finding.

    The gaps of the bins of :func:`reliability` are averaged, weighted by their numbers of rows (Guo
    et al., "On Calibration of Modern Neural Networks", 2017). The result is biased upwards where
    bins hold few rows. The result, ``(F,)``, lies in [0, 1]; NaN for a finding without labels.
    """
    bins = reliability(targets, probabilities, n_bins)
    gaps = np.nan_to_num(np.abs(bins.mean_probability - bins.observed))
    return divide((bins.n * gaps).sum(axis=1), bins.n.sum(axis=1))


# --- arithmetic and checks ------------------------------------------------------------------------


def weighted_mean(values: Array, weights: Array | None = None) -> FloatArray:
    """Average over rows, leaving NaN out: ``(N, ...)`` with at most one further axis -> ``(...)``.

    Weights, ``(R, N)``, say how often each row counts, and give ``(R, ...)``; None counts each row
    once. NaN where no row counts.
    """
    counted = ~np.isnan(values)
    row_weights = np.ones(len(values)) if weights is None else weights
    return divide(
        row_weights @ np.where(counted, values, 0.0),
        row_weights @ counted.astype(row_weights.dtype),
    )


def divide(numerator: Array, denominator: Array | float) -> FloatArray:
    """Divide in float64; the quotient is NaN wherever the denominator is zero."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    quotient = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator != 0)
    return quotient


def has_both_classes(targets: Array) -> NDArray[np.bool_]:
    """Tell which findings have a labelled positive and a labelled negative, shape ``(F,)``."""
    both: NDArray[np.bool_] = (targets == 1).any(axis=0) & (targets == 0).any(axis=0)
    return both


def count_clusters(cells: NDArray[np.bool_], clusters: Array | None = None) -> NDArray[np.int64]:
    """Count the clusters with at least one such cell, per finding, ``(N, F)`` -> ``(F,)``.

    Clusters, ``(N,)``, are the patient or study of every row; None counts rows.
    """
    if clusters is None:
        return np.asarray(cells.sum(axis=0), np.int64)
    names, codes = number_names(clusters)
    return np.array(
        [np.bincount(codes[column], minlength=len(names)).astype(bool).sum() for column in cells.T],
        np.int64,
    )


def number_names(names: Array) -> tuple[Array, NDArray[np.intp]]:
    """Find the different names in ascending order, and the number of each row's, ``(N,)``.

    It gives what ``np.unique(names, return_inverse=True)`` does. That sorts all N, which takes
    seconds for a million names; this finds the different ones by hashing, and sorts those.
    """
    import pandas as pd  # which processes that train do without

    native = names.astype(names.dtype.newbyteorder("="), copy=False)
    codes, distinct = pd.factorize(native, sort=True, use_na_sentinel=False)
    return np.asarray(distinct, names.dtype), np.asarray(codes, np.intp)


def drop_positives_only(targets: Array) -> Array:
    """Leave findings unlabelled that have a labelled positive and no negative, ``(N, F)``.

    Nothing can be said of them: calling them present is never wrong. CheXpert's "No Finding" is 1
    or blank.
    """
    undefined = (targets == 1).any(axis=0) & ~(targets == 0).any(axis=0)
    return np.where(undefined, np.nan, targets) if undefined.any() else targets


def require_finite(scores: Array) -> Array:
    """Return the scores, or raise ValueError if some are NaN or infinite.

    Otherwise the scores of a diverged model would look like those of an undefined finding.
    """
    if not np.isfinite(scores).all():
        n_bad = int((~np.isfinite(scores)).sum())
        raise ValueError(f"{n_bad} of {scores.size} scores are NaN or infinite; did it diverge?")
    return scores
