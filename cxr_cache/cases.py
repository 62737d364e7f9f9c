"""Which test images a run is surest about: its hits, misses and false alarms of each finding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cxr_cache.scored import ScoredImages

Kind: TypeAlias = Literal["hits", "misses", "false_alarms"]

PER_KIND: Final = 4
"""Images of each kind and finding."""
MAX_FINDINGS: Final = 40
"""Of more, those with most positives; so many thumbnails take 2 MB."""


@dataclass(frozen=True)
class Case:
    """One image, and the probability that a finding was given on it."""

    image_id: str
    probability: float


def find_cases(
    images: ScoredImages, thresholds: Sequence[float]
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

    Returns
    -------
    dict[str, dict[Kind, list[Case]]]
        By finding; at most :data:`PER_KIND` of a kind and :data:`MAX_FINDINGS` findings.
    """
    n_positive = (images.targets == 1).sum(axis=0)
    common = np.argsort(-n_positive, kind="stable")[:MAX_FINDINGS]
    cases: dict[str, dict[Kind, list[Case]]] = {}
    for f in sorted(common):
        present, absent = images.targets[:, f] == 1, images.targets[:, f] == 0
        probabilities = images.probabilities[:, f]
        called = probabilities >= thresholds[f]
        cases[images.findings[f]] = {
            "hits": _surest(images, present & called, f, -probabilities),
            "misses": _surest(images, present & ~called, f, probabilities),
            "false_alarms": _surest(images, absent & called, f, -probabilities),
        }
    return cases


def _surest(
    images: ScoredImages, chosen: NDArray[np.bool_], f: int, key: NDArray[np.float64]
) -> list[Case]:
    rows = np.flatnonzero(chosen)
    first = rows[np.argsort(key[rows], kind="stable")[:PER_KIND]]
    return [Case(str(images.image_ids[r]), float(images.probabilities[r, f])) for r in first]
