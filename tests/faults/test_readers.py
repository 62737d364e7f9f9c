"""Readers in other processes while a writer commits, replaces and dies."""

from __future__ import annotations

import multiprocessing
import time

import numpy as np
import pytest

from cxr_cache.store.feature_store import DONE, PENDING, FeatureStore
from tests.faults.oracle import Violations, count_wrong, fill, inspect_after, open_or_create
from tests.small_stores import SHAPES, make_batch

N_IMAGES = 60


def read_until(store: FeatureStore, stop, results) -> None:
    """Read finished rows again and again; each must be right at once."""
    n_wrong = n_reads = 0
    while not stop.is_set() or not n_reads:
        state = store.status
        state[store.find_damaged()] = PENDING
        n_wrong += count_wrong(store, state)
        n_reads += int((state == DONE).any())
    results.put((n_reads, n_wrong))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_readers_see_whole_rows_while_a_writer_commits(fast_path, method):
    """The store that the parent opened goes to the workers: inherited, or pickled."""
    context = multiprocessing.get_context(method)
    path, stop, results = fast_path / "s.h5", context.Event(), context.Queue()
    with open_or_create(path, N_IMAGES) as store:
        store.commit([0], *make_batch(np.array([0])))
        readers = [
            context.Process(target=read_until, args=(store, stop, results)) for _ in range(2)
        ]
        for reader in readers:
            reader.start()
        for row in range(1, N_IMAGES):
            store.commit([row], *make_batch(np.array([row])))
            time.sleep(0.002)
    stop.set()
    outcomes = [results.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join()
    assert all(n_reads > 0 and n_wrong == 0 for n_reads, n_wrong in outcomes), outcomes
    with FeatureStore.open(path) as store:
        assert (store.status == DONE).all()


def test_a_child_that_exits_with_the_store_open_changes_nothing(fast_path):
    """With libhdf5 handles this rolls the file back, silently."""
    path = fast_path / "s.h5"
    context = multiprocessing.get_context("fork")
    with open_or_create(path, N_IMAGES) as store:
        for row in range(10):
            store.commit([row], *make_batch(np.array([row])))
            child = context.Process(target=_leave_carelessly, args=(store,))
            child.start()
            child.join()
            assert child.exitcode == 0
    found = Violations()
    with FeatureStore.open(path) as store:
        assert np.flatnonzero(store.status).tolist() == list(range(10))
        assert len(store.find_damaged()) == 0
    fill(path, N_IMAGES, 0, lambda _: None)
    with FeatureStore.open(path) as store:
        assert set(store.features) == set(SHAPES)
    inspect_after(path, set(range(10)) - {6}, found)
    assert found.unreadable == found.lost == 0


def _leave_carelessly(store: FeatureStore) -> None:
    del store
