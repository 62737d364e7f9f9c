"""Thousands of images: written whole, continued after an interruption, and judged one by one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from cxr_cache.cli.main import cli
from cxr_cache.common import extras
from cxr_cache.common.files import WriterLock
from cxr_cache.config import ExtractConfig
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import ConfigError, JobStopped, StoreBusyError
from cxr_cache.models import predict as predict_module
from cxr_cache.models.predict import predict_images, predict_to_file
from cxr_cache.models.run import Run
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.training.train import fit_run
from tests.models.test_predict import CONFIG, ENCODER


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(ENCODER, precision="fp32")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "phantoms"
    return write_phantoms(folder, n_studies=30, image_size_px=64).image_dir


@pytest.fixture(scope="module")
def run(images, encoder) -> Run:
    folder = images.parent.parent
    extract_embeddings(
        load_cohort(images.parent),
        *(images, folder / "features.h5", encoder),
        ExtractConfig(num_workers=0),
    )
    config = replace(CONFIG, min_positives=3)  # so that some findings are ranked only
    return fit_run(folder / "features.h5", folder / "run", config).run


@pytest.fixture
def paths(images, monkeypatch) -> list[Path]:
    monkeypatch.setattr(predict_module, "_IMAGES_AT_ONCE", 4)
    return sorted(images.iterdir())[:12]


def stop_after(n_images: int):
    def on_progress(n_done: int, _n_all: int) -> None:
        if n_done >= n_images:
            raise KeyboardInterrupt

    return on_progress


@pytest.mark.parametrize("ending", [".csv", ".json"])
def test_after_an_interruption_the_same_call_continues(run, paths, encoder, tmp_path, ending):
    """To the bit what an uninterrupted call writes, and no image is looked at twice."""
    whole, out = tmp_path / f"whole{ending}", tmp_path / f"out{ending}"
    predict_to_file(run, paths, encoder, whole)

    with pytest.raises(JobStopped, match=r"kept in .*\.partial; the same command continues"):
        predict_to_file(run, paths, encoder, out, on_progress=stop_after(8))
    assert not out.exists()
    partial = tmp_path / f"{out.name}.partial"
    with partial.open("ab") as file:  # as where the machine went off in the middle of a line
        file.write(b'{"id": "cut o')

    calls: list[int] = []
    predict_to_file(run, paths, encoder, out, on_progress=lambda done, _: calls.append(done))
    assert calls == [8, 12], "eight were there already"
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([whole.name, out.name])


def test_an_image_that_has_changed_since_is_predicted_anew(run, images, encoder, tmp_path, paths):
    copies = [Path(shutil.copy(path, tmp_path / path.name)) for path in paths[:8]]
    out = tmp_path / "out.csv"
    with pytest.raises(JobStopped):
        predict_to_file(run, copies, encoder, out, on_progress=stop_after(8))
    shutil.copy(paths[9], copies[2])
    calls: list[int] = []
    predict_to_file(run, copies, encoder, out, on_progress=lambda done, _: calls.append(done))
    assert calls == [7, 8]
    probabilities = pd.read_csv(out).iloc[:, 7:].to_numpy()
    expected = predict_images(run, [*copies[:2], paths[9], *copies[3:]], encoder).probabilities
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_a_part_of_another_model_is_not_mixed_in(run, paths, encoder, tmp_path, caplog):
    out = tmp_path / "out.csv"
    with pytest.raises(JobStopped):
        predict_to_file(run, paths, encoder, out, on_progress=stop_after(4))
    other = Run.open(shutil.copytree(run.path, tmp_path / "other"))
    model = other.load_model()
    other.save_model(replace(model, thresholds=dict.fromkeys(model.findings, 0.5)))
    calls: list[int] = []
    predict_to_file(other, paths, encoder, out, on_progress=lambda done, _: calls.append(done))
    assert calls[0] == 0
    assert "is of another model, or of another version of this run" in caplog.text


def test_an_image_that_could_not_be_used_is_tried_again(run, paths, encoder, tmp_path):
    late, out = tmp_path / "late.png", tmp_path / "out.csv"
    with pytest.raises(JobStopped):
        predict_to_file(run, [*paths[:3], late], encoder, out, on_progress=stop_after(4))
    shutil.copy(paths[5], late)
    assert predict_to_file(run, [*paths[:3], late], encoder, out).n_failed == 0


def test_two_processes_do_not_write_one_file(run, paths, encoder, tmp_path):
    out = tmp_path / "out.csv"
    lock = WriterLock.acquire(out)
    with pytest.raises(StoreBusyError, match="is being written by process"):
        predict_to_file(run, paths, encoder, out)
    lock.release()


def test_what_is_decided_ranked_only_or_unknown_is_said_of_every_image(run, paths, encoder):
    config = {**run.config, "findings_unlearnt": [run.config["findings"][1]]}
    predictions = predict_images(Run(run.path, config), [*paths[:2], "absent.png"], encoder)
    statuses = pd.DataFrame(predictions.statuses(), columns=list(predictions.findings))
    assert (statuses.iloc[2] == "unknown").all(), "nothing is known of an image that is not there"
    undecided = set(predictions.undecided)
    assert undecided, "min_positives leaves some out"
    assert run.config["findings"][1] not in undecided
    for finding, of_images in statuses.iloc[:2].items():
        if finding == run.config["findings"][1]:
            assert (of_images == "unknown").all()
        elif finding in undecided:
            assert (of_images == "ranked only").all()
        else:
            assert set(of_images) <= {"present", "absent"}
    table = predictions.to_table()
    for n in range(3):
        for status, column in (("ranked only", "ranked_only"), ("present", "present")):
            listed = list(filter(None, table[column][n].split(";")))
            assert listed == statuses.columns[statuses.iloc[n] == status].tolist()
    assert f"left out: {run.config['findings'][1]}." in predictions.to_text()


def test_findings_that_nobody_has_are_unlearnt(run):
    targets = run.targets.merge(run.splits[["image_id", "split"]], on="image_id")
    train = targets[targets["split"] == "train"]
    expected = [
        name for name in run.config["findings"] if set(train[name].dropna().unique()) != {0, 1}
    ]
    assert run.config["findings_unlearnt"] == expected


def test_noise_is_called_unlike_the_training_images(run, paths, encoder, tmp_path):
    noise = tmp_path / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(pixels).save(noise)
    predictions = predict_images(run, [*paths, noise], encoder)
    assert predictions.distances.argmax() == len(paths)
    assert predictions.distance_quantiles[-1] >= 0.99
    assert predictions.n_unusual >= 1
    assert np.median(predictions.distance_quantiles[:-1]) < 0.9
    said = predictions.to_text().splitlines()
    assert "of the training images: do not rely on this" in said[said.index(str(noise)) + 1]


def test_json_and_parquet_say_what_the_csv_says(run, paths, encoder, tmp_path):
    named = [*paths[:3], tmp_path / "absent.png"]
    predictions = predict_to_file(run, named, encoder, tmp_path / "out.csv")
    predict_to_file(run, named, encoder, tmp_path / "out.json")
    table = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
    records = json.loads((tmp_path / "out.json").read_text())
    assert [record["image"] for record in records] == table["image"].tolist()
    assert records[-1]["error"] == table["error"].iloc[-1] != ""
    assert records[-1]["findings"]["Cardiomegaly"] == {"probability": None, "status": "unknown"}
    for record, statuses in zip(records, predictions.statuses(), strict=True):
        assert [of["status"] for of in record["findings"].values()] == statuses.tolist()
    pytest.importorskip("pyarrow")
    predict_to_file(run, named, encoder, tmp_path / "out.parquet")
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "out.parquet"), predictions.to_table(), check_dtype=False
    )


def test_what_cannot_be_written_is_known_before_anything_is_predicted(
    run, paths, tmp_path, monkeypatch
):
    command = ["predict", str(run.path), str(paths[0]), "--out"]
    for ending in (".xlsx", ".CSV", ".txt"):
        result = CliRunner().invoke(cli, [*command, str(tmp_path / f"out{ending}")])
        assert result.exit_code == 1
        assert f"ends in {ending}; end it in .csv, .json, .parquet" in result.output
    monkeypatch.setattr(extras, "package_versions", lambda *_: {})
    with pytest.raises(ConfigError, match=r"pip install 'cxr-cache\[parquet\]'"):
        predict_to_file(run, paths, [], tmp_path / "out.parquet")
    assert not list(tmp_path.iterdir())
