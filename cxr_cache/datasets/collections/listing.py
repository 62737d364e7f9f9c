"""What the tables of a published data set say, in one form, before any choice is made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import hash_file
from cxr_cache.common.wording import count, normalise_name, suggest
from cxr_cache.config import BLANK_CHOICES, UNCERTAIN_CHOICES, ReadConfig, parse_policy
from cxr_cache.datasets.cohort import Cohort, Reading
from cxr_cache.errors import ConfigError, TableError

PRESENT: Final = 1.0
UNCERTAIN: Final = -1.0
BLANK: Final = np.nan

CHEXPERT_FINDINGS: Final = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion"),
    *("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    *("Pleural Other", "Fracture", "Support Devices"),
)
"""The 14 observations of CheXpert's labeller, which MIMIC-CXR-JPG and BRAX took over."""
NO_FINDING_BLANK: Final = (
    "The labeller writes No Finding as 1 or leaves it blank, never 0; with --blank ignore it has "
    "positives only."
)
_OTHER_NAMES: Final = {"Airspace Opacity": "Lung Opacity"}
"""What radiologists' test labels of CheXpert and MIMIC-CXR-JPG call the same observation."""


@dataclass(frozen=True)
class Listing:
    """N images with what is known of each, and each finding as it was coded.

    Attributes
    ----------
    images
        Columns of the image table, cells as written, index 0 to N - 1.
    codes
        1 present, 0 absent, -1 uncertain, NaN blank; columns are the findings, float32.
    files
        The files that were read.
    usual
        The findings that are taken unless others are named; None takes all.
    unlabelled
        Images of which the tables say nothing, whatever is made of a blank; shape ``(N,)``.
    uncertain, blank
        What the authors make of these codes: ``"ignore"``, ``"zeros"`` or ``"ones"``.
    split
        Whose split the column ``given_split`` has.
    notes
        Whole sentences for whoever uses the data set.
    """

    images: pd.DataFrame
    codes: pd.DataFrame
    files: tuple[Path, ...]
    usual: tuple[str, ...] | None = None
    unlabelled: NDArray[np.bool_] | None = None
    uncertain: str = "ignore"
    blank: str = "ignore"
    split: str = ""
    notes: tuple[str, ...] = ()


