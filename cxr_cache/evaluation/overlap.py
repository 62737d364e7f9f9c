"""A run and images of a store -> which of them are its own under other names, or may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.wording import count, find_differences
from cxr_cache.errors import CxrCacheError, RunError, StoreMismatchError
from cxr_cache.evaluation.audit_images import CLOSE, SAME_FILE, find_copies
from cxr_cache.models.run import Run
from cxr_cache.store.feature_store import FeatureStore

SAME_NAME: Final = "same name"
"""Of files that were not compared, since a store keeps no digests of them or is not there."""
COLUMNS: Final = ("image_id", "run_image_id", "run_split", "evidence", "distance")
_TOO_GOOD: Final = "figures on images that it was trained on are too good"


@dataclass(frozen=True, eq=False)
class Overlap:
    """Images of a store that are, or may be, the run's own."""

    table: pd.DataFrame
    """As ``overlap.csv``, with the columns :data:`COLUMNS`: a row for each such image, with the
    image of the run that it most likely is."""
    n_images: int
    """Images that were looked at."""
    n_patients: int
    """Patients whose ids the run's data have too."""
    n_images_of_patients: int
    """Their images."""
    note: str
    """Why bytes or embeddings could not be compared; empty where they could."""

    def count(self, *evidence: str, split: str = "") -> int:
        """Images for which there is such evidence, of both sides of the split or of one."""
        chosen = self.table["evidence"].isin(evidence)
        if split:
            chosen &= self.table["run_split"] == split
        return int(chosen.sum())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of the figures has to know, a sentence or two each."""
        return tuple(self._warn())

    def _warn(self) -> Iterator[str]:
        of = f"of the {self.n_images:,} images"
        if n := self.count(SAME_FILE, SAME_NAME):
            n_named = self.count(SAME_NAME)
            by_name = f", {n_named:,} of them by their names alone" if n_named else ""
            yield (
                f"{n:,} {of} {'belongs' if n == 1 else 'belong'} to the run's own data{by_name}: "
                f"{self._count_sides(SAME_FILE, SAME_NAME)}; {_TOO_GOOD}."
            )
        if n := self.count(CLOSE):
            yield (
                f"{n:,} {of} {'is' if n == 1 else 'are'} near-identical to images of the run's own "
                f"data by their embeddings (not verified as pictures): {self._count_sides(CLOSE)}; "
                f"overlap.csv names {'it' if n == 1 else 'them'}. If they are the same, "
                f"{_TOO_GOOD}."
            )
        if self.n_patients:
            yield (
                f"{count(self.n_patients, 'patient')} ({count(self.n_images_of_patients, 'image')})"
                " have an id that a patient of the run's own data has. If they are the same "
                f"persons, figures are too good; ids of two hospitals may also be equal by chance."
            )
        if self.note:
            yield self.note

    def _count_sides(self, *evidence: str) -> str:
        n_train, n_test = (self.count(*evidence, split=side) for side in ("train", "test"))
        return f"{n_train:,} to its train split, {n_test:,} to its test split"

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


def find_overlap(run: Run, store: FeatureStore, images: pd.DataFrame) -> Overlap:
    """Compare images of a store with those of a run, as far as the run's own store is there.

    Bytes are compared by the SHA-256 that stores keep, embeddings of the same encoder by
    :func:`cxr_cache.evaluation.audit_images.find_copies`, and patients by their ids. A name says
    that two images are one only where neither can be compared.

    Parameters
    ----------
    run
        A finished run.
    store
        With the images.
    images
        Columns image_id and patient_id of those that matter, N of them; of a run of whole studies,
        the column study_uid names their images.
    """
    if run.level == "study":
        every = store.cohort.take(store.embedded_rows).images
        images = every[every["study_uid"].isin(images["study_uid"])]
    splits = run.read_table("splits")
    rows = pd.Index(store.image_ids).get_indexer(pd.Index(images["image_id"]))
    theirs, note = _read_files(store, rows), ""
    try:
        with _open_own(run) as own:
            ours = _read_files(own, _find_rows(own, splits["image_id"]))
            if find_differences(own.header.encoder, store.header.encoder):
                ours = replace(ours, embeddings=None)
                note = (
                    "Which images are the run's own was told by their files alone, since the "
                    f"embeddings of {own.path} are of another encoder."
                )
    except CxrCacheError as error:
        ours = _Files.of_names(splits["image_id"])
        note = (
            "Which images are the run's own was told by their names alone, since the store that "
            f"it was trained on cannot be compared: {error}"
        )
    table = _find_same(theirs, ours, dict(zip(splits["image_id"], splits["split"], strict=True)))
    patients = images["patient_id"]
    patients_of_run = set(run.read_table("predictions").get("patient_id", ()))
    is_known = (patients != "") & patients.isin(patients_of_run)
    return Overlap(table, len(rows), patients[is_known].nunique(), int(is_known.sum()), note)


def is_own_store(run: Run, store: FeatureStore) -> bool:
    """Tell whether a store holds all images of a run, by name and, where that can be told, by file.

    Files are compared with those of the store that the run was trained on, if it is another one.
    """
    names = run.read_table("splits")["image_id"]
    if not names.isin(store.image_ids[store.embedded_rows]).all():
        return False
    try:
        with _open_own(run) as own:
            is_same = own.path.resolve() == store.path.resolve()
            return is_same or not _count_other_files(store, own, names)
    except CxrCacheError:
        return True  # nothing says otherwise


# -- runs that are compared with each other -----------------------------------------------


def note_overlap(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """Say whether test images of runs are, or may be, train images of theirs under other names.

    They are compared as in :func:`find_overlap`, in the store that a run was trained on. Test
    images of runs of several stores are compared by their files too. Runs go by `names`.
    """
    found: dict[tuple[str, int], str] = {}  # runs of one store and split are looked at once
    concerned: dict[str, list[str]] = {}
    for name, run in zip(names, runs, strict=True):
        for part in run.outer_runs or [run]:
            splits = part.read_table("splits")
            key = (part.store_path, hash(tuple(splits["image_id"] + splits["split"])))
            if key not in found:
                found[key] = _note_tested_and_trained_on(part, splits)
            if found[key]:
                concerned.setdefault(found[key], []).append(name)
    notes = [f"{' and '.join(of)}: {note}" for note, of in concerned.items()]
    others = zip(names[1:], runs[1:], strict=True)
    return notes + [
        f"{names[0]} and {name}: {note}"
        for name, run in others
        if (note := _note_other_files(runs[0], run))
    ]


def _note_tested_and_trained_on(run: Run, splits: pd.DataFrame) -> str:
    """A sentence or two on the run's own test images; empty where nothing was found."""
    tested, trained_on = (
        splits.loc[splits["split"] == side, "image_id"] for side in ("test", "train")
    )
    try:
        with _open_own(run) as own:
            test, train = (_read_files(own, _find_rows(own, of)) for of in (tested, trained_on))
            path = own.path
    except CxrCacheError as error:
        return f"whether test images were trained on under other names was not checked. {error}"
    table = _find_same(test, train, dict.fromkeys(trained_on, "train"))
    if not len(table):
        return ""
    first = table.iloc[0]
    n_same, n_close = (int((table["evidence"] == kind).sum()) for kind in (SAME_FILE, CLOSE))
    return (
        f"{len(table):,} of {count(len(tested), 'test image')} {'is' if len(table) == 1 else 'are'}"
        f" or may be trained on under other names: {n_same:,} by their files, {n_close:,} by "
        "near-identical embeddings (not verified as pictures). The first is "
        f"{first['image_id']!r}, like {first['run_image_id']!r}; `cxr-cache audit {path} --run-dir "
        f"{run.path}` lists them. {_TOO_GOOD.capitalize()}."
    )


