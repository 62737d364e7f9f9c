"""Every command that reads all rows, on more and more of them: is time linear, and memory flat?

    python scripts/bench_growth.py [--rows 100,200,400] [--steps import,train] [--epochs 2]
                                   [--folder DIR] [--minutes 8] [--quick] [--out FILE]

For each number of thousand rows, a data set is generated (two CSV files, and an ``.npz`` with
embeddings of 512 numbers that 35 findings can be learnt from), and the commands a user would give
run one after the other, each as a process of its own: ``describe``, ``import``, ``train`` (5 folds
and a final model, batch 1,024), ``evaluate``, ``report`` and ``audit``. ``open`` opens the store
and reads no row of it. ``--rows 1000`` is a million.

Memory is that of the process and of every process that it starts: the largest sum, sampled twice
a second, of what each holds (pages that several share are divided among them, pages of a
mapped file count), or the kernel's own maximum for the first of them where that is more. What the
same command holds on 2,000 rows, mostly libraries, is taken off. The table gives the rest in
megabytes and, at the largest size, as a multiple of the bytes of all embeddings. Slopes are of a
straight line on log scales, through the processor seconds beyond those for 2,000 rows, which a
busy machine distorts less than the clock: 1 is linear. Beside them stands the size of the page.

With ``--folder`` and ``--minutes`` the work can be done in portions: what has been measured stays
in ``figures.json`` of that folder, no step begins after so many minutes, and the same call again
goes on. The table and the results are written once nothing is left to measure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from benchmarking import describe_machine, format_table, results_path, write_json

from cxr_cache.datasets.labels import FINDINGS

WIDTH = 512
BATCH_SIZE = 1024
GOALS = {"multiple": 3.0, "slope": 1.1}
"""Memory of any step, in embeddings' bytes at the largest size, and its growth in time."""
SAMPLED_EVERY_S = 0.5
SMALL = 2_000
"""Rows of which next to nothing is held."""
STEPS = ("describe", "import", "open", "train", "evaluate", "report", "audit")
Figures = dict[str, float]


def write_data(folder: Path, n_images: int) -> None:
    """Two images per study, as the Indiana tables have them, and their embeddings."""
    rng = np.random.default_rng(0)
    prevalence = np.geomspace(0.3, 0.002, len(FINDINGS))
    uids = np.arange(n_images) // 2
    present = (rng.random((uids[-1] + 1, len(FINDINGS))) < prevalence)[uids]  # (N, F)
    labels = [";".join(np.array(FINDINGS)[row]) or "Normal" for row in present]
    image_ids = [f"{i:07d}.png" for i in range(n_images)]
    pd.DataFrame(
        {"uid": uids, "filename": image_ids, "projection": "Frontal", "label": labels}
    ).to_csv(folder / "indiana_projections.csv", index=False)
    pd.DataFrame({"uid": np.unique(uids), "Problems": "normal"}).to_csv(
        folder / "indiana_reports.csv", index=False
    )
    directions = rng.normal(size=(len(FINDINGS), WIDTH)).astype(np.float32)
    embeddings = rng.standard_normal((n_images, WIDTH), np.float32)
    embeddings += 0.3 * present.astype(np.float32) @ directions
    np.savez(folder / "embeddings.npz", image_id=image_ids, embeddings=embeddings)


def commands(folder: Path, n_epochs: int) -> dict[str, list[str]]:
    """What a user would give, in order; `open` stands for whatever begins with a store."""
    store, run = str(folder / "store.h5"), str(folder / "run")
    tool = ["-m", "cxr_cache"]
    recipe = ["--epochs", str(n_epochs), "--batch-size", str(BATCH_SIZE), "--lr", "1e-3"]
    embeddings, csv_dir = str(folder / "embeddings.npz"), str(folder)
    opening = f"import cxr_cache; cxr_cache.FeatureStore.open({store!r}).close()"
    return {
        "describe": [*tool, "describe", "--csv-dir", csv_dir],
        "import": [*tool, "import", embeddings, "--csv-dir", csv_dir, "--store", store],
        "open": ["-c", opening],
        "train": [*tool, "train", store, "--run-dir", run, *recipe],
        "evaluate": [*tool, "evaluate", run],
        "report": [*tool, "report", run],
        "audit": [*tool, "audit", store, "--run-dir", run, "--out", str(folder / "audit")],
    }


def measure(arguments: Sequence[str]) -> Figures:
    """Run Python with these arguments: seconds by the clock and of processors, peak megabytes."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peaks, ended = [0], threading.Event()

    def sample() -> None:
        waits = itertools.chain(itertools.repeat(0.05, 10), itertools.repeat(SAMPLED_EVERY_S))
        while not ended.wait(next(waits)):  # often at first: some processes end in half a second
            held = sum(read_bytes(member, "smaps_rollup", "Pss:") for member in family(process.pid))
            peaks.append(max(held, read_bytes(process.pid, "status", "VmHWM:")))

    sampler = threading.Thread(target=sample)
    sampler.start()
    output, _ = process.communicate()
    elapsed_s = time.perf_counter() - started
    ended.set()
    sampler.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{output}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": elapsed_s, "cpu_seconds": cpu_s, "peak_mb": max(peaks) / 1e6}


def family(pid: int) -> Iterator[int]:
    """A process and all that it has started."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended meanwhile
        return
    for child in children:
        yield from family(int(child))


