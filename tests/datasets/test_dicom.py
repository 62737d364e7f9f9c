"""DICOM pixels: against pydicom's own functions, and every reason for which a file is refused."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", minversion="3")

from pydicom.pixels import apply_modality_lut, apply_voi_lut  # noqa: E402
from pydicom.uid import (  # noqa: E402
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from cxr_cache.datasets.dicom.pixels import decode_dicom  # noqa: E402
from cxr_cache.datasets.images import decode_picture, read_image  # noqa: E402
from cxr_cache.datasets.preprocessing import Preprocessing  # noqa: E402
from cxr_cache.errors import ImageError  # noqa: E402
from tests.datasets.dicoms import dicom, lut, make_header, to_bytes  # noqa: E402

PYDICOMS_FILES = sorted(
    path
    for path in (Path(pydicom.__file__).parent / "data").rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc", ".json")
)


def read(data: bytes, bits_stored: int | None = None) -> np.ndarray:
    """Grey levels 0..255, not rounded."""
    return decode_dicom(data, bits_stored, lambda size: None) + np.float32(127.5)


def ramp(top: int = 4095, dtype: str = "uint16", bottom: int = 0) -> np.ndarray:
    return np.linspace(bottom, top, 64 * 48).round().astype(dtype).reshape(48, 64)


def by_pydicom(data: bytes, lowest: float, highest: float) -> np.ndarray:
    """The same steps on the pixels themselves, scaled over the range that the case states."""
    header = pydicom.dcmread(BytesIO(data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a VOI LUT on rescaled, whole numbers
        shown = apply_voi_lut(apply_modality_lut(header.pixel_array, header), header, index=0)
    share = ((shown.astype(float) - lowest) / (highest - lowest)).clip(0, 1)
    return 255 * (1 - share if header.PhotometricInterpretation == "MONOCHROME1" else share)


WINDOW = {"WindowCenter": 2000, "WindowWidth": 1500}
RESCALE = {"RescaleSlope": 0.5, "RescaleIntercept": -100}
CURVE = (np.linspace(0, 1, 4096) ** 2 * 65535).round()

# Header fields, and the range of what they can show.
CASES = {
    "nothing": ({}, 0, 4095),
    "a window": (WINDOW, 0, 4095),
    "two windows": ({"WindowCenter": [2000, 9], "WindowWidth": [1500, 3]}, 0, 4095),
    "an exact window": (WINDOW | {"VOILUTFunction": "LINEAR_EXACT"}, 0, 4095),
    "a sigmoid": (WINDOW | {"VOILUTFunction": "SIGMOID"}, 0, 4095),
    "a rescale": (RESCALE, -100, 4095 / 2 - 100),
    "a rescale and a window": (RESCALE | {"WindowCenter": 700, "WindowWidth": 900}, -100, 1947.5),
    "a modality LUT": ({"ModalityLUTSequence": lut(CURVE)}, 0, 65535),
    "a modality LUT and a window": (
        {"ModalityLUTSequence": lut(CURVE), "WindowCenter": 30000, "WindowWidth": 40000},
        0,
        65535,
    ),
    "a VOI LUT": ({"VOILUTSequence": lut(CURVE // 16, bits=12)}, 0, 4095),
    "a short VOI LUT": ({"VOILUTSequence": lut(range(0, 1000, 4), first=1000, bits=10)}, 0, 1023),
    "a VOI LUT, preferred to a window": (
        {"VOILUTSequence": lut(CURVE)} | WINDOW,
        0,
        65535,
    ),
    "a rescale and a VOI LUT": (
        {"RescaleSlope": 1, "RescaleIntercept": -500, "VOILUTSequence": lut(CURVE, first=-200)},
        0,
        65535,
    ),
    "a blank window": ({"WindowCenter": None, "WindowWidth": None}, 0, 4095),
}


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("case", CASES)
def test_grey_levels_equal_pydicoms_functions(case, interpretation):
    fields, lowest, highest = CASES[case]
    data = dicom(ramp(), BitsStored=12, PhotometricInterpretation=interpretation, **fields)
    grey = read(data)
    assert grey.dtype == np.float32
    np.testing.assert_allclose(grey, by_pydicom(data, lowest, highest), atol=1e-4)
    assert np.ptp(grey) > 60, "a case that shows something"


@pytest.mark.parametrize("fields", [{}, WINDOW, RESCALE, WINDOW | RESCALE], ids=str)
def test_a_monochrome1_twin_of_inverted_values_gives_the_same_pixels(fields):
    """Only where what is done to the values is symmetric; a window is turned with them."""
    twin = dict(fields)
    if "WindowCenter" in fields:
        slope, intercept = fields.get("RescaleSlope", 1), fields.get("RescaleIntercept", 0)
        # the centre of LINEAR lies half a value lower
        twin["WindowCenter"] = 4095 * slope + 2 * intercept - fields["WindowCenter"] + 1
    values = ramp()
    straight = read(dicom(values, BitsStored=12, **fields))
    inverted = read(
        dicom(4095 - values, BitsStored=12, PhotometricInterpretation="MONOCHROME1", **twin)
    )
    np.testing.assert_allclose(inverted, straight, atol=1e-3)


def test_the_inversion_follows_the_window_and_not_the_other_way_round():
    """A window over the bright end shows the dark end of a MONOCHROME1 picture as white."""
    fields = {"WindowCenter": 3900, "WindowWidth": 100, "BitsStored": 12}
    grey = read(dicom(ramp(), PhotometricInterpretation="MONOCHROME1", **fields))
    assert grey[0, 0] == 255
    assert grey[-1, -1] == 0


def test_a_real_radiograph_and_its_monochrome1_copy_are_exact_inverses(shared_data):
    folder = shared_data / "dicom"
    if not folder.is_dir():
        pytest.skip("no DICOM among the real data")
    one, two = sorted(folder.glob("*.dcm"))
    straight, inverse = (decode_picture(path.read_bytes()) for path in (one, two))
    assert straight.shape == (1024, 1024)
    assert np.ptp(straight) > 200
    np.testing.assert_array_equal(straight, pydicom.dcmread(one).pixel_array)
    np.testing.assert_array_equal(inverse, 255 - straight)
    prep = Preprocessing(224, (0.5,) * 3, (0.5,) * 3, "bicubic", "crop")
    pixels = [read_image(folder, path.name, prep).pixels for path in (one, two)]
    np.testing.assert_array_equal(pixels[1], 255 - pixels[0])


def test_a_negative_slope_shows_small_values_bright():
    grey = read(dicom(ramp(), BitsStored=12, RescaleSlope=-1, RescaleIntercept=4095))
    np.testing.assert_allclose(grey, 255 - ramp() * (255 / 4095), atol=1e-3)


def test_a_window_after_a_negative_slope_shows_large_results_bright():
    fields = {"RescaleSlope": -1, "RescaleIntercept": 4095, "WindowCenter": 1000, "WindowWidth": 9}
    grey = read(dicom(ramp(), BitsStored=12, **fields))
    assert grey[0, 0] == 255, "the value 0 becomes 4095"
    assert grey[-1, -1] == 0


def test_the_scale_does_not_depend_on_the_brightest_pixel():
    dark, bright = read(dicom(ramp(1000), BitsStored=12)), read(dicom(ramp(4000), BitsStored=12))
    assert dark.max() == pytest.approx(1000 / 4095 * 255)
    assert bright.max() == pytest.approx(4000 / 4095 * 255)


def test_signed_values_are_scaled_over_the_signed_range():
    grey = read(dicom(ramp(2047, "int16", -2048), BitsStored=12))
    assert (grey.min(), grey.max()) == (0, 255)
    np.testing.assert_allclose(grey, read(dicom(ramp(), BitsStored=12)), atol=1e-3)


def test_a_voi_lut_of_8_bit_entries_has_more_than_256_of_them():
    """pydicom indexes such a table by 8-bit numbers, so that it wraps."""
    grey = read(dicom(ramp(), BitsStored=12, VOILUTSequence=lut(np.arange(4096) // 16, bits=8)))
    np.testing.assert_array_equal(grey, (ramp() // 16).astype(np.float32))


# -- headers that lack something or go wrong --------------------------------------------------


@pytest.mark.parametrize("absent", ["HighBit", "PixelRepresentation", "SamplesPerPixel"])
def test_a_field_with_one_possible_value_may_be_absent(absent):
    np.testing.assert_array_equal(
        read(dicom(ramp(), BitsStored=12, **{absent: None})), read(dicom(ramp(), BitsStored=12))
    )


def test_padding_is_black_in_either_interpretation():
    values = ramp()
    values[:5] = 4095
    for interpretation in ("MONOCHROME1", "MONOCHROME2"):
        grey = read(
            dicom(
                values,
                BitsStored=12,
                PhotometricInterpretation=interpretation,
                PixelPaddingValue=4095,
            )
        )
        assert (grey[:5] == 0).all()
        assert grey[20].min() > 50


def test_a_range_of_padding_is_black_and_may_lie_outside_the_stored_bits():
    values = ramp()
    values[:20] = 60000
    fields = {"PixelPaddingValue": 50000, "PixelPaddingRangeLimit": 65535}
    grey = read(dicom(values, BitsStored=12, **fields))
    assert (grey[:20] == 0).all()
    np.testing.assert_array_equal(grey[20:], read(dicom(ramp(), BitsStored=12))[20:])


def test_markers_burnt_in_above_the_range_are_white():
    values = ramp()
    values[0, :20] = 65535
    grey = read(dicom(values, BitsStored=12))
    assert (grey[0, :20] == 255).all()
    assert grey[1:].max() == 255


def test_a_range_that_many_pixels_exceed_is_refused():
    with pytest.raises(ImageError, match=r"75% of the DICOM pixels lie outside 0 to 1023, the "):
        read(dicom(ramp(), BitsStored=10))


def test_a_window_tells_the_range_whatever_the_stored_bits():
    data = dicom(ramp(), BitsStored=10, WindowCenter=2048, WindowWidth=4096)
    np.testing.assert_allclose(read(data), ramp() * (255 / 4095), atol=0.1)


def test_overlays_in_the_upper_bits_are_taken_off():
    header = make_header(ramp() | (ramp() > 2000).astype(np.uint16) * 0x8000, BitsStored=12)
    header.add_new((0x6000, 0x0102), "US", 15)
    np.testing.assert_array_equal(read(to_bytes(header)), read(dicom(ramp(), BitsStored=12)))


def test_stated_bits_correct_a_header_that_states_more():
    twelve = read(dicom(ramp(), BitsStored=12))
    np.testing.assert_array_equal(read(dicom(ramp(), BitsStored=16), 12), twelve)
    np.testing.assert_array_equal(read(dicom(ramp(), BitsStored=12), 16), twelve)
    eight = (ramp() // 16).astype(np.uint8)
    np.testing.assert_array_equal(read(dicom(eight), 12), eight)


BROKEN = {
    "several frames": ({"NumberOfFrames": 2}, "holds 2 frames, and which of them"),
    "colour": (
        {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3},
        r"in colour \(RGB, samples per pixel: 3\)",
    ),
    "a palette": ({"PhotometricInterpretation": "PALETTE COLOR"}, r"in colour \(PALETTE COLOR"),
    "no rows": ({"Rows": None}, r"without a picture \(Digital X-Ray Image Storage"),
    "no bits": ({"BitsStored": None, "HighBit": None}, "header lacks BitsStored"),
    "32 bits": ({"BitsAllocated": 32}, "have 32 bits; 8 and 16 are read"),
    "more bits than allocated": ({"BitsStored": 20, "HighBit": 19}, "BitsStored 20 of 16 bits"),
    "another high bit": (
        {"BitsStored": 12, "HighBit": 15},
        "HighBit 15 and BitsStored 12.*should be 11",
    ),
    "four billion pixels": ({"Rows": 65535, "Columns": 65535}, "the limit is 64 megapixels"),
    "more pixels": ({"Rows": 7999, "Columns": 7999}, "truncated: 7999 x 7999 pixels take"),
    "fewer pixels": ({"Rows": 20}, "holds several pictures, or other ones than its header"),
    "no width": (
        {"WindowCenter": 5, "WindowWidth": 0},
        "states WindowWidth 0, which shows nothing",
    ),
    "no slope": ({"RescaleSlope": 0, "RescaleIntercept": 5}, "RescaleSlope 0.0, by which nothing"),
    "an unknown function": (
        {"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "CUBIC"},
        "Unsupported .* VOI LUT Function value 'CUBIC'",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_refused_is_refused_in_a_sentence(kind):
    fields, reason = BROKEN[kind]
    with pytest.raises(ImageError, match=reason) as refused:
        decode_picture(dicom(ramp(), **fields))
    assert "\n" not in str(refused.value)


def test_a_lut_that_is_shorter_than_stated_is_refused():
    table = lut(range(100))
    table[0].LUTDescriptor = [4096, 0, 12]
    with pytest.raises(
        ImageError, match=r"VOI LUT .* states 4096 entries of 12 bits and holds 100"
    ):
        read(dicom(ramp(), BitsStored=12, VOILUTSequence=table))


def test_a_report_holds_no_picture():
    header = make_header(ramp())
    header.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    del header.PixelData
    with pytest.raises(ImageError, match=r"DICOM file without a picture \(Basic Text SR Storage\)"):
        read(to_bytes(header))


# -- transfer syntaxes -------------------------------------------------------------------------


def compressed(syntax: str) -> bytes:
    header = make_header(ramp(), BitsStored=12)
    if syntax == JPEGLSLossless:
        header = pydicom.dcmread(
            next(path for path in PYDICOMS_FILES if path.name == "MR_small_jpeg_ls_lossless.dcm")
        )
        del header[0xFFFCFFFC]  # padding behind the pixels
        return to_bytes(header)
    header.compress(syntax, generate_instance_uid=False)
    return to_bytes(header)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_lossless_compression_gives_the_same_pixels(syntax):
    np.testing.assert_array_equal(read(compressed(syntax)), read(dicom(ramp(), BitsStored=12)))


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_every_way_of_writing_a_header_is_read(syntax):
    header = make_header(ramp(), BitsStored=12)
    header.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        header.PixelData = ramp().astype(">u2").tobytes()
    buffer = BytesIO()
    pydicom.dcmwrite(
        buffer,
        header,
        implicit_vr=syntax == ImplicitVRLittleEndian,
        little_endian=syntax != ExplicitVRBigEndian,
    )
    np.testing.assert_array_equal(read(buffer.getvalue()), read(dicom(ramp(), BitsStored=12)))


def test_jpeg_ls_lossless_equals_the_uncompressed_twin():
    twin = next(path for path in PYDICOMS_FILES if path.name == "MR_small.dcm")
    np.testing.assert_array_equal(read(compressed(JPEGLSLossless)), read(twin.read_bytes()))


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless, None])
@pytest.mark.parametrize("cut", [1, 30, 300, 1500])
def test_a_cut_file_is_refused_wherever_it_is_cut(syntax, cut):
    data = compressed(syntax) if syntax else dicom(ramp(), BitsStored=12)
    lost = data[: -cut - 8] if syntax else data[:-cut]  # the last 8 bytes only end the list
    with pytest.raises(ImageError):
        decode_picture(lost)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_no_size_in_a_header_allocates_more_than_the_file_can_hold(syntax):
    header = pydicom.dcmread(BytesIO(compressed(syntax)))
    header.Rows = header.Columns = 7999  # within the limit of pixels
    data = to_bytes(header)
    tracemalloc.start()
    with pytest.raises(ImageError, match="states 7999 x 7999 pixels"):
        decode_picture(data)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_codestream_of_another_size_is_refused_before_it_is_decoded():
    header = pydicom.dcmread(BytesIO(compressed(JPEG2000Lossless)))
    at = header.PixelData.index(b"\xff\x51") + 6
    header.PixelData = (
        header.PixelData[:at] + struct.pack(">II", 60000, 60000) + header.PixelData[at + 8 :]
    )
    with pytest.raises(
        ImageError, match="64 x 48 pixels of one sample, its compressed pixels 60000"
    ):
        decode_picture(to_bytes(header))


def test_a_deflated_file_that_inflates_without_end_is_refused():
    header = make_header(ramp())
    header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data = to_bytes(header)
    start = data.index(bytes(header.file_meta.TransferSyntaxUID, "ascii")) + 22
    squeeze = zlib.compressobj(wbits=-15)
    bomb = data[:start] + squeeze.compress(bytes(60_000_000)) + squeeze.flush()
    tracemalloc.start()
    with pytest.raises(ImageError, match="inflates to more than 100 times"):
        decode_picture(bomb)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_an_unknown_transfer_syntax_is_named():
    header = make_header(ramp())
    header.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2
    header.PixelData = pydicom.encaps.encapsulate([b"\0" * 4000])
    with pytest.raises(
        ImageError, match=r"syntax 1\.2\.840\.10008\.1\.2\.4\.100 \(MPEG2 .* not read"
    ):
        decode_picture(to_bytes(header))


def test_a_missing_plugin_is_named_with_the_command(monkeypatch):
    decoder = pydicom.pixels.get_decoder(JPEG2000Lossless)
    monkeypatch.setitem(
        decoder._unavailable, "pylibjpeg", ("pylibjpeg>=2", "pylibjpeg-openjpeg>=2")
    )
    monkeypatch.delitem(decoder._available, "pylibjpeg")
    with pytest.raises(
        ImageError,
        match=r"compressed as JPEG 2000 .*requires pylibjpeg>=2 and pylibjpeg-openjpeg>=2: pip "
        r"install 'cxr-cache\[dicom\]'",
    ):
        decode_picture(compressed(JPEG2000Lossless))


@pytest.mark.parametrize("as_folder", [False, True], ids=["a file", "a folder"])
def test_without_pydicom_one_sentence_says_what_to_install(tmp_path, as_folder):
    (tmp_path / "a.dcm").write_bytes(dicom(ramp()))
    call = (
        "load_cohort(sys.argv[1], 'dicom')"
        if as_folder
        else "decode_picture(pathlib.Path(sys.argv[1], 'a.dcm').read_bytes())"
    )
    code = (
        "import sys, pathlib; sys.modules['pydicom'] = None\n"
        "from cxr_cache.datasets.images import decode_picture\n"
        "from cxr_cache.datasets.readers import load_cohort\n"
        f"try: {call}\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    name = "ConfigError" if as_folder else "ImageError"
    assert done.stdout.startswith(name), done.stderr
    assert "needs pydicom: pip install 'cxr-cache[dicom]'" in done.stdout
    assert done.stdout.count("\n") == 1


# -- pydicom's own files ---------------------------------------------------------------------


def test_pydicoms_own_files_are_read_or_refused_in_a_sentence(caplog):
    """Over 150 files of every kind, some of them damaged on purpose; none takes much memory."""
    n_read = n_refused = 0
    sentences = []
    for path in PYDICOMS_FILES:
        data = path.read_bytes()
        tracemalloc.start()
        try:
            picture = decode_picture(data)
        except ImageError as refused:
            n_refused += 1
            sentences.append(str(refused))
        else:
            n_read += 1
            assert picture.dtype == np.uint8
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 30 * len(data) + 8_000_000, path.name
    assert [text for text in sentences if "\n" in text or len(text) > 250] == []
    assert not caplog.records
    assert n_read > 50
    assert n_refused > 80


@pytest.mark.parametrize(
    "name", ["MR_small_jp2klossless.dcm", "MR_small_RLE.dcm", "JPGExtended.dcm"]
)
def test_one_changed_byte_or_a_cut_never_ends_in_another_error(name):
    data = next(path for path in PYDICOMS_FILES if path.name == name).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        spoilt = bytearray(data[: rng.integers(200, len(data)) if rng.random() < 0.3 else None])
        for _ in range(rng.integers(1, 4)):
            spoilt[rng.integers(132, len(spoilt))] = rng.integers(256)
        with contextlib.suppress(ImageError):
            decode_picture(bytes(spoilt))
