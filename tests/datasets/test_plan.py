"""Widths that a plan expects are those that the project's own intervals have."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy import integrate
from scipy.stats import norm

from cxr_cache.cli.main import cli
from cxr_cache.config import PlanConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.describe import plan_test
from cxr_cache.errors import ConfigError, TableError
from cxr_cache.evaluation.figures import estimate
from cxr_cache.evaluation.scored import ScoredImages
from cxr_cache.metrics.intervals import normal_scores_error
from cxr_cache.metrics.planning import (
    expected_half_width,
    expected_macro_half_width,
    studies_for,
)


def simulate(seed: int, auroc: float, n_positive: list[int], n: int) -> ScoredImages:
    """One image a study; normal scores, each finding's by themselves."""
    rng = np.random.default_rng(seed)
    targets = np.zeros((n, len(n_positive)))
    for f, n_present in enumerate(n_positive):
        targets[rng.permutation(n)[:n_present], f] = 1
    scores = rng.normal(size=targets.shape) + np.sqrt(2) * norm.ppf(auroc) * targets
    ids, blank = np.arange(n).astype(str).astype(object), np.full(n, "", object)
    names = tuple(f"finding {f}" for f in range(len(n_positive)))
    return ScoredImages(ids, ids, blank, blank, targets, norm.cdf(scores), names)


@pytest.mark.parametrize("auroc", [0.7, 0.8, 0.9])
def test_widths_are_those_of_simulated_tests(auroc):
    """Mean over simulated tests, of findings by themselves and of the mean over findings."""
    n, n_positive = 400, [12, 40, 150, 8, 25]
    widths = []
    for seed in range(20):
        images = simulate(seed, auroc, n_positive, n)
        found = estimate(images, np.full(len(n_positive), 0.5), n_resamples=100, seed=seed)
        of_each, of_mean = found.intervals["auroc"], found.intervals["macro_auroc"]
        widths.append([*(of_each.high - of_each.low), of_mean.high - of_mean.low])
    simulated = np.mean(widths, axis=0) / 2

    counts = np.array(n_positive, float), n - np.array(n_positive, float)
    planned = expected_half_width(auroc, *counts)
    of_mean, n_counted = expected_macro_half_width(auroc, *counts)

    np.testing.assert_allclose(planned, simulated[:-1], rtol=0.12)
    assert of_mean == pytest.approx(simulated[-1], rel=0.1)
    assert n_counted == len(n_positive)


def test_the_error_is_that_of_the_integrals_of_normal_scores():
    """Hanley and McNeil's formula, with Q1 and Q2 integrated numerically."""
    for auroc, m, n in ((0.6, 10, 300), (0.8, 50, 50), (0.95, 7, 90)):
        d = np.sqrt(2) * norm.ppf(auroc)
        q1, _ = integrate.quad(lambda x, d=d: norm.cdf(x) ** 2 * norm.pdf(x - d), -12, 12)
        q2, _ = integrate.quad(lambda y, d=d: norm.sf(y - d) ** 2 * norm.pdf(y), -12, 12)
        variance = auroc * (1 - auroc) + (m - 1) * (q1 - auroc**2) + (n - 1) * (q2 - auroc**2)
        error = normal_scores_error(np.array(auroc), np.array(m), np.array(n))
        assert error == pytest.approx(np.sqrt(variance / (m * n)), rel=1e-6)


def test_as_many_studies_are_needed_as_make_the_interval_narrow_enough():
    rates = np.array([0.3, 0.02, 0.001])

    def width_at(n):
        return expected_half_width(0.8, n * rates, n * (1 - rates))

    needed = studies_for(0.02, width_at, 3)

    assert (width_at(needed) <= 0.02).all()
    assert (width_at(0.999 * needed - 1) > 0.02).all()
    assert (np.diff(needed) > 0).all(), "the rarer, the more"
    assert np.isinf(studies_for(0.02, lambda n: np.full(len(n), np.nan), 2)).all()


def make_cohort(**columns: object) -> Cohort:
    """200 patients with two studies of one image each; every tenth patient has a mass."""
    patient = np.repeat(np.arange(200), 2)
    images = pd.DataFrame(
        {
            "image_id": [f"{i}.png" for i in range(400)],
            "study_uid": np.arange(400).astype(str),
            "patient_id": patient.astype(str),
            **columns,
        }
    )
    targets = np.stack([patient % 10 == 0, patient < 2, patient >= 200], axis=1).astype(np.float32)
    return Cohort(images, targets, ("Mass", "Cyst", "Never"))


def test_patients_are_counted_and_a_given_split_is_taken_as_it_is():
    plan = plan_test(make_cohort(), PlanConfig(test_fraction=0.25))
    mass, cyst, never = plan.findings
    assert (plan.unit, plan.n_test) == ("patient", 50)
    assert (mass.n_positive, mass.n_negative) == (5, 45)
    expected = expected_half_width(0.8, np.array(5.0), np.array(45.0))
    assert mass.half_width == pytest.approx(float(expected))
    assert (cyst.n_positive, cyst.half_width) == (0.5, None), "one alone shows no spread"
    assert never.n_needed is None
    assert plan.n_in_macro == 1
    assert plan.macro.half_width == pytest.approx(mass.half_width, rel=0.1)

    given = make_cohort(given_split=np.where(np.arange(400) < 120, "test", "train"))
    plan = plan_test(given)
    assert (plan.n_test, plan.findings[0].n_positive) == (60, 6)
    assert "given by the image table" in plan.to_text()


def test_the_command_plans_in_text_and_json_and_refuses_idle_options(tmp_path):
    cohort = make_cohort()
    path = tmp_path / "labels.csv"
    cohort.images.assign(Mass=cohort.targets[:, 0].astype(int)).to_csv(path, index=False)
    run = CliRunner().invoke
    shown = run(cli, ["describe", "--data", str(path), "--plan", "--plan-auroc", "0.9"])
    assert shown.exit_code == 0, shown.output
    assert (
        "Expected intervals at an AUROC of 0.9, on a test of 40 labelled patients" in shown.stdout
    )
    assert "patients for ±0.02" in shown.stdout
    as_json = run(cli, ["describe", "--data", str(path), "--plan", "--json"])
    plan = json.loads(as_json.stdout)["plan"]
    assert plan["findings"][0]["n_positive"] == pytest.approx(4)
    idle = run(cli, ["describe", "--data", str(path), "--plan-width", "0.05"])
    assert idle.exit_code == 2
    assert "--plan-width goes with --plan." in idle.stderr
    wrong = run(cli, ["describe", "--data", str(path), "--plan", "--plan-auroc", "1"])
    assert wrong.exit_code == 1
    assert "--plan-auroc must lie in [0.5, 1), not 1.0." in wrong.stderr


def test_what_cannot_be_planned_is_refused():
    cohort = make_cohort()
    blank = Cohort(cohort.images, np.full((400, 1), np.nan, np.float32), ("Mass",))
    with pytest.raises(TableError, match="No image has a label, so there is no test to plan"):
        plan_test(blank)
    with pytest.raises(ConfigError, match=r"plan_width must lie between 0 and 0\.5, not 0"):
        PlanConfig(plan_width=0.0)
