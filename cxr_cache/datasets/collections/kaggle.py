"""Two competitions on images of NIH ChestX-ray14: RSNA's pneumonia and SIIM's pneumothorax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from cxr_cache.common.tables import read_csv
from cxr_cache.datasets.collections.listing import Listing
from cxr_cache.datasets.collections.places import find_beside, locate_images

_FROM_NIH: Final = (
    "These images come from NIH ChestX-ray14; beside that data set, the same patients would be in "
    "both."
)


def list_rsna(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``stage_2_train_labels.csv``: a row per box, and one without a box where there is none.

    The column ``patientId`` counts images. Which patient of NIH an image is of, the mappings of
    RSNA tell where they lie beside the table; the classes in ``stage_2_detailed_class_info.csv``
    become the fact ``image_class``.
    """
    boxes = read_csv(tables[0])
    targets = pd.to_numeric(boxes["Target"]).groupby(boxes["patientId"], sort=False).max()
    names = targets.index
    images = pd.DataFrame({"image_id": names, "study_uid": names})
    classes = find_beside(path, "*detailed_class_info.csv*")
    for file in classes[:1]:
        table = read_csv(file).drop_duplicates("patientId").set_index("patientId")
        images["image_class"] = table["class"].reindex(names).fillna("").to_numpy(object)
    mappings = find_beside(path, "*dataset-mappings*.json")
    for file in mappings[:1]:
        of_nih = {entry["subset_img_id"]: entry["img_id"] for entry in json.loads(file.read_text())}
        images["patient_id"] = [of_nih.get(name, "")[:8].lstrip("0") for name in names]
    written = [f"stage_2_train_images/{name}.dcm" for name in names]
    return Listing(
        images.assign(image_id=locate_images(written, image_dir)),
        pd.DataFrame({"Pneumonia": targets.to_numpy(np.float32)}),
        files=(tables[0], *classes[:1], *mappings[:1]),
        notes=(_FROM_NIH,),
    )


def list_siim(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``train-rle.csv``: a row per outline of a pneumothorax, -1 where there is none.

    Images lie two folders deep, the first of which is the study.
    """
    table = read_csv(tables[0])
    outlined = (table["EncodedPixels"] != "-1").groupby(table["ImageId"], sort=False).max()
    written = [f"{name}.dcm" for name in outlined.index]
    image_ids = locate_images(written, image_dir)
    studies = [image_id.split("/")[-3] if image_id.count("/") > 1 else name
               for image_id, name in zip(image_ids, outlined.index, strict=True)]
    return Listing(
        pd.DataFrame({"image_id": image_ids, "study_uid": studies}),
        pd.DataFrame({"Pneumothorax": outlined.to_numpy(np.float32)}),
        files=(tables[0],),
        notes=(_FROM_NIH,),
    )
