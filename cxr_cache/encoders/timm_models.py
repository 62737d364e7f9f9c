"""Encoders of timm: its names with its published weights, and folders in its layout."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from cxr_cache.common.wording import first_line, suggest
from cxr_cache.datasets.preprocessing import Preprocessing
from cxr_cache.encoders.hugging_face import is_timms
from cxr_cache.encoders.layouts import split_biases
from cxr_cache.encoders.sources import (
    HUGGING_FACE_CONFIG,
    IMAGENET,
    Family,
    Place,
    Source,
    fetch_from_hub,
    find_in_places,
    require_whole_patches,
)
from cxr_cache.encoders.timm_vit import PooledTower, split_pooled
from cxr_cache.encoders.weights import fill_tower, read_tensors, require_usable
from cxr_cache.errors import ConfigError, EncoderError

WEIGHTS_FILES: Final = ("model.safetensors", "pytorch_model.bin")


def find_by_name(name: str) -> Source:
    """Read what ``NAME`` stands for: timm's own published weights."""
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise EncoderError(
            f"timm {timm.__version__} has no architecture '{architecture}'."
            f"{suggest(architecture, timm.list_models())}"
        )
    try:
        cfg = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{architecture}.*")
        raise EncoderError(
            f"timm:{name}: {first_line(error)} Published are {', '.join(tags) or 'none'}."
        ) from error
    if cfg is None or not cfg.hf_hub_id:
        place = f", only at {cfg.url}" if cfg is not None and cfg.url else ""
        raise EncoderError(
            f"timm:{name} has no weights on the Hugging Face hub{place}. Choose one of "
            f"{', '.join(timm.list_pretrained(f'{architecture}.*')) or 'another architecture'}."
        )
    named = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else ()
    weights = fetch_from_hub(cfg.hf_hub_id, (*named, *WEIGHTS_FILES), None)
    model_cfg = {"architecture": architecture, "model_args": {}}
    name = f"timm:{name}"
    return Source(name, name, model_cfg, asdict(cfg), weights, weights.parent.name)


def _find(place: Place) -> Source | None:
    """Read timm's config.json, which :mod:`cxr_cache.encoders.hugging_face` has seen before.

    None where a file was named that has another library's beside it.
    """
    import timm

    config_path = place.find((HUGGING_FACE_CONFIG,))
    config = {} if config_path is None else json.loads(config_path.read_text(encoding="utf-8"))
    if config_path is None or not is_timms(config):
        return None
    place = place.pin(config_path)
    weights = place.fetch_weights(
        WEIGHTS_FILES,
        "has a configuration, but no weights. Put one of these beside "
        f"{HUGGING_FACE_CONFIG}: {', '.join(WEIGHTS_FILES)}.",
    )
    architecture = str(config["architecture"])
    if not timm.is_model(architecture):
        raise EncoderError(
            f"{config_path} wants the architecture '{architecture}', which timm "
            f"{timm.__version__} does not have.{suggest(architecture, timm.list_models())}"
        )
    known = {field.name for field in fields(timm.models.PretrainedCfg)}
    cfg, model_args = config.get("pretrained_cfg") or config, config.get("model_args") or {}
    if not isinstance(cfg, dict) or not isinstance(model_args, dict):
        raise EncoderError(
            f"{config_path} has a pretrained_cfg or model_args that is no table of settings. Copy "
            "the file from the model's repository."
        )
    cfg = {key: value for key, value in cfg.items() if key in known}
    notes: tuple[str, ...] = ()
    if not {"mean", "std"} & cfg.keys():
        own = timm.models.get_pretrained_cfg(architecture, allow_unregistered=False)
        cfg = (asdict(own) if own else {}) | cfg
        notes = (
            f"{config_path.name} does not say how images are prepared (pretrained_cfg). What timm "
            f"has for {architecture} was assumed.",
        )
    n_channels = model_args.get("in_chans", 3)
    if model_args.get("img_size") and cfg.get("fixed_input_size", False):
        cfg["input_size"] = (3, *_pair(model_args["img_size"]))  # as timm has it
    _require_size(cfg.get("input_size", (3, 224, 224)), n_channels, config_path)
    model_cfg = {"architecture": architecture, "model_args": model_args}
    if "global_pool" in config:
        model_cfg["global_pool"] = config["global_pool"]
    return Source(
        place.name, str(config_path), model_cfg, cfg, weights, place.revision, notes=notes
    )


