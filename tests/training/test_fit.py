"""Heads trained side by side are heads trained alone, and alone they are plain PyTorch."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from cxr_cache.config import TrainConfig
from cxr_cache.errors import ConfigError, TrainingError
from cxr_cache.models.heads import HeadBank
from cxr_cache.store.rows import TrainingData, prepare_embeddings
from cxr_cache.training.fit import (
    HeadFit,
    HeadTask,
    Trajectory,
    can_share_a_bank,
    count_steps,
    fit_heads,
)
from tests.synthetic import FINDINGS, QUICK, WIDTH, make_data

N_EPOCHS = 6


@pytest.fixture
def in_float64():
    """What is equal by algebra is then equal to 1e-9, and no rounding can be the excuse.

    Plain PyTorch could not be met in float32: there, the biases before a batch norm wander, for
    AdamW scales the rounding noise of their gradients, which ought to be zero, up to full steps.
    """
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_tasks(n_rows: int, sizes: tuple[int, ...] = (70, 53, 61)) -> list[HeadTask]:
    """Heads with different rows, different numbers of them, and different seeds."""
    tasks = []
    for h, size in enumerate(sizes):
        rows = np.random.default_rng(h).permutation(n_rows)
        tasks.append(HeadTask(np.sort(rows[:size]), np.sort(rows[size : 2 * size - 40]), 10 + h))
    return tasks


def in_double(data: TrainingData) -> TrainingData:
    cohort = replace(data.cohort, targets=data.cohort.targets.astype(np.float64))
    return replace(data, embeddings=data.embeddings.astype(np.float64), cohort=cohort)


def fit(data, tasks, config=QUICK, n_epochs=N_EPOCHS, **options) -> list[Trajectory]:
    """Train with the number of steps that suits the smallest of three folds."""
    options = {"keep": range(1, n_epochs + 1), "n_steps": 3, **options}
    return fit_heads(data, tasks, config, n_epochs=n_epochs, **options)


def curves(trajectory: Trajectory, *columns: str) -> np.ndarray:
    """History without the time it took, ``(epochs, columns)``."""
    columns = columns or ("epoch", "lr", "train_loss", "val_loss", "val_auroc")
    return np.array([[row[column] for column in columns] for row in trajectory.history])


def assert_same(ours: Trajectory, theirs: Trajectory, **tolerance: float) -> None:
    """Equal history, kept probabilities and weights."""
    np.testing.assert_allclose(curves(ours), curves(theirs), **tolerance)
    assert ours.probabilities.keys() == theirs.probabilities.keys() == ours.weights.keys()
    for epoch, probabilities in ours.probabilities.items():
        np.testing.assert_allclose(probabilities, theirs.probabilities[epoch], **tolerance)
        for name, weights in ours.weights[epoch].items():
            expected = theirs.weights[epoch][name]
            np.testing.assert_allclose(weights, expected, **tolerance, err_msg=name)


# --- Together and alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
@pytest.mark.parametrize("loss", ["focal", "weighted-bce"])
def test_heads_trained_together_equal_heads_trained_alone(in_float64, schedule, loss):
    """The whole point of the head bank: training side by side changes nothing.

    Rows, numbers of rows, seeds, dropout, plateaus and early stops are each head's own.
    """
    data = in_double(make_data(unlabelled=0.1))
    tasks = make_tasks(len(data.cohort))
    config = replace(QUICK, schedule=schedule, loss=loss, patience=0, early_stopping=3)

    together = fit(data, tasks, config, n_epochs=12)
    alone = [fit(data, [task], config, n_epochs=12)[0] for task in tasks]

    for ours, theirs in zip(together, alone, strict=True):
        assert_same(ours, theirs, rtol=1e-9, atol=1e-9)
    stops = {len(trajectory.history) for trajectory in together}
    assert len(stops) > 1, "all heads stopped at once; the test shows too little"
    assert not np.allclose(*(t.history[0]["train_loss"] for t in together[:2]))


@pytest.mark.parametrize("rate", [2e-5, 3e-3])
def test_together_and_alone_agree_to_a_millionth_in_float32(rate):
    """As it is used; the biases before a batch norm once made it a thousandth."""
    data = make_data()
    tasks = make_tasks(len(data.cohort))
    config = replace(QUICK, learning_rate=rate)

    together = fit(data, tasks, config)
    alone = [fit(data, [task], config)[0] for task in tasks]

    for ours, theirs in zip(together, alone, strict=True):
        assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_order_of_the_heads_does_not_matter(in_float64):
    data = in_double(make_data())
    tasks = make_tasks(len(data.cohort))

    forwards, backwards = fit(data, tasks), fit(data, tasks[::-1])

    for ours, theirs in zip(forwards, backwards[::-1], strict=True):
        assert_same(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_same_call_gives_the_same_bits():
    data = make_data()
    tasks = make_tasks(len(data.cohort))

    first, again = fit(data, tasks), fit(data, tasks)
    other = fit(data, [replace(task, seed=task.seed + 1) for task in tasks])

    for ours, theirs, others in zip(first, again, other, strict=True):
        assert_same(ours, theirs, rtol=0, atol=0)
        assert not np.allclose(curves(ours, "train_loss"), curves(others, "train_loss"))


def test_heads_with_different_recipes_may_share_a_bank(in_float64):
    """Rate, decay, schedule, stopping and loss are each head's own."""
    data = in_double(make_data(unlabelled=0.1))
    tasks = make_tasks(len(data.cohort))
    configs = [
        replace(QUICK, learning_rate=0.02, schedule="cosine"),
        replace(QUICK, weight_decay=0.3, loss="weighted-bce", early_stopping=2),
        replace(QUICK, loss="focal-balanced", gamma=1.0, patience=0),
    ]
    options = {"n_epochs": 8, "n_steps": 3, "keep": [3, 8]}

    bank = HeadFit(data, tasks, configs, **options)
    bank.run()

    for ours, task, config in zip(bank.trajectories, tasks, configs, strict=True):
        assert_same(ours, fit_heads(data, [task], config, **options)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"learning_rate": 1.0, "weight_decay": 1.0, "alpha": 0.9}, True),
        ({"loss": "bce"}, True),
        ({"loss": "asymmetric"}, False),
        ({"batch_size": 4}, False),
        ({"hidden": (3,)}, False),
        ({"norm": "layer"}, False),
        ({"dropout": 0.1}, False),
    ],
)
def test_what_decides_shapes_must_be_shared(change, allowed):
    assert can_share_a_bank([QUICK, replace(QUICK, **change)]) == allowed


