"""The image table: which images there are, of which study, with which targets."""

from __future__ import annotations

import copy
import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import find_duplicates
from cxr_cache.common.wording import count, list_names
from cxr_cache.errors import TableError
from cxr_cache.metrics.scores import Array

IMAGE_COLUMNS: Final = ("image_id", "study_uid", "patient_id", "projection")
"""Columns that every image table has, in this order; further ones follow them."""
FACTS: Final = ("sex", "age", "view_position")
"""Names of further columns, as readers give them where a data set has such facts about images."""
GIVEN: Final = ("given_split", "given_fold")
"""Names of further columns with the split that a data set comes with: ``"train"``, ``"val"``,
``"test"`` or ``""``, and the number of the fold."""
_OPTIONAL_COLUMNS: Final = ("patient_id", "projection")
RESERVED_COLUMNS: Final = frozenset({"split", "fold", "status", "error"})
"""Columns that tables of runs and stores have beside those of the image table."""


@dataclass(frozen=True)
class Reading:
    """How the tables of a data set were understood, for whoever describes or reports on it."""

    format: str
    """Name of the reader."""
    why: str = ""
    """Why ``auto`` took the data set for this; blank where the format was given."""
    columns: dict[str, str] = field(default_factory=dict)
    """What each column of the tables was used as, in words."""
    codes: dict[str, dict[str, int]] = field(default_factory=dict)
    """How often each label code was written, by finding."""
    counts: dict[str, int] = field(default_factory=dict)
    """How much there is, for the flow of images: ``rows`` of the table that names the images,
    ``images``, ``studies`` and ``patients`` that they make; and how many of each have labels of
    which none became 0 or 1 (``dropped_images`` ...)."""
    policy: str = ""
    """What was made of uncertain and blank cells, in words."""
    split: str = ""
    """Whose split the column ``given_split`` is; blank without one."""
    notes: tuple[str, ...] = ()
    """What a reader of the results should know, in sentences."""

    def to_text(self) -> str:
        """Say in a short table what the data set was taken for and what each column was used as.

        Notes are left out: they are warnings when the data set is read.
        """
        names_of: dict[str, list[str]] = {}
        for column, use in self.columns.items():
            kind, _, why = use.partition(": ")
            names_of.setdefault(kind, []).append(f"{column} ({why})" if why else column)
        if "finding" in names_of:  # at the end, as there are many
            names = names_of.pop("finding")
            names_of[count(len(names), "finding")] = names
        if "ignored" in names_of:
            names_of["ignored"] = names_of.pop("ignored")
        lines = [f"read as {self.format}{self.why and f': {self.why}'}"]
        for kind, names in names_of.items():
            first = f"  {kind + ':':<20} "
            lines.append(
                textwrap.fill(
                    list_names(names), 80, initial_indent=first, subsequent_indent=" " * len(first)
                )
            )
        if self.policy:
            lines.append(f"  {'label codes:':<20} {self.policy}")
        if self.split:
            lines.append(f"  {'split of:':<20} {self.split}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the same as JSON-able values."""
        return {**dataclasses.asdict(self), "notes": list(self.notes)}

    @classmethod
    def of_dict(cls, values: Any) -> Reading:
        """Make one of what :meth:`to_dict` gave, as JSON has it.

        Raises
        ------
        ValueError
            The values are of another form.
        """
        known = {of.name for of in dataclasses.fields(cls)}
        if not isinstance(values, dict) or not isinstance(values.get("format"), str):
            raise ValueError("this is not how a data set was read")
        made = cls(**{name: value for name, value in values.items() if name in known})
        texts = (made.format, made.why, made.policy, made.split, *made.notes)
        columns, codes, counts = made.columns, made.codes, made.counts
        if not (
            isinstance(columns, dict)
            and isinstance(codes, dict)
            and all(isinstance(of_finding, dict) for of_finding in codes.values())
            and all(isinstance(text, str) for text in (*texts, *columns.values()))
            and isinstance(counts, dict)
            and all(isinstance(n, int) for of in (*codes.values(), counts) for n in of.values())
        ):
            raise ValueError("this is not how a data set was read")
        return dataclasses.replace(made, notes=tuple(made.notes))


@dataclass(frozen=True, eq=False)
class Cohort:
    """N images in a fixed order, which is the order of the rows everywhere else.

    Attributes
    ----------
    images
        One row per image, all cells text, ``""`` where unknown, index 0 to N - 1. Columns:
        ``image_id``, the posix path of the file relative to the image folder, unique;
        ``study_uid``, the examination that the image belongs to; ``patient_id``, which all images
        of a study share; ``projection``, ``"Frontal"`` or ``"Lateral"``; and any further fact
        about images, such as ``sex`` or ``age``, which stores and tables of runs then carry along.
        Missing columns ``patient_id`` and ``projection`` are added blank; numbers become text.
    targets
        1 present, 0 absent, NaN unlabelled; shape ``(N, F)``, float32.
    findings
        Names of the F findings.
    source
        SHA-256 (hex) of each file that was read, by file name.
    reading
        How the data set's tables were understood; None where nobody has said so.

    Raises
    ------
    TableError
        A column is missing or has a name that is taken, an image is listed twice, a study has two
        patients, or the targets are of another shape or hold other values.

    Examples
    --------
    >>> images = pd.DataFrame({"image_id": ["1_a.png", "1_b.png"], "study_uid": ["1", "1"]})
    >>> cohort = Cohort(images.assign(age=57), np.zeros((2, 1), np.float32), ("Edema",))
    >>> cohort.images.loc[1].to_dict()
    {'image_id': '1_b.png', 'study_uid': '1', 'patient_id': '', 'projection': '', 'age': '57'}
    """

    images: pd.DataFrame
    targets: NDArray[np.float32]
    findings: tuple[str, ...]
    source: dict[str, str] = field(default_factory=dict)
    reading: Reading | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", _complete_table(self.images))
        n_images = len(self.images)
        if self.targets.shape != (n_images, len(self.findings)):
            raise TableError(
                f"targets of shape {self.targets.shape} for {n_images} images and "
                f"{len(self.findings)} findings"
            )
        if not (np.isnan(self.targets) | (self.targets == 0) | (self.targets == 1)).all():
            raise TableError("targets hold other values than 1, 0 and NaN")
        for name in self.images.columns:
            if name in RESERVED_COLUMNS or name in self.findings:
                taken = "a column of the tables of runs and stores"
                other = taken if name in RESERVED_COLUMNS else "a finding"
                raise TableError(
                    f"{name!r} is a column of the image table and the name of {other}; rename one."
                )
        if duplicates := find_duplicates(self.images["image_id"]):
            raise TableError(f"image {duplicates[0]!r} is listed twice; image ids must be unique")
        _require_utf8(self.images)
        require_one_patient_per_study(
            self.images["patient_id"].to_numpy(), self.images["study_uid"].to_numpy()
        )

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        n_studies = count(len(np.unique(self.study_uids)), "study")
        n_patients = len(set(self.patient_ids.tolist()) - {""})
        known = count(n_patients, "patient") if n_patients else "patients unknown"
        n_labelled = int(self.is_labelled.sum())
        return (
            f"Cohort of {count(len(self), 'image')} of {n_studies} ({known}), {n_labelled:,} of "
            f"them labelled\n"
            f"  {count(len(self.findings), 'finding')}: {list_names(self.findings, 5)}\n"
            f"  known of each image: {list_names([*self.images.columns])}"
        )

    @cached_property
    def is_labelled(self) -> NDArray[np.bool_]:
        """Whether a label of each image is known, ``(N,)``."""
        return np.atleast_1d((~np.isnan(self.targets)).any(axis=1))

    @cached_property
    def image_ids(self) -> NDArray[np.str_]:
        """Column ``image_id`` as an array, ``(N,)``."""
        return _to_array(self.images["image_id"])

    @cached_property
    def study_uids(self) -> NDArray[np.str_]:
        """Column ``study_uid`` as an array, ``(N,)``."""
        return _to_array(self.images["study_uid"])

    @cached_property
    def patient_ids(self) -> NDArray[np.str_]:
        """Column ``patient_id`` as an array, ``(N,)``; ``""`` where unknown."""
        return _to_array(self.images["patient_id"])

    @cached_property
    def projections(self) -> NDArray[np.str_]:
        """Column ``projection`` as an array, ``(N,)``; ``""`` where unknown."""
        return _to_array(self.images["projection"])

    @property
    def names_nobody(self) -> bool:
        """Whether each image stands for itself, since no patient is named and no study has two."""
        n_studies = len(np.unique(self.study_uids))
        return n_studies == len(self) > 1 and not (self.patient_ids != "").any()

    @cached_property
    def groups(self) -> NDArray[np.str_]:
        """What a split keeps together: the patient where known, else the study; shape ``(N,)``."""
        return assign_clusters(self.patient_ids, self.study_uids)

    def take(self, rows: NDArray[Any] | slice) -> Cohort:
        """Return the images at `rows` (indices, mask or slice), in that order."""
        return dataclasses.replace(self, images=self.images.iloc[rows], targets=self.targets[rows])

    def with_reading(self, reading: Reading) -> Cohort:
        """Return the same images with another account of how they were read."""
        same = copy.copy(self)  # checked before
        object.__setattr__(same, "reading", reading)
        return same

    def assign(self, **columns: Any) -> Cohort:
        """Return the same images with columns of the image table replaced or added.

        Parameters
        ----------
        columns
            Values by name, as :meth:`pandas.DataFrame.assign` takes them.
        """
        images = self.images.copy()
        for name, values in columns.items():
            # As objects: Arrow, where pandas has it, fails on names that are not UTF-8, and these
            # are to be refused in a sentence.
            cells = values if np.isscalar(values) else np.asarray(values, object)
            images[name] = pd.Series(cells, images.index, object)
        return dataclasses.replace(self, images=images)


def _complete_table(images: pd.DataFrame) -> pd.DataFrame:
    """The image table with all its columns in order, as text, counted from 0."""
    names = [str(name) for name in images.columns]
    if duplicates := find_duplicates(names):
        raise TableError(f"two columns of the image table are named {duplicates[0]!r}; rename one.")
    missing = [name for name in IMAGE_COLUMNS if name not in (*names, *_OPTIONAL_COLUMNS)]
    if missing:
        raise TableError(
            f"The image table has no column {missing[0]!r}; its columns are {', '.join(names)}."
        )
    cells = {name: _to_text(images.iloc[:, place]) for place, name in enumerate(names)}
    ordered = dict.fromkeys([*IMAGE_COLUMNS, *names])
    table: pd.DataFrame = pd.DataFrame(
        {name: pd.Series(cells.get(name, ""), range(len(images)), object) for name in ordered}
    )
    return table


def _to_text(column: pd.Series[Any]) -> NDArray[np.object_]:
    """Cells as text; equal ones are one object, as most studies and views recur."""
    cells = column.to_numpy(object)
    if pd.api.types.infer_dtype(cells, skipna=False) != "string":
        cells = np.array(["" if pd.isna(cell) else _write_cell(cell) for cell in cells], object)
    codes, known = pd.factorize(cells)
    return np.asarray(known[codes], object)


def _write_cell(cell: Any) -> str:
    """A number that pandas made a float, for a missing one among them, is whole again: 57."""
    return f"{cell:.15g}" if isinstance(cell, float) else str(cell)


def _require_utf8(images: pd.DataFrame) -> None:
    """Names of files may be any bytes; Python reads those outside UTF-8 as surrogates."""
    for name in images.columns:
        cells = images[name].tolist()
        if _is_utf8("".join(cells)):
            continue
        cell = next(cell for cell in cells if not _is_utf8(cell))
        if name == "image_id":
            raise TableError(
                f"image {cell!r} has a name that is not UTF-8, in which stores and tables keep "
                "names. Rename the file."
            )
        raise TableError(
            f"{name} {cell!r} is not UTF-8, in which stores and tables keep text. Write it anew."
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _to_array(cells: pd.Series[str]) -> NDArray[np.str_]:
    return np.asarray(cells.tolist(), np.str_)


def finding_table(
    cohort: Cohort, values: NDArray[np.float32], columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """Columns that say which image, then one per finding with `values`, ``(N, F)``.

    Parameters
    ----------
    columns
        Which columns of the image table; None takes all.
    """
    images = cohort.images if columns is None else cohort.images[list(columns)]
    of_findings = pd.DataFrame(values, columns=list(cohort.findings))
    table: pd.DataFrame = pd.concat([images, of_findings], axis=1)
    return table


# -- what is resampled, and kept together by splits --------------------------------------

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