def _pair(size: int | Sequence[int]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _require_size(size: Any, n_channels: int, path: Path) -> None:
    """Raise EncoderError where an input size is none."""
    is_size = isinstance(size, list | tuple) and all(isinstance(n, int) for n in size)
    if not is_size or len(size) != 3 or min(size) < 1:
        raise EncoderError(
            f"{path} has the input_size {size!r}, where channels, height and width belong, such as "
            "[3, 224, 224]. Copy the file from the model's repository."
        )
    for n in (n_channels, size[0]):
        if n != 3:
            raise EncoderError(
                f"{path} is for images of {n} channels, not of 3. Take a model for images in "
                "colour; radiographs fill all three channels."
            )


def build_tower(source: Source) -> nn.Module:
    """Build timm's model without its classifier; its weights mean nothing yet."""
    cfg = source.model_cfg
    arguments = {**cfg["model_args"], "num_classes": 0}
    if cfg.get("global_pool"):
        arguments["global_pool"] = cfg["global_pool"]
    if "dinov3" in cfg["architecture"] and arguments.get("global_pool", "avg") == "avg":
        arguments["global_pool"] = "token"  # as it was trained; the mean is timm's own choice
    image_px = source.preprocess_cfg.get("input_size", (3, 224, 224))[-1]
    px, is_asked = source.img_size or image_px, source.img_size is not None
    trunk = _build(source, arguments)
    embed = getattr(trunk, "patch_embed", None)
    patch = getattr(embed, "patch_size", 0)
    require_whole_patches(source, patch if isinstance(patch, tuple) else (patch,), image_px)
    made_for = getattr(embed, "img_size", None)
    own_px = made_for[-1] if made_for else image_px
    takes_size = source.preprocess_cfg.get("fixed_input_size", made_for is not None)
    # One that resamples its positions for every image does so once and for all
    is_dynamic = made_for is not None and getattr(trunk, "dynamic_img_size", False)
    if px != own_px and ((is_asked and takes_size) or is_dynamic):
        trunk = _build(source, arguments | {"img_size": px})
    has_positions = getattr(trunk, "pos_embed", None) is not None
    return PooledTower(trunk, positions_from_px=own_px if has_positions and px != own_px else None)


def _build(source: Source, arguments: Mapping[str, Any]) -> Any:
    import timm
    import torch

    try:
        with torch.random.fork_rng(devices=[]):  # towers draw their initial weights
            return timm.create_model(
                source.model_cfg["architecture"],
                pretrained=False,
                pretrained_cfg=dict(source.preprocess_cfg),
                **arguments,
            )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise EncoderError(
            f"The image tower that {source.origin} describes cannot be built: {first_line(error)}"
        ) from error


def fill_with_weights(visual: Any, source: Source) -> None:
    """Put timm's weights into the tower; every tensor but the classifier's must have its place."""
    import timm

    assert source.weights is not None
    tensors = read_tensors(source.weights)
    require_usable(tensors, source.weights)
    trunk = visual.trunk
    architecture = timm.models.get_pretrained_cfg(source.model_cfg["architecture"])
    own = architecture.classifier if architecture else None
    classifiers = source.preprocess_cfg.get("classifier") or own or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    expected = trunk.state_dict()
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if name in expected or not name.startswith(tuple(f"{c}." for c in classifiers))
    }
    converted = _convert(kept, visual, source.img_size is not None)
    named = {f"trunk.{name}": tensor for name, tensor in converted.items()}
    fill_tower(visual, named, source.weights, "image", lambda name: [_spell(name, tensors)])


