"""One optimiser and schedule per head, each equal to torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from cxr_cache.config import HORIZON_SCHEDULES, SCHEDULES
from cxr_cache.models.heads import HeadBank
from cxr_cache.training.steps.optim import BankOptimizer, clip_per_head

D, N_FINDINGS, B = 8, 5, 16
PEAK = 0.01

TORCH_SCHEDULERS = {
    "plateau": lambda o, n: lr_scheduler.ReduceLROnPlateau(o, mode="min", factor=0.5, patience=3),
    "constant": lambda o, n: lr_scheduler.ConstantLR(o, factor=1.0),
    "cosine": lambda o, n: lr_scheduler.CosineAnnealingLR(o, T_max=n),
    "one-cycle": lambda o, n: lr_scheduler.OneCycleLR(
        o, max_lr=PEAK, total_steps=n + 1, cycle_momentum=False
    ),
}


@pytest.fixture
def in_float64():
    """A bias before a batch norm has no gradient but noise, which AdamW scales up to full steps.

    In float64 its noise of 1e-16 is far below AdamW's eps of 1e-8, so that it stays where it is.
    """
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_bank(n_heads: int) -> HeadBank:
    return HeadBank(n_heads, D, N_FINDINGS, hidden=(12, 6), dropout=0.0, seeds=range(n_heads))


def draw_batch(step: int, n_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(n_heads, B, D, generator=generator)
    return x, 3 * torch.randn(n_heads, B, N_FINDINGS, generator=generator)


def validation_loss(h: int, epoch: int) -> float:
    """Better for some epochs, then not any more; of each head at another time."""
    return 1 / min(epoch + 1, 2 + 3 * h)


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_heads_step_as_torch_steps_them_alone(in_float64, schedule, max_grad_norm):
    """50 steps of AdamW, clip_grad_norm_ and a schedule, on three heads and on three models."""
    n_heads, n_epochs, steps_per_epoch = 3, 10, 5
    bank = make_bank(n_heads)
    ours = BankOptimizer(
        bank,
        learning_rate=PEAK,
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
        schedule=schedule,
        n_epochs=n_epochs,
    )
    models = [bank.as_sequential(h) for h in range(n_heads)]
    theirs = [torch.optim.AdamW(m.parameters(), lr=PEAK, weight_decay=0.1) for m in models]
    schedulers = [TORCH_SCHEDULERS[schedule](optimizer, n_epochs) for optimizer in theirs]

    for epoch in range(n_epochs):
        assert ours.rates_by_head == [o.param_groups[0]["lr"] for o in theirs], f"epoch {epoch}"
        for step in range(steps_per_epoch):
            x, y = draw_batch(epoch * steps_per_epoch + step, n_heads)
            bank.backward((bank(x) - y).square().mean(dim=(1, 2)))
            ours.step()
            for h, (model, optimizer) in enumerate(zip(models, theirs, strict=True)):
                optimizer.zero_grad()
                (model(x[h]) - y[h]).square().mean().backward()
                if max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
                optimizer.step()
        losses = [validation_loss(h, epoch) for h in range(n_heads)]
        ours.end_epoch(torch.tensor(losses))
        for scheduler, loss in zip(schedulers, losses, strict=True):
            scheduler.step(*[loss] if schedule == "plateau" else [])

    for h, model in enumerate(models):
        for ours_, theirs_ in zip(
            bank.as_sequential(h).parameters(), model.parameters(), strict=True
        ):
            torch.testing.assert_close(ours_, theirs_, rtol=1e-7, atol=1e-7)


def test_plateaus_of_heads_are_their_own():
    """The head whose loss stalls first is the first, and for a while the only one, to slow down."""
    optimizer = BankOptimizer(make_bank(3), learning_rate=PEAK, weight_decay=0.0, patience=3)

    rates = []
    for epoch in range(8):
        optimizer.end_epoch(torch.tensor([validation_loss(h, epoch) for h in range(3)]))
        rates.append(optimizer.rates_by_head)

    halved_after = [next((e for e in range(8) if rates[e][h] < PEAK), None) for h in range(3)]
    assert halved_after == [5, None, None]
    assert rates[-1] == [PEAK / 2, PEAK, PEAK]


def test_clipping_is_per_head_and_not_over_all():
    """A head with a large gradient must not slow its neighbour down."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(2, 1000, generator=generator) * torch.tensor([[1e-3], [1e3]])
    expected = []
    for row in gradient:
        parameter = nn.Parameter(torch.zeros(1000))
        parameter.grad = row.clone()
        nn.utils.clip_grad_norm_([parameter], 1.0)
        expected.append(parameter.grad)

    clipped = gradient.clone()
    clip_per_head(clipped, 1.0)

    torch.testing.assert_close(clipped, torch.stack(expected))
    assert torch.equal(clipped[0], gradient[0]), "a small gradient stays as it is"
    joint = nn.Parameter(torch.zeros_like(gradient))
    joint.grad = gradient.clone()
    nn.utils.clip_grad_norm_([joint], 1.0)
    assert not torch.allclose(joint.grad[0], clipped[0], atol=1e-6)


def test_a_zero_gradient_stays_zero():
    gradient = torch.zeros(2, 5)
    clip_per_head(gradient, 1.0)
    assert torch.equal(gradient, torch.zeros(2, 5))


def test_a_learning_rate_can_be_replayed():
    """What is set counts from the next step on, for every head."""
    bank = make_bank(2)
    optimizer = BankOptimizer(bank, learning_rate=PEAK, weight_decay=0.0, schedule="constant")
    bank.flat_grad.fill_(1.0)
    before = bank.flat.clone()

    optimizer.set_learning_rate(0.5)
    optimizer.step()

    assert optimizer.rates_by_head == [0.5, 0.5]
    # The first step of Adam is the rate itself, whatever the size of the gradient.
    torch.testing.assert_close(before - bank.flat, torch.full_like(before, 0.5), rtol=1e-4, atol=0)


def test_only_schedules_with_a_horizon_depend_on_it():
    """This is what lets the search read small candidates off one long trajectory."""
    for schedule in SCHEDULES:
        rates = []
        for n_epochs in (4, 8):
            optimizer = BankOptimizer(
                make_bank(1),
                learning_rate=PEAK,
                weight_decay=0.0,
                schedule=schedule,
                n_epochs=n_epochs,
            )
            rates.append([])
            for epoch in range(4):
                rates[-1].append(optimizer.rates_by_head)
                optimizer.step()
                optimizer.end_epoch(torch.tensor([validation_loss(0, epoch)]))
        assert (rates[0] != rates[1]) == (schedule in HORIZON_SCHEDULES), schedule
