"""Intervals are Student's, contain their estimate, and cover, rare findings included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, optimize, stats
from scipy.special import expit, logit

from cxr_cache.metrics.intervals import (
    auroc_interval,
    interval_of_mean,
    macro_error,
    macro_interval,
    pool_clusters,
    standard_errors,
    student_interval,
)
from cxr_cache.metrics.resampled import RankedScores
from tests.oracles import bootstrap_weights

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_error_of_a_mean_is_the_textbook_one():
    """n - 1 in the denominator, though resampled means show n + 1."""
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 10, 100):
        values = rng.random(n)
        weights = bootstrap_weights(np.arange(n), 4000, seed=n).astype(np.float64)
        resampled = weights @ values / weights.sum(axis=1)

        error = standard_errors(resampled, n)

        assert error == pytest.approx(values.std(ddof=1) / np.sqrt(n), rel=0.06)


def test_bounds_are_students_on_the_logit_scale():
    estimates, errors, n = np.array([0.3, 0.9]), np.array([0.05, 0.02]), np.array([4, 60])

    low, high = student_interval(estimates, errors, n, "logit")

    reach = stats.t.ppf(0.975, n - 1) * errors / (estimates * (1 - estimates))
    np.testing.assert_allclose(low, expit(logit(estimates) - reach))
    np.testing.assert_allclose(high, expit(logit(estimates) + reach))


def test_other_scales():
    low, high = student_interval(np.array(2.0), 0.5, np.inf, "log")
    assert (low, high) == pytest.approx((2 * np.exp(-0.49), 2 * np.exp(0.49)), abs=1e-3)
    low, high = student_interval(np.array(-1.0), 0.5, np.inf, "identity")
    assert (low, high) == pytest.approx((-1.98, -0.02), abs=1e-3)


@pytest.mark.parametrize("n", [1, 2, 30])
def test_none_and_all_get_clopper_and_pearsons_bound(n):
    """Resamples of 3 hits in 3 all have 3 hits: a percentile interval would say [1, 1]."""
    low, high = student_interval(np.array([0.0, 1.0]), np.zeros(2), np.full(2, n), "logit")

    none, every = (stats.binomtest(k, n).proportion_ci(method="exact") for k in (0, n))
    np.testing.assert_allclose(low, [none.low, every.low])
    np.testing.assert_allclose(high, [none.high, every.high])


def test_one_study_is_no_ground_for_an_interval():
    for n in (0, 1):
        assert np.isnan(student_interval(np.array(0.7), 0.1, n, "logit")).all()
        assert np.isnan(standard_errors(np.random.default_rng(0).random((9, 2)), n)).all()
    assert np.isnan(student_interval(np.array(np.nan), 0.1, 5, "logit")).all()


@pytest.mark.parametrize("seed", range(5))
def test_an_interval_contains_its_estimate_and_stays_inside_its_range(seed):
    rng = np.random.default_rng(seed)
    estimates, errors = rng.random(200), rng.random(200) * 10 ** rng.uniform(-6, 1, 200)
    errors = np.maximum(errors, 1e-5)  # a smaller one is rounding, and no ground for an interval
    estimates[:2] = 0, 1

    low, high = student_interval(estimates, errors, rng.integers(2, 50, 200), "logit")

    assert (low <= estimates).all()
    assert (estimates <= high).all()
    assert (low >= 0).all()
    assert (high <= 1).all()


def test_the_error_of_a_mean_over_findings_keeps_their_covariance():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(20_000, 1))
    resampled = 0.5 + 0.1 * shared + 0.05 * rng.normal(size=(20_000, 4))
    undefined = np.full((20_000, 1), np.nan)

    figures = np.array([0.5, 0.5, 0.5, 0.5, np.nan])
    n = np.array([1e6, 1e6, 1e6, 1e6, 0])
    spread = macro_error(figures, np.hstack([resampled, undefined]), n)

    assert spread.error == pytest.approx(np.sqrt(0.1**2 + 0.05**2 / 4), rel=0.02)


def test_only_a_findings_own_variance_is_widened():
    """What findings share comes from clusters that are in all of them, of which there are many."""
    rng = np.random.default_rng(1)
    resampled = 0.7 + 0.03 * rng.normal(size=(400, 1)) + 0.05 * rng.normal(size=(400, 3))
    n = np.array([3, 5, 9])

    spread = macro_error(np.full(3, 0.7), resampled, n)

    covariance = np.cov(resampled.T, ddof=0)
    covariance[np.diag_indices(3)] *= (n + 1) / (n - 1)
    own = covariance.diagonal()
    assert spread.error**2 == pytest.approx(covariance.sum() / 9)
    freedom = covariance.sum() ** 2 / (own**2 / (n - 1)).sum()
    assert spread.n_clusters == pytest.approx(freedom + 1)
    as_it_is = macro_error(np.full(3, 0.7), resampled, n, widen=False)
    assert as_it_is.error**2 == pytest.approx(np.cov(resampled.T, ddof=0).sum() / 9)


def test_a_finding_of_one_study_is_as_uncertain_as_it_is_far_from_the_mean():
    """As ``survey`` in R centres strata of one unit at the grand mean."""
    rng = np.random.default_rng(0)
    resampled = 0.5 + np.array([0.1, 0.1, 0.02]) * rng.normal(size=(20_000, 3))
    n, figures = np.array([4, 4, 1]), np.array([0.5, 0.5, 0.8])

    spread = macro_error(figures, resampled, n)

    widened = 0.1**2 * (4 + 1) / (4 - 1)
    assert spread.error == pytest.approx(np.sqrt((2 * widened + (0.8 - 0.6) ** 2) / 9), rel=0.02)
    total = 2 * widened + 0.2**2
    assert spread.n_clusters == pytest.approx(1 + total**2 / (2 * widened**2 / 3), rel=0.03)
    assert np.isnan(macro_error(figures[2:], resampled[:, 2:], n[2:])).all()
    alone = macro_interval(np.array([0.5]), resampled[:, 2:], n[2:], "logit")
    assert np.isnan(alone).all()


def normal_scores(distance: float) -> tuple[float, float, float]:
    """AUROC, variance and kurtosis of the share of negatives that a positive beats."""
    mean = stats.norm.cdf(distance / np.sqrt(2))

    def moment(power: int) -> float:
        return integrate.quad(
            lambda z: (stats.norm.cdf(z + distance) - mean) ** power * stats.norm.pdf(z), -9, 9
        )[0]

    return mean, moment(2), moment(4) / moment(2) ** 2


@pytest.mark.parametrize(
    ("area", "error", "n_positive", "n_negative"),
    [(0.6, 0.1, 5, 760), (0.95, 0.02, 9, 760), (0.97, 0.0, 20, 30), (0.3, 0.05, 200, 12)],
)
def test_bounds_of_an_auroc_are_those_from_which_it_is_just_near_enough(
    area, error, n_positive, n_negative
):
    """Against quadrature and a root finder of SciPy's."""

    def excess(distance: float) -> float:
        mean, variance, kurtosis = normal_scores(distance)
        expected = mean * (1 - mean) + (n_positive + n_negative - 2) * variance
        expected /= n_positive * n_negative
        worth = (min(n_positive, n_negative) - 1) * min(1, 2 / (kurtosis - 1))
        mixed = (worth * error**2 + 30 * expected) / (worth + 30)
        return abs(area - mean) - stats.t.ppf(0.975, worth + 30) * np.sqrt(mixed)

    middle = np.sqrt(2) * stats.norm.ppf(area)
    wanted = [
        stats.norm.cdf(optimize.brentq(excess, *ends) / np.sqrt(2))
        for ends in ((middle - 4, middle), (middle, middle + 4))
    ]

    found = auroc_interval(np.array(area), np.array(error), n_positive, n_negative)

    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_intervals_of_aurocs_contain_them_and_mirror():
    rng = np.random.default_rng(0)
    areas, errors = rng.random(60), 0.3 * rng.random(60)
    n_positive, n_negative = rng.integers(2, 300, (2, 60))

    low, high = auroc_interval(areas, errors, n_positive, n_negative)
    mirrored = auroc_interval(1 - areas, errors, n_negative, n_positive)

    assert ((low > 0) & (low < areas) & (areas < high) & (high < 1)).all()
    np.testing.assert_allclose(mirrored, (1 - high, 1 - low), atol=1e-7)
    unknown = auroc_interval(np.array([0.8, 0.8]), np.array([0.1, np.nan]), [1, 9], 50)
    assert np.isnan(unknown).all()
    perfect = auroc_interval(np.array(1.0), np.array(0.0), 5, 50)
    exact = stats.binomtest(5, 5).proportion_ci(method="exact")
    assert perfect == pytest.approx((exact.low, 1))


