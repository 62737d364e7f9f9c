"""Encoders of timm: its names with its published weights, and folders in its layout."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Final

from torch import Tensor, nn

from cxr_cache.common.wording import first_line, suggest
from cxr_cache.datasets.preprocessing import Preprocessing
from cxr_cache.encoders.sources import (
    HUGGING_FACE_CONFIG,
    IMAGENET,
    Family,
    Place,
    Source,
    fetch_from_hub,
    find_in_places,
)
from cxr_cache.encoders.timm_vit import PooledTower, split_pooled
from cxr_cache.encoders.weights import fill_tower, read_tensors, require_numbers
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


def _find(place: Place) -> Source:
    """Read timm's config.json, which :mod:`cxr_cache.encoders.hugging_face` has seen before."""
    import timm

    config_path = place.fetch((HUGGING_FACE_CONFIG,), f"has no {HUGGING_FACE_CONFIG}.")
    place = place.pin(config_path)
    weights = place.fetch(
        WEIGHTS_FILES,
        "has a configuration, but no weights. Put one of these beside "
        f"{HUGGING_FACE_CONFIG}: {', '.join(WEIGHTS_FILES)}.",
    )
    config = json.loads(config_path.read_text(encoding="utf-8"))
    architecture = str(config["architecture"])
    if not timm.is_model(architecture):
        raise EncoderError(
            f"{config_path} wants the architecture '{architecture}', which timm "
            f"{timm.__version__} does not have.{suggest(architecture, timm.list_models())}"
        )
    cfg = config.get("pretrained_cfg", config)
    model_cfg = {"architecture": architecture, "model_args": config.get("model_args") or {}}
    if "global_pool" in config:
        model_cfg["global_pool"] = config["global_pool"]
    return Source(place.name, str(config_path), model_cfg, cfg, weights, place.revision)


def build_tower(source: Source) -> nn.Module:
    """Build timm's model without its classifier; its weights mean nothing yet."""
    import timm
    import torch

    cfg = source.model_cfg
    architecture, img_size = cfg["architecture"], source.img_size
    arguments = {"num_classes": 0, **cfg["model_args"]}
    arguments["num_classes"] = 0
    if cfg.get("global_pool"):
        arguments["global_pool"] = cfg["global_pool"]
    if "dinov3" in architecture:  # trained with its class token; timm takes the mean
        arguments["global_pool"] = "token"
    if img_size is not None and source.preprocess_cfg.get("fixed_input_size", True):
        arguments["img_size"] = img_size  # others take images of any size
    try:
        with torch.random.fork_rng(devices=[]):  # towers draw their initial weights
            trunk = timm.create_model(
                architecture, pretrained=False, pretrained_cfg=dict(source.preprocess_cfg),
                **arguments,
            )  # fmt: skip
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise EncoderError(
            f"The image tower that {source.origin} describes cannot be built: {first_line(error)}"
        ) from error
    trained_px = source.preprocess_cfg.get("input_size", (3, 224, 224))[-1]
    has_positions = getattr(trunk, "pos_embed", None) is not None
    is_resampled = has_positions and img_size not in (None, trained_px)
    return PooledTower(trunk, positions_from_px=trained_px if is_resampled else None)


def fill_with_weights(visual: Any, source: Source) -> None:
    """Put timm's weights into the tower; every tensor but the classifier's must have its place."""
    assert source.weights is not None
    tensors = read_tensors(source.weights)
    require_numbers(tensors, source.weights)
    trunk = visual.trunk
    classifiers = source.preprocess_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    expected = trunk.state_dict()
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if name in expected or not name.startswith(tuple(f"{c}." for c in classifiers))
    }
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    converted: Mapping[str, Tensor] = convert(kept, trunk) if convert else kept
    named = {f"trunk.{name}": tensor for name, tensor in converted.items()}
    fill_tower(visual, named, source.weights, "image")


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
        raise EncoderError(f"{source.origin}: {error}") from error
    return replace(preprocessing, bits_stored=bits_stored)


FAMILY: Final = Family(
    find={"timm": find_by_name, **find_in_places(_find)},
    build=build_tower,
    fill=fill_with_weights,
    read_preprocessing=read_preprocessing,
    split=split_pooled,
)
