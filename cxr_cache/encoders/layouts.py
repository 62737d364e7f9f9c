"""Vision transformers of Hugging Face: their settings as timm's, their tensors by timm's names.

One table of names serves all families, since none of them means two things. What a family is
missing in its configuration are the defaults of transformers, which leaves them out of files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr_cache.encoders.weights import held_twice
from cxr_cache.errors import EncoderError


@dataclass(frozen=True)
class Layout:
    """What tells one family of vision transformers from another."""

    defaults: Mapping[str, Any]
    """Settings that a configuration may leave out."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of timm's VisionTransformer, the same in every model of the family."""
    resampling: Mapping[str, Any] = field(default_factory=lambda: {"mode": "bicubic"})
    """How the family itself resamples position embeddings for images of another size."""


_BASE: Final = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
    "qkv_bias": True,
}
_DINO: Final = _BASE | {"mlp_ratio": 4, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False}
_CLIP: Final = Layout(
    _BASE
    | {
        "intermediate_size": 3072,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    {"pre_norm": True},
)
_SIGLIP: Final = Layout(
    _BASE
    | {
        "intermediate_size": 3072,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "vision_use_head": True,
    },
    {"class_token": False, "global_pool": "map"},
)
_SIGLIP2: Final = Layout(
    {**_SIGLIP.defaults, "image_size": None, "num_patches": 256},
    _SIGLIP.arguments,
    {"mode": "bilinear", "antialias": True},
)

LAYOUTS: Final[dict[str, Layout]] = {
    "dinov2": Layout(_DINO | {"patch_size": 14}, {"init_values": 1.0}),
    "dinov2_with_registers": Layout(
        _DINO | {"num_register_tokens": 4},
        {"init_values": 1.0, "no_embed_class": True},
        {"mode": "bicubic", "antialias": True},
    ),
    "dinov3_vit": Layout(
        _BASE
        | {
            "hidden_size": 384,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "layer_norm_eps": 1e-5,
            "num_register_tokens": 0,
            "query_bias": True,
            "key_bias": False,
            "value_bias": True,
            "use_gated_mlp": False,
            "rope_theta": 100.0,
        },
        {
            "init_values": 1.0,
            "use_abs_pos_emb": False,
            "use_rot_pos_emb": True,
            "rope_type": "dinov3",
            "rope_rotate_half": True,
            "use_fc_norm": False,
        },
    ),
    "vit": Layout(_BASE | {"intermediate_size": 3072, "layer_norm_eps": 1e-12}),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2": _SIGLIP2,
    "siglip2_vision_model": _SIGLIP2,
}
"""By the ``model_type`` of a ``config.json``."""

_ACTIVATIONS: Final = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Names of activation functions in transformers, and in timm."""


def read_settings(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Read the settings of the image tower, with the family's defaults.

    Raises
    ------
    EncoderError
        The tower has parts that none of its family has, or settings that are none.
    """
    layout = LAYOUTS[config["model_type"]]
    given = config.get("vision_config", config)
    settings = dict(layout.defaults)
    settings |= {k: v for k, v in given.items() if k in settings and v is not None}
    if settings["image_size"] is None:  # of a tower for images of any shape; its grid is a square
        settings["image_size"] = int(settings["num_patches"] ** 0.5) * settings["patch_size"]
    for name in ("image_size", "patch_size"):
        sides = settings[name] if isinstance(settings[name], list) else [settings[name]] * 2
        if len(set(sides)) != 1:
            raise EncoderError(f"{origin} asks for {name} {sides}, not a square.")
        settings[name] = sides[0]
    for name, default in settings.items():
        is_count = isinstance(layout.defaults[name], int) and name not in ("mlp_ratio", "qkv_bias")
        if is_count and (not isinstance(default, int) or default < 0):
            raise EncoderError(f"{origin} has {name} {default!r}, where a whole number belongs.")
    if settings["hidden_act"] not in _ACTIVATIONS:
        raise EncoderError(
            f"{origin} has the activation function '{settings['hidden_act']}', which is not one of "
            f"{', '.join(_ACTIVATIONS)}."
        )
    if settings["num_channels"] != 3:
        raise EncoderError(
            f"{origin} is for images of {settings['num_channels']} channels, not of 3."
        )
    return settings


def build_trunk(model_type: str, settings: Mapping[str, Any], image_px: int) -> nn.Module:
    """Build timm's tower for a family's settings; its weights mean nothing yet."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    if model_type == "dinov3_vit":
        with torch.random.fork_rng(devices=[]):  # it draws its initial weights
            eva: nn.Module = Eva(**_arguments_of_eva(settings, image_px))
        return eva
    arguments = _arguments_of_vit(model_type, settings, image_px)
    trunk: nn.Module = VisionTransformer(**arguments, device="meta")  # nothing is drawn
    return trunk.to_empty(device="cpu")


def _arguments_of_eva(settings: Mapping[str, Any], image_px: int) -> dict[str, Any]:
    """Give the arguments of timm's Eva, whose keys have no bias."""
    biases = [settings[f"{name}_bias"] for name in ("query", "key", "value")]
    is_gated, activation = settings["use_gated_mlp"], _ACTIVATIONS[settings["hidden_act"]]
    if biases not in ([True, False, True], [False, False, False]):
        raise ValueError(f"biases of queries, keys and values are {biases}")
    if activation != ("silu" if is_gated else "gelu"):
        raise ValueError(f"hidden_act is {settings['hidden_act']} with use_gated_mlp {is_gated}")
    width = settings["hidden_size"]
    return {
        "img_size": image_px,
        "patch_size": settings["patch_size"],
        "embed_dim": width,
        "depth": settings["num_hidden_layers"],
        "num_heads": settings["num_attention_heads"],
        "qkv_bias": biases[0],
        "num_reg_tokens": settings["num_register_tokens"],
        "norm_layer": partial(nn.LayerNorm, eps=settings["layer_norm_eps"]),
        "mlp_ratio": (settings["intermediate_size"] + 0.5) / width,  # cut to a whole number
        "swiglu_mlp": is_gated,
        "rope_temperature": settings["rope_theta"],
        "global_pool": "token",
        "num_classes": 0,
        **LAYOUTS["dinov3_vit"].arguments,
    }


def _arguments_of_vit(
    model_type: str, settings: Mapping[str, Any], image_px: int
) -> dict[str, Any]:
    """Give the arguments of timm's VisionTransformer."""
    from timm.layers.create_act import get_act_layer
    from timm.layers.mlp import GluMlp

    width = settings["hidden_size"]
    arguments = {
        "img_size": image_px,
        "patch_size": settings["patch_size"],
        "embed_dim": width,
        "depth": settings["num_hidden_layers"],
        "num_heads": settings["num_attention_heads"],
        "qkv_bias": settings["qkv_bias"],
        "reg_tokens": settings.get("num_register_tokens", 0),
        "norm_layer": partial(nn.LayerNorm, eps=settings["layer_norm_eps"]),
        "act_layer": get_act_layer(_ACTIVATIONS[settings["hidden_act"]]),
        "global_pool": "token",
        "num_classes": 0,
        **LAYOUTS[model_type].arguments,
    }
    hidden = settings.get("intermediate_size") or int(width * settings["mlp_ratio"])
    if settings.get("use_swiglu_ffn"):
        arguments |= {
            "mlp_layer": partial(GluMlp, gate_last=False),
            "act_layer": nn.SiLU,
        }
        hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)  # the gate's and the value's
    arguments["mlp_ratio"] = (hidden + 0.5) / width  # timm cuts the product to a whole number
    if not settings.get("vision_use_head", True):
        arguments |= {"global_pool": "avg", "fc_norm": False}
    return arguments


