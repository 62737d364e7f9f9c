"""Sentences that say a finding is present, or absent, for zero-shot classification."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from cxr_cache.errors import ConfigError


@dataclass(frozen=True)
class PromptPair:
    """What may be said of an image with a finding, and of one without."""

    present: tuple[str, ...]
    absent: tuple[str, ...]


def load_prompts(path: Path | None = None) -> dict[str, PromptPair]:
    """Prompts by finding, from a JSON file or the package's own for the 35 findings.

    The file holds ``{"Mass": {"present": ["a lung mass"], "absent": ["no lung mass"]}}``; a finding
    may have several of each, whose embeddings are averaged.

    Raises
    ------
    ConfigError
        The file is not of that form.
    """
    if path is None:
        text = files("cxr_cache.encoders").joinpath("prompts35.json").read_text(encoding="utf-8")
    else:
        text = path.read_text(encoding="utf-8")
    try:
        entries = json.loads(text)
        return {finding: _parse_pair(entry) for finding, entry in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} is not a file of prompts ({error!r}). It needs, for every finding: "
            '{"Cardiomegaly": {"present": ["cardiomegaly"], "absent": ["no cardiomegaly"]}}.'
        ) from error


def _parse_pair(entry: Any) -> PromptPair:
    pair = PromptPair(tuple(entry["present"]), tuple(entry["absent"]))
    for sentences in (entry["present"], entry["absent"]):
        if isinstance(sentences, str) or not sentences:
            raise ValueError("present and absent are lists of one sentence or more")
        if not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
            raise ValueError("a sentence is text")
    return pair
