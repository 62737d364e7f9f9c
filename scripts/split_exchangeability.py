"""How balanced test splits and folds are, and how alike those of different seeds.

    python scripts/split_exchangeability.py indiana_csv --seeds 200

For every seed the test split and the folds of a data set are made. Balanced is a part that holds
its share of each finding: the error is |images with the finding / (share x all of them) - 1|.
Exchangeable are seeds if no study is in test much more often than another with the finding, and no
two are together much more often than others; then each new seed is a new experiment. Of a finding
with n positive studies (or patients), the table gives

* in test: how many of them, on average, and the fewest and most of any seed;
* shared: of two seeds, the positive test studies of both, as a share of the mean of either's, and
  what independent draws of as many studies would share;
* of each positive study, the share of seeds in which it is in test: the lowest and the highest, and
  the standard deviation over studies as a multiple of what independent draws of as many have;
* together: of each two, the share of seeds in which both are in one fold, the highest.

The summary has the same for each fold as if it were the test, and for random studies, which are
exchangeable and not balanced. A seed takes half a second of one core on 3,851 studies.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from benchmarking import write_json
from numpy.typing import NDArray

from cxr_cache.datasets.readers import load_cohort
from cxr_cache.datasets.splits import assign_folds, split_test

Array = NDArray[Any]
MIN_IMAGES = 50
"""Images with a finding from which on its balance counts in the summary."""
FEW = (2, 50)
"""Positive studies of the findings that are rare."""


def main() -> None:
    """Make the splits, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="data set, as `cxr-cache describe --data` takes it")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cohort, seeds = load_cohort(options.data), range(options.seeds)
    targets, groups = cohort.targets, cohort.groups
    _, first, group_of_row = np.unique(groups, return_index=True, return_inverse=True)
    counts = np.stack([np.bincount(group_of_row, of) for of in (targets == 1).T], axis=1)  # (G, F)

    tests = np.stack([split_test(targets, groups, options.share, seed)[first] for seed in seeds])
    folds = np.stack([assign_folds(targets, groups, options.folds, seed)[first] for seed in seeds])
    at_random = np.random.default_rng(0).random(tests.shape) < options.share
    table = measure_test(counts, tests, options.share, cohort.findings)
    table["together"] = find_most_together(counts, folds)
    summary = pd.DataFrame(
        {
            "test": summarise(table),
            "random studies": summarise(
                measure_test(counts, at_random, options.share, cohort.findings)
            ),
        }
    )
    of_folds = [
        measure_test(counts, folds == k, 1 / options.folds, cohort.findings)
        for k in range(options.folds)
    ]
    summary["folds"] = np.mean([summarise(of_fold) for of_fold in of_folds], axis=0)
    print(table.sort_values("n").round(3).to_string(index=False))
    print(summary.round(4).to_string())
    if options.out is not None:
        found = {"findings": table.to_dict("records"), "summary": summary.to_dict()}
        write_json(options.out, {"seeds": options.seeds, **found})


def measure_test(
    counts: Array, is_test: Array, share: float, findings: Sequence[str]
) -> pd.DataFrame:
    """Measure balance and exchangeability, finding by finding.

    `counts` are images with each finding, ``(G, F)``; `is_test` is of every seed, ``(S, G)``.
    """
    error = np.abs(is_test @ counts / (share * counts.sum(axis=0)) - 1).mean(axis=0)
    rows = []
    for f, finding in enumerate(findings):
        chosen = is_test[:, counts[:, f] > 0].astype(float)  # (S, n)
        n, n_test = chosen.shape[1], chosen.sum(axis=1)
        often = chosen.mean(axis=0)
        usual = np.sqrt(often.mean() * (1 - often.mean()) / len(chosen))
        rows.append(
            {
                "finding": finding,
                "n": n,
                "n_images": int(counts[:, f].sum()),
                "in_test": n_test.mean(),
                "fewest": int(n_test.min()),
                "most": int(n_test.max()),
                "shared": share_pairs(chosen @ chosen.T, n_test),
                "independent": share_pairs(np.outer(n_test, n_test) / n, n_test),
                "lowest": often.min(),
                "highest": often.max(),
                "spread": often.std() / usual if usual > 0 else np.nan,
                "error": error[f],
                "missing": float(((n_test == 0) | (n_test == n)).mean()),
            }
        )
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def share_pairs(shared: Array, n_test: Array) -> float:
    """Positive test studies that two seeds share, ``(S, S)``, over the mean of their own."""
    pairs = np.triu_indices(len(n_test), 1)
    own = ((n_test[:, None] + n_test) / 2)[pairs].sum()
    return float(shared[pairs].sum() / own) if own else np.nan


def find_most_together(counts: Array, folds: Array) -> list[float]:
    """Find the share of seeds in which the two studies are in one fold that most often are.

    One number per finding; `folds` is ``(S, G)``.
    """
    most = []
    for of_finding in counts.T:
        of_seeds = folds[:, of_finding > 0]
        together = np.zeros((of_seeds.shape[1],) * 2)
        for k in range(int(folds.max()) + 1):
            inside = (of_seeds == k).astype(float)
            together += inside.T @ inside / len(folds)
        np.fill_diagonal(together, 0)
        most.append(float(together.max()))
    return most


def summarise(table: pd.DataFrame) -> pd.Series:
    """Mean error of frequent findings, and means over rare ones of what makes seeds alike."""
    frequent, rare = table[table["n_images"] >= MIN_IMAGES], table[table["n"].between(*FEW)]
    summary: pd.Series = pd.Series(
        {
            f"error, {MIN_IMAGES} images or more": frequent["error"].mean(),
            "shared, rare findings": rare["shared"].mean(),
            "independent draws, rare findings": rare["independent"].mean(),
            "spread, rare findings": rare.loc[rare["n"] > FEW[0], "spread"].mean(),
            "highest share of seeds, 3 studies or more": table.loc[table["n"] > 2, "highest"].max(),
            "rare findings that a side lacks, per seed": rare["missing"].sum(),
        }
    )
    return summary


if __name__ == "__main__":
    main()
