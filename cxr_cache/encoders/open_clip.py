"""Encoders of open_clip: its folders, its repositories and its own names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr_cache.common.wording import suggest
from cxr_cache.datasets.preprocessing import Preprocessing
from cxr_cache.encoders.catalogue.known import read_known
from cxr_cache.encoders.sources import (
    CONFIG_FILE,
    CONFIG_FILES,
    HUGGING_FACE_CONFIG,
    IMAGENET,
    Family,
    Place,
    Source,
    fetch_from_hub,
    find_in_places,
    require_whole_patches,
)
from cxr_cache.encoders.timm_vit import TimmTower
from cxr_cache.encoders.towers import SplitTower, join_heads, softmax_products, split_heads
from cxr_cache.encoders.weights import VISION_PREFIX, fill_with_noise, load_weights, read_names
from cxr_cache.errors import ConfigError, EncoderError

WEIGHTS_FILES = (  # in open_clip's own order of preference
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)


def _find(place: Place) -> Source | None:
    """Read what a place in open_clip's layout holds; None if it is another library's."""
    config = place.fetch(
        CONFIG_FILES,
        f"has no {CONFIG_FILE}, nor a {HUGGING_FACE_CONFIG} as transformers and timm write it. "
        "Copy it from the model's repository, beside the weights. Weights that never had one are "
        "named local-file:PATH.",
    )
    if config.name != CONFIG_FILE or not _may_hold_tower(place.weights):
        return None
    place = place.pin(config)
    weights = place.fetch_weights(
        WEIGHTS_FILES,
        f"has no weights. Put one of these beside {CONFIG_FILE}: {', '.join(WEIGHTS_FILES)}.",
    )
    return _describe(place, config, weights)


def _may_hold_tower(weights: Path | None) -> bool:
    """Tell whether a file that was named is open_clip's; others may lie in its repositories."""
    return weights is None or any(n.startswith(VISION_PREFIX) for n, _ in read_names(weights))


def _describe(place: Place, config_path: Path, weights: Path) -> Source:
    """Read open_clip_config.json."""
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise EncoderError(
            f"{config_path} cannot be read as JSON ({error}). Copy or download it again."
        ) from error
    preprocess_cfg = config.get("preprocess_cfg") or {} if isinstance(config, dict) else None
    if not isinstance(preprocess_cfg, dict) or not isinstance(config.get("model_cfg"), dict):
        raise EncoderError(
            f"{config_path} has no model_cfg, or none that is a table, or such a preprocess_cfg, "
            "so it is not a configuration of open_clip. "
            "Take the file from the repository that the weights are from."
        )
    return Source(
        place.name, str(config_path), config["model_cfg"], preprocess_cfg, weights, place.revision
    )


def find_in_open_clip(name: str) -> Source:
    """An architecture that open_clip knows, and the tag of published weights for it."""
    from open_clip import get_model_config, get_pretrained_cfg

    architecture, tag = _parse_open_clip_name(name)
    model_cfg = get_model_config(architecture)
    tag_cfg = get_pretrained_cfg(architecture, tag)
    if "timm_model_name" not in model_cfg["vision_cfg"] and (
        tag_cfg.get("quick_gelu", False) != model_cfg.get("quick_gelu", False)
    ):
        other = architecture.removesuffix("-quickgelu")
        other += "" if other != architecture else "-quickgelu"
        raise EncoderError(
            f"The weights '{tag}' of {architecture} were trained with another activation "
            f"function than this architecture has. Use {other}/{tag}."
        )
    weights, revision = _fetch_published(tag_cfg)
    return Source(f"{architecture}/{tag}", name, model_cfg, tag_cfg, weights, revision)


