"""Image files to batches of pixels, in worker processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from cxr_cache.errors import CxrCacheError, ImageError
from cxr_cache.images import DecodedImage, Preprocessing, read_image


@dataclass
class Batch:
    """Decoded images of B rows, and the rows whose file cannot be used."""

    rows: NDArray[np.intp]
    pixels: NDArray[np.uint8]
    """``(B, 3, S, S)``"""
    sha256: NDArray[np.uint8]
    """Of each file's bytes, ``(B, 32)``."""
    failures: list[tuple[int, str]]
    """Row and reason."""


def decode_batches(
    image_ids: NDArray[np.str_],
    rows: NDArray[np.intp],
    image_dir: Path,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    num_workers: int,
) -> Iterator[Batch]:
    """Decode some rows of an image table, in order.

    Parameters
    ----------
    image_ids
        Of the whole table, ``(N,)``.
    rows
        Which to decode.
    image_dir
        Folder that the image ids are relative to.
    preprocessing
        The encoder's.
    batch_size
        Rows per batch; those that fail count.
    num_workers
        Processes; 0 decodes in this one.
    """
    loader: DataLoader[Any] = DataLoader(
        _Decoding(image_ids, rows, image_dir, preprocessing),
        batch_size=batch_size,
        num_workers=min(num_workers, len(rows)),
        collate_fn=_collate,
        worker_init_fn=_depend_on_parent,
    )
    yield from loader


@contextlib.contextmanager
def dead_workers_explained() -> Iterator[None]:
    """Turn the death of a decoding process into a message.

    PyTorch raises it from a signal handler, so it can come out of any line of the main thread,
    not only of the one that asks for the next batch. The other workers are ended as well: they
    would wait for ever to hand over a batch, and Python for them.
    """
    others = set(multiprocessing.active_children())
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise CxrCacheError(
            "A decoding process was killed, most likely for want of memory. What is done is kept; "
            "run the same command again, with fewer --num-workers or a smaller --batch-size."
        ) from error


class _Decoding(Dataset[tuple[int, DecodedImage | str]]):
    """Row number to decoded image, or to the reason why there is none."""

    def __init__(
        self,
        image_ids: NDArray[np.str_],
        rows: NDArray[np.intp],
        image_dir: Path,
        preprocessing: Preprocessing,
    ) -> None:
        self._image_ids = image_ids
        self._rows = rows
        self._image_dir = image_dir
        self._preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> tuple[int, DecodedImage | str]:
        row = int(self._rows[i])
        image_id = str(self._image_ids[row])
        try:
            return row, read_image(self._image_dir, image_id, self._preprocessing)
        except ImageError as error:
            return row, str(error)


def _collate(items: list[tuple[int, DecodedImage | str]]) -> Batch:
    """Stack what could be decoded.

    numpy arrays travel through the worker's pipe; torch tensors would need shared memory, of
    which containers often have 64 MB only.
    """
    decoded = [(row, image) for row, image in items if isinstance(image, DecodedImage)]
    pixels = [image.pixels for _, image in decoded] or [np.empty((0, 3, 0, 0), np.uint8)]
    sha256 = np.frombuffer(b"".join(image.sha256 for _, image in decoded), np.uint8)
    return Batch(
        rows=np.array([row for row, _ in decoded], dtype=np.intp),
        pixels=np.stack(pixels) if decoded else pixels[0],
        sha256=sha256.reshape(-1, 32),
        failures=[(row, reason) for row, reason in items if isinstance(reason, str)],
    )


def _depend_on_parent(_worker: int) -> None:
    """Leave interrupts to the parent, and do not outlive it.

    PyTorch's workers notice that their parent is gone, but then wait for ever to hand over a
    batch that nobody will fetch.
    """
    for interrupt in (signal.SIGINT, signal.SIGTERM):  # both often go to the whole group
        signal.signal(interrupt, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
