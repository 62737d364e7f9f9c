"""Synthetic chest X-rays with known findings, for the demo, the tests and the benchmarks.

A phantom is drawn the way a film is exposed: every structure adds to the density that the beam
meets, or takes some away, and one tone curve at the end turns density into grey. Coordinates are
the patient's. `y` runs from 0 at the top of the picture to 1 at its bottom. On a frontal view `x`
is 0 at the midline and positive on the patient's left, the right of the picture; on a lateral view
it is negative in front and positive behind.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import uniform_filter1d

from cxr_cache.errors import ConfigError

Array = NDArray[np.float32]
Points = NDArray[np.float64]
Box = tuple[int, int, int, int]

CM = 0.025
MIN_IMAGE_SIZE_PX = 64
NORMAL_SHARE = 0.4
RECIPE_FILE = "phantoms.json"
REPORT_COLUMNS = ["uid", "MeSH", "Problems", "image", "indication", "comparison", "findings"]
REPORT_COLUMNS += ["impression"]
PROJECTION_COLUMNS = ["uid", "filename", "projection"]
BOX_COLUMNS = ["filename", "finding", "x0", "y0", "x1", "y1"]


# --- the patient ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sign:
    """Where one finding sits in the patient, the same for every view of a study."""

    finding: str
    side: int  # -1 the patient's right, 1 left
    across: float  # 0 midline, 1 chest wall
    depth: float  # 0 front, 1 back
    height: float  # 0 apex, 1 diaphragm
    size: float  # 0 slight, 1 severe
    seed: int  # for shapes with a random outline

    def words(self) -> dict[str, str]:
        """What a report calls the place and the size."""
        lobes = ("upper lobe", "middle lobe" if self.side < 0 else "lingula", "lower lobe")
        return {
            "side": "right" if self.side < 0 else "left",
            "lobe": lobes[int(np.digitize(self.height, (0.45, 0.6)))],
            "degree": ("mild", "moderate", "severe")[int(3 * self.size)],
            "extent": ("small", "moderate", "large")[int(3 * self.size)],
        }


@dataclass(frozen=True)
class Anatomy:
    """What makes one patient differ from another."""

    chest_width: float  # half the inner width of the rib cage
    chest_depth: float  # front to back, 1 on average
    body_width: float  # half the width of the trunk
    bulk: float  # density of the trunk, 1 on average
    dome_y: float  # top of the right hemidiaphragm
    dome_height: float  # from there down to the costophrenic angle
    heart_ratio: float  # cardiothoracic ratio
    air: float  # share of the trunk's density that the lungs take away
    vessels: float  # contrast of the lung markings, 1 on average
    rib_drop: float  # half the height of a rib's loop
    spine_curve: float  # how far the spine leaves the midline
    stomach: float  # radius of the gas bubble
    seed: int  # for the vessel trees
    raised: tuple[float, float] = (0.0, 0.0)  # lift of the right and the left hemidiaphragm

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Anatomy:
        """A person without findings."""
        chest_width = rng.uniform(0.325, 0.38)
        return cls(
            chest_width=chest_width,
            chest_depth=rng.uniform(0.93, 1.05),
            body_width=chest_width * rng.uniform(1.2, 1.42),
            bulk=rng.uniform(0.88, 1.12),
            dome_y=rng.uniform(0.61, 0.68),
            dome_height=rng.uniform(0.09, 0.13),
            heart_ratio=rng.uniform(0.40, 0.49),
            air=rng.uniform(0.64, 0.72),
            vessels=rng.uniform(0.8, 1.2),
            rib_drop=rng.uniform(0.05, 0.065),
            spine_curve=rng.normal(0.0, 0.004),
            stomach=rng.uniform(0.0, 0.055),
            seed=int(rng.integers(2**32)),
        )


# --- drawing -------------------------------------------------------------------------------------

SAMPLES = np.linspace(-0.65, 1.15, 2048)  # where curves are tabulated


def ramp(distance: Array, softness: float) -> Array:
    """0 outside, 1 inside, linear across an edge of the given width."""
    edge = distance * (1 / softness)
    edge += 0.5
    return np.clip(edge, 0, 1, out=edge)


def smooth(curve: ArrayLike) -> Array:
    """Round off the corners of a curve tabulated at SAMPLES."""
    rounded: Array = uniform_filter1d(uniform_filter1d(np.asarray(curve, np.float32), 49), 35)
    return rounded


def profile(knots: Sequence[tuple[float, float]]) -> Array:
    """A smooth curve through ``(position, value)`` knots, tabulated at SAMPLES."""
    return smooth(np.interp(SAMPLES, *np.array(knots).T))


def mirrored(knots: Sequence[tuple[float, float]], unit: float) -> Points:
    """The same curve to both sides of 0, its positions in `unit`, tabulated at SAMPLES."""
    return np.asarray(np.interp(np.abs(SAMPLES) / unit, *np.array(knots).T))


def value_at(table: Array, position: ArrayLike) -> Points:
    """Read a tabulated curve at a few positions, shape as `position`."""
    return np.asarray(np.interp(np.asarray(position), SAMPLES, table))


def trace(points: ArrayLike, n_points: int = 16) -> Points:
    """A polyline with its corners rounded, resampled to ``(n_points, 2)``."""
    points = np.asarray(points, dtype=np.float64)
    at = np.linspace(0, len(points) - 1, n_points)
    path = np.stack([np.interp(at, np.arange(len(points)), column) for column in points.T], axis=-1)
    return np.asarray(uniform_filter1d(path, 3, axis=0))


class Film:
    """A square film: patient coordinates `x` and `y` of every pixel, and shapes to draw on it.

    Shapes are arrays ``(S, S)`` of float32 between 0 outside and 1 inside.
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
        """The value of a tabulated curve at every pixel's `x`."""
        return table.take(self._x_index, mode="clip")

    def along_y(self, table: Array) -> Array:
        """The value of a tabulated curve at every pixel's `y`."""
        return table.take(self._y_index, mode="clip")

    def to_pixels(self, points: ArrayLike) -> Points:
        """Patient coordinates ``(..., 2)`` to columns and rows."""
        seen = (np.asarray(points) - (0, 0.5)) @ (self.rotation.T * self.zoom)
        return np.asarray((seen + self.shift + 0.5) * self.size_px)

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, softness: float = 1.0, tilt: float = 0.0
    ) -> Array:
        """An ellipse with a soft rim; softness 1 makes a dome. `tilt` lowers its right end."""
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
        """Bands along polylines ``(n, points, 2)``, each of one value; widths may taper.

        With `inside` below 1 only the rim has the full value, like the cortex of a bone. Where
        bands cross, the later one covers the earlier.
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
        """Bounds ``(x0, y0, x1, y1)`` of a region in pixels, ends excluded; None if unseen."""
        inside = region > 0.25 * max(float(region.max()), 0.02)
        columns, rows = (np.flatnonzero(inside.any(axis=axis)) for axis in (0, 1))
        if not len(columns):
            return None
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass
class Scene:
    """A drawn patient, ready for findings to be painted on; arrays have shape ``(S, S)``."""

    film: Film
    anatomy: Anatomy
    is_frontal: bool
    density: Array
    air: Array  # the density that aerated lung takes away
    markings: Array  # the density that vessels add
    lungs: Array  # mask, with what lies in front of the heart and behind it
    heart: Array  # mask
    spine: Array  # mask
    spine_x: Array  # tabulated over y, as are the next two
    near_wall: Array  # midline on a frontal view, front of the lungs on a lateral one
    far_wall: Array  # chest wall, or back of the lungs

    @property
    def across(self) -> Array:
        """0 at the near wall of the lungs, 1 at the far one."""
        near, far = self.film.along_y(self.near_wall), self.film.along_y(self.far_wall)
        return ((np.abs(self.film.x) if self.is_frontal else self.film.x) - near) / (far - near)

    def place(self, sign: Sign) -> tuple[float, float]:
        """The point of the lungs where a finding sits."""
        y = 0.14 + sign.height * (self.anatomy.dome_y - 0.14)
        near, far = (float(value_at(wall, y)) for wall in (self.near_wall, self.far_wall))
        if self.is_frontal:
            return sign.side * sign.across * far, y
        return near + sign.depth * (far - near), y

    def on_side(self, sign: Sign) -> Array:
        """The lung that a finding is in; a lateral view shows both in one."""
        return self.lungs * (self.film.x * sign.side > 0) if self.is_frontal else self.lungs

    def fill(self, mask: Array, amount: float) -> Array:
        """Put water where the lung had air; returns the change of density."""
        change = mask * self.air * amount
        self.density += change
        self.air = self.air - change
        return change


# --- anatomy -------------------------------------------------------------------------------------
# Knots are (position, value). Frontal widths and positions across are in units of the half width
# of the chest (trunk: of the body).

# fmt: off
BODY = profile([
    (0, 0.29), (0.045, 0.33), (0.075, 0.55), (0.1, 0.9), (0.135, 1.15), (0.2, 1.26), (0.3, 1.15),
    (0.42, 1.0), (0.6, 0.95), (0.8, 0.98), (1.1, 1.04),
])
BODY_DENSITY = profile([
    (0, 0.9), (0.1, 1.05), (0.2, 1.15), (0.5, 1.1), (0.65, 1.35), (0.8, 1.75), (1, 1.9),
])
CAGE = profile([
    (0.09, 0.25), (0.13, 0.5), (0.17, 0.64), (0.25, 0.78), (0.35, 0.87), (0.48, 0.94), (0.62, 0.99),
    (0.75, 1.01), (1, 1),
])
APEX = [(0, 0.2), (0.15, 0.165), (0.28, 0.135), (0.4, 0.125), (0.55, 0.13), (0.7, 0.15), (2, 0.2)]
DIAPHRAGM = [
    (0, 0.55), (0.1, 0.3), (0.3, 0.05), (0.5, 0), (0.65, 0.08), (0.8, 0.33), (0.9, 0.65),
    (1.05, 1.3), (2, 2),
]
MEDIASTINUM_RIGHT = profile([(0, 0.2), (0.15, 0.15), (0.25, 0.12), (0.5, 0.12), (0.8, 0.1)])
MEDIASTINUM_LEFT = profile([
    (0, 0.2), (0.15, 0.14), (0.215, 0.155), (0.26, 0.22), (0.31, 0.16), (0.355, 0.19), (0.42, 0.16),
    (0.5, 0.13), (0.8, 0.12),
])
HEART_RIGHT = profile([
    (0.34, 0), (0.4, 0.3), (0.46, 0.8), (0.54, 1), (0.62, 0.95), (0.72, 0.6), (0.8, 0.3),
])
HEART_LEFT = profile([
    (0.32, 0), (0.4, 0.25), (0.47, 0.58), (0.54, 0.88), (0.61, 1), (0.66, 1), (0.73, 0.7),
    (0.8, 0.3),
])
CLAVICLE = [(0.06, 0.185), (0.25, 0.165), (0.5, 0.115), (0.75, 0.095), (1, 0.1), (1.2, 0.12)]
SHOULDER_BLADE = [(1.2, 0.15), (1.05, 0.2), (1.02, 0.28), (1.05, 0.36), (1.12, 0.43), (1.2, 0.45)]
ARM_BONE = [(1.32, 0.14), (1.4, 0.17), (1.45, 0.25), (1.5, 0.34), (1.57, 0.45), (1.66, 0.6)]

CHEST_FRONT = profile([
    (0, -0.11), (0.07, -0.13), (0.14, -0.2), (0.25, -0.3), (0.4, -0.365), (0.6, -0.39), (0.8, -0.4),
])
CHEST_BACK = profile([
    (0, 0.13), (0.06, 0.19), (0.15, 0.28), (0.3, 0.35), (0.45, 0.37), (0.65, 0.355), (0.85, 0.32),
])
LATERAL_DENSITY = profile([
    (0, 1.9), (0.12, 1.9), (0.22, 1.65), (0.35, 1.5), (0.6, 1.45), (0.75, 1.75), (1, 2),
])
LUNG_FRONT = profile([
    (0.1, 0.05), (0.15, -0.04), (0.2, -0.15), (0.28, -0.235), (0.4, -0.295), (0.55, -0.33),
    (0.75, -0.35),
])
LUNG_BACK = profile([
    (0.1, 0.1), (0.15, 0.18), (0.22, 0.235), (0.32, 0.275), (0.45, 0.295), (0.6, 0.295),
    (0.75, 0.28), (0.9, 0.265),
])
LATERAL_DIAPHRAGM = [
    (-0.4, 0.6), (-0.3, 0.25), (-0.2, 0.04), (-0.1, -0.02), (0, 0.08), (0.1, 0.45), (0.2, 1.1),
    (0.28, 1.8), (0.35, 2.2),
]
LATERAL_SPINE = profile([
    (0, 0.05), (0.1, 0.135), (0.2, 0.2), (0.33, 0.242), (0.48, 0.255), (0.65, 0.245), (0.85, 0.205),
    (1.05, 0.17),
])
BREASTBONE_Y = np.linspace(0.19, 0.6, 10)
AORTA = trace([
    (-0.07, 0.45), (-0.075, 0.36), (-0.04, 0.29), (0.03, 0.265), (0.1, 0.29), (0.13, 0.36),
    (0.15, 0.46), (0.165, 0.6),
])
# fmt: on


def _blocks() -> Array:
    """Vertebral bodies with bright end plates and dark discs between them, over y."""
    phase = (SAMPLES / (0.043 + 0.012 * np.clip(SAMPLES, 0, 1))) % 1
    from_disc = np.minimum(phase, 1 - phase)
    plates = np.exp(-(((from_disc - 0.13) / 0.06) ** 2))
    return ((1 + 0.6 * plates) * np.clip(from_disc * 12 - 0.6, 0, 1)).astype(np.float32)


VERTEBRAE = _blocks()


def draw_vessels(film: Film, anatomy: Anatomy, hila: Sequence[tuple[float, float]]) -> Array:
    """Lung markings: from each hilum curved trunks, each with forks, tapering to nothing."""
    rng = np.random.default_rng(anatomy.seed)
    n_points, n_trunks, n_forks = 8, 9, 3

    def grow(start: Points, aim: Points, length: Points) -> Points:
        bend = rng.normal(0, 0.09, (len(aim), n_points)).cumsum(axis=1)
        bend += rng.normal(0, 0.05, len(aim))[:, None] * np.arange(n_points)
        angle = aim[:, None] + bend
        step = np.stack([np.cos(angle), np.sin(angle)], axis=-1) * length[:, None, None] / n_points
        return np.asarray(start[:, None] + step.cumsum(axis=1))

    trees = []
    for x, y in hila:
        aim = np.linspace(-1.4, 1.5, n_trunks) + rng.normal(0, 0.12, n_trunks)
        aim = np.where(x < 0, np.pi - aim, aim)
        hilum = np.array([x, y]) + rng.normal(0, (0.006, 0.02), (n_trunks, 2))
        trunks = grow(hilum, aim, rng.uniform(0.2, 0.34, n_trunks))
        turn = np.tile((-0.6, 0.6, -0.4), n_trunks) + rng.normal(0, 0.15, n_trunks * n_forks)
        forks = grow(
            trunks[:, (1, 3, 5)].reshape(-1, 2),
            np.repeat(aim, n_forks) + turn,
            rng.uniform(0.06, 0.17, n_trunks * n_forks),
        )
        trees += [forks, trunks]
    sizes = [n_trunks * n_forks, n_trunks] * len(hila)
    caliber, contrast = (np.repeat(v * len(hila), sizes) for v in ([0.005, 0.01], [0.7, 1.0]))
    widths = caliber[:, None] * np.linspace(1, 0, n_points) ** 1.3
    return film.bands(np.concatenate(trees), widths, contrast)


def frontal_ribs(anatomy: Anatomy, cage: Array, spine_x: Array) -> Points:
    """Ten loops a side, from the spine round the chest wall and to the front, (20, 32, 2)."""
    level = np.arange(10)[:, None]
    turn = np.linspace(0.05, 0.85, 32) * np.pi
    start = 0.095 + 0.056 * level
    drop = anatomy.rib_drop * (0.6 + 0.06 * level)
    y = start + drop * (1 - np.cos(turn)) + 0.012 * np.sin(2 * turn)
    reach = (value_at(cage, start + drop) + 0.006) * np.sin(turn) ** 0.9
    at_spine = value_at(spine_x, start) * np.clip(np.cos(turn), 0, 1)
    return np.concatenate([np.stack([s * reach + at_spine, y], axis=-1) for s in (-1, 1)])


def draw_airways(film: Film, midline: Array, turn: float) -> Array:
    """The trachea and its two main branches."""
    trachea = trace([(0, 0), (0, 0.1), (0, 0.2), (0.004, 0.29), (0.025, 0.33), (0.06, 0.37)])
    branch = trace([(0, 0.28), (-0.005, 0.3), (-0.02, 0.325), (-0.035, 0.345), (-0.055, 0.365)])
    paths = np.stack([branch, trachea])
    paths[..., 0] += turn + value_at(midline, paths[..., 1])
    narrowing = np.interp(np.linspace(0, 1, 16), (0, 0.6, 1), (0.036, 0.034, 0.018))
    return film.bands(paths, np.stack([np.full(16, 0.024), narrowing]), (0.6, 1))


def frontal_scene(film: Film, anatomy: Anatomy, turn: float) -> Scene:
    """The chest from behind (PA); `turn` shifts what lies in front against the spine."""
    x, y, a, unit = film.x, film.y, anatomy, anatomy.chest_width
    wide = np.abs(x)
    spine_x = (a.spine_curve * np.sin((SAMPLES - 0.15) * 2 * np.pi / 0.8)).astype(np.float32)
    midline = spine_x * 0.5
    cage = film.along_y(CAGE * unit)
    lifted = np.where(SAMPLES < 0, a.raised[0], a.raised[1] - 0.02)
    floor = film.along_x(smooth(a.dome_y - lifted + a.dome_height * mirrored(DIAPHRAGM, unit)))
    apex = film.along_x(smooth(mirrored(APEX, unit)))

    depth = film.along_y(BODY_DENSITY * a.bulk)
    trunk = depth * np.sqrt(np.clip(1 - (x / film.along_y(BODY * a.body_width)) ** 2, 0, 1))
    arm = (wide - a.body_width * 1.12 - 0.14 * y) * (1 / 0.075)
    arm = 0.8 * np.sqrt(np.clip(1 - arm * arm, 0, 1)) * ramp(y - 0.22, 0.12)
    lungs = ramp(cage - wide, 0.012) * ramp(y - apex, 0.015) * ramp(floor - y, 0.008)

    width = a.heart_ratio * 2 * unit
    right = MEDIASTINUM_RIGHT * unit + HEART_RIGHT * (0.3 * width - 0.12 * unit)
    left = MEDIASTINUM_LEFT * unit + HEART_LEFT * (0.7 * width - 0.13 * unit)
    inner = x - film.along_y(midline + turn)
    silhouette = ramp(film.along_y(left) - inner, 0.012) * ramp(inner + film.along_y(right), 0.012)
    heart = silhouette * ramp(y - 0.36, 0.02) * ramp(floor + 0.01 - y, 0.02)
    clear = lungs * (1 - silhouette * (0.93 - 0.2 * heart))
    air = trunk * a.air * clear
    markings = draw_vessels(film, a, [(-0.23 * unit, 0.4), (0.24 * unit, 0.385)])
    markings *= clear * (0.14 * a.vessels)

    ribs = frontal_ribs(a, CAGE * unit, spine_x)
    shoulder = np.stack([trace(path) for path in (CLAVICLE, SHOULDER_BLADE, ARM_BONE)])
    shoulder *= (unit, 1)
    front = np.concatenate([ribs[:, 16:], shoulder, shoulder * (-1, 1)])
    widths = np.array([0.019] * 20 + [0.026, 0.012, 0.045] * 2)
    brightness = [0.65] * 20 + [1, 0.6, 1] * 2
    column = ramp(0.033 - np.abs(x - film.along_y(spine_x)), 0.012)
    hila = film.ellipse(-0.24 * unit, 0.405, 0.04, 0.065)
    hila += film.ellipse(0.25 * unit, 0.385, 0.035, 0.055)
    below = ramp(y - floor, 0.02) * ramp(cage - wide, 0.03)
    texture = film.mottle * ramp(y - floor - 0.1, 0.1)

    density = np.maximum(trunk, arm) - air + markings
    density += 0.17 * film.bands(ribs[:, :17], 0.022, inside=0.6)
    density += 0.22 * film.bands(front, widths[:, None], brightness, inside=0.6)
    density += column * (0.08 + 0.12 * film.along_y(VERTEBRAE)) + 0.1 * heart + 0.12 * hila * lungs
    density += below * (0.15 + 0.05 * texture) - 0.3 * draw_airways(film, midline, turn)
    if a.stomach > 0.015:
        gas = film.ellipse(0.45 * unit, a.dome_y + 0.04 + a.stomach, 1.2 * a.stomach, a.stomach)
        density -= 0.6 * gas * below
    return Scene(
        film, a, True, density, air, markings, lungs, heart, column, spine_x, CAGE * 0, CAGE * unit
    )


def lateral_scene(film: Film, anatomy: Anatomy, turn: float) -> Scene:
    """The chest from its left side; `turn` shifts the ribs of one side against the other's."""
    x, y, a, unit = film.x, film.y, anatomy, anatomy.chest_depth
    near, far, spine_x = LUNG_FRONT * unit, LUNG_BACK * unit, LATERAL_SPINE * unit
    middle = film.along_y((CHEST_FRONT + CHEST_BACK) * (unit / 2))
    half = film.along_y((CHEST_BACK - CHEST_FRONT) * (unit / 2))
    depth = film.along_y(LATERAL_DENSITY * a.bulk)
    trunk = depth * np.sqrt(np.clip(1 - ((x - middle) / half) ** 2, 0, 1))
    arm = (y - 0.06 - 0.2 * x) * (1 / 0.11)
    arm = 1.1 * np.sqrt(np.clip(1 - arm * arm, 0, 1)) * ramp(0.05 - x, 0.2)

    domes = np.interp(SAMPLES / unit, *np.array(LATERAL_DIAPHRAGM).T) * a.dome_height + a.dome_y
    floors = [film.along_x(smooth(domes - lift)) for lift in (a.raised[0], a.raised[1] - 0.022)]
    above = (ramp(floors[0] - y, 0.01) + ramp(floors[1] - y, 0.01)) * 0.5
    lungs = ramp(x - film.along_y(near), 0.012) * ramp(film.along_y(far) - x, 0.02)
    lungs *= ramp(y - 0.15, 0.08) * above
    size = a.heart_ratio / 0.45
    heart = film.ellipse(
        (-0.2 + 0.04 * size) * unit, a.dome_y - 0.1, 0.16 * size, 0.13 * size, 0.7, tilt=-0.35
    )
    clear = lungs * (1 - 0.45 * heart)
    air = trunk * a.air * clear
    markings = draw_vessels(film, a, [(-0.01, 0.42), (0.02, 0.42)])
    markings *= clear * (0.14 * a.vessels)

    level = (0.13 + 0.058 * np.arange(9))[:, None]
    s = np.linspace(0, 1, 12)
    starts = value_at(spine_x, level) + 0.03
    rib_x = starts + (value_at(near, level + 0.2) - starts) * s + 0.02 * np.sin(np.pi * s)
    ribs = np.stack([rib_x, level + 0.2 * s**1.2], axis=-1)
    ribs = np.concatenate([ribs, np.add(ribs, (0.01, 0.022 + turn))])
    sternum = np.stack([value_at(near, BREASTBONE_Y) - 0.012, BREASTBONE_Y], axis=-1)
    column = ramp(0.036 - np.abs(x - film.along_y(spine_x)), 0.01)
    windpipe = trace([(-0.03, 0.02), (0.0, 0.15), (0.015, 0.28), (0.02, 0.39)])

    density = np.maximum(trunk, arm) - air + markings
    density += 0.09 * film.bands(ribs, 0.016, inside=0.6)
    density += 0.2 * film.bands([sternum], 0.022, inside=0.6)
    density += column * (0.12 + 0.15 * film.along_y(VERTEBRAE))
    density += lungs * (0.1 * film.bands([AORTA], np.linspace(0.07, 0.04, 16)))
    density += lungs * (0.15 * film.ellipse(0.0, 0.42, 0.055, 0.055))
    density -= 0.22 * film.bands([windpipe], np.linspace(0.032, 0.015, 16))
    if a.stomach > 0.015:
        gas = film.ellipse(-0.1, a.dome_y + 0.06 + a.stomach, 1.3 * a.stomach, a.stomach)
        density -= 0.6 * gas * (1 - above)
    return Scene(film, a, False, density, air, markings, lungs, heart, column, spine_x, near, far)


