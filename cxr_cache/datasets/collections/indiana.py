"""The Indiana collection's two CSV files -> the image table."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.tables import (
    hash_file,
    read_csv,
    require_columns,
    require_filled,
    require_unique,
)
from cxr_cache.common.wording import count, list_names
from cxr_cache.config import ReadConfig
from cxr_cache.datasets.codes import BLANK, Policy, apply_policy, pick_findings
from cxr_cache.datasets.cohort import FACTS, IMAGE_COLUMNS, Cohort, Reading
from cxr_cache.datasets.columns import FACT_ROLES, ROLE_NAMES, find_roles, require_named, restrict
from cxr_cache.datasets.labels import (
    FINDINGS,
    assign_targets,
    count_unknown_tags,
    parse_labels,
    take_or_nan,
)
from cxr_cache.datasets.table import ROLE_WORDS, read_facts
from cxr_cache.errors import TableError

logger = logging.getLogger(__name__)

PROJECTIONS = {"frontal": "Frontal", "lateral": "Lateral", "": ""}
"""How a projection may be written (in any case), and how the cohort writes it."""
RECIPE_FILE = "phantoms.json"
"""Beside the two tables where the images are drawn ones, see :mod:`cxr_cache.datasets.phantoms`."""


def read_indiana(
    csv_dir: Path, config: ReadConfig | None = None, image_dir: Path | None = None
) -> Cohort:
    """Read a data set in the form of the Indiana collection: two CSV files in one folder.

    ``indiana_reports.csv`` has one row per study with the columns ``uid`` and
    ``Problems``; ``indiana_projections.csv`` one row per image with ``uid``,
    ``filename`` and ``projection``. Rows are joined on ``uid`` and keep the
    order of the images. Other columns are ignored, except these, in either file
    (that of the images counts first):

    ``label``
        Findings separated by ``;``. It takes precedence over the rule for ``Problems``.
    ``patient_id`` (or ``Patient ID``, ``subject_id`` ...)
        Images of one patient then stay together in splits.
    ``sex``, ``age``, ``view_position``, ``split``, ``fold`` (and other names of these)
        Further columns of the image table.

    Where neither file has ages, they are worked out from the birth and study dates in Open-i's
    table of DICOM headers (``*dicom_metadata*.csv``, also packed as ``.csv.gz``), if it lies beside
    the two. An image whose study has no report is kept as an unlabelled row, and the
    number of them is logged as a warning.

    Parameters
    ----------
    csv_dir
        Folder with the two files, or with one ``*reports*.csv`` and one
        ``*projections*.csv``.
    config, image_dir
        As every reader takes them.

    Returns
    -------
    Cohort
        The complete collection has 7,466 images of 3,851 studies; findings are
        the 35 of :data:`cxr_cache.datasets.labels.FINDINGS`.

    Raises
    ------
    TableError
        A file is missing, unreadable or contradicts itself.

    See Also
    --------
    read_csv : the encodings, separators and faults that are dealt with.
    """
    reports_path = _find_csv(csv_dir, "reports")
    images_path = _find_csv(csv_dir, "projections")
    reports, images = read_csv(reports_path), read_csv(images_path)
    require_columns(reports, ("uid",), reports_path)
    require_columns(images, ("uid", "filename", "projection"), images_path)
    require_unique(reports, "uid", reports_path)
    require_unique(images, "filename", images_path)
    require_filled(images, "uid", images_path)
    report_of_image = _join(images, reports, images_path, reports_path)
    table = {
        "image_id": images["filename"].tolist(),
        "study_uid": images["uid"].tolist(),
        "projection": _parse_projections(images, images_path),
    }
    config = config or ReadConfig()
    require_named(config, {images_path: images, reports_path: reports})
    notes: list[str] = []
    uses: dict[str, str] = {}
    for sheet, path in ((images, images_path), (reports, reports_path)):
        facts, of_sheet, noted = _read_facts(sheet, path, config)
        notes += noted
        uses |= {f"{path.name}: {column}": use for column, use in of_sheet.items()}
        for name, cells in facts.items():
            if sheet is reports:
                cells = np.append(cells, "")[report_of_image]  # -1 takes the blank at the end
            table.setdefault(name, cells.tolist())
    headers_path = None if "age" in table else _find_headers(csv_dir)
    if headers_path is not None:
        table["age"] = images["uid"].map(_read_ages(headers_path)).fillna("").tolist()
        uses |= {f"{headers_path.name}: {name}": "age" for name in _OF_HEADERS[1:]}
    if "label" not in images and "label" not in reports and "Problems" in reports:
        notes += _note_unknown_tags(reports["Problems"].tolist())
    picked = pick_findings(FINDINGS, config.findings)
    policy = Policy().with_config(config, FINDINGS)
    targets = _parse_targets(images, reports, report_of_image, images_path, reports_path)
    codes = np.where(np.isnan(targets), BLANK, targets).astype(np.int8)
    has_report = report_of_image >= 0
    targets[has_report] = apply_policy(codes[has_report], FINDINGS, policy)
    ordered = [name for name in (*IMAGE_COLUMNS, *FACTS) if name in table]
    given = [use for use in uses.values() if use.startswith("given")]
    return Cohort(
        pd.DataFrame({name: table[name] for name in dict.fromkeys([*ordered, *table])}),
        targets[:, picked],
        tuple(FINDINGS[place] for place in picked),
        source={
            path.name: hash_file(path) for path in (reports_path, images_path, headers_path) if path
        },
        reading=Reading(
            "phantoms" if (csv_dir / RECIPE_FILE).is_file() else "indiana",
            columns=uses,
            policy=policy.to_text() if config.blank or config.uncertain else "",
            split=f"columns of {images_path.name} and {reports_path.name}" if given else "",
            notes=tuple(notes),
        ),
    )


_USES = {
    "uid": "study",
    "filename": "image file",
    "projection": "projection",
    "Problems": "list of tags",
    "label": "list of findings",
}


def _read_facts(
    table: pd.DataFrame, path: Path, config: ReadConfig
) -> tuple[dict[str, NDArray[np.object_]], dict[str, str], list[str]]:
    """Patients and other facts of one of the files, what its columns are used as, and notes."""
    roles = find_roles(table, path, restrict(config, table), may_choose=tuple(ROLE_NAMES))
    wanted = ("patient", "view", "split", "fold", *FACT_ROLES)
    roles = {role: column for role, column in roles.items() if role in wanted}
    cells, notes = read_facts(table, roles, path)
    uses = {column: ROLE_WORDS.get(role, role) for role, column in roles.items()}
    uses = {name: uses.get(name) or _USES.get(name, "ignored") for name in table.columns}
    names = {"patient": "patient_id"}
    facts = {names.get(name, name): cells[name].to_numpy(object) for name in cells.columns}
    facts.pop("projection", None)  # of the view; the file has its own
    return facts, uses, notes


def _note_unknown_tags(problems: list[str]) -> list[str]:
    """Say which tags no rule knows."""
    unknown = count_unknown_tags(problems)
    if not unknown:
        return []
    names = [f"{tag!r} ({n:,})" for tag, n in unknown.most_common()]
    return [
        f"{count(len(names), 'tag')} in Problems {'is' if len(names) == 1 else 'are'} none that "
        f"the rule knows: {list_names(names, 5)}. A report is not called Normal for such a tag; if "
        "nothing else is mapped, its images are unlabelled. Correct the spelling, or give labels."
    ]


def _find_csv(csv_dir: Path, kind: str) -> Path:
    usual = csv_dir / f"indiana_{kind}.csv"
    if usual.is_file():
        return usual
    if not csv_dir.is_dir():
        raise TableError(f"{csv_dir} is not a folder; give the one with the two CSV files.")
    candidates = sorted(csv_dir.glob(f"*{kind}*.csv"))
    if len(candidates) == 1:
        return candidates[0]
    present = ", ".join(sorted(path.name for path in csv_dir.glob("*.csv"))) or "no CSV file"
    raise TableError(
        f"{csv_dir} needs indiana_{kind}.csv, or exactly one *{kind}*.csv; it holds: {present}."
    )


_OF_HEADERS = ("imageid", "Patient's Birth Date", "Study Date")


def _find_headers(csv_dir: Path) -> Path | None:
    """The table of DICOM headers, where there is one."""
    found = sorted(csv_dir.glob("*dicom_metadata*.csv*"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise TableError(f"{csv_dir} holds several tables of DICOM headers: {names}. Keep one.")
    return found[0] if found else None


def _read_ages(path: Path) -> dict[str, str]:
    """Age in whole years by uid, out of DICOM headers; all images of a study name one date.

    Open-i calls the images of study 57 ``CXR57_IM-...``. An age that nobody has is left out.
    """
    try:  # 170 columns, of which these are wanted
        headers = pd.read_csv(path, dtype=str, usecols=list(_OF_HEADERS), keep_default_na=False)
    except (OSError, ValueError) as error:
        raise TableError(
            f"{path} is no table of DICOM headers with the columns {', '.join(_OF_HEADERS)}: "
            f"{error}. Put Open-i's table there, or take the file away."
        ) from error
    uids = headers["imageid"].str.extract(r"^CXR(\d+)_", expand=False)
    born, studied = (
        pd.to_numeric(headers[name], errors="coerce") for name in _OF_HEADERS[1:]
    )  # 19550820 is the 20th of August
    years = (studied - born) // 10_000
    is_age = uids.notna() & years.between(0, 120)
    if not is_age.all():
        logger.warning(
            "%s: %d of %d rows tell no age: no study, no dates, or impossible ones.",
            path,
            (~is_age).sum(),
            len(is_age),
        )
    ages = years[is_age].astype(int).astype(str)
    return dict(zip(uids[is_age], ages, strict=True))


def _join(
    images: pd.DataFrame, reports: pd.DataFrame, images_path: Path, reports_path: Path
) -> NDArray[np.int64]:
    """Row of each image's report, -1 where there is none; shape (N,)."""
    rows = pd.Index(reports["uid"]).get_indexer(pd.Index(images["uid"]))
    n_without = int((rows < 0).sum())
    if n_without == len(rows):
        raise TableError(
            f"no uid of {images_path.name} occurs in {reports_path.name}: the first are "
            f"{images['uid'].iloc[0]!r} and {reports['uid'].iloc[0]!r}. "
            "Give two files of the same data set."
        )
    if n_without:
        logger.warning(
            "%d of %d images have no report in %s (the first: uid %r); they are kept, unlabelled",
            n_without,
            len(rows),
            reports_path,
            images["uid"].iloc[int((rows < 0).argmax())],
        )
    return np.asarray(rows, np.int64)


def _parse_targets(
    images: pd.DataFrame,
    reports: pd.DataFrame,
    report_of_image: NDArray[np.int64],
    images_path: Path,
    reports_path: Path,
) -> NDArray[np.float32]:
    """Take the user's labels where there are any, else the rule for the reports' tags."""
    if "label" in images:
        return parse_labels(
            images["label"].tolist(), source=str(images_path), lines=images.index.tolist()
        )
    if "label" in reports:
        of_reports = parse_labels(
            reports["label"].tolist(), source=str(reports_path), lines=reports.index.tolist()
        )
    else:
        require_columns(reports, ("Problems",), reports_path)
        of_reports = assign_targets(reports["Problems"].tolist())
    return take_or_nan(of_reports, report_of_image)


def _parse_projections(images: pd.DataFrame, path: Path) -> list[str]:
    written = images["projection"].str.lower()
    unknown = np.flatnonzero(~written.isin(list(PROJECTIONS)))
    if len(unknown):
        row = unknown[0]
        raise TableError(
            f"{path}, line {images.index[row]}: projection {images['projection'].iloc[row]!r} is "
            "neither Frontal nor Lateral; leave it blank where it is something else or unknown."
        )
    return written.map(PROJECTIONS).tolist()
