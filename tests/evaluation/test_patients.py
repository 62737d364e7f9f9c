"""Where patients are known, intervals resample them; elsewhere nothing has changed."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.datasets.cohort import UNITS, assign_clusters, name_unit
from cxr_cache.errors import TableError
from cxr_cache.evaluation.compare import compare_runs
from cxr_cache.evaluation.evaluate import (
    Evaluation,
    evaluate_predictions,
    format_summary,
    score_run,
)
from cxr_cache.evaluation.figures import estimate
from cxr_cache.evaluation.scored import ScoredImages, parse_predictions, read_scored
from cxr_cache.models.run import Run
from cxr_cache.report.report import write_joint_report, write_report
from cxr_cache.training.train import fit_run
from tests.evaluation.test_evaluate import FINDINGS, make_run, make_tables
from tests.synthetic import QUICK, make_cohort, make_store

THRESHOLDS = dict.fromkeys(FINDINGS, 0.5)


def name_patients(study_uids: pd.Series) -> pd.Series:
    """Four consecutive studies each, so that every patient has several on each side."""
    return "0" + (study_uids.astype(int) // 4).astype(str)


def evaluate(predictions: pd.DataFrame, targets: pd.DataFrame, **options: Any) -> Evaluation:
    return evaluate_predictions(predictions, targets, THRESHOLDS, n_resamples=50, **options)


# --- what is resampled ---------------------------------------------------------------------------


def test_clusters_are_patients_where_known_else_studies():
    studies = np.array(["7", "8", "9", "9"])

    mixed = assign_clusters(np.array(["8", "8", "", ""]), studies)
    assert mixed[0] == mixed[1] != mixed[2] == mixed[3]
    assert len({*mixed, *assign_clusters(np.array(["9", "8", "", ""]), studies)}) == 3
    np.testing.assert_array_equal(assign_clusters(np.full(4, ""), studies), studies)


@pytest.mark.parametrize(
    ("patients", "unit"),
    [(["", ""], "study"), (["1", ""], "patient or study"), (["1", "2"], "patient")],
)
def test_the_unit_says_which(patients, unit):
    assert name_unit(np.array(patients)) == unit
    assert unit in UNITS


def test_patients_are_resampled_as_studies_of_that_name_would_be():
    """Every bound of every figure by image, to the bit, and only the counted studies differ."""
    tables = make_tables(0)
    predictions, targets = tables["predictions"], tables["targets"]
    patients = name_patients(predictions["study_uid"])

    known = evaluate(predictions.assign(patient_id=patients), targets)
    merged = evaluate(predictions.assign(study_uid=patients), targets)

    assert known.metrics["test"] == merged.metrics["test"]
    assert known.metrics["n_test_studies"] == 4 * merged.metrics["n_test_studies"]
    by_projection, expected = (e.metrics["test_by_projection"] for e in (known, merged))
    for projection, figures in by_projection.items():
        assert figures.pop("n_studies") > expected[projection].pop("n_studies")
        assert figures == expected[projection]
    columns = known.per_finding.columns.drop("n_positive_studies_test")
    pd.testing.assert_frame_equal(known.per_finding[columns], merged.per_finding[columns])


def test_a_study_of_two_patients_is_refused():
    tables = make_tables(0)
    predictions, targets = tables["predictions"], tables["targets"]
    predictions["patient_id"] = name_patients(predictions["study_uid"])
    study = predictions["study_uid"].value_counts().index[0]
    row = predictions.index[predictions["study_uid"] == study][-1]
    predictions.loc[row, "patient_id"] = "Q"

    words = rf"predictions: study '{study}' belongs to patient .* and to patient 'Q'\. Give all"
    with pytest.raises(TableError, match=words):
        parse_predictions(predictions, targets, FINDINGS)


def test_studies_keep_their_patients_when_their_images_are_averaged():
    tables = make_tables(0)
    predictions = tables["predictions"]
    predictions["patient_id"] = name_patients(predictions["study_uid"])

    studies = parse_predictions(predictions, tables["targets"], FINDINGS).by_study()

    expected = name_patients(pd.Series(studies.study_uids))
    assert studies.patient_ids.tolist() == expected.tolist()
    assert studies.unit == "patient"


def test_groups_are_resampled_by_patient_too(tmp_path):
    tables = make_tables(0)
    predictions, targets = tables["predictions"], tables["targets"]
    uids = predictions["study_uid"].unique()
    path = tmp_path / "groups.csv"
    pd.DataFrame({"study_uid": uids, "sex": ["F", "M"] * (len(uids) // 2)}).to_csv(path)
    known = predictions.assign(patient_id=name_patients(predictions["study_uid"]))

    by_patient, by_study = (
        evaluate(table, targets, groups=path).metrics["test_by_group"]["sex"]
        for table in (known, predictions)
    )

    for sex, figures in by_patient.items():
        assert figures["n_studies"] == by_study[sex]["n_studies"] == len(uids) / 2
        for name in ("macro_auroc", "macro_ap"):
            assert figures[name]["value"] == by_study[sex][name]["value"]
            assert figures[name]["low"] != by_study[sex][name]["low"]


def test_several_positive_studies_of_one_patient_give_no_interval():
    """The table goes on counting studies; what an interval rests on are patients."""
    tables = make_tables(0)
    predictions, targets = tables["predictions"], tables["targets"].fillna(0)
    targets["Mass"] = predictions["study_uid"].isin(["4", "5", "6"]).astype(float)
    known = predictions.assign(patient_id=name_patients(predictions["study_uid"]))

    by_study, by_patient = (
        evaluate(table, targets).per_finding.set_index("finding").loc["Mass"]
        for table in (predictions, known)
    )

    assert by_study["auroc_low"] < by_study["auroc"] == by_patient["auroc"]
    assert pd.isna(by_patient["auroc_low"])
    assert by_patient["n_positive_studies_test"] == by_study["n_positive_studies_test"] == 3


# --- where no patient is known -------------------------------------------------------------------


@pytest.mark.parametrize("blank", ["", np.nan])
def test_a_blank_column_is_as_none_at_all(tmp_path, blank):
    """To the bit, so that a run made before there was the column keeps its figures."""
    before, run = make_run(tmp_path / "before"), make_run(tmp_path / "run")
    for name in ("predictions", "out_of_fold"):
        run.write_table(name, run.read_table(name).assign(patient_id=blank))

    assert score_run(run, n_resamples=50) == score_run(before, n_resamples=50)
    for path in before.path.glob("*.csv"):
        if path.stem not in ("predictions", "out_of_fold"):
            assert path.read_bytes() == (run.path / path.name).read_bytes(), path.name
    assert read_scored(before).patient_ids.tolist() == [""] * len(read_scored(run))


# --- from the store to the page ------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Run, pd.Series, Path]:
    """A run on patients of three studies, evaluated and reported; their ids; the store."""
    folder = tmp_path_factory.mktemp("patients")
    cohort = make_cohort(90)
    patients = np.char.add("00MRN", (np.arange(len(cohort)) // 6).astype(str))
    store = make_store(folder / "s.h5", cohort.assign(patient_id=patients))
    run = fit_run(store, folder / "run", replace(QUICK, epochs=(4,))).run
    score_run(run, n_resamples=50)
    write_report(run)
    return run, pd.Series(patients, cohort.image_ids), store


def forget_patients(run: Run, path: Path) -> Run:
    """The same run as an earlier version would have left it."""
    old = Run.open(shutil.copytree(run.path, path))
    for name in ("predictions", "out_of_fold"):
        old.write_table(name, old.read_table(name).drop(columns="patient_id"))
    return old


def test_a_run_carries_patients_from_its_store_to_its_figures(trained):
    run, patients, _ = trained
    for name in ("predictions", "out_of_fold"):
        table = run.read_table(name)
        assert table["patient_id"].tolist() == patients[table["image_id"]].tolist()
    metrics = run.read_metrics()
    assert metrics["bootstrap"]["unit"] == "patient"
    assert "over patients and the number of patients that" in metrics["bootstrap"]["interval"]
    assert "resamples of patients]" in format_summary(metrics)


def test_page_and_card_speak_of_patients_and_name_none(trained):
    run, _, _ = trained
    page, card = (run.path / name for name in ("report.html", "model_card.md"))
    for path in (page, card):
        assert "50 bootstrap resamples of whole patients" in path.read_text()
    named = {p.name for p in run.path.rglob("*") if p.is_file() and b"00MRN" in p.read_bytes()}
    assert named == {"predictions.csv", "out_of_fold.csv", "logistic.csv"}


def test_patients_known_in_part_are_said_to_be(trained, tmp_path):
    run, _, _ = trained
    copy = Run.open(shutil.copytree(run.path, tmp_path / "run"))
    table = copy.read_table("predictions")
    table.loc[table["study_uid"].astype(int) % 2 == 0, "patient_id"] = ""
    copy.write_table("predictions", table)

    assert "resamples of patients or studies]" in format_summary(score_run(copy, n_resamples=5))


def test_an_external_store_brings_its_patients(trained):
    run, _, store = trained
    arguments = ["evaluate", run.path, "--store", store, "--resamples", 5]
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "5 resamples of patients]" in result.output


def test_runs_are_compared_by_patient_even_if_one_of_them_names_none(trained, tmp_path):
    """All are scored on the same resamples, whichever of them comes first."""
    run, _, store = trained
    other = fit_run(store, tmp_path / "other", replace(QUICK, epochs=(1,))).run
    old = forget_patients(run, tmp_path / "old")
    oldest = forget_patients(other, tmp_path / "oldest")

    both, one, reverse, none = (
        compare_runs(*pair, n_resamples=50)
        for pair in ((run, other), (old, other), (run, oldest), (old, oldest))
    )

    unnamed = ["run", "against"]
    for comparison in (one, reverse):
        pd.testing.assert_frame_equal(
            comparison.table.drop(columns=unnamed), both.table.drop(columns=unnamed)
        )
    assert both.unit == one.unit == reverse.unit == "patient"
    assert none.unit == "study"
    assert "paired intervals over patients\n" in both.to_text()
    assert "paired intervals over studies\n" in none.to_text()
    widths = both.table["high"] - both.table["low"]
    assert not np.allclose(widths, none.table["high"] - none.table["low"], equal_nan=True)


def test_the_page_of_several_runs_says_what_its_differences_rest_on(trained, tmp_path):
    """Also where the first run's own figures rest on studies."""
    run, _, _ = trained
    old = forget_patients(run, tmp_path / "old")
    score_run(old, n_resamples=5)

    html = write_joint_report([old, run], tmp_path / "both.html", n_resamples=5).read_text()

    assert "a paired bootstrap of whole patients" in html
    assert "from 5 or 50 bootstrap resamples of whole studies" in html
    assert not re.search("00MRN", html)


