"""Differences between groups: what they are, and that equal groups are not called different."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as reference

from cxr_cache.evaluation.compare import MACRO
from cxr_cache.evaluation.evaluate import evaluate_predictions, format_summary
from cxr_cache.evaluation.group_differences import (
    MIN_CLUSTERS,
    compare_groups,
    describe_differences,
)
from cxr_cache.evaluation.scored import ScoredImages, find_groups
from cxr_cache.metrics.operating_point import NEVER

FINDINGS = ("Mass", "Edema", "Hernia", "Cyst")


def make_images(seed: int, n_patients: int = 150, gap: float = 0.0) -> ScoredImages:
    """Two images a patient; signal is smaller by `gap` for F; Cyst has three patients in all."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n_patients), 2)
    sex = np.where(np.arange(n_patients) % 2, "F", "M").astype(object)
    targets = (rng.random((n_patients, 4)) < 0.35).astype(float)
    targets[:, 3] = np.arange(n_patients) < 3
    targets = targets[patient]
    signal = np.where(sex[patient] == "F", 1.5 - gap, 1.5)[:, None] * targets
    own = rng.normal(size=(n_patients, 4))[patient]
    scores = signal + 0.7 * own + 0.7 * rng.normal(size=targets.shape)
    ids = patient.astype(str).astype(object)
    band = np.array(["18-39", "40-59", "60-79"], object)[rng.integers(0, 3, n_patients)]
    return ScoredImages(
        image_ids=np.array([f"{row}.png" for row in range(len(patient))], object),
        study_uids=ids,
        patient_ids=ids,
        projections=np.full(len(patient), "Frontal", object),
        targets=targets,
        probabilities=1 / (1 + np.exp(-scores)),
        findings=FINDINGS,
        groups={"sex": sex[patient], "age_band": band[patient]},
    )


def test_a_difference_is_that_of_scikit_learns_figures():
    images, cuts = make_images(0), np.full(4, 0.6)
    table = compare_groups(images, cuts, n_resamples=50, seed=0)

    for row in table[table["finding"] != MACRO].to_dict("records"):
        f = FINDINGS.index(row["finding"])
        values = images.groups[row["group"]]
        own = values == row["value"]
        others = ~own if row["against"] == "all others" else values == row["against"]
        figures = []
        for rows in (own, others):
            t, p = images.targets[rows, f], images.probabilities[rows, f]
            label = {"sensitivity": 1, "specificity": 0}.get(row["measure"])
            figures.append(
                reference.roc_auc_score(t, p)
                if label is None
                else reference.recall_score(t, p >= cuts[f], pos_label=label)
            )
        assert (row["figure"], row["figure_against"]) == pytest.approx(tuple(figures), abs=1e-6)
        assert row["difference"] == pytest.approx(figures[0] - figures[1], abs=1e-6)
        assert row["low"] < row["difference"] < row["high"]
        assert row["p"] <= row["p_holm"] <= 1
    assert set(table["group"]) == {"sex", "age_band"}, "one projection is no group"
    assert set(table.loc[table["group"] == "sex", "value"]) == {"M"}, (
        "of two groups, one difference"
    )
    assert set(table.loc[table["group"] == "age_band", "value"]) == {"18-39", "40-59", "60-79"}


def test_means_are_over_the_findings_that_can_be_compared():
    table = compare_groups(make_images(1), np.full(4, 0.6), n_resamples=50, seed=0)

    areas = table[table["measure"] == "auroc"]
    assert "Cyst" not in set(areas["finding"]), f"fewer than {MIN_CLUSTERS} patients have it"
    for keys, rows in areas.groupby(["group", "value"]):
        single, [macro] = rows[rows["finding"] != MACRO], rows[rows["finding"] == MACRO].index
        assert len(single) == 3, keys
        assert table.loc[macro, "difference"] == pytest.approx(single["difference"].mean())
    macro = describe_differences(table)["macro"]
    assert {row["n_findings"] for row in macro if row["measure"] == "auroc"} == {3}


