"""Predictions -> metrics, with intervals from a bootstrap over patients or studies."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.wording import count, first_lines, list_names
from cxr_cache.config import EvaluateConfig
from cxr_cache.datasets.cohort import UNITS, Unit
from cxr_cache.errors import TableError
from cxr_cache.evaluation.compare import describe_recipe
from cxr_cache.evaluation.composition import count_labels, describe_people
from cxr_cache.evaluation.curves import (
    BAND_RESAMPLES,
    DECISION_COLUMNS,
    calibration_curves,
    decision_curves,
    ranking_curves,
)
from cxr_cache.evaluation.figures import (
    MEASURES,
    Entry,
    Estimates,
    calibration_columns,
    estimate,
    pooled_recalibration,
    probability_errors,
    tabulate_findings,
    tabulate_groups,
    to_number,
)
from cxr_cache.evaluation.group_differences import compare_groups, describe_differences
from cxr_cache.evaluation.scored import (
    ScoredImages,
    apply_calibrations,
    find_groups,
    join_groups,
    parse_predictions,
    read_groups,
    read_outer_folds,
)
from cxr_cache.metrics.intervals import LEVEL as LEVEL  # the page takes it from here
from cxr_cache.metrics.operating_point import (
    Calibration,
    OperatingPoint,
    choose_operating_point,
    find_rule,
)
from cxr_cache.metrics.paired import ScoredRows, score_jointly
from cxr_cache.metrics.resampled import METHOD
from cxr_cache.metrics.scores import (
    NEVER,
    UNDECIDED,
    FloatArray,
    drop_positives_only,
    find_best_constant,
    macro_mean,
)
from cxr_cache.models.run import Run, TableName
from cxr_cache.models.split_reads import count_reading

FEW_POSITIVES: Final = 10
"""Findings with fewer positive patients (or studies) in test are named as hardly measurable."""


_N_DIFFERENCES: Final = 5
"""Between groups, that a summary names: of means over findings, and of single findings."""
_INTERVAL: Final = (
    "Student's t on the logit scale, with the standard error of a {method} over {units} "
    "and the number of {units} that a figure rests on; for the AUROC of a finding, the values "
    "whose own error explains it"
)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Figures of one set of predictions."""

    metrics: dict[str, Any]
    """As in ``metrics.json``; what is undefined is None."""
    tables: dict[TableName, pd.DataFrame] = field(default_factory=dict)
    """CSV files of the run folder by name; what is undefined is NaN."""

    def __repr__(self) -> str:
        return first_lines(format_summary(self.metrics))

    @property
    def per_finding(self) -> pd.DataFrame:
        """One row per finding, as in ``per_finding.csv``."""
        return self.tables["per_finding"]


@dataclass(frozen=True, eq=False)
class _Reading:
    """How probabilities are read, and how intervals are drawn."""

    point: OperatingPoint
    n_resamples: int
    seed: int
    of_folds: tuple[OperatingPoint, ...] = ()
    """Of each outer fold's model, where images have folds; chosen by the rules of `point`."""

    def calibrate(self, images: ScoredImages) -> ScoredImages:
        if images.folds is not None:
            return apply_calibrations(images, self.of_folds)
        return images.with_probabilities(self.point.calibration.apply(images.probabilities))

    def cuts(self, images: ScoredImages) -> FloatArray:
        """Thresholds, ``(F,)``; of images that have folds, those of every image, ``(N, F)``."""
        if images.folds is None:
            return self.point.thresholds
        return np.array([point.thresholds for point in self.of_folds])[images.folds]

    def estimate(self, images: ScoredImages, *, resample: bool = True) -> Estimates:
        n_resamples = self.n_resamples if resample else 0
        return estimate(images, self.cuts(images), n_resamples=n_resamples, seed=self.seed)


