"""All figures of a set of scored rows, with intervals over its patients or studies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.evaluation.scored import ScoredImages
from cxr_cache.metrics.intervals import (
    Interval,
    Scale,
    auroc_interval,
    count_classes,
    count_rarer_class,
    interval_of_mean,
    macro_interval,
    standard_errors,
    student_interval,
)
from cxr_cache.metrics.operating_point import Calibration
from cxr_cache.metrics.recalibration import recalibrate
from cxr_cache.metrics.resampled import bootstrap, rank_scores
from cxr_cache.metrics.scores import (
    CONFUSION_COLUMNS,
    UNDECIDED,
    Array,
    FloatArray,
    average_precision_of_chance,
    confusion_counts,
    divide,
    drop_positives_only,
    errors_of_prevalence,
    exact_matches,
    expected_calibration_error,
    f1_of_calling_all,
    find_best_constant,
    has_both_classes,
    label_accuracy,
    label_accuracy_all_negative,
    log_losses,
    macro_mean,
    rates,
    squared_errors,
    support_mean,
    weighted_mean,
)

Figures: TypeAlias = dict[str, FloatArray]
"""Named figures under R weightings of the rows: overall ``(R,)``, per finding ``(R, F)``."""
Entry: TypeAlias = dict[str, float | int | None]
"""``{"value", "low", "high"}``, as JSON has it."""
CountedOver: TypeAlias = Literal["labelled", "positive", "both", "negative", "called", "not called"]
"""Whose clusters a figure of a finding rests on; ``"both"`` is the fewer of the two classes."""


class Measure(NamedTuple):
    """What is known of a figure that every finding has; its own figure, the means, the page."""

    label: str
    """In the middle of a sentence."""
    counted_over: CountedOver
    scale: Scale | None = "logit"
    """On which its interval is symmetric; None for no interval."""
    baseline: float | str | None = None
    """What its mean over findings is compared with: the number itself, or a figure's name."""
    baseline_label: str = ""
    """What scores the baseline."""
    lower_is_better: bool = False
    is_headline: bool = False
    """Whether it stands at the top of the page and on the model card."""
    is_in_panel: bool = False
    """Whether it stands among the figures of a single finding, beside its curves."""
    widen: bool = True
    """Whether resamples of few clusters show too little of its variance, as they do of means."""
    hub_metric: str = ""
    """Its name among the metrics of the Hugging Face Hub, where a model card is to report it."""

    @property
    def heading(self) -> str:
        """The label at the beginning of a line."""
        return self.label[0].upper() + self.label[1:]


MEASURES: Final = {
    "auroc": Measure(
        *("AUROC", "both", "logit", 0.5, "guessing"), is_headline=True, hub_metric="roc_auc"
    ),
    "ap": Measure(
        *("average precision", "both", "logit", "ap_of_chance", "guessing"),
        is_headline=True,
        widen=False,
        hub_metric="average_precision",
    ),
    "prevalence": Measure("prevalence, beside average precision", "labelled"),
    "f1": Measure(
        *("F1", "positive", "logit", "f1_of_calling_all", "calling everything present"),
        is_headline=True,
        is_in_panel=True,
        hub_metric="f1",
    ),
    "sensitivity": Measure("sensitivity", "positive"),
    "specificity": Measure("specificity", "negative"),
    "ppv": Measure("PPV", "called"),
    "npv": Measure("NPV", "not called"),
    "balanced_accuracy": Measure("balanced accuracy", "both", is_in_panel=True),
    "brier": Measure(
        *("Brier score", "labelled", "logit", "brier_of_prevalence", "constant prevalence"),
        lower_is_better=True,
        is_headline=True,
        is_in_panel=True,
    ),
    "brier_skill": Measure(
        *("Brier skill score", "both", "identity", 0.0, "constant prevalence"), is_in_panel=True
    ),
    "log_loss": Measure(
        *("log loss", "labelled", "log", "log_loss_of_prevalence", "constant prevalence"),
        lower_is_better=True,
        is_in_panel=True,
    ),
    "log_loss_skill": Measure(
        *("log loss skill score", "both", "identity", 0.0, "constant prevalence"), is_in_panel=True
    ),
    "calibration_error": Measure(  # resampling would bias it upwards
        *("calibration error", "labelled", None),
        lower_is_better=True,
        is_headline=True,
        is_in_panel=True,
    ),
}
"""Every figure of a finding, in the order of the page; tables, page and model card read this."""

