"""Random changes to pixels: seeded, within their bounds, and none unasked."""

from __future__ import annotations

import pytest
import torch

from cxr_cache.config import Augmentation
from cxr_cache.datasets.preprocessing import Preprocessing
from cxr_cache.errors import ConfigError
from cxr_cache.store.augment import augment, enlarge_for_crops

SEEDS = torch.arange(4)
PREPROCESSING = Preprocessing(48, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", "squash")


@pytest.fixture
def pixels() -> torch.Tensor:
    """A bright square in the middle of a dark film, in every image."""
    images = torch.full((4, 3, 48, 48), 40, dtype=torch.uint8)
    images[..., 16:32, 16:32] = 200
    return images


def test_nothing_is_changed_unasked(pixels):
    assert augment(pixels, Augmentation(), 48, SEEDS) is pixels
    assert enlarge_for_crops(PREPROCESSING, Augmentation()) is PREPROCESSING


CHANGES = [
    Augmentation(crop_scale=0.5),
    Augmentation(rotation_deg=20),
    Augmentation(brightness=0.3),
    Augmentation(contrast=0.3),
]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_seed_decides_and_global_randomness_is_left_alone(pixels, changes):
    state = torch.get_rng_state()
    first, again, other = (augment(pixels, changes, 48, SEEDS + n) for n in (0, 0, 9))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1]), "every image changes in its own way"
    assert (first.shape, first.dtype) == (pixels.shape, torch.uint8)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(augment(pixels[2:], changes, 48, SEEDS[2:]), first[2:])


def test_a_crop_is_cut_from_an_image_that_is_large_enough(pixels):
    """The smallest crop still has as many pixels as the encoder takes: none is enlarged."""
    changes = Augmentation(crop_scale=0.25)
    assert enlarge_for_crops(PREPROCESSING, changes).image_size_px == 96
    large = torch.nn.functional.interpolate(pixels.float(), 96).to(torch.uint8)
    assert augment(large, changes, 48, SEEDS).shape == (4, 3, 48, 48)


def test_brightness_stays_within_its_factor(pixels):
    for seed in range(10):
        changed = augment(pixels, Augmentation(brightness=0.2), 48, SEEDS + 4 * seed).float()
        factors = changed.mean(dim=(1, 2, 3)) / pixels.float().mean(dim=(1, 2, 3))
        assert ((factors > 0.78) & (factors < 1.22)).all()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"crop_scale": 0.0}, r"crop_scale must lie in \(0, 1\]"),
        ({"crop_scale": 1.5}, r"crop_scale must lie in \(0, 1\]"),
        ({"rotation_deg": -1}, "rotation_deg must lie between 0 and 180"),
        ({"brightness": 1.0}, r"brightness must lie in \[0, 1\)"),
        ({"contrast": -0.1}, r"contrast must lie in \[0, 1\)"),
    ],
)
def test_options_out_of_range_are_named(option, message):
    with pytest.raises(ConfigError, match=message):
        Augmentation(**option)
