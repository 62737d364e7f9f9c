"""Train the last blocks of an encoder and a head together, fold by fold, on tokens."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cxr_cache.common.devices import resolve_precision
from cxr_cache.common.distributed import slice_of_process, world_size
from cxr_cache.config import FinetuneConfig
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.errors import TrainingError
from cxr_cache.models.heads import HeadBank
from cxr_cache.models.tuned import TailAndHead, name_blocks
from cxr_cache.store.studies import StudyBatch, StudyTokens, head_width, take_tokens
from cxr_cache.store.tokens import TokenSource
from cxr_cache.training.fit import HeadTask, Trajectory, has_stopped, score_held_out, tell_of_epoch
from cxr_cache.training.losses import make_loss
from cxr_cache.training.steps.optim import WeightAverage, advance, make_scheduler


@dataclass(frozen=True)
class TuningData:
    """What every fold trains from."""

    encoder: Encoder
    source: TokenSource | StudyTokens
    targets: NDArray[np.float32]
    """``(N, F)``, NaN where unlabelled."""
    tail: Mapping[str, Tensor]
    """The blocks as they were loaded, where every fold begins."""


@dataclass(frozen=True)
class Keeper:
    """Where the state of a fold survives an interruption."""

    load: Callable[[], dict[str, Any] | None]
    save: Callable[[dict[str, Any]], None] | None
    """None where another process keeps it."""


NOT_KEPT: Final = Keeper(load=lambda: None, save=None)


def build_model(
    data: TuningData,
    config: FinetuneConfig,
    *,
    seed: int = 0,
    head: Mapping[str, Tensor] | None = None,
) -> TailAndHead:
    """The encoder with its blocks as they were loaded, and a head: given, or drawn from `seed`."""
    bank = HeadBank.of_recipe(
        config,
        head_width(data.encoder.identity.embedding_width, config.level),
        data.targets.shape[1],
        seeds=[seed],
        device=data.encoder.device,
    )
    if head is not None:
        bank.load_state_dict(dict(head))
    model = TailAndHead(
        data.encoder,
        bank,
        config.unfreeze_layers,
        input_norm=config.input_norm,
        precision=resolve_precision(config.precision, data.encoder.device),
        keeps_activations=not config.grad_checkpointing,
    )
    model.restore({name: tensor[None] for name, tensor in data.tail.items()} | bank.snapshot())
    return model


def tune(
    data: TuningData,
    task: HeadTask,
    config: FinetuneConfig,
    *,
    n_epochs: int,
    keep: Collection[int],
    keep_weights: bool,
    head: Mapping[str, Tensor] | None = None,
    learning_rates: Sequence[float] | None = None,
    keeper: Keeper = NOT_KEPT,
    on_epoch: Callable[[], None] = lambda: None,
) -> Trajectory:
    """Train blocks and head on the rows of one task, and score every epoch on those held out.

    An epoch visits full batches of a fresh permutation of the task's rows, each in a random view.
    Order, dropout and augmentation of an epoch follow from the task's seed and the epoch alone, so
    that a training goes on after an interruption as if there had been none.

    Parameters
    ----------
    n_epochs, keep, learning_rates
        As in :class:`cxr_cache.training.fit.HeadFit`. The rates are those of the blocks; the head's
        stays in proportion.
    keep_weights
        Keep not only probabilities at the epochs of `keep`, but the weights too.
    head
        Where the head begins, as :meth:`HeadBank.snapshot` gives it; None draws one.
    keeper, on_epoch
        What keeps the state after every epoch, and what is called then.

    Raises
    ------
    TrainingError
        A loss is no longer finite.
    """
    state = keeper.load()
    trajectory = Trajectory() if state is None else _unpack(state["trajectory"])
    for _ in trajectory.history:
        on_epoch()
    if state is not None and state["trainer"] is None:  # it had ended
        return trajectory
    trainer = _Trainer(data, task, config, n_epochs, head, learning_rates)
    if state is not None:
        trainer.load_state(state["trainer"])
    for epoch in range(len(trajectory.history) + 1, n_epochs + 1):
        row, probabilities = trainer.run_epoch(epoch)
        trajectory.history.append(row)
        tell_of_epoch(task.name, row)
        stops = has_stopped(trajectory.history, config.early_stopping)
        for kept in (e for e in keep if e == epoch or (stops and e > epoch)):
            trajectory.probabilities[kept] = probabilities
            if keep_weights:
                trajectory.weights[kept] = trainer.snapshot()
        ends = stops or epoch == n_epochs
        if keeper.save is not None:
            left = None if ends else trainer.state()
            keeper.save({"trajectory": _pack(trajectory), "trainer": left})
        on_epoch()
        if stops:
            break
    return trajectory


def _pack(trajectory: Trajectory) -> dict[str, Any]:
    """As plain containers and tensors."""
    kept = {epoch: torch.from_numpy(p) for epoch, p in trajectory.probabilities.items()}
    return {"history": trajectory.history, "probabilities": kept, "weights": trajectory.weights}


def _unpack(packed: Mapping[str, Any]) -> Trajectory:
    kept = {epoch: tensor.numpy() for epoch, tensor in packed["probabilities"].items()}
    return Trajectory(packed["history"], kept, packed["weights"])


class _Trainer:
    """A model on its way through the epochs."""

    def __init__(
        self,
        data: TuningData,
        task: HeadTask,
        config: FinetuneConfig,
        n_epochs: int,
        head: Mapping[str, Tensor] | None,
        learning_rates: Sequence[float] | None,
    ) -> None:
        self.config, self.task, self.source = config, task, data.source
        self.learning_rates = learning_rates
        self.model = build_model(data, config, seed=task.seed, head=head)
        self.parallel: nn.Module = self.model
        if world_size() > 1:
            self.parallel = DistributedDataParallel(self.model)
        device = data.encoder.device
        self.targets = torch.from_numpy(data.targets).to(device)  # (N, F)
        self.held_out_targets = data.targets[task.held_out_rows]
        self.n_batches = len(task.train_rows) // config.batch_size
        self.optimizer = torch.optim.AdamW(group_parameters(self.model, config), fused=True)
        schedule = "constant" if learning_rates is not None else config.schedule
        self.scheduler = make_scheduler(schedule, self.optimizer, config.patience, n_epochs)
        rows = torch.from_numpy(task.train_rows).to(device)
        self.loss = make_loss(config, self.targets[rows])
        self.average = WeightAverage(self.model.tensors(), config.ema_decay)

    def run_epoch(self, epoch: int) -> tuple[dict[str, float], NDArray[np.float32]]:
        """Train and score once; a row of history, and held-out probabilities."""
        started = time.perf_counter()
        if self.learning_rates is not None:
            factor = self.learning_rates[epoch - 1] / self.config.learning_rate
            for group in self.optimizer.param_groups:
                group["lr"] = factor * group["full_lr"]
        rate = self._last_blocks_rate()
        train_loss = self._train(epoch)
        with self.average.in_place():
            val_loss, probabilities = self._score()
        are_finite = all(bool(tensor.isfinite().all()) for tensor in self.model.tail.values())
        if not (are_finite and np.isfinite([train_loss, val_loss]).all()):
            raise TrainingError(
                f"The loss or the weights are no longer finite in epoch {epoch}. Use a smaller "
                "--lr or --head-lr, some --warmup-steps, or --precision fp32."
            )
        advance(self.scheduler, val_loss)
        row = {
            "epoch": epoch,
            "lr": rate,
            "train_loss": train_loss,
            **score_held_out(self.held_out_targets, probabilities, torch.tensor(val_loss)),
            "seconds": time.perf_counter() - started,
        }
        return row, probabilities

    def _last_blocks_rate(self) -> float:
        """The configured rate as the schedule has it now; blocks before have smaller ones."""
        groups = self.optimizer.param_groups
        full = self.config.learning_rate
        return next(float(group["lr"]) for group in groups if group["full_lr"] == full)

    def _train(self, epoch: int) -> float:
        """One epoch; the mean loss."""
        order, views, seeds = self._draw(epoch)
        rows = order.to(self.targets.device).view(self.n_batches, -1)
        self.model.train()
        self.model.bank.generators[0].manual_seed(_seed(self.task.seed, epoch, "dropout"))
        total = torch.zeros((), device=self.targets.device)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        shares, kept = self._draw_shares(epoch), self._draw_patches(epoch)
        n_each = self.config.accumulate
        n_steps = -(-self.n_batches // n_each)
        for i, tokens in enumerate(self._own_batches(order, views, seeds)):
            step = i // n_each
            n_averaged = min(n_each, self.n_batches - step * n_each)  # the last may have fewer
            is_last = i == step * n_each + n_averaged - 1
            if kept is not None:
                tokens = take_tokens(tokens, kept[i])
            with self._syncing(is_last=is_last):
                loss = self._loss_of(tokens, self.targets[rows[i]], float(shares[i]))
                (loss / n_averaged).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            if is_last:
                self._step((epoch - 1) * n_steps + step + 1, rates)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return float(total) / self.n_batches

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows in the order of this epoch; of each, its view and the seed of its changes."""
        generator = torch.Generator().manual_seed(_seed(self.task.seed, epoch, "order"))
        n_rows = self.n_batches * self.config.batch_size
        order = torch.randperm(len(self.task.train_rows), generator=generator)[:n_rows]
        views = torch.randint(self.source.n_views, (n_rows,), generator=generator)
        seeds = torch.randint(2**62, (n_rows,), generator=generator)
        return torch.from_numpy(self.task.train_rows)[order], views, seeds

    def _draw_shares(self, epoch: int) -> NDArray[np.float64]:
        """Share of its own image in the mixture of every batch of this epoch."""
        if not self.config.mixup:
            return np.ones(self.n_batches)
        rng = np.random.default_rng(_seed(self.task.seed, epoch, "mixup"))
        return rng.beta(self.config.mixup, self.config.mixup, self.n_batches)

    def _draw_patches(self, epoch: int) -> Tensor | None:
        """Which tokens every batch of this epoch keeps, rising, ``(n_batches, n)``; None for all.

        Class token and registers always stay. On the CPU, from where tokens can be picked on any
        device: those of a source may be elsewhere than the encoder.
        """
        if not self.config.patch_dropout:
            return None
        encoder = self.model.encoder
        n_patches = math.prod(encoder.patch_grid)
        n_prefix = int(encoder.identity.n_tokens or 0) - n_patches
        n_kept = max(1, round(n_patches * (1 - self.config.patch_dropout)))
        generator = torch.Generator().manual_seed(_seed(self.task.seed, epoch, "patches"))
        order = torch.rand(self.n_batches, n_patches, generator=generator).argsort(dim=1)
        patches = n_prefix + order[:, :n_kept].sort(dim=1).values
        prefix = torch.arange(n_prefix).expand(self.n_batches, -1)
        return torch.cat([prefix, patches], dim=1)

    def _loss_of(self, tokens: Tensor | StudyBatch, targets: Tensor, share: float) -> Tensor:
        """The loss of a batch, whose neighbours are mixed unless the share is 1.

        Rows come in random order, so that neighbours are random pairs; and pairs stay together
        where several processes share the batch.
        """
        if share == 1:
            return self.loss(self.parallel(tokens), targets)
        assert isinstance(tokens, Tensor), "studies are not mixed"
        logits = self.parallel(share * tokens.float() + (1 - share) * _swap(tokens).float())
        return share * self.loss(logits, targets) + (1 - share) * self.loss(logits, _swap(targets))

    def _own_batches(self, *drawn: Tensor) -> Iterator[Tensor | StudyBatch]:
        """What this process does of every batch."""
        part = slice_of_process(self.config.batch_size)
        rows, views, seeds = (x.view(self.n_batches, -1)[:, part].flatten() for x in drawn)
        return self.source.batches(rows, views, part.stop - part.start, seeds=seeds)

    def _syncing(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Processes exchange gradients once a step, not once a batch."""
        if is_last or not isinstance(self.parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def _step(self, step: int, rates: Sequence[float]) -> None:
        """Clip, warm up, update."""
        ramp = min(1.0, step / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = ramp * rate
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update()

    @torch.no_grad()
    def _score(self) -> tuple[float, NDArray[np.float32]]:
        """Loss and probabilities on the held-out rows; zero loss where there are none."""
        rows = self.task.held_out_rows
        if not len(rows):
            return 0.0, np.empty((0, self.targets.shape[1]), np.float32)
        logits = self.model.logits(self.source, rows)
        loss = self.loss(logits, self.targets[torch.from_numpy(rows).to(self.targets.device)])
        return float(loss), torch.sigmoid(logits).cpu().numpy()

    def snapshot(self) -> dict[str, Tensor]:
        """The weights to score and save, as :meth:`TailAndHead.snapshot` gives them."""
        with self.average.in_place():
            return self.model.snapshot()

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on; random draws follow from its number."""
        return {
            "model": self.model.snapshot(),
            "average": self.average.state(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        self.model.restore(state["model"])
        self.average.load_state(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


def group_parameters(model: TailAndHead, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Group what trains by learning rate and weight decay.

    The last block has the configured rate, each one before it `layer_decay` times that of the next
    (Clark et al. 2020, "ELECTRA"), and the head its own. Norms and biases may be spared from weight
    decay.
    """
    blocks = name_blocks(model.tail)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in (*model.tail.items(), *model.bank.named_parameters()):
        if not parameter.requires_grad:
            continue
        rate = config.head_learning_rate
        if name in model.tail:
            (block,) = name_blocks([name])
            n_behind = len(blocks) - 1 - blocks.index(block)
            rate = config.learning_rate * config.layer_decay**n_behind
        decays = config.decay_norms or _is_matrix(name, parameter)
        key = (rate, config.weight_decay if decays else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": chosen, "lr": rate, "full_lr": rate, "weight_decay": decay}
        for (rate, decay), chosen in groups.items()
    ]


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Neither norm nor bias: of an encoder's block by its axes, of a head's stack by its name."""
    return name.startswith("weight_") or (name.startswith("visual.") and parameter.ndim >= 2)


def _swap(x: Tensor) -> Tensor:
    """Exchange the first with the second row, the third with the fourth, and so on."""
    return x.view(-1, 2, *x.shape[1:]).flip(1).view_as(x)


def _seed(seed: int, epoch: int, purpose: str) -> int:
    """A seed for one purpose in one epoch."""
    words = [seed, epoch, *purpose.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
