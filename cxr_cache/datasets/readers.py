"""How the image table of a data set is read, by the form that the data set has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from cxr_cache.common.wording import suggest
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.indiana import read_indiana
from cxr_cache.errors import ConfigError

READERS: Final[dict[str, Callable[[Path], Cohort]]] = {"indiana": read_indiana}
"""Forms of data sets by name; a reader takes the path that the user gives."""

AUTO: Final = "auto"


def load_cohort(path: str | Path, format: str = AUTO) -> Cohort:  # noqa: A002
    """Read which images a data set has, of which studies, and with which findings.

    Parameters
    ----------
    path
        What the format's reader takes: for ``"indiana"`` the folder with its two CSV files, as
        :func:`cxr_cache.datasets.indiana.read_indiana` describes them.
    format
        A name among :data:`READERS`, or ``"auto"``: Indiana's, the only one so far.

    Returns
    -------
    Cohort
        Rows in the order of the data set's own table.

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
    return READERS["indiana" if format == AUTO else format](Path(path))
