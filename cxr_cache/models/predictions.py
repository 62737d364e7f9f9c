"""Predictions of images: what they mean, how they are written, and what is kept of a part."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.common.extras import require_extra
from cxr_cache.common.files import disk_errors_named, replacing, write_whole
from cxr_cache.common.plain import to_json
from cxr_cache.common.tables import hash_file, write_table
from cxr_cache.common.wording import count, list_names
from cxr_cache.datasets.studies import N_PROJECTIONS
from cxr_cache.errors import ConfigError
from cxr_cache.models.run import Run
from cxr_cache.models.unlikeness import UNUSUAL

_N_PRINTED: Final = 2  # images whose predictions are shown where a result is printed
_ENDINGS: Final = (".csv", ".json", ".parquet")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predictions:
    """Probabilities, or scores, of N images or studies; what they mean at the run's thresholds."""

    image_ids: tuple[str, ...]
    """Paths as they were given, or uids of studies."""
    findings: tuple[str, ...]
    probabilities: NDArray[np.float32]
    """Calibrated if the run is, ``(N, F)``; NaN where an image could not be used."""
    decisions: NDArray[np.bool_]
    """``(N, F)``, probability at or above the threshold."""
    errors: tuple[str, ...]
    """Why an image could not be used; empty where it could."""
    views: tuple[str, ...] = ()
    """Of studies: the projections of each one's images, such as ``"Frontal + Lateral"``."""
    undecided: tuple[str, ...] = ()
    """Findings that are ranked only, since too few positives were there to choose a threshold."""
    is_calibrated: bool = True
    """Whether these are probabilities; otherwise they are scores, whose order alone means much."""
    unknown: tuple[str, ...] = ()
    """Findings of which nothing could be learnt: all training images had them, or none."""
    distances: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Of each image from the training images, ``(N,)``, as
    :class:`cxr_cache.models.unlikeness.TrainingDistribution` says; NaN where not known."""
    distance_quantiles: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Share of training images that are no further away, ``(N,)``."""

    @property
    def row(self) -> str:
        """What has a prediction: ``"image"`` or ``"study"``."""
        return "study" if self.views else "image"

    def __repr__(self) -> str:
        few = slice(_N_PRINTED)
        head = replace(
            self,
            image_ids=self.image_ids[few],
            probabilities=self.probabilities[few],
            decisions=self.decisions[few],
            errors=self.errors[few],
            distances=self.distances[few],
            distance_quantiles=self.distance_quantiles[few],
        )
        n_images, n_failed = count(len(self.image_ids), self.row), self.n_failed
        failed = f" ({n_failed:,} could not be used)" if n_failed else ""
        lines = [f"Predictions of {count(len(self.findings), 'finding')} for {n_images}{failed}"]
        lines += head.to_text(n_shown=2).splitlines()
        if len(self.image_ids) > _N_PRINTED:
            lines.append("... to_table() holds all of them.")
        return "\n".join(lines)

    @property
    def n_failed(self) -> int:
        """Images, or studies, without a prediction."""
        return sum(bool(error) for error in self.errors)

    @property
    def n_unusual(self) -> int:
        """Images further from the training images than 99 % of these."""
        return int((self.distance_quantiles >= UNUSUAL).sum())

    def statuses(self) -> NDArray[np.str_]:
        """Of every image and finding, ``(N, F)``: present, absent, ranked only, or unknown.

        The first two are decided. What nothing could be learnt of is unknown, and so is everything
        about an image that could not be used.
        """
        names = np.array(self.findings)
        found = np.where(self.decisions, "present", "absent").astype("<U11")
        found[:, np.isin(names, self.undecided)] = "ranked only"
        found[:, np.isin(names, self.unknown)] = "unknown"
        found[[bool(error) for error in self.errors]] = "unknown"
        return found

    def to_table(self) -> pd.DataFrame:
        """One row per image.

        The columns are image, or study and views; present, ranked_only and unknown (findings, with
        ``;`` between: all others are decided to be absent); distance and distance_quantile; error;
        then the probability of each finding.
        """
        names, statuses = np.array(self.findings), self.statuses()
        unasked = np.full(len(self.image_ids), np.nan)

        def name_all(status: str) -> list[str]:
            return [";".join(names[row == status]) for row in statuses]

        described: pd.DataFrame = pd.DataFrame(
            {
                self.row: self.image_ids,
                **({"views": self.views} if self.views else {}),
                "present": name_all("present"),
                "ranked_only": name_all("ranked only"),
                "unknown": name_all("unknown"),
                "distance": self.distances if len(self.distances) else unasked,
                "distance_quantile": self.distance_quantiles
                if len(self.distance_quantiles)
                else unasked,
                "error": self.errors,
            }
        )
        table: pd.DataFrame = pd.concat(
            [described, pd.DataFrame(self.probabilities, columns=list(self.findings))], axis=1
        )
        return table

    def to_records(self) -> list[dict[str, Any]]:
        """The same for JSON: of each image what the columns say, and findings by name.

        Each finding has its probability, and its status as :meth:`statuses` says.
        """
        left = ["present", "ranked_only", "unknown", *self.findings]
        records: list[dict[str, Any]] = self.to_table().drop(columns=left).to_dict("records")
        for record, row, of_row in zip(records, self.probabilities, self.statuses(), strict=True):
            record["error"] = record["error"] or None
            record["findings"] = {
                name: {"probability": float(value), "status": str(status)}
                for name, value, status in zip(self.findings, row, of_row, strict=True)
            }
        return records

    def write(self, path: Path) -> None:
        """Write a file, whole or not at all: CSV, ``.json`` or ``.parquet``, by its ending.

        Raises
        ------
        ConfigError
            As :func:`require_writable_as_predictions`.
        """
        require_writable_as_predictions(path)
        if path.suffix == ".json":
            write_whole(path, to_json(self.to_records()).encode())
        elif path.suffix == ".parquet":
            with replacing(path) as file:
                self.to_table().to_parquet(file, index=False)
        else:
            write_table(path, self.to_table(), digits=6)

    def to_text(self, n_shown: int = 5) -> str:
        """The likeliest findings of each image; ``*`` marks those called present.

        ``?`` marks those that nothing is decided of. Scores are written without a per cent sign.
        """
        lines, form = [], "6.1%" if self.is_calibrated else "6.3f"
        for n, (image_id, row, called, error) in enumerate(
            zip(self.image_ids, self.probabilities, self.decisions, self.errors, strict=True)
        ):
            lines.append(image_id)
            if error:
                lines.append(f"    not usable: {error}")
                continue
            if len(self.distance_quantiles) and self.distance_quantiles[n] >= UNUSUAL:
                share = self.distance_quantiles[n]
                lines.append(f"    unlike {share:.1%} of the training images: do not rely on this")
            known = [f for f, name in enumerate(self.findings) if name not in self.unknown]
            # Called findings first: with a low threshold they need not be the likeliest.
            for f in sorted(known, key=lambda f: (not called[f], -row[f]))[:n_shown]:
                mark = "?" if self.findings[f] in self.undecided else "*" if called[f] else " "
                lines.append(f"  {mark} {row[f]:{form}}  {self.findings[f]}")
        if self.n_failed == len(self.image_ids):
            return "\n".join(lines)
        if self.undecided:
            lines.append(f"? too few to decide, ranked only: {list_names(self.undecided)}.")
        if self.unknown:
            lines.append(f"Nothing could be learnt of, and left out: {list_names(self.unknown)}.")
        if not self.is_calibrated:
            lines.append("These are scores, not probabilities: the run is not calibrated.")
        lines.append("* at or above the run's threshold. Not for clinical use.")
        return "\n".join(lines)


