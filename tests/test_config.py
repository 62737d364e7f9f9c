"""Every option is declared once, says what it is in whole sentences, and checks itself."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
import subprocess
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_cache import config
from cxr_cache.config import (
    Augmentation,
    Config,
    ExtractConfig,
    FinetuneConfig,
    Recipe,
    TrainConfig,
    kinds,
    option_of,
)
from cxr_cache.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(
    (
        found
        for found in vars(config).values()
        if isinstance(found, type) and issubclass(found, Config) and is_dataclass(found)
    ),
    key=lambda found: found.__name__,
)


DECLARED = [
    pytest.param(found, of, id=f"{found.__name__}.{of.name}")
    for found in CONFIGS
    for of in fields(found)
]


@pytest.mark.parametrize(("found", "of"), DECLARED)
def test_every_option_is_explained_in_whole_sentences(found, of):
    text = option_of(of).help
    assert text.endswith(".")
    assert len(text.split()) >= 3
    assert text[0].isupper()
    assert not text.startswith("Of ")


@pytest.mark.parametrize(("found", "of"), DECLARED)
def test_values_of_another_kind_are_refused_by_the_name_of_the_field(found, of):
    """No number is whole by accident, and none is missing, unless the option says so."""
    kind = kinds(found)[of.name]
    wrong: list[Any] = {
        bool: [1, "yes", 0.0],
        int: [True, 1.5, "3", math.nan, math.inf],
        float: [True, "3", math.nan],
        str: [3, True],
    }.get(kind.type, [])
    if not kind.is_optional:
        wrong.append(None)
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"^{of.name} (must|is one of|'?[^ ]+'? is no rule)"):
            found(**{of.name: (value,) if kind.is_many and value is not None else value})


UNLIMITED = {"max_grad_norm"}  # infinity is no limit


@pytest.mark.parametrize(("found", "of"), DECLARED)
def test_no_number_is_infinite(found, of):
    kind = kinds(found)[of.name]
    if kind.type is float and of.name not in UNLIMITED:
        with pytest.raises(ConfigError, match=f"^{of.name} must .*, not inf"):
            found(**{of.name: math.inf})


def test_what_was_accepted_by_mistake():
    with pytest.raises(
        ConfigError, match="head_learning_rate must be positive and finite, not inf"
    ):
        FinetuneConfig(head_learning_rate=math.inf)
    with pytest.raises(ConfigError, match=r"warmup_steps must be a whole number, not 1\.5"):
        FinetuneConfig(warmup_steps=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("found", CONFIGS)
def test_choices_are_named(found):
    for name, kind in kinds(found).items():
        if kind.choices:
            with pytest.raises(ConfigError, match=f"^{name} is one of {kind.choices[0]}"):
                found(**{name: "no-such-choice"})


def test_all_problems_are_told_at_once_and_can_be_respelled():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(learning_rate=-1, n_folds=1, epochs=())
    error = pickle.loads(pickle.dumps(caught.value))  # as from another process
    assert str(error) == (
        "n_folds must be 2 or more, not 1; learning_rate must be positive and finite, not -1.0; "
        "epochs must be 1 or more, and there are none."
    )
    assert "--lr must be positive and finite, not -1.0;" in error.spelled({"learning_rate": "--lr"})


def test_numbers_of_arrays_and_lists_become_pythons_own():
    """config.json holds them, and a config read back is the same."""
    made = TrainConfig(
        epochs=[20, np.int64(10), 10],  # type: ignore[arg-type]
        hidden=[64],  # type: ignore[arg-type]
        learning_rate=np.float64(0.1),
        n_folds=np.int32(3),  # type: ignore[arg-type]
        gamma=2,
    )
    assert (made.epochs, made.hidden) == ((10, 20), (64,))
    assert {type(made.n_folds), type(made.gamma), type(made.epochs[0])} == {int, float}
    assert TrainConfig(epochs=7).epochs == (7,)  # type: ignore[arg-type]
    assert TrainConfig(**json.loads(json.dumps(asdict(made)))) == made
    tuned = FinetuneConfig(augmentation=Augmentation(crop_scale=0.8))
    assert FinetuneConfig(**json.loads(json.dumps(asdict(tuned)))) == tuned


def test_the_tuned_recipe_is_the_default_and_the_reference_is_whole():
    assert TrainConfig.of_recipe("tuned") == TrainConfig()
    shared = {of.name: getattr(Recipe(), of.name) for of in fields(Recipe)}
    reference = TrainConfig.of_recipe("reference")
    assert {name: getattr(reference, name) for name in shared} == shared
    differing = {name for name in shared if getattr(TrainConfig(), name) != shared[name]}
    assert differing == set(TrainConfig.reference)
    assert FinetuneConfig.of_recipe("tuned") == FinetuneConfig()
    published = FinetuneConfig.of_recipe("reference")
    assert (published.learning_rate, published.head_learning_rate) == (2e-5, 2e-4)
    assert {n for n in shared if getattr(published, n) != shared[n]} == {"epochs", "device"}
    assert TrainConfig() == TrainConfig(
        epochs=(5, 10, 20, 30, 50), batch_size=64, learning_rate=1e-3, final="ensemble"
    )


def test_fine_tuning_keeps_its_values_and_tells_why_it_takes_no_standard_scores():
    made = FinetuneConfig.of_recipe("reference")
    assert (made.epochs, made.batch_size, made.learning_rate) == ((5, 10, 15), 16, 2e-5)
    assert (made.final, made.device, made.head_learning_rate) == ("refit", "auto", 2e-4)
    with pytest.raises(ConfigError, match="input_norm standard needs embeddings that stay"):
        FinetuneConfig(input_norm="standard")


@pytest.mark.parametrize("part", [(0, 3), (4, 3), (1,), (1, 2, 3)])
def test_a_part_is_one_of_all(part):
    with pytest.raises(ConfigError, match=r"part must be one of 1/N, 2/N \.\.\. N/N, not "):
        ExtractConfig(part=part)
    assert replace(ExtractConfig(), part=(2, 3)).part == (2, 3)


@pytest.mark.parametrize("found", CONFIGS)
def test_a_notebook_shows_what_the_options_mean(found):
    """help(TrainConfig) says more than its signature."""
    for of in fields(found):
        assert re.search(rf"^{of.name}\n    \S", found.__doc__, re.MULTILINE), of.name


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_options_are_read_by_every_python_that_is_promised(version):
    """What typing takes in annotations differs; config.py imports nothing but Python itself."""
    minor = f"python{version}"
    places = (Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/{minor}")
    found = next(map(str, places), None) or shutil.which(minor)
    if found is None or subprocess.run([found, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"there is no {minor} here")
    code = (
        "from cxr_cache import config\n"
        "for kind in vars(config).values():\n"
        "    if isinstance(kind, type) and config.Config in kind.__mro__[1:]:\n"
        "        config.kinds(kind)\n"
    )
    done = subprocess.run([found, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
