"""Large arrays that other processes map instead of copying."""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from pathlib import Path
from typing import IO, Final

import numpy as np
from numpy.typing import NDArray

from cxr_cache.common.files import require_space, reserve

_WORTH_A_FILE: Final = 2**28
"""Bytes from which on a second copy in memory would be felt."""


def allocate_shared(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Zeros, float32; a large array lies in a temporary file, which goes when the array does.

    joblib hands an array to another process of this machine by its file's name if it has one;
    other arrays it writes to such a file first, and then both are in memory. Where the temporary
    folder cannot be used or has no room, the array is an ordinary one.
    """
    n_bytes = 4 * math.prod(shape)
    if n_bytes < _WORTH_A_FILE:
        return np.zeros(shape, np.float32)
    try:
        # A write to a mapped page that the disk has no room for would end the process.
        require_space(Path(tempfile.gettempdir(), "features"), n_bytes)
        file, name = _open_temporary()
        file.truncate(n_bytes)
        reserve(file.fileno())
    except OSError:
        return np.zeros(shape, np.float32)
    mapped = np.memmap(name, np.float32, "r+", shape=shape)
    weakref.finalize(mapped, file.close)
    return np.asarray(mapped)  # pickled by value, where it must go to another machine


def _open_temporary() -> tuple[IO[bytes], str]:
    """A file that goes when it is closed, and a name for other processes to open it by.

    On Linux it is in no folder, so that not even a process that is killed leaves it behind; its
    name is that of its descriptor.
    """
    file = tempfile.TemporaryFile(prefix="cxr-cache-")  # noqa: SIM115  # closed with the array
    name = f"/proc/{os.getpid()}/fd/{file.fileno()}"
    if os.access(name, os.R_OK | os.W_OK):
        return file, name
    file.close()
    named = tempfile.NamedTemporaryFile(prefix="cxr-cache-")  # noqa: SIM115
    return named, named.name
