"""Every kind of file that is read, and every reason for which one is refused, as real files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin, features

from cxr_cache.datasets import images
from cxr_cache.datasets.images import (
    MAX_FILE_BYTES,
    MIN_EDGE_PX,
    decode_picture,
    find_missing,
    read_image,
    require_stated_bits,
)
from cxr_cache.datasets.preprocessing import (
    DECODE_RULE,
    Preprocessing,
    normalise,
    number_decode_rule,
)
from cxr_cache.errors import ConfigError, ImageError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SQUASH = Preprocessing(224, CLIP_MEAN, CLIP_STD, "bicubic", "squash")
CROP = replace(SQUASH, resize="crop")
SMALL = replace(SQUASH, image_size_px=32)

ORIENTATION = 0x0112


def noise(width: int, height: int, channels: int = 1, seed: int = 0) -> Image.Image:
    """Sharp edges and every grey level, so that interpolation has something to get wrong."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    """A slope along both axes, which survives lossy compression."""
    slope = np.add.outer(np.linspace(0, 127, height), np.linspace(0, 127, width))
    return Image.fromarray(slope.round().astype(np.uint8))


def ramp16(width: int = 64, height: int = 64, top: int = 65535) -> np.ndarray:
    """All of 0 .. `top`, line by line."""
    return np.linspace(0, top, width * height).round().astype(np.uint16).reshape(height, width)


def write_png(
    path: Path, *, size: tuple[int, int], depth: int, colour: int, rows: bytes = b""
) -> None:
    """A PNG that Pillow itself cannot write; `rows` come with their filter bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def open_clip_pixels(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """The pixels that open_clip's own evaluation transform arrives at, before normalisation."""
    transform = open_clip.image_transform(
        preprocessing.image_size_px,
        is_train=False,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        resize_mode={"squash": "squash", "crop": "shortest", "pad": "longest"}[
            preprocessing.resize
        ],
        interpolation=preprocessing.interpolation,
    )
    return (transform(image) * 255).round().to(torch.uint8).numpy()


def read(path: Path, preprocessing: Preprocessing = SMALL) -> np.ndarray:
    return read_image(path.parent, path.name, preprocessing).pixels


def mode_of(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def reason_or_none(path: Path) -> str | None:
    try:
        read(path)
    except ImageError as error:
        return str(error)
    return None


# --- equal to open_clip -----------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "size",
    [(300, 200), (200, 301), (224, 224), (225, 224), (223, 501), (50, 37), (16, 400), (700, 17)],
    ids=str,
)
def test_pixels_equal_open_clips_transform(tmp_path, size, channels, resize, interpolation):
    """Portrait, landscape, square, odd, smaller than the target, extremely narrow."""
    preprocessing = replace(SQUASH, resize=resize, interpolation=interpolation)
    image = noise(*size, channels=channels)
    image.save(tmp_path / "a.png")

    decoded = read_image(tmp_path, "a.png", preprocessing)

    assert decoded.pixels.shape == (3, 224, 224)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.flags.c_contiguous
    np.testing.assert_array_equal(decoded.pixels, open_clip_pixels(image, preprocessing))


@pytest.mark.parametrize("preprocessing", [SQUASH, CROP], ids=["squash", "crop"])
@pytest.mark.parametrize("size", [(1, 40), (40, 1), (3, 1000)], ids=str)
def test_resizing_equals_open_clips_even_one_pixel_wide(size, preprocessing):
    image = noise(*size)
    pixels = images._to_channels(images._resize(image, preprocessing))
    np.testing.assert_array_equal(pixels, open_clip_pixels(image, preprocessing))


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [(300, 190), (77, 101), (20, 25)])
def test_without_antialias_pixels_are_those_of_tf_image_resize(tmp_path, size, resize):
    """Which torch's own interpolation gives, too: half-pixel centres, four neighbours."""
    plain = Preprocessing(32, CLIP_MEAN, CLIP_STD, "bilinear", resize, antialias=False)
    picture = noise(*size)
    picture.save(tmp_path / "x.png")
    width, height = images._resized_size(size, plain)
    grey = torch.from_numpy(np.array(picture, dtype=np.float32))[None, None]
    theirs = torch.nn.functional.interpolate(grey, size=(height, width), mode="bilinear")[0, 0]
    canvas = Image.fromarray(theirs.numpy())
    rounded = int if resize == "pad" else round
    left, top = rounded((width - 32) / 2), rounded((height - 32) / 2)
    expected = np.asarray(canvas.crop((left, top, left + 32, top + 32)))
    assert np.abs(read(tmp_path / "x.png", plain)[0] - expected).max() <= 1
    assert (read(tmp_path / "x.png", replace(plain, antialias=True)) != expected).mean() > 0.5
    Image.fromarray(np.asarray(picture).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.abs(read(tmp_path / "deep.png", plain)[0] - expected).max() <= 1


def test_antialias_is_recorded_where_it_is_off_and_goes_with_bilinear():
    plain = replace(SQUASH, interpolation="bilinear", antialias=False)
    assert Preprocessing.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain
    assert "antialias" not in SQUASH.to_dict()  # stores of earlier versions do not have it
    with pytest.raises(ConfigError, match=r"bilinear interpolation only.*'bicubic'.*--no-anti"):
        replace(SQUASH, antialias=False)


def test_a_large_jpeg_is_decoded_at_full_size(tmp_path):
    """Pillow's draft mode would be quicker, and change pixels."""
    smooth(1300, 1100).save(tmp_path / "a.jpg", quality=60)
    with Image.open(tmp_path / "a.jpg") as image:
        expected = open_clip_pixels(image, CROP)
    np.testing.assert_array_equal(read(tmp_path / "a.jpg", CROP), expected)


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_grey_resized_once_equals_grey_resized_as_rgb(tmp_path, resize):
    """The short cut for grey, half the work, is bit-identical."""
    grey = noise(310, 270)
    grey.save(tmp_path / "grey.png")
    grey.convert("RGB").save(tmp_path / "rgb.png")
    preprocessing = replace(SQUASH, resize=resize)
    np.testing.assert_array_equal(
        read(tmp_path / "grey.png", preprocessing), read(tmp_path / "rgb.png", preprocessing)
    )


def test_normalise_equals_open_clips_transform(tmp_path):
    image = noise(240, 260, channels=3)
    image.save(tmp_path / "a.png")
    transform = open_clip.image_transform(
        224, is_train=False, mean=CLIP_MEAN, std=CLIP_STD, resize_mode="squash"
    )
    pixels = torch.from_numpy(read(tmp_path / "a.png", SQUASH))[None]
    before = pixels.clone()

    normalised = normalise(pixels, SQUASH)

    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised[0], transform(image), rtol=0, atol=1e-6)
    assert torch.equal(pixels, before)


