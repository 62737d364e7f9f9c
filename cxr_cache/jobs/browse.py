"""A store -> a page with a map of its embeddings."""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cxr_cache.common.extras import require_extra
from cxr_cache.common.files import write_whole
from cxr_cache.common.wording import count
from cxr_cache.config import BrowseConfig, MapMethod
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.errors import RunError
from cxr_cache.evaluation.embedding_map import (
    MIN_ROWS,
    Places,
    measure_unlikeness,
    place,
    read_unit_embeddings,
    require_embedded,
)
from cxr_cache.evaluation.overlap import is_own_store
from cxr_cache.jobs.similar import name_findings
from cxr_cache.models.aligned import align_run
from cxr_cache.models.run import Run
from cxr_cache.models.unlikeness import UNUSUAL
from cxr_cache.report.page import render_map
from cxr_cache.report.pictures import draw_thumbnails
from cxr_cache.report.report import require_page_path
from cxr_cache.report.views import to_records
from cxr_cache.store.feature_store import FAILED, FeatureStore

MAX_POINTS: Final = 20_000
"""On one page; of more images a random sample is shown."""
MAX_PICTURES: Final = 1_000
"""On one page, of about 5 kB each."""
N_FURTHEST: Final = 20
"""Images furthest from the others that are listed."""
MAX_FAILURES: Final = 500
"""Failed images that are listed; all are counted."""
_MAX_GROUPS: Final = 5  # that colours tell apart, beside "other" and "unknown"
_SEED: Final = 0
_UNLABELLED: Final = 2
_AXES: Final = {"pca": "principal components", "umap": "UMAP"}


