"""Recipes and baselines trained in folds: on the cores, on a cluster, or side by side on a GPU."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray

from cxr_cache.common.devices import resolve_device
from cxr_cache.common.files import hold_folder, write_whole
from cxr_cache.common.wording import count, describe_differences, find_differences
from cxr_cache.config import TrainConfig
from cxr_cache.datasets.splits import Split, draw_rows
from cxr_cache.errors import ConfigError, RunError, TrainingError
from cxr_cache.training.baselines import Baseline
from cxr_cache.training.fit import (
    HeadFit,
    HeadTask,
    PlainRows,
    Trajectory,
    can_share_a_bank,
)
from cxr_cache.training.search import Weighing, choose_candidate, fold_tasks, score_fold

_HEADS_IN_A_BANK: Final = 64
"""On a GPU: heads that train side by side."""

Amount: TypeAlias = int | float | None
"""How many images of its training part a fold trains on: a number, a share below 1, or all."""


def name_amount(amount: Amount) -> str:
    """Write an amount as options do: ``50``, ``10%`` or ``all``.

    Examples
    --------
    >>> [name_amount(amount) for amount in (50, 0.025, None)]
    ['50', '2.5%', 'all']
    """
    if amount is None:
        return "all"
    return f"{amount}" if isinstance(amount, int) else f"{100 * amount:g}%"


@dataclass(frozen=True)
class Setting:
    """One recipe of an ablation on so many images, and what sets it apart."""

    config: TrainConfig
    varied: Mapping[str, str]
    """The options that differ between settings, as they were written."""
    stores: tuple[int, ...] = (0,)
    """Which of the ablation's stores are read side by side."""
    n_train: Amount = None
    """Images that each fold trains on."""

    @property
    def label(self) -> str:
        """Such as ``lr=0.001 hidden=256``; it does not say how many images there are."""
        return " ".join(f"{name}={value}" for name, value in self.varied.items()) or "as given"


