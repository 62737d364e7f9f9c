"""What the benchmarks have in common: generated stores, facts about the machine, a table, JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cxr_cache.datasets.cohort import Cohort
from cxr_cache.store.feature_store import FeatureStore

N_FINDINGS = 35
PREVALENCE = 0.05
TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def make_cohort(n_images: int, seed: int = 0) -> Cohort:
    """Images without files, each a study of its own, with random findings."""
    rng = np.random.default_rng(seed)
    names = np.array([f"{i:06d}.png" for i in range(n_images)])
    return Cohort(
        pd.DataFrame({"image_id": names, "study_uid": names}),
        targets=(rng.random((n_images, N_FINDINGS)) < PREVALENCE).astype(np.float32),
        findings=tuple(f"Finding {i}" for i in range(N_FINDINGS)),
        source={"generated": str(seed)},
    )


def commit_tokens(store: FeatureStore, rows: NDArray[np.intp], tokens: NDArray[np.float16]) -> None:
    """Commit rows that hold these tokens, ``(B, V, T, W)``, and zeros elsewhere."""
    features: dict[str, NDArray[Any]] = {
        name: np.zeros((len(rows), *shape), np.float32)
        for name, shape in store.feature_shapes.items()
        if name != "tokens"
    }
    store.commit(rows, features | {"tokens": tokens}, np.zeros((len(rows), 32), np.uint8))


def describe_machine() -> dict[str, Any]:
    """What the figures depend on; nothing that names the machine."""
    n_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cores": os.cpu_count(),
        "cpu_flags": _cpu_flags(),
        "memory_gb": round(n_bytes / 1e9, 1),
        "gpus": gpus,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _cpu_flags() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    present = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    return [flag for flag in TELLING_FLAGS if flag in present]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of equal width; the first row is the header, the first column text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write results for other programs, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
