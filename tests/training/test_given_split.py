"""A given split from the store to the run, its tables and its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cxr_cache.config import TrainConfig
from cxr_cache.datasets.cohort import Cohort, Reading
from cxr_cache.errors import RunError
from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.models.run import Run
from cxr_cache.report.model_card import render_card
from cxr_cache.report.page import render_page
from cxr_cache.report.views import read_view
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import find_labelled_rows
from cxr_cache.training.ablate import make_settings, run_ablation
from cxr_cache.training.frozen_start import config_from_run, load_starts
from cxr_cache.training.train import fit_run
from tests.synthetic import QUICK, make_cohort, make_store

QUICKER = replace(QUICK, epochs=(1, 2), n_folds=2)
WHOSE = "the official lists of <Nowhere>"


def give_split(shared: int = 0) -> tuple[Cohort, np.ndarray]:
    """A cohort of which the last 15 studies are test, and some of them have an image in train."""
    cohort = make_cohort(60)
    words = np.array(["train"] * 80 + ["val"] * 10 + ["test"] * 30, object)
    words[90 : 90 + 2 * shared : 2] = "train"
    return replace(cohort.assign(given_split=words), reading=Reading("table", split=WHOSE)), words


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("given") / "store.h5", give_split()[0])


@pytest.fixture(scope="module")
def run(store) -> Run:
    run = fit_run(store, store.parent / "run", QUICKER).run
    score_run(run, n_resamples=20)
    return run


def texts(run: Run) -> tuple[str, str]:
    """Page and card, without the pictures on disk."""
    view = read_view(run)
    return render_page([view]), render_card(view)


def test_a_given_split_goes_from_the_store_to_the_tables(run):
    words = give_split()[1]
    splits = run.splits
    np.testing.assert_array_equal((splits["split"] == "test").to_numpy(), words == "test")
    assert splits["given_split"].tolist() == words.tolist()
    assert set(splits["fold"].dropna()) == {1, 2}
    by_study = splits[splits["split"] == "train"].groupby("study_uid")["fold"]
    assert (by_study.nunique() == 1).all()
    config = json.loads((run.path / "config.json").read_text())
    assert config["split"] == {"whose": WHOSE, "n_shared": 0, "unit": "study"}
    assert run.read_metrics()["split"] == config["split"]
    assert config["warnings"] == [
        "10 images marked val are trained on: folds inside train and val take the part of val."
    ]


def test_page_card_and_terminal_say_whose_split_it_is(run, store, tmp_path):
    page, card = texts(run)
    said = "the official lists of &lt;Nowhere&gt;. No study is on both sides of it."
    assert said in page
    assert "Split as given by" in card
    assert "no study is on both sides." in card
    assert "balanced between the parts" not in page
    result = fit_run(store, tmp_path / "again", QUICKER)
    assert f"\nSplit as given by {WHOSE}\n" in result.to_text()


def test_studies_on_both_sides_stand_on_page_and_card(tmp_path):
    cohort, words = give_split(shared=4)
    result = fit_run(make_store(tmp_path / "s.h5", cohort), tmp_path / "run", QUICKER)
    score_run(result.run, n_resamples=20)
    warning = (
        f"4 studies are on both sides of the given split, with 4 of {(words == 'test').sum()} test "
        "images: 45, 46, 47 and 1 more."
    )
    assert warning in result.to_text()
    for text in texts(result.run):
        assert "4 studies are on both sides" in text
        assert warning in text


def test_a_new_split_is_made_where_asked_for(store, tmp_path):
    run = fit_run(store, tmp_path / "run", replace(QUICKER, split="new")).run
    plain = make_store(tmp_path / "plain.h5", make_cohort(60))
    expected = fit_run(plain, tmp_path / "plain", QUICKER).run
    assert run.splits.equals(expected.splits)
    assert run.config["split"]["whose"] == expected.config["split"]["whose"] == ""
    assert run.config["warnings"] == []


def test_an_ablation_uses_and_describes_the_given_split(store, tmp_path):
    settings = make_settings(QUICKER, [])
    ablation = run_ablation(store, tmp_path / "out", settings, baselines=(), n_workers=1)
    assert "10 images marked val are trained on" in ablation.to_text()


def test_a_fine_tuning_takes_the_split_of_its_start(store, run):
    config = config_from_run(run)
    assert config.split == "given"
    with FeatureStore.open(store) as features:
        found = find_labelled_rows(features)
        [start] = load_starts(run, found, features, config)
        assert start.split.whose == WHOSE
        np.testing.assert_array_equal(start.split.is_test, give_split()[1] == "test")
        with pytest.raises(RunError, match="split: 'given' in the run, 'new' now"):
            load_starts(run, found, features, config_from_run(run, split="new"))


def test_a_run_of_an_earlier_version_had_a_split_of_its_own(run):
    """It did not look at given ones."""
    older = {k: v for k, v in run.config["train"].items() if k != "split"}
    earlier = Run(run.path, {**run.config, "train": older})
    assert config_from_run(earlier).split == "new"
    assert TrainConfig().split == "given"
