"""The head as scikit-learn knows classifiers: its own checks, pipelines, searches, pickles."""

from __future__ import annotations

import pickle
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.inspection import permutation_importance
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    jaccard_score,
    log_loss,
    precision_score,
    roc_auc_score,
)
from sklearn.model_selection import (
    GridSearchCV,
    KFold,
    cross_val_predict,
    cross_val_score,
    cross_validate,
    learning_curve,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from cxr_cache import FocalHeadClassifier, GroupedMultilabelSplit
from cxr_cache.config import TrainConfig
from cxr_cache.datasets.splits import Split
from cxr_cache.errors import ConfigError, TableError
from cxr_cache.store.rows import prepare_embeddings
from cxr_cache.training.fit import HeadTask, PlainRows, fit_heads
from cxr_cache.training.search import final_task
from cxr_cache.training.train import fit_run
from tests.synthetic import FINDINGS, make_cohort, make_embeddings, make_store

COHORT = make_cohort(n_studies=60, unlabelled=0.1)
X = make_embeddings(COHORT)[:, 0]
Y = COHORT.targets
COMPLETE = np.nan_to_num(Y).astype(int)
PLAIN = {"schedule": "constant", "final": "refit"}
"""Without folds, where the number of epochs is given."""
RECIPE = {"learning_rate": 3e-3, "hidden": (12, 8), "epochs": 4, "batch_size": 16, **PLAIN}
SEARCHED = {"epochs": (2, 4), "n_folds": 2, "final": "ensemble", "schedule": "plateau"}

EXPECTED_FAILURES = {
    "check_classifier_multioutput": (
        "The check indexes classes_ with a matrix of decisions, so it wants one array [0, 1] for "
        "all findings. classes_ has a row [0, 1] for each finding: from one array, scorers would "
        "take two findings for the two classes of one (see "
        "test_scorers_do_not_take_two_findings_for_two_classes)."
    ),
}


def make_head(**changes: object) -> FocalHeadClassifier:
    return FocalHeadClassifier(**{**RECIPE, "random_state": 0, **changes})


OF_THE_CHECKS = {
    "epochs": 12,
    "learning_rate": 0.03,
    "hidden": (8,),
    "batch_size": 4,
    "dropout": 0.1,
    "input_norm": "none",
}


@parametrize_with_checks(
    [
        FocalHeadClassifier(**OF_THE_CHECKS, **PLAIN),
        FocalHeadClassifier(**OF_THE_CHECKS, final="ensemble", n_folds=2, n_jobs=1),
    ],
    expected_failed_checks=lambda _: EXPECTED_FAILURES,
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_defaults_are_those_of_train():
    """But for what belongs to test rows, to a store or to a run."""
    defaults, recipe = FocalHeadClassifier().get_params(), asdict(TrainConfig())

    of_rows_that_fit_does_not_see = {
        *("test_fraction", "threshold_rule", "min_positives", "calibration", "baseline"),
        *("level", "protocol", "n_outer_folds"),
    }
    of_a_store = {"split", "split_by", "features", "flip"}
    left_out = {name: recipe.pop(name) for name in of_rows_that_fit_does_not_see | of_a_store}
    assert recipe.pop("seed") == TrainConfig().seed
    assert defaults.pop("random_state") is None
    assert defaults == recipe
    assert left_out.keys() | recipe.keys() | {"seed"} == {f.name for f in fields(TrainConfig)}


def test_an_unknown_parameter_is_refused_by_name():
    with pytest.raises(TypeError, match=r"no parameter 'n_epochs'; its parameters are epochs, "):
        FocalHeadClassifier(n_epochs=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("estimator") / "store.h5", COHORT)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"final": "refit"},
        {"final": "best-fold", "epochs": (4,)},
        {"final": "refit", "epochs": (3,), "schedule": "constant"},  # which needs no folds here
        {"schedule": "cosine", "final": "refit", "epochs": (3,)},
        {"schedule": "one-cycle"},
        {"n_folds": 3, "early_stopping": 1, "patience": 0},
        {"input_norm": "standard", "norm": "layer"},
        {"loss": "class-balanced", "gamma": 1.0, "weight_decay": 0.1, "max_grad_norm": None},
        {"loss": "focal-balanced", "alpha": 0.4, "dropout": 0.0, "hidden": (), "n_jobs": 1},
    ],
    ids=str,
)
def test_fit_is_what_train_does(store, tmp_path, changes):
    """On the training rows of a run, with its studies and its seed: the same predictions."""
    recipe = {**RECIPE, **SEARCHED, **changes}
    result = fit_run(store, tmp_path / "run", TrainConfig(**recipe, seed=5))
    splits = result.run.read_table("splits")
    train, test = (splits["split"] == side for side in ("train", "test"))
    studies = splits["study_uid"].to_numpy()

    head = FocalHeadClassifier(**recipe, random_state=5).fit(X[train], Y[train], studies[train])

    predictions = result.run.read_table("predictions")[list(FINDINGS)].to_numpy()
    np.testing.assert_allclose(head.predict_proba(X[test]), predictions[test], atol=1e-6)
    assert head.epochs_ == result.chosen_epochs
    if head.epoch_search_ is None:
        assert (recipe["final"], len(recipe["epochs"])) == ("refit", 1)
    else:
        pd.testing.assert_frame_equal(head.epoch_search_, result.search)
    assert len(head.heads_) == (recipe["n_folds"] if recipe["final"] == "ensemble" else 1)


