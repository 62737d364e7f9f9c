"""Pillow's resizing of large grey images, to the last bit, in half of its time.

Pillow adds up pixels times weights, one after the other. Here the same sums are matrix products,
which a processor computes many at a time. They are exact: a weight is a whole number of
2**-22, so that sums of thousands of them times 0..255 fit into a double.
"""

from __future__ import annotations

import functools
import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_UNIT: Final = 1 << 22
"""What Pillow multiplies weights by, before it rounds them to whole numbers."""
_MAX_SUPPORT: Final = 3
"""Of Pillow's filters, in pixels of the smaller image to either side: that of Lanczos."""
_MIN_RATIO: Final = 2
"""Of widths; of images that shrink less, few pixels enter a sum, and Pillow is as fast."""
_MAX_RATIO: Final = 64
"""Of widths; to ask for weights takes memory that grows with its square."""
_MAX_HEIGHT: Final = 1.4
"""Of images over their width; of taller ones Pillow resizes the rows first, from some 1.5 on."""
_GROUP: Final = 8
"""Columns of the result per product: of more, the sums hold many weights of 0."""
_STRIP: Final = 1 << 19
"""Pixels that are converted to doubles at a time, so that they stay in the processor's cache."""


class _Group(NamedTuple):
    """Neighbouring columns of the result, and the columns of the image that they are sums of."""

    made: slice
    read: slice
    weights: NDArray[np.float64]
    """``(columns read, columns made)``"""


def shrink(picture: Image.Image, size: tuple[int, int], method: Image.Resampling) -> Image.Image:
    """Resize an image as ``picture.resize(size, method)`` does, to the bit.

    Parameters
    ----------
    picture
        Of any mode. Only 8-bit grey (``L``), not much taller than wide, that becomes at most half
        as wide is resized here, all others by Pillow.
    size
        Width and height of the result.
    method
        Pillow's filter, not ``NEAREST``.
    """
    ratio = picture.width / size[0]
    is_tall = picture.height > _MAX_HEIGHT * picture.width
    if picture.mode != "L" or not _MIN_RATIO <= ratio <= _MAX_RATIO or is_tall:
        return picture.resize(size, method)
    # Pillow, too, has the columns first, rounds, and then resizes what has become much smaller
    return Image.fromarray(_narrow(picture, size[0], method)).resize(size, method)


def _narrow(picture: Image.Image, width: int, method: Image.Resampling) -> NDArray[np.uint8]:
    """Pillow's horizontal pass: uint8, ``(H, width)``."""
    groups = _group_columns(picture.width, width, method)
    n_rows = min(picture.height, max(1, _STRIP // picture.width))
    doubles, sums = np.empty((n_rows, picture.width)), np.empty((n_rows, width))
    narrow = np.empty((picture.height, width), np.uint8)
    for top in range(0, picture.height, n_rows):
        made_rows = narrow[top : top + n_rows]
        strip, summed = doubles[: len(made_rows)], sums[: len(made_rows)]
        # numpy's view of a whole image would be a copy, made in slow pieces
        strip[:] = np.asarray(picture.crop((0, top, picture.width, top + len(made_rows))))
        for made, read, weights in groups:
            np.matmul(strip[:, read], weights, out=summed[:, made])
        summed += 0.5
        made_rows[:] = summed.clip(0, 255, out=summed)  # cut to whole numbers
    return narrow


@functools.lru_cache(maxsize=64)
def _group_columns(n_columns: int, width: int, method: Image.Resampling) -> tuple[_Group, ...]:
    """The weights by which `n_columns` become `width`, as Pillow itself states them.

    It resizes rows that hold single bright points far apart, in its mode of 32-bit numbers, which
    has the weights of 8-bit images and rounds them in the same way.
    """
    reach = math.ceil(_MAX_SUPPORT * n_columns / width) + 1
    period = 2 * reach + 1
    columns = np.arange(n_columns)
    points = np.zeros((period, n_columns), np.int32)
    points[columns % period, columns] = _UNIT
    answers = np.asarray(Image.fromarray(points).resize((width, period), method)) / _UNIT
    middles = ((np.arange(width) + 0.5) * n_columns / width).astype(int)
    groups = []
    for first in range(0, width, _GROUP):
        made = np.arange(first, min(first + _GROUP, width))
        start = max(0, middles[made[0]] - reach)
        near = columns[start : middles[made[-1]] + reach + 1]
        is_near = np.abs(near[:, None] - middles[made]) <= reach
        weights = np.where(is_near, answers[near % period][:, made], 0)
        used = np.flatnonzero(weights.any(axis=1))
        top, bottom = int(used[0]), int(used[-1]) + 1
        groups.append(
            _Group(
                slice(first, first + len(made)),
                slice(start + top, start + bottom),
                np.ascontiguousarray(weights[top:bottom]),
            )
        )
    return tuple(groups)