_PREFIXES: Final = re.compile(r"^(?:vision_model|dinov2|dinov2_with_registers|vit)\.")
"""What models for more than embeddings call the tower."""
_IGNORED: Final = re.compile(
    r"text_model\..*|text_projection\..*|logit_scale|logit_bias|classifier\..*|head\.(weight|bias)"
    r"|(?:dino_head|ibot_head|student)\..*"
    r"|(?:embeddings\.)?mask_token|.*\.position_ids|rope_embeddings\.inv_freq"
)
"""Tensors that no embedding of an image needs: the other tower, what was trained on top or beside,
what masked patches were replaced by, and positions counted from 0."""

_WB: Final = r"(\.weight|\.bias)"
_NAMES: Final = [
    (re.compile(pattern), name)
    for pattern, name in {
        r"embeddings\.(?:cls_token|class_embedding)|cls_token": "trunk.cls_token",
        r"embeddings\.register_tokens|register_tokens": "trunk.reg_token",
        r"embeddings\.position_embeddings?(?:\.weight)?|pos_embed": "trunk.pos_embed",
        r"embeddings\.(?:patch_embeddings(?:\.projection)?|patch_embedding)" + _WB: (
            r"trunk.patch_embed.proj\1"
        ),
        r"patch_embed\.proj" + _WB: r"trunk.patch_embed.proj\1",
        r"pre_layrnorm" + _WB: r"trunk.norm_pre\1",  # spelt like this by transformers
        r"(?:layernorm|post_layernorm|norm)" + _WB: r"trunk.norm\1",
        # DINOv2's own trainer keeps blocks in groups, with their numbers after the group's.
        r"(?:encoder\.)?(?:layers?|blocks)\.(?:\d+\.)?(\d+)\.(.*)": r"trunk.blocks.\1.\2",
        r"visual_projection(\.weight)": r"head\1",
        r"pooler\.dense" + _WB: r"head.dense\1",
        r"head\.probe": "trunk.attn_pool.latent",
        r"head\.attention\.in_proj_(weight|bias)": r"trunk.attn_pool.qkv.\1",
        r"head\.attention\.out_proj" + _WB: r"trunk.attn_pool.proj\1",
        r"head\.layernorm" + _WB: r"trunk.attn_pool.norm\1",
        r"head\.mlp\.(fc[12])" + _WB: r"trunk.attn_pool.mlp.\1\2",
    }.items()
]
_NAMES_IN_BLOCKS: Final = [
    (re.compile(pattern + r"(\.weight|\.bias)$"), name)
    for pattern, name in {
        r"\.(?:attention\.attention\.|attention\.|self_attn\.)query": ".attn.q",
        r"\.(?:attention\.attention\.|attention\.|self_attn\.)key": ".attn.k",
        r"\.(?:attention\.attention\.|attention\.|self_attn\.)value": ".attn.v",
        r"\.(?:attention\.|self_attn\.)q_proj": ".attn.q",
        r"\.(?:attention\.|self_attn\.)k_proj": ".attn.k",
        r"\.(?:attention\.|self_attn\.)v_proj": ".attn.v",
        r"\.(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)": ".attn.proj",
        r"\.(?:layernorm_before|layer_norm1)": ".norm1",
        r"\.(?:layernorm_after|layer_norm2)": ".norm2",
        r"\.(?:intermediate\.dense|mlp\.weights_in|mlp\.w12)": ".mlp.fc1",
        r"\.(?:output\.dense|mlp\.weights_out|mlp\.w3|mlp\.down_proj)": ".mlp.fc2",
        r"\.mlp\.gate_proj": ".mlp.gate",
        r"\.mlp\.up_proj": ".mlp.value",
    }.items()
]
_JOINED: Final = {".qkv": (".q", ".k", ".v"), ".fc1": (".gate", ".value")}
"""Matrices that timm keeps as one, and their parts in order."""


