"""A run tested on another data set leaves what its own test leaves, and says what differs."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from sklearn.metrics import roc_auc_score

from cxr_cache.cli.main import cli
from cxr_cache.config import ExtractConfig
from cxr_cache.datasets.cohort import Cohort, Reading
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import ConfigError, RunError, TableError
from cxr_cache.evaluation.compare import compare_runs, open_tested
from cxr_cache.evaluation.evaluate import evaluate_predictions, score_run
from cxr_cache.evaluation.scored import read_scored
from cxr_cache.jobs.external import evaluate_on_store
from cxr_cache.models.predict import predict_store
from cxr_cache.models.run import Run
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.training.train import fit_run
from tests.evaluation.test_matching import NIH
from tests.synthetic import FINDINGS, IMPORTED, QUICK, make_cohort, make_embeddings

OTHER = ("Cardiomegaly", "pleural effusion", "Nodule", "Hernia", "Fracture")
"""Names of the other hospital: Mass and Scoliosis it does not label."""


def make_hospital(
    path: Path, cohort: Cohort, *, embeddings: np.ndarray | None = None, first_digest: int = 0
) -> Path:
    """A finished store whose images have digests, numbered from 1 more than `first_digest`."""
    values = make_embeddings(cohort) if embeddings is None else embeddings
    shapes = {"embeddings": values.shape[1:]}
    digests = np.zeros((len(cohort), 32), np.uint8)
    digests[:, :2] = np.arange(first_digest + 1, first_digest + 1 + len(cohort))[:, None] >> [0, 8]
    with FeatureStore.create(path, cohort, encoder=IMPORTED, features=shapes) as store:
        store.commit(np.arange(len(cohort)), {"embeddings": values}, digests)
    return path


def make_other(n_studies: int = 40, **changes: object) -> Cohort:
    """Another hospital with patients, sexes and ages, and other names for the same findings."""
    cohort = make_cohort(n_studies, seed=7)
    study = np.arange(len(cohort)) // 2
    images = cohort.images.assign(
        image_id=[f"other/{row:05d}.png" for row in range(len(cohort))],
        study_uid=[f"o{k}" for k in study],
        patient_id=[f"op{k // 2}" for k in study],
        sex=np.where(study // 2 % 2, "F", "M"),
        age=(20 + study).astype(str),
    )
    targets = cohort.targets[:, [0, 1, 2, 3, 5]].copy()
    targets[::7, 0] = np.nan
    return replace(cohort, images=images, targets=targets, findings=OTHER, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("external")


@pytest.fixture(scope="module")
def run(folder) -> Run:
    store = make_hospital(folder / "own.h5", make_cohort(80))
    run = fit_run(store, folder / "run", QUICK).run
    score_run(run, n_resamples=0)
    return run


@pytest.fixture(scope="module")
def other(folder) -> Path:
    cohort = make_other()
    own = make_embeddings(make_cohort(40, seed=7))  # the same directions mean the same findings
    return make_hospital(folder / "other.h5", cohort, embeddings=own, first_digest=1000)


@pytest.fixture(scope="module")
def tested(run, other, folder) -> Path:
    evaluate_on_store(run, other, out=folder / "tested", n_resamples=30)
    return folder / "tested"


def evaluate(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def refuse(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.output


def test_two_runs_are_compared_on_the_other_data_set(tested, tmp_path):
    second = Path(shutil.copytree(tested, tmp_path / "worse"))
    table = pd.read_csv(second / "predictions.csv")
    noise = np.random.default_rng(0).normal(0, 0.4, (len(table), 4))
    table[list(FINDINGS[:4])] = (table[list(FINDINGS[:4])] + noise).clip(0, 1)
    table.to_csv(second / "predictions.csv", index=False)

    comparison = compare_runs(open_tested(tested), open_tested(second), n_resamples=200)

    targets = pd.read_csv(second / "targets.csv").set_index("image_id").loc[table["image_id"]]
    labelled = {name: targets[name].notna().to_numpy() for name in FINDINGS[:4]}
    worse = [
        roc_auc_score(targets[name][rows], table[name][rows]) for name, rows in labelled.items()
    ]
    row = comparison.macro("worse")
    own = json.loads((tested / "metrics.json").read_text())
    assert row["first"] == pytest.approx(own["test"]["macro_auroc"]["value"])
    assert row["second"] == pytest.approx(np.mean(worse))
    assert row["low"] < row["difference"] < row["high"] < 0
    assert (comparison.n_images, comparison.unit) == (80, "patient")
    assert comparison.reads.n_runs == 1  # it is one run that both folders are tests of
    assert set(own["external"]["warnings"]) < set(comparison.notes)


def test_a_test_elsewhere_is_not_compared_with_a_run_nor_without_its_own(run, tested, tmp_path):
    def compare(*paths: object) -> str:
        result = CliRunner().invoke(cli, ["compare", *map(str, paths)])
        assert result.exit_code == 1, result.output
        return result.output

    assert "of which 0 are the same" in compare(run.path, tested)
    moved = Path(shutil.copytree(tested, tmp_path / "moved"))
    metrics = json.loads((moved / "metrics.json").read_text())
    metrics["external"]["run"] = str(tmp_path / "gone")
    (moved / "metrics.json").write_text(json.dumps(metrics))
    assert f"{tmp_path / 'gone'} is not a run folder" in compare(tested, moved)


def test_it_leaves_what_a_runs_own_test_leaves(tested):
    names = {path.name for path in tested.iterdir() if path.suffix == ".csv"}
    of_run = {"predictions", "targets", "per_finding", "per_finding_by_study", "subgroups"}
    of_run |= {"curves", "calibration", "group_differences"}
    of_run |= {"decision_curves", "label_counts"}
    assert names == {f"{name}.csv" for name in of_run | {"matching", "overlap"}}
    assert {path.name for path in (tested / "plots").iterdir()} == {
        f"{name}.png"
        for name in (
            *("per_finding", "class_distribution", "class_vs_performance", "curves"),
            *("confusion_matrices", "confusion_matrices_six"),
        )
    }
    assert (tested / "report.html").stat().st_size > 10_000
    assert "external" in json.loads((tested / "metrics.json").read_text())
    assert json.loads((tested / "test_reads.json").read_text())["n_reads"] == 1


def test_figures_are_those_of_the_runs_probabilities_and_the_others_labels(run, other, tested):
    with FeatureStore.open(other) as store:
        predictions, targets = predict_store(run, store)
    renamed = targets.rename(columns={"pleural effusion": "Pleural Effusion"})
    cuts = {name: run.thresholds[name] for name in FINDINGS[:4]}
    expected = evaluate_predictions(predictions, renamed, cuts, n_resamples=30)

    metrics = json.loads((tested / "metrics.json").read_text())

    assert metrics["test"] == expected.metrics["test"]
    assert metrics["bootstrap"]["unit"] == "patient"
    ours = pd.read_csv(tested / "per_finding.csv").set_index("finding")
    theirs = expected.per_finding.set_index("finding")
    assert ours.index.tolist() == list(FINDINGS[:4])
    for name in (
        "n_test",
        "threshold",
        "auroc",
        "auroc_low",
        "sensitivity",
        "tp",
        "prevalence_test",
    ):
        np.testing.assert_allclose(ours[name], theirs[name], err_msg=name)
    kept = pd.read_csv(tested / "predictions.csv")
    np.testing.assert_allclose(kept[list(FINDINGS)], predictions[list(FINDINGS)], rtol=1e-6)


def test_findings_that_the_other_set_does_not_label_are_unlabelled_not_absent(tested):
    targets = pd.read_csv(tested / "targets.csv")
    assert targets[["Mass", "Scoliosis"]].isna().all(axis=None)
    external = json.loads((tested / "metrics.json").read_text())["external"]
    assert external["findings_unlabelled"] == ["Mass", "Scoliosis"]
    matching = pd.read_csv(tested / "matching.csv", keep_default_na=False).set_index("finding")
    assert matching.loc["Mass", "why"] == "not labelled"
    assert matching.loc["Pleural Effusion", "store_finding"] == "pleural effusion"


def test_own_test_and_train_prevalence_stand_beside(run, tested):
    table = pd.read_csv(tested / "per_finding.csv").set_index("finding")
    own = run.per_finding.set_index("finding").loc[list(FINDINGS[:4])]
    for name in ("auroc", "sensitivity", "brier"):
        np.testing.assert_allclose(table[f"{name}_own_test"], own[name], err_msg=name)
    train = run.splits.loc[run.splits["split"] == "train", "image_id"]
    of_train = run.targets.set_index("image_id").loc[train, list(FINDINGS[:4])]
    np.testing.assert_allclose(table["prevalence_train"], of_train.mean())


def test_what_is_chosen_there_is_beside_what_is_carried_over(tested):
    """With F1 maximised on the images themselves, it can only be as good or better."""
    table = pd.read_csv(tested / "per_finding.csv")
    assert (table["f1_recalibrated"] >= table["f1"].fillna(0) - 1e-9).all()
    assert table["log_loss_recalibrated"].mean() < table["log_loss"].mean()
    external = json.loads((tested / "metrics.json").read_text())["external"]
    assert external["recalibrated"]["macro_f1"]["value"] == pytest.approx(
        table["f1_recalibrated"].mean()
    )
    page = (tested / "report.html").read_text()
    assert "chosen anew (optimistic)" in page


def test_groups_come_from_the_other_store(tested):
    metrics = json.loads((tested / "metrics.json").read_text())
    assert metrics["test_by_group"].keys() == {"sex", "age_band"}
    differences = pd.read_csv(tested / "group_differences.csv")
    assert "sex" in set(differences["group"])
    assert "Differences between groups" in (tested / "report.html").read_text()


def test_the_folder_is_read_as_a_run_is(run, tested):
    images = read_scored(Run(tested, run.config), calibrated=False)
    assert len(images) == 80
    assert images.unit == "patient"


def test_the_command_prints_the_matching_and_replaces_an_earlier_test(
    run, other, tmp_path, monkeypatch
):
    monkeypatch.setattr("cxr_cache.report.report.draw_test_plots", lambda _: {})  # takes seconds
    out = tmp_path / "out"
    groups = tmp_path / "groups.csv"
    groups.write_text("study_uid,film\n" + "\n".join(f"o{k},{k % 2}" for k in range(40)))
    evaluate(run.path, "--store", other, "--out", out, "--resamples", 0, "--groups", groups)
    assert (out / "groups.csv").exists()

    said = evaluate(run.path, "--store", other, "--out", out, "--resamples", 0)

    assert not (out / "groups.csv").exists(), "it belongs to the test before"
    assert "4 of the run's 6 findings can be scored:" in said
    assert "Not labelled there: Mass, Scoliosis" in said
    assert "Labelled there alone: Fracture" in said
    assert "with thresholds and calibration chosen here (optimistic)" in said
    assert f"Report: {out / 'report.html'}" in said
    metrics = tmp_path / "external.json"
    assert f"{metrics} written" in evaluate(
        run.path, "--store", other, "--out", metrics, "--resamples", 0
    )
    assert json.loads(metrics.read_text()) == json.loads((out / "metrics.json").read_text())


def test_labels_and_map_of_ones_own(run, other, tmp_path):
    with FeatureStore.open(other) as store:
        cohort = store.cohort
    labels = cohort.images[["image_id"]].assign(
        Herniation=cohort.targets[:, 3].astype(int), Odd=cohort.targets[:, 4].astype(int)
    )
    labels.to_csv(tmp_path / "labels.csv", index=False)
    arguments = (run.path, "--store", other, "--labels", tmp_path / "labels.csv")
    said = refuse(*arguments, "--resamples", 0)
    assert f"{tmp_path / 'labels.csv'} labels none of the findings of {run.path}" in said
    assert "say with --map which names belong together" in said
    (tmp_path / "map.csv").write_text("finding,store_finding\nhernia,Herniation\n")

    said = evaluate(*arguments, "--map", tmp_path / "map.csv", "--resamples", 0)

    assert "Hernia  Herniation  same      by the map" in said
    evaluation = evaluate_on_store(run, other, n_resamples=0)
    named = evaluate_on_store(
        run,
        other,
        labels=tmp_path / "labels.csv",
        name_map=tmp_path / "map.csv",
        n_resamples=0,
    )
    areas = [one.per_finding.set_index("finding")["auroc"] for one in (evaluation, named)]
    assert areas[1]["Hernia"] == areas[0]["Hernia"]


def test_what_only_looks_the_same_is_scored_if_asked_for(run, folder):
    """The run's data set is unknown; of Indiana it is known what its Hernia holds."""
    path = folder / "indiana.h5"
    make_hospital(path, make_other(reading=Reading("indiana")), first_digest=3000)
    plain = evaluate_on_store(run, path, n_resamples=0)
    assert "Hernia" not in set(plain.per_finding["finding"])
    assert plain.metrics["external"]["data_set"] == "indiana"
    more = evaluate_on_store(run, path, relations="same,broader", n_resamples=0)
    row = more.per_finding.set_index("finding").loc["Hernia"]
    assert row["relation"] == "broader"
    with pytest.raises(ConfigError, match="relations takes same, narrower, broader, differs, with"):
        evaluate_on_store(run, path, relations="wider")


