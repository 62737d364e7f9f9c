"""The folder for the Hub is read back as a run, predicts the same, and names nobody's folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard

from cxr_cache.cli.main import cli
from cxr_cache.config import ExtractConfig, FinetuneConfig
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import ConfigError, ExportError, RunError
from cxr_cache.jobs.runs import finetune_tail, train_head
from cxr_cache.models.export import export_run
from cxr_cache.models.predict import predict_images
from cxr_cache.models.run import Run
from cxr_cache.store.extract import extract_embeddings
from tests.encoders.test_encoder import TIMM_VIT, write_open_clip_model
from tests.models.test_predict import CONFIG


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("somebody")


@pytest.fixture(scope="module")
def encoder(folder) -> Encoder:
    """One that lies in a folder of this machine, whose path is nobody's business."""
    name = write_open_clip_model(folder / "my-encoder", TIMM_VIT)
    return load_encoder(name, precision="fp32")


@pytest.fixture(scope="module")
def images(folder) -> list[Path]:
    return sorted(
        write_phantoms(folder / "phantoms", n_studies=24, image_size_px=64).image_dir.iterdir()
    )


@pytest.fixture(scope="module")
def store(folder, images, encoder) -> Path:
    extract_embeddings(
        load_cohort(folder / "phantoms"),
        *(images[0].parent, folder / "features.h5", encoder),
        ExtractConfig(num_workers=0, unfreeze_layers=1),
    )
    return folder / "features.h5"


@pytest.fixture(scope="module")
def run(folder, store) -> Run:
    return train_head(store, folder / "first-run", CONFIG).run


def test_it_is_read_back_and_predicts_the_same(run, images, encoder, tmp_path):
    summary = export_run(run, tmp_path / "hub", "hub")
    names = {path.name for path in (tmp_path / "hub").iterdir()}
    assert names == {
        *("README.md", "config.json", "preprocessing.json", "model.safetensors"),
        *("training_distribution.safetensors", "metrics.json", "per_finding.csv"),
    }
    assert summary.n_bytes == sum(path.stat().st_size for path in (tmp_path / "hub").iterdir())
    read = Run.open(tmp_path / "hub")
    ours, theirs = (predict_images(one, images[:5], encoder) for one in (run, read))
    np.testing.assert_array_equal(theirs.probabilities, ours.probabilities)
    np.testing.assert_array_equal(theirs.decisions, ours.decisions)
    np.testing.assert_array_equal(theirs.distance_quantiles, ours.distance_quantiles)
    assert theirs.undecided == ours.undecided


def test_the_command_predicts_from_it_with_the_encoder_given(run, images, folder, tmp_path):
    hub = tmp_path / "hub"
    exported = CliRunner().invoke(
        cli, ["export", str(run.path), "--format", "hub", "--out", str(hub)]
    )
    assert exported.exit_code == 0, exported.output
    assert "Nothing was uploaded. To do so: hf upload ORGANISATION/NAME FOLDER" in exported.output
    assert "The card names no licence" in exported.output
    command = ["predict", str(hub), str(images[0])]
    absent = CliRunner().invoke(cli, command)
    assert absent.exit_code == 1
    assert "my-encoder is not a folder" in absent.output
    given = CliRunner().invoke(cli, [*command, "--model", f"local-dir:{folder / 'my-encoder'}"])
    assert given.exit_code == 0, given.output


def test_the_card_is_one_that_the_hub_reads(run, tmp_path):
    export_run(run, tmp_path / "hub", "hub")
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.library_name == "cxr-cache"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.eval_results, "metrics stand in the header"
    assert "Not for clinical use" in card.content
    assert "## How to use" in card.content
    preprocessing = json.loads((tmp_path / "hub" / "preprocessing.json").read_text())
    assert preprocessing == json.loads(json.dumps(run.load_model().encoder["preprocessing"]))


def test_no_folder_of_this_machine_and_no_patient_is_in_it(run, folder, tmp_path):
    warning = "2 patients are on both sides of the given split: P_0, P_1. Use --split new."
    copy = Path(shutil.copytree(run.path, tmp_path / "first-run"))
    table = run.predictions  # phantoms are nobody, so that they name no patients
    table["patient_id"] = [f"P_{i // 3}" for i in range(len(table))]
    Run.open(copy).write_table("predictions", table)
    config = json.loads((copy / "config.json").read_text())
    config["warnings"] = [warning, "2 findings are rare: Mass, Edema."]
    (copy / "config.json").write_text(json.dumps(config))
    card = (copy / "model_card.md").read_text()
    marked = warning.replace("_", "\\_")
    others = f"## Limits\n\n* {marked}\n* 2 findings are rare: Mass, Edema.\n"
    card = card.replace("## Limits\n", others)
    (copy / "model_card.md").write_text(card)

    summary = export_run(Run.open(copy), tmp_path / "hub", "hub")

    assert "Warnings that name patients were left out of the card." in summary.notes
    for path in (tmp_path / "hub").iterdir():
        content = path.read_bytes()
        for secret in (folder, tmp_path):
            assert str(secret).encode() not in content, f"{path.name} names {secret}"
        assert warning.encode() not in content
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "* 2 findings are rare: Mass, Edema." in card
    assert "A warning that names patients was left out here" in card
    assert "P\\_0" not in card
    assert "P_0" not in card


def test_fine_tuned_members_are_exported_too(run, store, images, encoder, folder, tmp_path):
    config = FinetuneConfig(
        epochs=(1,), n_folds=2, batch_size=8, unfreeze_layers=1, precision="fp32", final="ensemble"
    )
    tuned = finetune_tail(store, tmp_path / "tuned", config).run
    export_run(tuned, tmp_path / "hub", "hub")
    ours, theirs = (
        predict_images(one, images[:3], encoder) for one in (tuned, Run.open(tmp_path / "hub"))
    )
    np.testing.assert_array_equal(theirs.probabilities, ours.probabilities)
    assert np.isfinite(ours.distances).all()


def test_what_cannot_be_exported_is_refused_in_a_sentence(run, tmp_path):
    bare = Run.open(shutil.copytree(run.path, tmp_path / "bare"))
    (bare.path / "model_card.md").unlink()
    with pytest.raises(ExportError, match=r"has no model card.*cxr-cache report"):
        export_run(bare, tmp_path / "hub", "hub")
    with pytest.raises(ConfigError, match="--model goes with a format that holds the encoder"):
        export_run(run, tmp_path / "hub", "hub", model="local-dir:x")
    with pytest.raises(ConfigError, match="holds other files and no export"):
        export_run(run, bare.path, "hub", overwrite=True)
    model = bare.load_model()
    bare.save_model(replace(model, encoder={**model.encoder, "imported": True}))
    with pytest.raises(RunError, match="there is no encoder to run new images through"):
        export_run(bare, tmp_path / "hub", "hub")
    assert not (tmp_path / "hub").exists()


def test_an_earlier_export_is_replaced_only_when_asked(run, tmp_path):
    export_run(run, tmp_path / "hub", "hub")
    with pytest.raises(ConfigError, match="--overwrite"):
        export_run(run, tmp_path / "hub", "hub")
    export_run(run, tmp_path / "hub", "hub", overwrite=True)
