"""The methods section says what the run recorded, all of it, and nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.config import Augmentation, FinetuneConfig, Recipe, TrainConfig
from cxr_cache.encoders.identity import EncoderIdentity
from cxr_cache.errors import RunError
from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.models.run import Run
from cxr_cache.report import phrases
from cxr_cache.report.methods import describe_methods, find_blanks
from cxr_cache.report.page import render_page
from cxr_cache.report.views import read_view
from tests.evaluation.test_evaluate import make_run
from tests.report.test_report import copy_run

ENCODER = EncoderIdentity(
    name="hf-hub:microsoft/rad-dino",
    revision="9f341de",
    weights_sha256="3f9c",
    preprocessing={
        **{"image_size_px": 518, "mean": [0.53, 0.53, 0.53], "std": [0.25, 0.25, 0.25]},
        **{"interpolation": "bicubic", "resize": "pad", "bits_stored": 12, "decode_rule": 1},
    },
    precision="bf16",
    n_blocks=12,
    n_tokens=1370,
    token_width=768,
    pooled_width=768,
    embedding_width=768,
    is_random=False,
).to_dict()
STORE = {"path": "mine.h5", "encoder": ENCODER, "cohort": {"labels.csv": "ab12"}}
SPLIT = {"whose": "", "n_shared": 0, "unit": "study"}
OTHERS: dict[str, Any] = {
    **{"split_by": "image", "level": "study", "final": "best-fold", "schedule": "constant"},
    **{"loss": "asymmetric", "norm": "layer", "input_norm": "none", "features": "both"},
    **{"threshold_rule": "youden", "calibration": "temperature", "select_by": "weighted"},
    **{"max_grad_norm": None, "early_stopping": 7, "hidden": (31,), "epochs": (2, 3, 5)},
    **{"augmentation": Augmentation(rotation_deg=9), "patch_dropout": 0.25, "source": "images"},
    **{"layer_decay": 0.5, "ema_decay": 0.9, "mixup": 0.4},
}
"""What options are changed to; numbers and switches change by themselves."""
ELSEWHERE = {
    **dict.fromkeys(("threshold_rule", "calibration", "min_positives"), "metrics.json"),
    **{"select_by": "search_measure", "baseline": "logistic", "flip": "n_views"},
    **{"split": "splits.csv", "protocol": "outer_folds", "n_outer_folds": "outer_folds"},
}
"""Options of which the run records elsewhere what came of them."""
OF_THE_MACHINE = (
    *("n_jobs", "num_workers", "device", "tokens_in", "grad_checkpointing", "precision", "half"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Run:
    """Frozen, of one store, with a new split and everything that a run records today."""
    run = make_run(
        tmp_path_factory.mktemp("methods") / "run",
        **{"store": STORE, "split": SPLIT, "n_views": 2, "search_measure": "macro AUROC"},
        train=asdict(TrainConfig(epochs=(2, 4), n_folds=3)),
    )
    score_run(run, n_resamples=50)
    return run


def change(name: str, value: Any) -> Any:
    """Another value of an option."""
    if name in OTHERS:
        return OTHERS[name]
    return not value if isinstance(value, bool) else value / 2 if value < 1 else value + 1


def of(run: Run, kind: str = "train", recipe: Recipe | None = None, **config: Any) -> Run:
    """The same run as if it had been trained otherwise."""
    options = {} if recipe is None else {kind: asdict(recipe)}
    return Run(run.path, {**run.config, "kind": kind, **options, **config})


def test_figures_and_numbers_are_those_of_the_run(base):
    text = describe_methods(base)

    metrics = base.metrics
    auroc = metrics["test"]["macro_auroc"]
    shown = f"{auroc['value']:.3f} (95% CI {auroc['low']:.3f} to {auroc['high']:.3f}; guessing"
    assert shown in text
    assert f"{metrics['test_by_study']['macro_auroc']['value']:.3f}" in text
    assert "48 images of 24 studies" in text
    assert "The training set had 192 images of 96 studies." in text
    missing = base.targets[base.config["findings"]].isna().to_numpy().mean()
    assert f"{missing:.1%} of the labels were missing" in text
    for fact in ("hf-hub:microsoft/rad-dino", "revision 9f341de", "SHA-256 3f9c", "12 bits"):
        assert fact in text
    assert "padded with black to 518 × 518" in text
    assert "labels.csv, SHA-256 ab12" in text
    assert "from 50 resamples of whole studies" in text
    assert f"torch {base.config['versions']['torch']}" in text
    assert "5 of 6 findings" in text
    assert "in the test: Bronchiolitis." in text
    for word in ("None", "nan", "{", "undefined"):
        assert word not in text


@pytest.mark.parametrize("kind", ["train", "finetune"])
def test_no_option_is_passed_over(base, kind, monkeypatch):
    """Whoever adds an option adds a sentence, or finds it listed by its name."""
    read_table = Run.read_table
    read = cache(lambda path, name: read_table(Run(path, {}), name))
    monkeypatch.setattr("cxr_cache.report.views.Run.read_table", lambda run, n: read(run.path, n))
    kind_of = {"train": TrainConfig, "finetune": FinetuneConfig}[kind]
    start: dict[str, Any] = {"epochs": (2, 4), "n_folds": 3, "schedule": "plateau"}
    before = describe_methods(of(base, kind, kind_of(**start)))
    silent = []
    for field in fields(kind_of):
        if field.name in ELSEWHERE or field.name in OF_THE_MACHINE:
            continue
        other = change(field.name, start.get(field.name, field.default))
        if describe_methods(of(base, kind, kind_of(**{**start, field.name: other}))) == before:
            silent.append(field.name)
    assert silent == []


def test_an_option_that_no_sentence_knows_is_listed_by_its_name(base, monkeypatch):
    monkeypatch.setattr("cxr_cache.report.methods._DESCRIBED", ())
    recipe = TrainConfig(epochs=(2, 4), n_folds=3, dropout=0.123)
    assert "Further options: epochs (2, 4), n folds 3, dropout 0.123." in describe_methods(
        of(base, recipe=recipe)
    )


@pytest.mark.parametrize("loss", phrases.LOSSES)
def test_every_loss_has_its_phrase_and_reference(base, loss):
    text = describe_methods(of(base, recipe=TrainConfig(epochs=(2, 4), n_folds=3, loss=loss)))
    paragraphs, references = text.split("## References")
    for key, reference in phrases.REFERENCES.items():
        assert (f"[{key}]" in paragraphs) == (reference in references)


def test_what_evaluate_chose_later_is_what_is_described(base, tmp_path):
    run = copy_run(base, tmp_path / "run")
    score_run(run, n_resamples=0, threshold_rule="specificity=0.8", calibration="temperature")
    text = describe_methods(run)
    assert "is the lowest with a specificity of at least 0.8" in text
    assert "by a single temperature" in text
    assert "No intervals were computed." in text


def test_a_given_split_is_said_to_be_given(base, tmp_path):
    run = copy_run(base, tmp_path / "run")
    splits = run.splits
    run.write_table("splits", splits.assign(given_split=splits["split"].replace("train", "")))
    given = {"whose": "the column 'set' of labels.csv", "n_shared": 3, "unit": "patient"}
    text = describe_methods(of(run, split=given))
    assert "The test set was the one given by the column 'set' of labels.csv: 48 images" in text
    assert "3 patients had images in both sets." in text
    assert "drawn at random" not in text
    assert "3 folds of whole studies" in text

    run.write_table("splits", splits.assign(given_fold=splits["fold"]))
    text = describe_methods(of(run, split=given))
    assert "the 3 folds given by the column 'set' of labels.csv" in text
    assert "drawn at random" in text  # only folds were given

    by_image = TrainConfig(epochs=(2, 4), n_folds=3, split_by="image")
    shared = {**SPLIT, "n_shared": 1}
    text = describe_methods(of(base, recipe=by_image, split=shared))
    assert "drawn at random image by image" in text
    assert "1 study had images in both sets." in text


def test_patients_are_counted_where_they_are_known(base, tmp_path):
    assert "does not name patients" in describe_methods(base)
    run = copy_run(base, tmp_path / "run")
    table = run.predictions
    patients = table["study_uid"].astype(int) // 2 * 2
    table.insert(2, "patient_id", "P" + patients.astype(str))
    table.loc[table.index[:4], "patient_id"] = ""
    run.write_table("predictions", table)
    text = describe_methods(run)
    n_patients = table.loc[table["split"] == "test", "patient_id"].replace("", None).nunique()
    assert f"48 images of 24 studies of {n_patients} patients" in text
    assert "The patients of 4 images were not known." in text


def test_age_and_sex_are_told_where_they_are_known(base, tmp_path):
    blanks = find_blanks(describe_methods(base))
    assert {"Age.", "Sex."} <= set(blanks)
    run = copy_run(base, tmp_path / "run")
    table = run.predictions
    study = table["study_uid"].astype(int)
    table.insert(3, "age", (20 + study % 60).astype(str))
    table.insert(4, "sex", study.mod(2).map({0: "F", 1: "M"}))
    run.write_table("predictions", table)
    score_run(run, n_resamples=0)
    text = describe_methods(run)
    of_test = table[table["split"] == "test"].drop_duplicates("study_uid")
    median = of_test["age"].astype(float).median()
    assert f"{median:g} years (quartiles" in text
    n_f = (of_test["sex"] == "F").sum()
    assert f"{n_f} F, {len(of_test) - n_f} M among the studies of the test set" in text


def test_several_stores_imported_features_and_studies(base):
    imported = {
        **{"name": "imported:features.npz", "imported": True, "is_random": False},
        **{"weights_sha256": "77aa", "embedding_width": 1024},
    }
    text = describe_methods(of(base, further_stores=[{**STORE, "encoder": imported}]))
    assert "Features of 1024 numbers per image came from features.npz (SHA-256 77aa)" in text
    assert "stood side by side" in text
    assert "Encoder, weights and preprocessing by which they were computed." in find_blanks(text)

    recipe = TrainConfig(epochs=(2, 4), n_folds=3, level="study")
    assert "Each study got one prediction" in describe_methods(of(base, recipe=recipe))


def test_a_fine_tuned_run(base):
    recipe = FinetuneConfig(epochs=(2, 4), n_folds=3, unfreeze_layers=1, source="tokens", mixup=0.4)
    start = {"path": "runs/first", "head_sha256": "11"}
    text = describe_methods(of(base, "finetune", recipe, from_run=start))
    assert "The last 1 block of the encoder was trained together with a head" in text
    assert "began as those of the frozen run runs/first" in text
    assert "learning rates of 0.0002 (blocks) and 0.001 (head)" in text
    assert "Training read cached tokens" in text
    assert "mixed [Zhang 2018] with α = 0.4" in text
    assert "encoder was not trained" not in text


def test_what_the_run_does_not_know_is_a_blank_and_never_guessed(base):
    blanks = find_blanks(describe_methods(base))
    assert "name, version and reference of the data set" in blanks
    assert "Hardware." in blanks
    assert not set(blanks) & set(phrases.REFERENCES)

    older = {k: v for k, v in base.config.items() if k not in ("n_views", "split")}
    text = describe_methods(Run(base.path, older))
    assert any(blank.startswith("Whether mirror images") for blank in find_blanks(text))
    assert "had images in both sets" not in text

    base.write_model_card("---\nlicense: mit\ndatasets:\n- me/chest\n---\n")
    text = describe_methods(base)
    assert "Images and labels were those of me/chest." in text
    named = {**base.config, "reading": {"format": "nih", "policy": "uncertain: ones"}}
    text = describe_methods(Run(base.path, named))
    assert "of me/chest, read in the form of NIH ChestX-ray14." in text
    assert "Label codes were read so: uncertain: ones." in text
    machine = {"processor": "EPYC 9", "gpu": "H100", "cores": 2}
    text = describe_methods(Run(base.path, {**base.config, "machine": machine}))
    assert "Training ran on H100 and EPYC 9." in text
    assert "Hardware." not in find_blanks(text)


def test_options_of_a_later_version_are_refused(base):
    later = {**base.config["train"], "curriculum": True}
    with pytest.raises(RunError, match=r"does not know: curriculum\. Use the version"):
        describe_methods(of(base, train=later))


@pytest.fixture
def external(base, tmp_path) -> Path:
    folder = tmp_path / "ext"
    folder.mkdir()
    told = {"run": "runs/run", "store": "other.h5", "data_set": "chexpert", "relations": ["same"]}
    metrics = {**base.metrics, "external": {**told, "warnings": ["3 images are the run's own."]}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    base_table = base.path / "per_finding.csv"
    (folder / "per_finding.csv").write_bytes(base_table.read_bytes())
    return folder


def test_a_test_on_another_data_set_is_described(base, external):
    text = describe_methods(base, external=external)
    assert "calibration and thresholds unchanged, on 48 images of 24 studies" in text
    assert "read in the form of CheXpert" in text
    assert "3 images are the run's own." in text
    assert "On the external test set (48 images" in text


def test_the_command_writes_a_file_and_never_over_one(base, external, tmp_path):
    out = tmp_path / "methods.md"
    line = ["methods", str(base.path), "--out", str(out), "--external", str(external)]
    said = CliRunner().invoke(cli, line)
    assert said.exit_code == 0, said.output
    assert out.read_text(encoding="utf-8") == describe_methods(base, external=external)
    assert "[Hardware.]" in said.stderr

    again = CliRunner().invoke(cli, line)
    assert again.exit_code == 1
    assert "is there already, and may hold what you filled in" in again.output

    printed = CliRunner().invoke(cli, ["methods", str(base.path)])
    assert printed.stdout.strip() == describe_methods(base).strip()


def test_a_regression_that_cannot_be_scored_is_said_to_be_undefined(base, tmp_path):
    """As on a test of four images, where no finding has both classes."""
    run = copy_run(base, tmp_path / "run")
    none = {"value": None, "low": None, "high": None}
    run.write_metrics(
        {**run.metrics, "logistic": {"C": 0.1, "macro_auroc": none, "difference": none}}
    )
    assert "minus it: <strong>undefined</strong>" in render_page([read_view(run)])
    assert "had a macro AUROC of undefined" in describe_methods(run)


@pytest.mark.parametrize(
    ("external", "words"),
    [
        ({}, "holds no test on another data set. `cxr-cache evaluate"),
        ({"external": {"run": "runs/other"}}, "is a test of the run runs/other, not of"),
    ],
)
def test_a_folder_that_is_no_test_of_the_run_is_refused(base, tmp_path, external, words):
    (tmp_path / "metrics.json").write_text(json.dumps(external))
    for folder in (tmp_path, tmp_path / "missing"):
        said = CliRunner().invoke(cli, ["methods", str(base.path), "--external", str(folder)])
        assert said.exit_code == 1
        assert (words if folder == tmp_path else "holds no test") in said.output