def test_real_radiographs_equal_open_clips_transform(shared_data):
    nih = sorted((shared_data / "nih_1024" / "images").glob("*.png"))
    indiana = sorted((shared_data / "indiana_256" / "images").iterdir())
    for path in [*nih[:: len(nih) // 4], *indiana[:: len(indiana) // 8]]:
        with Image.open(path) as image:
            if image.mode not in ("L", "RGB"):
                continue
            for preprocessing in (SQUASH, CROP):
                expected = open_clip_pixels(image, preprocessing)
                np.testing.assert_array_equal(read(path, preprocessing), expected, str(path))


def test_real_radiographs_with_an_alpha_channel_can_be_read(shared_data):
    """Some copies of the NIH images are RGBA, in which the alpha says nothing."""
    paths = sorted((shared_data / "nih_1024" / "images").glob("*.png"))
    with_alpha = [path for path in paths if mode_of(path) == "RGBA"]
    for path in [*with_alpha, *paths[::16]]:
        assert np.ptp(read(path)) > 100, path.name


# --- formats and modes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "name", "options"),
    [
        ("L", "a.png", {}),
        ("L", "a.tif", {}),
        ("L", "a.tif", {"compression": "tiff_lzw"}),
        ("L", "a.bmp", {}),
        ("LA", "a.png", {}),
        ("P", "a.png", {}),
        ("P", "a.bmp", {}),
        ("RGB", "a.png", {}),
        ("RGB", "a.bmp", {}),
        ("RGB", "a.tif", {}),
        ("RGBA", "a.png", {}),
        ("RGBA", "a.tif", {}),
    ],
)
def test_lossless_files_of_one_picture_give_the_same_pixels(tmp_path, mode, name, options):
    grey = noise(40, 50)
    grey.convert(mode).save(tmp_path / name, **options)
    np.testing.assert_array_equal(
        read(tmp_path / name, CROP), open_clip_pixels(grey.convert("RGB"), CROP)
    )


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
def test_one_bit_images_become_black_and_white(tmp_path, name):
    """Interpolated as grey; open_clip would take the nearest pixel."""
    bits = noise(40, 50).point(lambda value: 255 * (value > 127), "1")
    bits.save(tmp_path / name)
    expected = open_clip_pixels(bits.convert("L"), SQUASH)
    np.testing.assert_array_equal(read(tmp_path / name, SQUASH), expected)
    assert expected.max() == 255


@pytest.mark.parametrize(
    ("mode", "name"),
    [("L", "a.jpg"), ("RGB", "a.jpg"), ("CMYK", "a.jpg"), ("YCbCr", "a.jpg"), ("CMYK", "a.tif")],
)
def test_colour_models_become_rgb(tmp_path, mode, name):
    colours = Image.merge("RGB", [smooth(90, 70), smooth(90, 70).rotate(180), smooth(90, 70)])
    colours.convert(mode).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.mode == ("RGB" if mode == "YCbCr" else mode)
        expected = open_clip_pixels(image.convert("RGB"), SQUASH)
    np.testing.assert_array_equal(read(tmp_path / name, SQUASH), expected)


def test_ycbcr_tiff_becomes_rgb(tmp_path):
    colours = noise(40, 40, channels=3)
    colours.convert("YCbCr").save(tmp_path / "a.tif")
    expected = open_clip_pixels(colours.convert("YCbCr").convert("RGB"), SQUASH)
    np.testing.assert_array_equal(read(tmp_path / "a.tif", SQUASH), expected)


def test_progressive_jpeg_is_read(tmp_path):
    smooth(90, 70).save(tmp_path / "a.jpg", progressive=True)
    smooth(90, 70).save(tmp_path / "b.jpg")
    np.testing.assert_array_equal(read(tmp_path / "a.jpg"), read(tmp_path / "b.jpg"))


@pytest.mark.parametrize("preprocessing", [SQUASH, CROP], ids=["squash", "crop"])
def test_opaque_alpha_changes_nothing(tmp_path, preprocessing):
    """So that RGBA copies of grey radiographs still equal open_clip's transform bit for bit."""
    image = noise(300, 260, channels=3).convert("RGBA")
    image.save(tmp_path / "a.png")
    expected = open_clip_pixels(image, preprocessing)
    np.testing.assert_array_equal(read(tmp_path / "a.png", preprocessing), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_over_black(tmp_path, mode):
    grey, alpha = noise(32, 32), noise(32, 32, seed=1)
    image = grey.convert(mode)
    image.putalpha(alpha)
    image.save(tmp_path / "a.png")

    pixels = read(tmp_path / "a.png")

    expected = np.asarray(grey, dtype=float) * np.asarray(alpha) / 255
    np.testing.assert_allclose(pixels, np.stack([expected] * 3), atol=0.51)


@pytest.mark.parametrize(
    ("mode", "transparency"),
    [("L", 7), ("P", 7), ("P", bytes([255] * 7 + [0] + [255] * 248))],
    ids=["grey", "one of the palette", "alpha per palette entry"],
)
def test_transparent_colours_become_black(tmp_path, mode, transparency):
    grey = noise(32, 32)
    image = grey.copy()
    if mode == "P":
        image.putpalette([value for level in range(256) for value in (level, level, level)])
    image.save(tmp_path / "a.png", transparency=transparency)

    values = np.asarray(grey)
    expected = np.where(values == 7, 0, values)
    assert (values == 7).any()
    np.testing.assert_array_equal(read(tmp_path / "a.png"), np.stack([expected] * 3))


def test_the_content_decides_not_the_name(tmp_path):
    smooth(60, 60).save(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.jpg").read_bytes())
    np.testing.assert_array_equal(read(tmp_path / "a.jpg"), read(tmp_path / "b.png"))


def test_the_hash_is_of_the_files_bytes(tmp_path):
    noise(32, 32).save(tmp_path / "a.png")
    digest = hashlib.sha256((tmp_path / "a.png").read_bytes()).digest()
    assert read_image(tmp_path, "a.png", SMALL).sha256 == digest


def test_images_in_subfolders_and_linked_folders_are_read(tmp_path):
    (tmp_path / "real" / "p1" / "s1").mkdir(parents=True)
    noise(32, 32).save(tmp_path / "real" / "p1" / "s1" / "Brust röntgen.png")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "alias.png").symlink_to("p1/s1/Brust röntgen.png")
    for image_id in ("p1/s1/Brust röntgen.png", "alias.png"):
        assert read_image(tmp_path / "linked", image_id, SMALL).pixels.shape == (3, 32, 32)


# --- 16-bit grey ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_16_bit_ramp_keeps_its_grey_levels(tmp_path, name):
    """Pillow's own conversion to 8 bits leaves two of them."""
    Image.fromarray(ramp16()).save(tmp_path / name)
    pixels = read(tmp_path / name, replace(SQUASH, image_size_px=64))
    assert len(np.unique(pixels)) == 256
    np.testing.assert_array_equal(pixels[0], np.rint(ramp16() / 257))
    np.testing.assert_array_equal(pixels[0], pixels[2])


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_16_bit_grey_looks_like_the_8_bit_picture(tmp_path, resize):
    """Within one grey level, since only the 8-bit picture is rounded between the two passes."""
    grey = smooth(130, 300)
    grey.save(tmp_path / "8.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "16.png")
    preprocessing = replace(SQUASH, resize=resize)
    narrow = read(tmp_path / "8.png", preprocessing).astype(int)
    wide = read(tmp_path / "16.png", preprocessing).astype(int)
    assert abs(narrow - wide).max() <= 1


def test_overshoot_of_16_bit_grey_ends_at_black_and_white(tmp_path):
    """Bicubic interpolation leaves the range beside a sharp edge; the values must not wrap."""
    step = np.repeat(np.array([[0, 65535]], np.uint16), 16, axis=1).repeat(32, axis=0)
    Image.fromarray(step).save(tmp_path / "a.png")
    row = read(tmp_path / "a.png", SQUASH)[0, 0].astype(int)
    assert set(row[:100]) == {0}
    assert set(row[-100:]) == {255}
    assert (np.diff(row) >= 0).all()


def test_the_stated_bit_depth_sets_the_scale(tmp_path):
    Image.fromarray(ramp16(top=4095)).save(tmp_path / "a.png")
    full = read(tmp_path / "a.png", replace(SMALL, image_size_px=64))
    stated = read(tmp_path / "a.png", replace(SMALL, image_size_px=64, bits_stored=12))
    assert full.max() == 16
    assert len(np.unique(stated)) == 256
    np.testing.assert_array_equal(stated[0], np.rint(ramp16(top=4095) * (255 / 4095)))


def test_a_value_above_the_stated_range_is_an_error_not_clipped(tmp_path):
    Image.fromarray(ramp16(top=4100)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"value 4100, outside 0 to 4095.* 12 bits"):
        read(tmp_path / "a.png", replace(SMALL, bits_stored=12))


def test_a_negative_value_is_an_error(tmp_path):
    Image.fromarray(ramp16().astype(np.int32) - 5).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="value -5, outside 0 to 65535"):
        read(tmp_path / "a.tif")


def test_32_bit_integers_in_the_16_bit_range_are_read(tmp_path):
    Image.fromarray(ramp16().astype(np.int32)).save(tmp_path / "a.tif")
    Image.fromarray(ramp16()).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), read(tmp_path / "a.png"))


