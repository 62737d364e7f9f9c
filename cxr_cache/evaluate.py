"""Predictions -> metrics, with intervals from a bootstrap over studies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.errors import TableError
from cxr_cache.metrics import (
    CONFUSION_COLUMNS,
    NEVER,
    FloatArray,
    RankedScores,
    Rates,
    bootstrap,
    confusion_counts,
    exact_matches,
    expected_calibration_error,
    label_accuracy,
    label_accuracy_all_negative,
    log_losses,
    macro_mean,
    micro_f1,
    percentile_interval,
    rates,
    squared_errors,
    weighted_mean,
)
from cxr_cache.run import Run

LEVEL = 0.95
"""Share of resamples inside an interval."""

FEW_POSITIVES = 10
"""Findings with fewer positives in test are scored, and named as hardly measurable."""

Statistics: TypeAlias = dict[str, FloatArray]
"""Named figures under R weightings of the images: overall ``(R,)``, per finding ``(R, F)``."""


@dataclass(frozen=True, eq=False)
class ScoredImages:
    """Rows that have both targets and probabilities: images, or studies.

    Attributes
    ----------
    image_ids, study_uids, projections
        Shape ``(N,)``; a study carries its own uid as its image_id and no projection.
    targets
        1 present, 0 absent, NaN unlabelled; shape ``(N, F)``.
    probabilities
        In [0, 1], shape ``(N, F)``, float64.
    findings
        Names of the F findings.
    """

    image_ids: NDArray[np.object_]
    study_uids: NDArray[np.object_]
    projections: NDArray[np.object_]
    targets: FloatArray
    probabilities: FloatArray
    findings: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def n_studies(self) -> int:
        """Number of different studies."""
        return len(np.unique(self.study_uids))

    def take(self, rows: NDArray[Any]) -> ScoredImages:
        """Rows by number or mask."""
        return ScoredImages(
            self.image_ids[rows],
            self.study_uids[rows],
            self.projections[rows],
            self.targets[rows],
            self.probabilities[rows],
            self.findings,
        )

    def by_study(self) -> ScoredImages:
        """One row per study: probabilities averaged, a finding present where any image has it."""
        if not len(self):
            return self
        uids, codes = np.unique(self.study_uids, return_inverse=True)
        order = np.argsort(codes, kind="stable")
        starts = np.searchsorted(codes[order], np.arange(len(uids)))
        n_images = np.bincount(codes)[:, None]
        return ScoredImages(
            image_ids=uids,
            study_uids=uids,
            projections=np.full(len(uids), "", dtype=object),
            targets=np.fmax.reduceat(self.targets[order], starts, axis=0),  # NaN only if all are
            probabilities=np.add.reduceat(self.probabilities[order], starts, axis=0) / n_images,
            findings=self.findings,
        )


def parse_predictions(
    predictions: pd.DataFrame, targets: pd.DataFrame, findings: Sequence[str]
) -> ScoredImages:
    """Join predictions with targets by image_id, in the order of the predictions.

    Parameters
    ----------
    predictions
        Columns image_id, study_uid, projection and one probability per finding.
    targets
        Columns image_id and one target per finding: 1, 0 or NaN. More rows than predictions are
        fine.
    findings
        What to score; the F columns to take from both.

    Raises
    ------
    TableError
        A column is missing, an image has no row of targets or two, or a probability lies outside
        [0, 1].
    """
    findings = tuple(findings)
    columns = ("image_id", "study_uid", "projection", *findings)
    _require_columns(predictions, columns, "predictions")
    _require_columns(targets, ("image_id", *findings), "targets")
    index = pd.Index(targets["image_id"])
    if not index.is_unique:
        twice = index[index.duplicated()][0]
        raise TableError(f"targets: image_id {twice!r} has more than one row; keep one.")
    rows = index.get_indexer(pd.Index(predictions["image_id"]))
    if (rows < 0).any():
        missing = predictions["image_id"].to_numpy()[rows < 0]
        raise TableError(
            f"targets: no row for {len(missing)} predicted images, the first is {missing[0]!r}. "
            "Use the table of the same cohort."
        )
    probabilities = predictions[list(findings)].to_numpy(np.float64)
    _require_probabilities(probabilities, predictions["image_id"].to_numpy(object), findings)
    return ScoredImages(
        image_ids=predictions["image_id"].to_numpy(object),
        study_uids=predictions["study_uid"].to_numpy(object),
        projections=predictions["projection"].to_numpy(object),
        targets=targets[list(findings)].to_numpy(np.float64)[rows],
        probabilities=probabilities,
        findings=findings,
    )


def _require_columns(table: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise TableError(f"{name}: no column {', '.join(map(repr, missing))}.")


def _require_probabilities(
    probabilities: FloatArray, image_ids: NDArray[np.object_], findings: tuple[str, ...]
) -> None:
    outside = ~((probabilities >= 0) & (probabilities <= 1))  # NaN too
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise TableError(
            f"predictions: {image_ids[row]} has {probabilities[row, column]} for "
            f"{findings[column]!r}, which is no probability."
        )


# --- figures -------------------------------------------------------------------------------------


def _statistics(
    images: ScoredImages, thresholds: FloatArray
) -> Callable[[NDArray[np.float32]], Statistics]:
    """Everything that does not depend on the weights, computed once; the rest as a function."""
    targets, decisions = images.targets, images.probabilities >= thresholds
    ranking = _ranking_statistics(images)
    squared, log_loss = (of(targets, images.probabilities) for of in (squared_errors, log_losses))
    exact = exact_matches(targets, decisions)
    exact_all_negative = exact_matches(targets, np.zeros_like(decisions))

    def statistics(weights: NDArray[np.float32]) -> Statistics:
        counts = confusion_counts(targets, decisions, weights)
        derived = rates(counts)
        brier, surprise = weighted_mean(squared, weights), weighted_mean(log_loss, weights)
        accuracy, all_negative = label_accuracy(counts), label_accuracy_all_negative(counts)
        return {
            **ranking(weights),
            "macro_f1": macro_mean(derived.f1),
            "micro_f1": micro_f1(counts),
            "macro_balanced_accuracy": macro_mean(derived.balanced_accuracy),
            "label_accuracy": accuracy,
            "label_accuracy_all_negative": all_negative,
            "label_accuracy_gain": accuracy - all_negative,
            "exact_match": weighted_mean(exact, weights),
            "exact_match_all_negative": weighted_mean(exact_all_negative, weights),
            "macro_brier": macro_mean(brier),
            "macro_log_loss": macro_mean(surprise),
            "brier": brier,
            "log_loss": surprise,
            **derived._asdict(),
        }

    return statistics


def _ranking_statistics(images: ScoredImages) -> Callable[[NDArray[np.float32]], Statistics]:
    """Only what needs no threshold."""
    ranked = RankedScores(images.targets, images.probabilities)

    def statistics(weights: NDArray[np.float32]) -> Statistics:
        areas, precisions = ranked.auroc_and_ap(weights)
        prevalence = np.where(np.isnan(areas), np.nan, weighted_mean(images.targets, weights))
        return {
            "macro_auroc": macro_mean(areas),
            "macro_ap": macro_mean(precisions),
            "macro_prevalence": macro_mean(prevalence),  # the AP that guessing would get
            "auroc": areas,
            "ap": precisions,
        }

    return statistics


@dataclass(frozen=True, eq=False)
class _Estimates:
    """Figures on the rows as they are, with bounds where they were resampled."""

    figures: Statistics  # overall (), per finding (F,)
    low: Statistics
    high: Statistics
    n_undefined: dict[str, NDArray[np.int64]]

    def overall(self) -> dict[str, dict[str, float | None]]:
        """The figures over all findings, as metrics.json has them."""
        return {name: self._entry(name) for name, value in self.figures.items() if value.ndim == 0}

    def _entry(self, name: str) -> dict[str, float | None]:
        entry = {"value": _number(self.figures[name])}
        if name in self.low:
            entry |= {"low": _number(self.low[name]), "high": _number(self.high[name])}
        return entry


def _estimate(
    statistics: Callable[[NDArray[np.float32]], Statistics],
    images: ScoredImages,
    n_resamples: int,
    seed: int,
) -> _Estimates:
    """Evaluate on the rows themselves, then on resampled studies; no resamples, no bounds."""
    once = np.ones((1, len(images)), dtype=np.float32)
    figures = {name: figure[0] for name, figure in statistics(once).items()}
    if n_resamples == 0:
        return _Estimates(figures, {}, {}, {})
    resampled = bootstrap(statistics, images.study_uids, n_resamples, seed)
    intervals = {name: percentile_interval(value, LEVEL) for name, value in resampled.items()}
    return _Estimates(
        figures,
        {name: interval.low for name, interval in intervals.items()},
        {name: interval.high for name, interval in intervals.items()},
        {name: interval.n_undefined for name, interval in intervals.items()},
    )


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Figures of one set of predictions."""

    metrics: dict[str, Any]
    """As in ``metrics.json``; what is undefined is None."""
    per_finding: pd.DataFrame
    """One row per finding, as in ``per_finding.csv``; what is undefined is NaN."""


