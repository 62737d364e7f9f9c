"""Trainings told to TensorBoard, Weights & Biases or MLflow, by the callback that users have, too.

A tracker is made when a training is asked for, so that a missing package is known at once, and
opens what it writes to with the first epoch, when the run folder is there. Nothing that goes wrong
in a tracker after that ends a training.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from cxr_cache.common.extras import require_extra
from cxr_cache.config import FinetuneConfig, TrainConfig
from cxr_cache.jobs.runs import is_another_process
from cxr_cache.models.run import Run
from cxr_cache.training.outcome import TrainResult

PROJECT: Final = "cxr-cache"
"""What runs belong to, where the tracker's own variable does not say."""

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where numbers of a training go."""

    def log(self, training: str, epoch: int, values: Mapping[str, float]) -> None:
        """Write what is finite of an epoch of one training, or of the test: epoch 0 of "test"."""
        ...

    def close(self, *, has_finished: bool) -> None:
        """Write what is left."""
        ...


class _TensorBoard:
    """An event file per training, so that TensorBoard draws their curves over each other."""

    def __init__(self, folder: Path, _name: str, options: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make: Callable[[str], Any] = lambda name: SummaryWriter(str(folder / name))
        self._writers: dict[str, Any] = {}
        self._writer("config").add_text("options", f"```\n{json.dumps(options, indent=2)}\n```")

    def _writer(self, name: str) -> Any:
        if name not in self._writers:
            self._writers[name] = self._make(name)
        return self._writers[name]

    def log(self, training: str, epoch: int, values: Mapping[str, float]) -> None:
        writer = self._writer(training)
        for name, value in values.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()  # a training that is killed leaves what it has told

    def close(self, *, has_finished: bool) -> None:
        for writer in self._writers.values():
            writer.close()


class _MLflow:
    """A run of MLflow: on the server that MLFLOW_TRACKING_URI names, else in files of the run."""

    def __init__(self, folder: Path, name: str, options: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:  # files need no database, which network file systems do badly with
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = folder.resolve().as_uri()
        self._client: Any = MlflowClient(tracking_uri=uri)
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else self._client.create_experiment(experiment)
        self._run = self._client.create_run(number, run_name=name).info.run_id
        for option, value in options.items():
            self._client.log_param(self._run, option, value)

    def log(self, training: str, epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, f"{training}/{name}", value, step=epoch)

    def close(self, *, has_finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if has_finished else "FAILED")


class _WandB:
    """A run of Weights & Biases; offline, in files of the run, where nobody has logged in."""

    def __init__(self, folder: Path, name: str, options: Mapping[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            dir=str(folder),
            config=dict(options),
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, training: str, epoch: int, values: Mapping[str, float]) -> None:
        step = f"{training}/epoch"
        self._run.define_metric(f"{training}/*", step_metric=step)
        self._run.log({step: epoch, **{f"{training}/{k}": v for k, v in values.items()}})

    def close(self, *, has_finished: bool) -> None:
        self._run.finish(exit_code=0 if has_finished else 1)


TRACKERS: Final[dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}
"""By name, which is that of the extra, too. Each is made of a folder, the run's name and options
that are text, numbers or None."""


class Tracking:
    """All trackers of a training; called after each epoch, as ``on_epoch`` of a job."""

    def __init__(self, names: Sequence[str], run: Run, options: Mapping[str, Any]) -> None:
        self._names, self._run, self._options = list(names), run, options
        self._open: dict[str, Tracker] = {}
        self._has_finished = False

    def __call__(self, training: str, row: Mapping[str, float]) -> None:
        """Take an epoch of a training."""
        values = {name: value for name, value in row.items() if name != "epoch"}
        self._log(training, int(row["epoch"]), values)

    def finish(self, result: TrainResult) -> None:
        """Take the figures of the test, each as its value, at the end of a training."""
        figures = (result.metrics or {}).get("test", {})
        values = {name: figure["value"] for name, figure in figures.items()}
        self._log("test", 0, values)
        self._has_finished = True

    def close(self) -> None:
        """Write what is left."""
        for name in list(self._open):
            self._try(name, lambda t: t.close(has_finished=self._has_finished))

    def _log(self, training: str, epoch: int, values: Mapping[str, float | None]) -> None:
        slug = re.sub(r"[^A-Za-z0-9]+", "-", training)
        told = {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
        for name in list(self._names):
            self._try(name, lambda t: t.log(slug, epoch, told))

    def _try(self, name: str, work: Callable[[Tracker], None]) -> None:
        """Do something with a tracker, and do without it from where it fails on."""
        try:
            if name not in self._open:
                folder = self._run.logs_path / name
                self._open[name] = TRACKERS[name](folder, self._run.path.name, self._options)
            work(self._open[name])
        except Exception as error:
            self._names.remove(name)
            self._open.pop(name, None)
            logger.warning(
                "%s is told of nothing more, since it failed: %s: %s. The training goes on, and "
                "history.csv has every epoch.",
                *(name, type(error).__name__, error),
            )


@contextmanager
def tracking(
    names: Sequence[str], run_dir: str | Path, config: TrainConfig | FinetuneConfig
) -> Iterator[Tracking | None]:
    """Give the callback that tells trackers of a training; None where there is nothing to tell.

    They write to ``logs/NAME`` of the run folder, or where their own environment variables say. Of
    several processes, the first tells.

    Parameters
    ----------
    names
        Keys of :data:`TRACKERS`.
    run_dir, config
        Those of the training.

    Raises
    ------
    ConfigError
        A tracker's package is not installed; the message has the line that installs it.

    Examples
    --------
    >>> with tracking(["tensorboard"], "runs/first", config) as on_epoch:  # doctest: +SKIP
    ...     result = train_head("features.h5", "runs/first", config, on_epoch=on_epoch)
    ...     on_epoch.finish(result)
    """
    names = list(dict.fromkeys(names))
    for name in names:
        require_extra(name, f"--log-to {name}")
    if not names or is_another_process():
        yield None
        return
    options = {
        name: value if isinstance(value, int | float | str | None) else str(value)
        for name, value in vars(config).items()
    }
    told = Tracking(names, Run(Path(run_dir), {}), options)
    try:
        yield told
    finally:
        told.close()
