"""New images get the probabilities that the run itself would have given them."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.config import ExtractConfig, TrainConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import RunError, StoreFormatError, StoreIncompleteError, StoreMismatchError
from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.evaluation.scored import read_scored
from cxr_cache.models import predict as predict_module
from cxr_cache.models.heads import HeadBank
from cxr_cache.models.predict import (
    Predictions,
    Predictor,
    predict_images,
    predict_store,
    require_encoder_of_run,
)
from cxr_cache.models.run import Run
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.training.train import fit_run
from tests.synthetic import FINDINGS, IMPORTED, QUICK, WIDTH, make_cohort, make_store

ENCODER = "random:test_vit:5"
CONFIG = TrainConfig(
    epochs=(1, 2),
    n_folds=2,
    batch_size=8,
    learning_rate=1e-2,
    hidden=(16,),
    final="ensemble",
    calibration="none",
    min_positives=0,
    n_jobs=1,
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(ENCODER, precision="fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def images(folder) -> Path:
    return write_phantoms(folder / "phantoms", n_studies=30, image_size_px=64).image_dir


@pytest.fixture(scope="module")
def cohort(images) -> Cohort:
    return load_cohort(images.parent)


@pytest.fixture(scope="module")
def store(folder, images, cohort, encoder) -> Path:
    extract_embeddings(
        cohort, images, folder / "features.h5", encoder, ExtractConfig(num_workers=0)
    )
    return folder / "features.h5"


@pytest.fixture(scope="module")
def run(folder, store) -> Run:
    return fit_run(store, folder / "run", CONFIG).run


def predictions_of(run: Run) -> pd.DataFrame:
    return run.read_table("predictions").set_index("image_id")[run.config["findings"]]


# --- Images ---------------------------------------------------------------------------------------


def test_predictions_of_images_equal_those_of_the_run(run, images, cohort, encoder):
    """Decoding, encoder, normalisation and the average of the members: all as in training.

    To 1e-5, for the encoder's bits depend on which images share a batch.
    """
    expected = predictions_of(run)
    paths = [images / image_id for image_id in reversed(cohort.image_ids)]

    predictions = predict_images(run, paths, encoder)

    assert predictions.image_ids == tuple(map(str, paths))
    assert list(predictions.findings) == run.config["findings"]
    assert predictions.n_failed == 0
    np.testing.assert_allclose(
        predictions.probabilities, expected.loc[[path.name for path in paths]], atol=1e-5
    )
    thresholds = np.array([run.thresholds[finding] for finding in predictions.findings])
    np.testing.assert_array_equal(predictions.decisions, predictions.probabilities >= thresholds)
    assert predictions.decisions.any()


def test_probabilities_are_calibrated_and_called_as_the_evaluation_does(
    run, images, cohort, encoder, tmp_path
):
    copy = Run.open(shutil.copytree(run.path, tmp_path / "copy"))
    score_run(copy, calibration="platt", threshold_rule="specificity=0.8", n_resamples=0)
    test = read_scored(copy, "test")
    paths = [images / image_id for image_id in test.image_ids]

    predictions = predict_images(copy, paths, encoder)

    np.testing.assert_allclose(predictions.probabilities, test.probabilities, atol=1e-5)
    assert (
        np.abs(test.probabilities - predictions_of(run).loc[test.image_ids]).max(axis=None) > 0.01
    )
    table = copy.read_table("per_finding")
    labelled = ~np.isnan(test.targets)
    called = (predictions.decisions & labelled).sum(axis=0)
    np.testing.assert_array_equal(called, table["tp"] + table["fp"])
    plain = predict_images(run, paths, encoder)
    assert (plain.decisions != predictions.decisions).any()


def test_the_size_of_the_batches_changes_nothing(run, images, cohort, encoder, monkeypatch):
    paths = [images / image_id for image_id in cohort.image_ids[:7]]
    expected = predict_images(run, paths, encoder)

    monkeypatch.setattr(predict_module, "_IMAGES_AT_ONCE", 3)
    predictions = predict_images(run, paths, encoder)

    np.testing.assert_allclose(predictions.probabilities, expected.probabilities, atol=1e-5)


def test_an_image_that_cannot_be_used_is_reported_in_its_row(run, images, encoder, tmp_path):
    """The others are predicted as if it were not there."""
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    good = sorted(images.iterdir())[:3]
    paths = [good[0], tmp_path / "text.png", good[1], tmp_path / "missing.png", good[2]]

    predictions = predict_images(run, [*paths, tmp_path / "empty.png"], encoder)

    assert [bool(error) for error in predictions.errors] == [False, True, False, True, False, True]
    assert predictions.n_failed == 3
    assert len(set(predictions.errors)) == 4, "three reasons, in words, and none"
    broken = [1, 3, 5]
    assert np.isnan(predictions.probabilities[broken]).all()
    assert not predictions.decisions[broken].any()
    expected = predict_images(run, good, encoder)
    np.testing.assert_allclose(
        predictions.probabilities[[0, 2, 4]], expected.probabilities, atol=1e-5
    )


def test_an_image_that_the_encoder_cannot_bear_is_reported_too(run, images, encoder, monkeypatch):
    """Half precision can overflow; NaN must not read as 'nothing present'."""
    encode = encoder.encode

    def overflow(pixels):
        pooled, embedding = (tensor.clone() for tensor in encode(pixels))
        embedding[1, 0] = torch.inf
        return pooled, embedding

    monkeypatch.setattr(encoder, "encode", overflow)
    predictions = predict_images(run, sorted(images.iterdir())[:3], encoder)

    assert predictions.errors == ("", "the encoder gave NaN or infinity for this image", "")
    assert np.isnan(predictions.probabilities[1]).all()
    assert np.isfinite(predictions.probabilities[[0, 2]]).all()


def test_no_images_give_no_predictions(run, encoder):
    assert predict_images(run, [], encoder).to_table().empty


def test_predictions_as_table_and_as_text():
    predictions = Predictions(
        image_ids=("a.png", "b.png"),
        findings=("Mass", "Nodule", "Hernia"),
        probabilities=np.array([[0.2, 0.9, 0.05], [np.nan] * 3], np.float32),
        decisions=np.array([[False, True, True], [False] * 3]),
        errors=("", "the file is empty"),
    )

    table, lines = predictions.to_table(), predictions.to_text(n_shown=2).splitlines()

    described = ["image", "present", "ranked_only", "unknown", "distance", "distance_quantile"]
    assert table.columns.tolist() == [*described, "error", "Mass", "Nodule", "Hernia"]
    assert table["unknown"].tolist() == ["", "Mass;Nodule;Hernia"]
    assert table["present"].tolist() == ["Nodule;Hernia", ""]
    assert table["error"].tolist() == ["", "the file is empty"]
    assert lines[:3] == ["a.png", "  *  90.0%  Nodule", "  *   5.0%  Hernia"]
    assert lines[3:5] == ["b.png", "    not usable: the file is empty"]
    assert "Not for clinical use" in lines[-1]


# --- Members --------------------------------------------------------------------------------------


def test_an_ensemble_averages_the_probabilities_of_its_members(run):
    model = run.load_model()
    bank = HeadBank.from_snapshot(model.tensors)
    assert bank.n_heads == CONFIG.n_folds
    width = model.tensors["weight_0"].shape[1]
    embeddings = 50 * np.random.default_rng(0).normal(size=(5, width)).astype(np.float32)
    embeddings[3] = np.nan

    probabilities = Predictor(model).from_embeddings(embeddings)

    x = torch.nn.functional.normalize(torch.from_numpy(embeddings), dim=-1)
    with torch.no_grad():
        members = [bank.as_sequential(h)(x).sigmoid().numpy() for h in range(bank.n_heads)]
    rest = [0, 1, 2, 4]
    np.testing.assert_allclose(probabilities[rest], np.mean(members, axis=0)[rest], atol=1e-6)
    assert np.isnan(probabilities[3]).all()
    assert not np.allclose(members[0][rest], members[1][rest], atol=1e-4)


# --- Other encoders -------------------------------------------------------------------------------


def test_another_encoder_is_refused_with_both_values(run, images, encoder):
    other = load_encoder("random:test_vit:6", precision="fp32")

    with pytest.raises(RunError) as refusal:
        predict_images(run, sorted(images.iterdir())[:1], other)

    message = str(refusal.value)
    assert str(run.path) in message
    assert f"weights_sha256: '{encoder.identity.weights_sha256}' in the run" in message
    assert f"'{other.identity.weights_sha256}' in random:test_vit:6" in message
    assert "image_size" not in message, "only what differs is listed"
    assert "Use the run's encoder" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16"}, "precision: 'fp32' in the run, 'bf16' in"),
        ({"resize": "crop"}, "resize: 'squash' in the run, 'crop' in"),
        ({"normalize": "imagenet"}, "mean: "),
    ],
)
def test_the_same_weights_used_otherwise_are_another_encoder(run, images, options, message):
    recorded = run.load_model().encoder["preprocessing"]["resize"]
    if options.get("resize") == recorded:
        options, message = {"resize": "squash"}, "resize: 'crop' in the run, 'squash' in"

    with pytest.raises(RunError, match=message):
        predict_images(
            run,
            sorted(images.iterdir())[:1],
            load_encoder(ENCODER, **{"precision": "fp32", **options}),
        )


@pytest.fixture(scope="module")
def imported_run(folder) -> Run:
    store = make_store(folder / "imported.h5", make_cohort())
    return fit_run(store, folder / "imported_run", replace(QUICK, epochs=(1,), n_folds=2)).run


def test_a_run_on_imported_embeddings_has_no_encoder_to_predict_with(imported_run, encoder):
    """Said before an encoder is loaded, too."""
    remedy = r"imported from imported:tiny\.npz.*`cxr-cache evaluate .* --store F\.h5`"

    with pytest.raises(RunError, match=remedy):
        predict_images(imported_run, [], encoder)
    with pytest.raises(RunError, match=remedy):
        require_encoder_of_run(imported_run, imported_run.load_model().encoder, None)


def test_what_is_advised_for_imported_embeddings_works(imported_run, folder, tmp_path):
    """The command that the message names, on other embeddings of the same kind."""
    with pytest.raises(RunError) as caught:
        require_encoder_of_run(imported_run, imported_run.load_model().encoder, None)
    (command,) = re.findall(r"`cxr-cache (evaluate [^`]*)`", str(caught.value))
    other = make_store(tmp_path / "other.h5", make_cohort(seed=9))
    arguments = [str(other) if word == "F.h5" else word for word in command.split()]
    done = CliRunner().invoke(cli, [*arguments, "--resamples", "20"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "macro AUROC" in done.output


# --- Stores ---------------------------------------------------------------------------------------


def test_predicting_the_runs_own_store_gives_its_predictions(run, store, cohort):
    with FeatureStore.open(store) as features:
        predictions, targets = predict_store(run, features)

    findings = run.config["findings"]
    assert predictions.columns.tolist() == [
        "image_id",
        "study_uid",
        "patient_id",
        "projection",
        *findings,
    ]
    assert predictions["image_id"].tolist() == cohort.image_ids.tolist()
    assert predictions["study_uid"].tolist() == cohort.study_uids.tolist()
    assert predictions["projection"].tolist() == cohort.projections.tolist()
    np.testing.assert_allclose(predictions[findings], predictions_of(run), atol=1e-6)
    assert targets.columns.tolist() == ["image_id", *findings]
    np.testing.assert_array_equal(targets[findings], cohort.targets)


def test_another_hospitals_store_is_predicted_with_findings_in_the_runs_order(
    imported_run, tmp_path
):
    """Other images, more findings in another order; failed rows have no prediction."""
    cohort = make_cohort(20, seed=9)
    more = np.column_stack([np.zeros(len(cohort), np.float32), cohort.targets[:, ::-1]])
    other = replace(cohort, targets=more, findings=("Kyphosis", *FINDINGS[::-1]))
    values = np.random.default_rng(0).normal(size=(40, 1, WIDTH)).astype(np.float32)
    path = make_store(tmp_path / "o.h5", other, embeddings=values)
    with FeatureStore.open(path, "r+") as store:
        store.mark_pending(np.array([4]))
        store.record_failures(np.array([4]), ["broken"])

    with FeatureStore.open(path) as store:
        predictions, targets = predict_store(imported_run, store)

    kept = np.delete(np.arange(40), 4)
    assert predictions["image_id"].tolist() == cohort.image_ids[kept].tolist()
    np.testing.assert_array_equal(targets[list(FINDINGS)], cohort.targets[kept])
    expected = Predictor(imported_run.load_model()).from_embeddings(values[kept, 0])
    np.testing.assert_array_equal(predictions[list(FINDINGS)], expected)


def refuse_store(run: Run, path: Path, error: type[Exception], message: str) -> None:
    with FeatureStore.open(path) as store, pytest.raises(error, match=message):
        predict_store(run, store)


def test_a_store_of_another_encoder_is_refused(run, imported_run, store, tmp_path):
    wide = make_store(
        tmp_path / "wide.h5",
        make_cohort(20),
        encoder={**IMPORTED, "embedding_width": 24},
        embeddings=np.ones((40, 1, 24), np.float32),
    )

    refuse_store(
        imported_run,
        wide,
        StoreMismatchError,
        r"embedding_width: 24 in the store, 16 in the run[\s\S]*Extract the images with",
    )
    refuse_store(imported_run, store, StoreMismatchError, "imported: None in the store, True in")
    imported_store = imported_run.config["store"]["path"]
    refuse_store(run, Path(imported_store), StoreMismatchError, "imported: True in the store")


def test_an_extraction_with_other_weights_is_refused(run, images, cohort, tmp_path):
    other = load_encoder("random:test_vit:6", precision="fp32")
    path = tmp_path / "other.h5"
    extract_embeddings(cohort.take(slice(4)), images, path, other, ExtractConfig(num_workers=0))

    sha256 = other.identity.weights_sha256
    refuse_store(run, path, StoreMismatchError, f"weights_sha256: '{sha256}' in the store")


def test_a_store_without_a_finding_of_the_run_is_predicted_and_says_nothing_of_it(
    imported_run, tmp_path
):
    cohort = make_cohort(20)
    fewer = replace(cohort, targets=cohort.targets[:, :4], findings=FINDINGS[:4])

    with FeatureStore.open(make_store(tmp_path / "few.h5", fewer)) as store:
        predictions, targets = predict_store(imported_run, store)

    assert predictions.columns.tolist()[-len(FINDINGS) :] == list(FINDINGS)
    assert targets.columns.tolist() == ["image_id", *FINDINGS[:4]]


def test_pending_rows_are_not_passed_over_in_silence(imported_run, tmp_path):
    path = make_store(tmp_path / "s.h5", make_cohort(20))
    with FeatureStore.open(path, "r+") as store:
        store.mark_pending(np.arange(3))

    refuse_store(imported_run, path, StoreIncompleteError, "3 of 40 rows are pending")


def test_damaged_rows_are_not_passed_over_in_silence(imported_run, tmp_path):
    path = make_store(tmp_path / "s.h5", make_cohort(20))
    with h5py.File(path, "r") as file:
        place = file["embeddings"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)

    refuse_store(imported_run, path, StoreFormatError, r"1 damaged row .*00000\.png")


def make_predictions(**options) -> Predictions:
    probabilities = np.array([[0.9, 0.2, 0.6], [0.1, 0.3, 0.8]], np.float32)
    findings = ("Mass", "Edema", "Hernia")
    return Predictions(
        ("a.png", "b.png"), findings, probabilities, probabilities > 0.5, ("", ""), **options
    )


def test_what_is_not_decided_is_said_in_text_and_table():
    predictions = make_predictions(undecided=("Edema",))

    text, table = predictions.to_text(), predictions.to_table()

    assert text.count("  ? ") == 2
    assert "? too few to decide, ranked only: Edema." in text
    assert table["ranked_only"].tolist() == ["Edema", "Edema"]
    assert table["present"].tolist() == ["Mass;Hernia", "Hernia"]
    assert make_predictions().to_table()["ranked_only"].tolist() == ["", ""]


def test_without_calibration_they_are_called_scores():
    scores, probabilities = (make_predictions(is_calibrated=of).to_text() for of in (False, True))

    assert "0.900  Mass" in scores
    assert "These are scores, not probabilities: the run is not calibrated." in scores
    assert "90.0%  Mass" in probabilities
    assert "score" not in probabilities
