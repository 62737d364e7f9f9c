"""Store to run folder: a head on cached embeddings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cxr_cache.common.devices import resolve_device
from cxr_cache.common.machine import describe_machine
from cxr_cache.common.wording import count
from cxr_cache.config import RepeatConfig, TrainConfig
from cxr_cache.datasets.splits import Split
from cxr_cache.errors import ConfigError
from cxr_cache.models.heads import predict_probabilities
from cxr_cache.models.run import Run, SavedModel, require_free
from cxr_cache.store.rows import TrainingData, load_training_data
from cxr_cache.store.side_by_side import StorePaths, list_stores, open_stores
from cxr_cache.training.baselines import train_logistic
from cxr_cache.training.fit import told_as
from cxr_cache.training.outcome import (
    TrainResult,
    describe_codes,
    describe_head,
    describe_labels,
    describe_split,
    note_split,
    tabulate_repeats,
    write_outcome,
)
from cxr_cache.training.search import (
    count_epochs,
    require_trainable_folds,
    search_epochs,
    seed_of_repeat,
    split_rows,
    stack_members,
    train_final,
)

logger = logging.getLogger(__name__)


def fit_run(
    store_path: StorePaths,
    run_dir: str | Path,
    config: TrainConfig | None = None,
    *,
    labels: str | Path | None = None,
    allow_pending: bool = False,
    overwrite: bool = False,
    n_repeats: int = RepeatConfig.n_repeats,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> TrainResult:
    """Split, search the number of epochs, train the final head and write the run folder.

    Parameters and errors are those of :func:`cxr_cache.jobs.runs.train_head`, which calls this and
    then evaluates the run. Test rows take part in nothing but the final predictions.
    """
    config, n_repeats = config or TrainConfig(), RepeatConfig(n_repeats).n_repeats
    if config.protocol == "nested" and n_repeats > 1:
        raise ConfigError(
            f"--repeats {n_repeats} trains again on one split, and --protocol nested has many. "
            "Give one of the two; another --seed makes other outer folds."
        )
    run_dir = Path(run_dir)
    labels = None if labels is None else Path(labels)
    require_free(run_dir, overwrite=overwrite)
    device = resolve_device(config.device)
    with open_stores(store_path) as stores:
        data = load_training_data(
            stores[0], config, further=stores[1:], labels=labels, allow_pending=allow_pending
        )
        described: list[dict[str, Any]] = [
            {"path": str(path), "encoder": one.header.encoder, "cohort": one.header.cohort}
            for path, one in zip(list_stores(store_path), stores, strict=True)
        ]
        reading = stores[0].header.reading
    cohort, encoders = data.cohort, [one["encoder"] for one in described]
    n_rows = count(len(cohort), config.level)
    logger.info("%s: %s on %s, with %s", store_path, n_rows, config.device, config)
    source = {
        "seed": config.seed,
        "machine": describe_machine(device),
        "findings": list(cohort.findings),
        "store": described[0],
        **({"further_stores": described[1:]} if described[1:] else {}),
        "reading": reading,
        "labels": describe_labels(labels),
        "label_codes": describe_codes(cohort),
        "n_views": len(data.embeddings),
        "random_encoder": any(bool(encoder.get("is_random")) for encoder in encoders),
    }
    job = _Job(data, source, config, n_repeats, on_progress)
    if config.n_outer_folds is None:
        return job.train(run_dir, split_rows(cohort, data.studies, config), overwrite=overwrite)
    return job.train_nested(run_dir, config.n_outer_folds, overwrite=overwrite)


@dataclass(frozen=True, eq=False)
class _Job:
    """Rows to train on, and how: what the trainings of one command have in common."""

    data: TrainingData
    source: dict[str, Any]
    """What ``config.json`` says of where the rows come from."""
    config: TrainConfig
    n_repeats: int
    on_progress: Callable[[int, int], None]

    def train_nested(self, run_dir: Path, n_outer: int, *, overwrite: bool) -> TrainResult:
        """Test every outer fold by a run of its own, and train the model to use on all rows.

        The runs of the outer folds lie in the folder of the whole, which is not finished before
        they are.
        """
        data, config = self.data, self.config
        splits = [split_rows(data.cohort, data.studies, config, k) for k in range(n_outer)]
        everything = split_rows(data.cohort, data.studies, config)
        for split in (*splits, everything):
            require_trainable_folds(data.targets, split, config)

        def test_outer_folds(run: Run) -> None:
            for k, split in enumerate(splits, start=1):
                part = partial(count_epochs, self.on_progress, n_outer + 1, k)
                job = replace(self, config=config.of_outer_fold, on_progress=part)
                with told_as(f"outer fold {k} of {n_outer}"):
                    job.train(run.outer_path(k), split)

        last = partial(count_epochs, self.on_progress, n_outer + 1, n_outer + 1)
        return replace(self, on_progress=last).train(
            run_dir, everything, overwrite=overwrite, begin=test_outer_folds
        )

    def train(
        self,
        run_dir: Path,
        split: Split,
        *,
        overwrite: bool = False,
        begin: Callable[[Run], None] = lambda _run: None,
    ) -> TrainResult:
        """Search, train and write one run; `begin` is called when its folder is its own."""
        data, config, cohort = self.data, self.config, self.data.cohort
        require_trainable_folds(cohort.targets, split, config)  # before an old run gives way
        notes = data.notes + note_split(split, cohort, config.level)
        entries = {"split": describe_split(split, cohort), "warnings": list(notes)}
        described = {"kind": "train", "train": asdict(config), **self.source, **entries}
        run = Run.create(run_dir, described, overwrite=overwrite)
        begin(run)
        search = search_epochs(
            data,
            split,
            config,
            clusters=cohort.groups,
            on_progress=partial(count_epochs, self.on_progress, self.n_repeats, 1),
        )
        bank, final_history = train_final(data, split, search, config)
        probabilities = predict_probabilities(bank, torch.from_numpy(data.embeddings[0]))
        has_baseline = config.baseline and split.is_test.any()
        baseline = train_logistic(data, split, search.weighing, config) if has_baseline else None
        if self.n_repeats > 1:
            repeats = self._test_repeats(run, split)
            tested = [probabilities.numpy()[split.is_test], *repeats]
            run.config["n_repeats"] = self.n_repeats
            run.write_table("repeats", tabulate_repeats(cohort, split, tested))
        logger.info("The final model is trained; writing %s", run_dir)
        run.save_fold_heads(stack_members(search.trajectories[search.chosen], search.chosen))
        stores = [run.config["store"], *run.config.get("further_stores", ())]
        encoders = [store["encoder"] for store in stores]
        write_outcome(
            run,
            cohort,
            split,
            search,
            config,
            predictions=probabilities.numpy(),
            features=data.embeddings[0],
            final_history=final_history,
            studies=data.studies,
            make_model=lambda thresholds: SavedModel(
                bank.snapshot(),
                cohort.findings,
                thresholds,
                encoders[0],
                describe_head(config),
                further_encoders=tuple(encoders[1:]),
            ),
            baseline=baseline,
            flow=data.flow,
            files=data.files,
        )
        return TrainResult(run, search, notes)

    def _test_repeats(self, run: Run, split: Split) -> Iterator[NDArray[np.float32]]:
        """Train the recipe again on the same split, with other seeds; test predictions, ``(n, F)``.

        The heads of each are kept, for a fine-tuning of the same repeats to begin with.
        """
        data, config, n_repeats = self.data, self.config, self.n_repeats
        embeddings = torch.from_numpy(data.embeddings[0])
        for repeat in range(2, n_repeats + 1):
            again = replace(config, seed=seed_of_repeat(config.seed, repeat))
            progress = partial(count_epochs, self.on_progress, n_repeats, repeat)
            groups = data.cohort.groups
            with told_as(f"repeat {repeat} of {n_repeats}"):
                found = search_epochs(data, split, again, clusters=groups, on_progress=progress)
                bank, _ = train_final(data, split, found, again)
            members = stack_members(found.trajectories[found.chosen], found.chosen)
            final = bank.snapshot([0])
            run.save_repeat_heads(repeat, {k: torch.cat([members[k], final[k]]) for k in members})
            yield predict_probabilities(bank, embeddings).numpy()[split.is_test]
