"""Devices, precisions and free memory of this machine."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Final, Literal, cast

import torch

from cxr_cache.errors import ConfigError, EncoderError

PRECISIONS = ("fp32", "bf16", "fp16")

Precision = Literal["fp32", "bf16", "fp16"]


def resolve_device(device: str) -> torch.device:
    """Return the device that a name means here; ``"auto"`` prefers cuda to mps to cpu.

    Raises
    ------
    EncoderError
        The name means no device, or this machine does not have the device.
    """
    n_devices = {
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    present = [kind for kind, count in n_devices.items() if count]
    if device == "auto":
        return torch.device(present[0])
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")  # a name that no machine has for a device to compute on
    if (chosen.index or 0) >= n_devices.get(chosen.type, 0):
        raise EncoderError(
            f"There is no device '{device}' here; torch {torch.__version__} sees "
            f"{', '.join(present)}. Use one of these, or auto."
        )
    return chosen


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """Return the precision of matrix products; ``"auto"`` is bf16 where it is native, else fp32.

    Raises
    ------
    ConfigError
        There is no such precision.
    """
    require_choice("precision", precision, ("auto", *PRECISIONS))
    if precision == "auto":
        return "bf16" if _has_native_bf16(device) else "fp32"
    return cast(Precision, precision)


def require_choice(option: str, value: str | None, choices: Sequence[str | None]) -> None:
    """Raise ConfigError unless `value` is one of the choices."""
    if value not in choices:
        raise ConfigError(f"{option} is '{value}'; choose from {', '.join(filter(None, choices))}.")


def _has_native_bf16(device: torch.device) -> bool:
    """Tell whether the device computes in bf16 itself; emulated, bf16 is slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # torch has no public function for this, and the private ones come and go between versions.
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, question, bool)() for question in questions)


def free_ram_bytes(root: Path = Path("/")) -> int:
    """Return the memory that can be had without swapping, within every limit set on this process.

    Batch systems and containers limit the control group of a job, or one above it; the kernel ends
    a process that takes more, however much the machine has. ``proc`` and ``sys`` lie in `root`.
    """
    free = 2**30  # where nobody knows
    with contextlib.suppress(OSError, AttributeError, ValueError):  # macOS has no /proc
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with contextlib.suppress(OSError, KeyError):
        free = _read_numbers(root / "proc/meminfo")["MemAvailable:"] * 1024
    for group, (limit, used, cache) in _memory_groups(root):
        with contextlib.suppress(OSError, KeyError, ValueError):  # "max" is no number
            left = int((group / limit).read_text()) - int((group / used).read_text())
            free = min(free, max(0, left + _read_numbers(group / "memory.stat")[cache]))
    return free


def require_memory(n_bytes: int, what: str, advice: str) -> None:
    """Raise ConfigError where so much memory is not to be had, before it is asked for.

    `what` takes it, in words that begin a sentence; `advice` is a sentence.
    """
    free = free_ram_bytes()
    if n_bytes > free:
        raise ConfigError(
            f"{what} take {n_bytes / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free. "
            f"{advice}"
        )


_GROUPS: Final = {
    1: (
        ("sys/fs/cgroup/memory",),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    ),
    2: (
        ("sys/fs/cgroup", "sys/fs/cgroup/unified"),
        ("memory.max", "memory.current", "file"),
    ),
}
"""Of each version of control groups: where they lie; the files of limit and use, and the entry of
``memory.stat`` for what is cached of files and can be dropped."""


def _memory_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The control group of this process and all above it, which limit it as well."""
    lines = ["0::/", ":memory:/"]  # the groups that a container sees as its own
    with contextlib.suppress(OSError):
        lines += (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        places, files = _GROUPS[2 if number == "0" else 1]
        own = PurePosixPath("/", *(part for part in PurePosixPath(path).parts if part != ".."))
        for place, group in itertools.product(places, (own, *own.parents)):
            yield root / place / group.relative_to("/"), files


def _read_numbers(path: Path) -> dict[str, int]:
    """Read a file of lines such as ``MemAvailable: 12345 kB``."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}