def test_fit_without_folds_is_the_training_of_the_package():
    """One head, on all labelled rows, with nothing held out: the same weights, to the bit."""
    unlabelled = Y.copy()
    unlabelled[::7] = np.nan
    head = make_head().fit(X, unlabelled)

    rows = np.flatnonzero(~np.isnan(unlabelled).all(axis=1))
    seed = final_task(Split(np.zeros(2, bool), np.zeros(2, np.int64)), seed=0).seed
    data = PlainRows(prepare_embeddings(X, "l2")[None], unlabelled)
    config = TrainConfig(
        schedule="constant", learning_rate=3e-3, hidden=(12, 8), batch_size=16, final="refit"
    )
    task = HeadTask(rows, np.arange(len(X)), seed)  # scored here, so that there is a reference
    trajectory = fit_heads(data, [task], config, n_epochs=4, n_steps=len(rows) // 16, keep=[4])[0]

    np.testing.assert_allclose(head.predict_proba(X), trajectory.probabilities[4], atol=1e-6)
    losses = [epoch["train_loss"] for epoch in trajectory.history]
    np.testing.assert_array_equal(head.loss_curve_, losses)
    weight = trajectory.weights[4]["weight_0"][0].T.numpy()
    np.testing.assert_array_equal(head.head_[0].weight.detach().numpy(), weight)
    assert head.epoch_search_ is None


def test_an_ensemble_is_the_mean_of_its_heads():
    head = make_head(**SEARCHED).fit(X, Y)
    assert len(head.heads_) == 2
    assert head.loss_curve_.shape == (head.epochs_,)
    with pytest.raises(AttributeError, match="see heads_"):
        _ = head.head_
    prepared = torch.from_numpy(prepare_embeddings(X, "l2"))
    expected = torch.stack([torch.sigmoid(one(prepared)) for one in head.heads_]).mean(dim=0)
    np.testing.assert_allclose(head.predict_proba(X), expected.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(head.predict_log_proba(X), np.log(head.predict_proba(X)))


def test_groups_stay_on_one_side_of_the_folds():
    """Two images per study: leaking ones score better in the search, and that is seen."""
    by_study = make_head(**SEARCHED).fit(X, Y, groups=pd.Series(COHORT.study_uids))
    by_row = make_head(**SEARCHED).fit(X, Y)
    named = make_head(**SEARCHED).fit(X, Y, groups=np.arange(len(X)))
    assert not by_study.epoch_search_.equals(by_row.epoch_search_)
    pd.testing.assert_frame_equal(by_row.epoch_search_, named.epoch_search_)


def test_shapes_and_meaning_of_the_outputs():
    head = make_head().fit(X, Y)

    probabilities, logits, present = (
        head.predict_proba(X),
        head.decision_function(X),
        head.predict(X),
    )

    assert probabilities.shape == logits.shape == present.shape == Y.shape
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)))
    np.testing.assert_array_equal(present, probabilities > 0.5)
    assert [c.tolist() for c in head.classes_] == [[0, 1]] * len(FINDINGS)
    assert head.loss_curve_.shape == (4,)


def test_one_finding_in_a_column_stays_a_column():
    head = make_head().fit(X, Y[:, :1])
    assert head.predict_proba(X).shape == head.predict(X).shape == (len(X), 1)


