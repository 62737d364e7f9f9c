"""Images per second on one core, from the bytes of a file to pixels, per format and library.

    python scripts/bench_decode.py [--images FOLDER] [--rounds 7] [--out FILE]

Three kinds of rows, in turns in one run. **Decoding alone**, by Pillow and by the libraries that
are installed (torchvision, OpenCV, imagecodecs, simplejpeg, kornia-rs; pylibjpeg for DICOM), with
the largest difference to the first row's pixels. **From bytes to 224 pixels**: `decode_image` as it
is, without kornia-rs, and with Pillow's own resizing as well, which is how version 0.1.0 did it;
these three are compared, too. **Floor**: what no decoder of a PNG can do without, inflating, by
zlib and by libdeflate where that is installed.

The files are made of `--images`, a folder of radiographs, or else of phantoms: enlarged, with
grain, to the sizes that data sets have. Files of 1,024 pixels are taken as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import time
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from benchmarking import describe_machine, format_table, results_path, write_json
from numpy.typing import NDArray
from PIL import Image

from cxr_cache.datasets import images
from cxr_cache.datasets.images import decode_image
from cxr_cache.datasets.phantoms.dataset import draw_phantom
from cxr_cache.datasets.preprocessing import Preprocessing
from cxr_cache.datasets.raster import shrink

SMALL_PX, FULL_SIZE, JPEG_SIZE = 1024, (2000, 2500), (2500, 3000)  # width, height
GRAIN = 0.9
"""Standard deviation in grey levels: full-size files of about 2 MB, as Indiana's are."""
RULE = Preprocessing(224, (0, 0, 0), (1, 1, 1), "bicubic", "crop")

Way = Callable[[bytes], Any]


def make_files(folder: Path | None, n_images: int) -> dict[str, list[bytes]]:
    """Files of each kind, by what they are called in the table."""
    kinds = ("PNG 1,024", "PNG 2,000 x 2,500", "JPEG 2,500 x 3,000", "PNG 16 bits, 2,000 x 2,500")
    files: dict[str, list[bytes]] = {kind: [] for kind in kinds}
    with contextlib.suppress(ImportError):
        importlib.import_module("openjpeg")
        files["DICOM JPEG 2000, 2,000 x 2,500"] = []
    for i, (small, picture) in enumerate(_pictures(folder, n_images)):
        rng = np.random.default_rng(i)
        full = _enlarge(picture, FULL_SIZE, rng)
        made = [
            small,
            _save(np.rint(full).astype(np.uint8), "PNG"),
            _save(np.rint(_enlarge(picture, JPEG_SIZE, rng)).astype(np.uint8), "JPEG", quality=90),
            _save(np.rint(full * 257).astype(np.uint16), "PNG"),
        ]
        if len(files) > len(made):
            made.append(_to_dicom(np.rint(full * (4095 / 255)).astype(np.uint16)))
        for kind, data in zip(files, made, strict=True):
            files[kind].append(data)
    return files


def _pictures(folder: Path | None, n_images: int) -> Iterator[tuple[bytes, Image.Image]]:
    """A PNG file of about 1,024 pixels, and its picture."""
    if folder is not None:
        for path in sorted(folder.glob("*.png"))[:n_images]:
            yield path.read_bytes(), Image.open(path).convert("L")
        return
    for i in range(n_images):
        drawn, _ = draw_phantom([], "Frontal", np.random.default_rng(i), SMALL_PX)
        yield _save(drawn, "PNG"), Image.fromarray(drawn)


def _enlarge(
    picture: Image.Image, size: tuple[int, int], rng: np.random.Generator
) -> NDArray[np.float64]:
    values = np.asarray(picture.resize(size, Image.Resampling.BICUBIC), np.float64)
    return (values + rng.normal(0, GRAIN, values.shape)).clip(0, 255)


