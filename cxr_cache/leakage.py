"""What a split by image would have gained by leaking: the same head, trained both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from cxr_cache.config import TrainConfig
from cxr_cache.errors import RunError
from cxr_cache.features import prepare_embeddings
from cxr_cache.fit import HeadTask, TrainingData, count_steps, fit_heads
from cxr_cache.heads import HeadBank, predict_probabilities
from cxr_cache.joint_auroc import Figure, ScoredRows, score_jointly
from cxr_cache.outcome import FINAL
from cxr_cache.run import Run
from cxr_cache.splits import split_test, split_test_by_image
from cxr_cache.store import FeatureStore
from cxr_cache.training_rows import find_done_rows

BY_STUDY: Final = "split by study"
BY_IMAGE: Final = "split by image"
LEAKING: Final = "by image, as many train images"
CLEAN: Final = "by image, no study of test in train"


@dataclass(frozen=True)
class Arm:
    """One of the heads."""

    name: str
    n_train: int
    n_test: int
    n_shared: int
    """Test images that have another image of their study, or patient, in train."""
    macro_auroc: Figure


@dataclass(frozen=True)
class Leakage:
    """Test macro AUROC of one head by study and by image, and by image with the leak stopped."""

    arms: tuple[Arm, ...]
    gain: Figure
    """By image minus by study: other test images, the same studies resampled."""
    gain_on_same_images: Figure
    """With the leak minus without: the same test images, as many train images."""
    n_epochs: int

    def to_text(self) -> str:
        """A table for a terminal."""
        lines = [
            f"Leakage: the run's head, {self.n_epochs} epochs, test macro AUROC [95 % interval "
            "over studies]",
            f"  {'':<37}{'train':>7}{'test':>7}{'shared':>8}",
        ]
        lines += [
            f"  {arm.name:<37}{arm.n_train:>7,}{arm.n_test:>7,}{arm.n_shared:>8,}  "
            f"{arm.macro_auroc.to_text()}"
            for arm in self.arms
        ]
        return "\n".join(
            [
                *lines,
                f"  by image minus by study, findings that both score: {self.gain.to_text('+')}",
                "  the leak alone, on the same test images:            "
                f"{self.gain_on_same_images.to_text('+')}",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON-able."""
        return asdict(self)


def measure_leakage(
    store: FeatureStore, run: Run, *, n_resamples: int = 1000, seed: int = 0
) -> Leakage:
    """Train a run's head on a split by image and on one by study, and test both.

    Two test splits hold different images, so two more heads are tested on the images of the split
    by image: one trained without any study (or patient) of theirs, one with their studies, on as
    many images, drawn at random. Only the leak is between these two.

    Parameters
    ----------
    store
        The run's.
    run
        Of `cxr-cache train`: gives recipe, number of epochs, learning rate of every epoch, findings
        and targets.
    n_resamples, seed
        Of the bootstrap over studies.

    Raises
    ------
    RunError
        The run was fine-tuned, or its images are not in the store.
    ConfigError
        Too few images.
    """
    config = recipe_of(run)
    data = _data_of(store, run, config)
    rates = _learning_rates(run)
    cohort = data.cohort
    options = (config.test_fraction, config.seed)
    by_study = split_test(cohort.targets, cohort.groups, *options)
    by_image = split_test_by_image(cohort.targets, cohort.findings, *options)
    others = np.flatnonzero(~by_image)
    clean = others[~np.isin(cohort.groups[others], cohort.groups[by_image])]
    leaking = np.random.default_rng(config.seed).choice(others, len(clean), replace=False)
    pairs = (
        {BY_STUDY: (np.flatnonzero(~by_study), by_study), BY_IMAGE: (others, by_image)},
        {LEAKING: (np.sort(leaking), by_image), CLEAN: (clean, by_image)},
    )
    arms, scored = {}, {}
    for pair in pairs:  # the heads of a pair take equally many steps
        tests = [np.flatnonzero(is_test) for _, is_test in pair.values()]
        scores = _train(data, [train for train, _ in pair.values()], tests, config, rates)
        for name, test, probabilities in zip(pair, tests, scores, strict=True):
            arms[name] = (pair[name][0], test)
            scored[name] = ScoredRows(test, cohort.targets[test], probabilities)
    areas = score_jointly(scored, cohort.groups, n_resamples=n_resamples, seed=seed)
    return Leakage(
        tuple(
            Arm(
                name,
                len(train),
                len(test),
                int(np.isin(cohort.groups[test], cohort.groups[train]).sum()),
                areas[name].macro(),
            )
            for name, (train, test) in arms.items()
        ),
        areas[BY_IMAGE].minus(areas[BY_STUDY]).macro(),
        areas[LEAKING].minus(areas[CLEAN]).macro(),
        len(rates),
    )


def _train(
    data: TrainingData,
    train_rows: Sequence[NDArray[np.intp]],
    test_rows: Sequence[NDArray[np.intp]],
    config: TrainConfig,
    rates: Sequence[float],
) -> list[NDArray[np.float32]]:
    """Probabilities of heads trained side by side, each for its own test rows."""
    tasks = [HeadTask(rows, np.empty(0, np.int64), config.seed) for rows in train_rows]
    trained = fit_heads(
        data,
        tasks,
        config,
        n_epochs=len(rates),
        n_steps=count_steps(tasks, config.batch_size),
        keep=[len(rates)],
        learning_rates=rates,
    )
    return [
        predict_probabilities(
            HeadBank.from_snapshot(trajectory.weights[len(rates)]),
            torch.from_numpy(data.embeddings[0, rows]),
        )[0].numpy()
        for trajectory, rows in zip(trained, test_rows, strict=True)
    ]


def recipe_of(run: Run) -> TrainConfig:
    """What the head of a run was trained with.

    Raises
    ------
    RunError
        The run was fine-tuned.
    """
    if run.config.get("kind") != "train":
        raise RunError(
            f"{run.path} was fine-tuned; the leak is measured with heads on cached embeddings. "
            "Give a run of `cxr-cache train`."
        )
    return replace(TrainConfig(**run.config["train"]), early_stopping=None)


def _data_of(store: FeatureStore, run: Run, config: TrainConfig) -> TrainingData:
    """The run's images with its targets, and their embeddings."""
    findings = tuple(run.config["findings"])
    table = run.read_table("targets").set_index("image_id")
    done = find_done_rows(store, allow_pending=True)
    rows = done[np.isin(store.image_ids[done], table.index.to_numpy(str))]
    if len(rows) < len(table):
        raise RunError(
            f"{run.path} was trained on {len(table):,} images, of which {store.path} holds "
            f"{len(rows):,}. Give the run's own store."
        )
    targets = table.loc[store.image_ids[rows], list(findings)].to_numpy(np.float32)
    cohort = replace(store.cohort.take(rows), targets=targets, findings=findings)
    embeddings = np.ascontiguousarray(store.embeddings[rows].swapaxes(0, 1))  # (V, N, D)
    return TrainingData(prepare_embeddings(embeddings, config.input_norm), cohort)


def _learning_rates(run: Run) -> list[float]:
    """Rate of every epoch up to the chosen number: the folds' geometric mean, as in a refit."""
    history = run.read_table("history")
    history = history[history["fold"] != FINAL]
    if "horizon" in history:
        history = history[history["horizon"] == run.config["chosen_epochs"]]
    history = history[history["epoch"] <= run.config["chosen_epochs"]]
    rates = np.log(history["lr"]).groupby(history["epoch"]).mean()
    return [float(rate) for rate in np.exp(rates.sort_index())]
