"""Bytes that have reached the disk: every write of a feature store goes through here."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO, Final

from cxr_cache.errors import ConfigError, DiskError, DiskFullError, StoreBusyError

OUT_OF_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, in as many calls as the system needs."""
    left = memoryview(data).cast("B")
    while left:
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written


def read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset` on; returns how many bytes there were."""
    n_read = 0
    while n_read < len(buffer):
        got = os.preadv(fd, [buffer[n_read:]], offset + n_read)
        if not got:
            break
        n_read += got
    return n_read


def sync(fd: int) -> None:
    """Return when what was written to `fd` is on the disk."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync stops at the drive's own cache
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Return when the names in `folder` are on the disk."""
    with opened(folder, os.O_RDONLY) as fd:
        os.fsync(fd)


def reserve(fd: int) -> None:
    """Turn a sparse file into real blocks, so that no later write can lack space."""
    if hasattr(os, "posix_fallocate"):  # not on macOS, where the check of free space has to do
        os.posix_fallocate(fd, 0, os.fstat(fd).st_size)


def require_space(path: Path, needed: int) -> None:
    """Raise unless the file system of `path` has `needed` bytes free.

    Raises
    ------
    DiskFullError
        With both numbers.
    """
    if needed > shutil.disk_usage(path.parent).free:
        raise _disk_full(path, needed)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor that is closed at the end, and that no started program inherits."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def disk_errors_named(path: Path, needed: int) -> Iterator[None]:
    """Turn what the system says about a failed write into a message about `path`.

    Parameters
    ----------
    path
        The store that is being written.
    needed
        Bytes that were to be written.

    Raises
    ------
    DiskFullError
        The file system, the quota or the file size limit is exhausted.
    DiskError
        The disk failed.
    """
    try:
        yield
    except (DiskError, DiskFullError):
        raise
    except OSError as error:
        if error.errno in OUT_OF_SPACE:
            raise _disk_full(path, needed) from error
        raise DiskError(
            f"{path} could not be written: {error.strerror or error}. What was finished before is "
            "kept. Check the disk (its log, its cable, the network mount), then run the same "
            "command again."
        ) from error


def _disk_full(path: Path, needed: int) -> DiskFullError:
    free = shutil.disk_usage(path.parent).free
    return DiskFullError(
        f"{path} needs {needed:,} bytes, and {path.parent} has {free:,} free (or a quota or a "
        "limit on file sizes allows less). Free some space, or write to another disk with --store; "
        "what was finished before is kept."
    )


# -- files that readers see whole or not at all ---


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old one or the whole new one.

    Raises
    ------
    DiskFullError
        As :func:`replacing`.
    """
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write under a temporary name, then rename: readers see the old file or the whole new one.

    Raises
    ------
    DiskFullError
        The file system, the quota or the file size limit is exhausted; the old file is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer turns the one into the other
        free = shutil.disk_usage(path.parent).free
        number = getattr(error, "errno", None) or getattr(error.__context__, "errno", None)
        if number not in OUT_OF_SPACE:
            raise
        raise DiskFullError(
            f"{path} could not be written: {path.parent} has {free:,} bytes free (or a quota or a "
            "limit on file sizes allows less). Free some space and run the same command again; "
            "what was finished before is kept."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


# -- one writer at a time ---

_held: Final[dict[Path, WriterLock]] = {}
"""Record locks do not exclude a second writer in the same process; this does."""


_guard: Final = threading.Lock()


class WriterLock:
    """An exclusive record lock on ``<name>.lock`` beside the store.

    The kernel drops a record lock when its process ends, however it ends, and a
    forked child does not inherit it; so a lock file left by a killed process
    stops nobody, and decoding workers that outlive their parent hold nothing.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._pid = os.getpid()
        self.holder = {
            "host": socket.gethostname(),
            "pid": self._pid,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        with contextlib.suppress(OSError):  # a full disk: locked all the same, only not signed
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(self.holder).encode(), 0)

    @classmethod
    def acquire(cls, store_path: Path) -> WriterLock:
        """Take the lock or refuse at once.

        Raises
        ------
        StoreBusyError
            With the holder's host, process and starting time.
        """
        target = Path(os.path.realpath(store_path))  # two links to one store share its lock
        target.parent.mkdir(parents=True, exist_ok=True)
        path = target.with_name(f"{target.name}.lock")
        with _guard:
            own = _held.get(path)
            if own is not None and own._pid == os.getpid():
                raise _busy(store_path, own.holder)
            _held[path] = lock = cls(path, _lock_file(path, store_path))
        return lock

    def release(self) -> None:
        """Remove the lock file and let the next writer in; in a forked child, do neither."""
        if self._pid == os.getpid():
            _held.pop(self.path, None)
            with contextlib.suppress(OSError):  # a failed disk: the file stays, and stops nobody
                self.path.unlink()
        os.close(self._fd)


def _lock_file(path: Path, store_path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = _read_holder(fd)
            os.close(fd)
            raise _busy(store_path, holder) from error
        if _is_at(fd, path):
            return fd
        os.close(fd)  # its last holder removed it between our two calls


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _read_holder(fd: int) -> dict[str, object]:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _busy(store_path: Path, holder: dict[str, object]) -> StoreBusyError:
    who = (
        f"process {holder['pid']} on {holder['host']} (since {holder['started']})"
        if holder.keys() >= {"pid", "host", "started"}
        else "another process"
    )
    return StoreBusyError(
        f"{store_path} is being written by {who}. Wait for it to end, or stop it; what it has "
        "finished is kept."
    )


# -- text that people give ---


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, or say in one sentence where it is something else.

    Raises
    ------
    ConfigError
        The file cannot be read, or holds a byte that is not UTF-8; the message names the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise ConfigError(
            f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8, so the file was saved in another "
            "encoding, such as Latin-1. Save it as UTF-8."
        ) from error
