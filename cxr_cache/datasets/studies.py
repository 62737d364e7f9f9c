"""Images -> the studies that they make, for models that see all views of a study at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import read_csv
from cxr_cache.common.wording import count, list_names
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.columns import read_views
from cxr_cache.datasets.locate import match_paths
from cxr_cache.datasets.splits import TEST, Split
from cxr_cache.errors import ConfigError, TableError

N_IMAGES: Final = "n_images"
"""Column of a table of studies: how many images each has."""
N_PROJECTIONS: Final = 2
"""Frontal and lateral, in this order; an image of unknown projection counts as frontal."""
_BETWEEN: Final = " + "


@dataclass(frozen=True, eq=False)
class Studies:
    """N images and the S studies that they make."""

    images: Cohort
    """The N images."""
    cohort: Cohort
    """A row per study, in the order in which their first images come.

    Its ``image_id`` is the study's uid, and other columns hold the values of its images, such as
    ``"Frontal + Lateral"``. A further column counts the images. A finding is present where any of
    the images has it, absent where one is labelled and none has it.
    """
    study_of: NDArray[np.int64]
    """The study of each image, ``(N,)``."""
    notes: tuple[str, ...]
    """What a reader of the results should know, in sentences."""

    def pick(self, studies: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the images of some studies, study by study, and the slot of each.

        Slot :data:`N_PROJECTIONS` k + p is that of projection p of the k-th of these studies.
        """
        order = np.argsort(self.study_of, kind="stable")
        n_images = np.bincount(self.study_of, minlength=len(self.cohort))
        first, n_each = (np.cumsum(n_images) - n_images)[studies], n_images[studies]
        place = np.repeat(np.arange(len(studies)), n_each)  # of the study of each image
        inside = np.arange(n_each.sum()) - np.repeat(np.cumsum(n_each) - n_each, n_each)
        rows = order[first[place] + inside]
        is_lateral = self.images.projections[rows] == "Lateral"
        return rows, N_PROJECTIONS * place + is_lateral

    def take_split(self, split: Split, rows: NDArray[np.intp]) -> Split:
        """Make the split of some images, at least one of each study, that of the studies.

        Raises
        ------
        ConfigError
            A study has images on several sides.
        """
        fold, studies = np.full(len(self.cohort), TEST, np.int64), self.study_of[rows]
        fold[studies] = split.fold
        if (differs := fold[studies] != split.fold).any():
            i = int(differs.argmax())
            sides = split.fold[i], fold[studies[i]]
            one, other = ("test" if side == TEST else f"fold {side + 1}" for side in sides)
            whose = split.whose and f" given by {split.whose}"
            raise ConfigError(
                f"Study {str(self.cohort.image_ids[studies[i]])!r} has images in {one} and {other} "
                f"of the split{whose}, and --level study needs whole studies. Make another split "
                "with --split new."
            )
        return replace(split, is_test=fold == TEST, fold=fold)


def group_by_study(images: Cohort) -> Studies:
    """Bring images together by study."""
    study_of, uids = pd.factorize(images.images["study_uid"])
    table = pd.DataFrame({"image_id": uids, "study_uid": uids})
    for name in images.images.columns.drop(["image_id", "study_uid"]):
        table[name] = _join_values(images.images[name], study_of, len(uids))
    table[N_IMAGES] = np.bincount(study_of)
    order = np.argsort(study_of, kind="stable")
    starts = np.flatnonzero(np.diff(study_of[order], prepend=-1))
    targets = images.targets[order]
    union = np.fmax.reduceat(targets, starts, axis=0)  # NaN where all are
    differ = (union != np.fmin.reduceat(targets, starts, axis=0)) & ~np.isnan(union)
    cohort = replace(images, images=table, targets=union)
    notes = tuple(_note(images, cohort, int(differ.any(axis=1).sum())))
    return Studies(images, cohort, study_of, notes)


def read_studies(path: str | Path | None, images: Sequence[str]) -> Studies:
    """Read which image files make a study, without labels.

    Parameters
    ----------
    path
        CSV with the columns image_id (the path of a file, or its end), study_uid and projection, in
        words such as Frontal, PA or LATERAL; further rows and columns do not matter. None takes
        every image for a study.
    images
        Paths of the images.

    Raises
    ------
    TableError
        The file cannot be read, or has no row for an image; or an image is listed twice.
    """
    if path is None:
        table = pd.DataFrame({"image_id": images, "study_uid": images})
        note = (
            f"Each of the {count(len(images), 'image')} is taken for a study of one frontal view. "
            "Name studies and projections in a CSV with --studies."
        )
        return replace(group_by_study(_without_labels(table)), notes=(note,))
    table = read_csv(Path(path))
    if missing := [name for name in ("image_id", "study_uid") if name not in table]:
        there = list_names([*map(str, table)])
        raise TableError(
            f"{path} has no column {missing[0]!r}; its columns are {there}. It needs image_id, "
            "study_uid and projection."
        )
    found = match_paths(table["image_id"].tolist(), images, f"{path}, image_id")
    row_of = {image: row for row, image in enumerate(found) if image is not None}
    if absent := [image for image in images if image not in row_of]:
        raise TableError(
            f"{path} has no row for {count(len(absent), 'image')}, the first is {absent[0]!r}. Add "
            "its study and projection, or leave it out."
        )
    views = table["projection"] if "projection" in table else pd.Series([""] * len(table))
    rows = [row_of[image] for image in images]
    uids = table["study_uid"].to_numpy()
    if blank := [image for image, uid in zip(images, uids[rows], strict=True) if not uid]:
        raise TableError(f"{path} names no study for {blank[0]!r}; write its study_uid.")
    of_images = {
        "image_id": images,
        "study_uid": uids[rows],
        "projection": read_views(views)[0][rows],
    }
    studies = group_by_study(_without_labels(pd.DataFrame(of_images)))
    if n_more := int(np.isin(uids, uids[rows]).sum()) - len(rows):
        note = f"{path} has {count(n_more, 'more image')} of these studies, not given here."
        return replace(studies, notes=(*studies.notes, note))
    return studies


def _without_labels(images: pd.DataFrame) -> Cohort:
    return Cohort(images, np.empty((len(images), 0), np.float32), ())


def _join_values(cells: pd.Series[Any], study_of: NDArray[np.int64], n: int) -> NDArray[Any]:
    """The different known values of each study's images, in order."""
    known = pd.DataFrame({"study": study_of, "cell": cells.to_numpy()})
    known = known[known["cell"] != ""].drop_duplicates().sort_values(["study", "cell"])
    joined = known.groupby("study")["cell"].agg(_BETWEEN.join)
    values: NDArray[Any] = joined.reindex(range(n), fill_value="").to_numpy()
    return values


def _note(images: Cohort, studies: Cohort, n_differ: int) -> Iterator[str]:
    of = f"of {count(len(studies), 'study')}"
    if n_differ:
        yield (
            f"The images of {n_differ:,} {of} disagree about a finding. A study has a finding if "
            "any of its images has it."
        )
    if n_unknown := int((images.projections == "").sum()):
        yield (
            f"{n_unknown:,} of {count(len(images), 'image')} have no known projection and count as "
            "frontal."
        )
    if not (studies.projections == f"Frontal{_BETWEEN}Lateral").any():
        yield f"None {of} is known to have a frontal and a lateral image."