def test_images_and_patients_that_the_run_knows_are_warned_of(run, folder, caplog):
    """One file byte for byte, one embedding almost the same, a patient; other names only."""
    cohort = make_other()
    values = make_embeddings(make_cohort(40, seed=8), seed=8)
    with FeatureStore.open(run.config["store"]["path"]) as own:
        values[20:23, 0] = own.embeddings[50:53, 0] * 1.001
        own_ids = own.image_ids
    path = make_hospital(folder / "known.h5", cohort, embeddings=values, first_digest=155)

    evaluation = evaluate_on_store(run, path, n_resamples=0)

    split = run.splits.set_index("image_id")["split"]
    table = evaluation.overlap.table.set_index("image_id")
    same = table[table["evidence"] == "same file"]
    assert same.index.tolist() == [f"other/{row:05d}.png" for row in range(5)]
    assert same["run_image_id"].tolist() == own_ids[155:].tolist()
    assert same["run_split"].tolist() == split[own_ids[155:]].tolist()
    close = table[table["evidence"] == "close embeddings"]
    assert close.loc["other/00020.png", "run_image_id"] == own_ids[50]
    assert {"other/00020.png", "other/00021.png", "other/00022.png"} <= set(close.index)
    assert "5 of the 80 images belong to the run's own data: " in caplog.text
    assert "are near-identical to images of the run's own data" in caplog.text
    n_near = evaluation.metrics["external"]["overlap"]["n_near_identical"]
    assert n_near == len(close)
    assert len(evaluation.metrics["external"]["warnings"]) == 2


