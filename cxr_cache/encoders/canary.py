"""Generated images whose embeddings tell whether an encoder still computes the same."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from cxr_cache.encoders.encoder import Encoder

N_CANARIES: Final = 8
MIN_COSINE: Final = 0.9999
"""Recomputed features must agree this well: batch size and device change bits, not directions."""


def draw_canaries(size_px: int) -> NDArray[np.uint8]:
    """Eight smooth random fields with grain, ``(C, 3, S, S)``.

    They need no file, are the same on every machine, and no two are alike.
    """
    rng = np.random.default_rng(20170802)
    axis = np.linspace(0, 2 * np.pi, size_px)
    images = np.empty((N_CANARIES, 3, size_px, size_px), np.uint8)
    for image in images:
        waves = rng.uniform(0.5, 4.0, size=(2, 1))
        phases = rng.uniform(0, 2 * np.pi, size=(2, 1))
        rows, columns = np.sin(waves * axis + phases)
        field = 110 + 60 * np.outer(rows, columns) + rng.normal(0, 12, (size_px, size_px))
        image[:] = field.clip(0, 255).astype(np.uint8)
    return images


def encode_canaries(encoder: Encoder) -> NDArray[np.float32]:
    """Embeddings of the eight images, ``(C, D)``: a fingerprint of what is computed."""
    images = draw_canaries(encoder.preprocessing.image_size_px)
    _, embeddings = encoder.encode(torch.from_numpy(images))
    return np.asarray(embeddings.cpu().numpy(), np.float32)


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine between corresponding vectors along the last axis; NaN where one is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore"):
        return np.asarray((a * b).sum(axis=-1) / norms)
