"""Train three-layer heads side by side, each on its own rows of cached embeddings."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from cxr_cache.common.devices import resolve_device
from cxr_cache.common.wording import count
from cxr_cache.config import TrainConfig
from cxr_cache.errors import ConfigError, TrainingError
from cxr_cache.metrics.scores import auroc, macro_mean
from cxr_cache.models.heads import HeadBank
from cxr_cache.training.losses import FOCAL_LOSSES, LOSS_OPTIONS, make_loss, stack_losses
from cxr_cache.training.steps.backprop import Backprop, draw_dropout
from cxr_cache.training.steps.optim import BankOptimizer

if TYPE_CHECKING:
    from cxr_cache.training.steps.compiled import CompiledSteps

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE: Final = 8192
_SCORED_AT_ONCE: Final = 8192  # rows of one head
_TRAINED_AT_ONCE: Final = 1024
_WORTH_COMPILING: Final = 2.0
"""Seconds of training from which on importing numba, and what it has compiled, pays."""

# -- what to train on, and what comes out ------------------------------------------------


class Rows(Protocol):
    """What a head is trained on: all rows, of which a task picks its own."""

    @property
    def embeddings(self) -> NDArray[np.float32]:
        """``(V, N, D)``, prepared by :func:`cxr_cache.store.rows.prepare_features`."""
        ...

    @property
    def targets(self) -> NDArray[np.float32]:
        """``(N, F)``, NaN where unlabelled."""
        ...


@dataclass(frozen=True)
class PlainRows:
    """Nothing but the numbers, for a worker that need not know whose they are."""

    embeddings: NDArray[np.float32]
    targets: NDArray[np.float32]


@dataclass(frozen=True)
class HeadTask:
    """One head to train: on which rows, scored on which, from which seed."""

    train_rows: NDArray[np.int64]
    held_out_rows: NDArray[np.int64]
    """May be empty: then nothing is scored, and no schedule may ask."""
    seed: int
    name: str = ""
    """How messages call this training, such as "fold 2 of 5"."""


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


# -- heads side by side -----------------------------------------------------------------


def fit_heads(
    data: Rows, tasks: Sequence[HeadTask], config: TrainConfig, **options: Any
) -> list[Trajectory]:
    """Train one head per task, all in one bank, and keep each at the epochs asked for.

    Further options, and errors, are those of :class:`HeadFit`.
    """
    fit = HeadFit(data, tasks, [config] * len(tasks), **options)
    fit.run()
    return fit.trajectories


class HeadFit:
    """Heads on their way through the epochs, all in one bank; it can stop, move and go on.

    A head's result depends on its own task only: rows, order, dropout, clipping, schedule and
    stopping are its own. An epoch visits `n_steps` full batches of a fresh permutation of the
    task's rows; the few that do not fill a batch wait for the next epoch. A task with fewer rows
    than that goes through them several times in an epoch.

    Parameters
    ----------
    data, tasks, configs
        Embeddings and targets of all rows, a task per head, and the recipe of each; they may differ
        in what :func:`can_share_a_bank` allows.
    n_epochs
        Length of the trajectories.
    keep
        Epochs, counted from 1, after which probabilities and weights are kept. A head that has
        stopped early counts as unchanged from then on.
    n_steps
        Batches per epoch, the same for every head; by default as many as :func:`count_steps` says.
    learning_rates
        The rate of every epoch, in place of the schedule.

    Raises
    ------
    TrainingError
        From :meth:`run`: a loss is no longer finite.
    """

    def __init__(
        self,
        data: Rows,
        tasks: Sequence[HeadTask],
        configs: Sequence[TrainConfig],
        *,
        n_epochs: int,
        keep: Collection[int],
        n_steps: int | None = None,
        learning_rates: Sequence[float] | None = None,
    ) -> None:
        assert can_share_a_bank(configs)
        config = configs[0]
        device = resolve_device(config.device)
        self._batch_size = config.batch_size
        self._n_steps = n_steps or count_steps(tasks, config.batch_size)
        self._n_epochs, self._keep, self._learning_rates = n_epochs, keep, learning_rates
        self._patience = [config.early_stopping for config in configs]
        self._embeddings = torch.from_numpy(data.embeddings).to(device)  # (V, N, D)
        self._targets = torch.from_numpy(data.targets).to(device)  # (N, F)
        self._rows = [torch.from_numpy(task.train_rows).to(device) for task in tasks]
        self._held_out_targets = [data.targets[task.held_out_rows] for task in tasks]
        self._scored_rows = _pad([task.held_out_rows for task in tasks]).to(device)  # (H, n)
        # Not the seed itself: from there come the initial weights and dropout.
        self._shuffles = [torch.Generator().manual_seed(task.seed + 1) for task in tasks]
        self._bank = HeadBank.of_recipe(
            config,
            self._embeddings.shape[-1],
            self._targets.shape[-1],
            seeds=[task.seed for task in tasks],
            device=device,
        )
        self._backprop = Backprop(self._bank) if config.norm == "batch" else None
        self._statistics = (
            InputStatistics.of(self._embeddings[0], self._rows)
            if config.input_norm == "standard"
            else None
        )
        self._optimizer = BankOptimizer(
            self._bank,
            learning_rate=[config.learning_rate for config in configs],
            weight_decay=[config.weight_decay for config in configs],
            max_grad_norm=config.max_grad_norm,
            schedule=[
                "constant" if learning_rates is not None else config.schedule for config in configs
            ],
            patience=[config.patience for config in configs],
            n_epochs=n_epochs,
        )
        self._loss = stack_losses(
            [
                make_loss(config, self._targets[rows])
                for config, rows in zip(configs, self._rows, strict=True)
            ]
        )
        self._compiled = self._compile(config, n_epochs * self._n_steps)
        self.epoch = 0
        """Epochs done."""
        self.trajectories = [Trajectory() for _ in tasks]
        self._running = set(range(len(tasks)))

    def _compile(self, config: TrainConfig, n_steps: int) -> CompiledSteps | None:
        """Steps in one loop, where that can be and pays."""
        if (
            n_steps * estimate_step(config.batch_size) < _WORTH_COMPILING
            or self._bank.flat.dtype != torch.float32
            or not can_compile(config, len(self._rows), self._bank.flat.device)
        ):
            return None
        from cxr_cache.training.steps.compiled import CompiledSteps

        return CompiledSteps(self._bank, self._optimizer, self._loss)

    def run(self, until: int | None = None) -> None:
        """Go on to epoch `until`, by default to the last, or until every head has stopped."""
        # Products this small gain nothing from threads, and lose much when the cores are shared.
        with _one_thread(blas=self._compiled is not None):
            while not self.has_ended and (until is None or self.epoch < until):
                self.epoch += 1
                rows, probabilities = self._run_epoch(self.epoch)
                for h in sorted(self._running):
                    self._record(h, rows[h], probabilities[h])

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to train."""
        return not self._running or self.epoch >= self._n_epochs

    def _record(self, h: int, row: dict[str, float], probabilities: NDArray[np.float32]) -> None:
        trajectory = self.trajectories[h]
        trajectory.history.append(row)
        stops = has_stopped(trajectory.history, self._patience[h])
        for kept in (e for e in self._keep if e == self.epoch or (stops and e > self.epoch)):
            trajectory.probabilities[kept] = probabilities
            trajectory.weights[kept] = self._snapshot(h)
        if stops:
            self._running.discard(h)

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`run` goes on from, for another process or another day."""
        return {
            "epoch": self.epoch,
            "has_ended": self.has_ended,
            "running": self._running,
            "trajectories": self.trajectories,
            # Not the parameters: each is a view of `flat`, and would bring all of it along.
            "flat": self._bank.flat,
            "buffers": dict(self._bank.named_buffers()),
            "optimizer": self._optimizer.state_dict(),
            "generators": [g.get_state() for g in self._shuffles + self._bank.generators],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave: to the bit as if nothing had stopped."""
        self.epoch, self._running = state["epoch"], state["running"]
        self.trajectories = state["trajectories"]
        self._bank.flat.copy_(state["flat"])
        for name, buffer in self._bank.named_buffers():
            buffer.copy_(state["buffers"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        generators = self._shuffles + self._bank.generators
        for generator, its_state in zip(generators, state["generators"], strict=True):
            generator.set_state(its_state)

    def _snapshot(self, h: int) -> dict[str, Tensor]:
        """Head `h` as a bank of one, which reads embeddings that are not standardised."""
        state = self._bank.snapshot([h])
        return state if self._statistics is None else self._statistics.fold_into(state, h)

    def _run_epoch(self, epoch: int) -> tuple[list[dict[str, float]], list[NDArray[np.float32]]]:
        """Train and score once; a row of history and held-out probabilities per head."""
        started = time.perf_counter()
        if self._learning_rates is not None:
            self._optimizer.set_learning_rate(self._learning_rates[epoch - 1])
        rates = self._optimizer.rates_by_head
        train_losses = self._train()
        val_losses, probabilities = self._score()
        # Without held-out rows, no loss has seen the last step of the epoch; the weights have.
        if not all(x.isfinite().all() for x in (train_losses, val_losses, self._bank.flat)):
            raise TrainingError(
                f"The loss or the weights are no longer finite in epoch {epoch}. Use a smaller "
                "--lr, or check the embeddings with `cxr-cache inspect`."
            )
        self._optimizer.end_epoch(val_losses)
        seconds = (time.perf_counter() - started) / self._bank.n_heads
        rows = [
            {
                "epoch": epoch,
                "lr": rates[h],
                "train_loss": float(train_losses[h]),
                **score_held_out(self._held_out_targets[h], probabilities[h], val_losses[h]),
                "seconds": seconds,
            }
            for h in range(self._bank.n_heads)
        ]
        return rows, probabilities

    def _train(self) -> Tensor:
        """One epoch of every head; mean loss of each, ``(H,)``."""
        n_rows = self._n_steps * self._batch_size
        order = torch.stack([self._shuffle(h, n_rows) for h in range(len(self._rows))])  # (H, n)
        views = torch.stack(
            [torch.randint(len(self._embeddings), (n_rows,), generator=g) for g in self._shuffles]
        ).to(order.device)
        total = torch.zeros(len(self._rows), device=order.device)
        self._bank.train()
        # Gathered and drawn for several steps at once: as many calls fewer, and still in the cache.
        n_at_once = max(1, _TRAINED_AT_ONCE // self._batch_size) * self._batch_size
        for rows, of in zip(
            torch.split(order, n_at_once, 1), torch.split(views, n_at_once, 1), strict=True
        ):
            total += self._take_steps(self._inputs(of, rows), self._targets[rows])
        return total / self._n_steps

    def _shuffle(self, h: int, n_rows: int) -> Tensor:
        rows = self._rows[h]
        order = torch.randperm(max(len(rows), n_rows), generator=self._shuffles[h])[:n_rows]
        return rows[order.to(rows.device) % len(rows)]

    def _inputs(self, views: Tensor | int, rows: Tensor) -> Tensor:
        """What the heads read of rows ``(H, n)``: ``(H, n, D)``."""
        flat = self._embeddings.flatten(0, 1)  # (V N, D)
        picked = flat.index_select(0, (views * self._embeddings.shape[1] + rows).flatten())
        x = picked.view(*rows.shape, picked.shape[1])
        return x if self._statistics is None else self._statistics.apply(x)

    def _take_steps(self, x: Tensor, y: Tensor) -> Tensor:
        """A step for every batch of ``(H, n, D)`` and ``(H, n, F)``; the sum of their losses."""
        H, n, F = y.shape
        by_step = (n // self._batch_size, H, self._batch_size, F)  # (S, H, B, F)
        targets = y.view(H, by_step[0], -1, F).transpose(0, 1)
        logits = torch.empty(by_step, dtype=x.dtype, device=x.device)
        if self._compiled is not None:
            self._compiled.take(x.view(len(logits), -1, x.shape[2]), targets[:, 0], logits[:, 0])
        else:
            step = self._step_by_autograd if self._backprop is None else self._step_by_hand
            step(torch.split(x, self._batch_size, dim=1), targets, logits)
        losses: Tensor = self._loss(logits, targets)  # (S, H)
        return losses.sum(dim=0)

    def _step_by_hand(self, batches: Sequence[Tensor], targets: Tensor, logits: Tensor) -> None:
        assert self._backprop is not None
        factors = draw_dropout(self._bank, len(batches), self._batch_size)
        prepared = zip(*(part.unbind() for part in self._loss.prepare(targets)), strict=True)
        for x, keep, of_step, out in zip(batches, factors, prepared, logits.unbind(), strict=True):
            self._backprop.forward(x, keep, out=out)
            self._backprop.backward(self._loss.gradient(out, *of_step))
            self._optimizer.step()

    def _step_by_autograd(self, batches: Sequence[Tensor], targets: Tensor, logits: Tensor) -> None:
        for x, y, out in zip(batches, targets, logits, strict=True):
            recorded = self._bank(x)
            self._bank.backward(self._loss(recorded, y))
            self._optimizer.step()
            out.copy_(recorded.detach())

    @torch.inference_mode()
    def _score(self) -> tuple[Tensor, list[NDArray[np.float32]]]:
        """Loss and probabilities on each head's own held-out rows; zero loss where it has none."""
        rows = self._scored_rows
        self._bank.eval()
        parts = [
            self._bank(self._inputs(0, part.clamp(min=0)))
            for part in torch.split(rows, _SCORED_AT_ONCE, 1)
        ]
        logits = torch.cat(parts, dim=1)  # (H, n, F)
        targets = self._targets[rows].masked_fill(rows[..., None] < 0, torch.nan)
        probabilities = torch.sigmoid(logits).cpu().numpy()
        return (
            self._loss(logits, targets).cpu(),
            [p[: len(t)] for p, t in zip(probabilities, self._held_out_targets, strict=True)],
        )


@contextmanager
def _one_thread(*, blas: bool) -> Iterator[None]:
    """One thread for torch, and for the BLAS of compiled steps, which is another."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, "blas") if blas else nullcontext():
            yield
    finally:
        torch.set_num_threads(n_threads)


def can_compile(config: TrainConfig, n_heads: int, device: torch.device) -> bool:
    """Whether a head's steps can be compiled: it is alone, on the CPU, and numba is there."""
    return (
        n_heads == 1
        and device.type == "cpu"
        and config.norm == "batch"
        and config.loss in FOCAL_LOSSES
        and _has_numba()
    )


@cache
def _has_numba() -> bool:
    """Whether numba can be imported; an old one refuses a new numpy, which is said."""
    if find_spec("numba") is None:
        return False
    try:
        import numba  # noqa: F401
    except Exception as error:
        logger.warning("Training goes on without compiled steps: %s", error)
        return False
    return True


def estimate_step(batch_size: int) -> float:
    """Seconds of a step of the reference's head: its optimiser, and so much for every row."""
    return 6e-4 + 3e-5 * batch_size


@dataclass(frozen=True)
class InputStatistics:
    """Mean and spread of each head's training inputs, to standardise by."""

    mean: Tensor
    """``(H, 1, D)``."""
    std: Tensor
    """``(H, 1, D)``; 1 where an input never varies."""

    @classmethod
    def of(cls, embeddings: Tensor, rows: Sequence[Tensor]) -> InputStatistics:
        """Compute them over the rows of each head, of embeddings ``(N, D)``."""
        means, variances = [], []
        for chosen in rows:
            total, squares = torch.zeros(2, embeddings.shape[1], device=embeddings.device).double()
            for part in torch.split(chosen, _ROWS_AT_ONCE):
                x = embeddings[part].double()
                total += x.sum(dim=0)
                squares += x.square().sum(dim=0)
            means.append(total / len(chosen))
            variances.append((squares / len(chosen) - means[-1].square()).clamp(min=0))
        std = torch.stack(variances).sqrt()
        mean = torch.stack(means)
        # Of an input that never varies, rounding shows less than this share of its size.
        std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)
        return cls(mean[:, None].to(embeddings.dtype), std[:, None].to(embeddings.dtype))

    def apply(self, x: Tensor) -> Tensor:
        """Standardise ``(H, n, D)`` in place."""
        return x.sub_(self.mean).div_(self.std)

    def fold_into(self, state: dict[str, Tensor], h: int) -> dict[str, Tensor]:
        """Head `h` with its first layer changed so that it reads what is not standardised."""
        weight = state["weight_0"] / self.std[h].mT  # (1, D, C) / (D, 1)
        bias = state["bias_0"] - self.mean[h] @ weight  # (1, 1, C) - (1, D) @ (1, D, C)
        return state | {"weight_0": weight, "bias_0": bias}


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


# -- which heads can be trained together -----------------------------------------------


def can_share_a_bank(configs: Sequence[TrainConfig]) -> bool:
    """Whether heads with these recipes can be trained side by side.

    They may differ in learning rate, weight decay, schedule, stopping and, where it is one
    of the focal family, loss; the rest decides shapes, or what all heads do in one call.
    """
    return len({tuple(_shared(config).items()) for config in configs}) == 1


def _shared(config: TrainConfig) -> dict[str, Any]:
    """The options of a recipe that all heads of a bank have in common."""
    of_each_head = {"learning_rate", "weight_decay", "schedule", "patience", "early_stopping"}
    if config.loss in FOCAL_LOSSES:
        of_each_head |= set(LOSS_OPTIONS)
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in of_each_head}


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
            f"A fold has {count(fewest, 'image')} to train on, fewer than the batch size "
            f"{batch_size}. Use a smaller --batch-size (of ablate: --set batch_size=), fewer "
            "--folds, or more images."
        )
    return fewest // batch_size


# -- telling of epochs --------------------------------------------------------------------

EPOCHS: Final = logging.getLogger("cxr_cache.training.epochs")
"""Says of every epoch, as it ends, how it went. Whoever writes a log of trainings adds a handler
whose records have the attributes `training` (:attr:`HeadTask.name`) and `row` (a row of
:attr:`Trajectory.history`), and sets the level to DEBUG."""


OnEpoch: TypeAlias = Callable[[str, Mapping[str, float]], object]
"""Is called after every epoch with the name of the training ("fold 2 of 5", "final model") and a
row of :attr:`Trajectory.history`."""

_listeners: Final[ContextVar[tuple[OnEpoch, ...]]] = ContextVar("listeners", default=())
_part: Final[ContextVar[str]] = ContextVar("part", default="")


@contextmanager
def telling(on_epoch: OnEpoch | None) -> Iterator[None]:
    """Call a function after every epoch that ends in the block; None calls nothing.

    A training takes longer than to write about it: where the function raises, that is logged as a
    warning, the function is not called again, and the training goes on.
    """
    token = _listeners.set((*_listeners.get(), *([] if on_epoch is None else [_guard(on_epoch)])))
    try:
        yield
    finally:
        _listeners.reset(token)


def _guard(on_epoch: OnEpoch) -> OnEpoch:
    has_failed = False

    def call(training: str, row: Mapping[str, float]) -> None:
        nonlocal has_failed
        if has_failed:
            return
        try:
            on_epoch(training, row)
        except Exception as error:
            has_failed = True
            logger.warning(
                "%s is not told of further epochs, since it failed at epoch %d of %s: %s: %s. The "
                "training goes on.",
                getattr(on_epoch, "__name__", type(on_epoch).__name__),
                *(row["epoch"], training, type(error).__name__, error),
                exc_info=logger.isEnabledFor(logging.DEBUG),
            )

    return call


@contextmanager
def told_as(part: str) -> Iterator[None]:
    """Call trainings of the block "PART, fold 2 of 5", where a job trains these more than once."""
    token = _part.set(part)
    try:
        yield
    finally:
        _part.reset(token)


def tell_of_epoch(training: str, row: Mapping[str, float]) -> None:
    """Tell of an epoch to the handlers of :data:`EPOCHS`, and as :func:`telling` was asked to."""
    training = ", ".join(filter(None, (_part.get(), training or "head")))
    text = ", ".join(f"{name} {value:.5g}" for name, value in row.items())
    EPOCHS.debug("%s: %s", training, text, extra={"training": training, "row": row})
    for listener in _listeners.get():
        listener(training, row)
