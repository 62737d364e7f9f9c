"""Two processes train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cxr_cache.common.distributed import process_group
from cxr_cache.config import ExtractConfig, FinetuneConfig
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import ConfigError
from cxr_cache.models.run import Run
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.training.finetune import tune_run

CONFIG = FinetuneConfig.of_recipe(
    "reference",
    epochs=(1, 2),
    n_folds=2,
    batch_size=8,
    accumulate=2,
    learning_rate=1e-3,
    head_learning_rate=1e-2,
    hidden=(16,),
    layer_decay=0.5,
    ema_decay=0.9,
    mixup=0.3,
    patch_dropout=0.5,
    device="cpu",
    precision="fp32",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    images = write_phantoms(folder / "phantoms", n_studies=24, image_size_px=64).image_dir
    config = ExtractConfig(num_workers=0, unfreeze_layers=2, flip=True)
    encoder = load_encoder("random:test_vit:5", precision="fp32")
    extract_embeddings(load_cohort(images.parent), images, folder / "s.h5", encoder, config)
    return folder / "s.h5"


def torchrun(store: Path, run_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "cxr_cache", "finetune", str(store), "--run-dir", str(run_dir)),
        *("--recipe", "reference"),
        *("--epochs", "1,2", "--folds", "2", "--batch-size", "8", "--accumulate", "2"),
        *("--lr", "1e-3", "--head-lr", "1e-2", "--hidden", "16", "--device", "cpu"),
        *("--layer-decay", "0.5", "--ema", "0.9", "--mixup", "0.3", "--patch-dropout", "0.5"),
        *("--precision", "fp32", "--repeats", "2"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_two_processes_give_the_run_of_one(store, tmp_path):
    """Each batch is shared, dropout and batch norm see the whole of it, gradients are summed.

    Both leave out the same patches, mix the same pairs and average the same weights; and both
    train the recipe again.
    """
    alone = tune_run(store, tmp_path / "alone", CONFIG, n_repeats=2).run
    result = torchrun(store, tmp_path / "two")
    assert result.returncode == 0, result.stderr
    two = Run.open(tmp_path / "two")

    assert two.config["processes"] == 2
    options = json.loads((two.path / "config.json").read_text())["finetune"]
    assert FinetuneConfig(**options) == replace(CONFIG, source="tokens")
    assert asdict(CONFIG).keys() == options.keys()
    assert result.stdout.count("macro AUROC  ") == 1  # one of them reports
    losses = [run.read_table("history")["train_loss"] for run in (alone, two)]
    pd.testing.assert_series_equal(*losses, rtol=1e-5)
    ours, theirs = (run.load_model().tensors for run in (alone, two))
    for name, tensor in ours.items():
        if not name.endswith("qkv.bias"):  # keys' biases move by rounding alone
            assert (tensor - theirs[name]).norm() <= 2e-3 * tensor.norm().clamp(min=1e-2), name
    findings = list(two.config["findings"])
    for table in ("predictions", "repeats"):
        once, again = (run.read_table(table)[findings].to_numpy() for run in (alone, two))
        np.testing.assert_allclose(once, again, atol=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused(store, tmp_path, monkeypatch):
    """Before anything is written; the other process is made up, for starting two takes long."""
    monkeypatch.setattr("cxr_cache.training.finetune.world_size", lambda: 2)
    message = r"--batch-size 9 does not divide into 2 processes\. Use a multiple of 2\."
    with pytest.raises(ConfigError, match=message):
        tune_run(store, tmp_path / "run", replace(CONFIG, batch_size=9, mixup=0.0))
    assert not (tmp_path / "run").exists()


def test_alone_nothing_is_started():
    with process_group(torch.device("cpu")) as device:
        assert device == torch.device("cpu")
        assert not torch.distributed.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    message = r"WORLD_SIZE is 4 and RANK is not set\. Start several"
    with pytest.raises(ConfigError, match=message), process_group(torch.device("cpu")):
        pass
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(ConfigError, match=r"process 3 on a machine with 2 GPUs\. Use --nproc-per"),
        process_group(torch.device("cuda")),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="train on cuda or cpu, not on mps"),
        process_group(torch.device("mps")),
    ):
        pass
