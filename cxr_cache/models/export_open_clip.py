"""A run -> a folder that open_clip loads as `local-dir:`, with the head beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from cxr_cache.datasets.preprocessing import Preprocessing
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import find_encoder
from cxr_cache.encoders.open_clip import WEIGHTS_FILES
from cxr_cache.encoders.sources import CONFIG_FILE, Source
from cxr_cache.encoders.weights import read_tensors
from cxr_cache.errors import ExportError
from cxr_cache.models.export_onnx import plain_heads
from cxr_cache.models.run import Run, SavedModel

HEAD_FILE: Final = "head.json"
HEAD_WEIGHTS_FILE: Final = "head.safetensors"

_CALIBRATE: Final = (
    "probabilities = torch.sigmoid(slope * torch.logit(probabilities) + intercept), with slope and "
    "intercept of calibration, in the order of findings."
)
_RESIZE_MODES: Final = {"crop": "shortest", "squash": "squash", "pad": "longest"}
_COPIED_FILES: Final = (  # what Hugging Face tokenizers are made of; open_clip reads them here
    "added_tokens.json",
    "config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
)


def require_one_checkpoint(run: Run, model: SavedModel) -> None:
    """Raise ExportError unless one image tower stands for the run, and a text tower goes with it.

    Random weights come without the one, and fine-tuned members have towers of their own.
    """
    if model.encoder["is_random"]:
        raise ExportError(
            f"{run.path} was made with {model.encoder['name']}, whose random weights come without "
            "the text tower that open_clip needs. Use --format onnx, which writes the image tower "
            "and the head."
        )
    if model.features != "projected":
        raise ExportError(
            f"{run.path} was trained with --features {model.features}, and an open_clip model "
            "gives the projected embedding only. Train with --features projected, or use "
            "--format onnx."
        )
    if model.tail is not None and model.n_members > 1:
        raise ExportError(
            f"{run.path} is an ensemble of {model.n_members} fine-tuned image towers, and an "
            "open_clip model has one. Fine-tune with --final refit or --final best-fold, or use "
            "--format onnx, which averages them."
        )


def write_open_clip(
    model: SavedModel, encoder: Encoder, description: Mapping[str, Any], folder: Path
) -> tuple[str, ...]:
    """Write configuration, both towers and the head; tokenizer files where the source has them.

    Tensors that were not trained are copied as the checkpoint holds them, text tower included;
    they are mapped rather than loaded, and no text tower is built.

    The model has at most one set of fine-tuned blocks, and the encoder was loaded from a
    checkpoint. The description goes into ``head.json``. Gives what a user of the folder has to
    know.

    Raises
    ------
    ExportError
        The checkpoint has no text tower, or the disk is full.
    """
    _, source = find_encoder(encoder.identity.name)
    assert source.weights is not None, "random weights were refused before"
    tensors = read_tensors(source.weights)
    _require_text_tower(source, tensors)
    folder.mkdir(parents=True)
    config = {
        "model_cfg": dict(source.model_cfg),
        "preprocess_cfg": _preprocess_cfg(encoder.preprocessing),
    }
    _write_json(folder / CONFIG_FILE, config)
    heads = plain_heads(model)
    _write_json(folder / HEAD_FILE, {**description, "how_to_use": _how_to_use(model, heads)})
    _save(heads.state_dict(), folder / HEAD_WEIGHTS_FILE)
    tuned = {name: tensor[0] for name, tensor in model.tail_tensors.items()}
    assert tuned.keys() <= tensors.keys(), "blocks that the encoder does not have"
    _save(tensors | tuned, folder / WEIGHTS_FILES[0])
    copied = _copy_beside(source.weights, folder)
    return _notes(source.model_cfg["text_cfg"], copied)


def _require_text_tower(source: Source, tensors: Mapping[str, Tensor]) -> None:
    has_text = any(not name.startswith("visual.") for name in tensors)
    if not has_text or "text_cfg" not in source.model_cfg:
        raise ExportError(
            f"{source.weights if not has_text else source.origin} has no text tower, without "
            "which open_clip builds no model. Use --format onnx, which needs none."
        )


def _preprocess_cfg(preprocessing: Preprocessing) -> dict[str, Any]:
    """What the run was trained on, in open_clip's words; the tower knows its size."""
    if not preprocessing.antialias:
        raise ExportError(
            "The run's images were resized without antialias, which open_clip cannot be told. Use "
            "--format onnx, or extract again without --no-antialias."
        )
    return {
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "interpolation": preprocessing.interpolation,
        "resize_mode": _RESIZE_MODES[preprocessing.resize],
    }


