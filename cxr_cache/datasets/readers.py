"""How the image table of a data set is read, by the form that the data set has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from cxr_cache.common.wording import suggest
from cxr_cache.config import ReadConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.indiana import read_indiana
from cxr_cache.errors import ConfigError

Reader: TypeAlias = Callable[[Path, ReadConfig, Path | None], Cohort]
"""Takes the path that the user gives, the options, and the folder with the images, if one is
named."""

READERS: Final[dict[str, Reader]] = {"indiana": read_indiana}
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
    read = READERS["indiana" if format == AUTO else format]
    return read(Path(path), config or ReadConfig(), None if image_dir is None else Path(image_dir))
