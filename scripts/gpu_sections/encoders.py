"""Encoders of every kind that is read, with random weights, written as their libraries write them.

Names of tensors are those that the package's messages have for each layout, so that neither
transformers nor a network is needed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.layouts import build_trunk, read_settings
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.encoders.tensor_names import make_speller
from cxr_cache.encoders.timm_vit import PooledTower
from cxr_cache.encoders.weights import fill_with_noise


class Kind(NamedTuple):
    """An encoder: a name that needs no file, or settings in Hugging Face's layout."""

    full: str | Mapping[str, Any]
    small: str | Mapping[str, Any]
    """Of the same kind, just enough to see that it is read and runs."""
    pool: str = "default"


_SMALL: Final = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_SMALL_MLP: Final = _SMALL | {"image_size": 64, "patch_size": 16, "intermediate_size": 96}

KINDS: Final = {
    "BiomedCLIP, ViT-B/16, 224 px": Kind("random:vit_base_patch16_224", "random:test_vit"),
    "DINOv2 ViT-B/14 with registers, 518 px": Kind(
        {"model_type": "dinov2_with_registers", "image_size": 518, "patch_size": 14},
        {"model_type": "dinov2_with_registers", "image_size": 70, "patch_size": 14} | _SMALL,
    ),
    "DINOv3 ViT-B/16, rotary positions, 256 px": Kind(
        {"model_type": "dinov3_vit", "image_size": 256, "num_register_tokens": 4}
        | {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
        {"model_type": "dinov3_vit", "num_register_tokens": 4} | _SMALL_MLP,
    ),
    "CLIP ViT-B/32, 224 px": Kind(
        {"model_type": "clip_vision_model"}, {"model_type": "clip_vision_model"} | _SMALL_MLP
    ),
    "SigLIP So400m/14, 448 px": Kind(
        {"model_type": "siglip_vision_model", "image_size": 448, "patch_size": 14}
        | {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16}
        | {"intermediate_size": 4304},
        {"model_type": "siglip_vision_model"} | _SMALL_MLP,
    ),
    "EVA-02 ViT-B/16, rotary positions, 224 px": Kind(
        "random:eva02_base_patch16_clip_224",
        "random:eva02_tiny_patch14_224?img_size=56",
        pool="mean",
    ),
}
"""Sizes are those of BiomedCLIP, RAD-DINO, DINOv3-B, CheXzero, MedSigLIP and EVA-X-B."""


def load_kind(kind: Kind, *devices: str, quick: bool) -> list[Encoder]:
    """Load an encoder of a kind on each of some devices, in fp32."""
    chosen = kind.small if quick else kind.full
    with tempfile.TemporaryDirectory() as folder:
        if not isinstance(chosen, str):
            write_folder(Path(folder), chosen)
        name = chosen if isinstance(chosen, str) else f"local-dir:{folder}"
        return [
            load_encoder(name, device=device, precision="fp32", pool=kind.pool)
            for device in devices
        ]


def write_folder(folder: Path, config: Mapping[str, Any], seed: int = 0) -> None:
    """Write configuration, preprocessing and random weights of a tower as transformers does."""
    settings = read_settings(config, str(folder))
    size_px = settings["image_size"]
    tower = PooledTower(build_trunk(config["model_type"], settings, size_px))
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if parameter.ndim < 2:  # of norms, layer scales and biases
                parameter.fill_(name.endswith("weight") or "gamma" in name)
    fill_with_noise(tower, seed)
    spell, tensors = make_speller((), config["model_type"], settings), dict[str, Tensor]()
    for name, parameter in tower.named_parameters():
        names = spell(name)  # of queries, keys and values, which timm has in one
        for new, part in zip(names, parameter.detach().chunk(len(names)), strict=True):
            tensors[new] = torch.cat([tensors[new], part]) if new in tensors else part.clone()
    processing = {
        **{"image_processor_type": "ViTImageProcessor", "do_resize": True, "do_normalize": True},
        **{"size": {"height": size_px, "width": size_px}, "resample": 3},
        **{"image_mean": [0.5] * 3, "image_std": [0.25] * 3},
    }
    (folder / "config.json").write_text(json.dumps(dict(config)))
    (folder / "preprocessor_config.json").write_text(json.dumps(processing))
    save_file(tensors, folder / "model.safetensors")
