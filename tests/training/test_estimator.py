"""The head as scikit-learn knows classifiers: its own checks, pipelines, searches, pickles."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.estimator_checks import parametrize_with_checks

from cxr_cache import FocalHeadClassifier, GroupedMultilabelSplit
from cxr_cache.config import TrainConfig
from cxr_cache.errors import ConfigError, TableError
from cxr_cache.store.rows import TrainingData, prepare_embeddings
from cxr_cache.training.fit import HeadTask, fit_heads
from tests.synthetic import FINDINGS, make_cohort, make_embeddings

COHORT = make_cohort(n_studies=60, unlabelled=0.1)
X = make_embeddings(COHORT)[:, 0]
Y = COHORT.targets
COMPLETE = np.nan_to_num(Y).astype(int)
RECIPE = {"learning_rate": 3e-3, "hidden": (12, 8), "n_epochs": 4, "batch_size": 16}

EXPECTED_FAILURES = {
    "check_classifier_multioutput": (
        "The check indexes classes_ with a matrix of decisions, so it wants one array [0, 1] for "
        "all findings. classes_ is a list of F such arrays, as forests have it: from one array, "
        "scorers would take two findings for the two classes of one (see "
        "test_scorers_do_not_take_two_findings_for_two_classes)."
    ),
}


def make_head(**changes: object) -> FocalHeadClassifier:
    return FocalHeadClassifier(**{**RECIPE, "random_state": 0, **changes})


@parametrize_with_checks(
    [
        FocalHeadClassifier(
            n_epochs=8,
            learning_rate=0.03,
            hidden=(8,),
            batch_size=8,
            dropout=0.1,
            input_norm="none",
        )
    ],
    expected_failed_checks=lambda _: EXPECTED_FAILURES,
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_defaults_are_the_tuned_recipe():
    tuned, defaults = TrainConfig.of_recipe("tuned"), FocalHeadClassifier().get_params()

    assert {name: getattr(tuned, name) for name in defaults if hasattr(tuned, name)} == {
        name: value for name, value in defaults.items() if hasattr(tuned, name)
    } | {"schedule": "plateau"}  # which needs rows to be held out
    assert defaults["n_epochs"] in tuned.epochs


def test_fit_is_the_training_of_the_package():
    """One head, on all labelled rows, with nothing held out: the same weights, to the bit."""
    unlabelled = Y.copy()
    unlabelled[::7] = np.nan
    head = make_head().fit(X, unlabelled)

    seed = int(check_random_state(0).randint(np.iinfo(np.int32).max))
    rows = np.flatnonzero(~np.isnan(unlabelled).all(axis=1))
    cohort = replace(COHORT, targets=unlabelled)
    data = TrainingData(prepare_embeddings(X, "l2")[None], cohort)
    config = TrainConfig(schedule="constant", learning_rate=3e-3, hidden=(12, 8))
    task = HeadTask(rows, np.arange(len(X)), seed)  # scored here, so that there is a reference
    trajectory = fit_heads(data, [task], config, n_epochs=4, n_steps=len(rows) // 16, keep=[4])[0]

    np.testing.assert_allclose(head.predict_proba(X), trajectory.probabilities[4], atol=1e-6)
    losses = [epoch["train_loss"] for epoch in trajectory.history]
    np.testing.assert_array_equal(head.loss_curve_, losses)
    weight = trajectory.weights[4]["weight_0"][0].T.numpy()
    np.testing.assert_array_equal(head.head_[0].weight.detach().numpy(), weight)


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
    head = make_head(n_epochs=8).fit(X, names)

    assert head.classes_.tolist() == ["healthy", "sick"]
    probabilities = head.predict_proba(X)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    np.testing.assert_array_equal(head.predict(X) == "sick", probabilities[:, 1] > 0.5)
    np.testing.assert_array_equal(probabilities[:, 1] > 0.5, head.decision_function(X) > 0)
    assert head.score(X, names) == pytest.approx(roc_auc_score(names, probabilities[:, 1]))
    column = make_head(n_epochs=8).fit(X, COMPLETE[:, :1])
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
        ({"schedule": "plateau"}, Y, ConfigError, "fit holds nothing out. Use 'constant'"),
        ({"loss": "hinge"}, Y, ConfigError, "loss is one of focal"),
        ({"n_epochs": 2.5}, Y, ConfigError, "epochs must be a whole number"),
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
