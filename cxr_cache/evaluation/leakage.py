"""What a split by image would have gained by leaking: the same head, trained both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from cxr_cache.common.wording import count
from cxr_cache.config import TrainConfig
from cxr_cache.datasets.cohort import UNITS, Unit, name_unit
from cxr_cache.datasets.splits import split_test, split_test_by_image
from cxr_cache.errors import RunError
from cxr_cache.metrics.paired import Figure, JointAuroc, ScoredRows, score_jointly
from cxr_cache.models.aligned import align_run
from cxr_cache.models.heads import HeadBank, predict_probabilities
from cxr_cache.models.run import FINAL_FOLD, Run
from cxr_cache.models.split_reads import count_reading
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import TrainingData, find_done_rows, read_features
from cxr_cache.training.fit import HeadTask, fit_heads
from cxr_cache.training.search import average_rates

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
    """By image minus by study: other test images, the same studies (or patients) resampled."""
    gain_on_same_images: Figure
    """With the leak minus without: the same test images, as many train images."""
    gain_sd: float | None
    gain_on_same_images_sd: float | None
    """Standard deviation of either over trainings, None of a single one; the intervals are those of
    the mean."""
    n_epochs: int
    n_repeats: int
    unit: Unit
    """What was resampled."""

    def __repr__(self) -> str:
        return self.to_text()

    def to_text(self) -> str:
        """A table for a terminal."""
        lines = [
            f"Leakage: the run's head, {count(self.n_epochs, 'epoch')}, test macro AUROC, mean of "
            f"{count(self.n_repeats, 'training')} [95 % interval over {UNITS[self.unit]}]",
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
                f"  by image minus by study, findings that both score: {self.gain.to_text('+')}"
                + self._describe_spread(self.gain_sd),
                "  the leak alone, on the same test images:            "
                + self.gain_on_same_images.to_text("+")
                + self._describe_spread(self.gain_on_same_images_sd),
            ]
        )

    def _describe_spread(self, sd: float | None) -> str:
        """The spread over trainings; a single one has none."""
        return "" if sd is None else f", sd over trainings {sd:.3f}"

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON-able."""
        return asdict(self)


def measure_leakage(
    store: FeatureStore,
    run: Run,
    *,
    n_repeats: int = 5,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Leakage:
    """Train a run's head on a split by image and on one by study, and test both.

    Two test splits hold different images, so two more heads are tested on the images of the split
    by image: one trained without any study (or patient) of theirs, one with their studies, on as
    many images, drawn at random. Only the leak is between these two. One training differs from the
    next by more than most leaks, so each is repeated: with other initial weights, order and
    dropout.

    The run, of `cxr-cache train` on this store, gives recipe, number of epochs, learning rate of
    every epoch, findings and targets. `n_resamples` and `seed` are those of the bootstrap.

    Raises
    ------
    RunError
        The run was fine-tuned, or its images are not in the store.
    ConfigError
        Too few images.
    """
    config = recipe_of(run)
    data = _data_of(store, run, config)
    rates = _read_rates(run)
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
    arms: dict[str, tuple[NDArray[np.intp], NDArray[np.intp]]] = {}
    scored: dict[tuple[str, int], ScoredRows] = {}
    for pair in pairs:  # the heads of a pair take equally many steps
        arms |= {name: (train, np.flatnonzero(test)) for name, (train, test) in pair.items()}
        keys = [(name, k) for name in pair for k in range(n_repeats)]
        scores = _train(data, [(*arms[name], k) for name, k in keys], config, rates)
        for key, probabilities in zip(keys, scores, strict=True):
            test_rows = arms[key[0]][1]
            scored[key] = ScoredRows(test_rows, cohort.targets[test_rows], probabilities)
    named = {f"{name} {k}": rows for (name, k), rows in scored.items()}
    areas = score_jointly(named, cohort.groups, n_resamples=n_resamples, seed=seed)
    of_arm = {name: [areas[f"{name} {k}"] for k in range(n_repeats)] for name in arms}
    gain, gain_sd = _subtract(of_arm[BY_IMAGE], of_arm[BY_STUDY])
    leak, leak_sd = _subtract(of_arm[LEAKING], of_arm[CLEAN])
    count_reading("audit --leakage", run)
    return Leakage(
        arms=tuple(
            Arm(
                name,
                len(train),
                len(test),
                int(np.isin(cohort.groups[test], cohort.groups[train]).sum()),
                JointAuroc.average(of_arm[name]).macro(),
            )
            for name, (train, test) in arms.items()
        ),
        gain=gain,
        gain_on_same_images=leak,
        gain_sd=gain_sd,
        gain_on_same_images_sd=leak_sd,
        n_epochs=len(rates),
        n_repeats=n_repeats,
        unit=name_unit(cohort.patient_ids),
    )


def _subtract(
    ours: Sequence[JointAuroc], theirs: Sequence[JointAuroc]
) -> tuple[Figure, float | None]:
    """Difference of two arms' means, and its standard deviation over single trainings."""
    differences = [a.minus(b) for a, b in zip(ours, theirs, strict=True)]
    single = [one.macro().value for one in differences]
    spread = float(np.std(single, ddof=1)) if len(single) > 1 else None
    return JointAuroc.average(differences).macro(), spread


def _train(
    data: TrainingData,
    heads: Sequence[tuple[NDArray[np.intp], NDArray[np.intp], int]],
    config: TrainConfig,
    rates: Sequence[float],
) -> list[NDArray[np.float32]]:
    """Probabilities of heads trained side by side, given each one's train rows, test rows, seed."""
    tasks = [
        HeadTask(train, np.empty(0, np.int64), config.seed + 1000 * k) for train, _, k in heads
    ]
    n = len(rates)
    trained = fit_heads(data, tasks, config, n_epochs=n, keep=[n], learning_rates=rates)
    return [
        predict_probabilities(
            HeadBank.from_snapshot(trajectory.weights[n]),
            torch.from_numpy(data.embeddings[0, test]),
        ).numpy()
        for trajectory, (_, test, _) in zip(trained, heads, strict=True)
    ]


def recipe_of(run: Run) -> TrainConfig:
    """What the head of a run was trained with.

    Raises
    ------
    RunError
        The run was fine-tuned, or reads several stores.
    """
    if run.config.get("kind") != "train":
        raise RunError(
            f"{run.path} was fine-tuned; the leak is measured with heads on cached embeddings. "
            "Give a run of `cxr-cache train`."
        )
    run.require_images("the leak between images of a study is measured on single images")
    if len(run.stores) > 1:
        raise RunError(
            f"{run.path} reads {len(run.stores)} stores side by side; the leak is measured with "
            "heads on one. Give a run of `cxr-cache train` on this store alone."
        )
    return replace(TrainConfig(**run.config["train"]), early_stopping=None)


def _data_of(store: FeatureStore, run: Run, config: TrainConfig) -> TrainingData:
    """The run's images with its targets, and their embeddings."""
    done = find_done_rows(store, allow_pending=True)
    aligned = align_run(run, store.cohort.take(done), store.path)
    return TrainingData(read_features(store, done[aligned.places], config), aligned.cohort)


def _read_rates(run: Run) -> list[float]:
    """Learning rate of every epoch up to the chosen number, as a refit would take them."""
    history, chosen = run.read_table("history"), run.config["chosen_epochs"]
    kept = (history["fold"] != FINAL_FOLD) & (history["epoch"] <= chosen)
    if "horizon" in history:
        kept &= history["horizon"] == chosen
    return average_rates(
        [fold.sort_values("epoch").to_dict("records") for _, fold in history[kept].groupby("fold")]
    )
