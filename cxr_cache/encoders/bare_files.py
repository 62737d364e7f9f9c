"""Checkpoints that come without a configuration: names and shapes of the tensors say what to build.

OpenAI's CLIP (CheXzero), files of the repositories of DINOv2 (RAD-DINO, CheXFound) and DINOv3, and
EVA-X. Two things no shape shows: the number of attention heads, which is that of the family, and
how images are prepared. That is read from a ``preprocessor_config.json`` beside the file; without
one it is the family's own way, and a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from cxr_cache.common.wording import first_line, list_names
from cxr_cache.encoders import hugging_face, open_clip
from cxr_cache.encoders.catalogue.known import Known
from cxr_cache.encoders.sources import (
    CONFIG_FILE,
    CONFIG_FILES,
    HUGGING_FACE_CONFIG,
    IMAGENET,
    Family,
    Place,
    Source,
    first_file,
    keep_links,
    require_whole_patches,
)
from cxr_cache.encoders.tensor_names import EVA_X, EVA_X_GATED, spell
from cxr_cache.encoders.timm_vit import PooledTower
from cxr_cache.encoders.weights import (
    explain_prefixes,
    fill_tower,
    read_names,
    read_tensors,
    require_no_adapter,
    require_not_quantised,
    require_usable,
)
from cxr_cache.errors import EncoderError

_SUFFIXES: Final = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
_USUAL_NAMES: Final = {*hugging_face.WEIGHTS_FILES, *open_clip.WEIGHTS_FILES}
"""Of weights that come with a configuration."""
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

_HEADS: Final = {1280: 16, 1408: 16, 1664: 16}
"""Attention heads by width of the tower, where they are not 64 numbers wide each."""
_CLIP: Final = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
_EVA_X: Final = {"mean": (0.49185,) * 3, "std": (0.28509,) * 3}
_CUT_OUT = "the shortest edge resized (bicubic), the middle cut out"
_SQUEEZED = "squeezed into a square (bilinear)"


@dataclass(frozen=True)
class BareFile:
    """Weights without a configuration in a folder or repository, and the name that leads there."""

    path: Path
    name: str
    revision: str | None = None


def find_in_place(place: Place, file: str | None) -> BareFile | None:
    """Find the weights that a folder or repository holds without a configuration.

    `file` is the one to take. Without it, None is given where there is a configuration, or no
    weights at all: other families say what is missing.

    Raises
    ------
    EncoderError
        There is no such file, or several could be meant.
    """
    if file is None:
        names = _list_bare(place)
        if len(names) > 1:
            raise EncoderError(
                f"{place.folder or place.repo} holds no configuration, but several files of "
                f"weights: {list_names(names, 20)}. Say which one, such as "
                f"{place.name}?file={names[0]}."
            )
        if not names:
            return None
        file = names[0]
    if place.folder is not None:
        path = place.folder / file
        if not path.is_file():
            raise EncoderError(f"{place.folder} has no {file}.{_suggest_files(place)}")
        return BareFile(path, f"local-file:{path}")
    found = place.find((file,))
    if found is None:
        raise EncoderError(
            f"{place.repo} on the Hugging Face hub has no {file}.{_suggest_files(place)}"
        )
    for beside in ((CONFIG_FILE,), (HUGGING_FACE_CONFIG,), hugging_face.PREPROCESSING_FILES):
        with suppress(EncoderError):  # there is none, or it cannot be asked for
            place.find(beside)
    commit = found.parents[len(PurePosixPath(file).parts) - 1].name
    return BareFile(found, f"{place.name}?file={file}", commit)


def _list_bare(place: Place) -> list[str]:
    """List the files of weights in a place without a configuration; none where it has one."""
    try:
        if place.find(CONFIG_FILES) is not None:
            return []
    except EncoderError:
        # Without a network, other weights in the cache may still be those that are meant
        cached = _keep_weights(place, is_cached=True)
        cached = [name for name in cached if name not in _USUAL_NAMES]
        if not cached:
            raise
        return cached
    with suppress(EncoderError):
        return _keep_weights(place)
    return _keep_weights(place, is_cached=True)


def _keep_weights(place: Place, *, is_cached: bool = False) -> list[str]:
    return [name for name in place.list_files(is_cached=is_cached) if name.endswith(_SUFFIXES)]


def _suggest_files(place: Place) -> str:
    """Say which files of weights a place has instead, where that can be known."""
    with suppress(EncoderError):
        if names := _keep_weights(place):
            return f" It holds {list_names(names, 20)}."
    return " Check the name."


def _read_shapes(identifier: str) -> tuple[Path, Shapes]:
    """Read names and shapes of the tensors of a file.

    Raises
    ------
    EncoderError
        There is no file, it cannot be read, or it holds an adapter.
    """
    path = keep_links(identifier)
    if not path.is_file():
        raise EncoderError(
            f"{path} is not a file. local-file: takes one with an encoder's weights."
        )
    shapes = dict(read_names(path))
    require_no_adapter(shapes, path)
    return path, shapes


def _make_source(
    path: Path,
    model_cfg: dict[str, Any],
    kind: str,
    px: int,
    statistics: Mapping[str, Any],
    *,
    margin: float = 1,
    how: str = _CUT_OUT,
    notes: tuple[str, ...] = (),
) -> Source:
    """Give the source of a file for images `px` wide, prepared as is `kind`'s way.

    They are cut out of images `margin` times as wide, or `how` says otherwise.
    """
    name = f"local-file:{path}"
    expected = hugging_face.PREPROCESSING_FILES
    if (beside := first_file(path.parent, expected)) is not None:
        processor = hugging_face.read_processor(beside)
        return Source(name, str(path), model_cfg, processor, path, notes=notes)
    processor = {"origin": str(path), "image_processor_type": "CLIPImageProcessor"}
    processor |= {f"image_{key}": values for key, values in statistics.items()}
    if how == _SQUEEZED:
        processor |= {"size": {"height": px, "width": px}, "resample": 2}
    else:
        processor |= {
            "size": {"shortest_edge": round(px * margin)},
            "do_center_crop": True,
            "crop_size": px,
            "crop_rounding": "nearest",  # these families crop by torchvision
        }
    mean, std = (", ".join(f"{n:.4g}" for n in statistics[key]) for key in ("mean", "std"))
    note = (
        f"{path.name} does not say how images are prepared. {kind} was assumed: {how}, mean "
        f"{mean}, standard deviation {std}. If it was trained otherwise, put its {expected[0]} "
        "beside it."
    )
    return Source(name, str(path), model_cfg, processor, path, notes=(note, *notes))


def take_known(source: Source, known: Known) -> Source:
    """Prepare images as an encoder's authors do, where its file does not say how.

    They are known by the encoder's name, which is then the source's too.

    Raises
    ------
    EncoderError
        The file holds a tower of another width.
    """
    cfg = source.model_cfg
    width = cfg.get("hidden_size") or cfg.get("vision_cfg", {}).get("width") or cfg["embed_dim"]
    if width != known.width:
        raise EncoderError(
            f"{source.weights} holds a tower {width} wide, and {known.name} is {known.width} wide. "
            f"If it is another encoder, name it local-file:{source.weights}."
        )
    if not known.model:
        source = replace(source, name=f"{known.name}?file={source.weights}")
    if not known.mean or source.preprocess_cfg["origin"] != str(source.weights):
        return source
    processor = dict(source.preprocess_cfg)
    processor |= {"image_mean": known.mean, "image_std": known.std}
    if known.resize:
        processor["resize_mode"] = known.resize
    return replace(source, preprocess_cfg=processor, notes=source.notes[1:])


def _need(path: Path, shapes: Shapes, name: str, n_axes: int) -> tuple[int, ...]:
    """Read the shape of a tensor without which the tower cannot be told.

    Raises
    ------
    EncoderError
        It is missing, or has another number of axes.
    """
    if len(shape := shapes.get(name, ())) != n_axes:
        what = f"{name} of shape {shape}" if name in shapes else f"no {name}"
        raise EncoderError(
            f"{path} is half a checkpoint, or of another kind than its names tell: it holds {what}."
            " Copy or download it again."
        )
    return shape


def _count_blocks(path: Path, shapes: Shapes, pattern: str) -> int:
    numbers = [int(found[1]) for name in shapes if (found := re.search(pattern, name))]
    if not numbers:
        raise EncoderError(f"{path} is half a checkpoint: it holds no blocks. Copy it again.")
    return 1 + max(numbers)


def _count_heads(path: Path, width: int) -> int:
    if width not in _HEADS and width % 64:
        raise EncoderError(
            f"{path} holds a tower {width} wide, of which no shape shows how many attention heads "
            "it has. Put the config.json of its Hugging Face repository beside it, as local-dir:."
        )
    return _HEADS.get(width, width // 64)


def _read_grid(path: Path, shapes: Shapes, name: str, n_before: int = 1) -> int:
    """Read the side of the square of patches off the position embeddings."""
    if len(shapes.get(name, ())) < 2:
        _need(path, shapes, name, 3)
    n_patches = shapes[name][-2] - n_before
    side = isqrt(max(n_patches, 0))
    if not n_patches or side**2 != n_patches:
        raise EncoderError(
            f"{path} has {n_patches} position embeddings of patches ({name}), which are no square. "
            "Take the file from the model's repository."
        )
    return side


# -- OpenAI's CLIP ------------------------------------------------------------------------


def _find_clip(path: Path, shapes: Shapes) -> Source | None:
    """Read a state dict of OpenAI's CLIP, whose tower open_clip builds."""
    if "visual.class_embedding" not in shapes or "visual.proj" not in shapes:
        return None
    width, _, patch, _ = _need(path, shapes, "visual.conv1.weight", 4)
    px = patch * _read_grid(path, shapes, "visual.positional_embedding")
    vision = {
        "image_size": px,
        "patch_size": patch,
        "width": width,
        "layers": _count_blocks(path, shapes, r"^visual\.transformer\.resblocks\.(\d+)\."),
        "head_width": width // _count_heads(path, width),
    }
    embed_dim = _need(path, shapes, "visual.proj", 2)[1]
    cfg = {"embed_dim": embed_dim, "vision_cfg": vision, "quick_gelu": True}
    source = _make_source(path, cfg, "OpenAI's CLIP (with QuickGELU)", px, _CLIP)
    hint = (
        " If it has no QuickGELU, as most that open_clip trained, put its open_clip_config.json "
        f"beside it. CheXzero's images are prepared otherwise: name it chexzero?file={path}."
    )
    return replace(source, notes=tuple(note + hint for note in source.notes))


