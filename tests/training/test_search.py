"""The search table says what separate runs would, and test rows have no part in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import gmean

from cxr_cache.config import SelectBy
from cxr_cache.datasets.splits import Split, make_split
from cxr_cache.errors import ConfigError, TrainingError
from cxr_cache.metrics.scores import auroc, macro_mean
from cxr_cache.models.heads import HeadBank, predict_probabilities
from cxr_cache.store.rows import TrainingData
from cxr_cache.training import fit_on_cores as fit_on_cores_module
from cxr_cache.training import search as search_module
from cxr_cache.training.fit import HeadTask, fit_heads
from cxr_cache.training.search import (
    EpochSearch,
    Weighing,
    choose_candidate,
    require_trainable_folds,
    score_fold,
    search_epochs,
    train_final,
    weigh_findings,
)
from tests.synthetic import QUICK, make_data

FOLDS = [f"fold_{k + 1}" for k in range(QUICK.n_folds)]


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return make_data(unlabelled=0.1)


def split_of(data: TrainingData, **options) -> Split:
    cohort = data.cohort
    return make_split(
        cohort.targets, cohort.groups, cohort.findings, **{"n_folds": QUICK.n_folds, **options}
    )


@pytest.fixture(scope="module")
def split(data) -> Split:
    return split_of(data)


def final_probabilities(data: TrainingData, bank: HeadBank) -> np.ndarray:
    """Of every head by itself, (H, N, F)."""
    x = torch.from_numpy(data.embeddings[0])
    heads = [HeadBank.from_snapshot(bank.snapshot([h])) for h in range(bank.n_heads)]
    return np.stack([predict_probabilities(head, x).numpy() for head in heads])


# --- The table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["plateau", "constant", "cosine", "one-cycle"])
def test_every_row_equals_a_run_of_that_many_epochs(data, split, schedule):
    """Read off one trajectory where the schedule allows it, trained by itself where not: exact."""
    config = replace(QUICK, schedule=schedule, patience=0, learning_rate=0.03)

    table = search_epochs(data, split, config).table

    assert table.columns.tolist() == ["epochs", "mean_auroc", "std_auroc", *FOLDS]
    assert table["epochs"].tolist() == list(config.epochs)
    for i, epochs in enumerate(config.epochs):
        alone = search_epochs(data, split, replace(config, epochs=(epochs,))).table
        pd.testing.assert_frame_equal(table[i : i + 1].reset_index(drop=True), alone, rtol=0)


def test_a_schedule_with_a_horizon_is_not_read_off_a_longer_trajectory(data, split):
    """With cosine, epoch 2 of 6 is not the end of 2."""
    config = replace(QUICK, schedule="cosine", learning_rate=0.03)

    trajectories = search_epochs(data, split, config).trajectories

    assert [len(trajectories[e][0].history) for e in config.epochs] == list(config.epochs)
    long, short = trajectories[6][0], trajectories[2][0]
    assert long.history[0]["lr"] == short.history[0]["lr"]
    assert long.history[1]["lr"] > short.history[1]["lr"]


def test_scores_are_those_of_the_held_out_rows(data, split):
    """Each fold's AUROC belongs to the probabilities that are kept as out-of-fold predictions."""
    search = search_epochs(data, split, QUICK)

    for _, row in search.table.iterrows():
        epochs = int(row["epochs"])
        scores = []
        for k, trajectory in enumerate(search.trajectories[epochs]):
            targets = data.cohort.targets[split.held_out(k)]
            scores.append(float(macro_mean(auroc(targets, trajectory.probabilities[epochs]))))
        np.testing.assert_array_equal(row[FOLDS], scores)
        assert row["mean_auroc"] == pytest.approx(np.mean(scores), rel=1e-12)
        assert row["std_auroc"] == pytest.approx(np.std(scores, ddof=1), rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_chosen_candidate_has_the_best_mean(data, split, seed):
    search = search_epochs(data, split, replace(QUICK, seed=seed, learning_rate=0.03))

    assert search.chosen == search.table.set_index("epochs")["mean_auroc"].idxmax()


def make_counted(counts: Sequence[int], n_studies: int = 90):
    """Targets with so many positive studies of two images each, their studies, and a split."""
    study = np.repeat(np.arange(n_studies), 2)
    fold = np.where(study % 5 == 4, -1, study % 4)
    targets = np.zeros((len(study), len(counts)), np.float32)
    train = np.unique(study[fold >= 0])
    for f, n in enumerate(counts):
        targets[np.isin(study, train[:n]), f] = 1
    return targets, study, Split(fold == -1, fold)


def test_findings_weigh_what_is_known_of_them():
    """By positive and negative training studies, never by images."""
    targets, studies, split = make_counted([9, 10, 30, 63, 0])  # of 72 training studies

    plain, learnable, weighted = (
        weigh_findings(targets, studies, split, of) for of in get_args(SelectBy)
    )

    assert (plain.weights == 1).all()
    assert learnable.weights.tolist() == [0, 1, 1, 0, 0]
    assert "2 of 5 findings" in learnable.measure
    expected = [1 / (1 / n + 1 / (72 - n)) for n in (9, 10, 30, 63)]
    np.testing.assert_allclose(weighted.weights, [*expected, 0])
    by_image = weigh_findings(targets, None, split, "learnable")
    assert by_image.weights.tolist() == [1, 1, 1, 1, 0]


def test_where_nothing_can_be_learnt_all_findings_count():
    targets, studies, split = make_counted([5, 9])

    assert weigh_findings(targets, studies, split, "learnable").weights.tolist() == [1, 1]


def test_a_finding_without_weight_decides_nothing(data, split):
    scores = np.random.default_rng(0).random(data.targets.shape)
    weighing = Weighing(np.array([1, 0, 2, 0, 0, 0.0]), "")
    rows = split.held_out(0)

    found = score_fold(data.targets[rows], scores[rows], weighing)

    areas = auroc(data.targets[rows], scores[rows])
    assert found == pytest.approx((areas[0] + 2 * areas[2]) / 3)


def test_the_smallest_within_one_standard_error_of_the_best():
    scores = np.array([[0.60, 0.62, 0.61], [0.70, 0.71, 0.73], [0.71, 0.73, 0.72], [0.7, 0.7, 0.7]])

    assert choose_candidate(scores) == 2
    assert (
        choose_candidate(scores, within_one_se=True) == 1
    )  # 0.0067 behind, with an error of 0.0088
    apart = scores + np.array([[0], [-0.02], [0], [0]])
    assert choose_candidate(apart, within_one_se=True) == 2
    assert choose_candidate(scores[:, :1], within_one_se=True) == 2  # one fold shows no error


def test_of_equal_candidates_the_smallest_is_chosen(data, split):
    """Once every fold has stopped early, more epochs are the same model."""
    config = replace(
        QUICK, epochs=(1, 40, 50, 60), early_stopping=1, learning_rate=0.03, schedule="constant"
    )

    search = search_epochs(data, split, config)

    assert max(len(trajectory.history) for trajectory in search.trajectories[60]) < 40
    late = search.table[search.table["epochs"] >= 40]
    assert late[["mean_auroc", "std_auroc", *FOLDS]].drop_duplicates().shape[0] == 1
    assert search.chosen == 40


def test_processes_give_what_one_process_gives(data, split, monkeypatch):
    """To 1e-5, for a bank of three multiplies in another order than three banks of one."""
    one = search_epochs(data, split, QUICK)
    calls = []
    monkeypatch.setattr(fit_on_cores_module, "_WORTH_PROCESSES", 0)

    several = search_epochs(
        data, split, replace(QUICK, n_jobs=2), on_progress=lambda *call: calls.append(call)
    )

    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (18, 18), "three folds of six epochs"
    assert several.chosen == one.chosen
    pd.testing.assert_frame_equal(several.table, one.table, rtol=1e-5)
    for ours, theirs in zip(several.trajectories[6], one.trajectories[6], strict=True):
        for epoch in QUICK.epochs:
            np.testing.assert_allclose(
                ours.probabilities[epoch], theirs.probabilities[epoch], atol=1e-5
            )
            for name, weights in ours.weights[epoch].items():
                torch.testing.assert_close(
                    weights, theirs.weights[epoch][name], rtol=1e-5, atol=1e-5, msg=name
                )
    with pytest.raises(TrainingError, match="no longer finite"):  # from a process, as it is
        search_epochs(data, split, replace(QUICK, n_jobs=2, learning_rate=1e30))


def test_progress_counts_epochs_over_all_horizons(data, split):
    calls = []

    search_epochs(
        data,
        split,
        replace(QUICK, schedule="cosine"),
        on_progress=lambda *call: calls.append(call),
    )

    n_epochs = QUICK.n_folds * sum(QUICK.epochs)
    assert calls[-1] == (n_epochs, n_epochs)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


# --- What the test rows may not do ----------------------------------------------------------------


@pytest.mark.parametrize("final", ["refit", "ensemble", "best-fold"])
@pytest.mark.parametrize("loss", ["focal", "weighted-bce"])
def test_test_rows_could_hold_anything(data, split, final, loss):
    """With NaN for their embeddings and other targets, search and final model stay the same."""
    config = replace(QUICK, final=final, loss=loss)
    embeddings, targets = data.embeddings.copy(), data.cohort.targets.copy()
    embeddings[:, split.is_test] = np.nan
    targets[split.is_test] = 1 - targets[split.is_test]
    poisoned = replace(data, embeddings=embeddings, cohort=replace(data.cohort, targets=targets))

    results = []
    for rows in (data, poisoned):
        search = search_epochs(rows, split, config)
        bank, _ = train_final(rows, split, search, config)
        results.append((search.table, bank.snapshot()))

    (clean_table, clean), (poisoned_table, other) = results
    pd.testing.assert_frame_equal(clean_table, poisoned_table, rtol=0)
    for name, tensor in clean.items():
        assert torch.equal(tensor, other[name]), name


# --- The final model ------------------------------------------------------------------------------


def test_a_refit_replays_the_folds_mean_rates_on_all_rows(data, split):
    """Geometric, because rates are halved: 8e-4 and 2e-4 meet at 4e-4."""
    config = replace(QUICK, final="refit", patience=0, learning_rate=0.1, epochs=(8,))
    search = search_epochs(data, split, config)

    bank, history = train_final(data, split, search, config)

    rates = np.array([[row["lr"] for row in t.history] for t in search.trajectories[8]])
    assert len(np.unique(rates[:, -1])) > 1, "the folds never differed; the test shows too little"
    np.testing.assert_allclose([row["lr"] for row in history], gmean(rates, axis=0), rtol=1e-12)
    rows = np.flatnonzero(~split.is_test)
    task = HeadTask(rows, np.empty(0, np.int64), search_module._head_seed(config.seed, -1))
    expected = fit_heads(
        data,
        [task],
        config,
        n_epochs=8,
        n_steps=len(rows) // config.batch_size,
        keep=[8],
        learning_rates=[row["lr"] for row in history],
    )[0]
    for name, tensor in bank.snapshot().items():
        assert torch.equal(tensor, expected.weights[8][name]), name


def test_a_refit_stops_after_the_mean_of_the_folds_stops(data, split):
    config = replace(
        QUICK,
        final="refit",
        early_stopping=1,
        learning_rate=0.03,
        schedule="constant",
        epochs=(60,),
    )
    search = search_epochs(data, split, config)
    stops = [len(trajectory.history) for trajectory in search.trajectories[60]]

    _, history = train_final(data, split, search, config)

    assert len(set(stops)) > 1
    assert len(history) == round(np.mean(stops))


def test_an_ensemble_is_the_folds_own_models(data, split):
    """Every member gives on its held-out rows what the search scored there."""
    search = search_epochs(data, split, QUICK)

    bank, history = train_final(data, split, search, replace(QUICK, final="ensemble"))

    assert (bank.n_heads, history) == (QUICK.n_folds, [])
    probabilities = final_probabilities(data, bank)
    for k, trajectory in enumerate(search.trajectories[search.chosen]):
        np.testing.assert_allclose(
            probabilities[k, split.held_out(k)], trajectory.probabilities[search.chosen], atol=1e-6
        )


def test_the_best_fold_is_the_one_with_the_best_score(data, split):
    best_folds = set()
    for seed in range(3):
        config = replace(QUICK, final="best-fold", seed=seed)
        search = search_epochs(data, split, config)
        best = search.table.set_index("epochs").loc[search.chosen, FOLDS].to_numpy().argmax()

        bank, history = train_final(data, split, search, config)

        assert (bank.n_heads, history) == (1, [])
        expected = search.trajectories[search.chosen][best].weights[search.chosen]
        for name, tensor in bank.snapshot().items():
            assert torch.equal(tensor, expected[name]), name
        best_folds.add(best)
    assert len(best_folds) > 1, "the same fold was always best; the test shows too little"


def test_every_fold_and_the_final_model_have_their_own_seed():
    seeds = [search_module._head_seed(seed, fold) for seed in range(20) for fold in range(-1, 10)]

    assert len(set(seeds)) == len(seeds)


# --- What cannot be searched ----------------------------------------------------------------------


def refuse_to_train(*_, **__):
    raise AssertionError("the error should come before any training")


def test_a_fold_in_which_nothing_can_be_scored_is_named_before_training(data, split, monkeypatch):
    monkeypatch.setattr(search_module, "fit_on_cores", refuse_to_train)
    targets = data.cohort.targets.copy()
    targets[split.held_out(1)] = 0
    unscorable = replace(data, cohort=replace(data.cohort, targets=targets))

    with pytest.raises(TrainingError, match=r"images of fold 2, no finding .* Use fewer --folds"):
        search_epochs(unscorable, split, QUICK)


def test_a_batch_larger_than_a_fold_is_named_before_training(data, split, monkeypatch):
    monkeypatch.setattr(search_module, "fit_on_cores", refuse_to_train)
    fewest = min(len(split.trained_on(k)) for k in range(split.n_folds))

    require_trainable_folds(data.cohort.targets, split, replace(QUICK, batch_size=fewest))
    with pytest.raises(ConfigError, match=f"{fewest} images .* batch size {fewest + 1}"):
        search_epochs(data, split, replace(QUICK, batch_size=fewest + 1))


def test_a_search_is_told_apart_by_its_seed(data, split):
    searches: list[EpochSearch] = [
        search_epochs(data, split, replace(QUICK, seed=seed)) for seed in (1, 1, 2)
    ]

    pd.testing.assert_frame_equal(searches[0].table, searches[1].table, rtol=0)
    assert not searches[0].table.equals(searches[2].table)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_every_epoch_is_told_of_once_and_by_name(caplog, monkeypatch, n_jobs):
    """To any handler of the logger, whether folds train in this process or in others."""
    if n_jobs > 1:
        monkeypatch.setattr(fit_on_cores_module, "_WORTH_PROCESSES", 0.0)
    data, config = make_data(40), replace(QUICK, epochs=(2, 3), n_folds=2, n_jobs=n_jobs)
    split = split_of(data, n_folds=2)
    with caplog.at_level("DEBUG", logger="cxr_cache.training.epochs"):
        search = search_epochs(data, split, config)
        _, history = train_final(data, split, search, config)

    told: dict[str, list] = {}
    for record in caplog.records:
        if record.name == "cxr_cache.training.epochs":
            told.setdefault(record.training, []).append(record.row)
    folds = search.trajectories[3]
    assert told == {
        "fold 1 of 2": folds[0].history,
        "fold 2 of 2": folds[1].history,
        "final model": history,
    }