RESAMPLED: Final = {name: measure for name, measure in MEASURES.items() if measure.scale}
"""Those that have intervals."""


def make_statistics(images: ScoredImages, thresholds: FloatArray) -> Callable[[Array], Figures]:
    """Everything that does not depend on the weights, computed once; the rest as a function.

    Parameters
    ----------
    images
        N rows, F findings.
    thresholds
        Probability from which on each finding counts as present, shape ``(F,)``; or ``(N, F)``
        where rows have models, and so thresholds, of their own.

    Returns
    -------
    Callable
        Weights of the rows ``(R, N)`` to the figures under them.
    """
    targets, probabilities = drop_positives_only(images.targets), images.probabilities
    is_decided = thresholds < UNDECIDED
    decided, decisions = np.where(is_decided, targets, np.nan), probabilities >= thresholds
    ranked = rank_scores(targets, probabilities, images.folds)
    pooled = rank_scores(targets, probabilities, images.folds, pooled=True)
    errors = {
        "brier": np.nan_to_num(squared_errors(targets, probabilities)),
        "log_loss": np.nan_to_num(log_losses(targets, probabilities)),
    }
    constants = (np.zeros(targets.shape[1], bool), find_best_constant(decided))
    exact = np.stack(
        [exact_matches(decided, called) for called in (decisions, *constants)], axis=-1
    )

    n_present, n_cells = (targets == 1).sum(axis=0), (~np.isnan(targets)).sum(axis=0)
    unweighted = {
        name: _beside_prevalence(name, cells.sum(axis=0), n_present, n_cells)
        for name, cells in errors.items()
    }

    def statistics(weights: Array) -> Figures:
        counts = confusion_counts(targets, decisions, weights)  # (R, F, 4)
        n_labelled, n_positive = counts.sum(axis=-1), counts[..., 0] + counts[..., 2]
        if is_decided.ndim == 1:
            counts *= is_decided[:, None]
        else:
            counts = confusion_counts(decided, decisions, weights)
        per_finding, micro = rates(counts)._asdict(), rates(counts.sum(axis=-2))._asdict()
        for name, cells in errors.items():
            of_both = _beside_prevalence(name, weights @ cells, n_positive, n_labelled)
            for figure, values in (
                (name, of_both[0]),
                (f"{name}_skill", _skill(*of_both, unweighted[name])),
            ):
                per_finding[figure], micro[figure] = values[..., :-1], values[..., -1]
        per_finding["auroc"], per_finding["ap"] = ranked.auroc_and_ap(weights)
        micro["auroc"], micro["ap"] = (of[:, 0] for of in pooled.auroc_and_ap(weights))
        prevalence = divide(n_positive, n_labelled)
        per_finding["prevalence"] = np.where(np.isnan(per_finding["auroc"]), np.nan, prevalence)
        micro["prevalence"] = divide(n_positive.sum(axis=-1), n_labelled.sum(axis=-1))
        accuracy, all_negative = label_accuracy(counts), label_accuracy_all_negative(counts)
        exact_match = weighted_mean(exact, weights)  # (R, 3)
        return {
            **{name: per_finding[name] for name in RESAMPLED},
            **{
                f"weighted_{name}": support_mean(per_finding[name], n_positive)
                for name in RESAMPLED
            },
            **{f"micro_{name}": micro[name] for name in RESAMPLED},
            "label_accuracy": accuracy,
            "label_accuracy_all_negative": all_negative,
            "label_accuracy_gain": accuracy - all_negative,
            "exact_match": exact_match[:, 0],
            "exact_match_all_negative": exact_match[:, 1],
            "exact_match_best_constant": exact_match[:, 2],
        }

    return statistics


def _beside_prevalence(
    name: str, summed: Array, n_positive: Array, n_labelled: Array
) -> tuple[FloatArray, FloatArray]:
    """Mean ``"brier"`` or ``"log_loss"`` errors, and those of stating each finding's prevalence.

    From sums over labelled rows and numbers of rows, ``(..., F)``; with all cells pooled as one
    more finding, ``(..., F + 1)``.
    """
    of_constant = np.nan_to_num(n_labelled * errors_of_prevalence(n_positive, n_labelled)[name])
    summed, of_constant, n = (
        np.concatenate([each, each.sum(axis=-1, keepdims=True)], axis=-1)
        for each in (summed, of_constant, n_labelled)
    )
    return divide(summed, n), divide(of_constant, n)


