"""Scores of probabilities equal scikit-learn's, and so do the maps that calibrate them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.optimize import minimize
from scipy.special import expit, logit, stdtrit
from sklearn import metrics as reference
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from cxr_cache.metrics import scores as metrics
from cxr_cache.metrics.operating_point import (
    MIN_SLOPE,
    Calibration,
    choose_operating_point,
    fit_calibration,
)
from cxr_cache.metrics.recalibration import recalibrate
from cxr_cache.metrics.scores import (
    auroc,
    errors_of_prevalence,
    expected_calibration_error,
    log_losses,
    reliability,
    squared_errors,
)
from tests.oracles import average_precision
from tests.predictions import SEEDS, F, make_predictions, per_finding


@pytest.mark.parametrize("seed", SEEDS)
def test_brier_and_log_loss_equal_scikit_learn(seed):
    targets, scores = make_predictions(seed)
    scores[0] = 0.0
    scores[1] = 1.0  # certain, and wrong somewhere

    brier = metrics.weighted_mean(squared_errors(targets, scores))
    log_loss = metrics.weighted_mean(log_losses(targets, scores))

    defined = slice(3, F)
    np.testing.assert_allclose(
        brier[defined], per_finding(reference.brier_score_loss, targets, scores)[defined]
    )
    np.testing.assert_allclose(
        log_loss[defined], per_finding(reference.log_loss, targets, scores)[defined]
    )
    assert np.isnan(brier[2])
    assert np.isnan(log_loss[2])


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_error_is_the_mean_gap_over_bins(seed):
    targets, scores = make_predictions(seed, n_rows=300, decimals=2)  # edges of bins included

    errors = expected_calibration_error(targets, scores)

    for f in range(3, F):
        labelled = ~np.isnan(targets[:, f])
        t, p = targets[labelled, f], scores[labelled, f]
        bins = np.ceil(p * 10 - 1e-9).clip(1, 10)  # (0, 0.1], (0.1, 0.2], ...
        gaps = [
            (bins == b).mean() * abs(p[bins == b].mean() - t[bins == b].mean())
            for b in np.unique(bins)
        ]
        assert errors[f] == pytest.approx(sum(gaps))
    assert np.isnan(errors[2])


@pytest.mark.parametrize("seed", SEEDS)
def test_bins_are_those_of_scikit_learns_curve(seed):
    targets, scores = make_predictions(seed, n_rows=300)

    bins = reliability(targets, scores)

    for f in range(3, F):
        labelled = ~np.isnan(targets[:, f])
        observed, stated = calibration_curve(targets[labelled, f], scores[labelled, f], n_bins=10)
        filled = bins.n[f] > 0
        np.testing.assert_allclose(bins.observed[f, filled], observed)
        np.testing.assert_allclose(bins.mean_probability[f, filled], stated)
        assert bins.n[f].sum() == labelled.sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_constant_prevalence_scores_what_scikit_learn_says(seed):
    targets, _ = make_predictions(seed)
    n_positive, n_labelled = (targets == 1).sum(axis=0), (~np.isnan(targets)).sum(axis=0)

    constant = errors_of_prevalence(n_positive, n_labelled)

    assert constant["brier"][:2].tolist() == constant["log_loss"][:2].tolist() == [0, 0]
    assert np.isnan(constant["brier"][2])
    for f in range(3, F):
        t = targets[~np.isnan(targets[:, f]), f]
        p = np.full(len(t), t.mean())
        assert constant["brier"][f] == pytest.approx(reference.brier_score_loss(t, p))
        assert constant["log_loss"][f] == pytest.approx(reference.log_loss(t, p))


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_slope_and_intercept_are_those_of_statsmodels(seed):
    """Of the regression and of its cluster-robust errors; its own corrections taken out."""
    targets, scores = make_predictions(seed, n_rows=400)
    clusters = np.arange(400) // 2

    found = recalibrate(targets, scores, clusters)

    for f in range(3, F):
        rows = ~np.isnan(targets[:, f])
        t, z, own = targets[rows, f], logit(scores[rows, f].clip(1e-7, 1 - 1e-7)), clusters[rows]
        robust = {"cov_type": "cluster", "cov_kwds": {"groups": own, "use_correction": False}}
        family = sm.families.Binomial()
        both = sm.GLM(t, sm.add_constant(z), family=family).fit(**robust)
        one = sm.GLM(t, np.ones_like(z), family=family, offset=z).fit(**robust)
        n = min(len(np.unique(own[t == value])) for value in (0, 1))
        reach = stdtrit(n - 1, 0.975) * np.sqrt(n / (n - 1))
        for value, interval, estimate, error in (
            (found.slope, found.slope_interval, both.params[1], both.bse[1]),
            (found.intercept, found.intercept_interval, one.params[0], one.bse[0]),
        ):
            assert value[f] == pytest.approx(estimate, rel=1e-4, abs=1e-5)
            assert interval.low[f] == pytest.approx(estimate - reach * error, rel=1e-4, abs=1e-5)
    assert np.isnan(found.slope[:3]).all()


def test_a_slope_of_separated_classes_is_undefined():
    targets = np.repeat([[0.0], [1.0]], 10, axis=0)

    found = recalibrate(targets, 0.4 + 0.2 * targets, np.arange(20))

    assert np.isnan(found.slope[0])


# --- maps ----------------------------------------------------------------------------------------


def make_distorted(seed: int, n_rows: int = 2000):
    """True probabilities, outcomes drawn from them, and a model that states them distorted."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1.5, 1.5, (n_rows, 4))
    targets = (rng.random(logits.shape) < expit(logits)).astype(float)
    targets[rng.random(targets.shape) < 0.1] = np.nan
    return expit(logits), targets, expit(0.4 * logits + 0.6)


