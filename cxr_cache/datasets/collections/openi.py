"""Open-i's original of the Indiana collection: a report per XML file."""

from __future__ import annotations

from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import numpy as np
import pandas as pd

from cxr_cache.common.wording import list_names
from cxr_cache.datasets.codes import BLANK
from cxr_cache.datasets.collections.listing import Listing
from cxr_cache.datasets.collections.places import find_home
from cxr_cache.datasets.labels import FINDINGS, assign_targets, count_unknown_tags
from cxr_cache.errors import TableError

REPORTS: Final = (
    "ecgen-radiology",
    "NLMCXR_reports/ecgen-radiology",
    "reports/ecgen-radiology",
    ".",
)


def find_reports(path: Path) -> list[Path]:
    """The XML files of the reports, where there are any."""
    home = find_home(path)
    for place in REPORTS:
        if found := sorted((home / place).glob("*.xml")):
            return found
    return []


def list_openi(tables: list[Path], path: Path, image_dir: Path | None) -> Listing:
    """Read ``ecgen-radiology/*.xml``, by the 35-finding rule of the Indiana collection.

    The part before the first slash of each term under ``MeSH/major`` is what Kaggle's copy has in
    its column ``Problems``.
    """
    images, problems = [], []
    files = find_reports(path)
    for file in files:
        try:
            report = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise TableError(f"{file} is not whole XML: {error}. Unpack it anew.") from error
        uid = report.find("uId")
        if uid is None:
            raise TableError(
                f"{file} has no uId, which names the study, so it is no report of Open-i."
            )
        terms = ";".join((term.text or "").split("/")[0] for term in report.iterfind("MeSH/major"))
        for image in report.iter("parentImage"):
            images.append({"image_id": image.get("id", ""), "study_uid": uid.get("id", "")})
            problems.append(terms)
    if not files:
        raise TableError(f"{path} holds no report of Open-i; these are ecgen-radiology/*.xml.")
    if not images:
        raise TableError(f"{path}: none of the {len(files):,} reports names an image.")
    table = pd.DataFrame(images)
    targets = assign_targets(problems)
    unknown = list_names([f"{tag!r}" for tag in count_unknown_tags(problems)], 5)
    return Listing(
        table.assign(image_id=table["image_id"] + ".png", patient_id=table["study_uid"]),
        FINDINGS,
        np.where(np.isnan(targets), BLANK, targets).astype(np.int8),
        notes=(f"Terms that the rule for findings does not know: {unknown}.",) if unknown else (),
        columns={"parentImage": "image", "uId": "study and patient", "MeSH/major": "findings"},
    )
