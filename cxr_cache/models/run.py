"""The run folder: config, weights, predictions and tables, each written whole or not at all."""

from __future__ import annotations

import json
import logging
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
from cxr_cache.common.manifest import FILE as MANIFEST
from cxr_cache.common.manifest import mark_written
from cxr_cache.common.tables import write_table
from cxr_cache.common.wording import (
    count,
    describe_differences,
    find_differences,
    list_names,
    package_versions,
)
from cxr_cache.datasets.preprocessing import number_decode_rule
from cxr_cache.errors import RunError
from cxr_cache.metrics.operating_point import Calibration, OperatingPoint
from cxr_cache.models.unlikeness import TrainingDistribution

if TYPE_CHECKING:  # torch takes seconds to import; `report` and `--help` do without it
    from torch import Tensor

FORMAT_VERSION: Final = 1
TableName = Literal[
    "flow",
    "splits",
    "targets",
    "epoch_search",
    "history",
    "predictions",
    "out_of_fold",
    "logistic",
    "repeats",
    "per_finding",
    "per_finding_by_study",
    "groups",
    "subgroups",
    "group_differences",
    "curves",
    "decision_curves",
    "calibration",
    "label_counts",
    "zero_shot",
    "matching",
    "overlap",
    "outer_folds",
    "outer_predictions",
]

FINAL_FOLD: Final = "final"
"""What stands in the column `fold` of ``history.csv`` for the final model."""

_PACKAGES: Final = ("cxr-cache", "torch", "numpy", "numba", "scikit-learn")
_CONFIG: Final = "config.json"
_METRICS: Final = "metrics.json"
_READS: Final = "test_reads.json"
_MODEL: Final = "model.safetensors"
_FOLD_HEADS: Final = "fold_heads.safetensors"
_DISTRIBUTION: Final = "training_distribution.safetensors"
_REPEAT_HEADS: Final = "fold_heads_{}.safetensors"
_STATES: Final = "unfinished"
_REPORT: Final = "report.html"
_CARD: Final = "model_card.md"
_PLOTS: Final = "plots"
_LOGS: Final = "logs"
_OUTER: Final = "outer_fold_{}"
_MODEL_ENTRY: Final = "cxr_cache"
_MODEL_FIELDS: Final = (
    *("findings", "thresholds", "encoder", "head"),
    *("tail", "threshold_rule", "calibration", "min_positives"),
)
_FURTHER: Final = "further_encoders"
"""What a model says beside :data:`_MODEL_FIELDS`, if it reads several stores."""

