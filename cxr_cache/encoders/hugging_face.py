"""Encoders in the layout of Hugging Face's transformers, which is not needed to load them.

A folder or repository holds ``config.json``, weights, and ``preprocessor_config.json``. Its
``model_type`` says what the tower is; no code of the repository runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast

from torch import nn

from cxr_cache.common.wording import list_names
from cxr_cache.datasets.preprocessing import Preprocessing
from cxr_cache.encoders.layouts import (
    LAYOUTS,
    build_trunk,
    fit_tensors,
    read_settings,
    rename_tensors,
)
from cxr_cache.encoders.sources import (
    ADAPTER_CONFIG,
    CONFIG_FILES,
    HUGGING_FACE_CONFIG,
    IMAGENET,
    Family,
    Place,
    Source,
    find_in_places,
)
from cxr_cache.encoders.timm_vit import PooledTower, split_pooled
from cxr_cache.encoders.weights import (
    fill_tower,
    list_parts,
    read_names,
    read_tensors,
    require_numbers,
)
from cxr_cache.errors import ConfigError, EncoderError

WEIGHTS_FILES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pt",
)
PREPROCESSING_FILES: Final = ("preprocessor_config.json", "processor_config.json")


def _find(place: Place) -> Source | None:
    """Read what a place in the layout of transformers holds; None if it is timm's."""
    config_path = place.fetch(CONFIG_FILES, f"has no {HUGGING_FACE_CONFIG}.")
    if ADAPTER_CONFIG in (config_path.name, *(path.name for path in config_path.parent.iterdir())):
        raise EncoderError(
            f"{place.folder or place.repo} holds an adapter (LoRA), which is a change to another "
            "model and no model by itself. Merge the two and save the result: peft's "
            "merge_and_unload(), then save_pretrained()."
        )
    config = _read_json(config_path)
    if "model_type" not in config and "architecture" in config:
        return None
    _require_known(config, config_path)
    place = place.pin(config_path)
    weights = place.fetch(
        WEIGHTS_FILES,
        "has a configuration, but no weights. Put one of these beside "
        f"{HUGGING_FACE_CONFIG}: {', '.join(WEIGHTS_FILES)}.",
    )
    for part in list_parts(weights):
        place.fetch(
            (part.name,),
            f"lacks {part.name}, a part of the weights that {weights.name} lists. Copy it from the "
            "model's repository.",
        )
    preprocessing_path = place.fetch(
        PREPROCESSING_FILES,
        f"has no {PREPROCESSING_FILES[0]}, so it is unknown how images must be resized and "
        "normalised. Copy it from the model's repository.",
    )
    preprocessing = read_processor(preprocessing_path)
    return Source(place.name, str(config_path), config, preprocessing, weights, place.revision)


def read_processor(path: Path) -> dict[str, Any]:
    """Read what a family's own image processor does with images, and name the file as its origin.

    Raises
    ------
    EncoderError
        The file is no JSON.
    """
    content = _read_json(path)
    return {**content.get("image_processor", content), "origin": str(path)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise EncoderError(
            f"{path} cannot be read as JSON ({error}). Copy or download it again."
        ) from error
    if not isinstance(content, dict):
        raise EncoderError(f"{path} is no configuration: it holds a {type(content).__name__}.")
    return content


def _require_known(config: Mapping[str, Any], path: Path) -> None:
    """Raise unless this is the configuration of a tower that can be loaded."""
    model_type = config.get("model_type")
    if model_type not in LAYOUTS:
        custom = " It has code of its own (auto_map), which is not run." * ("auto_map" in config)
        says = f"has the model_type {model_type!r}, which is no image tower that is known here"
        if model_type is None:
            says = "does not name its model_type, so it is unknown how the tower is built"
        raise EncoderError(
            f"{path} {says}.{custom} Known are {', '.join(LAYOUTS)}, and what open_clip and timm "
            "have. Embeddings that were computed elsewhere come in by cxr-cache import."
        )
    if "quantization_config" in config:
        raise EncoderError(
            f"{path} describes quantised weights (quantization_config), from which the original "
            "weights cannot be recovered. Take the model before it was quantised."
        )


def build_tower(source: Source) -> nn.Module:
    """Build timm's VisionTransformer for a configuration; its weights mean nothing yet."""
    model_type = source.model_cfg["model_type"]
    settings = read_settings(source.model_cfg, source.origin)
    # Where images are of any shape, read_preprocessing asks the caller for one.
    own_px = read_size(source.preprocess_cfg, settings["image_size"], "squash")[0]
    image_px = source.img_size or own_px
    try:
        trunk = build_trunk(model_type, settings, image_px)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise EncoderError(
            f"The image tower that {source.origin} describes cannot be built: {error}"
        ) from error
    has_positions = getattr(trunk, "pos_embed", None) is not None
    is_resampled = has_positions and image_px // settings["patch_size"] != (
        settings["image_size"] // settings["patch_size"]
    )
    positions_from_px = settings["image_size"] if is_resampled else None
    head = _build_head(source, settings["hidden_size"])
    return PooledTower(trunk, head, positions_from_px=positions_from_px)