def _note_other_files(first: Run, second: Run) -> str:
    """A sentence if two runs of several stores were tested on other files of the same names."""
    tested = first.tested_ids
    if first.store_path == second.store_path:
        return ""
    try:
        with _open_own(first) as ours, _open_own(second) as theirs:
            n = _count_other_files(ours, theirs, tested)
    except CxrCacheError:
        return ""  # each is told by itself
    if not n:
        return ""
    return (
        f"of {count(len(tested), 'test image')} {n:,} {'has' if n == 1 else 'have'} other bytes in "
        "the second's store (by SHA-256), and were matched by their names alone. Make sure that "
        "they are the same pictures."
    )


# -- files of stores ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Files:
    image_ids: NDArray[np.str_]
    digests: NDArray[np.object_]
    """SHA-256 of each file as text, ``""`` where the store has none (imported embeddings)."""
    embeddings: NDArray[np.float32] | None
    """``(n, D)``; None where they cannot be compared."""

    @classmethod
    def of_names(cls, image_ids: pd.Series[str]) -> _Files:
        """Files of which nothing else is known."""
        return cls(image_ids.to_numpy(str), np.full(len(image_ids), "", object), None)


@contextmanager
def _open_own(run: Run) -> Iterator[FeatureStore]:
    """Open the store that a run was trained on.

    Raises
    ------
    RunError
        The run does not record it.
    StoreNotFoundError, StoreFormatError
        It is not there.
    """
    if not run.store_path:
        raise RunError(f"{run.path} does not record the store that it was trained on.")
    with FeatureStore.open(run.find_store() or run.store_path) as own:
        yield own


