"""Pixels to the feature columns of a store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxr_cache.encoder import Encoder, EncoderIdentity, load_encoder

IMAGENET_STATISTICS: Final = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
"""Mean and standard deviation of the pixels that ``--normalize imagenet`` stands for."""


def encode_views(
    encoder: Encoder, pixels: NDArray[np.uint8], *, flip: bool, n_unfrozen: int | None = None
) -> dict[str, NDArray[Any]]:
    """Every feature column of some images.

    Parameters
    ----------
    encoder
        What computes them.
    pixels
        ``(B, 3, S, S)``, uint8.
    flip
        Also encode the mirror images, as a second view.
    n_unfrozen
        Also give the tokens that enter the first of the last `n_unfrozen` blocks.

    Returns
    -------
    dict
        ``embeddings`` ``(B, V, D)`` and ``pooled`` ``(B, V, P)``, float32; where they are asked
        for, ``tokens`` ``(B, V, T, W)``, float16: infinite where that type is too narrow.
    """
    outputs = [_encode(encoder, view, n_unfrozen) for view in _split_views(pixels, flip)]
    return {
        name: torch.stack([output[name] for output in outputs], dim=1).cpu().numpy()
        for name in outputs[0]
    }


def largest_token(
    encoder: Encoder, pixels: NDArray[np.uint8], *, flip: bool, n_unfrozen: int
) -> float:
    """Largest absolute value among the tokens of some images, as computed, not as stored."""
    views = _split_views(pixels, flip)
    tokens = [encoder.encode_with_tokens(view, n_unfrozen)[0] for view in views]
    return max(float(values.abs().max()) for values in tokens)


def _split_views(pixels: NDArray[np.uint8], flip: bool) -> list[Tensor]:
    upright = torch.from_numpy(pixels)
    return [upright, upright.flip(-1)] if flip else [upright]


def _encode(encoder: Encoder, pixels: Tensor, n_unfrozen: int | None) -> dict[str, Tensor]:
    """The feature columns of one view, in one pass."""
    if n_unfrozen is None:
        pooled, embeddings = encoder.encode(pixels)
        return {"embeddings": embeddings, "pooled": pooled}
    tokens, pooled, embeddings = encoder.encode_with_tokens(pixels, n_unfrozen)
    return {"embeddings": embeddings, "pooled": pooled, "tokens": tokens.half()}


def reload_encoder(
    recorded: Mapping[str, Any], *, model: str | None = None, device: str = "auto"
) -> Encoder:
    """Load the encoder that a store or a run says it was made with.

    Parameters
    ----------
    recorded
        An encoder's identity as :meth:`EncoderIdentity.to_dict` gives it.
    model
        Its name, where it lies elsewhere now; None takes the recorded one.
    device
        As for :func:`cxr_cache.encoder.load_encoder`.

    Returns
    -------
    Encoder
        It may still differ in its weights: compare the identities.

    Raises
    ------
    EncoderError
        `recorded` is no identity, or the encoder cannot be loaded.
    """
    identity = EncoderIdentity.from_dict(recorded)
    preprocessing = identity.preprocessing
    statistics = [list(preprocessing.get(name, ())) for name in ("mean", "std")]
    return load_encoder(
        model or identity.name,
        device=device,
        precision=identity.precision,
        resize=preprocessing.get("resize"),
        normalize="imagenet" if statistics == IMAGENET_STATISTICS else "encoder",
        bits_stored=preprocessing.get("bits_stored"),
    )
