"""Bands and decision curves are what a plain computation, resample by resample, gives."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student
from sklearn.metrics import roc_curve

from cxr_cache.evaluation.curves import (
    DECISION_COLUMNS,
    POOLED,
    THRESHOLDS,
    decision_curves,
    ranking_curves,
)
from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.evaluation.scored import ScoredImages
from cxr_cache.metrics.intervals import widen_errors
from cxr_cache.metrics.resampled import RankedScores, bootstrap, bootstrap_variance
from cxr_cache.metrics.scores import NEVER
from tests.evaluation.test_evaluate import make_run
from tests.predictions import SEEDS, make_predictions


def make_images(seed: int, n: int = 60, decimals: int = 16) -> ScoredImages:
    """Studies of one or two images; the first three findings have one class or none."""
    targets, scores = make_predictions(seed, n, decimals)
    study = (np.arange(n) * 2 // 3).astype(str).astype(object)
    blank = np.full(n, "", object)
    ids = np.arange(n).astype(str).astype(object)
    names = tuple(f"f{k}" for k in range(targets.shape[1]))
    return ScoredImages(ids, study, blank, blank, targets.astype(float), scores, names)


def read_plainly(targets, scores, weights, false_alarm, recall):
    """Sensitivity at a share of false alarms, and precision at a recall, by scikit-learn's curve.

    Corners are not dropped; on a vertical piece, the upper end counts.
    """
    fpr, tpr, cuts = roc_curve(targets, scores, sample_weight=weights, drop_intermediate=False)
    k = np.searchsorted(fpr, false_alarm + 1e-12, side="right") - 1
    sensitivity = tpr[k]
    if k + 1 < len(fpr) and tpr[k + 1] > tpr[k]:  # tied scores: a slope between two corners
        share = (false_alarm - fpr[k]) / (fpr[k + 1] - fpr[k])
        sensitivity = tpr[k] + share * (tpr[k + 1] - tpr[k])
    reached = cuts[np.flatnonzero(tpr >= recall - 1e-12)[0]]
    if recall == 0:
        reached = scores[targets == 1].max()
    called = scores >= reached
    return sensitivity, weights[called & (targets == 1)].sum() / weights[called].sum()


@pytest.mark.parametrize("decimals", [16, 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_curves_under_weights_are_those_of_scikit_learn(seed, decimals):
    images = make_images(seed, decimals=decimals)
    weights = np.random.default_rng(seed).exponential(size=(4, len(images))).astype(np.float32)
    places = (np.array([0, 0.05, 0.31, 0.5, 0.77, 1]), np.array([0, 0.13, 0.4, 0.66, 0.9, 1]))
    ranked = RankedScores(images.targets, images.probabilities)

    read = ranked.read_curves(weights, [places if f > 2 else None for f in range(7)])

    assert read[:3] == [None] * 3
    for f in range(3, 7):
        labelled = ~np.isnan(images.targets[:, f])
        target, score = images.targets[labelled, f], images.probabilities[labelled, f]
        for r, row in enumerate(weights[:, labelled].astype(float)):
            for k, at in enumerate(zip(*places, strict=True)):
                expected = read_plainly(target, score, row, *at)
                assert (read[f][0][r, k], read[f][1][r, k]) == pytest.approx(expected, abs=1e-6)


def test_variances_are_those_of_all_resamples():
    images = make_images(3)
    ranked = RankedScores(images.targets[:, 3:], images.probabilities[:, 3:])

    def statistics(weights):
        return {"area": ranked.auroc_and_ap(weights)[0]}

    for n in (2, 37, 2600):  # several chunks, the last of them smaller
        all_of_them = bootstrap(statistics, images.clusters, n, 1)["area"]
        spread = bootstrap_variance(statistics, images.clusters, n, 1)["area"]
        np.testing.assert_allclose(spread, all_of_them.var(axis=0), rtol=1e-10)


def test_bands_rest_on_the_resamples_and_hold_their_curve():
    images = make_images(4, n=90)
    table = ranking_curves(images, n_resamples=60, seed=7)
    plain = ranking_curves(images)

    shared = ["finding", "threshold", "sensitivity", "specificity", "ppv"]
    pd.testing.assert_frame_equal(table[shared], plain[shared])
    assert plain["sensitivity_low"].isna().all()
    for name in ("sensitivity", "ppv"):
        known = table[f"{name}_low"].notna()
        assert known.mean() > 0.8
        low, value, high = (table.loc[known, f"{name}{end}"] for end in ("_low", "", "_high"))
        assert ((low <= value + 1e-12) & (value <= high + 1e-12)).all()
    # One point by hand: Student's t on the logit scale, with the spread over all resamples.
    rows = table[table["finding"] == "f4"].reset_index(drop=True)
    row = rows.iloc[(rows["sensitivity"] - 0.5).abs().argmin()]
    place = np.array([1 - row["specificity"]]), np.array([row["sensitivity"]])
    ranked = RankedScores(images.targets[:, [4]], images.probabilities[:, [4]])

    def statistics(weights):
        [(sensitivity, _)] = ranked.read_curves(weights, [place])
        return {"at": sensitivity[:, 0]}

    spread = bootstrap(statistics, images.clusters, 60, 7)["at"].var()
    with_it, without = (
        len(np.unique(images.clusters[images.targets[:, 4] == value])) for value in (1, 0)
    )
    n = min(with_it, without)
    value = row["sensitivity"]
    logit = np.log(value / (1 - value))
    reach = student.ppf(0.975, n - 1) * widen_errors(np.array(spread), n) / (value * (1 - value))
    bounds = 1 / (1 + np.exp(-np.array([logit - reach, logit + reach])))
    np.testing.assert_allclose(row[["sensitivity_low", "sensitivity_high"]].astype(float), bounds)


def test_a_copied_study_makes_no_band_narrower():
    images = make_images(5, n=60)
    rows = np.repeat(np.arange(60), 3)
    copied = images.take(rows)
    copied = replace(copied, image_ids=np.arange(180).astype(str).astype(object))
    once, often = (ranking_curves(each, n_resamples=40, seed=0) for each in (images, copied))
    width = [(of["sensitivity_high"] - of["sensitivity_low"]).mean() for of in (once, often)]
    assert width[1] == pytest.approx(width[0], rel=0.02)


def plain_benefit(targets, probabilities, threshold):
    """Vickers and Elkin's net benefit, row by row."""
    labelled = ~np.isnan(targets)
    benefit = 0.0
    for target, p in zip(targets[labelled], probabilities[labelled], strict=True):
        if p >= threshold:
            benefit += 1 if target == 1 else -threshold / (1 - threshold)
    return benefit / labelled.sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_net_benefit_is_that_of_a_plain_loop(seed):
    images = make_images(seed)
    table = decision_curves(images, n_resamples=0, seed=0)

    assert table.columns.tolist() == list(DECISION_COLUMNS)
    assert table["net_benefit_low"].isna().all()
    assert set(table["finding"]) == {"f3", "f4", "f5", "f6"}, "those with both classes"
    for f in range(3, 7):
        rows = table[table["finding"] == f"f{f}"]
        target, p = images.targets[:, f], images.probabilities[:, f]
        for row in rows.iloc[::6].to_dict("records"):
            model = plain_benefit(target, p, row["threshold"])
            everyone = plain_benefit(target, np.ones(len(p)), row["threshold"])
            assert row["net_benefit"] == pytest.approx(model, abs=1e-12)
            assert row["treat_all"] == pytest.approx(everyone, abs=1e-12)
            assert row["gain"] == pytest.approx(model - max(everyone, 0), abs=1e-12)
            assert row["n_called"] == (p[~np.isnan(target)] >= row["threshold"]).sum()