# -- the DINOv2 repository ----------------------------------------------------------------


def _find_vit(path: Path, named: Shapes) -> Source | None:
    """Read a file of the DINOv2 repository, or of another plain ViT with its names."""
    # DINOv2's own trainer keeps blocks in groups, with their numbers after the group's
    shapes = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in named.items()}
    if "blocks.0.attn.qkv.weight" not in shapes or "blocks.0.attn.q_bias" in shapes:
        return None
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= shapes.keys():
        return None
    if more := [name for name in ("reg_token", "dist_token", "norm_pre.weight") if name in shapes]:
        raise EncoderError(
            f"{path} holds a ViT of timm's with more than its tensors explain "
            f"({list_names(more, 3)}). Put timm's config.json beside it."
        )
    width, _, patch, _ = _need(path, shapes, "patch_embed.proj.weight", 4)
    px = patch * _read_grid(path, shapes, "pos_embed")
    is_gated = "blocks.0.mlp.w12.weight" in shapes
    hidden = shapes.get(f"blocks.0.mlp.{'w3' if is_gated else 'fc2'}.weight", (0, 0))[-1]
    n_registers = shapes.get("register_tokens", (1, 0))[1]
    cfg = {
        "model_type": "dinov2_with_registers" if n_registers else "dinov2",
        "hidden_size": width,
        "num_hidden_layers": _count_blocks(path, shapes, r"^blocks\.(\d+)\."),
        "num_attention_heads": _count_heads(path, width),
        "image_size": px,
        "patch_size": patch,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "num_register_tokens": n_registers,
        "use_swiglu_ffn": is_gated,
        # Of a gated block it is what two thirds of are taken and rounded up
        "mlp_ratio": (hidden * 1.5 + 0.25 if is_gated else hidden + 0.5) / width,
    }
    kind = "DINOv2's way"
    if "blocks.0.ls1.gamma" not in shapes:
        cfg |= {"model_type": "vit", "intermediate_size": hidden, "layer_norm_eps": 1e-6}
        kind = "ImageNet's usual way"
    return _make_source(path, cfg, kind, px, IMAGENET)


