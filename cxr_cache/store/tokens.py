"""Where the tokens of a training batch come from: memory, the store, or images through the stem."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cxr_cache.common.devices import free_ram_bytes, require_memory
from cxr_cache.common.distributed import world_size
from cxr_cache.config import Augmentation
from cxr_cache.datasets.decoding import Batch, decode_batches, read_ahead
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.encoding import decode_tokens
from cxr_cache.errors import TrainingError
from cxr_cache.store.augment import augment, enlarge_for_crops
from cxr_cache.store.feature_store import FeatureStore

_SHARE_OF_MEMORY: Final = 0.5
"""Of what is free, at most this much is filled with tokens."""
_BATCHES_AHEAD: Final = 2


class TokenSource(Protocol):
    """The tokens of N images, in V views each."""

    n_views: int

    @property
    def description(self) -> str:
        """What this is, to end a sentence that begins with "from"."""
        ...

    def batches(
        self, rows: Tensor, views: Tensor, batch_size: int, *, seeds: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Tokens of some images, in the order given, B at a time; the last batch may be smaller.

        Of `rows`, `views` says which view is wanted, and `seeds` from which seed its pixels are
        changed at random (None: not at all; cached tokens have no pixels), ``(n,)`` int64 each.

        Yields
        ------
        Tensor
            ``(B, T, W)``, float16, bfloat16 or float32, on any device; its memory may be filled
            anew once the next batch is taken.
        """
        ...


class ResidentTokens:
    """Tokens ``(N, V, T, W)`` in memory, on whatever device they are.

    With `pins`, a thread puts batches into page-locked memory, from which they get to a GPU while
    that is at work on another.
    """

    def __init__(self, tokens: Tensor, *, pins: bool = False) -> None:
        self.tokens, self._pins = tokens, pins
        self.n_views = tokens.shape[1]

    @classmethod
    def load(
        cls,
        store: FeatureStore,
        store_rows: NDArray[np.intp],
        device: torch.device,
        *,
        pins: bool = False,
    ) -> ResidentTokens:
        """Read the tokens of some rows of a store.

        Raises
        ------
        ConfigError
            They do not fit into the memory that is free.
        """
        column = store.columns["tokens"]
        if device.type == "cpu":
            require_memory(
                len(store_rows) * column.row_bytes,
                f"The tokens of {len(store_rows):,} images of {store.path}",
                "Read them from the file while training, with --tokens-in disk.",
            )
        dtype = getattr(torch, store.header.tokens_dtype)
        tokens = torch.empty(len(store_rows), *column.shape, dtype=dtype, device=device)
        for places in store.split_rows(np.arange(len(store_rows)), ("tokens",)):
            values = decode_tokens(store.read_rows("tokens", store_rows[places]))
            tokens[int(places[0]) : int(places[-1]) + 1] = values.to(device)
        return cls(tokens, pins=pins)

    @property
    def description(self) -> str:
        """See :class:`TokenSource`."""
        n_images, n_views = self.tokens.shape[:2]
        return (
            f"the tokens of {n_images:,} images ({n_views} per image, "
            f"{self.tokens.nbytes / 1e9:,.2f} GB) in the memory of {self.tokens.device}"
        )

    def batches(
        self, rows: Tensor, views: Tensor, batch_size: int, *, seeds: Tensor | None = None
    ) -> Iterator[Tensor]:
        """See :class:`TokenSource`."""
        batches = self._gather(rows, views, batch_size)
        if not self._pins:
            return batches
        return read_ahead(map(Tensor.pin_memory, batches), _BATCHES_AHEAD)

    def _gather(self, rows: Tensor, views: Tensor, batch_size: int) -> Iterator[Tensor]:
        rows, views = rows.to(self.tokens.device), views.to(self.tokens.device)
        for chosen, view in zip(
            torch.split(rows, batch_size), torch.split(views, batch_size), strict=True
        ):
            yield self.tokens[chosen, view]


class StoredTokens:
    """Tokens of N rows that stay in the file of a store, which stays open; a thread reads ahead.

    `pins` is that of :class:`ResidentTokens`.
    """

    def __init__(
        self, store: FeatureStore, store_rows: NDArray[np.intp], *, pins: bool = False
    ) -> None:
        self._store, self._store_rows, self._pins = store, store_rows, pins
        self.n_views = store.columns["tokens"].shape[0]

    @property
    def description(self) -> str:
        """See :class:`TokenSource`."""
        n_bytes = len(self._store_rows) * self._store.columns["tokens"].row_bytes
        return (
            f"the tokens of {len(self._store_rows):,} images ({self.n_views} per image, "
            f"{n_bytes / 1e9:,.2f} GB), read from {self._store.path}"
        )

    def batches(
        self, rows: Tensor, views: Tensor, batch_size: int, *, seeds: Tensor | None = None
    ) -> Iterator[Tensor]:
        """See :class:`TokenSource`."""
        batches = self._read(rows.numpy(), views.numpy(), batch_size)
        pinned = map(Tensor.pin_memory, batches) if self._pins else batches
        return read_ahead(pinned, _BATCHES_AHEAD)

    def _read(
        self, rows: NDArray[np.int64], views: NDArray[np.int64], batch_size: int
    ) -> Iterator[Tensor]:
        column = self._store.columns["tokens"]
        shape = (min(batch_size, len(rows)), *column.shape[1:])
        # One in use, the others read or being read; new memory for each would cost as much again.
        buffers = [np.empty(shape, column.dtype) for _ in range(_BATCHES_AHEAD + 2)]
        for start, buffer in zip(
            range(0, len(rows), batch_size), itertools.cycle(buffers), strict=False
        ):
            chosen = self._store_rows[rows[start : start + batch_size]]
            seen = views[start : start + batch_size]
            read = self._store.read_views("tokens", chosen, seen, out=buffer[: len(chosen)])
            yield decode_tokens(read)


