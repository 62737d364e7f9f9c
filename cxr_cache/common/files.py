"""Files: bytes that are on the disk, files seen whole or not at all, and one writer at a time.

Only this module makes calls that differ between operating systems and file systems. What databases
and git put up with is put up with here too: a file system without locks, without folders that can
be synced, or without blocks that can be reserved, is used all the same.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO, Final

from cxr_cache.errors import ConfigError, CxrCacheError, DiskError, DiskFullError, StoreBusyError

logger = logging.getLogger(__name__)

OUT_OF_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNSUPPORTED: Final = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, 524)
"""Answers of file systems that lack a call; 524 is ENOTSUPP, which Linux lets slip through."""
_NO_FOLDER_SYNC: Final = (*_UNSUPPORTED, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR)
_NO_LOCKS: Final = (*_UNSUPPORTED, errno.ENOLCK)
_WRONG_PATH: Final = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)
_LOCKED: Final = (errno.EAGAIN, errno.EACCES)


def open_file(path: Path, flags: int) -> int:
    """Open a file of bytes and return its descriptor, which no started program inherits."""
    return os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)


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
        with contextlib.suppress(OSError):  # network drives and memory sticks do not know it
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Return when the names in `folder` are on the disk, where the file system can say so."""
    with _tolerated(*_NO_FOLDER_SYNC), opened(folder, os.O_RDONLY) as fd:
        os.fsync(fd)