# --- findings ------------------------------------------------------------------------------------
# A painter changes the scene and returns the regions that it changed, one mask for each box. A
# finding of the patient's build alters the anatomy first, and its painter only names the region.


def paint_effusion(scene: Scene, sign: Sign) -> list[Array]:
    """Fluid fills the angle and climbs the chest wall."""
    bottom = scene.anatomy.dome_y + scene.anatomy.dome_height * (1 if scene.is_frontal else 1.5)
    rise = (0.11 + 0.2 * sign.size) * (0.3 + 0.7 * np.clip(scene.across, 0, 1) ** 4)
    return [scene.fill(ramp(scene.film.y - bottom + rise, 0.02) * scene.on_side(sign), 0.95)]


def paint_round(
    scene: Scene, sign: Sign, *, radius_cm: tuple[float, float], lobes: int
) -> list[Array]:
    """A round shadow; several `lobes` make its outline irregular."""
    x, y = scene.place(sign)
    radius = CM * float(np.interp(sign.size, (0, 1), radius_cm))
    shadow = scene.film.ellipse(x, y, radius, radius, 0.5)
    for dx, dy in np.random.default_rng(sign.seed).uniform(-0.5, 0.5, (lobes, 2)) * radius:
        lobe = scene.film.ellipse(x + dx, y + dy, 0.75 * radius, 0.7 * radius, 0.5)
        shadow = np.maximum(shadow, lobe)
    scene.density += 0.3 * shadow
    return [shadow]


