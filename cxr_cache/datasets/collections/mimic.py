"""MIMIC-CXR-JPG: images in one table, their split in another, labels of studies in a third."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from cxr_cache.common.tables import read_table, require_columns, require_unique
from cxr_cache.common.wording import count
from cxr_cache.datasets.codes import BLANK
from cxr_cache.datasets.collections.listing import (
    CHEXPERT_FINDINGS,
    CHEXPERT_NOTE,
    CHEXPERT_POLICY,
    Listing,
    look_up,
    read_chexpert_codes,
    say_columns,
    take_columns,
)
from cxr_cache.datasets.collections.places import find_beside, peek
from cxr_cache.datasets.columns import read_splits
from cxr_cache.errors import TableError

_COLUMNS: Final = {
    "subject_id": "patient_id",
    "study_id": "study_uid",
    "ViewPosition": "view_position",
}


def list_mimic(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read the table of images, and what lies beside it of split, labels and test labels.

    Labels are of studies, and so the same for all images of one. CheXpert's labeller comes first,
    and NegBio's where it is alone; what a radiologist said of the test studies replaces both.
    """
    main = next((file for file in tables if "ViewPosition" in peek(file)), tables[0])
    table = read_table(main)
    labels = find_beside(path, "*chexpert.csv*") or find_beside(path, "*negbio.csv*")
    if not labels:
        raise TableError(
            f"{path} names the images of MIMIC-CXR-JPG but has no labels; put "
            "mimic-cxr-2.0.0-chexpert.csv.gz beside it."
        )
    by_radiologist = find_beside(path, "*test-set-labeled.csv*")
    codes = np.full((len(table), len(CHEXPERT_FINDINGS)), BLANK, np.int8)
    for file in (*labels[:1], *by_radiologist):
        of_studies = read_table(file)
        require_columns(of_studies, ("study_id",), file)
        require_unique(of_studies, "study_id", file)
        rows = pd.Index(of_studies["study_id"]).get_indexer(pd.Index(table["study_id"]))
        codes[rows >= 0] = read_chexpert_codes(of_studies, file)[rows[rows >= 0]]
    images = take_columns(table, _COLUMNS)
    splits = [file for file in find_beside(path, "*split.csv*") if "split" in peek(file)]
    for file in splits[:1]:
        split = look_up(read_table(file), "dicom_id", "split", file)
        images["given_split"] = read_splits(split.reindex(table["dicom_id"]).fillna(""), file)
    patient, study, name = images["patient_id"], images["study_uid"], table["dicom_id"].to_numpy()
    written = "files/p" + patient.str[:2] + "/p" + patient + "/s" + study + "/" + name + ".jpg"
    unlabelled = (codes == BLANK).all(axis=1)
    notes = [CHEXPERT_NOTE]
    if n_without := images["study_uid"][unlabelled].nunique():
        notes.append(
            f"Whatever is made of blank cells, {count(n_without, 'study')} without a single label "
            f"{'is' if n_without == 1 else 'are'} unlabelled."
        )
    notes += [
        f"Findings of the studies in {file.name} are a radiologist's." for file in by_radiologist
    ]
    return Listing(
        images.assign(image_id=written),
        CHEXPERT_FINDINGS,
        codes,
        files=(main, *labels[:1], *splits[:1], *by_radiologist),
        unlabelled=unlabelled,
        policy=CHEXPERT_POLICY,
        split="the split of MIMIC-CXR-JPG" if splits else "",
        columns=say_columns(table, _COLUMNS, {"dicom_id": "image", "split": "given_split"}),
        notes=tuple(notes),
    )
