"""The test images that a run is surest about, right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from cxr_cache.evaluation.scored import ScoredImages
from cxr_cache.metrics.scores import FloatArray

Kind: TypeAlias = Literal["hits", "misses", "false_alarms"]

PER_KIND: Final = 4
"""Images of each kind and finding, where one run is shown."""
MAX_FINDINGS: Final = 40
"""Of more, those with most positives; so many thumbnails take 2 MB."""


class Case(TypedDict):
    """One image, and the probability that a finding was given on it."""

    image_id: str
    probability: float


def find_cases(
    images: ScoredImages, thresholds: FloatArray | Sequence[float], per_kind: int = PER_KIND
) -> dict[str, dict[Kind, list[Case]]]:
    """The most confident hits, misses and false alarms of each finding.

    Hits are labelled present and called present, false alarms labelled absent and called present,
    both from the highest probability down; misses are labelled present and not called, from the
    lowest probability up. Of equal probabilities the earlier row comes first.

    Parameters
    ----------
    images
        N scored rows, F findings.
    thresholds
        Probability from which on each finding is called present, shape ``(F,)``.
    per_kind
        Images of each kind and finding.

    Returns
    -------
    dict[str, dict[Kind, list[Case]]]
        By finding, at most :data:`MAX_FINDINGS` of them.
    """
    n_positive = (images.targets == 1).sum(axis=0)
    common = np.argsort(-n_positive, kind="stable")[:MAX_FINDINGS]
    cases: dict[str, dict[Kind, list[Case]]] = {}
    for f in sorted(common):
        present, absent = images.targets[:, f] == 1, images.targets[:, f] == 0
        probabilities = images.probabilities[:, f]
        called = probabilities >= thresholds[f]
        kinds: dict[Kind, tuple[NDArray[np.bool_], NDArray[np.float64]]] = {
            "hits": (present & called, -probabilities),
            "misses": (present & ~called, probabilities),
            "false_alarms": (absent & called, -probabilities),
        }
        cases[images.findings[f]] = {
            kind: [
                Case(image_id=str(images.image_ids[row]), probability=float(probabilities[row]))
                for row in _first(chosen, key, per_kind)
            ]
            for kind, (chosen, key) in kinds.items()
        }
    return cases


def _first(chosen: NDArray[np.bool_], key: NDArray[np.float64], n_rows: int) -> NDArray[np.intp]:
    """So many of the chosen rows, the smallest keys first."""
    rows = np.flatnonzero(chosen)
    return rows[np.argsort(key[rows], kind="stable")[:n_rows]]