def _spell(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Give the name that a file has for a tensor of the tower."""
    bare = name.removeprefix("trunk.")
    joined = re.sub(r"\.[qkv]_bias$", ".qkv.bias", bare)
    return joined if joined in tensors else bare


def _convert(tensors: dict[str, Tensor], visual: Any, is_resized: bool) -> Mapping[str, Tensor]:
    """Bring tensors of older or other names, and positions of another size, into timm's own.

    timm fits a file of its own names to any tower without a word, so it is left alone where no
    other size was asked for.
    """
    trunk = visual.trunk
    expected = trunk.state_dict()
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    is_own = tensors.keys() <= expected.keys()
    if convert is None or (is_own and not _may_resample(tensors, visual, is_resized)):
        return tensors
    if any(name.endswith(".qkv.bias") and name not in expected for name in tensors):
        # timm leaves out biases that the tower has no place for; those that are 0 change nothing
        split = split_biases(tensors)
        tensors = {n: t for n, t in split.items() if n in expected or n in tensors or t.any()}
    converted: Mapping[str, Tensor] = convert(tensors, trunk)
    return converted


def _may_resample(tensors: Mapping[str, Tensor], visual: Any, is_resized: bool) -> bool:
    """Tell whether tensors are of the tower, if for images of another size."""
    trunk, from_px = visual.trunk, visual.positions_from_px
    embed = getattr(trunk, "patch_embed", None)
    patch = getattr(getattr(embed, "proj", None), "weight", None)
    if patch is not None and tensors.get("patch_embed.proj.weight", patch).shape != patch.shape:
        return False
    positions = tensors.get("pos_embed")
    if from_px is None or positions is None or positions.ndim != 3:
        return is_resized
    n_before = trunk.pos_embed.shape[1] - math.prod(trunk.patch_embed.grid_size)
    n_own = math.prod(from_px // side for side in trunk.patch_embed.patch_size)
    return bool(positions.shape[1] == n_before + n_own)


def read_preprocessing(
    source: Source, visual: Any, resize: str | None, normalize: str, bits_stored: int | None
) -> Preprocessing:
    """Read what timm's transform for evaluation does, overridden by the caller."""
    from timm.data.config import resolve_data_config

    resolve: Callable[..., dict[str, Any]] = resolve_data_config
    cfg = resolve({"img_size": source.img_size}, dict(source.preprocess_cfg))
    if normalize == "imagenet":
        cfg |= IMAGENET
    height, width = cfg["input_size"][1:]
    if height != width:
        raise EncoderError(f"{source.origin} asks for {height} x {width} pixels, not a square.")
    modes = {"center": "crop", "squash": "squash"}
    own = modes.get(cfg["crop_mode"])
    if own is None and resize is None:
        raise EncoderError(
            f"{source.origin} asks for crop_mode '{cfg['crop_mode']}', which is not offered. "
            "Choose --resize squash, crop or pad."
        )
    larger = math.floor(height / cfg["crop_pct"])
    is_own = resize is None or resize == own
    try:
        preprocessing = Preprocessing(
            image_size_px=height,
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
            interpolation=cfg["interpolation"],
            resize=resize or own,  # type: ignore[arg-type]
            resize_px=larger if is_own and larger != height else None,
        )
    except ConfigError as error:
        raise EncoderError(
            f"{source.origin}: {error} Copy the file from the model's repository."
        ) from error
    return replace(preprocessing, bits_stored=bits_stored)


FAMILY: Final = Family(
    find={"timm": find_by_name, **find_in_places(_find)},
    build=build_tower,
    fill=fill_with_weights,
    read_preprocessing=read_preprocessing,
    split=split_pooled,
)