def test_patients_of_one_id_are_warned_of(folder, tmp_path):
    cohort = make_cohort(60)
    patients = [f"op{int(uid) // 2}" for uid in cohort.study_uids]
    own = make_hospital(tmp_path / "own.h5", cohort.assign(patient_id=patients))
    run = fit_run(own, tmp_path / "run", replace(QUICK, epochs=(1,))).run
    path = make_hospital(tmp_path / "other.h5", make_other(), first_digest=1000)

    [warning] = [
        text
        for text in evaluate_on_store(run, path, n_resamples=0).overlap.warnings
        if "patient" in text
    ]

    assert warning.startswith("20 patients (80 images) have an id that a patient of the run's own")


def test_without_the_runs_own_store_names_are_compared_and_it_is_said(run, other, tmp_path):
    moved = Run(run.path, {**run.config, "store": {**run.config["store"], "path": "gone.h5"}})
    own = run.config["store"]["path"]
    evaluation = evaluate_on_store(moved, own, n_resamples=0)
    assert (
        "160 of the 160 images belong to the run's own data, 160 of them by their names alone"
        in (evaluation.overlap.warnings[0])
    )
    assert "told by their names alone, since the store that it was trained on cannot be compared: "
    assert "gone.h5" in evaluation.overlap.warnings[-1]
    same_name_only = make_cohort(40)
    path = make_hospital(tmp_path / "n.h5", same_name_only, first_digest=2000)
    known = evaluate_on_store(run, path, n_resamples=0).overlap
    assert known.count("same name") == 0, "their bytes differ"


