"""Options of training with their defaults, checked when they are set, and names to choose from.

Nothing here imports torch, so that the command line can show the defaults at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from cxr_cache.errors import ConfigError

DEFAULT_ENCODER: Final = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
LOSSES: Final = ("focal", "focal-balanced", "bce", "weighted-bce")
"""``focal`` is the reference's variant, ``focal-balanced`` the paper's."""
SCHEDULES: Final = ("plateau", "constant", "cosine", "one-cycle")
HORIZON_SCHEDULES: Final = ("cosine", "one-cycle")
"""Schedules in which the learning rate of an epoch depends on how many epochs will follow."""
SPLITS: Final = ("study", "image")
FINALS: Final = ("refit", "ensemble", "best-fold")
INPUT_NORMS: Final = ("l2", "none")


@dataclass(frozen=True)
class TrainConfig:
    """How to search and train; the defaults are the reference system's."""

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
    """Epochs without a better validation loss before the rate is halved."""
    early_stopping: int | None = None
    """Epochs without a better validation loss after which a fold stops; None trains on."""
    loss: str = "focal"
    alpha: float = 0.25
    gamma: float = 2.0
    hidden: tuple[int, ...] = (512, 256)
    dropout: float = 0.5
    input_norm: Literal["l2", "none"] = "l2"
    device: str = "cpu"
    n_jobs: int = -1
    """Processes that share the folds on the CPU; -1 is one per core."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "epochs", tuple(sorted(set(self.epochs))))
        object.__setattr__(self, "hidden", tuple(self.hidden))  # JSON has lists
        rules: list[tuple[bool, str]] = [
            (bool(self.epochs) and self.epochs[0] >= 1, "--epochs must be 1 or more"),
            (self.n_folds >= 2, "--folds must be 2 or more"),
            (0 < self.test_fraction < 1, "--test-fraction must lie between 0 and 1"),
            (self.split_by in SPLITS, f"--split-by is one of {', '.join(SPLITS)}"),
            (self.final in FINALS, f"--final is one of {', '.join(FINALS)}"),
            (self.seed >= 0, "--seed must not be negative"),
            (self.batch_size >= 2, "--batch-size must be 2 or more: batch norm needs two rows"),
            (self.learning_rate > 0, "--lr must be positive"),
            (self.weight_decay >= 0, "--weight-decay must not be negative"),
            (self.max_grad_norm is None or self.max_grad_norm > 0, "--clip must be positive"),
            (self.schedule in SCHEDULES, f"--schedule is one of {', '.join(SCHEDULES)}"),
            (self.patience >= 0, "--patience must not be negative"),
            (self.early_stopping is None or self.early_stopping >= 1, "--early-stopping is >= 1"),
            (self.loss in LOSSES, f"--loss is one of {', '.join(LOSSES)}"),
            (0 <= self.alpha <= 1, "--alpha must lie in [0, 1]"),
            (self.gamma >= 0, "--gamma must not be negative"),
            (all(width >= 1 for width in self.hidden), "--hidden widths must be 1 or more"),
            (0 <= self.dropout < 1, "--dropout must lie in [0, 1)"),
            (self.input_norm in INPUT_NORMS, f"--input-norm is one of {', '.join(INPUT_NORMS)}"),
        ]
        if broken := [text for holds, text in rules if not holds]:
            raise ConfigError("; ".join(broken) + ".")

    @property
    def has_horizon(self) -> bool:
        """Whether an epoch's learning rate depends on how many epochs will follow."""
        return self.schedule in HORIZON_SCHEDULES
