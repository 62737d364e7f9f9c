"""Checkpoints that come without a configuration: names and shapes of the tensors say what to build.

OpenAI's CLIP (CheXzero), files of the DINOv2 repository (RAD-DINO, CheXFound) and EVA-X. Two things
no shape shows: the number of attention heads, which is that of the family, and how images are
prepared. That is read from a ``preprocessor_config.json`` beside the file; without one it is the
family's own way, and a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any, Final, TypeAlias

from torch import Tensor, nn

from cxr_cache.common.wording import first_line, list_names
from cxr_cache.encoders import hugging_face, open_clip
from cxr_cache.encoders.sources import (
    CONFIG_FILES,
    HUGGING_FACE_CONFIG,
    IMAGENET,
    Family,
    Source,
    first_file,
)
from cxr_cache.encoders.timm_vit import PooledTower
from cxr_cache.encoders.weights import fill_tower, read_names, read_tensors, require_numbers
from cxr_cache.errors import EncoderError

_SUFFIXES: Final = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

_HEADS: Final = {1280: 16, 1408: 16, 1664: 16}
"""Attention heads by width of the tower, where they are not 64 numbers wide each."""
_DINO: Final = {"image_mean": IMAGENET["mean"], "image_std": IMAGENET["std"]}
_CLIP: Final = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_EVA_X: Final = {"image_mean": (0.49185,) * 3, "image_std": (0.28509,) * 3}


def _find_only_file(identifier: str) -> str | None:
    """Give the file of weights that a path is, or that lies alone in its folder; None otherwise."""
    path = Path(identifier).expanduser().resolve()
    if path.is_file():
        return str(path)
    if not path.is_dir() or first_file(path, CONFIG_FILES):
        return None
    files = [file for file in path.iterdir() if file.suffix in _SUFFIXES]
    return str(files[0]) if len(files) == 1 else None


def _read_shapes(identifier: str) -> tuple[Path, Shapes]:
    """Read names and shapes of the tensors of a file.

    Raises
    ------
    EncoderError
        There is no file, it cannot be read, or it holds an adapter.
    """
    path = Path(identifier).expanduser().resolve()
    if not path.is_file():
        raise EncoderError(
            f"{path} is not a file. local-file: takes one with an encoder's weights."
        )
    shapes = dict(read_names(path))
    if adapters := [name for name in shapes if "lora_" in name]:
        raise EncoderError(
            f"{path} holds an adapter (LoRA: {list_names(adapters, 1)}), which is a change to "
            "another model and no model by itself. Merge the two and save the result."
        )
    return path, shapes


def _make_source(
    path: Path, model_cfg: dict[str, Any], kind: str, own: Mapping[str, Any], px: int, margin: float
) -> Source:
    """Give the source of a file for images `px` wide, cut out of ones `margin` times as wide."""
    name = f"local-file:{path}"
    expected = hugging_face.PREPROCESSING_FILES
    if (beside := first_file(path.parent, expected)) is not None:
        return Source(name, str(path), model_cfg, hugging_face.read_processor(beside), path)
    resized = round(px * margin)
    processor = {
        "origin": str(path),
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": resized},
        "do_center_crop": True,
        "crop_size": px,
        "crop_rounding": "nearest",  # these families crop by torchvision
        **own,
    }
    mean, std = (", ".join(f"{n:.4g}" for n in own[key]) for key in ("image_mean", "image_std"))
    note = (
        f"{path.name} does not say how images are prepared. {kind} was assumed: the shortest edge "
        f"resized (bicubic), the middle cut out, mean {mean}, standard deviation {std}. If it was "
        f"trained otherwise, put its {expected[0]} beside it."
    )
    return Source(name, str(path), model_cfg, processor, path, notes=(note,))


def _count_blocks(shapes: Shapes, pattern: str) -> int:
    return 1 + max(int(found[1]) for name in shapes if (found := re.search(pattern, name)))


def _count_heads(path: Path, width: int) -> int:
    if width not in _HEADS and width % 64:
        raise EncoderError(
            f"{path} holds a tower {width} wide, of which no shape shows how many attention heads "
            "it has. Put the config.json of its Hugging Face repository beside it, as local-dir:."
        )
    return _HEADS.get(width, width // 64)


def _read_grid(path: Path, shapes: Shapes, name: str, n_before: int = 1) -> int:
    """Read the side of the square of patches off the position embeddings."""
    n_patches = shapes[name][-2] - n_before if name in shapes and len(shapes[name]) > 1 else 0
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
    width, _, patch, _ = shapes["visual.conv1.weight"]
    px = patch * _read_grid(path, shapes, "visual.positional_embedding")
    vision = {
        "image_size": px,
        "patch_size": patch,
        "width": width,
        "layers": _count_blocks(shapes, r"^visual\.transformer\.resblocks\.(\d+)\."),
        "head_width": width // _count_heads(path, width),
    }
    cfg = {"embed_dim": shapes["visual.proj"][1], "vision_cfg": vision, "quick_gelu": True}
    return _make_source(path, cfg, "OpenAI's CLIP (with QuickGELU)", _CLIP, px, 1)


# -- the DINOv2 repository ----------------------------------------------------------------


def _find_vit(path: Path, named: Shapes) -> Source | None:
    """Read a file of the DINOv2 repository, or of another plain ViT with its names."""
    # DINOv2's own trainer keeps blocks in groups, with their numbers after the group's
    shapes = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in named.items()}
    if "blocks.0.attn.qkv.weight" not in shapes or "blocks.0.attn.q_bias" in shapes:
        return None
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= shapes.keys():
        return None
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    px = patch * _read_grid(path, shapes, "pos_embed")
    is_gated = "blocks.0.mlp.w12.weight" in shapes
    hidden = shapes.get(f"blocks.0.mlp.{'w3' if is_gated else 'fc2'}.weight", (0, 0))[-1]
    n_registers = shapes.get("register_tokens", (1, 0))[1]
    cfg = {
        "model_type": "dinov2_with_registers" if n_registers else "dinov2",
        "hidden_size": width,
        "num_hidden_layers": _count_blocks(shapes, r"^blocks\.(\d+)\."),
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
    return _make_source(path, cfg, kind, _DINO, px, 1)


# -- EVA-X --------------------------------------------------------------------------------


def _find_eva(path: Path, shapes: Shapes) -> Source | None:
    """Read a file of EVA-X, in the names of timm's Eva."""
    if "blocks.0.attn.q_proj.weight" not in shapes or "pos_embed" not in shapes:
        return None
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    px = patch * _read_grid(path, shapes, "pos_embed")
    gate = shapes.get("blocks.0.mlp.w1.weight")
    hidden = (gate or shapes.get("blocks.0.mlp.fc1.weight") or (4 * width,))[0]
    cfg = {
        "img_size": px,
        "patch_size": patch,
        "embed_dim": width,
        "depth": _count_blocks(shapes, r"^blocks\.(\d+)\."),
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
    return _make_source(path, cfg, "EVA-X's way", _EVA_X, px, 256 / 224)


def _build_eva(source: Source) -> nn.Module:
    """Build timm's Eva for the shapes of a file; its weights mean nothing yet."""
    import torch
    from timm.models.eva import Eva

    own_px = source.model_cfg["img_size"]
    px = source.img_size or hugging_face.read_size(source.preprocess_cfg, own_px, "squash")[0]
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
    require_numbers(tensors, source.weights)
    converted: dict[str, Tensor] = checkpoint_filter_fn(tensors, visual.trunk)
    named = {f"trunk.{name}": tensor for name, tensor in converted.items()}
    fill_tower(visual, named, source.weights, "image")


def _of_files(
    family: Family, find: Callable[[Path, Shapes], Source | None], *, is_last: bool = False
) -> Family:
    """Give a family whose encoders are found in files, and prepared for as a processor says.

    The last one to be asked for a file says that it is of no known kind.
    """

    def in_file(identifier: str) -> Source | None:
        path, shapes = _read_shapes(identifier)
        found = find(path, shapes)
        if found is None and is_last and (path.parent / HUGGING_FACE_CONFIG).is_file():
            raise EncoderError(
                f"{path} does not tell by itself which image tower it is for, but "
                f"{HUGGING_FACE_CONFIG} lies beside it: name the folder, local-dir:{path.parent}."
            )
        if found is None and is_last:
            raise EncoderError(
                f"{path} holds no image tower that its tensors tell: {list_names(list(shapes), 3)}."
                " Known without a configuration are OpenAI's CLIP (visual.class_embedding), files "
                "of the DINOv2 repository (blocks.0.attn.qkv.weight) and EVA-X "
                "(blocks.0.attn.q_proj.weight). Put config.json and preprocessor_config.json "
                "beside any other, and name the folder as local-dir:."
            )
        return found

    def in_folder(identifier: str) -> Source | None:
        file = _find_only_file(identifier)
        return None if file is None else find(*_read_shapes(file))

    return replace(
        family,
        find={"local-file": in_file, "local-dir": in_folder},
        read_preprocessing=hugging_face.read_preprocessing,
    )


FAMILIES: Final = {
    "files of OpenAI's CLIP": _of_files(open_clip.FAMILY, _find_clip),
    "files of DINOv2": _of_files(hugging_face.FAMILY, _find_vit),
    "files of EVA-X": _of_files(
        replace(hugging_face.FAMILY, build=_build_eva, fill=_fill_eva),
        _find_eva,
        is_last=True,
    ),
}
