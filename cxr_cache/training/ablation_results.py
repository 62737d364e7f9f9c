"""A folder of what an ablation has finished: a file per fold, and in the end one per method."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxr_cache.common.whole_files import write_whole
from cxr_cache.common.wording import describe_differences, find_differences
from cxr_cache.errors import RunError
from cxr_cache.training.ablation_folds import Fold, Method

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
        """Make the folder, or go on in it if it belongs to the same data and folds."""
        marker = out / _IDENTITY
        if marker.exists():
            before = json.loads(marker.read_text())
            if differences := find_differences(before, dict(identity)):
                raise RunError(
                    f"{out} holds an ablation of other data or folds:\n"
                    + describe_differences(differences, "there", "now")
                    + "\nGive another folder with --out."
                )
        elif out.exists() and any(out.iterdir()):
            raise RunError(f"{out} is not empty, and holds no ablation. Give another folder.")
        (out / _FILES).mkdir(parents=True, exist_ok=True)
        write_whole(marker, json.dumps(identity, indent=2).encode())
        return cls(out / _FILES, n_folds)

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
        chosen = int(aurocs.mean(axis=0).argmax())
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