logger = logging.getLogger(__name__)
_LATER_FIELDS: Final = {
    **{"tail": None, "threshold_rule": "f1", "calibration": None, "min_positives": 0}
}
"""What a model says that was saved before the field existed."""
_ENCODER_PREFIX: Final = "visual."
_TEXT_COLUMNS: Final = ("image_id", "study_uid", "patient_id", "projection", "split")
_TEXT_COLUMNS_OF: Final[dict[str, tuple[str, ...]]] = {
    "flow": ("kind", "what"),
    "history": ("fold",),
    "label_counts": ("finding",),
    "decision_curves": ("finding",),
    "per_finding": ("finding", "store_finding"),
    "per_finding_by_study": ("finding",),
    "subgroups": ("group", "value", "finding"),
    "group_differences": ("group", "value", "against", "measure", "finding"),
    "matching": ("finding", "store_finding", "relation", "why"),
    "overlap": ("run_image_id", "run_split", "evidence"),
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
    """Probability from which on a finding counts as present; above 1 where none is
    (:data:`cxr_cache.metrics.scores.NEVER`), or where nothing is decided (``UNDECIDED``)."""
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
    min_positives: int = 0
    """Positive patients or studies without which a finding got no threshold."""
    further_encoders: tuple[dict[str, Any], ...] = ()
    """Identities of the encoders whose features follow the first's, where there are several."""

    @property
    def encoders(self) -> tuple[dict[str, Any], ...]:
        """Identities of all encoders whose features the head reads, in the order of its inputs."""
        return (self.encoder, *self.further_encoders)

    @property
    def n_members(self) -> int:
        """How many models are averaged: 1 unless it is an ensemble."""
        return len(self.tensors["weight_0"])

    @property
    def features(self) -> str:
        """Which outputs of the encoder the head reads; the embedding before there was a choice."""
        features: str = self.head.get("features", "projected")
        return features

    @property
    def level(self) -> str:
        """What is given a prediction: ``"image"``, as before there was a choice, or ``"study"``."""
        level: str = self.head.get("level", "image")
        return level

    @property
    def head_tensors(self) -> dict[str, Tensor]:
        """Weights of the heads."""
        return {k: v.float() for k, v in self.tensors.items() if not k.startswith(_ENCODER_PREFIX)}

    @property
    def tail_tensors(self) -> dict[str, Tensor]:
        """Weights of the encoder's fine-tuned blocks, by their names in the checkpoint."""
        return {k: v.float() for k, v in self.tensors.items() if k.startswith(_ENCODER_PREFIX)}

    @property
    def operating_point(self) -> OperatingPoint:
        """How the model's probabilities are read."""
        return OperatingPoint(
            Calibration.none(len(self.findings))
            if self.calibration is None
            else Calibration.from_dict(self.calibration),
            np.array([self.thresholds[finding] for finding in self.findings]),
            self.threshold_rule,
            self.min_positives,
        )

    def read_at(self, point: OperatingPoint) -> SavedModel:
        """The model with thresholds and calibration of this operating point instead of its own."""
        return replace(
            self,
            thresholds=point.by_finding(self.findings),
            threshold_rule=point.rule,
            calibration=point.calibration.to_dict(),
            min_positives=point.min_positives,
        )


class Run:
    """A folder that explains itself: everything one training produced, by name.

    Make one with :meth:`create`, read one with :meth:`open`. Files appear under
    their names only when they are complete.

    Examples
    --------
    >>> run = Run.open("runs/first")  # doctest: +SKIP
    >>> run.metrics["test"]["macro_auroc"]["value"]  # doctest: +SKIP
    0.766
    >>> run.predictions.query("split == 'test'")["Cardiomegaly"].max()  # doctest: +SKIP
    0.61
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self._let_go: Callable[[], object] = lambda: None

    def __repr__(self) -> str:
        kind, status = self.config.get("kind", "run"), self.config.get("status", "not finished")
        lines = [f"Run {self.path} ({kind}, {status})"]
        if findings := self.config.get("findings"):
            lines.append(f"  {count(len(findings), 'finding')}: {list_names(findings, 5)}")
        if names := [one["encoder"]["name"] for one in self.stores if "encoder" in one]:
            lines.append(f"  {'encoder' if len(names) == 1 else 'encoders'}: {list_names(names)}")
        if "chosen_epochs" in self.config:
            lines.append(f"  trained for {count(self.config['chosen_epochs'], 'epoch')}")
        with suppress(RunError, KeyError, TypeError):  # not evaluated, or by an earlier version
            area = self.read_metrics()["test"]["macro_auroc"]["value"]
            of = "the nested cross-validation" if self.is_nested else "the test images"
            lines.append(f"  macro AUROC of {of}: {area:.3f}")
        return "\n".join(lines)

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
        versions = {"python": platform.python_version(), **package_versions(*_PACKAGES)}
        run = cls(path, {"format_version": FORMAT_VERSION, "versions": versions, **config})
        with run._held():
            require_free(path, overwrite=overwrite)  # another may have finished since
            run._write_config("running")  # first: what is left of an old run is not taken for one
        tables = (f"{table}.csv" for table in get_args(TableName))
        names = (_METRICS, _READS, _MODEL, _FOLD_HEADS, _DISTRIBUTION, _REPORT, _CARD, MANIFEST)
        for name in (*names, *tables):
            (path / name).unlink(missing_ok=True)
        for old in path.glob(_REPEAT_HEADS.format("*")):
            old.unlink()
        outer = (folder.name for folder in path.glob(_OUTER.format("*")))
        for folder in (_PLOTS, _STATES, _LOGS, *outer):
            shutil.rmtree(path / folder, ignore_errors=True)
        mark_written(path)
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
        if writes:
            mark_written(run.path)
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

    def record(self, entries: Mapping[str, Any]) -> None:
        """Add entries to what ``config.json`` says of a run that is not finished."""
        self.config = {**self.config, **entries}
        self._write_config("running")

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

    @property
    def stores(self) -> list[dict[str, Any]]:
        """What the run records of each store that it was trained on: path, encoder, cohort."""
        return [self.config.get("store", {}), *self.config.get("further_stores", ())]

    @property
    def store_path(self) -> str:
        """The first store, as it was named when the run was trained; empty if none is recorded."""
        path: str = self.stores[0].get("path", "")
        return path

    def find_store(self) -> Path | None:
        """Find the first store by its path, also from beside the run; None if it is not there."""
        path = Path(self.store_path)
        places = (path, self.path.resolve().parent / path)
        return next((place for place in places if place.is_file()), None)

    @property
    def level(self) -> str:
        """What is given a prediction, as :attr:`SavedModel.level` says."""
        level: str = self.config.get(self.config.get("kind", ""), {}).get("level", "image")
        return level

    def require_images(self, why: str) -> None:
        """Raise RunError if the run predicts studies as a whole; `why` says what needs images."""
        if self.level == "study":
            raise RunError(
                f"{self.path} predicts whole studies (--level study), and {why}. Give a run of "
                "--level image."
            )

    @property
    def is_nested(self) -> bool:
        """Whether every image was tested in an outer fold, and the run's own model on none."""
        return bool(self.config.get("train", {}).get("protocol") == "nested")

    @property
    def tested_ids(self) -> pd.Series[str]:
        """Ids of the images that are tested: of a nested run all, each in its outer fold."""
        splits = self.read_table("splits")
        tested: pd.Series[str] = splits.loc[
            (splits["split"] == "test") | self.is_nested, "image_id"
        ]
        return tested

    def outer_path(self, k: int) -> Path:
        """Folder of the run that tests outer fold `k`, counted from 1."""
        return self.path / _OUTER.format(k)

    @property
    def outer_runs(self) -> list[Run]:
        """The runs that test the outer folds, in order; none unless the run is nested."""
        n_outer = self.config["train"]["n_outer_folds"] if self.is_nested else 0
        return [Run.open(self.outer_path(k)) for k in range(1, n_outer + 1)]

    def require_holdout(self, why: str) -> None:
        """Raise RunError if the run is nested; `why` says what needs test images of its model."""
        if self.is_nested:
            raise RunError(
                f"{self.path} is a nested cross-validation (--protocol nested), whose model has no "
                f"test images of its own, and {why}. Give a run of --protocol holdout, or one of "
                f"its outer folds, such as {self.outer_path(1)}."
            )

    # -- tables -------------------------------------------------------------------------

    def write_table(self, name: TableName, table: pd.DataFrame) -> Path:
        """Write ``NAME.csv``; floats keep nine significant digits, which is all of float32."""
        path = self.path / f"{name}.csv"
        write_table(path, table)
        logger.info("%s is written", path)
        return path

    def read_table(self, name: TableName) -> pd.DataFrame:
        """Read ``NAME.csv``; ids are text, whatever they look like.

        Raises
        ------
        RunError
            The file is missing or damaged.
        """
        path = self.path / f"{name}.csv"
        if not path.is_file():
            raise RunError(f"{path} is missing; the run folder is not whole. Train again.")
        text_columns = [*_TEXT_COLUMNS, *_TEXT_COLUMNS_OF.get(name, ())]
        try:
            if name in ("predictions", "out_of_fold", "logistic", "repeats"):
                text_columns += _read_image_columns(path)
            dtypes = dict.fromkeys(text_columns, str)
            table = pd.read_csv(path, dtype=dtypes, keep_default_na=False, na_values=[""])
        except ValueError as error:  # pandas' own, and bytes that are not UTF-8
            raise RunError(f"{path} is damaged ({error}). Train again.") from error
        text = [column for column in dtypes if column in table]
        table[text] = table[text].fillna("")
        return table

    @property
    def splits(self) -> pd.DataFrame:
        """Which side of the split each image is on: image_id, study_uid, split, fold."""
        return self.read_table("splits")

    @property
    def targets(self) -> pd.DataFrame:
        """Column image_id and one target per finding: 1, 0 or NaN where unlabelled."""
        return self.read_table("targets")

    @property
    def predictions(self) -> pd.DataFrame:
        """Probabilities of the final model for every image, with the side it is on.

        They are the model's own; ``run.calibration.apply`` gives those that thresholds belong to.
        """
        return self.read_table("predictions")

    @property
    def out_of_fold(self) -> pd.DataFrame:
        """Probabilities of train images by models that have not seen them; not calibrated."""
        return self.read_table("out_of_fold")

    @property
    def per_finding(self) -> pd.DataFrame:
        """Figures of every finding on the test images; the run must have been evaluated."""
        return self.read_table("per_finding")

    @property
    def metrics(self) -> dict[str, Any]:
        """All figures over the findings, as ``metrics.json`` holds them."""
        return self.read_metrics()

    # -- metrics, plots, page -----------------------------------------------------------

    def write_evaluation(
        self,
        metrics: Mapping[str, Any],
        tables: Mapping[TableName, pd.DataFrame],
        point: OperatingPoint | None = None,
    ) -> None:
        """Write ``metrics.json`` and the tables that belong to it.

        ``metrics.json`` is removed first and written last, so that whoever finds it finds the
        tables of the same evaluation; after an interruption there is none, and
        :meth:`read_metrics` says what to do. What is undefined must be None, not NaN. With `point`,
        the model keeps its thresholds and calibration from now on; None changes neither.
        """
        _dump_metrics(metrics)  # what cannot be written fails before anything is removed
        model = None if point is None else self.load_model().read_at(point)
        self.drop_metrics()
        if model is not None:
            self.save_model(model)
        for name, table in tables.items():
            self.write_table(name, table)
        self.write_metrics(metrics)

    def drop_metrics(self) -> None:
        """Remove ``metrics.json``, before something changes that its figures rest on."""
        mark_written(self.path)
        (self.path / _METRICS).unlink(missing_ok=True)

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json``; what is undefined must be None, not NaN."""
        write_whole(self.path / _METRICS, _dump_metrics(metrics))

    def read_metrics(self) -> dict[str, Any]:
        """Read ``metrics.json``.

        Raises
        ------
        RunError
            The file is missing or damaged.
        """
        path = self.path / _METRICS
        remedy = f"`cxr-cache evaluate {self.path}` writes it."
        try:
            metrics: dict[str, Any] = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise RunError(f"{path} is missing. {remedy}") from error
        except ValueError as error:
            raise RunError(f"{path} is damaged ({error}). {remedy}") from error
        return metrics

    def write_reads(self, reads: Mapping[str, Any]) -> None:
        """Write ``test_reads.json``, which is no figure: it differs when the same is done again."""
        write_whole(self.path / _READS, json.dumps(reads, indent=2).encode())

    def read_reads(self) -> dict[str, Any] | None:
        """Read ``test_reads.json``; None where there is none, or a damaged one."""
        try:
            reads: dict[str, Any] = json.loads((self.path / _READS).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return reads

    def plot_path(self, name: str) -> Path:
        """Where the plot called `name` goes; its folder is made."""
        (self.path / _PLOTS).mkdir(exist_ok=True)
        return self.path / _PLOTS / f"{name}.png"

    @property
    def logs_path(self) -> Path:
        """Where trackers of trainings write, each in a folder or file of its own."""
        return self.path / _LOGS

    @property
    def report_path(self) -> Path:
        """The page of this run."""
        return self.path / _REPORT

    def write_report(self, html: str) -> Path:
        """Write ``report.html``."""
        mark_written(self.path)
        write_whole(self.report_path, html.encode())
        return self.report_path

    def write_model_card(self, markdown: str) -> Path:
        """Write ``model_card.md``."""
        path = self.path / _CARD
        write_whole(path, markdown.encode())
        return path

    def read_model_card(self) -> str:
        """Read ``model_card.md``; empty where there is none."""
        path = self.path / _CARD
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

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
            try:
                torch.save(dict(state), file)
            except RuntimeError as error:
                # Ctrl-C in the midst: torch fails to end the half file, which is not the news.
                if isinstance(error.__context__, KeyboardInterrupt):
                    raise error.__context__ from None
                raise

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

    def drop_states(self, prefix: str) -> None:
        """Delete what :meth:`save_state` kept under names that begin so."""
        for path in (self.path / _STATES).glob(f"{prefix}*.pt"):
            path.unlink(missing_ok=True)

    def _state_path(self, name: str) -> Path:
        return self.path / _STATES / f"{name}.pt"

    # -- model --------------------------------------------------------------------------

    def save_model(self, model: SavedModel) -> None:
        """Write ``model.safetensors``: tensors, and everything else as JSON metadata."""
        from safetensors.torch import save

        description = {field: getattr(model, field) for field in _MODEL_FIELDS}
        if model.further_encoders:
            description[_FURTHER] = model.further_encoders
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
        return self._load_heads(self.path / _FOLD_HEADS)

    def save_repeat_heads(self, repeat: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the heads of a repeat, from 2 on: those of its K folds and its final one."""
        from safetensors.torch import save

        write_whole(self._repeat_heads_path(repeat), save(_plain(tensors)))

    def load_repeat_heads(self, repeat: int) -> dict[str, Tensor]:
        """Read what :meth:`save_repeat_heads` wrote, with errors of :meth:`load_fold_heads`."""
        return self._load_heads(self._repeat_heads_path(repeat))

    def has_repeat_heads(self, repeat: int) -> bool:
        """Whether the heads of a repeat were kept; version 0.1.0 kept none."""
        return self._repeat_heads_path(repeat).is_file()

    def _repeat_heads_path(self, repeat: int) -> Path:
        return self.path / _REPEAT_HEADS.format(repeat)

    def _load_heads(self, path: Path) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise RunError(f"{path} is missing. Train the run again with `cxr-cache train`.")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise RunError(f"{path} is damaged: {error}. Train the run again.") from error

    def save_distribution(self, found: TrainingDistribution) -> None:
        """Write what tells how unlike its training images an image is."""
        from safetensors.numpy import save

        write_whole(self.path / _DISTRIBUTION, save(dict(vars(found))))

    def load_distribution(self) -> TrainingDistribution | None:
        """Read what :meth:`save_distribution` wrote; None where it did not, as before 0.2.

        Raises
        ------
        RunError
            The file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self.path / _DISTRIBUTION
        if not path.is_file():
            return None
        try:
            return TrainingDistribution(**load_file(path))
        except (SafetensorError, TypeError, OSError) as error:
            raise RunError(
                f"{path} is damaged: {error}. Delete it to predict without saying how unlike the "
                "training images an image is, or train the run again."
            ) from error

    def load_model(self, *, with_weights: bool = True) -> SavedModel:
        """Read ``model.safetensors``; its description alone needs no torch.

        Raises
        ------
        RunError
            The file is missing or is not a model of this package.
        """
        from safetensors import SafetensorError, safe_open

        path = self.path / _MODEL
        if not path.is_file():
            raise RunError(f"{path} is missing; the run folder is not whole. Train again.")
        try:
            with safe_open(path, framework="pt" if with_weights else "np") as file:
                stored = _LATER_FIELDS | json.loads((file.metadata() or {})[_MODEL_ENTRY])
                stored["encoder"] = number_decode_rule(stored["encoder"])
                names = file.keys() if with_weights else ()
                tensors = {name: file.get_tensor(name) for name in names}
            description = {field: stored[field] for field in _MODEL_FIELDS}
            if with_weights and "norm" not in description["head"]:  # as in version 0.1.0
                from cxr_cache.models.heads import find_norm

                description["head"]["norm"] = find_norm(tensors)
            description["findings"] = tuple(stored["findings"])
            return SavedModel(
                tensors, **description, further_encoders=tuple(stored.get(_FURTHER, ()))
            )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path} is not a model of cxr-cache: {error}. Train again.") from error

    @property
    def operating_point(self) -> OperatingPoint:
        """How the model's probabilities are read; tables hold them as the model gives them."""
        return self.load_model(with_weights=False).operating_point

    @property
    def thresholds(self) -> dict[str, float]:
        """Probability from which on each finding counts as present."""
        return self.load_model(with_weights=False).thresholds

    @property
    def threshold_rule(self) -> str:
        """How the thresholds were chosen."""
        return self.operating_point.rule

    @property
    def calibration(self) -> Calibration:
        """Map from the model's own probabilities, as tables hold them, to calibrated ones."""
        return self.operating_point.calibration


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


def _dump_metrics(metrics: Mapping[str, Any]) -> bytes:
    return json.dumps(metrics, indent=2, allow_nan=False, default=_jsonable).encode()


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
