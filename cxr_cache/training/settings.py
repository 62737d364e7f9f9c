"""Settings of an ablation: text such as ``lr=1e-4,1e-3`` -> recipes, all of them or a sample."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np

from cxr_cache.config import TrainConfig
from cxr_cache.errors import ConfigError, suggest

_SHORT: Final = {"lr": "learning_rate", "clip": "max_grad_norm", "folds": "n_folds"}
_SHARED: Final = (
    *("n_folds", "test_fraction", "split_by", "seed", "device", "n_jobs"),
    *("final", "threshold_rule", "calibration"),
)
"""What all settings have in common: folds, and what comes after the comparison."""
_OF_ABLATE: Final = {
    **{"n_folds": "--folds", "test_fraction": "--test-fraction", "split_by": "--split-by"},
    **{"seed": "--seed", "device": "--device", "n_jobs": "--workers"},
}
"""Options of `ablate` for them; the rest is the recipe's."""
_MAY_BE_NONE: Final = ("max_grad_norm", "early_stopping")
_LARGEST_GRID: Final = 10_000


@dataclass(frozen=True)
class Setting:
    """One recipe of an ablation, and what sets it apart."""

    config: TrainConfig
    varied: Mapping[str, str]
    """The options that differ between settings, as they were written."""

    @property
    def label(self) -> str:
        """Such as ``lr=0.001 hidden=256``."""
        return " ".join(f"{name}={value}" for name, value in self.varied.items()) or "as given"


def make_settings(
    base: TrainConfig, options: Sequence[str], *, n_sampled: int | None = None, seed: int = 0
) -> list[Setting]:
    """Every combination of the options' values, the first values first, or a sample of them.

    Parameters
    ----------
    base
        Everything that the options do not name.
    options
        ``NAME=VALUE,VALUE...``; widths and epoch candidates are joined by ``x``.
    n_sampled
        Take so many at random, the first among them; None takes all.
    seed
        Of the sample.

    Raises
    ------
    ConfigError
        An option or value is unknown or out of range, or there are too many combinations.
    """
    choices: dict[str, list[str]] = {}
    for option in options:
        name, listed = _parse_option(option)
        if _field(name) in map(_field, choices):
            raise ConfigError(f"--set {option}: {name} was given before. List all values at once.")
        choices[name] = listed
    n_settings = math.prod(map(len, choices.values()))
    if n_settings > _LARGEST_GRID and n_sampled is None:
        raise ConfigError(
            f"--set makes {n_settings:,} settings. Use --sample N to try some of them, or fewer "
            "values."
        )
    combinations = itertools.product(*choices.values())
    if n_sampled is not None and n_sampled < n_settings:
        others = np.random.default_rng(seed).choice(n_settings - 1, n_sampled - 1, replace=False)
        combinations = (_nth(choices, n) for n in [0, *sorted(others + 1)])  # type: ignore[assignment]
    varied = [name for name, values in choices.items() if len(values) > 1]
    settings = []
    for combination in combinations:
        written = dict(zip(choices, combination, strict=True))
        parsed = {_field(name): _parse_value(name, text) for name, text in written.items()}
        settings.append(Setting(replace(base, **parsed), {name: written[name] for name in varied}))
    return settings


def _nth(choices: Mapping[str, Sequence[str]], n: int) -> tuple[str, ...]:
    """Combination `n`, in the order in which itertools.product counts."""
    places = np.unravel_index(n, [len(values) for values in choices.values()])
    return tuple(values[int(i)] for values, i in zip(choices.values(), places, strict=True))


def _parse_option(option: str) -> tuple[str, list[str]]:
    name, equals, values = option.partition("=")
    name = name.strip().replace("-", "_")
    listed = [value.strip() for value in values.split(",")]
    if not equals or not all(listed):
        raise ConfigError(f"--set {option}: write NAME=VALUE,VALUE, such as lr=1e-4,1e-3.")
    if len({_parse_value(name, value) for value in listed}) < len(listed):
        raise ConfigError(f"--set {option}: a value is given twice.")
    return name, listed


def _field(name: str) -> str:
    field = _SHORT.get(name, name)
    allowed = [f.name for f in fields(TrainConfig) if f.name not in _SHARED]
    if field in _SHARED:
        instead = (
            f"Use {_OF_ABLATE[field]} instead." if field in _OF_ABLATE else "It is the recipe's."
        )
        raise ConfigError(f"--set {name}: all settings share it. {instead}")
    if field not in allowed:
        hint = suggest(name, [*_SHORT, *allowed]) or f" Choose from {', '.join(allowed)}."
        raise ConfigError(f"--set {name}: there is no such option.{hint}")
    return field


def _parse_value(name: str, text: str) -> Any:
    field = _field(name)
    if text == "none" and field in _MAY_BE_NONE:
        return None
    try:
        return _parser(field)(text)
    except ValueError as error:
        raise ConfigError(f"--set {name}: {text!r} is not a value for it ({error}).") from error


def _parser(field: str) -> Callable[[str], Any]:
    """How to read a value of the same type as the default."""
    default = getattr(TrainConfig(), field)
    if isinstance(default, bool):
        return _parse_bool
    if isinstance(default, tuple):
        return lambda text: () if text == "none" else tuple(int(part) for part in text.split("x"))
    return int if default is None else type(default)  # early stopping alone is none by default


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false"):
        raise ValueError("yes or no")
    return text.lower() in ("yes", "true")
