"""A folder of DICOM files -> the image table, from their headers; no pixel is read."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from cxr_cache.common.wording import count, list_names
from cxr_cache.config import ReadConfig
from cxr_cache.datasets.cohort import Cohort, Reading
from cxr_cache.datasets.dicom.pixels import import_pydicom, is_dicom, quiet_pydicom
from cxr_cache.datasets.dicom.pseudonyms import hash_id, load_key
from cxr_cache.errors import ConfigError, ImageError, TableError

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_AGE: Final = 120
"""In years; older patients are slips of the pen, or a birth date that was made up."""

SUFFIXES: Final = (".dcm", ".dicom")
"""Files of these names are rows even where they are damaged, so that their failure is seen."""

_IDS: Final = {
    "patient_id": ("patient", "PatientID"),
    "study_uid": ("study", "StudyInstanceUID"),
    "series_uid": ("series", "SeriesInstanceUID"),
    "instance_uid": ("instance", "SOPInstanceUID"),
}
_UNKNOWN: Final = frozenset(
    {"", "anonymous", "anonymized", "anonymised", "anon", "unknown", "none", "null", "nan", "na"}
)
_TAGS: Final = (
    *(keyword for _, keyword in _IDS.values()),
    *("PatientName", "PatientSex", "PatientAge", "PatientBirthDate", "StudyDate"),
    *("ViewPosition", "ViewCodeSequence", "PresentationIntentType", "SOPClassUID", "Rows"),
)
_PROJECTIONS: Final = (
    ("LATERAL", "Lateral"),
    ("LAT", "Lateral"),
    ("LL", "Lateral"),
    ("RL", "Lateral"),
    ("POSTERO-ANTERIOR", "Frontal"),
    ("ANTERO-POSTERIOR", "Frontal"),
    ("PA", "Frontal"),
    ("AP", "Frontal"),
)


@dataclass
class _Found:
    """Rows of the image table, and what was met beside them."""

    rows: list[dict[str, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    """DICOM objects without a picture, by kind."""
    n_foreign: int = 0
    """Files that are no DICOM."""
    unreadable: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    """For processing, not for the eye."""
    telling: list[str] = field(default_factory=list)
    """Paths that hold a name or an id of their own header."""
    n_impossible_ages: int = 0
    n_files: Counter[str] = field(default_factory=Counter)
    """Of each instance, as the rows name it."""


def read_dicom(path: Path, config: ReadConfig, image_dir: Path | None = None) -> Cohort:
    """Read a folder of DICOM files as a data set of its own, without labels.

    Study, series, patient, view, sex and age come from the headers. Names and birth dates are
    never kept. Ids are kept as keyed hashes, so that the same patient has the same id whenever
    the data set is read with the same key; paths of files are kept as they are.

    Parameters
    ----------
    path
        The folder; files lie in it or below it, whatever their names.
    config
        Of its options, ``keep_ids`` and ``id_key`` count here.
    image_dir
        Folder that image ids are relative to, if it is another one above `path`.

    Returns
    -------
    Cohort
        Rows in the order of the paths. Columns beside the usual ones: ``series_uid``,
        ``instance_uid``, ``view_position``, ``sex`` and ``age`` in years. No findings.

    Raises
    ------
    ConfigError
        pydicom is not installed, or the key of the hashes cannot be used.
    TableError
        The folder holds no DICOM picture, or a study is of two patients.
    """
    try:
        import_pydicom()
    except ImageError as error:
        raise ConfigError(f"{path} is to be read as DICOM: {error}.") from error
    if not path.is_dir():
        raise TableError(f"{path} is not a folder; give the one with the DICOM files.")
    root = path if image_dir is None else image_dir
    if not path.resolve().is_relative_to(root.resolve()):
        raise TableError(f"The DICOM files of {path} do not lie in the image folder {root}.")
    found = _read_headers(path, root, _pseudonyms(config))
    if not found.rows:
        raise TableError(
            f"{path} holds no DICOM picture: {count(sum(found.others.values()), 'DICOM object')} "
            f"without one, and {count(found.n_foreign, 'other file')}."
        )
    images = pd.DataFrame(found.rows)
    notes = tuple(_notes(found, config.keep_ids))
    return Cohort(
        images,
        np.empty((len(images), 0), np.float32),
        (),
        source={f"{path.name}/": hashlib.sha256(images.to_csv(index=False).encode()).hexdigest()},
        reading=Reading("dicom", columns=_describe_columns(config.keep_ids), notes=notes),
    )


def find_instances(folder: Path) -> dict[str, str]:
    """Path of each DICOM picture below a folder, relative to it, by its SOP instance UID.

    Tables of labels often name images by this UID. Where several files share one, the first counts.

    Raises
    ------
    ImageError
        pydicom is not installed.
    """
    import_pydicom()
    found = _read_headers(folder, folder, lambda _, value: value)
    paths: dict[str, str] = {}
    for row in found.rows:
        if row["instance_uid"]:
            paths.setdefault(row["instance_uid"], row["image_id"])
    return paths


# -- headers ------------------------------------------------------------------------------


def _pseudonyms(config: ReadConfig) -> Callable[[str, str], str]:
    if config.keep_ids:
        return lambda _, value: value
    key = load_key(config.id_key)
    return lambda kind, value: hash_id(key, kind, value)


def _read_headers(path: Path, root: Path, name: Callable[[str, str], str]) -> _Found:
    """Read the header of every DICOM file below `path`, in the order of the paths."""
    from pydicom import dcmread

    found = _Found()
    for file in _walk(path):
        image_id = Path(os.path.relpath(file, root)).as_posix()
        try:
            with file.open("rb") as opened:
                marked = is_dicom(opened.read(132))
            if not marked and file.suffix.lower() not in SUFFIXES:
                found.n_foreign += 1
                continue
            with quiet_pydicom():
                header = dcmread(file, stop_before_pixels=True, specific_tags=[*_TAGS])
                if header.get("Rows") is None:
                    found.others[_kind(header)] += 1
                else:
                    _add_row(found, image_id, header, name)
        except Exception:  # pydicom raises nearly every built-in exception for damaged files
            found.unreadable.append(image_id)
            found.rows.append(
                dict.fromkeys(_IDS, "") | {"image_id": image_id, "study_uid": image_id}
            )
    return found


def _walk(path: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (Path(folder, name) for name in sorted(files) if not name.startswith(".")):
            if file.is_file():  # and no pipe, which might never answer
                yield file


def _kind(header: Dataset) -> str:
    from pydicom.uid import UID

    uid = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    return UID(str(uid)).name if uid else "of no stated kind"


def _add_row(
    found: _Found, image_id: str, header: Dataset, name: Callable[[str, str], str]
) -> None:
    ids = {column: _text(header, keyword) for column, (_, keyword) in _IDS.items()}
    if ids["patient_id"].lower() in _UNKNOWN:
        ids["patient_id"] = ""
    if _tells_who(image_id.lower(), header, ids):
        found.telling.append(image_id)
    if _text(header, "PresentationIntentType").upper() == "FOR PROCESSING":
        found.raw.append(image_id)
    row = {column: name(_IDS[column][0], of) if of else "" for column, of in ids.items()}
    found.n_files[row["instance_uid"]] += bool(row["instance_uid"])
    row["study_uid"] = row["study_uid"] or image_id
    view = _text(header, "ViewPosition").upper() or _coded_view(header)
    age, impossible = _age(header)
    found.n_impossible_ages += impossible
    sex = _text(header, "PatientSex").upper()
    found.rows.append(
        row
        | {
            "image_id": image_id,
            "projection": _projection(view),
            "view_position": view,
            "sex": sex if sex in ("F", "M") else "",
            "age": age,
        }
    )


def _text(header: Dataset, keyword: str) -> str:
    value = header.get(keyword)
    return "" if value is None else str(value).replace("\0", "").strip()


def _coded_view(header: Dataset) -> str:
    items = header.get("ViewCodeSequence") or []
    return _text(items[0], "CodeMeaning").upper() if items else ""


def _projection(view: str) -> str:
    words = view.replace("_", " ").split()
    return next((projection for word, projection in _PROJECTIONS if word in words), "")


def _age(header: Dataset) -> tuple[str, bool]:
    """Years that the header states, else those between birth and study, and whether impossible.

    ``"057Y"``, ``"018M"`` and ``"62"`` are ages; months, weeks and days make whole years.
    """
    stated = _text(header, "PatientAge").upper()
    unit = stated[-1:] if stated[-1:] in "DWMY" else "Y"
    digits = stated.rstrip("DWMY")
    years: int | None = None
    if digits.isascii() and digits.isdigit():
        years = int(int(digits) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1}[unit or "Y"])
    if years is None or years > MAX_AGE:
        between = _years_between(_text(header, "PatientBirthDate"), _text(header, "StudyDate"))
        years = between if between is not None else years
    if years is None:
        return "", False
    possible = 0 <= years <= MAX_AGE
    return (str(years) if possible else ""), not possible


def _years_between(birth: str, study: str) -> int | None:
    try:
        born, seen = (
            date(int(day[:4]), int(day[4:6]), int(day[6:8]))
            for day in (text.replace(".", "") for text in (birth, study))
        )
    except ValueError:
        return None
    return seen.year - born.year - ((seen.month, seen.day) < (born.month, born.day))


def _tells_who(path: str, header: Dataset, ids: dict[str, str]) -> bool:
    """Whether a path, in small letters, holds a name or an id of its own header."""
    names = _text(header, "PatientName").replace("^", " ").replace("=", " ").split()
    told = [word for word in names if len(word) > 3]
    told += [of for of in (ids["patient_id"], ids["instance_uid"]) if len(of) > 3]
    return any(word.lower() in path for word in told)


# -- in words -------------------------------------------------------------------------------


def _describe_columns(keep_ids: bool) -> dict[str, str]:
    how = "" if keep_ids else ", as a keyed hash"
    return {
        "PatientID": f"patient{how}",
        "StudyInstanceUID": f"study{how}",
        "SeriesInstanceUID": f"series_uid{how}",
        "SOPInstanceUID": f"instance_uid{how}",
        "ViewPosition": "view_position, and projection by it",
        "PatientSex": "sex",
        "PatientAge": "age, else by PatientBirthDate and StudyDate, which are not kept",
    }


def _notes(found: _Found, keep_ids: bool) -> Iterator[str]:
    """What a user should know, in sentences."""

    def first(paths: list[str]) -> str:
        return f"{count(len(paths), 'file')} (the first: {paths[0]})"

    if found.others:
        kinds = [f"{n:,} {kind}" for kind, n in found.others.most_common()]
        yield f"DICOM objects without a picture were left out: {list_names(kinds, 4)}."
    if found.n_foreign:
        yield f"Left out as no DICOM: {count(found.n_foreign, 'file')}."
    if found.unreadable:
        yield f"The headers of {first(found.unreadable)} cannot be read; extraction will say why."
    if found.raw:
        yield (
            f"FOR PROCESSING is stated in {first(found.raw)}: values of the detector, rather than "
            "pictures for the eye."
        )
    if found.n_impossible_ages:
        yield f"Left blank as impossible: {count(found.n_impossible_ages, 'age')}."
    if repeated := [row for row in found.rows if found.n_files[row["instance_uid"]] > 1]:
        yield (
            f"A SOP instance UID that another file has too, as copies of an image have it, is in "
            f"{first([row['image_id'] for row in repeated])}."
        )
    if found.telling and not keep_ids:
        yield (
            f"The paths of {first(found.telling)} hold the patient's name or id, or the instance's "
            "UID, and stores keep them as image ids. Rename the files before sharing a store."
        )