def test_two_classes_in_one_dimension_may_be_called_anything():
    names = np.where(COMPLETE[:, 0] == 1, "sick", "healthy")
    head = make_head(epochs=8).fit(X, names)

    assert head.classes_.tolist() == ["healthy", "sick"]
    probabilities = head.predict_proba(X)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    np.testing.assert_array_equal(head.predict(X) == "sick", probabilities[:, 1] > 0.5)
    np.testing.assert_array_equal(probabilities[:, 1] > 0.5, head.decision_function(X) > 0)
    assert head.score(X, names) == pytest.approx(roc_auc_score(names, probabilities[:, 1]))
    column = make_head(epochs=8).fit(X, COMPLETE[:, :1])
    np.testing.assert_array_equal(column.predict_proba(X)[:, 0], probabilities[:, 1])


def test_the_score_is_macro_auroc_over_what_is_labelled():
    """A finding without a positive does not count; one with unlabelled rows counts without them."""
    head = make_head().fit(X, Y)
    scored = Y.copy()
    scored[:, 3] = 0

    expected = []
    for f in (0, 1, 2, 4, 5):
        rows = ~np.isnan(Y[:, f])
        expected.append(roc_auc_score(Y[rows, f], head.predict_proba(X)[rows, f]))
    assert head.score(X, scored) == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("n_findings", [1, 2, 3])
def test_scorers_do_not_take_two_findings_for_two_classes(n_findings):
    y, folds = COMPLETE[:, :n_findings], KFold(3)
    scores = cross_val_score(make_head(), X, y, cv=folds, scoring="roc_auc")

    expected = []
    for train, fold in folds.split(X):
        head = make_head().fit(X[train], y[train])
        expected.append(roc_auc_score(y[fold], head.predict_proba(X[fold])))
    np.testing.assert_allclose(scores, expected)


def test_a_pickle_predicts_as_the_original_and_a_clone_is_unfitted():
    head = make_head().fit(X, Y)

    again = pickle.loads(pickle.dumps(head))

    np.testing.assert_array_equal(again.predict_proba(X), head.predict_proba(X))
    assert clone(head).get_params() == head.get_params()
    assert not hasattr(clone(head), "head_")


def test_a_pipeline_is_searched_over_whole_studies():
    """Scaling, a grid, and the project's own folds, in scikit-learn's hands."""
    pipeline = make_pipeline(StandardScaler(), make_head(input_norm="none"))
    folds = GroupedMultilabelSplit(n_splits=3, random_state=0)
    grid = {"focalheadclassifier__learning_rate": [1e-5, 1e-2]}

    search = GridSearchCV(pipeline, grid, cv=folds).fit(X, Y, groups=COHORT.study_uids)

    assert search.best_params_ == {"focalheadclassifier__learning_rate": 1e-2}
    train, held_out = next(iter(folds.split(X, Y, COHORT.study_uids)))
    alone = clone(pipeline).set_params(**search.best_params_).fit(X[train], Y[train])
    assert search.cv_results_["split0_test_score"][1] == alone.score(X[held_out], Y[held_out])


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_standardising_is_that_of_a_scaler_in_front(norm):
    scaled = make_pipeline(StandardScaler(), make_head(input_norm="none", norm=norm))
    head = make_head(input_norm="standard", norm=norm).fit(X, Y)
    expected = scaled.fit(X, Y).predict_proba(X)
    np.testing.assert_allclose(head.predict_proba(X), expected, atol=1e-4)


def test_inputs_of_all_sizes_are_standardised_and_constant_ones_left_alone():
    """Also beside one that is millions of times as large."""
    sizes = np.array([2.0**-10, 1, 2**16] * 6)[: X.shape[1]]  # which change no digit
    others = np.column_stack([np.zeros(len(X)), np.full(len(X), 3.0), np.full(len(X), 1e-4)])
    head = make_head(input_norm="standard").fit(np.column_stack([X * sizes, others]), Y)
    expected = make_head(input_norm="standard").fit(np.column_stack([X, others * 0]), Y)
    np.testing.assert_allclose(
        head.predict_proba(np.column_stack([X * sizes, others])),
        expected.predict_proba(np.column_stack([X, others * 0])),
        atol=1e-4,
    )