def evaluate_predictions(
    predictions: pd.DataFrame,
    targets: pd.DataFrame,
    thresholds: Mapping[str, float],
    *,
    calibration: Calibration | None = None,
    rule: str = "f1",
    min_positives: int = 0,
    groups: str | Path | None = None,
    n_resamples: int = EvaluateConfig.n_resamples,
    seed: int = EvaluateConfig.seed,
) -> Evaluation:
    """Score predictions for images that no choice was made on.

    A finding without both a positive and a negative is not scored; it is left out of the macro
    means and named.

    Parameters
    ----------
    predictions
        Columns image_id, study_uid, projection and one probability per finding, not calibrated;
        patient_id, blank where unknown, if there is any: patients are then resampled. Columns sex
        and age, in years, make groups.
    targets
        Columns image_id and one target per finding: 1, 0 or NaN.
    thresholds
        Calibrated probability from which on each finding counts as present; its keys are the
        findings scored.
    calibration
        Applied to the probabilities; None leaves them.
    rule
        How the thresholds were chosen, to be recorded.
    min_positives
        Below how many positives a finding was given none, to be recorded.
    groups
        CSV of groups to be evaluated one by one; see
        :func:`cxr_cache.evaluation.scored.join_groups`.
    n_resamples
        Bootstrap resamples; 0 leaves the intervals out.
    seed
        Of the resampling. Evaluations of the same rows and patients with one seed resample alike.

    Returns
    -------
    Evaluation
        ``docs/outputs.md`` says what it holds.

    Raises
    ------
    TableError
        The tables do not fit each other, or there is nothing to evaluate.

    Examples
    --------
    >>> run = Run.open("runs/first")  # doctest: +SKIP
    >>> evaluation = evaluate_predictions(
    ...     run.predictions, run.targets, run.thresholds, calibration=run.calibration
    ... )  # doctest: +SKIP
    >>> evaluation.per_finding[["finding", "auroc", "auroc_low", "auroc_high"]]  # doctest: +SKIP
    """
    raw = parse_predictions(predictions, targets, tuple(thresholds))
    raw = replace(raw, groups=find_groups(predictions))
    cuts = np.array(list(thresholds.values()))
    point = OperatingPoint(calibration or Calibration.none(len(cuts)), cuts, rule, min_positives)
    evaluation = _evaluate(raw, _Reading(point, n_resamples, seed), groups)
    return _add_composition(evaluation, predictions.assign(split="test"), targets, thresholds)


def score_run(
    run: Run,
    *,
    threshold_rule: str | None = None,
    calibration: str | None = None,
    min_positives: int | None = None,
    groups: str | Path | None = None,
    n_resamples: int = EvaluateConfig.n_resamples,
    seed: int = EvaluateConfig.seed,
    verb: str = "evaluate",
) -> dict[str, Any]:
    """Evaluate the predictions that a run stored, and store the figures with it.

    The test split gets intervals. Train and out-of-fold figures are there to be compared with it
    and carry values only: the final model has seen every training row, and thresholds and
    calibration were chosen on the out-of-fold predictions.

    Parameters
    ----------
    run
        A run with predictions; ``metrics.json`` and the tables are written to it.
    threshold_rule, calibration, min_positives
        Choose thresholds and calibration anew, on the run's out-of-fold predictions, and store them
        with its model; None keeps what is stored, of all three.
    groups
        As in :func:`evaluate_predictions`. They are kept in the run's ``groups.csv``, and taken
        from there where None are given.
    n_resamples, seed
        As in :func:`evaluate_predictions`.
    verb
        The command for which this is done, under which it counts as a reading of the test split.

    Returns
    -------
    dict[str, Any]
        What ``metrics.json`` holds: that of :func:`evaluate_predictions`, and ``train`` and
        ``out_of_fold``, ``{"value"}`` by name. Out of fold, AUROC and AP are those of the folds,
        averaged, since scores of different folds come from different models.

    Raises
    ------
    TableError
        The run's tables do not fit each other.
    RunError
        One of them is missing.
    ConfigError
        There is no such rule or calibration.
    """
    chosen = (threshold_rule, calibration, min_positives)
    if run.is_nested:
        return _score_nested(run, chosen, groups, n_resamples=n_resamples, seed=seed, verb=verb)
    findings, predictions = run.config["findings"], run.read_table("predictions")
    targets, point = run.read_table("targets"), run.operating_point
    images = parse_predictions(predictions, targets, findings)
    images = replace(images, groups=find_groups(predictions))
    out_of_fold = parse_predictions(run.read_table("out_of_fold"), targets, findings)
    if is_chosen_anew := chosen != (None, None, None):
        point = _choose_anew(out_of_fold, point, *chosen)
    reading = _Reading(point, n_resamples, seed)
    is_test = (predictions["split"] == "test").to_numpy()
    train, held_out = reading.calibrate(images.take(~is_test)), reading.calibrate(out_of_fold)

    if groups is None:
        groups = run.groups_path
    evaluation = _add_composition(
        _evaluate(images.take(is_test), reading, groups),
        predictions,
        targets,
        findings,
        (run.config.get("label_codes") or {}).get("codes"),
    )
    recipe = describe_recipe(run, n_resamples=n_resamples, seed=seed)
    metrics = {
        **evaluation.metrics,
        "train": reading.estimate(train, resample=False).overall(),
        "out_of_fold": estimate(
            _in_folds(held_out, run), point.thresholds, n_resamples=0, seed=seed
        ).overall(),
        **({"recipe": recipe} if recipe else {}),
        "n_train_images": train.count_images(),
        "n_train_studies": train.n_studies,
        **{name: run.config[name] for name in ("split",) if name in run.config},  # whose it is
    }
    if run.has_table("logistic"):
        metrics["logistic"], column = _compare_logistic(run, images.take(is_test), reading)
        evaluation.per_finding["auroc_logistic"] = column
    present = images.targets == 1
    evaluation.per_finding.insert(1, "n_images", images.count_images(present))
    evaluation.per_finding.insert(2, "n_studies", images.count_studies(present))
    run.write_evaluation(metrics, evaluation.tables, point if is_chosen_anew else None)
    run.write_reads(count_reading(verb, run).to_dict())
    return metrics