def test_a_figure_without_spread_has_no_interval_instead_of_a_point():
    """Eight of nine right in every patient: each resample says 0.889, up to rounding."""
    resampled = np.full(50, 8 / 9) + 1e-8 * np.random.default_rng(0).random(50)
    for scale in ("logit", "log", "identity"):
        found = student_interval(np.array(8 / 9), standard_errors(resampled, 5), 5, scale)
        assert np.isnan(found).all()
    equal_models = student_interval(np.array(0.0), 0.0, 5, "identity")
    assert equal_models == (0, 0)


@pytest.mark.parametrize("n", [2, 3, 7, 60])
def test_the_mean_of_one_finding_is_that_finding(n):
    rng = np.random.default_rng(n)
    resampled = np.clip(0.7 + 0.05 * rng.standard_normal((500, 1)), 0.01, 0.99)

    macro = macro_interval(np.array([0.7]), resampled, np.array([n]), "logit")

    errors = standard_errors(resampled, np.array([n]))
    alone = student_interval(np.array([0.7]), errors, np.array([n]), "logit")
    np.testing.assert_allclose(np.array(macro), np.array(alone)[:, 0])


def test_the_freedom_of_a_sum_is_satterthwaites():
    """As of Welch's test: equal variances add up what each is known by; a known one adds none."""
    assert pool_clusters(np.ones(5), np.full(5, 4)) == pytest.approx(1 + 5 * 3)
    assert pool_clusters(np.array([1, 1e-9]), np.array([4, 1000])) == pytest.approx(1 + 3)
    a, b = np.random.default_rng(0).normal(0, [[1], [3]], (2, 8))
    b = b[:5]
    welch = stats.ttest_ind(a, b, equal_var=False)
    variances = np.array([a.var(ddof=1) / 8, b.var(ddof=1) / 5])
    assert pool_clusters(variances, np.array([8, 5])) == pytest.approx(1 + welch.df)
    assert pool_clusters(np.zeros(3), np.full(3, 4)) == np.inf


