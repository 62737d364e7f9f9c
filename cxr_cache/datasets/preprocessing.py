"""How pixels of an image become the input of an encoder: resized, cropped and normalised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from PIL import Image

from cxr_cache.datasets.raster.shrink import shrink
from cxr_cache.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


DECODE_RULE: Final = 1
"""Number of the rule by which files become pixels; one that changes a pixel gets the next."""
DECODE_RULES: Final = {
    1: "Grey: 8-bit values are used as stored and fill all three channels; 1-bit is 0 and 255. "
    "16-bit grey is scaled linearly in float32, 65535 to 255, or 2**bits_stored - 1 to 255 where "
    "the data set states its bits; larger values are an error, none is clipped; rounded to 8 bits "
    "after resizing. 9- to 15-bit JPEG 2000 and 12-bit TIFF state their own bits. "
    "DICOM: modality LUT or rescale, first VOI LUT or window, inversion of MONOCHROME1, each as "
    "pydicom has it, scaled over the range that the header states; padding is black. "
    "Colour: palette, CMYK and YCbCr become RGB by Pillow; colour profiles and gamma are not "
    "applied. Alpha and transparent colours are composited over black. "
    "EXIF orientation is applied, then the image is resized by Pillow (antialiased, unless "
    "antialias is false), then cropped."
}
"""The rules in words, for people; only their numbers are compared."""


def number_decode_rule(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Give a stored identity of an encoder the number of its decode rule.

    Version 0.1.0 stored the rule in words, which begin with that number.
    """
    preprocessing: Any = encoder.get("preprocessing")
    rule = preprocessing.get("decode_rule") if isinstance(preprocessing, Mapping) else None
    if not isinstance(rule, str) or not (found := re.match(r"rule (\d+)\.", rule)):
        return dict(encoder)
    return {**encoder, "preprocessing": {**preprocessing, "decode_rule": int(found[1])}}


_LATER_FIELDS: Final = {"resize_px": None, "crop_rounding": "nearest", "antialias": True}
"""Fields that version 0.1.0 did not have, with what they were then."""


_RESAMPLING = {
    name: Image.Resampling[name.upper()]
    for name in ("bicubic", "bilinear", "lanczos", "box", "hamming")
}
"""By their names in Pillow. Not nearest: where a point lies between two pixels, Pillow and torch
choose different ones."""


