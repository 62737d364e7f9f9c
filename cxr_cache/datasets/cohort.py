"""The image table: which images there are, of which study, with which targets."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import (
    find_duplicates,
)
from cxr_cache.errors import TableError
from cxr_cache.metrics.scores import Array

Unit: TypeAlias = Literal["study", "patient", "patient or study"]
"""What the clusters of some rows are."""


UNITS: Final[dict[Unit, str]] = {
    "study": "studies",
    "patient": "patients",
    "patient or study": "patients or studies",
}
"""Several of each, in words."""


def assign_clusters(patient_ids: Array, study_uids: Array) -> Array:
    """The patient of every row where known, else its study, shape ``(N,)``.

    Two studies of one patient are as little evidence of their own as two images of one study.

    Parameters
    ----------
    patient_ids
        ``""`` where unknown, shape ``(N,)``.
    study_uids
        Shape ``(N,)``; all rows of a study name the same patient.
    """
    known = patient_ids != ""
    if not known.any():
        return study_uids
    of_patient = np.char.add("patient ", patient_ids.astype(str))
    of_study = np.char.add("study ", study_uids.astype(str))
    return np.where(known, of_patient, of_study)


def require_one_patient_per_study(patient_ids: Array, study_uids: Array, source: str = "") -> None:
    """Raise for a study of two patients, which would end up on both sides of a split.

    Raises
    ------
    TableError
        Its message begins with `source`.
    """
    pairs = pd.DataFrame({"study": study_uids, "patient": patient_ids}).drop_duplicates()
    duplicates = find_duplicates(pairs["study"])
    if duplicates:
        patients = pairs.loc[pairs["study"] == duplicates[0], "patient"]
        raise TableError(
            f"{source}study {duplicates[0]!r} belongs to patient {patients.iloc[0]!r} and to "
            f"patient {patients.iloc[1]!r}. Give all its images one patient id, or none."
        )


def name_unit(patient_ids: Array) -> Unit:
    """Which the clusters of such rows are."""
    known = patient_ids != ""
    if not known.any():
        return "study"
    return "patient" if known.all() else "patient or study"


logger = logging.getLogger(__name__)


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


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


IMAGE_COLUMNS: Final = ("image_id", "study_uid", "patient_id", "projection")
"""What a table of predictions says of every image; patients are needed for its intervals."""


def finding_table(
    cohort: Cohort, values: NDArray[np.float32], columns: Sequence[str]
) -> pd.DataFrame:
    """Columns that say which image, then one per finding with `values`, ``(N, F)``."""
    described = {
        "image_id": cohort.image_ids,
        "study_uid": cohort.study_uids,
        "patient_id": cohort.patient_ids,
        "projection": cohort.projections,
    }
    left = pd.DataFrame({name: described[name] for name in columns})
    table: pd.DataFrame = pd.concat(
        [left, pd.DataFrame(values, columns=list(cohort.findings))], axis=1
    )
    return table
