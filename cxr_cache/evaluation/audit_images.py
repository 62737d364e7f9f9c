"""One image file at full size -> the few facts about its pixels that an audit keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray

from cxr_cache.datasets.images import MIN_EDGE_PX, read_picture
from cxr_cache.errors import ImageError

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

    Parameters
    ----------
    image_dir, image_ids, bits_stored
        As in :func:`cxr_cache.datasets.images.read_picture`.
    n_jobs
        Processes that decode.
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
    small = _thin_out(grey)
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


def _thin_out(grey: NDArray[Any]) -> NDArray[Any]:
    """Every n-th row and column, so that percentiles are quick."""
    step = max(1, max(grey.shape) // _SMALLER_PX)
    return grey[::step, ::step]


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
