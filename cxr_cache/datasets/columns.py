"""What the columns of a table are: roles by the names that public tables give them, and cells."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import require_columns
from cxr_cache.common.wording import count, list_names
from cxr_cache.config import ReadConfig
from cxr_cache.errors import TableError

logger = logging.getLogger(__name__)

ROLE_NAMES: Final[Mapping[str, str]] = {
    "image": "imageid image imageindex imagepath imagename imagefile imagefilename path filepath "
    "file filename fname img imgid imgpath imgname dicomid pathtoimage pngpath dicompath "
    "sopinstanceuid dicomfile",
    "patient": "patientid patient subjectid subject deidpatientid patientnumber patientuid "
    "personid pid mrn patid patientno patientnum patientidentifier patients patientcode "
    "participantid participant anonpatientid subjectno subjectnumber subjectcode",
    "study": "studyuid studyid study studyinstanceuid accession accessionnumber examid exam "
    "reportid visitid uid",
    "projection": "projection frontallateral",
    "view": "viewposition view viewpositiondicom appa",
    "split": "split givensplit subset partition set datasplit traintest traintestsplit phase",
    "fold": "fold givenfold folds foldid kfold cvfold",
    "sex": "sex gender patientsex patientgender patientsexdicom",
    "age": "age patientage ageyears ageinyears ageatstudy",
    "reader": "reader readerid radid rater raterid annotator annotatorid radiologist radiologistid",
    "hospital": "hospital hospitalid site siteid institution institutionname centre center",
    "race": "race patientrace",
    "ethnicity": "ethnicity patientethnicity",
    "names": "label labels findinglabels findinglabel findings finding class classname diagnosis "
    "diagnoses problems",
}
"""Names of columns by role, in small letters without anything but letters and digits."""

OPTIONS: Final = {
    "image": "image_column",
    "patient": "patient_column",
    "study": "study_column",
    "view": "view_column",
    "split": "split_column",
    "fold": "fold_column",
}
"""The options that name a column, by role; all others are recognised only."""

FACT_ROLES: Final = ("sex", "age", "hospital", "race", "ethnicity")
"""What is kept as information about images, in columns of these names."""

_NEVER = (
    "followup followupno width height rows columns index unnamed0 status error source report "
    "impression indication comparison studydate studytime date nimages id rowid xmin ymin xmax "
    "ymax x y w h bmi weight predicted prediction"
)
NEVER_FINDINGS: Final = frozenset(_NEVER.split())
"""Names of columns, squeezed, that are no findings even if they hold nothing but 0 and 1."""

ROLE_OF_NAME: Final = {name: role for role, names in ROLE_NAMES.items() for name in names.split()}


def squeeze_name(name: str) -> str:
    """A column's name in small letters, without blanks, underscores and signs: ``patientid``."""
    return re.sub(r"[\W_]+", "", name).lower()


def find_roles(
    table: pd.DataFrame, path: Path, config: ReadConfig, *, may_choose: tuple[str, ...] = ()
) -> dict[str, str]:
    """Find which column has which role.

    Parameters
    ----------
    table, path
        The table, and its file for messages.
    config
        Names columns where the user has done so.
    may_choose
        Roles of which several candidates are all right: the caller decides among them.

    Returns
    -------
    dict[str, str]
        Column by role, for the roles of :data:`ROLE_NAMES` that the table has.

    Raises
    ------
    TableError
        Two columns may have a role and differ; a column that the user names is not there.
    """
    named = {role: getattr(config, option) for role, option in OPTIONS.items()}
    named = {role: column for role, column in named.items() if column is not None}
    require_columns(table, [*named.values()], path)
    roles: dict[str, str] = dict(named)
    for column in table.columns:
        role = ROLE_OF_NAME.get(squeeze_name(column))
        if role is None or column in named.values() or (role in named):
            continue
        if role == "projection" and "view" in named:
            continue
        first = roles.setdefault(role, column)
        if first == column or role in (*may_choose, "names"):
            continue
        if not (table[first] == table[column]).all():
            option = OPTIONS.get(role)
            remedy = "Rename or remove one of them."
            if option:
                remedy = f"Name one with --{option.replace('_', '-')}, or rename the other."
            raise TableError(
                f"{path}: the columns {first!r} and {column!r} may both be the {role} of a row, "
                f"and they differ. {remedy}"
            )
    return roles


def require_named(config: ReadConfig, tables: Mapping[Path, pd.DataFrame]) -> None:
    """Raise TableError for a column that the user names and none of the tables has."""
    for option in OPTIONS.values():
        column = getattr(config, option)
        if column is not None and not any(column in table for table in tables.values()):
            path, table = next(iter(tables.items()))
            require_columns(table, (column,), path)


