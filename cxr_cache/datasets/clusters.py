"""What a split keeps and a resample draws as a whole: patients where known, else studies."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import numpy as np
import pandas as pd

from cxr_cache.common.tables import find_duplicates
from cxr_cache.errors import TableError
from cxr_cache.metrics.scores import Array, FloatArray

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


def count_rarer_class(targets: Array, clusters: Array) -> FloatArray:
    """Clusters with a positive, or with a negative where those are fewer, of each finding.

    Parameters
    ----------
    targets
        1 present, 0 absent, NaN unlabelled, ``(N, F)``.
    clusters
        Of every row, ``(N,)``.

    Returns
    -------
    FloatArray
        Shape ``(F,)``.
    """
    counts = [
        min(len(np.unique(clusters[target == value])) for value in (0, 1)) for target in targets.T
    ]
    return np.array(counts, np.float64)


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
