"""What a head has to beat: prevalence, logistic regression, nearest neighbours, by scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

Array: TypeAlias = NDArray[np.float32]
_ROWS_AT_ONCE: Final = 1024


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


def predict_logistic(
    embeddings: Array, targets: Array, held_out: Array, candidates: tuple[Any, ...]
) -> list[Array]:
    """One L2-regularised logistic regression per finding, on standardised embeddings."""
    scaler = StandardScaler().fit(embeddings)
    x, x_held_out = scaler.transform(embeddings), scaler.transform(held_out)
    predictions = [predict_prevalence(x, targets, x_held_out, (None,))[0] for _ in candidates]
    for f, target in enumerate(targets.T):
        labelled = ~np.isnan(target)
        if len(np.unique(target[labelled])) < 2:
            continue  # one class only: its prevalence stays
        model = LogisticRegression(max_iter=300, tol=1e-3, warm_start=True)
        for prediction, C in zip(predictions, candidates, strict=True):
            model.set_params(C=C)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(x[labelled], target[labelled])
            prediction[:, f] = model.predict_proba(x_held_out)[:, 1]
    return predictions


def predict_neighbours(
    embeddings: Array, targets: Array, held_out: Array, candidates: tuple[Any, ...]
) -> list[Array]:
    """Share of positives among those that are labelled of the k nearest images, by direction."""
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
    Baseline("logistic regression", "C", (1e-4, 1e-3, 1e-2), predict_logistic),
    Baseline("nearest neighbours", "k", (5, 20, 50, 100, 200), predict_neighbours),
)