def paint_granuloma(scene: Scene, sign: Sign) -> list[Array]:
    """One to three dots of chalk."""
    x, y = scene.place(sign)
    rng = np.random.default_rng(sign.seed)
    dots = []
    for dx, dy in rng.normal(0, 1.5 * CM, (1 + sign.seed % 3, 2)):
        radius = rng.uniform(0.3, 0.5) * CM
        dots.append(scene.film.ellipse(x + dx, y + dy, radius, radius, 0.4))
        scene.density += 0.7 * dots[-1]
    return dots


def paint_cloud(
    scene: Scene, sign: Sign, *, radius_cm: float, patchy: float, amount: float
) -> list[Array]:
    """A fluffy part of lung that has lost its air; the bronchi in it stay dark."""
    radius = radius_cm * CM * (0.85 + 0.3 * sign.size)
    cloud = scene.film.ellipse(*scene.place(sign), 1.2 * radius, radius)
    cloud = np.clip(1.1 * cloud * (1 + patchy * scene.film.mottle), 0, 1)
    cloud *= scene.on_side(sign)
    scene.density -= amount * scene.markings * cloud
    return [scene.fill(cloud, amount)]


def paint_atelectasis(scene: Scene, sign: Sign) -> list[Array]:
    """Plates of collapsed lung above a diaphragm that has been drawn up."""
    rng = np.random.default_rng(sign.seed)
    top = scene.anatomy.dome_y - scene.anatomy.raised[sign.side > 0]
    x, _ = scene.place(replace(sign, across=0.55, height=1.0))
    y = top - rng.uniform(0.015, 0.08, (3, 1))
    s = np.linspace(-1, 1, 8)
    half, slope = rng.uniform(0.06, 0.1, (3, 1)), rng.normal(0, 0.02, (3, 1))
    plates = np.stack([x + half * s, y + slope * s], axis=-1)
    layer = scene.film.bands(plates, 0.012 * np.sqrt(1.05 - s**2)) * scene.lungs
    scene.density += 0.25 * layer
    across = scene.across
    drawn_up = (across > 0) & (across < 1) & (np.abs(scene.film.y - top - 0.02) < 0.11)
    if scene.is_frontal:
        drawn_up &= scene.film.x * sign.side > 0
    return [drawn_up.astype(np.float32)]


