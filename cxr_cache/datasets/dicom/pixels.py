"""DICOM file -> grey picture, by pydicom, which is imported only when there is such a file.

Nothing here looks at the brightest or darkest pixel: the scale follows from the header alone, so
that the same tissue is as bright in every image of a machine.
"""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_cache.common.extras import pip_line
from cxr_cache.errors import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset, FileDataset

REMEDY: Final = pip_line("dicom")

HALF_RANGE: Final = 127.5

MAX_OVERSHOOT: Final = 0.01
"""Largest share of pixels above the stated range: markers burnt in, not a wrong range."""

# A value of run-length coding stands for at most 64 (two bytes for 128). Radiographs shrink to a
# half or a fiftieth, empty pictures to a thousandth; one of more pixels per byte is none.
_MAX_PIXELS_PER_BYTE = 10_000
_MAX_PIXELS_PER_BYTE_RLE = 64
_MAX_INFLATED = 100

_RLE = "1.2.840.10008.1.2.5"
_DEFLATED = b"1.2.840.10008.1.2.1.99"


def is_dicom(data: bytes) -> bool:
    """Whether the bytes begin as a DICOM file does: "DICM" after 128 bytes of anything."""
    return data[128:132] == b"DICM"


def decode_dicom(
    data: bytes, bits_stored: int | None, require_size: Callable[[tuple[int, int]], None]
) -> NDArray[np.float32]:
    """Decode a DICOM file to what its header says is shown, as grey levels.

    The steps are those of the standard: modality LUT or rescale, then the first VOI LUT or
    window, then the inversion of MONOCHROME1. The result is scaled over the whole range that these
    steps can give by the header, and padding is black.

    Parameters
    ----------
    data
        The whole file.
    bits_stored
        Bits in use in 16-bit files; a header that states more of them is taken to be wrong.
    require_size
        Raises for a ``(width, height)`` that is not read. It is called before any pixel is
        decoded.

    Returns
    -------
    NDArray[np.float32]
        Grey levels from -127.5 (black) to 127.5 (white), not rounded, shape ``(H, W)``. Since they
        are centred, resizing treats a picture and its inverse alike, to the last bit;
        :func:`to_levels` makes 0 to 255 of them.

    Raises
    ------
    ImageError
        pydicom or a decoder is not installed, the object is no single grey picture, its header
        contradicts itself or its pixels, or the file is cut. Of a damaged file, pydicom may raise
        nearly every built-in exception.

    Notes
    -----
    The functions of pydicom are applied to each value that can occur, of which there are at most
    65,536, and the pixels then looked up, which takes less time and memory than all pixels.
    """
    with quiet_pydicom():
        return _decode_grey(data, bits_stored, require_size)


def _decode_grey(
    data: bytes, bits_stored: int | None, require_size: Callable[[tuple[int, int]], None]
) -> NDArray[np.float32]:
    header, stored = _decode(data, require_size)
    bits = _bits(header, bits_stored)
    values = _stored_values(header, bits)
    shown = _to_grey(header, values, bits)
    padded = _is_padding(header, values) | _is_padding(header, _stored_values(header, 16))
    shown[padded] = -HALF_RANGE
    if not _has_voi(header):
        _require_in_range(header, stored, values, padded, bits)
    grey: NDArray[np.float32] = shown[stored]
    return grey


