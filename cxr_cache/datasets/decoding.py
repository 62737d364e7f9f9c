"""Image files to batches of pixels, ahead of whoever uses them: in processes, or in a thread."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from cxr_cache.datasets.images import DecodedImage, decode_image, read_bytes
from cxr_cache.datasets.preprocessing import Preprocessing
from cxr_cache.errors import CxrCacheError, ImageError

T = TypeVar("T")


def read_ahead(items: Iterator[T], n_ahead: int) -> Iterator[T]:
    """The same items, up to `n_ahead` of them made while one is used.

    Whoever leaves before the end waits for nothing: the thread ends by itself after the item that
    it is at. It must not be waited for, because an iterator that an error left half read is
    closed by the garbage collector, at any line of any thread: also at one that holds a lock
    which the thread needs in order to end.
    """
    end = object()
    thread = ThreadPoolExecutor(1, "read-ahead")
    coming: deque[Future[T | object]] = deque()
    try:
        while True:
            while len(coming) <= n_ahead:
                coming.append(thread.submit(next, items, end))
            item = coming.popleft().result()
            if item is end:
                return
            yield item  # type: ignore[misc]  # not `end`, which alone is no T
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


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
    reading_share: float
    """Of the time that making the batch took: reading files, not decoding them."""


def decode_batches(
    image_ids: NDArray[np.str_],
    rows: NDArray[np.intp],
    image_dir: Path,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    num_workers: int,
) -> Generator[Batch, None, None]:
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
        Processes, each two batches ahead; 0 decodes one batch ahead in a thread of this one.
    """
    loader: DataLoader[Any] = DataLoader(
        _Decoding(image_ids, rows, image_dir, preprocessing),
        batch_size=batch_size,
        num_workers=min(num_workers, len(rows)),
        collate_fn=_collate,
        worker_init_fn=_depend_on_parent,
    )
    # Pillow gives the interpreter's lock away while it decodes, and so does torch at work.
    yield from loader if num_workers else read_ahead(iter(loader), 1)


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


@dataclass(frozen=True)
class _Item:
    """One image or the reason why there is none, and what it took."""

    row: int
    image: DecodedImage | str
    reading_s: float
    decoding_s: float


class _Decoding(Dataset[_Item]):
    """The i-th of some rows of an image table."""

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

    def __getitem__(self, i: int) -> _Item:
        row = int(self._rows[i])
        started = read = time.perf_counter()
        image: DecodedImage | str
        try:
            data = read_bytes(self._image_dir, str(self._image_ids[row]))
            read = time.perf_counter()
            image = decode_image(data, self._preprocessing)
        except ImageError as error:
            image = str(error)
        return _Item(row, image, read - started, time.perf_counter() - read)


def _collate(items: list[_Item]) -> Batch:
    """Stack what could be decoded.

    numpy arrays travel through the worker's pipe; torch tensors would need shared memory, of
    which containers often have 64 MB only.
    """
    decoded = [(i.row, i.image) for i in items if isinstance(i.image, DecodedImage)]
    pixels = [image.pixels for _, image in decoded] or [np.empty((0, 3, 0, 0), np.uint8)]
    sha256 = np.frombuffer(b"".join(image.sha256 for _, image in decoded), np.uint8)
    reading_s = sum(item.reading_s for item in items)
    total_s = reading_s + sum(item.decoding_s for item in items)
    return Batch(
        rows=np.array([row for row, _ in decoded], dtype=np.intp),
        pixels=np.stack(pixels) if decoded else pixels[0],
        sha256=sha256.reshape(-1, 32),
        failures=[(item.row, item.image) for item in items if isinstance(item.image, str)],
        reading_share=reading_s / total_s if total_s else 0.0,
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
