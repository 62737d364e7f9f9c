"""Two runs on the same studies: one set of resamples for both, and only if the test is the same."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from cxr_cache.compare import compare_runs
from cxr_cache.errors import RunError
from cxr_cache.metrics import bootstrap_weights
from cxr_cache.run import Run
from cxr_cache.train import train_head
from tests.synthetic import QUICK, make_cohort, make_embeddings, make_store

FIGURES = (roc_auc_score, average_precision_score)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    cohort = make_cohort(150, unlabelled=0.1)
    return make_store(tmp_path_factory.mktemp("compare") / "s.h5", cohort)


@pytest.fixture(scope="module")
def runs(store) -> tuple[Run, Run]:
    weak = replace(QUICK, epochs=(1,), learning_rate=1e-6)
    strong = replace(QUICK, epochs=(40,), learning_rate=1e-2)
    return tuple(
        train_head(store, store.parent / name, config).run
        for name, config in (("weak", weak), ("strong", strong))
    )


def scores(run, weights=None):
    """scikit-learn's AUROC and AP on test, finding by finding, NaN labels left out."""
    predictions = run.read_table("predictions")
    predictions = predictions[predictions["split"] == "test"].set_index("image_id")
    targets = run.read_table("targets").set_index("image_id").loc[predictions.index]
    values = []
    for finding in run.config["findings"]:
        labelled = targets[finding].notna().to_numpy()
        y, p = targets[finding][labelled], predictions[finding][labelled]
        w = None if weights is None else weights[labelled]
        present = y if w is None else y[w > 0]
        if present.nunique() == 2:
            values.append([of(y, p, sample_weight=w) for of in FIGURES])
    return np.mean(values, axis=0), predictions["study_uid"].to_numpy(object)


def test_figures_and_intervals_are_those_of_an_independent_loop(runs):
    comparison = compare_runs(*runs, n_resamples=60, seed=3)
    (first, uids), (second, _) = (scores(run) for run in runs)
    weights = bootstrap_weights(uids, 60, 3)
    resampled = np.array([scores(runs[1], w)[0] - scores(runs[0], w)[0] for w in weights])
    for column, difference in enumerate(comparison.by_image):
        assert difference.first == pytest.approx(first[column], abs=1e-6)
        assert difference.second == pytest.approx(second[column], abs=1e-6)
        bounds = np.percentile(resampled[:, column], [2.5, 97.5])
        assert (difference.low, difference.high) == pytest.approx(tuple(bounds), abs=1e-6)


def test_a_clear_difference_is_clear_and_turns_its_sign_with_the_runs(runs):
    forth, back = compare_runs(*runs), compare_runs(*reversed(runs))
    for ours, theirs in zip(
        forth.by_image + forth.by_study, back.by_image + back.by_study, strict=True
    ):
        assert ours.value == pytest.approx(-theirs.value)
        assert (ours.low, ours.high) == pytest.approx((-theirs.high, -theirs.low))
    assert forth.by_image[0].low > 0


def test_a_run_does_not_differ_from_itself(runs, tmp_path):
    copy = Run.open(shutil.copytree(runs[0].path, tmp_path / "copy"))
    for difference in compare_runs(runs[0], copy, n_resamples=20).by_image:
        assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_the_table_names_runs_figures_and_intervals(runs):
    text = compare_runs(*runs, n_resamples=50).to_text()
    assert text.splitlines()[0].endswith("differences with 95% paired intervals over studies")
    assert "weak      strong  difference" in text
    assert "macro AUROC, by study" in text


def test_another_test_split_is_refused_with_the_counts(runs, store, tmp_path):
    other = train_head(store, tmp_path / "other", replace(QUICK, epochs=(1,), seed=7)).run
    with pytest.raises(RunError, match=r"was tested on \d+ images and .* \d+ are the same\. Only"):
        compare_runs(runs[0], other)


def test_other_targets_are_refused(runs, tmp_path):
    cohort = make_cohort(150, unlabelled=0.1)
    path = make_store(tmp_path / "t.h5", cohort, embeddings=make_embeddings(cohort))
    run = train_head(path, tmp_path / "r", replace(QUICK, epochs=(1,))).run
    table = run.read_table("targets")
    finding = run.config["findings"][0]
    table[finding] = 1 - table[finding]
    run.write_table("targets", table)
    with pytest.raises(RunError, match="tested on other targets for the same images"):
        compare_runs(runs[0], run)