@pytest.mark.filterwarnings("error")
def test_the_seed_decides_and_frames_are_as_good_as_arrays():
    probabilities = make_head().fit(X, Y).predict_proba(X)
    frames = pd.DataFrame(X, columns=[f"x{i}" for i in range(X.shape[1])]), pd.DataFrame(Y)

    np.testing.assert_array_equal(make_head().fit(*frames).predict_proba(frames[0]), probabilities)
    assert not np.allclose(make_head(random_state=1).fit(X, Y).predict_proba(X), probabilities)


@pytest.mark.parametrize(
    ("changes", "y", "error", "message"),
    [
        ({"schedule": "fast"}, Y, ConfigError, "schedule is one of plateau"),
        ({"loss": "hinge"}, Y, ConfigError, "loss is one of focal"),
        ({"epochs": 2.5}, Y, ConfigError, "epochs must be a whole number"),
        ({"batch_size": 500}, Y, ConfigError, r"batch_size=500 .* n_samples = 120\. Use a smaller"),
        ({}, np.where(np.isnan(Y), 2, Y), TableError, r"y holds .*2.* in row \d+, column \d"),
        ({}, np.full(len(X), "a"), TableError, "y holds 1 class, 'a'; there must be two"),
        ({}, np.arange(len(X)) % 3, TableError, r"is multiclass\. .* as y of shape \(N, F\)"),
        ({}, Y[:, 0], ValueError, "Input y contains NaN"),
        ({}, X[:, 0], TableError, "Unknown label type: continuous. Give two classes"),
    ],
)
def test_what_cannot_be_learnt_is_refused_in_words(changes, y, error, message):
    with pytest.raises(error, match=message):
        make_head(**changes).fit(X, y)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["a"] * (len(X) - 1) + [None], "no value in row 119, and 1 such rows in all"),
        (np.arange(3), r"groups has shape \(3,\); X has 120 rows"),
        (["a"] * len(X), "2 folds need as many groups"),
    ],
)
def test_groups_that_make_no_folds_are_refused(groups, message):
    with pytest.raises(ConfigError, match=message):
        make_head(**SEARCHED).fit(X, Y, groups=groups)


# -- scikit-learn's own tools -------------------------------------------------------------

FOLDS = GroupedMultilabelSplit(n_splits=3, random_state=0)
STUDIES = COHORT.study_uids


def fold_by_fold(y: np.ndarray, method: str, **changes: object) -> np.ndarray:
    """What cross_val_predict should give."""
    out: np.ndarray | None = None
    for train, held_out in FOLDS.split(X, y, STUDIES):
        found = getattr(make_head(**changes).fit(X[train], y[train]), method)(X[held_out])
        out = np.empty((len(X), *found.shape[1:]), found.dtype) if out is None else out
        out[held_out] = found
    return out


@pytest.mark.parametrize("n_findings", [0, 1, 2, 3, 6])
@pytest.mark.parametrize(
    "method", ["predict", "predict_proba", "predict_log_proba", "decision_function"]
)
def test_cross_val_predict_gives_what_each_fold_says(n_findings, method):
    y = COMPLETE[:, :n_findings] if n_findings else np.where(COMPLETE[:, 0], "sick", "healthy")
    found = cross_val_predict(make_head(), X, y, groups=STUDIES, cv=FOLDS, method=method)
    np.testing.assert_array_equal(found, fold_by_fold(y, method))


def test_unlabelled_findings_and_cross_val_predict():
    """It makes a class of NaN before the head sees it; the message says what keeps it."""
    found = cross_val_predict(make_head(), X, Y, groups=STUDIES, cv=FOLDS)
    np.testing.assert_array_equal(found, fold_by_fold(Y, "predict"))
    with pytest.raises(TableError, match="cross_val_predict makes classes of missing values"):
        cross_val_predict(make_head(), X, Y, groups=STUDIES, cv=FOLDS, method="predict_proba")
    kept = cross_validate(
        *(make_head(), X, Y),
        **{"groups": STUDIES, "cv": FOLDS, "return_estimator": True, "return_indices": True},
    )
    expected = fold_by_fold(Y, "predict_proba")
    for head, held_out in zip(kept["estimator"], kept["indices"]["test"], strict=True):
        np.testing.assert_array_equal(head.predict_proba(X[held_out]), expected[held_out])


