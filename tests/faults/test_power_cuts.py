"""Power cuts on a real ext4: the file system is shut down under the writer, and mounted again."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cxr_cache.store.feature_store import PENDING
from tests.faults.oracle import Violations, fill, inspect_after, kill, run_in_child

N_IMAGES = 120
SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
WITHOUT_LOG_FLUSH = 2  # what is not yet in the journal on the disk is gone


def run_quietly(*command: object) -> bool:
    return subprocess.run(list(map(str, command)), capture_output=True).returncode == 0


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    if not run_quietly("mount", "-o", "loop", image, folder):
        pytest.skip("power cuts need root, a loop device and ext4: skipped")
    try:
        yield folder
    finally:
        assert run_quietly("umount", folder)


def cut_power(folder: Path) -> int:
    """Shut the file system down; returns when that began.

    An fsync that is under way at that moment may still report success for what is lost. A real
    power cut leaves nobody to report to, so only what was acknowledged before counts.
    """
    fd = os.open(folder, os.O_RDONLY)
    began = time.monotonic_ns()
    fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", WITHOUT_LOG_FLUSH))
    os.close(fd)
    return began


@pytest.mark.parametrize("n_cuts", [5, pytest.param(150, marks=pytest.mark.faults)])
def test_power_cuts_on_ext4(fast_path, tmp_path, seed, n_cuts):
    image, folder = fast_path / "disk.img", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(24 << 20)
    if os.geteuid() != 0 or not run_quietly("mkfs.ext4", "-q", "-F", image):
        pytest.skip("power cuts need root, a loop device and ext4: skipped")
    rng, found, acknowledged = np.random.default_rng(seed), Violations(), set()
    n_during = 0
    for _ in range(n_cuts):
        with mounted(image, folder):
            batches, patience = int(rng.integers(1 << 30)), float(rng.exponential(0.05))

            def work(acknowledge, seed: int = batches) -> None:
                try:
                    fill(folder / "s.h5", N_IMAGES, seed, acknowledge)
                except OSError:  # the disk is gone; it may also be the kill that ends this
                    os._exit(2)

            def stop(child: int, after_s: float = patience) -> int:
                time.sleep(after_s)
                began = cut_power(folder)
                kill(child)
                return began

            reported, status = run_in_child(work, stop)
            n_during += status != 0
        acknowledged |= reported
        with mounted(image, folder):  # the journal is replayed here
            state = inspect_after(folder / "s.h5", acknowledged, found)
            if len(state) and (state != PENDING).all():
                (folder / "s.h5").unlink()
                acknowledged = set()
    print(f"power cuts on ext4: {found}, {n_during} of them during a write")
    assert found.total == 0, found
