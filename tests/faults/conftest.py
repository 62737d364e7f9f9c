"""The long part runs only when it is asked for: ``pytest -m faults tests/faults``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SEED = int(os.environ.get("CXR_CACHE_FAULTS_SEED", "0"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "faults" in (config.option.markexpr or ""):
        return
    skip = pytest.mark.skip(reason="the long part of the fault harness: `make faults`")
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.get_closest_marker("faults"):
            item.add_marker(skip)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Printed, so that a failure can be repeated with CXR_CACHE_FAULTS_SEED."""
    print(f"\n{request.node.name}: CXR_CACHE_FAULTS_SEED={SEED}")
    return SEED


@pytest.fixture
def fast_path(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A folder in memory where there is one: what is tested is the order of calls, not a disk."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    import tempfile

    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)