def require_writable_as_predictions(path: Path) -> None:
    """Raise ConfigError, before anything takes long, unless predictions can be written there."""
    if path.suffix and path.suffix not in _ENDINGS:
        raise ConfigError(
            f"{path} ends in {path.suffix}; end it in {', '.join(_ENDINGS)}, which says how the "
            "predictions are written."
        )
    if path.suffix == ".parquet":
        require_extra("parquet", str(path))


# -- what is being predicted, and what is kept of it -----------------------------------------

Pick: TypeAlias = Callable[[NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.int64] | None]]
"""Finds the images of some rows, and their slots where the rows are studies."""


class Rows:
    """Images or studies on their way to predictions."""

    def __init__(self, ids: Sequence[str], names: Sequence[str], pick: Pick, n_findings: int):
        self.ids, self.names, self.pick = ids, names, pick
        self.is_done = np.zeros(len(ids), bool)
        self.probabilities = np.full((len(ids), n_findings), np.nan, np.float32)
        """Not calibrated."""
        self.distances = np.full(len(ids), np.nan)
        self.errors = [""] * len(ids)
        images, slots = pick(np.arange(len(ids)))
        of = images if slots is None else slots // N_PROJECTIONS
        self.images_of: list[list[int]] = [[] for _ in ids]
        """The images of each row, by their places in `names`."""
        for image, row in zip(images.tolist(), of.tolist(), strict=True):
            self.images_of[row].append(image)

    def stamp(self, row: int) -> list[list[Any]]:
        """Path, size and time of change of the row's files: whether they are what they were."""
        stamps = []
        for i in self.images_of[row]:
            path = Path(self.names[i])
            with suppress(OSError):
                status = path.stat()
                stamps.append([str(path), status.st_size, status.st_mtime_ns])
        return stamps


