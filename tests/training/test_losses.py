"""Losses equal torch's and torchvision's where those exist, and ignore what is unlabelled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from cxr_cache import config
from cxr_cache.config import TrainConfig
from cxr_cache.training.losses import (
    LOSSES,
    WeightedFocal,
    asymmetric_loss,
    balance_positives,
    class_balance,
    make_loss,
    stack_losses,
)
from tests.oracles import bce_loss, focal_loss, reference_focal_loss

EVEN = torch.tensor([[0.0], [1.0]])
"""Targets by which no finding is rare."""
ALL_LOSSES = [
    pytest.param(make_loss(TrainConfig(loss=name, alpha=0.25, gamma=gamma), EVEN), id=id_)
    for name in LOSSES
    for gamma, id_ in [(2.0, name), (0.5, f"{name}, gamma 0.5")]
]


def draw(seed: int, *shape: int, unlabelled: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets, some of them NaN."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=generator)
    targets = (torch.rand(shape, generator=generator) < 0.3).float()
    targets[torch.rand(shape, generator=generator) < unlabelled] = torch.nan
    return logits, targets


# --- Equal to torch and torchvision ---------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_focal_loss_without_focus_is_binary_cross_entropy(seed):
    logits, targets = draw(seed, 8, 5)

    loss = focal_loss(logits, targets, gamma=0.0)

    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, targets))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_focal_loss_and_its_gradient_equal_torchvision(alpha, gamma):
    logits, targets = draw(0, 8, 5)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()

    loss = focal_loss(ours, targets, gamma=gamma, alpha=alpha)
    expected = sigmoid_focal_loss(theirs, targets, alpha=alpha, gamma=gamma, reduction="mean")

    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("target", "expected"), [(1.0, 0.0433), (0.0, 0.1300)])
def test_focal_loss_of_an_undecided_logit_has_the_known_value(target, expected):
    """alpha (1 - p_t)^2 log 2 at p_t = 0.5, as torchvision has it too."""
    loss = focal_loss(torch.zeros(1, 1), torch.full((1, 1), target), gamma=2.0, alpha=0.25)

    assert loss.item() == pytest.approx(expected, abs=5e-5)


def test_the_references_variant_scales_positives_and_negatives_alike():
    """Its code has no 1 - alpha: the loss is the unbalanced one, times alpha."""
    logits, targets = draw(0, 8, 5)
    unbalanced = sigmoid_focal_loss(logits, targets, alpha=-1, gamma=2.0, reduction="mean")

    loss = reference_focal_loss(logits, targets, gamma=2.0, alpha=0.25)

    torch.testing.assert_close(loss, 0.25 * unbalanced)
    assert not torch.isclose(loss, focal_loss(logits, targets, gamma=2.0, alpha=0.25))


def test_weighted_cross_entropy_equals_torchs_positive_weight():
    logits, targets = draw(0, 8, 5)
    weight = torch.tensor([0.1, 1.0, 3.0, 20.0, 100.0])

    loss = bce_loss(logits, targets, positive_weight=weight)

    torch.testing.assert_close(
        loss, F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight)
    )


def test_the_names_to_choose_from_are_those_of_the_losses():
    assert set(config.LOSSES) == set(LOSSES)


def test_every_name_makes_the_loss_it_says():
    logits, targets = draw(0, 8, 5)
    weight = balance_positives(targets)
    expected = {
        "focal": reference_focal_loss(logits, targets, alpha=0.3, gamma=1.5),
        "focal-balanced": focal_loss(logits, targets, alpha=0.3, gamma=1.5),
        "class-balanced": WeightedFocal(1.5, *class_balance(targets))(logits, targets),
        "asymmetric": asymmetric_loss(logits, targets, gamma=1.5),
        "bce": bce_loss(logits, targets),
        "weighted-bce": bce_loss(logits, targets, positive_weight=weight),
    }

    for name in LOSSES:
        loss = make_loss(TrainConfig(loss=name, alpha=0.3, gamma=1.5), targets)
        assert torch.equal(loss(logits, targets), expected[name]), name
    assert len({float(value) for value in expected.values()}) == len(LOSSES)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 4.0])
def test_asymmetric_loss_equals_the_formula_of_its_paper(gamma):
    """Ridnik et al. 2021, eq. 6 and 7, entry by entry."""
    logits, targets = draw(0, 8, 5)
    p = torch.sigmoid(logits)
    p_m = (p - 0.05).clamp(min=0)
    expected = torch.where(targets == 1, -torch.log(p), -(p_m**gamma) * torch.log(1 - p_m)).mean()

    torch.testing.assert_close(asymmetric_loss(logits, targets, gamma=gamma), expected)


def test_class_balance_weighs_by_effective_numbers():
    """Cui et al. 2019: as many of both weigh alike; the rarer weighs more, up to n times."""
    targets = torch.zeros(1000, 3)
    targets[:500, 0] = 1
    targets[:10, 1] = 1
    targets[:10, 2] = torch.nan

    positive, negative = class_balance(targets)

    assert (positive + negative).tolist() == pytest.approx([2.0, 2.0, 2.0])
    assert positive[0] == pytest.approx(1.0)
    n = torch.tensor([10.0, 990.0], dtype=torch.float64)
    effective = (1 - 0.9999**n) / (1 - 0.9999)
    assert positive[1] / negative[1] == pytest.approx(float(effective[1] / effective[0]), rel=1e-5)


# --- Gradients written out ------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ALL_LOSSES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gradient_written_out_is_autograds(loss, seed):
    logits, targets = draw(seed, 3, 8, 5, unlabelled=0.3)
    logits[0, 0] *= 1000
    leaf = logits.double().requires_grad_()
    loss(leaf, targets.double()).sum().backward()

    gradient = loss.gradient(logits.double(), *loss.prepare(targets.double()))

    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-12)


def test_a_batch_without_labels_has_no_gradient():
    for loss in (
        WeightedFocal(),
        make_loss(TrainConfig(loss="asymmetric", alpha=0.0, gamma=2.0), EVEN),
    ):
        prepared = loss.prepare(torch.full((4, 3), torch.nan))
        assert (loss.gradient(torch.randn(4, 3), *prepared) == 0).all()


def test_stacked_losses_are_the_losses_side_by_side():
    """Heads may differ in weights and focus: each has the value and gradient of its own loss."""
    logits, targets = draw(0, 4, 8, 5, unlabelled=0.3)
    recipes = {"focal": 2.0, "focal-balanced": 1.0, "weighted-bce": 0.0, "class-balanced": 0.5}
    losses = [
        make_loss(TrainConfig(loss=name, gamma=gamma, alpha=0.3), targets[0])
        for name, gamma in recipes.items()
    ]

    together = stack_losses(losses)

    values = together(logits, targets)
    gradients = together.gradient(logits, *together.prepare(targets))
    for h, loss in enumerate(losses):
        torch.testing.assert_close(values[h], loss(logits[h], targets[h]))
        expected = loss.gradient(logits[h], *loss.prepare(targets[h]))
        torch.testing.assert_close(gradients[h], expected)


# --- Unlabelled, extreme and stacked --------------------------------------------------------------


@pytest.mark.parametrize("loss", ALL_LOSSES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_unlabelled_targets_count_for_nothing(loss, seed):
    """The mean is over the labelled entries alone, and the gradient at the others is zero."""
    logits, targets = draw(seed, 8, 5, unlabelled=0.4)
    logits.requires_grad_()
    labelled = ~targets.isnan()

    value = loss(logits, targets)
    value.backward()

    alone = loss(logits[labelled][:, None], targets[labelled][:, None])
    torch.testing.assert_close(value, alone)
    assert (logits.grad[~labelled] == 0).all()
    counts = labelled & ((targets == 1) | (logits.sigmoid() > 0.05))  # the asymmetric loss's margin
    assert (logits.grad[counts] != 0).all()


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_a_batch_without_labels_costs_nothing(loss):
    logits = torch.randn(4, 3, requires_grad=True)

    value = loss(logits, torch.full((4, 3), torch.nan))
    value.backward()

    assert value.item() == 0
    assert torch.equal(logits.grad, torch.zeros(4, 3))


@pytest.mark.parametrize("loss", ALL_LOSSES)
@pytest.mark.parametrize("logit", [1e4, -1e4, 104.0, -104.0, 17.0, -17.0, 0.0])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_extreme_logits_give_finite_loss_and_gradient(loss, logit, target):
    """Certainly right costs nothing; certainly wrong costs the logit, not infinity."""
    logits = torch.full((1, 1), logit, requires_grad=True)

    value = loss(logits, torch.full((1, 1), target))
    value.backward()

    assert value.isfinite()
    assert value.item() <= abs(logit) + 1
    assert logits.grad.isfinite().all()
    if abs(logit) > 100 and (logit > 0) == (target == 1):
        assert value.item() == 0


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_leading_axes_are_heads_that_do_not_notice_each_other(loss):
    """One backward of the sum gives every head the gradient that it would have alone."""
    logits, targets = draw(0, 3, 8, 5, unlabelled=0.3)
    together = logits.clone().requires_grad_()

    losses = loss(together, targets)
    losses.sum().backward()

    assert losses.shape == (3,)
    for h in range(3):
        alone = logits[h].clone().requires_grad_()
        value = loss(alone, targets[h])
        value.backward()
        torch.testing.assert_close(losses[h], value)
        torch.testing.assert_close(together.grad[h], alone.grad)


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_targets_may_be_shared_by_the_heads(loss):
    logits, targets = draw(0, 3, 8, 5, unlabelled=0.3)

    shared = loss(logits, targets[0])

    torch.testing.assert_close(shared, loss(logits, targets[:1].expand(3, 8, 5)))


# --- Weights of the positives ---------------------------------------------------------------------


def test_balanced_positives_weigh_as_much_as_negatives():
    targets = torch.zeros(10, 4)
    targets[:2, 0] = 1  # 2 positives, 8 negatives
    targets[:5, 1] = 1  # 5 and 5
    targets[2:, 2] = torch.nan  # none and 2, the others unlabelled
    targets[:, 3] = 1  # 10 and none

    weights = balance_positives(targets)

    assert weights[:2].tolist() == [4.0, 1.0]
    assert weights[2] == 2.0, "nothing to divide by: as for one positive"
    assert weights[3] == pytest.approx(0.01), "bounded below too"
    for f in (0, 1):
        present = targets[:, f] == 1
        assert weights[f] * present.sum() == (~present).sum()


def test_a_rare_finding_does_not_carry_the_whole_loss():
    targets = torch.zeros(1000, 1)
    targets[0] = 1

    assert balance_positives(targets).item() == 100.0
    assert balance_positives(targets, largest=5.0).item() == 5.0
