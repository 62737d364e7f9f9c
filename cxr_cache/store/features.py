"""Which outputs of an encoder a head reads, and how they are scaled before it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

COLUMNS: Final = {
    "projected": ("embeddings",),
    "pooled": ("pooled",),
    "both": ("embeddings", "pooled"),
}
"""Columns of a store for each of :data:`cxr_cache.config.FEATURES`."""


def prepare_embeddings(embeddings: NDArray[np.float32], input_norm: str) -> NDArray[np.float32]:
    """Embeddings as the head reads them: L2-normalised along the last axis, or as they are.

    What is standardised stays as it is: mean and spread belong to the rows that a head is trained
    on, and end up in its first layer.
    """
    if input_norm != "l2":
        return embeddings
    norms = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    prepared: NDArray[np.float32] = embeddings / np.maximum(norms, np.float32(1e-12))
    return prepared


def prepare_features(parts: Sequence[NDArray[np.float32]], input_norm: str) -> NDArray[np.float32]:
    """Side by side, each prepared by itself: the encoder's outputs differ in scale."""
    prepared = [prepare_embeddings(part, input_norm) for part in parts]
    return prepared[0] if len(prepared) == 1 else np.concatenate(prepared, axis=-1)
