"""Reading ahead in a thread: the same items, and nobody waits for it who leaves early."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from cxr_cache.datasets.decoding import read_ahead


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


class Slow:
    """Numbers, the second of which comes only when it is allowed to."""

    def __init__(self) -> None:
        self.allowed = threading.Event()
        self.was_waited_for = False

    def __iter__(self) -> Iterator[int]:
        for number in range(10):
            if number and not self.allowed.wait(20):
                self.was_waited_for = True
            yield number


@pytest.mark.parametrize("n_ahead", [0, 1, 3, 50])
@pytest.mark.parametrize("n_items", [0, 1, 2, 20])
def test_the_items_come_in_order(n_items, n_ahead):
    assert list(read_ahead(iter(range(n_items)), n_ahead)) == list(range(n_items))


@pytest.mark.parametrize("n_ahead", [1, 2, 4])
def test_no_more_than_asked_for_is_ahead(n_ahead):
    made: list[int] = []

    def record() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    for item in read_ahead(record(), n_ahead):
        assert made[-1] <= item + n_ahead


def test_nothing_is_an_item_too():
    assert list(read_ahead(iter([None, 0, None]), 1)) == [None, 0, None]


def test_an_error_comes_out_in_its_place_and_ends_the_thread():
    def fail_at_the_third() -> Iterator[int]:
        yield from (0, 1)
        raise OSError("a failed disk")

    items = read_ahead(fail_at_the_third(), 1)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(OSError, match="a failed disk"):
        next(items)
    for thread in readers():
        thread.join(30)
    assert not readers()


def test_leaving_early_waits_for_nothing_and_ends_the_thread():
    slow = Slow()
    items = read_ahead(iter(slow), 3)
    assert next(items) == 0

    items.close()  # the thread is at the second item, which nobody will see

    slow.allowed.set()
    for thread in readers():
        thread.join(30)
    assert not readers()
    assert not slow.was_waited_for


def test_what_an_error_left_half_read_may_be_collected_anywhere():
    """The collector may run while a lock is held that the thread needs in order to go on."""
    lock, held = threading.Lock(), threading.Event()

    def need_the_lock() -> Iterator[int]:
        yield 0
        assert held.wait(30)
        with lock:
            yield 1

    def leave_half_read() -> None:
        items = read_ahead(need_the_lock(), 2)
        assert next(items) == 0
        cycle: list[object] = [items]
        cycle.append(cycle)  # as an error and the frame that it came from

    def collect() -> None:
        with lock:
            held.set()
            gc.collect()

    gc.disable()
    try:
        leave_half_read()
        collector = threading.Thread(target=collect, daemon=True)
        collector.start()
        collector.join(30)
        assert not collector.is_alive()
    finally:
        gc.enable()