# -- the DINOv3 repository ----------------------------------------------------------------

_DINOV3_PX: Final = 224  # its code and its image processor; rotary positions fit any size
_BFLOAT16_STEP: Final = 2**-8
"""Relative distance of two numbers in bfloat16, at most."""


def _find_dinov3(path: Path, shapes: Shapes) -> Source | None:
    """Read a file of the DINOv3 repository, whose positions are rotary."""
    if not {"rope_embed.periods", "blocks.0.attn.qkv.weight"} <= shapes.keys():
        return None
    width, _, patch, _ = _need(path, shapes, "patch_embed.proj.weight", 4)
    periods = read_tensors(path, "rope_embed.periods")["rope_embed.periods"].flatten().double()
    base = _read_base(path, periods)
    is_gated, has_bias = "blocks.0.mlp.w1.weight" in shapes, "blocks.0.attn.qkv.bias" in shapes
    cfg = {
        "model_type": "dinov3_vit",
        "hidden_size": width,
        "num_hidden_layers": _count_blocks(path, shapes, r"^blocks\.(\d+)\."),
        "num_attention_heads": width // (4 * len(periods)),  # a quarter of a head's width each
        "intermediate_size": _need(
            path, shapes, f"blocks.0.mlp.{'w1' if is_gated else 'fc1'}.weight", 2
        )[0],
        "image_size": _DINOV3_PX,
        "patch_size": patch,
        "num_register_tokens": shapes.get("storage_tokens", (1, 0))[1],
        "query_bias": has_bias,
        "value_bias": has_bias,
        "use_gated_mlp": is_gated,
        "hidden_act": "silu" if is_gated else "gelu",
        "rope_theta": base,
    }
    is_rounded = not torch.allclose(periods, _make_periods(base, len(periods)), rtol=1e-5)
    notes = (
        f"The periods of rotary positions in {path.name} are rounded to bfloat16. They are "
        "computed in float32 here, as transformers and timm do; the features differ a little from "
        "those of Meta's own code.",
    )
    return _make_source(
        path,
        cfg,
        "DINOv3's way",
        _DINOV3_PX,
        IMAGENET,
        how=_SQUEEZED,
        notes=notes if is_rounded else (),
    )


