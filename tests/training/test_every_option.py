"""Every option of a recipe reaches every later step: a step that forgets one fails here."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cxr_cache.config import Augmentation, FinetuneConfig, TrainConfig
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import RunError
from cxr_cache.models.predict import predict_store
from cxr_cache.models.run import Run
from cxr_cache.models.tuned import copy_tail
from cxr_cache.store.extract import ExtractConfig, extract_embeddings
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.tokens import ResidentTokens
from cxr_cache.training.finetune import tune_run
from cxr_cache.training.fit import HeadTask
from cxr_cache.training.frozen_start import config_from_run
from cxr_cache.training.train import fit_run
from cxr_cache.training.tuning import TuningData, tune
from tests.synthetic import IMPORTED, make_cohort, make_embeddings

HEAD = TrainConfig(
    epochs=(2, 12),
    n_folds=2,
    batch_size=16,
    learning_rate=0.1,
    hidden=(12, 8),
    patience=0,
    final="refit",
    schedule="plateau",
    n_jobs=1,
)
OF_ANY_RECIPE: dict[str, Any] = {
    "epochs": (3,),
    "n_folds": 3,
    "test_fraction": 0.4,
    "split_by": "image",
    "level": "study",
    "final": "ensemble",
    "seed": 7,
    "batch_size": 8,
    "learning_rate": 1e-4,
    "weight_decay": 0.5,
    "max_grad_norm": 1e-3,
    "schedule": "cosine",
    "loss": "asymmetric",
    "alpha": 0.9,
    "gamma": 0.0,
    "hidden": (4,),
    "dropout": 0.0,
    "norm": "layer",
    "input_norm": "none",
    "threshold_rule": "specificity=0.9",
    "calibration": "temperature",
    "min_positives": 30,
}
OF_A_HEAD = OF_ANY_RECIPE | {
    **{"patience": 5, "early_stopping": 1, "features": "both", "flip": False},
}
WHERE_AND_HOW_FAST = {"device": "auto", "n_jobs": 2}

TAIL = FinetuneConfig.of_recipe(
    "reference",
    epochs=(1,),
    n_folds=2,
    batch_size=8,
    learning_rate=1e-3,
    head_learning_rate=1e-2,
    hidden=(8,),
    device="cpu",
    precision="fp32",
    num_workers=0,
)
OF_A_TAIL = OF_ANY_RECIPE | {
    **{"epochs": (2,), "schedule": "one-cycle", "head_learning_rate": 1e-4, "warmup_steps": 10},
    **{"batch_size": 4, "layer_decay": 0.5, "ema_decay": 0.9, "mixup": 0.4},
    "patch_dropout": 0.5,
    **{"decay_norms": False, "accumulate": 2, "precision": "bf16", "half": True},
}
WHERE_THE_LOSS_STALLS = {"patience": 9, "early_stopping": 1}
WHERE_CANDIDATES_DIFFER = {"select_by": "macro", "within_one_se": True}
"""tests/training/test_search.py has these: they choose among candidates, and may agree."""
BESIDE_THE_HEAD = {"baseline"}
OF_THE_PROTOCOL = {
    *("epochs", "n_folds", "test_fraction", "split_by", "level", "final", "seed"),
    *("threshold_rule", "calibration", "min_positives", "half"),
}
OF_GIVEN_SPLITS = {"split"}
"""tests/training/test_given_split.py has it: it needs a split that was given."""
OF_NESTED = {"protocol", "n_outer_folds"}
"""tests/jobs/test_nested.py has these: they make many runs."""
OF_PIXELS = {"flip", "augmentation", "source", "num_workers"}
"""tests/training/test_finetune.py has these: they need images."""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Two views and two kinds of features, of images that a head can learn from."""
    path, cohort = tmp_path_factory.mktemp("every") / "store.h5", make_cohort(60, unlabelled=0.1)
    embeddings = make_embeddings(cohort, n_views=2)
    pooled = embeddings[..., :5] ** 2
    shapes = {"embeddings": embeddings.shape[1:], "pooled": pooled.shape[1:]}
    with FeatureStore.create(path, cohort, encoder=IMPORTED, features=shapes) as written:
        values = {"embeddings": embeddings, "pooled": pooled}
        written.commit(np.arange(len(cohort)), values, np.zeros((len(cohort), 32), np.uint8))
    return path


