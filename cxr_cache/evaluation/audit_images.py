"""Pictures and embeddings -> the few facts an audit keeps, copies, and images that are odd."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from numpy.typing import NDArray

from cxr_cache.datasets.images import MIN_EDGE_PX, read_picture
from cxr_cache.errors import ImageError
from cxr_cache.metrics.neighbours import search_cells
from cxr_cache.store.rows import to_unit_length

if TYPE_CHECKING:
    from sklearn.neighbors import NearestNeighbors

Array: TypeAlias = NDArray[Any]

THUMBNAIL_PX: Final = 32
"""Side of the grey thumbnails; it must not exceed any image's."""
_FLAT: Final = 8  # grey levels within which a row or column of the border counts as plain
_FILES_AT_ONCE: Final = 16
_SMALLER_PX: Final = 512  # of the longer side, for everything but the digest


@dataclass(frozen=True, eq=False)
class PictureFacts:
    """What is kept of one picture."""

    pixel_sha256: bytes
    """Of shape and decoded values (32 bytes): equal for one picture in two files or formats."""
    thumbnail: NDArray[np.uint8]
    """Grey means over equal parts, ``(32, 32)``."""
    contrast: float
    """Grey levels between the 1st and the 99th percentile."""
    colour: float
    """Mean difference between the largest and smallest channel, in grey levels; 0 for grey."""
    frame: float
    """Share of the area in plain rows and columns along the edges (collimation, padding)."""


def examine_pictures(
    image_dir: str | Path,
    image_ids: Sequence[str],
    *,
    bits_stored: int | None = None,
    n_jobs: int = 1,
) -> Generator[PictureFacts | ImageError, None, None]:
    """Facts about files, in their order; where a file cannot be decoded, the reason.

    `n_jobs` processes decode, as :func:`cxr_cache.datasets.images.read_picture` does.
    """
    parts = [
        image_ids[start : start + _FILES_AT_ONCE]
        for start in range(0, len(image_ids), _FILES_AT_ONCE)
    ]
    pool = Parallel(n_jobs=n_jobs, return_as="generator")
    for facts in pool(delayed(_examine_files)(image_dir, part, bits_stored) for part in parts):
        yield from facts


def _examine_files(
    image_dir: str | Path, image_ids: Sequence[str], bits_stored: int | None
) -> list[PictureFacts | ImageError]:
    facts: list[PictureFacts | ImageError] = []
    for image_id in image_ids:
        try:
            facts.append(describe_picture(read_picture(image_dir, image_id, bits_stored)))
        except ImageError as error:
            facts.append(error)
    return facts


