"""Groups of scored images -> how much better or worse each fares, and is that more than luck."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.evaluation.compare import MACRO, holm, tabulate_differences
from cxr_cache.evaluation.scored import ScoredImages
from cxr_cache.metrics.intervals import LEVEL, count_rarer_class
from cxr_cache.metrics.resampled import bootstrap, rank_scores
from cxr_cache.metrics.scores import UNDECIDED, Array, FloatArray, confusion_counts, rates

COMPARED: Final = ("auroc", "sensitivity", "specificity")
MIN_CLUSTERS: Final = 5
"""Patients (or studies) that a figure must rest on in both groups. With fewer, a difference says
nothing, and counting it among the tests would make the others harder to tell from luck."""
COLUMNS: Final = (
    *("group", "value", "against", "measure", "finding", "n_positive", "n_positive_against"),
    *("figure", "figure_against", "difference", "low", "high", "p", "p_holm"),
)
REST: Final = "all others"


class _Contrast(NamedTuple):
    group: str
    value: str
    against: str
    is_of_value: NDArray[np.bool_]
    images: ScoredImages
    """Those whose value is known."""
    cuts: FloatArray
    """From which on their findings count as present."""


def compare_groups(
    images: ScoredImages, cuts: FloatArray, *, n_resamples: int, seed: int
) -> pd.DataFrame:
    """Compare each group with all other images whose value is known.

    There is no reference group to choose that way, and of two groups there is one difference. All
    figures of a comparison are computed under the same weightings of whole patients (or studies),
    so that images of one patient in both groups are accounted for. Intervals are of one difference
    each. P values belong to the same t statistic and are corrected by Holm's method (1979), which
    holds however the differences depend on each other: over all findings of all groups, and for the
    means over findings over all groups, each measure by itself. Means are over the findings that
    can be compared, the same ones on both sides.

    Parameters
    ----------
    images
        N calibrated rows, F findings, with their groups.
    cuts
        Probability from which on each finding counts as present, ``(F,)``, or ``(N, F)`` where
        that differs between rows.
    n_resamples, seed
        As in :func:`cxr_cache.metrics.resampled.bootstrap`; nothing is compared without resamples.

    Returns
    -------
    pd.DataFrame
        Columns :data:`COLUMNS`, a row per comparison, measure and finding (blank: mean over
        findings) that rests on :data:`MIN_CLUSTERS` on both sides.
    """
    parts = (
        []
        if not n_resamples
        else [
            part
            for contrast in _list_contrasts(images, cuts)
            for part in _compare(contrast, n_resamples, seed)
        ]
    )
    if not parts:
        empty: pd.DataFrame = pd.DataFrame(columns=list(COLUMNS))
        return empty
    table = pd.concat(parts, ignore_index=True)
    table = table[table["difference"].notna()].reset_index(drop=True)
    kinds = [table["measure"], table["finding"] == MACRO]
    table["p_holm"] = table["p"].groupby(kinds).transform(holm)
    ordered: pd.DataFrame = table[list(COLUMNS)]
    return ordered


def describe_differences(table: pd.DataFrame) -> dict[str, Any]:
    """What metrics.json says: the means, and findings that differ beyond luck, clearest first."""
    is_macro = table["finding"] == MACRO
    tested = table[~is_macro & table["p_holm"].notna()]
    return {
        "correction": "Holm",
        "level": LEVEL,
        "min_clusters": MIN_CLUSTERS,
        "n_tested": {name: int((tested["measure"] == name).sum()) for name in COMPARED},
        "macro": _to_records(table.assign(n_findings=_count_findings(table))[is_macro]),
        "differing": _to_records(
            tested[tested["p_holm"] < 1 - LEVEL].sort_values("p", kind="stable")
        ),
    }


def _count_findings(table: pd.DataFrame) -> pd.Series[int]:
    """Over how many findings the mean of each row's comparison is."""
    keys = [table[name] for name in ("group", "value", "measure")]
    return (table["finding"] != MACRO).groupby(keys).transform("sum")


def _to_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(name): None if pd.isna(cell) else cell for name, cell in row.items()}
        for row in table.to_dict("records")
    ]


def _list_contrasts(images: ScoredImages, cuts: FloatArray) -> Iterator[_Contrast]:
    cuts = np.broadcast_to(cuts, images.targets.shape)
    for name, values in {"projection": images.projections, **images.groups}.items():
        known, of_known = images.take(values != ""), cuts[values != ""]
        own = values[values != ""]
        several = sorted(set(own))
        if len(several) == 2:
            yield _Contrast(name, several[1], several[0], own == several[1], known, of_known)
        elif len(several) > 2:
            for value in several:
                yield _Contrast(name, value, REST, own == value, known, of_known)


def _compare(contrast: _Contrast, n_resamples: int, seed: int) -> Iterator[pd.DataFrame]:
    """Each measure's differences, F + 1 rows."""
    images = contrast.images
    sides = [np.flatnonzero(~contrast.is_of_value), np.flatnonzero(contrast.is_of_value)]
    parts = [images.take(rows) for rows in sides]
    ranked = [rank_scores(part.targets, part.probabilities, part.folds) for part in parts]
    of_sides = [contrast.cuts[rows] for rows in sides]
    decided = [
        np.where(own < UNDECIDED, part.targets, np.nan)
        for own, part in zip(of_sides, parts, strict=True)
    ]

    def statistics(weights: Array) -> dict[str, FloatArray]:
        figures: dict[str, list[FloatArray]] = {name: [] for name in COMPARED}
        for k, (rows, part, ranking) in enumerate(zip(sides, parts, ranked, strict=True)):
            own = weights[:, rows]
            of_side = rates(confusion_counts(decided[k], part.probabilities >= of_sides[k], own))
            figures["auroc"].append(ranking.auroc_and_ap(own)[0])
            figures["sensitivity"].append(of_side.sensitivity)
            figures["specificity"].append(of_side.specificity)
        return {name: np.stack(values, axis=1) for name, values in figures.items()}  # (R, 2, F)

    once = statistics(np.ones((1, len(images))))
    resampled = bootstrap(statistics, images.clusters, n_resamples, seed)
    n_positive = [(part.targets == 1).sum(axis=0) for part in parts]
    described = {
        "group": contrast.group,
        "value": contrast.value,
        "against": contrast.against,
        "finding": [*images.findings, MACRO],
    }
    for measure in COMPARED:
        n_clusters = np.min([_count_clusters(part, measure) for part in parts], axis=0)
        figures = once[measure][0]  # (2, F)
        # A share of exactly 0 or 1 shows no spread to measure a difference by.
        is_told = (n_clusters >= MIN_CLUSTERS) & ((figures > 0) & (figures < 1)).all(axis=0)
        against, own = np.where(is_told, figures, np.nan)
        changes = np.where(is_told, resampled[measure][:, 1] - resampled[measure][:, 0], np.nan)
        table = tabulate_differences(against, own, changes, n_clusters)
        table = table.rename(columns={"first": "figure_against", "second": "figure"})
        counted = [np.where(is_told, n, 0) for n in n_positive[::-1]]
        yield table.assign(
            **described,
            measure=measure,
            n_positive=[*n_positive[1], counted[0].sum()],
            n_positive_against=[*n_positive[0], counted[1].sum()],
        )


def _count_clusters(images: ScoredImages, measure: str) -> FloatArray:
    """Clusters on which a measure of each finding rests, ``(F,)``."""
    if measure == "auroc":
        return count_rarer_class(images.targets, images.clusters)
    cells = images.targets == (1 if measure == "sensitivity" else 0)
    return images.count_clusters(cells).astype(np.float64)