def test_big_endian_16_bit_tiff_is_read(tmp_path):
    Image.frombytes("I;16B", (64, 64), ramp16().astype(">u2").tobytes()).save(tmp_path / "a.tif")
    Image.fromarray(ramp16()).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), read(tmp_path / "a.png"))


def test_a_transparent_16_bit_grey_becomes_black(tmp_path):
    values = ramp16(32, 32)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=int(values[-1, -1]))
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["transparency"] == 65535
    assert read(tmp_path / "a.png")[0, -1, -1] == 0


def pack_12_bits(values: np.ndarray) -> bytes:
    """Two values in three bytes, the higher bits first; each row ends with a whole byte."""
    rows = np.pad(values, ((0, 0), (0, values.shape[1] % 2))).astype(np.uint32)
    one, two = rows[:, ::2], rows[:, 1::2]
    packed = np.stack([one >> 4, (one & 15) << 4 | two >> 8, two & 255], axis=-1)
    n_bytes = -(-values.shape[1] * 12 // 8)
    return packed.reshape(len(values), -1)[:, :n_bytes].astype(np.uint8).tobytes()


def tiff_of_12_bits(values: np.ndarray, compression: int = 1) -> bytes:
    """A little-endian TIFF, which Pillow itself cannot write; 8 is zip."""
    strip = pack_12_bits(values)
    strip = zlib.compress(strip) if compression == 8 else strip
    height, width = values.shape
    entries = [(256, width), (257, height), (258, 12), (259, compression), (262, 1), (273, 8)]
    entries += [(277, 1), (278, height), (279, len(strip))]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    start = b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip
    return start + struct.pack("<H", len(entries)) + directory + bytes(4)


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("width", [64, 63])
def test_a_12_bit_tiff_fills_its_own_range(tmp_path, width, compression):
    values = ramp16(width, 64, 4095)
    (tmp_path / "a.tif").write_bytes(tiff_of_12_bits(values, compression))
    np.testing.assert_array_equal(
        decode_picture((tmp_path / "a.tif").read_bytes()), np.rint(values * (255 / 4095))
    )


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_a_jpeg_2000_of_more_than_8_bits_fills_its_own_range(bits):
    utils = pytest.importorskip("openjpeg.utils")
    values = ramp16(top=2**bits - 1)
    data = utils.encode_array(values, bits_stored=bits, photometric_interpretation=2)
    np.testing.assert_array_equal(
        decode_picture(bytes(data)), np.rint(values * (255 / (2**bits - 1)))
    )


@pytest.mark.skipif(not features.check("webp"), reason="Pillow without WebP")
@pytest.mark.parametrize("channels", [1, 3])
def test_a_lossless_webp_gives_the_pixels_of_the_png(tmp_path, channels):
    image = noise(70, 50, channels)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.webp", lossless=True)
    np.testing.assert_array_equal(read(tmp_path / "a.webp"), read(tmp_path / "a.png"))


@pytest.mark.skipif(not features.check("jpg_2000"), reason="Pillow without JPEG 2000")
@pytest.mark.parametrize("channels", [1, 3])
def test_a_lossless_jpeg_2000_gives_the_pixels_of_the_png(tmp_path, channels):
    image = noise(70, 50, channels)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.jp2", irreversible=False)
    np.testing.assert_array_equal(read(tmp_path / "a.jp2"), read(tmp_path / "a.png"))


@pytest.mark.parametrize("cut", [1, 30, 1000, 2500])
@pytest.mark.parametrize("name", ["a.webp", "a.jp2"])
def test_a_cut_webp_or_jpeg_2000_is_refused(tmp_path, name, cut):
    noise(64, 64).save(tmp_path / name, lossless=True)
    data = (tmp_path / name).read_bytes()
    assert len(data) > 2600
    (tmp_path / name).write_bytes(data[:-cut])
    with pytest.raises(ImageError):
        read(tmp_path / name)


def test_an_animation_is_refused(tmp_path):
    frames = [noise(32, 32, seed=seed) for seed in range(3)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="holds 3 frames"):
        read(tmp_path / "a.webp")


# -- 16-bit files that hold fewer bits ---------------------------------------------------------


def write_many(folder: Path, top: int, n: int = 30) -> list[str]:
    """Noise of 0 .. `top` in 16-bit files, as tools that convert DICOM leave it."""
    rng = np.random.default_rng(0)
    for i in range(n):
        values = rng.integers(0, top, (24, 24), endpoint=True).astype(np.uint16)
        Image.fromarray(values).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(n)]


