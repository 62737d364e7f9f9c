"""Losses for multi-label heads: focal and its relatives, one value per head, NaN-aware.

The paper (Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 5) weighs positives by
``alpha`` and negatives by ``1 - alpha``. The reference system multiplies every term by ``alpha``,
which scales the loss and its gradient and changes no balance between positives and negatives.
Both are here, cross-entropy is the same family with ``gamma`` 0, and :data:`LOSSES` names them
all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cxr_cache.config import Recipe


def asymmetric_loss(
    logits: Tensor, targets: Tensor, *, gamma: float = 4.0, margin: float = 0.05
) -> Tensor:
    """Asymmetric loss over the labelled entries, one value per head.

    Ridnik et al. 2021, "Asymmetric Loss For Multi-Label Classification", eq. 6 and 7, with
    unfocused positives: negatives are scaled down by ``p_m ** gamma``, where ``p_m`` is their
    probability less `margin`, and count for nothing below it. `gamma` is at least 0; logits and
    targets are as :class:`WeightedFocal` takes them.
    """
    excess = (torch.sigmoid(logits) - margin).clamp(min=0)  # p_m
    negatives = -torch.log1p(-excess) * excess**gamma
    loss = torch.where(targets == 1, -F.logsigmoid(logits), negatives)
    return _mean_over_labelled(loss, targets)


def balance_positives(targets: Tensor, *, largest: float = 100.0) -> Tensor:
    """Weight per finding at which its positives count as much as its negatives, ``(F,)``.

    It is the number of negatives per positive, in ``[1 / largest, largest]``: two positives in
    thousands must not carry the whole loss.
    """
    n_positive = (targets == 1).sum(dim=0)
    n_negative = (targets == 0).sum(dim=0)
    return (n_negative / n_positive.clamp(min=1)).clamp(1 / largest, largest)


def class_balance(targets: Tensor, *, beta: float = 0.9999) -> tuple[Tensor, Tensor]:
    """Weights of positives and negatives of each finding by their effective numbers, ``(F,)`` each.

    Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples", eq. 6: ``n``
    samples count as ``(1 - beta ** n) / (1 - beta)``, and weigh the inverse. The two sum to 2.
    """
    counts = torch.stack([(targets == 1).sum(dim=0), (targets == 0).sum(dim=0)])
    inverse = 1 / (1 - beta ** counts.clamp(min=1).double())
    positive, negative = (2 * inverse / inverse.sum(dim=0)).to(targets.dtype)
    return positive, negative


def _mean_over_labelled(loss: Tensor, targets: Tensor) -> Tensor:
    labelled = (~targets.isnan()).expand_as(loss)
    total = torch.where(labelled, loss, 0.0).sum(dim=(-2, -1))
    return total / labelled.sum(dim=(-2, -1)).clamp(min=1)


# -- losses with their gradients ---------------------------------------------------------


class Loss(Protocol):
    """A loss of logits and targets, one value per head, that knows its own gradient."""

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Losses, shape ``(..., B, F)`` -> ``(...)``; differentiable."""
        ...

    def prepare(self, targets: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`gradient` needs of the targets; of many batches at once, ``(..., B, F)``."""
        ...

    def gradient(self, logits: Tensor, *prepared: Tensor) -> Tensor:
        """Gradient of the sum of the losses with respect to the logits, ``(..., B, F)``."""
        ...


@dataclass(frozen=True)
class WeightedFocal:
    """Focal loss with weights: ``-w (1 - p_t)^gamma log p_t`` of the labelled entries, averaged.

    Entries that the model already gets right are scaled down by ``(1 - p_t) ** gamma``, where
    ``p_t`` is the probability given to the true label. Unlabelled (NaN) targets contribute neither
    to the sum nor to the count, so a finding that is labelled rarely is not diluted. The mean runs
    over the last two axes only: heads that train side by side keep their losses apart, so
    ``loss.sum().backward()`` gives each head the gradient that it would have alone.

    Every field may be a tensor that broadcasts to ``(..., B, F)``: heads side by side may differ.
    """

    gamma: float | Tensor = 2.0
    positive_weight: float | Tensor = 1.0
    negative_weight: float | Tensor = 1.0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Losses, shape ``(..., B, F)`` -> ``(...)``; differentiable."""
        # With s the log-odds of the true label, p_t = sigmoid(s) and log(1 - p_t) = log p_t - s.
        # The power of 1 - p_t is taken as exp(gamma log(1 - p_t)): as a power of 0 its slope would
        # be infinite.
        present = targets == 1
        log_odds = torch.where(present, logits, -logits)  # s, (..., B, F)
        log_p = F.logsigmoid(log_odds)
        loss = -torch.exp(self.gamma * (log_p - log_odds)) * log_p
        weight = torch.where(present, self.positive_weight, self.negative_weight)
        return _mean_over_labelled(loss * weight, targets)

    def prepare(self, targets: Tensor) -> tuple[Tensor, ...]:
        """Sign of the log-odds, and weight in the mean with that sign; 0 where unlabelled."""
        present, labelled = targets == 1, (~targets.isnan()).to(targets.dtype)
        sign = torch.where(present, torch.ones_like(targets), -torch.ones_like(targets))
        weight = torch.where(present, self.positive_weight, self.negative_weight)
        share = labelled / labelled.sum(dim=(-2, -1), keepdim=True).clamp(min=1)
        return sign, sign * weight * share

    def gradient(self, logits: Tensor, *prepared: Tensor) -> Tensor:
        """Gradient of the sum of the losses, ``(..., B, F)``.

        With p = p_t and q = 1 - p: dp/ds = p q, so d/ds of ``-q^gamma log p`` is
        ``q^gamma (gamma p log p - q)``; s is the logit of a positive, and minus that of a negative.
        """
        sign, signed_weight = prepared
        log_odds = logits * sign
        log_p = F.logsigmoid(log_odds)
        q = torch.sigmoid(log_odds.neg_())
        slope = torch.exp(log_p).mul_(log_p).mul_(self.gamma).sub_(q).mul_(signed_weight)
        return slope.mul_(q.pow_(self.gamma))


@dataclass(frozen=True)
class ByAutograd:
    """A loss whose gradient is left to autograd."""

    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Losses, shape ``(..., B, F)`` -> ``(...)``."""
        return self.function(logits, targets)

    def prepare(self, targets: Tensor) -> tuple[Tensor, ...]:
        """The targets as they are."""
        return (targets,)

    def gradient(self, logits: Tensor, *prepared: Tensor) -> Tensor:
        """Gradient of the sum of the losses, ``(..., B, F)``."""
        (targets,) = prepared
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.function(leaf, targets).sum(), leaf)
        return gradient


LOSS_OPTIONS: Final = ("loss", "alpha", "gamma")
"""Options of a recipe that decide its loss."""

MakeLoss: TypeAlias = Callable[[Recipe, Tensor], Loss]

FOCAL_LOSSES: Final[dict[str, MakeLoss]] = {
    "focal": lambda recipe, _: WeightedFocal(recipe.gamma, recipe.alpha, recipe.alpha),
    "focal-balanced": lambda recipe, _: WeightedFocal(recipe.gamma, recipe.alpha, 1 - recipe.alpha),
    "class-balanced": lambda recipe, targets: WeightedFocal(recipe.gamma, *class_balance(targets)),
    "bce": lambda *_: WeightedFocal(0.0),
    "weighted-bce": lambda _, targets: WeightedFocal(0.0, balance_positives(targets)),
}
"""Losses of one formula, in which heads that train side by side may differ."""

LOSSES: Final[dict[str, MakeLoss]] = {
    **FOCAL_LOSSES,
    "asymmetric": lambda recipe, _: ByAutograd(partial(asymmetric_loss, gamma=recipe.gamma)),
}
"""Every loss by its name; it is made for a recipe, and for the targets to train on, ``(N, F)``, by
which some losses weigh findings. The names are those of :data:`cxr_cache.config.LOSSES`."""


def make_loss(recipe: Recipe, targets: Tensor) -> Loss:
    """Make the loss of a recipe for the rows to train on, given their targets, ``(N, F)``."""
    return LOSSES[recipe.loss](recipe, targets)


def stack_losses(losses: Sequence[Loss]) -> Loss:
    """The losses of heads side by side as one, of logits ``(..., H, B, F)``.

    Losses that are not :class:`WeightedFocal` cannot differ: the first stands for all.
    """
    focal = [loss for loss in losses if isinstance(loss, WeightedFocal)]
    if len(focal) < len(losses):
        return losses[0]
    if len(focal) == 1:
        return focal[0]
    gammas = {loss.gamma for loss in focal}
    gamma = gammas.pop() if len(gammas) == 1 else _stack([loss.gamma for loss in focal])
    return WeightedFocal(
        gamma,
        _stack([loss.positive_weight for loss in focal]),
        _stack([loss.negative_weight for loss in focal]),
    )


def _stack(values: Sequence[float | Tensor]) -> Tensor:
    """Numbers, or one per finding, of every head: ``(H, 1, F)``, or ``(H, 1, 1)``."""
    tensors = [
        torch.as_tensor(value).expand(1) if isinstance(value, float | int) else value
        for value in values
    ]
    n = max(len(tensor) for tensor in tensors)
    return torch.stack([tensor.expand(n) for tensor in tensors])[:, None]
