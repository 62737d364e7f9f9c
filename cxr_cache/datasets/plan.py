"""What a data set's test can tell: widths of intervals that are to be expected, before training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cxr_cache.common.wording import count
from cxr_cache.config import PlanConfig
from cxr_cache.datasets.cohort import UNITS, Cohort, Unit, name_unit
from cxr_cache.datasets.splits import has_given_split, take_given_split
from cxr_cache.errors import TableError
from cxr_cache.metrics.planning import (
    expected_half_width,
    expected_macro_half_width,
    studies_for,
)
from cxr_cache.metrics.scores import FloatArray, count_clusters


@dataclass(frozen=True)
class FindingPlan:
    """What is expected of one finding, or, without numbers of cases, of the mean over findings."""

    finding: str
    n_positive: float | None
    """Patients (or studies) with the finding that are expected in the test."""
    n_negative: float | None
    half_width: float | None
    """Of the interval of the AUROC; None where there is none."""
    n_needed: int | None
    """Test patients (or studies) that give the half width wanted; None where no number does."""


@dataclass(frozen=True)
class Plan:
    """How wide the intervals of a test are expected to be, at a stated AUROC."""

    config: PlanConfig
    unit: Unit
    n_test: int
    """Labelled patients (or studies) in the test."""
    whose: str
    """Whose split the test is; blank where it is a share of the data."""
    findings: tuple[FindingPlan, ...]
    macro: FindingPlan
    n_in_macro: int
    """Findings with at least one positive and one negative expected."""

    def to_dict(self) -> dict[str, Any]:
        """Return the same as JSON-able values."""
        return asdict(self)

    def to_text(self) -> str:
        """Write a table for a terminal: a row per finding, the mean over findings last."""
        units, config = UNITS[self.unit], self.config
        of = f"given by {self.whose}" if self.whose else f"{config.test_fraction:.0%} of the data"
        width = max(18, *(len(row.finding) for row in self.findings))
        lines = [
            f"Expected intervals at an AUROC of {config.plan_auroc:g}, on a test of "
            f"{self.n_test:,} labelled {units} ({of}):",
            f"  {'finding':<{width}}  {'positives':>9}  {'half width':>11}  "
            f"{units} for ±{config.plan_width:g}",
        ]
        lines += [
            f"  {row.finding:<{width}}  {_number(row.n_positive):>9}  "
            f"{'no interval' if row.half_width is None else f'±{row.half_width:.3f}':>11}  "
            f"{'no number' if row.n_needed is None else f'{row.n_needed:,}':>14}"
            for row in (*self.findings, self.macro)
        ]
        return "\n".join(
            [
                *lines,
                f"  The mean is over the {count(self.n_in_macro, 'finding')} with at least one "
                "positive expected, as if their errors had nothing in common; errors that findings "
                "share make its interval wider.",
            ]
        )


def plan_test(cohort: Cohort, config: PlanConfig | None = None) -> Plan:
    """Expect the widths of the intervals of a test, from how often findings occur.

    Intervals rest on patients (studies, where patients are unknown), so these are counted. A given
    split is taken as it is; else the test is a share of the data that keeps every prevalence.

    Parameters
    ----------
    cohort
        The images, with their labels.
    config
        The AUROC that is assumed, the half width that is wanted and the share of the test.

    Raises
    ------
    TableError
        No image has a label.

    Examples
    --------
    >>> print(plan_test(load_cohort("DATA")).to_text())  # doctest: +SKIP
    """
    config = config or PlanConfig()
    cohort = cohort.take(~np.isnan(cohort.targets).all(axis=1))
    if not len(cohort):
        raise TableError("No image has a label, so there is no test to plan.")
    is_test, share, whose = np.ones(len(cohort), bool), config.test_fraction, ""
    if has_given_split(cohort) and (split := take_given_split(cohort)).whose:
        is_test, share, whose = split.is_test, 1.0, split.whose
    clusters = cohort.groups[is_test]
    targets = cohort.targets[is_test]
    n_clusters = len(np.unique(clusters))
    counts = np.stack([count_clusters(targets == value, clusters) for value in (1, 0)])
    rates = counts / n_clusters  # per test patient or study; images of one may differ
    expected = share * counts
    half_widths = expected_half_width(config.plan_auroc, *expected)

    def width_at(n: FloatArray) -> FloatArray:
        return expected_half_width(config.plan_auroc, n * rates[0], n * rates[1])

    def macro_at(n: FloatArray) -> FloatArray:
        return np.array([expected_macro_half_width(config.plan_auroc, *(n[0] * rates))[0]])

    needed = studies_for(config.plan_width, width_at, len(cohort.findings))
    of_macro, n_in_macro = expected_macro_half_width(config.plan_auroc, *expected)
    rows = [
        FindingPlan(finding, *expected[:, f].tolist(), _known(half_widths[f]), _whole(needed[f]))
        for f, finding in enumerate(cohort.findings)
    ]
    [macro_needed] = studies_for(config.plan_width, macro_at, 1)
    return Plan(
        config,
        name_unit(cohort.patient_ids),
        round(share * n_clusters),
        whose,
        tuple(rows),
        FindingPlan("mean over findings", None, None, _known(of_macro), _whole(macro_needed)),
        n_in_macro,
    )


def _known(value: float | np.floating[Any]) -> float | None:
    return None if np.isnan(value) else float(value)


def _whole(value: float | np.floating[Any]) -> int | None:
    return int(value) if np.isfinite(value) else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}" if value < 10 else f"{value:,.0f}"
