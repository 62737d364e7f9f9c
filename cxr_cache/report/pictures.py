"""Pictures of cases for a page: small images, and maps of where a finding was seen."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxr_cache.common.wording import count
from cxr_cache.datasets.images import read_image
from cxr_cache.datasets.preprocessing import Preprocessing
from cxr_cache.errors import ConfigError, ImageError
from cxr_cache.models.run import Run
from cxr_cache.report.cases import Case, Kind

if TYPE_CHECKING:  # a page without maps does without torch
    from cxr_cache.encoders.encoder import Encoder

EDGE_PX: Final = 144  # of a thumbnail, which is square
_JPEG_QUALITY: Final = 70


def draw_thumbnails(
    image_dir: str | Path, image_ids: Iterable[str], preprocessing: Mapping[str, Any] | None
) -> tuple[dict[str, str], list[str]]:
    """Small pictures of images, cut as the encoder saw them.

    Parameters
    ----------
    image_dir
        Folder that the ids are relative to.
    image_ids
        Which images; each is drawn once.
    preprocessing
        Of the encoder, as a run records it; None (imported embeddings) crops to the middle square.

    Returns
    -------
    tuple[dict[str, str], list[str]]
        A ``data:image/jpeg`` address of about 4 kB by image id, and what was wrong with the images
        that have none, one sentence each.

    Raises
    ------
    ConfigError
        `image_dir` is not a folder, or holds none of the images.
    """
    image_dir, image_ids = Path(image_dir), list(dict.fromkeys(image_ids))
    if not image_dir.is_dir():
        raise ConfigError(f"{image_dir} is not a folder; give the one with the run's images.")
    rule = _rule(preprocessing)
    pictures, problems = {}, []
    for image_id in image_ids:
        try:
            pictures[image_id] = _draw(image_dir, image_id, rule)
        except ImageError as error:
            problems.append(f"{image_id}: {error}.")
    if problems and not pictures:
        raise ConfigError(
            f"{image_dir} holds none of the {count(len(problems), 'image')} to show; the first is "
            f"{problems[0]} Give the folder that the run's images were read from."
        )
    return pictures, problems


def _rule(preprocessing: Mapping[str, Any] | None) -> Preprocessing:
    stated = preprocessing or {}
    size_px = stated.get("image_size_px", EDGE_PX)
    return Preprocessing(
        image_size_px=size_px,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        interpolation="bicubic",
        resize=stated.get("resize", "crop"),
        bits_stored=stated.get("bits_stored"),
        resize_px=stated.get("resize_px"),
    ).scaled_to(EDGE_PX)


def _draw(image_dir: Path, image_id: str, rule: Preprocessing) -> str:
    pixels = read_image(image_dir, image_id, rule).pixels  # (3, S, S)
    is_grey = (pixels == pixels[:1]).all()
    picture = Image.fromarray(pixels[0] if is_grey else pixels.transpose(1, 2, 0))
    jpeg = io.BytesIO()
    picture.save(jpeg, format="JPEG", quality=_JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode("ascii")


class CaseMaps(TypedDict):
    """Maps of one run's cases, ready for JSON."""

    rows: int
    columns: int
    by_finding: dict[str, dict[str, str]]
    """By finding and image id: a byte per patch, row by row, 255 its
    maximum (all 0 where nothing counts), in base64."""


def draw_maps(
    run: Run,
    cases: Mapping[str, Mapping[Kind, Iterable[Case]]],
    image_dir: str | Path,
    encoder: Encoder,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> CaseMaps:
    """Map every case for its own finding, as :func:`cxr_cache.models.explain.explain_images` would.

    Parameters
    ----------
    run
        A finished run, frozen or fine-tuned.
    cases
        By finding, as :func:`cxr_cache.report.cases.find_cases` returns them.
    image_dir
        Folder of the images; those that cannot be read have no map.
    encoder
        The run's. The images of a finding go through it together, with a gradient.
    on_progress
        Called with the numbers of cases done and in all.

    Raises
    ------
    RunError, EncoderError
        As in :func:`cxr_cache.models.explain.explain_images`.
    """
    import torch  # only maps need it; most pages have none

    from cxr_cache.models.explain import load_traceable_model

    traced = load_traceable_model(run, encoder)
    image_ids = {
        finding: [case["image_id"] for of_kind in kinds.values() for case in of_kind]
        for finding, kinds in cases.items()
    }
    n_done, n_cases = 0, sum(map(len, image_ids.values()))
    by_finding = {}
    for finding, ids in image_ids.items():
        pixels = _read(Path(image_dir), ids, encoder.preprocessing)
        if pixels:
            batch = torch.from_numpy(np.stack(list(pixels.values())))
            maps = traced.map_findings(batch, [traced.model.findings.index(finding)])[0]
            by_finding[finding] = dict(zip(pixels, map(_pack, maps.numpy()), strict=True))
        n_done += len(ids)
        if on_progress is not None:
            on_progress(n_done, n_cases)
    rows, columns_of_patches = encoder.patch_grid
    return CaseMaps(rows=rows, columns=columns_of_patches, by_finding=by_finding)


def _read(
    image_dir: Path, image_ids: Iterable[str], preprocessing: Preprocessing
) -> dict[str, NDArray[np.uint8]]:
    pixels = {}
    for image_id in image_ids:
        try:
            pixels[image_id] = read_image(image_dir, image_id, preprocessing).pixels
        except ImageError:
            continue  # the thumbnail says why
    return pixels


def _pack(relevance: NDArray[np.float32]) -> str:
    shares = relevance / max(float(relevance.max()), 1e-12)
    return base64.b64encode((255 * shares).round().astype(np.uint8).tobytes()).decode("ascii")
