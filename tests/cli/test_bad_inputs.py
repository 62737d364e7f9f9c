"""Bad files and tables, end to end: each kind is used or refused in a sentence, and is counted."""

from __future__ import annotations

import gzip
import json
import os
import socket
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from cxr_cache.cli.main import cli
from cxr_cache.config import ExtractConfig
from cxr_cache.datasets.images import MAX_FILE_BYTES
from cxr_cache.datasets.labels import load_labels
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import TableError
from cxr_cache.store.extract import ExtractSummary, extract_embeddings
from cxr_cache.store.feature_store import DONE, FAILED, PENDING, FeatureStore
from tests.datasets.test_images import ORIENTATION, noise, ramp16, smooth, write_png
from tests.synthetic import make_cohort, make_store

MODEL = "random:test_vit"

Make = Callable[[Path], object]
"""Puts something at the path."""

# --- images: makers ---------------------------------------------------------------------------


def content(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


def saved(image: Image.Image, **options: object) -> Make:
    return lambda path: image.save(path, **options)


def cut(make: Make, share: float) -> Make:
    """The file that `make` writes without its last bytes."""

    def write(path: Path) -> None:
        make(path)
        os.truncate(path, int(path.stat().st_size * share))

    return write


def patched_tiff(image: Image.Image, tag: int, value: int) -> Make:
    """A TIFF with another value of a tag than Pillow writes; little-endian, one short."""

    def write(path: Path) -> None:
        buffer = BytesIO()
        image.save(buffer, "TIFF")
        entry = struct.pack("<HHI", tag, 3, 1)
        data = bytearray(buffer.getvalue())
        start = data.index(entry) + len(entry)
        data[start : start + 2] = struct.pack("<H", value)
        path.write_bytes(data)

    return write


def changed_byte(path: Path) -> None:
    noise(64, 64).save(path, compress_level=0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def hundred_megapixels(path: Path) -> None:
    rows = bytes(10_000 * (1 + 10_000 // 8))
    write_png(path, size=(10_000, 10_000), depth=1, colour=0, rows=rows)
    assert path.stat().st_size < 20_000


def sixteen_bit_colours(path: Path) -> None:
    rows = b"".join(b"\0" + bytes(range(6)) * 32 for _ in range(32))
    write_png(path, size=(32, 32), depth=16, colour=2, rows=rows)


def bomb_in_a_comment(path: Path) -> None:
    """100 MB of text in 100 KB, for whoever unpacks comments on opening."""
    noise(64, 64).save(path)
    data = path.read_bytes()
    body = b"zTXtComment\0\0" + zlib.compress(bytes(100_000_000), 1)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(data[:33] + chunk + data[33:])  # behind the signature and the header


def hole(path: Path) -> None:
    path.touch()
    os.truncate(path, MAX_FILE_BYTES + 1024**2)  # takes no space


def unix_socket(path: Path) -> None:
    """Bound from the folder, since names of sockets are short."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


def link_out(path: Path) -> None:
    """To a picture that could be read."""
    path.symlink_to("../outside.png")


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    smooth(40, 60).save(path, exif=exif)


def in_subfolder(path: Path) -> None:
    path.parent.mkdir(parents=True)
    noise(64, 64).save(path)


def link_inside(path: Path) -> None:
    noise(64, 64, seed=5).save(path.with_name("target of a link"), "PNG")
    path.symlink_to("target of a link")


def zipped(data: bytes) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", data)
    return buffer.getvalue()


def nothing(_: Path) -> None:
    """No file."""


PNG = BytesIO()
noise(64, 64).save(PNG, "PNG")
COLOURS = Image.merge("RGB", [smooth(90, 70), smooth(90, 70).rotate(180), noise(90, 70)])
SEE_THROUGH = noise(64, 64, channels=4)
TWELVE_BITS = Image.fromarray(ramp16(top=4095))
LAB = Image.frombytes("LAB", (32, 32), bytes(range(256)) * 12)

# --- images: kinds ----------------------------------------------------------------------------

# The name in the table, what lies there, and a part of the reason (None: the image is used).
IMAGE_KINDS: dict[str, tuple[str, Make, str | None]] = {
    "zero bytes": ("zero.png", content(b""), "the file is empty (0 bytes)"),
    "HTML": ("html.png", content(b"<!DOCTYPE html><title>Log in"), "a web page or other markup"),
    "DICOM": ("dicom.png", content(bytes(128) + b"DICM" + bytes(50)), "a DICOM file"),
    "GIF": ("gif.gif", saved(noise(64, 64)), "but a GIF"),
    "WebP": ("webp.webp", saved(noise(64, 64)), None),
    "JPEG 2000": ("jp2.png", content(b"\0\0\0\x0cjP  \r\n\x87\n"), "a JPEG 2000 image"),
    "PDF": ("pdf.pdf", content(b"%PDF-1.7\n"), "a PDF document"),
    "zip": ("zip.png", content(zipped(PNG.getvalue())), "a zip archive"),
    "gzip": ("gzip.png", content(gzip.compress(PNG.getvalue())), "a gzip file"),
    "HDF5": ("hdf5.png", content(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
    "Git LFS pointer": (
        "lfs.png",
        content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "`git lfs pull`",
    ),
    "zeros": ("zeros.png", content(bytes(4096)), "begins with zeros, as unfinished copies do"),
    "text": ("text.png", content(b"uid,image\n1,a\n"), r"begins with 'uid,image\n1,a\n'"),
    "head of a PNG": ("head.png", content(b"\x89PNG\r\n\x1a\n"), "begins like a PNG, but"),
    "head of a JPEG": ("head.jpg", content(b"\xff\xd8\xff\xe0\0"), "begins like a JPEG, but"),
    "head of a TIFF": ("head.tif", content(b"II*\0"), "begins like a TIFF, but"),
    "head of a BMP": ("head.bmp", content(b"BM"), "begins like a BMP, but"),
    "truncated PNG": ("cut.png", cut(saved(noise(64, 64)), 0.5), "the file is truncated"),
    "truncated JPEG": ("cut.jpg", cut(saved(noise(64, 64)), 0.5), "the file is truncated"),
    "PNG with a changed byte": ("bit.png", changed_byte, "the file is damaged: "),
    "bomb in a comment": (
        "comment.png",
        bomb_in_a_comment,
        "its colour profile or texts take more than 64 MiB",
    ),
    "100 megapixels": ("100mp.png", hundred_megapixels, "(100.0 megapixels); the limit is 64"),
    "257 MiB": ("hole.png", hole, "the file has 257.0 MiB; the limit is 256 MiB"),
    "1 x 1": ("1x1.png", saved(noise(1, 1)), "has 1 x 1 pixels; a radiograph has at least 16"),
    "constant": ("grey.png", saved(Image.new("L", (64, 64), 90)), "one grey value everywhere"),
    "several frames": (
        "frames.tif",
        saved(noise(32, 32), save_all=True, append_images=[noise(32, 32, seed=1)] * 2),
        "the file holds 3 frames",
    ),
    "float TIFF": (
        "float.tif",
        saved(Image.fromarray(ramp16().astype(np.float32))),
        "32-bit floats, which have no stated range",
    ),
    "16-bit colours": ("rgb48.png", sixteen_bit_colours, "the colours have 16 bits"),
    "12-bit TIFF": ("12.tif", patched_tiff(TWELVE_BITS, 258, 12), "the TIFF has 12 bits per pixel"),
    "white is 0": ("white.tif", patched_tiff(TWELVE_BITS, 262, 0), "stores white as 0 in 16 bits"),
    "signed TIFF": ("signed.tif", saved(noise(32, 32), tiffinfo={339: 2}), "signed 8-bit pixels"),
    "negative values": (
        "negative.tif",
        saved(Image.fromarray(ramp16().astype(np.int32) - 5)),
        "the value -5, outside 0 to 65535",
    ),
    "Lab colours": ("lab.tif", saved(LAB), "a kind that is not read (Pillow's mode LAB)"),
    "folder": ("folder.png", Path.mkdir, "the path is a folder"),
    "pipe": ("pipe.png", os.mkfifo, "a pipe, socket or device"),
    "socket": ("socket.png", unix_socket, "a pipe, socket or device"),
    "link to itself": (
        "loop.png",
        lambda path: path.symlink_to(path.name),
        "a symbolic link that leads to itself",
    ),
    "link out of the folder": ("link.png", link_out, "out of the image folder, by a symbolic link"),
    "path out of the folder": ("../../etc/passwd", nothing, "the path leads out of the image"),
    "absolute path": ("/etc/passwd", nothing, "the path is absolute"),
    "missing file": ("nowhere.png", nothing, "the file does not exist"),
    "dangling link": ("gone.png", lambda p: p.symlink_to("nowhere"), "the file does not exist"),
    "too long a name": ("n" * 300 + ".png", nothing, "File name too long"),
    # These are used
    "8-bit grey": ("plain.png", saved(noise(64, 64)), None),
    "the same bytes again": ("again.png", saved(noise(64, 64)), None),
    "JPEG named .png": ("jpeg.png", saved(smooth(64, 64), format="JPEG"), None),
    "progressive JPEG": ("progressive.jpg", saved(smooth(90, 70), progressive=True), None),
    "no ending": ("noending", saved(noise(64, 64), format="PNG"), None),
    "EXIF-rotated": ("turned.jpg", turned, None),
    "RGBA with real alpha": ("alpha.png", saved(SEE_THROUGH), None),
    "grey with alpha": ("la.png", saved(noise(64, 64).convert("LA")), None),
    "palette": ("palette.png", saved(COLOURS.quantize(64)), None),
    "transparent palette": ("p7.png", saved(COLOURS.quantize(64), transparency=7), None),
    "CMYK": ("cmyk.jpg", saved(COLOURS.convert("CMYK")), None),
    "YCbCr": ("ycbcr.tif", saved(COLOURS.convert("YCbCr")), None),
    "1-bit": ("bits.png", saved(noise(64, 64).convert("1")), None),
    "16-bit grey": ("16.png", saved(Image.fromarray(ramp16())), None),
    "12 of 16 bits used": ("12of16.png", saved(TWELVE_BITS), None),
    "32-bit integers": ("int32.tif", saved(Image.fromarray(ramp16().astype(np.int32))), None),
    "compressed TIFF": ("lzw.tif", saved(noise(64, 64), compression="tiff_lzw"), None),
    "BMP": ("bmp.bmp", saved(noise(64, 64)), None),
    "colour photograph": ("photo.jpg", saved(COLOURS), None),
    "colour profile": ("profile.png", saved(COLOURS, icc_profile=b"not a profile"), None),
    "subfolder": ("p1/s1/a.png", in_subfolder, None),
    "name with letters of its own": ("Brust röntgen 胸.png", saved(noise(64, 64)), None),
    "link inside the folder": ("inside.png", link_inside, None),
}
if os.geteuid() != 0:  # who may read everything
    IMAGE_KINDS["unreadable"] = (
        "secret.png",
        lambda path: (path.touch(), path.chmod(0)),
        "permission to read the file is denied",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One of each kind, and the two tables that name them."""
    folder = tmp_path_factory.mktemp("data")
    noise(64, 64).save(folder / "outside.png")
    (folder / "images").mkdir()
    for image_id, make, _ in IMAGE_KINDS.values():
        make(folder / "images" / image_id)
    names = [image_id for image_id, _, _ in IMAGE_KINDS.values()]
    return write_tables(folder, [*names, "one more.png"])


def write_tables(folder: Path, image_ids: list[str]) -> Path:
    numbers = np.arange(len(image_ids))
    pd.DataFrame({"uid": numbers, "filename": image_ids, "projection": "Frontal"}).to_csv(
        folder / "indiana_projections.csv", index=False
    )
    pd.DataFrame({"uid": numbers, "Problems": "normal"}).to_csv(
        folder / "indiana_reports.csv", index=False
    )
    return folder


KINDS = ("--limit", len(IMAGE_KINDS))


@pytest.fixture(scope="module")
def extracted(folder) -> ExtractSummary:
    """By the library, where the last row has a name that no CSV file can hold."""
    torch.set_num_threads(1)
    cohort = load_cohort(folder)
    return extract_embeddings(
        cohort.assign(image_id=np.append(cohort.image_ids[:-1], "nul\0.png")),
        folder / "images",
        folder / "library.h5",
        load_encoder(MODEL, precision="fp32"),
        ExtractConfig(num_workers=0),
    )


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def extract(folder: Path, store: str, *options: object) -> Result:
    where = ("--csv-dir", folder, "--image-dir", folder / "images", "--store", folder / store)
    model = ("--model", MODEL, "--precision", "fp32", "--num-workers", 0)
    return invoke("extract", *where, *model, *options)


def outcome(path: Path) -> dict[str, str | None]:
    """The reason of every failed row, None for rows that are done."""
    with FeatureStore.open(path) as store:
        assert set(store.status.tolist()) <= {DONE, FAILED}
        assert not (store.embeddings[store.status == FAILED]).any(), "a stand-in"
        reasons = store.read_errors(np.arange(len(store)))
        assert [bool(reason) for reason in reasons] == (store.status == FAILED).tolist()
        return dict(zip(store.image_ids.tolist(), (r or None for r in reasons), strict=True))


def test_every_kind_of_image_is_done_or_failed_for_its_own_reason(folder, extracted):
    found = outcome(folder / "library.h5")
    assert found.pop("nul\0.png") == "the path holds characters that no file name can hold"
    assert list(found) == [image_id for image_id, _, _ in IMAGE_KINDS.values()]
    for kind, (image_id, _, reason) in IMAGE_KINDS.items():
        if reason is None:
            assert found[image_id] is None, f"{kind}: {found[image_id]}"
        else:
            assert reason in (found[image_id] or "it was used"), f"{kind}: {found[image_id]}"
            assert "\n" not in found[image_id]

    n_used = sum(reason is None for _, _, reason in IMAGE_KINDS.values())
    n_refused = len(IMAGE_KINDS) - n_used + 1
    total = f"{n_used + n_refused} images = {n_used} done + {n_refused} failed + 0 pending"
    assert total in extracted.to_text()
    assert dict(extracted.failures) == {k: v for k, v in found.items() if v} | {
        "nul\0.png": "the path holds characters that no file name can hold"
    }


def test_the_command_prints_the_same_count_and_reasons(folder, extracted):
    result = extract(folder, "command.h5", *KINDS)
    assert result.exit_code == 0, result.output  # not more than 100 have failed
    assert "Traceback" not in result.output
    found = outcome(folder / "command.h5")
    assert found == {
        key: why for key, why in outcome(folder / "library.h5").items() if key in found
    }
    counts = Counter(why is None for why in found.values())
    total = f"{len(found)} images = {counts[True]} done + {counts[False]} failed + 0 pending"
    assert total in result.output
    assert "2 failed: the file is truncated: its end is missing (first: cut.png)" in result.output


def test_the_same_bytes_under_two_names_are_two_rows(folder, extracted):
    with FeatureStore.open(folder / "library.h5") as store:
        rows = [store.image_ids.tolist().index(name) for name in ("plain.png", "again.png")]
        first, second = store.embeddings[rows]
        hashes = store.read_column("image_sha256")[rows]
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(hashes[0], hashes[1])


def test_too_many_failures_end_with_status_1_and_keep_what_is_done(folder):
    result = extract(folder, "strict.h5", *KINDS, "--max-failures", 5, "--batch-size", 8)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.output.count("Error: ") == 1
    assert "images failed, more than the 5 tolerated (--max-failures)" in result.output
    assert "zero.png: the file is empty (0 bytes)" in result.output
    with FeatureStore.open(folder / "strict.h5") as store:
        counts = Counter(store.status.tolist())
    assert counts[PENDING] > 0
    assert 5 < counts[FAILED] <= 13
    assert counts.total() == len(IMAGE_KINDS)

    assert extract(folder, "strict.h5", *KINDS).exit_code == 0
    assert outcome(folder / "strict.h5").keys() == {name for name, _, _ in IMAGE_KINDS.values()}


@pytest.mark.parametrize(("n_missing", "status"), [(100, 0), (101, 1)])
def test_one_hundred_failures_are_tolerated_by_default(tmp_path, n_missing, status):
    (tmp_path / "images").mkdir()
    noise(64, 64).save(tmp_path / "images" / "a.png")
    write_tables(tmp_path, ["a.png", *(f"{i}.png" for i in range(n_missing))])
    result = extract(tmp_path, "s.h5")
    assert result.exit_code == status, result.output
    with FeatureStore.open(tmp_path / "s.h5") as store:
        assert Counter(store.status.tolist()) == {DONE: 1, FAILED: n_missing}


def test_one_percent_of_many_rows_is_tolerated():
    config = ExtractConfig()
    assert [config.tolerated_failures(n) for n in (1, 10_000, 20_000)] == [100, 100, 200]


def test_a_name_that_is_not_utf_8_is_refused_before_extraction(tmp_path):
    """As Python lists it from the folder; the store's text could not hold it."""
    cohort = make_cohort(1)
    ids = np.array(["0.png", os.fsdecode(b"r\xf6ntgen.png")])
    with pytest.raises(TableError, match=r"'r\\udcf6ntgen\.png' has a name that is not UTF-8"):
        cohort.assign(image_id=ids)


def test_a_folder_with_such_a_name_is_refused_too(tmp_path):
    """Also where pandas keeps text in Arrow, which cannot hold it."""
    for name in (b"a.png", b"r\xf6ntgen.png"):
        noise(64, 64).save(tmp_path / os.fsdecode(name))
    result = CliRunner().invoke(cli, ["describe", "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "has a name that is not UTF-8" in result.output


# --- tables -----------------------------------------------------------------------------------

REPORTS = "uid,Problems\n00012,normal\nNA,Cardiomegaly\n"
IMAGES = "uid,filename,projection\n00012,00012.png,Frontal\nNA,NA.png,Lateral\nNA,2.png,\n"
LABELS = "image_id,Edema\n00000.png,1\n00001.png,0\n"


def latin_1(text: str) -> bytes:
    return text.replace("normal", "normal;épaisseur").encode("latin-1")


# Which file (reports, images: of `describe`; labels: of `train`), its content, and a part of the
# message (None: read as if nothing were odd).
TABLE_KINDS: dict[str, tuple[str, str | bytes, str | None]] = {
    # These are read
    "plain; ids NA and 00012": ("images", IMAGES, None),
    "byte-order mark": ("images", IMAGES.encode("utf-8-sig"), None),
    "UTF-16": ("images", IMAGES.encode("utf-16"), None),
    "Latin-1": ("reports", latin_1(REPORTS), None),
    "semicolons": ("images", IMAGES.replace(",", ";"), None),
    "tabs": ("reports", REPORTS.replace(",", "\t"), None),
    "Windows line ends": ("images", IMAGES.replace("\n", "\r\n"), None),
    "old Macintosh line ends": ("images", IMAGES.replace("\n", "\r"), None),
    "blank lines": ("images", IMAGES.replace("\n", "\n\n"), None),
    "row numbers": ("reports", ",uid,Problems\n0,00012,normal\n1,NA,Cardiomegaly\n", None),
    "any case and space": ("images", IMAGES.replace("Frontal", " FRONTAL "), None),
    "1, 0, -1, blank, 1.0": (
        "labels",
        "image_id,Edema\n00000.png,1\n00001.png,0\n00002.png,-1\n00003.png,\n00004.png,1.0\n",
        None,
    ),
    "one column of findings": ("labels", "filename,label\n00000.png, edema ;NODULE\n", None),
    # These are refused
    "missing file": ("labels", "", "cannot be read: No such file"),  # deleted below
    "empty file": ("images", b"", "is empty"),
    "only a header": ("labels", "image_id,Edema\n", "has a header (image_id, Edema) but no rows"),
    "an extra field on every row": (
        "images",
        IMAGES.replace(".png,", ".png,x,"),
        "line 2: 4 fields, but the header names 3 (uid, filename, projection)",
    ),
    "a long row": ("reports", REPORTS + "3,a,b\n", "line 4: 3 fields, but the header names 2"),
    "a short row": ("reports", REPORTS + "3\n", "line 4: 1 fields, but the header names 2"),
    "unclosed quote": ("reports", REPORTS + '3,"normal\n', "begins on line 4 is not closed"),
    "quote closed too early": ("labels", 'image_id,Edema\n"a"b,1\n', "line 2 is not closed, or"),
    "duplicate columns": ("labels", "image_id,Edema,Edema\na,1,0\n", "columns are named 'Edema'"),
    "column without a name": ("labels", "image_id,,Edema\na,1,0\n", "a column has no name"),
    "missing column": ("images", IMAGES.replace("projection", "view"), "no column 'projection'"),
    "misspelt column": (
        "images",
        IMAGES.replace("filename", "file_name"),
        "'file_name' be renamed",
    ),
    "no labels": ("reports", "uid,text\n00012,a\nNA,b\n", "no column 'Problems'"),
    "no image_id": ("labels", "picture,Edema\n00000.png,1\n", "has no column 'image_id'"),
    "UTF-16 without a mark": ("images", IMAGES.encode("utf-16-le"), "it holds NUL bytes"),
    "NUL in UTF-16": ("images", IMAGES.replace("NA.", "\0").encode("utf-16"), "NUL characters"),
    "no encoding at all": ("reports", REPORTS.encode() + b"3,\x81\n", "line 4: byte 0x81 belongs"),
    "blank uid": ("images", IMAGES + ",4.png,Frontal\n", "line 5: uid is blank"),
    "blank filename": ("images", IMAGES + "NA,,Frontal\n", "line 5: filename is blank"),
    "the same image twice": ("images", IMAGES + "NA,2.png,\n", "on line 4 and on line 5"),
    "the same report twice": ("reports", REPORTS + "NA,normal\n", "on line 3 and on line 4"),
    "the same label twice": ("labels", LABELS + "00000.png,0\n", "is on line 2 and on line 4"),
    "unknown projection": (
        "images",
        IMAGES + "NA,4.png,AP\n",
        "line 5: projection 'AP' is neither",
    ),
    "other reports": ("reports", "uid,Problems\n12,normal\n", "no uid of indiana_projections.csv"),
    "one study, two patients": (
        "images",
        "uid,filename,projection,patient_id\nNA,1.png,Frontal,p1\nNA,2.png,Lateral,p2\n",
        "study 'NA' belongs to patient 'p1' and to patient 'p2'",
    ),
    "label 2": ("labels", LABELS + "00002.png,2\n", "line 4: column 'Edema' holds '2'"),
    "label yes": ("labels", LABELS + "00002.png,yes\n", "column 'Edema' holds 'yes'"),
    "label NaN": ("labels", LABELS + "00002.png,nan\n", None),
    "a probability": ("labels", LABELS + "00002.png,0.5\n", "column 'Edema' holds '0.5'"),
    "decimal comma": ("labels", LABELS + '00002.png,"1,0"\n', "column 'Edema' holds '1,0'"),
    "unknown finding": (
        "labels",
        "image_id,label\n00000.png,Edema\n00001.png,Edema;Cardiomegly\n",
        "line 3: unknown finding 'cardiomegly' (did you mean 'Cardiomegaly'?)",
    ),
    "finding like no other": (
        "labels",
        "image_id,label\na,xyzzy\n",
        "line 2: unknown finding 'xyz",
    ),
    "no finding": ("labels", "image_id,patient_id\n00000.png,1\n", "has no finding: its columns"),
    "other images": ("labels", "image_id,Edema\nImages/0.PNG,1\n", "names none of the 40 images"),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "s.h5", make_cohort(20))


def write_kind(folder: Path, kind: str) -> Path:
    """The two tables of a data set and one of labels, of which one is odd."""
    which, text, _ = TABLE_KINDS[kind]
    paths = {
        "reports": folder / "indiana_reports.csv",
        "images": folder / "indiana_projections.csv",
        "labels": folder / "labels.csv",
    }
    for name, plain in (("reports", REPORTS), ("images", IMAGES), ("labels", LABELS)):
        paths[name].write_text(plain)
    paths[which].write_bytes(text if isinstance(text, bytes) else text.encode())
    if kind == "missing file":
        paths[which].unlink()
    return paths[which]


@pytest.mark.parametrize("kind", [kind for kind, (*_, why) in TABLE_KINDS.items() if why])
def test_a_broken_table_is_refused_in_one_message(tmp_path, store, kind):
    path = write_kind(tmp_path, kind)
    which, _, message = TABLE_KINDS[kind]
    if which == "labels":
        result = invoke("train", store, "--run-dir", tmp_path / "run", "--labels", path)
    else:
        result = invoke("describe", "--csv-dir", tmp_path)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), "a traceback instead of a message"
    assert result.output.count("Error: ") == 1
    assert message in result.output
    assert path.name in result.output or kind == "one study, two patients"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [kind for kind, (*_, why) in TABLE_KINDS.items() if not why])
def test_an_odd_table_is_read_as_what_it_says(tmp_path, kind):
    path = write_kind(tmp_path, kind)
    if TABLE_KINDS[kind][0] == "labels":
        findings, targets = load_labels(path, make_cohort(3).image_ids)
        edema = targets[:, findings.index("Edema")].tolist()
        nan = np.nan
        expected = [1, 0, nan, nan, 1, nan] if "1.0" in kind else [1, nan, nan, nan, nan, nan]
        if kind == "label NaN":
            expected = [1, 0, nan, nan, nan, nan]
        np.testing.assert_array_equal(edema, expected)
        return
    (tmp_path / "images").mkdir()
    for name in ("00012.png", "NA.png"):
        (tmp_path / "images" / name).touch()
    result = invoke("describe", "--csv-dir", tmp_path, "--image-dir", tmp_path / "images", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    counts = {entry["finding"]: entry["images"] for entry in found["findings"] if entry["images"]}
    assert (found["images"], found["studies"], found["missing_files"]) == (3, 2, 1)
    assert found["projections"] == {"Frontal": 1, "Lateral": 1, "": 1}
    assert counts == {"Cardiomegaly": 2, "Normal": 1}


# --- how many ---------------------------------------------------------------------------------


SAME_SENTENCE = {
    "truncated JPEG", "socket", "dangling link", "a long row", "a short row", "misspelt column",
    "quote closed too early", "no labels", "no image_id", "blank filename", "label yes",
    "a probability", "decimal comma", "the same report twice", "the same label twice",
}  # fmt: skip
"""Refused in the words of another kind, at most with another name or number; they do not count."""


def refusal(folder: Path, kind: str) -> str:
    """What the library says about a kind of table, without the folder."""
    path = write_kind(folder, kind)
    ids = make_cohort(20).image_ids
    with pytest.raises(TableError) as caught:
        load_labels(path, ids) if path.name == "labels.csv" else load_cohort(folder)
    return str(caught.value).replace(str(folder), "")


def test_at_least_60_kinds_are_refused_each_in_its_own_words(folder, extracted, tmp_path):
    """Issue 3, "How it is judged"."""
    found = outcome(folder / "library.h5")
    sentences = [
        found[image_id]
        for kind, (image_id, _, reason) in IMAGE_KINDS.items()
        if reason and kind not in SAME_SENTENCE
    ]
    sentences += [
        refusal(tmp_path, kind)
        for kind, (_, _, message) in TABLE_KINDS.items()
        if message and kind not in SAME_SENTENCE
    ]
    assert not SAME_SENTENCE - (IMAGE_KINDS.keys() | TABLE_KINDS.keys())
    assert len(set(sentences)) == len(sentences)
    assert len(sentences) >= 60
    assert len(IMAGE_KINDS) + len(TABLE_KINDS) >= 100
