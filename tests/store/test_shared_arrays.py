"""Large arrays: mapped by other processes, gone with their last reader, ordinary when they must."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from joblib import Parallel, delayed

from cxr_cache.store import rows as shared_arrays
from cxr_cache.store.rows import allocate_shared


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where temporary files go, and every array is large."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shared_arrays, "_WORTH_A_FILE", 1)
    return tmp_path


def describe(array: np.ndarray) -> tuple[float, str]:
    """Its sum, and the file that it is mapped from."""
    while array.base is not None and not isinstance(array, np.memmap):
        array = array.base
    return float(array.sum()), str(getattr(array, "filename", ""))


def test_small_arrays_are_ordinary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    array = allocate_shared((2, 3))
    assert (array.shape, array.dtype, array.sum()) == ((2, 3), np.float32, 0)
    assert list(tmp_path.iterdir()) == []


def test_another_process_maps_the_same_file(folder):
    array = allocate_shared((1, 40, 8))
    array[:] = 1

    with Parallel(n_jobs=2) as pool:
        ((total, name),) = pool([delayed(describe)(array)])

    assert (total, name) == (320, describe(array)[1])
    assert name.startswith(f"/proc/{os.getpid()}/fd/" if sys.platform == "linux" else str(folder))


def test_the_file_goes_when_nothing_refers_to_the_array(folder):
    array = allocate_shared((4, 5))
    file = Path(describe(array)[1])
    part = array[1:]
    del array
    assert file.stat().st_size == 80
    del part
    assert not file.exists()


def test_without_names_of_descriptors_the_file_lies_in_the_folder(folder, monkeypatch):
    """Systems other than Linux; there too it goes with the array."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    array = allocate_shared((4, 5))
    array[:] = 3
    (file,) = folder.iterdir()
    assert describe(array) == (60, str(file))
    del array
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file stays")
def test_a_killed_process_leaves_nothing(tmp_path):
    code = (
        "import os, signal, cxr_cache.store.rows as s; s._WORTH_A_FILE = 1; "
        "array = s.allocate_shared((1000, 1000)); array[:] = 1; "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_pickled_it_is_its_values(folder):
    array = allocate_shared((3,))
    array[:] = (1, 2, 3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(array)), [1, 2, 3])


def test_without_a_folder_it_is_ordinary(folder, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "gone"))
    assert allocate_shared((3, 4)).sum() == 0


def test_without_room_it_is_ordinary(folder, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shared_arrays, "reserve", refuse)
    array = allocate_shared((3, 4))
    array[:] = 2
    assert array.sum() == 24
    assert list(folder.iterdir()) == []