@dataclass(frozen=True, eq=False)
class Draw:
    """What a method is trained on in every fold: all images, or some that were drawn."""

    tasks: Sequence[HeadTask]
    """One per fold."""
    n_passed: int
    """Images that an epoch goes through: those of the smallest training part, also of a draw."""
    n_train: Amount
    repeat: int
    """Number of the repeat, from 0."""
    weighing: Weighing | None = None
    """How much findings count in the scores; None counts all alike."""

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this draw from others; empty for the first training on all images."""
        identity: dict[str, Any] = {"repeat": self.repeat} if self.repeat else {}
        if self.n_train is not None:
            digest = hashlib.sha256(b"".join(task.train_rows.tobytes() for task in self.tasks))
            drawn = digest.hexdigest()[:16]
            identity |= {"n_train": self.n_train, "repeat": self.repeat, "drawn": drawn}
        return identity


def draw_tasks(
    split: Split,
    groups: NDArray[Any],
    seed: int,
    n_train: Amount,
    repeat: int,
    weighing: Weighing | None = None,
    level: str = "image",
) -> Draw:
    """Draw what the folds train on, of whole groups, ``(N,)``; what they hold out stays.

    Every repeat has another order of groups, the same in all folds, and other initial weights.

    Raises
    ------
    ConfigError
        A fold has fewer images (or studies, as `level` says) to train on than are asked for.
    """
    tasks = fold_tasks(split, seed)
    fewest = min(tasks, key=lambda task: len(task.train_rows))
    n_passed = len(fewest.train_rows)
    if isinstance(n_train, int) and n_train > n_passed:
        raise ConfigError(
            f"--set n_train={n_train}: {fewest.name} has {count(n_passed, level)} to train on, "
            "fewer than that. Use n_train=all for all of them, or a smaller number."
        )
    drawn = []
    for task in tasks:
        rows = task.train_rows
        if n_train is not None:
            n = n_train if isinstance(n_train, int) else round(n_train * len(rows))
            rows = draw_rows(rows, groups, n, (seed, repeat))
        drawn.append(replace(task, train_rows=rows, seed=task.seed + 1000 * repeat))
    return Draw(drawn, n_passed, n_train, repeat, weighing)


@dataclass(frozen=True)
class Method:
    """A row of the table: a recipe for heads, or a baseline."""

    label: str
    identity: Mapping[str, Any]
    """All that its numbers depend on but the data; JSON-able."""
    candidates: tuple[Any, ...]
    """Epochs of a head; the one number that a baseline chooses."""
    draw: Draw = field(compare=False)
    config: TrainConfig | None = None
    baseline: Baseline | None = None
    stores: tuple[int, ...] = (0,)
    """Which of the ablation's stores are read side by side."""

    @property
    def kind(self) -> str:
        """What it is called in tables: ``head`` or ``baseline``."""
        return "head" if self.baseline is None else "baseline"

    @property
    def key(self) -> str:
        """Name of its files."""
        identity = dict(self.identity)
        if self.stores != (0,):
            identity["stores"] = self.stores
        text = json.dumps(identity, sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def of_setting(cls, setting: Setting, draw: Draw) -> Method:
        """A recipe for heads."""
        config = {k: v for k, v in asdict(setting.config).items() if k not in ("n_jobs", "device")}
        return cls(
            setting.label,
            config | draw.identity,
            setting.config.epochs,
            draw,
            config=setting.config,
            stores=setting.stores,
        )

    @classmethod
    def of_baseline(
        cls, baseline: Baseline, base: TrainConfig, draw: Draw, stores: tuple[int, ...] = (0,)
    ) -> Method:
        """A baseline, on what the heads of `base` read; nothing in it is random but the draw."""
        identity = {
            "baseline": baseline.label,
            "candidates": baseline.candidates,
            **{
                name: getattr(base, name)
                for name in ("features", "input_norm", "seed", "select_by")
            },
            **({} if draw.n_train is None else draw.identity),
        }
        return cls(
            baseline.label, identity, baseline.candidates, draw, baseline=baseline, stores=stores
        )


class Fold(NamedTuple):
    """A method on one fold: per candidate its score and held-out probabilities."""

    key: str
    fold: int
    aurocs: list[float]
    probabilities: list[NDArray[np.float32]]
    """``(n, F)`` each."""
    seconds: float


def train_folds(
    rows: PlainRows,
    missing: Sequence[tuple[Method, int]],
    *,
    device: str,
    open_pool: Callable[..., AbstractContextManager[Parallel]],
    streams: bool,
) -> Generator[Fold, None, None]:
    """Train methods in folds, in whatever order they finish."""
    if resolve_device(device).type != "cpu":
        on_device = [(method, k) for method, k in missing if method.config is not None]
        yield from _train_stacked(rows, on_device)
        missing = [(method, k) for method, k in missing if method.config is None]
    if not missing:
        return
    jobs = [delayed(_fit_fold)(rows.embeddings, rows.targets, method, k) for method, k in missing]
    options = {"mmap_mode": "c", "return_as": "generator_unordered" if streams else "list"}
    with open_pool(**options) as pool:
        n_at_once = len(jobs) if streams else 4 * pool.n_jobs
        for start in range(0, len(jobs), n_at_once):
            yield from pool(jobs[start : start + n_at_once])


def _fit_fold(
    embeddings: NDArray[np.float32],
    targets: NDArray[np.float32],
    method: Method,
    k: int,
) -> Fold:
    started, task = time.perf_counter(), method.draw.tasks[k]
    if method.config is not None:
        try:
            (fitted,) = _fit_bank(PlainRows(embeddings, targets), [(method, k)])
        except TrainingError as error:
            raise TrainingError(
                f"Setting {method.label}{_on_how_many(method)}: {error} What the others have "
                "finished is kept; leave this one out of --set and run the command again."
            ) from error
        return fitted
    assert method.baseline is not None
    predictions = method.baseline.predict(
        embeddings[0, task.train_rows],
        targets[task.train_rows],
        embeddings[0, task.held_out_rows],
        method.candidates,
    )
    held_out = targets[task.held_out_rows]
    weighing = method.draw.weighing
    aurocs = [score_fold(held_out, prediction, weighing) for prediction in predictions]
    return Fold(method.key, k, aurocs, predictions, time.perf_counter() - started)


def _on_how_many(method: Method) -> str:
    n_train = method.draw.n_train
    return "" if n_train is None else f", n_train={name_amount(n_train)}"


def _train_stacked(rows: PlainRows, missing: Sequence[tuple[Method, int]]) -> Iterator[Fold]:
    """Heads that can share a bank, side by side: on a GPU they cost little more than one."""
    waiting = list(missing)
    while waiting:
        first = waiting[0][0].config
        assert first is not None
        fitting = [(m, k) for m, k in waiting if m.config and can_share_a_bank([first, m.config])]
        bank = fitting[:_HEADS_IN_A_BANK]
        waiting = [pair for pair in waiting if pair not in bank]
        yield from _fit_bank(rows, bank)


def _fit_bank(rows: PlainRows, bank: Sequence[tuple[Method, int]]) -> Iterator[Fold]:
    started, configs = time.perf_counter(), [m.config for m, _ in bank if m.config is not None]
    trajectories: list[dict[int, Trajectory]] = [{} for _ in bank]
    candidates, has_horizon = configs[0].epochs, any(config.has_horizon for config in configs)
    for horizon in candidates if has_horizon else candidates[-1:]:
        keep = (horizon,) if has_horizon else candidates
        fit = HeadFit(
            rows,
            [method.draw.tasks[k] for method, k in bank],
            configs,
            n_epochs=horizon,
            n_steps=bank[0][0].draw.n_passed // configs[0].batch_size,
            keep=keep,
        )
        fit.run()
        for of_head, trajectory in zip(trajectories, fit.trajectories, strict=True):
            of_head |= dict.fromkeys(keep, trajectory)
    seconds = (time.perf_counter() - started) / len(bank)
    for (method, k), of_head in zip(bank, trajectories, strict=True):
        kept = [of_head[epoch].probabilities[epoch] for epoch in method.candidates]
        held_out = rows.targets[method.draw.tasks[k].held_out_rows]
        aurocs = [score_fold(held_out, of_epoch, method.draw.weighing) for of_epoch in kept]
        yield Fold(method.key, k, aurocs, kept, seconds)


# -- what is finished, on disk ----------------------------------------------------------

_IDENTITY: Final = "ablation.json"
_FILES: Final = "finished"


class Finished(NamedTuple):
    """A method in all folds, at the candidate that is best on average."""

    chosen: int  # number of the candidate
    aurocs: NDArray[np.float64]  # (K,)
    probabilities: list[NDArray[np.float32]]  # per fold, (n, F)
    seconds: float


@dataclass(frozen=True)
class Results:
    """The folder, open for one ablation's data and folds."""

    path: Path
    n_folds: int

    @classmethod
    def open(cls, out: Path, identity: Mapping[str, Any], n_folds: int) -> Results:
        """Make the folder, or go on in it if it belongs to the same data and folds.

        No other process may write to it for as long as the results live.

        Raises
        ------
        RunError
            `out` holds an ablation of other data or folds, or other files.
        StoreBusyError
            Another process is writing to `out`.
        """
        marker = out / _IDENTITY
        if marker.exists():
            before = json.loads(marker.read_text())
            if differences := find_differences(before, dict(identity)):
                raise RunError(
                    f"{out} holds an ablation of other data or folds:\n"
                    + describe_differences(differences, "there", "now")
                    + "\nGive another folder with --out."
                )
        elif out.exists() and any(path.name[0] != "." for path in out.iterdir()):
            raise RunError(f"{out} is not empty, and holds no ablation. Give another folder.")
        out.mkdir(parents=True, exist_ok=True)
        results = cls(out / _FILES, n_folds)
        hold_folder(out, results)
        write_whole(marker, json.dumps(identity, indent=2).encode())
        results.path.mkdir(exist_ok=True)
        return results

    def has(self, method: Method, fold: int | None = None) -> bool:
        """Whether a method, or one of its folds, is finished."""
        whole = self._file(method.key).exists()
        return whole or (fold is not None and self._file(method.key, fold).exists())

    def add(self, result: Fold) -> None:
        """Keep a fold; with the last one of a method, only what its best candidate left."""
        _save(
            self._file(result.key, result.fold),
            {f"probabilities_{i}": p for i, p in enumerate(result.probabilities)}
            | {"aurocs": np.array(result.aurocs), "seconds": np.array(result.seconds)},
        )
        files = [self._file(result.key, k) for k in range(self.n_folds)]
        if not all(file.exists() for file in files):
            return
        folds = [_load(file) for file in files]
        aurocs = np.stack([fold["aurocs"] for fold in folds])  # (K, candidates)
        chosen = choose_candidate(aurocs.T)
        _save(
            self._file(result.key),
            {f"probabilities_{k}": f[f"probabilities_{chosen}"] for k, f in enumerate(folds)}
            | {
                "chosen": np.array(chosen),
                "aurocs": aurocs[:, chosen],
                "seconds": np.array(sum(float(fold["seconds"]) for fold in folds)),
            },
        )
        for file in files:
            file.unlink()

    def load(self, method: Method) -> Finished:
        """Read a finished method."""
        stored = _load(self._file(method.key))
        probabilities = [stored[f"probabilities_{k}"] for k in range(self.n_folds)]
        return Finished(
            int(stored["chosen"]), stored["aurocs"], probabilities, float(stored["seconds"])
        )

    def _file(self, key: str, fold: int | None = None) -> Path:
        return self.path / (f"{key}.npz" if fold is None else f"{key}-fold{fold}.npz")


def _save(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_whole(path, buffer.getvalue())


def _load(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)