def test_a_folder_of_other_things_is_left_alone(run, other, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, run.path):
        said = refuse(run.path, "--store", other, "--out", out, "--resamples", 0)
        assert "holds other files and no external test. Choose a folder of its own." in said
    with pytest.raises(RunError, match=r"notes.txt is a file; --out takes a folder, or a file"):
        evaluate_on_store(run, other, out=tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("option", "value"), [("--labels", "x.csv"), ("--map", "x.csv"), ("--relations", "broader")]
)
def test_options_of_an_external_test_need_a_store(run, tmp_path, option, value, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text("a\n1\n")
    result = CliRunner().invoke(cli, ["evaluate", str(run.path), option, value])
    assert result.exit_code == 2
    assert f"{option} goes with --store" in result.output


def test_nothing_is_read_or_written_where_nothing_can_be_scored(run, tmp_path):
    cohort = replace(make_other(), findings=("A", "B", "C", "D", "E"))
    path = make_hospital(tmp_path / "s.h5", cohort)
    with pytest.raises(TableError, match="labels none of the findings"):
        evaluate_on_store(run, path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_indiana_and_nih_test_each_other(shared_data, tmp_path):
    """Real pixels of both collections through a random encoder: what is compared, not how well."""
    encoder = load_encoder("random:test_vit", precision="fp32")
    stores = {
        "indiana": (read_some_of_indiana(shared_data), shared_data / "indiana_256" / "images"),
        "nih": (read_nih(shared_data), shared_data / "nih_1024" / "images"),
    }
    for name, (cohort, images) in stores.items():
        config = ExtractConfig(num_workers=0)
        extract_embeddings(cohort, images, tmp_path / f"{name}.h5", encoder, config)

    for ours, other in (("indiana", "nih"), ("nih", "indiana")):
        run = fit_run(tmp_path / f"{ours}.h5", tmp_path / ours, replace(QUICK, n_folds=2)).run
        store, out = tmp_path / f"{other}.h5", tmp_path / f"{ours}_on_{other}"
        said = evaluate(run.path, "--store", store, "--out", out, "--resamples", 20)
        assert f"6 of the run's {len(run.config['findings'])} findings can be scored:" in said
        assert re.search("Effusion +Effusion +differs +Indiana's Effusion is", said)
        assert "belong to the run's own data" not in said
        assert "have an id that a patient of the run's own data has" not in said
        targets = pd.read_csv(out / "targets.csv")
        assert len(targets) == len(stores[other][0])
        assert (out / "report.html").is_file()


def read_some_of_indiana(shared_data: Path) -> Cohort:
    cohort = load_cohort(shared_data / "indiana_256")
    images = shared_data / "indiana_256" / "images"
    there = [row for row, name in enumerate(cohort.image_ids) if (images / name).is_file()]
    return cohort.take(np.array(there[:300]))


def read_nih(shared_data: Path) -> Cohort:
    path = shared_data / "nih_1024" / "Data_Entry_2017.csv"
    table = pd.read_csv(path, dtype=str, index_col=False)
    listed = table["Finding Labels"].str.get_dummies("|")
    findings = tuple(NIH)
    targets = listed.reindex(columns=list(findings), fill_value=0).to_numpy(np.float32)
    images = pd.DataFrame(
        {
            "image_id": table["Image Index"],
            "study_uid": table["Patient ID"] + "_" + table["Follow-up #"],
            "patient_id": table["Patient ID"],
            "sex": table["Patient Gender"],
            "age": table["Patient Age"],
        }
    )
    return Cohort(images, targets, findings, reading=Reading("nih"))
