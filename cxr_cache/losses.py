"""Losses for multi-label heads: focal and its relatives, one value per head, NaN-aware.

The paper (Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 5) weighs positives by
``alpha`` and negatives by ``1 - alpha``. The reference system multiplies every term by ``alpha``,
which scales the loss and its gradient and changes no balance between positives and negatives.
Both are here; :data:`cxr_cache.config.LOSSES` names them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_loss(
    logits: Tensor, targets: Tensor, *, gamma: float = 2.0, alpha: float | None = None
) -> Tensor:
    """Focal loss over the labelled entries, one value per head.

    Entries that the model already gets right are scaled down by
    ``(1 - p_t) ** gamma``, where ``p_t`` is the probability given to the true
    label. Unlabelled (NaN) targets contribute neither to the sum nor to the
    count, so a finding that is labelled rarely is not diluted.

    The mean runs over the last two axes only. Any leading axes are heads that
    train side by side; since their losses stay apart, ``loss.sum().backward()``
    gives each head the gradient that it would have alone.

    Parameters
    ----------
    logits
        Scores before the sigmoid, shape ``(..., B, F)``.
    targets
        1 present, 0 absent, NaN unlabelled; broadcastable to `logits`.
    gamma
        Focusing strength, at least 0. Zero gives binary cross-entropy.
    alpha
        Weight of positives in ``[0, 1]``; negatives get ``1 - alpha``.
        None weighs both alike.

    Returns
    -------
    Tensor
        Mean loss in nats, shape ``(...)``; zero where nothing is labelled.

    Examples
    --------
    >>> logits, targets = torch.zeros(3, 8, 14), torch.ones(8, 14)
    >>> focal_loss(logits, targets, gamma=0.0)
    tensor([0.6931, 0.6931, 0.6931])
    """
    # With s the log-odds of the true label, p_t = sigmoid(s) and 1 - p_t = sigmoid(-s). The power
    # of 1 - p_t is taken as exp(gamma log(1 - p_t)): as a power of 0 its slope would be infinite.
    present = targets == 1
    log_odds = torch.where(present, logits, -logits)  # s, (..., B, F)
    loss = -torch.exp(gamma * F.logsigmoid(-log_odds)) * F.logsigmoid(log_odds)
    if alpha is not None:
        loss = loss * torch.where(present, alpha, 1 - alpha)
    return _mean_over_labelled(loss, targets)


def reference_focal_loss(
    logits: Tensor, targets: Tensor, *, gamma: float = 2.0, alpha: float = 0.25
) -> Tensor:
    """The reference system's variant: positives and negatives are both multiplied by `alpha`.

    Parameters and result as :func:`focal_loss`.
    """
    return alpha * focal_loss(logits, targets, gamma=gamma)


def bce_loss(logits: Tensor, targets: Tensor, *, positive_weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy over the labelled entries, one value per head.

    Parameters
    ----------
    logits, targets
        As :func:`focal_loss`.
    positive_weight
        Factor on the positives of each finding, shape ``(F,)`` or ``(H, 1, F)``; see
        :func:`balance_positives`.
    """
    weight = None if positive_weight is None else positive_weight.expand_as(logits)
    loss = F.binary_cross_entropy_with_logits(
        logits, torch.nan_to_num(targets).expand_as(logits), reduction="none", pos_weight=weight
    )
    return _mean_over_labelled(loss, targets)


def balance_positives(targets: Tensor, *, largest: float = 100.0) -> Tensor:
    """Weight per finding at which its positives count as much as its negatives.

    Parameters
    ----------
    targets
        ``(N, F)``, 1 present, 0 absent, NaN unlabelled.
    largest
        Bound on the weight: two positives in thousands must not carry the whole loss.

    Returns
    -------
    Tensor
        Negatives per positive, shape ``(F,)``, in ``[1 / largest, largest]``.
    """
    n_positive = (targets == 1).sum(dim=0)
    n_negative = (targets == 0).sum(dim=0)
    return (n_negative / n_positive.clamp(min=1)).clamp(1 / largest, largest)


def _mean_over_labelled(loss: Tensor, targets: Tensor) -> Tensor:
    labelled = (~targets.isnan()).expand_as(loss)
    total = torch.where(labelled, loss, 0.0).sum(dim=(-2, -1))
    return total / labelled.sum(dim=(-2, -1)).clamp(min=1)


def make_loss(
    name: str, *, alpha: float, gamma: float, positive_weight: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of :data:`cxr_cache.config.LOSSES` called `name`, of logits and targets."""
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "focal": lambda x, y: reference_focal_loss(x, y, alpha=alpha, gamma=gamma),
        "focal-balanced": lambda x, y: focal_loss(x, y, alpha=alpha, gamma=gamma),
        "bce": bce_loss,
        "weighted-bce": lambda x, y: bce_loss(x, y, positive_weight=positive_weight),
    }
    return losses[name]