def _parse_open_clip_name(name: str) -> tuple[str, str]:
    """Split ``ARCHITECTURE/TAG``; the tag may be missing where there is only one."""
    from open_clip import is_pretrained_cfg, list_models, list_pretrained_tags_by_model

    architecture, tag = name.replace("/", "-"), ""  # ViT-B/32 means ViT-B-32
    if architecture not in list_models():
        head, _, tag = name.rpartition("/")
        architecture = head.replace("/", "-")
    if architecture not in list_models():
        if name.startswith(("/", "./", "../", "~")) and not Path(name).exists():
            raise EncoderError(f"There is no file or folder {name}.")
        kind = "dir" if Path(name).is_dir() else "file"
        here = f" What lies here is named local-{kind}:{name}." if Path(name).exists() else ""
        raise EncoderError(
            f"'{name}' is no short name of an encoder, and open_clip has no architecture "
            f"'{architecture or name}'."
            f"{suggest(architecture or name, [*list_models(), *read_known()])}{here} A model of "
            "the Hugging Face hub is named hf-hub:ORG/REPO, a folder local-dir:PATH; cxr-cache "
            "encoders lists the short names."
        )
    tags = list_pretrained_tags_by_model(architecture)
    if not tag and len(tags) == 1:
        return architecture, tags[0]
    if not tag or not is_pretrained_cfg(architecture, tag):
        raise EncoderError(
            f"{name} does not say which weights. Choose one of: "
            f"{', '.join(f'{architecture}/{known}' for known in tags) or '(none are published)'}."
        )
    return architecture, tag


def _fetch_published(tag_cfg: Mapping[str, Any]) -> tuple[Path, str | None]:
    """Weights of an open_clip tag, and the commit they are from where there is one."""
    from open_clip import download_pretrained

    repo, _, file = tag_cfg.get("hf_hub", "").rpartition("/")
    if repo:
        named = (f"{Path(file).stem}.safetensors", file) if file else WEIGHTS_FILES
        path = fetch_from_hub(repo, named, None)
        return path, path.parent.name
    try:
        return Path(download_pretrained(dict(tag_cfg))), None
    except (OSError, RuntimeError) as error:
        raise EncoderError(
            f"{tag_cfg.get('url')} cannot be downloaded: {error}. Connect once, or copy the model "
            "here and name it local-dir:PATH."
        ) from error


