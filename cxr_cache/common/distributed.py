"""Several processes that train one model, as torchrun starts them; alone, everything is a no-op."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cxr_cache.errors import ConfigError


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes, if torchrun started any, for as long as the block runs.

    Parameters
    ----------
    device
        What the user asked for.

    Yields
    ------
    torch.device
        What this process computes on: of several GPUs the one with its local rank.

    Raises
    ------
    ConfigError
        More processes than GPUs, another kind of device than CPU and CUDA, or half of torchrun's
        environment.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if "RANK" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and RANK is not set. Start several "
            "processes with torchrun, or unset WORLD_SIZE."
        )
    if device.type == "cuda":
        local_rank, n_devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= n_devices:
            raise ConfigError(
                f"torchrun started process {local_rank + 1} on a machine with {n_devices} GPUs. "
                f"Use --nproc-per-node {n_devices}."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ConfigError(f"Several processes train on cuda or cpu, not on {device.type}.")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def own_part(n: int) -> slice:
    """The share of `n` things of this process, in one piece; sizes differ by one at most."""
    first, end = (n * k // world_size() for k in (rank(), rank() + 1))
    return slice(first, end)


def gather_parts(part: Tensor, n: int) -> Tensor:
    """Join what each process has for its :func:`own_part` of `n` things; axis 0."""
    if world_size() == 1:
        return part
    largest = -(-n // world_size())
    padded = part.new_zeros(largest, *part.shape[1:])
    padded[: len(part)] = part
    gathered = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(gathered, padded)
    ends = [n * k // world_size() for k in range(world_size() + 1)]
    sizes = [end - start for start, end in itertools.pairwise(ends)]
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])


def gather_batch(rows: Tensor) -> Tensor:
    """The whole batch, of which each process holds an equal part, ``(b, D) -> (B, D)``.

    Gradients flow back to the own part, so that what follows, batch norm included, is computed on
    the whole batch by every process alike.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherBatch.apply(rows)
    return gathered


class _GatherBatch(torch.autograd.Function):
    """All processes compute the same loss from the same rows, so each knows its own gradient.

    Its part times the number of processes, since DistributedDataParallel averages over them: a
    process contributes to the encoder's gradient by its own rows only.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.n_rows = len(rows)
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        start = rank() * ctx.n_rows
        return grads[0][start : start + ctx.n_rows] * world_size()
