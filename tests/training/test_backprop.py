"""Gradients written out by hand are the ones autograd finds."""

from __future__ import annotations

import pytest
import torch

from cxr_cache.models.heads import HeadBank
from cxr_cache.training.steps.backprop import Backprop, draw_dropout

D, N_FINDINGS = 8, 5


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_pair(n_heads: int, **options) -> tuple[HeadBank, HeadBank]:
    """Two banks alike in everything, biases and luck included."""
    banks = [HeadBank(n_heads, D, N_FINDINGS, **options) for _ in range(2)]
    for bank in banks:
        with torch.no_grad():
            bank.flat += 0.1 * draw(1, *bank.flat.shape)
        bank.train()
    return banks[0], banks[1]


@pytest.mark.parametrize("n_heads", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("hidden", [(12, 6), (7,), ()])
@pytest.mark.parametrize("batch_size", [16, 5])
def test_a_step_is_autograds_step(n_heads, dropout, hidden, batch_size):
    """Logits, every gradient and the running statistics, over steps with the same dropout."""
    ours, theirs = make_pair(n_heads, hidden=hidden, dropout=dropout)
    backprop = Backprop(ours)
    n_steps = 3

    for step, keep in enumerate(draw_dropout(ours, n_steps, batch_size)):
        x, y = draw(step, n_heads, batch_size, D), draw(9, n_heads, batch_size, N_FINDINGS)
        expected = theirs(x)
        theirs.backward((expected - y).square().mean(dim=(1, 2)))
        logits = torch.empty_like(y)
        backprop.forward(x, keep, out=logits)
        backprop.backward(2 * (logits - y) / y[0].numel())

        torch.testing.assert_close(logits, expected.detach())
        torch.testing.assert_close(ours.flat_grad, theirs.flat_grad)
        with torch.no_grad():
            for bank in (ours, theirs):
                bank.flat -= 0.1 * bank.flat_grad
    others = theirs.state_dict()
    for name, mine in ours.state_dict().items():
        torch.testing.assert_close(mine, others[name], msg=name)


def test_dropout_drops_its_share_and_keeps_the_mean():
    bank = HeadBank(2, D, N_FINDINGS, hidden=(100, 60), dropout=0.3)

    factors = torch.cat([layer.flatten() for layer in next(draw_dropout(bank, 1, 512))])

    assert set(factors.unique().tolist()) == {0.0, 1 / 0.7}
    n = len(factors)
    assert (factors == 0).double().mean() == pytest.approx(0.3, abs=4 * (0.21 / n) ** 0.5)


def test_dropout_does_not_depend_on_how_many_steps_are_drawn_at_once():
    banks = make_pair(2, hidden=(12, 7), dropout=0.5)

    at_once = list(draw_dropout(banks[0], 4, 5))
    one_by_one = [next(draw_dropout(banks[1], 1, 5)) for _ in range(4)]

    for ours, theirs in zip(at_once, one_by_one, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)
