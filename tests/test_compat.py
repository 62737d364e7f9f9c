"""What version 0.1.0 has written stays usable: its store continues, its runs predict the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.models.predict import predict_store
from cxr_cache.models.run import Run
from cxr_cache.store.extract import ExtractConfig, extract_embeddings
from cxr_cache.store.feature_store import FeatureStore
from tests.conftest import SHARED_DATA

COMPAT = SHARED_DATA.with_name("compat") / "version_0.1.0"
IMAGES = COMPAT / "images"
RUNS = ("frozen", "finetuned")
N_ROWS = 160

pytestmark = pytest.mark.skipif(not COMPAT.is_dir(), reason="../shared/compat is not here")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def store(tmp_path) -> Path:
    return copy(COMPAT / "store.h5", tmp_path / "store.h5")


@pytest.fixture(params=RUNS)
def run_dir(request, tmp_path) -> Path:
    return copy(COMPAT / request.param, tmp_path / request.param)


def copy(source: Path, target: Path) -> Path:
    """A copy that may be written to."""
    if source.is_dir():
        target.mkdir()
        for file in source.iterdir():
            copy(file, target / file.name)
    else:
        shutil.copyfile(source, target)
    return target


def succeed(*arguments: object) -> str:
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.output


def test_the_store_is_whole_and_described(store):
    assert f"{N_ROWS} done" in succeed("verify", store)
    said = succeed("inspect", store)
    assert "format version 1" in said
    assert "random:test_vit" in said
    with FeatureStore.open(store) as features:
        table = features.to_frame()
    assert table.columns[:4].tolist() == ["image_id", "study_uid", "patient_id", "projection"]
    assert len(table) == N_ROWS


def test_the_store_is_continued_with_more_images(store):
    """Its rows stay although their files are not at hand; what is new fits what is there."""
    cohort, names = load_cohort(COMPAT), sorted(file.name for file in IMAGES.iterdir())
    new = np.flatnonzero(np.isin(cohort.image_ids, names))
    longer = cohort.take(np.append(np.arange(N_ROWS), new))
    encoder = load_encoder("random:test_vit", precision="fp32")
    config = ExtractConfig(num_workers=0, unfreeze_layers=2)
    summary = extract_embeddings(longer, IMAGES, store, encoder, config)
    assert (summary.n_taken_over, summary.n_computed) == (N_ROWS, len(names))
    assert (summary.n_done, summary.n_pending) == (N_ROWS + len(names), 0)
    with FeatureStore.open(store) as features:
        predictions, _ = predict_store(Run.open(COMPAT / "frozen"), features)
    ours = predictions.set_index("image_id").loc[names]
    theirs = pd.read_csv(COMPAT / "predicted_frozen.csv")
    findings = list(cohort.findings)
    np.testing.assert_allclose(ours[findings], theirs[findings], rtol=0, atol=1e-5)


def test_the_store_can_be_trained_on(store, tmp_path):
    succeed("train", store, "--run-dir", tmp_path / "run", "--epochs", 2, "--folds", 3)
    succeed(
        *("finetune", store, "--run-dir", tmp_path / "tuned", "--epochs", 1, "--device", "cpu"),
        *("--from-run", COMPAT / "frozen"),
    )
    splits = [
        Run.open(path).read_table("splits") for path in (COMPAT / "frozen", tmp_path / "tuned")
    ]
    assert splits[0].equals(splits[1])


@pytest.mark.parametrize("name", RUNS)
def test_runs_predict_what_they_did(name, tmp_path):
    out = tmp_path / "predicted.csv"
    succeed("predict", COMPAT / name, IMAGES, "--device", "cpu", "--out", out)
    ours, theirs = (pd.read_csv(path) for path in (out, COMPAT / f"predicted_{name}.csv"))
    assert [Path(path).name for path in ours["image"]] == [Path(p).name for p in theirs["image"]]
    assert set(theirs) <= set(ours)  # columns came, none went
    assert ours["present"].equals(theirs["present"])
    findings = theirs.columns[3:]
    # The blocks compute in bf16, and were run on a processor with AMX tiles. One that has bf16 in
    # vectors only, or none at all, sums in another order: bf16 has 8 bits, and 5e-4 are left.
    is_same = name == "frozen" or getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    atol = 1e-5 if is_same else 5e-4
    np.testing.assert_allclose(ours[findings], theirs[findings], rtol=0, atol=atol)


def test_runs_are_evaluated_reported_and_scored_on_the_store(run_dir, store):
    before = json.loads((run_dir / "metrics.json").read_text())
    succeed("evaluate", run_dir, "--resamples", 20)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for name, entry in before["test"].items():
        if entry["value"] is not None:
            assert metrics["test"][name]["value"] == pytest.approx(entry["value"], abs=1e-6), name
    succeed("report", run_dir)
    assert (run_dir / "report.html").stat().st_size > 10_000
    assert "belong to the run's own data" in succeed(
        "evaluate", run_dir, "--store", store, "--resamples", 0, "--device", "cpu"
    )


@pytest.mark.slow
def test_runs_are_explained_and_exported(run_dir, tmp_path):
    image = min((IMAGES).iterdir())
    options = ("--device", "cpu", "--out", tmp_path / "maps")
    succeed("explain", run_dir, image, "--finding", "Normal", *options)
    assert list((tmp_path / "maps").iterdir())
    succeed("export", run_dir, "--format", "onnx", "--out", tmp_path / "run.onnx")
    assert (tmp_path / "run.onnx").stat().st_size > 100_000


def test_the_store_and_a_run_are_audited_together(store, run_dir):
    assert f"{N_ROWS} images looked at" in succeed("audit", store, "--run-dir", run_dir)