def _find_rows(own: FeatureStore, image_ids: pd.Series[str]) -> NDArray[np.intp]:
    """Rows of a run's images in its store; StoreMismatchError where there are none."""
    rows = np.intersect1d(np.flatnonzero(np.isin(own.image_ids, image_ids)), own.embedded_rows)
    if not len(rows):
        raise StoreMismatchError(f"{own.path} was written anew since: it has none of them.")
    return rows


def _read_files(store: FeatureStore, rows: NDArray[np.intp]) -> _Files:
    embeddings = np.array(store.read_rows("embeddings", rows)[:, 0])
    return _Files(store.image_ids[rows], _read_digests(store, rows), embeddings)


def _read_digests(store: FeatureStore, rows: NDArray[np.intp]) -> NDArray[np.object_]:
    digests = np.asarray(store.read_column("image_sha256"))[rows]
    text = [digest.tobytes().hex() if digest.any() else "" for digest in digests]
    return np.array(text, object)


def _count_other_files(first: FeatureStore, second: FeatureStore, names: pd.Series[str]) -> int:
    """Count images whose bytes differ between two stores, of those with digests in both."""
    digests = []
    for store in (first, second):
        rows = np.flatnonzero(np.isin(store.image_ids, names))
        digests.append(pd.Series(_read_digests(store, rows), store.image_ids[rows]))
    ours, theirs = digests[0].align(digests[1], join="inner")
    return int(((ours != theirs) & (ours != "") & (theirs != "")).sum())


def _find_same(theirs: _Files, ours: _Files, split: Mapping[str, str]) -> pd.DataFrame:
    """Images that are the run's or may be, each with the strongest evidence of any of the run's.

    `split` is the side of each of the run's images by its name. Of several with the same evidence,
    one that was trained on is given.
    """
    files, own_files = (
        pd.DataFrame({name: files.image_ids, "digest": files.digests})
        for files, name in ((theirs, "image_id"), (ours, "run_image_id"))
    )
    same_file = files[files["digest"] != ""].merge(own_files, on="digest")
    found = [same_file.assign(evidence=SAME_FILE, distance=np.nan)]
    if theirs.embeddings is not None and ours.embeddings is not None:
        rows, own_rows, distances = find_copies(theirs.embeddings, ours.embeddings)
        close = {"image_id": theirs.image_ids[rows], "run_image_id": ours.image_ids[own_rows]}
        found.append(pd.DataFrame(close).assign(evidence=CLOSE, distance=distances))
    else:
        same_name = files.merge(own_files, left_on="image_id", right_on="run_image_id")
        differ = (same_name["digest_x"] != "") & (same_name["digest_y"] != "")
        found.append(same_name[~differ].assign(evidence=SAME_NAME, distance=np.nan))
    table = pd.concat(found, ignore_index=True)
    table["run_split"] = table["run_image_id"].map(dict(split))
    table["is_test"] = table["run_split"] == "test"
    table["rank"] = table["evidence"] == CLOSE
    table = table.sort_values(["rank", "is_test"], kind="stable")
    distinct: pd.DataFrame = table.drop_duplicates("image_id", ignore_index=True)[list(COLUMNS)]
    return distinct
