"""Store, split and images -> what crosses the split, is there twice, or does not belong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.devices import require_memory
from cxr_cache.common.files import write_whole
from cxr_cache.common.plain import to_json
from cxr_cache.common.tables import write_table
from cxr_cache.common.wording import count, first_lines
from cxr_cache.config import AuditConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.errors import ConfigError, RunError, StoreIncompleteError
from cxr_cache.evaluation.audit_images import (
    CLOSE,
    NEAR_IDENTICAL,
    SAME_FILE,
    SAME_PIXELS,
    THUMBNAIL_PX,
    Neighbourhood,
    PictureFacts,
    describe_usual,
    examine_pictures,
    find_embedding_outliers,
    find_neighbours,
    find_pixel_outliers,
    find_same_digests,
    standardise,
)
from cxr_cache.evaluation.leakage import Leakage, measure_leakage, recipe_of
from cxr_cache.evaluation.overlap import Overlap, find_overlap, is_own_store
from cxr_cache.models.aligned import align_run
from cxr_cache.models.run import Run
from cxr_cache.store.feature_store import FeatureStore

MIN_CORRELATION: Final = 0.99
"""Of 32 x 32 grey means. Of 6,352 real radiographs no two different ones reach 0.98."""
_TABLES: Final = ("groups", "duplicates", "outliers", "unreadable")
_N_SHOWN: Final = 5
_AND: Final = " and "
_MIN_ROWS: Final = 3
_COARSE_PX: Final = 16
_ROWS_AT_ONCE: Final = 8192


@dataclass(frozen=True, eq=False)
class Audit:
    """What was found."""

    store: str
    run: str | None
    n_images: int
    n_failed: int
    knows_patients: bool
    """Whether any image names its patient."""
    groups: pd.DataFrame
    """Studies and patients on several sides: kind, id, n_images, sides."""
    duplicates: pd.DataFrame
    """Pairs of images: image_a, image_b, evidence, distance, correlation, study_a, study_b,
    split_a, split_b, crosses, conflicting."""
    outliers: pd.DataFrame
    """Images: image_id, study_uid, projection, split, reason, value, usual."""
    unreadable: pd.DataFrame
    """Files that could not be looked at: image_id, reason."""
    looked_at_pixels: bool
    leakage: Leakage | None
    notes: tuple[str, ...] = ()
    """What is unusual about all pictures together."""
    overlap: Overlap | None = None
    """Which images are the run's own, where the store is not that of the run."""

    def __repr__(self) -> str:
        return first_lines(self.to_text())

    @property
    def crossing(self) -> pd.DataFrame:
        """Verified duplicates on two sides of the split."""
        pairs = self.duplicates
        found: pd.DataFrame = pairs[(pairs["crosses"] != "") & (pairs["evidence"] != CLOSE)]
        return found

    def to_text(self) -> str:
        """For a terminal."""
        lines = [
            f"{self.store}: {count(self.n_images, 'image')} looked at, {self.n_failed:,} failed"
        ]
        lines += self._describe_groups() + self._describe_duplicates() + self._describe_outliers()
        lines += [f"Note: {note}" for note in self.notes]
        if len(self.unreadable):
            lines.append(f"{count(len(self.unreadable), 'file')} could not be read")
        if not self.looked_at_pixels:
            lines.append(
                "Without --image-dir no picture was compared: copies that were changed, and images "
                "that are blank, inverted, turned or no radiographs, are not looked for."
            )
        if self.leakage is not None:
            lines.append(self.leakage.to_text())
        return "\n".join(lines)

    def _describe_groups(self) -> list[str]:
        if self.run is None:
            return ["No --run-dir: there is no split to check."]
        if self.overlap is not None:
            return [
                f"This store does not hold the images of {self.run} (by name or file), so there is "
                "no split to check. Of the images looked at:",
                *(f"  {line}" for line in self.overlap.warnings or ("None is the run's own.",)),
            ]
        lines = []
        for kind in ("study", "patient") if self.knows_patients else ("study",):
            found = self.groups[self.groups["kind"] == kind]
            plural = {"study": "studies", "patient": "patients"}[kind]
            n_test = found["sides"].str.contains("test").sum()
            lines.append(
                f"{plural} on several sides of the split of {self.run}: {n_test:,} on test and "
                f"train, {len(found) - n_test:,} on several folds only"
            )
        if not self.knows_patients:
            lines.append("no image names its patient, so patients are not checked")
        return lines

    def _describe_duplicates(self) -> list[str]:
        pairs = self.duplicates
        lines = ["Pairs of images that are one, or may be:"]
        for evidence in (SAME_FILE, SAME_PIXELS, NEAR_IDENTICAL, CLOSE):
            found = pairs[pairs["evidence"] == evidence]
            if not len(found):
                continue
            unverified = " (not verified)" if evidence == CLOSE else ""
            lines.append(
                f"  {evidence}{unverified}: {len(found):,}; {(found['crosses'] != '').sum():,} "
                f"cross the split, {(found['study_a'] != found['study_b']).sum():,} join two "
                f"studies, {(found['conflicting'] != '').sum():,} have conflicting labels"
            )
            lines += _first(found, "{image_a}  {image_b}  {crosses}  {conflicting}")
        return lines if len(lines) > 1 else ["No pair of images looks like one."]

    def _describe_outliers(self) -> list[str]:
        lines = []
        for reason, found in self.outliers.groupby("reason"):
            lines.append(f"  {reason}: {len(found):,}")
            lines += _first(found, "{image_id}  ({value:.3g}; usual is {usual:.3g})")
        return (
            ["Images unlike the others:", *lines] if lines else ["No image is unlike the others."]
        )

    def write(self, folder: Path) -> None:
        """Write groups.csv, duplicates.csv, outliers.csv, unreadable.csv and audit.json.

        Of a store that is not the run's, overlap.csv too.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.overlap is not None:
            write_table(folder / "overlap.csv", self.overlap.table, digits=6)
        for name in _TABLES:
            write_table(folder / f"{name}.csv", getattr(self, name), digits=6)
        write_whole(folder / "audit.json", to_json(self._summarise()).encode())

    def to_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_text` for programs, with every group, pair and image."""
        return self._summarise() | {name: getattr(self, name) for name in _TABLES}

    def _summarise(self) -> dict[str, Any]:
        return {
            "store": self.store,
            "run": self.run,
            "n_images": self.n_images,
            "n_failed": self.n_failed,
            "looked_at_pixels": self.looked_at_pixels,
            "n_groups_on_several_sides": len(self.groups),
            "n_pairs": self.duplicates["evidence"].value_counts().to_dict(),
            "n_pairs_crossing": len(self.crossing),
            "n_outliers": self.outliers["reason"].value_counts().to_dict(),
            "n_unreadable": len(self.unreadable),
            "notes": self.notes,
            "overlap": None if self.overlap is None else self.overlap.to_dict(),
            "leakage": None if self.leakage is None else self.leakage.to_dict(),
        }