@pytest.mark.parametrize("seed", SEEDS)
def test_platt_is_scikit_learns(seed):
    _, targets, stated = make_distorted(seed)

    fitted = fit_calibration(targets, stated, "platt")
    calibrated = fitted.apply(stated)

    for f in range(4):
        labelled = ~np.isnan(targets[:, f])
        logits = logit(stated[labelled, f])[:, None]
        given = LogisticRegression()  # whose decision function is the logit itself
        given.classes_, given.coef_, given.intercept_ = np.array([0, 1]), np.ones((1, 1)), [0.0]
        theirs = CalibratedClassifierCV(FrozenEstimator(given), method="sigmoid")
        theirs.fit(logits, targets[labelled, f].astype(int))
        expected = theirs.predict_proba(logits)[:, 1]
        np.testing.assert_allclose(calibrated[labelled, f], expected, atol=2e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_temperature_is_the_slope_of_a_logistic_regression_without_intercept(seed):
    _, targets, stated = make_distorted(seed)
    labelled = ~np.isnan(targets)

    fitted = fit_calibration(targets, stated, "temperature")

    regression = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8)
    regression.fit(logit(stated[labelled])[:, None], targets[labelled])
    assert 1 / fitted.temperature == pytest.approx(regression.coef_[0, 0], rel=1e-4)
    assert (fitted.slope == fitted.slope[0]).all()
    assert (fitted.intercept == 0).all()


def make_family(seed: int, n_rows: int = 3000, counts=(4, 6, 8, 15, 40, 120, 300, 700, 900, 1000)):
    """Findings of very different frequency, whose stated logits are compressed about alike.

    Gives training targets and probabilities, and those of as many other rows.
    """
    rng = np.random.default_rng(seed)
    prevalence = np.array(counts) / n_rows
    both = []
    for _ in range(2):
        present = rng.random((n_rows, len(counts))) < prevalence
        present[:3, 0] = True  # never without a positive
        scores = rng.standard_normal(present.shape) + present
        both += [present * 1.0, expit(0.6 * (scores - 0.5 + logit(prevalence)) + 0.4)]
    return both


@pytest.mark.parametrize("seed", SEEDS)
def test_shrunk_maps_state_rare_findings_better_on_other_rows_and_frequent_ones_as_well(seed):
    targets, stated, others, stated_others = make_family(seed)
    rare, frequent = slice(0, 4), slice(7, None)

    own, shrunk = (fit_calibration(targets, stated, of) for of in ("platt", "platt-shrunk"))

    losses = [
        metrics.weighted_mean(log_losses(others, of.apply(stated_others))) for of in (own, shrunk)
    ]
    assert losses[1][rare].mean() < losses[0][rare].mean()
    np.testing.assert_allclose(losses[1][frequent], losses[0][frequent], rtol=0.005)
    spread = [np.std(of.slope[rare]) for of in (own, shrunk)]
    assert spread[1] < spread[0]


def test_shrunk_maps_are_the_modes_of_their_posterior():
    """Found again by scipy, from the common lines and variances at which the fit ended."""
    targets, stated, *_ = make_family(0)
    fitted = fit_calibration(targets, stated, "platt-shrunk")
    z = logit(stated)
    centre = z.mean(axis=0)
    lines = np.stack([np.ones_like(centre), centre], axis=1)
    maps = np.stack([fitted.intercept + fitted.slope * centre, fitted.slope])
    common = (lines @ np.linalg.lstsq(lines, maps.T, rcond=None)[0]).T

    def information(f: int) -> np.ndarray:
        p = expit(fitted.intercept[f] + fitted.slope[f] * z[:, f])
        x = np.stack([np.ones(len(z)), z[:, f] - centre[f]], axis=1)
        return (x * (p * (1 - p))[:, None]).T @ x

    variances = np.ones(2)
    for _ in range(2000):  # their own fixed point, the maps given
        covariances = [np.linalg.inv(information(f) + np.diag(1 / variances)) for f in range(10)]
        spread = np.array([np.diag(of) for of in covariances]).T
        variances = np.maximum((np.square(maps - common) + spread).mean(axis=1), 1e-4)
    for f in range(10):

        def loss(map_: np.ndarray, f: int = f) -> float:
            logits = map_[0] + map_[1] * (z[:, f] - centre[f])
            fit = np.logaddexp(0, np.where(targets[:, f] == 1, -logits, logits)).sum()
            return fit + (np.square(map_ - common[:, f]) / variances).sum() / 2

        found = minimize(loss, maps[:, f], tol=1e-10).x
        np.testing.assert_allclose(maps[:, f], found, atol=0.02)


