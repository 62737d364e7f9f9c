"""The anatomy of a phantom: where structures lie, and how they look from the front and the side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cxr_cache.datasets.phantoms.film import (
    SAMPLES,
    Array,
    Film,
    Points,
    mirrored,
    profile,
    ramp,
    smooth,
    trace,
    value_at,
)


@dataclass(frozen=True)
class Sign:
    """Place, size and shape of one finding in the patient, equal in every view of a study."""

    finding: str
    side: int  # -1 the patient's right, 1 left
    across: float  # 0 midline, 1 chest wall
    depth: float  # 0 front, 1 back
    height: float  # 0 apex, 1 diaphragm
    size: float  # 0 slight, 1 severe
    seed: int  # for shapes with a random outline

    def words(self) -> dict[str, str]:
        """Return the words by which a report names the place and the size."""
        lobes = ("upper lobe", "middle lobe" if self.side < 0 else "lingula", "lower lobe")
        return {
            "side": "right" if self.side < 0 else "left",
            "lobe": lobes[int(np.digitize(self.height, (0.45, 0.6)))],
            "degree": ("mild", "moderate", "severe")[int(3 * self.size)],
            "extent": ("small", "moderate", "large")[int(3 * self.size)],
        }


@dataclass(frozen=True)
class Anatomy:
    """Measures in which patients differ. Lengths are in patient coordinates, see `film`."""

    chest_width: float  # half the inner width of the rib cage
    chest_depth: float  # front to back, 1 on average
    body_width: float  # half the width of the trunk
    bulk: float  # density of the trunk, 1 on average
    dome_y: float  # top of the right hemidiaphragm
    dome_height: float  # from the dome down to the costophrenic angle
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
        """Draw the measures of a person without findings."""
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


@dataclass
class Scene:
    """A drawn patient, on whom findings can be painted; arrays have shape ``(S, S)``."""

    film: Film
    anatomy: Anatomy
    is_frontal: bool
    density: Array
    air: Array  # the density that aerated lung takes away
    markings: Array  # the density that vessels add
    lungs: Array  # mask, with the lung in front of the heart and behind it
    heart: Array  # mask
    spine: Array  # mask
    spine_x: Array  # tabulated over y, like the next two
    near_wall: Array  # midline on a frontal view, front of the lungs on a lateral one
    far_wall: Array  # chest wall, or back of the lungs

    @property
    def across(self) -> Array:
        """Position of every pixel between the walls of the lungs: 0 near, 1 far."""
        near, far = self.film.along_y(self.near_wall), self.film.along_y(self.far_wall)
        return ((np.abs(self.film.x) if self.is_frontal else self.film.x) - near) / (far - near)

    def place(self, sign: Sign) -> tuple[float, float]:
        """Return the point of the lungs where a finding sits."""
        y = 0.14 + sign.height * (self.anatomy.dome_y - 0.14)
        near, far = (float(value_at(wall, y)) for wall in (self.near_wall, self.far_wall))
        if self.is_frontal:
            return sign.side * sign.across * far, y
        return near + sign.depth * (far - near), y

    def on_side(self, sign: Sign) -> Array:
        """Return the mask of the lung that a finding is in; on a lateral view, of both lungs."""
        return self.lungs * (self.film.x * sign.side > 0) if self.is_frontal else self.lungs

    def fill(self, mask: Array, amount: float) -> Array:
        """Put water where the lung had air, and return the change of density."""
        change = mask * self.air * amount
        self.density += change
        self.air = self.air - change
        return change


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
    """Tabulate over y the vertebral bodies, with bright end plates and dark discs between them."""
    phase = (SAMPLES / (0.043 + 0.012 * np.clip(SAMPLES, 0, 1))) % 1
    from_disc = np.minimum(phase, 1 - phase)
    plates = np.exp(-(((from_disc - 0.13) / 0.06) ** 2))
    return ((1 + 0.6 * plates) * np.clip(from_disc * 12 - 0.6, 0, 1)).astype(np.float32)


VERTEBRAE = _blocks()


def draw_vessels(film: Film, anatomy: Anatomy, hila: Sequence[tuple[float, float]]) -> Array:
    """Draw the lung markings: from each hilum curved trunks, each with forks that taper off."""
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
    """Trace ten ribs a side, from the spine round the chest wall to the front, ``(20, 32, 2)``."""
    level = np.arange(10)[:, None]
    turn = np.linspace(0.05, 0.85, 32) * np.pi
    start = 0.095 + 0.056 * level
    drop = anatomy.rib_drop * (0.6 + 0.06 * level)
    y = start + drop * (1 - np.cos(turn)) + 0.012 * np.sin(2 * turn)
    reach = (value_at(cage, start + drop) + 0.006) * np.sin(turn) ** 0.9
    at_spine = value_at(spine_x, start) * np.clip(np.cos(turn), 0, 1)
    return np.concatenate([np.stack([s * reach + at_spine, y], axis=-1) for s in (-1, 1)])


def draw_airways(film: Film, midline: Array, turn: float) -> Array:
    """Draw the trachea and its two main branches."""
    trachea = trace([(0, 0), (0, 0.1), (0, 0.2), (0.004, 0.29), (0.025, 0.33), (0.06, 0.37)])
    branch = trace([(0, 0.28), (-0.005, 0.3), (-0.02, 0.325), (-0.035, 0.345), (-0.055, 0.365)])
    paths = np.stack([branch, trachea])
    paths[..., 0] += turn + value_at(midline, paths[..., 1])
    narrowing = np.interp(np.linspace(0, 1, 16), (0, 0.6, 1), (0.036, 0.034, 0.018))
    return film.bands(paths, np.stack([np.full(16, 0.024), narrowing]), (0.6, 1))


def frontal_scene(film: Film, anatomy: Anatomy, turn: float) -> Scene:
    """Draw the chest from behind (PA); `turn` shifts structures in front against the spine."""
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
    density += below * (0.15 + 0.05 * texture)
    density -= 0.3 * draw_airways(film, midline, turn) * (1 - clear)
    if a.stomach > 0.015:
        gas = film.ellipse(0.45 * unit, a.dome_y + 0.04 + a.stomach, 1.2 * a.stomach, a.stomach)
        density -= 0.6 * gas * below
    return Scene(
        film, a, True, density, air, markings, lungs, heart, column, spine_x, CAGE * 0, CAGE * unit
    )


def lateral_scene(film: Film, anatomy: Anatomy, turn: float) -> Scene:
    """Draw the chest from its left side; `turn` shifts one side's ribs against the other's."""
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