def audit_store(
    store: FeatureStore,
    *,
    run: Run | None = None,
    image_dir: Path | None = None,
    config: AuditConfig | None = None,
    with_leakage: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Look for leaks between the sides of a split, for duplicates, and for odd images.

    Parameters
    ----------
    store
        Its finished rows are looked at.
    run
        Its split is checked, and its targets are the labels. If it was trained on other images, it
        is told which of these are its own under other names, or may be: see
        :func:`cxr_cache.evaluation.overlap.find_overlap`. Without a run, duplicates are looked for
        all the same.
    image_dir
        Folder with the images: close embeddings are then compared as pictures, and every picture
        with the usual one.
    config
        How to look.
    with_leakage
        Also train the run's head with and without a leaking split; see
        :func:`cxr_cache.evaluation.leakage.measure_leakage`.
    on_progress
        Called with (images read, images to read).

    Raises
    ------
    StoreIncompleteError
        There are fewer than three finished rows.
    ConfigError
        `with_leakage` without a `run`; or the embeddings do not fit into memory.
    RunError
        `with_leakage` with a store that is not the run's; or as
        :func:`cxr_cache.evaluation.leakage.measure_leakage`.

    Examples
    --------
    >>> with FeatureStore.open("features.h5") as store:  # doctest: +SKIP
    ...     found = audit_store(store, run=Run.open("runs/first"), image_dir="DATA/images")
    >>> print(found.to_text())  # doctest: +SKIP
    """
    config = config or AuditConfig()
    if with_leakage:
        if run is None:
            raise ConfigError("--leakage trains the head of a run. Give one with --run-dir.")
        recipe_of(run)  # refuses before the long work
    rows = store.embedded_rows
    if len(rows) < _MIN_ROWS:
        raise StoreIncompleteError(
            f"{store.path} has {count(len(rows), 'finished row')}; an audit compares at least "
            f"{_MIN_ROWS}. Run `cxr-cache extract` first."
        )
    cohort, sides, overlap = _join_run(store, store.cohort.take(rows), run)
    if with_leakage and overlap is not None:
        raise RunError(
            f"--leakage trains on the images of {run and run.path}, and {store.path} holds others. "
            "Give the run's own store."
        )
    near = find_neighbours(_read_embeddings(store, rows), overwrite=True)
    facts, unreadable = _look_at(store, cohort, image_dir, config.n_jobs, on_progress)
    pairs = _find_pairs(np.array(store.read_column("image_sha256"))[rows], near, facts, config)
    outliers = pd.concat(
        [find_embedding_outliers(near), find_pixel_outliers(facts, cohort.projections)],
        ignore_index=True,
    )
    leakage = None
    if with_leakage and run is not None:
        leakage = measure_leakage(store, run, n_repeats=config.n_repeats)
    return Audit(
        store=str(store.path),
        run=None if run is None else str(run.path),
        n_images=len(rows),
        n_failed=store.count_rows().n_failed,
        knows_patients=bool((cohort.patient_ids != "").any()),
        groups=_find_split_groups(cohort, sides),
        duplicates=_describe_pairs(pairs, cohort, sides),
        outliers=_describe_rows(outliers, cohort, sides),
        unreadable=unreadable,
        looked_at_pixels=image_dir is not None,
        leakage=leakage,
        notes=tuple(describe_usual(facts.values())),
        overlap=overlap,
    )


def _read_embeddings(store: FeatureStore, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """Embeddings of the images as they are, without their mirror images, ``(N, D)``."""
    width = store.feature_shapes["embeddings"][1]
    require_memory(
        len(rows) * width * 4,
        f"The embeddings of {count(len(rows), 'image')} of {store.path}",
        "Audit on a machine with so much, or parts of the data set as stores of their own.",
    )
    embeddings = np.empty((len(rows), width), np.float32)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        embeddings[part] = store.read_rows("embeddings", rows[part])[:, 0]
    return embeddings


def _join_run(
    store: FeatureStore, cohort: Cohort, run: Run | None
) -> tuple[Cohort, NDArray[np.str_], Overlap | None]:
    """The cohort with the run's targets, and each image's side: test, fold 2, or nothing.

    Where the images are not the run's, those that may be all the same.
    """
    sides = np.full(len(cohort), "", "<U8")
    if run is None:
        return cohort, sides, None
    if not is_own_store(run, store):
        return cohort, sides, find_overlap(run, store, cohort.images)
    run.require_holdout("an audit looks for copies of these among the train images")
    aligned = align_run(run, cohort, store.path)
    folds = np.char.add("fold ", (aligned.fold + 1).astype(str))
    sides[aligned.places] = np.where(aligned.is_test, "test", folds)
    findings = aligned.cohort.findings
    targets = np.full((len(cohort), len(findings)), np.nan, np.float32)
    targets[aligned.places] = aligned.cohort.targets
    return replace(cohort, findings=findings, targets=targets), sides, None


def _look_at(
    store: FeatureStore,
    cohort: Cohort,
    image_dir: Path | None,
    n_jobs: int,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[dict[int, PictureFacts], pd.DataFrame]:
    """Facts about every picture that can be read, by row; and why the others cannot."""
    facts: dict[int, PictureFacts] = {}
    reasons: list[tuple[str, str]] = []
    if image_dir is not None:
        image_ids = cohort.image_ids.tolist()
        bits_stored = store.header.encoder.get("preprocessing", {}).get("bits_stored")
        examined = examine_pictures(image_dir, image_ids, bits_stored=bits_stored, n_jobs=n_jobs)
        with closing(examined):
            for row, found in enumerate(examined):
                if isinstance(found, PictureFacts):
                    facts[row] = found
                else:
                    reasons.append((image_ids[row], str(found)))
                if on_progress is not None:
                    on_progress(row + 1, len(image_ids))
    unreadable: pd.DataFrame = pd.DataFrame(reasons, columns=["image_id", "reason"])
    return facts, unreadable


def _find_pairs(
    sha256: NDArray[np.uint8],
    near: Neighbourhood,
    facts: dict[int, PictureFacts],
    config: AuditConfig,
) -> pd.DataFrame:
    """Pairs a, b with evidence, distance and correlation; of several kinds, the strongest."""
    looked_at = np.array(sorted(facts), np.intp)
    digests = np.array([list(facts[row].pixel_sha256) for row in looked_at], np.uint8)
    candidates, distances = near.close_pairs(config.closeness)
    kinds: list[tuple[str, NDArray[np.intp]]] = [(SAME_FILE, find_same_digests(sha256))]
    if len(facts) >= _MIN_ROWS:
        kinds.append((SAME_PIXELS, looked_at[find_same_digests(digests)]))
        kinds.append((CLOSE, looked_at[_find_similar_pictures([facts[row] for row in looked_at])]))
    found = pd.concat(
        [_as_pairs(pairs, evidence) for evidence, pairs in kinds]
        + [_as_pairs(candidates, CLOSE).assign(distance=distances)],
        ignore_index=True,
    )
    found["correlation"] = [
        _correlate(facts[a], facts[b]) if a in facts and b in facts else np.nan
        for a, b in zip(found["a"], found["b"], strict=True)
    ]
    is_compared = (found["evidence"] == CLOSE) & found["correlation"].notna()
    is_same = found["correlation"] >= MIN_CORRELATION
    found.loc[is_compared & is_same, "evidence"] = NEAR_IDENTICAL
    found = found[~is_compared | is_same]
    found["distance"] = found.groupby(["a", "b"])["distance"].transform("max")
    distinct: pd.DataFrame = found.drop_duplicates(["a", "b"], ignore_index=True)
    return distinct


def _find_similar_pictures(facts: Sequence[PictureFacts]) -> NDArray[np.intp]:
    """Pairs whose coarse thumbnails correlate: copies of another brightness, which embeddings miss.

    Coarser pictures correlate more, so that these are candidates, to be compared at full size.
    """
    thumbnails = np.stack([one.thumbnail for one in facts])
    coarse = thumbnails.reshape(len(facts), _COARSE_PX, -1, _COARSE_PX, THUMBNAIL_PX // _COARSE_PX)
    flat = standardise(coarse.mean(axis=(2, 4))).reshape(len(facts), -1)
    return find_neighbours(flat, less_mean=False).pairs_within(1 - MIN_CORRELATION)[0]


def _as_pairs(pairs: NDArray[np.intp], evidence: str) -> pd.DataFrame:
    ordered = np.sort(pairs, axis=1)
    table: pd.DataFrame = pd.DataFrame(
        {"a": ordered[:, 0], "b": ordered[:, 1], "evidence": evidence, "distance": np.nan}
    )
    return table


def _correlate(a: PictureFacts, b: PictureFacts) -> float:
    first, second = standardise(np.stack([a.thumbnail, b.thumbnail]))
    return float((first * second).sum())


def _find_split_groups(cohort: Cohort, sides: NDArray[np.str_]) -> pd.DataFrame:
    """Studies and patients whose images lie on several sides."""
    tables: list[pd.DataFrame] = []
    for kind, ids in (("study", cohort.study_uids), ("patient", cohort.patient_ids)):
        known = (ids != "") & (sides != "")
        images: pd.DataFrame = pd.DataFrame({"id": ids[known], "side": sides[known]})
        several = images.drop_duplicates().groupby("id").size()
        images = images[images["id"].isin(several.index[several > 1])]
        by_id = images.groupby("id")["side"]
        table = pd.DataFrame(
            {"n_images": by_id.size(), "sides": by_id.agg(lambda s: _AND.join(sorted(set(s))))}
        ).reset_index()
        table.insert(0, "kind", kind)
        tables.append(table)
    found: pd.DataFrame = pd.concat(tables, ignore_index=True)
    return found


def _describe_pairs(pairs: pd.DataFrame, cohort: Cohort, sides: NDArray[np.str_]) -> pd.DataFrame:
    a, b = pairs["a"].to_numpy(), pairs["b"].to_numpy()
    differ = np.abs(cohort.targets[a] - cohort.targets[b]) == 1  # NaN conflicts with nothing
    names = np.array(cohort.findings, dtype=object)
    crosses = np.where((sides[a] == "test") | (sides[b] == "test"), "test and train", "two folds")
    is_within = (sides[a] == sides[b]) | (sides[a] == "") | (sides[b] == "")
    table: pd.DataFrame = pd.DataFrame(
        {
            "image_a": cohort.image_ids[a],
            "image_b": cohort.image_ids[b],
            "evidence": pairs["evidence"],
            "distance": pairs["distance"],
            "correlation": pairs["correlation"],
            "study_a": cohort.study_uids[a],
            "study_b": cohort.study_uids[b],
            "split_a": sides[a],
            "split_b": sides[b],
            "crosses": np.where(is_within, "", crosses),
            "conflicting": [";".join(names[row]) for row in differ],
        }
    )
    return table


def _describe_rows(outliers: pd.DataFrame, cohort: Cohort, sides: NDArray[np.str_]) -> pd.DataFrame:
    rows = outliers["row"].to_numpy(np.intp)
    described = {
        "image_id": cohort.image_ids[rows],
        "study_uid": cohort.study_uids[rows],
        "projection": cohort.projections[rows],
        "split": sides[rows],
    }
    facts = outliers.drop(columns="row")
    table: pd.DataFrame = facts.assign(**described)[[*described, *facts.columns]]
    return table


def _first(table: pd.DataFrame, form: str) -> list[str]:
    """The first rows in a form, and how many more there are."""
    lines = [
        "    " + form.format(**row).rstrip() for row in table.head(_N_SHOWN).to_dict("records")
    ]
    return lines + [f"    and {len(table) - _N_SHOWN:,} more"] * (len(table) > _N_SHOWN)