def _build_head(source: Source, width: int) -> nn.Module | None:
    """Build what follows the pooling, which is what the file has weights for."""
    assert source.weights is not None
    widths = {
        name: shape[0]
        for name, shape in read_names(source.weights)
        if name.endswith(("visual_projection.weight", "pooler.dense.weight")) and len(shape) == 2
    }
    if not widths:
        return None
    name, projected_width = next(iter(widths.items()))
    if name.endswith("visual_projection.weight"):
        return nn.Linear(width, projected_width, bias=False)
    if source.model_cfg["model_type"] == "vit":
        activation = {"tanh": nn.Tanh, "linear": nn.Identity}.get(
            source.model_cfg.get("pooler_act", "tanh")
        )
        if activation is None:
            raise EncoderError(
                f"{source.origin} has the pooler_act '{source.model_cfg['pooler_act']}', which is "
                "neither tanh nor linear."
            )
        head = nn.Sequential()
        head.add_module("dense", nn.Linear(width, projected_width))
        head.add_module("activation", activation())
        return head
    return None


def fill_with_weights(visual: nn.Module, source: Source) -> None:
    """Put a checkpoint's weights into the tower; every tensor must have its place."""
    assert source.weights is not None
    tensors = read_tensors(source.weights)
    require_numbers(tensors, source.weights)
    model_type = source.model_cfg["model_type"]
    settings = read_settings(source.model_cfg, source.origin)
    named = rename_tensors(tensors, source.weights)
    if not any(name.startswith("trunk.") for name in named):
        raise EncoderError(
            f"{source.weights} holds no image tower, but {list_names(list(tensors), 3)}. "
            f"{source.origin} asks for a {model_type}; take both from the same repository."
        )
    fill_tower(visual, fit_tensors(named, visual, model_type, settings), source.weights, "image")


# -- preprocessing ------------------------------------------------------------------------

ResizeMode: TypeAlias = Literal["squash", "crop", "pad"]
_RESAMPLING: Final = {2: "bilinear", 3: "bicubic"}
_OTHERS: Final = {0: "nearest", 1: "lanczos", 4: "box", 5: "hamming"}
_DEFAULT_RESAMPLING: Final = {"ViT": 2, "DINOv3ViT": 2, "CLIP": 3, "Bit": 3, "Siglip": 3}
"""By the kind of image processor, of files that leave it out."""
_CROPPING: Final = ("CLIP", "Bit")
"""Kinds for which one number is the shortest edge, not the side of a square."""


def _find_kind(cfg: Mapping[str, Any]) -> str:
    named = cfg.get("image_processor_type") or cfg.get("feature_extractor_type") or ""
    return re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", named)