def test_images_of_a_study_are_no_evidence_of_their_own():
    """Every image twice within its study changes no map, and no threshold."""
    targets, stated, *_ = make_family(1, n_rows=1000, counts=(3, 5, 8, 20, 100, 300))
    studies = np.arange(len(targets))
    options = {"rule": "f1", "calibration": "platt-shrunk", "min_positives": 5}

    once = choose_operating_point(targets, stated, clusters=studies, **options)
    twice = choose_operating_point(
        *(np.repeat(of, 2, axis=0) for of in (targets, stated)),
        clusters=np.repeat(studies, 2),
        **options,
    )

    np.testing.assert_allclose(twice.calibration.slope, once.calibration.slope)
    np.testing.assert_allclose(twice.calibration.intercept, once.calibration.intercept)
    np.testing.assert_allclose(twice.thresholds, once.thresholds)
    assert once.undecided.any()


def test_two_findings_have_no_common_map():
    targets, stated, *_ = make_family(0)

    two, own = (
        fit_calibration(targets[:, :2], stated[:, :2], of) for of in ("platt-shrunk", "platt")
    )

    np.testing.assert_array_equal(two.slope, own.slope)


def test_platt_undoes_a_known_distortion_on_other_rows():
    true, targets, stated = make_distorted(0, n_rows=20_000)
    fitted = fit_calibration(targets[:10_000], stated[:10_000], "platt")

    np.testing.assert_allclose(fitted.slope, 1 / 0.4, rtol=0.08)
    np.testing.assert_allclose(fitted.apply(stated[10_000:]), true[10_000:], atol=0.03)
    for score in (squared_errors, log_losses):
        before, after = (
            np.nanmean(score(targets[10_000:], p[10_000:])) for p in (stated, fitted.apply(stated))
        )
        assert after < before


@pytest.mark.parametrize("method", ["temperature", "platt", "platt-shrunk"])
@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_never_changes_the_order_of_images(method, seed):
    """Also where the model ranks a finding worse than chance: a negative slope would turn it."""
    targets, scores = make_predictions(seed)
    scores[:, 4] = 1 - scores[:, 4]

    fitted = fit_calibration(targets, scores, method)
    calibrated = fitted.apply(scores)

    assert (fitted.slope >= MIN_SLOPE).all()
    for measure in (auroc, average_precision):
        np.testing.assert_array_equal(measure(targets, calibrated), measure(targets, scores))


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_findings_without_both_classes_are_left_alone(method):
    """All negative, all positive, no label; temperature is one number for all of them."""
    targets, scores = make_predictions(0)

    fitted = fit_calibration(targets, scores, method)

    assert np.isfinite(fitted.slope).all()
    if method == "platt":
        assert fitted.slope[:3].tolist() == [1, 1, 1]
        assert fitted.intercept[:3].tolist() == [0, 0, 0]
        np.testing.assert_array_equal(fitted.apply(scores)[:, :3], scores[:, :3])
    alone = fit_calibration(targets[:, :3], scores[:, :3], method)
    assert np.isfinite(alone.slope).all()


@pytest.mark.parametrize("method", ["temperature", "platt", "platt-shrunk"])
def test_perfect_separation_and_certainty_stay_finite(method):
    targets = np.array([[1.0], [1.0], [0.0], [0.0]])
    certain = targets.astype(np.float32)

    for scores in (certain, 0.8 * certain + 0.1, np.full((4, 1), 0.5)):
        fitted = fit_calibration(targets, scores, method)
        calibrated = fitted.apply(scores)
        assert np.isfinite(fitted.slope).all()
        assert ((calibrated >= 0) & (calibrated <= 1)).all()
    assert np.isnan(Calibration.none(1).apply(np.array([[np.nan]]))).all()


def test_one_row_is_calibrated_by_nothing():
    assert fit_calibration(np.ones((1, 1)), np.full((1, 1), 0.3), "platt").slope == [1]
    assert fit_calibration(np.ones((1, 1)), np.full((1, 1), 0.3), "temperature").slope == [1]


def test_no_calibration_changes_no_bit():
    _, scores = make_predictions(0)

    fitted = fit_calibration(*make_predictions(0), "none")

    np.testing.assert_array_equal(fitted.apply(scores), scores)
    assert fitted.temperature is None


def test_a_map_goes_through_json():
    fitted = fit_calibration(*make_predictions(1), "platt")
    _, scores = make_predictions(2)

    again = Calibration.from_dict(json.loads(json.dumps(fitted.to_dict())))

    np.testing.assert_array_equal(again.apply(scores), fitted.apply(scores))
