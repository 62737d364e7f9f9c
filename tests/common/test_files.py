"""File systems that lack something, full disks, and files that are whole or not there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from cxr_cache.common import files
from cxr_cache.common.files import (
    WriterLock,
    disk_errors_named,
    free_bytes,
    hold_folder,
    replacing,
    require_no_writer,
    require_space,
    reserve,
    sync,
    sync_folder,
    write_whole,
)
from cxr_cache.errors import ConfigError, DiskError, DiskFullError, StoreBusyError
from cxr_cache.store.feature_store import FeatureStore
from tests.small_stores import ENCODER, SHAPES, make_batch, make_cohort, make_store

WITHOUT_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, 524]
"""Lustre without -o flock, NFS without a lock service, FUSE, and DVS."""


def failing(number: int, calls: list | None = None):
    def fail(*arguments: object, **_: object) -> None:
        if calls is not None:
            calls.append(arguments)
        raise OSError(number, os.strerror(number))

    return fail


# --- No locks -------------------------------------------------------------------------------------


@pytest.fixture(params=WITHOUT_LOCKS)
def without_locks(request, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", failing(request.param))
    monkeypatch.setattr(files, "_warned", set())


@pytest.mark.usefixtures("without_locks")
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, caplog):
    path = tmp_path / "s.h5"
    with make_store(path, done=slice(0, 4)):
        pass
    with FeatureStore.open(path, "r+") as store:
        store.commit([5], *make_batch([5]))
    assert len(caplog.messages) == 1  # once per lock file, not once per call
    for part in (f"{path}.lock", "has no locks", "See to it that only one writes"):
        assert part in caplog.messages[0]
    assert [p.name for p in tmp_path.iterdir()] == ["s.h5"]
    with FeatureStore.open(path) as store:
        assert store.status.tolist()[:6] == [1, 1, 1, 1, 0, 1]


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_living_process_of_this_machine_is_respected(tmp_path):
    """Its number stands in the lock file: all that such a file system can tell."""
    lock = tmp_path / "s.h5.lock"
    holder = {"pid": os.getppid(), "host": socket.gethostname(), "started": "today"}
    lock.write_text(json.dumps(holder))

    for attempt in (WriterLock.acquire, require_no_writer):
        with pytest.raises(StoreBusyError, match=f"process {os.getppid()} on .*") as refused:
            attempt(tmp_path / "s.h5")
        assert f"If there is no such process, delete {lock}." in str(refused.value)
    lock.unlink()  # as it says
    WriterLock.acquire(tmp_path / "s.h5").release()


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize(
    "note",
    [
        {"pid": 2**22 + 5, "host": socket.gethostname(), "started": "then"},  # ended
        {"pid": 1, "host": "elsewhere", "started": "then"},
        {"pid": True, "host": socket.gethostname()},
        "no JSON",
    ],
)
def test_without_locks_others_are_named_but_do_not_stop_anybody(tmp_path, caplog, note):
    text = note if isinstance(note, str) else json.dumps(note)
    (tmp_path / "s.h5.lock").write_text(text)

    WriterLock.acquire(tmp_path / "s.h5").release()

    named = isinstance(note, dict) and "started" in note
    assert named == (f"process {note['pid']} on {note['host']}" in caplog.text if named else False)


def test_any_other_answer_to_a_lock_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        WriterLock.acquire(tmp_path / "s.h5")


# --- No synchronisation of folders, no reservation, no numbers ------------------------------------


@pytest.mark.parametrize(
    "number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.ENOSYS]
)
def test_a_folder_that_cannot_be_synced_is_none_the_worse(tmp_path, monkeypatch, number):
    """EINVAL is what CIFS answers, and what `import` and the first `extract` failed on."""
    fsync, calls = os.fsync, []

    def of_files_only(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").is_dir():
            failing(number, calls)()
        fsync(fd)

    monkeypatch.setattr(os, "fsync", of_files_only)
    make_store(tmp_path / "s.h5").close()
    assert calls
    with FeatureStore.open(tmp_path / "s.h5") as store:
        assert len(store.embedded_rows) == len(store)


def test_a_folder_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_blocks_need_not_be_reserved(tmp_path, monkeypatch, number):
    calls: list = []
    monkeypatch.setattr(os, "posix_fallocate", failing(number, calls))
    make_store(tmp_path / "s.h5").close()
    assert calls
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        reserve(0)


def test_macos_falls_back_to_fsync(tmp_path, monkeypatch):
    """F_FULLFSYNC is refused by network drives (ENOTSUP) and some memory sticks (ENOTTY)."""
    calls = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", failing(errno.ENOTSUP, calls))
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(fd))
    sync(7)
    assert calls == [(7, 51), 7]


def test_a_disk_that_states_zeros_may_have_space(tmp_path, monkeypatch):
    """Buckets that are mounted as folders have neither a size nor a free part of it."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(0, 0, 0))
    assert free_bytes(tmp_path) is None
    stated = []
    make_store(tmp_path / "s.h5", on_space=stated.append).close()
    assert stated[0].to_text().endswith(" MB.")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(100, 100, 0))
    with pytest.raises(DiskFullError, match=r"needs 5 bytes, and .* has 0 free"):
        require_space(tmp_path / "x", 5)
    monkeypatch.setattr(files.shutil, "disk_usage", failing(errno.ENOSYS))
    require_space(tmp_path / "x", 5)


