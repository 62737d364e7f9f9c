"""Disks that are full, and disks that fail."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from cxr_cache.common import files as durable
from cxr_cache.errors import DiskError, DiskFullError
from cxr_cache.store.feature_store import DONE, FeatureStore
from tests.faults.disk import CallCounter
from tests.faults.oracle import (
    Violations,
    fill,
    inspect_after,
    open_or_create,
    run_in_child,
    write_rows,
)
from tests.small_stores import SHAPES, make_batch, make_cohort

N_IMAGES = 400
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of a given size; needs root."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def store_size(tmp_path: Path) -> int:
    open_or_create(tmp_path / "size.h5", N_IMAGES).close()
    return (tmp_path / "size.h5").stat().st_size


@pytest.mark.parametrize("share", [k / 12 for k in range(12)])
@pytest.mark.parametrize("lies", [False, True], ids=["free space known", "free space unknown"])
def test_a_full_disk_is_named_and_resume_completes(small_disk, tmp_path, monkeypatch, share, lies):
    """Twelve sizes, met by the check beforehand or, where quotas hide it, by the writes."""
    size = store_size(tmp_path)
    disk = small_disk(max(4096, int(size * share) // 4096 * 4096))
    if lies:
        monkeypatch.setattr(durable.shutil, "disk_usage", lambda _: Usage(1 << 50, 0, 1 << 50))
    with pytest.raises(DiskFullError, match=r"s\.h5 needs [\d,]+ bytes, and .* has [\d,]+ free"):
        fill(disk / "s.h5", N_IMAGES, 0, lambda _: None)
    assert list(disk.iterdir()) == []  # and what was begun is gone

    subprocess.run(["mount", "-o", f"remount,size={2 * size + (1 << 20)}", str(disk)], check=True)
    fill(disk / "s.h5", N_IMAGES, 0, lambda _: None)
    found = Violations()
    inspect_after(disk / "s.h5", set(range(N_IMAGES)), found)
    assert found.total == 0, found


def test_a_disk_too_full_for_another_table_keeps_the_store(small_disk, tmp_path):
    size = store_size(tmp_path)
    disk = small_disk(int(1.5 * size) // 4096 * 4096)
    fill(disk / "s.h5", N_IMAGES, 0, lambda _: None)
    with FeatureStore.open(disk / "s.h5", "r+") as store:
        with pytest.raises(DiskFullError):
            store.replace(make_cohort(N_IMAGES + 5), np.full(N_IMAGES + 5, -1), features=SHAPES)
        store.mark_pending(np.array([0]))  # it can still be written
        write_rows(store, np.array([0]))
    found = Violations()
    inspect_after(disk / "s.h5", set(range(N_IMAGES)), found)
    assert found.total == 0, found


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_limit_on_file_sizes_is_named(tmp_path, share):
    """What `ulimit -f` and some quotas do; needs no root."""
    limit = int(store_size(tmp_path) * share)

    def work(acknowledge) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(DiskFullError, match=r"s\.h5 needs"):
            fill(tmp_path / "s.h5", N_IMAGES, 0, acknowledge)

    acknowledged, status = run_in_child(work)
    assert (acknowledged, status) == (set(), 0)
    assert not (tmp_path / "s.h5").exists()


@pytest.mark.parametrize("kind", ["pwrite", "fsync"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_at_any_call(fast_path, kind, number):
    """The batch is refused as a whole, earlier ones stay, and only a fresh start goes on."""
    path, template = fast_path / "s.h5", fast_path / "template.h5"
    with open_or_create(template, 20) as store:
        write_rows(store, np.arange(8))
    acknowledged = set(range(8))
    batch = np.array([8, 9, 11, 12])

    def fail(name: str, arguments: tuple) -> None:
        raise OSError(number, os.strerror(number))

    counter = CallCounter()
    with counter.installed():
        shutil.copy(template, path)
        with FeatureStore.open(path, "r+") as store:
            first = counter.n_calls
            store.commit(batch, *make_batch(batch))
        last = counter.n_calls
    n_failed = 0
    for at in range(first, last):
        shutil.copy(template, path)
        seen = []

        def act(name: str, arguments: tuple, seen: list = seen) -> None:
            seen.append(name)
            fail(name, arguments)

        with CallCounter(at, act).installed(), FeatureStore.open(path, "r+") as store:
            expected = DiskError if number == errno.EIO else DiskFullError
            with pytest.raises(expected, match=r"s\.h5 .*(kept|finished before)"):
                store.commit(batch, *make_batch(batch))
            assert (store.status[batch] != DONE).all()
            with pytest.raises(DiskError, match="open the store again"):
                store.commit(batch, *make_batch(batch))
        if kind not in seen:
            continue
        n_failed += 1
        found = Violations()
        inspect_after(path, acknowledged, found)
        fill(path, 20, 0, lambda _: None)
        inspect_after(path, set(range(20)), found)
        assert found.total == 0, found
    assert n_failed >= 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_while_a_store_is_created(fast_path, number):
    counter = CallCounter()
    with counter.installed():
        open_or_create(fast_path / "count.h5", 20).close()
    (fast_path / "count.h5").unlink()

    def fail(name: str, arguments: tuple) -> None:
        raise OSError(number, os.strerror(number))

    n_by_lock = 2  # it signs its file, which it can do without
    for at in range(n_by_lock, counter.n_calls):
        expected = DiskError if number == errno.EIO else DiskFullError
        with CallCounter(at, fail).installed(), pytest.raises((expected, OSError)) as caught:
            open_or_create(fast_path / "s.h5", 20)
        assert caught.value.errno == number or isinstance(caught.value, expected)
        left = [file.name for file in fast_path.iterdir()]
        assert left in ([], ["s.h5"]), f"call {at} left {left}"
        open_or_create(fast_path / "s.h5", 20).close()
        (fast_path / "s.h5").unlink()