def _how_to_use(model: SavedModel, heads: nn.ModuleList) -> list[str]:
    """Lines of Python and prose that need open_clip, but not this package."""
    calibrates = model.operating_point.calibration.method != "none"
    layers = ", ".join(map(_name_layer, cast(nn.Sequential, heads[0])))
    normalise = "embedding = torch.nn.functional.normalize(embedding, dim=-1)"
    return [
        "model, _, preprocess = open_clip.create_model_and_transforms('local-dir:THIS_FOLDER')",
        "embedding = model.eval().encode_image(preprocess(image.convert('RGB'))[None])",
        *([normalise] if model.head["input_norm"] == "l2" else []),
        f"A head is torch.nn.Sequential of {layers} in evaluation mode. {HEAD_WEIGHTS_FILE} is the "
        f"state_dict of torch.nn.ModuleList of {len(heads)} such heads ('0.0.weight' is the first "
        "layer of the first).",
        "probabilities = mean over the heads of torch.sigmoid(head(embedding)), in the order of "
        "findings.",
        *([_CALIBRATE] if calibrates else []),
        "A finding counts as present from its threshold on (2: never; 3: too few positives to "
        "decide).",
        "Files of more than 8 bits must be scaled to 8 bits as preprocessing.decode_rule_in_words "
        "says.",
    ]


def _name_layer(layer: nn.Module) -> str:
    """A layer as one would write it in Python, without what its weights do not depend on."""
    if isinstance(layer, nn.Linear):
        return f"Linear({layer.in_features}, {layer.out_features})"
    return type(layer).__name__


def _copy_beside(weights: Path, folder: Path) -> list[str]:
    """Copy tokenizer and licence from the checkpoint's folder; gives the names found."""
    found = [name for name in _COPIED_FILES if (weights.parent / name).is_file()]
    for name in found:
        shutil.copyfile(weights.parent / name, folder / name)
    return found


def _notes(text_cfg: Mapping[str, Any], copied: list[str]) -> tuple[str, ...]:
    """What open_clip will look for elsewhere: parts of a text tower from Hugging Face."""
    if "hf_model_name" not in text_cfg:
        return ()
    notes = [
        f"open_clip takes the text tower's configuration from {text_cfg['hf_model_name']} on the "
        "Hugging Face hub (or its cache), and needs the package transformers.",
    ]
    if not any(name.startswith(("tokenizer", "vocab")) for name in copied):
        notes.append(
            "No tokenizer files lay beside the encoder's weights; for open_clip.get_tokenizer "
            "copy them from the encoder's repository into the folder."
        )
    return tuple(notes)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.touch()
    usual_mode = path.stat().st_mode & 0o777  # safetensors lets nobody but the owner read
    try:
        save_file(_unshared(tensors), path, metadata={"format": "pt"})
        path.chmod(usual_mode)
    except SafetensorError as error:
        raise ExportError(f"{path.name} could not be written: {error}. Free some space.") from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, in the order of their names, none of which lies in another's memory.

    Safetensors refuses tied weights; a pickle may hold some.
    """
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items()):
        place = tensor.untyped_storage().data_ptr()
        is_whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        keep = is_whole and place not in seen and tensor.is_contiguous()
        apart[name] = tensor if keep else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(place)
    return apart