@dataclass(frozen=True)
class Preprocessing:
    """How a file becomes the encoder's input; part of the encoder's identity.

    ``resize`` is ``"squash"`` (to a square, aspect ratio given up) or ``"crop"`` (shortest edge
    to size, then the centre; open_clip's ``"shortest"``) or ``"pad"`` (longest edge to size, black
    on either side; open_clip's ``"longest"``). ``bits_stored`` concerns 16-bit grey
    files only: the bits that the data set says are used, None for the full 16.

    ``resize_px`` is the size before the centre is cut out, where it is larger: DINOv2 resizes to
    256 and cuts out 224. ``crop_rounding`` says where the cut begins if the margin is odd:
    open_clip rounds half a pixel to the nearest even number, transformers rounds it ``"down"``.
    Without ``antialias`` a pixel is interpolated between the four nearest ones of the image,
    however much smaller that becomes: TensorFlow's ``tf.image.resize``.
    """

    image_size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize: Literal["squash", "crop", "pad"]
    bits_stored: int | None = None
    resize_px: int | None = None
    crop_rounding: Literal["nearest", "down"] = "nearest"
    antialias: bool = True

    def __post_init__(self) -> None:
        if self.image_size_px < 1:
            raise ConfigError(f"image_size_px is {self.image_size_px}; it must be at least 1.")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ConfigError(f"mean {self.mean} and std {self.std} must hold 3 numbers each.")
        if not np.isfinite([*self.mean, *self.std]).all() or min(self.std) <= 0:
            raise ConfigError(
                f"mean {self.mean} and std {self.std} must be finite, and std positive."
            )
        if self.interpolation not in _RESAMPLING:
            raise ConfigError(
                f"interpolation is '{self.interpolation}'; choose from {', '.join(_RESAMPLING)}."
            )
        if self.resize not in ("squash", "crop", "pad"):
            raise ConfigError(f"resize is '{self.resize}'; choose from squash, crop, pad.")
        if self.bits_stored is not None and not 8 <= self.bits_stored <= 16:
            raise ConfigError(f"bits_stored is {self.bits_stored}; it must lie between 8 and 16.")
        if self.resize_px is not None and self.resize_px < self.image_size_px:
            raise ConfigError(
                f"Images are resized to {self.resize_px} pixels, from which no "
                f"{self.image_size_px} can be cut out."
            )
        if self.crop_rounding not in ("nearest", "down"):
            raise ConfigError(
                f"crop_rounding is '{self.crop_rounding}'; choose from nearest, down."
            )
        if not self.antialias and self.interpolation != "bilinear":
            raise ConfigError(
                f"Images are resized without antialias by bilinear interpolation only, and "
                f"interpolation is '{self.interpolation}'. Leave out --no-antialias."
            )

    def scaled_to(self, size_px: int) -> Preprocessing:
        """Give the same rule for pictures of another size, which show the same part of an image."""
        margin = None if self.resize_px is None else self.resize_px / self.image_size_px
        return replace(
            self,
            image_size_px=size_px,
            resize_px=None if margin is None else round(size_px * margin),
        )

    @property
    def share_seen(self) -> float:
        """Share of the resized image's side that is left after the cut, in (0, 1]."""
        return self.image_size_px / (self.resize_px or self.image_size_px)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the decode rule, as JSON has them: lists, not tuples.

        Fields that version 0.1.0 did not have are left out where they change nothing.
        """
        values = {
            name: value
            for name, value in asdict(self).items()
            if name not in _LATER_FIELDS or value != _LATER_FIELDS[name]
        }
        return values | {
            "mean": list(self.mean),
            "std": list(self.std),
            "decode_rule": DECODE_RULE,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of :meth:`to_dict`.

        Raises
        ------
        ConfigError
            A key is missing or unknown, a value is out of range, or the decode rule is another
            one than this version of the program follows.
        """
        expected = {field.name for field in fields(cls)} | {"decode_rule"}
        if set(values) | set(_LATER_FIELDS) != expected:
            raise ConfigError(
                f"A preprocessing holds the keys {sorted(expected)}, not {sorted(values)}."
            )
        rule = number_decode_rule({"preprocessing": values})["preprocessing"]["decode_rule"]
        if rule != DECODE_RULE:
            raise ConfigError(
                f"The images were decoded by another rule ({rule!r}) than this version of "
                f"cxr-cache follows ({DECODE_RULE}). Use the version that wrote them, or extract "
                "again."
            )
        arguments = {key: value for key, value in values.items() if key != "decode_rule"}
        return cls(**(arguments | {"mean": tuple(values["mean"]), "std": tuple(values["std"])}))


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Scale pixels to 0..1, subtract the mean and divide by the standard deviation.

    Parameters
    ----------
    pixels
        uint8, shape ``(B, 3, S, S)``, on any device.
    preprocessing
        Holds the mean and the standard deviation of each channel, on the scale 0..1.

    Returns
    -------
    Tensor
        float32, same shape and device: what torchvision's ToTensor and Normalize give.
    """
    assert not pixels.is_floating_point(), "float pixels would be changed in place"
    scaled = pixels.float()
    mean = scaled.new_tensor(preprocessing.mean).view(3, 1, 1)
    std = scaled.new_tensor(preprocessing.std).view(3, 1, 1)
    return scaled.div_(255).sub_(mean).div_(std)


def _resized_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height before the crop; the longer edge is cut to whole pixels as torchvision's."""
    target = preprocessing.resize_px or preprocessing.image_size_px
    if preprocessing.resize == "squash":
        return target, target
    width, height = size
    if preprocessing.resize == "pad":  # an edge is at least one pixel, even of a line
        ratio = max(size) / target
        return max(1, round(width / ratio)), max(1, round(height / ratio))
    longest = int(target * max(size) / min(size))
    return (target, longest) if width <= height else (longest, target)


def _resize(picture: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize, then cut out the centre; to the pixel what the encoder's own transform does.

    What lies beyond the image is black.
    """
    target = preprocessing.image_size_px
    width, height = _resized_size(picture.size, preprocessing)
    method = _RESAMPLING[preprocessing.interpolation]
    if preprocessing.antialias:
        resized = shrink(picture, (width, height), method)
    else:  # a transform looks at the pixels around one point
        scales = (picture.width / width, 0, 0, 0, picture.height / height, 0)
        resized = picture.transform((width, height), Image.Transform.AFFINE, scales, method)
    is_nearest = preprocessing.crop_rounding == "nearest" and preprocessing.resize != "pad"
    rounded = round if is_nearest else int
    left, top = rounded((width - target) / 2), rounded((height - target) / 2)
    return resized.crop((left, top, left + target, top + target))