@pytest.mark.parametrize(
    ("top", "bits"), [(255, 8), (1023, 10), (4095, 12), (2500, 12), (9999, 14)]
)
def test_16_bit_files_of_fewer_bits_are_refused_with_the_remedy(tmp_path, top, bits):
    names = write_many(tmp_path, top)
    with pytest.raises(
        ConfigError,
        match=rf"they seem to be {bits}-bit images.* nearly black\. Give "
        rf"--bits-stored {bits} to scale.*, or --bits-stored 16 if they are meant",
    ):
        require_stated_bits(tmp_path, names, SMALL)
    for stated in (bits, 16):
        require_stated_bits(tmp_path, names, replace(SMALL, bits_stored=stated))


def test_one_bright_image_shows_that_all_bits_are_in_use(tmp_path):
    names = write_many(tmp_path, 4095)
    Image.fromarray(ramp16()).save(tmp_path / "7.png")
    require_stated_bits(tmp_path, names, SMALL)


def test_burnt_in_markers_do_not_hide_that_the_rest_is_dark(tmp_path):
    values = ramp16(top=4095)
    values[:2, :5] = 65535
    Image.fromarray(values).save(tmp_path / "a.png")
    with pytest.raises(
        ConfigError, match=r"No value above 4095 .* markers aside.*--bits-stored 12"
    ):
        require_stated_bits(tmp_path, ["a.png"], SMALL)


