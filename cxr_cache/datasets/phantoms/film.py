"""The phantom's film: a grid in the patient's coordinates, and soft shapes drawn on it.

A phantom is drawn the way a film is exposed: every structure adds to the density that the beam
meets, or takes some away, and one tone curve at the end turns density into grey. Coordinates are
the patient's. `y` runs from 0 at the top of the picture to 1 at its bottom. On a frontal view `x`
is 0 at the midline and positive on the patient's left, the right of the picture; on a lateral view
it is negative in front and positive behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import uniform_filter1d

Array = NDArray[np.float32]
Points = NDArray[np.float64]
Box = tuple[int, int, int, int]

CM = 0.025  # a centimetre, as a share of the picture's height


SAMPLES = np.linspace(-0.65, 1.15, 2048)  # where curves are tabulated


def ramp(distance: Array, softness: float) -> Array:
    """Rise from 0 outside to 1 inside, linearly across an edge of the given width."""
    edge = distance * (1 / softness)
    edge += 0.5
    return np.clip(edge, 0, 1, out=edge)


def smooth(curve: ArrayLike) -> Array:
    """Round off the corners of a curve tabulated at SAMPLES."""
    rounded: Array = uniform_filter1d(uniform_filter1d(np.asarray(curve, np.float32), 49), 35)
    return rounded


def profile(knots: Sequence[tuple[float, float]]) -> Array:
    """Draw a smooth curve through ``(position, value)`` knots, tabulated at SAMPLES."""
    return smooth(np.interp(SAMPLES, *np.array(knots).T))


def mirrored(knots: Sequence[tuple[float, float]], unit: float) -> Points:
    """Draw a curve to both sides of 0, with its positions in `unit`, tabulated at SAMPLES."""
    return np.asarray(np.interp(np.abs(SAMPLES) / unit, *np.array(knots).T))


def value_at(table: Array, position: ArrayLike) -> Points:
    """Read a tabulated curve at a few positions, shape as `position`."""
    return np.asarray(np.interp(np.asarray(position), SAMPLES, table))


def trace(points: ArrayLike, n_points: int = 16) -> Points:
    """Round the corners of a polyline and resample it to ``(n_points, 2)``."""
    points = np.asarray(points, dtype=np.float64)
    at = np.linspace(0, len(points) - 1, n_points)
    path = np.stack([np.interp(at, np.arange(len(points)), column) for column in points.T], axis=-1)
    return np.asarray(uniform_filter1d(path, 3, axis=0))


class Film:
    """A square film, with the patient coordinates `x` and `y` of every pixel.

    Its methods draw shapes, which are arrays ``(S, S)`` of float32, 0 outside and 1 inside.
    """

    def __init__(self, size_px: int, rng: np.random.Generator, *, may_face_right: bool) -> None:
        self.size_px = size_px
        self.zoom = rng.uniform(0.94, 1.1)
        self.shift = rng.uniform(-0.025, 0.025, size=2)
        roll = rng.normal(0.0, 0.022)
        self.rotation = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
        if rng.random() < 0.15 and may_face_right:
            self.rotation[0] *= -1
        offset = (np.arange(size_px) + 0.5) / size_px - 0.5
        right, down = offset - self.shift[0], offset[:, None] - self.shift[1]
        inverse = self.rotation.T / self.zoom
        self.x: Array = (inverse[0, 0] * right + inverse[0, 1] * down).astype(np.float32)
        self.y: Array = (inverse[1, 0] * right + inverse[1, 1] * down + 0.5).astype(np.float32)
        self._x_index, self._y_index = self._index(self.x), self._index(self.y)
        coarse = Image.fromarray(rng.standard_normal((24, 24), dtype=np.float32))
        cloudy = coarse.resize((size_px, size_px), Image.Resampling.BICUBIC)
        self.mottle: Array = np.asarray(cloudy)  # a smooth random texture around 0

    @staticmethod
    def _index(coordinate: Array) -> NDArray[np.intp]:
        per_unit = (len(SAMPLES) - 1) / float(SAMPLES[-1] - SAMPLES[0])
        return ((coordinate - float(SAMPLES[0])) * per_unit).astype(np.intp)

    def along_x(self, table: Array) -> Array:
        """Read a tabulated curve at every pixel's `x`."""
        return table.take(self._x_index, mode="clip")

    def along_y(self, table: Array) -> Array:
        """Read a tabulated curve at every pixel's `y`."""
        return table.take(self._y_index, mode="clip")

    def to_pixels(self, points: ArrayLike) -> Points:
        """Turn patient coordinates ``(..., 2)`` into columns and rows of pixels."""
        seen = (np.asarray(points) - (0, 0.5)) @ (self.rotation.T * self.zoom)
        return np.asarray((seen + self.shift + 0.5) * self.size_px)

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, softness: float = 1.0, tilt: float = 0.0
    ) -> Array:
        """Draw an ellipse with a soft rim. Softness 1 makes a dome; `tilt` lowers its right end."""
        shape = np.zeros_like(self.x)
        reach = (max(rx, ry) + abs(tilt) * rx) * self.zoom * self.size_px * 1.1 + 1
        left, top = np.maximum(self.to_pixels((x, y)) - reach, 0).astype(int)
        window = np.s_[top : int(top + 2 * reach) + 2, left : int(left + 2 * reach) + 2]
        across = (self.x[window] - x) * (1 / rx)
        down = (self.y[window] - y) * (1 / ry) - across * (tilt * rx / ry)
        rim = np.clip((1 - across * across - down * down) * (1 / softness), 0, 1)
        shape[window] = rim * rim * (3 - 2 * rim)
        return shape

    def bands(
        self, paths: ArrayLike, widths: ArrayLike, values: ArrayLike = 1.0, inside: float = 1.0
    ) -> Array:
        """Draw bands along polylines ``(n, points, 2)``, each of one value; widths may taper.

        With `inside` below 1 only the rim has the full value, like the cortex of a bone. Where
        bands cross, the later one covers the earlier one.
        """
        middle = self.to_pixels(paths)
        along = np.gradient(middle, axis=1)
        normal = along[..., ::-1] * (-1, 1) / (np.linalg.norm(along, axis=-1, keepdims=True) + 1e-9)
        half = np.broadcast_to(widths, middle.shape[:2])[..., None] * (self.zoom * self.size_px / 2)
        outlines = np.concatenate([middle + half * normal, (middle - half * normal)[:, ::-1]], 1)
        start = np.clip(outlines.min(axis=(0, 1)), 0, self.size_px - 1).astype(int)
        end = np.clip(outlines.max(axis=(0, 1)) + 2, start + 1, self.size_px).astype(int)

        sheet = Image.new("L", tuple(2 * (end - start)))  # at twice the size, for smooth edges
        draw = ImageDraw.Draw(sheet)
        rims = np.broadcast_to(np.asarray(values) * 255.0, len(outlines))
        flat = (2 * (outlines - start)).reshape(len(outlines), -1)
        for outline, rim in zip(flat.tolist(), rims.tolist(), strict=True):
            draw.polygon(outline, fill=int(inside * rim), outline=int(rim))
        shape = np.zeros_like(self.x)
        window = np.s_[start[1] : end[1], start[0] : end[0]]
        shape[window] = np.asarray(sheet.reduce(2), dtype=np.float32) * (1 / 255)
        return shape

    def box(self, region: Array) -> Box | None:
        """Find the bounds ``(x0, y0, x1, y1)`` of a region in pixels; None if it is not visible.

        Ends are excluded.
        """
        inside = region > 0.25 * max(float(region.max()), 0.02)
        columns, rows = (np.flatnonzero(inside.any(axis=axis)) for axis in (0, 1))
        if not len(columns):
            return None
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
