"""Vision transformers of Hugging Face: their settings as timm's, their tensors in timm's shapes.

What a family is missing in its configuration are the defaults of transformers, which leaves them
out of files.
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
            "proj_bias": True,
            "mlp_bias": True,
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

ACTIVATIONS: Final = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
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
    given = config.get("vision_config") or config
    if not isinstance(given, Mapping):
        raise EncoderError(
            f"{origin} has the vision_config {given!r}, where the settings of the image tower "
            "belong. Copy the file from the model's repository."
        )
    settings = dict(layout.defaults)
    settings |= {k: v for k, v in given.items() if k in settings and v is not None}
    if settings["image_size"] is None:  # of a tower for images of any shape; its grid is a square
        settings["image_size"] = int(settings["num_patches"] ** 0.5) * settings["patch_size"]
    for name in ("image_size", "patch_size"):
        sides = settings[name] if isinstance(settings[name], list) else [settings[name]] * 2
        if len(set(sides)) != 1:
            raise EncoderError(
                f"{origin} asks for {name} {sides}, not a square, and no other is offered. "
                "Embeddings that were computed elsewhere come in by cxr-cache import."
            )
        settings[name] = sides[0]
    for name, default in settings.items():
        is_count = type(layout.defaults[name]) is int and name != "mlp_ratio"
        least = 0 if name == "num_register_tokens" else 1
        if is_count and (not isinstance(default, int) or default < least):
            raise EncoderError(
                f"{origin} has {name} {default!r}, where a whole number of at least {least} "
                "belongs. Copy the file from the model's repository."
            )
    if settings["hidden_act"] not in ACTIVATIONS:
        raise EncoderError(
            f"{origin} has the activation function '{settings['hidden_act']}', which is not one of "
            f"{', '.join(ACTIVATIONS)}. Embeddings that were computed elsewhere come in by "
            "cxr-cache import."
        )
    if settings["num_channels"] != 3:
        raise EncoderError(
            f"{origin} is for images of {settings['num_channels']} channels, not of 3. Take a "
            "model for images in colour; radiographs fill all three channels."
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
    is_gated, activation = settings["use_gated_mlp"], ACTIVATIONS[settings["hidden_act"]]
    if biases not in ([True, False, True], [False, False, False]):
        raise ValueError(
            f"biases of queries, keys and values are {biases}, where queries and values have some "
            "or none, and keys have none"
        )
    if activation != ("silu" if is_gated else "gelu"):
        raise ValueError(
            f"hidden_act is {settings['hidden_act']} with use_gated_mlp {is_gated}, where silu "
            "goes with a gate, and gelu without"
        )
    if not (settings["mlp_bias"] and settings["proj_bias"]):
        raise ValueError("mlp_bias or proj_bias is false, where these layers have biases")
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
        "act_layer": get_act_layer(ACTIVATIONS[settings["hidden_act"]]),
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


def fit_tensors(
    tensors: Mapping[str, Tensor], tower: Any, model_type: str, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Bring tensors into the shapes of the tower: axes of one, and positions for its input size."""
    expected = tower.state_dict()
    if model_type == "dinov3_vit":
        tensors = split_biases({_name_in_eva(name): t for name, t in tensors.items()})
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


def split_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split biases of queries, keys and values as timm's Eva keeps them; keys have none there.

    DINOv3's own code multiplies them by a mask, which is 0 for keys. A bias of keys that is left
    keeps a name that no tower has. Of other names nothing is changed.
    """
    split = {name: t for name, t in tensors.items() if not re.search(r"\.qkv\.bias(_mask)?$", name)}
    for name, bias in tensors.items():
        if not name.endswith(".qkv.bias"):
            continue
        stem = name.removesuffix(".qkv.bias")
        masked = bias.float() * tensors.get(f"{name}_mask", torch.ones(()))
        split[f"{stem}.q_bias"], of_keys, split[f"{stem}.v_bias"] = masked.chunk(3)
        if of_keys.any():
            split[f"{stem}.k_bias"] = of_keys
    return split


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
