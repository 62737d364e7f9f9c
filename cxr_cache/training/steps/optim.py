"""AdamW, clipping and schedules for heads that train side by side, independently of each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.adamw import adamw

from cxr_cache.models.heads import HeadBank

BETAS: Final = (0.9, 0.999)
EPS: Final = 1e-8


class BankOptimizer:
    """torch's fused AdamW with a schedule for each head of a bank.

    A head's parameters lie in one row of ``bank.flat``, so for torch each head is a single vector
    with a learning rate, moments, clipping and schedule of its own. Heads with equal rate and decay
    are updated in one call.

    Gradients are read from ``bank.flat_grad``.

    Parameters
    ----------
    learning_rate, weight_decay
        Learning rate and weight decay of AdamW (Loshchilov & Hutter 2019). Like `schedule` and
        `patience`, each is one value for all heads, or one value per head.
    max_grad_norm
        Euclidean norm to which each head's gradient is scaled down; None for no limit.
    schedule
        One of :data:`cxr_cache.config.SCHEDULES`. ``plateau`` halves the rate when the validation
        loss has not improved for more than `patience` epochs.
    n_epochs
        Number of epochs, for schedules that depend on it.
    """

    def __init__(
        self,
        bank: HeadBank,
        *,
        learning_rate: float | Sequence[float],
        weight_decay: float | Sequence[float],
        max_grad_norm: float | None = 1.0,
        schedule: str | Sequence[str] = "plateau",
        patience: int | Sequence[int] = 3,
        n_epochs: int = 1,
    ) -> None:
        self._flat, self._grad = bank.flat, bank.flat_grad
        self.max_grad_norm = max_grad_norm
        n_heads = len(bank.flat)
        each = partial(_one_each, n=n_heads)
        self.weight_decays = each(weight_decay)
        self.moments = torch.zeros_like(bank.flat), torch.zeros_like(bank.flat)
        self.n_steps = [torch.zeros((), device=bank.flat.device) for _ in range(n_heads)]
        self._rates = [_Rate(rate) for rate in each(learning_rate)]
        self._schedulers = [
            make_scheduler(name, holder, patience_, n_epochs)
            for name, holder, patience_ in zip(
                each(schedule), self._rates, each(patience), strict=True
            )
        ]

    @property
    def rates_by_head(self) -> list[float]:
        """Learning rate of each head now."""
        return [float(holder.param_groups[0]["lr"]) for holder in self._rates]

    def set_learning_rate(self, learning_rate: float) -> None:
        """Use `learning_rate` for every head from here on."""
        for holder in self._rates:
            holder.param_groups[0]["lr"] = learning_rate

    @torch.no_grad()
    def step(self) -> None:
        """Clip every head's gradient to its own norm, and update its parameters."""
        if self.max_grad_norm is not None:
            clip_per_head(self._grad, self.max_grad_norm)
        heads_with: dict[tuple[float, float], list[int]] = {}
        for h, settings in enumerate(zip(self.rates_by_head, self.weight_decays, strict=True)):
            heads_with.setdefault(settings, []).append(h)
        for (rate, decay), heads in heads_with.items():
            mean, square = self.moments
            adamw(
                [self._flat[h] for h in heads],
                [self._grad[h] for h in heads],
                [mean[h] for h in heads],
                [square[h] for h in heads],
                [],  # the largest squares, which only AMSGrad has
                [self.n_steps[h] for h in heads],
                fused=True,
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=rate,
                weight_decay=decay,
                eps=EPS,
                maximize=False,
            )

    def end_epoch(self, validation_losses: Tensor) -> None:
        """Advance the schedules by the heads' validation losses, ``(H,)``."""
        for holder, scheduler, loss in zip(
            self._rates, self._schedulers, validation_losses.tolist(), strict=True
        ):
            holder.step()  # does nothing, but torch warns of schedules whose optimiser never steps
            advance(scheduler, loss)

    def state_dict(self) -> dict[str, Any]:
        """Return moments and schedules, for :meth:`load_state_dict`."""
        return {
            "moments": self.moments,
            "n_steps": self.n_steps,
            "rates": self.rates_by_head,
            "schedulers": [scheduler and scheduler.state_dict() for scheduler in self._schedulers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state that :meth:`state_dict` gave."""
        self.moments, self.n_steps = state["moments"], state["n_steps"]
        for holder, rate in zip(self._rates, state["rates"], strict=True):
            holder.param_groups[0]["lr"] = rate
        for scheduler, its_state in zip(self._schedulers, state["schedulers"], strict=True):
            if scheduler is not None:
                scheduler.load_state_dict(its_state)


class _Rate(torch.optim.Optimizer):
    """A learning rate in the form of an optimiser, on which torch's schedules act.

    The inherited ``add_param_group`` would import torch's compiler, which takes seconds in every
    process.
    """

    def __init__(self, learning_rate: float) -> None:
        super().__init__([torch.empty(0)], {"lr": learning_rate})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.param_groups.append(self.defaults | param_group)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


def _one_each(value: Any, n: int) -> Sequence[Any]:
    """Return a list or tuple as it is, and any other value `n` times."""
    return value if isinstance(value, list | tuple) else [value] * n


class WeightAverage:
    """Exponential moving average of tensors over the steps of a training.

    After step t the average moves by ``1 - min(decay, (1 + t) / (10 + t))`` of the way to the
    tensors, so that the first steps, where these are far from anything useful, are soon forgotten.
    A decay of 0 follows the tensors, without a copy of them.
    """

    def __init__(self, tensors: Sequence[Tensor], decay: float) -> None:
        self._tensors, self._decay, self._n_steps = list(tensors), decay, 0
        self.values = [tensor.detach().clone() for tensor in self._tensors] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        """Take in the tensors after a step."""
        if self._decay:
            self._n_steps += 1
            decay = min(self._decay, (1 + self._n_steps) / (10 + self._n_steps))
            torch._foreach_lerp_(self.values, self._tensors, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange tensors and average while the block runs."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for tensor, value in zip(self._tensors, self.values, strict=bool(self.values)):
            kept = tensor.clone()
            tensor.copy_(value)
            value.copy_(kept)

    def state(self) -> dict[str, Any]:
        """Average and number of steps, for :meth:`load_state`."""
        return {"values": self.values, "n_steps": self._n_steps}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self._n_steps = state["n_steps"]
        for value, kept in zip(self.values, state["values"], strict=True):
            value.copy_(kept)


def clip_per_head(flat_grad: Tensor, max_norm: float) -> None:
    """Scale each row down to `max_norm` in place, as ``torch.nn.utils.clip_grad_norm_`` would."""
    norms = torch.linalg.vector_norm(flat_grad, dim=1, keepdim=True)
    if norms.device.type == "cpu" and bool((norms <= max_norm - 1e-6).all()):
        return  # the factor is 1; on a GPU, asking for this would mean waiting
    flat_grad.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0))


def advance(scheduler: Any, validation_loss: float) -> None:
    """Set the learning rates of the next epoch."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(validation_loss)
    elif scheduler is not None:
        scheduler.step()


def make_scheduler(
    name: str, optimizer: torch.optim.Optimizer, patience: int, n_epochs: int
) -> Any:
    """Make the torch scheduler called `name`, which is stepped once an epoch.

    None keeps the rates constant.
    """
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
