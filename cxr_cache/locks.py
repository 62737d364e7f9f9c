"""One writer at a time: a lock file that names its holder and dies with it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path

from cxr_cache.errors import StoreBusyError

_held: set[Path] = set()  # record locks do not exclude a second writer in the same process


class WriterLock:
    """An exclusive record lock on ``<name>.lock`` beside the store.

    The kernel drops a record lock when its process ends, however it ends, and a
    forked child does not inherit it; so a lock file left by a killed process
    stops nobody, and decoding workers that outlive their parent hold nothing.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def acquire(cls, store_path: Path) -> WriterLock:
        """Take the lock or refuse at once.

        Raises
        ------
        StoreBusyError
            With the holder's host, process and starting time.
        """
        store_path.parent.mkdir(parents=True, exist_ok=True)
        path = store_path.resolve().with_name(f"{store_path.name}.lock")
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if path in _held:
                    raise BlockingIOError
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                holder = _describe_holder(fd)
                if path not in _held:  # closing any handle would drop this process's own lock
                    os.close(fd)
                raise StoreBusyError(
                    f"{store_path} is being written by {holder}. Wait for it to end, or stop it; "
                    "what it has finished is kept."
                ) from error
            if _same_file(fd, path):
                break
            os.close(fd)  # its last holder removed it between our two calls
        _held.add(path)
        holder_now = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(holder_now).encode(), 0)
        return cls(path, fd)

    def release(self) -> None:
        """Remove the lock file and let the next writer in."""
        self.path.unlink(missing_ok=True)
        os.close(self._fd)
        _held.discard(self.path)


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _describe_holder(fd: int) -> str:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} (since {holder['started']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
