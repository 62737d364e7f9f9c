"""Which number of epochs each rule chooses, and what it costs on test, over many splits.

    python scripts/epoch_choice.py features.h5 --out searches --seeds 20

For every seed, a split is made and the search of `train` run once. All candidates are then made
into ensembles and scored on the test images, which no search does. The rules are compared on these
trajectories: how much their choices differ between splits, and how far the test AUROC of the chosen
candidate lies behind that of the best. Finished seeds are kept in the folder and not trained again.
A seed takes about a minute and a half of one core on 6,352 images of 1,024 features.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from benchmarking import format_table

from cxr_cache.config import SelectBy, TrainConfig
from cxr_cache.datasets.splits import TEST, Split
from cxr_cache.metrics.scores import auroc, macro_mean
from cxr_cache.models.heads import HeadBank, predict_probabilities
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import TrainingData, load_training_data
from cxr_cache.training.search import (
    choose_candidate,
    score_fold,
    search_epochs,
    split_cohort,
    stack_members,
    weigh_findings,
)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=-1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(n_jobs=options.jobs)
    with FeatureStore.open(options.store) as store:
        data = load_training_data(store, config)
    found: dict[str, list[tuple[int, float, float]]] = {}
    for seed in range(options.seeds):
        path = options.out / f"{seed}.npz"
        if not path.is_file():
            np.savez(path, **search(data, replace(config, seed=seed)))
        with np.load(path) as searched:
            judge(data, dict(searched), found)
    rows = [["rule", "chosen", "test macro AUROC", "behind the best", "worst"]]
    for rule, choices in found.items():
        chosen, scored, behind = map(np.array, zip(*choices, strict=True))
        counts = ", ".join(f"{n}: {times}" for n, times in sorted(Counter(chosen.tolist()).items()))
        row = [rule, counts, f"{scored.mean():.4f}", f"{behind.mean():.4f}", f"{behind.max():.4f}"]
        rows.append(row)
    print(format_table(rows))


def search(data: TrainingData, config: TrainConfig) -> dict[str, Any]:
    """Out-of-fold and test probabilities after every candidate number of epochs, and the folds."""
    split = split_cohort(data.cohort, config)
    found = search_epochs(data, split, config, clusters=data.cohort.groups)
    out_of_fold, test = [], []
    for epochs in config.epochs:
        held_out = np.full(data.targets.shape, np.nan, np.float32)
        for k, trajectory in enumerate(found.trajectories[epochs]):
            held_out[split.held_out(k)] = trajectory.probabilities[epochs]
        bank = HeadBank.from_snapshot(stack_members(found.trajectories[epochs], epochs))
        rows = torch.from_numpy(data.embeddings[0][split.is_test])
        out_of_fold.append(held_out)
        test.append(predict_probabilities(bank, rows).numpy())
    arrays = {"oof": np.array(out_of_fold), "test": np.array(test)}
    return arrays | {"fold": split.fold, "epochs": np.array(config.epochs)}


def judge(
    data: TrainingData, searched: dict[str, Any], found: dict[str, list[tuple[int, float, float]]]
) -> None:
    """Add what each rule chooses: epochs, its test AUROC, and how far that is from the best."""
    split = Split(searched["fold"] == TEST, searched["fold"])
    on_test = macro_mean(auroc(data.targets[split.is_test], searched["test"]))  # (C,)
    for select_by in get_args(SelectBy):
        weighing = weigh_findings(data.targets, data.cohort.groups, split, select_by)
        folds = [split.held_out(k) for k in range(split.n_folds)]
        scores = np.array(
            [
                [score_fold(data.targets[rows], candidate[rows], weighing) for rows in folds]
                for candidate in searched["oof"]
            ]
        )
        for within_one_se in (False, True):
            best = choose_candidate(scores, within_one_se=within_one_se)
            rule = select_by + ", smallest within 1 SE" * within_one_se
            behind = float(on_test.max() - on_test[best])
            chosen = (int(searched["epochs"][best]), float(on_test[best]), behind)
            found.setdefault(rule, []).append(chosen)


if __name__ == "__main__":
    main()
