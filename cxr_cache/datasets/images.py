"""File -> pixels: the only module that decodes.

It runs in decoding worker processes, so it imports neither torch nor pandas. Everything that can
be wrong with one file ends as an :class:`ImageError` whose message is the reason; nothing is ever
replaced by a stand-in.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COMPRESSION,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    STRIPBYTECOUNTS,
    TiffImageFile,
)

from cxr_cache.common.wording import count, list_names
from cxr_cache.datasets.dicom.pixels import (
    codestream_size,
    decode_dicom,
    is_dicom,
    largest_value,
    to_levels,
)
from cxr_cache.datasets.preprocessing import Preprocessing, _resize, _resized_size
from cxr_cache.datasets.raster.png import decode_png
from cxr_cache.errors import ConfigError, ImageError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "JPEG2000", "WEBP")
"""What Pillow reads; DICOM is pydicom's."""
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 256 * 1024**2
MAX_TEXT_BYTES = 64 * 1024**2
"""Of a PNG's colour profile and texts, unpacked; Pillow's own limit calls many scans damaged."""
MIN_EDGE_PX = 16
DARK_BITS = 14
"""16-bit images of no larger values are taken to be of as many bits, unless bits are stated."""
MAX_MARKED = 0.01
"""Largest share of pixels that may be letters burnt in at full brightness."""
_N_LOOKED_AT = 1000  # files of a sample, of which most are of 8 bits, as their first bytes tell
_N_DECODED = 32


# What brings an image of each EXIF orientation upright; 1, and anything unknown, is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's modes for grey of more than 8 bits; which one a file gets depends on Pillow's version.
_WIDE_GREY = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})

# The mode that every other mode is read as; RGBA is then composited over black.
_READ_AS = {
    "1": "L",
    "L": "L",
    "P": "RGB",
    "RGB": "RGB",
    "RGBX": "RGB",
    "CMYK": "RGB",
    "YCbCr": "RGB",
    "LA": "RGBA",
    "PA": "RGBA",
    "RGBA": "RGBA",
}

