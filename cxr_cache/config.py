"""Options of training with their defaults, checked when they are set, and names to choose from.

Nothing here imports torch, so that the command line can show the defaults at once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Final, Literal, TypeAlias

from cxr_cache.errors import ConfigError

DEFAULT_ENCODER: Final = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
LOSSES: Final = ("focal", "focal-balanced", "class-balanced", "bce", "weighted-bce", "asymmetric")
"""``focal`` is the reference's variant, ``focal-balanced`` the paper's."""
SCHEDULES: Final = ("plateau", "constant", "cosine", "one-cycle")
HORIZON_SCHEDULES: Final = ("cosine", "one-cycle")
"""Schedules in which the learning rate of an epoch depends on how many epochs will follow."""
SPLITS: Final = ("study", "image")
FINALS: Final = ("refit", "ensemble", "best-fold")
INPUT_NORMS: Final = ("l2", "standard", "none")
"""Each embedding to length 1, each of its numbers to mean 0 and spread 1 over images, or as is."""
NORMS: Final = ("batch", "layer")
FEATURES: Final = ("projected", "pooled", "both")
"""What the head reads: the embedding, what it is projected from, or the two side by side."""
SOURCES: Final = ("auto", "tokens", "images")
BACKENDS: Final = ("loky", "dask", "ray")
PLACES: Final = ("auto", "device", "ram", "disk")
TRAINING_PRECISIONS: Final = ("auto", "fp32", "bf16")
THRESHOLD_RULES: Final = ("f1", "youden", "sensitivity=0.9", "specificity=0.9", "ppv=0.5")
"""Examples of how thresholds may be chosen; :data:`cxr_cache.metrics.operating_point.RULES` has
all rules."""
CALIBRATIONS: Final = ("none", "temperature", "platt")
Rule: TypeAlias = tuple[bool, str]


def parse_threshold_rule(rule: str) -> tuple[str, float]:
    """``"ppv=0.5"`` -> ``("ppv", 0.5)``; rules without a target get NaN.

    Only the form is looked at here; :func:`cxr_cache.metrics.operating_point.find_rule` knows which
    rules there are.

    Raises
    ------
    ConfigError
        This is not the form of a rule, or the target does not lie in (0, 1].
    """
    name, is_target, text = rule.partition("=")
    try:
        target = float(text) if is_target else math.nan
    except ValueError:
        name = ""
    if not re.fullmatch("[a-z][a-z0-9-]*", name):
        raise ConfigError(
            f"--threshold-rule {rule!r} is no rule; it is one such as {', '.join(THRESHOLD_RULES)}."
        )
    if is_target and not 0 < target <= 1:
        raise ConfigError(f"--threshold-rule {rule}: the target must lie in (0, 1].")
    return name, target


@dataclass(frozen=True)
class Recipe:
    """What training a head and fine-tuning have in common; the defaults are the reference's."""

    epochs: tuple[int, ...] = (30, 50, 75, 90, 100)
    """Candidates of the search."""
    n_folds: int = 5
    test_fraction: float = 0.2
    split_by: Literal["study", "image"] = "study"
    final: Literal["refit", "ensemble", "best-fold"] = "refit"
    seed: int = 42
    batch_size: int = 16
    learning_rate: float = 2e-5
    weight_decay: float = 1e-4
    max_grad_norm: float | None = 1.0
    schedule: str = "plateau"
    patience: int = 3
    """The rate is halved after more than so many epochs without a better validation loss."""
    early_stopping: int | None = None
    """Epochs without a better validation loss after which a fold stops; None trains on."""
    loss: str = "focal"
    alpha: float = 0.25
    gamma: float = 2.0
    hidden: tuple[int, ...] = (512, 256)
    dropout: float = 0.5
    norm: Literal["batch", "layer"] = "batch"
    input_norm: Literal["l2", "standard", "none"] = "l2"
    device: str = "cpu"
    threshold_rule: str = "f1"
    """How thresholds are chosen on out-of-fold predictions."""
    calibration: Literal["none", "temperature", "platt"] = "none"
    """How probabilities are calibrated on out-of-fold predictions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "epochs", tuple(sorted(set(self.epochs))))
        object.__setattr__(self, "hidden", tuple(self.hidden))  # JSON has lists
        if broken := [text for holds, text in self._rules() if not holds]:
            raise ConfigError("; ".join(broken) + ".")
        parse_threshold_rule(self.threshold_rule)

    def _rules(self) -> list[Rule]:
        calibrations = ", ".join(CALIBRATIONS)
        return [
            *(
                (all(isinstance(n, Integral) for n in numbers), f"--{name} must be a whole number")
                for name, numbers in self._counts().items()
            ),
            (bool(self.epochs) and self.epochs[0] >= 1, "--epochs must be 1 or more"),
            (self.n_folds >= 2, "--folds must be 2 or more"),
            (0 < self.test_fraction < 1, "--test-fraction must lie between 0 and 1"),
            (self.split_by in SPLITS, f"--split-by is one of {', '.join(SPLITS)}"),
            (self.final in FINALS, f"--final is one of {', '.join(FINALS)}"),
            (self.seed >= 0, "--seed must not be negative"),
            (self.batch_size >= 2, "--batch-size must be 2 or more: batch norm needs two rows"),
            (0 < self.learning_rate < math.inf, "--lr must be positive and finite"),
            (0 <= self.weight_decay < math.inf, "--weight-decay must be 0 or more, and finite"),
            (self.max_grad_norm is None or self.max_grad_norm > 0, "--clip must be positive"),
            (self.schedule in SCHEDULES, f"--schedule is one of {', '.join(SCHEDULES)}"),
            (self.patience >= 0, "--patience must not be negative"),
            (self.early_stopping is None or self.early_stopping >= 1, "--early-stopping is >= 1"),
            (self.loss in LOSSES, f"--loss is one of {', '.join(LOSSES)}"),
            (0 <= self.alpha <= 1, "--alpha must lie in [0, 1]"),
            (0 <= self.gamma < math.inf, "--gamma must be 0 or more, and finite"),
            (all(width >= 1 for width in self.hidden), "--hidden widths must be 1 or more"),
            (0 <= self.dropout < 1, "--dropout must lie in [0, 1)"),
            (self.norm in NORMS, f"--norm is one of {', '.join(NORMS)}"),
            (self.input_norm in INPUT_NORMS, f"--input-norm is one of {', '.join(INPUT_NORMS)}"),
            (self.calibration in CALIBRATIONS, f"--calibration is one of {calibrations}"),
        ]

    def _counts(self) -> dict[str, tuple[int, ...]]:
        """What has to be whole, by the name of its option."""
        stopping = () if self.early_stopping is None else (self.early_stopping,)
        return {
            "epochs": self.epochs,
            "folds": (self.n_folds,),
            "batch-size": (self.batch_size,),
            "patience": (self.patience,),
            "early-stopping": stopping,
            "hidden": self.hidden,
        }

    @property
    def has_horizon(self) -> bool:
        """Whether an epoch's learning rate depends on how many epochs will follow."""
        return self.schedule in HORIZON_SCHEDULES


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """How to search and train a head on cached embeddings."""

    features: Literal["projected", "pooled", "both"] = "projected"
    flip: bool = True
    """Train on the mirror images too, where the store has them."""
    n_jobs: int = -1
    """Processes that share the folds on the CPU; -1 is one per core."""

    @classmethod
    def of_recipe(cls, name: str, **options: Any) -> TrainConfig:
        """The recipe called `name`, of :data:`RECIPES`, but for the options given."""
        if name not in RECIPES:
            raise ConfigError(f"--recipe is one of {', '.join(RECIPES)}, not {name!r}.")
        return cls(**{**RECIPES[name], **options})

    def _rules(self) -> list[Rule]:
        features = ", ".join(FEATURES)
        return [
            *super()._rules(),
            (self.features in FEATURES, f"--features is one of {features}"),
        ]


RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "tuned": {
        "batch_size": 64,
        "learning_rate": 1e-3,
        "epochs": (5, 10, 20, 30, 50),
        "final": "ensemble",
    },
    "reference": {},
}
"""Options of :class:`TrainConfig` that differ from its defaults, which are the reference's.

``tuned`` was chosen on out-of-fold predictions; docs/measurements.md has both on test studies.
"""


@dataclass(frozen=True)
class Augmentation:
    """Random changes to the pixels of an image, for training end to end; none by default."""

    crop_scale: float | None = None
    """Smallest share of the image's area that a random crop keeps; None crops nothing."""
    rotation_deg: float = 0.0
    """Largest turn to either side, in degrees."""
    brightness: float = 0.0
    """0.2 multiplies by a factor from 0.8 to 1.2."""
    contrast: float = 0.0
    """As brightness, around the image's mean."""

    def __post_init__(self) -> None:
        rules: list[Rule] = [
            (
                self.crop_scale is None or 0 < self.crop_scale <= 1,
                "--crop-scale must lie in (0, 1]",
            ),
            (0 <= self.rotation_deg <= 180, "--rotation must lie between 0 and 180 degrees"),
            (0 <= self.brightness < 1, "--brightness must lie in [0, 1)"),
            (0 <= self.contrast < 1, "--contrast must lie in [0, 1)"),
        ]
        if broken := [text for holds, text in rules if not holds]:
            raise ConfigError("; ".join(broken) + ".")

    @property
    def changes_pixels(self) -> bool:
        """Whether any option is on."""
        return self != Augmentation()


