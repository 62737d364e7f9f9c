"""How the image table of a data set is read, by the form that the data set has."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeAlias

from cxr_cache.common.wording import suggest
from cxr_cache.config import ReadConfig
from cxr_cache.datasets.cohort import Cohort, Reading
from cxr_cache.datasets.collections import catalogue
from cxr_cache.datasets.collections.indiana import read_indiana
from cxr_cache.datasets.collections.recognise import recognise
from cxr_cache.datasets.columns import note_patients
from cxr_cache.datasets.dicom.folder import add_header_facts, read_dicom
from cxr_cache.datasets.flow import count_images
from cxr_cache.datasets.locate import default_image_dir
from cxr_cache.datasets.table import read_own_table
from cxr_cache.errors import ConfigError

logger = logging.getLogger(__name__)

Reader: TypeAlias = Callable[[Path, ReadConfig, Path | None], Cohort]
"""Takes the path that the user gives, the options, and the folder with the images, if one is
named."""

READERS: Final[dict[str, Reader]] = {
    "indiana": read_indiana,
    **catalogue.READERS,
    "dicom": read_dicom,
    "table": read_own_table,
}
"""Forms of data sets by name; whoever has another form adds a reader here."""

AUTO: Final = "auto"


def load_cohort(
    path: str | Path,
    format: str = AUTO,  # noqa: A002
    *,
    image_dir: str | Path | None = None,
    config: ReadConfig | None = None,
) -> Cohort:
    """Read which images a data set has, of which studies, and with which findings.

    Parameters
    ----------
    path
        What the format's reader takes: a folder of a data set, a table, or a folder of images.
    format
        A name among :data:`READERS`, or ``"auto"``, which recognises it by files and columns.
    image_dir
        Folder with the images, where they lie elsewhere.
    config
        Names of columns and what is made of label codes; None recognises and takes the defaults.

    Returns
    -------
    Cohort
        Rows in the order of the data set's own table; its attribute ``reading`` tells how the
        tables were understood.

    Raises
    ------
    TableError
        A file is missing, unreadable or contradicts itself.
    ConfigError
        There is no such format.

    Examples
    --------
    >>> cohort = load_cohort("indiana_csv")  # doctest: +SKIP
    >>> len(cohort), cohort.images["projection"].value_counts().to_dict()  # doctest: +SKIP
    (7466, {'Frontal': 3818, 'Lateral': 3648})
    """
    if format not in (AUTO, *READERS):
        raise ConfigError(
            f"No reader is called {format!r}; format is one of {', '.join([AUTO, *READERS])}."
            f"{suggest(format, READERS)}"
        )
    path, why = Path(path), ""
    if format == AUTO:
        format, why = recognise(path)  # noqa: A001
        logger.info("%s is read as %s: %s", path, format, why)
    folder = None if image_dir is None else Path(image_dir)
    cohort = READERS[format](path, config or ReadConfig(), folder)
    if format == "table":
        where = folder or default_image_dir(path)
        cohort = add_header_facts(cohort, where, config or ReadConfig())
    return _annotate(cohort, why)


def _annotate(cohort: Cohort, why: str) -> Cohort:
    """Add what holds for every format: why it was taken for this, what is odd, how much it is."""
    reading = cohort.reading or Reading("")
    counts = {"rows": len(cohort), **reading.counts, **count_images(cohort.images)._asdict()}
    notes = tuple(dict.fromkeys([*reading.notes, *note_patients(cohort.images)]))
    for note in notes:
        logger.warning(note)
    return cohort.with_reading(replace(reading, why=why, notes=notes, counts=counts))
