"""What the sections share: the machine, a figure, how speeds and memory are measured."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import load_encoder

N_UNFROZEN: Final = 2
MODES: Final = ("fp32", "tf32", "bf16")


@dataclass(frozen=True)
class Setup:
    """What is measured, and how long."""

    device: torch.device
    quick: bool
    n_processes: int

    @property
    def encoder_name(self) -> str:
        """Full size, or just enough to see that the script runs."""
        return "random:test_vit" if self.quick else "random:vit_base_patch16_224"

    def pick(self, full: Any, quick: Any) -> Any:
        """The one of two sizes that applies."""
        return quick if self.quick else full

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Row:
    """One figure; a value of None with a note says why there is none."""

    case: str
    value: float | None
    unit: str
    peak_mb: float | None = None
    """Device memory at its peak, over what was allocated before."""
    limit: float | None = None
    """A larger value is a failure."""
    note: str = ""
    failed: bool = False


class SectionSkipped(Exception):  # noqa: N818 - not an error
    """What the section is about is not on this machine."""


@contextmanager
def computing_in(mode: str) -> Iterator[None]:
    """Let float32 products use the matrix units' tf32, or see that they do not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = mode == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def autocast_of(mode: str) -> Any:
    """The package's name: tf32 is a way to compute fp32."""
    return "bf16" if mode == "bf16" else "fp32"


def attempt(setup: Setup, case: str, measure: Callable[[], float], unit: str = "images/s") -> Row:
    """One figure with its peak memory; running out of memory is a result, and so is a failure."""
    on_gpu = setup.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setup.device)
        before = torch.cuda.memory_allocated(setup.device)
    try:
        value = measure()
    except torch.OutOfMemoryError:
        return Row(case, None, unit, note="out of memory")
    except Exception as error:  # whatever it is, the other figures are still wanted
        return failure(case, error, unit)
    if not on_gpu:
        return Row(case, value, unit)
    peak = torch.cuda.max_memory_allocated(setup.device) - before
    return Row(case, value, unit, peak_mb=peak / 1e6)


def failure(case: str, error: Exception, unit: str = "") -> Row:
    """What there is instead of a figure; the rest of the error goes to stderr."""
    traceback.print_exception(error)
    return Row(case, None, unit, note=f"{type(error).__name__}: {error}", failed=True)


def speed_of(setup: Setup, step: Callable[[], object], n_images: int) -> float:
    """Images/s: the median of five rounds of a third of a second."""

    def seconds(n_steps: int) -> float:
        setup.synchronize()
        started = time.perf_counter()
        for _ in range(n_steps):
            step()
        setup.synchronize()
        return time.perf_counter() - started

    seconds(setup.pick(3, 1))  # to warm up
    n_steps: int = max(1, round(setup.pick(0.3, 0.01) / seconds(1)))
    return n_images * n_steps / median(seconds(n_steps) for _ in range(setup.pick(5, 2)))


@cache
def encoder_in(setup: Setup, precision: Any) -> Encoder:
    """One encoder per precision for all sections; its blocks begin anew in every training."""
    return load_encoder(setup.encoder_name, device=str(setup.device), precision=precision)


def draw_pixels(encoder: Encoder, n_images: int) -> Tensor:
    """Noise, uint8, on the processor."""
    size_px = encoder.preprocessing.image_size_px
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (n_images, 3, size_px, size_px), dtype=torch.uint8, generator=generator
    )


def draw_tokens(encoder: Encoder, n_images: int) -> Tensor:
    """Noise, float16, ``(N, 1, T, W)`` on the encoder's device."""
    identity = encoder.identity
    generator = torch.Generator(encoder.device).manual_seed(0)
    return torch.randn(
        *(n_images, 1, int(identity.n_tokens or 0), int(identity.token_width or 0)),
        dtype=torch.float16,
        device=encoder.device,
        generator=generator,
    )


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm; zero where both are zero."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
