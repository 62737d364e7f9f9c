"""What a user can cause and fix; the command line prints these as one message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CxrCacheError(Exception):
    """Base class; the command line prints these without a traceback."""


class ConfigError(CxrCacheError, ValueError):
    """Options that contradict each other or lie outside their range."""


class TableError(CxrCacheError, ValueError):
    """A CSV file that cannot be read as what it should be."""


class ImageError(CxrCacheError, ValueError):
    """One image file cannot be used; the message is the reason, in a sentence."""


class TooManyFailuresError(CxrCacheError, RuntimeError):
    """More images failed than the user allowed."""


class EncoderError(CxrCacheError, ValueError):
    """An encoder that cannot be found, loaded or split."""


class StoreNotFoundError(CxrCacheError, FileNotFoundError):
    """There is no feature store at the path."""


class StoreFormatError(CxrCacheError, ValueError):
    """The file is not a feature store of this format version, or is damaged."""


class StoreMismatchError(CxrCacheError, ValueError):
    """The store holds embeddings of another encoder, cohort or preprocessing."""


class StoreBusyError(CxrCacheError, OSError):
    """Another process is writing to the store."""


class StoreIncompleteError(CxrCacheError, ValueError):
    """The store still has pending rows."""


class DiskFullError(CxrCacheError, OSError):
    """There is not enough space where a file should be written."""


class DiskError(CxrCacheError, OSError):
    """The disk failed while a store was being written."""


class BackendError(CxrCacheError, RuntimeError):
    """Workers that cannot be started or reached."""


class WorkerLostError(BackendError):
    """A worker ended while it had work."""


class TrainingError(CxrCacheError, ArithmeticError):
    """Training went where no result can come from."""


class RunError(CxrCacheError, ValueError):
    """A run folder that is missing, unfinished, finished already, or of another store."""


class ExportError(CxrCacheError, RuntimeError):
    """A model that cannot be written in a format, or whose file would compute something else."""


def nearest_names(name: str, known: Iterable[str], n: int = 1) -> list[str]:
    """Up to `n` of the known names that `name` may be meant for, best first.

    Case and white space do not matter.

    Examples
    --------
    >>> nearest_names("cardiomegly", ["Edema", "Cardiomegaly"])
    ['Cardiomegaly']
    """
    spelled = {normalise(other): other for other in known}
    return [spelled[match] for match in difflib.get_close_matches(normalise(name), spelled, n)]


def suggest(name: str, known: Iterable[str]) -> str:
    """A question with the names nearest to `name`; empty where none is near."""
    close = nearest_names(name, known, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def normalise(name: str) -> str:
    """A name in small letters, with single spaces."""
    return " ".join(name.split()).lower()
