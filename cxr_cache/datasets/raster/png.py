"""PNG files, by kornia-rs where it is installed: the same values as Pillow's in half the time.

A PNG is lossless, so there is one right answer, and whatever this decoder refuses is left to
Pillow, whose words for what is wrong with a file are the ones that a user reads. It refuses less
than Pillow in one point: the sum over the pixels that the compressed stream ends with is not
compared. A damaged file is found before, by the checksums over all that is compressed.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_DECODERS: Final = {
    (8, 0): ("decode_image_png_u8", "mono"),
    (16, 0): ("decode_image_png_u16", "mono"),
    (8, 2): ("decode_image_png_u8", "rgb"),
    (8, 6): ("decode_image_png_u8", "rgba"),
}
"""kornia-rs's function and its mode, by bits and colour type."""

# Chunks from which Pillow takes nothing that changes a pixel; transparency, EXIF and frames do.
_PLAIN: Final = {b"IHDR", b"IDAT", b"IEND", b"tIME", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"bKGD"}
_MAX_TEXT_BYTES: Final = 1024

_thread: Final = threading.local()


def leave_to_pillow() -> None:
    """Have this thread decode by Pillow alone, as threads should that decode side by side.

    kornia-rs holds the interpreter's lock while it decodes, so that they would take turns.
    """
    _thread.leaves = True


def decode_png(data: bytes) -> Image.Image | None:
    """Decode a plain PNG, whose checksums have been compared.

    Parameters
    ----------
    data
        The whole file; of other formats, too.

    Returns
    -------
    Image.Image or None
        In Pillow's mode L, I;16, RGB or RGBA. None where Pillow has to decode: kornia-rs is not
        installed or refuses the file, it is no PNG, or one of another kind of colours, of
        interlaced rows, or with chunks that may matter.
    """
    if getattr(_thread, "leaves", False):
        return None
    decoder = _DECODERS.get((data[24], data[25])) if data.startswith(b"\x89PNG") else None
    kornia = _import_kornia() if decoder and data[28] == 0 else None
    if decoder is None or kornia is None or not _is_plain(data):
        return None
    name, mode = decoder
    size = int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")  # height first
    decode: Callable[..., Any] = getattr(kornia, name)
    with contextlib.suppress(Exception):  # of no kind of its own; Pillow tells what is wrong
        values: NDArray[Any] = np.asarray(decode(data, size, mode))  # (H, W, C)
        return Image.fromarray(values[..., 0] if mode == "mono" else values)
    return None


@functools.cache
def _import_kornia() -> Any:
    """kornia-rs's functions for files; None without it, or where its version has other names."""
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kornia_rs import io

        return io if all(hasattr(io, name) for name, _ in _DECODERS.values()) else None
    return None


def _is_plain(data: bytes) -> bool:
    """Whether the file holds pixels and short texts, none of them about the camera."""
    return all(
        kind in _PLAIN
        or (kind == b"tEXt" and len(text) <= _MAX_TEXT_BYTES and not _may_turn(text.lower()))
        for kind, text in _chunks(data)
    )


def _may_turn(text: bytes) -> bool:
    """EXIF and XMP, which state how the camera was held, have the one or the other as a name."""
    return b"exif" in text or b"xmp" in text or b"profile" in text


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind of each chunk, and the content of those that hold text."""
    at = 8
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        yield kind, data[at + 8 : at + 8 + length] if kind == b"tEXt" else b""
        at += 12 + length
