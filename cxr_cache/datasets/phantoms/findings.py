"""Findings of phantoms: how each is drawn, and how the report names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from cxr_cache.datasets.phantoms.anatomy import Anatomy, Scene, Sign
from cxr_cache.datasets.phantoms.film import CM, Array, ramp, value_at

# A painter draws a finding into the scene and returns the regions that it changed, one mask for
# each box. A finding of the patient's build alters the anatomy before the scene is drawn; its
# painter only returns the region.


def paint_effusion(scene: Scene, sign: Sign) -> list[Array]:
    """Draw fluid that fills the costophrenic angle and climbs the chest wall."""
    bottom = scene.anatomy.dome_y + scene.anatomy.dome_height * (1 if scene.is_frontal else 1.5)
    rise = (0.11 + 0.2 * sign.size) * (0.3 + 0.7 * np.clip(scene.across, 0, 1) ** 4)
    return [scene.fill(ramp(scene.film.y - bottom + rise, 0.02) * scene.on_side(sign), 0.95)]


def paint_round(
    scene: Scene, sign: Sign, *, radius_cm: tuple[float, float], lobes: int
) -> list[Array]:
    """Draw a round shadow; several `lobes` make its outline irregular."""
    x, y = scene.place(sign)
    radius = CM * float(np.interp(sign.size, (0, 1), radius_cm))
    shadow = scene.film.ellipse(x, y, radius, radius, 0.5)
    for dx, dy in np.random.default_rng(sign.seed).uniform(-0.5, 0.5, (lobes, 2)) * radius:
        lobe = scene.film.ellipse(x + dx, y + dy, 0.75 * radius, 0.7 * radius, 0.5)
        shadow = np.maximum(shadow, lobe)
    scene.density += 0.3 * shadow
    return [shadow]


def paint_granuloma(scene: Scene, sign: Sign) -> list[Array]:
    """Draw one to three calcified dots."""
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
    """Draw a fluffy part of lung that has lost its air; the bronchi in it stay dark."""
    radius = radius_cm * CM * (0.85 + 0.3 * sign.size)
    cloud = scene.film.ellipse(*scene.place(sign), 1.2 * radius, radius)
    cloud = np.clip(1.1 * cloud * (1 + patchy * scene.film.mottle), 0, 1)
    cloud *= scene.on_side(sign)
    scene.density -= amount * scene.markings * cloud
    return [scene.fill(cloud, amount)]


def paint_atelectasis(scene: Scene, sign: Sign) -> list[Array]:
    """Draw plates of collapsed lung above a raised diaphragm."""
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
    """Draw air between lung and chest wall, with no markings beyond a thin white edge.

    It shows on frontal views only.
    """
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
    """Draw a stomach above the diaphragm: a round bubble behind the heart with a fluid level."""
    film, radius = scene.film, 0.05 + 0.025 * sign.size
    x, y = 0.02 + 0.02 * sign.side if scene.is_frontal else 0.1, scene.anatomy.dome_y - 0.015
    bubble = film.ellipse(x, y, 1.15 * radius, radius, 0.3)
    gas = film.ellipse(x, y, radius, 0.86 * radius, 0.4) * ramp(y + 0.2 * radius - film.y, 0.01)
    scene.density += 0.28 * bubble - (0.75 if scene.is_frontal else 0.35) * gas
    return [bubble]


def paint_edema(scene: Scene, sign: Sign) -> list[Array]:
    """Draw haze that spreads from the hila like wings."""
    wings = scene.film.ellipse(-0.15 if scene.is_frontal else 0.0, 0.44, 0.13, 0.18)
    if scene.is_frontal:
        wings += scene.film.ellipse(0.15, 0.44, 0.13, 0.18)
    wings *= np.clip(0.8 + 0.25 * scene.film.mottle, 0, 1)
    return [scene.fill(wings, 0.45 + 0.25 * sign.size)]


def paint_degeneration(scene: Scene, sign: Sign) -> list[Array]:
    """Draw bony spurs at the edges of the thoracic spine."""
    rng = np.random.default_rng(sign.seed)
    y = np.linspace(0.3, 0.7, 6)[:, None] + rng.uniform(-0.02, 0.02, (6, 1))
    out = np.where(rng.random((6, 1)) < 0.5, -1, 1) if scene.is_frontal else -1
    s = np.array([-0.5, 0.7, 1.1, 1.6])
    spurs = np.stack([value_at(scene.spine_x, y) + out * 0.036 * s, y + 0.006 * s**2], axis=-1)
    layer = scene.film.bands(spurs, [0.008, 0.013, 0.016, 0.005])
    scene.density += 0.5 * layer
    return [layer]


def overinflate(anatomy: Anatomy, sign: Sign) -> Anatomy:
    """Return an anatomy with long lungs on a low, flat diaphragm in a deep chest."""
    dome_y = anatomy.dome_y + 0.05 + 0.03 * sign.size
    dome_height, chest_depth = 0.35 * anatomy.dome_height, 1.03 * anatomy.chest_depth
    return replace(anatomy, dome_y=dome_y, dome_height=dome_height, chest_depth=chest_depth)


def lift_diaphragm(anatomy: Anatomy, sign: Sign) -> Anatomy:
    """Return an anatomy with one side of the diaphragm raised."""
    lift = 0.03 + 0.03 * sign.size
    return replace(anatomy, raised=(lift, 0.0) if sign.side < 0 else (0.0, lift))


@dataclass(frozen=True)
class PhantomFinding:
    """How one finding is coded, reported and drawn, and how common it is."""

    mesh: str  # the part before the first slash is the tag of the Problems column
    phrase: str  # follows "There is" in the report
    weight: float  # how common it is relative to the others
    paint: Callable[[Scene, Sign], list[Array]]
    alter: Callable[[Anatomy, Sign], Anatomy] = lambda anatomy, sign: anatomy

    @property
    def tag(self) -> str:
        """Tag of the column `Problems`, from which the label rule derives the finding."""
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