def paint_pneumothorax(scene: Scene, sign: Sign) -> list[Array]:
    """Air between lung and chest wall: no markings beyond a thin white edge. Frontal only."""
    if not scene.is_frontal:
        return []
    y, cap = scene.film.y, 0.05 + 0.09 * sign.size
    gap = cap * np.clip(1.15 - (y - 0.12) * 2, 0, 1)
    collapsed = ramp(1 - scene.across - gap * 3.3, 0.03) * ramp(y - 0.125 - cap, 0.012)
    side = scene.on_side(sign) * (scene.air > 0.1) * (gap > 0.2 * cap)
    beyond, edge = side * (1 - collapsed), side * 4 * collapsed * (1 - collapsed)
    scene.density += 0.15 * edge + 0.06 * side * collapsed - beyond * (scene.markings + 0.1)
    return [np.maximum(beyond, edge)]


def paint_hernia(scene: Scene, sign: Sign) -> list[Array]:
    """Stomach above the diaphragm: a round bubble behind the heart with a fluid level."""
    film, radius = scene.film, 0.05 + 0.025 * sign.size
    x, y = 0.02 + 0.02 * sign.side if scene.is_frontal else 0.1, scene.anatomy.dome_y - 0.015
    bubble = film.ellipse(x, y, 1.15 * radius, radius, 0.3)
    gas = film.ellipse(x, y, radius, 0.86 * radius, 0.4) * ramp(y + 0.2 * radius - film.y, 0.01)
    scene.density += 0.28 * bubble - (0.75 if scene.is_frontal else 0.35) * gas
    return [bubble]