@pytest.mark.parametrize("change", [{}, {"norm": "layer"}, {"schedule": "one-cycle"}])
def test_a_fit_that_stops_moves_and_goes_on_gives_the_same_bits(change):
    """As heads do that take turns on the cores: through a pickle, after every second epoch."""
    data = make_data(n_views=2)
    tasks = make_tasks(len(data.cohort))
    config = replace(QUICK, patience=0, early_stopping=3, **change)
    options = {"n_epochs": 7, "n_steps": 3, "keep": [1, 5, 7]}
    whole = fit_heads(data, tasks, config, **options)

    fit = HeadFit(data, tasks, [config] * 3, **options)
    while not fit.has_ended:
        fit.run(fit.epoch + 2)
        state = pickle.loads(pickle.dumps(fit.state_dict()))
        fit = HeadFit(data, tasks, [config] * 3, **options)
        fit.load_state_dict(state)

    for ours, theirs in zip(fit.trajectories, whole, strict=True):
        assert_same(ours, theirs, rtol=0, atol=0)


def test_standardised_inputs_are_those_of_the_training_rows(in_float64):
    """The same as standardising by hand; what is kept reads the embeddings as they are."""
    data = in_double(make_data())
    task = make_tasks(len(data.cohort))[0]
    config = replace(QUICK, input_norm="standard", learning_rate=0.01)
    inputs = 3 + 5 * data.embeddings * np.arange(1, WIDTH + 1)
    inputs[..., 1] = 7.0  # never varies
    mean, std = inputs[0, task.train_rows].mean(axis=0), inputs[0, task.train_rows].std(axis=0)
    by_hand = (inputs - mean) / np.where(std > 1e-6 * std.max(), std, 1.0)

    ours = fit(replace(data, embeddings=inputs), [task], config)[0]
    expected = fit(replace(data, embeddings=by_hand), [task], replace(config, input_norm="none"))[0]

    np.testing.assert_allclose(curves(ours), curves(expected), rtol=1e-8)
    kept = HeadBank.from_snapshot(ours.weights[N_EPOCHS])
    logits = kept(torch.from_numpy(inputs[0, task.held_out_rows]))[0]
    np.testing.assert_allclose(
        logits.sigmoid().detach(), ours.probabilities[N_EPOCHS], rtol=1e-8, atol=1e-10
    )


