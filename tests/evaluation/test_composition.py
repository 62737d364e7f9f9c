"""Missing labels, ages and sexes are those that one counts in the tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cxr_cache.evaluation.composition import count_labels, describe_people
from cxr_cache.evaluation.evaluate import evaluate_predictions, score_run
from cxr_cache.report.composition import tabulate_people
from tests.evaluation.test_evaluate import FINDINGS, make_run, make_tables


def make_predictions(seed: int) -> pd.DataFrame:
    """Two images a study, two studies a patient; some patients, ages and sexes are unknown."""
    rng = np.random.default_rng(seed)
    n_patients = 60
    study = np.repeat(np.arange(2 * n_patients), 2)
    patient = study // 2
    ages = rng.integers(18, 95, 2 * n_patients).astype(str)
    ages[rng.random(2 * n_patients) < 0.1] = ""
    ages[3] = "414"  # no age
    sexes = rng.choice(["F", "M", ""], n_patients)
    table = pd.DataFrame(
        {
            "image_id": [f"{i}.png" for i in range(len(study))],
            "study_uid": study.astype(str),
            "patient_id": np.where(patient % 9 == 0, "", patient.astype(str)),
            "projection": np.where(np.arange(len(study)) % 2, "Lateral", ""),
            "sex": sexes[patient],
            "age": ages[study],
            "split": np.where(patient % 4 == 0, "test", "train"),
        }
    )
    clash = table.index[(table["patient_id"] == "1")][0]
    table["sex"] = table["sex"].mask(table["patient_id"] == "1", "F")
    table.loc[clash, "sex"] = "M"
    return table


@pytest.mark.parametrize("seed", range(3))
def test_ages_and_sexes_are_those_of_the_table(seed):
    table = make_predictions(seed)
    described = describe_people(table)

    for side in ("train", "test"):
        own, of = table[table["split"] == side], described[side]
        assert (of["n_images"], of["n_studies"]) == (len(own), own["study_uid"].nunique())
        assert of["n_patients"] == own.loc[own["patient_id"] != "", "patient_id"].nunique()
        assert of["projection"] == {"Lateral": len(own) // 2, "unknown": len(own) // 2}
        years = pd.to_numeric(own.drop_duplicates("study_uid")["age"])
        years = years[years <= 120].dropna()
        age = of["age"]
        assert age["n_studies"] == len(years)
        assert age["n_unknown"] == own["study_uid"].nunique() - len(years)
        assert age["mean"] == pytest.approx(years.mean())
        assert age["std"] == pytest.approx(years.std())
        quantiles = years.quantile([0, 0.25, 0.5, 0.75, 1]).tolist()
        assert [age["range"][0], *age["quartiles"], age["range"][1]] == pytest.approx(
            [quantiles[k] for k in (0, 1, 3, 4)]
        )
        assert age["median"] == quantiles[2]
        # Sexes of patients, of studies where nobody names the patient.
        who = own["patient_id"].where(own["patient_id"] != "", "study " + own["study_uid"])
        first = (
            own.assign(who=who)
            .drop_duplicates("who")
            .set_index("who")["sex"]
            .drop("1", errors="ignore")
        )
        assert of["sex"]["n"] == first[first != ""].value_counts().sort_index().to_dict()
        assert of["sex"]["n_unknown"] == (first == "").sum()
        assert of["sex"]["n_contradictory"] == (side == "train")
        assert of["sex"]["unit"] == "patient or study"


def test_what_is_not_known_is_said_so():
    table = make_predictions(0).drop(columns=["sex", "patient_id"]).assign(age="")
    described = describe_people(table)
    assert described["test"]["sex"] is None
    assert described["test"]["n_patients"] is None
    assert described["test"]["age"] == {"n_studies": 0, "n_unknown": 30}
    lines = {line[0]: line[1:] for line in tabulate_people(described)}
    assert lines["patients"] == ["not named", "not named"]
    assert lines["sex unknown"] == ["all", "all"]
    age = next(cells for name, cells in lines.items() if name.startswith("age"))
    assert age == ["unknown", "unknown"]


@pytest.mark.parametrize("seed", range(3))
def test_labels_are_counted_by_side_and_as_they_were_written(seed):
    tables = make_tables(seed)
    predictions, targets = tables["predictions"], tables["targets"]
    codes = {"Mass": {"present": 7, "uncertain": 5}, "Nodule": {"blank": 3}}

    counted = count_labels(predictions, targets, FINDINGS, codes).set_index("finding")

    joined = predictions[["image_id", "split"]].merge(targets, on="image_id")
    for finding in FINDINGS:
        for side in ("train", "test"):
            own = joined.loc[joined["split"] == side, finding]
            row = counted.loc[finding]
            assert row[f"{side}_present"] == (own == 1).sum()
            assert row[f"{side}_absent"] == (own == 0).sum()
            assert row[f"{side}_unlabelled"] == own.isna().sum()
    assert counted.loc["Mass", "written_uncertain"] == 5
    assert counted.loc["Nodule", "written_blank"] == 3
    assert counted.loc["Hernia"].filter(like="written").isna().all(), "nobody says"
    plain = count_labels(predictions, targets, FINDINGS)
    assert not [name for name in plain if name.startswith("written")]


def test_an_evaluation_keeps_them(tmp_path):
    run = make_run(tmp_path / "run", label_codes={"codes": {"Mass": {"uncertain": 2}}})
    metrics = score_run(run, n_resamples=0)
    assert metrics["demographics"]["test"]["n_images"] == metrics["n_test_images"]
    assert run.read_table("label_counts")["written_uncertain"].max() == 2
    tables = make_tables(0)
    test = tables["predictions"].drop(columns="split")
    alone = evaluate_predictions(
        test, tables["targets"], dict.fromkeys(FINDINGS, 0.5), n_resamples=0
    )
    assert alone.metrics["demographics"].keys() == {"test"}
    assert "train_present" not in alone.tables["label_counts"]
