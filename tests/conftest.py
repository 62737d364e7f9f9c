"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cxr_cache.datasets.cohort import Cohort
    from cxr_cache.encoders.encoder import Encoder

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real radiographs and CSVs beside the checkout, where there is one."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data (../shared/data) is not on this machine")
    return SHARED_DATA


# -- what extractions are tried on; imported when a test asks, for torch takes seconds ---


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """A tiny one of random weights; what a test patches is put back by `monkeypatch`."""
    import torch

    from cxr_cache.encoders.loading import load_encoder

    torch.set_num_threads(1)
    return load_encoder("random:test_vit", precision="fp32")


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """A folder with both tables and about fifteen images, which no test changes."""
    from cxr_cache.datasets.phantoms.dataset import write_phantoms

    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, n_studies=8, image_size_px=64, seed=3)
    return folder


@pytest.fixture
def images(phantoms, tmp_path) -> Path:
    """A copy of the images that a test may spoil."""
    return shutil.copytree(phantoms / "images", tmp_path / "images")


@pytest.fixture(scope="session")
def cohort(phantoms) -> Cohort:
    from cxr_cache.datasets.readers import load_cohort

    return load_cohort(phantoms)