def test_a_mean_without_any_variance_has_no_interval():
    """Sensitivities of 0 and 1 only: their mean of a half is not certain, it is unknown."""
    found = macro_interval(np.array([0.0, 1.0]), np.tile([0.0, 1.0], (9, 1)), [3, 4], "logit")
    assert np.isnan(found).all()


def test_the_mean_of_two_shares_knows_what_they_do_not():
    """No positive found of 16: the error of that by resampling is zero, its bound 0.206."""
    sensitivity = student_interval(np.array(0.0), 0.0, 16, "logit")
    specificity = student_interval(np.array(0.99), 0.005, 600, "logit")
    pairs = (np.array(0.0), sensitivity), (np.array(0.99), specificity)

    low, high = interval_of_mean(np.array(0.495), *pairs)

    assert low == pytest.approx(0.495 - (0.99 - specificity.low) / 2)
    assert high == pytest.approx(0.495 + np.hypot(0.206, specificity.high - 0.99) / 2, abs=1e-3)
    unknown = student_interval(np.array(0.5), np.nan, 1, "logit")
    assert np.isnan(interval_of_mean(np.array(0.5), pairs[0], (0.5, unknown))).all()


def test_a_perfect_mean_is_no_certainty():
    """Every finding at 1, in every resample: the bound is that of the best known one."""
    low, high = macro_interval(np.ones(3), np.ones((9, 3)), np.array([2, 30, 1]), "logit")

    assert (low, high) == (pytest.approx(0.025 ** (1 / 30)), 1)


