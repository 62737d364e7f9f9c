"""A run and the images of another store -> which of them the run knows already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.wording import count, find_differences
from cxr_cache.config import AuditConfig
from cxr_cache.errors import CxrCacheError, StoreMismatchError
from cxr_cache.evaluation.audit import CLOSE, SAME_FILE
from cxr_cache.evaluation.audit_images import find_neighbours
from cxr_cache.models.run import Run
from cxr_cache.store.feature_store import FeatureStore

SAME_NAME: Final = "same name"
"""Of files that were not compared, since a store keeps no digests of them or is not there."""
COLUMNS: Final = ("image_id", "run_image_id", "run_split", "evidence", "distance")
_MIN_ROWS: Final = 3
_TOO_GOOD: Final = "figures on images that it was trained on are too good"


@dataclass(frozen=True, eq=False)
class Overlap:
    """Images of another store that are, or may be, the run's own."""

    table: pd.DataFrame
    """As ``overlap.csv``, with the columns :data:`COLUMNS`: a row for every pair."""
    n_images: int
    """Images that were looked at."""
    n_patients: int
    """Patients whose ids the run's data have too."""
    n_images_of_patients: int
    """Their images."""
    note: str
    """Why bytes and embeddings could not be compared; empty where they could."""

    def count(self, *evidence: str) -> int:
        """Images for which there is such evidence."""
        return int(self.table.loc[self.table["evidence"].isin(evidence), "image_id"].nunique())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of the figures has to know, a sentence or two each."""
        return tuple(self._warn())

    def _warn(self) -> Iterator[str]:
        of = f"of the {self.n_images:,} images"
        if n := self.count(SAME_FILE, SAME_NAME):
            n_named = self.count(SAME_NAME)
            known = self.table[self.table["evidence"].isin((SAME_FILE, SAME_NAME))]
            n_train = known.loc[known["run_split"] == "train", "image_id"].nunique()
            by_name = f", {n_named:,} of them by their names alone" if n_named else ""
            yield (
                f"{n:,} {of} {'belongs' if n == 1 else 'belong'} to the run's own data{by_name}: "
                f"{n_train:,} to its train split, {n - n_train:,} to its test split; {_TOO_GOOD}."
            )
        if n := self.count(CLOSE):
            yield (
                f"{n:,} {of} {'is' if n == 1 else 'are'} near-identical to images of the run's own "
                "data by their embeddings (not verified as pictures); overlap.csv names "
                f"{'it' if n == 1 else 'them'}. If they are the same, {_TOO_GOOD}."
            )
        if self.n_patients:
            yield (
                f"{count(self.n_patients, 'patient')} ({count(self.n_images_of_patients, 'image')})"
                " have an id that a patient of the run's own data has. If they are the same "
                f"persons, figures are too good; ids of two hospitals may also be equal by chance."
            )
        if self.note:
            yield self.note

    def to_dict(self) -> dict[str, Any]:
        """What metrics.json says."""
        return {
            "n_same_file": self.count(SAME_FILE),
            "n_same_name": self.count(SAME_NAME),
            "n_near_identical": self.count(CLOSE),
            "n_same_patients": self.n_patients,
            "n_images_of_same_patients": self.n_images_of_patients,
            "note": self.note,
        }


def find_overlap(run: Run, store: FeatureStore, scored: pd.DataFrame) -> Overlap:
    """Compare images of a store with those of a run, as far as the run's own store is there.

    Bytes are compared by the SHA-256 that stores keep. Embeddings are compared as ``audit`` does
    (:func:`cxr_cache.evaluation.audit_images.find_neighbours`), and patients by their ids.

    Parameters
    ----------
    run
        A finished run.
    store
        Of the same encoder.
    scored
        Columns image_id and patient_id of those of its images that are scored, N of them; of a run
        of whole studies, the column study_uid names their images.
    """
    images = scored
    if run.level == "study":
        images = store.cohort.take(store.embedded_rows).images
        images = images[images["study_uid"].isin(scored["study_uid"])]
    predictions = run.read_table("predictions")
    known = run.read_table("splits").set_index("image_id")
    rows = pd.Index(store.image_ids).get_indexer(pd.Index(images["image_id"]))
    patients = images["patient_id"]
    is_known = (patients != "") & patients.isin(set(predictions.get("patient_id", ())))
    theirs, note = _read_files(store, rows), ""
    ours = _Files(known.index.to_numpy(str), np.full(len(known), "", object), None)
    try:
        ours = _read_own_files(run, ours.image_ids)
    except CxrCacheError as error:
        note = (
            "Which images are the run's own was told by their names alone, since the store that "
            f"it was trained on cannot be compared: {error}"
        )
    table = _find_pairs(theirs, ours)
    table["run_split"] = known["split"].reindex(table["run_image_id"]).to_numpy()
    ordered: pd.DataFrame = table[list(COLUMNS)]
    return Overlap(ordered, len(rows), patients[is_known].nunique(), int(is_known.sum()), note)


@dataclass(frozen=True, eq=False)
class _Files:
    image_ids: NDArray[np.str_]
    digests: NDArray[np.object_]
    """SHA-256 of each file as text, ``""`` where the store has none (imported embeddings)."""
    embeddings: NDArray[np.float32] | None


def _read_own_files(run: Run, image_ids: NDArray[np.str_]) -> _Files:
    """What the run's own store knows of the run's images.

    Raises
    ------
    StoreNotFoundError, StoreFormatError, StoreMismatchError
        It is not there, or is not the store of before.
    """
    with FeatureStore.open(run.config["store"]["path"]) as own:
        differences = find_differences(own.header.encoder, run.config["store"]["encoder"])
        rows = np.intersect1d(np.flatnonzero(np.isin(own.image_ids, image_ids)), own.embedded_rows)
        if differences or not len(rows):
            raise StoreMismatchError(f"{own.path} was written anew since.")
        return _read_files(own, rows)


def _read_files(store: FeatureStore, rows: NDArray[np.intp]) -> _Files:
    digests = np.asarray(store.read_column("image_sha256"))[rows]
    text = [digest.tobytes().hex() if digest.any() else "" for digest in digests]
    embeddings = np.array(store.read_rows("embeddings", rows)[:, 0])
    return _Files(store.image_ids[rows], np.array(text, object), embeddings)


def _find_pairs(theirs: _Files, ours: _Files) -> pd.DataFrame:
    """Images that are one or may be, each with the strongest evidence of any of the run's."""
    files, own_files = (
        pd.DataFrame({name: files.image_ids, "digest": files.digests})
        for files, name in ((theirs, "image_id"), (ours, "run_image_id"))
    )
    same_file = files[files["digest"] != ""].merge(own_files, on="digest")
    same_name = files.merge(own_files, left_on="image_id", right_on="run_image_id")
    differ = (same_name["digest_x"] != "") & (same_name["digest_y"] != "")  # one name, two files
    found = [
        same_file.assign(evidence=SAME_FILE, distance=np.nan),
        same_name[~differ].assign(evidence=SAME_NAME, distance=np.nan),
    ]
    if ours.embeddings is not None and theirs.embeddings is not None:
        found.append(_find_close(theirs, ours))
    columns = ["image_id", "run_image_id", "evidence", "distance"]
    every = pd.concat([part[columns] for part in found], ignore_index=True)
    table: pd.DataFrame = every.drop_duplicates("image_id", ignore_index=True)
    return table


def _find_close(theirs: _Files, ours: _Files) -> pd.DataFrame:
    """Pairs that lie closer together than unrelated images do, nearest first."""
    assert theirs.embeddings is not None
    assert ours.embeddings is not None
    n = len(theirs.embeddings)
    both = np.concatenate([theirs.embeddings, ours.embeddings])
    pairs, distances = np.empty((0, 2), np.intp), np.empty(0)
    if len(both) >= _MIN_ROWS:
        pairs, distances = find_neighbours(both, np.arange(n)).close_pairs(AuditConfig.closeness)
    crosses = (pairs[:, 0] < n) & (pairs[:, 1] >= n)
    a, b = pairs[crosses].T
    table: pd.DataFrame = pd.DataFrame(
        {
            "image_id": theirs.image_ids[a],
            "run_image_id": ours.image_ids[b - n],
            "evidence": CLOSE,
            "distance": distances[crosses],
        }
    )
    return table
