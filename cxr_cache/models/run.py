"""The run folder: config, weights, predictions and tables, each written whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import pandas as pd

from cxr_cache.common.files import (
    disk_errors_named,
    hold_folder,
    replacing,
    require_no_writer,
    write_whole,
)
from cxr_cache.common.tables import write_table
from cxr_cache.common.wording import describe_differences, find_differences
from cxr_cache.datasets.preprocessing import number_decode_rule
from cxr_cache.errors import RunError
from cxr_cache.metrics.operating_point import Calibration, OperatingPoint

if TYPE_CHECKING:  # torch takes seconds to import; `report` and `--help` do without it
    from torch import Tensor

FORMAT_VERSION: Final = 1
TableName = Literal[
    "splits",
    "targets",
    "epoch_search",
    "history",
    "predictions",
    "out_of_fold",
    "per_finding",
    "per_finding_by_study",
    "groups",
    "subgroups",
    "curves",
    "calibration",
    "zero_shot",
]

FINAL_FOLD: Final = "final"
"""What stands in the column `fold` of ``history.csv`` for the final model."""

_CONFIG: Final = "config.json"
_METRICS: Final = "metrics.json"
_MODEL: Final = "model.safetensors"
_FOLD_HEADS: Final = "fold_heads.safetensors"
_STATES: Final = "unfinished"
_REPORT: Final = "report.html"
_CARD: Final = "model_card.md"
_PLOTS: Final = "plots"
_MODEL_ENTRY: Final = "cxr_cache"
_MODEL_FIELDS: Final = (
    *("findings", "thresholds", "encoder", "head"),
    *("tail", "threshold_rule", "calibration"),
)
_LATER_FIELDS: Final = {"tail": None, "threshold_rule": "f1", "calibration": None}
"""What a model says that was saved before the field existed."""
_ENCODER_PREFIX: Final = "visual."
_TEXT_COLUMNS: Final = ("image_id", "study_uid", "patient_id", "projection", "split")
_TEXT_COLUMNS_OF: Final[dict[str, tuple[str, ...]]] = {
    "history": ("fold",),
    "per_finding": ("finding",),
    "per_finding_by_study": ("finding",),
    "subgroups": ("group", "value", "finding"),
    "curves": ("finding",),
    "calibration": ("stage", "finding"),
    "zero_shot": ("finding", "present", "absent"),
}
"""More columns of text, whatever is in them; other tables may have a finding of such a name."""


@dataclass(frozen=True)
class SavedModel:
    """What was trained, and what is needed to use it on other images."""

    tensors: dict[str, Tensor]
    """Weights by name; the leading axis is the members that are averaged."""
    findings: tuple[str, ...]
    thresholds: dict[str, float]
    """Probability from which on a finding counts as present."""
    encoder: dict[str, Any]
    """Identity of the encoder whose embeddings the head reads."""
    head: dict[str, Any]
    """How embeddings are prepared and what the head looks like."""
    tail: dict[str, Any] | None = None
    """Of a fine-tuned run: which blocks were trained, and how they compute."""
    threshold_rule: str = "f1"
    """How the thresholds were chosen."""
    calibration: dict[str, Any] | None = None
    """Map from the model's probabilities to those the thresholds belong to; None is none."""

    @property
    def head_tensors(self) -> dict[str, Tensor]:
        """Weights of the heads."""
        return {k: v.float() for k, v in self.tensors.items() if not k.startswith(_ENCODER_PREFIX)}

    @property
    def tail_tensors(self) -> dict[str, Tensor]:
        """Weights of the encoder's fine-tuned blocks, by their names in the checkpoint."""
        return {k: v.float() for k, v in self.tensors.items() if k.startswith(_ENCODER_PREFIX)}

    def read_at(self, point: OperatingPoint) -> SavedModel:
        """The model with thresholds and calibration of this operating point instead of its own."""
        return replace(
            self,
            thresholds=point.by_finding(self.findings),
            threshold_rule=point.rule,
            calibration=point.calibration.to_dict(),
        )


def read_calibration(stored: dict[str, Any] | None, n_findings: int) -> Calibration:
    """The map that a :class:`SavedModel` describes."""
    return Calibration.none(n_findings) if stored is None else Calibration.from_dict(stored)