def rename_tensors(tensors: Mapping[str, Tensor], path: Any) -> dict[str, Tensor]:
    """Give a checkpoint's tensors the names that :class:`PooledTower` has for them.

    Tensors that no image needs are left out by name; unknown ones keep their names, for
    :func:`cxr_cache.encoders.weights.fill_tower` to refuse.

    Raises
    ------
    EncoderError
        Two tensors would be the same.
    """
    renamed: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for name, tensor in tensors.items():
        bare = _PREFIXES.sub("", name)
        if _IGNORED.fullmatch(bare) or not tensor.numel():  # no registers are an empty tensor
            continue
        new = _rename(bare)
        if new in renamed:
            raise held_twice(path, origins[new], name)
        renamed[new], origins[new] = tensor, name
    for whole, parts in _JOINED.items():
        for name in [name for name in renamed if re.search(rf"{re.escape(parts[0])}\.\w+$", name)]:
            stem, _, kind = name.rpartition(f"{parts[0]}.")
            named = [f"{stem}{part}.{kind}" for part in parts]
            shapes = {tuple(renamed[p].shape[1:]) if p in renamed else None for p in named}
            if len(shapes) == 1 and None not in shapes:
                renamed[f"{stem}{whole}.{kind}"] = torch.cat([renamed.pop(part) for part in named])
    for name in [name for name in renamed if ".mlp.value." in name]:  # there was no gate
        renamed[name.replace(".mlp.value.", ".mlp.fc1.")] = renamed.pop(name)
    for name in [name for name in renamed if name.startswith("trunk.attn_pool.qkv.")]:
        tensor, kind = renamed.pop(name), name.rpartition(".")[2]
        width = len(tensor) // 3
        renamed[f"trunk.attn_pool.q.{kind}"] = tensor[:width]
        renamed[f"trunk.attn_pool.kv.{kind}"] = tensor[width:]
    return renamed


