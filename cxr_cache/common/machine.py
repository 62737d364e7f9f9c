"""The machine that a result was computed on, as far as the last digits of numbers depend on it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cxr_cache.common.wording import find_differences

if TYPE_CHECKING:  # torch takes seconds to import; `compare` does without it
    import torch

_CHOOSING: Final = (
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"),
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE", "NVIDIA_TF32_OVERRIDE"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG"),
)
"""Environment variables that choose instructions or numbers of threads."""

_LIBRARIES: Final = {
    "MKL": r"Math Kernel Library Version (\S+?)-",
    "oneDNN": r"(?:MKL-DNN|oneDNN) v(\S+)",
    "OpenBLAS": r"OpenBLAS (\d\S*)",
}
"""Where torch names the libraries that it multiplies matrices with."""


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe what rounds the numbers of a training: processor, instructions, libraries, threads.

    Two machines that differ in any of it add the same numbers in another order. A training enlarges
    the difference, so that the same seed gives another model.

    Parameters
    ----------
    device
        Where the training computes.

    Returns
    -------
    dict[str, Any]
        ``processor`` and ``architecture``; ``cores`` that this process may use, and ``threads`` of
        torch; ``instructions``, the widest that torch's own kernels use (``"AVX512"``);
        ``torch_libraries`` and ``numpy_blas`` with their versions; ``gpu``, unless the device is
        the processor; and ``environment``, the variables that change any of this, if any is set.
    """
    import torch
    from joblib import cpu_count

    chosen = {name: os.environ[name] for name in _CHOOSING if name in os.environ}
    return {
        "processor": name_processor(),
        "architecture": platform.machine(),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch_libraries": _name_torch_libraries(),
        "numpy_blas": _name_numpy_blas(),
        **({} if device.type == "cpu" else {"gpu": _name_accelerator(device)}),
        **({"environment": chosen} if chosen else {}),
    }


def compare_machines(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """List what differs between two machines that :func:`describe_machine` described.

    Examples
    --------
    >>> compare_machines(
    ...     {"instructions": "AVX2", "environment": {}},
    ...     {"instructions": "AVX512", "environment": {"OMP_NUM_THREADS": "1"}},
    ... )
    'instructions AVX2 and AVX512, OMP_NUM_THREADS not set and 1'
    """
    flat = [
        {**machine, **machine.get("environment", {}), "environment": None}
        for machine in (first, second)
    ]
    return ", ".join(
        f"{name.replace('_', ' ') if name.islower() else name} "
        + " and ".join("not set" if value is None else str(value) for value in values)
        for name, values in find_differences(*flat).items()
    )


def name_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name the processor's model; with its numbers, since virtual machines hide parts of names."""
    lines = []
    with contextlib.suppress(OSError):  # not on Linux
        lines = cpuinfo.read_text(errors="replace").splitlines()
    pairs = (line.partition(":") for line in lines if ":" in line)
    known: dict[str, str] = {}
    for name, _, value in pairs:
        known.setdefault(name.strip(), value.strip())
    numbers = ", ".join(
        f"{label} {known[name]}"
        for label, name in (("family", "cpu family"), ("model", "model"))
        if name in known
    )
    if "model name" in known:
        return f"{known['model name']} ({numbers})" if numbers else known["model name"]
    return platform.processor() or "unknown"


def _name_torch_libraries() -> str:
    import torch

    built_with = torch.__config__.show()
    found = {name: re.search(pattern, built_with) for name, pattern in _LIBRARIES.items()}
    return ", ".join(f"{name} {match[1]}" for name, match in found.items() if match) or "unknown"


def _name_numpy_blas() -> str:
    """Name the libraries behind NumPy and SciPy, and the processor that they compute for."""
    from threadpoolctl import threadpool_info

    names = {
        " ".join(
            str(pool[key]) for key in ("internal_api", "version", "architecture") if pool.get(key)
        )
        for pool in threadpool_info()
        if pool["user_api"] == "blas"
    }
    return ", ".join(sorted(names)) or "unknown"


def _name_accelerator(device: torch.device) -> str:
    import torch

    if device.type != "cuda":
        return device.type
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    versions = f"CUDA {torch.version.cuda}, cuDNN {cudnn}"
    return f"{torch.cuda.get_device_name(device)}, {versions}"
