"""Compiled steps are the steps that torch computes."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from cxr_cache.models.heads import HeadBank
from cxr_cache.training import fit as fit_module
from cxr_cache.training import fit_on_cores as fit_on_cores_module
from cxr_cache.training.fit import HeadFit, HeadTask, PlainRows, can_compile, count_steps
from cxr_cache.training.fit_on_cores import fit_on_cores
from cxr_cache.training.losses import WeightedFocal
from cxr_cache.training.steps.backprop import Backprop, draw_dropout
from cxr_cache.training.steps.optim import BankOptimizer
from tests.synthetic import QUICK

pytest.importorskip("numba", reason="the extra `fast` is not installed")
from cxr_cache.training.steps.compiled import CompiledSteps

D, F = 8, 5


def draw_rows(n: int, width: int = D) -> PlainRows:
    rng = np.random.default_rng(3)
    targets = (rng.random((n, F)) < 0.3).astype(np.float32)
    targets[rng.random((n, F)) < 0.1] = np.nan
    return PlainRows(rng.standard_normal((1, n, width)).astype(np.float32), targets)


@pytest.mark.parametrize("hidden", [(12, 6), (7,), ()])
@pytest.mark.parametrize(
    ("dropout", "batch_size", "gamma", "max_grad_norm"),
    [(0.0, 16, 2.0, 1.0), (0.3, 5, 0.0, None), (0.5, 80, 1.5, 0.001)],
)
def test_steps_are_those_of_torch(hidden, dropout, batch_size, gamma, max_grad_norm):
    """Logits, gradients, moments, running statistics and weights, with the same dropout."""
    n_steps = 4
    data = draw_rows(n_steps * batch_size)
    x = torch.from_numpy(data.embeddings[0]).view(n_steps, batch_size, D)
    y = torch.from_numpy(data.targets).view(n_steps, batch_size, F)
    loss = WeightedFocal(gamma, torch.linspace(0.1, 2, F), 0.4)
    banks = [HeadBank(1, D, F, hidden=hidden, dropout=dropout).train() for _ in range(2)]
    optimizers = [
        BankOptimizer(bank, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=max_grad_norm)
        for bank in banks
    ]
    logits = torch.empty(2, n_steps, batch_size, F)

    ours, theirs = banks
    steps = CompiledSteps(ours, optimizers[0], loss)
    for part in (slice(0, 3), slice(3, 4)):  # moments and luck go on from one call to the next
        steps.take(x[part], y[part], logits[0, part])
    backprop = Backprop(theirs)
    for step, keep in enumerate(draw_dropout(theirs, n_steps, batch_size)):
        backprop.forward(x[step][None], keep, out=logits[1, step][None])
        gradient = loss.gradient(logits[1, step], *loss.prepare(y[step]))
        backprop.backward(gradient[None])
        optimizers[1].step()

    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    for one, other in zip(optimizers[0].moments, optimizers[1].moments, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)
    assert optimizers[0].n_steps == optimizers[1].n_steps == [n_steps]
    others = theirs.state_dict()
    for name, mine in ours.state_dict().items():
        torch.testing.assert_close(mine, others[name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.fixture
def always(monkeypatch):
    """However little there is to do."""
    monkeypatch.setattr(fit_module, "_WORTH_COMPILING", 0.0)


def make_fit(data: PlainRows, **change) -> HeadFit:
    rows = np.arange(len(data.targets))
    config = replace(QUICK, **change)
    return HeadFit(data, [HeadTask(rows[12:], rows[:12], 1)], [config], n_epochs=4, keep=[2, 4])


def test_a_fit_is_that_of_torch(always, monkeypatch):
    data = draw_rows(60)
    ours = make_fit(data)
    ours.run()
    monkeypatch.setattr(fit_module, "_WORTH_COMPILING", math.inf)
    theirs = make_fit(data)
    theirs.run()

    assert ours._compiled is not None
    assert theirs._compiled is None
    histories = (fit.trajectories[0].history for fit in (ours, theirs))
    for mine, other in zip(*histories, strict=True):
        for name in ("train_loss", "val_loss"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4)


def test_a_fit_that_stops_moves_and_goes_on_gives_the_same_bits(always):
    data = draw_rows(60)
    whole = make_fit(data)
    whole.run()
    part = make_fit(data)
    part.run(2)
    state = pickle.loads(pickle.dumps(part.state_dict()))
    again = make_fit(data)
    again.load_state_dict(state)
    again.run()

    for name, weights in whole.trajectories[0].weights[4].items():
        assert torch.equal(weights, again.trajectories[0].weights[4][name])


def test_what_is_no_longer_finite_is_said(always):
    data = draw_rows(60)
    data.embeddings[0, 30, 3] = np.nan

    with pytest.raises(fit_module.TrainingError, match="no longer finite in epoch 1"):
        make_fit(data).run()


def test_one_core_gives_what_two_give(always, monkeypatch):
    """Steps compiled for one head at a time, whatever the number of cores."""
    monkeypatch.setattr(fit_on_cores_module, "_WORTH_PROCESSES", 0.0)
    data = draw_rows(60)
    rows = np.arange(60)
    tasks = [HeadTask(rows[rows % 2 != k], rows[rows % 2 == k], k) for k in range(2)]
    config = replace(QUICK, n_jobs=1)
    one = fit_on_cores(data, tasks, config, n_epochs=3, keep=[3])

    for trajectory, task in zip(one, tasks, strict=True):
        n_steps = count_steps(tasks, config.batch_size)
        alone = HeadFit(data, [task], [config], n_epochs=3, keep=[3], n_steps=n_steps)
        alone.run()
        (expected,) = alone.trajectories
        assert np.array_equal(trajectory.probabilities[3], expected.probabilities[3])


@pytest.mark.parametrize(
    ("change", "n_heads", "device", "can"),
    [
        ({}, 1, "cpu", True),
        ({"loss": "class-balanced"}, 1, "cpu", True),
        ({}, 2, "cpu", False),
        ({}, 1, "cuda", False),
        ({"norm": "layer"}, 1, "cpu", False),
        ({"loss": "asymmetric"}, 1, "cpu", False),
    ],
)
def test_what_can_be_compiled(change, n_heads, device, can):
    assert can_compile(replace(QUICK, **change), n_heads, torch.device(device)) == can


def test_without_numba_torch_takes_the_steps(always, monkeypatch):
    monkeypatch.setattr(fit_module, "_has_numba", lambda: False)
    fit = make_fit(draw_rows(60))
    fit.run()

    assert fit._compiled is None
    assert len(fit.trajectories[0].history) == 4


@pytest.mark.slow
def test_compiled_steps_are_faster(monkeypatch):
    """By 1.48 on the processor where docs/performance.md was measured; in turns, the best of 3."""
    data = draw_rows(1600, width=512)
    config = replace(QUICK, hidden=(512, 256), batch_size=16, patience=0)
    rows = np.arange(1600)
    seconds: dict[float, list[float]] = {0.0: [], math.inf: []}
    for _ in range(4):
        for worth, of in seconds.items():
            monkeypatch.setattr(fit_module, "_WORTH_COMPILING", worth)
            fit = HeadFit(data, [HeadTask(rows, rows[:0], 0)], [config], n_epochs=3, keep=[])
            started = time.perf_counter()
            fit.run()
            of.append(time.perf_counter() - started)

    assert min(seconds[math.inf]) > 1.2 * min(seconds[0.0])


def test_a_numba_that_cannot_be_imported_is_named_and_left_out(tmp_path, monkeypatch, caplog):
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less.')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba")
    fit_module._has_numba.cache_clear()
    assert not can_compile(QUICK, 1, torch.device("cpu"))
    assert "without compiled steps: Numba needs NumPy 2.3 or less." in caplog.text
    fit_module._has_numba.cache_clear()


def test_a_process_that_begins_with_compiled_steps_keeps_to_one_thread():
    """Numba loads the BLAS of its products late, which must not be after threads were limited."""
    code = (
        "import cxr_cache.training.steps.compiled; from threadpoolctl import threadpool_info; "
        "print([found['filepath'] for found in threadpool_info()])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "scipy" in done.stdout


def test_nearly_everything_can_be_dropped(always):
    make_fit(draw_rows(60), dropout=0.999999).run()