# --- coverage ------------------------------------------------------------------------------------


def draw_patients(rng: np.random.Generator) -> ScoredImages:
    """60 patients of one to six studies of two images; the finding stays with the patient."""
    patient = np.repeat(np.repeat(np.arange(60), rng.integers(1, 7, 60)), 2)
    image = np.arange(len(patient))
    present = (rng.random(60) < 0.4)[patient].astype(float)
    logits = present  # and normal noise of unit variance, most of which is the patient's
    for share, of in ((0.6, patient), (0.3, image // 2), (0.1, image)):
        logits = logits + np.sqrt(share) * rng.standard_normal(of[-1] + 1)[of]
    ids = (of.astype(str).astype(object) for of in (image, image // 2, patient))
    p = 1 / (1 + np.exp(-logits))
    return ScoredImages(*ids, np.full(len(image), "", object), present[:, None], p[:, None], ("A",))


def test_intervals_over_patients_cover_and_those_over_studies_are_too_narrow():
    """100 draws; ``scripts/interval_coverage.py`` has 500 of the same kind, and other figures."""
    true_auroc = 0.76025  # of two normals of unit variance, one apart: Phi(1 / sqrt(2))
    n_covered = {"patients": 0, "studies": 0}
    for repeat in range(100):
        images = draw_patients(np.random.default_rng([repeat, 5]))
        unnamed = replace(images, patient_ids=np.full(len(images), "", object))
        for name, rows in (("patients", images), ("studies", unnamed)):
            estimates = estimate(rows, np.array([0.5]), n_resamples=60, seed=repeat)
            low, high = estimates.intervals["auroc"]
            n_covered[name] += bool(low[0] <= true_auroc <= high[0])

    assert 90 <= n_covered["patients"] <= 99, n_covered
    assert n_covered["studies"] < 87, n_covered