# How the files that are read begin, and others that lie in image folders (offset and bytes).
_BEGINNINGS = (
    (0, b"\x89PNG", "a PNG"),
    (0, b"\xff\xd8", "a JPEG"),
    (0, b"II*\0", "a TIFF"),
    (0, b"MM\0*", "a TIFF"),
    (0, b"BM", "a BMP"),
    (4, b"jP  ", "a JPEG 2000 image"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (8, b"WEBP", "a WebP image"),
)
_OTHER_KINDS = (
    (0, b"GIF8", "a GIF"),
    (0, b"\x08\0\x05\0", "a DICOM object without its file header (128 bytes and DICM)"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
)

_TRUNCATED = "the file is truncated: its end is missing"
_NOT_A_FILE = "the path is a pipe, socket or device, not a file"
_OPEN_ERRORS = {
    errno.ENOENT: "the file does not exist",
    errno.ENOTDIR: "the file does not exist",
    errno.EACCES: "permission to read the file is denied",
    errno.EPERM: "permission to read the file is denied",
    errno.ELOOP: "the path is a symbolic link that leads to itself",
    errno.ENXIO: _NOT_A_FILE,
}

# A pipe that nobody writes to would block an ordinary open() for ever.
_OPEN_FLAGS = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY")
)


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """One image, ready for the encoder's normalisation, with the hash of the file it came from.

    ``pixels`` is uint8 of shape ``(3, S, S)``; ``sha256`` is the digest (32 bytes) of the very
    bytes that were decoded.
    """

    pixels: NDArray[np.uint8]
    sha256: bytes


def read_image(
    image_dir: str | Path | None, image_id: str, preprocessing: Preprocessing
) -> DecodedImage:
    """Read one image file, upright, resized and cropped as the encoder wants it.

    For 8-bit grey and RGB files the pixels equal those of open_clip's own evaluation transform
    bit for bit. The content decides about the format, not the file's name.

    Parameters
    ----------
    image_dir
        Folder that holds all images of the cohort, which links may not lead out of. None for a
        single file that the user has named.
    image_id
        Posix path of the file relative to `image_dir`; without a folder, any path.
    preprocessing
        Size, interpolation, resizing and bit depth.

    Returns
    -------
    DecodedImage
        ``pixels`` of shape ``(3, S, S)``, uint8, with ``S = image_size_px``; the three channels
        of a grey image are equal.

    Raises
    ------
    ImageError
        The file cannot be used. The message is the reason without the file's name (the caller
        knows it), one line without a full stop.

    Notes
    -----
    Pillow's settings are process-wide and are changed while it decodes, so call this from several
    processes rather than from several threads.
    """
    return decode_image(read_bytes(image_dir, image_id), preprocessing)


def decode_image(data: bytes, preprocessing: Preprocessing) -> DecodedImage:
    """The half of :func:`read_image` that follows :func:`read_bytes`.

    Raises
    ------
    ImageError
        The bytes are no image that can be used; as :func:`read_image`.
    """
    with _strict_pillow():
        picture = _resize(_decode(data, preprocessing), preprocessing)
    rounded = to_levels(np.asarray(picture)) if is_dicom(data) else picture
    pixels = _to_channels(rounded)  # (3, S, S)
    if (pixels == pixels[:, :1, :1]).all():
        size = f"{preprocessing.image_size_px} x {preprocessing.image_size_px} pixels"
        raise ImageError(f"the image holds one grey value everywhere at {size}, so it is blank")
    return DecodedImage(pixels, hashlib.sha256(data).digest())


def read_picture(
    image_dir: str | Path | None, image_id: str, bits_stored: int | None = None
) -> NDArray[np.uint8]:
    """Read one image file at its full size, upright: what a person would look at.

    Parameters
    ----------
    image_dir, image_id
        As in :func:`read_image`.
    bits_stored
        Bits in use in 16-bit grey files, None for all.

    Returns
    -------
    NDArray[np.uint8]
        Grey ``(H, W)`` or colour ``(H, W, 3)``; 16-bit grey is rounded to 8 bits.

    Raises
    ------
    ImageError
        The file cannot be decoded. A blank image can.
    """
    return decode_picture(read_bytes(image_dir, image_id), bits_stored)


def decode_picture(data: bytes, bits_stored: int | None = None) -> NDArray[np.uint8]:
    """The half of :func:`read_picture` that follows :func:`read_bytes`.

    Raises
    ------
    ImageError
        The bytes are no image that can be used; as :func:`read_picture`.
    """
    rule = Preprocessing(1, (0, 0, 0), (1, 1, 1), "bilinear", "squash", bits_stored)
    with _strict_pillow():
        values = np.asarray(_decode(data, rule))
    if is_dicom(data):
        return to_levels(values)
    return values if values.dtype == np.uint8 else np.rint(values).astype(np.uint8)


def read_bytes(image_dir: str | Path | None, image_id: str) -> bytes:
    """Read an image file as it is, with every check that needs no decoding.

    Raises
    ------
    ImageError
        There is no ordinary, readable file inside the image folder; as :func:`read_image`.
    """
    return _read_file(_locate(image_dir, image_id))


def find_missing(image_dir: str | Path, image_ids: Iterable[str]) -> list[str]:
    """The image ids, in their order, at whose path there is nothing.

    Whether a file that is there can be used, only :func:`read_image` knows.
    """
    # Unlike Path.exists, os.path.exists answers False for a name that no file can have.
    return [
        image_id
        for image_id in image_ids
        if not os.path.exists(os.path.join(image_dir, image_id))  # noqa: PTH110, PTH118
    ]


def require_any_image(image_dir: str | Path, image_ids: Sequence[str] | NDArray[np.str_]) -> None:
    """Raise ConfigError if the folder holds none of the images, as the wrong folder does.

    The message names an image that was looked for, what the folder holds, and where the image is
    if that is one folder up or down.
    """
    folder = Path(image_dir)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give the one with the images.")
    if not len(image_ids) or any((folder / str(image_id)).exists() for image_id in image_ids):
        return
    first = str(image_ids[0])
    there = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    near = [folder.parent, *(folder / name for name in there if name.endswith("/"))][:100]
    found = next((place for place in near if (place / first).exists()), None)
    raise ConfigError(
        f"None of the {count(len(image_ids), 'image')} of the table is in {folder}. The first is "
        f"{first!r}; the folder holds {list_names(there, 3) or 'nothing'}. "
        + (
            f"That image is in {found}: give this folder."
            if found
            else "Give the folder that the names in the table start from."
        )
    )


def require_stated_bits(
    image_dir: str | Path, image_ids: Sequence[str] | NDArray[np.str_], prep: Preprocessing
) -> None:
    """Raise ConfigError if 16-bit files hold values of fewer bits, and nobody has stated how many.

    The message names both remedies; :func:`find_unused_bits` looks.
    """
    if unused := find_unused_bits(image_dir, image_ids, prep):
        n_bits, seen = unused
        raise ConfigError(
            f"{seen}: they seem to be {n_bits}-bit images in 16-bit files, and would be nearly "
            f"black. Give --bits-stored {n_bits} to scale them by their own range, or "
            "--bits-stored 16 if they are meant to be this dark."
        )


def find_unused_bits(
    image_dir: str | Path | None, image_ids: Sequence[str] | NDArray[np.str_], prep: Preprocessing
) -> tuple[int, str] | None:
    """The bits that 16-bit files use if these are few and not stated, and what was seen, in words.

    Tools that convert DICOM leave 12-bit values as they are, which on a scale of 16 bits are
    nearly black. A sample of the images is looked at, and as soon as one needs more than
    :data:`DARK_BITS`, all is well.
    """
    if prep.bits_stored is not None:
        return None
    largest: list[int] = []
    for row in np.random.default_rng(0).permutation(len(image_ids))[:_N_LOOKED_AT]:
        with suppress(ImageError):  # whoever reads them all tells which cannot be used, and why
            value = _largest_value(image_dir, str(image_ids[row]), prep)
            largest += [] if value is None else [value]
        if largest and (largest[-1] >= 2**DARK_BITS or len(largest) == _N_DECODED):
            break
    if not largest or max(largest) >= 2**DARK_BITS:
        return None
    n_bits = max(largest).bit_length()
    return max(8, n_bits + n_bits % 2), (  # devices have an even number
        f"No value above {max(largest)} occurs in a sample of "
        f"{count(len(largest), '16-bit image')}, burnt-in markers aside, where 16 bits hold up to "
        "65535"
    )


def _largest_value(image_dir: str | Path | None, image_id: str, prep: Preprocessing) -> int | None:
    """The largest value of a file that states no fewer than 16 bits; None for every other file."""
    path = _locate(image_dir, image_id)
    head = _read_file(path, 32)
    if head.startswith(b"\xff\xd8") or (head.startswith(b"\x89PNG") and head[24:25] != b"\x10"):
        return None  # quickly, since most files are of 8 bits
    data = _read_file(path)
    with _strict_pillow():
        if is_dicom(data):
            return largest_value(data, lambda size: _require_size(size, prep))
        image = _open_checked(data, prep)
        if image.mode not in _WIDE_GREY or _bits_per_sample(image, data) < 16:
            return None
        values = np.asarray(image)
        bright = values >= 2**DARK_BITS
        is_marked = 0 < bright.mean() <= MAX_MARKED
        return int(values[~bright].max() if is_marked else values.max())


def _locate(image_dir: str | Path | None, image_id: str) -> str:
    """Absolute path of an image, which must lie in the folder once symbolic links are followed."""
    if image_dir is not None and PurePosixPath(image_id).is_absolute():
        raise ImageError("the path is absolute; it must be relative to the image folder")
    try:
        root = Path(os.path.realpath(image_dir or "."))
        path = Path(os.path.realpath(root / image_id))
    except ValueError as error:  # a NUL byte, or characters that no file name can hold
        raise ImageError("the path holds characters that no file name can hold") from error
    if image_dir is not None and not path.is_relative_to(root):
        by_link = ".." not in PurePosixPath(image_id).parts
        how = ", by a symbolic link" if by_link else ""
        raise ImageError(f"the path leads out of the image folder{how}")
    return str(path)


def _read_file(path: str, n_bytes: int = -1) -> bytes:
    """The first or all bytes of a regular file, without waiting for a pipe or a device."""
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
        try:
            _require_regular(os.fstat(descriptor))
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                data = file.read(n_bytes)
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = _OPEN_ERRORS.get(error.errno or 0, f"the file cannot be read: {error.strerror}")
        raise ImageError(reason) from error
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    return data


def _require_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("the path is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(_NOT_A_FILE)
    if status.st_size > MAX_FILE_BYTES:
        raise ImageError(
            f"the file has {status.st_size / 1024**2:.1f} MiB; the limit is "
            f"{MAX_FILE_BYTES / 1024**2:.0f} MiB"
        )


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Turn whatever Pillow raises into a reason, keep it quiet, and make it refuse cut files.

    Other code in the process may have told Pillow to accept truncated files, which then end in
    grey. Pillow's own pixel limit is off inside because ours is lower, and compared before any
    pixel is decoded.
    """
    settings = {
        (ImageFile, "LOAD_TRUNCATED_IMAGES"): False,
        (Image, "MAX_IMAGE_PIXELS"): None,
        (PngImagePlugin, "MAX_TEXT_CHUNK"): MAX_TEXT_BYTES,
        (PngImagePlugin, "MAX_TEXT_MEMORY"): MAX_TEXT_BYTES,
    }
    before = {key: getattr(*key) for key in settings}
    try:
        for key, value in settings.items():
            setattr(*key, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("decoding the image takes more memory than there is") from error
    except Exception as error:  # damaged files make Pillow raise nearly every built-in exception
        detail = " ".join(str(error).split())[:120] or type(error).__name__
        if "truncated" in detail.lower():
            raise ImageError(_TRUNCATED) from error
        if "Decompressed data too large" in detail or "Too much memory used in text" in detail:
            raise ImageError(
                f"its colour profile or texts take more than {MAX_TEXT_BYTES / 1024**2:.0f} MiB; "
                "save the image without them"
            ) from error
        raise ImageError(f"the file is damaged: {detail}") from error
    finally:
        for key, value in before.items():
            setattr(*key, value)


def _decode(data: bytes, preprocessing: Preprocessing) -> Image.Image:
    """The upright image in mode L, RGB or F (grey on the scale 0..255), at full size.

    That of a DICOM file lies around 0, as :func:`decode_dicom` has it.
    """
    if is_dicom(data):
        bits_stored = preprocessing.bits_stored
        grey = decode_dicom(data, bits_stored, lambda size: _require_size(size, preprocessing))
        return Image.fromarray(grey)
    file = _open_checked(data, preprocessing)
    image = decode_png(data) or file
    image.load()
    picture = _to_grey_or_rgb(image, _bits_per_sample(file, data), preprocessing.bits_stored)
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return picture if turn is None else picture.transpose(turn)


def _open_checked(data: bytes, preprocessing: Preprocessing) -> ImageFile.ImageFile:
    """The file, not yet decoded, once nothing but its pixels can still be wrong."""
    image = _open_header(data)
    _require_size(image.size, preprocessing)
    _require_one_frame(image)
    _require_faithful(image, data)
    _require_whole(image, data)
    return _open_header(data)  # checking used the first one up


def _open_header(data: bytes) -> ImageFile.ImageFile:
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(_describe_beginning(data)) from error
    except OSError as error:
        webp = data.startswith(b"WEBP", 8)
        if not webp and not data.startswith(b"jP  ", 4):
            raise
        # Pillow hands a whole WebP to the decoder at once, which says no more than that
        cut = webp and len(data) < 8 + int.from_bytes(data[4:8], "little")
        raise ImageError(_TRUNCATED if cut else _describe_beginning(data)) from error
    except KeyError as error:  # Pillow was built without the library for this format
        raise ImageError(f"this machine's Pillow cannot read {error.args[0]} files") from error


def _describe_beginning(data: bytes) -> str:
    """Why Pillow recognises no image in these bytes."""
    start = data[:512]
    for offset, beginning, kind in _BEGINNINGS:
        if start.startswith(beginning, offset):
            return (
                f"the file begins like {kind}, but its header is damaged, cut off or of a rare "
                "kind that is not read"
            )
    kinds = f"an image that can be read ({', '.join(FORMATS)}, DICOM)"
    for offset, beginning, kind in _OTHER_KINDS:
        if start.startswith(beginning, offset):
            return f"the file is not {kinds} but {kind}"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):  # after a byte order mark or spaces
        return f"the file is not {kinds} but a web page or other markup"
    if not any(start):
        return f"the file is not {kinds}: it begins with zeros, as unfinished copies do"
    return f"the file is not {kinds}: it begins with {ascii(start[:16])[1:]}"


def _require_size(size: tuple[int, int], preprocessing: Preprocessing) -> None:
    """Compare the size that the header states with the limits, before any pixel is decoded."""
    width, height = size
    stated = f"the image has {width} x {height} pixels"
    if min(size) < MIN_EDGE_PX:
        raise ImageError(f"{stated}; a radiograph has at least {MIN_EDGE_PX} on each side")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{stated} ({width * height / 1e6:.1f} megapixels); the limit is "
            f"{MAX_PIXELS / 1e6:.0f} megapixels"
        )
    resized_width, resized_height = _resized_size(size, preprocessing)
    if resized_width * resized_height > MAX_PIXELS:
        raise ImageError(
            f"{stated}, too narrow to crop: resized it would have "
            f"{resized_width} x {resized_height}"
        )


def _require_one_frame(image: ImageFile.ImageFile) -> None:
    n_frames = getattr(image, "n_frames", 1)
    if n_frames > 1:
        raise ImageError(
            f"the file holds {n_frames} frames, and which of them is the radiograph is unknown"
        )


def _require_faithful(image: ImageFile.ImageFile, data: bytes) -> None:
    """Refuse the files that Pillow opens, but of which it would give other values than stored."""
    remedy = "save the image as 8-bit or 16-bit grey"
    if image.mode == "F":
        raise ImageError(f"the pixels are 32-bit floats, which have no stated range; {remedy}")
    bits = _bits_per_sample(image, data)
    if image.mode not in _WIDE_GREY and bits > 8:
        raise ImageError(f"the colours have {bits} bits, of which only 8 could be read; {remedy}")
    if image.format == "JPEG2000" and not 8 <= bits <= 16:
        kind = "signed pixels" if bits < 0 else f"{bits} bits per pixel"
        raise ImageError(f"the JPEG 2000 has {kind}; {remedy}")
    if not isinstance(image, TiffImageFile):
        return
    if bits not in (1, 2, 4, 8, 12, 16, 32):
        raise ImageError(f"the TIFF has {bits} bits per pixel; {remedy}")
    if bits == 12 and image.tag_v2.get(COMPRESSION, 1) == 1:  # Pillow takes any bytes for these
        width, height = image.size
        stated = sum(image.tag_v2.get(STRIPBYTECOUNTS, ()))
        if stated != (expected := -(-width * 12 // 8) * height):
            raise ImageError(
                f"the TIFF has 12 bits per pixel, but states {stated} bytes of pixels where "
                f"{width} x {height} take {expected}; {remedy}"
            )
    if bits > 8 and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
        raise ImageError(f"the TIFF stores white as 0 in {bits} bits; {remedy} with black as 0")
    if bits <= 8 and max(image.tag_v2.get(SAMPLEFORMAT, (1,))) != 1:
        raise ImageError(f"the TIFF has signed {bits}-bit pixels; {remedy}")


def _require_whole(image: ImageFile.ImageFile, data: bytes) -> None:
    """Refuse cut or changed files that Pillow would decode without a word.

    It stops at the last row of a PNG and never reads the checksums of the pixels, and a JPEG whose
    end was filled up with zeros can decode to grey.
    """
    if image.format == "PNG":
        image.verify()  # all checksums up to the closing chunk
        whole = data.rfind(b"IEND\xaeB`\x82") >= 0  # from the end, where it is
    elif image.format == "JPEG":
        assert image.fp is not None
        whole = data.rfind(b"\xff\xd9", image.fp.tell()) >= 0  # the header ends where scans begin
    elif image.format == "JPEG2000":
        whole = b"\xff\xd9" in data[-64:]
    else:
        whole = True
    if not whole:
        raise ImageError(_TRUNCATED)


def _bits_per_sample(image: ImageFile.ImageFile, data: bytes) -> int:
    if isinstance(image, TiffImageFile):
        return int(max(image.tag_v2.get(BITSPERSAMPLE, (1,))))
    if image.format == "PNG":
        return data[24]  # signature 8, length 4, "IHDR" 4, width 4, height 4
    if image.format == "JPEG2000":
        stated = codestream_size(data)
        return stated[3] if stated else 0
    return 8


def _to_grey_or_rgb(image: Image.Image, n_bits: int, bits_stored: int | None) -> Image.Image:
    if image.mode in _WIDE_GREY:
        return _scale_wide_grey(image, n_bits, bits_stored)
    if image.mode not in _READ_AS:
        raise ImageError(f"the pixels are of a kind that is not read (Pillow's mode {image.mode})")
    mode = "RGBA" if image.has_transparency_data else _READ_AS[image.mode]
    picture = image if image.mode == mode else image.convert(mode)
    if mode != "RGBA":
        return picture
    black = Image.new("RGB", picture.size)
    black.paste(picture, mask=picture.getchannel("A"))
    return black


def _scale_wide_grey(image: Image.Image, stated: int, bits_stored: int | None) -> Image.Image:
    """Grey of more than 8 bits on the scale 0..255 in float32, so that no level is lost yet.

    The file states its own bits where it is a TIFF or JPEG 2000 of fewer than 16.
    """
    values = np.asarray(image)
    if image.format == "JPEG2000":
        values = values >> (16 - stated)  # Pillow has filled up the 16 bits
    if "transparency" in image.info:
        values = np.where(values == image.info["transparency"], 0, values)
    n_bits = min(stated, 16 if bits_stored is None else bits_stored)
    full_scale = 2**n_bits - 1
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest > full_scale:
        culprit = lowest if lowest < 0 else highest
        raise ImageError(
            f"the image holds the value {culprit}, outside 0 to {full_scale}, the range of the "
            f"{n_bits} bits stated for 16-bit files (bits_stored)"
        )
    return Image.fromarray(values.astype(np.float32) * np.float32(255 / full_scale))


def _to_channels(picture: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels with the channels first; grey is resized once and repeated, not resized thrice."""
    values = np.asarray(picture)  # (S, S) or (S, S, 3)
    if values.dtype == np.float32:  # bicubic interpolation overshoots at edges
        values = np.rint(values.clip(0, 255)).astype(np.uint8)
    if values.ndim == 2:
        return np.stack([values] * 3)  # (S, S) -> (3, S, S)
    return np.ascontiguousarray(values.transpose(2, 0, 1))