def _skill(
    errors: FloatArray, constants: FloatArray, unweighted: tuple[FloatArray, FloatArray]
) -> FloatArray:
    """1 - error / constant on the rows as they are, and what follows to first order under weights.

    A quotient under weights would have no variance: where the few positives of a finding weigh next
    to nothing, so does the constant.
    """
    error, constant = unweighted
    change: FloatArray = divide(error * (constants - constant), np.square(constant))
    return 1 - divide(errors, constant) + change


@dataclass(frozen=True, eq=False)
class Estimates:
    """Figures of some rows, and their bounds where clusters were resampled."""

    figures: Figures
    """Overall ``()``, per finding ``(F,)``."""
    intervals: dict[str, Interval]
    """By the same names, and ``macro_...``; empty without resamples."""
    n_undefined: dict[str, NDArray[np.int64]]
    """Resamples that left a figure of a finding undefined, ``(F,)``."""
    by_chance: Figures
    """What knowing nothing gets, ``(F,)``: ``ap_of_chance``, ``f1_of_calling_all``, and Brier score
    and log loss ``_of_prevalence``."""
    calibration_error: FloatArray
    """Shape ``(F,)``; it has no interval."""
    calibration_error_weighted: float
    calibration_error_micro: float

    def overall(self) -> dict[str, Entry]:
        """The figures over all findings, as metrics.json has them."""
        return {
            **{
                f"macro_{name}": _mean_entry(self.figures[name]) | self._bounds(f"macro_{name}")
                for name in RESAMPLED
            },
            **{f"macro_{name}": _mean_entry(values) for name, values in self.by_chance.items()},
            "macro_calibration_error": _mean_entry(self.calibration_error),
            **{
                name: {"value": to_number(figure), **self._bounds(name)}
                for name, figure in self.figures.items()
                if figure.ndim == 0
            },
            "weighted_calibration_error": {"value": to_number(self.calibration_error_weighted)},
            "micro_calibration_error": {"value": to_number(self.calibration_error_micro)},
        }

    def _bounds(self, name: str) -> Entry:
        if name not in self.intervals:
            return {}
        interval = self.intervals[name]
        return {"low": to_number(interval.low), "high": to_number(interval.high)}


def estimate(
    images: ScoredImages, thresholds: FloatArray, *, n_resamples: int = 0, seed: int = 0
) -> Estimates:
    """Evaluate on the rows themselves, then on resampled clusters; no resamples, no bounds.

    Parameters
    ----------
    images, thresholds
        As :func:`make_statistics` takes them.
    n_resamples, seed
        As in :func:`cxr_cache.metrics.resampled.bootstrap`.
    """
    statistics = make_statistics(images, thresholds)
    figures = {name: figure[0] for name, figure in statistics(np.ones((1, len(images)))).items()}
    intervals: dict[str, Interval] = {}
    n_undefined: dict[str, NDArray[np.int64]] = {}
    if n_resamples:
        clusters = images.clusters
        resampled = bootstrap(statistics, clusters, n_resamples, seed)
        n_clusters_of = _count_clusters(images, thresholds)
        of_classes = count_classes(images.targets, clusters)
        n_clusters = len(np.unique(clusters))
        intervals = _intervals(figures, resampled, n_clusters_of, of_classes, n_clusters)
        n_undefined = {name: np.isnan(resampled[name]).sum(axis=0) for name in RESAMPLED}
    targets = drop_positives_only(images.targets)
    errors = expected_calibration_error(targets, images.probabilities)
    cells = targets.reshape(-1, 1), images.probabilities.reshape(-1, 1)
    return Estimates(
        figures,
        intervals,
        n_undefined,
        _by_chance(images, figures),
        errors,
        float(support_mean(errors, (targets == 1).sum(axis=0))),
        float(expected_calibration_error(*cells)[0]),
    )


def _by_chance(images: ScoredImages, figures: Figures) -> Figures:
    """Of the findings for which the run's own figure is defined."""
    n_positive, n_labelled = (
        (images.targets == 1).sum(axis=0),
        (~np.isnan(images.targets)).sum(axis=0),
    )
    ap = _guess_ap(images)
    f1 = f1_of_calling_all(n_positive, n_labelled)
    errors = errors_of_prevalence(n_positive, n_labelled)
    return {
        "ap_of_chance": np.where(np.isnan(figures["ap"]), np.nan, ap),
        "f1_of_calling_all": np.where(np.isnan(figures["f1"]), np.nan, f1),
        **{
            f"{name}_of_prevalence": np.where(np.isnan(figures[name]), np.nan, values)
            for name, values in errors.items()
        },
    }


