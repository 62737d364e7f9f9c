"""A run -> one ONNX file, pixels to probabilities, compared with torch before it is kept."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from cxr_cache.common.extras import EXTRAS, require_extra
from cxr_cache.common.wording import first_line
from cxr_cache.datasets.preprocessing import Preprocessing
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.encoding import draw_canaries
from cxr_cache.encoders.towers import run_whole
from cxr_cache.errors import ExportError
from cxr_cache.models.heads import HeadBank
from cxr_cache.models.predict import Predictor
from cxr_cache.models.run import Run, SavedModel
from cxr_cache.models.tuned import as_cached, load_members
from cxr_cache.store.rows import FEATURES

OPSET: Final = 18
MAX_DIFFERENCE: Final = 1e-4
"""Between probabilities of the file and of torch, both in float32."""

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
    "order of findings, calibrated; a finding counts as present from its threshold on (2: never; "
    "3: too few positives to decide)."
)


def require_onnx(run: Run, model: SavedModel) -> None:
    """Raise ConfigError unless the packages of the extra are there; any run will do."""
    require_extra("onnx", "--format onnx")


def write_onnx(
    model: SavedModel, encoder: Encoder, description: Mapping[str, Any], path: Path
) -> tuple[str, ...]:
    """Write the file, check it, and compare it with torch on generated images.

    The members of an ensemble are averaged inside the file; the encoder computes in float32. The
    description goes into the file's ``metadata_props``; what is not text, as JSON. Gives a sentence
    on how far the probabilities are from torch's.

    Raises
    ------
    ExportError
        The model is too large for one file, or no exporter's file computes what torch does.
    """
    whole = build_whole_model(model, encoder)
    _require_size(whole)
    images = draw_canaries(encoder.preprocessing.image_size_px)
    predictor = Predictor(in_full_precision(model), encoder)
    uncalibrated = predictor.from_pixels(torch.from_numpy(images))
    expected = model.operating_point.calibration.apply(uncalibrated)
    texts = {**description, "how_to_use": _HOW_TO_USE}
    reasons = []
    for exporter in _EXPORTERS:
        try:
            _convert(whole, images, exporter, texts, path)
            difference = float(np.abs(_run_file(path, images) - expected).max())
            if not difference <= MAX_DIFFERENCE:  # NaN is not
                raise ExportError(
                    f"its probabilities differ from torch's by {difference:.2g}, more than "
                    f"{MAX_DIFFERENCE:g}"
                )
        except Exception as error:  # converters raise anything
            reasons.append(f"{type(error).__name__}: {first_line(error)}")
            continue
        return (
            f"Checked with onnxruntime: probabilities of {len(images)} generated images are "
            f"within {difference:.1e} of torch's.",
        )
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", *EXTRAS["onnx"].packages)
    )
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


def build_whole_model(model: SavedModel, encoder: Encoder) -> nn.Module:
    """The module that gives what :func:`cxr_cache.models.predict.predict_images` gives.

    In evaluation mode and without gradients: uint8 pixels ``(B, 3, S, S)`` to probabilities
    ``(B, F)``, the members averaged, then calibrated. Plain layers only, for exporters. `encoder`
    is the run's, as it is before fine-tuning, which it stays.
    """
    build = _FrozenModel if model.tail is None else _TunedModel
    return build(model, encoder).eval().requires_grad_(False)


def plain_heads(model: SavedModel) -> nn.ModuleList:
    """The members' heads as plain ``nn.Sequential``, in evaluation mode."""
    bank = HeadBank.from_snapshot(model.head_tensors)
    return nn.ModuleList([bank.as_sequential(k) for k in range(bank.n_heads)])


def in_full_precision(model: SavedModel) -> SavedModel:
    """The same model with blocks that compute in float32, whatever they were trained in."""
    return model if model.tail is None else replace(model, tail=model.tail | {"precision": "fp32"})


class _Normalise(nn.Module):
    """Normalise as :class:`cxr_cache.encoders.encoder.Encoder` does, with nothing in place."""

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name)).view(3, 1, 1)
            self.register_buffer(name, values)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std


class _Average(nn.Module):
    """Members' logits to probabilities, averaged, then calibrated."""

    slope: Tensor
    intercept: Tensor

    def __init__(self, model: SavedModel) -> None:
        super().__init__()
        calibration = model.operating_point.calibration
        for name in ("slope", "intercept"):
            self.register_buffer(name, torch.from_numpy(getattr(calibration, name)).float())
        self._calibrates = calibration.method != "none"

    def forward(self, logits: list[Tensor]) -> Tensor:
        mean = torch.stack([torch.sigmoid(one) for one in logits]).mean(dim=0)
        if not self._calibrates:
            return mean
        return torch.sigmoid(self.slope * (torch.log(mean) - torch.log(1 - mean)) + self.intercept)


class _FrozenModel(nn.Module):
    """One encoder, and every member's head on its embedding."""

    def __init__(self, model: SavedModel, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.heads = encoder, _folded_heads(model)
        self.normalise = _Normalise(encoder.preprocessing)
        self.average = _Average(model)
        self._input_norm = model.head["input_norm"]
        self._columns = FEATURES[model.features]

    def forward(self, pixels: Tensor) -> Tensor:
        pooled, embeddings = run_whole(self.encoder.visual, self.normalise(pixels))
        outputs = {"embeddings": embeddings, "pooled": pooled}
        parts = [outputs[name] for name in self._columns]
        if self._input_norm == "l2":
            parts = [F.normalize(part, dim=-1) for part in parts]
        embeddings = torch.cat(parts, dim=-1)
        return cast(Tensor, self.average([head(embeddings) for head in self.heads]))


class _TunedModel(nn.Module):
    """One stem, and every member's blocks and head on its tokens."""

    def __init__(self, model: SavedModel, encoder: Encoder) -> None:
        super().__init__()
        assert model.tail is not None
        self._model, self._n_unfrozen = replace(model, tensors={}), model.tail["unfreeze_layers"]
        self.encoder, self.heads = encoder, _folded_heads(model)
        self.normalise, self.average = _Normalise(encoder.preprocessing), _Average(model)
        members = load_members(in_full_precision(model), encoder)
        self.tails = nn.ModuleList([member.encoder for member in members])

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.encoder.stem(self.normalise(pixels), self._n_unfrozen)
        tokens = as_cached(tokens, self._model).float()
        logits = []
        for tail, head in zip(self.tails, self.heads, strict=True):
            _, embeddings = cast(Encoder, tail).tail(tokens, self._n_unfrozen)
            if self._model.head["input_norm"] == "l2":
                embeddings = F.normalize(embeddings, dim=-1)
            logits.append(head(embeddings))
        return cast(Tensor, self.average(logits))


def _folded_heads(model: SavedModel) -> nn.ModuleList:
    """The heads with each batch norm in the layer before it, without dropout.

    In evaluation a norm is a scale and a shift; the exporter of torch 2.6 stumbles over it.
    """
    heads = nn.ModuleList()
    for head in plain_heads(model):
        layers: list[nn.Module] = []
        for layer in head.children():
            if isinstance(layer, nn.BatchNorm1d):
                layers[-1] = fuse_linear_bn_eval(cast(nn.Linear, layers[-1]), layer)
            elif not isinstance(layer, nn.Dropout):
                layers.append(layer)
        heads.append(nn.Sequential(*layers))
    return heads
