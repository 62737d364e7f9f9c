"""What a cohort holds: findings, views, missing files; and what a test of it can tell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from cxr_cache.common.wording import count
from cxr_cache.config import PlanConfig
from cxr_cache.datasets.codes import CODE_NAMES
from cxr_cache.datasets.cohort import GIVEN, UNITS, Cohort, Reading, Unit, name_unit
from cxr_cache.datasets.labels import FINDINGS, PUBLISHED_COUNTS, PUBLISHED_IMAGES
from cxr_cache.datasets.splits import has_given_split, take_given_split
from cxr_cache.errors import TableError
from cxr_cache.metrics.planning import (
    expected_half_width,
    expected_macro_half_width,
    studies_for,
)
from cxr_cache.metrics.scores import FloatArray, count_clusters


@dataclass(frozen=True)
class FindingCount:
    """How often one finding occurs; prevalence is among labelled images, None without any."""

    finding: str
    images: int
    studies: int
    prevalence: float | None


@dataclass(frozen=True)
class CohortDescription:
    """What a cohort holds, in numbers; made by :func:`describe_cohort`.

    Attributes
    ----------
    findings
        Counts of each finding, in cohort order.
    n_images, n_studies
        All images; the studies they belong to.
    n_patients
        None where no patient is named.
    n_without_patient
        Images that name no patient.
    n_unlabelled
        Images without a single labelled finding.
    projections
        Images of each projection, ``""`` for unknown.
    images_per_study
        Number of studies with 1, 2, ... images.
    missing
        Images without a file; None where no image folder was given.
    n_as_published
        How many of the 35 image counts equal the published ones; None where
        the cohort is not the complete Indiana collection.
    """

    findings: tuple[FindingCount, ...]
    n_images: int
    n_studies: int
    n_patients: int | None
    n_without_patient: int
    n_unlabelled: int
    projections: dict[str, int]
    images_per_study: dict[int, int]
    missing: tuple[str, ...] | None
    n_as_published: int | None
    given: dict[str, dict[str, int]] = field(default_factory=dict)
    """Images of each part of a given split, and of each given fold."""
    reading: Reading | None = None

    @property
    def imbalance_ratio(self) -> float | None:
        """Images of the most frequent finding per image of the rarest that occurs at all."""
        counts = [count.images for count in self.findings if count.images]
        return max(counts) / min(counts) if counts else None

    def to_dict(self) -> dict[str, Any]:
        """Return the same as JSON-able values."""
        missing = self.missing
        return {
            "images": self.n_images,
            "studies": self.n_studies,
            "patients": self.n_patients,
            "images_without_patient": self.n_without_patient,
            "unlabelled_images": self.n_unlabelled,
            "projections": self.projections,
            "images_per_study": {str(n): count for n, count in self.images_per_study.items()},
            "missing_files": None if missing is None else len(missing),
            "missing_first": None if missing is None else list(missing[:5]),
            "imbalance_ratio": self.imbalance_ratio,
            "counts_as_published": self.n_as_published,
            "findings": [asdict(count) for count in self.findings],
            **self.given,
            "reading": None if self.reading is None else self.reading.to_dict(),
        }

    def to_text(self) -> str:
        """Return one screen of text: the cohort's size and views, then a row per finding."""
        head = self._summary_lines()
        if self.reading is not None:
            head += ["", self.reading.to_text()]
        if not self.findings:
            return "\n".join([*head, "", "no findings"])
        width = max(len("finding"), *(len(count.finding) for count in self.findings))
        header = f"{'finding':<{width}}  {'images':>7}  {'studies':>7}  {'prevalence':>10}"
        codes = {} if self.reading is None else self.reading.codes
        written = [code for code in CODE_NAMES.values() if any(code in of for of in codes.values())]
        header += "".join(f"  {code:>9}" for code in written)
        rows = [
            f"{count.finding:<{width}}  {count.images:>7,}  {count.studies:>7,}  "
            f"{_percent(count.prevalence):>10}"
            + "".join(f"  {codes.get(count.finding, {}).get(code, 0):>9,}" for code in written)
            for count in self.findings
        ]
        return "\n".join([*head, "", header, *rows])

    def _summary_lines(self) -> list[str]:
        unnamed = f" ({self.n_without_patient:,} images name none)"
        patients = "; patients are not named"
        if self.n_images == self.n_studies > 1:
            patients += ", nor studies of several images, so a split keeps no images together"
        if self.n_patients is not None:
            patients = f" of {count(self.n_patients, 'patient')}" + unnamed * bool(
                self.n_without_patient
            )
        per_study = (f"{n}: {count:,}" for n, count in self.images_per_study.items())
        views = (f"{name or 'unknown'} {count:,}" for name, count in self.projections.items())
        lines = [
            f"{count(self.n_images, 'image')} of {count(self.n_studies, 'study')}{patients}",
            f"projections:       {', '.join(views)}",
            f"images per study:  {', '.join(per_study)}",
            f"unlabelled images: {self.n_unlabelled:,}",
        ]
        for name, parts in self.given.items():
            shown = (f"{part or 'none'} {n:,}" for part, n in parts.items())
            lines.append(f"{name.replace('_', ' ') + ':':<18} {', '.join(shown)}")
        for share, what in ((0, "positives"), (1, "negatives")):
            if lacking := [of.finding for of in self.findings if of.prevalence == share]:
                lines.append(f"without {what}: {_list_first(lacking, 2)}, cannot be scored")
        if self.missing is not None:
            all_missing = len(self.missing) == self.n_images
            hint = "; none is there, so this may be the wrong folder" if all_missing else ""
            lines.append(f"missing files:     {_list_first(self.missing)}{hint}")
        if self.imbalance_ratio is not None:
            lines.append(f"imbalance ratio:   {self.imbalance_ratio:,.0f}:1")
        if self.n_as_published is not None:
            lines.append(
                f"image counts:      {self.n_as_published} of {len(PUBLISHED_COUNTS)} as published"
            )
        return lines


