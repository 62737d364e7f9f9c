"""Image files decoded into batches of pixels ahead of their use, by processes or a thread."""

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
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, Dataset

from cxr_cache.datasets.images import DecodedImage, decode_image, read_bytes
from cxr_cache.datasets.preprocessing import Preprocessing
from cxr_cache.errors import CxrCacheError, ImageError

T = TypeVar("T")


@dataclass
class Batch:
    """Decoded images of B rows, and the rows whose file cannot be used."""

    rows: NDArray[np.intp]
    """Row of each image in its table, ``(B,)``."""
    pixels: NDArray[np.uint8]
    """``(B, 3, S, S)``"""
    sha256: NDArray[np.uint8]
    """SHA-256 of each file's bytes, ``(B, 32)``."""
    failures: list[tuple[int, str]]
    """Row and reason of each failure."""
    reading_share: float
    """Share of the time for this batch that went into reading files, not into decoding them."""


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
        Ids of the whole table, ``(N,)``.
    rows
        Rows to decode.
    image_dir
        Folder that the image ids are relative to.
    preprocessing
        Preprocessing that the encoder expects.
    batch_size
        Rows per batch, including those that fail.
    num_workers
        Number of decoding processes, each of which works two batches ahead. With 0, a thread of
        this process decodes one batch ahead.
    """
    loader: DataLoader[Any] = DataLoader(
        _Decoding(image_ids, rows, image_dir, preprocessing),
        batch_size=batch_size,
        num_workers=min(num_workers, len(rows)),
        collate_fn=_collate,
        worker_init_fn=_depend_on_parent,
    )
    # A thread suffices, since Pillow and torch release the interpreter's lock while they work, and
    # kornia-rs, which does not, takes less time than an encoder on a CPU.
    yield from loader if num_workers else read_ahead(iter(loader), 1)


def read_ahead(items: Iterator[T], n_ahead: int) -> Iterator[T]:
    """Yield the items, while a thread makes up to `n_ahead` of the next ones.

    A caller that stops early waits for nothing: the thread ends by itself after its current item.
    Waiting for it could block for ever. An iterator that an error left half read is closed by the
    garbage collector at any line of any thread, perhaps in one that holds a lock which the thread
    needs in order to end.
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
            yield item  # type: ignore[misc]  # it is a T, since it is not `end`
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def dead_workers_explained() -> Iterator[None]:
    """Turn the death of a decoding process into a message.

    PyTorch raises the error from a signal handler, so any line of the main thread can raise it, not
    only the one that asks for the next batch. The other workers are killed too. Otherwise they
    would wait for ever to hand over a batch, and Python would wait for them.
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
    """One image, or the reason why there is none, and the time it took."""

    row: int
    image: DecodedImage | str
    reading_s: float
    decoding_s: float


class _Decoding(Dataset[_Item]):
    """Some rows of an image table, which are decoded when they are asked for."""

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
    """Stack the images that could be decoded.

    The batch holds numpy arrays, which travel through the worker's pipe. Torch tensors would need
    shared memory, of which containers often have only 64 MB.
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
    """Let this worker leave interrupts to its parent, and end when the parent has ended.

    It keeps to one core, as torch does in it by itself; resizing multiplies matrices by numpy.

    PyTorch's workers notice that their parent is gone, but then wait for ever to hand over a
    batch that nobody will fetch.
    """
    for interrupt in (signal.SIGINT, signal.SIGTERM):  # often sent to the whole process group
        signal.signal(interrupt, signal.SIG_IGN)
    threadpool_limits(1, "blas")
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
