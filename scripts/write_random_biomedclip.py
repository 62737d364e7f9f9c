"""Write a folder in BiomedCLIP's exact layout, at full size, with seeded random weights.

For tests and speed measurements on machines without the real weights:

    python scripts/write_random_biomedclip.py FOLDER
    cxr-cache extract ... --model local-dir:FOLDER

Names, shapes and configuration are those of the Hugging Face repository
microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224, text tower included; the numbers are
noise, so the embeddings mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

CONFIG = {
    "model_cfg": {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {
            "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 256,
        },
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}
WEIGHTS_FILES = {
    "safetensors": "open_clip_model.safetensors",
    "bin": "open_clip_pytorch_model.bin",
}
WIDTH, MLP_WIDTH, EMBEDDING_WIDTH, TEXT_PROJECTION_WIDTH = 768, 3072, 512, 640
N_BLOCKS, N_TOKENS, PATCH_SIZE_PX = 12, 197, 16
VOCABULARY_SIZE, N_POSITIONS = 30522, 512


def vision_shapes() -> Shapes:
    """Names and shapes of the image tower: timm's ViT-B/16 and a projection without bias."""
    shapes: Shapes = {
        "visual.trunk.cls_token": (1, 1, WIDTH),
        "visual.trunk.pos_embed": (1, N_TOKENS, WIDTH),
        "visual.trunk.patch_embed.proj.weight": (WIDTH, 3, PATCH_SIZE_PX, PATCH_SIZE_PX),
        "visual.trunk.patch_embed.proj.bias": (WIDTH,),
    }
    for block in (f"visual.trunk.blocks.{i}" for i in range(N_BLOCKS)):
        shapes |= _affine(f"{block}.norm1", WIDTH)
        shapes |= _affine(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        shapes |= _affine(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= _affine(f"{block}.norm2", WIDTH)
        shapes |= _affine(f"{block}.mlp.fc1", MLP_WIDTH, WIDTH)
        shapes |= _affine(f"{block}.mlp.fc2", WIDTH, MLP_WIDTH)
    shapes |= _affine("visual.trunk.norm", WIDTH)
    return shapes | {"visual.head.proj.weight": (EMBEDDING_WIDTH, WIDTH)}


def text_shapes(n_layers: int, vocabulary_size: int) -> Shapes:
    """Names and shapes of the text tower: BERT base and a two-layer projection without bias."""
    embeddings = "text.transformer.embeddings"
    shapes: Shapes = {
        f"{embeddings}.word_embeddings.weight": (vocabulary_size, WIDTH),
        f"{embeddings}.position_embeddings.weight": (N_POSITIONS, WIDTH),
        f"{embeddings}.token_type_embeddings.weight": (2, WIDTH),
    }
    shapes |= _affine(f"{embeddings}.LayerNorm", WIDTH)
    for layer in (f"text.transformer.encoder.layer.{i}" for i in range(n_layers)):
        for part in ("query", "key", "value"):
            shapes |= _affine(f"{layer}.attention.self.{part}", WIDTH, WIDTH)
        shapes |= _affine(f"{layer}.attention.output.dense", WIDTH, WIDTH)
        shapes |= _affine(f"{layer}.attention.output.LayerNorm", WIDTH)
        shapes |= _affine(f"{layer}.intermediate.dense", MLP_WIDTH, WIDTH)
        shapes |= _affine(f"{layer}.output.dense", WIDTH, MLP_WIDTH)
        shapes |= _affine(f"{layer}.output.LayerNorm", WIDTH)
    return shapes | {
        "text.proj.0.weight": (TEXT_PROJECTION_WIDTH, WIDTH),
        "text.proj.2.weight": (EMBEDDING_WIDTH, TEXT_PROJECTION_WIDTH),
        "logit_scale": (),
    }


def _affine(name: str, *shape: int) -> Shapes:
    """A weight and its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def draw_tensors(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Noise of unit gain for matrices; norms near 1 and biases near 0, so that each one counts."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _draw(name, shape, generator) for name, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.rand(shape, generator=generator).mul_(2).sub_(1)
    if len(shape) < 2:
        return noise.mul_(0.1).add_(0 if name.endswith("bias") else 1)
    fan_in = 1 if shape[0] == 1 else math.prod(shape[1:])
    return noise.mul_(math.sqrt(3 / fan_in))


def write_biomedclip_folder(
    folder: Path,
    *,
    file_format: str = "safetensors",
    seed: int = 0,
    n_text_layers: int = 12,
    vocabulary_size: int = VOCABULARY_SIZE,
) -> dict[str, Tensor]:
    """Write configuration and weights, and return the weights by their names.

    Parameters
    ----------
    folder
        Made if it does not exist; 784 MB are written at full size.
    file_format
        ``"safetensors"`` or ``"bin"`` (torch's pickle).
    seed
        Same seed, same bytes.
    n_text_layers, vocabulary_size
        Smaller than BERT base where a test needs the text tower's names only.
    """
    tensors = draw_tensors(vision_shapes() | text_shapes(n_text_layers, vocabulary_size), seed)
    write_checkpoint(folder, tensors, file_format)
    return tensors


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], file_format: str) -> Path:
    """Write BiomedCLIP's configuration beside `tensors`; gives the weights' path."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(CONFIG, indent=2)
    (folder / "open_clip_config.json").write_text(config + "\n", encoding="utf-8")
    path = folder / WEIGHTS_FILES[file_format]
    save = save_file if file_format == "safetensors" else torch.save
    save(tensors, path)
    return path


def main() -> None:
    """Read the command line, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", choices=tuple(WEIGHTS_FILES), default="safetensors")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tensors = write_biomedclip_folder(options.folder, file_format=options.format, seed=options.seed)
    n_parameters = sum(tensor.numel() for tensor in tensors.values())
    print(f"{options.folder}: {n_parameters / 1e6:.1f} M random parameters, seed {options.seed}")


if __name__ == "__main__":
    main()