def test_8_bit_and_unusable_files_say_nothing_about_the_bits_of_others(tmp_path):
    names = write_many(tmp_path, 4095, n=3)
    noise(24, 24).save(tmp_path / "a.png")
    noise(24, 24).save(tmp_path / "b.jpg")
    (tmp_path / "c.png").write_bytes((tmp_path / "0.png").read_bytes()[:-20])
    os.mkfifo(tmp_path / "pipe.png")
    others = ["a.png", "b.jpg", "c.png", "pipe.png", "absent.png", "../out.png"]
    require_stated_bits(tmp_path, others, SMALL)
    with pytest.raises(
        ConfigError, match=r"No value above 409\d occurs in a sample of 3 16-bit images"
    ):
        require_stated_bits(tmp_path, [*others, *names], SMALL)


def test_dicom_that_states_16_bits_and_uses_12_is_refused_too(tmp_path):
    pytest.importorskip("pydicom")
    from tests.datasets.dicoms import dicom

    values = ramp16(top=4095)
    (tmp_path / "a.dcm").write_bytes(dicom(values))
    with pytest.raises(ConfigError, match="--bits-stored 12"):
        require_stated_bits(tmp_path, ["a.dcm"], SMALL)
    for fields in ({"BitsStored": 12}, {"WindowCenter": 2000, "WindowWidth": 4000}):
        (tmp_path / "a.dcm").write_bytes(dicom(values, **fields))
        require_stated_bits(tmp_path, ["a.dcm"], SMALL)


def test_bits_stored_leaves_8_bit_files_alone(tmp_path):
    noise(32, 32).save(tmp_path / "a.png")
    stated = read(tmp_path / "a.png", replace(SMALL, bits_stored=12))
    np.testing.assert_array_equal(stated, read(tmp_path / "a.png"))


# --- orientation ------------------------------------------------------------------------------


# From the stored array to the upright one, as the EXIF standard defines the orientations.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("name", ["8.png", "16.png", "a.jpg", "raw.tif", "lzw.tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(ramp16(40, 60)) if name == "16.png" else smooth(40, 60)
    options = {"compression": "tiff_lzw"} if name == "lzw.tif" else {}
    stored.save(tmp_path / f"turned_{name}", exif=exif, **options)

    values = np.asarray(stored)
    if name == "a.jpg":
        stored.save(tmp_path / "plain.jpg")
        values = np.asarray(Image.open(tmp_path / "plain.jpg"))
    Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](values))).save(tmp_path / "up.png")

    preprocessing = replace(CROP, image_size_px=40)
    np.testing.assert_array_equal(
        read(tmp_path / f"turned_{name}", preprocessing), read(tmp_path / "up.png", preprocessing)
    )


def test_an_unknown_orientation_is_upright(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 99
    noise(32, 32).save(tmp_path / "a.png", exif=exif)
    noise(32, 32).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png"), read(tmp_path / "b.png"))


# --- files that cannot be used ----------------------------------------------------------------


def test_a_missing_file(tmp_path):
    with pytest.raises(ImageError, match=r"^the file does not exist$"):
        read_image(tmp_path, "a.png", SMALL)
    (tmp_path / "b.png").touch()
    with pytest.raises(ImageError, match=r"^the file does not exist$"):
        read_image(tmp_path, "b.png/a.png", SMALL)


@pytest.mark.parametrize("image_id", ["sub", "", "."])
def test_a_folder(tmp_path, image_id):
    (tmp_path / "sub").mkdir()
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path, image_id, SMALL)


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match="pipe, socket or device"):
        read(tmp_path / "a.png")


def test_a_socket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # socket paths are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("a.png")
        with pytest.raises(ImageError, match="pipe, socket or device"):
            read(tmp_path / "a.png")


def test_a_device():
    with pytest.raises(ImageError, match="pipe, socket or device"):
        read_image("/dev", "zero", SMALL)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EACCES, "permission to read the file is denied"),
        (errno.EIO, "the file cannot be read: "),
    ],
)
def test_what_the_system_refuses(tmp_path, monkeypatch, number, reason):
    """Raised by hand: root, who may run the tests, is allowed everything."""
    noise(32, 32).save(tmp_path / "a.png")

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(images.os, "open", refuse)
    with pytest.raises(ImageError, match=reason):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("image_id", ["../out.png", "sub/../../out.png", "link.png", "dir/out.png"])
def test_a_path_that_leaves_the_folder(tmp_path, image_id):
    noise(32, 32).save(tmp_path / "out.png")
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    (folder / "dir").symlink_to(tmp_path)
    with pytest.raises(ImageError, match="leads out of the image folder"):
        read_image(folder, image_id, SMALL)


