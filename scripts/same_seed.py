"""How far the same recipe and seed give the same model where numbers are rounded otherwise.

    python scripts/same_seed.py features.h5 --out runs
    python scripts/same_seed.py tokens.h5 --out tuned --command finetune --precision fp32

Trains one recipe again and again, each time in processes of its own, which are told to use other
instructions, threads or processes, and compares calibrated test probabilities with the first run's:
the largest and the mean difference, the positive calls that only one of the two makes (as a share
of those that either makes), and the difference of macro AUROC. The last row is another seed on the
same split, for scale. Finished runs are kept. Options that this script does not know are those of
the command.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from benchmarking import format_table

from cxr_cache.evaluation.scored import ScoredImages, read_scored, read_trainings
from cxr_cache.metrics.scores import auroc, macro_mean
from cxr_cache.models.run import Run

HERE = [sys.executable]
TWO_PROCESSES = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
SCALAR = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
OTHER_PRODUCTS = {"MKL_CBWR": "COMPATIBLE"}
SETTINGS: dict[str, dict[str, tuple[list[str], dict[str, str], list[str]]]] = {
    "train": {
        "again": (HERE, {}, []),
        "AVX2 in torch and oneDNN": (HERE, AVX2, []),
        "no vectors in torch": (HERE, SCALAR, []),
        "MKL's products in another order": (HERE, OTHER_PRODUCTS, []),
        "all heads in one process": (HERE, {}, ["--jobs", "1"]),
        "two threads": (HERE, {"OMP_NUM_THREADS": "2"}, []),
    },
    "finetune": {
        "again": (HERE, {}, []),
        "AVX2 in torch and oneDNN": (HERE, AVX2, []),
        "MKL's products in another order": (HERE, OTHER_PRODUCTS, []),
        "two threads": (HERE, {"OMP_NUM_THREADS": "2"}, []),
        "two processes": (TWO_PROCESSES, {}, []),
    },
}
"""What starts python, the environment that is changed, and further options."""
HEADER = ["", "largest", "mean", "calls changed", "macro AUROC"]


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--command", choices=list(SETTINGS), default="train")
    options, of_command = parser.parse_known_args()
    command = [options.command, str(options.store), *of_command]
    first = train(HERE, {}, [*command, "--repeats", "2"], options.out / "first")
    scored = read_scored(first)
    rows = [HEADER]
    for number, (name, setting) in enumerate(SETTINGS[options.command].items(), start=1):
        start, environment, more = setting
        run = train(start, environment, [*command, *more], options.out / str(number))
        rows.append([name, *compare(first, scored, run, read_scored(run))])
        print(format_table([HEADER, rows[-1]]), flush=True)
    rows.append(["another seed", *compare(first, scored, first, read_trainings(first)[1])])
    print(f"\n{first.config['machine']}\n{format_table(rows)}")


def train(
    start: Sequence[str], environment: dict[str, str], command: Sequence[str], run_dir: Path
) -> Run:
    """Train in a process of its own, unless it was done before."""
    if not (run_dir / "metrics.json").is_file():
        subprocess.run(
            [*start, "-m", "cxr_cache", *command, "--run-dir", str(run_dir)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    return Run.open(run_dir)


def compare(first: Run, ours: ScoredImages, second: Run, theirs: ScoredImages) -> list[str]:
    """Columns of the table."""
    change = np.abs(ours.probabilities - theirs.probabilities)
    calls = [
        images.probabilities >= run.operating_point.thresholds
        for run, images in ((first, ours), (second, theirs))
    ]
    only_one, either = (calls[0] ^ calls[1]).sum(), (calls[0] | calls[1]).sum()
    areas = [macro_mean(auroc(each.targets, each.probabilities)) for each in (ours, theirs)]
    return [
        f"{change.max():.1e}",
        f"{change.mean():.1e}",
        f"{only_one / max(1, either):.1%}",
        f"{areas[1] - areas[0]:+.4f}",
    ]


if __name__ == "__main__":
    main()
