"""Store to fine-tuned run: the protocol of `train`, whatever it reads, whatever interrupts it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from cxr_cache.common.wording import count
from cxr_cache.config import Augmentation, ExtractConfig, FinetuneConfig, TrainConfig
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import load_encoder, reload_encoder
from cxr_cache.errors import (
    ConfigError,
    RunError,
    StoreIncompleteError,
    StoreMismatchError,
    TrainingError,
)
from cxr_cache.evaluation.compare import compare_runs
from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.models import predict as predict_module
from cxr_cache.models.explain import TraceableModel
from cxr_cache.models.predict import Predictor, predict_images, predict_store
from cxr_cache.models.run import Run
from cxr_cache.models.tuned import TailAndHead
from cxr_cache.report.report import write_report
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.training import finetune as finetune_module
from cxr_cache.training.finetune import tune_run
from cxr_cache.training.frozen_start import config_from_run
from cxr_cache.training.train import fit_run
from tests.synthetic import make_cohort, make_store

ENCODER = "random:test_vit:5"
FROZEN = TrainConfig(
    epochs=(1, 2),
    n_folds=2,
    final="refit",
    batch_size=8,
    learning_rate=1e-2,
    hidden=(16,),
    n_jobs=1,
)
TUNED = FinetuneConfig.of_recipe(
    "reference",
    epochs=(1, 2),
    n_folds=2,
    batch_size=8,
    learning_rate=1e-3,
    head_learning_rate=1e-2,
    hidden=(16,),
    device="cpu",
    precision="fp32",
    num_workers=0,
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.set_num_threads(1)
    return load_encoder(ENCODER, precision="fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def images(folder) -> Path:
    return write_phantoms(folder / "phantoms", n_studies=24, image_size_px=64).image_dir


def extract(images, path, encoder, **options) -> Path:
    config = ExtractConfig(num_workers=0, **options)
    extract_embeddings(load_cohort(images.parent), images, path, encoder, config)
    return path


@pytest.fixture(scope="module")
def store(folder, images, encoder) -> Path:
    """With tokens of both views."""
    return extract(images, folder / "tokens.h5", encoder, unfreeze_layers=2, flip=True)


@pytest.fixture(scope="module")
def without_tokens(folder, images, encoder) -> Path:
    return extract(images, folder / "embeddings.h5", encoder)


@pytest.fixture(scope="module")
def frozen(folder, store) -> Run:
    run = fit_run(store, folder / "frozen", FROZEN).run
    score_run(run, n_resamples=10)
    return run


@pytest.fixture(scope="module")
def tuned(folder, store) -> Run:
    return tune_run(store, folder / "tuned", TUNED).run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.load_model().tensors


def assert_same_run(ours: Run, theirs: Run) -> None:
    assert weights(ours).keys() == weights(theirs).keys()
    for name, tensor in weights(ours).items():
        assert torch.equal(tensor, weights(theirs)[name]), name
    for table in ("splits", "epoch_search", "predictions", "out_of_fold"):
        pd.testing.assert_frame_equal(ours.read_table(table), theirs.read_table(table))


# -- the run ----------------------------------------------------------------------------


def test_a_fine_tuned_run_is_a_run_like_any_other(tuned, tmp_path):
    run = Run.open(shutil.copytree(tuned.path, tmp_path / "run"))
    metrics = score_run(run, n_resamples=10)
    assert 0 <= metrics["test"]["macro_auroc"]["value"] <= 1
    assert write_report(run).stat().st_size > 10_000
    assert {path.name for path in run.path.iterdir()} == {
        *("config.json", "model.safetensors", "metrics.json", "report.html", "plots"),
        *(
            "model_card.md",
            "group_differences.csv",
            "curves.csv",
            "calibration.csv",
            "per_finding_by_study.csv",
        ),
        *("flow.csv", "label_counts.csv", "decision_curves.csv", "test_reads.json"),
        *("training_distribution.safetensors", "subgroups.csv"),
        *(f"{name}.csv" for name in ("splits", "targets", "epoch_search", "history")),
        *(f"{name}.csv" for name in ("predictions", "out_of_fold", "per_finding")),
        *(f"{name}.csv" for name in ("per_finding_by_study", "subgroups", "curves", "calibration")),
    }
    history = run.read_table("history")
    assert set(history["fold"]) == {"1", "2", "final"}
    assert run.config["finetune"]["source"] == "tokens"


def test_what_trains_is_said_once(store, tmp_path):
    said = []
    tune_run(store, tmp_path / "run", replace(TUNED, epochs=(1,)), echo=said.append)
    (text,) = said
    with FeatureStore.open(store) as features:
        n_images = len(features)
    assert text.splitlines() == [
        "Training 83,456 parameters of visual.trunk.blocks.4, visual.trunk.blocks.5 and 8,835 of "
        "the head; 255,552 of the encoder stay frozen.",
        f"From the tokens of {n_images} images (2 per image, 0.00 GB) in the memory of cpu.",
    ]


def test_the_model_file_holds_what_was_trained_and_nothing_else(tuned, encoder):
    tensors = weights(tuned)
    blocks = {name for name in tensors if name.startswith("visual.")}
    assert blocks == {
        name for name, _ in encoder.named_parameters() if ".blocks.4." in name or ".5." in name
    }
    own = encoder.state_dict()
    assert all(not torch.equal(tensors[name][0], own[name]) for name in blocks)


def test_half_the_file_predicts_what_it_says(store, images, encoder, tmp_path, tuned):
    config = replace(TUNED, half=True)
    run = tune_run(store, tmp_path / "run", config).run
    sizes = [(r.path / "model.safetensors").stat().st_size for r in (run, tuned)]
    assert sizes[0] < 0.6 * sizes[1]
    assert_predicts_images(run, images, encoder)


def test_a_search_holds_each_fold_out_and_the_refit_takes_all(tuned, store):
    with FeatureStore.open(store) as features:
        assert len(tuned.read_table("predictions")) == len(features)
    splits = tuned.read_table("splits")
    out_of_fold = tuned.read_table("out_of_fold")
    assert set(out_of_fold["image_id"]) == set(splits["image_id"][splits["split"] == "train"])
    places = splits[["study_uid", "split", "fold"]].drop_duplicates()
    assert places["study_uid"].is_unique


def test_one_number_of_epochs_is_taken_without_a_search(store, tmp_path):
    """Thresholds still come from images that were held out: those of the first fold."""
    result = tune_run(store, tmp_path / "run", replace(TUNED, epochs=(2,)))
    splits = result.run.read_table("splits")
    out_of_fold = result.run.read_table("out_of_fold")
    assert set(out_of_fold["image_id"]) == set(splits["image_id"][splits["fold"] == 1])
    assert set(result.run.read_table("history")["fold"]) == {"1", "final"}
    assert "No search: macro AUROC on one held-out fold" in result.to_text()
    score_run(result.run, n_resamples=10)
    write_report(result.run)


@pytest.mark.parametrize("final", ["ensemble", "best-fold"])
def test_fold_models_can_be_the_final_one(store, images, encoder, tmp_path, final):
    run = tune_run(store, tmp_path / "run", replace(TUNED, final=final)).run
    n_members = {"ensemble": 2, "best-fold": 1}[final]
    assert len(weights(run)["weight_0"]) == n_members
    assert_predicts_images(run, images, encoder)
    one_number = replace(TUNED, final=final, epochs=(1,))
    run = tune_run(store, tmp_path / "one", one_number).run
    assert len(weights(run)["weight_0"]) == n_members
    assert set(run.read_table("history")["fold"]) == {"1", "2"}


def test_a_schedule_with_a_horizon_trains_every_candidate_by_itself(store, tmp_path):
    result = tune_run(store, tmp_path / "run", replace(TUNED, schedule="cosine"))
    history = result.run.read_table("history")
    assert history.groupby(["fold", "horizon"]).size().to_dict() == {
        **{("1", 1): 1, ("1", 2): 2, ("2", 1): 1, ("2", 2): 2},
        ("final", result.chosen_epochs): result.chosen_epochs,
    }


def test_stopping_epochs_are_reported(store, tmp_path):
    config = replace(TUNED, epochs=(1, 12), early_stopping=1, head_learning_rate=1.0)
    result = tune_run(store, tmp_path / "run", config)
    lengths = result.run.read_table("history").groupby("fold").size()
    assert min(lengths["1"], lengths["2"]) < 12
    for fold in ("1", "2"):
        if lengths[fold] < 12:
            assert f"fold {fold} after {count(lengths[fold], 'epoch')}" in result.to_text()
    assert "\n      1 epoch   0." in result.to_text()


# -- using it ---------------------------------------------------------------------------


def assert_predicts_images(run, images, encoder):
    """To 2e-4: batches differ between caching and predicting, and tokens are rounded after."""
    expected = run.read_table("predictions").set_index("image_id")[run.config["findings"]]
    paths = [images / name for name in expected.index[:9]]
    predictions = predict_images(run, paths, encoder)
    assert predictions.n_failed == 0
    np.testing.assert_allclose(
        predictions.probabilities, expected.iloc[:9].to_numpy(np.float32), atol=2e-4
    )


def test_new_images_get_the_probabilities_of_the_run(tuned, images, encoder):
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    assert_predicts_images(tuned, images, encoder)
    after = encoder.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(p.requires_grad for p in encoder.parameters())


def test_the_run_is_evaluated_on_a_store_with_tokens(tuned, store, encoder):
    with FeatureStore.open(store) as features:
        predictions, _ = predict_store(tuned, features, encoder)
    expected = tuned.read_table("predictions").set_index("image_id")[tuned.config["findings"]]
    found = predictions.set_index("image_id")[tuned.config["findings"]]
    np.testing.assert_allclose(found, expected.loc[found.index], atol=1e-5)


def test_another_encoder_is_refused_for_evaluation(tuned, store):
    other = load_encoder("random:test_vit:7", precision="fp32")
    message = r"trained on embeddings of another encoder"
    with FeatureStore.open(store) as features, pytest.raises(RunError, match=message):
        predict_store(tuned, features, other)


def test_a_store_without_the_tokens_is_refused_for_evaluation(tuned, without_tokens, encoder):
    message = r"(?s)no tokens for the blocks .* boundary_block: None in the store, 4 in the run"
    with (
        FeatureStore.open(without_tokens) as features,
        pytest.raises(StoreMismatchError, match=message),
    ):
        predict_store(tuned, features, encoder)


# -- tokens or images -------------------------------------------------------------------


def test_towers_with_rotary_positions_keep_all_patches_unless_asked(store, tmp_path):
    settled = tune_run(store, tmp_path / "run", replace(TUNED, patch_dropout=None)).run
    assert settled.config["finetune"]["patch_dropout"] == 0.5

    eva = SimpleNamespace(tokens_hold_positions=False, identity=SimpleNamespace(name="timm:eva"))
    assert finetune_module._settle_patch_dropout(eva, None) == 0.0
    with pytest.raises(
        ConfigError, match=r"--patch-dropout 0.5 cannot leave patches out of timm:eva"
    ):
        finetune_module._settle_patch_dropout(eva, 0.5)


def test_images_give_the_run_that_tokens_give(without_tokens, images, store, tmp_path):
    """Tokens are rounded to float16 in the store, so figures agree to about three digits.

    At usual rates, because at TUNED's AdamW doubles what differs with every step.
    """
    usual = replace(TUNED, learning_rate=1e-4, head_learning_rate=1e-3)
    config = replace(usual, flip=True)
    from_images = tune_run(without_tokens, tmp_path / "i", config, image_dir=images)
    from_tokens = tune_run(store, tmp_path / "t", usual)
    assert from_images.run.config["finetune"]["source"] == "images"
    ours, theirs = (r.run.read_table("history")["train_loss"] for r in (from_images, from_tokens))
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)
    findings = from_images.run.config["findings"]
    ours, theirs = (r.run.read_table("predictions")[findings] for r in (from_images, from_tokens))
    np.testing.assert_allclose(ours, theirs, atol=0.02)


@pytest.mark.parametrize("place", ["ram", "disk", "device"])
def test_where_tokens_wait_changes_nothing(store, tmp_path, tuned, place):
    run = tune_run(store, tmp_path / "run", replace(TUNED, tokens_in=place)).run
    assert_same_run(run, tuned)


def test_augmented_images_train_and_are_scored_as_they_are(without_tokens, images, tmp_path):
    changes = Augmentation(crop_scale=0.6, rotation_deg=10, brightness=0.2, contrast=0.2)
    config = replace(TUNED, epochs=(1,), augmentation=changes, flip=True)
    run = tune_run(without_tokens, tmp_path / "a", config, image_dir=images).run
    plain = replace(config, augmentation=Augmentation())
    other = tune_run(without_tokens, tmp_path / "b", plain, image_dir=images).run
    losses = [r.read_table("history")["train_loss"] for r in (run, other)]
    assert not np.allclose(*losses, rtol=1e-3)
    again = tune_run(without_tokens, tmp_path / "c", config, image_dir=images).run
    assert_same_run(run, again)


def test_an_image_that_has_changed_since_is_named(without_tokens, images, tmp_path):
    copies = shutil.copytree(images, tmp_path / "images")
    first, second, *_ = sorted(copies.iterdir())
    shutil.copy(second, first)
    with pytest.raises(TrainingError, match=rf"{first.name} has changed .* in the store, .* now"):
        tune_run(without_tokens, tmp_path / "run", TUNED, image_dir=copies)


def test_missing_images_are_counted_before_an_old_run_gives_way(
    without_tokens, images, tuned, tmp_path
):
    copies = shutil.copytree(images, tmp_path / "images")
    old = shutil.copytree(tuned.path, tmp_path / "run")
    first, second, *_ = sorted(copies.iterdir())
    first.unlink()
    second.unlink()
    with pytest.raises(TrainingError, match=rf"2 of \d+ images are not in .*'{first.name}'"):
        tune_run(without_tokens, old, TUNED, image_dir=copies, overwrite=True)
    assert Run.open(old).load_model().tensors.keys() == weights(tuned).keys()


# -- from a frozen run ------------------------------------------------------------------


def test_a_frozen_run_gives_split_final_model_and_heads(store, frozen, tmp_path):
    here = {"batch_size": 8, "device": "cpu", "precision": "fp32"}
    config = config_from_run(frozen, "reference", **here)
    assert config.final == frozen.config["train"]["final"]
    assert config.epochs == (frozen.config["chosen_epochs"],)
    assert config.hidden == (16,)
    still = replace(config, learning_rate=1e-12, head_learning_rate=1e-12, epochs=(1,))

    run = tune_run(store, tmp_path / "run", still, from_run=frozen.path).run

    pd.testing.assert_frame_equal(run.read_table("splits"), frozen.read_table("splits"))
    start = frozen.load_model().tensors
    for name, tensor in start.items():
        if not name.startswith(("mean", "var")):
            torch.testing.assert_close(weights(run)[name], tensor, msg=name)
    comparison = compare_runs(frozen, run, n_resamples=20)
    assert comparison.n_images == int((frozen.read_table("splits")["split"] == "test").sum())


def test_rule_and_calibration_are_those_that_the_frozen_run_has_now(frozen, tmp_path):
    """Also where they were chosen after its training; what is given explicitly wins."""
    copy = Run.open(shutil.copytree(frozen.path, tmp_path / "copy"))
    score_run(copy, threshold_rule="sensitivity=0.8", calibration="platt", n_resamples=0)

    config = config_from_run(copy, batch_size=8)
    given = config_from_run(copy, batch_size=8, threshold_rule="f1", calibration="none")

    assert (config.threshold_rule, config.calibration) == ("sensitivity=0.8", "platt")
    assert (given.threshold_rule, given.calibration) == ("f1", "none")
    plain = config_from_run(frozen, batch_size=8)
    assert (plain.threshold_rule, plain.calibration) == ("f1", "platt-shrunk")


def test_the_final_model_starts_from_a_member_of_an_ensemble(store, tmp_path):
    ensemble = fit_run(store, tmp_path / "frozen", replace(FROZEN, final="ensemble")).run
    config = config_from_run(ensemble, batch_size=8, device="cpu", precision="fp32", epochs=(1,))
    assert config.final == "ensemble"
    still = replace(config, final="refit", learning_rate=1e-12, head_learning_rate=1e-12)

    run = tune_run(store, tmp_path / "run", still, from_run=ensemble.path).run

    members = ensemble.load_model().tensors["weight_0"]
    assert len(members) == FROZEN.n_folds
    torch.testing.assert_close(weights(run)["weight_0"], members[:1])


def test_a_fold_starts_from_the_head_that_has_not_seen_it(store, frozen, tmp_path):
    """The final head has seen every fold, so out-of-fold figures would be too good with it."""
    config = config_from_run(frozen, **{"batch_size": 8, "device": "cpu", "precision": "fp32"})
    still = replace(config, learning_rate=1e-12, head_learning_rate=1e-12, epochs=(1, 2))
    still = replace(still, final="ensemble")
    run = tune_run(store, tmp_path / "run", still, from_run=frozen.path).run
    fold_heads = frozen.load_fold_heads()
    assert not torch.equal(fold_heads["weight_0"][0], fold_heads["weight_0"][1])
    torch.testing.assert_close(weights(run)["weight_0"], fold_heads["weight_0"])


def test_a_frozen_run_that_does_not_fit_is_refused_with_both_values(
    store, frozen, images, folder, tmp_path
):
    config = config_from_run(frozen, batch_size=8)
    with pytest.raises(RunError, match=r"hidden: \[16\] in the run, \[12\] now"):
        tune_run(store, tmp_path / "r", replace(config, hidden=(12,)), from_run=frozen.path)
    other = load_encoder("random:test_vit:6", precision="fp32")
    elsewhere = extract(images, tmp_path / "other.h5", other, unfreeze_layers=2, flip=True)
    with pytest.raises(RunError, match=r"weights_sha256: '\w+' in the run, '\w+' now"):
        tune_run(elsewhere, tmp_path / "r", config, from_run=frozen.path)
    assert not (tmp_path / "r").exists()


# -- repeats ----------------------------------------------------------------------------


def by_repeat(run: Run) -> list[np.ndarray]:
    """Test predictions of every training, ``(n, F)`` each."""
    table, findings = run.read_table("repeats"), list(run.config["findings"])
    return [part[findings].to_numpy() for _, part in table.groupby("repeat")]


def test_the_first_repeat_is_the_run_and_an_interrupted_second_ends_as_it_would_have(
    store, tuned, tmp_path
):
    whole, broken, counts = tmp_path / "whole", tmp_path / "broken", []
    run = tune_run(store, whole, TUNED, n_repeats=2, on_progress=lambda *c: counts.append(c)).run
    n_epochs = counts[-1][0]
    with pytest.raises(KeyboardInterrupt):
        tune_run(store, broken, TUNED, n_repeats=2, on_progress=_StopAfter(n_epochs - 1))
    again = tune_run(store, broken, TUNED, n_repeats=2).run

    assert_same_run(run, tuned)
    assert run.config["n_repeats"] == 2
    assert counts[-1][1] == n_epochs
    first, second = by_repeat(run)
    findings = list(run.config["findings"])
    predictions = tuned.read_table("predictions").query("split == 'test'")[findings]
    np.testing.assert_array_equal(first, predictions)
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(by_repeat(again)[1], second)


def test_each_repeat_begins_with_the_heads_of_the_same_frozen_repeat(store, tmp_path):
    """So that the fine-tuned recipe and the frozen one can be compared, training included."""
    recipe = replace(FROZEN, norm="layer", final="ensemble")  # no statistics, which would move
    frozen = fit_run(store, tmp_path / "frozen", recipe, n_repeats=2).run
    config = config_from_run(frozen, "reference", batch_size=8, device="cpu", precision="fp32")
    still = replace(config, learning_rate=1e-12, head_learning_rate=1e-12, epochs=(1,))

    run = tune_run(store, tmp_path / "run", still, from_run=frozen.path, n_repeats=2).run

    before, after = by_repeat(frozen), by_repeat(run)
    for ours, theirs in zip(after, before, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert np.abs(before[0] - before[1]).max() > 1e-2
    notes = compare_runs(frozen, run, n_resamples=20).notes
    assert notes[0].startswith("This compares recipes: figures are means over 2 and 2 trainings")


def test_a_frozen_run_of_fewer_repeats_is_no_start_for_them(store, frozen, tmp_path):
    config = config_from_run(frozen, batch_size=8)
    message = (
        r"has the heads of 1 training, and --repeats 3 begins each repeat with heads of its own\. "
        r"Train it with `cxr-cache train --repeats 3`, or fine-tune without --repeats\."
    )
    with pytest.raises(RunError, match=message):
        tune_run(store, tmp_path / "run", config, from_run=frozen.path, n_repeats=3)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_fine_tuned_into_its_own_place(store, frozen):
    config = config_from_run(frozen, batch_size=8)
    with pytest.raises(RunError, match="is the run to start from; --run-dir needs another folder"):
        tune_run(store, frozen.path, config, from_run=frozen.path, overwrite=True)
    assert Run.open(frozen.path).config["status"] == "finished"


def test_a_full_gpu_is_one_message(store, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    monkeypatch.setattr(finetune_module, "tune", fail)
    with pytest.raises(TrainingError, match=r"too little memory: CUDA .*--grad-checkpointing"):
        tune_run(store, tmp_path / "run", TUNED)


def test_a_fine_tuned_run_is_no_start(store, tuned, tmp_path):
    with pytest.raises(RunError, match="is a run of `cxr-cache finetune`; --from-run starts from"):
        config_from_run(tuned)


# -- interruption -----------------------------------------------------------------------


class _StopAfter:
    """Raises after so many epochs, as Ctrl-C would."""

    def __init__(self, n_epochs: int) -> None:
        self.left = n_epochs

    def __call__(self, _done: int, _all: int) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("n_epochs", [1, 2, 3, 5])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(store, tuned, tmp_path, n_epochs):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tune_run(store, path, TUNED, on_progress=_StopAfter(n_epochs))
    with pytest.raises(RunError, match=r"not finished.*Run the same `cxr-cache finetune` command"):
        Run.open(path)

    counts = []
    run = tune_run(
        store, path, TUNED, on_progress=lambda done, total: counts.append((done, total))
    ).run

    assert_same_run(run, tuned)
    assert counts[-1][0] == counts[-1][1]
    assert not (path / "unfinished").exists()


def test_a_run_that_goes_on_elsewhere_says_so(store, tmp_path, monkeypatch):
    path = tmp_path / "run"
    here = torch.backends.cpu.get_cpu_capability()
    with pytest.raises(KeyboardInterrupt):
        tune_run(store, path, TUNED, on_progress=_StopAfter(1))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    with pytest.raises(KeyboardInterrupt):
        tune_run(store, path, TUNED, on_progress=_StopAfter(2))
    monkeypatch.undo()

    run = tune_run(store, path, TUNED).run

    assert run.config["machine"]["instructions"] == here
    assert run.config["warnings"][-1] == (
        f"A part of this run was trained on another machine: instructions {here} and SVE256."
    )
    assert len(set(run.config["warnings"])) == len(run.config["warnings"])


def test_an_unfinished_run_of_other_options_is_refused(store, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tune_run(store, path, TUNED, on_progress=_StopAfter(1))
    before = sorted((path / "unfinished").iterdir())
    message = r"finetune.learning_rate: 0.001 in the run, 0.002 now\n.*--overwrite"
    with pytest.raises(RunError, match=message):
        tune_run(store, path, replace(TUNED, learning_rate=2e-3))
    assert sorted((path / "unfinished").iterdir()) == before
    tune_run(store, path, replace(TUNED, tokens_in="disk"))  # where, not what


def test_an_unfinished_run_of_another_store_is_refused(store, images, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tune_run(store, path, TUNED, on_progress=_StopAfter(1))
    other = load_encoder("random:test_vit:6", precision="fp32")
    elsewhere = extract(images, tmp_path / "other.h5", other, unfreeze_layers=2, flip=True)
    with pytest.raises(RunError, match=r"store.path: '.*tokens.h5' in the run, '.*other.h5' now"):
        tune_run(elsewhere, path, TUNED)
    moved = shutil.copy(store, tmp_path / "moved.h5")
    tune_run(moved, path, TUNED)  # the same rows under another name


def test_labels_and_start_cannot_be_dropped_on_the_way(store, frozen, tmp_path):
    """Other targets make another split, and test rows would have been trained on."""
    path, labels = tmp_path / "run", tmp_path / "labels.csv"
    frozen.read_table("targets").to_csv(labels, index=False)
    with pytest.raises(KeyboardInterrupt):
        tune_run(store, path, TUNED, labels=labels, on_progress=_StopAfter(1))
    with pytest.raises(RunError, match=r"labels\.sha256: '\w+' in the run, None now"):
        tune_run(store, path, TUNED)
    config = config_from_run(frozen, batch_size=8, device="cpu", precision="fp32")
    with pytest.raises(KeyboardInterrupt):
        tune_run(
            store,
            path,
            config,
            from_run=frozen.path,
            overwrite=True,
            on_progress=_StopAfter(1),
        )
    with pytest.raises(RunError, match=r"from_run\.head_sha256: '\w+' in the run, None now"):
        tune_run(store, path, config)


def test_an_unfinished_run_of_an_earlier_version_continues_on_the_split_of_its_start_alone(
    store, frozen, tmp_path
):
    """Its own split was drawn by other rules: what a fold trained on could be held out now."""
    config = config_from_run(frozen, batch_size=8, device="cpu", precision="fp32")
    for start, options in ((frozen.path, config), (None, TUNED)):
        path = tmp_path / f"run {start is None}"
        with pytest.raises(KeyboardInterrupt):
            tune_run(store, path, options, from_run=start, on_progress=_StopAfter(1))
        written = json.loads((path / "config.json").read_text())
        del written["finetune"]["split"]
        written.pop("split_sha256", None)
        (path / "config.json").write_text(json.dumps(written))
        if start is not None:
            tune_run(store, path, options, from_run=start)
            continue
        with pytest.raises(
            RunError, match=r"(?s)split_sha256: None in the run, '\w+' now.*--overwrite"
        ):
            tune_run(store, path, options)


def test_a_damaged_state_is_named(store, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tune_run(store, path, TUNED, on_progress=_StopAfter(1))
    (state,) = (path / "unfinished").iterdir()
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(RunError, match=rf"{state.name} is damaged.*Delete this file"):
        tune_run(store, path, TUNED)


# -- bad input --------------------------------------------------------------------------


def test_tokens_of_another_boundary_are_refused_with_both_values(store, tmp_path):
    message = r"unfreeze_layers: 2 in the store, 3 in this run\nUse --unfreeze-layers 2"
    with pytest.raises(StoreMismatchError, match=message):
        tune_run(store, tmp_path / "run", replace(TUNED, unfreeze_layers=3))
    assert not (tmp_path / "run").exists()


def test_a_store_without_tokens_says_what_to_do(without_tokens, tmp_path):
    with pytest.raises(ConfigError, match=r"no tokens .* --tokens --unfreeze-layers 2, or give"):
        tune_run(without_tokens, tmp_path / "run", TUNED)
    with pytest.raises(ConfigError, match="--source images needs --image-dir"):
        tune_run(without_tokens, tmp_path / "run", replace(TUNED, source="images"))
    with pytest.raises(ConfigError, match=r"has no tokens\. Add them"):
        tune_run(without_tokens, tmp_path / "run", replace(TUNED, source="tokens"))


def test_half_a_token_set_is_refused_with_the_counts(without_tokens, images, encoder, tmp_path):
    path = Path(shutil.copy(without_tokens, tmp_path / "half.h5"))
    done = 0

    def stop(n_done, _failed, _all):
        nonlocal done
        done += n_done
        if done >= 16:
            raise KeyboardInterrupt

    config = ExtractConfig(num_workers=0, batch_size=8, unfreeze_layers=2)
    cohort = load_cohort(images.parent)
    with pytest.raises(KeyboardInterrupt):
        extract_embeddings(cohort, images, path, encoder, config, on_progress=stop)
    message = rf"tokens for 16 of {len(cohort)} images; {len(cohort) - 16} are still to come"
    with pytest.raises(StoreIncompleteError, match=message):
        tune_run(path, tmp_path / "run", TUNED)
    fit_run(path, tmp_path / "head", FROZEN)  # embeddings are all there


def test_imported_embeddings_have_no_blocks_to_train(tmp_path):
    path = make_store(tmp_path / "imported.h5", make_cohort())
    with pytest.raises(StoreMismatchError, match=r"imported from imported:tiny\.npz; there is no"):
        tune_run(path, tmp_path / "run", TUNED)


def test_an_encoder_that_moved_and_changed_is_refused(store, tmp_path):
    with pytest.raises(StoreMismatchError, match=r"weights_sha256: '\w+' in the store"):
        tune_run(store, tmp_path / "run", TUNED, model="random:test_vit:7")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_replaced_unasked(store, tuned):
    before = (tuned.path / "config.json").read_text()
    with pytest.raises(RunError, match="holds a finished run"):
        tune_run(store, tuned.path, TUNED)
    assert (tuned.path / "config.json").read_text() == before


def test_the_configuration_survives_json(tuned):
    stored = json.loads((tuned.path / "config.json").read_text())["finetune"]
    rebuilt = FinetuneConfig(**stored)
    assert replace(rebuilt, source="auto") == replace(TUNED, source="auto")


def test_the_encoder_of_a_run_can_be_loaded_again(tuned, encoder):
    assert reload_encoder(tuned.load_model().encoder).identity == encoder.identity


def test_bf16_is_recorded_and_predicts_alike(store, images, encoder, tmp_path):
    run = tune_run(store, tmp_path / "run", replace(TUNED, precision="bf16")).run
    assert run.load_model().tail["precision"] == "bf16"
    expected = run.read_table("predictions").set_index("image_id")[run.config["findings"]]
    paths = [images / name for name in expected.index[:9]]
    found = predict_images(run, paths, encoder).probabilities
    np.testing.assert_allclose(found, expected.iloc[:9].to_numpy(np.float32), atol=0.02)


def test_members_are_loaded_once_however_many_images_there_are(tuned, images, encoder, monkeypatch):
    """They were loaded anew for every 32 images."""
    paths = sorted(images.iterdir())[:7]
    expected = predict_images(tuned, paths, encoder).probabilities
    loaded = []
    init = TailAndHead.__init__
    monkeypatch.setattr(
        TailAndHead, "__init__", lambda self, *a, **k: (loaded.append(self), init(self, *a, **k))[1]
    )
    monkeypatch.setattr(predict_module, "_IMAGES_AT_ONCE", 2)
    found = predict_images(tuned, paths, encoder).probabilities
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len(loaded) == tuned.load_model().n_members
    tensors = {id(tensor) for one in loaded for tensor in one.encoder.parameters()}
    tail = sum(len(one.tail) for one in loaded)
    assert len(tensors) == len(list(encoder.parameters())) + tail - len(loaded[0].tail)


def test_the_module_reads_no_test_rows_before_the_end(store, tmp_path, monkeypatch):
    """Train with test targets turned upside down: thresholds and weights stay the same."""
    plain = tune_run(store, tmp_path / "a", TUNED).run
    is_test = (plain.read_table("splits")["split"] == "test").to_numpy()
    find = finetune_module.find_labelled_rows

    def flipped(*args, **options):
        found = find(*args, **options)
        targets = found.cohort.targets.copy()
        targets[is_test] = 1 - targets[is_test]
        return replace(found, cohort=replace(found.cohort, targets=targets))

    split = finetune_module.split_rows
    monkeypatch.setattr(finetune_module, "find_labelled_rows", flipped)
    with FeatureStore.open(store) as features:
        original = features.cohort
    monkeypatch.setattr(
        finetune_module, "split_rows", lambda _, studies, config: split(original, studies, config)
    )
    other = tune_run(store, tmp_path / "b", TUNED).run
    assert plain.thresholds == other.thresholds
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(plain).items())


@pytest.mark.parametrize(
    "use",
    [
        lambda model, encoder: Predictor(model, encoder).from_tokens(torch.zeros(1, 5, 7)),
        lambda model, encoder: TraceableModel(model, encoder).map_findings(
            torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [99], 2
        ),
    ],
    ids=["predict", "explain"],
)
def test_an_error_gives_the_encoder_its_own_blocks_back(tuned, use):
    """Also while somebody keeps the error, as a notebook does."""
    encoder = load_encoder(ENCODER, precision="fp32")
    own = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}

    with pytest.raises((RuntimeError, IndexError)) as kept:
        use(tuned.load_model(), encoder)

    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    assert kept.value.__traceback__ is not None