@dataclass(frozen=True)
class FinetuneConfig(Recipe):
    """How to fine-tune the last blocks together with the head."""

    epochs: tuple[int, ...] = (5, 10, 15)
    """Candidates of the search; a single one is taken without a search."""
    device: str = "auto"
    unfreeze_layers: int = 2
    """Blocks that train, counted from the end."""
    head_learning_rate: float = 2e-4
    """Of the head; `learning_rate` is that of the blocks."""
    warmup_steps: int = 0
    """Steps over which both rates rise from zero."""
    decay_norms: bool = True
    """Whether weight decay applies to norms and biases too, as the reference has it."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one step; batch norm sees each by itself."""
    precision: str = "auto"
    """What the blocks compute in; weights, head and optimiser stay float32."""
    grad_checkpointing: bool = False
    """Compute activations again instead of keeping them: less memory, a third more work."""
    source: str = "auto"
    """Cached tokens, or end to end from the images; auto takes tokens where the store has them."""
    tokens_in: str = "auto"
    """Where tokens wait for their turn; auto is the fastest place that they fit into."""
    flip: bool = False
    """From images: show the mirror image half of the time (a store of two views always does)."""
    augmentation: Augmentation = Augmentation()
    """From images only."""
    num_workers: int = min(8, os.cpu_count() or 1)
    """From images: decoding processes."""
    half: bool = False
    """Round the trained weights to float16: half the file."""

    def __post_init__(self) -> None:
        if isinstance(self.augmentation, Mapping):  # as JSON has it
            object.__setattr__(self, "augmentation", Augmentation(**self.augmentation))
        super().__post_init__()

    def _rules(self) -> list[Rule]:
        precisions = ", ".join(TRAINING_PRECISIONS)
        return [
            *super()._rules(),
            (self.unfreeze_layers >= 1, "--unfreeze-layers must be 1 or more"),
            (
                self.input_norm != "standard",
                "--input-norm standard needs embeddings that stay as they are; fine-tuning takes "
                "l2 or none",
            ),
            (self.head_learning_rate > 0, "--head-lr must be positive"),
            (self.warmup_steps >= 0, "--warmup-steps must not be negative"),
            (self.accumulate >= 1, "--accumulate must be 1 or more"),
            (self.precision in TRAINING_PRECISIONS, f"--precision is one of {precisions}"),
            (self.source in SOURCES, f"--source is one of {', '.join(SOURCES)}"),
            (self.tokens_in in PLACES, f"--tokens-in is one of {', '.join(PLACES)}"),
            (self.num_workers >= 0, "--num-workers must be 0 or more"),
        ]

    @property
    def searches(self) -> bool:
        """Whether the number of epochs is looked for in all folds, or given."""
        return len(self.epochs) > 1