class OpenClipTower(SplitTower):
    """open_clip's own VisionTransformer, behind names such as ViT-B-32."""

    def __init__(self, visual: Any) -> None:
        from open_clip.transformer import ResidualAttentionBlock

        self._visual = visual
        self.blocks = visual.transformer.resblocks
        self.reads_class_token_only = (
            visual.pool_type == "tok"
            and visual.attn_pool is None
            and type(self.blocks[-1]) is ResidualAttentionBlock
        )
        self.patch_grid = tuple(visual.grid_size)

    def embed(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self._visual._embeds(pixels)
        return tokens

    def class_token_block(self, tokens: Tensor) -> Tensor:
        block: Any = self.blocks[-1]
        normed = block.ln_1(tokens)
        attended = block.attention(q_x=normed[:, :1], k_x=normed, v_x=normed)
        class_token: Tensor = tokens[:, :1] + block.ls_1(attended)  # (B, 1, W)
        changed: Tensor = block.ls_2(block.mlp(block.ln_2(class_token)))
        return class_token + changed

    def shows_attention(self, block: nn.Module) -> bool:
        from open_clip.transformer import ResidualAttentionBlock

        return type(block) is ResidualAttentionBlock and type(block.attn) is nn.MultiheadAttention

    def block_with_attention(self, block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        attn = block.attn
        projected = F.linear(block.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = split_heads(projected, attn.num_heads)
        attention = softmax_products(q, k)
        tokens = tokens + block.ls_1(attn.out_proj(join_heads(attention @ v)))
        return tokens + block.ls_2(block.mlp(block.ln_2(tokens))), attention

    def finish(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        pooled: Tensor = self._visual._pool(tokens)[0]
        return pooled, pooled @ self._visual.proj


_RESIZE_OF_MODE = {"shortest": "crop", "squash": "squash", "longest": "pad"}


def build_tower(source: Source) -> nn.Module:
    """open_clip's image tower for a configuration, with weights that mean nothing yet."""
    import timm
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    try:
        vision_cfg = CLIPVisionCfg(**source.model_cfg["vision_cfg"])
        embedding_width = int(source.model_cfg["embed_dim"])
    except (KeyError, TypeError, ValueError) as error:
        raise EncoderError(
            f"{source.origin} does not describe an open_clip model: {error!r}. "
            "It needs model_cfg with embed_dim and vision_cfg, as open_clip writes them."
        ) from error
    timm_name = vision_cfg.timm_model_name
    if timm_name and (":" in timm_name or not timm.is_model(timm_name)):
        raise EncoderError(
            f"{source.origin} wants the architecture '{timm_name}', which timm "
            f"{timm.__version__} does not have.{suggest(timm_name, timm.list_models())}"
        )
    own_px = _pair(vision_cfg.image_size)[0]
    px = source.img_size or own_px
    # Its weights come from us
    vision_cfg = replace(vision_cfg, timm_model_pretrained=False, image_size=px)
    try:
        with torch.random.fork_rng(devices=[]):  # towers draw their initial weights
            torch.default_generator.manual_seed(source.seed)
            visual: nn.Module = _build_vision_tower(
                embedding_width, vision_cfg, quick_gelu=source.model_cfg.get("quick_gelu", False)
            )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise EncoderError(
            f"The image tower that {source.origin} describes cannot be built: {error}"
        ) from error
    embed = getattr(getattr(visual, "trunk", None), "patch_embed", visual)
    require_whole_patches(source, _pair(getattr(embed, "patch_size", 0)), own_px)
    if px != own_px:
        visual.positions_from_px = own_px  # type: ignore[assignment]
    return visual


def read_preprocessing(
    source: Source, visual: nn.Module, resize: str | None, normalize: str, bits_stored: int | None
) -> Preprocessing:
    """open_clip's defaults, overridden by the model's configuration, overridden by the caller."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    cfg = merge_preprocess_dict(PreprocessCfg(), source.preprocess_cfg)
    if normalize == "imagenet":
        cfg |= IMAGENET
    resize = resize or _RESIZE_OF_MODE.get(cfg["resize_mode"])
    if resize is None:
        raise EncoderError(
            f"{source.origin} asks for resize_mode '{cfg['resize_mode']}', which is not offered. "
            "Choose --resize squash, crop or pad."
        )
    height, width = _pair(getattr(visual, "image_size", cfg["size"]))
    if height != width:
        raise EncoderError(f"{source.origin} asks for {height} x {width} pixels, not a square.")
    try:
        preprocessing = Preprocessing(
            image_size_px=height,
            mean=_three(cfg["mean"]),
            std=_three(cfg["std"]),
            interpolation=cfg["interpolation"],
            resize=cast(Literal["squash", "crop", "pad"], resize),
        )
    except ConfigError as error:
        raise EncoderError(f"{source.origin}: {error}") from error
    return replace(preprocessing, bits_stored=bits_stored)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _three(value: float | Sequence[float]) -> tuple[float, float, float]:
    """open_clip takes one number for all three channels, too."""
    return (value, value, value) if isinstance(value, int | float) else tuple(value)  # type: ignore[return-value]


def fill_tower(visual: Any, source: Source) -> None:
    """Put a checkpoint's weights into a tower, or noise where there is none."""
    if source.weights is None:
        fill_with_noise(visual, source.seed)
    else:
        fit = None if source.img_size is None else _fit_positions
        load_weights(visual, source.weights, fit, is_bare=source.is_bare)
    if source.img_size is not None and hasattr(getattr(visual, "trunk", None), "set_input_size"):
        visual.trunk.set_input_size(source.img_size)  # timm resamples positions in place


def _fit_positions(visual: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Resample positions of open_clip's own tower as open_clip does, for images of another size."""
    from open_clip.model import resize_pos_embed

    name = "positional_embedding"
    if name in tensors and tensors[name].ndim == 2:
        state = {f"visual.{name}": tensors[name].float()}
        resize_pos_embed(state, SimpleNamespace(visual=visual))
        tensors[name] = state[f"visual.{name}"]


def split_tower(visual: Any) -> SplitTower | None:
    """Take a tower apart, or None. Subclasses may do anything, so only the exact types count."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer as OpenClipTransformer
    from timm.models.vision_transformer import VisionTransformer as TimmTransformer

    if type(visual) is TimmModel and type(visual.trunk) is TimmTransformer:
        return TimmTower(visual) if visual.trunk.global_pool else None
    if type(visual) is OpenClipTransformer and visual.transformer.batch_first:
        return OpenClipTower(visual) if visual.pool_type != "none" else None
    return None


FAMILY: Final = Family(
    find={**find_in_places(_find), "": find_in_open_clip},
    build=build_tower,
    fill=fill_tower,
    read_preprocessing=read_preprocessing,
    split=split_tower,
)