def reserve(fd: int) -> None:
    """Turn a sparse file into real blocks, so that no later write can lack space.

    Where the system or the file system cannot do that, the check of free space has to do.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with _tolerated(*_UNSUPPORTED):
            os.posix_fallocate(fd, 0, os.fstat(fd).st_size)


@contextmanager
def _tolerated(*numbers: int) -> Iterator[None]:
    """Pass over errors of the operating system that have one of these numbers."""
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file for the length of a block; see :func:`open_file`."""
    fd = open_file(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


# -- space, and disks that fail ---


def free_bytes(folder: Path) -> int | None:
    """Return the bytes that a user may still write below `folder`; None where nobody knows."""
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(folder)
        if usage.total or usage.free:  # object stores that are mounted as folders state zeros
            return usage.free
    return None


def require_space(path: Path, needed: int) -> None:
    """Raise DiskFullError, with both numbers, unless `path` has `needed` bytes free."""
    free = free_bytes(path.parent)
    if free is not None and needed > free:
        raise _disk_full(path, needed)


@contextmanager
def disk_errors_named(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn what the system says about a failed write into a message about `path`.

    `needed` is the number of bytes that were to be written; None where that is not known.

    Raises
    ------
    DiskFullError
        The file system, the quota or the file size limit is exhausted.
    DiskError
        The disk failed.
    """
    try:
        yield
    except CxrCacheError:
        raise
    except (OSError, RuntimeError) as error:  # torch's writer turns the one into the other
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        if cause.errno in OUT_OF_SPACE:
            raise _disk_full(path, needed) from error
        raise DiskError(
            f"{path} could not be written: {cause.strerror or cause}. Check the "
            + ("path" if cause.errno in _WRONG_PATH else "disk, its log and the network mount")
            + " and the permissions, then run the same command again; what was finished before is "
            "kept."
        ) from error


def _disk_full(path: Path, needed: int | None) -> DiskFullError:
    free = free_bytes(path.parent)
    there = "an unknown number of" if free is None else f"{free:,}"
    return DiskFullError(
        (
            f"{path} could not be written: {path.parent} has {there} bytes free"
            if needed is None
            else f"{path} needs {needed:,} bytes, and {path.parent} has {there} free"
        )
        + " (or a quota or a limit on file sizes allows less). Free some space and run the same "
        "command again, or write to another disk; what was finished before is kept."
    )


# -- files that readers see whole or not at all ---


def write_whole(path: Path, content: bytes) -> None:
    """Write a file as :func:`replacing` does: readers see the old one or the whole new one."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write under a temporary name, then rename: readers see the old file or the whole new one.

    Where `path` is a link, the file that it leads to is replaced. What is no ordinary file (a
    terminal, a pipe, /dev/stdout) cannot be replaced, and is written to as it is.

    Raises
    ------
    DiskFullError, DiskError
        As :func:`disk_errors_named`; the old file is still there.
    """
    if path.is_relative_to("/dev") or (path.exists() and not path.is_file()):
        with disk_errors_named(path), path.open("wb") as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with disk_errors_named(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                sync(file.fileno())
            temporary.replace(target)
    finally:
        with contextlib.suppress(OSError):  # renamed already; or the disk failed, and says so
            temporary.unlink()


# -- one writer at a time ---

_held: Final[dict[Path, WriterLock]] = {}
"""Record locks do not exclude a second writer in the same process; this does."""
_guard: Final = threading.RLock()  # a finalizer may run at any line of the thread that has it


class WriterLock:
    """An exclusive record lock on a file beside what is written.

    The kernel drops a record lock when its process ends, however it ends, and a
    forked child does not inherit it; so a lock file left by a killed process
    stops nobody, and decoding workers that outlive their parent hold nothing.

    On a file system without locks the lock file is only a note of who writes. It refuses a second
    writer where the first one lives on the same machine, and warns of the rest.

    Notes
    -----
    Own code instead of the package filelock: that takes locks that forked children share (before
    its version 4), does without them on one of the four answers of file systems that have none,
    and cannot say who holds a lock.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._pid, self._thread = os.getpid(), threading.get_ident()
        self.holder = {
            "host": os.uname().nodename,
            "pid": self._pid,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        with contextlib.suppress(OSError):  # a full disk: locked all the same, only not signed
            os.ftruncate(fd, 0)
            write_at(fd, json.dumps(self.holder).encode(), 0)

    @classmethod
    def acquire(cls, written: Path, lock_file: Path | None = None) -> WriterLock:
        """Take the lock on a file or an existing folder, or refuse at once.

        Parameters
        ----------
        written
            A file, whose lock lies beside it; or a folder, whose lock lies in it. A thread that
            has the lock of a folder already gets it anew: what it wrote before has failed.
        lock_file
            Where the lock is to be instead.

        Raises
        ------
        StoreBusyError
            With the holder's host, process and starting time.
        DiskError
            The lock file cannot be made.
        """
        path = lock_file or _lock_path(written)
        with _guard:
            own = _held.get(path)
            if own is not None and own._pid == os.getpid():
                if not written.is_dir() or own._thread != threading.get_ident():
                    raise _busy(written, own.holder)
                own._let_go()
            _held[path] = lock = cls(path, _lock_file(path, written))
        return lock

    def release(self) -> None:
        """Remove the lock file and let the next writer in; in a forked child, do neither."""
        with _guard:
            self._let_go()

    def _let_go(self) -> None:
        if self._fd < 0:
            return
        if self._pid == os.getpid():
            _held.pop(self.path, None)
            with contextlib.suppress(OSError):  # a failed disk: the file stays, and stops nobody
                self.path.unlink()
        os.close(self._fd)
        self._fd = -1


def hold_folder(folder: Path, owner: object) -> Callable[[], object]:
    """Keep other processes from writing to a folder for as long as `owner` lives.

    What it gives lets the next writer in, before `owner` is gone; calling it again does nothing.
    Errors are those of :meth:`WriterLock.acquire`.
    """
    return weakref.finalize(owner, WriterLock.acquire(folder).release)


def require_no_writer(written: Path) -> None:
    """Raise StoreBusyError if another process is writing to a file or folder now.

    For callers who do something that takes long before they take the lock.
    """
    path = _lock_path(written)
    own = _held.get(path)
    if own is not None and own._pid == os.getpid():
        return
    with contextlib.suppress(FileNotFoundError, PermissionError), opened(path, os.O_RDONLY) as fd:
        _lock(fd, fcntl.LOCK_SH, path, written)


def _lock_path(written: Path) -> Path:
    target = Path(os.path.realpath(written))  # two links to one store share its lock
    return target / ".lock" if target.is_dir() else target.with_name(f"{target.name}.lock")


def _lock_file(path: Path, written: Path) -> int:
    while True:
        with disk_errors_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = open_file(path, os.O_RDWR | os.O_CREAT)
        try:
            _lock(fd, fcntl.LOCK_EX, path, written)
            if _is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its last holder removed it between our two calls


def _lock(fd: int, kind: int, path: Path, written: Path) -> None:
    """Lock an open lock file, or raise StoreBusyError; warn where the file system has no locks."""
    try:
        fcntl.lockf(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        holder = _read_holder(fd)
        if error.errno in _LOCKED:
            raise _busy(written, holder) from error
        if error.errno not in _NO_LOCKS:
            raise
        if _lives_here(holder):
            raise _busy(written, holder, f" If there is no such process, delete {path}.") from error
        if kind == fcntl.LOCK_EX and path not in _warned:
            _warned.add(path)
            note = f" The file says that {_describe(holder)} writes or has ended there."
            logger.warning(
                "%s: this file system has no locks (%s), so a process on another machine that "
                "writes to %s at the same time goes unnoticed, and its work and this one's may be "
                "lost. See to it that only one writes.%s",
                *(path, error.strerror, written, note if holder else ""),
            )


_warned: Final[set[Path]] = set()


def _lives_here(holder: dict[str, object]) -> bool:
    """Whether the process noted in a lock file is another one of this machine."""
    pid = holder.get("pid")
    if holder.get("host") != os.uname().nodename or pid == os.getpid() or type(pid) is not int:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _read_holder(fd: int) -> dict[str, object]:
    buffer = bytearray(4096)
    try:
        holder = json.loads(buffer[: read_at(fd, memoryview(buffer), 0)])
    except (ValueError, OSError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _busy(written: Path, holder: dict[str, object], remedy: str = "") -> StoreBusyError:
    return StoreBusyError(
        f"{written} is being written by {_describe(holder)}. Wait for it to end, stop it, or write "
        f"somewhere else; what it has finished is kept.{remedy}"
    )


def _describe(holder: dict[str, object]) -> str:
    if holder.keys() >= {"pid", "host", "started"}:
        return f"process {holder['pid']} on {holder['host']} (since {holder['started']})"
    return "another process"


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
            f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8, so the file was saved in "
            "another encoding, such as Latin-1. Save it as UTF-8."
        ) from error
