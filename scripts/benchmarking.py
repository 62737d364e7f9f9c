"""What the benchmarks have in common: generated stores, facts about the machine, a table, JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cxr_cache.datasets.cohort import Cohort
from cxr_cache.store.feature_store import FeatureStore

N_FINDINGS = 35
PREVALENCE = 0.05
VECTORS: Final = {
    "amx_bf16": "amx",
    "avx512_bf16": "avx512bf16",
    "avx512f": "avx512",
    "avx2": "avx2",
    "bf16": "bf16",
    "asimd": "neon",
}
"""What a processor computes with, from the fastest: flags of the kernel, and what they are called
here. The last two are ARM's."""
ZEN: Final = (
    *((0x17, 0x00, "zen"), (0x17, 0x30, "zen2")),
    *((0x19, 0x00, "zen3"), (0x19, 0x10, "zen4"), (0x19, 0x20, "zen3"), (0x19, 0x60, "zen4")),
    *((0x1A, 0x00, "zen5"), (0x1A, 0x50, "zen6"), (0x1A, 0x60, "zen5"), (0x1A, 0x80, "zen6")),
)
"""AMD's family, first model of it, and generation, as the Linux kernel tells them."""
CPU: Final = torch.device("cpu")
RESULTS: Final = Path(__file__).resolve().parent.parent / "benchmarks"


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
    flags = set(read_cpuinfo().split())
    return {
        "processor": name_processor(),
        "cores": os.cpu_count(),
        "cpu_flags": [flag for flag in reversed(VECTORS) if flag in flags],
        "memory_gb": round(n_bytes / 1e9, 1),
        "gpus": gpus,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def results_path(benchmark: str, device: torch.device = CPU) -> Path:
    """File for the results of a benchmark on this machine's processor, or on its GPU."""
    gpu = device.type == "cuda"
    name = _spell_plainly(torch.cuda.get_device_name(device)) if gpu else name_processor()
    return RESULTS / name / f"{benchmark}.json"


def read_cpuinfo() -> str:
    """Read what the system says of the processor, as Linux writes it; never the machine's name."""
    if (path := Path("/proc/cpuinfo")).is_file():
        return path.read_text()
    name = platform.processor() or platform.machine()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return f"model name : {name}"


def name_processor(cpuinfo: str | None = None) -> str:
    """Name a processor by its make and by what it computes with.

    Machines that should measure alike have one name, such as ``amd-epyc-zen4-avx512bf16``, which is
    also that of a folder. `cpuinfo` is the text of ``/proc/cpuinfo``; None reads this machine's.
    """
    text = read_cpuinfo() if cpuinfo is None else cpuinfo
    fields: dict[str, str] = dict(re.findall(r"^([\w ]+?)\s*:[ \t]*(.*)$", text, re.MULTILINE))
    model = fields.get("model name", platform.machine())
    made = re.search(r"\b(AMD|Intel|Apple)\b.*?\b(EPYC|Ryzen|Xeon|Core|M\d+)\b", model)
    parts = list(made.groups()) if made else [re.sub(r"\(.*?\)|@.*", "", model)]
    if model.startswith("AMD"):
        family, number = (int(fields.get(name, 0)) for name in ("cpu family", "model"))
        parts += [name for of, first, name in ZEN if of == family and first <= number][-1:]
    flags = fields.get("flags", fields.get("Features", "")).split()
    parts.append(next((name for flag, name in VECTORS.items() if flag in flags), ""))
    return "-".join(_spell_plainly(part) for part in parts if part)


def _spell_plainly(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


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
