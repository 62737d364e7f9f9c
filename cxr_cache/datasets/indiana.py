"""The Indiana collection's two CSV files -> the image table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import (
    hash_file,
    read_csv,
    require_columns,
    require_filled,
    require_unique,
)
from cxr_cache.datasets.cohort import Cohort, logger
from cxr_cache.datasets.labels import (
    FINDINGS,
    assign_targets,
    parse_labels,
    take_or_nan,
)
from cxr_cache.errors import TableError

PROJECTIONS = {"frontal": "Frontal", "lateral": "Lateral", "": ""}
"""How a projection may be written (in any case), and how the cohort writes it."""


def load_cohort(csv_dir: str | Path) -> Cohort:
    """Read a data set in the form of the Indiana collection: two CSV files in one folder.

    ``indiana_reports.csv`` has one row per study with the columns ``uid`` and
    ``Problems``; ``indiana_projections.csv`` one row per image with ``uid``,
    ``filename`` and ``projection``. Rows are joined on ``uid`` and keep the
    order of the images. Other columns are ignored, except two:

    ``label``
        Findings separated by ``;``, in either file (that of the images
        counts first). It takes precedence over the rule for ``Problems``.
    ``patient_id``
        In either file. Images of one patient then stay together in splits.

    An image whose study has no report is kept as an unlabelled row, and the
    number of them is logged as a warning.

    Parameters
    ----------
    csv_dir
        Folder with the two files, or with one ``*reports*.csv`` and one
        ``*projections*.csv``.

    Returns
    -------
    Cohort
        The complete collection has 7,466 images of 3,851 studies; findings are
        the 35 of :data:`cxr_cache.datasets.labels.FINDINGS`.

    Raises
    ------
    TableError
        A file is missing, unreadable or contradicts itself.

    See Also
    --------
    read_csv : the encodings, separators and faults that are dealt with.
    """
    csv_dir = Path(csv_dir)
    reports_path = _find_csv(csv_dir, "reports")
    images_path = _find_csv(csv_dir, "projections")
    reports, images = read_csv(reports_path), read_csv(images_path)
    require_columns(reports, ("uid",), reports_path)
    require_columns(images, ("uid", "filename", "projection"), images_path)
    require_unique(reports, "uid", reports_path)
    require_unique(images, "filename", images_path)
    require_filled(images, "uid", images_path)
    report_of_image = _join(images, reports, images_path, reports_path)
    return Cohort(
        image_ids=_to_array(images["filename"]),
        study_uids=_to_array(images["uid"]),
        patient_ids=_parse_patient_ids(images, reports, report_of_image),
        projections=_parse_projections(images, images_path),
        targets=_parse_targets(images, reports, report_of_image, images_path, reports_path),
        findings=FINDINGS,
        source={path.name: hash_file(path) for path in (reports_path, images_path)},
    )


def _find_csv(csv_dir: Path, kind: str) -> Path:
    usual = csv_dir / f"indiana_{kind}.csv"
    if usual.is_file():
        return usual
    if not csv_dir.is_dir():
        raise TableError(f"{csv_dir} is not a folder; give the one with the two CSV files.")
    candidates = sorted(csv_dir.glob(f"*{kind}*.csv"))
    if len(candidates) == 1:
        return candidates[0]
    present = ", ".join(sorted(path.name for path in csv_dir.glob("*.csv"))) or "no CSV file"
    raise TableError(
        f"{csv_dir} needs indiana_{kind}.csv, or exactly one *{kind}*.csv; it holds: {present}."
    )


def _join(
    images: pd.DataFrame, reports: pd.DataFrame, images_path: Path, reports_path: Path
) -> NDArray[np.int64]:
    """Row of each image's report, -1 where there is none; shape (N,)."""
    rows = pd.Index(reports["uid"]).get_indexer(pd.Index(images["uid"]))
    n_without = int((rows < 0).sum())
    if n_without == len(rows):
        raise TableError(
            f"no uid of {images_path.name} occurs in {reports_path.name}: the first are "
            f"{images['uid'].iloc[0]!r} and {reports['uid'].iloc[0]!r}. "
            "Give two files of the same data set."
        )
    if n_without:
        logger.warning(
            "%d of %d images have no report in %s (the first: uid %r); they are kept, unlabelled",
            n_without,
            len(rows),
            reports_path,
            images["uid"].iloc[int((rows < 0).argmax())],
        )
    return np.asarray(rows, np.int64)


def _parse_targets(
    images: pd.DataFrame,
    reports: pd.DataFrame,
    report_of_image: NDArray[np.int64],
    images_path: Path,
    reports_path: Path,
) -> NDArray[np.float32]:
    """Take the user's labels where there are any, else the rule for the reports' tags."""
    if "label" in images:
        return parse_labels(
            images["label"].tolist(), source=str(images_path), lines=images.index.tolist()
        )
    if "label" in reports:
        of_reports = parse_labels(
            reports["label"].tolist(), source=str(reports_path), lines=reports.index.tolist()
        )
    else:
        require_columns(reports, ("Problems",), reports_path)
        of_reports = assign_targets(reports["Problems"].tolist())
    return take_or_nan(of_reports, report_of_image)


def _parse_patient_ids(
    images: pd.DataFrame, reports: pd.DataFrame, report_of_image: NDArray[np.int64]
) -> NDArray[np.str_]:
    if "patient_id" in images:
        return _to_array(images["patient_id"])
    if "patient_id" in reports:
        of_reports = np.append(_to_array(reports["patient_id"]), "")
        return of_reports[report_of_image]  # -1 takes the blank at the end
    return np.full(len(images), "", np.str_)


def _parse_projections(images: pd.DataFrame, path: Path) -> NDArray[np.str_]:
    written = images["projection"].str.lower()
    unknown = np.flatnonzero(~written.isin(list(PROJECTIONS)))
    if len(unknown):
        row = unknown[0]
        raise TableError(
            f"{path}, line {images.index[row]}: projection {images['projection'].iloc[row]!r} is "
            "neither Frontal nor Lateral; leave it blank where it is something else or unknown."
        )
    return _to_array(written.map(PROJECTIONS))


def _to_array(cells: pd.Series[str]) -> NDArray[np.str_]:
    return np.asarray(cells.tolist(), np.str_)