# --- Whole or not there ---------------------------------------------------------------------------


def test_a_failed_write_names_the_file_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b"old")
    said = r"table\.csv could not be written: Input/output error"
    with pytest.raises(DiskError, match=said), replacing(path):
        failing(errno.EIO)()
    with pytest.raises(RuntimeError, match="not a matter of the disk"), replacing(path):
        raise RuntimeError("not a matter of the disk")
    with pytest.raises(ConfigError), disk_errors_named(path):
        raise ConfigError("says it all")
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    assert path.read_bytes() == b"old"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    said = (
        r"none/table\.csv could not be written: No such file.* Check the path and the permissions"
    )
    with pytest.raises(DiskError, match=said):
        write_whole(tmp_path / "none" / "table.csv", b"new")


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.csv").write_bytes(b"old")
    (tmp_path / "link.csv").symlink_to("real.csv")
    write_whole(tmp_path / "link.csv", b"new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_bytes() == b"new"


def test_what_is_no_file_is_written_to_as_it_is(tmp_path):
    """`--out /dev/stdout` and `--out >(gzip > table.csv.gz)` go on working."""
    write_whole(Path(os.devnull), b"new")
    assert not Path(os.devnull).is_file()
    reader, writer = os.pipe()
    write_whole(Path(f"/dev/fd/{writer}"), b"through a pipe")
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"through a pipe"


# --- Folders that are written for long ------------------------------------------------------------


class Owner:
    """Something that writes into a folder."""


def test_a_folder_is_held_until_its_owner_is_gone_or_lets_go(tmp_path):
    owner = Owner()
    let_go = hold_folder(tmp_path, owner)
    assert (tmp_path / ".lock").exists()
    let_go()
    let_go()
    assert not (tmp_path / ".lock").exists()
    hold_folder(tmp_path, owner)
    del owner
    assert not (tmp_path / ".lock").exists()


def test_a_failed_owner_of_the_same_thread_gives_way(tmp_path):
    """A notebook keeps what failed alive; the cell can be run again all the same."""
    failed, again = Owner(), Owner()
    let_go = hold_folder(tmp_path, failed)
    hold_folder(tmp_path, again)
    let_go()
    del failed
    assert (tmp_path / ".lock").exists()  # that of the second one


def test_two_stores_at_once_do_not_replace_each_other(tmp_path):
    """Both saw that there was none; the second to get there must not delete the first."""
    path = tmp_path / "s.h5"
    make_store(path).close()
    with pytest.raises(ConfigError, match=r"s\.h5 exists already"):
        FeatureStore.create(path, make_cohort(3), encoder=ENCODER, features=SHAPES, overwrite=False)
    with FeatureStore.open(path) as store:
        assert len(store) == 20
    assert [p.name for p in tmp_path.iterdir()] == ["s.h5"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of descriptors")
def test_no_started_program_inherits_a_file(tmp_path):
    with make_store(tmp_path / "s.h5") as store:
        assert not os.get_inheritable(store._fd)