def paint_edema(scene: Scene, sign: Sign) -> list[Array]:
    """Haze that spreads from the hila like wings."""
    wings = scene.film.ellipse(-0.15 if scene.is_frontal else 0.0, 0.44, 0.13, 0.18)
    if scene.is_frontal:
        wings += scene.film.ellipse(0.15, 0.44, 0.13, 0.18)
    wings *= np.clip(0.8 + 0.25 * scene.film.mottle, 0, 1)
    return [scene.fill(wings, 0.45 + 0.25 * sign.size)]


def paint_degeneration(scene: Scene, sign: Sign) -> list[Array]:
    """Bony spurs at the edges of the thoracic spine."""
    rng = np.random.default_rng(sign.seed)
    y = np.linspace(0.3, 0.7, 6)[:, None] + rng.uniform(-0.02, 0.02, (6, 1))
    out = np.where(rng.random((6, 1)) < 0.5, -1, 1) if scene.is_frontal else -1
    s = np.array([-0.5, 0.7, 1.1, 1.6])
    spurs = np.stack([value_at(scene.spine_x, y) + out * 0.036 * s, y + 0.006 * s**2], axis=-1)
    layer = scene.film.bands(spurs, [0.008, 0.013, 0.016, 0.005])
    scene.density += 0.35 * layer
    return [layer]