def evaluate_predictions(
    predictions: pd.DataFrame,
    targets: pd.DataFrame,
    thresholds: Mapping[str, float],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Score predictions for images that no choice was made on.

    Intervals hold 95 % of the resamples of whole studies. A finding without both a positive and a
    negative is not scored; it is left out of the macro means and named.

    Parameters
    ----------
    predictions
        Columns image_id, study_uid, projection and one probability per finding.
    targets
        Columns image_id and one target per finding: 1, 0 or NaN.
    thresholds
        Probability from which on each finding counts as present; its keys are the findings scored.
    n_resamples
        Bootstrap resamples; 0 leaves the intervals out.
    seed
        Of the resampling. Evaluations of the same studies with one seed resample alike.

    Returns
    -------
    Evaluation
        ``metrics`` holds ``test`` (``{"value", "low", "high"}`` by name), ``test_by_study``
        (probabilities averaged over the images of a study), ``test_by_projection``, counts, and
        the findings that could not be scored.

    Raises
    ------
    TableError
        The tables do not fit each other, or there is nothing to evaluate.
    """
    images = parse_predictions(predictions, targets, tuple(thresholds))
    return _evaluate(images, np.array(list(thresholds.values())), n_resamples, seed)


def _evaluate(images: ScoredImages, cuts: FloatArray, n_resamples: int, seed: int) -> Evaluation:
    if not len(images):
        raise TableError("predictions: no image to evaluate.")
    estimates = _estimate(_statistics(images, cuts), images, n_resamples, seed)

    def ranked(subset: ScoredImages) -> dict[str, Any]:
        return _estimate(_ranking_statistics(subset), subset, n_resamples, seed).overall()

    errors = expected_calibration_error(images.targets, images.probabilities)
    metrics = {
        "test": {
            **estimates.overall(),
            "macro_calibration_error": {"value": _number(macro_mean(errors))},
        },
        "test_by_study": ranked(images.by_study()),
        "test_by_projection": {
            projection: {
                **ranked(subset),
                "n_images": len(subset),
                "n_studies": subset.n_studies,
            }
            for projection, subset in _by_projection(images)
        },
        **_counts(images, estimates.figures["auroc"], cuts),
        "bootstrap": {"n_resamples": n_resamples, "seed": seed, "level": LEVEL, "unit": "study"},
    }
    return Evaluation(metrics, _per_finding(images, cuts, estimates, errors))


def _by_projection(images: ScoredImages) -> Iterator[tuple[str, ScoredImages]]:
    for projection in sorted(set(images.projections) - {""}):
        yield projection, images.take(images.projections == projection)


def _counts(images: ScoredImages, areas: FloatArray, cuts: FloatArray) -> dict[str, Any]:
    """How much was scored, and which findings were not."""
    undefined = np.isnan(areas)
    return {
        "n_findings": len(images.findings),
        "n_findings_scored": int((~undefined).sum()),
        "n_findings_undefined": int(undefined.sum()),
        "findings_undefined": _named(images.findings, undefined),
        "findings_with_few_positives": _named(
            images.findings, ~undefined & ((images.targets == 1).sum(axis=0) < FEW_POSITIVES)
        ),
        "findings_never_called": _named(images.findings, cuts >= NEVER),
        "n_test_images": len(images),
        "n_test_studies": images.n_studies,
    }


def _named(findings: Sequence[str], chosen: NDArray[np.bool_]) -> list[str]:
    return [finding for finding, is_chosen in zip(findings, chosen, strict=True) if is_chosen]


def _per_finding(
    images: ScoredImages, cuts: FloatArray, estimates: _Estimates, errors: FloatArray
) -> pd.DataFrame:
    """One row per finding, in the order of the findings."""
    targets, figures = images.targets, estimates.figures
    counts = confusion_counts(targets, images.probabilities >= cuts).astype(np.int64)
    columns: dict[str, Any] = {
        "finding": images.findings,
        "n_test": (~np.isnan(targets)).sum(axis=0),
        "n_positive_test": (targets == 1).sum(axis=0),
        "prevalence_test": weighted_mean(targets),
        "threshold": cuts,
    }
    for name in ("auroc", "ap"):
        columns[name] = figures[name]
        columns[f"{name}_low"] = estimates.low.get(name, np.nan)
        columns[f"{name}_high"] = estimates.high.get(name, np.nan)
    columns |= {name: figures[name] for name in Rates._fields}
    columns |= dict(zip(CONFUSION_COLUMNS, counts.T, strict=True))
    columns |= {name: figures[name] for name in ("brier", "log_loss")}
    columns["calibration_error"] = errors
    columns["n_undefined_resamples"] = estimates.n_undefined.get("auroc", 0)
    table: pd.DataFrame = pd.DataFrame(columns)
    return table


# --- the run -------------------------------------------------------------------------------------


def evaluate_run(run: Run, *, n_resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Evaluate the predictions that a run stored, and store the figures with it.

    The test split gets intervals. Train and out-of-fold figures are there to be compared with it
    and carry values only: the final model has seen every training row, and the thresholds were
    chosen on the out-of-fold predictions.

    Parameters
    ----------
    run
        A run with predictions; ``metrics.json`` and ``per_finding.csv`` are written to it.
    n_resamples, seed
        As in :func:`evaluate_predictions`.

    Returns
    -------
    dict[str, Any]
        What ``metrics.json`` holds: that of :func:`evaluate_predictions`, and ``train`` and
        ``out_of_fold``, ``{"value"}`` by name.

    Raises
    ------
    TableError
        The run's tables do not fit each other.
    RunError
        One of them is missing.
    """
    findings = run.config["findings"]
    cuts = np.array([run.thresholds[finding] for finding in findings])
    predictions, targets = run.read_table("predictions"), run.read_table("targets")
    is_test = (predictions["split"] == "test").to_numpy()
    images = parse_predictions(predictions, targets, findings)
    train = images.take(~is_test)
    out_of_fold = parse_predictions(run.read_table("out_of_fold"), targets, findings)

    evaluation = _evaluate(images.take(is_test), cuts, n_resamples, seed)
    metrics = {
        **evaluation.metrics,
        "train": _values(train, cuts),
        "out_of_fold": _values(out_of_fold, cuts),
        "n_train_images": len(train),
        "n_train_studies": train.n_studies,
    }
    per_finding = evaluation.per_finding
    per_finding.insert(1, "n_images", (images.targets == 1).sum(axis=0))
    per_finding.insert(2, "n_studies", (images.by_study().targets == 1).sum(axis=0))
    run.write_table("per_finding", per_finding)
    run.write_metrics(metrics)
    return metrics


def _values(images: ScoredImages, cuts: FloatArray) -> dict[str, Any]:
    """The same figures without intervals."""
    return _estimate(_statistics(images, cuts), images, n_resamples=0, seed=0).overall()


def format_summary(metrics: Mapping[str, Any]) -> str:
    """Headline figures of ``metrics.json`` for a terminal, one line each."""
    test, boot = metrics["test"], metrics["bootstrap"]
    accuracy = _with_interval(test["label_accuracy"], "{:.2%}")
    all_negative = _with_interval(test["label_accuracy_all_negative"], "{:.2%}", bounds=False)
    lines = [
        f"test: {metrics['n_test_images']:,} images of {metrics['n_test_studies']:,} studies, "
        f"{metrics['n_findings_scored']} of {metrics['n_findings']} findings scored",
        f"  macro AUROC     {_with_interval(test['macro_auroc'])}",
        f"    by study      {_with_interval(metrics['test_by_study']['macro_auroc'])}",
        f"  macro AP        {_with_interval(test['macro_ap'])}",
        f"  macro F1        {_with_interval(test['macro_f1'])}",
        f"  label accuracy  {accuracy}; predicting nothing scores {all_negative}",
    ]
    if boot["n_resamples"]:
        lines.append(
            f"  [{boot['level']:.0%} intervals from {boot['n_resamples']:,} resamples of studies]"
        )
    if metrics["findings_undefined"]:
        lines.append(
            f"  {metrics['n_findings_undefined']} not scored, without a positive or a negative in "
            f"test: {', '.join(metrics['findings_undefined'])}"
        )
    return "\n".join(lines)


def _with_interval(
    entry: Mapping[str, float | None], form: str = "{:.3f}", *, bounds: bool = True
) -> str:
    """``0.722 [0.701, 0.741]``, or ``undefined``."""
    value, low, high = (entry.get(name) for name in ("value", "low", "high"))
    if value is None:
        return "undefined"
    if not bounds or low is None or high is None:
        return form.format(value)
    return f"{form.format(value)} [{form.format(low)}, {form.format(high)}]"


def _number(value: float | FloatArray) -> float | None:
    """As JSON has it: None where undefined."""
    number = float(value)
    return None if math.isnan(number) else number