def test_a_neighbouring_folder_with_the_same_beginning(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images2").mkdir()
    noise(32, 32).save(tmp_path / "images2" / "a.png")
    with pytest.raises(ImageError, match="leads out of the image folder"):
        read_image(tmp_path / "images", "../images2/a.png", SMALL)


def test_names_that_are_no_relative_paths(tmp_path):
    noise(32, 32).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="the path is absolute"):
        read_image(tmp_path, str(tmp_path / "a.png"), SMALL)
    for image_id in ("a.png\0.jpg", "\ud800.png"):
        with pytest.raises(ImageError, match="characters that no file name can hold"):
            read_image(tmp_path, image_id, SMALL)
    with pytest.raises(ImageError, match="cannot be read: File name too long"):
        read_image(tmp_path, "a" * 300 + ".png", SMALL)


def test_a_link_to_itself(tmp_path):
    (tmp_path / "a.png").symlink_to("a.png")
    with pytest.raises(ImageError, match="symbolic link that leads to itself"):
        read(tmp_path / "a.png")


def test_an_empty_file(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(ImageError, match=r"the file is empty \(0 bytes\)"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<!DOCTYPE html><html>login</html>", "a web page or other markup"),
        (b"\xef\xbb\xbf \n<?xml version='1.0'?>", "a web page or other markup"),
        (bytes(128) + b"DICM" + bytes(50), "a DICOM file"),
        (b"%PDF-1.7", "a PDF document"),
        (b"PK\x03\x04rest", "a zip archive"),
        (b"GIF89a" + bytes(50), "a GIF"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "a WebP image"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (bytes(4096), "begins with zeros"),
        (b"uid,image\n1,a\n", r"begins with 'uid,image\\n1,a\\n'"),
        (b"\x89PNG\r\n\x1a\n", "begins like a PNG, but its header is damaged"),
        (b"\xff\xd8\xff\xe0\x00", "begins like a JPEG, but its header is damaged"),
        (b"BM", "begins like a BMP, but its header is damaged"),
        (b"x", "begins with 'x'"),
    ],
)
def test_not_an_image(tmp_path, content, reason):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("cut", [1, 4, 12, 13, 100, 2000])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "progressive.jpg", "a.bmp", "16.png"])
def test_a_truncated_file(tmp_path, name, cut, monkeypatch):
    """Even a PNG that lacks only its closing chunk, and whatever other code told Pillow."""
    image = noise(64, 64)
    if name == "16.png":
        image = Image.fromarray(np.asarray(noise(64, 64)).astype(np.uint16) ** 2)
    image.save(tmp_path / name, **({"progressive": True} if "progressive" in name else {}))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-cut])
    for accept_truncated in (False, True):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", accept_truncated)
        with pytest.raises(ImageError, match=r"the file is (truncated|damaged)"):
            read(tmp_path / name)
        assert ImageFile.LOAD_TRUNCATED_IMAGES is accept_truncated


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_file_cut_in_the_middle_or_filled_up_with_zeros(tmp_path, name):
    noise(64, 64).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    half = len(content) // 2
    (tmp_path / name).write_bytes(content[:half])
    with pytest.raises(ImageError, match="the file is truncated: its end is missing"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(content[:half] + bytes(len(content) - half))
    with pytest.raises(ImageError, match=r"the file is (truncated|damaged)"):
        read(tmp_path / name)


def test_a_png_with_one_changed_byte(tmp_path):
    """Pillow on its own would decode some of these to other pixels without a word."""
    noise(64, 64).save(tmp_path / "a.png", compress_level=0)
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"the file is damaged: .*checksum"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "palette.png", "a.jpg", "a.bmp", "a.tif"])
def test_damage_ends_as_image_error_and_nothing_else(tmp_path, name):
    """Random damage to headers and contents, without a warning."""
    image = noise(24, 24)
    (image.convert("P") if "palette" in name else image).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(0)
    reasons = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(80):
            damaged = bytearray(content)
            reach = min(len(damaged), int(rng.choice([60, 2000])))
            for place in rng.integers(0, reach, rng.integers(1, 4)):
                damaged[place] = rng.integers(256)
            (tmp_path / name).write_bytes(damaged)
            reasons.append(reason_or_none(tmp_path / name))
    assert any(reasons)
    for reason in filter(None, reasons):
        assert re.fullmatch(r"[^\n]{10,250}[^.]", reason), reason


def test_too_many_pixels(tmp_path):
    """Known from the header: there is not one pixel in these files."""
    write_png(tmp_path / "a.png", size=(8001, 8000), depth=8, colour=0)
    with pytest.raises(
        ImageError, match=r"8001 x 8000 pixels \(64\.0 megapixels\); the limit is 64"
    ):
        read(tmp_path / "a.png")
    write_png(tmp_path / "b.png", size=(200_000, 100_000), depth=16, colour=0)
    with pytest.raises(ImageError, match=r"200000 x 100000 pixels \(20000\.0 megapixels\)"):
        read(tmp_path / "b.png")
    assert Image.MAX_IMAGE_PIXELS is not None