def test_holm_is_over_all_groups_and_findings_of_a_measure():
    table = compare_groups(make_images(2), np.full(4, 0.6), n_resamples=50, seed=0)
    tested = table[(table["measure"] == "auroc") & (table["finding"] != MACRO)]

    ordered = tested.sort_values("p")
    n = len(ordered)
    assert n == 3 * 4
    expected = np.minimum(np.maximum.accumulate(ordered["p"] * np.arange(n, 0, -1)), 1)
    np.testing.assert_allclose(ordered["p_holm"], expected)


def test_equal_groups_are_not_called_different_and_unequal_ones_are():
    def n_found(gap: float) -> int:
        found = 0
        for seed in range(6):
            table = compare_groups(
                make_images(seed, gap=gap), np.full(4, 0.6), n_resamples=50, seed=0
            )
            areas = table[(table["measure"] == "auroc") & (table["finding"] != MACRO)]
            found += bool((areas["p_holm"] < 0.05).any())
        return found

    assert n_found(0.0) <= 1
    assert n_found(1.5) >= 5


def test_copies_of_images_make_no_difference_clearer():
    images, cuts = make_images(3), np.full(4, 0.6)
    rows = np.repeat(np.arange(len(images)), 4)
    copied = replace(
        images.take(rows), image_ids=np.array([f"{k}.png" for k in range(len(rows))], object)
    )

    once, often = (compare_groups(part, cuts, n_resamples=50, seed=0) for part in (images, copied))

    np.testing.assert_allclose(once["p"], often["p"], rtol=1e-3, atol=1e-6)


def test_a_share_of_one_has_no_spread_and_is_not_tested():
    images = make_images(4)
    table = compare_groups(images, np.array([NEVER, 0, 0.6, 0.6]), n_resamples=50, seed=0)
    told = table[table["finding"].isin(["Mass", "Edema"])]
    assert set(told["measure"]) == {"auroc"}


def make_tables(**columns: object) -> tuple[pd.DataFrame, pd.DataFrame]:
    images = make_images(5)
    head = pd.DataFrame(
        {
            "image_id": images.image_ids,
            "study_uid": images.study_uids,
            "projection": images.projections,
            **columns,
        }
    )
    predictions = head.assign(**dict(zip(FINDINGS, images.probabilities.T, strict=True)))
    targets = head[["image_id"]].assign(**dict(zip(FINDINGS, images.targets.T, strict=True)))
    return predictions, targets


def test_sex_and_age_of_the_image_table_are_groups_without_a_file(tmp_path, caplog):
    n = len(make_images(5))
    ages = np.array(["17", "18", "39.9", "40", "80", "", "414", "old"], object)
    sexes = np.array(["F", "M", ""], object)
    columns = {"sex": sexes[np.arange(n) % 3], "age": ages[np.arange(n) % 8]}
    predictions, targets = make_tables(**columns)

    groups = find_groups(predictions)

    bands = groups["age_band"][:8].tolist()
    assert bands == ["0-17", "18-39", "18-39", "40-59", "80+", "", "", ""]
    assert f"{2 * (n // 8) + (n % 8 == 7)} values of the column age are no number" in caplog.text
    cuts = dict.fromkeys(FINDINGS, 0.6)
    path = tmp_path / "groups.csv"
    lines = [
        f"{name},{'old' if row % 2 else 'new'}" for row, name in enumerate(predictions["image_id"])
    ]
    path.write_text("\n".join(["image_id,film", *lines]))
    evaluation = evaluate_predictions(predictions, targets, cuts, groups=path, n_resamples=20)
    assert evaluation.metrics["test_by_group"].keys() == {"sex", "age_band", "film"}
    assert evaluation.tables["groups"].columns.tolist() == ["image_id", "film"], "what was given"
    assert set(evaluation.tables["group_differences"]["group"]) == {"sex", "age_band", "film"}
    differences = evaluation.metrics["group_differences"]
    assert differences["n_tested"]["auroc"] > 0
    assert "groups          sex, age_band, film: the AUROC of" in format_summary(evaluation.metrics)


def test_without_resamples_or_groups_nothing_is_compared():
    predictions, targets = make_tables()
    cuts = dict.fromkeys(FINDINGS, 0.6)
    for n_resamples in (0, 20):
        evaluation = evaluate_predictions(predictions, targets, cuts, n_resamples=n_resamples)
        assert evaluation.tables["group_differences"].empty
        assert evaluation.metrics["group_differences"]["macro"] == []
