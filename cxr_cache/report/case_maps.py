"""Cases that a page shows -> where in them the run looked, as small as a page can hold."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from cxr_cache.datasets.images import Preprocessing, read_image
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.errors import ImageError
from cxr_cache.models.explain import count_blocks, load_traceable_model
from cxr_cache.models.relevance import map_findings
from cxr_cache.models.run import Run
from cxr_cache.report.cases import Case, Kind


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
    model = load_traceable_model(run, encoder)
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
            columns = [model.findings.index(finding)]
            maps = map_findings(model, encoder, batch, columns, count_blocks(model))[0]
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