def _guess_ap(images: ScoredImages) -> FloatArray:
    """AP that a random order is expected to have, as the AP is averaged over outer folds."""
    positive = np.array([(part.targets == 1).sum(axis=0) for part in images.by_fold()])
    labelled = np.array([(~np.isnan(part.targets)).sum(axis=0) for part in images.by_fold()])
    of_folds = np.nan_to_num(average_precision_of_chance(positive, labelled))
    n_counted = np.where(labelled > positive, positive, 0)  # those of a fold with negatives
    if len(positive) == 1:
        return average_precision_of_chance(positive[0], labelled[0])
    return divide((of_folds * n_counted).sum(axis=0), n_counted.sum(axis=0))


def _mean_entry(of_findings: FloatArray) -> Entry:
    return {
        "value": to_number(macro_mean(of_findings)),
        "n_findings": int((~np.isnan(of_findings)).sum()),
    }


def _count_clusters(
    images: ScoredImages, thresholds: FloatArray
) -> dict[CountedOver, NDArray[np.int64]]:
    """Clusters with at least one image of each kind, per finding, ``(F,)``.

    Kinds that figures at thresholds rest on are counted where a threshold was chosen.
    """
    decided = np.where(thresholds < UNDECIDED, images.targets, np.nan)
    is_called, labelled = images.probabilities >= thresholds, ~np.isnan(decided)
    kinds: dict[CountedOver, NDArray[np.bool_]] = {
        "labelled": ~np.isnan(images.targets),
        "positive": decided == 1,
        "negative": decided == 0,
        "called": labelled & is_called,
        "not called": labelled & ~is_called,
    }
    counts = {kind: images.count_clusters(cells) for kind, cells in kinds.items()}
    counts["both"] = count_rarer_class(images.targets, images.clusters).astype(np.int64)
    return counts


def _intervals(
    figures: Figures,
    resampled: Figures,
    n_clusters_of: dict[CountedOver, NDArray[np.int64]],
    of_classes: FloatArray,
    n_clusters: int,
) -> dict[str, Interval]:
    intervals = {}
    for name, measure in RESAMPLED.items():
        assert measure.scale is not None
        scale, n, values = measure.scale, n_clusters_of[measure.counted_over], resampled[name]
        errors = standard_errors(values, n, widen=measure.widen)
        intervals[name] = student_interval(figures[name], errors, n, scale)
        if name == "auroc":
            intervals[name] = auroc_interval(figures[name], errors, *of_classes)
        (defined,) = np.nonzero(~np.isnan(figures[name]))
        intervals[f"macro_{name}"] = (
            Interval(*(bounds[defined[0]] for bounds in intervals[name]))
            if len(defined) == 1
            else macro_interval(figures[name], values, n, scale, widen=measure.widen)
        )
    intervals["balanced_accuracy"] = interval_of_mean(
        figures["balanced_accuracy"],
        *((figures[name], intervals[name]) for name in ("sensitivity", "specificity")),
    )
    for name in figures.keys() - RESAMPLED.keys():
        error = standard_errors(resampled[name], n_clusters)
        intervals[name] = student_interval(figures[name], error, n_clusters, _scale_of(name))
    return intervals


def _scale_of(overall: str) -> Scale:
    """Of a figure over all findings."""
    if overall == "label_accuracy_gain":
        return "identity"
    scale = RESAMPLED[overall.partition("_")[2]].scale if _is_mean(overall) else None
    return scale or "logit"


def _is_mean(overall: str) -> bool:
    return overall.startswith(("weighted_", "micro_"))


def to_number(value: float | FloatArray | np.floating[Any]) -> float | None:
    """As JSON has it: None where undefined."""
    number = float(value)
    return None if math.isnan(number) else number


# -- tables ---


def calibration_columns(
    raw: ScoredImages, images: ScoredImages, calibration: Calibration | None
) -> dict[str, Any]:
    """Errors without calibration, the map of each finding, and what it leaves to be corrected.

    None is of several models, whose maps differ.
    """
    targets = drop_positives_only(raw.targets)
    errors = probability_errors(targets, raw.probabilities)
    left = recalibrate(targets, images.probabilities, images.clusters)
    return {
        **{f"{name}_before": values for name, values in errors.items()},
        "calibration_slope": np.nan if calibration is None else calibration.slope,
        "calibration_intercept": np.nan if calibration is None else calibration.intercept,
        "test_slope": left.slope,
        "test_slope_low": left.slope_interval.low,
        "test_slope_high": left.slope_interval.high,
        "test_intercept": left.intercept,
        "test_intercept_low": left.intercept_interval.low,
        "test_intercept_high": left.intercept_interval.high,
    }