@pytest.fixture(scope="module")
def head_run(store, tmp_path_factory) -> Run:
    return fit_run(store, tmp_path_factory.mktemp("base") / "run", HEAD).run


def outcome(run: Run) -> dict[str, float]:
    """What a run says of every image, where it draws the lines, and how it came there."""
    table = run.read_table("predictions").set_index("image_id")
    said = table[list(run.config["findings"])].stack().to_dict()
    point = run.calibration.to_dict() | {"thresholds": list(run.thresholds.values())}
    rates = run.read_table("history")["lr"].tolist()
    return {**{str(key): value for key, value in said.items()}, "point": point, "rates": rates}


def test_the_lists_of_this_file_are_whole():
    """Whoever adds an option says here what it changes."""
    assert {f.name for f in fields(TrainConfig)} == {
        *OF_A_HEAD,
        *WHERE_AND_HOW_FAST,
        *OF_GIVEN_SPLITS,
        *WHERE_CANDIDATES_DIFFER,
        *BESIDE_THE_HEAD,
        *OF_NESTED,
    }
    elsewhere = {"device", "tokens_in", "grad_checkpointing", "unfreeze_layers"} | OF_PIXELS
    elsewhere |= OF_GIVEN_SPLITS | WHERE_CANDIDATES_DIFFER.keys()
    assert {f.name for f in fields(FinetuneConfig)} == {
        *OF_A_TAIL,
        *WHERE_THE_LOSS_STALLS,
    } | elsewhere


@pytest.mark.parametrize("name", OF_A_HEAD)
def test_a_head_heeds_every_option(store, head_run, tmp_path, name):
    """And its model, read back, predicts what the run says."""
    config = replace(HEAD, **{name: OF_A_HEAD[name]})
    run = fit_run(store, tmp_path / "run", config).run

    assert outcome(run) != outcome(head_run)
    head = run.load_model().head
    expected = {n: getattr(config, n) for n in ("hidden", "dropout", "norm", "features", "level")}
    assert head == {**expected, "hidden": list(config.hidden), "input_norm": config.input_norm}
    with FeatureStore.open(store) as features:
        predicted, _ = predict_store(run, features)
    findings = list(run.config["findings"])
    ours, theirs = predicted[findings], run.read_table("predictions")[findings]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", WHERE_AND_HOW_FAST)
def test_where_a_head_trains_changes_nothing(store, head_run, tmp_path, name):
    config = replace(HEAD, **{name: WHERE_AND_HOW_FAST[name]})
    ours = outcome(fit_run(store, tmp_path / "run", config).run)
    theirs = outcome(head_run)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(
        [v for k, v in ours.items() if k not in ("point", "rates")],
        [v for k, v in theirs.items() if k not in ("point", "rates")],
        atol=1e-4,
    )


# -- fine-tuning ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tokens")
    images = write_phantoms(folder / "phantoms", n_studies=40, image_size_px=64).image_dir
    encoder = load_encoder("random:test_vit:5", precision="fp32")
    config = ExtractConfig(num_workers=0, unfreeze_layers=2)
    cohort = load_cohort(images.parent)
    extract_embeddings(cohort, images, folder / "tokens.h5", encoder, config)
    return folder / "tokens.h5"


@pytest.fixture(scope="module")
def tuning_data() -> TuningData:
    torch.set_num_threads(1)
    encoder = load_encoder("random:test_vit:5", precision="fp32")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (24, 3, 160, 160), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        cached = encoder.stem(encoder.prepare(pixels), 2)[:, None]
    targets = np.random.default_rng(0).integers(0, 2, (24, 3)).astype(np.float32)
    return TuningData(encoder, ResidentTokens(cached), targets, copy_tail(encoder, 2))


@pytest.fixture(scope="module")
def tail_run(tokens, tmp_path_factory) -> Run:
    return tune_run(tokens, tmp_path_factory.mktemp("base") / "tail", TAIL).run


