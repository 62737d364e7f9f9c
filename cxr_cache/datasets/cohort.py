"""The image table: which images there are, of which study, with which targets."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import (
    find_duplicates,
    hash_file,
    read_csv,
    require_columns,
    require_filled,
    require_unique,
)
from cxr_cache.datasets.clusters import assign_clusters, require_one_patient_per_study
from cxr_cache.datasets.labels import (
    FINDINGS,
    assign_targets,
    parse_labels,
    parse_target_table,
)
from cxr_cache.errors import TableError

logger = logging.getLogger(__name__)

PROJECTIONS = {"frontal": "Frontal", "lateral": "Lateral", "": ""}
"""How a projection may be written (in any case), and how the cohort writes it."""


@dataclass(frozen=True, eq=False)
class Cohort:
    """N images in a fixed order, which is the order of the rows everywhere else.

    Attributes
    ----------
    image_ids
        Relative posix path of each file under the image folder, unique; shape
        ``(N,)``, as the next three.
    study_uids
        Examination that the image belongs to.
    patient_ids
        ``""`` where unknown. All images of a study name the same patient.
    projections
        ``"Frontal"``, ``"Lateral"``, or ``""`` where unknown.
    targets
        1 present, 0 absent, NaN unlabelled; shape ``(N, F)``, float32.
    findings
        Names of the F findings.
    source
        SHA-256 (hex) of each file that was read, by file name.
    """

    image_ids: NDArray[np.str_]
    study_uids: NDArray[np.str_]
    patient_ids: NDArray[np.str_]
    projections: NDArray[np.str_]
    targets: NDArray[np.float32]
    findings: tuple[str, ...]
    source: dict[str, str]

    def __post_init__(self) -> None:
        n_images = len(self.image_ids)
        for name in ("study_uids", "patient_ids", "projections", "targets"):
            n_values = len(getattr(self, name))
            if n_values != n_images:
                raise TableError(f"{n_images} image_ids, but {n_values} {name}")
        if self.targets.shape != (n_images, len(self.findings)):
            raise TableError(
                f"targets of shape {self.targets.shape} for {n_images} images and "
                f"{len(self.findings)} findings"
            )
        if not (np.isnan(self.targets) | (self.targets == 0) | (self.targets == 1)).all():
            raise TableError("targets hold other values than 1, 0 and NaN")
        duplicates = find_duplicates(self.image_ids)
        if duplicates:
            raise TableError(f"image {duplicates[0]!r} is listed twice; image ids must be unique")
        self._require_utf8()
        require_one_patient_per_study(self.patient_ids, self.study_uids)

    def _require_utf8(self) -> None:
        """Names of files may be any bytes; Python reads those outside UTF-8 as surrogates."""
        for image_id in self.image_ids.tolist():
            if not _is_utf8(image_id):
                raise TableError(
                    f"image {image_id!r} has a name that is not UTF-8, in which stores and tables "
                    "keep names. Rename the file."
                )

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def groups(self) -> NDArray[np.str_]:
        """What a split keeps together: the patient where known, else the study; shape ``(N,)``."""
        return assign_clusters(self.patient_ids, self.study_uids)

    def take(self, rows: NDArray[Any] | slice) -> Cohort:
        """Return the images at `rows` (indices, mask or slice), in that order."""
        return dataclasses.replace(
            self,
            image_ids=self.image_ids[rows],
            study_uids=self.study_uids[rows],
            patient_ids=self.patient_ids[rows],
            projections=self.projections[rows],
            targets=self.targets[rows],
        )


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


def load_labels(
    path: str | Path, image_ids: NDArray[np.str_]
) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Read the targets of given images from a CSV file of the user's own.

    The file names images in a column ``image_id`` (or ``filename``). Findings
    are either listed in a column ``label``, separated by ``;``, or have a
    column each: 1 present, 0 absent, blank unlabelled, -1 uncertain (read as
    unlabelled). Images that the file does not name are unlabelled; rows for
    other images are ignored.

    Parameters
    ----------
    path
        CSV file, read by :func:`read_csv`.
    image_ids
        The images wanted, shape ``(N,)``.

    Returns
    -------
    findings
        F names.
    targets
        Shape ``(N, F)``, float32, rows in the order of `image_ids`.

    Raises
    ------
    TableError
        The file cannot be read so, or names none of the images.
    """
    path = Path(path)
    table = read_csv(path)
    key = "filename" if "filename" in table and "image_id" not in table else "image_id"
    require_columns(table, (key,), path)
    require_unique(table, key, path)
    if "label" in table:
        findings = FINDINGS
        targets = parse_labels(
            table["label"].tolist(), source=str(path), lines=table.index.tolist()
        )
    else:
        findings, targets = parse_target_table(table, source=str(path))
    rows = pd.Index(table[key]).get_indexer(pd.Index(image_ids))  # (N,), -1 where not named
    if (rows < 0).all():
        raise TableError(
            f"{path} names none of the {len(image_ids)} images: its first {key} is "
            f"{table[key].iloc[0]!r}, theirs {str(image_ids[0])!r}. "
            "Image ids are paths relative to the image folder."
        )
    return findings, _take_or_nan(targets, rows)


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
    return _take_or_nan(of_reports, report_of_image)


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


def _take_or_nan(targets: NDArray[np.float32], rows: NDArray[Any]) -> NDArray[np.float32]:
    """Rows of `targets`, unlabelled where the row is -1."""
    unlabelled = np.full((1, targets.shape[1]), np.nan, np.float32)
    return np.asarray(np.concatenate([targets, unlabelled])[rows])  # -1 takes the last


def _to_array(cells: pd.Series[str]) -> NDArray[np.str_]:
    return np.asarray(cells.tolist(), np.str_)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