def restrict(config: ReadConfig, table: pd.DataFrame) -> ReadConfig:
    """Leave out the columns that the user names and a table lacks: of several, each has some."""
    named = {option: getattr(config, option) for option in OPTIONS.values()}
    absent = {option: None for option, name in named.items() if name and name not in table}
    return ReadConfig(**{**vars(config), **absent})


def candidates(table: pd.DataFrame, role: str) -> list[str]:
    """All columns whose names fit a role, in the table's order."""
    return [name for name in table.columns if ROLE_OF_NAME.get(squeeze_name(name)) == role]


# -- cells --------------------------------------------------------------------------------

UNKNOWN: Final = frozenset(
    ("", "nan", "none", "na", "n/a", "<na>", "nat", "null", "unknown", "unk", "missing", "-", "?")
)
"""Words, in small letters, that stand for a patient or fact that is not known."""


def is_unknown(cell: str) -> bool:
    """Whether a cell holds a word for unknown."""
    return cell.strip().lower() in UNKNOWN


def map_cells(column: pd.Series[Any], read: Callable[[str], Any]) -> NDArray[np.object_]:
    """Apply a function to the different cells of a column, once each."""
    codes, known = pd.factorize(column.to_numpy(object))
    values = np.empty(len(known), object)
    values[:] = [read(cell) for cell in known]
    return values[codes]


def read_ids(column: pd.Series[Any]) -> NDArray[np.object_]:
    """Ids as written; words for unknown become ``""``."""
    return map_cells(column, lambda cell: "" if is_unknown(cell) else cell)


