"""Random changes to the pixels of training images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cxr_cache.config import Augmentation
from cxr_cache.datasets.preprocessing import Preprocessing


def enlarge_for_crops(preprocessing: Preprocessing, augmentation: Augmentation) -> Preprocessing:
    """Return the preprocessing for images that will be cropped.

    It decodes them so large that no random crop has to be enlarged.
    """
    if augmentation.crop_scale is None:
        return preprocessing
    size_px = math.ceil(preprocessing.image_size_px / math.sqrt(augmentation.crop_scale))
    return preprocessing.scaled_to(size_px)


def augment(pixels: Tensor, augmentation: Augmentation, size_px: int, seeds: Tensor) -> Tensor:
    """Change every image of a batch at random by turning, cropping, brightness and contrast.

    Parameters
    ----------
    pixels
        uint8, ``(B, 3, S', S')``, decoded as :func:`enlarge_for_crops` says.
    augmentation
        Which changes to make, and how large.
    size_px
        Side S of the images that the encoder takes.
    seeds
        One seed per image, ``(B,)``. Equal seeds give equal changes, whatever else is in the
        batch. The global random state stays as it was.

    Returns
    -------
    Tensor
        uint8, ``(B, 3, S, S)``.
    """
    # It imports torch's compiler, which takes longer than all else that a training imports.
    from torchvision.transforms import v2

    steps: list[torch.nn.Module] = []
    if augmentation.rotation_deg:
        bilinear = v2.InterpolationMode.BILINEAR
        steps.append(v2.RandomRotation(augmentation.rotation_deg, interpolation=bilinear))
    if augmentation.crop_scale is not None:
        scale = (augmentation.crop_scale, 1.0)
        bicubic = v2.InterpolationMode.BICUBIC
        steps.append(v2.RandomResizedCrop(size_px, scale=scale, interpolation=bicubic))
    if augmentation.brightness or augmentation.contrast:
        steps.append(v2.ColorJitter(augmentation.brightness, augmentation.contrast))
    if not steps:
        return pixels
    change = v2.Compose(steps)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        changed = []
        for image, seed in zip(pixels, seeds.tolist(), strict=True):
            torch.default_generator.manual_seed(seed)
            changed.append(change(image))
        return torch.stack(changed)