@dataclass(frozen=True)
class MapPage:
    """What was written, and what is on it."""

    path: Path
    store: str
    run: str | None
    method: MapMethod
    n_images: int
    """Images with an embedding."""
    n_shown: int
    variance: tuple[float, float] | None
    """Shares of the variance of all images along the axes; None for UMAP."""
    n_unusual: int | None
    """Images further from the others than 99 % are; None where that is not measured."""
    furthest: tuple[str, ...]
    """Ids of those furthest from the others, the furthest first."""
    failures: dict[str, int]
    """How many images failed, by reason, the most frequent first."""
    n_pending: int
    """Images without an embedding so far."""
    n_pictures: int
    problems: tuple[str, ...]
    """What was wrong with images that have no picture, in sentences."""

    def to_text(self) -> str:
        """For a terminal."""
        axes = _AXES[self.method]
        if self.variance is not None:
            first, second = (f"{100 * share:.1f} %" for share in self.variance)
            axes = f"{axes} with {first} and {second} of the variance"
        lines = [f"{self.path}: map of {count(self.n_shown, 'image')} by {axes}"]
        if self.n_shown < self.n_images:
            lines.append(
                f"Of {self.n_images:,} images this is a random sample, with the furthest in it."
            )
        if self.n_unusual is not None and self.furthest:
            lines.append(
                f"{count(self.n_unusual, 'image')} at or beyond the {100 * UNUSUAL:.0f} % quantile "
                f"of distance from the others; the furthest is {self.furthest[0]}"
            )
        lines += [f"{n:,} not on the map, failed: {why}" for why, n in self.failures.items()]
        if self.n_pending:
            lines.append(f"{self.n_pending:,} not on the map: they are still to be embedded")
        if self.n_pictures:
            lines.append(
                f"It holds {count(self.n_pictures, 'picture')}. If these are real radiographs, do "
                "not share it unless their licence and your approvals allow that."
            )
        if self.problems:
            lines.append(f"{len(self.problems):,} without a picture; the first: {self.problems[0]}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return {"written": [self.path], **{k: v for k, v in vars(self).items() if k != "path"}}


def write_map(
    store: FeatureStore,
    path: str | Path,
    *,
    run: Run | None = None,
    image_dir: str | Path | None = None,
    config: BrowseConfig | None = None,
) -> MapPage:
    """Write a page with a map of a store's embeddings, in one file that needs no other.

    Parameters
    ----------
    store
        An open store. Rows that failed or are pending are counted on the page.
    path
        HTML file to write; it may exist if it is a page of cxr-cache.
    run
        A run on this store, whose split and labels are shown.
    image_dir
        Folder of the images: up to :data:`MAX_PICTURES` small pictures go into the page, which may
        then not be shared if the images may not.
    config
        How the embeddings are placed.

    Raises
    ------
    StoreIncompleteError, StoreFormatError
        Fewer than three images have an embedding, or one of these is not finite.
    RunError
        `run` was trained on other images.
    ConfigError
        `path` holds something else, `image_dir` does not hold the images, or UMAP is not installed.

    Examples
    --------
    >>> with FeatureStore.open("features.h5") as store:  # doctest: +SKIP
    ...     write_map(store, "map.html", run=Run.open("runs/first"))
    """
    path, method = Path(path), (config or BrowseConfig()).method
    require_page_path(path)
    if method == "umap":
        require_extra("umap", "--method umap")  # before the long part
    rows = require_embedded(store, MIN_ROWS, "a map")
    cohort, split = _read_split(store, rows, run)
    embeddings = read_unit_embeddings(store, rows)
    unlikeness = measure_unlikeness(embeddings, cohort)
    furthest = (
        np.empty(0, np.intp)
        if unlikeness is None
        else np.argsort(-unlikeness, kind="stable")[:N_FURTHEST]
    )
    shown = _draw(len(rows), MAX_POINTS, furthest)
    places = place(embeddings, shown, method)
    pictures, problems = _draw_pictures(store, cohort, shown, furthest, image_dir)
    failed = np.flatnonzero(store.status == FAILED)
    reasons = store.read_errors(failed)
    counts = store.count_rows()
    page = MapPage(
        path=path,
        store=str(store.path),
        run=None if run is None else str(run.path),
        method=method,
        n_images=len(rows),
        n_shown=len(shown),
        variance=places.variance,
        n_unusual=None if unlikeness is None else int((unlikeness >= UNUSUAL).sum()),
        furthest=tuple(cohort.image_ids[furthest].tolist()),
        failures=dict(Counter(reasons).most_common()),
        n_pending=counts.n_pending - counts.n_without_tokens,
        n_pictures=len(pictures),
        problems=tuple(problems),
    )
    html = render_map(
        page=page,
        encoder=store.header.encoder,
        cohort=cohort,
        axes=_AXES[method],
        split=split[0],
        unusual=UNUSUAL,
        furthest=_describe(cohort.take(furthest)),
        failed=list(zip(store.image_ids[failed[:MAX_FAILURES]].tolist(), reasons, strict=False)),
        has_image_dir=image_dir is not None,
        data=_pack(cohort.take(shown), places, split, unlikeness, shown) | {"pictures": pictures},
    )
    write_whole(path, html.encode())
    return page


Split: TypeAlias = tuple[str, NDArray[np.str_]]
"""Whose split it is, in words, and the side of each image; blank without one."""


def _read_split(
    store: FeatureStore, rows: NDArray[np.intp], run: Run | None
) -> tuple[Cohort, Split]:
    """The images with the labels and the split of the run, or of the store's own table."""
    cohort = store.cohort.take(rows)
    if run is None:
        given = cohort.images.get("given_split")
        if given is None or not (given != "").any():
            return cohort, ("", np.full(len(cohort), ""))
        return cohort, ("that the data set comes with", given.to_numpy(np.str_))
    if not is_own_store(run, store):
        raise RunError(
            f"{run.path} was not trained on the images of {store.path}, by name and file, so there "
            "is no split of them to show. Give a run on this store, or leave out --run-dir."
        )
    aligned = align_run(run, cohort, store.path)
    sides = np.full(len(cohort), "not in the run")
    sides[aligned.places] = np.where(aligned.is_test, "test", "train")
    findings = aligned.cohort.findings
    targets = np.full((len(cohort), len(findings)), np.nan, np.float32)
    targets[aligned.places] = aligned.cohort.targets
    labelled = replace(cohort, findings=findings, targets=targets)
    return labelled, (f"of the run {run.path.resolve().name}", sides)


def _draw(n: int, n_most: int, first: NDArray[np.intp]) -> NDArray[np.intp]:
    """At most so many of n rows, rising: those of `first`, and a random sample of the others."""
    if n <= n_most:
        return np.arange(n)
    others = np.setdiff1d(np.arange(n), first)
    drawn = np.random.default_rng(_SEED).choice(others, n_most - len(first), replace=False)
    return np.sort(np.concatenate([first, drawn]))


def _draw_pictures(
    store: FeatureStore,
    cohort: Cohort,
    shown: NDArray[np.intp],
    furthest: NDArray[np.intp],
    image_dir: str | Path | None,
) -> tuple[dict[str, str], list[str]]:
    """Small pictures of points, by their number on the page, and what was wrong with others."""
    if image_dir is None:
        return {}, []
    chosen = _draw(len(shown), MAX_PICTURES, np.searchsorted(shown, furthest))
    image_ids = cohort.image_ids[shown[chosen]].tolist()
    pictures, problems = draw_thumbnails(
        image_dir, image_ids, store.header.encoder.get("preprocessing")
    )
    number_of = dict(zip(image_ids, chosen.tolist(), strict=True))
    return {str(number_of[image_id]): address for image_id, address in pictures.items()}, problems


def _describe(images: Cohort) -> list[dict[str, Any]]:
    """Rows of the table of images furthest from the others."""
    return [
        {**known, "findings": name_findings(images, row)}
        for row, known in enumerate(to_records(images.images))
    ]


def _pack(
    images: Cohort,
    places: Places,
    split: Split,
    unlikeness: NDArray[np.float64] | None,
    shown: NDArray[np.intp],
) -> dict[str, Any]:
    """What the page's own program draws, ready for JSON; arrays as bytes in base64.

    A place is two unsigned 16-bit numbers on one scale for both axes, a label one of four labels in
    a byte (0 absent, 1 present, 2 unlabelled).
    """
    low = places.coordinates.min(axis=0)
    widest = max(float(np.ptp(places.coordinates, axis=0).max()), np.finfo(np.float32).tiny)
    scaled = (places.coordinates - low) / widest  # 0 to 1
    groupings = {"projection": images.projections, "split": split[1][shown]}
    labels = np.where(np.isnan(images.targets), _UNLABELLED, images.targets).astype(np.uint8)
    return {
        "n": len(images),
        "extent": scaled.max(axis=0).tolist(),
        "places": _encode((scaled * 65535).round().astype("<u2")),
        "ids": images.image_ids.tolist(),
        "studies": images.study_uids.tolist(),
        "patients": images.patient_ids.tolist() if (images.patient_ids != "").any() else None,
        "groupings": {
            name: _group(values) for name, values in groupings.items() if (values != "").any()
        },
        "findings": [
            {"name": name, "codes": _encode(_pack_labels(labels[:, f]))}
            for f, name in enumerate(images.findings)
        ],
        "unlikeness": None
        if unlikeness is None
        else _encode((unlikeness[shown] * 65535).astype("<u2")),
        "unusual": []
        if unlikeness is None
        else np.flatnonzero(unlikeness[shown] >= UNUSUAL).tolist(),
    }


def _group(values: NDArray[np.str_]) -> dict[str, Any]:
    """The most frequent values as they are, then what holds the others, and who has none."""
    frequent = [name for name, _ in Counter(values[values != ""].tolist()).most_common(_MAX_GROUPS)]
    names = sorted(frequent)
    codes = np.full(len(values), len(names), np.uint8)
    for code, name in enumerate(names):
        codes[values == name] = code
    codes[values == ""] = len(names) + 1
    return {"names": [*names, "other", "unknown"], "codes": _encode(codes)}


def _pack_labels(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    padded = np.zeros(-(-len(labels) // 4) * 4, np.uint8)
    padded[: len(labels)] = labels
    packed: NDArray[np.uint8] = (padded.reshape(-1, 4) << np.array([0, 2, 4, 6], np.uint8)).sum(
        axis=1, dtype=np.uint8
    )
    return packed


def _encode(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")
