"""A run -> one ONNX file, pixels to probabilities, compared with torch before it is kept."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cxr_cache.encoders.canary import draw_canaries
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.sources import first_line
from cxr_cache.errors import ExportError
from cxr_cache.models.predict import predict_pixels
from cxr_cache.models.run import Run, SavedModel, read_calibration
from cxr_cache.models.whole_model import build_whole_model, in_full_precision

OPSET: Final = 18
MAX_DIFFERENCE: Final = 1e-4
"""Between probabilities of the file and of torch, both in float32."""

_PACKAGES: Final = ("onnx", "onnxscript", "onnxruntime")
_MAX_BYTES: Final = 2 * 10**9  # protobuf holds 2 GiB
_EXPORTERS: Final[tuple[dict[str, Any], ...]] = (
    {
        "dynamo": True,
        "external_data": False,
        # torch 2.6 fails at a size without a limit; the file itself holds none
        "dynamic_shapes": ({0: torch.export.Dim("batch", max=2**30)},),
    },
    # The older one, where the newer cannot, as in torch 2.6 with fine-tuned blocks
    {"dynamo": False, "dynamic_axes": {name: {0: "batch"} for name in ("pixels", "probabilities")}},
)
_HOW_TO_USE: Final = (
    "Input pixels: uint8 (B, 3, S, S), RGB from 0 to 255, decoded, resized and cropped as "
    "preprocessing says; normalisation is inside. Output probabilities: float32 (B, F), in the "
    "order of findings, calibrated; a finding counts as present from its threshold on (above 1: "
    "never)."
)


def require_onnx(run: Run, model: SavedModel) -> None:
    """Raise ExportError unless the packages of the extra are there; any run will do."""
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise ExportError(
            f"--format onnx needs {', '.join(missing)}, which cxr-cache does without otherwise. "
            "Install with: pip install 'cxr-cache[onnx]'"
        )


def write_onnx(
    model: SavedModel, encoder: Encoder, description: Mapping[str, Any], path: Path
) -> tuple[str, ...]:
    """Write the file, check it, and compare it with torch on generated images.

    Parameters
    ----------
    model
        Frozen or fine-tuned; the members of an ensemble are averaged inside the file.
    encoder
        The run's, computing in float32.
    description
        Goes into the file's ``metadata_props``; what is not text, as JSON.
    path
        Written only here.

    Returns
    -------
    tuple
        How far the probabilities are from torch's.

    Raises
    ------
    ExportError
        The model is too large for one file, or no exporter's file computes what torch does.
    """
    whole = build_whole_model(model, encoder)
    _require_size(whole)
    images = draw_canaries(encoder.preprocessing.image_size_px)
    uncalibrated = predict_pixels(in_full_precision(model), encoder, torch.from_numpy(images))
    expected = read_calibration(model.calibration, len(model.findings)).apply(uncalibrated)
    texts = {**description, "how_to_use": _HOW_TO_USE}
    reasons = []
    for exporter in _EXPORTERS:
        try:
            _convert(whole, images, exporter, texts, path)
            difference = float(np.abs(_run_file(path, images) - expected).max())
            _require_equal(difference)
        except Exception as error:  # converters raise anything
            reasons.append(f"{type(error).__name__}: {first_line(error)}")
            continue
        return (
            f"Checked with onnxruntime: probabilities of {len(images)} generated images are "
            f"within {difference:.1e} of torch's.",
        )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", *_PACKAGES))
    raise ExportError(
        "No ONNX file that computes what the run computes could be made, so none was kept:\n"
        + "\n".join(f"  {reason}" for reason in reasons)
        + f"\nTry other versions than {versions}."
    )


def _require_size(whole: nn.Module) -> None:
    tensors = {id(tensor): tensor for tensor in whole.state_dict(keep_vars=True).values()}
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if n_bytes > _MAX_BYTES:
        raise ExportError(
            f"The model has {n_bytes / 1e9:.1f} GB of weights, and an ONNX file holds at most "
            f"{_MAX_BYTES / 1e9:.0f} GB. Use --format open-clip, or a run with fewer members."
        )


def _require_equal(difference: float) -> None:
    if not difference <= MAX_DIFFERENCE:  # NaN is not
        raise ExportError(
            f"its probabilities differ from torch's by {difference:.2g}, more than "
            f"{MAX_DIFFERENCE:g}"
        )


def _convert(
    whole: nn.Module,
    images: NDArray[np.uint8],
    exporter: Mapping[str, Any],
    texts: Mapping[str, Any],
    path: Path,
) -> None:
    """Write the module with its weights and its description, for any number of images."""
    import onnx

    with _quiet(), _plain_attention():
        torch.onnx.export(
            whole,
            (torch.from_numpy(images[:2]),),  # two, for one would be taken for a constant
            path,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=["probabilities"],
            verbose=False,
            **exporter,
        )
    content = onnx.load(path)
    for node in content.graph.node:  # traces of this machine's files, a fifth of a small model
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.helper.set_model_props(
        content,
        {key: text if isinstance(text, str) else json.dumps(text) for key, text in texts.items()},
    )
    onnx.save(content, path)
    onnx.checker.check_model(str(path), full_check=True)


def _run_file(path: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Probabilities by onnxruntime, in batches of two sizes, neither of which was traced."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    parts = [session.run(None, {"pixels": part})[0] for part in (images[:1], images[1:])]
    return np.concatenate(parts)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what converters tell about their own work; what they raise is kept."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep ``nn.MultiheadAttention`` from its fused kernel, for which ONNX has no word."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