def describe_cohort(cohort: Cohort, missing: Sequence[str] | None = None) -> CohortDescription:
    """Count what a cohort holds.

    Parameters
    ----------
    cohort
        The images.
    missing
        Those without a file, from :func:`cxr_cache.datasets.images.find_missing`; None where that
        was not looked up.
    """
    labelled = ~np.isnan(cohort.targets)
    patients = set(cohort.images["patient_id"].tolist()) - {""}
    images_of_study = Counter(cohort.images["study_uid"].tolist())
    findings = _count_findings(cohort)
    n_as_published = None
    if cohort.findings == FINDINGS and len(cohort) == PUBLISHED_IMAGES:
        n_as_published = sum(PUBLISHED_COUNTS[count.finding] == count.images for count in findings)
    return CohortDescription(
        findings=findings,
        n_images=len(cohort),
        n_studies=len(images_of_study),
        n_patients=len(patients) or None,
        n_without_patient=int((cohort.patient_ids == "").sum()),
        n_unlabelled=int((~labelled.any(axis=1)).sum()),
        projections=dict(sorted(Counter(cohort.images["projection"].tolist()).items())),
        images_per_study=dict(sorted(Counter(images_of_study.values()).items())),
        missing=None if missing is None else tuple(missing),
        n_as_published=n_as_published,
        given={
            name: dict(sorted(Counter(cohort.images[name].tolist()).items()))
            for name in GIVEN
            if name in cohort.images
        },
        reading=cohort.reading,
    )


def _count_findings(cohort: Cohort) -> tuple[FindingCount, ...]:
    counts = []
    study_of_image, _ = pd.factorize(cohort.images["study_uid"])
    for column, finding in enumerate(cohort.findings):
        targets = cohort.targets[:, column]
        present = targets == 1
        n_labelled = int((~np.isnan(targets)).sum())
        counts.append(
            FindingCount(
                finding=finding,
                images=int(present.sum()),
                studies=int(np.count_nonzero(np.bincount(study_of_image[present]))),
                prevalence=float(present.sum()) / n_labelled if n_labelled else None,
            )
        )
    return tuple(counts)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _list_first(names: Sequence[str], n: int = 3) -> str:
    more = ", ..." if len(names) > n else ""
    return f"{len(names):,}" + (f" ({', '.join(names[:n])}{more})" if names else "")


# -- what its test can tell ---


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
    nested: float | None = None
    """Half width of the mean where all are tested, as by ``train --protocol nested``; None where
    the split is given, or there is no interval."""

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
        lines.append(
            f"  The mean is over the {count(self.n_in_macro, 'finding')} with at least one "
            "positive and one negative expected, as if their errors had nothing in common; errors "
            "that findings share make its interval wider."
        )
        if not self.whose:
            width_of_all = "no interval" if self.nested is None else f"±{self.nested:.3f}"
            lines.append(
                f"  `train --protocol nested` tests all {units}, each once, which takes several "
                f"times as long: the mean has {width_of_all} then."
            )
        return "\n".join(lines)


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
    cohort = cohort.take(cohort.is_labelled)
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
    of_nested = math.nan if whose else expected_macro_half_width(config.plan_auroc, *counts)[0]
    rows = [
        FindingPlan(finding, float(n), float(n_not), _known(half_widths[f]), _whole(needed[f]))
        for f, (finding, n, n_not) in enumerate(zip(cohort.findings, *expected, strict=True))
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
        _known(of_nested),
    )


def _known(value: float | np.floating[Any]) -> float | None:
    return None if np.isnan(value) else float(value)


def _whole(value: float | np.floating[Any]) -> int | None:
    return int(value) if np.isfinite(value) else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}" if value < 10 else f"{value:,.0f}"
