"""Flow of images from a table to the test: how many are lost to what, and where the rest goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.datasets.cohort import Cohort, Reading

Kind: TypeAlias = Literal["left", "lost", "part", "shared", "of which"]
COLUMNS: Final = ("kind", "what", "images", "studies", "patients")
DROPPED: Final = "dropped_"
"""Prefix of those entries of :attr:`cxr_cache.datasets.cohort.Reading.counts` that count images
with labels of which none became 0 or 1."""


class Counts(NamedTuple):
    """How many images, and of how many studies and named patients."""

    images: int
    studies: int
    patients: int

    def minus(self, other: Counts) -> Counts:
        """The differences."""
        return Counts(*(mine - its for mine, its in zip(self, other, strict=True)))


def count_images(images: pd.DataFrame, rows: NDArray[Any] | slice = slice(None)) -> Counts:
    """Count some rows of an image table, all by default; images without a patient name none."""
    studies = images["study_uid"].to_numpy()[rows]
    patients = images["patient_id"].to_numpy()[rows] if "patient_id" in images else ()
    return Counts(len(studies), len(set(studies)), len(set(patients) - {""}))


def count_dropped(
    images: pd.DataFrame, targets: NDArray[np.float32], is_coded: NDArray[np.bool_]
) -> dict[str, int]:
    """Count images with labels of which none became 0 or 1, and what goes with them.

    Parameters
    ----------
    images
        N images.
    targets
        What was made of their label codes, ``(N, F)``.
    is_coded
        Whether some code of an image is not blank, ``(N,)``.

    Returns
    -------
    dict[str, int]
        ``dropped_images``, and the studies and patients of which all images are among them.
    """
    kept = ~(is_coded & np.isnan(targets).all(axis=1))
    lost = count_images(images).minus(count_images(images, kept))
    return {f"{DROPPED}{name}": n for name, n in lost._asdict().items()}


class Row(NamedTuple):
    """A line of the flow, in the words and numbers that ``flow.csv`` has."""

    kind: Kind
    """``left`` after the losses above it; ``lost``; ``part`` of what is left at the end, of which
    ``shared`` is in several; ``of which`` has more to say of a line and is subtracted nowhere."""
    what: str
    images: int | None
    """None, as of studies and patients, where it cannot be known."""
    studies: int | None
    patients: int | None


@dataclass(frozen=True, eq=False)
class Flow:
    """N images on their way to train and test, each lost to the first thing that it lacks.

    Studies and patients are lost with the last of their images. So numbers of each add up: what is
    left is what was left before, less what was lost in between, and the parts, less what is shared,
    are what is left at the end.
    """

    images: pd.DataFrame
    """The image table of all N, with ``study_uid`` and ``patient_id``."""
    is_left: NDArray[np.bool_]
    """Which of them have not been lost yet, ``(N,)``."""
    now: Counts
    """What the last line leaves."""
    rows: tuple[Row, ...]

    @classmethod
    def begin(cls, cohort: Cohort, table: Mapping[str, int], labels: Reading | None) -> Flow:
        """Count from the rows of the data set's table to the images whose labels can be used.

        Parameters
        ----------
        cohort
            N images.
        table
            What :attr:`cxr_cache.datasets.cohort.Reading.counts` says of the data set's table;
            without it, the flow begins with the N images.
        labels
            How the labels of these images were read, where that is known.
        """
        here = count_images(cohort.images)
        flow, read = cls(cohort.images, np.ones(len(cohort), bool), here, ()), here
        if "rows" in table:
            read = Counts(table["images"], table["studies"], table["patients"])
            flow = replace(flow, now=read._replace(images=table["rows"]))
            flow = flow.reach("rows of the table")._lose("more rows of the same image", read)
            flow = flow.reach("images of the table") if read.images < table["rows"] else flow
            flow = flow._lose("not in the store (--limit, --part)", here)
        if not flow.rows or read != here:
            flow = flow.reach("images of the store")
        dropped = {} if labels is None else labels.counts
        is_whole = table.get("images", len(cohort)) == len(cohort)  # else these are of more images
        if labels is not None and is_whole and dropped.get(f"{DROPPED}images"):
            lost = Counts(*(dropped[f"{DROPPED}{name}"] for name in Counts._fields))
            why = f"no label but those that are left out ({labels.policy})"
            flow = flow._lose(why, here.minus(lost))
        return flow

    def lose(self, why: str, lost: NDArray[Any]) -> Flow:
        """Lose images, given as a mask ``(N,)`` or as row numbers; some may be lost already."""
        is_left = self.is_left.copy()
        is_left[lost] = False
        return replace(self, is_left=is_left)._lose(why, count_images(self.images, is_left))

    def reach(self, what: str) -> Flow:
        """Add a line that says what is left now."""
        return self._add("left", what, self.now)

    def divide(self, is_test: NDArray[np.bool_], n_folds: int, files: NDArray[Any] | None) -> Flow:
        """Add the two sides of the split, and which images have a file that another has too.

        Parameters
        ----------
        is_test
            Side of each of the M images left, ``(M,)``.
        n_folds
            Number of folds that the train images are divided into.
        files
            Digest of the file of each, ``(M, B)``; None where they are not known.
        """
        left = self.images[self.is_left]
        train, test = count_images(left, ~is_test), count_images(left, is_test)
        flow = self.reach("images to train and test on")
        flow = flow._add("part", f"train, in {n_folds} folds" if n_folds > 1 else "train", train)
        if "given_split" in left and (val := (left["given_split"] == "val") & ~is_test).any():
            flow = flow._add(
                "of which", "train images that are val in the given split", count_images(left, val)
            )
        if test.images:  # a nested cross-validation sets none aside
            flow = flow._add("part", "test", test)
        shared = Counts(*(a + b - n for a, b, n in zip(train, test, flow.now, strict=True)))
        if any(shared):
            flow = flow._add("shared", "in train and in test", shared)
        return flow._count_copies(left, is_test, files)

    def _count_copies(
        self, left: pd.DataFrame, is_test: NDArray[np.bool_], files: NDArray[Any] | None
    ) -> Flow:
        """Duplicates are kept, since labels and studies may tell why there are two."""
        if files is None:
            unknown = "images with the same file cannot be told, as imported features name no file"
            return replace(self, rows=(*self.rows, Row("of which", unknown, None, None, None)))
        _, code, n_same = np.unique(files, axis=0, return_inverse=True, return_counts=True)
        code = code.reshape(-1)
        is_copy = n_same[code] > 1
        flow = self._add(
            "of which", "images with the same file as another", count_images(left, is_copy)
        )
        across = is_test & np.isin(code, code[~is_test])
        if across.any():
            what = "test images with the same file as a train image"
            flow = flow._add("of which", what, count_images(left, across))
        return flow

    def to_table(self) -> pd.DataFrame:
        """The lines, as ``flow.csv`` has them; patients are blank where nobody names any."""
        table = parse_flow(pd.DataFrame(self.rows, columns=list(COLUMNS)))
        if not (self.images["patient_id"] != "").any() and not table["patients"].any():
            table["patients"] = pd.NA
        return table

    def _lose(self, why: str, left: Counts) -> Flow:
        lost = self.now.minus(left)
        return replace(self, now=left)._add("lost", why, lost) if any(lost) else self

    def _add(self, kind: Kind, what: str, counts: Counts) -> Flow:
        return replace(self, rows=(*self.rows, Row(kind, what, *counts)))


def parse_flow(table: pd.DataFrame) -> pd.DataFrame:
    """Make the numbers of a flow whole, which pandas reads as fractions beside blank cells."""
    parsed: pd.DataFrame = table.astype(dict.fromkeys(Counts._fields, "Int64"))
    return parsed


def format_flow(table: pd.DataFrame) -> list[str]:
    """Lines for a terminal of what :func:`parse_flow` gives."""
    names = [name for name in Counts._fields if table[name].notna().any()]
    marks = {"left": "", "lost": "- ", "part": "  ", "shared": "  - ", "of which": "    of which "}
    lines = [f"Flow, {' / '.join(names)}:"]
    for row in table.to_dict("records"):
        numbers = [f"{row[name]:,}" for name in names if not pd.isna(row[name])]
        mark = marks[row["kind"]] if numbers else ""
        lines.append(f"  {' / '.join(numbers):>{8 * len(names)}}  {mark}{row['what']}")
    return lines