class Run:
    """A folder that explains itself: everything one training produced, by name.

    Make one with :meth:`create`, read one with :meth:`open`. Files appear under
    their names only when they are complete.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self._let_go: Callable[[], object] = lambda: None

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any], *, overwrite: bool = False) -> Run:
        """Start a run folder; an unfinished run of before is started anew.

        No other process may write to the folder until the run is finished or this process ends.

        Raises
        ------
        RunError
            `path` holds a finished run and `overwrite` is off, or holds other files.
        StoreBusyError
            Another process is writing to `path`; the message names it.
        """
        path = Path(path)
        require_free(path, overwrite=overwrite)
        with disk_errors_named(path):
            path.mkdir(parents=True, exist_ok=True)
        run = cls(path, {"format_version": FORMAT_VERSION, "versions": _versions(), **config})
        with run._held():
            require_free(path, overwrite=overwrite)  # another may have finished since
            run._write_config("running")  # first: what is left of an old run is not taken for one
        tables = (f"{table}.csv" for table in get_args(TableName))
        for name in (_METRICS, _MODEL, _FOLD_HEADS, _REPORT, _CARD, *tables):
            (path / name).unlink(missing_ok=True)
        for folder in (_PLOTS, _STATES):
            shutil.rmtree(path / folder, ignore_errors=True)
        return run

    @classmethod
    def resume(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        free: Collection[str] = (),
        incidental: Collection[str] = (),
        writes: bool = True,
    ) -> Run | None:
        """The unfinished run at `path`, to be continued; None where there is nothing to continue.

        Parameters
        ----------
        path
            Run folder, which may not exist.
        config
            What decides the run's results: some of the entries that :meth:`create` was given.
        free
            Settings (``"finetune.device"``) that may differ.
        incidental
            Settings (``"store.path"``) that are named beside others that differ, but may differ
            alone.
        writes
            This process is the one that writes, so no other may; as in :meth:`create`.

        Raises
        ------
        RunError
            The run there was started with other options, or from another store.
        StoreBusyError
            Another process is writing to `path`.
        """
        run = cls(Path(path), _read_config(Path(path)) or {})
        if not run._is_begun():
            return None
        with run._held(writes=writes):
            run.config = _read_config(run.path) or {}
            if not run._is_begun():  # another has finished it since
                return None
            run._require_same(config, free, incidental)
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a finished run.

        Raises
        ------
        RunError
            There is no run at `path`, it has not finished, or another version wrote it.
        """
        path = Path(path)
        config = _read_config(path)
        if config is None:
            raise RunError(
                f"{path} is not a run folder: it has no {_CONFIG}. `cxr-cache train` makes one."
            )
        if config.get("format_version") != FORMAT_VERSION:
            raise RunError(
                f"{path}/{_CONFIG} has format version {config.get('format_version')}, this "
                f"cxr-cache reads {FORMAT_VERSION}. Train again, or use the version that wrote it."
            )
        if config.get("status") != "finished":
            raise RunError(
                f"{path} is not finished: its training was interrupted or is still running. "
                f"Run the same `cxr-cache {config.get('kind', 'train')}` command again."
            )
        return cls(path, config)

    def finish(self) -> None:
        """Declare the run complete; from here on it is not overwritten unasked."""
        self._write_config("finished")
        shutil.rmtree(self.path / _STATES, ignore_errors=True)
        self._let_go()

    @contextmanager
    def _held(self, *, writes: bool = True) -> Iterator[None]:
        """Keep others from writing to the folder: from here on, unless the block fails."""
        if writes:
            self._let_go = hold_folder(self.path, self)
        try:
            yield
        except BaseException:
            self._let_go()
            raise

    def _is_begun(self) -> bool:
        """Whether there is something to continue."""
        status = self.config.get("status", "finished")
        return status != "finished" and (self.path / _STATES).is_dir()

    def _require_same(
        self, config: Mapping[str, Any], free: Collection[str], incidental: Collection[str]
    ) -> None:
        """Raise RunError unless the run was started as :meth:`resume` was told."""
        given = json.loads(json.dumps(config, default=_jsonable))  # tuples are lists in JSON
        before = _flatten({key: self.config.get(key) for key in given})
        differences = {
            name: values
            for name, values in find_differences(before, _flatten(given)).items()
            if name not in free
        }
        if differences.keys() - set(incidental):
            raise RunError(
                f"{self.path} holds an unfinished run that was started differently:\n"
                + describe_differences(differences, "in the run", "now")
                + "\nContinue it with the same options and store, choose another folder, or start "
                "it anew with --overwrite."
            )

    def _write_config(self, status: str) -> None:
        self.config = {**self.config, "status": status}
        write_whole(
            self.path / _CONFIG, json.dumps(self.config, indent=2, default=_jsonable).encode()
        )

    # -- tables -------------------------------------------------------------------------

    def write_table(self, name: TableName, table: pd.DataFrame) -> Path:
        """Write ``NAME.csv``; floats keep nine significant digits, which is all of float32."""
        path = self.path / f"{name}.csv"
        write_table(path, table)
        return path

    def read_table(self, name: TableName) -> pd.DataFrame:
        """Read ``NAME.csv``; ids are text, whatever they look like."""
        path = self.path / f"{name}.csv"
        if not path.is_file():
            raise RunError(f"{path} is missing; the run folder is not whole. Train again.")
        text_columns = [*_TEXT_COLUMNS, *_TEXT_COLUMNS_OF.get(name, ())]
        if name in ("predictions", "out_of_fold"):
            text_columns += _read_image_columns(path)
        dtypes = dict.fromkeys(text_columns, str)
        table = pd.read_csv(path, dtype=dtypes, keep_default_na=False, na_values=[""])
        text = [column for column in dtypes if column in table]
        table[text] = table[text].fillna("")
        return table

    # -- metrics, plots, page -----------------------------------------------------------

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json``; what is undefined must be None, not NaN."""
        text = json.dumps(metrics, indent=2, allow_nan=False, default=_jsonable)
        write_whole(self.path / _METRICS, text.encode())

    def read_metrics(self) -> dict[str, Any]:
        """Read ``metrics.json``."""
        path = self.path / _METRICS
        if not path.is_file():
            raise RunError(f"{path} is missing. `cxr-cache evaluate {self.path}` writes it.")
        metrics: dict[str, Any] = json.loads(path.read_text())
        return metrics

    def plot_path(self, name: str) -> Path:
        """Where the plot called `name` goes; its folder is made."""
        (self.path / _PLOTS).mkdir(exist_ok=True)
        return self.path / _PLOTS / f"{name}.png"

    @property
    def report_path(self) -> Path:
        """The page of this run."""
        return self.path / _REPORT

    def write_report(self, html: str) -> Path:
        """Write ``report.html``."""
        write_whole(self.report_path, html.encode())
        return self.report_path

    def write_model_card(self, markdown: str) -> Path:
        """Write ``model_card.md``."""
        path = self.path / _CARD
        write_whole(path, markdown.encode())
        return path

    def has_table(self, name: TableName) -> bool:
        """Whether ``NAME.csv`` is there; runs of earlier versions lack some."""
        return (self.path / f"{name}.csv").is_file()

    @property
    def groups_path(self) -> Path | None:
        """The table of the groups that test images are evaluated by, where there is one."""
        return self.path / "groups.csv" if self.has_table("groups") else None

    # -- what an interrupted training continues from ------------------------------------

    def save_state(self, name: str, state: Mapping[str, Any]) -> None:
        """Keep the state of a training: tensors, numbers and text, in nested containers."""
        import torch

        (self.path / _STATES).mkdir(exist_ok=True)
        with replacing(self._state_path(name)) as file:
            torch.save(dict(state), file)

    def load_state(self, name: str) -> dict[str, Any] | None:
        """What :meth:`save_state` kept under `name`; None if there is nothing.

        Raises
        ------
        RunError
            The file is damaged.
        """
        import torch

        path = self._state_path(name)
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes can raise anything
            raise RunError(
                f"{path} is damaged, so the training cannot continue from it. Delete this file; "
                "the same command then trains that part again."
            ) from error
        return state

    def _state_path(self, name: str) -> Path:
        return self.path / _STATES / f"{name}.pt"

    # -- model --------------------------------------------------------------------------

    def save_model(self, model: SavedModel) -> None:
        """Write ``model.safetensors``: tensors, and everything else as JSON metadata."""
        from safetensors.torch import save

        description = {field: getattr(model, field) for field in _MODEL_FIELDS}
        # One entry: safetensors writes several in an order that changes from call to call.
        metadata = {_MODEL_ENTRY: json.dumps(description, default=_jsonable)}
        write_whole(self.path / _MODEL, save(_plain(model.tensors), metadata))

    def save_fold_heads(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the K heads of the search, after the chosen epochs; axis 0 is the folds."""
        from safetensors.torch import save

        write_whole(self.path / _FOLD_HEADS, save(_plain(tensors)))

    def load_fold_heads(self) -> dict[str, Tensor]:
        """Read what :meth:`save_fold_heads` wrote.

        Raises
        ------
        RunError
            The file is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path / _FOLD_HEADS
        if not path.is_file():
            raise RunError(f"{path} is missing. Train the run again with `cxr-cache train`.")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise RunError(f"{path} is damaged: {error}. Train the run again.") from error

    def load_model(self) -> SavedModel:
        """Read ``model.safetensors``.

        Raises
        ------
        RunError
            The file is missing or is not a model of this package.
        """
        from safetensors import safe_open

        description = self._read_model_description()
        with safe_open(self.path / _MODEL, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        from cxr_cache.models.heads import find_norm

        # Version 0.1.0 did not write down the norm of the hidden layers.
        description["head"] = {"norm": find_norm(tensors)} | description["head"]
        return SavedModel(tensors, **{**description, "findings": tuple(description["findings"])})

    @property
    def thresholds(self) -> dict[str, float]:
        """Probability from which on each finding counts as present."""
        thresholds: dict[str, float] = self._read_model_description()["thresholds"]
        return thresholds

    @property
    def threshold_rule(self) -> str:
        """How the thresholds were chosen."""
        rule: str = self._read_model_description()["threshold_rule"]
        return rule

    @property
    def calibration(self) -> Calibration:
        """Map from the model's own probabilities, as tables hold them, to calibrated ones."""
        description = self._read_model_description()
        return read_calibration(description["calibration"], len(description["findings"]))

    def _read_model_description(self) -> dict[str, Any]:
        from safetensors import SafetensorError, safe_open

        path = self.path / _MODEL
        if not path.is_file():
            raise RunError(f"{path} is missing; the run folder is not whole. Train again.")
        try:
            with safe_open(path, framework="np") as file:
                description = json.loads((file.metadata() or {})[_MODEL_ENTRY])
            description = _LATER_FIELDS | description
            description["encoder"] = number_decode_rule(description["encoder"])
            return {field: description[field] for field in _MODEL_FIELDS}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path} is not a model of cxr-cache: {error}. Train again.") from error


