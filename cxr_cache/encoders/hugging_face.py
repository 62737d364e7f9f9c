"""Encoders in the layout of Hugging Face's transformers, which is not needed to load them.

A folder or repository holds ``config.json``, weights, and ``preprocessor_config.json``. Its
``model_type`` says what the tower is; no code of the repository runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast

from torch import nn

from cxr_cache.common.wording import first_line, list_names
from cxr_cache.datasets.preprocessing import Preprocessing
from cxr_cache.encoders.layouts import (
    ACTIVATIONS,
    LAYOUTS,
    build_trunk,
    fit_tensors,
    read_settings,
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
    require_whole_patches,
)
from cxr_cache.encoders.tensor_names import make_speller, rename_tensors
from cxr_cache.encoders.timm_vit import PooledTower, split_pooled
from cxr_cache.encoders.weights import (
    explain_prefixes,
    fill_tower,
    list_parts,
    read_names,
    read_tensors,
    require_usable,
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
    """Read what a place in the layout of transformers holds; None if it is timm's.

    A file that was named may be told by its own tensors, so None where its neighbour is unknown.
    """
    is_named = place.weights is not None
    config_path = place.find((HUGGING_FACE_CONFIG,) if is_named else CONFIG_FILES)
    if config_path is None:
        return None
    if ADAPTER_CONFIG in (config_path.name, *(path.name for path in config_path.parent.iterdir())):
        raise EncoderError(
            f"{place.folder or place.repo} holds an adapter (LoRA), which is a change to another "
            "model and no model by itself. Merge the two and save the result: peft's "
            "merge_and_unload(), then save_pretrained()."
        )
    config = read_json(config_path)
    if is_timms(config) or (is_named and not _is_known(config)):
        return None
    require_known(config, config_path)
    place = place.pin(config_path)
    weights = place.fetch_weights(
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
    notes = tuple(_note_unknown_kind(preprocessing, preprocessing_path))
    return Source(
        place.name, str(config_path), config, preprocessing, weights, place.revision, notes=notes
    )


def is_timms(config: Mapping[str, Any]) -> bool:
    """Tell whether a configuration is timm's, which transformers writes for its models, too."""
    return "architecture" in config and config.get("model_type") in (None, "timm_wrapper")


def _note_unknown_kind(cfg: Mapping[str, Any], path: Path) -> Iterator[str]:
    """Say that a processor may do more than its file states."""
    if _find_kind(cfg) not in _KINDS:
        named = cfg.get("image_processor_type") or cfg.get("feature_extractor_type")
        yield (
            f"{path.name} names an image processor that is not known here ({named}). Images were "
            "prepared as the file states; if the processor's own code does more, the features are "
            "not quite the encoder's."
        )


def read_processor(path: Path) -> dict[str, Any]:
    """Read what a family's own image processor does with images, and name the file as its origin.

    Raises
    ------
    EncoderError
        The file is no JSON.
    """
    content = read_json(path)
    return {**content.get("image_processor", content), "origin": str(path)}


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration.

    Raises
    ------
    EncoderError
        It is no JSON, or no dictionary.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise EncoderError(
            f"{path} cannot be read as JSON ({error}). Copy or download it again."
        ) from error
    if not isinstance(content, dict):
        raise EncoderError(f"{path} is no configuration: it holds a {type(content).__name__}.")
    return content


def require_known(config: Mapping[str, Any], path: Path) -> None:
    """Raise EncoderError unless this is the configuration of a tower that can be loaded."""
    model_type = config.get("model_type")
    if not _is_known(config):
        custom = _explain_part(config)
        custom += " It has code of its own (auto_map), which is not run." * ("auto_map" in config)
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