def _rename(name: str) -> str:
    """Give the tower's name of one tensor; an unknown one keeps its own."""
    for pattern, new in _NAMES:
        if match := pattern.fullmatch(name):
            renamed = match.expand(new)
            break
    else:
        return name
    if ".blocks." not in renamed:
        return renamed
    renamed = re.sub(r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma", renamed)
    for pattern, new in _NAMES_IN_BLOCKS:
        renamed, n_found = pattern.subn(rf"{new}\1", renamed)
        if n_found:
            break
    return renamed


def fit_tensors(
    tensors: Mapping[str, Tensor], tower: Any, model_type: str, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Bring tensors into the shapes of the tower: axes of one, and positions for its input size."""
    expected = tower.state_dict()
    if model_type == "dinov3_vit":
        tensors = {_name_in_eva(name): tensor for name, tensor in tensors.items()}
    fitted = {
        name: tensor.reshape(expected[name].shape)
        if name in expected and tensor.squeeze().shape == expected[name].squeeze().shape
        else tensor
        for name, tensor in tensors.items()
    }
    side = settings["patch_size"]
    patch = fitted.get("trunk.patch_embed.proj.weight")
    if patch is not None and patch.shape[1:] == (3 * side**2,):
        # Of images that come cut into patches, channels last
        patch = patch.reshape(-1, side, side, 3).permute(0, 3, 1, 2)
        fitted["trunk.patch_embed.proj.weight"] = patch
    return fitted | _fit_positions(fitted, tower, model_type, settings["image_size"] // side)


def _fit_positions(
    tensors: Mapping[str, Tensor], tower: Any, model_type: str, grid: int
) -> dict[str, Tensor]:
    """Resample the positions of `grid` x `grid` patches; tensors of other shapes stay as they are.

    Where positions belong to patches only, the class token's is added to it once and for all.
    """
    trunk, width = tower.trunk, tower.trunk.embed_dim
    n_before = int(trunk.cls_token is not None)
    positions = tensors.get("trunk.pos_embed")
    if positions is None or positions.numel() != (n_before + grid**2) * width:
        return {}
    positions = positions.reshape(1, -1, width).float()
    before, patches = positions[:, :n_before], positions[:, n_before:]
    patches = _resample(patches, grid, trunk.patch_embed.grid_size, model_type)
    if not trunk.no_embed_class:
        return {"trunk.pos_embed": torch.cat([before, patches], dim=1)}
    class_token = tensors.get("trunk.cls_token")
    if class_token is None or class_token.shape != before.shape:
        return {"trunk.pos_embed": patches}
    return {"trunk.pos_embed": patches, "trunk.cls_token": class_token.float() + before}


def _name_in_eva(name: str) -> str:
    name = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)
    return re.sub(r"\.attn\.([qv])\.bias$", r".attn.\1_bias", name)


def _resample(patches: Tensor, grid: int, new: tuple[int, int], model_type: str) -> Tensor:
    """Resample positions of patches ``(1, grid * grid, W)`` as the family itself does."""
    if (grid, grid) == tuple(new):
        return patches
    image = patches.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, align_corners=False, **LAYOUTS[model_type].resampling)
    return image.permute(0, 2, 3, 1).flatten(1, 2)