def test_nothing_defined_has_no_interval():
    nothing = macro_interval(np.full(3, np.nan), np.full((9, 3), np.nan), np.zeros(3), "logit")

    assert np.isnan(nothing).all()


def test_intervals_over_studies_cover_and_those_over_images_are_too_narrow():
    """Three images of one study are not three pieces of evidence; 100 repeats of 100 studies."""
    true_auroc = 0.76025  # of two normals of unit variance, one apart: Phi(1 / sqrt(2))
    n_repeats = 100
    groupings = {"studies": np.arange(300) // 3, "images": np.arange(300)}
    n_covered = dict.fromkeys(groupings, 0)
    for repeat in range(n_repeats):
        rng = np.random.default_rng([repeat, 1])
        present = np.repeat(rng.random(100) < 0.4, 3)
        shared = np.repeat(rng.standard_normal(100), 3)
        scores = present + np.sqrt(0.9) * shared + np.sqrt(0.1) * rng.standard_normal(300)
        ranked = RankedScores(present[:, None].astype(float), scores[:, None])
        once = ranked.auroc_and_ap(np.ones((1, 300)))[0][0]
        for name, groups in groupings.items():
            areas = ranked.auroc_and_ap(bootstrap_weights(groups, 100, repeat))[0]
            n = [len(np.unique(groups[is_there])) for is_there in (present, ~present)]
            low, high = auroc_interval(once, standard_errors(areas, min(n)), *n)
            n_covered[name] += bool(low[0] <= true_auroc <= high[0])

    assert 0.89 <= n_covered["studies"] / n_repeats <= 0.99, n_covered
    assert n_covered["images"] / n_repeats < 0.87, n_covered


@pytest.mark.slow
def test_coverage_at_full_size(tmp_path):
    """500 repeats: one AUROC, findings by their positives, the mean, and equal models."""
    out = tmp_path / "coverage.json"
    script = REPOSITORY / "scripts" / "interval_coverage.py"
    subprocess.run([sys.executable, script, "--out", out], check=True, timeout=1200)

    found = json.loads(out.read_text())
    assert found["repeats"] == 500
    assert 0.92 <= found["one_finding"]["studies"] <= 0.98
    assert found["one_finding"]["images"] < 0.85
    assert 0.92 <= found["patients"]["patients"] <= 0.98
    assert found["patients"]["studies"] < 0.85
    for row in found["areas"]:  # 4,000 repeats have a standard error of 0.35 %
        if row["spread"] == 1:
            assert 0.93 <= row["coverage"] <= 0.98, row
        assert row["coverage"] >= 0.88, row
    for row in found["equal_models"]:  # of a nominal 95 and 5 %
        assert row["coverage"] >= 0.92, row
        several = not row["design"].startswith("1 x")
        for measure in ("auroc", "ap"):
            called = row[f"{measure}_called_different"]
            assert called <= 0.08, row
            assert called >= 0.02 or not several, row
    assert found["same_recipe"]["studies_and_training"] <= 0.07
    assert found["same_recipe"]["studies"] > 0.1
    by_key = {
        (r["measure"], r["truth"], r["method"], r["of"]): r["coverage"]
        for r in found["many_findings"]
    }
    kinds = ("macro", "2-4", "5-9", "10-19", "20-49", "50-1000000")
    of = [kind if kind == "macro" else f"{kind} positives" for kind in kinds]
    for kind in of:
        assert 0.92 <= by_key["auroc", "population", "package", kind] <= 0.98, kind
        for measure in ("ap", "f1"):
            assert by_key[measure, "as large", "package", kind] >= 0.92, (measure, kind)
    for measure in ("auroc", "ap", "f1"):  # what the package's intervals are there for
        assert by_key[measure, "as large", "percentiles", "2-4 positives"] < 0.8
    assert by_key["ap", "as large", "percentiles", "macro"] < 0.9