def _in_folds(out_of_fold: ScoredImages, run: Run) -> ScoredImages:
    """The same rows with their folds, so that only scores of one fold's model are ranked."""
    key, rows = (
        ("study_uid", out_of_fold.study_uids)
        if run.level == "study"
        else ("image_id", out_of_fold.image_ids)
    )
    fold_of = run.read_table("splits").drop_duplicates(key).set_index(key)["fold"]
    folds = fold_of.reindex(rows)
    if folds.isna().any():
        raise TableError(
            f"{run.path}: {count(int(folds.isna().sum()), 'row')} of out_of_fold.csv, such as "
            f"{folds.index[folds.isna()][0]!r}, without a fold in splits.csv. Train the run again "
            "with --overwrite."
        )
    return replace(out_of_fold, folds=folds.to_numpy(np.int64))


def _choose_anew(
    out_of_fold: ScoredImages,
    before: OperatingPoint,
    rule: str | None,
    calibration: str | None,
    min_positives: int | None,
) -> OperatingPoint:
    """Thresholds and calibration by other rules; those that are None stay."""
    return choose_operating_point(
        out_of_fold.targets,
        out_of_fold.probabilities,
        rule=rule or before.rule,
        calibration=calibration or before.calibration.method,
        clusters=out_of_fold.clusters,
        min_positives=before.min_positives if min_positives is None else min_positives,
    )