def test_the_pixel_limit_is_ours_not_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    noise(32, 32).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").shape == (3, 32, 32)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_too_narrow_to_crop(tmp_path):
    """Cropping it would first need 224 x 1,400,000 pixels."""
    write_png(tmp_path / "a.png", size=(16, 100_000), depth=8, colour=0)
    with pytest.raises(
        ImageError, match=r"16 x 100000 pixels, too narrow to crop: .* 224 x 1400000"
    ):
        read(tmp_path / "a.png", CROP)


def test_too_many_bytes(tmp_path):
    (tmp_path / "a.png").touch()
    os.truncate(tmp_path / "a.png", MAX_FILE_BYTES + 1024**2)  # a hole, no space taken
    with pytest.raises(ImageError, match=r"the file has 257\.0 MiB; the limit is 256 MiB"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(1, 1), (15, 200), (200, 15)], ids=str)
def test_too_small(tmp_path, size):
    noise(*size).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels; .* at least 16 on each"):
        read(tmp_path / "a.png")


def test_no_pixels_at_all(tmp_path):
    write_png(tmp_path / "a.png", size=(0, 0), depth=8, colour=0)
    with pytest.raises(ImageError):
        read(tmp_path / "a.png")


def test_the_smallest_size_is_read(tmp_path):
    noise(MIN_EDGE_PX, MIN_EDGE_PX).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").shape == (3, 32, 32)


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (64, 64), 0),
        Image.new("L", (64, 64), 255),
        Image.new("RGB", (64, 64), (10, 20, 30)),
        Image.new("RGBA", (64, 64), (200, 200, 200, 0)),
        Image.fromarray(np.full((64, 64), 3000, np.uint16)),
    ],
    ids=["black", "white", "one colour", "transparent", "16-bit"],
)
def test_a_blank_image(tmp_path, image):
    image.save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"one grey value everywhere at 32 x 32 .* blank"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_several_frames(tmp_path, name):
    noise(32, 32).save(
        tmp_path / name, save_all=True, append_images=[noise(32, 32, seed=s) for s in (1, 2)]
    )
    with pytest.raises(ImageError, match=r"the file holds 3 frames, .* is unknown"):
        read(tmp_path / name)


def test_several_pictures_in_one_jpeg(tmp_path):
    smooth(40, 40).save(
        tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[smooth(40, 40)]
    )
    with pytest.raises(ImageError, match="the file holds 2 frames"):
        read(tmp_path / "a.jpg")


def test_floats_have_no_stated_range(tmp_path):
    Image.fromarray(ramp16().astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="32-bit floats, which have no stated range"):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("colour", "channels"), [(2, 3), (4, 2), (6, 4)], ids=["RGB", "LA", "RGBA"]
)
def test_16_bit_colours_are_refused_not_halved(tmp_path, colour, channels):
    """Pillow reads their upper bytes only, so a 12-bit picture would come out black."""
    rows = b"".join(b"\0" + bytes(range(2 * channels)) * 32 for _ in range(32))
    write_png(tmp_path / "a.png", size=(32, 32), depth=16, colour=colour, rows=rows)
    with pytest.raises(ImageError, match="16 bits, of which only 8 could be read"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("image", "tag", "value", "reason"),
    [
        (Image.fromarray(ramp16()), 258, 12, "the TIFF has 12 bits per pixel"),
        (Image.fromarray(ramp16()), 262, 0, "stores white as 0 in 16 bits"),
    ],
)
def test_tiffs_that_pillow_would_misread(tmp_path, image, tag, value, reason):
    buffer = BytesIO()
    image.save(buffer, "TIFF")
    entry = struct.pack("<HHI", tag, 3, 1)  # one unsigned short, little-endian
    start = buffer.getvalue().index(entry) + len(entry)
    content = bytearray(buffer.getvalue())
    content[start : start + 2] = struct.pack("<H", value)
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        read(tmp_path / "a.tif")


def test_a_signed_tiff_is_refused(tmp_path):
    noise(32, 32).save(tmp_path / "a.tif", tiffinfo={339: 2})
    with pytest.raises(ImageError, match="signed 8-bit pixels"):
        read(tmp_path / "a.tif")


def test_a_colour_space_that_is_not_read(tmp_path):
    Image.frombytes("LAB", (32, 32), bytes(range(256)) * 12).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a kind that is not read .*LAB"):
        read(tmp_path / "a.tif")


def test_too_little_memory_is_a_reason(tmp_path, monkeypatch):
    noise(32, 32).save(tmp_path / "a.png")

    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", exhausted)
    with pytest.raises(ImageError, match="more memory than there is"):
        read(tmp_path / "a.png")


