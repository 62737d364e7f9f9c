"""One writer at a time, whatever became of the last one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from cxr_cache.common.files import WriterLock
from cxr_cache.errors import StoreBusyError
from cxr_cache.store.feature_store import FeatureStore
from tests.small_stores import make_batch, make_store

FORK = multiprocessing.get_context("fork")


def hold(path: Path, ready, *, release: bool) -> None:
    lock = WriterLock.acquire(path)
    ready.set()
    if release:
        lock.release()
        return
    time.sleep(60)


def start_holder(path: Path, *, release: bool = False):
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(path, ready), kwargs={"release": release})
    process.start()
    assert ready.wait(10)
    return process


def test_a_second_writer_is_told_who_the_first_is(tmp_path):
    holder = start_holder(tmp_path / "s.h5")
    try:
        pattern = (
            rf"s\.h5 is being written by process {holder.pid} on {socket.gethostname()} \(since"
        )
        with pytest.raises(StoreBusyError, match=pattern):
            WriterLock.acquire(tmp_path / "s.h5")
    finally:
        holder.kill()
        holder.join()


def test_the_same_process_is_refused_too(tmp_path):
    with make_store(tmp_path / "s.h5") as store:
        with pytest.raises(StoreBusyError, match=f"process {os.getpid()}"):
            FeatureStore.open(store.path, "r+")
        with pytest.raises(StoreBusyError):  # and the refusal did not drop the lock
            FeatureStore.open(store.path, "r+")
        holder = json.loads((tmp_path / "s.h5.lock").read_text())
        assert holder["pid"] == os.getpid()
    FeatureStore.open(tmp_path / "s.h5", "r+").close()


def test_a_refused_stranger_does_not_disturb_the_holder(tmp_path):
    """A record lock is lost when any handle of its process is closed; another process's is not."""
    with make_store(tmp_path / "s.h5"):
        for _ in range(2):
            child = FORK.Process(target=_expect_busy, args=(tmp_path / "s.h5",))
            child.start()
            child.join()
            assert child.exitcode == 0


def _expect_busy(path: Path) -> None:
    try:
        FeatureStore.open(path, "r+")
    except StoreBusyError:
        return
    raise AssertionError("opened a store that another process writes")


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    holder = start_holder(tmp_path / "s.h5")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / "s.h5.lock").exists()

    WriterLock.acquire(tmp_path / "s.h5").release()

    assert not (tmp_path / "s.h5.lock").exists()


def test_a_child_that_outlives_its_parent_holds_nothing(tmp_path):
    path, leaf = tmp_path / "s.h5", FORK.Value("i", 0)
    parent = FORK.Process(target=_open_and_leave_a_child, args=(path, leaf))
    parent.start()
    while not leaf.value:
        time.sleep(0.01)
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    try:
        os.kill(leaf.value, 0)  # the child is alive
        FeatureStore.open(path, "r+").close()
    finally:
        os.kill(leaf.value, signal.SIGKILL)


def _open_and_leave_a_child(path: Path, leaf) -> None:
    store = make_store(path)
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    leaf.value = child
    time.sleep(60)
    store.close()


def test_a_child_that_closes_what_it_inherited_changes_nothing(tmp_path):
    """Neither the parent's lock nor its file: it goes on writing, and nobody else may."""
    path = tmp_path / "s.h5"
    with make_store(path, done=slice(0)) as store:
        child = os.fork()
        if not child:
            store.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert (tmp_path / "s.h5.lock").exists()
        other = FORK.Process(target=_expect_busy, args=(path,))
        other.start()
        other.join()
        assert other.exitcode == 0
        store.commit([3], *make_batch(np.array([3])))
    with FeatureStore.open(path) as reader:
        assert reader.status[3] == 1
        assert len(reader.find_damaged()) == 0


def test_locks_come_and_go(tmp_path):
    for _ in range(20):
        start_holder(tmp_path / "s.h5", release=True).join()
        WriterLock.acquire(tmp_path / "s.h5").release()