def _is_known(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in tuple(LAYOUTS)  # what is in a file may be a list


def _explain_part(config: Mapping[str, Any]) -> str:
    """Say how to take the image tower out of a model for more; empty if none is known."""
    part = config.get("vision_config") or config.get("encoder")
    if not isinstance(part, Mapping) or not _is_known(part):
        return ""
    return (
        f" Its image tower is a {part['model_type']}: load the model by transformers, and save "
        "that part alone by its save_pretrained()."
    )


def build_tower(source: Source) -> nn.Module:
    """Build timm's VisionTransformer for a configuration; its weights mean nothing yet."""
    model_type = source.model_cfg["model_type"]
    settings = read_settings(source.model_cfg, source.origin)
    # Where images are of any shape, read_preprocessing asks the caller for one.
    own_px = read_size(source.preprocess_cfg, settings["image_size"], "squash")[0]
    image_px = source.img_size or own_px
    require_whole_patches(source, (settings["patch_size"],) * 2, own_px)
    try:
        trunk = build_trunk(model_type, settings, image_px)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise EncoderError(
            f"The image tower that {source.origin} describes cannot be built: {first_line(error)}. "
            "Take configuration and weights from the model's repository; embeddings that were "
            "computed elsewhere come in by cxr-cache import."
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
        from timm.layers.create_act import get_act_layer

        named = source.model_cfg.get("pooler_act", "tanh")
        known = {"tanh": "tanh", "linear": "identity"} | ACTIVATIONS
        if named not in known:
            raise EncoderError(
                f"{source.origin} has the pooler_act '{named}', which is not one of "
                f"{', '.join(known)}. Embeddings that were computed elsewhere come in by cxr-cache "
                "import."
            )
        head = nn.Sequential()
        head.add_module("dense", nn.Linear(width, projected_width))
        head.add_module("activation", get_act_layer(known[named])())
        return head
    return None


def fill_with_weights(visual: nn.Module, source: Source) -> None:
    """Put a checkpoint's weights into the tower; every tensor must have its place."""
    assert source.weights is not None
    tensors = read_tensors(source.weights)
    require_usable(tensors, source.weights)
    model_type = source.model_cfg["model_type"]
    settings = read_settings(source.model_cfg, source.origin)
    named = rename_tensors(tensors, source.weights)
    if not any(name.startswith("trunk.") for name in named):
        remedy = explain_prefixes(source.weights) or "Take both from the same repository."
        raise EncoderError(
            f"{source.weights} holds no image tower, but {list_names(list(tensors), 3)}, and "
            f"{source.origin} asks for a {model_type}. {remedy}"
        )
    fitted = fit_tensors(named, visual, model_type, settings)
    spell = make_speller(tensors, model_type, settings)
    fill_tower(visual, fitted, source.weights, "image", spell, is_bare=source.is_bare)


# -- preprocessing ------------------------------------------------------------------------

ResizeMode: TypeAlias = Literal["squash", "crop", "pad"]
_RESAMPLING: Final = {1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""By their numbers in Pillow."""
_DEFAULT_RESAMPLING: Final = {"ViT": 2, "DINOv3ViT": 2, "CLIP": 3, "Bit": 3, "Siglip": 3}
"""By the kind of image processor, of files that leave it out."""
_CROPPING: Final = ("CLIP", "Bit")
"""Kinds for which one number is the shortest edge, not the side of a square."""
_KINDS: Final = {*_DEFAULT_RESAMPLING, "Siglip2", "DeiT", "Beit", "Blip", "ChineseCLIP", ""}
"""Kinds that do no more than their files state."""


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
    resize = resize or cfg.get("resize_mode")  # never in a file; of encoders that are known
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
    if not isinstance(height, int | None):
        raise EncoderError(
            f"{origin} asks for {height!r} x {width!r} pixels, where whole numbers belong. Copy "
            "the file from the model's repository."
        )
    return height


_STEPS: Final = {"resize", "rescale", "normalize", "center_crop", "pad", "convert_rgb"}
"""What may be done to images; any more would be left out."""


def _require_known_steps(cfg: Mapping[str, Any], origin: str) -> None:
    """Raise EncoderError where a processor does more to images than is offered."""
    asked = {key for key, value in cfg.items() if value is True}
    more = {key for key in asked if key.startswith("do_") and key[3:] not in _STEPS}
    more = (more - {"do_reduce_labels"}) | (asked & {"offset", "rescale_offset"})
    if more:
        raise EncoderError(
            f"{origin} does more to images than is offered ({list_names(sorted(more))}), and "
            "features without it would differ. Embeddings that were computed elsewhere come in by "
            "cxr-cache import."
        )


def _read_interpolation(cfg: Mapping[str, Any], origin: str) -> str:
    """Read the name of the interpolation, which files have by its number."""
    resample = cfg.get("resample", _DEFAULT_RESAMPLING.get(_find_kind(cfg)))
    if resample is None:
        raise EncoderError(
            f"{origin} does not say by which interpolation images are resized (resample). Copy the "
            "file from the model's repository, or add the line as its code has it, such as "
            '"resample": 3 for bicubic.'
        )
    name = _RESAMPLING.get(resample, resample)
    if name not in _RESAMPLING.values():
        raise EncoderError(
            f"{origin} asks for the interpolation {'nearest' if name == 0 else repr(name)} "
            "(resample), which is not offered. Offered are "
            f"{', '.join(f'{n} ({name})' for n, name in _RESAMPLING.items())}: one of these in a "
            "copy of the file changes features a little."
        )
    return str(name)


def _read_statistics(
    cfg: Mapping[str, Any], normalize: str, origin: str
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Read mean and standard deviation of pixels in 0..1."""
    if normalize == "imagenet":
        return IMAGENET["mean"], IMAGENET["std"]
    mean, std = cfg.get("image_mean"), cfg.get("image_std")
    if not cfg.get("do_normalize", True):
        mean, std = 0, 1
    if mean is None or std is None:
        raise EncoderError(
            f"{origin} has no image_mean and image_std. Copy the file from the model's repository, "
            "or choose --normalize imagenet."
        )
    factor = cfg.get("rescale_factor", 1 / 255) if cfg.get("do_rescale", True) else 1
    return _read_channels(mean, factor, origin), _read_channels(std, factor, origin)


def _read_channels(values: Any, factor: Any, origin: str) -> tuple[float, float, float]:
    """Read a number for each channel, of pixels times `factor`, as one of pixels in 0..1."""
    numbers = values if isinstance(values, list | tuple) else (values,)
    numbers = tuple(numbers) * 3 if len(numbers) == 1 else tuple(numbers)
    are_numbers = all(isinstance(n, int | float) for n in (*numbers, factor))
    if not are_numbers or len(numbers) != 3 or not factor > 0:
        raise EncoderError(
            f"{origin} has {values!r} as mean or standard deviation (image_mean, image_std) of "
            f"pixels times {factor!r} (rescale_factor), where one number or three belong. Copy the "
            "file from the model's repository."
        )
    scale = 1 if abs(factor * 255 - 1) < 1e-6 else factor * 255
    return (numbers[0] / scale, numbers[1] / scale, numbers[2] / scale)


def read_preprocessing(
    source: Source, visual: Any, resize: str | None, normalize: str, bits_stored: int | None
) -> Preprocessing:
    """Read what a family's own image processor does, overridden by the caller."""
    cfg = source.preprocess_cfg
    # Of towers that are not timm's: open_clip's own
    sides = visual.trunk.patch_embed.img_size if hasattr(visual, "trunk") else visual.image_size
    origin, px = cfg["origin"], sides[0]
    size_px, resized, mode = read_size(cfg, px, resize)
    _require_known_steps(cfg, origin)
    mean, std = _read_statistics(cfg, normalize, origin)
    try:
        preprocessing = Preprocessing(
            image_size_px=size_px,
            mean=mean,
            std=std,
            interpolation=_read_interpolation(cfg, origin),
            resize=mode,
            resize_px=None if resized == size_px else resized,
            crop_rounding=cfg.get("crop_rounding", "down")
            if mode == "crop" or resized != size_px
            else "nearest",
        )
    except ConfigError as error:
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
