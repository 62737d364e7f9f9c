"""The data sets that CheXpert's labeller coded by image: CheXpert, CheXpert Plus and BRAX."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from cxr_cache.common.tables import read_table
from cxr_cache.datasets.codes import BLANK
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
    lines = found[0].read_text("utf-8").splitlines()
    labels = pd.DataFrame.from_records([json.loads(line) for line in lines if line.strip()])
    row_of = pd.Index(labels["path_to_image"]).get_indexer(pd.Index(table["path_to_image"]))
    values = labels.reindex(columns=list(CHEXPERT_FINDINGS)).to_numpy(float)
    codes = np.where(np.isnan(values), BLANK, values).astype(np.int8)
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


def list_brax(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``master_spreadsheet_update.csv``: the labeller on reports in Portuguese.

    An accession number is taken with its patient, because nobody promises that it is the only one
    of its kind. Ages are in steps of five years.
    """
    table = read_table(tables[0])
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