@pytest.mark.parametrize("name", sorted(OF_THE_PROTOCOL | {"norm", "input_norm", "hidden"}))
def test_a_fine_tuned_run_heeds_every_option(tokens, tail_run, tmp_path, name):
    config = replace(TAIL, **{name: OF_A_TAIL[name]})
    run = tune_run(tokens, tmp_path / "run", config).run

    assert outcome(run) != outcome(tail_run)
    expected = {n: getattr(config, n) for n in ("dropout", "norm", "input_norm", "level")}
    expected |= {"hidden": list(config.hidden), "features": "projected"}
    assert run.load_model().head == expected


@pytest.mark.parametrize(
    "name", [*sorted(OF_A_TAIL.keys() - OF_THE_PROTOCOL), *WHERE_THE_LOSS_STALLS]
)
def test_every_fold_of_a_fine_tuning_heeds_every_option(tuning_data, name):
    config, n_epochs = replace(TAIL, patience=0), 1
    if name in WHERE_THE_LOSS_STALLS:
        rate = 1e-12 if name == "early_stopping" else 1e-7  # plateau heeds no change below 1e-8
        still = {"learning_rate": rate, "head_learning_rate": rate, "norm": "layer"}
        config, n_epochs = replace(config, **still), 3
    changed = replace(config, **{name: (OF_A_TAIL | WHERE_THE_LOSS_STALLS)[name]})
    task = HeadTask(np.arange(16), np.arange(16, 24), seed=0)
    ours, theirs = (
        tune(tuning_data, task, c, n_epochs=n_epochs, keep=[n_epochs], keep_weights=False)
        for c in (changed, config)
    )
    ours, theirs = (
        ([row["lr"] for row in t.history], t.probabilities[n_epochs].tolist())
        for t in (ours, theirs)
    )
    assert ours != theirs


def test_other_blocks_than_are_cached_are_refused(tokens, tmp_path):
    with pytest.raises(ValueError, match="unfreeze_layers: 2 in the store, 1 in this run"):
        tune_run(tokens, tmp_path / "run", replace(TAIL, unfreeze_layers=1))


# -- fine-tuning that goes on from a frozen run -------------------------------------------

TAKEN_OVER = {
    *("n_folds", "test_fraction", "split_by", "level", "seed", "final"),
    *("hidden", "dropout", "norm", "input_norm"),
    *("loss", "alpha", "gamma", "threshold_rule", "calibration"),
}


@pytest.mark.parametrize("name", sorted(OF_ANY_RECIPE))
def test_a_start_from_a_frozen_run_takes_its_head_split_and_loss(tokens, tmp_path, name):
    """What it does not take belongs to the steps that are still to come."""
    recipe = replace(HEAD, **{"batch_size": 8, name: OF_ANY_RECIPE[name]})
    frozen = fit_run(tokens, tmp_path / "frozen", recipe)
    config = config_from_run(
        frozen.run, batch_size=8, device="cpu", precision="fp32", patch_dropout=0
    )

    expected = OF_ANY_RECIPE[name] if name in TAKEN_OVER else getattr(config, name)
    assert getattr(config, name) == expected
    assert config.epochs == FinetuneConfig().epochs
    assert config_from_run(frozen.run, "reference").epochs == (frozen.chosen_epochs,)
    if name not in ("norm", "input_norm", "hidden", "final"):  # a second each
        return
    still = replace(config, learning_rate=1e-12, head_learning_rate=1e-12, epochs=(1,))
    run = tune_run(tokens, tmp_path / "run", still, from_run=frozen.run.path).run
    ours, theirs = run.load_model(), frozen.run.load_model()
    assert ours.head["norm"] == theirs.head["norm"]
    torch.testing.assert_close(ours.tensors["weight_0"], theirs.tensors["weight_0"])


def test_a_head_of_another_norm_is_no_start(tokens, tmp_path):
    frozen = fit_run(tokens, tmp_path / "frozen", replace(HEAD, norm="layer")).run
    config = config_from_run(frozen, norm="batch", batch_size=8, device="cpu")
    with pytest.raises(RunError, match="norm: 'layer' in the run, 'batch' now"):
        tune_run(tokens, tmp_path / "run", config, from_run=frozen.path)


def test_pixel_options_are_not_silent_where_tokens_train(tokens, tmp_path):
    said: list[str] = []
    config = replace(TAIL, augmentation=Augmentation(rotation_deg=5.0))
    tune_run(tokens, tmp_path / "run", config, echo=said.append)
    assert "the changes to pixels are for --source images" in said[0]
