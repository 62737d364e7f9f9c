"""A run's predictions for another data set -> how well it does there, beside its own test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from cxr_cache.common.wording import count, first_lines
from cxr_cache.config import EvaluateConfig
from cxr_cache.evaluation.evaluate import Evaluation, evaluate_predictions, format_summary
from cxr_cache.evaluation.figures import Estimates, estimate
from cxr_cache.evaluation.matching import Matching
from cxr_cache.evaluation.overlap import Overlap
from cxr_cache.evaluation.scored import ScoredImages, parse_predictions, read_scored
from cxr_cache.metrics.operating_point import Calibration, choose_operating_point
from cxr_cache.metrics.scores import UNDECIDED, FloatArray, weighted_mean
from cxr_cache.models.run import Run
from cxr_cache.models.split_reads import SplitReads

AT_THRESHOLD: Final = ("f1", "sensitivity", "specificity", "ppv", "npv", "balanced_accuracy")
OF_CALIBRATION: Final = ("brier", "log_loss")


@dataclass(frozen=True, eq=False, kw_only=True)
class ExternalEvaluation(Evaluation):
    """Figures of a run on another data set; nothing was chosen there but what says so."""

    matching: Matching
    """Which findings were scored, which not, and why."""
    overlap: Overlap
    """Images and patients that the run knows already."""
    reads: SplitReads | None = None
    """How often figures of these images have been computed, where that was counted."""

    def __repr__(self) -> str:
        return first_lines(self.to_text())

    def to_text(self) -> str:
        """Write what was matched, the figures, and how far they are from the run's own test."""
        reads = [] if self.reads is None else [self.reads.to_text()]
        return "\n".join(
            [self.matching.to_text(), format_summary(self.metrics), *self._beside(), *reads]
        )

    def _beside(self) -> list[str]:
        """Finding by finding, what the run's own data and these say."""
        external, here = self.metrics["external"], self.metrics["test"]
        own, anew = external["own_test"], external["recalibrated"]
        table = self.per_finding
        width = max(len(name) for name in table["finding"])
        shown = ("prevalence_train", "prevalence_test", "auroc_own_test", "auroc")
        lines = [
            f"  {'':<{width}}  prevalence        AUROC",
            f"  {'':<{width}}  train   here      own test  here",
        ]
        for row in table.to_dict("records"):
            train, now, own_area, area = (_fixed(row[name]) for name in shown)
            line = f"  {row['finding']:<{width}}  {train:<6}  {now:<8}  {own_area:<8}  {area}"
            lines.append(line)
        for name, words in (
            ("sensitivity", "macro sensitivity"),
            ("specificity", "macro specificity"),
            ("calibration_error", "macro calibration error"),
        ):
            before, carried, chosen = (
                self._mean(figures[f"macro_{name}"]) for figures in (own, here, anew)
            )
            lines.append(
                f"  {words}: {before} in the run's own test; here {carried}, and {chosen} with "
                "thresholds and calibration chosen here (optimistic)"
            )
        return lines

    def _mean(self, entry: Mapping[str, Any]) -> str:
        """A mean over findings, and over how many where not over all that are scored."""
        is_whole = entry["value"] is None or entry["n_findings"] == len(self.per_finding)
        of = "" if is_whole else f" (over {count(entry['n_findings'], 'finding')})"
        return f"{_fixed(entry['value'])}{of}"


