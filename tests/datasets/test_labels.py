"""The 35-finding rule and the two forms of a user's own labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxr_cache.config import ReadConfig
from cxr_cache.datasets.codes import Policy, apply_policy
from cxr_cache.datasets.labels import (
    FINDINGS,
    PUBLISHED_COUNTS,
    PUBLISHED_IMAGES,
    assign_targets,
    count_unknown_tags,
    load_labels,
    parse_labels,
)
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.datasets.table import read_sheet
from cxr_cache.errors import TableError


def read_findings(table: pd.DataFrame, source: str = "the table"):
    """Findings and targets of a table with a column for each."""
    sheet = read_sheet(table, Path(source), ReadConfig())
    return sheet.findings, apply_policy(sheet.codes, sheet.findings, Policy())


def names_of(row: np.ndarray) -> set[str]:
    return {FINDINGS[column] for column in np.flatnonzero(row == 1)}


def test_the_rule_reproduces_every_published_count(shared_data):
    targets = load_cohort(shared_data / "indiana_csv").targets

    assert targets.shape == (PUBLISHED_IMAGES, 35)
    assert dict(zip(FINDINGS, targets.sum(axis=0).astype(int), strict=True)) == PUBLISHED_COUNTS
    assert targets.size == 261_310
    assert targets.sum() == 13_123


def test_findings_are_listed_from_the_most_to_the_least_frequent():
    counts = [PUBLISHED_COUNTS[finding] for finding in FINDINGS]
    assert len(FINDINGS) == 35
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("normal", {"Normal"}),
        ("No Indexing", {"Normal"}),  # never indexed: nothing mapped
        ("Cardiomegaly;Pulmonary Artery", {"Cardiomegaly", "Pulmonary Artery Enlargement"}),
        ("  cardiomegaly ;; PULMONARY \t artery", {"Cardiomegaly", "Pulmonary Artery Enlargement"}),
        ("Lung", {"Hyperinflation"}),  # a clinical oddity of the rule
        ("Lung Diseases, Interstitial", {"Interstitial Lung Disease"}),  # tags are compared whole
        ("Pneumonia", {"Airspace Disease", "Consolidation"}),
        ("Cardiomegaly;normal", {"Cardiomegaly"}),
    ],
)
def test_tags_are_compared_whole_whatever_their_case_and_spacing(cell, expected):
    assert names_of(assign_targets([cell])[0]) == expected


@pytest.mark.parametrize("cell", ["", "  ", " ; ", "nan"])
def test_a_blank_cell_is_unlabelled_and_not_normal(cell):
    assert np.isnan(assign_targets([cell])).all()
    assert np.isnan(parse_labels([cell])).all()


def test_every_image_of_the_rule_has_a_finding():
    targets = assign_targets(
        ["Cardiomegaly", "Aorta;Stents", "normal", "Cardiomegaly; made-up tag"]
    )
    assert (targets.sum(axis=1) > 0).all()
    assert targets.dtype == np.float32


def test_a_tag_that_no_rule_knows_is_reported_and_never_normal():
    """Issue 12: a misspelt finding would otherwise be a normal image."""
    targets = assign_targets(["made-up tag", "Aorta; made-up tag", "Cardiomegaly; made-up tag"])
    assert np.isnan(targets[:2]).all()
    assert names_of(targets[2]) == {"Cardiomegaly"}  # what is mapped is
    assert count_unknown_tags(["made-up tag;Cardiomegaly", "Made-Up  Tag", "normal"]) == {
        "made-up tag": 2
    }


def test_a_label_cell_lists_findings_in_any_case_and_spacing():
    targets = parse_labels(["Pleural Effusion; edema", " cardiac  SHADOW (abnormal) ", ""])

    assert names_of(targets[0]) == {"Pleural Effusion", "Edema"}
    assert names_of(targets[1]) == {"Cardiac Shadow (abnormal)"}
    assert np.isnan(targets[2]).all()
    assert not np.isnan(targets[:2]).any()


def test_an_unknown_finding_is_refused_with_its_line_and_the_nearest_name():
    with pytest.raises(TableError, match=r"labels\.csv, line 7: .*'cardiomegly'.*'Cardiomegaly'"):
        parse_labels(["Edema", "Edema; Cardiomegly"], source="labels.csv", lines=[2, 7])


def test_a_finding_like_no_other_is_refused_without_a_guess():
    with pytest.raises(TableError, match=r"'xyzzy'\. For findings of your own"):
        parse_labels(["xyzzy"])


def test_a_target_table_reads_present_absent_uncertain_and_unlabelled():
    table = pd.DataFrame(
        {
            "image_id": ["a", "b", "c", "d"],
            "patient_id": ["1", "1", "2", "3"],  # describes the image, is no finding
            "Edema": ["1", "0", "", "-1"],
            "My own finding": ["1.0", "0.0", " 1 ", "-1.0"],
        }
    )

    findings, targets = read_findings(table)

    assert findings == ("Edema", "My own finding")
    nan = np.nan
    np.testing.assert_array_equal(targets, [[1, 1], [0, 0], [nan, 1], [nan, nan]])
    assert targets.dtype == np.float32


@pytest.mark.parametrize("value", ["2", "yes", "0.5", "inf", "-2", "1,0"])
def test_another_value_is_refused_with_its_line_column_and_value(value):
    table = pd.DataFrame({"image_id": ["a", "b"], "Edema": ["1", value]}, index=[2, 3])
    with pytest.raises(TableError, match=rf"own\.csv, line 3: column 'Edema' holds '{value}'"):
        read_findings(table, "own.csv")


def test_a_target_table_without_findings_is_refused(tmp_path):
    (tmp_path / "own.csv").write_text("image_id,fold\na,0\n")
    with pytest.raises(TableError, match="no finding: its columns are image_id, fold"):
        load_labels(tmp_path / "own.csv", np.array(["a"]))
