"""The data sets that CheXpert's labeller coded by image: CheXpert, CheXpert Plus and BRAX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from cxr_cache.common.tables import read_csv
from cxr_cache.datasets.collections.listing import (
    CHEXPERT_FINDINGS,
    NO_FINDING_BLANK,
    Listing,
    code_columns,
    take_columns,
)
from cxr_cache.datasets.collections.places import find_beside, locate_images
from cxr_cache.errors import TableError

PATH: Final = r"(?:^|/)(?P<side>train|valid|test)/(?P<patient_id>patient\d+)/(?P<study>study\d+)/"
_SIDES: Final = {"train": "train", "valid": "val", "test": "test"}
_FACTS: Final = {"Sex": "sex", "Age": "age", "Frontal/Lateral": "projection", "AP/PA": "view_position"}


def list_chexpert(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``train.csv``, ``valid.csv`` and the test labels of CheXlocalize, as many as are there.

    Patient, study and side of the split are in the path of each image.
    """
    labels = [read_csv(file) for file in tables]
    codes = [code_columns(t, CHEXPERT_FINDINGS, file) for t, file in zip(labels, tables)]
    table = pd.concat(labels, ignore_index=True).fillna("")
    parts = _parse_paths(table["Path"], tables[0])
    images = take_columns(table, _FACTS)
    given = parts["side"].map(_SIDES) if parts["side"].nunique() > 1 else ""
    return Listing(
        images.assign(
            image_id=locate_images(table["Path"].tolist(), image_dir),
            study_uid=parts["patient_id"] + "/" + parts["study"],
            patient_id=parts["patient_id"],
            given_split=given,
        ),
        pd.concat(codes, ignore_index=True),
        files=tuple(tables),
        blank="zeros",
        split="CheXpert's folders train, valid and test" if parts["side"].nunique() > 1 else "",
        notes=(NO_FINDING_BLANK,),
    )


def _parse_paths(paths: pd.Series[str], source: Path) -> pd.DataFrame:
    parts = paths.str.extract(PATH)
    strange = parts["patient_id"].isna().to_numpy()
    if strange.any():
        raise TableError(
            f"{source}: the path {paths[strange].iloc[0]!r} is not of CheXpert's form "
            "train/patient00001/study1/view1_frontal.jpg. Give --format table for other paths."
        )
    return parts


def list_chexpert_plus(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``df_chexpert_plus_240401.csv`` and the labels, which are lines of JSON by image path.

    Three files of labels exist. Those of the impression come first, because CheXpert's own labels
    were taken from there.
    """
    table = read_csv(tables[0])
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
    codes = labels.reindex(columns=list(CHEXPERT_FINDINGS)).iloc[row_of].astype(np.float32)
    unlabelled = row_of < 0
    codes[unlabelled] = np.nan
    parts = _parse_paths(table["path_to_image"], tables[0])
    named = {
        "frontal_lateral": "projection",
        "ap_pa": "view_position",
        "split": "given_split",
        **{name: name for name in ("sex", "age", "race", "ethnicity")},
    }
    return Listing(
        take_columns(table, named).assign(
            image_id=locate_images(table["path_to_image"].tolist(), image_dir),
            study_uid=(parts["patient_id"] + "/" + parts["study"]).to_numpy(object),
            patient_id=parts["patient_id"].to_numpy(object),
        ),
        codes.reset_index(drop=True),
        files=(tables[0], found[0]),
        unlabelled=unlabelled,
        blank="zeros",
        split="the column split of CheXpert Plus",
        notes=(NO_FINDING_BLANK, f"Labels are those of {found[0].name}."),
    )


def list_brax(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``master_spreadsheet_update.csv``: the labeller on reports in Portuguese.

    An accession number is taken with its patient, because nobody promises that it is the only one
    of its kind. Ages are in steps of five years.
    """
    table = read_csv(tables[0])
    named = {
        "PatientID": "patient_id",
        "PatientSex": "sex",
        "PatientAge": "age",
        "ViewPosition": "view_position",
    }
    pixels = "PngPath" if "PngPath" in table else "DicomPath"
    return Listing(
        take_columns(table, named).assign(
            image_id=locate_images(table[pixels].tolist(), image_dir),
            study_uid=(table["PatientID"] + "_" + table["AccessionNumber"]).to_numpy(object),
        ),
        code_columns(table, CHEXPERT_FINDINGS, tables[0]),
        files=(tables[0],),
        blank="zeros",
        notes=(NO_FINDING_BLANK,),
    )
