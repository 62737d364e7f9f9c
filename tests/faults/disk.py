"""A model of what a crash leaves of a file: writes so far, and pages that reached the disk."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PAGE = 4096


@dataclass
class Recorder:
    """Writes to one file in order, with the points at which they were asked to be on the disk."""

    base: bytes = b""
    writes: list[tuple[int, bytes]] = field(default_factory=list)
    """Offset and bytes, since the last sync."""

    def write(self, offset: int, data: bytes) -> None:
        self.writes.append((offset, data))

    def sync(self) -> None:
        self.base = self.after_all()
        self.writes.clear()

    def after_all(self) -> bytes:
        return self.after(len(self.writes))

    def after(self, n_writes: int) -> bytes:
        """What a killed process leaves: the first writes, whole; the system writes them back."""
        content = bytearray(self.base)
        for offset, data in self.writes[:n_writes]:
            content.extend(bytes(max(0, offset + len(data) - len(content))))
            content[offset : offset + len(data)] = data
        return bytes(content)

    def torn(self, rng: np.random.Generator) -> bytes:
        """What a power cut leaves: of each page since the last sync any of its states."""
        states = [self.after(n) for n in range(len(self.writes) + 1)]
        longest = max(map(len, states))
        content = bytearray(longest)
        for start in range(0, longest, PAGE):
            chosen = states[rng.integers(len(states))]
            content[start : start + PAGE] = chosen[start : start + PAGE].ljust(PAGE, b"\0")
        return bytes(content[:longest])


class RecordedFile:
    """An in-memory file, as h5py takes it, that tells a recorder about every write."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.content = bytearray()
        self.position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: len(self.content)}
        self.position = base[whence] + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        buffer = bytearray(size)
        self.readinto(buffer)
        return bytes(buffer)

    def readinto(self, buffer: Any) -> int:
        data = self.content[self.position : self.position + len(buffer)].ljust(len(buffer), b"\0")
        buffer[:] = data
        self.position += len(buffer)
        return len(buffer)

    def write(self, data: Any) -> int:
        data = bytes(data)
        self.recorder.write(self.position, data)
        end = self.position + len(data)
        self.content.extend(bytes(max(0, end - len(self.content))))
        self.content[self.position : end] = data
        self.position = end
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        size = self.position if size is None else size
        if size > len(self.content):
            self.recorder.write(size - 1, b"\0")
            self.content.extend(bytes(size - len(self.content)))
        return size

    def flush(self) -> None:
        pass


@contextlib.contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Tell a recorder about every write and sync of this process."""
    pwrite, fsync = os.pwrite, os.fsync

    def write(fd: int, data: Any, offset: int) -> int:
        recorder.write(offset, bytes(data))
        return pwrite(fd, data, offset)

    def sync(fd: int) -> None:
        recorder.sync()
        fsync(fd)

    os.pwrite, os.fsync = write, sync
    try:
        yield
    finally:
        os.pwrite, os.fsync = pwrite, fsync


CALLS = ("pwrite", "fsync", "ftruncate", "posix_fallocate", "replace")


class CallCounter:
    """Counts what changes a file, and does something at one of the calls.

    Parameters
    ----------
    at
        Number of the call, from 0; None only counts.
    act
        Called with the name of the call and its arguments instead of the call.
    """

    def __init__(
        self, at: int | None = None, act: Callable[[str, tuple[Any, ...]], Any] | None = None
    ) -> None:
        self.n_calls = 0
        self._at, self._act = at, act

    @contextlib.contextmanager
    def installed(self) -> Iterator[CallCounter]:
        originals = {name: getattr(os, name) for name in CALLS}
        for name, original in originals.items():
            setattr(os, name, self._wrap(name, original))
        try:
            yield self
        finally:
            for name, original in originals.items():
                setattr(os, name, original)

    def _wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            number, self.n_calls = self.n_calls, self.n_calls + 1
            if number == self._at and self._act is not None:
                return self._act(name, arguments)
            return original(*arguments, **options)

        return call


_pwrite = os.pwrite


def die(name: str, arguments: tuple[Any, ...]) -> None:
    """End this process as a crash would, before the call."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_way(name: str, arguments: tuple[Any, ...]) -> None:
    """End this process in the middle of a write."""
    if name == "pwrite":
        fd, data, offset = arguments
        _pwrite(fd, memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2], offset)
    die(name, arguments)
