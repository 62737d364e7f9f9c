"""What a user can cause and fix; the command line prints these as one message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class CxrCacheError(Exception):
    """Base class; the command line prints these without a traceback."""


class ConfigError(CxrCacheError, ValueError):
    """Options that contradict each other or lie outside their range.

    Parameters
    ----------
    message
        Whole sentences; made from `problems` where it is empty.
    problems
        Fields and what is wrong with each, in words that follow its name.
    """

    def __init__(self, message: str = "", problems: Sequence[tuple[str, str]] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__(message or self.spelled({}))

    def spelled(self, flags: Mapping[str, str]) -> str:
        """Give the message with the fields under the names of `flags`, as a command has them."""
        if not self.problems:
            return str(self)
        said = "; ".join(f"{flags.get(field, field)} {text}" for field, text in self.problems)
        return said if said.endswith("?") else f"{said}."


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
    """Another process is writing to the store or the folder."""


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


class JobStopped(KeyboardInterrupt):
    """Ctrl-C in a later part of a job; the message says what is done, and what is left to do."""
