"""VinDr-CXR: three readers an image, as PhysioNet's tables of labels or as Kaggle's boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from cxr_cache.common.tables import read_csv
from cxr_cache.datasets.collections.listing import Listing, code_columns
from cxr_cache.datasets.collections.places import locate_images

_NOT_FINDINGS: Final = frozenset({"image_id", "rad_id"})
_OTHER_NAMES: Final = {"rad_ID": "rad_id", "Other disease": "Other diseases"}
"""What the tables of the test images call the same, and some editions of those for training."""
_NO_PATIENTS: Final = (
    "VinDr-CXR does not say which images are of one patient, so each image counts as one."
)


def list_vindr(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``image_labels_train.csv`` and ``image_labels_test.csv``, or one of them.

    Images for training have a row for each of three readers, those for testing one row, on which
    five readers agreed.
    """
    read = {file: read_csv(file).rename(columns=_OTHER_NAMES) for file in tables}
    findings = [name for name in next(iter(read.values())) if name not in _NOT_FINDINGS]
    codes = [code_columns(table, findings, file) for file, table in read.items()]
    side = {file: "train" if "rad_id" in table else "test" for file, table in read.items()}
    given = [side[file] for file, table in read.items() for _ in range(len(table))]
    names = pd.concat([table["image_id"] for table in read.values()]).tolist()
    written = [f"{of}/{name}.dicom" for of, name in zip(given, names, strict=True)]
    both = len(set(given)) > 1
    return Listing(
        pd.DataFrame(
            {
                "image_id": locate_images(written, image_dir),
                "study_uid": names,
                "given_split": given if both else "",
            }
        ),
        pd.concat(codes, ignore_index=True),
        files=tuple(tables),
        split="VinDr-CXR's tables for training and testing" if both else "",
        notes=(_NO_PATIENTS,),
    )


def list_vinbigdata(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``train.csv`` of Kaggle's VinBigData: a row per box, or one that says "No finding".

    What a reader drew no box of, is absent for that reader.
    """
    table = read_csv(tables[0])
    pairs = pd.factorize(table["image_id"] + "/" + table["rad_id"])
    numbers = pd.to_numeric(table["class_id"])
    findings = (
        table.assign(number=numbers).drop_duplicates("number").sort_values("number")["class_name"]
    )
    columns = pd.Index(findings).get_indexer(pd.Index(table["class_name"]))
    codes = np.zeros((len(pairs[1]), len(findings)), np.float32)
    codes[pairs[0], columns] = 1
    names = pd.Series(pairs[1]).str.partition("/")[0]
    return Listing(
        pd.DataFrame(
            {
                "image_id": locate_images([f"train/{name}.dicom" for name in names], image_dir),
                "study_uid": names,
            }
        ),
        pd.DataFrame(codes, columns=findings.tolist()),
        files=(tables[0],),
        usual=tuple(name for name in findings if name != "No finding"),
        notes=(_NO_PATIENTS, "Class 14, No finding, marks images on which a reader drew no box."),
    )
