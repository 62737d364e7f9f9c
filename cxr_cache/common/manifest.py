"""The manifest beside what a command wrote: which command, when, with what, and how it ended.

A command is recorded by :func:`recording`, which the command line wraps around it. The library says
where it writes by :func:`mark_written`, which does nothing where no command is recorded: a call
from Python leaves no manifest.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from cxr_cache.common.files import write_whole
from cxr_cache.common.wording import package_versions
from cxr_cache.errors import CxrCacheError

FILE: Final = "manifest.json"
N_KEPT: Final = 100
"""Commands that a manifest lists, the latest; more than that tell nobody anything."""
_PACKAGES: Final = ("cxr-cache", "torch", "open-clip-torch", "timm", "numpy", "scikit-learn")
_STOPPED: Final = (130, 143)

logger = logging.getLogger(__name__)


class _Command:
    """One call of the command line, and the places that it has written to."""

    def __init__(self, words: Sequence[str]) -> None:
        self._start = time.monotonic()
        self.places: list[Path] = []
        self.entry: dict[str, Any] = {
            "command": next((word for word in words if not word.startswith("-")), ""),
            "command_line": shlex.join(["cxr-cache", *words]),
            "folder": str(Path.cwd()),
            "status": "running",
            "exit_status": None,
            "started": _now(),
            "ended": None,
            "seconds": None,
            "process": os.getpid(),
            "versions": {"python": platform.python_version()},
        }

    def mark(self, place: Path) -> None:
        if place not in self.places:
            self.entry["versions"] |= package_versions(*_PACKAGES)  # a tenth of what --help takes
            self.places.append(place)
            _put(place, self.entry)

    def end(self, exit_status: int) -> None:
        self.entry |= {
            "status": "finished"
            if exit_status == 0
            else "stopped"
            if exit_status in _STOPPED
            else "failed",
            "exit_status": exit_status,
            "ended": _now(),
            "seconds": round(time.monotonic() - self._start, 3),
        }
        for place in self.places:
            if place.exists():
                _put(place, self.entry)


_running: ContextVar[_Command | None] = ContextVar("running", default=None)


@contextmanager
def recording(words: Sequence[str]) -> Iterator[None]:
    """Record the block as a command with these words behind ``cxr-cache``.

    It has finished if the block ends or raises ``SystemExit(0)``, was stopped if the status is that
    of a signal, and has failed otherwise.
    """
    command = _Command(words)
    token = _running.set(command)
    status = 1
    try:
        yield
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        raise
    except KeyboardInterrupt:
        status = _STOPPED[0]
        raise
    finally:
        _running.reset(token)
        command.end(status)


def mark_written(written: Path) -> None:
    """Say that the command of now writes to this folder or file, which is there.

    Called when a command has begun to write, so that one that is refused leaves no trace, and one
    that is killed leaves an entry that still says ``running``. Of the processes of one job, the
    first records.
    """
    command = _running.get()
    if command is not None and os.environ.get("RANK", "0") == "0":
        command.mark(Path(written).absolute())


def manifest_path(written: Path) -> Path:
    """Where the manifest of a folder or of a file lies."""
    return written / FILE if written.is_dir() else written.with_name(f"{written.name}.{FILE}")


def read_manifest(written: str | Path) -> list[dict[str, Any]]:
    """The commands that wrote to a folder or file, the latest last; empty where none did.

    A manifest that cannot be read counts as none: nothing follows from it.
    """
    with contextlib.suppress(OSError, ValueError):
        entries = json.loads(manifest_path(Path(written)).read_text(encoding="utf-8"))
        if isinstance(entries, list):
            return [entry for entry in entries if isinstance(entry, dict)]
    return []


def _put(place: Path, entry: dict[str, Any]) -> None:
    """Write an entry, in place of what it said before; a failure is a warning, and no more."""
    same = ("started", "process", "command_line")
    others = [
        other
        for other in read_manifest(place)
        if any(other.get(name) != entry[name] for name in same)
    ]
    path = manifest_path(place)
    try:
        write_whole(path, json.dumps([*others, entry][-N_KEPT:], indent=2).encode())
    except (OSError, CxrCacheError) as error:
        logger.warning("The manifest %s could not be written: %s", path, error)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
