"""Bytes that have reached the disk: every write of a feature store goes through here."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cxr_cache.errors import DiskError, DiskFullError

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
