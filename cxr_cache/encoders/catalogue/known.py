"""Encoders that many use: their short names, and what is known of them without their weights."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from cxr_cache.encoders.sources import join_query, split_query
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
    mean: tuple[float, ...]
    """Of pixels on the scale 0..1, one for each channel, as the authors' code has it where no file
    beside the weights does; empty where it is unknown."""
    std: tuple[float, ...]
    resize: str
    """How their code makes an image square, where it is another way than the family's."""
    page: str
    note: str
    """Oddities and traps, in sentences."""

    @property
    def token_mb(self) -> float:
        """Megabytes that the tokens of an image take in float16."""
        return self.n_tokens * self.width * 2 / 1e6


def _read_channels(text: str) -> tuple[float, ...]:
    """Read a number for each channel, of which one stands for three."""
    numbers = tuple(map(float, text.split()))
    return numbers * 3 if len(numbers) == 1 else numbers


@cache
def read_known() -> dict[str, Known]:
    """Read the encoders of ``known.csv`` by their short names."""
    text = files("cxr_cache.encoders.catalogue").joinpath("known.csv").read_text(encoding="utf-8")
    known = {}
    for row in csv.DictReader(text.splitlines()):
        values: dict[str, Any] = dict(row)
        values |= {name: int(row[name]) for name in ("image_px", "n_tokens", "width")}
        values |= {"seen": tuple(row["seen"].split()), "is_gated": bool(row["is_gated"])}
        values |= {name: _read_channels(row[name]) for name in ("mean", "std")}
        known[row["name"]] = Known(**values)
    return known


def _split_model(name: str) -> tuple[str, str]:
    """Split a name into what it is without a revision, and the file that it asks for."""
    plain, query = split_query(name)
    return plain.partition("@")[0], query.get("file", "")


def find_known(name: str) -> Known | None:
    """Find what is known of an encoder by its short name or its own, whatever its revision."""
    try:
        plain, file = _split_model(name)
    except EncoderError:
        return None
    if (known := read_known().get(plain.lower())) is not None:
        return known
    models = {_split_model(known.model): known for known in read_known().values() if known.model}
    return models.get((plain, file)) or models.get((plain, ""))


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
    >>> spell_out("chexzero?file=/data/best.pt")
    'local-file:/data/best.pt'
    """
    short = re.split("[@?]", name)[0]
    known = read_known().get(short.lower())
    if known is None:
        return name
    if not known.n_tokens:
        raise EncoderError(
            f"{known.name} ({known.page}) cannot be loaded here. {known.note} Features that its "
            "own code computes come in by cxr-cache import."
        )
    plain, asked = split_query(name)
    if not known.model:
        if "file" not in asked:
            raise EncoderError(
                f"No name leads to the weights of {known.name}: download them from {known.page} "
                f"and name the file, {known.name}?file=PATH."
            )
        return join_query(f"local-file:{asked.pop('file')}", asked)
    model, own = split_query(known.model)
    revision = plain[len(short) :]
    return join_query(f"{model.partition('@')[0] if revision else model}{revision}", own | asked)