def overinflate(anatomy: Anatomy, sign: Sign) -> Anatomy:
    """Long lungs on a low, flat diaphragm in a deep chest."""
    dome_y = anatomy.dome_y + 0.05 + 0.03 * sign.size
    dome_height, chest_depth = 0.35 * anatomy.dome_height, 1.08 * anatomy.chest_depth
    return replace(anatomy, dome_y=dome_y, dome_height=dome_height, chest_depth=chest_depth)


def lift_diaphragm(anatomy: Anatomy, sign: Sign) -> Anatomy:
    """One side drawn up."""
    lift = 0.03 + 0.03 * sign.size
    return replace(anatomy, raised=(lift, 0.0) if sign.side < 0 else (0.0, lift))


@dataclass(frozen=True)
class PhantomFinding:
    """How one finding is coded, reported and drawn, and how common it is."""

    mesh: str  # its part before the first slash is the tag of the Problems column
    phrase: str  # follows "There is"
    weight: float  # how common it is, against the others
    paint: Callable[[Scene, Sign], list[Array]]
    alter: Callable[[Anatomy, Sign], Anatomy] = lambda anatomy, sign: anatomy

    @property
    def tag(self) -> str:
        """Tag of the Problems column, from which the label rule derives the finding."""
        return self.mesh.split("/")[0]


# fmt: off
PHANTOM_FINDINGS: Mapping[str, PhantomFinding] = {
    "Cardiomegaly": PhantomFinding(
        "Cardiomegaly/{degree}", "{degree} cardiomegaly", 5, lambda scene, _: [scene.heart],
        lambda a, sign: replace(a, heart_ratio=0.58 + 0.12 * sign.size)),
    "Pleural Effusion": PhantomFinding(
        "Pleural Effusion/{side}/{extent}", "a {extent} {side} pleural effusion", 4,
        paint_effusion),
    "Nodule": PhantomFinding(
        "Nodule/lung/{lobe}/{side}", "a nodule in the {side} {lobe}", 3,
        partial(paint_round, radius_cm=(0.6, 1.4), lobes=0)),
    "Mass": PhantomFinding(
        "Mass/lung/{lobe}/{side}", "a mass in the {side} {lobe}", 2,
        partial(paint_round, radius_cm=(1.8, 3.0), lobes=5)),
    "Calcified Granuloma": PhantomFinding(
        "Calcified Granuloma/lung/{lobe}/{side}", "a calcified granuloma in the {side} {lobe}", 4,
        paint_granuloma),
    "Pneumothorax": PhantomFinding(
        "Pneumothorax/apex/{side}/{extent}", "a {extent} {side} apical pneumothorax", 2,
        paint_pneumothorax),
    "Consolidation": PhantomFinding(
        "Consolidation/lung/{lobe}/{side}", "consolidation in the {side} {lobe}", 3,
        partial(paint_cloud, radius_cm=5.5, patchy=0.2, amount=0.85)),
    "Airspace Disease": PhantomFinding(
        "Airspace Disease/lung/base/{side}", "patchy airspace disease at the {side} base", 3,
        lambda scene, sign: paint_cloud(
            scene, replace(sign, height=0.8), radius_cm=5.0, patchy=0.6, amount=0.65)),
    "Lesion": PhantomFinding(
        "Opacity/lung/{lobe}/{side}", "a hazy opacity in the {side} {lobe}", 4,
        partial(paint_cloud, radius_cm=3.5, patchy=0.2, amount=0.5)),
    "Volume Loss": PhantomFinding(
        "Pulmonary Atelectasis/base/{side}", "atelectasis at the {side} lung base", 4,
        paint_atelectasis, lift_diaphragm),
    "Hyperinflation": PhantomFinding(
        "Lung/hyperdistention/{degree}", "{degree} hyperexpansion of the lungs", 4,
        lambda scene, _: [scene.lungs], overinflate),
    "Emphysema": PhantomFinding(
        "Emphysema/{degree}", "{degree} emphysema", 2, lambda scene, _: [scene.lungs],
        lambda a, _: replace(a, vessels=0.3 * a.vessels, air=a.air + 0.1)),
    "Hernia": PhantomFinding(
        "Hernia, Hiatal/{extent}", "a {extent} hiatal hernia", 2, paint_hernia),
    "Edema": PhantomFinding(
        "Pulmonary Edema/{degree}", "{degree} pulmonary edema", 2, paint_edema,
        lambda a, _: replace(a, vessels=1.6 * a.vessels)),
    "Degenerative Change": PhantomFinding(
        "Spine/degenerative/{degree}", "{degree} degenerative change of the thoracic spine", 5,
        paint_degeneration),
    "Scoliosis": PhantomFinding(
        "Scoliosis/thoracic vertebrae/{side}/{degree}", "{degree} thoracic scoliosis", 3,
        lambda scene, _: [scene.spine] if scene.is_frontal else [],
        lambda a, sign: replace(a, spine_curve=sign.side * (0.04 + 0.035 * sign.size))),
}
# fmt: on


