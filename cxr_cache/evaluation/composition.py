"""What the two sides of a split hold: labels that are there and missing, ages and sexes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.datasets.codes import CODE_NAMES
from cxr_cache.datasets.cohort import assign_clusters, name_unit
from cxr_cache.datasets.studies import N_IMAGES
from cxr_cache.evaluation.scored import to_years

_STATES: Final = {"present": 1.0, "absent": 0.0, "unlabelled": np.nan}
WRITTEN: Final = tuple(f"written_{name}" for name in CODE_NAMES.values())


def count_labels(
    predictions: pd.DataFrame,
    targets: pd.DataFrame,
    findings: Sequence[str],
    codes: Mapping[str, Mapping[str, int]] | None = None,
) -> pd.DataFrame:
    """Count for each finding the images that have it, have it not, and say nothing of it.

    Parameters
    ----------
    predictions
        Columns image_id and split, ``"train"`` or ``"test"``.
    targets
        Columns image_id and one target per finding: 1, 0 or NaN.
    findings
        F names.
    codes
        How often each label code was written in the data set's tables, by finding, over all rows of
        the table: blank is what no report mentions, in data sets that are labelled by reports.

    Returns
    -------
    pd.DataFrame
        F rows: finding; for each side that there is, ``train_present``, ``train_absent``,
        ``train_unlabelled`` ...; and ``written_present`` ... ``written_blank``, where the codes are
        known.
    """
    side_of = predictions.set_index("image_id")["split"].reindex(targets["image_id"]).to_numpy()
    values = targets[list(findings)].to_numpy(np.float64)
    columns: dict[str, Any] = {"finding": list(findings)}
    for side in ("train", "test"):
        own = values[side_of == side]
        for state, value in _STATES.items():
            if len(own):
                is_state = np.isnan(own) if np.isnan(value) else own == value
                columns[f"{side}_{state}"] = is_state.sum(axis=0)
    if codes and any(finding in codes for finding in findings):
        for name, column in zip(CODE_NAMES.values(), WRITTEN, strict=True):
            columns[column] = pd.array(
                [codes[f].get(name, 0) if f in codes else pd.NA for f in findings], "Int64"
            )
    table: pd.DataFrame = pd.DataFrame(columns)
    return table


def describe_people(predictions: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Describe age and sex on each side of the split, as metrics.json has it.

    Ages are those of studies, since a patient grows older from one to the next, and sexes those of
    patients, or of studies where patients are unknown.

    Parameters
    ----------
    predictions
        Columns image_id, study_uid, projection and split; patient_id, sex and age, where known.

    Returns
    -------
    dict[str, dict[str, Any]]
        By side: ``n_images``, ``n_studies``, ``n_patients`` (None where none is named),
        ``projection`` (images by value), ``age`` and ``sex`` (None where no image has any).
    """
    ids = predictions.get("patient_id", pd.Series("", predictions.index, object))
    rows = predictions.assign(patient_id=ids.fillna("").astype(str))
    return {
        side: _describe_side(own)
        for side in ("train", "test")
        if len(own := rows[rows["split"] == side])
    }


def _describe_side(rows: pd.DataFrame) -> dict[str, Any]:
    patients = rows["patient_id"].to_numpy(object)
    n_images = rows[N_IMAGES].sum() if N_IMAGES in rows else len(rows)
    n_patients = len(set(patients) - {""})
    return {
        "n_images": int(n_images),
        "n_studies": int(rows["study_uid"].nunique()),
        "n_patients": n_patients or None,
        "projection": {
            str(value): int(n)
            for value, n in rows["projection"].replace("", "unknown").value_counts().items()
        },
        "age": _describe_ages(rows) if "age" in rows else None,
        "sex": _describe_sexes(rows, patients) if "sex" in rows else None,
    }


def _describe_ages(rows: pd.DataFrame) -> dict[str, Any]:
    """Years at the study; where its images differ, the first that is known counts."""
    years = to_years(rows["age"].fillna("").astype(str))
    of_study = years.groupby(rows["study_uid"]).first()  # leaves NaN out
    known = of_study.dropna().to_numpy()
    described = {"n_studies": len(known), "n_unknown": int(of_study.isna().sum())}
    if not len(known):
        return described
    low, first, median, third, high = np.percentile(known, (0, 25, 50, 75, 100)).tolist()
    return {
        **described,
        "mean": float(known.mean()),
        "std": float(known.std(ddof=1)) if len(known) > 1 else None,
        "median": median,
        "quartiles": [first, third],
        "range": [low, high],
    }


def _describe_sexes(rows: pd.DataFrame, patients: NDArray[np.object_]) -> dict[str, Any]:
    clusters = assign_clusters(patients, rows["study_uid"].to_numpy(object))
    sexes = rows["sex"].fillna("").astype(str)
    pairs = pd.DataFrame({"cluster": clusters, "sex": sexes.to_numpy()}).drop_duplicates()
    known = pairs[pairs["sex"] != ""]
    n_values = known.groupby("cluster")["sex"].nunique()
    alone = known[known["cluster"].isin(n_values.index[n_values == 1])]
    return {
        "unit": name_unit(patients),
        "n": {str(sex): int(n) for sex, n in alone["sex"].value_counts().sort_index().items()},
        "n_unknown": int(pairs["cluster"].nunique() - len(n_values)),
        "n_contradictory": int((n_values > 1).sum()),
    }