def test_pillow_stays_quiet(tmp_path, capfd):
    """A palette with transparency, a broken EXIF block and a malformed MPO make it warn."""
    noise(32, 32).convert("P").save(tmp_path / "a.png", transparency=bytes(range(256)))
    noise(32, 32).save(tmp_path / "b.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    noise(32, 32).save(tmp_path / "c.tif")
    (tmp_path / "c.tif").write_bytes((tmp_path / "c.tif").read_bytes()[:-500])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(tmp_path / "a.png")
        read(tmp_path / "b.jpg")
        with pytest.raises(ImageError):
            read(tmp_path / "c.tif")
    assert not caught
    assert capfd.readouterr() == ("", "")


def test_a_png_with_a_large_colour_profile_or_text_is_sound(tmp_path):
    """Scanners write profiles of several MiB; Pillow unpacks one, and calls the rest damage."""
    image = noise(48, 48)
    image.save(tmp_path / "plain.png")
    expected = read(tmp_path / "plain.png")
    image.save(tmp_path / "profile.png", icc_profile=bytes(5_000_000))
    for packed in (True, False):
        text = PngImagePlugin.PngInfo()
        text.add_text("note", "x" * 5_000_000, zip=packed)
        text.add_itxt("note", "x" * 5_000_000, zip=packed)
        image.save(tmp_path / f"text-{packed}.png", pnginfo=text)
    for name in ("profile", "text-True", "text-False"):
        np.testing.assert_array_equal(read(tmp_path / f"{name}.png"), expected)
    assert PngImagePlugin.MAX_TEXT_CHUNK < 5_000_000  # others in the process keep their limit


def test_a_png_whose_text_would_fill_the_memory_is_refused_for_that(tmp_path, monkeypatch):
    monkeypatch.setattr("cxr_cache.datasets.images.MAX_TEXT_BYTES", 2**20)
    noise(48, 48).save(tmp_path / "profile.png", icc_profile=bytes(2_000_000))
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * 2_000_000, zip=True)
    noise(48, 48).save(tmp_path / "text.png", pnginfo=text)
    for name in ("profile.png", "text.png"):
        with pytest.raises(ImageError, match="profile or texts take more than 1 MiB; save the"):
            read(tmp_path / name)


def test_a_single_file_may_be_a_link(tmp_path):
    """As in the caches of Hugging Face, DVC and git-annex; a table may not lead out by one."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "images").mkdir()
    noise(48, 48).save(tmp_path / "blobs" / "9f3a", "png")
    (tmp_path / "images" / "chest.png").symlink_to("../blobs/9f3a")

    named = read_image(None, str(tmp_path / "images" / "chest.png"), SMALL)
    np.testing.assert_array_equal(named.pixels, read(tmp_path / "blobs" / "9f3a"))
    with pytest.raises(ImageError, match="out of the image folder, by a symbolic link"):
        read_image(tmp_path / "images", "chest.png", SMALL)
    with pytest.raises(ImageError, match="does not exist"):
        read_image(None, str(tmp_path / "none.png"), SMALL)
    with pytest.raises(ImageError, match="no file name can hold"):
        read_image(None, "a\0b.png", SMALL)


# --- preprocessing, missing files, imports ----------------------------------------------------


@pytest.mark.parametrize("preprocessing", [SQUASH, CROP, replace(CROP, bits_stored=12)])
def test_preprocessing_survives_json(preprocessing):
    values = preprocessing.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert Preprocessing.from_dict(json.loads(json.dumps(values))) == preprocessing
    assert values["decode_rule"] == DECODE_RULE == 1


def test_a_rule_in_words_is_its_number():
    """Version 0.1.0 compared the words, so that better ones would have spoilt every store."""
    values = SQUASH.to_dict()
    for words in ("rule 1. Grey: 8-bit values are used as stored.", "rule 1. In better words."):
        assert Preprocessing.from_dict(values | {"decode_rule": words}) == SQUASH
        old = {"name": "x", "preprocessing": values | {"decode_rule": words}}
        assert number_decode_rule(old) == {"name": "x", "preprocessing": values}
    assert number_decode_rule({"name": "imported:x"}) == {"name": "imported:x"}
    assert number_decode_rule({"preprocessing": values}) == {"preprocessing": values}


def change(**changes: object) -> Callable[[dict[str, object]], dict[str, object]]:
    return lambda values: values | changes


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (change(decode_rule="rule 0. as it comes"), r"another rule \(0\) than .* follows \(1\)"),
        (change(decode_rule=2), r"another rule \(2\) than .* follows \(1\)"),
        (change(decode_rule="as it comes"), "another rule .'as it comes'. than"),
        (change(colour="green"), "not .*colour"),
        (lambda values: {"mean": values["mean"]}, "holds the keys"),
        (change(image_size_px=0), "image_size_px is 0; it must be at least 1"),
        (change(mean=[0.5]), "3 numbers each"),
        (change(std=[0.5, 0.0, 0.5]), "std positive"),
        (change(mean=[0.5, float("nan"), 0.5]), "finite"),
        (change(interpolation="nearest"), "'nearest'; choose from bicubic, bilinear"),
        (change(resize="shortest"), "'shortest'; choose from squash, crop"),
        (change(bits_stored=17), "bits_stored is 17; it must lie between 8 and 16"),
    ],
)
def test_a_preprocessing_that_cannot_be(damage, reason):
    with pytest.raises(ConfigError, match=reason):
        Preprocessing.from_dict(damage(SQUASH.to_dict()))


def test_find_missing_keeps_the_order(tmp_path):
    (tmp_path / "p1").mkdir()
    (tmp_path / "p1" / "a.png").touch()
    (tmp_path / "gone.png").symlink_to("nowhere")
    image_ids = ["z.png", "p1/a.png", "p1/b.png", "gone.png", "a" * 300, "nul\0.png"]
    assert find_missing(tmp_path, image_ids) == [i for i in image_ids if i != "p1/a.png"]
    assert find_missing(tmp_path / "no folder", ["a.png"]) == ["a.png"]


def test_importing_the_module_does_not_import_torch():
    """Decoding workers start with it."""
    code = (
        "import sys, cxr_cache.datasets.images; "
        "print({'torch', 'pandas', 'h5py'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
