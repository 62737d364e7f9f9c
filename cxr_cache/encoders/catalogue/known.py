"""Encoders that many use: their short names, and what is known of them without their weights."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from cxr_cache.errors import EncoderError


@dataclass(frozen=True)
class Known:
    """What is known of an encoder before its weights are there, as its authors describe it."""

    name: str
    """Short name that may be typed for it."""
    model: str
    """The name that this stands for; empty where weights come by hand, or not at all."""
    trained_on: str
    seen: tuple[str, ...]
    """Data sets whose images it was trained on, by the names of their formats; ``("none",)`` where
    there are none, and empty where it is unknown."""
    licence: str
    is_gated: bool
    """Its files are given out to those who have accepted its terms."""
    image_px: int
    n_tokens: int
    """Tokens of an image; 0 where the encoder cannot be loaded."""
    width: int
    """Width of its tokens, and of its pooled output."""
    file_sha256: str
    """Of the file with the weights, where it is pinned; else empty."""
    page: str
    note: str
    """Oddities and traps, in sentences."""

    @property
    def token_mb(self) -> float:
        """Megabytes that the tokens of an image take in float16."""
        return self.n_tokens * self.width * 2 / 1e6


@cache
def read_known() -> dict[str, Known]:
    """Read the encoders of ``known.csv`` by their short names."""
    text = files("cxr_cache.encoders.catalogue").joinpath("known.csv").read_text(encoding="utf-8")
    known = {}
    for row in csv.DictReader(text.splitlines()):
        values: dict[str, Any] = dict(row)
        values |= {name: int(row[name]) for name in ("image_px", "n_tokens", "width")}
        values |= {"seen": tuple(row["seen"].split()), "is_gated": bool(row["is_gated"])}
        known[row["name"]] = Known(**values)
    return known


def find_known(name: str) -> Known | None:
    """Find what is known of an encoder by its short name or its own, whatever its revision."""
    bare = re.split("[@?]", name)[0]
    models = {known.model.partition("@")[0]: known for known in read_known().values()} | {"": None}
    return read_known().get(bare.lower()) or models.get(bare)


def spell_out(name: str) -> str:
    """Give the name that a short name stands for; another name stays as it is.

    Raises
    ------
    EncoderError
        The encoder is known, but no name leads to its weights.

    Examples
    --------
    >>> spell_out("rad-dino"), spell_out("DINOv3-B?img_size=512")
    ('hf-hub:microsoft/rad-dino', 'timm:vit_base_patch16_dinov3.lvd1689m?img_size=512')
    """
    short = re.split("[@?]", name)[0]
    rest, known = name[len(short) :], read_known().get(short.lower())
    if known is None:
        return name
    if not known.n_tokens:
        raise EncoderError(
            f"{known.name} ({known.page}) cannot be loaded here. {known.note} Features that its "
            "own code computes come in by cxr-cache import."
        )
    if not known.model:
        raise EncoderError(
            f"No name leads to the weights of {known.name}: download them from {known.page} and "
            "name the file local-file:PATH."
        )
    return (known.model.partition("@")[0] if rest.startswith("@") else known.model) + rest