def test_net_benefit_is_that_of_dcurves():
    """Where the package is installed: it needs lifelines and statsmodels."""
    dcurves = pytest.importorskip("dcurves")
    images = make_images(1, n=200)
    table = decision_curves(images, n_resamples=0, seed=0)
    for f in range(3, 7):
        labelled = ~np.isnan(images.targets[:, f])
        data = pd.DataFrame(
            {"y": images.targets[labelled, f], "model": images.probabilities[labelled, f]}
        )
        theirs = dcurves.dca(data, outcome="y", modelnames=["model"], thresholds=THRESHOLDS)
        ours = table[table["finding"] == f"f{f}"]
        for name, column in (("model", "net_benefit"), ("all", "treat_all")):
            reference = theirs[theirs["model"] == name].sort_values("threshold")
            np.testing.assert_allclose(ours[column], reference["net_benefit"], atol=1e-9)
    assert "dcurves" in sys.modules


def test_bounds_of_a_decision_curve_are_students_t_over_the_resamples():
    images = make_images(2, n=90)
    table = decision_curves(images, n_resamples=80, seed=3)
    f, k = 5, 20  # a threshold in the middle
    row = table[table["finding"] == f"f{f}"].iloc[k]
    labelled = ~np.isnan(images.targets[:, f])
    present = images.targets[:, f] == 1
    called = images.probabilities[:, f] >= row["threshold"]
    odds = row["threshold"] / (1 - row["threshold"])

    def statistics(weights):
        n = weights[:, labelled].sum(axis=1)
        gained = weights[:, labelled & called & present].sum(axis=1)
        lost = weights[:, labelled & called & ~present].sum(axis=1)
        return {"at": (gained - odds * lost) / n}

    spread = bootstrap(statistics, images.clusters, 80, 3)["at"].var()
    n = min(len(np.unique(images.clusters[images.targets[:, f] == value])) for value in (0, 1))
    reach = student.ppf(0.975, n - 1) * widen_errors(np.array(spread), n)
    assert row["net_benefit_high"] - row["net_benefit"] == pytest.approx(reach, rel=1e-4)
    assert row["net_benefit"] - row["net_benefit_low"] == pytest.approx(reach, rel=1e-4)
    idle = table[table["n_called"] == 0]
    assert idle["net_benefit_low"].isna().all(), "no spread is no certainty"


def test_a_run_has_decision_curves_only_where_it_is_calibrated(tmp_path):
    run = make_run(tmp_path / "run")
    score_run(run, n_resamples=0, calibration="platt")
    assert len(run.read_table("decision_curves")) == 5 * len(THRESHOLDS)
    score_run(run, n_resamples=0, calibration="none")
    assert run.read_table("decision_curves").empty, "scores are no probabilities to act on"
    curves = run.read_table("curves")
    assert (curves.groupby("finding")["threshold"].first() == NEVER).all()
    assert POOLED in set(curves["finding"])