def describe_picture(picture: NDArray[np.uint8]) -> PictureFacts:
    """Facts about decoded pixels, grey ``(H, W)`` or colour ``(H, W, 3)``.

    A colour picture whose channels are equal is the grey one, and has its digest.
    """
    colour = float(np.ptp(picture, axis=2).mean()) if picture.ndim == 3 else 0.0
    if picture.ndim == 3 and colour == 0:
        picture = picture[..., 0]
    digest = hashlib.sha256(str(picture.shape).encode())
    digest.update(picture.tobytes())
    grey = picture if picture.ndim == 2 else picture.mean(axis=2)
    step = max(1, max(grey.shape) // _SMALLER_PX)
    small = grey[::step, ::step]  # so that percentiles are quick
    low, high = np.percentile(small, (1, 99))
    return PictureFacts(
        pixel_sha256=digest.digest(),
        thumbnail=np.rint(shrink(grey, THUMBNAIL_PX)).astype(np.uint8),
        contrast=float(high - low),
        colour=colour,
        frame=_measure_frame(small),
    )


def shrink(grey: NDArray[Any], size_px: int) -> NDArray[np.float64]:
    """Means over ``size_px`` x ``size_px`` equal parts of a picture ``(H, W)``."""
    assert min(grey.shape) >= MIN_EDGE_PX
    if min(grey.shape) < size_px:  # a part needs a pixel
        grey = np.repeat(np.repeat(grey, 2, axis=0), 2, axis=1)
    edges = [np.linspace(0, length, size_px + 1).astype(np.intp) for length in grey.shape]
    sums = np.add.reduceat(grey, edges[0][:-1], axis=0, dtype=np.float64)
    sums = np.add.reduceat(sums, edges[1][:-1], axis=1)
    means: NDArray[np.float64] = sums / np.outer(*map(np.diff, edges))
    return means


def _measure_frame(grey: NDArray[Any]) -> float:
    """Share of the area outside the rectangle between the first and last lines that show a thing.

    A line counts as plain where its 5th and 95th percentile lie close together, so that a letter or
    a speck on it does not matter.
    """
    inner = 1.0
    for axis in (0, 1):
        low, high = np.percentile(grey, (5, 95), axis=1 - axis)
        busy = np.flatnonzero(high - low > _FLAT)
        inner *= (busy[-1] + 1 - busy[0]) / grey.shape[axis] if len(busy) else 0.0
    return 1 - inner


# -- duplicates ---

SAME_FILE: Final = "same file"
SAME_PIXELS: Final = "same pixels"
NEAR_IDENTICAL: Final = "near-identical pixels"
CLOSE: Final = "close embeddings"
"""Not verified: they were not compared as pictures."""

N_NEIGHBOURS: Final = 10
"""Neighbours that are looked up for every image."""
MAX_RATIO: Final = 0.25
"""Distance of a copy over that of the last neighbour, at most. docs/audit.md says what it finds."""
MOST_EXACT: Final = 50_000
"""Images up to which each is compared with every other."""
N_EXACT: Final = 2000
"""Of more images, so many are drawn, and so many of the furthest, to be compared with all."""
_ROWS_AT_ONCE: Final = 8192
_EQUAL: Final = 1e-6  # rounding of a distance in float32, should there be as many copies


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """The nearest other images of Q images, P of them, nearest first.

    Distances are 1 - cosine between embeddings less their mean. Without subtracting it, all
    radiographs look alike to most encoders.
    """

    own: NDArray[np.intp]
    """Rows of the images whose neighbours these are, ``(Q,)``."""
    rows: NDArray[np.intp]
    """``(Q, P)``."""
    distances: NDArray[np.float64]
    """``(Q, P)``, from 0 to 2."""
    drawn: NDArray[np.intp] | None = None
    """Places, of Q, that were drawn at random to tell what is usual; None where all tell it."""
    exact: NDArray[np.intp] | None = None
    """Places whose neighbours are the nearest of all; None where that holds for every place."""

    @property
    def usual(self) -> NDArray[np.float64]:
        """Distances to the last of the P, of all images or of those drawn."""
        last = self.distances[:, -1]
        return last if self.drawn is None else last[self.drawn]

    @property
    def usual_distance(self) -> float:
        """Median distance to the last of the P: how close unrelated images come."""
        return float(np.median(self.usual))

    def close_pairs(self, closeness: float) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Pairs closer than `closeness` times the usual distance, and their distances.

        What is close depends on the encoder: the median image's nearest neighbour lies at a cosine
        of 0.6 for one and 0.97 for another. So the data set itself says what is usual.
        """
        return self.pairs_within(closeness * self.usual_distance)

    def pairs_within(self, distance: float) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Pairs closer than `distance`, ``(n, 2)``, and their distances, ``(n,)``.

        The smaller row comes first, each pair once, the nearest pair first.
        """
        pairs = np.stack([np.repeat(self.own, self.rows.shape[1]), self.rows.ravel()], axis=1)
        distances = self.distances.ravel()
        is_close = distances < distance
        pairs, first = np.unique(np.sort(pairs[is_close], axis=1), axis=0, return_index=True)
        distances = distances[is_close][first]
        order = np.argsort(distances, kind="stable")
        return pairs[order], distances[order]


def find_neighbours(
    embeddings: NDArray[np.float32], *, less_mean: bool = True, overwrite: bool = False
) -> Neighbourhood:
    """Look up the nearest others of every image, by embeddings in the encoder's scale.

    They are finite, ``(N, D)``, N at least 3. `less_mean` subtracts their mean first; without it,
    distances are 1 - cosine of what is given. Up to :data:`MOST_EXACT` images the search is exact:
    scikit-learn compares block by block and keeps the nearest only, so that memory grows with N,
    time with its square. Of more images, near others are found by
    :func:`cxr_cache.metrics.neighbours.search_cells`, in time that grows with N; and the nearest
    of all for some that are drawn, which tell what is usual, and for the :data:`N_EXACT` that are
    furthest from what was found. With `overwrite`, the embeddings are not in memory twice.
    """
    centred = embeddings if overwrite else np.empty_like(embeddings, order="C")
    mean = embeddings.mean(axis=0, dtype=np.float64).astype(np.float32) if less_mean else 0
    for start in range(0, len(centred), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        centred[part] = to_unit_length(embeddings[part] - mean)
    everything = np.arange(len(centred))
    n_neighbours = min(N_NEIGHBOURS, len(centred) - 1)
    if len(centred) <= MOST_EXACT:
        return Neighbourhood(everything, *_find_nearest(centred, slice(None), n_neighbours))
    rows, distances = search_cells(centred, n_neighbours)
    drawn = np.random.default_rng(0).choice(len(centred), N_EXACT, replace=False)
    exact = np.union1d(drawn, np.argpartition(distances[:, -1], -N_EXACT)[-N_EXACT:])
    rows[exact], distances[exact] = _find_nearest(centred, exact, n_neighbours)
    return Neighbourhood(everything, rows, distances, drawn, exact)


def _find_nearest(
    centred: NDArray[np.float32], own: NDArray[np.intp] | slice, n_neighbours: int
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Compare some vectors with all: rows of the nearest others and distances, ``(Q, P)``."""
    search = _make_search(n_neighbours + 1)
    squares, rows = search.fit(centred).kneighbors(centred[own])
    # An image is among its own neighbours, but behind its copies it need not come first.
    is_self = rows == np.arange(len(centred))[own, None]
    is_self[~is_self.any(axis=1), -1] = True
    others = (len(rows), n_neighbours)
    return rows[~is_self].reshape(others), squares[~is_self].reshape(others) / 2


def _make_search(n_neighbours: int) -> NearestNeighbors:
    from sklearn.neighbors import NearestNeighbors  # a second to import, and few commands need it

    return NearestNeighbors(n_neighbors=n_neighbours, algorithm="brute", metric="sqeuclidean")


def find_copies(
    embeddings: NDArray[np.float32], others: NDArray[np.float32]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Find images that lie much closer to one of some others than to those around it.

    Distances are those of :class:`Neighbourhood`, less the mean of the others. An image counts
    whose nearest lies closer than :data:`MAX_RATIO` of the distance to the last of its neighbours
    among them. scikit-learn compares block by block and keeps the nearest only.

    Parameters
    ----------
    embeddings
        In the encoder's scale, finite, ``(n, D)``.
    others
        Those of the same encoder that are known, ``(m, D)``. Of fewer than three nothing can be
        said, and nothing is found.

    Returns
    -------
    rows, of_others, distances
        Rows of such images, rising; the nearest of the others; and how far it is. ``(k,)`` each.
    """
    if min(len(embeddings), len(others) - 2) < 1:
        return np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0)
    mean = others.mean(axis=0, dtype=np.float64).astype(np.float32)
    n_wanted = min(N_NEIGHBOURS, len(others))
    search = _make_search(n_wanted)
    search.fit(to_unit_length(others - mean))
    squares, nearest = search.kneighbors(to_unit_length(embeddings - mean))
    distances = squares / 2  # (n, P), nearest first
    rows = np.flatnonzero(distances[:, 0] <= np.maximum(MAX_RATIO * distances[:, -1], _EQUAL))
    return rows, nearest[rows, 0], distances[rows, 0]


def find_same_digests(digests: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Pairs of rows with equal digests, ``(N, bytes) -> (n, 2)``: the first of each with the rest.

    Rows of zeros have no digest (embeddings that were imported). A group on two sides of a split,
    or with two labels, has at least one such pair that shows it.
    """
    known = np.flatnonzero(digests.any(axis=1))
    _, first, group = np.unique(digests[known], axis=0, return_index=True, return_inverse=True)
    pairs = np.stack([known[first[group.ravel()]], known], axis=1)
    distinct: NDArray[np.intp] = pairs[pairs[:, 0] != pairs[:, 1]]
    return distinct


# -- outliers ---

MIN_CONTRAST: Final = 16
"""Grey levels; the flattest of 6,352 real radiographs has 101."""
MAX_COLOUR: Final = 8  # grey levels
MAX_FRAME: Final = 0.5  # share of the area
MAX_ROBUST_Z: Final = 6.0
"""Standard deviations, estimated from quartiles, from which on a distance is unusual."""
COLUMNS: Final = ("row", "reason", "value", "usual")
_FITS: Final = 0.4
"""Correlation with the usual picture that an image turned or inverted back must reach."""
_GAIN: Final = 0.25
"""How much better it must fit than as it is."""
_MIN_IMAGES: Final = 20  # of a projection, for its usual picture to mean anything
_CHANGES: Final[Sequence[tuple[str, Callable[[Array], Array]]]] = (
    ("inverted: its negative fits", np.negative),
    ("upside down: fits when turned by 180 degrees", lambda usual: np.rot90(usual, 2)),
    ("on its side: fits when turned by 90 degrees", lambda usual: np.rot90(usual, 1)),
    ("on its side: fits when turned by 90 degrees", lambda usual: np.rot90(usual, -1)),
)
"""What may have been done to a picture, as done to the usual one or its mirror image: with these,
all eight ways in which a picture can lie."""


def find_embedding_outliers(near: Neighbourhood) -> pd.DataFrame:
    """Images far from all others, of those whose nearest are known.

    The distance to the last neighbour is compared on a log scale with its median over the data set,
    in units of a standard deviation estimated from the quartiles. Gives :data:`COLUMNS`, where
    `value` is the distance over the usual one.
    """
    last, usual = (
        np.maximum(of, np.finfo(np.float32).eps) for of in (near.distances[:, -1], near.usual)
    )
    low, middle, high = np.percentile(np.log(usual), (25, 50, 75))
    spread = (high - low) / 1.349  # of a normal distribution
    is_far = np.log(last) - middle > MAX_ROBUST_Z * max(spread, 1e-3)
    rows = np.flatnonzero(is_far) if near.exact is None else near.exact[is_far[near.exact]]
    return _table(rows, "far from all others in the embedding", last[rows] / np.exp(middle), 1.0)


def find_pixel_outliers(
    facts: Mapping[int, PictureFacts], projections: NDArray[np.str_]
) -> pd.DataFrame:
    """Pictures that are blank, coloured, mostly frame, inverted, turned or unlike the others.

    The last three by correlation with the usual picture of the same projection, which is the median
    over all thumbnails after each was scaled to mean 0 and length 1. `facts` come by row number,
    `projections` are those of all rows. Gives :data:`COLUMNS`: the row, what is odd, its value and
    what is usual; a row may have several.
    """
    if not facts:
        return _table(np.empty(0, np.intp), "", np.empty(0), 0.0)
    rows = np.array(list(facts), np.intp)
    pictures = list(facts.values())
    contrast, colour, frame = _collect(pictures)
    # What all pictures of a data set have makes none of them odd: each bound follows the usual one.
    is_blank = contrast < min(MIN_CONTRAST, np.median(contrast) / 2)
    is_coloured = colour > max(MAX_COLOUR, 2 * np.median(colour))
    is_framed = (frame > max(MAX_FRAME, (1 + np.median(frame)) / 2)) & ~is_blank
    found = [
        _table(rows[chosen], reason, values[chosen], np.median(values))
        for reason, chosen, values in (
            ("blank: almost no contrast", is_blank, contrast),
            ("in colour", is_coloured, colour),
            ("mostly a plain frame", is_framed, frame),
        )
        if chosen.any()
    ]
    for projection in np.unique(projections[rows]):
        of_it = np.flatnonzero((projections[rows] == projection) & ~is_blank)
        if len(of_it) >= _MIN_IMAGES:
            thumbnails = np.stack([pictures[k].thumbnail for k in of_it])
            found += _find_misfits(rows[of_it], thumbnails)
    return pd.concat([*found, _table(rows[:0], "", contrast[:0], 0.0)], ignore_index=True)


def describe_usual(facts: Collection[PictureFacts]) -> list[str]:
    """Say what is unusual about the data set as a whole, so that no single image is blamed."""
    if not facts:
        return []
    contrast, colour, frame = map(np.median, _collect(facts))
    notes = []
    if contrast < MIN_CONTRAST:
        notes.append(
            f"most pictures have almost no contrast: {contrast:.3g} of 255 grey levels are usual. "
            "If 16-bit files hold values of fewer bits, extract them again and state how many, "
            "such as --bits-stored 12."
        )
    if colour > MAX_COLOUR:
        notes.append(
            f"most pictures are in colour: channels usually differ by {colour:.3g} grey levels. "
            "Radiographs are grey, so look at some of them."
        )
    if frame > MAX_FRAME:
        notes.append(
            f"most pictures have a plain frame, which usually takes {frame:.0%} of their area. "
            "Crop the files, or the encoder sees little else."
        )
    return notes


def _collect(facts: Iterable[PictureFacts]) -> tuple[NDArray[np.float64], ...]:
    """Contrast, colour and frame of every picture, each ``(n,)``."""
    return tuple(np.array([(one.contrast, one.colour, one.frame) for one in facts]).T)


def _find_misfits(rows: NDArray[np.intp], thumbnails: NDArray[np.uint8]) -> list[pd.DataFrame]:
    """Thumbnails ``(n, S, S)`` of one projection that fit badly as they are."""
    scaled = standardise(thumbnails)
    usual = standardise(np.median(scaled, axis=0)[None])[0]
    as_is = _fit(scaled, usual)
    reasons, changes = zip(*_CHANGES, strict=True)
    changed = np.stack([_fit(scaled, change(usual)) for change in changes])
    best = np.array(reasons)[changed.argmax(axis=0)]
    is_changed = (changed.max(axis=0) > _FITS) & (changed.max(axis=0) - as_is > _GAIN)
    middle = np.median(as_is)
    spread = 1.4826 * np.median(np.abs(as_is - middle))  # of a normal distribution
    is_unlike = (middle - as_is > MAX_ROBUST_Z * max(spread, 0.02)) & ~is_changed
    found = {reason: is_changed & (best == reason) for reason in dict.fromkeys(reasons)}
    found["unlike the usual picture of its projection"] = is_unlike
    return [
        _table(rows[chosen], reason, as_is[chosen], middle)
        for reason, chosen in found.items()
        if chosen.any()
    ]


def _fit(scaled: Array, usual: Array) -> Array:
    """Correlation of pictures ``(n, S, S)`` with one or its mirror: laterals face either way."""
    sides = (usual, np.fliplr(usual))
    fit: Array = np.maximum(*(np.einsum("nij,ij->n", scaled, side) for side in sides))
    return fit


def standardise(thumbnails: NDArray[np.generic]) -> NDArray[np.float32]:
    """Each picture of ``(n, S, S)`` to mean 0 and length 1, so that products are correlations."""
    centred = thumbnails.astype(np.float32)
    centred -= centred.mean(axis=(1, 2), keepdims=True)
    lengths = np.linalg.norm(centred, axis=(1, 2), keepdims=True)
    scaled: NDArray[np.float32] = centred / np.maximum(lengths, np.float32(1e-6))
    return scaled


def _table(
    rows: NDArray[np.intp], reason: str, values: NDArray[np.float64], usual: float
) -> pd.DataFrame:
    table: pd.DataFrame = pd.DataFrame(
        {"row": rows, "reason": reason, "value": values, "usual": float(usual)}
    )
    return table