class Journal:
    """A file of lines, one for each row that is finished, after one that says of which model.

    Rows that could not be used are not in it, so that they are tried again. A last line that was
    cut off is left out.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self._path, self._identity = path, identity
        self._file: BinaryIO | None = None
        self._rows: dict[str, dict[str, Any]] = {}

    @classmethod
    @contextmanager
    def opened(cls, path: str | Path | None, run: Run, rows: Rows) -> Iterator[Journal]:
        """Read what is there, and open it for more; without a path, nothing is kept."""
        if path is None:
            yield cls(None, {})
            return
        path = Path(path)
        identity = {
            "cxr_cache_predictions": 1,
            "model_sha256": hash_file(run.path / "model.safetensors"),
            "n_findings": rows.probabilities.shape[1],
        }
        journal = cls(path, identity)
        lines = journal._read()
        with disk_errors_named(path):
            write_whole(path, b"".join(_line(one) for one in (identity, *lines)))
            with path.open("ab") as journal._file:
                yield journal

    def _read(self) -> list[dict[str, Any]]:
        assert self._path is not None, "nothing is read where nothing is kept"
        if not self._path.exists():
            return []
        lines = []
        for line in self._path.read_bytes().splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
        if not lines or lines[0] != self._identity:
            logger.warning(
                "%s is of another model, or of another version of this run; everything is "
                "predicted anew.",
                self._path,
            )
            return []
        self._rows = {line["id"]: line for line in lines[1:]}
        return list(self._rows.values())

    def fill(self, rows: Rows) -> None:
        """Take over the rows whose files have not changed."""
        for row, name in enumerate(rows.ids if self._rows else ()):
            kept = self._rows.get(name)
            if kept is not None and kept["stamp"] == rows.stamp(row):
                rows.is_done[row] = True
                rows.probabilities[row] = kept["probabilities"]
                rows.distances[row] = np.nan if kept["distance"] is None else kept["distance"]
        if n_kept := int(rows.is_done.sum()):
            logger.info("%s holds %s already", self._path, count(n_kept, "prediction"))

    def add(self, rows: Rows, finished: NDArray[np.intp]) -> None:
        """Keep rows that are finished; they are on the disk when this returns."""
        if self._file is None:
            return
        for row in finished.tolist():
            if not rows.errors[row]:
                distance = float(rows.distances[row])
                kept = {
                    "id": rows.ids[row],
                    "stamp": rows.stamp(row),
                    "probabilities": rows.probabilities[row].tolist(),
                    "distance": None if np.isnan(distance) else distance,
                }
                self._file.write(_line(kept))
        self._file.flush()
        os.fsync(self._file.fileno())


def _line(kept: dict[str, Any]) -> bytes:
    return json.dumps(kept).encode() + b"\n"
