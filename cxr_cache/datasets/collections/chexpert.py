"""The data sets that CheXpert's labeller coded by image: CheXpert, CheXpert Plus and BRAX."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import find_duplicates, read_table, require_columns
from cxr_cache.datasets.codes import ABSENT, BLANK, PRESENT, UNCERTAIN
from cxr_cache.datasets.collections.listing import (
    CHEXPERT_FINDINGS,
    CHEXPERT_NOTE,
    CHEXPERT_POLICY,
    Listing,
    read_chexpert_codes,
    say_columns,
    take_columns,
)
from cxr_cache.datasets.collections.places import find_beside
from cxr_cache.datasets.columns import SPLIT_WORDS, read_splits
from cxr_cache.errors import TableError

PATH: Final = r"((train|valid|test)/((patient\d+)/study\d+)/[^/\n]+)$"
"""How paths end: the image from there on, side of the split, study, and patient."""
_FACTS: Final = {
    "Sex": "sex",
    "Age": "age",
    "Frontal/Lateral": "projection",
    "AP/PA": "view_position",
}
_PLUS_FACTS: Final = {
    "frontal_lateral": "projection",
    "ap_pa": "view_position",
    "split": "given_split",
    **{name: name for name in ("sex", "age", "race", "ethnicity")},
}
_BRAX_FACTS: Final = {
    "PngPath": "image_id",
    "PatientID": "patient_id",
    "PatientSex": "sex",
    "ViewPosition": "view_position",
}
_JSON_CODES: Final = {1: PRESENT, 0: ABSENT, -1: UNCERTAIN, None: BLANK}
_AS_FINDINGS: Final = dict.fromkeys(CHEXPERT_FINDINGS, "finding")


def list_chexpert(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``train.csv``, ``valid.csv`` and the test labels of CheXlocalize, as many as are there.

    Patient, study and side of the split are in the path of each image.
    """
    read = [read_table(file) for file in tables]
    pairs = list(zip(read, tables, strict=True))
    images = [_list_images(table, "Path", file) for table, file in pairs]
    together = pd.concat(images, ignore_index=True).fillna("") if len(tables) > 1 else images[0]
    if len(tables) == 1:
        together["given_split"] = ""
    return Listing(
        together,
        CHEXPERT_FINDINGS,
        np.concatenate([read_chexpert_codes(table, file) for table, file in pairs]),
        files=tuple(tables),
        policy=CHEXPERT_POLICY,
        split="CheXpert's folders train, valid and test" if len(tables) > 1 else "",
        columns=say_columns(read[0], {"Path": "image, patient, study"}, _FACTS, _AS_FINDINGS),
        notes=(CHEXPERT_NOTE,),
    )


def _list_images(table: pd.DataFrame, column: str, file: Path) -> pd.DataFrame:
    """Facts of each image, from its row and from its path."""
    found = re.findall(PATH, "\n".join(table[column]), re.MULTILINE)
    if len(found) != len(table):
        strange = table[column][~table[column].str.contains(PATH)]
        raise TableError(
            f"{file}, line {strange.index[0]}: the path {strange.iloc[0]!r} is not of CheXpert's "
            "form, which is train/patient00001/study1/view1_frontal.jpg. Read tables with other "
            "paths by --format table."
        )
    parts = (pd.Series(part, dtype=object) for part in zip(*found, strict=True))
    image_ids, sides, studies, patients = parts
    facts: pd.DataFrame = take_columns(table, _FACTS | _PLUS_FACTS).assign(
        image_id=image_ids,
        study_uid=studies,
        patient_id=patients,
        given_split=sides.map(SPLIT_WORDS),
    )
    return facts


def list_chexpert_plus(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``df_chexpert_plus_240401.csv`` and the labels, which are lines of JSON by image path.

    Three files of labels exist. Those of the impression come first, because CheXpert's own labels
    were taken from there.
    """
    table = read_table(tables[0])
    found = [
        file
        for section in ("impression", "report", "findings")
        for file in find_beside(path, f"{section}_fixed.json")
    ]
    if not found:
        raise TableError(
            f"{path} holds {tables[0].name}, which has no labels. Put impression_fixed.json of "
            "CheXpert Plus beside it."
        )
    require_columns(table, ("split",), tables[0])
    labelled, codes = _read_json_labels(found[0])
    row_of = pd.Index(labelled).get_indexer(pd.Index(table["path_to_image"]))
    images = _list_images(table, "path_to_image", tables[0])
    return Listing(
        images.assign(given_split=read_splits(table["split"], tables[0])),
        CHEXPERT_FINDINGS,
        codes[row_of],
        files=(tables[0], found[0]),
        unlabelled=row_of < 0,
        policy=CHEXPERT_POLICY,
        split="the column split of CheXpert Plus",
        columns=say_columns(table, {"path_to_image": "image, patient, study"}, _PLUS_FACTS),
        notes=(CHEXPERT_NOTE, f"Findings are those of {found[0].name}."),
    )


def _read_json_labels(file: Path) -> tuple[list[str], NDArray[np.int8]]:
    """Paths of the images that a file of JSON lines labels, and their codes."""
    paths, rows = [], []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        try:
            labels = json.loads(line)
            paths.append(labels["path_to_image"])
            rows.append([_JSON_CODES[labels.get(finding)] for finding in CHEXPERT_FINDINGS])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TableError(
                f"{file}, line {number}: not the labels of an image in JSON, with path_to_image "
                f"and each finding as 1, 0, -1 or null ({error!r}). Fetch the file anew."
            ) from error
    if twice := find_duplicates(paths):
        raise TableError(f"{file} labels {twice[0]!r} on two lines. Keep one of them.")
    return paths, np.array(rows, np.int8)


def list_brax(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``master_spreadsheet_update.csv``: the labeller on reports in Portuguese.

    An accession number is taken with its patient, because nobody promises that it is the only one
    of its kind. Ages are in steps of five years.
    """
    table = read_table(tables[0])
    require_columns(table, ("PatientID", "PatientAge"), tables[0])
    return Listing(
        take_columns(table, _BRAX_FACTS).assign(
            study_uid=(table["PatientID"] + "_" + table["AccessionNumber"]).to_numpy(object),
            age=table["PatientAge"].str.extract(r"(\d+)")[0].fillna("").to_numpy(object),
        ),
        CHEXPERT_FINDINGS,
        read_chexpert_codes(table, tables[0]),
        files=(tables[0],),
        policy=CHEXPERT_POLICY,
        columns=say_columns(
            table, _BRAX_FACTS, {"AccessionNumber": "study", "PatientAge": "age"}, _AS_FINDINGS
        ),
        notes=(CHEXPERT_NOTE,),
    )
