"""A folder of DICOM files -> the image table, from their headers; no pixel is read."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd
from joblib import Parallel, cpu_count, delayed

from cxr_cache.common.wording import count, list_names
from cxr_cache.config import ReadConfig
from cxr_cache.datasets.cohort import Cohort, Reading
from cxr_cache.datasets.columns import is_unknown, read_ages, read_sexes, read_views
from cxr_cache.datasets.dicom.pixels import import_pydicom, is_dicom, quiet_pydicom
from cxr_cache.datasets.dicom.pseudonyms import hash_id, load_key
from cxr_cache.errors import ConfigError, ImageError, TableError

if TYPE_CHECKING:
    from pydicom import Dataset

SUFFIXES: Final = (".dcm", ".dicom")
"""Files of these names are rows even where they are damaged, so that their failure is seen."""

_IDS: Final = {
    "patient_id": ("patient", "PatientID"),
    "study_uid": ("study", "StudyInstanceUID"),
    "series_uid": ("series", "SeriesInstanceUID"),
    "instance_uid": ("instance", "SOPInstanceUID"),
}
_TAGS: Final = (
    *(keyword for _, keyword in _IDS.values()),
    *("PatientName", "PatientSex", "PatientAge", "PatientBirthDate", "StudyDate"),
    *("ViewPosition", "ViewCodeSequence", "PresentationIntentType", "SOPClassUID", "Rows"),
)
_NO_FACTS: Final = dict.fromkeys((*_IDS, "view", "sex", "age", "years_between"), "")
_ANONYMOUS: Final = frozenset({"anonymous", "anonymized", "anonymised", "anon"})
_MANY: Final = 5000  # files, from which on it pays to start processes


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
        Folder that holds the files, if it is another one.

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
    folder = path if image_dir is None else image_dir
    if not folder.is_dir():
        raise TableError(f"{folder} is not a folder; give the one with the DICOM files.")
    headers = _read_headers(folder)
    if not (pictures := [header for header in headers if header.facts]):
        n_foreign = sum(not header.kind for header in headers)
        raise TableError(
            f"{folder} holds no DICOM picture: {count(len(headers) - n_foreign, 'DICOM object')} "
            f"without one, and {count(n_foreign, 'other file')}."
        )
    images, n_impossible = _make_table(pictures, _pseudonyms(config))
    source = hashlib.sha256(images.to_csv(index=False).encode()).hexdigest()
    return Cohort(
        images,
        np.empty((len(images), 0), np.float32),
        (),
        source={f"{folder.resolve().name}/": source},
        reading=Reading(
            "dicom",
            columns=_describe_columns(config.keep_ids),
            notes=tuple(_notes(headers, pictures, n_impossible, config.keep_ids)),
        ),
    )


def holds_dicom(folder: Path) -> bool:
    """Whether one of the first hundred files below a folder is a DICOM file, by its content."""
    return any(_is_dicom_file(file) for file in islice(_walk(folder), 100))


def add_header_facts(cohort: Cohort, image_dir: Path, config: ReadConfig) -> Cohort:
    """Take from DICOM headers what a table of labels does not say: patients above all.

    Images of one patient would else be on both sides of a split. Where the table names patients,
    or its images are no DICOM files, the cohort stays as it is; so do cells that are filled.

    Raises
    ------
    ConfigError
        As :func:`read_dicom`.
    """
    images = cohort.images
    files = [image_dir / image_id for image_id in images["image_id"]]
    if (images["patient_id"] != "").any() or not any(_is_dicom_file(file) for file in files[:50]):
        return cohort
    headers = _read_some(list(zip(files, images["image_id"], strict=True)))
    facts, _ = _make_table(
        [h if h.facts else replace(h, facts=_NO_FACTS) for h in headers], _pseudonyms(config)
    )
    filled = {"patient_id": facts["patient_id"]}
    if images["study_uid"].equals(images["image_id"]):
        filled["study_uid"] = facts["study_uid"]
    for name in ("projection", "view_position", "sex", "age"):
        old = images[name] if name in images else pd.Series("", images.index, object)
        filled[name] = old.where(old != "", facts[name])
    added = {
        keyword: use
        for keyword, use in _describe_columns(config.keep_ids).items()
        if use.split(",")[0] not in ("series_uid", "instance_uid")
    }
    made = cohort.assign(**filled)
    reading = made.reading or Reading("")
    columns = {**reading.columns, **{f"DICOM {name}": use for name, use in added.items()}}
    return made.with_reading(replace(reading, columns=columns))


def find_instances(folder: Path) -> dict[str, str]:
    """Path of each DICOM picture below a folder, relative to it, by its SOP instance UID.

    Tables of labels often name images by this UID. Where several files share one, the first counts.

    Raises
    ------
    ConfigError
        pydicom is not installed.
    """
    paths: dict[str, str] = {}
    for header in _read_headers(folder):
        if uid := header.facts.get("instance_uid"):
            paths.setdefault(uid, header.image_id)
    return paths


# -- headers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    """What is taken from one file; of the patient's name, only whether the path tells it."""

    image_id: str
    kind: str
    """Of the DICOM object, in the standard's words; blank for other files."""
    facts: dict[str, str]
    """As written; empty where the file is no picture."""
    unreadable: bool = False
    raw: bool = False
    """For processing, not for the eye."""
    telling: bool = False
    """The path holds the name or an id of its own header."""


