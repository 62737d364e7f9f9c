"""Two competitions on images of NIH ChestX-ray14: RSNA's pneumonia and SIIM's pneumothorax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import read_table, require_columns
from cxr_cache.datasets.codes import PRESENT, read_codes
from cxr_cache.datasets.collections.listing import Listing, say_columns
from cxr_cache.datasets.collections.places import find_beside
from cxr_cache.errors import TableError

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
    boxes = read_table(tables[0])
    present = read_codes(boxes, ["Target"], tables[0])[:, 0] == PRESENT
    targets = _one_target(boxes["patientId"], present, tables[0])
    names = targets.index
    images = pd.DataFrame({"image_id": names, "study_uid": names})
    classes = find_beside(path, "*detailed_class_info.csv*")
    for file in classes[:1]:
        table = read_table(file)
        require_columns(table, ("patientId", "class"), file)
        table = table.drop_duplicates("patientId").set_index("patientId")
        images["image_class"] = table["class"].reindex(names).fillna("").to_numpy(object)
    mappings = find_beside(path, "*dataset-mappings*.json")
    for file in mappings[:1]:
        of_nih = _read_mappings(file)
        images["patient_id"] = [of_nih.get(name, "")[:8].lstrip("0") for name in names]
    return Listing(
        images.assign(image_id="stage_2_train_images/" + images["image_id"] + ".dcm"),
        ("Pneumonia",),
        targets.to_numpy(np.int8)[:, None],
        files=(tables[0], *classes[:1], *mappings[:1]),
        n_rows=len(boxes),
        columns=say_columns(boxes, {"patientId": "image", "Target": "finding Pneumonia"}),
        notes=(_FROM_NIH,),
    )


def _read_mappings(file: Path) -> dict[str, str]:
    """Name of NIH's image for each of RSNA's."""
    try:
        entries = json.loads(file.read_text("utf-8"))
        return {entry["subset_img_id"]: entry["img_id"] for entry in entries}
    except (ValueError, TypeError, KeyError) as error:
        raise TableError(
            f"{file} is not a list of images of RSNA and NIH in JSON ({error!r}). Fetch it anew, "
            "or move it away to do without patients."
        ) from error


def list_siim(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``train-rle.csv``: a row per outline of a pneumothorax, -1 where there is none.

    Images lie in folders of study and series; each study has one.
    """
    table = read_table(tables[0])
    present = (table["EncodedPixels"] != "-1").to_numpy()
    outlined = _one_target(table["ImageId"], present, tables[0])
    return Listing(
        pd.DataFrame({"image_id": outlined.index + ".dcm", "study_uid": outlined.index}),
        ("Pneumothorax",),
        outlined.to_numpy(np.int8)[:, None],
        files=(tables[0],),
        n_rows=len(table),
        columns=say_columns(table, {"ImageId": "image", "EncodedPixels": "finding Pneumothorax"}),
        notes=(_FROM_NIH,),
    )


def _one_target(names: pd.Series[str], present: NDArray[np.bool_], file: Path) -> pd.Series[bool]:
    """Whether the rows of each image say that something is there, on which they must agree."""
    of_image = pd.Series(present).groupby(names.to_numpy(object), sort=False)
    targets: pd.Series[bool] = of_image.max()
    differ = targets != of_image.min()
    if differ.any():
        raise TableError(
            f"{file}: image {differ.idxmax()!r} has rows that say it has the finding and rows "
            "that say it has not. Keep those of one kind."
        )
    return targets
