"""What a GPU makes of the encoder, the fine-tuning and the heads: one table, and JSON.

    scripts/gpu_check.sh [--quick] [--device cpu] [--budget SECONDS]
                         [--sections NAME,NAME] [--out FILE]

Sections run one after the other, each within its own limit and all within the budget: one that no
longer fits is skipped, one that fails is reported and the others go on. Speeds are medians of
several rounds with the device synchronised before and after each. Weights are random: in the layout
of BiomedCLIP's ViT-B/16 where no encoder is named, else of one encoder of each kind that is read.
Tokens, pixels and labels are noise, which changes no speed.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from benchmarking import RESULTS, describe_machine, format_table, results_path, write_json
from gpu_sections.encoding import (
    check_copies,
    check_encoders,
    check_extraction,
    check_files,
    check_launching,
)
from gpu_sections.exactness import check_exactness, check_tests
from gpu_sections.measuring import Row, SectionSkipped, Setup
from gpu_sections.training import (
    check_class_token,
    check_distributed,
    check_heads,
    check_memory,
    check_places,
    check_tuning,
    work_along,
)

from cxr_cache.common.devices import resolve_device

RESERVE_S: Final = 5.0
"""Of the budget, for the end."""


@dataclass(frozen=True)
class Section:
    """Figures that belong together, and the time they may take on a GPU."""

    check: Callable[[Setup], Iterator[Row]]
    least_s: float
    """With less left of the budget, it does not begin."""
    limit_s: float
    """After this, it ends with the figures that it has."""


SECTIONS: Final = {
    "exactness": Section(check_exactness, 15, 60),
    "encoders": Section(check_encoders, 40, 110),
    "extraction": Section(check_extraction, 15, 40),
    "files": Section(check_files, 10, 40),
    "copies": Section(check_copies, 5, 20),
    "tuning": Section(check_tuning, 20, 60),
    "heads": Section(check_heads, 15, 40),
    "places": Section(check_places, 20, 40),
    "memory": Section(check_memory, 20, 40),
    "launching": Section(check_launching, 60, 100),
    "distributed": Section(check_distributed, 60, 60),
    "class_token": Section(check_class_token, 15, 30),
    "tests": Section(check_tests, 60, 120),
}
"""In this order, so that the last are left out where the time does not suffice for all. A compiler
that fails can leave the process unusable, so launching comes late."""


def run_section(section: Section, setup: Setup, left_s: float) -> dict[str, Any]:
    """Its figures, and whether they are all: done, or stopped, skipped or failed, and why."""
    if left_s < section.least_s:
        status = f"skipped: {max(left_s, 0):.0f} s are left of the budget"
        return {"status": status, "elapsed_s": 0.0, "rows": []}
    started, limit_s, rows, status = time.perf_counter(), min(section.limit_s, left_s), [], "done"
    try:
        for row in section.check(setup):
            rows.append(row)
            if time.perf_counter() - started > limit_s:
                status = f"stopped: it took more than {limit_s:.0f} s"
                break
    except SectionSkipped as reason:
        status = f"skipped: {reason}"
    except Exception as error:  # whatever it is, the other sections go on
        traceback.print_exc()
        status = f"failed: {type(error).__name__}: {error}".replace(str(RESULTS.parent), ".")
    wrong = [row.case for row in rows if row.failed or not is_within_limit(row)]
    if wrong and not status.startswith("failed"):
        status = f"failed: {'; '.join(wrong)}"
    elapsed_s = time.perf_counter() - started
    return {"status": status, "elapsed_s": elapsed_s, "rows": [asdict(row) for row in rows]}


def is_within_limit(row: Row) -> bool:
    """NaN is not."""
    return row.limit is None or (row.value is not None and row.value <= row.limit)


def tabulate(results: dict[str, dict[str, Any]]) -> str:
    """One line per figure, under a line per section."""
    lines = [["", "value", "unit", "peak MB", "limit"]]
    for name, result in results.items():
        lines.append([f"{name} ({result['elapsed_s']:.0f} s)", "", "", "", ""])
        for row in result["rows"]:
            numbers = [row[key] for key in ("value", "peak_mb", "limit")]
            value, peak, limit = ("" if x is None else _in_digits(x) for x in numbers)
            lines.append([f"  {row['case']}", value or "-", row["unit"], peak, limit])
    return format_table(lines)


def _in_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def tell(results: dict[str, dict[str, Any]]) -> str:
    """What is to be said about single figures, and about sections that have not all of them."""
    notes = [
        f"{name}, {row['case']}: {row['note']}"
        for name, result in results.items()
        for row in result["rows"]
        if row["note"]
    ]
    statuses = [f"{name}: {r['status']}" for name, r in results.items() if r["status"] != "done"]
    return "\n".join(notes + statuses)


def main() -> None:
    """Run the sections, print, and write the figures down after each of them."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny tower: does it run at all?")
    parser.add_argument("--budget", type=float, default=420, help="seconds, for all sections")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="names, with commas")
    parser.add_argument("--out", type=Path, help="JSON file; by default named by the GPU")
    parser.add_argument("--processes", type=int, help="for torchrun; one per GPU by default")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    started = time.perf_counter()
    device = resolve_device(options.device)
    n_gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    setup = Setup(device, options.quick, options.processes or n_gpus)
    if options.worker:
        work_along(setup)
        return
    names = options.sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"there is no section {', '.join(unknown)}; choose from {', '.join(SECTIONS)}")
    out = options.out or results_path("gpu_check", device)
    if options.out is None and (folder := os.environ.get("OUT")):
        out = Path(folder) / out.name
    settings = {"device": str(device), "quick": setup.quick, "encoder": setup.encoder_name}
    machine, results = describe_machine(), {}
    for name in names:
        left_s = options.budget - RESERVE_S - (time.perf_counter() - started)
        results[name] = run_section(SECTIONS[name], setup, left_s)
        print(f"{name}: {results[name]['status']}", flush=True)
        write_json(
            out,
            {"machine": machine, "settings": settings, "sections": results}
            | {"elapsed_s": time.perf_counter() - started},
        )
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    sizes = "all encoders in small" if setup.quick else setup.encoder_name
    print(f"{sizes}, on {device} ({gpus}), torch {machine['torch']}")
    print(tabulate(results))
    print(tell(results))
    if any(result["status"].startswith("failed") for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