def _read_headers(folder: Path) -> list[_Header]:
    """Read the header of every file below a folder, in the order of the paths."""
    return _read_some([(file, file.relative_to(folder).as_posix()) for file in _walk(folder)])


def _read_some(files: list[tuple[Path, str]]) -> list[_Header]:
    try:
        import_pydicom()
    except ImageError as error:
        raise ConfigError(f"{files[0][0].parent if files else 'This'}: {error}.") from error
    n_jobs = min(cpu_count(), 8) if len(files) >= _MANY else 1
    headers: list[_Header] = Parallel(n_jobs, batch_size=64)(
        delayed(_read_header)(file, image_id) for file, image_id in files
    )
    return headers


def _walk(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (Path(where, name) for name in sorted(files) if not name.startswith(".")):
            if file.is_file():  # and no pipe, which might never answer
                yield file


def _is_dicom_file(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return is_dicom(opened.read(132))
    except OSError:
        return False


def _read_header(file: Path, image_id: str) -> _Header:
    from pydicom import dcmread

    if not _is_dicom_file(file) and file.suffix.lower() not in SUFFIXES:
        return _Header(image_id, "", {})
    try:
        with quiet_pydicom():
            header = dcmread(file, stop_before_pixels=True, specific_tags=[*_TAGS])
            return _take(header, image_id)
    except Exception:  # pydicom raises nearly every built-in exception for damaged files
        return _Header(image_id, "damaged", _NO_FACTS, unreadable=True)


def _take(header: Dataset, image_id: str) -> _Header:
    from pydicom.uid import UID

    uid = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    kind = UID(str(uid)).name if uid else "of no stated kind"
    if header.get("Rows") is None:
        return _Header(image_id, kind, {})
    ids = {column: _text(header, keyword) for column, (_, keyword) in _IDS.items()}
    if is_unknown(ids["patient_id"]) or ids["patient_id"].lower() in _ANONYMOUS:
        ids["patient_id"] = ""
    between = _years_between(_text(header, "PatientBirthDate"), _text(header, "StudyDate"))
    facts = {
        **ids,
        "view": _text(header, "ViewPosition") or _coded_view(header),
        "sex": _text(header, "PatientSex"),
        "age": _text(header, "PatientAge"),
        "years_between": between,
    }
    raw = _text(header, "PresentationIntentType").upper() == "FOR PROCESSING"
    return _Header(image_id, kind, facts, raw=raw, telling=_tells_who(image_id, header, ids))


def _text(header: Dataset, keyword: str) -> str:
    value = header.get(keyword)
    return "" if value is None else str(value).replace("\0", "").strip()


def _coded_view(header: Dataset) -> str:
    items = header.get("ViewCodeSequence") or []
    return _text(items[0], "CodeMeaning") if items else ""


def _years_between(birth: str, study: str) -> str:
    """Whole years between dates such as ``19570131`` or ``1957.01.31``; blank if unknown."""
    try:
        born, seen = (
            date(int(day[:4]), int(day[4:6]), int(day[6:8]))
            for day in (text.replace(".", "") for text in (birth, study))
        )
    except ValueError:
        return ""
    return str(seen.year - born.year - ((seen.month, seen.day) < (born.month, born.day)))


def _tells_who(path: str, header: Dataset, ids: dict[str, str]) -> bool:
    names = _text(header, "PatientName").replace("^", " ").replace("=", " ").split()
    told = [word for word in (*names, ids["patient_id"], ids["instance_uid"]) if len(word) > 3]
    return any(word.lower() in path.lower() for word in told)


# -- the image table --------------------------------------------------------------------------


def _pseudonyms(config: ReadConfig) -> Callable[[str, str], str]:
    if config.keep_ids:
        return lambda _, value: value
    key = load_key(config.id_key)
    return lambda kind, value: hash_id(key, kind, value)


def _make_table(
    pictures: list[_Header], name: Callable[[str, str], str]
) -> tuple[pd.DataFrame, int]:
    """The image table, and how many ages were impossible and left blank."""
    written = pd.DataFrame([picture.facts for picture in pictures], dtype=object)
    table = pd.DataFrame({"image_id": [picture.image_id for picture in pictures]}, dtype=object)
    for column, (kind, _) in _IDS.items():
        named = {value: name(kind, value) if value else "" for value in written[column].unique()}
        table[column] = written[column].map(named)
    table["study_uid"] = table["study_uid"].where(table["study_uid"] != "", table["image_id"])
    table["patient_id"] = _share_patients(table)
    table["projection"], table["view_position"] = read_views(written["view"])
    table["sex"] = read_sexes(written["sex"])
    stated, between = (read_ages(written[of])[0] for of in ("age", "years_between"))
    table["age"] = np.where(stated == "", between, stated)
    told = (written["age"] != "") | (written["years_between"] != "")
    return table, int((told & (table["age"] == "")).sum())


def _share_patients(table: pd.DataFrame) -> pd.Series[str]:
    """The patient of each row; one without is of the patient of its study.

    Raises
    ------
    TableError
        A study has two patients; the message names a file of each, as ids may be hashes.
    """
    known = table[table["patient_id"] != ""].drop_duplicates(["study_uid", "patient_id"])
    if (twice := known["study_uid"].duplicated(keep=False)).any():
        study = known.loc[twice, "study_uid"].iloc[0]
        one, two = known.loc[known["study_uid"] == study, "image_id"].iloc[:2]
        raise TableError(
            f"The headers of {one} and {two} have the same StudyInstanceUID and another PatientID. "
            "Correct one of them, as all images of a study are of one patient."
        )
    patient_of = dict(zip(known["study_uid"], known["patient_id"], strict=True))
    of_study = table["study_uid"].map(lambda study: patient_of.get(study, ""))
    patients: pd.Series[str] = table["patient_id"].where(table["patient_id"] != "", of_study)
    return patients


# -- in words -------------------------------------------------------------------------------


def _describe_columns(keep_ids: bool) -> dict[str, str]:
    how = "" if keep_ids else ", as a keyed hash"
    return {
        "PatientID": f"patient{how}",
        "StudyInstanceUID": f"study{how}",
        "SeriesInstanceUID": f"series_uid{how}",
        "SOPInstanceUID": f"instance_uid{how}",
        "ViewPosition": "view, and projection by it",
        "PatientSex": "information (sex)",
        "PatientAge": "information (age)",
        "PatientBirthDate": "used for the age where PatientAge is blank, and not kept",
        "StudyDate": "used for the age where PatientAge is blank, and not kept",
    }


def _notes(
    headers: list[_Header], pictures: list[_Header], n_impossible: int, keep_ids: bool
) -> Iterator[str]:
    """What a user should know, in sentences."""

    def first(found: list[_Header]) -> str:
        return f"{count(len(found), 'file')} (the first: {found[0].image_id})"

    others = Counter(header.kind for header in headers if header.kind and not header.facts)
    if others:
        kinds = [f"{n:,} {kind}" for kind, n in others.most_common()]
        yield f"DICOM objects without a picture were left out: {list_names(kinds, 4)}."
    if foreign := [header for header in headers if not header.kind]:
        yield f"Left out as no DICOM: {first(foreign)}."
    if unreadable := [picture for picture in pictures if picture.unreadable]:
        yield f"The headers of {first(unreadable)} cannot be read; extraction will say why."
    if raw := [picture for picture in pictures if picture.raw]:
        yield (
            f"FOR PROCESSING is stated in {first(raw)}: values of the detector, rather than "
            "pictures for the eye."
        )
    if n_impossible:
        yield f"Left blank as impossible: {count(n_impossible, 'age')}."
    n_files = Counter(picture.facts["instance_uid"] for picture in pictures)
    n_files[""] = 0
    if repeated := [p for p in pictures if n_files[p.facts["instance_uid"]] > 1]:
        yield (
            "A SOP instance UID that another file has too, as copies of an image have it, is in "
            f"{first(repeated)}."
        )
    if not keep_ids and (telling := [picture for picture in pictures if picture.telling]):
        yield (
            f"The paths of {first(telling)} hold the patient's name or id, or the instance's UID, "
            "and stores keep them as image ids. Rename the files before sharing a store."
        )
