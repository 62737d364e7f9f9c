"""What pip would install holds every file, and its command works away from the source tree."""

from __future__ import annotations

import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import cxr_cache
from scripts.wheel_test import build, find_missing, make_environment, use

pytest.importorskip("build")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    return build(tmp_path_factory.mktemp("dist"))


@pytest.mark.slow
def test_wheel_and_source_distribution_hold_every_file_of_the_package(built):
    assert find_missing(*built) == []


@pytest.mark.slow
def test_the_metadata_says_what_a_page_of_pypi_shows(built):
    with zipfile.ZipFile(built[0]) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_bytes(archive.read(name))
    assert metadata["Version"] == cxr_cache.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Not for clinical use" in metadata.get_payload()


@pytest.mark.slow
def test_the_command_and_the_demo_run_from_the_wheel(built, tmp_path):
    """In an environment that borrows its other packages; `make wheel-test` installs them all."""
    programs = make_environment(tmp_path / "venv", built[0], borrows=True)
    assert use(programs, tmp_path, demo=True) == f"cxr-cache, version {cxr_cache.__version__}"
