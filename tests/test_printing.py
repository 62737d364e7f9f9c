"""What a notebook shows of a result: ten lines that say what it is, however large it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsRegressor

from cxr_cache.evaluation.audit import Audit, audit_store
from cxr_cache.evaluation.compare import Comparison, compare_runs
from cxr_cache.evaluation.evaluate import evaluate_predictions, score_run
from cxr_cache.evaluation.zero_shot import ZeroShot
from cxr_cache.models.explain import Explanation
from cxr_cache.models.predict import Predictions
from cxr_cache.models.run import Run
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.training.ablate import Ablation
from cxr_cache.training.estimator import GroupedMultilabelSplit
from cxr_cache.training.outcome import TrainResult
from cxr_cache.training.train import fit_run
from tests.synthetic import QUICK, make_cohort, make_store


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> TrainResult:
    folder = tmp_path_factory.mktemp("printing")
    store = make_store(folder / "features.h5", make_cohort(80))
    fit_run(store, folder / "other", replace(QUICK, epochs=(1,)))
    return fit_run(store, folder / "run", replace(QUICK, epochs=(1, 2)))


def show(result: object, n_lines: int = 10) -> str:
    """As a notebook and `print` show it, which is the same."""
    text = repr(result)
    assert str(result) == text
    assert len(text.splitlines()) <= n_lines, text
    assert len(text) < 2000, text
    return text


def test_a_run_says_what_it_is_before_and_after_its_evaluation(trained):
    run = trained.run
    assert f"Run {run.path} (train, finished)" in show(run)
    assert "6 findings: Cardiomegaly, Pleural Effusion, Nodule, Hernia, Mass and" in show(run)
    assert "macro AUROC" not in show(run)
    metrics = score_run(run, n_resamples=0)
    assert f"test images: {metrics['test']['macro_auroc']['value']:.3f}" in show(Run.open(run.path))
    assert f"Run {run.path}" in show(trained)
    assert "Epoch search" in show(trained)


def test_tables_of_a_run_are_frames(trained):
    run = trained.run
    score_run(run, n_resamples=0)
    for name in ("splits", "targets", "predictions", "out_of_fold", "per_finding"):
        frame = getattr(run, name)
        assert isinstance(frame, pd.DataFrame)
        pd.testing.assert_frame_equal(frame, run.read_table(name))
    assert run.metrics == run.read_metrics()


def test_stores_and_cohorts_count_what_they_hold(trained, tmp_path):
    with FeatureStore.open(trained.run.config["store"]["path"]) as store:
        assert "160 images = 160 done + 0 failed + 0 pending" in show(store)
        assert "one row: embeddings (1, 16)" in show(store)
        cohort = store.cohort
    assert "Cohort of 160 images of 80 studies (patients unknown)" in show(cohort)
    one = cohort.take(np.arange(1))
    assert "1 image of 1 study" in show(one)
    show(store)  # closed


def test_evaluations_comparisons_and_audits_show_their_head(trained):
    run = trained.run
    evaluation = evaluate_predictions(run.predictions, run.targets, run.thresholds, n_resamples=20)
    assert "macro AUROC" in show(evaluation)
    comparison = compare_runs(run, Run.open(run.path.parent / "other"), n_resamples=20)
    assert "macro AUROC" in show(comparison)
    many = pd.concat([comparison.table.assign(p_holm=1e-4)] * 30)
    assert "more lines of to_text()" in show(
        Comparison(comparison.runs, 5, 5, "study", many.assign(difference=0.5))
    )
    with FeatureStore.open(run.config["store"]["path"]) as store:
        audit = audit_store(store, run=run)
    assert isinstance(audit, Audit)
    assert "160 images looked at" in show(audit)


def test_results_of_many_rows_are_not_printed_whole():
    n_images, findings = 69_000, tuple(f"finding {k}" for k in range(35))
    predictions = Predictions(
        tuple(f"{k}.png" for k in range(n_images)),
        findings,
        np.full((n_images, 35), 0.25, np.float32),
        np.zeros((n_images, 35), bool),
        ("", "the file is empty (0 bytes)", *[""] * (n_images - 2)),
    )
    text = show(predictions)
    assert "Predictions of 35 findings for 69,000 images (1 could not be used)" in text
    assert "1.png\n    not usable: the file is empty (0 bytes)" in text

    rows = {name: [0.5] * 36 for name in ("zero_shot", "zero_shot_low", "zero_shot_high")}
    table = pd.DataFrame({"finding": [*findings, "macro"], "n_positive": 3, **rows})
    zero_shot = ZeroShot(table, 1, 1, "study", "all labelled images", (), is_of_run=False, notes=())
    assert "1 image of 1 study" in show(zero_shot)

    folds = {name: [0.5] * 40 for name in ("mean_auroc", "std_auroc", "difference", "low", "high")}
    table = pd.DataFrame(
        {"rank": range(40), "setting": "lr=1", "kind": "head", "chosen": "5", **folds}
    )
    assert "more in the table" in show(Ablation(table, ()))

    explanation = Explanation(
        Path("a.png"), "Mass", 0.123, 0.3, np.zeros((14, 14), np.float32),
        np.zeros((2000, 1500), np.uint8), (0, 1500, 2000, 0),
    )  # fmt: skip
    text = show(explanation, n_lines=1)
    assert "Explanation of Mass on a.png: probability 12.3% (threshold 30.0%)" in text
    assert "14 x 14 patches over a picture of 1500 x 2000 pixels" in text


def test_rows_that_failed_are_left_out_of_what_scikit_learn_gets(tmp_path):
    """Rows are picked by `embedded_rows`, as the README's example for GridSearchCV does it."""
    cohort = make_cohort(30)
    shapes = {"embeddings": (1, 4)}
    encoder = {"name": "tiny", "weights_sha256": "3f9c", "is_random": False}
    rng = np.random.default_rng(0)
    with FeatureStore.create(tmp_path / "f.h5", cohort, encoder=encoder, features=shapes) as store:
        rows = np.arange(50)  # 50 to 54 fail, 55 to 59 are still pending
        features = {"embeddings": rng.normal(size=(50, 1, 4)).astype(np.float32)}
        store.commit(rows, features, np.zeros((50, 32), np.uint8))
        store.record_failures(np.arange(50, 55), ["the file is empty (0 bytes)"] * 5)

    with FeatureStore.open(tmp_path / "f.h5") as store:
        rows = store.embedded_rows
        X, cohort = store.embeddings[rows, 0], store.cohort.take(rows)
    search = GridSearchCV(
        KNeighborsRegressor(),
        {"n_neighbors": [1, 5]},
        cv=GroupedMultilabelSplit(n_splits=3, random_state=0),
    ).fit(X, cohort.targets, groups=cohort.groups)
    assert search.n_features_in_ == 4
    assert rows.tolist() == list(range(50))
    assert (X != 0).all()
