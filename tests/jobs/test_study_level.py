"""Runs of --level study, from a store to figures, predictions and comparisons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.config import ExtractConfig, FinetuneConfig, TrainConfig
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import ConfigError, RunError
from cxr_cache.evaluation.audit import audit_store
from cxr_cache.evaluation.compare import compare_runs
from cxr_cache.evaluation.evaluate import format_summary
from cxr_cache.evaluation.scored import read_scored
from cxr_cache.jobs.external import evaluate_on_store
from cxr_cache.jobs.runs import finetune_tail, train_head
from cxr_cache.models.predict import predict_images, predict_store
from cxr_cache.models.run import Run
from cxr_cache.report.report import write_joint_report, write_report
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.training.ablate import make_settings, run_ablation
from cxr_cache.training.frozen_start import config_from_run

ENCODER = "random:test_vit:5"
FROZEN = TrainConfig(
    epochs=(1, 2),
    n_folds=2,
    batch_size=8,
    learning_rate=1e-2,
    hidden=(16,),
    n_jobs=1,
    level="study",
    calibration="none",
    min_positives=0,
)
TUNED = FinetuneConfig(
    epochs=2,
    n_folds=2,
    batch_size=4,
    patch_dropout=0.5,
    calibration="none",
    min_positives=0,
    learning_rate=1e-3,
    hidden=(16,),
    device="cpu",
    precision="fp32",
    num_workers=0,
    level="study",
)


@pytest.fixture(scope="module")
def encoder():
    torch.set_num_threads(1)
    return load_encoder(ENCODER, precision="fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def images(folder) -> Path:
    return write_phantoms(folder / "phantoms", n_studies=30, image_size_px=64).image_dir


@pytest.fixture(scope="module")
def cohort(images):
    return load_cohort(images.parent)


@pytest.fixture(scope="module")
def store(folder, images, cohort, encoder) -> Path:
    config = ExtractConfig(num_workers=0, unfreeze_layers=2, flip=True)
    extract_embeddings(cohort, images, folder / "f.h5", encoder, config)
    return folder / "f.h5"


@pytest.fixture(scope="module")
def frozen(folder, store) -> Run:
    return train_head(store, folder / "frozen", FROZEN).run


@pytest.fixture(scope="module")
def by_image(folder, store) -> Run:
    return train_head(store, folder / "by_image", replace(FROZEN, level="image")).run


@pytest.fixture(scope="module")
def tuned(folder, store) -> Run:
    return finetune_tail(store, folder / "tuned", TUNED).run


@pytest.fixture(scope="module")
def studies_csv(folder, cohort) -> Path:
    cohort.images.to_csv(folder / "studies.csv", index=False)
    return folder / "studies.csv"


def test_rows_are_studies_and_the_split_is_that_of_a_run_by_image(frozen, by_image, cohort):
    predictions = frozen.predictions
    assert frozen.level == frozen.load_model().level == "study"
    assert predictions["image_id"].tolist() == list(dict.fromkeys(cohort.study_uids))
    assert predictions["n_images"].astype(int).sum() == len(cohort)
    pd.testing.assert_frame_equal(frozen.splits, by_image.splits)  # which name images in both
    by_study = read_scored(by_image).by_study()
    own = read_scored(frozen).by_study()
    assert own.image_ids.tolist() == by_study.image_ids.tolist()
    np.testing.assert_array_equal(own.targets, by_study.targets)


def test_figures_and_words_are_of_studies(frozen, by_image):
    metrics, of_images = frozen.metrics, by_image.metrics
    assert metrics["rows"] == "studies"
    for count in ("n_test_images", "n_test_studies", "n_train_images", "n_train_studies"):
        assert metrics[count] == of_images[count]
    assert metrics["test"]["macro_auroc"] == metrics["test_by_study"]["macro_auroc"]
    for name in ("n_images", "n_studies"):
        assert frozen.per_finding[name].tolist() == by_image.per_finding[name].tolist()
    text = format_summary(metrics)
    assert f"{metrics['n_test_studies']} studies with {metrics['n_test_images']} images" in text
    assert "by study" not in text
    page, card = frozen.report_path.read_text(), frozen.read_model_card()
    assert "Test studies" in page
    assert "Test images" not in page
    assert "averaged over their images" not in page
    assert "AUROC by study" not in card
    assert "Test studies" in card


def test_runs_are_compared_by_study_where_one_predicts_studies(frozen, by_image):
    comparison = compare_runs(by_image, frozen, n_resamples=50)
    assert comparison.rows == ("studies",)
    assert "by study" in comparison.to_text()
    row = comparison.macro("frozen", rows="studies")
    assert row["first"] == pytest.approx(
        by_image.metrics["test_by_study"]["macro_auroc"]["value"], abs=1e-6
    )
    assert row["second"] == pytest.approx(frozen.metrics["test"]["macro_auroc"]["value"], abs=1e-6)


@pytest.mark.parametrize("name", ["frozen", "tuned"])
def test_files_and_a_store_get_the_probabilities_of_the_run(
    name, request, store, images, encoder, studies_csv, cohort
):
    run = request.getfixturevalue(name)
    with FeatureStore.open(store) as features:
        table, targets = predict_store(run, features, encoder)
    assert table["image_id"].tolist() == targets["image_id"].tolist()
    findings = run.config["findings"]
    own = run.predictions.set_index("image_id").loc[table["image_id"], findings]
    np.testing.assert_allclose(table[findings], own, atol=1e-6)
    chosen = [images / name for name in reversed(cohort.image_ids[:9])]
    predicted = predict_images(run, chosen, encoder, studies=studies_csv)
    whole = own.loc[list(predicted.image_ids)[1:-1]]  # of the others, images may be missing
    kept = dict(zip(predicted.image_ids, predicted.probabilities, strict=True))
    np.testing.assert_allclose([kept[uid] for uid in whole.index], whole, atol=2e-3)
    columns = predicted.to_table().columns.tolist()
    assert columns[:5] == ["study", "views", "present", "ranked_only", "unknown"]


def test_a_study_with_a_broken_image_has_no_prediction(frozen, images, encoder, tmp_path):
    good = next(path for path in images.iterdir())
    (tmp_path / "bad.png").write_bytes(b"no image")
    table = tmp_path / "s.csv"
    table.write_text(f"image_id,study_uid,projection\nbad.png,1,lateral\n{good.name},1,PA\n")
    predicted = predict_images(frozen, [good, tmp_path / "bad.png"], encoder, studies=table)
    assert predicted.image_ids == ("1",)
    assert predicted.errors[0].startswith(f"{tmp_path / 'bad.png'}: ")
    assert np.isnan(predicted.probabilities).all()
    assert "1 study (1 could not be used)" in repr(predicted)


def test_gradients_reach_all_images_of_a_study(store, encoder, cohort):
    from cxr_cache.datasets.studies import group_by_study
    from cxr_cache.models.heads import HeadBank
    from cxr_cache.models.tuned import TailAndHead
    from cxr_cache.store.studies import StudyBatch, head_width

    bank = HeadBank(1, head_width(encoder.identity.embedding_width, "study"), 2, hidden=())
    model = TailAndHead(load_encoder(ENCODER, precision="fp32"), bank, 2)
    rows, slots = group_by_study(cohort).pick(np.arange(4))
    with FeatureStore.open(store) as features:
        tokens = torch.from_numpy(features.read_rows("tokens", rows)[:, 0]).float()
    model(StudyBatch(tokens.requires_grad_(), torch.from_numpy(slots))).sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad.abs().sum(dim=(1, 2)) > 0).all()


def test_fine_tuning_goes_on_from_a_frozen_run_of_studies(frozen, by_image, store, folder):
    config = replace(config_from_run(frozen, epochs=1, device="cpu", num_workers=0), batch_size=4)
    assert config.level == "study"
    run = finetune_tail(store, folder / "from", config, from_run=frozen.path).run
    pd.testing.assert_frame_equal(run.splits, frozen.splits)
    with pytest.raises(RunError, match=r"level: 'image' in the run, 'study' now"):
        finetune_tail(store, folder / "other", config, from_run=by_image.path)


def test_an_external_store_is_scored_by_study(frozen, store, folder):
    evaluation = evaluate_on_store(frozen, store, out=folder / "external", n_resamples=0)
    assert evaluation.metrics["rows"] == "studies"
    assert evaluation.metrics["external"]["overlap"]["n_same_file"] == len(frozen.splits)
    assert "Test studies" in (folder / "external" / "report.html").read_text()


def test_an_audit_knows_the_sides_of_the_images(frozen, store):
    with FeatureStore.open(store) as features:
        sides = audit_store(features, run=frozen).to_text()
        assert "0 on test and train, 0 on several folds only" in sides
        with pytest.raises(RunError, match="predicts whole studies"):
            audit_store(features, run=frozen, with_leakage=True)


def test_settings_are_compared_on_studies(store, folder, frozen):
    settings = make_settings(FROZEN, ["lr=1e-2,1e-3"])
    ablation = run_ablation(store, folder / "ablation", settings, baselines=(), n_workers=1)
    best = ablation.table.set_index("setting").loc["lr=1e-2", "mean_auroc"]
    assert best == pytest.approx(frozen.read_table("epoch_search")["mean_auroc"].max(), abs=1e-6)
    with pytest.raises(ConfigError, match=r"--set level: all settings share it. Use --level"):
        make_settings(FROZEN, ["level=image,study"])


def test_what_needs_single_images_says_so(frozen, by_image, images, folder):
    with pytest.raises(RunError, match=r"pictures .* single images. Give a run of --level image"):
        write_report(frozen, image_dir=images)
    with pytest.raises(RunError, match=r"predicts by study .* by image, which does not go on one"):
        write_joint_report([frozen, by_image], folder / "page.html")
    export = ["export", str(frozen.path), "--format", "onnx", "--out", str(folder / "x.onnx")]
    explain = ["explain", str(frozen.path), *map(str, sorted(images.iterdir())[:1])]
    finding = frozen.config["findings"][0]
    for command in (export, [*explain, "--finding", finding, "--out", str(folder / "maps")]):
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 1
        assert "predicts whole studies (--level study)" in result.output


def test_studies_go_with_a_run_of_studies_and_whole_splits(by_image, encoder, studies_csv):
    with pytest.raises(RunError, match="--studies goes with a run of --level study"):
        predict_images(by_image, ["a.png"], encoder, studies=studies_csv)
    with pytest.raises(ConfigError, match="split_by must be study where the level is study"):
        TrainConfig(level="study", split_by="image")