def take_columns(table: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """The columns of a table that `names` knows and the table has, under their new names."""
    return pd.DataFrame(
        {new: table[old].to_numpy(object) for old, new in names.items() if old in table}
    )


def code_columns(table: pd.DataFrame, findings: Sequence[str], path: Path) -> pd.DataFrame:
    """Codes of columns that hold 1, 0, -1 or nothing, with or without decimals.

    Raises
    ------
    TableError
        A cell holds something else; the message has its line.
    """
    table = table.rename(columns=_OTHER_NAMES)
    codes = {}
    for finding in findings:
        numbers = pd.to_numeric(table[finding], errors="coerce").to_numpy(np.float32)
        strange = ~np.isin(numbers, (1, 0, -1)) & (table[finding] != "").to_numpy()
        if strange.any():
            row = int(strange.argmax())
            raise TableError(
                f"{path}, line {table.index[row]}: column {finding!r} holds "
                f"{table[finding].iloc[row]!r}, but a finding is 1 (present), 0 (absent), -1 "
                "(uncertain) or blank."
            )
        codes[finding] = numbers
    return pd.DataFrame(codes)


def code_lists(
    cells: pd.Series[str], findings: Sequence[str], split_cell: Callable[[str], Iterable[str]]
) -> tuple[pd.DataFrame, Counter[str]]:
    """Codes of cells that list what is present; all else is absent, of a blank cell all is blank.

    Returns
    -------
    codes
        A column for each of `findings`.
    unknown
        Other names that the cells hold, with the number of their rows.
    """
    row_of, different = pd.factorize(cells)
    n_rows = np.bincount(row_of, minlength=len(different))
    column_of = {finding: column for column, finding in enumerate(findings)}
    codes = np.zeros((len(different), len(findings)), np.float32)
    unknown: Counter[str] = Counter()
    for row, cell in enumerate(different):
        names = set(split_cell(cell))
        if not names:
            codes[row] = BLANK
        for name in names:
            if name in column_of:
                codes[row, column_of[name]] = PRESENT
            else:
                unknown[name] += int(n_rows[row])
    return pd.DataFrame(codes[row_of], columns=list(findings)), unknown


# -- a listing and the choices made of it -> the cohort -----------------------------------

_FRONTAL: Final = frozenset({"PA", "AP", "FRONTAL"})
_LATERAL: Final = frozenset({"LL", "RL", "L", "LAT", "LLAT", "LATERAL"})
_VALUE: Final = {"ignore": np.nan, "zeros": 0.0, "ones": 1.0}
OLDEST: Final = 120
"""Years; NIH's first edition has ages up to 414."""


def make_cohort(listing: Listing, format: str, config: ReadConfig) -> Cohort:  # noqa: A002
    """Take the findings that are wanted, and make targets of their codes.

    Several rows of one image, by several readers, become one.
    """
    findings = _choose_findings(listing, config)
    codes = listing.codes[list(findings)]
    uncertain = _policy(config.uncertain, UNCERTAIN_CHOICES, listing.uncertain, findings)
    blank = _policy(config.blank, BLANK_CHOICES, listing.blank, findings)
    values = codes.to_numpy(np.float32)
    targets = np.where(values == UNCERTAIN, [_VALUE[choice] for choice in uncertain], values)
    targets = np.where(np.isnan(values), [_VALUE[choice] for choice in blank], targets)
    if listing.unlabelled is not None:
        targets[listing.unlabelled] = np.nan
    images, notes = _tidy_facts(listing.images)
    rows, targets = _join_readers(images["image_id"], targets.astype(np.float32), config.readers)
    return Cohort(
        images.iloc[rows],
        targets,
        findings,
        source={file.name: hash_file(file) for file in listing.files},
        reading=Reading(
            format,
            codes={finding: _count_codes(codes[finding]) for finding in findings},
            policy=_say_policy(uncertain, blank, findings),
            split=listing.split,
            notes=(*listing.notes, *notes),
        ),
    )


def _choose_findings(listing: Listing, config: ReadConfig) -> tuple[str, ...]:
    if config.findings is None:
        return listing.usual or tuple(listing.codes.columns)
    known = {normalise_name(name): name for name in listing.codes.columns}
    for name in config.findings:
        if normalise_name(name) not in known:
            raise ConfigError(
                f"The data set has no finding {name!r}; its findings are "
                f"{', '.join(known.values())}.{suggest(name, known.values())}"
            )
    return tuple(known[normalise_name(name)] for name in config.findings)


def _policy(
    text: str | None, choices: tuple[str, ...], default: str, findings: Sequence[str]
) -> list[str]:
    """The choice for each finding."""
    for_all, for_some = (None, {}) if text is None else parse_policy(text, choices)
    return [for_some.get(finding, for_all or default) for finding in findings]


def _say_policy(uncertain: list[str], blank: list[str], findings: Sequence[str]) -> str:
    words = []
    for code, choices in (("uncertain", uncertain), ("blank", blank)):
        usual = max(set(choices), key=choices.count)
        others = [f"{f}={c}" for f, c in zip(findings, choices, strict=True) if c != usual]
        words.append(f"{code}: {', '.join([usual, *others])}")
    return "; ".join(words)


def _count_codes(codes: pd.Series[Any]) -> dict[str, int]:
    counts = {code: int((codes == float(code)).sum()) for code in ("1", "0", "-1")}
    return {**counts, "blank": int(codes.isna().sum())}


def _tidy_facts(images: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Sex as F or M, age in years, views in capitals with their projection; and what was left out."""
    tidy, notes = images.reset_index(drop=True), []
    if "view_position" in tidy:
        tidy["view_position"] = views = tidy["view_position"].str.upper()
        if "projection" not in tidy:
            first = views.str.split("[ _]", n=1).str[0]
            kinds = [first.isin(_FRONTAL), first.isin(_LATERAL) | views.str.contains("LATERAL")]
            tidy["projection"] = np.select(kinds, ["Frontal", "Lateral"], "")
    if "sex" in tidy:
        first = tidy["sex"].str[:1].str.upper()
        tidy["sex"] = first.where(first.isin(["F", "M"]), "")
    if "age" in tidy:
        age = pd.to_numeric(tidy["age"], errors="coerce")
        impossible = (age < 0) | (age > OLDEST)
        if impossible.any():
            notes.append(f"{count(int(impossible.sum()), 'impossible age')} left blank.")
        tidy["age"] = age.mask(impossible)
    return tidy, notes


def _join_readers(
    names: pd.Series[str], targets: NDArray[np.float32], rule: str
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """First row of each image, and its targets over all of its rows."""
    if names.is_unique:
        return np.arange(len(names)), targets
    image_of, _ = pd.factorize(names)
    share = pd.DataFrame(targets).groupby(image_of).mean().to_numpy()
    rows = np.flatnonzero(~names.duplicated().to_numpy())
    half = {"majority": np.nan, "mean": 1.0}.get(rule)
    if half is None:
        joined = share > 0 if rule == "any" else share == 1
    else:
        joined = np.where(share == 0.5, half, share > 0.5)
    return rows, np.where(np.isnan(share), np.nan, joined).astype(np.float32)
