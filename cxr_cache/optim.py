"""AdamW, clipping and schedules for heads that train side by side and must not notice it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from cxr_cache.heads import HeadBank


class BankOptimizer:
    """One torch AdamW and one schedule per head, each on that head's row of the bank.

    A head's parameters lie in one row of ``bank.flat``, so to torch each head is a model with a
    single vector: learning rate, moments, clipping and schedule are its own by construction.

    Parameters
    ----------
    bank
        The heads; their gradients are read from ``bank.flat_grad``.
    learning_rate, weight_decay
        Of AdamW (Loshchilov & Hutter 2019).
    max_grad_norm
        Each head's gradient is scaled down to this Euclidean norm; None for no limit.
    schedule
        One of :data:`cxr_cache.config.SCHEDULES`: ``plateau`` halves the rate when the
        validation loss has not improved for `patience` epochs.
    n_epochs
        Horizon of the schedules that need one.
    """

    def __init__(
        self,
        bank: HeadBank,
        *,
        learning_rate: float,
        weight_decay: float,
        max_grad_norm: float | None = 1.0,
        schedule: str = "plateau",
        patience: int = 3,
        n_epochs: int = 1,
    ) -> None:
        self._bank = bank
        self._max_grad_norm = max_grad_norm
        rows = [nn.Parameter(row) for row in bank.flat]  # views: a step writes into the bank
        for row, grad in zip(rows, bank.flat_grad, strict=True):
            row.grad = grad
        self._optimizers = [
            torch.optim.AdamW([row], lr=learning_rate, weight_decay=weight_decay, fused=True)
            for row in rows
        ]
        self._schedulers = [
            make_scheduler(schedule, optimizer, patience, n_epochs)
            for optimizer in self._optimizers
        ]

    @property
    def learning_rates(self) -> list[float]:
        """Learning rate of each head now."""
        return [float(optimizer.param_groups[0]["lr"]) for optimizer in self._optimizers]

    def set_learning_rate(self, learning_rate: float) -> None:
        """Use `learning_rate` for every head from here on."""
        for optimizer in self._optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate

    def step(self) -> None:
        """Clip every head's gradient to its own norm, and update its parameters."""
        if self._max_grad_norm is not None:
            clip_per_head(self._bank.flat_grad, self._max_grad_norm)
        for optimizer in self._optimizers:
            optimizer.step()

    def end_epoch(self, validation_losses: Tensor) -> None:
        """Advance the schedules; `validation_losses` has shape ``(H,)``."""
        for scheduler, loss in zip(self._schedulers, validation_losses.tolist(), strict=True):
            advance(scheduler, loss)


def clip_per_head(flat_grad: Tensor, max_norm: float) -> None:
    """Scale each row down to `max_norm` in place, as ``torch.nn.utils.clip_grad_norm_`` would."""
    norms = torch.linalg.vector_norm(flat_grad, dim=1, keepdim=True)
    flat_grad.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0))


def advance(scheduler: Any, validation_loss: float) -> None:
    """Set the rates of the next epoch."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(validation_loss)
    elif scheduler is not None:
        scheduler.step()


def make_scheduler(
    name: str, optimizer: torch.optim.Optimizer, patience: int, n_epochs: int
) -> Any:
    """The torch scheduler called `name`, stepped once an epoch; None keeps the rates constant."""
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    if name == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=patience)
    if name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=n_epochs)
    if name == "one-cycle":
        return lr_scheduler.OneCycleLR(
            optimizer, max_lr=peaks, total_steps=n_epochs + 1, cycle_momentum=False
        )
    return None
