"""VinDr-CXR: three readers an image, as PhysioNet's tables of labels or as Kaggle's boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import read_table, require_columns
from cxr_cache.datasets.codes import PRESENT, read_codes
from cxr_cache.datasets.collections.listing import Listing, say_columns
from cxr_cache.errors import TableError

_NOT_FINDINGS: Final = frozenset({"image_id", "rad_id"})
_OTHER_NAMES: Final = {"rad_ID": "rad_id", "Other disease": "Other diseases"}
"""What the tables of the test images call the same, and some editions of those for training."""
_COLUMNS: Final = {"image_id": "image", "rad_id": "reader"}
_NO_PATIENTS: Final = (
    "VinDr-CXR does not say which images are of one patient, so each image counts as one."
)


def list_vindr(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``image_labels_train.csv`` and ``image_labels_test.csv``, or one of them.

    Images for training have a row for each of three readers, those for testing one row, on which
    five readers agreed.
    """
    read = {file: read_table(file).rename(columns=_OTHER_NAMES) for file in tables}
    first = next(iter(read.values()))
    findings = [name for name in first if name not in _NOT_FINDINGS]
    for file, table in read.items():
        _require_one_row_per_reader(table, file)
    side = {file: "train" if "rad_id" in table else "test" for file, table in read.items()}
    given = [side[file] for file, table in read.items() for _ in range(len(table))]
    names = pd.concat([table["image_id"] for table in read.values()]).tolist()
    both = len(set(given)) > 1
    return Listing(
        pd.DataFrame(
            {
                "image_id": [f"{of}/{name}.dicom" for of, name in zip(given, names, strict=True)],
                "study_uid": names,
                "given_split": given if both else "",
            }
        ),
        tuple(findings),
        np.concatenate([_read_codes(table, findings, file) for file, table in read.items()]),
        files=tuple(tables),
        several_readers=True,
        split="VinDr-CXR's tables for training and testing" if both else "",
        columns=say_columns(
            next(iter(read.values())), _COLUMNS, dict.fromkeys(findings, "finding")
        ),
        notes=(_NO_PATIENTS,),
    )


def _read_codes(table: pd.DataFrame, findings: list[str], file: Path) -> NDArray[np.int8]:
    require_columns(table, findings, file)
    return read_codes(table, findings, file)


def _require_one_row_per_reader(table: pd.DataFrame, file: Path) -> None:
    again = table.duplicated([name for name in ("image_id", "rad_id") if name in table])
    if again.any():
        row = table[again].iloc[0]
        reader = f" by reader {row['rad_id']}" if "rad_id" in row else ""
        raise TableError(
            f"{file}, line {row.name}: image {row['image_id']!r} is labelled twice{reader}. "
            "Keep one of the rows."
        )


def list_vinbigdata(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``train.csv`` of Kaggle's VinBigData: a row per box, or one that says "No finding".

    What a reader drew no box of, is absent for that reader.
    """
    table = read_table(tables[0])
    row_of, pairs = pd.factorize(table["image_id"] + "/" + table["rad_id"])
    numbers = pd.to_numeric(table["class_id"], errors="coerce")
    classes = table.assign(number=numbers).drop_duplicates("class_name")
    findings = tuple(classes.sort_values("number")["class_name"])
    codes = np.zeros((len(pairs), len(findings)), np.int8)
    codes[row_of, pd.Index(findings).get_indexer(pd.Index(table["class_name"]))] = PRESENT
    names = pd.Series(pairs).str.partition("/")[0]
    return Listing(
        pd.DataFrame({"image_id": "train/" + names + ".dicom", "study_uid": names}),
        findings,
        codes,
        files=(tables[0],),
        usual=tuple(name for name in findings if name != "No finding"),
        several_readers=True,
        n_rows=len(table),
        columns=say_columns(table, _COLUMNS, {"class_name": "finding", "class_id": "order"}),
        notes=(_NO_PATIENTS, "Class 14, No finding, says that a reader drew no box."),
    )