# --- one picture ---------------------------------------------------------------------------------


def place_findings(findings: Iterable[str], rng: np.random.Generator) -> tuple[int, list[Sign]]:
    """Decide who the patient is (a seed) and where each finding sits, whatever the others are."""
    patient = int(rng.integers(2**63))
    signs = []
    for finding in findings:
        if finding not in PHANTOM_FINDINGS:
            known = ", ".join(PHANTOM_FINDINGS)
            raise ConfigError(f"No phantom can show {finding!r}. Choose from: {known}.")
        own = np.random.default_rng([patient, *finding.encode()])
        side = -1 if own.random() < 0.5 else 1
        across, depth, height = own.uniform((0.4, 0.25, 0.25), (0.78, 0.75, 0.85)).tolist()
        seed = int(own.integers(2**32))
        signs.append(Sign(finding, side, across, depth, height, own.random(), seed))
    return patient, signs


def soften(picture: Array) -> Array:
    """Blur by a pixel, as screen and film do."""
    rows = picture.copy()
    rows[1:-1] = (picture[:-2] + picture[2:]) * 0.25 + picture[1:-1] * 0.5
    both = rows.copy()
    both[:, 1:-1] = (rows[:, :-2] + rows[:, 2:]) * 0.25 + rows[:, 1:-1] * 0.5
    return np.asarray(both)