def _save(values: NDArray[Any], kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    return buffer.getvalue()


def _to_dicom(values: NDArray[np.uint16]) -> bytes:
    """A radiograph of 12 bits, without loss."""
    from openjpeg.utils import encode_array
    from pydicom import Dataset, FileMetaDataset, dcmwrite
    from pydicom.encaps import encapsulate
    from pydicom.uid import DigitalXRayImageStorageForPresentation, JPEG2000Lossless, generate_uid

    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = JPEG2000Lossless
    header.SOPClassUID = DigitalXRayImageStorageForPresentation
    header.SOPInstanceUID = generate_uid()
    header.Rows, header.Columns = values.shape
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 12, 11
    header.SamplesPerPixel, header.PixelRepresentation = 1, 0
    header.PhotometricInterpretation = "MONOCHROME2"
    frame = encode_array(values, bits_stored=12, photometric_interpretation=2)
    header.PixelData = encapsulate([bytes(frame)])
    buffer = BytesIO()
    dcmwrite(buffer, header, enforce_file_format=True)
    return buffer.getvalue()


# -- the ways ----------------------------------------------------------------------------------


def decoders(kind: str) -> dict[str, Way]:
    """Decoders of a kind of file that are installed, the one to compare with first."""
    found: dict[str, Way] = {}
    candidates = _DICOM if kind.startswith("DICOM") else _JPEG if "JPEG" in kind else _PNG
    for name, (module, make) in candidates.items():
        with contextlib.suppress(ImportError):
            found[name] = make(importlib.import_module(module))
    return found


def _by_pillow(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    image.load()
    return image


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _by_kornia(module: Any) -> Way:
    def decode(data: bytes) -> Any:
        size = int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
        name = "decode_image_png_u16" if data[24] == 16 else "decode_image_png_u8"
        return getattr(module, name)(data, size, "mono")

    return decode


def _by_opencv(module: Any) -> Way:
    module.setNumThreads(1)
    return lambda data: module.imdecode(np.frombuffer(data, np.uint8), module.IMREAD_UNCHANGED)


def _by_pydicom(module: Any) -> Way:
    return lambda data: module.pixel_array(BytesIO(data), raw=True, decoding_plugin="pylibjpeg")


def _frame(data: bytes) -> bytes:
    return data[data.index(b"\xff\x4f\xff\x51") :]


_PNG: dict[str, tuple[str, Callable[[Any], Way]]] = {
    "Pillow": ("PIL", lambda _: _by_pillow),
    "torchvision": ("torchvision.io", lambda io: lambda data: io.decode_png(_as_tensor(data))),
    "OpenCV": ("cv2", _by_opencv),
    "imagecodecs": ("imagecodecs", lambda module: module.png_decode),
    "kornia-rs": ("kornia_rs.io", _by_kornia),
}
_JPEG: dict[str, tuple[str, Callable[[Any], Way]]] = {
    "Pillow": ("PIL", lambda _: _by_pillow),
    "torchvision": ("torchvision.io", lambda io: lambda data: io.decode_jpeg(_as_tensor(data))),
    "OpenCV": ("cv2", _by_opencv),
    "imagecodecs": ("imagecodecs", lambda module: module.jpeg8_decode),
    "simplejpeg": (
        "simplejpeg",
        lambda module: lambda data: module.decode_jpeg(data, colorspace="GRAY"),
    ),
}
_DICOM: dict[str, tuple[str, Callable[[Any], Way]]] = {
    "pylibjpeg": ("pydicom.pixels", _by_pydicom),
    "OpenCV": ("cv2", lambda cv2: lambda data: _by_opencv(cv2)(_frame(data))),
    "imagecodecs": (
        "imagecodecs",
        lambda module: lambda data: module.jpeg2k_decode(_frame(data)),
    ),
}


def whole_ways() -> dict[str, Way]:
    """From bytes to the encoder's pixels: as before, without the extra, and as it is."""

    def decode(data: bytes) -> NDArray[np.uint8]:
        return decode_image(data, RULE).pixels

    def by_pillow_alone(data: bytes) -> NDArray[np.uint8]:
        with mock.patch.object(shrink, "_MIN_RATIO", np.inf):
            return without_extra(data)

    def without_extra(data: bytes) -> NDArray[np.uint8]:
        with mock.patch.object(images, "decode_png", return_value=None):
            return decode(data)

    return {
        "to 224: before": by_pillow_alone,
        "to 224: without the extra": without_extra,
        "to 224: as it is": decode,
    }


def torchvision_way() -> dict[str, Way]:
    """Pillow's pixels by torchvision's resizing of bytes, which rounds in other places."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    def decode(data: bytes) -> NDArray[np.uint8]:
        values = torch.from_numpy(np.array(_by_pillow(data)))[None]
        height, width = values.shape[1:]
        target = 224 * max(height, width) // min(height, width)
        size = [target, 224] if height > width else [224, target]
        bicubic = InterpolationMode.BICUBIC
        resized = functional.resize(values, size, interpolation=bicubic, antialias=True)
        cut: NDArray[np.uint8] = functional.center_crop(resized, [224, 224]).numpy()
        return np.repeat(cut, 3, axis=0)

    return {"to 224: Pillow, torchvision's resize": decode}


def floors(kind: str) -> dict[str, Way]:
    """Inflating a PNG's pixels, which are then still row filters away from values."""
    if not kind.startswith("PNG"):
        return {}
    ways: dict[str, Way] = {"floor: zlib": lambda data: zlib.decompress(_stream(data))}
    with contextlib.suppress(ImportError):
        deflate: Any = importlib.import_module("deflate")
        ways["floor: libdeflate"] = lambda data: deflate.zlib_decompress(
            _stream(data), 2 * 2501 * 2501
        )
    return ways


def _stream(data: bytes) -> bytes:
    pieces, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT":
            pieces.append(data[at + 8 : at + 8 + length])
        at += 12 + length
    return b"".join(pieces)


# -- measuring ---------------------------------------------------------------------------------


def measure(ways: dict[str, Way], files: list[bytes], n_rounds: int) -> dict[str, float]:
    """Milliseconds per image: the median over rounds, in each of which every way has its turn."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(n_rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            for data in files:
                way(data)
            taken[name].append(time.perf_counter() - start)
    return {name: 1000 * median(times[1:]) / len(files) for name, times in taken.items()}


def largest_difference(way: Way, first: Way, files: list[bytes]) -> int:
    """In grey levels, over all pixels of all files."""
    return max(
        int(np.abs(_values(way(data)) - _values(first(data))).max(initial=0)) for data in files
    )


def _values(decoded: Any) -> NDArray[np.int64]:
    return np.asarray(decoded).squeeze().astype(np.int64)


def measure_kind(kind: str, files: list[bytes], n_rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds, images per second and difference of every way for one kind of file."""
    alone, whole = decoders(kind), whole_ways()
    whole |= torchvision_way() if kind in ("PNG 1,024", "PNG 2,000 x 2,500") else {}
    results: dict[str, dict[str, float]] = {}
    for ways in (alone, whole, floors(kind)):
        for name, ms in measure(ways, files, n_rounds).items():
            results[name] = {"ms": ms, "images_per_s": 1000 / ms}
            if ways in (alone, whole):
                first = next(iter(ways.values()))
                results[name]["difference"] = largest_difference(ways[name], first, files)
    return results


def main() -> None:
    """Measure, print, and write the figures down."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--images", type=Path, help="folder of PNG files of about 1,024 pixels")
    parser.add_argument("--n-images", type=int, default=4, help="files of each kind")
    parser.add_argument("--rounds", type=int, default=7, help="turns that count")
    parser.add_argument("--out", type=Path, default=results_path("decode"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, rows = {}, [["", "ms", "images/s", "largest difference"]]
    for kind, files in make_files(options.images, options.n_images).items():
        mb = sum(map(len, files)) / len(files) / 1e6
        results[kind] = measure_kind(kind, files, options.rounds)
        rows.append([f"{kind}, {mb:.1f} MB", "", "", ""])
        for name, result in results[kind].items():
            difference = result.get("difference")
            seen = "" if difference is None else f"{difference:.0f}"
            rows.append([f"  {name}", f"{result['ms']:.1f}", f"{result['images_per_s']:.0f}", seen])
    print(format_table(rows))
    write_json(options.out, {"machine": describe_machine(), "results": results})


if __name__ == "__main__":
    main()
