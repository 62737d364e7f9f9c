"""Several trainings of a recipe: one split, all kept, and their spread in every interval."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cxr_cache.evaluation.compare import compare_runs, tabulate_differences
from cxr_cache.evaluation.evaluate import format_summary, score_run
from cxr_cache.models.run import Run
from cxr_cache.training.train import fit_run
from tests.synthetic import QUICK, make_cohort, make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("repeats") / "s.h5", make_cohort(150))


@pytest.fixture(scope="module")
def runs(store) -> list[Run]:
    quick = replace(QUICK, epochs=(2,))
    return [
        fit_run(store, store.parent / name, config, n_repeats=3).run
        for name, config in (("a", quick), ("b", replace(quick, learning_rate=1e-3)))
    ]


def test_the_first_training_is_the_runs_and_the_split_is_that_of_one(runs, store, tmp_path):
    once = fit_run(store, tmp_path / "once", replace(QUICK, epochs=(2,))).run

    table = runs[0].read_table("repeats")

    assert runs[0].config["n_repeats"] == 3
    assert not once.has_table("repeats")
    pd.testing.assert_frame_equal(once.splits, runs[0].splits)
    pd.testing.assert_frame_equal(once.predictions, runs[0].predictions)
    tested = once.predictions.query("split == 'test'").drop(columns="split")
    parts = [part.drop(columns="repeat") for _, part in table.groupby("repeat")]
    assert len(parts) == 3
    pd.testing.assert_frame_equal(
        parts[0].reset_index(drop=True), tested[parts[0].columns].reset_index(drop=True)
    )
    finding = once.config["findings"][0]
    assert (parts[0][finding].to_numpy() != parts[1][finding].to_numpy()).any()


def test_recipes_are_compared_where_both_were_trained_several_times(runs, store, tmp_path):
    once = fit_run(store, tmp_path / "once", replace(QUICK, epochs=(2,))).run

    recipes = compare_runs(*runs, n_resamples=20)
    models = compare_runs(runs[0], once, n_resamples=20)

    assert recipes.notes[0].startswith("This compares recipes: figures are means over 3 and 3 ")
    assert models.notes[0].startswith("This compares trained models, not recipes")
    assert models.macro("once")["difference"] == 0  # the first training is the run's own


def test_runs_that_only_the_machine_tells_apart_are_said_to_be(runs, tmp_path):
    path = shutil.copytree(runs[0].path, tmp_path / "elsewhere")
    config = json.loads((path / "config.json").read_text())
    config["machine"] |= {"instructions": "AVX2", "processor": "Z80"}
    config["versions"]["torch"] = "1.13"
    config["train"] |= {"n_jobs": 7}
    (path / "config.json").write_text(json.dumps(config))
    machine, versions = runs[0].config["machine"], runs[0].config["versions"]

    other_machine = compare_runs(Run.open(runs[0].path), Run.open(path), n_resamples=20)
    other_recipe = compare_runs(Run.open(path), runs[1], n_resamples=20)

    assert other_machine.notes[-1].startswith(
        "elsewhere has the recipe and the seed of a, and was trained on another machine: torch "
        f"{versions['torch']} and 1.13, processor {machine['processor']} and Z80, instructions "
        f"{machine['instructions']} and AVX2. Numbers are rounded otherwise there"
    )
    assert len(other_recipe.notes) == 1


def test_the_evaluation_gives_the_recipe_and_the_spread_of_its_trainings(runs):
    metrics = score_run(runs[0], n_resamples=50)

    recipe = metrics["recipe"]["macro_auroc"]
    assert recipe["low"] < recipe["value"] < recipe["high"]
    assert recipe["std"] > 0
    assert "as the mean of 3 trainings, which spread by" in format_summary(metrics)


def test_without_an_error_over_studies_the_test_is_welchs():
    """Against SciPy: the resamples say nothing, so only the trainings' spread is left."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.7, 0.01, (5, 2)), rng.normal(0.71, 0.03, (8, 2))

    table = tabulate_differences(first, second, np.zeros((9, 2)), np.array([40.0, 50.0]))

    welch = stats.ttest_ind(second, first, equal_var=False)
    np.testing.assert_allclose(table["p"][:2], welch.pvalue)
    np.testing.assert_allclose(table["low"][:2], welch.confidence_interval().low)
    of_macro = stats.ttest_ind(second.mean(axis=1), first.mean(axis=1), equal_var=False)
    np.testing.assert_allclose(table["p"].iloc[-1], of_macro.pvalue)


def test_variances_over_studies_and_trainings_add_up():
    rng = np.random.default_rng(1)
    resampled = rng.normal(0, 0.02, (4000, 1))
    first, second = rng.normal(0.7, 0.01, (2, 4, 1))

    one = tabulate_differences(first.mean(axis=0), second.mean(axis=0), resampled, np.array([1e6]))
    all_of_them = tabulate_differences(first, second, resampled, np.array([1e6]))

    of_training = (first.var(ddof=1) + second.var(ddof=1)) / 4
    of_studies = ((one["high"] - one["low"]) / 2 / stats.norm.ppf(0.975)) ** 2
    total = of_studies + of_training
    pieces = [first.var(ddof=1) / 4, second.var(ddof=1) / 4]
    freedom = total**2 / (sum(piece**2 for piece in pieces) / 3)
    reach = stats.t.ppf(0.975, freedom) * np.sqrt(total)
    np.testing.assert_allclose((all_of_them["high"] - all_of_them["low"]) / 2, reach, rtol=1e-4)
