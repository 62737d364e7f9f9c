"""Images that do not look like the others: by their pixels, and by their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.evaluation.audit_images import PictureFacts

Array: TypeAlias = NDArray[Any]

MIN_CONTRAST: Final = 16
"""Grey levels; the flattest of 6,352 real radiographs has 101."""
MAX_COLOUR: Final = 8
MAX_FRAME: Final = 0.5
MAX_ROBUST_Z: Final = 6.0
"""Standard deviations, estimated from quartiles, from which on a distance is unusual."""
_FITS: Final = 0.4
"""Correlation with the usual picture that an image turned or inverted back must reach."""
_GAIN: Final = 0.25
"""How much better it must fit than as it is."""
_MIN_IMAGES: Final = 20  # of a projection, for its usual picture to mean anything

_CHANGES: Final[Mapping[str, Callable[[Array], Array]]] = {
    "inverted: its negative fits": np.negative,
    "upside down: fits when turned by 180 degrees": lambda usual: np.rot90(usual, 2),
    "on its side: fits when turned by 90 degrees": lambda usual: np.rot90(usual, 1),
}
"""What may have been done to a picture, as done to the usual one."""
COLUMNS: Final = ("row", "reason", "value", "usual")


def find_embedding_outliers(distances: NDArray[np.float64]) -> pd.DataFrame:
    """Images far from all others, ``(N, P)`` distances to their neighbours.

    The distance to the last neighbour is compared on a log scale with its median over the data set,
    in units of a standard deviation estimated from the quartiles.

    Returns
    -------
    pd.DataFrame
        Columns :data:`COLUMNS`; `value` is the distance over the usual one.
    """
    last = np.maximum(distances[:, -1], np.finfo(np.float32).eps)
    logs = np.log(last)
    low, middle, high = np.percentile(logs, (25, 50, 75))
    spread = (high - low) / 1.349  # of a normal distribution
    rows = np.flatnonzero(logs - middle > MAX_ROBUST_Z * max(spread, 1e-3))
    return _table(rows, "far from all others in the embedding", last[rows] / np.exp(middle), 1.0)


def find_pixel_outliers(
    facts: Mapping[int, PictureFacts], projections: NDArray[np.str_]
) -> pd.DataFrame:
    """Pictures that are blank, coloured, mostly frame, inverted, turned or unlike the others.

    The last three by correlation with the usual picture of the same projection, which is the median
    over all thumbnails after each was scaled to mean 0 and length 1.

    Parameters
    ----------
    facts
        By row number.
    projections
        Of all rows.

    Returns
    -------
    pd.DataFrame
        Columns :data:`COLUMNS`: the row, what is odd, its value and what is usual. A row may have
        several.
    """
    rows = np.array(list(facts), np.intp)
    pictures = list(facts.values())
    contrast, colour, frame = (
        np.array([getattr(one, name) for one in pictures])
        for name in ("contrast", "colour", "frame")
    )
    is_blank = contrast < MIN_CONTRAST
    found = [
        _table(rows[chosen], reason, values[chosen], np.median(values))
        for reason, chosen, values in (
            ("blank: almost no contrast", is_blank, contrast),
            ("in colour", colour > MAX_COLOUR, colour),
            ("mostly a plain frame", (frame > MAX_FRAME) & ~is_blank, frame),
        )
        if chosen.any()
    ]
    for projection in np.unique(projections[rows]):
        of_it = np.flatnonzero((projections[rows] == projection) & ~is_blank)
        if len(of_it) >= _MIN_IMAGES:
            thumbnails = np.stack([pictures[k].thumbnail for k in of_it])
            found += _find_misfits(rows[of_it], thumbnails)
    return pd.concat([*found, _table(rows[:0], "", contrast[:0], 0.0)], ignore_index=True)


def _find_misfits(rows: NDArray[np.intp], thumbnails: NDArray[np.uint8]) -> list[pd.DataFrame]:
    """Thumbnails ``(n, S, S)`` of one projection that fit badly as they are."""
    scaled = standardise(thumbnails)
    usual = standardise(np.median(scaled, axis=0)[None])[0]
    as_is = _fit(scaled, usual)
    changed = np.stack([_fit(scaled, change(usual)) for change in _CHANGES.values()])
    best = changed.argmax(axis=0)
    is_changed = (changed.max(axis=0) > _FITS) & (changed.max(axis=0) - as_is > _GAIN)
    middle = np.median(as_is)
    spread = 1.4826 * np.median(np.abs(as_is - middle))  # of a normal distribution
    is_unlike = (middle - as_is > MAX_ROBUST_Z * max(spread, 0.02)) & ~is_changed
    found = {reason: is_changed & (best == k) for k, reason in enumerate(_CHANGES)}
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
