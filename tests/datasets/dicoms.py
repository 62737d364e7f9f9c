"""DICOM files as tests need them, made of values and header fields."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    generate_uid,
)


def make_header(values: np.ndarray, **fields: Any) -> FileDataset:
    """A digital radiograph of such values; fields are set, or deleted where None."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = fields.get("SOPInstanceUID") or generate_uid()
    header = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    bits = 8 * values.dtype.itemsize
    stored = fields.get("BitsStored", bits) or bits
    given = {
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "Rows": values.shape[0],
        "Columns": values.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": stored,
        "HighBit": stored - 1,
        "PixelRepresentation": int(values.dtype.kind == "i"),
        **fields,
    }
    for name, value in given.items():
        if value is not None:
            setattr(header, name, value)
    header.PixelData = values.tobytes()
    header["PixelData"].VR = "OW"
    return header


def to_bytes(header: FileDataset) -> bytes:
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, header)
    return buffer.getvalue()


def dicom(values: np.ndarray, **fields: Any) -> bytes:
    """The file of :func:`make_header`."""
    return to_bytes(make_header(values, **fields))


def lut(entries: Any, first: int = 0, bits: int = 16) -> pydicom.Sequence:
    """A table of a modality or VOI LUT sequence."""
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(entries) % 65536, first, bits]
    item["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    item.LUTData = [int(entry) for entry in entries]
    item["LUTData"].VR = "US"
    return pydicom.Sequence([item])
