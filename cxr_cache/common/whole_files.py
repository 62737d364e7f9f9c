"""Files that readers see whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cxr_cache.common.files import OUT_OF_SPACE
from cxr_cache.errors import DiskFullError


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
