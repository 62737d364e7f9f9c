"""The faster ways from a file to pixels give what Pillow gives, and refuse what Pillow refuses."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cxr_cache.datasets import images
from cxr_cache.datasets.images import decode_image, decode_picture
from cxr_cache.datasets.preprocessing import Preprocessing
from cxr_cache.datasets.raster import png, shrink
from cxr_cache.errors import ImageError

FILTERS = [Image.Resampling[name] for name in ("BICUBIC", "BILINEAR", "LANCZOS", "BOX", "HAMMING")]
RULE = Preprocessing(32, (0, 0, 0), (1, 1, 1), "bicubic", "crop")
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def noise(width: int, height: int, channels: int = 1, top: int = 256) -> np.ndarray:
    dtype = np.uint8 if top == 256 else np.uint16
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(width + height).integers(0, top, shape, dtype=dtype)


def film(width: int, height: int) -> np.ndarray:
    """Slopes and grain, of which an encoder chooses every kind of row filter."""
    slope = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 120, width))
    slope[height // 3 : height // 2] = slope[height // 3]
    return (slope + noise(width, height) % 4).astype(np.uint8)


def to_png(values: np.ndarray | Image.Image, **options: object) -> bytes:
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    buffer = BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def assemble(header: bytes, stream: bytes, *more: bytes) -> bytes:
    """A PNG whose checksums are right, whatever its pixels are."""
    return SIGNATURE + b"".join(
        [chunk(b"IHDR", header), *more, chunk(b"IDAT", stream), chunk(b"IEND", b"")]
    )


def stream_of(data: bytes) -> bytes:
    found, at = b"", 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT":
            found += data[at + 8 : at + 8 + length]
        at += 12 + length
    return found


def by_pillow(monkeypatch: pytest.MonkeyPatch, data: bytes) -> object:
    """The pixels, or the reason why there are none, of a machine without kornia-rs."""
    with monkeypatch.context() as patch:
        patch.setattr(images, "decode_png", lambda _: None)
        return pixels_or_reason(data)


def pixels_or_reason(data: bytes) -> object:
    try:
        return decode_picture(data).tolist()
    except ImageError as error:
        return str(error)


# --- resizing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FILTERS, ids=lambda method: method.name.lower())
@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((1024, 700), (224, 224)),
        ((2500, 301), (224, 179)),
        ((64, 88), (32, 44)),
        ((67, 40), (33, 64)),
        ((501, 17), (1, 1)),
        ((3001, 33), (499, 16)),
    ],
    ids=str,
)
def test_a_large_grey_image_is_resized_to_pillows_bits(size, target, method):
    """Noise of black and white exceeds the range beside its edges, as no radiograph does."""
    for values in (film(*size), noise(*size), (noise(*size) > 127) * np.uint8(255)):
        picture = Image.fromarray(values)
        assert shrink._narrow(picture, target[0], method).shape == (size[1], target[0])
        np.testing.assert_array_equal(
            np.asarray(shrink.shrink(picture, target, method)),
            np.asarray(picture.resize(target, method)),
        )


def test_products_are_for_wide_grey_images_and_the_rest_is_pillows(monkeypatch):
    narrowed = []
    narrow = shrink._narrow
    monkeypatch.setattr(
        shrink, "_narrow", lambda *given: narrowed.append(given[0].size) or narrow(*given)
    )
    for values in (
        noise(90, 70),
        noise(63, 50),
        noise(448, 900),  # tall: Pillow has the rows first
        noise(100, 250),
        noise(3000, 16),  # a strip, whose weights would take more memory than a picture
        noise(90, 70, 3),
        noise(90, 70) / np.float32(2),
    ):
        picture = Image.fromarray(values)
        np.testing.assert_array_equal(
            np.asarray(shrink.shrink(picture, (32, 32), Image.Resampling.BICUBIC)),
            np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)),
        )
    assert narrowed == [(90, 70)]


# --- PNG --------------------------------------------------------------------------------------

KINDS = {
    "grey": to_png(film(80, 50)),
    "16 bits": to_png(film(80, 50).astype(np.uint16) * 257 + 3),
    "RGB": to_png(np.stack([film(80, 50), noise(80, 50), film(80, 50)], axis=-1)),
    "RGBA": to_png(noise(80, 50, 4)),
    "with a text": to_png(film(80, 50), dpi=(300, 300)),
}
LEFT_TO_PILLOW = {
    "grey and alpha": to_png(Image.fromarray(noise(80, 50)).convert("LA")),
    "palette": to_png(Image.fromarray(noise(80, 50)).convert("P")),
    "1 bit": to_png(Image.fromarray(noise(80, 50)).convert("1")),
    "transparent": to_png(noise(80, 50), transparency=7),
    "JPEG's bytes": b"\xff\xd8" + bytes(100),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_png_has_pillows_values(kind, monkeypatch):
    pytest.importorskip("kornia_rs")
    decoded = png.decode_png(KINDS[kind])
    with Image.open(BytesIO(KINDS[kind])) as expected:
        assert decoded is not None
        assert decoded.mode == expected.mode
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(expected))
    assert pixels_or_reason(KINDS[kind]) == by_pillow(monkeypatch, KINDS[kind])


@pytest.mark.parametrize("kind", LEFT_TO_PILLOW)
def test_other_kinds_are_left_to_pillow(kind):
    assert png.decode_png(LEFT_TO_PILLOW[kind]) is None


def test_without_kornia_pillow_decodes_and_no_pixel_changes(monkeypatch):
    with_it = [decode_image(data, RULE).pixels for data in KINDS.values()]
    monkeypatch.setattr(png, "_import_kornia", lambda: None)
    for data, pixels in zip(KINDS.values(), with_it, strict=True):
        assert png.decode_png(data) is None
        np.testing.assert_array_equal(decode_image(data, RULE).pixels, pixels)


@pytest.mark.parametrize("where", ["EXIF", "a text of EXIF", "XMP"])
def test_a_png_that_a_camera_turned_is_upright(where, monkeypatch):
    values = film(80, 50)
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngImagePlugin.PngInfo()
    if where == "a text of EXIF":
        content = exif.tobytes().hex()
        info.add_text("Raw profile type exif", f"\nexif\n{len(content) // 2:8}\n{content}\n")
    elif where == "XMP":
        info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    options = {"exif": exif} if where == "EXIF" else {"pnginfo": info}
    data = to_png(values, **options)
    assert png.decode_png(data) is None
    assert pixels_or_reason(data) == np.rot90(values, -1).tolist()


def test_interlaced_rows_are_left_to_pillow(monkeypatch):
    """Seven passes of an 8 x 8 pattern; of one grey, so that the order of pixels says nothing."""
    header = struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 1)
    passes = [(2, 2), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (16, 8)]  # width, height
    rows = b"".join((b"\0" + b"\x55" * width) * height for width, height in passes)
    data = assemble(header, zlib.compress(rows))
    assert png.decode_png(data) is None
    assert pixels_or_reason(data) == [[0x55] * 16] * 16


def broken_files() -> dict[str, bytes]:
    """Whole files by their checksums, with something wrong in what is compressed."""
    data = KINDS["grey"]
    header, stream = data[16:29], stream_of(data)
    rows = zlib.decompress(stream)
    wrong_filter = bytearray(rows)
    wrong_filter[81 * 20] = 7
    found = {
        "cut stream": assemble(header, stream[: len(stream) // 2]),
        "no stream": assemble(header, b""),
        "rows missing": assemble(header, zlib.compress(rows[:-500])),
        "rows too many": assemble(header, zlib.compress(rows + rows)),
        "a pixel missing": assemble(header, zlib.compress(rows[:-1])),
        "unknown filter": assemble(header, zlib.compress(bytes(wrong_filter))),
        "wrong Adler checksum": assemble(header, stream[:-4] + bytes(4)),
        "no Adler checksum": assemble(header, stream[:-4]),
        "bytes after the stream": assemble(header, stream + b"more"),
        "no zlib header": assemble(header, b"\0\0" + stream[2:]),
        "zeros": assemble(header, bytes(len(stream))),
        "wider": assemble(struct.pack(">I", 90) + header[4:], stream),
        "narrower": assemble(struct.pack(">I", 70) + header[4:], stream),
        "unknown compression": assemble(header[:10] + b"\1" + header[11:], stream),
        "unknown filters": assemble(header[:11] + b"\1" + header[12:], stream),
        "9 bits": assemble(header[:8] + b"\x09" + header[9:], stream),
        "colour type 1": assemble(header[:9] + b"\1" + header[10:], stream),
        "two streams": assemble(header, stream, chunk(b"IDAT", stream), chunk(b"tEXt", b"a\0b")),
        "unknown needed chunk": assemble(header, stream, chunk(b"ABCD", b"x")),
        "pixels of two headers": assemble(header, stream, chunk(b"IHDR", header)),
        "end with content": assemble(header, stream)[:-12] + chunk(b"IEND", b"x"),
    }
    found |= {f"cut at {at}": data[:at] for at in (20, 30, 45, len(data) // 2, len(data) - 3)}
    rng = np.random.default_rng(0)
    for i, at in enumerate(rng.integers(0, len(stream), 30)):
        changed = bytearray(stream)
        changed[at] ^= int(rng.integers(1, 256))
        found[f"changed byte {i}"] = assemble(header, bytes(changed))
    return found


def is_only_summed_wrong(stream: bytes) -> bool:
    """Whether a stream inflates to all pixels, and the sum at its end is that of other ones."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        rows = inflater.decompress(stream[2:])
    except zlib.error:
        return False
    stated = inflater.unused_data[:4]
    return len(rows) >= 81 * 50 and stated != zlib.adler32(rows).to_bytes(4, "big")


def test_broken_files_have_the_same_fate_and_wording(monkeypatch):
    """But for an encoder's wrong sum of the pixels in a file whose own checksums are right."""
    pytest.importorskip("kornia_rs")
    refused = 0
    for name, data in broken_files().items():
        expected = by_pillow(monkeypatch, data)
        if pixels_or_reason(data) != expected:
            assert expected == "the file is damaged: broken data stream when reading image file"
            assert is_only_summed_wrong(stream_of(data)), name
        refused += isinstance(expected, str)
    assert refused > 20


def test_real_radiographs_are_decoded_and_resized_to_the_same_bits(shared_data, monkeypatch):
    paths = sorted((shared_data / "nih_1024" / "images").glob("*.png"))
    for path in paths[:: len(paths) // 6]:
        data = path.read_bytes()
        rule = replace(RULE, image_size_px=224)
        pixels = decode_image(data, rule).pixels
        with monkeypatch.context() as patch:
            patch.setattr(images, "decode_png", lambda _: None)
            patch.setattr(shrink, "_MIN_RATIO", 10_000)
            np.testing.assert_array_equal(decode_image(data, rule).pixels, pixels, path.name)
