"""Text of --set options -> recipes: every combination, in order, or an error that teaches."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cxr_cache.config import TrainConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.splits import Split
from cxr_cache.errors import ConfigError
from cxr_cache.evaluation.leakage import Leakage
from cxr_cache.metrics.paired import Figure
from cxr_cache.training.ablate import make_settings
from cxr_cache.training.outcome import note_split

BASE = TrainConfig()
GRID = ["lr=1e-4,1e-3", "hidden=512x256,64,none", "clip=1,none", "flip=yes,no"]


def test_every_combination_is_there_and_the_first_values_come_first():
    settings = make_settings(BASE, GRID)

    expected = itertools.product((1e-4, 1e-3), ((512, 256), (64,), ()), (1.0, None), (True, False))
    found = [
        (s.config.learning_rate, s.config.hidden, s.config.max_grad_norm, s.config.flip)
        for s in settings
    ]
    assert found == list(expected)
    assert settings[1].label == "lr=1e-4 hidden=512x256 clip=1 flip=no"
    assert len({setting.label for setting in settings}) == len(settings)


def test_a_single_value_is_set_and_not_part_of_the_label():
    (setting,) = make_settings(BASE, ["batch-size=256", "loss=bce"])

    assert (setting.config.batch_size, setting.config.loss) == (256, "bce")
    assert setting.label == "as given"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_sample_holds_the_first_setting_and_no_other_twice(seed):
    everything = [setting.label for setting in make_settings(BASE, GRID)]

    sample = [s.label for s in make_settings(BASE, GRID, n_sampled=7, seed=seed)]

    assert len(sample) == len(set(sample)) == 7
    assert sample[0] == everything[0]
    assert set(sample) <= set(everything)
    assert sample == sorted(sample, key=everything.index)
    assert sample == [s.label for s in make_settings(BASE, GRID, n_sampled=7, seed=seed)]


def test_a_sample_larger_than_the_grid_is_the_grid():
    assert make_settings(BASE, GRID, n_sampled=1000) == make_settings(BASE, GRID)


def test_what_may_be_none_and_what_is_whole():
    (setting,) = make_settings(BASE, ["early_stopping=3", "clip=none", "patience=2"])
    config = setting.config
    assert (config.early_stopping, config.max_grad_norm, config.patience) == (3, None, 2)
    assert type(config.early_stopping) is int


def test_every_setting_is_tried_on_every_number_of_images():
    options = ["n_train=50,2.5%,all", "lr=1e-4,1e-3"]
    settings = make_settings(BASE, options)
    found = [(s.config.learning_rate, s.n_train, s.label) for s in settings]
    assert found == [
        (rate, n, f"lr={text}")
        for rate, text in ((1e-4, "1e-4"), (1e-3, "1e-3"))
        for n in (50, 0.025, None)
    ]
    sampled = make_settings(BASE, [*options, *GRID[1:]], n_sampled=2)
    assert [s.n_train for s in sampled] == 2 * [50, 0.025, None]
    (one,) = make_settings(BASE, ["n-train=7"])
    assert (one.config, one.n_train, one.label) == (BASE, 7, "as given")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lr"], "write NAME=VALUE,VALUE"),
        (["lr="], "write NAME=VALUE,VALUE"),
        (["lr=1,,2"], "write NAME=VALUE,VALUE"),
        (["lr=1,1"], "given twice"),
        (["learning_rat=1"], "no such option. Did you mean learning_rate?"),
        (["zzz=1"], "no such option. Choose from .*weight_decay"),
        (["lr=fast"], "'fast' is not a value"),
        (["hidden=5y6"], "'5y6' is not a value"),
        (["flip=maybe"], "'maybe' is not a value for it .yes or no"),
        (["lr=1e-3,0.001"], "given twice"),
        (["lr=1e-3", "lr=1e-2"], "lr=1e-2: lr was given before. List all values at once"),
        (["lr=1e-3,1e-2", "learning_rate=1"], "learning_rate was given before"),
        (["lr=none"], "'none' is not a value for it"),
        (["early_stopping=2.5"], "'2.5' is not a value for it"),
        (["gamma=inf"], "gamma must be 0 or more, and finite"),
        (["seed=1,2"], "all settings share it. Use --seed instead"),
        (["folds=3"], "all settings share it. Use --folds instead"),
        (["n_jobs=3"], "all settings share it. Use --workers instead"),
        (["n_train=0"], "'0' is no number of images; write a whole number from 1, a share such"),
        (["n_train=few"], "'few' is no number of images"),
        (["n_train=2.5"], "'2.5' is no number of images"),
        (["n_train=110%"], "'110%' is no number of images"),
        (["n_train=10%x"], "'10%x' is no number of images"),
        (["n_train=nan%"], "'nan%' is no number of images"),
        (["n_train=all,100%"], "given twice"),
        (["n_trian=50"], "no such option. Did you mean n_train?"),
        (["final=refit"], "all settings share it. It is the recipe's"),
        (["dropout=1.5"], r"dropout must lie in \[0, 1\)"),
        (["loss=foca"], "loss is one of"),
        ([f"alpha={','.join(str(i / 500) for i in range(300))}", *GRID[:3], "gamma=1,2,3"], "10,8"),
    ],
)
def test_what_cannot_be_set_is_explained(options, message):
    with pytest.raises(ConfigError, match=message):
        make_settings(BASE, options)


# --- Recipes --------------------------------------------------------------------------------------


def test_recipes_differ_in_what_they_say_and_options_go_before_them():
    tuned, reference = TrainConfig.of_recipe("tuned"), TrainConfig.of_recipe("reference")

    assert tuned == TrainConfig()
    assert (reference.batch_size, reference.learning_rate, reference.final) == (16, 2e-5, "refit")
    assert reference.epochs == (30, 50, 75, 90, 100)
    assert (tuned.batch_size, tuned.learning_rate, tuned.final) == (64, 1e-3, "ensemble")
    assert TrainConfig.of_recipe("tuned", batch_size=8) == replace(tuned, batch_size=8)
    with pytest.raises(ConfigError, match="recipe is one of tuned, reference, not 'best'"):
        TrainConfig.of_recipe("best")


# -- counts in words ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_rare", "text"),
    [(1, "1 finding has fewer .* cannot score it: A"), (2, "2 findings have .* score them: A")],
)
def test_notes_count_findings_in_singular_and_plural(n_rare, text):
    targets = np.zeros((8, 3), np.float32)
    targets[:, 2] = 1
    targets[0, :n_rare] = 1
    images = pd.DataFrame({"image_id": list("abcdefgh"), "study_uid": list("aacdefgh")})
    split = Split(np.zeros(8, bool), np.arange(8) % 4)
    (note,) = note_split(split, Cohort(images, targets, ("A", "B", "C")))
    assert re.search(text, note)


def test_a_spread_over_one_training_is_not_shown():
    figure = Figure(0.1, 0.0, 0.2)
    once, often = (
        Leakage((), figure, figure, sd, sd, n_epochs=2, n_repeats=n, unit="study").to_text()
        for sd, n in ((None, 1), (0.01, 5))
    )
    assert "nan" not in once
    assert "sd" not in once
    assert often.count("sd over trainings 0.010") == 2
