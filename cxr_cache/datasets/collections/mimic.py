"""MIMIC-CXR-JPG: images in one table, their split in another, labels of studies in a third."""

from __future__ import annotations

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
from cxr_cache.datasets.collections.places import find_beside, locate_images, peek
from cxr_cache.errors import TableError

_COLUMNS: Final = {"subject_id": "patient_id", "study_id": "study_uid", "ViewPosition": "view_position"}
_SIDES: Final = {"train": "train", "validate": "val", "test": "test"}


def list_mimic(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read the table of images, and what lies beside it of split, labels and test labels.

    Labels are of studies, and so the same for all images of one. CheXpert's labeller comes first,
    and NegBio's where it is alone; what a radiologist said of the test studies replaces both.
    """
    with_views = [file for file in tables if "metadata" in file.name]
    table = read_csv((with_views or tables)[0])
    labels = find_beside(path, "*chexpert.csv*") or find_beside(path, "*negbio.csv*")
    if not labels:
        raise TableError(
            f"{path} names the images of MIMIC-CXR-JPG but has no labels; put "
            "mimic-cxr-2.0.0-chexpert.csv.gz beside it."
        )
    by_radiologist = find_beside(path, "*test-set-labeled.csv*")
    codes = np.full((len(table), len(CHEXPERT_FINDINGS)), np.nan, np.float32)
    for file in (*labels[:1], *by_radiologist):
        of_studies = read_csv(file)
        rows = pd.Index(of_studies["study_id"]).get_indexer(pd.Index(table["study_id"]))
        codes[rows >= 0] = code_columns(of_studies, CHEXPERT_FINDINGS, file).to_numpy()[rows[rows >= 0]]
    images = take_columns(table, _COLUMNS)
    splits = [file for file in tables if "split" in peek(file)]
    for file in splits[:1]:
        split = read_csv(file).set_index("dicom_id")["split"].map(_SIDES)
        images["given_split"] = split.reindex(table["dicom_id"]).fillna("").to_numpy(object)
    patient, study, name = images["patient_id"], images["study_uid"], table["dicom_id"].to_numpy()
    written = "files/p" + patient.str[:2] + "/p" + patient + "/s" + study + "/" + name + ".jpg"
    return Listing(
        images.assign(image_id=locate_images(written.tolist(), image_dir)),
        pd.DataFrame(codes, columns=list(CHEXPERT_FINDINGS)),
        files=((with_views or tables)[0], labels[0], *splits[:1], *by_radiologist),
        unlabelled=np.isnan(codes).all(axis=1),
        blank="zeros",
        split="the split of MIMIC-CXR-JPG" if splits else "",
        notes=(
            NO_FINDING_BLANK,
            *(f"Findings of the studies in {file.name} are a radiologist's." for file in by_radiologist),
        ),
    )
