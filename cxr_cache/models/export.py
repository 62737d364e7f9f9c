"""A run -> a file or folder that works without this package: checks, description, replacing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cxr_cache.common.devices import require_choice
from cxr_cache.common.files import WriterLock, opened, sync, sync_folder
from cxr_cache.datasets.preprocessing import DECODE_RULES
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import reload_encoder
from cxr_cache.errors import ConfigError
from cxr_cache.models.export_hub import PREPROCESSING_FILE, require_card, write_hub
from cxr_cache.models.export_onnx import require_onnx, write_onnx
from cxr_cache.models.export_open_clip import HEAD_FILE, require_one_checkpoint, write_open_clip
from cxr_cache.models.predict import require_encoder_of_run, require_one_encoder
from cxr_cache.models.run import Run, SavedModel
from cxr_cache.models.tuned import name_blocks


@dataclass(frozen=True)
class _Format:
    """What a format refuses, how it is written, and by which file its folders are known."""

    require: Callable[[Run, SavedModel], None]
    write: Callable[[SavedModel, Encoder, Mapping[str, Any], Path], tuple[str, ...]] | None
    """What writes the model with its encoder; None where the encoder stays outside."""
    mark: str = ""

    @property
    def is_folder(self) -> bool:
        """Whether it makes a folder."""
        return bool(self.mark)


FORMATS: Final = {
    "open-clip": _Format(require_one_checkpoint, write_open_clip, HEAD_FILE),
    "onnx": _Format(require_onnx, write_onnx),
    "hub": _Format(require_card, None, PREPROCESSING_FILE),
}


@dataclass(frozen=True)
class ExportSummary:
    """What was written, and what its user has to know."""

    path: Path
    n_bytes: int
    notes: tuple[str, ...]

    def to_text(self) -> str:
        """A line for the file or folder, and one per note."""
        return "\n".join([f"{self.path} written, {self.n_bytes / 1e6:,.1f} MB", *self.notes])


def export_run(
    run: Run,
    out: str | Path,
    file_format: str,
    *,
    model: str | None = None,
    overwrite: bool = False,
) -> ExportSummary:
    """Write the model of a run for others: with its encoder, for use without this package, or not.

    ``"open-clip"`` and ``"onnx"`` hold the encoder, which is loaded on the CPU and in float32,
    whatever the run computed in. ``"hub"`` is a folder for the Hugging Face Hub with what was
    trained, as :func:`cxr_cache.models.export_hub.write_hub` says. The output appears under its
    name only when it is complete and checked.

    Parameters
    ----------
    run
        A finished run, frozen or fine-tuned.
    out
        Folder for ``"open-clip"`` and ``"hub"``, file for ``"onnx"``.
    file_format
        A key of :data:`FORMATS`.
    model
        The run's encoder, where it has moved; None takes the recorded name.
    overwrite
        Replace an earlier export.

    Raises
    ------
    ConfigError
        `file_format` is unknown, or `out` may not be written.
    ExportError
        The format cannot hold the run, or the file computes something else.
    RunError
        The run was trained on imported embeddings, or with another encoder than is found.
    EncoderError
        The encoder cannot be loaded.
    StoreBusyError
        Another process is writing to `out`.

    Examples
    --------
    >>> summary = export_run(Run.open("runs/first"), "first.onnx", "onnx")  # doctest: +SKIP
    >>> print(summary.to_text())  # doctest: +SKIP
    """
    require_choice("format", file_format, tuple(FORMATS))
    chosen, out, saved = FORMATS[file_format], Path(out).expanduser().resolve(), run.load_model()
    if chosen.write is not None:
        run.require_images("an export goes from the pixels of one image to its probabilities")
        require_one_encoder(run, saved, "an export holds one encoder with its head.")
    elif model is not None:
        raise ConfigError(f"--model goes with a format that holds the encoder, not {file_format}.")
    require_encoder_of_run(run, saved.encoder, None)
    chosen.require(run, saved)
    with _one_writer(out):
        _require_free(out, chosen, overwrite=overwrite)
        if chosen.write is None:
            with _replacing(out) as temporary:
                notes = write_hub(run, saved, describe_model(run, saved), temporary)
            return ExportSummary(out, sum(file.stat().st_size for file in _files(out)), notes)
        in_float32 = {**saved.encoder, "precision": "fp32"}
        encoder = reload_encoder(in_float32, model=model, device="cpu")
        require_encoder_of_run(run, in_float32, encoder)
        if encoder.identity.name == f"local-dir:{out}":
            raise ConfigError(f"{out} is the run's own encoder. Choose another folder.")
        with _replacing(out) as temporary:
            notes = chosen.write(saved, encoder, describe_model(run, saved), temporary)
    if not _computes_in_fp32(saved):
        notes += (f"{_describe_precision(saved)} Its own probabilities differ by that rounding.",)
    return ExportSummary(out, sum(file.stat().st_size for file in _files(out)), notes)


def describe_model(run: Run, model: SavedModel) -> dict[str, Any]:
    """Everything about a model that its tensors do not say, JSON-able."""
    notice = "Research software. Not for clinical use."
    if model.encoder["is_random"]:
        notice += " The encoder has RANDOM WEIGHTS: results have no medical meaning."
    preprocessing = model.encoder["preprocessing"]
    return {
        "notice": notice,
        "findings": list(model.findings),
        "thresholds": model.thresholds,
        "threshold_rule": model.threshold_rule,
        "calibration": model.calibration,
        "preprocessing": preprocessing
        | {"decode_rule_in_words": DECODE_RULES[preprocessing["decode_rule"]]},
        "features": model.features,
        "input_norm": model.head["input_norm"],
        "hidden": list(model.head["hidden"]),
        "norm": model.head["norm"],
        "n_members": model.n_members,
        "fine_tuned_blocks": name_blocks(model.tail_tensors),
        "encoder": model.encoder,
        "precision": _describe_precision(model),
        "run": {"name": run.path.resolve().name}
        | {key: run.config.get(key) for key in ("kind", "seed", "versions", "machine")},
    }


def _describe_precision(model: SavedModel) -> str:
    used = {"encoder": model.encoder["precision"]}
    if model.tail is not None:
        used |= {"blocks": model.tail["precision"], "tokens": model.tail["tokens"]}
    return "Exported in fp32; in the run: " + ", ".join(f"{k} {v}" for k, v in used.items()) + "."


def _computes_in_fp32(model: SavedModel) -> bool:
    return {model.encoder["precision"], (model.tail or {}).get("precision", "fp32")} == {"fp32"}


def _require_free(out: Path, chosen: _Format, *, overwrite: bool) -> None:
    """Raise ConfigError unless the output may be written; nothing but an export is replaced."""
    is_folder = chosen.is_folder
    if out.exists() and out.is_dir() != is_folder:
        wanted = "a folder" if is_folder else "a file, such as model.onnx"
        raise ConfigError(f"{out} is a {'file' if is_folder else 'folder'}; --out needs {wanted}.")
    if not out.exists() or (is_folder and not any(out.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{out} exists. Choose another name, or replace it with --overwrite.")
    if is_folder and not (out / chosen.mark).is_file():
        raise ConfigError(f"{out} holds other files and no export. Choose a folder of its own.")


@contextmanager
def _one_writer(out: Path) -> Iterator[None]:
    """Keep other processes from writing to `out`, by a lock beside it: a folder is replaced."""
    lock = WriterLock.acquire(out, out.with_name(f".{out.name}.lock"))
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A name beside `out` to write a file or folder to, which then takes the place of `out`."""
    temporary, former = (
        out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("tmp", "old")
    )
    try:
        yield temporary
        for file in _files(temporary):
            with opened(file, os.O_RDONLY) as fd:
                sync(fd)
        if out.is_dir():  # a folder that holds files cannot be renamed over
            out.rename(former)
        temporary.replace(out)
        sync_folder(out.parent)
    finally:
        if former.exists() and not out.exists():
            former.rename(out)
        for path in (temporary, former):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]