def _make_periods(base: float, n_periods: int) -> Tensor:
    """Compute the periods of rotary positions, ``base ** (i / n)``, as DINOv3 defines them."""
    return base ** (torch.arange(n_periods, dtype=torch.float64) / n_periods)


def _read_base(path: Path, periods: Tensor) -> float:
    """Read the base of the periods of rotary positions: 100, unless they tell otherwise.

    Raises
    ------
    EncoderError
        They are not powers of one number, as transformers and timm compute them.
    """
    n = len(periods)
    found = float(periods[-1].abs()) ** (n / (n - 1)) if n > 1 else 100.0
    for base in (100.0, found):
        if torch.allclose(periods, _make_periods(base, n), rtol=_BFLOAT16_STEP, atol=0):
            return base
    raise EncoderError(
        f"{path} has periods of rotary positions from {periods[0]:.4g} to {periods[-1]:.4g} "
        "(rope_embed.periods), which are not powers of one number, the only ones that are offered. "
        "Features that the model's own code computes come in by cxr-cache import."
    )


# -- EVA-X --------------------------------------------------------------------------------


def _find_eva(path: Path, shapes: Shapes) -> Source | None:
    """Read a file of EVA-X, in the names of timm's Eva."""
    if "blocks.0.attn.q_proj.weight" not in shapes or "pos_embed" not in shapes:
        return None
    width, _, patch, _ = _need(path, shapes, "patch_embed.proj.weight", 4)
    px = patch * _read_grid(path, shapes, "pos_embed")
    gate = shapes.get("blocks.0.mlp.w1.weight")
    hidden = (gate or shapes.get("blocks.0.mlp.fc1.weight") or (4 * width,))[0]
    cfg = {
        "img_size": px,
        "patch_size": patch,
        "embed_dim": width,
        "depth": _count_blocks(path, shapes, r"^blocks\.(\d+)\."),
        "num_heads": _count_heads(path, width),
        "mlp_ratio": (hidden + 0.5) / width,
        "swiglu_mlp": gate is not None,
        "scale_mlp": "blocks.0.mlp.ffn_ln.weight" in shapes,
        "scale_attn_inner": "blocks.0.attn.inner_attn_ln.weight" in shapes,
        "qkv_fused": False,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (px // patch, px // patch),
        "num_classes": 0,
    }
    return _make_source(path, cfg, "EVA-X's way", px, _EVA_X, margin=256 / 224)


def _build_eva(source: Source) -> nn.Module:
    """Build timm's Eva for the shapes of a file; its weights mean nothing yet."""
    from timm.models.eva import Eva

    own_px = source.model_cfg["img_size"]
    px = source.img_size or hugging_face.read_size(source.preprocess_cfg, own_px, "squash")[0]
    require_whole_patches(source, (source.model_cfg["patch_size"],) * 2, own_px)
    try:
        with torch.random.fork_rng(devices=[]):  # it draws its initial weights
            trunk = Eva(**(dict(source.model_cfg) | {"img_size": px}))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise EncoderError(
            f"The image tower that {source.origin} holds cannot be built: {first_line(error)}"
        ) from error
    return PooledTower(trunk, positions_from_px=own_px if px != own_px else None)


def _fill_eva(visual: Any, source: Source) -> None:
    """Put EVA-X's weights into the tower; every tensor must have its place.

    It pools the mean over patches, and the norm that was learnt before the pooling comes after.
    """
    from timm.models.eva import checkpoint_filter_fn

    assert source.weights is not None
    tensors = {
        re.sub(r"^norm\.", "fc_norm.", name): tensor
        for name, tensor in read_tensors(source.weights).items()
        if not re.fullmatch(r"(head|lm_head)\.(weight|bias)|mask_token", name)
    }
    require_usable(tensors, source.weights)
    converted: dict[str, Tensor] = checkpoint_filter_fn(tensors, visual.trunk)
    named = {f"trunk.{name}": tensor for name, tensor in converted.items()}
    table = EVA_X_GATED if source.model_cfg["swiglu_mlp"] else EVA_X
    fill_tower(
        visual, named, source.weights, "image", lambda name: spell(name, table), is_bare=True
    )


def _of_files(family: Family, find: Callable[[Path, Shapes], Source | None]) -> Family:
    """Give a family whose encoders are found in files, and prepared for as a processor says."""
    return replace(
        family,
        find={"local-file": lambda identifier: find(*_read_shapes(identifier))},
        read_preprocessing=hugging_face.read_preprocessing,
    )


def describe_unknown(identifier: str) -> EncoderError:
    """Give the error of a file whose tensors do not tell which image tower it is for."""
    path, shapes = _read_shapes(identifier)
    if (config := path.parent / HUGGING_FACE_CONFIG).is_file():
        hugging_face.require_known(hugging_face.read_json(config), config)
    require_not_quantised(read_tensors(path), path)
    if not shapes:
        return EncoderError(
            f"{path} holds no tensors by their names, so there is no model in it. Save its "
            "weights: torch.save(model.state_dict(), 'weights.pt')."
        )
    if explained := explain_prefixes(path):
        return EncoderError(f"{path} names no tensors as an encoder does. {explained}")
    return EncoderError(
        f"{path} holds no image tower that its tensors tell: {list_names(list(shapes), 3)}. "
        "Known without a configuration are OpenAI's CLIP (visual.class_embedding), files of the "
        "repositories of DINOv2 (blocks.0.attn.qkv.weight) and DINOv3 (rope_embed.periods) and "
        "EVA-X (blocks.0.attn.q_proj.weight). Put the configuration of any other beside it: "
        "open_clip_config.json, or config.json of timm, or of transformers with "
        "preprocessor_config.json. Embeddings that were computed elsewhere come in by cxr-cache "
        "import."
    )


FAMILIES: Final = {
    "files of OpenAI's CLIP": _of_files(open_clip.FAMILY, _find_clip),
    "files of DINOv2": _of_files(hugging_face.FAMILY, _find_vit),
    "files of DINOv3": _of_files(hugging_face.FAMILY, _find_dinov3),
    "files of EVA-X": _of_files(
        replace(hugging_face.FAMILY, build=_build_eva, fill=_fill_eva), _find_eva
    ),
}