def read_bytes(pid: int, file: str, entry: str) -> int:
    """A figure in kB that the kernel gives for a process; 0 where that has ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(entry))


def summarise(
    step: str, small: Mapping[str, Figures], measured: Mapping[int, Mapping[str, Figures]]
) -> dict[str, Any]:
    """Figures of one step at every size, its slope in time and its memory at the largest size."""
    sizes = [
        {
            "rows": n_rows,
            **figures[step],
            "above_mb": max(0.0, figures[step]["peak_mb"] - small[step]["peak_mb"]),
        }
        for n_rows, figures in measured.items()
    ]
    beyond = [max(1e-2, size["cpu_seconds"] - small[step]["cpu_seconds"]) for size in sizes]
    slope, _ = np.polyfit(np.log(list(measured)), np.log(beyond), 1)
    multiple = sizes[-1]["above_mb"] * 1e6 / (sizes[-1]["rows"] * WIDTH * 4)
    return {"small": small[step], "sizes": sizes, "slope": float(slope), "multiple": multiple}


class Portions:
    """Figures by number of rows and step, kept in a folder from one call to the next."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self._path = folder, folder / "figures.json"
        self._ends = time.monotonic() + 60 * minutes
        kept = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.figures: dict[int, dict[str, Figures]] = {int(n): of for n, of in kept.items()}

    def measure_size(self, n_rows: int, steps: Sequence[str], n_epochs: int) -> bool:
        """Measure every step on so many rows that was not; whether all of them are known now."""
        folder, known = self.folder / str(n_rows), self.figures.setdefault(n_rows, {})
        if not set(steps) - set(known):
            return True
        if not folder.exists():
            folder.mkdir(parents=True)
            write_data(folder, n_rows)
        for step, command in commands(folder, n_epochs).items():
            if step not in steps or step in known:
                continue
            if time.monotonic() > self._ends:
                return False
            known[step] = measure(command)
            if step == "report":
                known[step]["page_mb"] = (folder / "run" / "report.html").stat().st_size / 1e6
            self._path.write_text(json.dumps(self.figures))
            told = ", ".join(f"{value:,.1f} {name}" for name, value in known[step].items())
            print(f"{n_rows:>9,} rows, {step}: {told}", flush=True)
        shutil.rmtree(folder)
        return True


def tabulate(results: Mapping[str, Any]) -> str:
    """A row per step: time and memory at every size, slope, multiple, megabytes of the page."""
    sizes = [f"{size['rows'] // 1000}k" for size in next(iter(results.values()))["sizes"]]
    rows = [["", "2k rows", *sizes, "slope", "x embeddings", "page MB"]]
    for step, result in results.items():
        small, largest = result["small"], result["sizes"][-1]
        grown = [f"{r['seconds']:.1f} s +{r['above_mb']:,.0f} MB" for r in result["sizes"]]
        page = f"{largest['page_mb']:.2f}" if "page_mb" in largest else ""
        least = f"{small['seconds']:.1f} s {small['peak_mb']:,.0f} MB"
        judged = [f"{result['slope']:.2f}", f"{result['multiple']:.2f}"]
        rows.append([step, least, *grown, *judged, page])
    return format_table(rows)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rows", default="100,200,400", help="thousands, separated by commas")
    parser.add_argument("--steps", default=",".join(STEPS), help="those to measure, with commas")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write; the disk that is measured")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after")
    parser.add_argument("--quick", action="store_true", help="toy size, to see that it runs")
    parser.add_argument("--out", type=Path, default=results_path("growth"))
    options = parser.parse_args()
    sizes = [int(1000 * float(part)) for part in options.rows.split(",")]
    sizes = [2 * SMALL, 4 * SMALL] if options.quick else sizes
    steps = [step for step in STEPS if step in options.steps.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        portions = Portions(options.folder or Path(temporary), options.minutes)
        if not all(portions.measure_size(n, steps, options.epochs) for n in (SMALL, *sizes)):
            print("Not all is measured. The same call again goes on.")
            return
    measured = {n: portions.figures[n] for n in sizes}
    results = {step: summarise(step, portions.figures[SMALL], measured) for step in steps}
    print(tabulate(results))
    settings = {"width": WIDTH, "batch_size": BATCH_SIZE, "epochs": options.epochs}
    write_json(
        options.out,
        {"machine": describe_machine(), "settings": settings, "results": results, "goals": GOALS},
    )


if __name__ == "__main__":
    main()