def read_size(
    cfg: Mapping[str, Any], default_px: int, resize: str | None
) -> tuple[int, int, ResizeMode]:
    """Read the tower's input size, the size before the centre is cut out, and how it is resized.

    `resize` overrides the last; the whole image is then what is resized.

    Raises
    ------
    EncoderError
        The file describes something that is not offered.
    """
    origin = cfg.get("origin", "The preprocessing")
    size = cfg.get("size") if cfg.get("do_resize", True) else None
    crop = cfg.get("crop_size") if cfg.get("do_center_crop", False) else None
    if isinstance(size, int) and _find_kind(cfg) in _CROPPING:
        size = {"shortest_edge": size}
    edges = size if isinstance(size, dict) else {}
    shortest = edges.get("shortest_edge")
    sides, cut = _read_sides(size, origin), _read_sides(crop, origin)
    is_known = (shortest and cut and not edges.get("longest_edge")) or sides
    if resize is None and (cfg.get("do_pad") or not is_known):
        how = "pads images (do_pad) in a way of its own"
        if not cfg.get("do_pad"):
            how = f"does not say how an image becomes a square (size {size!r}, crop_size {crop!r})"
        raise EncoderError(f"{origin} {how}. Choose --resize squash, crop or pad.")
    resized = shortest or sides or default_px
    size_px, mode = cut or resized, "crop" if shortest else "squash"
    if resize is not None and (resize != mode or not is_known):
        return size_px, size_px, cast(ResizeMode, resize)
    if resized < size_px:
        raise EncoderError(
            f"{origin} resizes images to {resized} pixels and cuts {size_px} out of them, which "
            "would leave a black margin. Choose --resize squash, crop or pad."
        )
    return size_px, resized, cast(ResizeMode, mode)


def _read_sides(size: Any, origin: str) -> int | None:
    """Read the side of a square, which may be one number; None where there is none."""
    if not isinstance(size, dict):
        return size if isinstance(size, int) else None
    height, width = size.get("height"), size.get("width")
    if height != width:
        raise EncoderError(f"{origin} asks for {height} x {width} pixels, not a square.")
    return height


def read_preprocessing(
    source: Source, visual: Any, resize: str | None, normalize: str, bits_stored: int | None
) -> Preprocessing:
    """Read what a family's own image processor does, overridden by the caller."""
    cfg = source.preprocess_cfg
    # Of towers that are not timm's: open_clip's own
    sides = visual.trunk.patch_embed.img_size if hasattr(visual, "trunk") else visual.image_size
    origin, px = cfg["origin"], sides[0]
    size_px, resized, mode = read_size(cfg, px, resize)
    resample = cfg.get("resample", _DEFAULT_RESAMPLING.get(_find_kind(cfg)))
    if resample not in _RESAMPLING:
        raise EncoderError(
            f"{origin} asks for the interpolation {_OTHERS.get(resample, resample)}; offered are "
            f"{', '.join(_RESAMPLING.values())}."
        )
    if not cfg.get("do_rescale", True) or abs(cfg.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-4:
        raise EncoderError(
            f"{origin} does not scale pixels to 0..1 (do_rescale {cfg.get('do_rescale', True)}, "
            f"rescale_factor {cfg.get('rescale_factor')}), which is not offered."
        )
    statistics: dict[str, Any] = {"mean": cfg.get("image_mean"), "std": cfg.get("image_std")}
    if not cfg.get("do_normalize", True):
        statistics = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    if normalize == "imagenet":
        statistics = dict(IMAGENET)
    if None in statistics.values():
        raise EncoderError(
            f"{origin} has no image_mean and image_std. Copy the file from the model's repository, "
            "or choose --normalize imagenet."
        )
    triples = {k: (v,) * 3 if isinstance(v, int | float) else v for k, v in statistics.items()}
    try:
        preprocessing = Preprocessing(
            image_size_px=size_px,
            mean=tuple(triples["mean"]),
            std=tuple(triples["std"]),
            interpolation=_RESAMPLING[resample],
            resize=mode,
            resize_px=None if resized == size_px else resized,
            crop_rounding=cfg.get("crop_rounding", "down")
            if mode == "crop" or resized != size_px
            else "nearest",
        )
    except (ConfigError, TypeError) as error:
        raise EncoderError(f"{origin}: {error}") from error
    if source.img_size is not None:
        preprocessing = preprocessing.scaled_to(source.img_size)
    return replace(preprocessing, bits_stored=bits_stored)


FAMILY: Final = Family(
    find=find_in_places(_find),
    build=build_tower,
    fill=fill_with_weights,
    read_preprocessing=read_preprocessing,
    split=split_pooled,
)
