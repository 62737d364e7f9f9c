"""A run and images -> maps of where its findings come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cxr_cache.datasets.images import read_image, read_picture
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.errors import ConfigError, ImageError, RunError
from cxr_cache.models.predict import predict_images, require_encoder_of_run
from cxr_cache.models.relevance import map_findings
from cxr_cache.models.run import Run, SavedModel

DEFAULT_BLOCKS = 2
"""Of a frozen run; of a fine-tuned one it is the blocks that were tuned."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """One image and one finding."""

    path: Path
    finding: str
    probability: float
    threshold: float
    relevance: NDArray[np.float32]
    """Not negative, in no unit, rows and columns of patches."""
    picture: NDArray[np.uint8]
    """The radiograph at full size, ``(H, W)`` or ``(H, W, 3)``."""
    extent: tuple[float, float, float, float]
    """What of the picture the map covers, in its pixels: left, right, bottom, top."""


def parse_findings(run: Run, names: Sequence[str]) -> list[str]:
    """Findings of a run by their names, in any case.

    Raises
    ------
    ConfigError
        The run has no such finding.
    """
    known = {finding.casefold(): finding for finding in run.config["findings"]}
    unknown = [name for name in names if name.casefold() not in known]
    if unknown:
        raise ConfigError(
            f"{run.path} has no finding {unknown[0]!r}. It has: {', '.join(known.values())}."
        )
    return [known[name.casefold()] for name in names]


def explain_images(
    run: Run,
    paths: Sequence[Path],
    findings: Sequence[str],
    encoder: Encoder,
    *,
    n_blocks: int | None = None,
) -> Iterator[Explanation | ImageError]:
    """Maps of images, image by image, finding by finding; for a file that cannot be used, why.

    Parameters
    ----------
    run
        A finished run, frozen or fine-tuned.
    paths
        Image files.
    findings
        Names as :func:`parse_findings` gives them.
    encoder
        The run's.
    n_blocks
        Last blocks that are followed back; None for those that were fine-tuned, or two.

    Raises
    ------
    RunError
        `encoder` is not the run's, or there is none; or the head reads the pooled output.
    EncoderError
        The tower does not pool its class token alone, cannot be split, or has fewer blocks.
    """
    model = load_traceable_model(run, encoder)
    columns = [model.findings.index(finding) for finding in findings]
    prep = encoder.preprocessing
    for path in paths:
        try:
            decoded = read_image(path.parent, path.name, prep)
            picture = read_picture(path.parent, path.name, prep.bits_stored)
        except ImageError as error:
            yield ImageError(f"{path}: {error}")
            continue
        pixels = torch.from_numpy(decoded.pixels[None])
        maps = map_findings(model, encoder, pixels, columns, n_blocks or count_blocks(model))
        probabilities = predict_images(run, [path], encoder).probabilities[0]
        for finding, column, one in zip(findings, columns, maps, strict=True):
            yield Explanation(
                path=path,
                finding=finding,
                probability=float(probabilities[column]),
                threshold=model.thresholds[finding],
                relevance=one[0].numpy(),
                picture=picture,
                extent=find_extent(picture.shape[:2], prep.resize),
            )


def load_traceable_model(run: Run, encoder: Encoder) -> SavedModel:
    """The run's model, whose answers can be followed back into `encoder`.

    Raises
    ------
    RunError
        `encoder` is not the run's, or there is none; or the head reads the pooled output.
    """
    model = run.load_model()
    require_encoder_of_run(run, model.encoder, encoder)
    if (features := model.head.get("features", "projected")) != "projected":
        raise RunError(
            f"{run.path} was trained with --features {features}; maps follow the projected "
            "embedding back. Train with --features projected."
        )
    return model


def count_blocks(model: SavedModel) -> int:
    """How many last blocks are followed back unless another number is asked for."""
    return DEFAULT_BLOCKS if model.tail is None else int(model.tail["unfreeze_layers"])


def find_extent(shape: tuple[int, ...], resize: str) -> tuple[float, float, float, float]:
    """What of a picture ``(H, W)`` the encoder saw: all of it, or the central square."""
    height, width = shape
    if resize == "squash":
        return 0.0, float(width), float(height), 0.0
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return left, left + side, top + side, top
