"""How one recipe of fine-tuning scores on the held-out rows of one fold, epoch by epoch.

    python scripts/tuning_choice.py dino.h5 frozen --epochs 8 learning_rate=1e-4 layer_decay=0.7

This is how the tuned recipe was chosen (docs/measurements.md): each try is one training on a fold's
training rows, from that fold's head of the frozen run, and no test image is read. NAME=VALUE are
fields of :class:`cxr_cache.config.FinetuneConfig`, in JSON. Each line has the mean AUROC of all
findings, that of the findings which choose the number of epochs, and the losses.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cxr_cache.encoders.loading import reload_encoder
from cxr_cache.models.run import Run
from cxr_cache.models.tuned import copy_tail
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import find_labelled_rows
from cxr_cache.store.tokens import open_tokens
from cxr_cache.training.frozen_start import config_from_run, load_starts
from cxr_cache.training.search import fold_tasks, score_fold, weigh_findings
from cxr_cache.training.tuning import Keeper, TuningData, tune


def main() -> None:
    """Train one fold and print a line for each epoch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("run", type=Path, help="The frozen run to start from.")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--random-head", action="store_true", help="Do not begin with its head.")
    given = parser.parse_intermixed_args()
    values = {name: json.loads(value) for name, value in (s.split("=", 1) for s in given.settings)}
    run = Run.open(given.run)
    config = config_from_run(run, epochs=(given.epochs,), **{"patch_dropout": 0.5} | values)
    with FeatureStore.open(given.store) as store:
        found = find_labelled_rows(store).by(config.level)
        (start,) = load_starts(run, found, store, config)
        encoder = reload_encoder(store.header.encoder)
        source = open_tokens(store, found.rows, encoder.device, "ram")
        targets = found.cohort.targets
        data = TuningData(encoder, source, targets, copy_tail(encoder, config.unfreeze_layers))
        weighing = weigh_findings(targets, found.cohort.groups, start.split, config.select_by)
        task = fold_tasks(start.split, config.seed)[given.fold]
        held_out = targets[task.held_out_rows]

        def show(state: dict[str, Any]) -> None:
            row = state["trajectory"]["history"][-1]
            probabilities = state["trajectory"]["probabilities"][row["epoch"]].numpy()
            scores = [score_fold(held_out, probabilities, w) for w in (None, weighing)]
            print(
                f"{row['epoch']:3} macro {scores[0]:.4f} chosen by {scores[1]:.4f} losses "
                f"{row['train_loss']:.5f} {row['val_loss']:.5f}, {time.process_time():.0f} CPU s",
                flush=True,
            )

        print(f"frozen to fine-tuned, fold {given.fold}: {' '.join(given.settings)}", flush=True)
        tune(
            data,
            task,
            replace(config, precision="auto"),
            n_epochs=given.epochs,
            keep=range(1, given.epochs + 1),
            keep_weights=False,
            head=None if given.random_head else start.fold_heads[given.fold],
            keeper=Keeper(load=lambda: None, save=show),
        )


if __name__ == "__main__":
    main()
