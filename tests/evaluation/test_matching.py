"""Which findings of two data sets are the same: by name, by the table, by the user's own table."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxr_cache.common.tables import read_csv
from cxr_cache.config import RELATIONS
from cxr_cache.datasets.labels import FINDINGS
from cxr_cache.errors import TableError
from cxr_cache.evaluation.matching import NAMES, Matching, match_findings, name_data_set

NIH = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia"),
    *("Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening"),
    "Hernia",
)
INDIANA_IS_NIH = {
    "Cardiomegaly": ("Cardiomegaly",),
    "Volume Loss": ("Atelectasis",),
    "Pleural Effusion": ("Effusion",),
    "Nodule": ("Nodule",),
    "Pneumothorax": ("Pneumothorax",),
    "Pulmonary Fibrosis": ("Fibrosis",),
}


def relate(matching: Matching, finding: str, name: str) -> tuple[str, bool]:
    table = matching.table
    [row] = table[(table["finding"] == finding) & (table["store_finding"] == name)].to_dict(
        "records"
    )
    return row["relation"], row["is_scored"]


def test_indiana_and_nih_share_what_means_the_same():
    matching = match_findings(FINDINGS, NIH, our_data_set="indiana", their_data_set="nih")

    assert matching.scored == INDIANA_IS_NIH
    assert relate(matching, "Effusion", "Effusion") == ("differs", False)
    assert relate(matching, "Consolidation", "Consolidation") == ("narrower", False)
    back = match_findings(NIH, FINDINGS, our_data_set="nih", their_data_set="indiana")
    assert {name: (finding,) for finding, (name,) in back.scored.items()} == INDIANA_IS_NIH
    assert relate(back, "Consolidation", "Consolidation") == ("broader", False)
    assert "Scoliosis" in back.unused


def test_case_blanks_and_underscores_make_no_other_name():
    matching = match_findings(
        ("Pleural_Thickening", "Lung  Opacity", "Edema"), ("pleural thickening", "Lung opacity")
    )

    assert matching.scored == {
        "Pleural_Thickening": ("pleural thickening",),
        "Lung  Opacity": ("Lung opacity",),
    }
    assert matching.unlabelled == ("Edema",)


def test_one_data_set_is_the_same_as_itself_and_as_those_labelled_alike():
    for other in ("indiana", "openi"):
        matching = match_findings(FINDINGS, FINDINGS, our_data_set="indiana", their_data_set=other)
        assert matching.scored == {finding: (finding,) for finding in FINDINGS}
    names = ("No Finding", "Lung Lesion", "Pleural Other")
    same = match_findings(names, names, our_data_set="chexpert", their_data_set="mimic-cxr-jpg")
    assert same.unlabelled == ()
    none = match_findings(names[:1], names[:1], our_data_set="nih", their_data_set="chexpert")
    assert none.unlabelled == ("No Finding",)


def test_findings_of_ones_own_are_matched_by_their_names_alone():
    """Whoever has both Effusion and Pleural Effusion means two things by them."""
    names = ("Alpha", "Effusion", "Pleural Effusion", "Normal")
    matching = match_findings(names, names, our_data_set="table", their_data_set="table")
    assert matching.scored == {name: (name,) for name in names}
    alone = match_findings(("Effusion",), ("Pleural effusion", "Alpha"))
    assert alone.scored == {"Effusion": ("Pleural effusion",)}
    assert match_findings(("Effusion",), names[2:]).unlabelled == ()
    assert match_findings(("Alpha", "Pleural Effusion"), ("Effusion",)).unlabelled == ("Alpha",)


def test_other_relations_are_scored_only_if_asked_for_and_parts_are_joined():
    """The whole is present where one part is, absent where all are, else unlabelled."""
    options = {"our_data_set": "chexpert", "their_data_set": "nih"}
    assert match_findings(("Lung Lesion",), NIH, **options).scored == {}

    matching = match_findings(("Lung Lesion",), NIH, relations=("same", "narrower"), **options)

    assert matching.scored == {"Lung Lesion": ("Mass", "Nodule")}
    cells = list(itertools.product((1, 0, np.nan), repeat=2))
    labels = pd.DataFrame(cells, columns=["Mass", "Nodule"])
    expected = [1.0, 1.0, 1.0, 1.0, 0.0, np.nan, 1.0, np.nan, np.nan]
    np.testing.assert_array_equal(matching.relabel(labels)[:, 0], expected)


def write_map(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_map_of_ones_own_decides_on_what_it_names(tmp_path):
    text = "finding,store_finding,relation\nLung Lesion,Mass,\nLung Lesion,Nodule,same\n"
    path = write_map(tmp_path / "map.csv", text + "Edema,,\nPneumonia,Infiltration,broader\n")
    ours = ("Lung Lesion", "Edema", "Pneumonia", "Pneumothorax")

    matching = match_findings(ours, NIH, own=path)

    assert matching.scored == {
        "Lung Lesion": ("Mass", "Nodule"),
        "Pneumothorax": ("Pneumothorax",),
    }
    why = matching.table.set_index("finding")["why"]
    assert why["Edema"] == "left out by the map"
    assert relate(matching, "Pneumonia", "Infiltration") == ("broader", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "finding,store_finding\nEdma,Edema",
            "line 2: the run has no finding 'Edma'. Did you mean",
        ),
        ("finding,store_finding\nEdema,Edma", "the other data set has no finding 'Edma'. Did you"),
        (
            "finding,store_finding,relation\nEdema,Edema,wider",
            "line 2: relation 'wider' is none of same, narrower, broader, differs",
        ),
        ("finding,other\nEdema,Edema", "store_finding"),
    ],
)
def test_a_map_that_cannot_be_used_is_named(tmp_path, text, message):
    path = write_map(tmp_path / "map.csv", text)
    with pytest.raises(TableError, match=message) as caught:
        match_findings(("Edema",), NIH, own=path)
    assert str(path) in str(caught.value)


def test_the_text_says_what_is_matched_what_not_and_why():
    text = match_findings(FINDINGS, NIH, our_data_set="indiana", their_data_set="nih").to_text()

    assert text.startswith("6 of the run's 35 findings can be scored:\n")
    assert "  Volume Loss         Atelectasis         same      97 % of Indiana's" in text
    assert "  Effusion            Effusion            differs   Indiana's Effusion is" in text
    assert "\nNot labelled there: Normal, Degenerative Change" in text


def test_the_table_of_names_contradicts_itself_nowhere():
    """One line for a pair of names in a pair of data sets, in whichever direction."""
    table = read_csv(Path(str(NAMES)))
    assert set(table["relation"]) <= set(RELATIONS)
    known = set()
    for row in table.to_dict("records"):
        ours = [(row["name"].lower(), name) for name in row["data_set"].split("|")]
        theirs = [(row["other_name"].lower(), name) for name in row["other_data_set"].split("|")]
        for pair in itertools.product(ours, theirs):
            assert frozenset(pair) not in known, pair
            known.add(frozenset(pair))
    indiana = table.loc[table["data_set"] == "indiana", "name"]
    assert set(indiana) <= set(FINDINGS)


def test_data_sets_are_named_by_their_readers_and_old_stores_by_their_findings():
    assert name_data_set(NIH, {"format": "nih"}) == "nih"
    assert name_data_set(FINDINGS) == "indiana"
    assert name_data_set(("Alpha",)) == ""
