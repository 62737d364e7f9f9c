"""Image files -> small JPEG pictures that a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from PIL import Image

from cxr_cache.datasets.images import Preprocessing, read_image
from cxr_cache.errors import ConfigError, ImageError

EDGE_PX: Final = 144
_QUALITY: Final = 70


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
            f"{image_dir} holds none of the {len(problems)} images to show; the first is "
            f"{problems[0]} Give the folder that the run's images were read from."
        )
    return pictures, problems


def _rule(preprocessing: Mapping[str, Any] | None) -> Preprocessing:
    stated = preprocessing or {}
    return Preprocessing(
        image_size_px=EDGE_PX,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        interpolation="bicubic",
        resize=stated.get("resize", "crop"),
        bits_stored=stated.get("bits_stored"),
    )


def _draw(image_dir: Path, image_id: str, rule: Preprocessing) -> str:
    pixels = read_image(image_dir, image_id, rule).pixels  # (3, S, S)
    is_grey = (pixels == pixels[:1]).all()
    picture = Image.fromarray(pixels[0] if is_grey else pixels.transpose(1, 2, 0))
    jpeg = io.BytesIO()
    picture.save(jpeg, format="JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode("ascii")