@pytest.mark.parametrize("n_findings", [1, 2, 3, 6])
def test_scorers_of_several_findings_are_those_of_its_outputs(n_findings):
    y = COMPLETE[:, :n_findings]
    names = ["roc_auc", "average_precision", "accuracy"]
    if n_findings > 1:  # one column counts as two classes there
        names += ["f1_macro", "f1_micro", "precision_samples", "jaccard_macro", "neg_log_loss"]
    scores = cross_validate(make_head(), X, y, groups=STUDIES, cv=FOLDS, scoring=names)
    head_scores = {name: [] for name in names}
    for train, held_out in FOLDS.split(X, y, STUDIES):
        fitted = make_head().fit(X[train], y[train])
        said, sure = fitted.predict(X[held_out]), fitted.predict_proba(X[held_out])
        expected = {
            "roc_auc": roc_auc_score(y[held_out], sure),
            "average_precision": average_precision_score(y[held_out], sure),
            "accuracy": (said == y[held_out]).all(axis=1).mean(),
        }
        if n_findings > 1:
            expected |= {
                "f1_macro": f1_score(y[held_out], said, average="macro"),
                "f1_micro": f1_score(y[held_out], said, average="micro"),
                "precision_samples": precision_score(y[held_out], said, average="samples"),
                "jaccard_macro": jaccard_score(y[held_out], said, average="macro"),
                "neg_log_loss": -log_loss(y[held_out], sure),
            }
        for name, value in expected.items():
            head_scores[name].append(value)
    for name in names:
        np.testing.assert_allclose(scores[f"test_{name}"], head_scores[name], err_msg=name)


def test_importance_of_inputs_falls_where_they_are_noise():
    """The score takes unlabelled findings; of two inputs, one is what the findings follow."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (200, 2)).astype(float)
    told = np.column_stack([2 * y - 1 + 0.3 * rng.normal(size=(200, 2)), rng.normal(size=(200, 2))])
    y[rng.random(y.shape) < 0.1] = np.nan
    head = make_head(epochs=20, learning_rate=1e-2, input_norm="none").fit(told, y)

    importance = permutation_importance(head, told, y, n_repeats=3, random_state=0)

    assert importance.importances_mean[:2].min() > 0.2
    assert abs(importance.importances_mean[2:]).max() < 0.1


def test_more_rows_teach_more():
    sizes, _, scores = learning_curve(
        *(make_head(epochs=10, batch_size=8), X, Y),
        **{"groups": STUDIES, "cv": FOLDS, "train_sizes": [0.2, 1.0]},
    )
    assert sizes.tolist() == [16, 80]
    assert scores[1].mean() > max(0.5, scores[0].mean())


def test_a_search_over_searches_keeps_groups_where_metadata_is_routed():
    with sklearn.config_context(enable_metadata_routing=True):
        head = make_head(**SEARCHED).set_fit_request(groups=True)
        search = GridSearchCV(head, {"epochs": [(2, 4), 3]}, cv=FOLDS, error_score="raise")
        search.fit(X, Y, groups=STUDIES)
    alone = make_head(**SEARCHED).set_params(**search.best_params_).fit(X, Y, STUDIES)
    np.testing.assert_array_equal(search.predict_proba(X), alone.predict_proba(X))


@pytest.mark.parametrize("missing", [np.nan, pd.NA, None], ids=str)
def test_frames_with_missing_findings_are_arrays_with_nan(missing):
    """Of nullable integers, booleans, floats and objects."""
    x = pd.DataFrame(X, columns=[f"x{i}" for i in range(X.shape[1])])
    expected = make_head().fit(X, Y)
    findings = pd.DataFrame(np.where(np.isnan(Y), missing, Y), columns=FINDINGS, dtype=object)
    for dtype in ("object", "Int64", "boolean", "Float64"):
        y = findings.astype(dtype)
        head = make_head().fit(x, y)
        np.testing.assert_array_equal(head.predict_proba(x), expected.predict_proba(X))
        assert head.score(x, y) == expected.score(X, Y)
    scores = cross_val_score(make_head(), x, findings, groups=STUDIES, cv=FOLDS)
    as_arrays = cross_val_score(make_head(), X, Y, groups=STUDIES, cv=FOLDS)
    np.testing.assert_array_equal(scores, as_arrays)
    x.iloc[3, 2] = np.nan
    with pytest.raises(ValueError, match="Input X contains NaN"):
        make_head().fit(x, findings)