def _score_nested(
    run: Run,
    chosen: tuple[str | None, str | None, int | None],
    groups: str | Path | None,
    *,
    n_resamples: int,
    seed: int,
    verb: str,
) -> dict[str, Any]:
    """Evaluate each outer fold's run, and then all of them as one test.

    Thresholds and calibration that are `chosen` anew are so in every outer fold, and for the model
    that the run delivers, which no figure is of.
    """
    groups = run.groups_path if groups is None else groups
    outer, (rule, calibration, least) = run.outer_runs, chosen
    find_rule(rule or run.threshold_rule)
    if groups is not None:
        read_groups(Path(groups))
    run.drop_metrics()  # which would belong to other thresholds than those of the folds from now on
    of_outer = [
        score_run(
            part,
            threshold_rule=rule,
            calibration=calibration,
            min_positives=least,
            groups=groups,
            n_resamples=n_resamples,
            seed=seed,
            verb=verb,
        )
        for part in outer
    ]
    findings, targets, point = run.config["findings"], run.targets, run.operating_point
    if is_chosen_anew := chosen != (None, None, None):
        point = _choose_anew(parse_predictions(run.out_of_fold, targets, findings), point, *chosen)
    raw, of_folds = read_outer_folds(run)
    reading = _Reading(point, n_resamples, seed, of_folds)
    codes = (run.config.get("label_codes") or {}).get("codes")
    evaluation = _add_composition(
        _evaluate(raw, reading, groups),
        run.predictions.assign(split="test"),
        targets,
        findings,
        codes,
    )
    metrics = {
        **evaluation.metrics,
        "outer_folds": [_describe_fold(*each) for each in zip(outer, of_outer, strict=True)],
        "findings_undefined_in_some_folds": _named(
            findings,
            evaluation.per_finding["n_outer_folds_scored"].between(1, len(outer) - 1).to_numpy(),
        ),
        "n_train_images": raw.count_images(),
        "n_train_studies": raw.n_studies,
        "split": run.config["split"],
    }
    if all(part.has_table("logistic") for part in outer):
        metrics["logistic"], column = _compare_logistic(run, raw, reading)
        evaluation.per_finding["auroc_logistic"] = column
    present = raw.targets == 1
    evaluation.per_finding.insert(1, "n_images", raw.count_images(present))
    evaluation.per_finding.insert(2, "n_studies", raw.count_studies(present))
    evaluation.tables["outer_folds"] = pd.concat(
        [part.per_finding.assign(outer_fold=k) for k, part in enumerate(outer, start=1)]
    )
    evaluation.tables["outer_predictions"] = _tabulate_outer(run, reading.calibrate(raw))
    run.write_evaluation(metrics, evaluation.tables, point if is_chosen_anew else None)
    run.write_reads(count_reading(verb, run).to_dict())
    return metrics


