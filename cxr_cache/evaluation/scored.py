"""Rows that have both targets and probabilities: images, studies, groups of images."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import find_duplicates, read_csv, require_unique
from cxr_cache.common.wording import count, list_names
from cxr_cache.datasets.cohort import (
    Unit,
    assign_clusters,
    name_unit,
    require_one_patient_per_study,
)
from cxr_cache.datasets.studies import N_IMAGES
from cxr_cache.errors import RunError, TableError
from cxr_cache.metrics.operating_point import OperatingPoint
from cxr_cache.metrics.scores import FloatArray, count_clusters, number_names
from cxr_cache.models.run import Run

logger = logging.getLogger(__name__)

AGE_BANDS: Final = (0, 18, 40, 60, 80)
"""First year of each band; the last has no end."""
OLDEST: Final = 120
"""Years; more is a mistake of the data set, as NIH's 414 is."""
MAX_GROUP_VALUES: Final = 20
_KEYS_OF_GROUPS: Final = ("image_id", "study_uid")
_CLASHES: Final = {
    ("projection",): "figures by projection are those of the image table's own",
    ("age", "age_band"): "its column 'age' becomes that",
}
"""Columns that a table of groups may not have, or not together, and why not the last of them."""


@dataclass(frozen=True, eq=False)
class ScoredImages:
    """Rows that have both targets and probabilities: images, or studies.

    Attributes
    ----------
    image_ids, study_uids, projections
        Shape ``(N,)``; a study carries its own uid as its image_id and no projection.
    patient_ids
        ``""`` where unknown, shape ``(N,)``. All rows of a study name the same patient.
    targets
        1 present, 0 absent, NaN unlabelled; shape ``(N, F)``.
    probabilities
        In [0, 1], shape ``(N, F)``, float64.
    findings
        Names of the F findings.
    groups
        What the images are divided by, such as sex, name to values of shape ``(N,)``; ``""`` where
        unknown.
    n_images
        How many images each row stands for, ``(N,)``; None where the rows are images.
    folds
        Outer fold of each row, from 0, whose model scored it, ``(N,)``; None where one model scored
        all. Whole patients are in one fold.
    """

    image_ids: NDArray[np.object_]
    study_uids: NDArray[np.object_]
    patient_ids: NDArray[np.object_]
    projections: NDArray[np.object_]
    targets: FloatArray
    probabilities: FloatArray
    findings: tuple[str, ...]
    groups: dict[str, NDArray[np.object_]] = field(default_factory=dict)
    n_images: NDArray[np.int64] | None = None
    folds: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def n_studies(self) -> int:
        """Number of different studies."""
        return int(self._studies.max(initial=-1)) + 1

    @cached_property
    def clusters(self) -> NDArray[np.intp]:
        """What intervals resample as a whole: the patient where known, else the study, ``(N,)``.

        They are numbered in the order of their names.
        """
        return number_names(assign_clusters(self.patient_ids, self.study_uids))[1]

    @cached_property
    def _studies(self) -> NDArray[np.intp]:
        return number_names(self.study_uids)[1]

    @property
    def unit(self) -> Unit:
        """What the clusters are."""
        return name_unit(self.patient_ids)

    @property
    def rows(self) -> Literal["images", "studies"]:
        """What the rows are."""
        return "images" if self.n_images is None else "studies"

    def count_images(self, cells: NDArray[np.bool_] | None = None) -> Any:
        """Images of the rows with such a cell, per finding, ``(N, F)`` -> ``(F,)``; or of all."""
        n_each = np.ones(len(self), np.int64) if self.n_images is None else self.n_images
        return int(n_each.sum()) if cells is None else n_each @ cells

    def count_studies(self, cells: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Studies with at least one such cell, per finding, ``(N, F)`` -> ``(F,)``."""
        return count_clusters(cells, self._studies)

    def count_clusters(self, cells: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Clusters with at least one such cell, per finding, ``(N, F)`` -> ``(F,)``."""
        return count_clusters(cells, self.clusters)

    def take(self, rows: NDArray[Any]) -> ScoredImages:
        """Rows by number or mask."""
        return ScoredImages(
            self.image_ids[rows],
            self.study_uids[rows],
            self.patient_ids[rows],
            self.projections[rows],
            self.targets[rows],
            self.probabilities[rows],
            self.findings,
            {name: values[rows] for name, values in self.groups.items()},
            None if self.n_images is None else self.n_images[rows],
            None if self.folds is None else self.folds[rows],
        )

    def with_probabilities(self, probabilities: FloatArray) -> ScoredImages:
        """The same rows with other probabilities, ``(N, F)``."""
        return replace(self, probabilities=probabilities)

    def by_fold(self) -> list[ScoredImages]:
        """The rows of each outer fold; all of them where there is one model."""
        if self.folds is None:
            return [self]
        return [self.take(self.folds == fold) for fold in np.unique(self.folds)]

    def by_group(self) -> Iterator[tuple[str, str, ScoredImages]]:
        """Name, value and images of every group whose value is known; projections come first."""
        for name, values in {"projection": self.projections, **self.groups}.items():
            for value in sorted(set(values) - {""}):
                yield name, value, self.take(values == value)

    def by_study(self) -> ScoredImages:
        """One row per study: probabilities averaged, a finding present where any image has it."""
        if not len(self):
            return self
        order = np.argsort(self._studies, kind="stable")  # brings the rows of each together
        starts = np.flatnonzero(np.diff(self._studies[order], prepend=-1))
        uids = self.study_uids[order][starts]
        n_rows = np.diff(np.append(starts, len(order)))
        return ScoredImages(
            image_ids=uids,
            study_uids=uids,
            patient_ids=self.patient_ids[order][starts],
            projections=np.full(len(uids), "", dtype=object),
            targets=np.fmax.reduceat(self.targets[order], starts, axis=0),  # NaN only if all are
            probabilities=np.add.reduceat(self.probabilities[order], starts, axis=0)
            / n_rows[:, None],
            findings=self.findings,
            n_images=n_rows
            if self.n_images is None
            else np.add.reduceat(self.n_images[order], starts),
            folds=None if self.folds is None else self.folds[order][starts],
        )


def parse_predictions(
    predictions: pd.DataFrame, targets: pd.DataFrame, findings: Sequence[str]
) -> ScoredImages:
    """Join predictions with targets by image_id, in the order of the predictions.

    Parameters
    ----------
    predictions
        Columns image_id, study_uid, projection and one probability per finding; patient_id, blank
        where unknown, if there is any. Rows that are whole studies have their uid as image_id too,
        and a column n_images.
    targets
        Columns image_id and one target per finding: 1, 0 or NaN. More rows than predictions are
        fine.
    findings
        What to score; the F columns to take from both.

    Raises
    ------
    TableError
        A column is missing, an image has no row of targets or two of either, a target is none of
        1, 0 and NaN, or a probability lies outside [0, 1].
    """
    findings = tuple(findings)
    columns = ("image_id", "study_uid", "projection", *findings)
    _require_columns(predictions, columns, "predictions")
    _require_columns(targets, ("image_id", *findings), "targets")
    for name, table in (("predictions", predictions), ("targets", targets)):
        if twice := find_duplicates(table["image_id"]):
            raise TableError(f"{name}: image_id {twice[0]!r} has more than one row; keep one.")
    index = pd.Index(targets["image_id"])
    rows = index.get_indexer(pd.Index(predictions["image_id"]))
    if (rows < 0).any():
        missing = predictions["image_id"].to_numpy()[rows < 0]
        raise TableError(
            f"targets: no row for {count(len(missing), 'predicted image')}, the first is "
            f"{missing[0]!r}. Use the table of the same cohort."
        )
    image_ids = predictions["image_id"].to_numpy(object)
    probabilities = predictions[list(findings)].to_numpy(np.float64)
    _require_probabilities(probabilities, image_ids, findings)
    wanted = targets[list(findings)].to_numpy(np.float64)[rows]
    _require_targets(wanted, image_ids, findings)
    patient_ids = _parse_patient_ids(predictions)
    require_one_patient_per_study(
        patient_ids, predictions["study_uid"].to_numpy(object), "predictions: "
    )
    return ScoredImages(
        image_ids=image_ids,
        study_uids=predictions["study_uid"].to_numpy(object),
        patient_ids=patient_ids,
        projections=predictions["projection"].to_numpy(object),
        targets=wanted,
        probabilities=probabilities,
        findings=findings,
        n_images=_read_numbers_of_images(predictions),
    )


def _read_numbers_of_images(predictions: pd.DataFrame) -> NDArray[np.int64] | None:
    """How many images each study has, where the rows are studies."""
    of_studies = (predictions["image_id"] == predictions["study_uid"]).all()
    if N_IMAGES not in predictions or not of_studies:
        return None
    return predictions[N_IMAGES].to_numpy(np.int64)


def find_groups(predictions: pd.DataFrame) -> dict[str, NDArray[np.object_]]:
    """Find groups that need no table of their own: sex and age, where the image table has them.

    Parameters
    ----------
    predictions
        As :func:`parse_predictions` takes them; columns ``sex`` and ``age``, in years, if there are
        any.

    Returns
    -------
    dict[str, NDArray[np.object_]]
        ``sex`` as written and ``age_band``, ``(N,)`` each, ``""`` where unknown; without those that
        are unknown of every image.
    """
    groups: dict[str, NDArray[np.object_]] = {}
    if "sex" in predictions:
        sexes = predictions["sex"].fillna("").astype(str).to_numpy(object)
        groups["sex"] = sexes
        if (n_values := len(set(sexes) - {""})) > MAX_GROUP_VALUES:
            logger.warning(
                "The column sex has %d values, so figures are not computed by sex.", n_values
            )
            del groups["sex"]
    if "age" in predictions:
        written = predictions["age"].fillna("").astype(str)
        years = to_years(written)
        if n_strange := int(((written != "") & years.isna()).sum()):
            logger.warning(
                "%s of the column age are no number of years from 0 to %d; these images belong to "
                "no age band.",
                count(n_strange, "value"),
                OLDEST,
            )
        groups["age_band"] = _name_bands(years)
    return {name: values for name, values in groups.items() if (values != "").any()}


def _parse_patient_ids(predictions: pd.DataFrame) -> NDArray[np.object_]:
    """As text, ``""`` where blank; runs of earlier versions lack the column."""
    if "patient_id" not in predictions:
        return np.full(len(predictions), "", object)
    cells = predictions["patient_id"].to_numpy(object)
    return np.where(pd.isna(cells), "", cells.astype(str)).astype(object)


def _require_columns(table: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise TableError(f"{name}: no column {', '.join(map(repr, missing))}.")


def _require_probabilities(
    probabilities: FloatArray, image_ids: NDArray[np.object_], findings: tuple[str, ...]
) -> None:
    outside = ~((probabilities >= 0) & (probabilities <= 1))  # NaN too
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise TableError(
            f"predictions: {image_ids[row]} has {probabilities[row, column]} for "
            f"{findings[column]!r}, which is no probability."
        )


def _require_targets(
    targets: FloatArray, image_ids: NDArray[np.object_], findings: tuple[str, ...]
) -> None:
    strange = ~(np.isnan(targets) | (targets == 0) | (targets == 1))
    if strange.any():
        row, column = np.argwhere(strange)[0]
        raise TableError(
            f"targets: {image_ids[row]} has {targets[row, column]:g} for {findings[column]!r}; "
            "write 1 for present, 0 for absent, and leave blank what is uncertain or unknown."
        )


def join_groups(images: ScoredImages, path: str | Path) -> ScoredImages:
    """Give images the groups of a CSV, to be evaluated one by one.

    Parameters
    ----------
    images
        N rows.
    path
        CSV with a column image_id or study_uid, each value once, and one column per grouping, such
        as sex. A column ``age``, in years, becomes ``age_band``. Blank cells, and images without
        a row, belong to no group.

    Raises
    ------
    TableError
        The file is broken, knows none of the images, or has a column of too many values or of a
        name that is taken.
    """
    path = Path(path)
    key, table = read_groups(path)
    ids = images.image_ids if key == "image_id" else images.study_uids
    rows = pd.Index(table[key]).get_indexer(pd.Index(ids))
    if (rows < 0).all():
        raise TableError(
            f"{path} has no row for any of the {count(len(ids), 'image')}: its first {key} is "
            f"{table[key].iloc[0]!r}, the first of the images {ids[0]!r}."
            + (" Its rows are studies: name them by study_uid." if images.rows == "studies" else "")
        )
    groups = dict(images.groups)
    for name in table.columns.drop([name for name in _KEYS_OF_GROUPS if name in table]):
        values = np.where(rows < 0, "", table[name].to_numpy(object)[rows])
        _require_few(values, name, path)
        groups[str(name)] = values
    return replace(images, groups=groups)


def read_groups(path: Path) -> tuple[str, pd.DataFrame]:
    """Read such a CSV: the column that names its rows, and the table with ages as bands.

    Raises
    ------
    TableError
        The file is broken.
    """
    table = read_csv(path)
    key = next((name for name in _KEYS_OF_GROUPS if name in table), None)
    if key is None or len(table.columns) == 1:
        raise TableError(
            f"{path} needs a column image_id or study_uid, and a column to group by, such as sex; "
            f"its columns are {list_names(list(table.columns))}."
        )
    require_unique(table, key, path)
    for names, reason in _CLASHES.items():
        if set(names) <= set(table):
            raise TableError(
                f"{path} has a column {names[-1]!r}, but {reason}. Give it another name."
            )
    if "age" in table:
        table = table.assign(age_band=_to_age_bands(table["age"], path)).drop(columns="age")
    return key, table


def _to_age_bands(ages: pd.Series[str], path: Path) -> NDArray[np.object_]:
    years = to_years(ages)
    broken = (ages != "") & years.isna()
    if broken.any():
        first = int(broken.to_numpy().argmax())
        raise TableError(
            f"{path}, line {ages.index[first]}: age {ages.iloc[first]!r} is not a number of years."
        )
    return _name_bands(years)


def to_years(ages: pd.Series[str]) -> pd.Series[float]:
    """Read ages as numbers of years, NaN where it is none that a person can reach."""
    numbers = pd.to_numeric(ages.to_numpy(object), errors="coerce").astype(float)
    is_age = (numbers >= 0) & (numbers <= OLDEST)
    return pd.Series(np.where(is_age, numbers, np.nan), ages.index)


def _name_bands(years: pd.Series[float]) -> NDArray[np.object_]:
    """Such as ``"40-59"``, ``""`` where the age is unknown."""
    ends = [f"-{end - 1}" for end in AGE_BANDS[1:]] + ["+"]
    labels = np.array([f"{first}{end}" for first, end in zip(AGE_BANDS, ends, strict=True)], object)
    bands = np.searchsorted(AGE_BANDS, years.fillna(0), side="right") - 1
    banded: NDArray[np.object_] = np.where(years.isna(), "", labels[bands])
    return banded


def _require_few(values: NDArray[np.object_], column: str, path: Path) -> None:
    n_values = len(set(values) - {""})
    if n_values > MAX_GROUP_VALUES:
        raise TableError(
            f"{path}: column {column!r} has {n_values} values among the images, and at most "
            f"{MAX_GROUP_VALUES} groups are evaluated. Make classes of it, or leave it out."
        )


def read_trainings(run: Run) -> list[ScoredImages]:
    """Test predictions of every training of a run, calibrated as its first, whose model it keeps.

    A run without repeats has one. Errors are those of :func:`read_scored`.
    """
    if not run.has_table("repeats"):
        return [read_scored(run)]
    table, targets = run.read_table("repeats"), run.read_table("targets")
    trainings = [
        parse_predictions(part, targets, run.config["findings"])
        for _, part in table.groupby("repeat")
    ]
    calibrate = run.calibration.apply
    return [each.with_probabilities(calibrate(each.probabilities)) for each in trainings]


def read_scored(
    run: Run, rows: Literal["test", "train", "out_of_fold"] = "test", *, calibrated: bool = True
) -> ScoredImages:
    """Predictions that a run stored, with their targets.

    Parameters
    ----------
    run
        A finished run.
    rows
        ``"test"`` and ``"train"`` are by the final model, ``"out_of_fold"`` by the fold model that
        has not seen the row. Of a nested run, ``"test"`` are all rows, each by the final model of
        its outer fold.
    calibrated
        Apply the run's calibration; the tables hold what the model itself says.

    Raises
    ------
    TableError
        The run's tables do not fit each other.
    RunError
        One of them is missing.
    """
    if rows == "test" and run.is_nested:
        images, points = read_outer_folds(run)
        return apply_calibrations(images, points) if calibrated else images
    table = run.read_table("out_of_fold" if rows == "out_of_fold" else "predictions")
    if rows != "out_of_fold":
        table = table[table["split"] == rows]
    images = parse_predictions(table, run.read_table("targets"), run.config["findings"])
    if not calibrated:
        return images
    return images.with_probabilities(run.calibration.apply(images.probabilities))


def read_outer_folds(run: Run) -> tuple[ScoredImages, tuple[OperatingPoint, ...]]:
    """Test predictions of a nested run, each by its outer fold's model, and how they are read.

    They are not calibrated, come in the order of the run's targets, and have groups such as sex.

    Raises
    ------
    RunError
        A fold's run is missing, or was trained on other rows than the whole.
    """
    outer = run.outer_runs
    tables = [part.predictions[lambda table: table["split"] == "test"] for part in outer]
    table = pd.concat([of.assign(_fold=k) for k, of in enumerate(tables)], ignore_index=True)
    targets = run.read_table("targets")
    order = pd.Index(table["image_id"]).get_indexer(pd.Index(targets["image_id"]))
    if len(table) != len(targets) or (order < 0).any():
        raise RunError(
            f"The outer folds of {run.path} test {len(table):,} {run.level} rows and the run has "
            f"{len(targets):,}, each of which belongs to one fold. Train it again with --overwrite."
        )
    table = table.iloc[order].reset_index(drop=True)
    folds = table.pop("_fold").to_numpy(np.int64)
    images = parse_predictions(table, targets, run.config["findings"])
    images = replace(images, groups=find_groups(table), folds=folds)
    return images, tuple(part.operating_point for part in outer)


def apply_calibrations(images: ScoredImages, points: Sequence[OperatingPoint]) -> ScoredImages:
    """Calibrate the rows of each outer fold as its model does."""
    assert images.folds is not None
    probabilities = np.empty_like(images.probabilities)
    for fold, point in enumerate(points):
        rows = images.folds == fold
        probabilities[rows] = point.calibration.apply(images.probabilities[rows])
    return images.with_probabilities(probabilities)