def require_free(path: Path, *, overwrite: bool) -> None:
    """Raise unless a run may be written to `path`; called before the long work.

    Raises
    ------
    RunError
        `path` holds a finished run and `overwrite` is off, or holds other files.
    StoreBusyError
        Another process is writing to `path`.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; --run-dir needs a folder, which may not exist yet.")
    config = _read_config(path)
    if config is None and path.is_dir() and any(p.name[0] != "." for p in path.iterdir()):
        raise RunError(f"{path} holds other files and no run. Choose a folder of its own.")
    if config is not None and config.get("status") == "finished" and not overwrite:
        raise RunError(
            f"{path} holds a finished run. Choose another folder, or replace it with --overwrite."
        )
    if path.is_dir():
        require_no_writer(path)


def _read_config(path: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((path / _CONFIG).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise _damaged(path, "is not a run's configuration")
    store = config.get("store")
    if isinstance(store, dict) and isinstance(store.get("encoder"), dict):
        config["store"] = {**store, "encoder": number_decode_rule(store["encoder"])}
    return config


def _read_image_columns(path: Path) -> list[str]:
    """The columns of a table of predictions that come from the image table: those before `split`.

    What follows are the findings, whose columns hold numbers.
    """
    header = pd.read_csv(path, nrows=0).columns.tolist()
    return header[: header.index("split")] if "split" in header else []


def _damaged(path: Path, reason: str) -> RunError:
    return RunError(
        f"{path / _CONFIG} {reason}; the run is damaged. Train into another folder, or delete "
        "this one."
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under one name each, so that a difference names the setting."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not go into JSON")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("cxr-cache", "torch", "numpy", "scikit-learn"):
        with suppress(importlib.metadata.PackageNotFoundError):  # used from its folder
            versions[package] = importlib.metadata.version(package)
    return versions
