"""Several processes that train one model together, as torchrun starts them.

In a process that trains alone, every function here does nothing.
"""

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
    """Join the other processes that torchrun started, if any, while the block runs.

    Given the device that the user asked for, it gives the one on which this process computes: of
    several GPUs the one with its local rank.

    Raises
    ------
    ConfigError
        There are more processes than GPUs, the device is neither CPU nor CUDA, or torchrun's
        environment is incomplete.
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
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Tell whether this process is the one that writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def slice_of_process(n: int) -> slice:
    """Return the slice of `n` items that is this process's share; sizes differ by at most 1."""
    first, end = (n * k // world_size() for k in (rank(), rank() + 1))
    return slice(first, end)


def gather_parts(part: Tensor, n: int) -> Tensor:
    """Join along axis 0 what each process has for its :func:`slice_of_process` of `n` items."""
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
    """Gather the whole batch, of which each process holds an equal part, ``(b, D) -> (B, D)``.

    Every process then computes the head, batch norm included, on the whole batch. Gradients flow
    back to each process's own part only.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherBatch.apply(rows)
    return gathered


class _GatherBatch(torch.autograd.Function):
    """Gathering of a batch, through which each process gets the gradient of its own rows.

    All processes compute the same loss from the same rows, so none has to ask the others for a
    gradient. It is multiplied by the number of processes, because DistributedDataParallel averages
    over processes, although each contributes by its own rows only.
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
