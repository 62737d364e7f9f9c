"""Encoding of pixels into the feature columns of a store, and canaries that check the encoder.

Canaries are generated images. Their embeddings show whether an encoder still computes the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxr_cache.encoders.encoder import Encoder
from cxr_cache.errors import EncoderError

logger = logging.getLogger(__name__)


def encode_views(
    encoder: Encoder,
    pixels: NDArray[np.uint8],
    *,
    flip: bool,
    n_unfrozen: int | None = None,
    tokens_dtype: str = "float16",
) -> dict[str, NDArray[Any]]:
    """Compute every feature column of some images, uint8 pixels ``(B, 3, S, S)``.

    With `flip`, the mirror images are a second view. Gives ``embeddings`` ``(B, V, D)`` and
    ``pooled`` ``(B, V, P)``, float32. With `n_unfrozen` also ``tokens`` ``(B, V, T, W)``, which
    enter the first of so many last blocks: float16, infinite where a value does not fit into that
    type; float32; or the bits of bfloat16 as uint16, which :func:`decode_tokens` reads.
    """
    views = _split_views(pixels, flip)
    if encoder.device.type == "cuda":  # a copy from pinned memory does not block its thread
        views = [view.pin_memory() for view in views]
    outputs = [_encode(encoder, view, n_unfrozen, tokens_dtype) for view in views]
    return {
        name: torch.stack([output[name] for output in outputs], dim=1).cpu().numpy()
        for name in outputs[0]
    }


@contextmanager
def encoding_threads(device: torch.device) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Start as many threads as there should be batches in the encoder at once.

    On a CPU there is one thread per core, which computes its batch alone. Cores that share matrix
    products would wait for each other at the end of each product, most of all on a busy machine,
    and pass activations between their caches. On a GPU there are two threads: one prepares its
    batch and launches its kernels while those of the other run.

    Yields
    ------
    tuple
        The threads, and their number.
    """
    n_cores, alone = torch.get_num_threads(), device.type == "cpu"
    n_threads = n_cores if alone else 2
    threads = ThreadPoolExecutor(
        n_threads, "encoder", lambda: torch.set_num_threads(1) if alone else None
    )
    try:
        yield threads, n_threads
    finally:
        threads.shutdown(cancel_futures=True)
        torch.set_num_threads(n_cores)  # threads that start later take the number that was set last


@contextmanager
def compiled(
    encoder: Encoder, threads: ThreadPoolExecutor, n_images: int, n_unfrozen: int | None
) -> Iterator[float]:
    """Have the encoder compiled for batches of `n_images` while the block runs.

    It is compiled by one of the threads that will compute, since code is made for their number of
    cores. `n_unfrozen` is that of :func:`encode_views`.

    Yields
    ------
    float
        Seconds that compiling took; 0 where it is not possible here, which is logged.
    """
    seconds = 0.0
    try:
        seconds = threads.submit(encoder.compile_pass, n_images, n_unfrozen).result()
    except EncoderError as error:
        logger.warning("%s It goes on without, at its usual speed.", error)
    try:
        yield seconds
    finally:
        encoder.drop_compiled()


class FittingEncoder:
    """An encoder that divides batches into pieces that fit into the device's memory.

    Pieces are halved whenever the memory does not suffice, and stay as small from then on.

    Attributes
    ----------
    largest
        Largest number of images that are encoded at once; None if every batch has fitted.
    """

    def __init__(self, encoder: Encoder, **options: Any) -> None:
        self.encoder, self._options = encoder, options
        self.largest: int | None = None

    def encode(self, pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Compute the columns of :func:`encode_views`.

        Raises
        ------
        EncoderError
            The memory does not suffice for a single image.
        """
        pieces, start = [], 0
        while start < len(pixels):
            piece = pixels[start : start + (self.largest or len(pixels))]
            if features := self._try(piece):
                pieces.append(features)
                start += len(piece)
            else:
                self._retreat(len(piece))
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _try(self, piece: NDArray[np.uint8]) -> dict[str, NDArray[Any]] | None:
        try:
            return encode_views(self.encoder, piece, **self._options)
        except torch.OutOfMemoryError:
            return None  # and not a retry here: the error still holds what filled the memory

    def _retreat(self, n_images: int) -> None:
        if n_images == 1:
            raise EncoderError(
                f"{self.encoder.device} has not enough free memory to encode a single image. End "
                "what else uses it, or choose another --device."
            )
        self.largest = min(n_images // 2, self.largest or n_images)
        if self.encoder.device.type == "cuda":
            torch.cuda.empty_cache()


def largest_token(
    encoder: Encoder, pixels: NDArray[np.uint8], *, flip: bool, n_unfrozen: int
) -> float:
    """Return the largest absolute value among the tokens of some images, before they are stored."""
    views = _split_views(pixels, flip)
    tokens = [encoder.encode_with_tokens(view, n_unfrozen)[0] for view in views]
    return max(float(values.abs().max()) for values in tokens)


def _split_views(pixels: NDArray[np.uint8], flip: bool) -> list[Tensor]:
    upright = torch.from_numpy(pixels)
    return [upright, upright.flip(-1)] if flip else [upright]


def decode_tokens(stored: NDArray[Any]) -> Tensor:
    """Read tokens as a store holds them, in their number format; the memory is shared."""
    tokens = torch.from_numpy(stored)
    return tokens.view(torch.bfloat16) if tokens.dtype == torch.uint16 else tokens


def _encode(
    encoder: Encoder, pixels: Tensor, n_unfrozen: int | None, tokens_dtype: str
) -> dict[str, Tensor]:
    """Compute the feature columns of one view, in one pass."""
    if n_unfrozen is None:
        pooled, embeddings = encoder.encode(pixels)
        return {"embeddings": embeddings, "pooled": pooled}
    tokens, pooled, embeddings = encoder.encode_with_tokens(pixels, n_unfrozen)
    rounded = tokens.to(getattr(torch, tokens_dtype))
    bits = rounded.view(torch.uint16) if rounded.dtype == torch.bfloat16 else rounded
    return {"embeddings": embeddings, "pooled": pooled, "tokens": bits}


# --- canaries ------------------------------------------------------------------------------------

N_CANARIES: Final = 8
MIN_COSINE: Final = 0.9999
"""Smallest cosine between features and their recomputation.

Batch size and device change the last bits of features, but not their directions.
"""


def draw_canaries(size_px: int) -> NDArray[np.uint8]:
    """Draw eight smooth random fields with grain, ``(C, 3, S, S)``.

    They need no file, are equal on every machine, and differ from each other.
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
    """Compute the embeddings of the eight images, ``(C, D)``, as a fingerprint of the encoder."""
    images = draw_canaries(encoder.preprocessing.image_size_px)
    _, embeddings = encoder.encode(torch.from_numpy(images))
    return np.asarray(embeddings.cpu().numpy(), np.float32)


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Compute the cosine of corresponding vectors along the last axis; NaN where one is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore"):
        return np.asarray((a * b).sum(axis=-1) / norms)
