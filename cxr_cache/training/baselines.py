"""What a head has to beat: prevalence, logistic regression, nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from threadpoolctl import threadpool_limits

from cxr_cache.config import TrainConfig
from cxr_cache.datasets.splits import Split
from cxr_cache.training.fit import InputStatistics, Rows
from cxr_cache.training.fit_on_cores import count_cores
from cxr_cache.training.search import Weighing, choose_candidate, score_fold

Array: TypeAlias = NDArray[np.float32]
STRENGTHS: Final = (1e-4, 1e-3, 1e-2)
"""Candidates of C, the inverse strength of the L2 penalty as scikit-learn counts it."""
_ROWS_AT_ONCE: Final = 1024
_MUCH: Final = 2**28
"""Bytes of features from which on no two folds are fitted at once."""
_N_ITERATIONS: Final = 200
_TOLERANCE: Final = 1e-8  # relative change of the loss, of which float32 tells no less


@dataclass(frozen=True)
class Baseline:
    """A model without a recipe: it has one number to choose, on the same folds as the others."""

    label: str
    knob: str
    candidates: tuple[Any, ...]
    predict: Callable[[Array, Array, Array, tuple[Any, ...]], list[Array]]
    """Of training embeddings, their targets, held-out embeddings and candidates; one ``(n, F)`` of
    probabilities per candidate."""


def predict_prevalence(
    embeddings: Array, targets: Array, held_out: Array, candidates: tuple[Any, ...]
) -> list[Array]:
    """The share of positives among the labelled, for every image."""
    labelled = (~np.isnan(targets)).sum(axis=0)
    share = np.nansum(targets, axis=0) / np.maximum(labelled, 1)
    return [np.tile(share.astype(np.float32), (len(held_out), 1))] * len(candidates)


@dataclass(frozen=True, eq=False)
class _Standardised:
    """Some rows of features, less a mean and over a spread, which are computed part by part.

    A standardised copy would take as much memory as the features, once for every fold.
    """

    features: Array
    """``(N, D)``."""
    rows: NDArray[np.intp]
    """The n rows, of N, that this is of."""
    mean: Array
    """``(D,)``, as is the spread."""
    spread: Array

    @classmethod
    def of(cls, features: Array, rows: NDArray[np.intp]) -> _Standardised:
        """Standardise rows as a head's inputs are, by their own mean and spread."""
        found = InputStatistics.of(torch.from_numpy(features), [torch.from_numpy(rows)])
        return cls(features, rows, found.mean[0, 0].numpy(), found.std[0, 0].numpy())

    def parts(self) -> Iterator[tuple[slice, Array]]:
        """Where each part begins and ends among the n, and its standardised values."""
        for start in range(0, len(self.rows), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            yield part, (self.features[self.rows[part]] - self.mean) / self.spread


def predict_logistic(
    embeddings: Array, targets: Array, held_out: Array, candidates: tuple[Any, ...]
) -> list[Array]:
    """One L2-regularised logistic regression per finding, on standardised embeddings.

    Candidates are values of C, the inverse strength of the penalty. A finding with one class only
    keeps its prevalence.
    """
    x = _Standardised.of(embeddings, np.arange(len(embeddings)))
    asked = replace(x, features=held_out, rows=np.arange(len(held_out)))
    return _predict_logistic(x, targets, asked, candidates)


def _predict_logistic(
    x: _Standardised, targets: Array, asked: _Standardised, candidates: tuple[Any, ...]
) -> list[Array]:
    both = (targets == 1).any(axis=0) & (targets == 0).any(axis=0)
    empty = np.empty((len(asked.rows), 0), np.float32)
    (prevalence,) = predict_prevalence(empty, targets, empty, (None,))
    predictions = []
    for weights, intercepts in _fit_logistic(x, targets[:, both], candidates):
        prediction = prevalence.copy()
        for part, values in asked.parts():
            prediction[part][:, both] = expit(values @ weights + intercepts)
        predictions.append(prediction)
    return predictions


def _fit_logistic(
    x: _Standardised, targets: Array, strengths: tuple[float, ...]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Fit F logistic regressions at once, for each inverse strength C in turn.

    Minimises the summed loss over labelled rows plus ||w||^2 / (2 C), the intercept unpenalised, as
    ``sklearn.linear_model.LogisticRegression(C=C)`` does for one finding. All findings share the
    matrix products of L-BFGS. Its variables are scaled by their curvature where a fit begins,
    along the eigenvectors of X'X, so that some ten steps suffice, and for a larger C some fifty.

    Parameters
    ----------
    x
        n rows of D features. Beside them memory holds one copy, turned to the eigenvectors.
    targets
        ``(n, F)``, NaN where unlabelled; each finding has both classes.
    strengths
        Values of C. Each fit begins where the last one ended.

    Yields
    ------
    weights, intercepts
        ``(D, F)`` and ``(F,)``.
    """
    from scipy.optimize import minimize  # takes half a second

    share = (targets == 1).sum(axis=0) / (~np.isnan(targets)).sum(axis=0)
    width = x.features.shape[1]
    products = np.zeros((width, width), np.float32)
    for _, values in x.parts():
        products += values.T @ values
    vectors = np.linalg.eigh(products).eigenvectors
    turned = np.empty((len(x.rows), width), np.float32)
    for part, values in x.parts():
        np.matmul(values, vectors, out=turned[part])
    weights, intercepts = np.zeros((width, targets.shape[1])), np.log(share / (1 - share))
    for C in strengths:
        curvature = _sum_curvature(turned, targets, weights, intercepts)  # (D + 1, F)
        curvature[:-1] += 1 / C
        scale = curvature**-0.5

        def loss(
            scaled: NDArray[np.float64], scale: NDArray[np.float64] = scale, C: float = C
        ) -> tuple[float, NDArray[np.float64]]:
            both = scaled.reshape(scale.shape) * scale
            value, gradient = _sum_loss(turned, targets, both[:-1], both[-1])
            gradient[:-1] += both[:-1] / C
            return value + np.square(both[:-1]).sum() / (2 * C), (gradient * scale).ravel()

        start = np.concatenate([weights, intercepts[None]]) / scale
        options = {"maxiter": _N_ITERATIONS, "ftol": _TOLERANCE, "gtol": 1e-5}
        found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options=options)
        both = found.x.reshape(scale.shape) * scale
        weights, intercepts = both[:-1], both[-1]
        yield vectors @ weights, intercepts


def _sum_curvature(
    x: Array, targets: Array, weights: NDArray[np.float64], intercepts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Second derivatives of :func:`_sum_loss` along each variable, ``(D + 1, F)``."""
    curvature = np.zeros((len(weights) + 1, len(intercepts)))
    w, b = weights.astype(np.float32), intercepts.astype(np.float32)
    for start in range(0, len(x), _ROWS_AT_ONCE):
        part = x[start : start + _ROWS_AT_ONCE]
        p = expit(part @ w + b)
        p *= (1 - p) * ~np.isnan(targets[start : start + _ROWS_AT_ONCE])
        curvature[:-1] += np.square(part).T @ p
        curvature[-1] += p.sum(axis=0, dtype=np.float64)
    return curvature


def _sum_loss(
    x: Array, targets: Array, weights: NDArray[np.float64], intercepts: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """Cross-entropy over the labelled cells, and its gradient, ``(D + 1, F)``, intercepts last."""
    value, gradient = 0.0, np.zeros((len(weights) + 1, len(intercepts)))
    w, b = weights.astype(np.float32), intercepts.astype(np.float32)
    for start in range(0, len(x), _ROWS_AT_ONCE):  # so that nothing leaves the cache
        part, wanted = x[start : start + _ROWS_AT_ONCE], targets[start : start + _ROWS_AT_ONCE]
        logits = part @ w
        logits += b
        # Of float32, as the logits are, exp takes a tenth of the time of expit and log_expit.
        small = np.exp(-np.abs(logits))
        losses = np.log(1 + small) + np.maximum(logits, 0) - logits * wanted
        errors = np.where(logits >= 0, np.float32(1), small) / (1 + small) - wanted
        if (unlabelled := np.isnan(wanted)).any():
            losses[unlabelled] = errors[unlabelled] = 0
        value += float(losses.sum(dtype=np.float64))
        gradient[:-1] += part.T @ errors
        gradient[-1] += errors.sum(axis=0, dtype=np.float64)
    return value, gradient


class LogisticBaseline(NamedTuple):
    """A logistic regression that was treated as the head was: same rows, folds and final model."""

    C: float
    """Chosen on the held-out folds, as the number of epochs is."""
    mean_auroc: float
    """Of the chosen one over the held-out folds, by the search's own measure."""
    probabilities: Array
    """Of the final model for the test rows, ``(n, F)``."""


def train_logistic(
    data: Rows, split: Split, weighing: Weighing, config: TrainConfig
) -> LogisticBaseline:
    """Train the baseline that stands beside a head.

    What becomes the final model is what becomes it for the head, so that no ensemble is compared
    with a single model: the mean of the folds' regressions, the best of them, or one of all rows.
    """
    embeddings, targets = data.embeddings[0], data.targets
    test = np.flatnonzero(split.is_test)

    def predict(
        train: NDArray[np.int64], asked: NDArray[np.int64], strengths: tuple[float, ...]
    ) -> list[Array]:
        x = _Standardised.of(embeddings, train)
        return _predict_logistic(x, targets[train], replace(x, rows=asked), strengths)

    def predict_fold(k: int) -> list[Array]:
        asked = np.concatenate([split.held_out(k), test])
        return predict(split.trained_on(k), asked, STRENGTHS)

    # A fold per core: products with as few columns as there are findings take longer on two cores
    # than on one. Every fold has a copy of its rows.
    n_at_once = 1 if embeddings.nbytes > _MUCH else min(count_cores(config), split.n_folds)
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(n_at_once) as pool:
        predicted = list(pool.map(predict_fold, range(split.n_folds)))
    scores, of_folds = [], []
    for k, by_strength in enumerate(predicted):
        held_out = split.held_out(k)
        n = len(held_out)
        scores.append([score_fold(targets[held_out], p[:n], weighing) for p in by_strength])
        of_folds.append([p[n:] for p in by_strength])
    by_candidate = np.array(scores).T  # (C, K)
    best = choose_candidate(by_candidate)
    if config.final == "ensemble":
        final = np.mean([predicted[best] for predicted in of_folds], axis=0)
    elif config.final == "best-fold":
        final = of_folds[int(by_candidate[best].argmax())][best]
    else:
        with threadpool_limits(1, "blas"):
            (final,) = predict(np.flatnonzero(~split.is_test), test, STRENGTHS[best : best + 1])
    mean_auroc = float(by_candidate[best].mean())
    return LogisticBaseline(STRENGTHS[best], mean_auroc, final.astype(np.float32))


def predict_neighbours(
    embeddings: Array, targets: Array, held_out: Array, candidates: tuple[Any, ...]
) -> list[Array]:
    """Share of positives among those that are labelled of the k nearest images, by direction."""
    from sklearn.neighbors import NearestNeighbors  # which a training does without

    k_largest = min(max(candidates), len(embeddings))
    index = NearestNeighbors(n_neighbors=k_largest, metric="cosine", algorithm="brute")
    index.fit(embeddings)
    (share,) = predict_prevalence(embeddings, targets, held_out[:1], (None,))
    predictions = [np.empty((len(held_out), targets.shape[1]), np.float32) for _ in candidates]
    for start in range(0, len(held_out), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        of_neighbours = targets[index.kneighbors(held_out[part], return_distance=False)]
        for prediction, k in zip(predictions, candidates, strict=True):
            votes = of_neighbours[:, :k]  # (n, k, F)
            n_labelled = (~np.isnan(votes)).sum(axis=1)
            # One more of average labels, for findings that no neighbour is labelled for.
            prediction[part] = (np.nansum(votes, axis=1) + share) / (n_labelled + 1)
    return predictions


BASELINES = (
    Baseline("prevalence", "", ("",), predict_prevalence),
    Baseline("logistic regression", "C", STRENGTHS, predict_logistic),
    Baseline("nearest neighbours", "k", (5, 20, 50, 100, 200), predict_neighbours),
)