class ImageTokens:
    """Images of N rows of a store, decoded anew each time and run through the frozen stem.

    The stem leaves `n_unfrozen` blocks to the tail, and computes in the encoder's own precision and
    without gradient. With `flip`, the mirror image is a second view; `augmentation` changes pixels
    where a seed asks for it.
    """

    def __init__(
        self,
        encoder: Encoder,
        n_unfrozen: int,
        store: FeatureStore,
        store_rows: NDArray[np.intp],
        image_dir: Path,
        *,
        flip: bool = False,
        augmentation: Augmentation | None = None,
        num_workers: int = 0,
    ) -> None:
        self._encoder, self._n_unfrozen = encoder, n_unfrozen
        self._image_ids, self._image_dir = store.image_ids, image_dir
        self._store_rows = store_rows
        self._sha256 = np.array(store.read_column("image_sha256"))
        self._augmentation = augmentation or Augmentation()
        self._num_workers = num_workers
        self.n_views = 2 if flip else 1

    @property
    def description(self) -> str:
        """See :class:`TokenSource`."""
        return f"{len(self._store_rows):,} images in {self._image_dir}, decoded in every epoch"

    def batches(
        self, rows: Tensor, views: Tensor, batch_size: int, *, seeds: Tensor | None = None
    ) -> Iterator[Tensor]:
        """See :class:`TokenSource`.

        Raises
        ------
        TrainingError
            An image cannot be read any more, or is another one than that of the store.
        """
        preprocessing = self._encoder.preprocessing
        if not len(rows):
            return
        augmentation = Augmentation() if seeds is None else self._augmentation
        decoded = decode_batches(
            self._image_ids,
            self._store_rows[rows.numpy()],
            self._image_dir,
            enlarge_for_crops(preprocessing, augmentation),
            batch_size=batch_size,
            num_workers=self._num_workers,
        )
        for i, (batch, view) in enumerate(
            zip(decoded, torch.split(views, batch_size), strict=True)
        ):
            self._require_same_images(batch)
            pixels = torch.from_numpy(batch.pixels)
            if seeds is not None:
                chosen = seeds[i * batch_size : i * batch_size + len(pixels)]
                pixels = augment(pixels, augmentation, preprocessing.image_size_px, chosen)
            pixels = torch.where(view[:, None, None, None] == 1, pixels.flip(-1), pixels)
            with torch.no_grad():  # must end before the yield, or it would hold for the reader too
                tokens = self._encoder.stem(self._encoder.prepare(pixels), self._n_unfrozen)
            yield tokens

    def _require_same_images(self, batch: Batch) -> None:
        if batch.failures:
            row, reason = batch.failures[0]
            raise TrainingError(
                f"{self._image_dir / str(self._image_ids[row])} cannot be used any more: {reason}. "
                "Restore it, or run `cxr-cache extract` again, which notes the row as failed."
            )
        changed = (batch.sha256 != self._sha256[batch.rows]).any(axis=1)
        if changed.any():
            i = int(changed.argmax())
            stored = self._sha256[batch.rows[i]].tobytes().hex()
            raise TrainingError(
                f"{self._image_dir / str(self._image_ids[batch.rows[i]])} has changed since its "
                f"extraction: sha256 {stored[:12]}… in the store, "
                f"{batch.sha256[i].tobytes().hex()[:12]}… now. Run `cxr-cache extract` again."
            )


def open_tokens(
    store: FeatureStore, store_rows: NDArray[np.intp], device: torch.device, place: str
) -> ResidentTokens | StoredTokens:
    """The cached tokens of N rows of a store, for a training that computes on `device`.

    `place` is ``"device"``, ``"ram"``, ``"disk"``, or ``"auto"``: the fastest that they fit into.
    """
    if place == "auto":
        place = _choose_place(len(store_rows) * store.columns["tokens"].row_bytes, device)
    travels = device.type == "cuda" and place != "device"
    if place == "disk":
        return StoredTokens(store, store_rows, pins=travels)
    where = device if place == "device" else torch.device("cpu")
    return ResidentTokens.load(store, store_rows, where, pins=travels)


def _choose_place(n_bytes: int, device: torch.device) -> str:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if n_bytes <= _SHARE_OF_MEMORY * free:
            return "device"
    return "ram" if n_bytes <= _SHARE_OF_MEMORY * free_ram_bytes() / world_size() else "disk"