SPLIT_WORDS: Final = {
    **dict.fromkeys(("train", "training", "tr", "trainval", "train_val", "development"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev", "tune", "tuning"), "val"),
    **dict.fromkeys(("test", "testing", "te", "holdout", "held-out", "hold-out"), "test"),
}
"""Words for the parts of a given split, in small letters."""


def is_split_flag(name: str) -> bool:
    """Whether a column says of each row if it is in one part of a split, as ``is_test``."""
    squeezed = squeeze_name(name)
    return squeezed.startswith(("is", "in")) and squeezed[2:].removesuffix("set") in SPLIT_WORDS


def find_split_word(name: str) -> str:
    """The part of a split that a file's name tells; blank if it tells none, or several.

    Examples
    --------
    >>> find_split_word("train"), find_split_word("labels_valid"), find_split_word("train_test")
    ('train', 'val', '')
    """
    words = re.split(r"[\W_]+", name.lower())
    parts = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return parts.pop() if len(parts) == 1 else ""


def read_splits(column: pd.Series[Any], path: Path) -> NDArray[np.object_]:
    """Words of a given split as ``"train"``, ``"val"``, ``"test"`` or ``""``.

    Raises
    ------
    TableError
        A cell holds another word.
    """

    def read(cell: str) -> str | None:
        return "" if is_unknown(cell) else SPLIT_WORDS.get(cell.strip().lower())

    return _read_all(
        column, read, path, "a split is train, val (valid, validate, dev), test or blank"
    )


def read_folds(column: pd.Series[Any], path: Path) -> NDArray[np.object_]:
    """Numbers of folds as text, ``""`` where there is none.

    Raises
    ------
    TableError
        A cell is not a whole number, 0 or more.
    """

    def read(cell: str) -> str | None:
        if is_unknown(cell):
            return ""
        return str(int(cell.split(".")[0])) if re.fullmatch(r"\d+(\.0+)?", cell.strip()) else None

    return _read_all(column, read, path, "a fold is a whole number (0, 1, 2 ...) or blank")


def _read_all(
    column: pd.Series[Any], read: Callable[[str], str | None], path: Path, form: str
) -> NDArray[np.object_]:
    """Cells as `read` gives them; one that it gives None for is an error that tells the form."""
    cells = map_cells(column, read)
    wrong = np.flatnonzero(np.array([cell is None for cell in cells], bool))
    if len(wrong):
        row = wrong[0]
        raise TableError(
            f"{path}, line {column.index[row]}: column {column.name!r} holds {column.iloc[row]!r}, "
            f"but {form}."
        )
    return cells


_SEXES: Final = {"f": "F", "female": "F", "woman": "F", "m": "M", "male": "M", "man": "M"}


def read_sexes(column: pd.Series[Any]) -> NDArray[np.object_]:
    """``"F"``, ``"M"``, or ``""`` where it is neither."""
    return map_cells(column, lambda cell: _SEXES.get(cell.strip().lower(), ""))


OLDEST: Final = 120
"""Years; a higher age is taken for a mistake."""


def read_ages(column: pd.Series[Any]) -> tuple[NDArray[np.object_], int]:
    """Ages in whole years as text, and how many were impossible and left blank.

    ``57``, ``57.0``, DICOM's ``057Y``, ``006M``, ``03W`` and ``010D``, and ``90+`` are read.
    """
    ages = map_cells(column, _read_age)
    impossible = np.array([age is None for age in ages], bool)
    ages[impossible] = ""
    return ages, int(impossible.sum())


_YEARS_IN: Final = {"y": 1.0, "m": 1 / 12, "w": 7 / 365.25, "d": 1 / 365.25}


def _read_age(cell: str) -> str | None:
    if is_unknown(cell):
        return ""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*(y|m|w|d|years?|\+)?", cell.strip().lower())
    if match is None:
        return None
    unit = (match[2] or "y")[0]
    years = float(match[1]) * _YEARS_IN.get(unit, 1.0)
    return str(int(years)) if 0 <= years <= OLDEST else None


_FRONTALS = "pa ap frontal front anteroposterior posteroanterior antero postero"
_LATERALS = "lateral lat ll rl"
_KIND_OF_WORD: Final = {
    **dict.fromkeys(_FRONTALS.split(), "Frontal"),
    **dict.fromkeys(_LATERALS.split(), "Lateral"),
}
_KIND_OF_LETTER: Final = {"f": "Frontal", "l": "Lateral"}
"""Letters that are a projection only if they stand alone; beside others they tell a side."""
_NO_POSITION: Final = ("frontal", "front", "f", "lateral", "lat")
"""Words of a projection that tell no position."""


def read_views(column: pd.Series[Any]) -> tuple[NDArray[np.object_], NDArray[np.object_]]:
    """Projections (``"Frontal"``, ``"Lateral"``, ``""``) and view positions (``"PA"``, ...)."""

    def words(cell: str) -> list[str]:
        return re.findall(r"[a-z]+", cell.lower())

    def projection(cell: str) -> str:
        name = words(cell)
        if len(name) == 1 and name[0] in _KIND_OF_LETTER:
            return _KIND_OF_LETTER[name[0]]
        kinds = {_KIND_OF_WORD[word] for word in name if word in _KIND_OF_WORD}
        if "decubitus" in name:  # its word lateral is of the patient, not of the beam
            kinds.discard("Lateral")
        return kinds.pop() if len(kinds) == 1 else ""

    def position(cell: str) -> str:
        name = words(cell)
        if start := next((word for word in name if word in ("pa", "ap", "ll", "rl")), ""):
            return start.upper()
        tells_none = name and name[0] in _NO_POSITION and "decubitus" not in name
        return "" if is_unknown(cell) or tells_none else cell.strip()

    return map_cells(column, projection), map_cells(column, position)


# -- what is odd about patients -------------------------------------------------------------


def note_unread_patients(uses: Mapping[str, str], source: str, remedy: str) -> list[str]:
    """Say which ignored columns may name the patients, where no column does."""
    words = ("patient", "subject", "participant", "caseid")
    found = [
        repr(column)
        for column, use in uses.items()
        if use.startswith("ignored") and any(word in squeeze_name(column) for word in words)
    ]
    if not found:
        return []
    return [
        f"No column of {source} is taken for the patient, but {list_names(found, 3)} may be: "
        f"{remedy}. Without patients, images of one may be on both sides of a split."
    ]


_LARGE_SHARE: Final = 0.1
_MANY: Final = 10  # images of one patient below which a share says nothing


def note_patients(images: pd.DataFrame) -> list[str]:
    """Say in sentences what is odd about the patients of an image table."""
    notes = []
    patients = images["patient_id"]
    known = patients[patients != ""]
    if len(known):
        counts = known.value_counts()
        largest, n_images = str(counts.index[0]), int(counts.iloc[0])
        if n_images >= _MANY and n_images > _LARGE_SHARE * len(images):
            notes.append(
                f"Patient {largest!r} has {n_images:,} of the {count(len(images), 'image')} "
                f"({n_images / len(images):.0%}). If this word stands for unknown patients, leave "
                "its cells blank."
            )
    if "hospital" in images and len(known):
        pairs = images.loc[patients != "", ["patient_id", "hospital"]].drop_duplicates()
        pairs = pairs[pairs["hospital"] != ""]
        twice = pairs["patient_id"].duplicated(keep=False)
        if twice.any():
            names = pairs.loc[twice, "patient_id"].drop_duplicates().tolist()
            where = pairs.loc[pairs["patient_id"] == names[0], "hospital"].tolist()
            notes.append(
                f"{count(len(names), 'patient')} ({list_names(names, 3)}) "
                f"{'is' if len(names) == 1 else 'are'} in two hospitals: {names[0]!r} in "
                f"{where[0]!r} and in {where[1]!r}. Their images stay together in the split; if "
                "these are different people, put the hospital in front of the patient's id."
            )
    return notes
