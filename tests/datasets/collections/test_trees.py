"""Each published data set, laid out in small as it comes, is recognised and read."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.datasets.images import find_missing
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.store.feature_store import FeatureStore
from tests.datasets.collections.trees import TREES


@pytest.fixture(scope="module", params=TREES)
def laid_out(request, tmp_path_factory):
    """Format, folder, and what should be found there."""
    form, lay_out = TREES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tree = lay_out(folder)
    inner = folder / "CheXpert-v1.0-small"
    return form, inner if inner.is_dir() else folder, tree


def test_it_is_recognised_and_every_image_is_found(laid_out):
    form, folder, tree = laid_out

    cohort = load_cohort(folder, image_dir=folder)

    assert cohort.reading.format == form
    assert cohort.reading.why
    assert (len(cohort), len(cohort.findings)) == (tree.n_images, tree.n_findings)
    assert len(set(cohort.patient_ids.tolist()) - {""}) == tree.n_patients
    assert find_missing(folder, cohort.image_ids) == []


def test_its_own_split_and_findings_are_taken(laid_out):
    _, folder, tree = laid_out

    cohort = load_cohort(folder, image_dir=folder)

    given = cohort.images.get("given_split", np.full(len(cohort), ""))
    assert {side: n for side, n in Counter(given).items() if side} == tree.split
    assert bool(cohort.reading.split) == bool(tree.split)
    for finding, n_present in tree.present.items():
        assert (cohort.targets[:, cohort.findings.index(finding)] == 1).sum() == n_present, finding


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_it_is_described(laid_out):
    _, folder, tree = laid_out

    told = json.loads(run("describe", "--data", folder, "--json"))

    assert told["images"] == tree.n_images
    assert told["patients"] == (tree.n_patients or None)
    assert len(told["findings"]) == tree.n_findings


@pytest.mark.slow
def test_it_is_extracted_and_trained_on(laid_out, tmp_path, monkeypatch):
    """Three commands from the folder to a run; figures and pages are not what this is about."""
    monkeypatch.setattr("cxr_cache.report.report.write_report", lambda run: run.report_path)
    form, folder, tree = laid_out
    store, run_dir = tmp_path / "store.h5", tmp_path / "run"

    run(
        "extract",
        "--data",
        folder,
        "--store",
        store,
        "--model",
        "random:test_vit",
        "--num-workers",
        0,
    )
    quick = ["--epochs", "1,2", "--folds", "2", "--batch-size", "4"]
    run("train", store, "--run-dir", run_dir, *quick)

    splits = pd.read_csv(run_dir / "splits.csv", dtype=str)
    assert (run_dir / "metrics.json").is_file()
    with FeatureStore.open(store) as features:
        assert features.cohort.reading.format == form
        patients = dict(zip(features.cohort.image_ids, features.cohort.groups, strict=True))
        n_labelled = (~np.isnan(features.cohort.targets)).any(axis=1).sum()
        given = features.cohort.images.get("given_split", pd.Series("", range(tree.n_images)))
        in_test = set(features.cohort.image_ids[(given == "test").to_numpy()])
    assert len(splits) == n_labelled
    if "test" in tree.split:
        assert set(splits["image_id"][splits["split"] == "test"]) == in_test
    pairs = splits.assign(group=splits["image_id"].map(patients))[["group", "split"]]
    assert tree.split or not pairs.drop_duplicates()["group"].duplicated().any()
