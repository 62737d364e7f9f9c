"""Train three-layer heads side by side, each on its own rows of cached embeddings."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxr_cache.cohort import Cohort
from cxr_cache.config import TrainConfig
from cxr_cache.devices import resolve_device
from cxr_cache.errors import ConfigError, TrainingError
from cxr_cache.heads import HeadBank
from cxr_cache.losses import balance_positives, make_loss
from cxr_cache.metrics import auroc, macro_mean
from cxr_cache.optim import BankOptimizer

_SCORED_AT_ONCE: Final = 8192  # rows of one head

# -- what to train on, and what comes out ------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """Rows that can be trained on: done in the store, undamaged, and labelled at all."""

    embeddings: NDArray[np.float32]
    """``(V, N, D)``, prepared by :func:`prepare_embeddings`."""
    cohort: Cohort
    """The N images; targets are NaN where unlabelled."""
    notes: tuple[str, ...] = ()
    """What a reader of the results should know about the rows left out."""


def prepare_embeddings(embeddings: NDArray[np.float32], input_norm: str) -> NDArray[np.float32]:
    """Embeddings as the head reads them: L2-normalised along the last axis, or as they are."""
    if input_norm == "none":
        return embeddings
    norms = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    prepared: NDArray[np.float32] = embeddings / np.maximum(norms, np.float32(1e-12))
    return prepared


# -- heads side by side -----------------------------------------------------------------


@dataclass(frozen=True)
class HeadTask:
    """One head to train: on which rows, scored on which, from which seed."""

    train_rows: NDArray[np.int64]
    held_out_rows: NDArray[np.int64]
    """May be empty: then nothing is scored, and no schedule may ask."""
    seed: int


@dataclass
class Trajectory:
    """What one head did on its way, and what was kept of it."""

    history: list[dict[str, float]] = field(default_factory=list)
    """One row per epoch: epoch, lr, train_loss, val_loss, val_auroc, seconds."""
    probabilities: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    """After each kept epoch, for the held-out rows, ``(n, F)``."""
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """After each kept epoch, a bank of one head, as :meth:`HeadBank.snapshot` gives it."""

    def auroc_after(self, epoch: int) -> float:
        """Validation AUROC after `epoch`, or when the head stopped, if that was earlier."""
        return self.history[min(epoch, len(self.history)) - 1]["val_auroc"]


def fit_heads(
    data: TrainingData,
    tasks: Sequence[HeadTask],
    config: TrainConfig,
    *,
    n_epochs: int,
    n_steps: int,
    keep: Collection[int],
    learning_rates: Sequence[float] | None = None,
) -> list[Trajectory]:
    """Train one head per task, all in one bank, and keep each at the epochs asked for.

    A head's result depends on its own task only: rows, order, dropout, clipping, schedule and
    stopping are its own. An epoch visits `n_steps` full batches of a fresh permutation of the
    task's rows; the few that do not fill a batch wait for the next epoch.

    Parameters
    ----------
    data
        Embeddings and targets of all rows.
    tasks
        One per head.
    config
        Recipe.
    n_epochs
        Length of the trajectories.
    n_steps
        Batches per epoch, the same for every head; see :func:`count_steps`.
    keep
        Epochs, counted from 1, after which probabilities and weights are kept. A head that has
        stopped early counts as unchanged from then on.
    learning_rates
        The rate of every epoch, in place of the schedule.

    Raises
    ------
    TrainingError
        A loss is no longer finite.
    """
    trajectories = [Trajectory() for _ in tasks]
    running = set(range(len(tasks)))
    # Products this small gain nothing from threads, and lose much when the cores are shared.
    with _one_thread():
        trainer = _Trainer(data, tasks, config, n_epochs, n_steps, learning_rates)
        for epoch in range(1, n_epochs + 1):
            rows, probabilities = trainer.run_epoch(epoch)
            for h in sorted(running):
                trajectories[h].history.append(rows[h])
                stops = has_stopped(trajectories[h].history, config.early_stopping)
                for kept in (e for e in keep if e == epoch or (stops and e > epoch)):
                    trajectories[h].probabilities[kept] = probabilities[h]
                    trajectories[h].weights[kept] = trainer.bank.snapshot([h])
                if stops:
                    running.discard(h)
            if not running:
                break
    return trajectories


def count_steps(tasks: Sequence[HeadTask], batch_size: int) -> int:
    """Full batches per epoch that every task has rows for.

    Raises
    ------
    ConfigError
        A task has fewer rows than a batch.
    """
    fewest = min(len(task.train_rows) for task in tasks)
    if fewest < batch_size:
        raise ConfigError(
            f"A fold has {fewest} images to train on, fewer than the batch size {batch_size}. "
            "Use a smaller --batch-size, fewer --folds, or more images."
        )
    return fewest // batch_size


@contextmanager
def _one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


class _Trainer:
    """A bank on its way through the epochs."""

    def __init__(
        self,
        data: TrainingData,
        tasks: Sequence[HeadTask],
        config: TrainConfig,
        n_epochs: int,
        n_steps: int,
        learning_rates: Sequence[float] | None,
    ) -> None:
        device = resolve_device(config.device)
        self.config, self.n_steps, self.learning_rates = config, n_steps, learning_rates
        self.embeddings = torch.from_numpy(data.embeddings).to(device)  # (V, N, D)
        self.targets = torch.from_numpy(data.cohort.targets).to(device)  # (N, F)
        self.rows = [torch.from_numpy(task.train_rows).to(device) for task in tasks]
        self.held_out_targets = [data.cohort.targets[task.held_out_rows] for task in tasks]
        self.scored_rows = _pad([task.held_out_rows for task in tasks]).to(device)  # (H, n)
        # Not the seed itself: from there come the initial weights and dropout.
        self.shuffles = [torch.Generator().manual_seed(task.seed + 1) for task in tasks]
        self.bank = HeadBank(
            len(tasks),
            self.embeddings.shape[-1],
            self.targets.shape[-1],
            hidden=config.hidden,
            dropout=config.dropout,
            seeds=[task.seed for task in tasks],
            device=device,
        )
        self.optimizer = BankOptimizer(
            self.bank,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            schedule="constant" if learning_rates is not None else config.schedule,
            patience=config.patience,
            n_epochs=n_epochs,
        )
        balance = torch.stack([balance_positives(self.targets[rows]) for rows in self.rows])
        self.loss = make_loss(
            config.loss,
            alpha=config.alpha,
            gamma=config.gamma,
            positive_weight=balance[:, None],  # (H, 1, F)
        )

    def run_epoch(self, epoch: int) -> tuple[list[dict[str, float]], list[NDArray[np.float32]]]:
        """Train and score once; a row of history and held-out probabilities per head."""
        started = time.perf_counter()
        if self.learning_rates is not None:
            self.optimizer.set_learning_rate(self.learning_rates[epoch - 1])
        rates = self.optimizer.learning_rates
        train_losses = self._train()
        val_losses, probabilities = self._score()
        # Without held-out rows, no loss has seen the last step of the epoch; the weights have.
        if not all(x.isfinite().all() for x in (train_losses, val_losses, self.bank.flat)):
            raise TrainingError(
                f"The loss or the weights are no longer finite in epoch {epoch}. Use a smaller "
                "--lr, or check the embeddings with `cxr-cache inspect`."
            )
        self.optimizer.end_epoch(val_losses)
        seconds = (time.perf_counter() - started) / self.bank.n_heads
        rows = [
            {
                "epoch": epoch,
                "lr": rates[h],
                "train_loss": float(train_losses[h]),
                **score_held_out(self.held_out_targets[h], probabilities[h], val_losses[h]),
                "seconds": seconds,
            }
            for h in range(self.bank.n_heads)
        ]
        return rows, probabilities

    def _train(self) -> Tensor:
        """One epoch of every head; mean loss of each, ``(H,)``."""
        n_batch, n_views = self.config.batch_size, len(self.embeddings)
        n_rows = self.n_steps * n_batch
        order = torch.stack([self._shuffle(h)[:n_rows] for h in range(len(self.rows))])  # (H, n)
        views = torch.stack(
            [torch.randint(n_views, (n_rows,), generator=g) for g in self.shuffles]
        ).to(order.device)
        total = torch.zeros(len(self.rows), device=order.device)
        self.bank.train()
        for start in range(0, n_rows, n_batch):
            rows = order[:, start : start + n_batch]  # (H, B)
            x = self.embeddings[views[:, start : start + n_batch], rows]  # (H, B, D)
            losses = self.loss(self.bank(x), self.targets[rows])
            self.bank.backward(losses)
            self.optimizer.step()
            total += losses.detach()
        return total / self.n_steps

    def _shuffle(self, h: int) -> Tensor:
        rows = self.rows[h]
        return rows[torch.randperm(len(rows), generator=self.shuffles[h]).to(rows.device)]

    @torch.inference_mode()
    def _score(self) -> tuple[Tensor, list[NDArray[np.float32]]]:
        """Loss and probabilities on each head's own held-out rows; zero loss where it has none."""
        rows = self.scored_rows
        self.bank.eval()
        parts = [
            self.bank(self.embeddings[0, part]) for part in torch.split(rows, _SCORED_AT_ONCE, 1)
        ]
        logits = torch.cat(parts, dim=1)  # (H, n, F)
        targets = self.targets[rows].masked_fill(rows[..., None] < 0, torch.nan)
        probabilities = torch.sigmoid(logits).cpu().numpy()
        return (
            self.loss(logits, targets).cpu(),
            [p[: len(t)] for p, t in zip(probabilities, self.held_out_targets, strict=True)],
        )


def _pad(rows: Sequence[NDArray[np.int64]]) -> Tensor:
    """Row numbers of every head, -1 past the end of the shorter ones, ``(H, n)``."""
    longest = max(map(len, rows))
    return torch.from_numpy(
        np.stack([np.pad(r, (0, longest - len(r)), constant_values=-1) for r in rows])
    )


def score_held_out(
    targets: NDArray[np.float32], probabilities: NDArray[np.float32], loss: Tensor
) -> dict[str, float]:
    """Validation columns of the history; NaN where nothing is held out."""
    if not len(targets):
        return {"val_loss": float("nan"), "val_auroc": float("nan")}
    return {"val_loss": float(loss), "val_auroc": float(macro_mean(auroc(targets, probabilities)))}


def has_stopped(history: Sequence[dict[str, float]], patience: int | None) -> bool:
    """Whether the validation loss has not improved for `patience` epochs."""
    if patience is None:
        return False
    best = min(range(len(history)), key=lambda i: history[i]["val_loss"])
    return len(history) - 1 - best >= patience