def _describe_fold(run: Run, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What metrics.json of a nested run says of an outer fold, from the metrics of its own run."""
    names = ("n_test_images", "n_test_studies", "n_findings_scored", "findings_undefined")
    return {
        **{name: metrics[name] for name in names},
        "chosen_epochs": run.config["chosen_epochs"],
        "test": metrics["test"],
    }


def _tabulate_outer(run: Run, images: ScoredImages) -> pd.DataFrame:
    """Calibrated probabilities of every image by its outer fold's model, as a table."""
    assert images.folds is not None
    table: pd.DataFrame = run.predictions.set_index("image_id").loc[images.image_ids].reset_index()
    table["split"] = "test"
    table.insert(list(table).index("split"), "outer_fold", images.folds + 1)
    table[list(images.findings)] = images.probabilities
    return table


def _add_composition(
    evaluation: Evaluation,
    predictions: pd.DataFrame,
    targets: pd.DataFrame,
    findings: Collection[str],
    codes: Mapping[str, Mapping[str, int]] | None = None,
) -> Evaluation:
    """Add what the sides of the split hold."""
    return replace(
        evaluation,
        metrics={**evaluation.metrics, "demographics": describe_people(predictions)},
        tables={
            **evaluation.tables,
            "label_counts": count_labels(predictions, targets, list(findings), codes),
        },
    )


def _compare_logistic(
    run: Run, images: ScoredImages, reading: _Reading
) -> tuple[dict[str, Any], FloatArray]:
    """The logistic regression that was trained beside a head, and how much better the head is.

    Gives what metrics.json says, and the regression's AUROC of each finding, ``(F,)``.
    """
    parts = run.outer_runs or [run]
    table = pd.concat([part.read_table("logistic") for part in parts]).set_index("image_id")
    scores = {
        "head": images.probabilities,
        "logistic": table.loc[images.image_ids, list(images.findings)].to_numpy(np.float64),
    }
    targets, rows = drop_positives_only(images.targets), np.arange(len(images))
    areas = score_jointly(
        {name: ScoredRows(rows, targets, of, images.folds) for name, of in scores.items()},
        images.clusters,
        n_resamples=max(2, reading.n_resamples),
        seed=reading.seed,
    )
    figures = {
        "macro_auroc": areas["logistic"].macro(),
        "difference": areas["head"].minus(areas["logistic"]).macro(),
    }
    names = ("value", "low", "high") if reading.n_resamples else ("value",)
    entries = {
        figure: {name: to_number(getattr(of, name)) for name in names}
        for figure, of in figures.items()
    }
    beside = [part.config["logistic"] for part in parts]
    of_run = (
        beside[0]
        if len(beside) == 1
        else {
            "C": [each["C"] for each in beside],
            "mean_auroc": float(np.mean([each["mean_auroc"] for each in beside])),
        }
    )
    return {**of_run, **entries}, areas["logistic"].once


def _evaluate(raw: ScoredImages, reading: _Reading, groups: str | Path | None) -> Evaluation:
    if not len(raw):
        raise TableError("predictions: no image to evaluate.")
    of_table = raw.groups
    if groups is not None:
        raw = join_groups(raw, groups)
    point = reading.point
    images, is_calibrated = reading.calibrate(raw), point.calibration.method != "none"
    differences = compare_groups(
        images, reading.cuts(images), n_resamples=reading.n_resamples, seed=reading.seed
    )
    studies = images.by_study()
    by_image = reading.estimate(images)

    def estimate_part(part: ScoredImages) -> Estimates:
        """Resampling takes most of the time, and what holds all images was resampled."""
        return by_image if len(part) == len(images) else reading.estimate(part)

    by_study = estimate_part(studies)  # each of a single image, where there are as many
    subsets = [
        (group, value, part, estimate_part(part)) for group, value, part in images.by_group()
    ]
    by_group: dict[str, dict[str, Any]] = {"projection": {}}
    for group, value, part, estimates in subsets:
        counts = {"n_images": part.count_images(), "n_studies": part.n_studies}
        by_group.setdefault(group, {})[value] = estimates.overall() | counts
    metrics = {
        "rows": images.rows,
        "test": by_image.overall(),
        "test_by_study": by_study.overall(),
        "test_by_projection": by_group.pop("projection"),
        "test_by_group": by_group,
        "group_differences": describe_differences(differences),
        **_counts(images, by_image.figures["auroc"], reading.cuts(images)),
        "threshold_rule": point.rule,
        "min_positives": point.min_positives,
        "calibration": _describe_calibration(raw, images, reading),
        "bootstrap": _describe_bootstrap(by_image, reading, images.unit),
    }
    of_bands = {"n_resamples": min(reading.n_resamples, BAND_RESAMPLES), "seed": reading.seed}
    tables: dict[TableName, pd.DataFrame] = {
        "per_finding": tabulate_findings(images, reading.cuts(images), by_image).assign(
            **calibration_columns(raw, images, None if raw.folds is not None else point.calibration)
        ),
        "per_finding_by_study": tabulate_findings(studies, reading.cuts(studies), by_study),
        "subgroups": tabulate_groups(
            [(*subset, reading.cuts(subset[2])) for subset in subsets],
        ),
        "group_differences": differences,
        # Scores of several models make no common curve.
        **({"curves": ranking_curves(images, **of_bands)} if images.folds is None else {}),
        "decision_curves": decision_curves(images, **of_bands)
        if is_calibrated
        else pd.DataFrame(columns=list(DECISION_COLUMNS)),
        "calibration": calibration_curves(raw, images if is_calibrated else None),
    }
    given = {name: of for name, of in images.groups.items() if of is not of_table.get(name)}
    if given:
        tables["groups"] = pd.DataFrame({"image_id": images.image_ids, **given})
    return Evaluation(metrics, tables)


def _counts(images: ScoredImages, areas: FloatArray, cuts: FloatArray) -> dict[str, Any]:
    """How much was scored, and which findings were not."""
    undefined, is_undecided = np.isnan(areas), np.atleast_2d(cuts >= UNDECIDED)
    undecided = is_undecided.all(axis=0)
    n_positive = images.count_clusters(images.targets == 1)
    best_constant = find_best_constant(np.where(is_undecided, np.nan, images.targets))
    return {
        "n_findings": len(images.findings),
        "n_findings_scored": int((~undefined).sum()),
        "n_findings_undefined": int(undefined.sum()),
        "findings_undefined": _named(images.findings, undefined),
        "findings_with_few_positives": _named(
            images.findings, ~undefined & (n_positive < FEW_POSITIVES)
        ),
        "findings_never_called": _named(
            images.findings, np.atleast_2d(cuts >= NEVER).all(axis=0) & ~undecided
        ),
        "findings_undecided": _named(images.findings, undecided),
        "best_constant": _named(images.findings, best_constant),
        "n_test_images": images.count_images(),
        "n_test_studies": images.n_studies,
    }


def _named(findings: Sequence[str], chosen: Any) -> list[str]:
    chosen = np.broadcast_to(chosen, len(findings))
    return [finding for finding, is_chosen in zip(findings, chosen, strict=True) if is_chosen]


def _describe_bootstrap(estimates: Estimates, reading: _Reading, unit: Unit) -> dict[str, Any]:
    n_undefined = {name: int(counts.sum()) for name, counts in estimates.n_undefined.items()}
    return {
        "n_resamples": reading.n_resamples,
        "seed": reading.seed,
        "level": LEVEL,
        "unit": unit,
        "interval": _INTERVAL.format(method=METHOD, units=UNITS[unit]),
        "n_undefined": {name: count for name, count in n_undefined.items() if count},
    }


def _describe_calibration(
    raw: ScoredImages, images: ScoredImages, reading: _Reading
) -> dict[str, Any]:
    """The map, and what it did on these images."""
    calibration = reading.point.calibration
    maps = [point.calibration for point in reading.of_folds] or [calibration]

    def errors(images: ScoredImages) -> dict[str, Entry]:
        targets = drop_positives_only(images.targets)
        cells = targets.reshape(-1, 1), images.probabilities.reshape(-1, 1)
        return {
            f"{kind}_{name}": {"value": to_number(macro_mean(values))}
            for kind, arrays in (
                ("macro", (targets, images.probabilities)),
                ("micro", cells),
            )
            for name, values in probability_errors(*arrays).items()
        }

    return {
        "method": calibration.method,
        "temperature": calibration.temperature if len(maps) == 1 else None,
        "findings_uncalibrated": _named(
            images.findings,
            calibration.method.startswith("platt")
            & np.all([(of.slope == 1) & (of.intercept == 0) for of in maps], axis=0),
        ),
        "test_before": errors(raw),
        "test_after": errors(images),
        **{f"test_{name}": entry for name, entry in pooled_recalibration(images).items()},
    }


def find_few(per_finding: pd.DataFrame) -> NDArray[np.bool_]:
    """Tell which findings rest on fewer than :data:`FEW_POSITIVES` patients or studies, ``(F,)``.

    Tables of earlier versions count studies only.
    """
    names = ("n_positive_clusters_test", "n_positive_studies_test")
    counted = next(name for name in names if name in per_finding)
    return np.asarray(per_finding[counted] < FEW_POSITIVES)


# --- in words ------------------------------------------------------------------------------------


def format_summary(metrics: Mapping[str, Any]) -> str:
    """Headline figures of ``metrics.json`` for a terminal, one line each."""
    test, boot = metrics["test"], metrics["bootstrap"]
    accuracy = _with_interval(test["label_accuracy"], "{:.2%}")
    all_negative, constant = (
        _with_interval(test[name], "{:.2%}", bounds=False)
        for name in ("label_accuracy_all_negative", "exact_match_best_constant")
    )
    of_studies = metrics.get("rows") == "studies"
    by_study = f"    by study      {_with_interval(metrics['test_by_study']['macro_auroc'])}"
    lines = [
        f"{'nested ' * ('outer_folds' in metrics)}test: {describe_sample(metrics, 'test')}, "
        f"{metrics['n_findings_scored']} of {count(metrics['n_findings'], 'finding')} scored",
        *_describe_outer_folds(metrics),
        f"  macro AUROC     {_with_interval(test['macro_auroc'])}",
        *([] if of_studies else [by_study]),
        *_describe_logistic(metrics.get("logistic")),
        f"  macro AP        {_with_interval(test['macro_ap'])}; guessing scores "
        f"{_with_interval(test['macro_ap_of_chance'])}",
        f"  macro F1        {_with_interval(test['macro_f1'])}; calling everything present scores "
        f"{_with_interval(test['macro_f1_of_calling_all'])}",
        f"  label accuracy  {accuracy}; predicting nothing scores {all_negative}",
        f"  exact match     {_with_interval(test['exact_match'], '{:.2%}')}; always "
        f"{list_names(metrics['best_constant']) or 'nothing'} scores {constant}",
        f"  Brier score     {_with_interval(test['macro_brier'])}; constant prevalence scores "
        f"{_with_interval(test['macro_brier_of_prevalence'])}, mean skill "
        f"{_with_interval(test['macro_brier_skill'])}",
        f"  log loss        {_with_interval(test['macro_log_loss'])}; constant prevalence scores "
        f"{_with_interval(test['macro_log_loss_of_prevalence'])}, mean skill "
        f"{_with_interval(test['macro_log_loss_skill'])}",
        f"  thresholds      {metrics['threshold_rule']}, macro sensitivity "
        f"{_with_interval(test['macro_sensitivity'])}, specificity "
        f"{_with_interval(test['macro_specificity'])}",
        *_describe_recipe(metrics.get("recipe", {})),
        *_describe_gain(metrics["calibration"]),
        *_describe_groups(metrics),
    ]
    if boot["n_resamples"]:
        lines.append(
            f"  [{boot['level']:.0%} intervals, from {boot['n_resamples']:,} resamples of "
            f"{UNITS[boot['unit']]}]"
        )
    if metrics["findings_undefined"]:
        lines.append(
            f"  {metrics['n_findings_undefined']} not scored, without a positive or a negative in "
            f"test: {list_names(metrics['findings_undefined'])}"
        )
    if metrics["findings_undecided"]:
        lines.append(
            f"  {len(metrics['findings_undecided'])} ranked only, with fewer than "
            f"{metrics['min_positives']} positive training {UNITS[boot['unit']]}, too few to "
            f"decide by: {list_names(metrics['findings_undecided'])}"
        )
    return "\n".join(lines)


def _describe_logistic(logistic: Mapping[str, Any] | None) -> list[str]:
    """What the logistic regression beside the head scores; nothing where there is none."""
    if logistic is None:
        return []
    return [
        f"    regression    {_with_interval(logistic['macro_auroc'])} (logistic, L2, C = "
        f"{describe_strength(logistic)}, on the same folds and features); the head minus it "
        f"{_with_interval(logistic['difference'], '{:+.3f}')}"
    ]


def describe_strength(logistic: Mapping[str, Any]) -> str:
    """The C of a logistic regression in words; of a nested run, those of its outer folds."""
    chosen = logistic["C"] if isinstance(logistic["C"], list) else [logistic["C"]]
    return " or ".join(f"{C:g}" for C in sorted(set(chosen)))


NESTED: Final = (
    "Every image was tested once, by the model of its outer fold, which the whole search on the "
    "other folds made. AUROC and average precision compare images of one outer fold only, since "
    "each fold has a model of its own: they are means over the folds, weighted by their pairs of a "
    "positive and a negative, and by their positives. All else is counted over all images, at each "
    "fold's own thresholds and calibration."
)
NESTED_MODEL: Final = (
    "The run's model is trained on all images by the same recipe and has no test images of its "
    "own: the nested figures are what to expect of it."
)
NESTED_INTERVALS: Final = (
    "Intervals hold which patients were tested, by these models; not that the models share "
    "training images, for which no unbiased variance is known (Bengio and Grandvalet 2004)."
)
"""What is said wherever figures of a nested run stand."""


def _describe_outer_folds(metrics: Mapping[str, Any]) -> list[str]:
    """What each outer fold scores by itself, and what their mean is of; empty without any."""
    folds = metrics.get("outer_folds", [])
    lines = [
        f"  outer fold {k:<3}  AUROC {_with_interval(fold['test']['macro_auroc'])}, AP "
        f"{_with_interval(fold['test']['macro_ap'])}; {fold['n_findings_scored']} of "
        f"{count(metrics['n_findings'], 'finding')}, {count(fold['n_test_studies'], 'study')}, "
        f"{count(fold['chosen_epochs'], 'epoch')}"
        for k, fold in enumerate(folds, start=1)
    ]
    if partly := metrics.get("findings_undefined_in_some_folds"):
        lines.append(
            f"  not defined in every outer fold, and averaged over the others: {list_names(partly)}"
        )
    return [f"  {NESTED}", *lines, f"  {NESTED_MODEL} {NESTED_INTERVALS}"] if folds else []


def describe_sample(metrics: Mapping[str, Any], side: str, what: str = "") -> str:
    """How many images and studies are on a side, ``"test"`` or ``"train"``; what is scored first.

    A word `what`, such as ``"test "``, is put before it.
    """
    n_images, n_studies = metrics[f"n_{side}_images"], metrics[f"n_{side}_studies"]
    if metrics.get("rows") == "studies":
        return f"{count(n_studies, f'{what}study')} with {count(n_images, 'image')}"
    return f"{count(n_images, f'{what}image')} of {count(n_studies, 'study')}"


def _describe_recipe(recipe: Mapping[str, Any]) -> list[str]:
    """What other trainings of the recipe would change; nothing where there was one."""
    return [
        f"  {name:<14}  {_with_interval(recipe[key])} as the mean of {recipe['n_trainings']} "
        f"trainings, which spread by {recipe[key]['std']:.3f}; the interval holds the training too"
        for name, key in (("recipe, AUROC", "macro_auroc"), ("recipe, AP", "macro_ap"))
        if key in recipe
    ]


def _describe_gain(calibration: Mapping[str, Any]) -> list[str]:
    """What calibration did to the test images, or that what is given are scores."""
    if calibration["method"] == "none":
        return ["  calibration     none: what the model gives are scores, not probabilities"]
    stages = [calibration[stage] for stage in ("test_before", "test_after")]
    log_loss, error = (
        " -> ".join(_with_interval(stage[f"micro_{name}"]) for stage in stages)
        for name in ("log_loss", "calibration_error")
    )
    return [
        f"  calibration     {calibration['method']}: micro log loss {log_loss}, calibration error "
        f"{error}; slope {_with_interval(calibration['test_slope'], '{:.2f}')}, intercept "
        f"{_with_interval(calibration['test_intercept'], '{:+.2f}')}"
    ]


def _describe_groups(metrics: Mapping[str, Any]) -> list[str]:
    """Which groups there are, how they differ on average, and which findings do beyond luck."""
    differences = metrics.get("group_differences", {})
    n_tested = differences.get("n_tested", {})
    if not n_tested.get("auroc"):
        return []
    names = dict.fromkeys(row["group"] for row in differences["macro"])
    found = differences["differing"]
    counts = []
    for measure, n in n_tested.items():
        n_found = sum(row["measure"] == measure for row in found)
        of = count(n, "comparison") + " differs" if measure == "auroc" else f"{n:,}"
        counts.append(f"the {MEASURES[measure].label} of {n_found} of {of}")
    lines = [f"  groups          {list_names([*names])}: {', '.join(counts)} (Holm, 5 %)"]
    of_areas = [row for row in differences["macro"] if row["measure"] == "auroc"]
    for row in of_areas[:_N_DIFFERENCES]:
        of = f"mean AUROC of {count(row['n_findings'], 'finding')}"
        lines.append(_describe_difference(of, row))
    for row in found[:_N_DIFFERENCES]:
        lines.append(_describe_difference(f"{row['finding']}, {row['measure']}", row))
    n_more = max(0, len(of_areas) - _N_DIFFERENCES) + max(0, len(found) - _N_DIFFERENCES)
    return lines + [f"    {n_more:,} more in group_differences.csv"] * bool(n_more)


def _describe_difference(what: str, row: Mapping[str, Any]) -> str:
    bounds = "[no interval]"
    if row["low"] is not None:
        bounds = f"[{row['low']:+.3f}, {row['high']:+.3f}]"
    p = "" if row["p_holm"] is None else f", p = {row['p_holm']:.2g}"
    return (
        f"    {what}, {row['group']} {row['value']} minus {row['against']}: "
        f"{row['difference']:+.3f} {bounds}{p}"
    )


def _with_interval(
    entry: Mapping[str, float | None], form: str = "{:.3f}", *, bounds: bool = True
) -> str:
    """``0.722 [0.701, 0.741]``, ``0.722 [no interval]``, or ``undefined``."""
    value, low, high = (entry.get(name) for name in ("value", "low", "high"))
    if value is None:
        return "undefined"
    if not bounds or "low" not in entry:  # nothing was resampled
        return form.format(value)
    if low is None or high is None:
        return f"{form.format(value)} [no interval]"
    return f"{form.format(value)} [{form.format(low)}, {form.format(high)}]"
