"""Synthetic chest X-rays with known findings, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxr_cache.datasets.collections.indiana import RECIPE_FILE
from cxr_cache.datasets.phantoms.anatomy import Anatomy, Sign, frontal_scene, lateral_scene
from cxr_cache.datasets.phantoms.film import Array, Box, Film
from cxr_cache.datasets.phantoms.findings import PHANTOM_FINDINGS
from cxr_cache.datasets.phantoms.styles import STANDARD, Style, find_style
from cxr_cache.errors import ConfigError

MIN_IMAGE_SIZE_PX = 64
NORMAL_SHARE = 0.4
REPORT_COLUMNS = "uid,MeSH,Problems,image,indication,comparison,findings,impression"
PROJECTION_COLUMNS = "uid,filename,projection"
BOX_COLUMNS = "filename,finding,x0,y0,x1,y1"

# --- one picture ---------------------------------------------------------------------------------


def place_findings(findings: Iterable[str], rng: np.random.Generator) -> tuple[int, list[Sign]]:
    """Choose the patient (a seed) and the place of each finding, which depends on no other."""
    patient = int(rng.integers(2**63))
    signs = []
    for finding in findings:
        if finding not in PHANTOM_FINDINGS:
            known = ", ".join(PHANTOM_FINDINGS)
            raise ConfigError(f"No phantom can show {finding!r}. Choose from: {known}.")
        of_sign = np.random.default_rng([patient, *finding.encode()])
        side = -1 if of_sign.random() < 0.5 else 1
        across, depth, height = of_sign.uniform((0.4, 0.25, 0.25), (0.78, 0.75, 0.85)).tolist()
        seed = int(of_sign.integers(2**32))
        signs.append(Sign(finding, side, across, depth, height, of_sign.random(), seed))
    return patient, signs


def soften(picture: Array) -> Array:
    """Blur a picture by one pixel, as screen and film do."""
    rows = picture.copy()
    rows[1:-1] = (picture[:-2] + picture[2:]) * 0.25 + picture[1:-1] * 0.5
    both = rows.copy()
    both[:, 1:-1] = (rows[:, :-2] + rows[:, 2:]) * 0.25 + rows[:, 1:-1] * 0.5
    return np.asarray(both)


def expose(film: Film, density: Array, rng: np.random.Generator, style: Style) -> NDArray[np.uint8]:
    """Turn density into grey levels, with an exposure that falls off across the film, and grain."""
    gain, contrast, grain = rng.uniform((1.0, 0.95, 0.03), (1.7, 1.3, 0.1)).tolist()
    gain, contrast, grain = gain * style.exposure, contrast * style.contrast, grain * style.grain
    slope_x, slope_y = rng.uniform(-0.15, 0.15, 2).tolist()
    n_steps, darkest = 2048, 6.0
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
    style: str = STANDARD,
) -> tuple[NDArray[np.uint8], list[tuple[str, Box]]]:
    """Draw one chest X-ray with the findings asked for.

    The patient and the place of each finding in this patient depend on `rng` alone. Two calls with
    equal generators therefore show the same patient, for example from two sides or with and without
    a finding; everything else in the picture stays.

    Parameters
    ----------
    findings
        Names from :data:`PHANTOM_FINDINGS`; empty for a normal chest.
    projection
        ``"Frontal"`` or ``"Lateral"``.
    rng
        Generator of random numbers, from which one is drawn.
    image_size_px
        Side S of the square picture.
    view
        Number of the exposure. Exposures differ in positioning, brightness and grain.
    style
        How the machine shows the patient: a name from
        :data:`cxr_cache.datasets.phantoms.styles.STYLES`.

    Returns
    -------
    pixels
        Grey levels, shape ``(S, S)``, uint8, air black.
    boxes
        Pairs of a finding and the bounds ``(x0, y0, x1, y1)`` of a region that it changed, in
        pixels, ends excluded. A finding can have several boxes, or none where this view hides it
        (pneumothorax and scoliosis from the side).

    Raises
    ------
    ConfigError
        A finding or the projection cannot be drawn, or there is no such style.
    """
    machine = find_style(style)
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
        if (whole := film.box(region)) and (box := machine.clip(whole, image_size_px))
    ]
    pixels = expose(film, scene.density, take, machine)
    return machine.finish(pixels, is_frontal=is_frontal), boxes


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
    """A folder of phantoms in the format of the Indiana data set."""

    csv_dir: Path
    image_dir: Path
    n_studies: int
    n_images: int


@dataclass(frozen=True)
class Study:
    """One examination, with its findings and its views."""

    uid: int
    findings: tuple[str, ...]
    projections: tuple[str, ...]
    indication: str
    seed: int

    @classmethod
    def sample(cls, seed: int, uid: int) -> Study:
        """Draw study number `uid`, which does not depend on how many studies are written."""
        rng = np.random.default_rng([seed, uid])
        n_findings = 0
        if rng.random() >= NORMAL_SHARE:
            n_findings = int(rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))
        names = list(PHANTOM_FINDINGS)
        share = np.array([finding.weight for finding in PHANTOM_FINDINGS.values()], dtype=float)
        share /= share.sum()
        chosen = rng.choice(len(names), n_findings, replace=False, p=share).tolist()
        return cls(
            uid=uid,
            findings=tuple(names[k] for k in sorted(chosen)),
            projections=list(VIEWS)[int(rng.choice(len(VIEWS), p=list(VIEWS.values())))],
            indication=INDICATIONS[int(rng.integers(len(INDICATIONS)))],
            seed=int(rng.integers(2**63)),
        )

    def views(self) -> list[tuple[str, str]]:
        """Return the file name and the projection of each picture."""
        seen = [self.projections[:k].count(p) for k, p in enumerate(self.projections)]
        first = {"Frontal": 1001, "Lateral": 2001}
        return [
            (f"{self.uid}_IM-{self.uid:04d}-{first[p] + k}.dcm.png", p)
            for p, k in zip(self.projections, seen, strict=True)
        ]

    def report(self) -> list[str]:
        """Write the study's row of ``indiana_reports.csv``."""
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
    style: str = STANDARD,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> PhantomSet:
    """Write a data set of phantoms in exactly the format of the Indiana data set.

    The folder gets ``images/*.png`` (8-bit grey), ``indiana_reports.csv``,
    ``indiana_projections.csv`` and two more files. ``phantoms.csv`` has one row for every region
    that a finding changed (`filename, finding, x0, y0, x1, y1` in pixels, ends excluded), and
    ``phantoms.json`` holds the arguments. About two studies of five are normal. Equal arguments
    give equal bytes, and a study does not depend on `n_studies`. As in the real data set, every
    view carries the labels of its report, even if only the other view shows the finding.

    Parameters
    ----------
    out_dir
        A new or empty folder, or one that this function has filled, or begun to fill, with the
        same arguments. Such a folder is written again.
    n_studies
        Number of studies, which have about 1.9 images each.
    image_size_px
        Side of the square pictures, at least 64.
    seed
        At least 0.
    style
        How the hospital's machine shows patients: ``"standard"``, or ``"digitised"`` for scanned
        film, which is darker and grainier and has a frame and a side marker. Equal seeds give the
        same patients in every style.
    progress
        Function that wraps the iterable of study numbers, as ``tqdm`` does.

    Raises
    ------
    ConfigError
        An argument is out of range, or the folder has other content.
    """
    find_style(style)
    recipe: dict[str, int] = {"n_studies": n_studies, "image_size_px": image_size_px, "seed": seed}
    for name, lowest in {"n_studies": 1, "image_size_px": MIN_IMAGE_SIZE_PX, "seed": 0}.items():
        if recipe[name] < lowest:
            raise ConfigError(f"{name} is {recipe[name]}; it must be at least {lowest}.")
    named = {} if style == STANDARD else {"style": style}  # folders of before name none
    claim_folder(out_dir, json.dumps(recipe | named))
    image_dir = out_dir / "images"
    image_dir.mkdir(exist_ok=True)

    reports, projections, boxes = [], [], []
    for uid in progress(range(1, n_studies + 1)):
        study = Study.sample(seed, uid)
        reports.append(study.report())
        for k, (filename, projection) in enumerate(study.views()):
            rng = np.random.default_rng(study.seed)
            pixels, regions = draw_phantom(
                study.findings, projection, rng, image_size_px, view=k, style=style
            )
            # For grainy pictures, run-length coding (type 3) packs as well as zlib's default and is
            # four times as fast.
            Image.fromarray(pixels).save(image_dir / filename, compress_level=1, compress_type=3)
            projections.append([str(uid), filename, projection])
            boxes += [[filename, finding, *map(str, box)] for finding, box in regions]
    write_csv(out_dir / "indiana_reports.csv", REPORT_COLUMNS, reports)
    write_csv(out_dir / "indiana_projections.csv", PROJECTION_COLUMNS, projections)
    write_csv(out_dir / "phantoms.csv", BOX_COLUMNS, boxes)
    return PhantomSet(out_dir, image_dir, n_studies, len(projections))


def claim_folder(out_dir: Path, recipe: str) -> None:
    """Make the folder and write the recipe into it, or raise if it holds something else."""
    recipe_path = out_dir / RECIPE_FILE
    if out_dir.exists() and not out_dir.is_dir():
        raise ConfigError(f"{out_dir} is a file. Choose a folder for the phantoms.")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        found = recipe_path.read_text(encoding="utf-8") if recipe_path.is_file() else None
        if found != recipe:
            raise ConfigError(
                f"{out_dir} already holds {f'phantoms of {found}' if found else 'other files'}; "
                f"phantoms of {recipe} would mix with them. "
                "Choose another folder, or delete this one."
            )
    out_dir.mkdir(parents=True, exist_ok=True)
    recipe_path.write_text(recipe, encoding="utf-8")


def write_csv(path: Path, columns: str, rows: Iterable[Sequence[str]]) -> None:
    """Write a table with the same line ends on every system."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns.split(","), *rows])
