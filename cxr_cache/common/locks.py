"""One writer at a time: a lock file that names its holder and dies with it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from cxr_cache.errors import StoreBusyError

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
