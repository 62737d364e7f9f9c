"""Items made by a thread while those before them are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