def expose(film: Film, density: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Turn density into grey: an exposure, its fall-off across the film, and grain."""
    gain, contrast, grain = rng.uniform((1.0, 0.95, 0.03), (1.7, 1.3, 0.1)).tolist()
    slope_x, slope_y = rng.uniform(-0.15, 0.15, 2).tolist()
    n_steps, darkest = 4096, 6.0
    steps = np.linspace(0, darkest, n_steps)
    tone = np.asarray(255 * (1 - np.exp(-steps)) ** contrast + 0.5, dtype=np.uint8)
    noise = rng.random(density.shape, dtype=np.float32) - 0.5
    light = (gain * n_steps / darkest) * (1 + slope_x * film.x + slope_y * film.y)
    exposure = light * soften(np.maximum(density, 0.01) + grain * noise)
    return np.asarray(tone.take(exposure.astype(np.intp), mode="clip"))


def draw_phantom(
    findings: Iterable[str],
    projection: str,
    rng: np.random.Generator,
    image_size_px: int = 256,
    *,
    view: int = 0,
) -> tuple[NDArray[np.uint8], list[tuple[str, Box]]]:
    """Draw one chest X-ray with the findings asked for.

    The patient, and where each finding would sit in this patient, depend on `rng` alone. Two calls
    with equal generators therefore show the same patient, from two sides or with and without a
    finding; everything else in the picture stays.

    Parameters
    ----------
    findings
        Names from :data:`PHANTOM_FINDINGS`; empty for a normal chest.
    projection
        ``"Frontal"`` or ``"Lateral"``.
    rng
        Advanced by one draw.
    image_size_px
        Side S of the square picture.
    view
        Number of the exposure: another one has other positioning, brightness and grain.

    Returns
    -------
    pixels
        Grey levels, shape ``(S, S)``, uint8, air black.
    boxes
        Pairs of a finding and the bounds ``(x0, y0, x1, y1)`` of a region that it changed, in
        pixels, ends excluded. A finding can have several, or none where this view hides it
        (pneumothorax and scoliosis from the side).

    Raises
    ------
    ConfigError
        A finding or projection that cannot be drawn.
    """
    if projection not in ("Frontal", "Lateral"):
        raise ConfigError(f"projection is {projection!r}; it must be 'Frontal' or 'Lateral'.")
    patient, signs = place_findings(findings, rng)
    anatomy = Anatomy.sample(np.random.default_rng([patient, 0]))
    for sign in signs:
        anatomy = PHANTOM_FINDINGS[sign.finding].alter(anatomy, sign)

    is_frontal = projection == "Frontal"
    take = np.random.default_rng([patient, 1, view, is_frontal])
    film = Film(image_size_px, take, may_face_right=not is_frontal)
    draw_scene = frontal_scene if is_frontal else lateral_scene
    scene = draw_scene(film, anatomy, take.normal(0, 0.006))
    boxes = [
        (sign.finding, box)
        for sign in signs
        for region in PHANTOM_FINDINGS[sign.finding].paint(scene, sign)
        if (box := film.box(region)) is not None
    ]
    return expose(film, scene.density, take), boxes


# --- a data set ----------------------------------------------------------------------------------

VIEWS = {
    ("Frontal", "Lateral"): 0.8,
    ("Frontal",): 0.12,
    ("Frontal", "Frontal"): 0.03,
    ("Frontal", "Frontal", "Lateral"): 0.05,
}
INDICATIONS = ["Chest pain.", "Shortness of breath.", "Cough.", "Preoperative evaluation.", ""]
NORMAL_SENTENCES = {
    "Cardiomegaly": "The heart is normal in size.",
    "Consolidation": "There is no focal consolidation.",
    "Pleural Effusion": "There is no pleural effusion.",
    "Pneumothorax": "There is no pneumothorax.",
}


@dataclass(frozen=True)
class PhantomSet:
    """A folder of phantoms in the form of the Indiana data set."""

    csv_dir: Path
    image_dir: Path
    n_studies: int
    n_images: int


@dataclass(frozen=True)
class Study:
    """One examination: its report and what its views show."""

    uid: int
    findings: tuple[str, ...]
    projections: tuple[str, ...]
    indication: str
    seed: int

    @classmethod
    def sample(cls, seed: int, uid: int) -> Study:
        """Study number `uid`, the same however many studies are written."""
        rng = np.random.default_rng([seed, uid])
        n_findings = 0
        if rng.random() >= NORMAL_SHARE:
            n_findings = int(rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))
        weights = np.array([finding.weight for finding in PHANTOM_FINDINGS.values()])
        chosen = rng.choice(
            len(weights), n_findings, replace=False, p=weights / weights.sum()
        ).tolist()
        names = list(PHANTOM_FINDINGS)
        return cls(
            uid=uid,
            findings=tuple(names[k] for k in sorted(chosen)),
            projections=list(VIEWS)[int(rng.choice(len(VIEWS), p=list(VIEWS.values())))],
            indication=INDICATIONS[int(rng.integers(len(INDICATIONS)))],
            seed=int(rng.integers(2**63)),
        )

    def views(self) -> list[tuple[str, str]]:
        """File name and projection of each picture."""
        seen = [self.projections[:k].count(p) for k, p in enumerate(self.projections)]
        first = {"Frontal": 1001, "Lateral": 2001}
        return [
            (f"{self.uid}_IM-{self.uid:04d}-{first[p] + k}.dcm.png", p)
            for p, k in zip(self.projections, seen, strict=True)
        ]

    def report(self) -> list[str]:
        """The row of ``indiana_reports.csv``."""
        _, signs = place_findings(self.findings, np.random.default_rng(self.seed))
        shown = [(PHANTOM_FINDINGS[sign.finding], sign.words()) for sign in signs]
        phrases = [finding.phrase.format(**words) for finding, words in shown]
        sentences = [f"There is {phrase}." for phrase in phrases]
        sentences += [s for name, s in NORMAL_SENTENCES.items() if name not in self.findings]
        numbered = [f"{k}. {p[0].upper()}{p[1:]}." for k, p in enumerate(phrases, 1)]
        return [
            str(self.uid),
            ";".join(finding.mesh.format(**words) for finding, words in shown) or "normal",
            ";".join(finding.tag for finding, _ in shown) or "normal",
            "Xray Chest PA and Lateral" if "Lateral" in self.projections else "Xray Chest PA",
            self.indication,
            "None.",
            " ".join(sentences),
            " ".join(numbered) or "No acute cardiopulmonary abnormality.",
        ]


def write_phantoms(
    out_dir: Path,
    *,
    n_studies: int = 200,
    image_size_px: int = 256,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> PhantomSet:
    """Write a data set of phantoms in exactly the form of the Indiana one.

    The folder gets ``images/*.png`` (8-bit grey), ``indiana_reports.csv``,
    ``indiana_projections.csv`` and two files more: ``phantoms.csv`` has one row for every region
    that a finding changed (`filename, finding, x0, y0, x1, y1` in pixels, ends excluded), and
    ``phantoms.json`` the arguments. About two studies of five are normal. The same arguments give
    the same bytes, and study i is the same whatever `n_studies` is. As in the real data set every
    view carries the labels of its report, also where only the other view shows the finding.

    Parameters
    ----------
    out_dir
        A new or empty folder, or one that this function has filled, or begun to fill, with the
        same arguments: it is then written again.
    n_studies
        Number of studies; about 1.9 images each.
    image_size_px
        Side of the square pictures, at least 64.
    seed
        At least 0.
    progress
        Wraps the iterable of study numbers, as ``tqdm`` does.

    Raises
    ------
    ConfigError
        An argument out of range, or a folder with other content.
    """
    recipe = {"n_studies": n_studies, "image_size_px": image_size_px, "seed": seed}
    for name, lowest in {"n_studies": 1, "image_size_px": MIN_IMAGE_SIZE_PX, "seed": 0}.items():
        if recipe[name] < lowest:
            raise ConfigError(f"{name} is {recipe[name]}; it must be at least {lowest}.")
    claim_folder(out_dir, json.dumps(recipe, indent=2) + "\n")
    image_dir = out_dir / "images"
    image_dir.mkdir(exist_ok=True)

    reports, projections, boxes = [], [], []
    for uid in progress(range(1, n_studies + 1)):
        study = Study.sample(seed, uid)
        reports.append(study.report())
        for k, (filename, projection) in enumerate(study.views()):
            rng = np.random.default_rng(study.seed)
            pixels, regions = draw_phantom(study.findings, projection, rng, image_size_px, view=k)
            # Run-length coding packs grainy pictures as well as zlib's default, four times as fast.
            Image.fromarray(pixels).save(image_dir / filename, compress_level=1, compress_type=3)
            projections.append([str(uid), filename, projection])
            boxes += [[filename, finding, *map(str, box)] for finding, box in regions]
    write_csv(out_dir / "indiana_reports.csv", REPORT_COLUMNS, reports)
    write_csv(out_dir / "indiana_projections.csv", PROJECTION_COLUMNS, projections)
    write_csv(out_dir / "phantoms.csv", BOX_COLUMNS, boxes)
    return PhantomSet(out_dir, image_dir, n_studies, len(projections))


def claim_folder(out_dir: Path, recipe: str) -> None:
    """Make the folder and leave the recipe in it, unless something else is there already."""
    recipe_path = out_dir / RECIPE_FILE
    if out_dir.exists() and not out_dir.is_dir():
        raise ConfigError(f"{out_dir} is a file. Choose a folder for the phantoms.")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        found = recipe_path.read_text(encoding="utf-8") if recipe_path.is_file() else None
        if found != recipe:
            holds = (
                "other files" if found is None else f"phantoms made with {' '.join(found.split())}"
            )
            raise ConfigError(
                f"{out_dir} already holds {holds}; asked for were phantoms with "
                f"{' '.join(recipe.split())}. Choose another folder, or delete this one."
            )
    out_dir.mkdir(parents=True, exist_ok=True)
    recipe_path.write_text(recipe, encoding="utf-8")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table with line ends that are the same on every system."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