# --- Equal to plain PyTorch -----------------------------------------------------------------------


def reference_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The focal loss as the reference's code writes it, over labelled entries."""
    labelled = ~targets.isnan()
    logits, targets = logits[labelled], targets[labelled].to(logits.dtype)
    bce = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_t = torch.exp(-bce)
    return (0.25 * (1 - p_t) ** 2 * bce).mean()


def train_plainly(data: TrainingData, task: HeadTask, config: TrainConfig, n_steps: int):
    """One nn.Sequential, AdamW, clip_grad_norm_ and ReduceLROnPlateau: the loop of a tutorial."""
    x, y = torch.from_numpy(data.embeddings), torch.from_numpy(data.cohort.targets)
    held_out = torch.from_numpy(task.held_out_rows)
    options = {
        "hidden": config.hidden,
        "dropout": 0.0,
        "seeds": [task.seed],
        "norm": config.norm,
    }
    model = HeadBank(1, WIDTH, len(FINDINGS), **options).as_sequential(0)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=config.patience
    )
    generator = torch.Generator().manual_seed(task.seed + 1)
    history, probabilities = [], []
    for epoch in range(1, N_EPOCHS + 1):
        rate = optimizer.param_groups[0]["lr"]
        order = torch.from_numpy(task.train_rows)[
            torch.randperm(len(task.train_rows), generator=generator)
        ][: n_steps * config.batch_size]
        views = torch.randint(len(x), (len(order),), generator=generator)
        losses = []
        model.train()
        for rows, of in zip(
            order.split(config.batch_size), views.split(config.batch_size), strict=True
        ):
            loss = reference_loss(model(x[of, rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            logits = model(x[0, held_out])
        val_loss = reference_loss(logits, y[held_out]).item()
        scheduler.step(val_loss)
        probabilities.append(logits.sigmoid().numpy())
        auroc = score_macro_auroc(y[held_out].numpy(), probabilities[-1])
        history.append([epoch, rate, np.mean(losses), val_loss, auroc])
    return np.array(history), probabilities, model


def score_macro_auroc(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """scikit-learn's, finding by finding, over those that have both classes."""
    scores = []
    for t, p in zip(targets.T, probabilities.T, strict=True):
        labelled = ~np.isnan(t)
        if len(np.unique(t[labelled])) == 2:
            scores.append(roc_auc_score(t[labelled], p[labelled]))
    return float(np.mean(scores))


@pytest.mark.parametrize(("n_views", "norm"), [(1, "batch"), (2, "batch"), (1, "layer")])
def test_training_equals_a_plain_pytorch_loop(in_float64, n_views, norm):
    """On the same order of rows and views: the bank, its optimiser and scoring add nothing."""
    data = in_double(make_data(n_views=n_views, unlabelled=0.1))
    tasks = make_tasks(len(data.cohort))
    config = replace(
        QUICK, dropout=0.0, patience=0, max_grad_norm=0.05, learning_rate=0.1, norm=norm
    )

    trajectories = fit(data, tasks, config)

    for task, trajectory in zip(tasks, trajectories, strict=True):
        history, probabilities, model = train_plainly(data, task, config, n_steps=3)
        np.testing.assert_allclose(curves(trajectory), history, rtol=1e-8)
        for epoch, expected in enumerate(probabilities, start=1):
            np.testing.assert_allclose(trajectory.probabilities[epoch], expected, rtol=1e-8)
        final = HeadBank.from_snapshot(trajectory.weights[N_EPOCHS]).as_sequential(0).state_dict()
        for name, expected in model.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(final[name], expected, rtol=1e-6, atol=1e-8, msg=name)
    assert any(t.history[-1]["lr"] < config.learning_rate for t in trajectories), "no plateau met"


def test_training_learns():
    """Held-out AUROC far above chance, where there is a signal; at chance where there is none."""
    data = make_data(n_studies=150)
    shuffled = np.random.default_rng(0).permutation(len(data.cohort))
    noise = replace(data, cohort=replace(data.cohort, targets=data.cohort.targets[shuffled]))
    rows = np.arange(len(data.cohort))
    task = HeadTask(rows[:200], rows[200:], 0)

    config = replace(QUICK, learning_rate=0.03, dropout=0.2)

    learnt, chance = (fit(d, [task], config, n_epochs=10, n_steps=12)[0] for d in (data, noise))

    assert learnt.history[-1]["val_auroc"] > 0.75
    assert 0.35 < chance.history[-1]["val_auroc"] < 0.65


def test_a_task_without_held_out_rows_is_trained_and_not_scored():
    data = make_data()
    task = HeadTask(np.arange(64), np.empty(0, np.int64), 0)

    trajectory = fit(data, [task], replace(QUICK, schedule="constant"), n_steps=4)[0]

    assert np.isfinite(curves(trajectory, "train_loss")).all()
    assert np.isnan(curves(trajectory, "val_loss", "val_auroc")).all()
    assert trajectory.probabilities[N_EPOCHS].shape == (0, len(FINDINGS))


def test_learning_rates_can_be_given_epoch_by_epoch():
    """They take the schedule's place, and mean the same steps."""
    data = make_data()
    tasks = make_tasks(len(data.cohort))[:1]
    config = replace(QUICK, patience=0)

    scheduled = fit(data, tasks, config)[0]
    rates = curves(scheduled, "lr")[:, 0].tolist()
    replayed = fit(data, tasks, replace(config, learning_rate=1.0), learning_rates=rates)[0]

    assert len(set(rates)) > 1
    assert_same(replayed, scheduled, rtol=0, atol=0)


# --- What is kept, and when a head stops ----------------------------------------------------------


def test_only_the_epochs_asked_for_are_kept():
    data = make_data()

    trajectory = fit(data, make_tasks(len(data.cohort))[:1], keep=(2, 5))[0]

    assert set(trajectory.probabilities) == set(trajectory.weights) == {2, 5}
    bank = HeadBank.from_snapshot(trajectory.weights[2])
    held_out = make_tasks(len(data.cohort))[0].held_out_rows
    probabilities = bank(torch.from_numpy(data.embeddings[0, held_out]))[0].sigmoid()
    np.testing.assert_allclose(trajectory.probabilities[2], probabilities.detach(), atol=1e-6)


def test_a_head_that_stopped_counts_as_it_was_when_it_stopped():
    """The history ends there, and what later epochs keep is what the stop left."""
    data = make_data()
    tasks = make_tasks(len(data.cohort))
    config = replace(QUICK, schedule="constant", learning_rate=0.03)
    n_epochs, patience = 60, 2

    whole = fit(data, tasks, config, n_epochs)
    stopping = fit(data, tasks, replace(config, early_stopping=patience), n_epochs)

    stops = []
    for full, short in zip(whole, stopping, strict=True):
        losses = curves(full, "val_loss")[:, 0]
        best = next(e for e in range(n_epochs) if (losses[e : e + patience + 1] >= losses[e]).all())
        stop = best + patience + 1  # counted from 1
        stops.append(stop)
        np.testing.assert_array_equal(curves(short), curves(full)[:stop])
        for epoch in range(1, n_epochs + 1):
            expected = min(epoch, stop)
            np.testing.assert_array_equal(short.probabilities[epoch], full.probabilities[expected])
            for name, weights in short.weights[epoch].items():
                assert torch.equal(weights, full.weights[expected][name]), name
        assert short.auroc_after(n_epochs) == full.history[stop - 1]["val_auroc"]
    assert len(set(stops)) > 1, "all heads stopped at once; the test shows too little"
    assert max(stops) < n_epochs


# --- What cannot work -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "n_steps"), [(1e30, 3), (1e39, 1)], ids=["in an epoch", "in its last step"]
)
@pytest.mark.parametrize("n_held_out", [0, 20])
def test_a_diverging_training_is_an_error_and_no_result(rate, n_steps, n_held_out):
    data = make_data()
    task = HeadTask(np.arange(48), np.arange(60, 60 + n_held_out), 0)
    config = replace(QUICK, learning_rate=rate, schedule="constant")

    with pytest.raises(TrainingError, match=r"no longer finite in epoch 1\. Use a smaller --lr"):
        fit(data, [task], config, n_steps=n_steps, n_epochs=1)


def test_a_fold_smaller_than_a_batch_is_refused():
    tasks = [HeadTask(np.arange(n), np.arange(3), 0) for n in (40, 15)]

    assert count_steps(tasks, 15) == 1
    message = r"15 images to train on, fewer than the batch size 16\. .*ablate: --set batch_size="
    with pytest.raises(ConfigError, match=message):
        count_steps(tasks, 16)


@pytest.mark.parametrize("input_norm", ["l2", "standard"])
def test_rows_that_do_not_fill_an_epoch_are_gone_through_several_times(in_float64, input_norm):
    """As if they were listed so often, also where they are fewer than a batch."""
    data, rows, held_out = in_double(make_data()), np.arange(8), np.arange(40, 60)
    config = replace(QUICK, batch_size=12, input_norm=input_norm)
    (once,), (often,) = (
        fit(data, [HeadTask(listed, held_out, 3)], config, n_steps=2)
        for listed in (rows, np.tile(rows, 3))
    )
    assert_same(once, often, rtol=1e-9)


@pytest.mark.parametrize("fails", [False, True])
def test_torchs_number_of_threads_is_given_back(fails):
    """Training takes one thread; the caller's setting survives it, and an error as well."""
    data = make_data()
    task = HeadTask(np.arange(48), np.arange(60, 80), 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        if fails:
            with pytest.raises(TrainingError):
                fit(data, [task], replace(QUICK, learning_rate=1e30), n_epochs=1)
        else:
            fit(data, [task], n_epochs=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- Embeddings and options -----------------------------------------------------------------------


def test_prepared_embeddings_have_length_one():
    raw = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32) * 100
    raw[1, 3] = 0
    before = raw.copy()

    prepared = prepare_embeddings(raw, "l2")

    assert prepared.dtype == np.float32
    np.testing.assert_array_equal(raw, before, err_msg="the caller's array was changed")
    lengths = np.linalg.norm(prepared, axis=-1)
    assert lengths[1, 3] == 0, "nothing has no direction"
    np.testing.assert_allclose(np.delete(lengths.ravel(), 8), 1, rtol=1e-6)
    np.testing.assert_array_equal(prepare_embeddings(raw, "none"), raw)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"epochs": ()}, "epochs must be 1 or more"),
        ({"epochs": (0, 5)}, "epochs must be 1 or more"),
        ({"n_folds": 1}, "n_folds must be 2 or more"),
        ({"test_fraction": 1.0}, "test_fraction must lie between 0 and 1"),
        ({"split_by": "patient"}, "split_by is one of study, image"),
        ({"final": "last"}, "final is one of refit, ensemble, best-fold"),
        ({"seed": -1}, "seed must not be negative"),
        ({"batch_size": 1}, "batch_size must be 2 or more, not 1: batch norm"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive and finite"),
        ({"epochs": (2.5,)}, "epochs must be a whole number"),
        ({"batch_size": 10.0}, "batch_size must be a whole number"),
        ({"hidden": (10.0,)}, "hidden must be a whole number"),
        ({"early_stopping": 2.5}, "early_stopping must be a whole number"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more, and finite"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"schedule": "step"}, "schedule is one of plateau"),
        ({"patience": -1}, "patience must not be negative"),
        ({"early_stopping": 0}, "early_stopping must be 1 or more"),
        ({"loss": "hinge"}, "loss is one of focal"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
        ({"gamma": -0.1}, "gamma must be 0 or more, and finite"),
        ({"hidden": (64, 0)}, "hidden must be 1 or more"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"input_norm": "l1"}, "input_norm is one of l2, standard, none"),
        ({"gamma": -1, "n_folds": 0}, "n_folds .*; gamma"),
    ],
)
def test_options_out_of_range_are_named(option, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**option)


def test_options_survive_the_run_folder():
    """They are written to config.json and can be built again from it."""
    config = TrainConfig(epochs=(50, 30, 50), hidden=(64,), max_grad_norm=None)

    assert config.epochs == (30, 50)
    assert TrainConfig(**json.loads(json.dumps(asdict(config)))) == config