def score_external(
    run: Run,
    predictions: pd.DataFrame,
    targets: pd.DataFrame,
    matching: Matching,
    overlap: Overlap,
    *,
    described: Mapping[str, Any],
    groups: str | Path | None = None,
    n_resamples: int = EvaluateConfig.n_resamples,
    seed: int = EvaluateConfig.seed,
) -> ExternalEvaluation:
    """Score a run on another data set, with the thresholds and the calibration that it has.

    Beside them stand the figures of the run's own test, of the same findings, and those that
    thresholds and calibration chosen on the other data set would have there. The latter are
    optimistic, since they are chosen and scored on the same images.

    Parameters
    ----------
    run
        A finished run.
    predictions
        The image table and one probability per finding of the run, not calibrated.
    targets
        Columns image_id and one target per finding of the other data set.
    matching
        Which of its findings stand for the run's, at least one.
    overlap
        Images that the run knows already.
    described
        What metrics.json is to say of the other data set, besides.
    groups, n_resamples, seed
        As in :func:`cxr_cache.evaluation.evaluate.evaluate_predictions`.

    Returns
    -------
    ExternalEvaluation
        Figures are of the findings that are scored. ``docs/outputs.md`` says what it holds.

    Raises
    ------
    TableError
        The tables do not fit each other.
    """
    scored = [finding for finding in matching.findings if finding in matching.scored]
    relabelled: pd.DataFrame = pd.DataFrame(
        matching.relabel(targets), columns=list(matching.findings)
    )
    relabelled.insert(0, "image_id", targets["image_id"].to_numpy())
    point = run.operating_point
    places = [matching.findings.index(finding) for finding in scored]
    calibration = _take(point.calibration, places)
    cuts = point.thresholds[places]
    evaluation = evaluate_predictions(
        predictions,
        relabelled,
        dict(zip(scored, cuts.tolist(), strict=True)),
        calibration=calibration,
        rule=point.rule,
        min_positives=point.min_positives,
        groups=groups,
        n_resamples=n_resamples,
        seed=seed,
    )
    raw = parse_predictions(predictions, relabelled, scored)
    own, own_cuts = _read_own_test(run, places)
    own_test = estimate(own, own_cuts, n_resamples=n_resamples, seed=seed)
    method = "platt" if calibration.method == "none" else calibration.method
    anew = choose_operating_point(
        raw.targets,
        raw.probabilities,
        rule=point.rule,
        calibration=method,
        clusters=raw.clusters,
        min_positives=point.min_positives,
    )
    recalibrated = estimate(
        raw.with_probabilities(anew.calibration.apply(raw.probabilities)), anew.thresholds
    )
    per_finding = _complete(evaluation.per_finding, matching, raw).assign(
        prevalence_train=_train_prevalence(run, scored),
        **_own_columns(own, own_test),
        **_recalibrated_columns(recalibrated, anew.thresholds),
    )
    predicted = predictions.copy()
    predicted.insert(predicted.columns.get_loc(matching.findings[0]), "split", "test")
    external = {
        **described,
        "run": str(run.path),
        "n_findings_of_run": len(matching.findings),
        "findings_unlabelled": list(matching.unlabelled),
        "matching": matching.table.to_dict("records"),
        "overlap": overlap.to_dict(),
        "warnings": list(overlap.warnings),
        "own_test": own_test.overall()
        | {"n_images": own.count_images(), "n_studies": own.n_studies},
        "recalibrated": recalibrated.overall(),
        "recalibrated_with": {"calibration": method, "threshold_rule": point.rule},
    }
    return ExternalEvaluation(
        evaluation.metrics | {"external": external},
        {
            **evaluation.tables,
            "per_finding": per_finding,
            "predictions": predicted,
            "targets": relabelled,
            "matching": matching.table,
            "overlap": overlap.table,
        },
        matching=matching,
        overlap=overlap,
    )


def _take(calibration: Calibration, places: list[int]) -> Calibration:
    return Calibration(calibration.method, calibration.slope[places], calibration.intercept[places])


def _read_own_test(run: Run, places: list[int]) -> tuple[ScoredImages, FloatArray]:
    """The run's own test images with some of its findings, and the thresholds they are read at.

    Of a nested run these are all images, each with the thresholds of its outer fold.
    """
    images, points = read_scored(run), [part.operating_point for part in run.outer_runs]
    cuts = run.operating_point.thresholds
    if images.folds is not None:
        cuts = np.array([point.thresholds for point in points])[images.folds]
    own = replace(
        images,
        targets=images.targets[:, places],
        probabilities=images.probabilities[:, places],
        findings=tuple(images.findings[place] for place in places),
    )
    return own, cuts[..., places]


def _train_prevalence(run: Run, findings: list[str]) -> FloatArray:
    predictions, targets = run.read_table("predictions"), run.read_table("targets")
    train = predictions.loc[predictions["split"] == "train", "image_id"]
    in_train = targets["image_id"].isin(train)
    return weighted_mean(targets.loc[in_train, findings].to_numpy(np.float64))


def _complete(table: pd.DataFrame, matching: Matching, images: ScoredImages) -> pd.DataFrame:
    """The columns that a run's own table has, and what stands for each finding."""
    rows = matching.table[matching.table["is_scored"]].set_index("finding")
    table = table.copy()
    present = images.targets == 1
    table.insert(1, "n_images", images.count_images(present))
    table.insert(2, "n_studies", images.count_studies(present))
    names = [";".join(matching.scored[finding]) for finding in table["finding"]]
    relations = rows["relation"].groupby(level=0).first().loc[table["finding"]].to_numpy()
    completed: pd.DataFrame = table.assign(store_finding=names, relation=relations)
    return completed


def _own_columns(own: ScoredImages, estimates: Estimates) -> dict[str, FloatArray]:
    """Figures of the run's own test, whose names end in ``_own_test``."""
    columns: dict[str, FloatArray] = {"prevalence": weighted_mean(own.targets)}
    for name in ("auroc", "ap", *AT_THRESHOLD, *OF_CALIBRATION):
        columns[name] = estimates.figures[name]
    if bounds := estimates.intervals.get("auroc"):
        columns |= {"auroc_low": bounds.low, "auroc_high": bounds.high}
    columns["calibration_error"] = estimates.calibration_error
    return {f"{name}_own_test": values for name, values in columns.items()}


def _recalibrated_columns(estimates: Estimates, thresholds: FloatArray) -> dict[str, FloatArray]:
    """Figures with what was chosen on the other data set; names end in ``_recalibrated``."""
    columns = {"threshold": np.where(thresholds >= UNDECIDED, np.nan, thresholds)}
    columns |= {name: estimates.figures[name] for name in (*AT_THRESHOLD, *OF_CALIBRATION)}
    columns["calibration_error"] = estimates.calibration_error
    return {f"{name}_recalibrated": values for name, values in columns.items()}


def _fixed(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.3f}"