def to_levels(centred: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round grey levels around 0 to 0..255, so that the inverse of a picture stays its inverse.

    Halves go away from the middle; interpolation may have exceeded the range by a little.

    Examples
    --------
    >>> to_levels(np.float32([-130, -127.5, -1, 1, 24, 127.5])).tolist()
    [0, 0, 126, 129, 152, 255]
    """
    steps = np.floor(np.abs(centred).clip(0, HALF_RANGE)).astype(np.int16)  # 0 to 127
    levels: NDArray[np.uint8] = np.where(centred < 0, 127 - steps, 128 + steps).astype(np.uint8)
    return levels


def largest_value(data: bytes, require_size: Callable[[tuple[int, int]], None]) -> int | None:
    """The largest stored value, where all that tells the range is a header that states 16 bits.

    Of signed values, twice the largest without its sign: it takes as many bits.
    None where the header states another range, by fewer bits or by what is to be shown.
    """
    with quiet_pydicom():
        header, stored = _decode(data, require_size)
    bits = _bits(header, None)
    if bits < 16 or _has_voi(header) or header.get("ModalityLUTSequence"):
        return None
    lowest, highest = (int(of(_stored_values(header, bits)[stored])) for of in (np.min, np.max))
    return max(highest, -lowest - 1) * (2 if header.PixelRepresentation else 1)


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Keep pydicom from warning and logging, whose exceptions say the same."""
    log = logging.getLogger("pydicom")
    before = log.propagate
    log.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.propagate = before


def import_pydicom() -> Any:
    """Import pydicom.

    Raises
    ------
    ImageError
        It is not installed.
    """
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise ImageError(f"the file is a DICOM file, which needs pydicom: {REMEDY}") from error
    return pydicom


# -- the file, and whether it can be read ---------------------------------------------------


def _decode(
    data: bytes, require_size: Callable[[tuple[int, int]], None]
) -> tuple[FileDataset, NDArray[np.unsignedinteger[Any]]]:
    """The header, and the stored bits of each pixel as an unsigned number, ``(H, W)``."""
    pydicom = import_pydicom()
    if _DEFLATED in data[132:1024]:
        _require_moderate_inflation(data)
    header: FileDataset = pydicom.dcmread(BytesIO(data))
    _require_single_grey(header)
    require_size((int(header.Columns), int(header.Rows)))
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise ImageError("the DICOM header states no transfer syntax, so how to decode is unknown")
    if syntax.is_private or not syntax.is_transfer_syntax:
        raise ImageError(f"the DICOM transfer syntax {syntax} ({syntax.name}) is not read")
    plugin = ""
    if syntax.is_encapsulated:
        plugin = _choose_plugin(pydicom, syntax)
        _require_whole_frame(header, syntax)
    else:
        _require_all_pixels(header)
    options = {"raw": True, "decoding_plugin": plugin, "correct_unused_bits": False}
    try:
        pixels, _ = pydicom.pixels.get_decoder(syntax).as_array(header, index=0, **options)
    except (RuntimeError, NotImplementedError) as error:
        detail = " ".join(str(error).rpartition("pylibjpeg: ")[2].split())[:120]
        raise ImageError(f"the DICOM pixels ({syntax.name}) cannot be decoded: {detail}") from error
    dtype = np.dtype(f"u{int(header.BitsAllocated) // 8}")
    signed = np.dtype(f"i{dtype.itemsize}")
    as_stored = pixels.astype(signed if header.PixelRepresentation else dtype, copy=False)
    return header, np.ascontiguousarray(as_stored).view(dtype)


def _require_moderate_inflation(data: bytes) -> None:
    """Refuse a deflated file that would inflate to far more than a radiograph."""
    start = 132
    while data[start : start + 2] == b"\2\0":  # elements of the file's own header, never deflated
        wide = data[start + 4 : start + 6] in (b"OB", b"UN")
        at, size, head = (start + 8, 4, 12) if wide else (start + 6, 2, 8)
        start += head + int.from_bytes(data[at : at + size], "little")
    left = _MAX_INFLATED * len(data)
    inflater, pending = zlib.decompressobj(-zlib.MAX_WBITS), data[start:]
    while left >= 0 and (piece := inflater.decompress(pending, 2**20)):
        left, pending = left - len(piece), inflater.unconsumed_tail
    if left < 0:
        raise ImageError(f"the deflated DICOM file inflates to more than {_MAX_INFLATED} times")


def _require_single_grey(header: FileDataset) -> None:
    """Raise for objects that are not one grey picture of 8 or 16 bits, and for absent fields."""
    needed = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PhotometricInterpretation")
    if "FloatPixelData" in header or "DoubleFloatPixelData" in header:
        raise ImageError("the DICOM pixels are floats, which have no stated range")
    if "PixelData" not in header or "Rows" not in header:
        kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
        raise ImageError(f"the file is a DICOM file without a picture ({_name(kind)})")
    if missing := [name for name in needed if header.get(name) in (None, "")]:
        raise ImageError(f"the DICOM header lacks {' and '.join(missing)}")
    if (n_frames := int(header.get("NumberOfFrames") or 1)) != 1:
        raise ImageError(
            f"the DICOM file holds {n_frames} frames, and which of them is the radiograph is "
            "unknown"
        )
    interpretation, n_samples = header.PhotometricInterpretation, header.get("SamplesPerPixel") or 1
    if interpretation not in ("MONOCHROME1", "MONOCHROME2") or n_samples != 1:
        raise ImageError(
            f"the DICOM picture is in colour ({interpretation}, samples per pixel: {n_samples}); "
            "only grey ones (MONOCHROME1 and 2) are read"
        )
    allocated, stored = int(header.BitsAllocated), int(header.BitsStored)
    if allocated not in (8, 16):
        raise ImageError(f"the DICOM pixels have {allocated} bits; 8 and 16 are read")
    if not 1 < stored <= allocated:
        raise ImageError(f"the DICOM header states BitsStored {stored} of {allocated} bits")
    high = header.get("HighBit")
    if high not in (None, "", stored - 1):
        raise ImageError(
            f"the DICOM header states HighBit {high} and BitsStored {stored}, so which bits hold "
            f"the values is unknown; HighBit should be {stored - 1}"
        )
    # Some writers leave these out; the standard has no other value for a plain grey picture.
    header.HighBit, header.SamplesPerPixel = stored - 1, 1
    if header.get("PixelRepresentation") in (None, ""):
        header.PixelRepresentation = 0


def _name(uid: Any) -> str:
    """The standard's words for a UID, or the UID where it has none."""
    from pydicom.uid import UID

    return UID(str(uid)).name if uid else "of no stated kind"


def _choose_plugin(pydicom: Any, syntax: Any) -> str:
    """Which decoder to use: one for all machines, as lossy decoders differ by a grey level.

    pydicom's own is slower for RLE than pylibjpeg's, which panics at damaged data.
    """
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError as error:
        raise ImageError(
            f"the DICOM transfer syntax {syntax} ({syntax.name}) is not read"
        ) from error
    if syntax == _RLE:
        return "pydicom"
    if "pylibjpeg" not in decoder.available_plugins:
        needs = [text for text in decoder.missing_dependencies if text.startswith("pylibjpeg")]
        what = needs[0].replace("pylibjpeg - ", "", 1) if needs else "has no decoder here"
        raise ImageError(
            f"the DICOM pixels are compressed as {syntax.name} ({syntax}), which {what}: {REMEDY}"
        )
    return "pylibjpeg"


def _require_all_pixels(header: FileDataset) -> None:
    """Compare the bytes of uncompressed pixels with what the header states, before decoding."""
    rows, columns = int(header.Rows), int(header.Columns)
    expected = rows * columns * int(header.BitsAllocated) // 8
    found = len(header.PixelData or b"")
    if found < expected:
        raise ImageError(
            f"the DICOM file is truncated: {columns} x {rows} pixels take {expected:,} bytes, and "
            f"it holds {found:,}"
        )
    if found >= 2 * expected:
        raise ImageError(
            f"the DICOM file holds {found:,} bytes of pixels, and {columns} x {rows} take "
            f"{expected:,}: it holds several pictures, or other ones than its header states"
        )


def _require_whole_frame(header: FileDataset, syntax: Any) -> None:
    """Compare the compressed picture with the header, before anything is allocated for it."""
    from pydicom.encaps import get_frame

    rows, columns = int(header.Rows), int(header.Columns)
    frame = get_frame(header.PixelData, 0, number_of_frames=1)
    per_byte = _MAX_PIXELS_PER_BYTE_RLE if syntax == _RLE else _MAX_PIXELS_PER_BYTE
    if rows * columns > per_byte * len(frame):
        raise ImageError(
            f"the DICOM header states {columns} x {rows} pixels, more than the {len(frame):,} "
            "compressed bytes can hold"
        )
    if syntax == _RLE:
        return
    size = codestream_size(frame)
    if size is None:
        raise ImageError(f"the DICOM pixels are not compressed as stated ({syntax.name})")
    if size[:3] != (columns, rows, 1):
        raise ImageError(
            f"the DICOM header states {columns} x {rows} pixels of one sample, its compressed "
            f"pixels {size[0]} x {size[1]} of {size[2]}"
        )
    if b"\xff\xd9" not in frame[-64:]:  # how JPEG, JPEG-LS and JPEG 2000 end, but for padding
        raise ImageError("the DICOM file is truncated: its compressed pixels have no end")


def codestream_size(data: bytes) -> tuple[int, int, int, int] | None:
    """Width, height, samples and bits that a JPEG, JPEG-LS or JPEG 2000 states; None if nothing.

    The bits of JPEG 2000 are those of the first sample, negative where they are signed.
    """
    start = data[:1024].find(b"\xff\x4f\xff\x51")  # of a JPEG 2000 codestream, in a JP2 or bare
    if start >= 0 and len(data) > start + 43:
        number = [
            int.from_bytes(data[at : at + 4], "big") for at in range(start + 8, start + 24, 4)
        ]
        samples, depth = int.from_bytes(data[start + 40 : start + 42], "big"), data[start + 42]
        bits = (depth & 127) + 1
        return number[0] - number[2], number[1] - number[3], samples, -bits if depth > 127 else bits
    at = 2
    while data[:2] == b"\xff\xd8" and data[at : at + 1] == b"\xff" and len(data) >= at + 10:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        # start of frame: SOF0 to SOF15 without DHT, JPG and DAC; SOF55 is JPEG-LS
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = (int.from_bytes(data[i : i + 2], "big") for i in (at + 5, at + 7))
            return width, height, data[at + 9], data[at + 4]
        at += 1 if marker == 0xFF else 2 + length
    return None


# -- values to grey levels --------------------------------------------------------------------


def _bits(header: Dataset, bits_stored: int | None) -> int:
    """Bits in use: what the header states, or fewer by the user's word about 16-bit files."""
    stated = int(header.BitsStored)
    return stated if bits_stored is None or header.BitsAllocated == 8 else min(stated, bits_stored)


def _range(header: Dataset, bits: int) -> tuple[int, int]:
    return (
        (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if header.PixelRepresentation
        else (0, 2**bits - 1)
    )


def _stored_values(header: Dataset, bits: int) -> NDArray[np.int32]:
    """The value that each pattern of the allocated bits stands for, ``(2**allocated,)``."""
    allocated = int(header.BitsAllocated)
    patterns = np.arange(2**allocated, dtype=np.int32)
    overlays = (header.get((group, 0x0102)) for group in range(0x6000, 0x6020, 2))
    if any(place is not None and place.value for place in overlays):  # drawn above the values
        patterns &= 2**bits - 1
    if header.PixelRepresentation:  # what is above the stored bits may repeat the sign, or not
        used = min(bits, allocated)
        patterns &= 2**used - 1
        patterns[patterns >= 2 ** (used - 1)] -= 2**used
    return patterns


def _has_voi(header: Dataset) -> bool:
    window = (header.get("WindowCenter"), header.get("WindowWidth"))
    return bool(header.get("VOILUTSequence")) or None not in window


def _to_grey(header: Dataset, values: NDArray[np.int32], bits: int) -> NDArray[np.float32]:
    """What pydicom makes of each value, -127.5 to 127.5, ``(2**allocated,)``."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    header.BitsStored = bits
    lowest, highest = (float(value) for value in _range(header, bits))
    if sequence := header.get("ModalityLUTSequence"):
        lowest, highest = 0.0, 2.0 ** _require_lut(sequence[0], "modality") - 1
        for name in ("RescaleSlope", "RescaleIntercept"):  # one or the other, says the standard
            header.pop(name, None)
    elif None not in (rescale := (header.get("RescaleSlope"), header.get("RescaleIntercept"))):
        slope, intercept = (float(number) for number in rescale)
        if not np.isfinite([slope, intercept]).all() or slope == 0:
            raise ImageError(
                f"the DICOM header states RescaleSlope {slope}, by which nothing shows"
            )
        lowest, highest = lowest * slope + intercept, highest * slope + intercept
    else:
        for name in ("RescaleSlope", "RescaleIntercept"):
            header.pop(name, None)
    meant = np.asarray(apply_modality_lut(values, header))
    if meant.dtype.kind == "u":
        meant = meant.astype(np.int32)  # pydicom subtracts from it
    if sequence := header.get("VOILUTSequence"):
        lowest, highest = 0.0, 2.0 ** _require_lut(sequence[0], "VOI") - 1
        # pydicom indexes tables of 8-bit numbers by 8-bit numbers, so that those of more than
        # 256 entries wrap; the entries of a table are the same in 16 bits
        sequence[0].LUTDescriptor = [*list(sequence[0].LUTDescriptor)[:2], 16]
    else:
        _require_window(header)
        if highest < lowest and not _has_voi(header):  # a negative slope; windows keep the order
            lowest, highest = highest, lowest
    shown = np.asarray(apply_voi_lut(meant, header, index=0, prefer_lut=True), np.float64)
    share = (shown - (lowest + highest) / 2) / ((highest - lowest) / 2)  # -1 to 1
    sign = -1 if header.PhotometricInterpretation == "MONOCHROME1" else 1
    return np.asarray(share.clip(-1, 1) * (sign * HALF_RANGE), np.float32)


def _require_lut(item: Dataset, kind: str) -> int:
    """The bits of a table's entries, once it is known that the table is whole."""
    descriptor, entries = item.get("LUTDescriptor"), item.get("LUTData")
    if descriptor is None or entries is None or len(descriptor) != 3:
        raise ImageError(f"the {kind} LUT of the DICOM header lacks its descriptor or its data")
    n_entries, bits = int(descriptor[0]) or 2**16, int(descriptor[2])
    n_found = len(entries) // 2 if isinstance(entries, bytes) else np.size(entries)
    if n_found < n_entries or not 8 <= bits <= 16:
        raise ImageError(
            f"the {kind} LUT of the DICOM header states {n_entries} entries of {bits} bits and "
            f"holds {n_found}"
        )
    return bits


def _require_window(header: Dataset) -> None:
    if not _has_voi(header):
        return
    for name in ("WindowCenter", "WindowWidth"):
        number = np.atleast_1d(np.asarray(header[name].value, np.float64))
        if not np.isfinite(number[0]) or (name == "WindowWidth" and number[0] <= 0):
            raise ImageError(f"the DICOM header states {name} {number[0]:g}, which shows nothing")


def _is_padding(header: Dataset, values: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which values mark pixels that lie outside the picture, ``(2**allocated,)``."""
    first = header.get("PixelPaddingValue")
    if first is None:
        return np.zeros(len(values), bool)
    last = header.get("PixelPaddingRangeLimit")
    lowest, highest = sorted((int(first), int(first if last is None else last)))
    return (values >= lowest) & (values <= highest)


def _require_in_range(
    header: Dataset,
    stored: NDArray[np.unsignedinteger[Any]],
    values: NDArray[np.int32],
    padded: NDArray[np.bool_],
    bits: int,
) -> None:
    """Raise if more than a few pixels exceed the range by which the picture is scaled.

    Markers and text that were burnt into the picture often do; they end at black or white.
    """
    lowest, highest = _range(header, bits)
    outside = ((values < lowest) | (values > highest)) & ~padded
    if not outside.any():
        return
    beyond = outside[stored]
    if (share := float(beyond.mean())) > MAX_OVERSHOOT:
        worst = int(values[stored][beyond].max())
        raise ImageError(
            f"{share:.0%} of the DICOM pixels lie outside {lowest} to {highest}, the range of the "
            f"{bits} bits stated as stored (up to {worst}), so the range is unknown"
        )