def pooled_recalibration(images: ScoredImages) -> dict[str, Entry]:
    """Calibration slope and intercept of all cells pooled, as metrics.json has them."""
    targets = drop_positives_only(images.targets)
    clusters = np.repeat(images.clusters, targets.shape[1])
    pooled = recalibrate(targets.reshape(-1, 1), images.probabilities.reshape(-1, 1), clusters)
    return {
        name: {
            "value": to_number(value[0]),
            "low": to_number(interval.low[0]),
            "high": to_number(interval.high[0]),
        }
        for name, value, interval in (
            ("slope", pooled.slope, pooled.slope_interval),
            ("intercept", pooled.intercept, pooled.intercept_interval),
        )
    }


def _typical_cuts(images: ScoredImages, cuts: FloatArray) -> FloatArray:
    """Thresholds, ``(F,)``, NaN where none was chosen; the median over outer folds, if any."""
    chosen = np.where(cuts < UNDECIDED, cuts, np.nan)
    if images.folds is None:
        return chosen
    _, first = np.unique(images.folds, return_index=True)  # a row of each fold
    is_chosen = ~np.isnan(chosen[first]).all(axis=0)
    typical = np.full(chosen.shape[1], np.nan)
    typical[is_chosen] = np.nanmedian(chosen[first][:, is_chosen], axis=0)
    return typical


def tabulate_findings(images: ScoredImages, cuts: FloatArray, estimates: Estimates) -> pd.DataFrame:
    """One row per finding, in the order of the findings."""
    targets = images.targets
    decided = np.where(cuts < UNDECIDED, targets, np.nan)
    counts = confusion_counts(decided, images.probabilities >= cuts).astype(np.int64)
    is_decided = np.atleast_2d(cuts < UNDECIDED).any(axis=0)
    columns: dict[str, Any] = {
        "finding": images.findings,
        "n_test": (~np.isnan(targets)).sum(axis=0),
        "n_positive_test": (targets == 1).sum(axis=0),
        "n_positive_studies_test": images.count_studies(targets == 1),
        "n_positive_clusters_test": images.count_clusters(targets == 1),
        "prevalence_test": weighted_mean(targets),
        "threshold": _typical_cuts(images, cuts),
    }
    if images.folds is not None:
        scored = [has_both_classes(part.targets) for part in images.by_fold()]
        columns["n_outer_folds_scored"] = np.sum(scored, axis=0)
    for name in RESAMPLED:
        if name != "prevalence":
            interval = estimates.intervals.get(name)
            columns[name] = estimates.figures[name]
            columns[f"{name}_low"] = np.nan if interval is None else interval.low
            columns[f"{name}_high"] = np.nan if interval is None else interval.high
    for name, n_cells in zip(CONFUSION_COLUMNS, counts.T, strict=True):
        columns[name] = pd.array(n_cells, "Int64")
        columns[name][~is_decided] = pd.NA
    columns["calibration_error"] = estimates.calibration_error
    columns["n_undefined_resamples"] = estimates.n_undefined.get("auroc", 0)
    table: pd.DataFrame = pd.DataFrame(columns)
    return table


def tabulate_groups(
    subsets: Sequence[tuple[str, str, ScoredImages, Estimates, FloatArray]],
) -> pd.DataFrame:
    """The findings of one group after the other, with the thresholds of its images."""
    names = ["group", "value", "n_images_group", "n_studies_group"]
    parts = []
    for group, value, images, estimates, cuts in subsets:
        part = tabulate_findings(images, cuts, estimates)
        described = pd.DataFrame(
            [(group, value, images.count_images(), images.n_studies)] * len(part), columns=names
        )
        parts.append(pd.concat([described, part], axis=1))
    table: pd.DataFrame = (
        pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=names)
    )
    return table


def probability_errors(targets: FloatArray, probabilities: FloatArray) -> dict[str, FloatArray]:
    """Brier score, log loss and calibration error per finding, each ``(F,)``."""
    return {
        "brier": weighted_mean(squared_errors(targets, probabilities)),
        "log_loss": weighted_mean(log_losses(targets, probabilities)),
        "calibration_error": expected_calibration_error(targets, probabilities),
    }
