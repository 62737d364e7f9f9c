"""Checkpoints without a configuration compute what their own family computes."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor

from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import load_encoder, recorded_options
from cxr_cache.errors import EncoderError
from tests.encoders.test_encoder import draw_pixels, relative_error
from tests.encoders.test_hugging_face import PROCESSING, Trace, require_equal, write_model

SMALL = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
DINOV2: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dinov2": ("Dinov2Model", "Dinov2Config", SMALL | {"image_size": 70}),
    "swiglu": ("Dinov2Model", "Dinov2Config", SMALL | {"image_size": 70, "use_swiglu_ffn": True}),
    "registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        SMALL | {"image_size": 64, "patch_size": 16, "use_swiglu_ffn": True},
    ),
}
IN_DINOV2 = {
    r"^embeddings\.position_embeddings": "pos_embed",
    r"^embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"^embeddings\.": "",
    r"^encoder\.layer\.": "blocks.",
    r"^layernorm\.": "norm.",
    r"attention\.output\.dense": "attn.proj",
    r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
    r"mlp\.weights_in": "mlp.w12",
    r"mlp\.weights_out": "mlp.w3",
}


def name_as_dinov2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors of transformers the names that they have in the DINOv2 repository."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".key." in name or ".value." in name:
            continue
        if ".query." in name:
            parts = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
            name, tensor = name.replace("attention.attention.query", "attn.qkv"), torch.cat(parts)
        for pattern, new in IN_DINOV2.items():
            name = re.sub(pattern, new, name)
        named[name] = tensor
    return named


def disturb(model: Any) -> Any:
    """Give a model seeded weights that all matter."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def require_splits(encoder: Encoder, expected: Tensor, pixels: Tensor) -> None:
    assert relative_error(expected[:1], expected[1:]) > 1e-2, "two images look alike"
    assert relative_error(encoder.visual(encoder.prepare(pixels)), expected) < 1e-5
    for n_unfrozen in (1, 2, encoder.identity.n_blocks):
        _, _, embedding = encoder.encode_with_tokens(pixels, n_unfrozen)
        assert relative_error(embedding, expected) < 1e-5


# --- Families ------------------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path: Path) -> tuple[Path, Any]:
    """A whole CLIP, as CheXzero saves one: the names are OpenAI's."""
    vision = {"image_size": 64, "patch_size": 16, "width": 128, "layers": 3}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    model = disturb(open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=True))
    path = tmp_path / "best_64_0.0001_original.pt"
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, path)
    return path, model.half().float()


def test_a_state_dict_of_openais_clip_is_its_image_tower(clip):
    path, model = clip
    encoder = load_encoder(f"local-file:{path}", precision="fp32")
    pixels = draw_pixels(2, 64)
    with torch.inference_mode():
        require_splits(encoder, model.visual(encoder.prepare(pixels)), pixels)
    assert encoder.preprocessing.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    assert "QuickGELU" in encoder.identity.notes[0]


def test_clip_takes_images_of_another_size_as_open_clip_does(clip):
    path, model = clip
    encoder = load_encoder(f"local-file:{path}?img_size=96", precision="fp32")
    theirs = open_clip.CLIP(
        24, {"image_size": 96, "patch_size": 16, "width": 128, "layers": 3},
        {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
        quick_gelu=True,
    ).eval()  # fmt: skip
    state = model.state_dict()
    open_clip.model.resize_pos_embed(state, theirs)
    theirs.load_state_dict(state)
    pixels = draw_pixels(2, 96)
    with torch.inference_mode():
        require_splits(encoder, theirs.visual(encoder.prepare(pixels)), pixels)
    assert encoder.identity.positions_from_px == 64
    recorded = json.loads(json.dumps(encoder.identity.to_dict()))
    assert load_encoder(**vars(recorded_options(recorded))).identity == encoder.identity


@pytest.mark.parametrize("family", DINOV2)
@pytest.mark.parametrize("wrap", ["bare", "teacher"])
def test_a_file_of_the_dinov2_repository_is_what_transformers_has(tmp_path, family, wrap):
    _, theirs = write_model(tmp_path / "m", *DINOV2[family])
    tensors = name_as_dinov2(load_file(tmp_path / "m" / "model.safetensors"))
    content: Any = tensors
    if wrap == "teacher":  # blocks in two groups, and beside them what the training was for
        in_group = {"0": "0.0", "1": "0.1", "2": "1.2"}
        tensors = {
            re.sub(r"^blocks\.(\d)", lambda found: f"blocks.{in_group[found[1]]}", name): tensor
            for name, tensor in tensors.items()
        }
        tensors = {f"backbone.{k}": v for k, v in tensors.items()}
        content = {"teacher": tensors | {"dino_head.last_layer.weight": torch.ones(3)}}
    path = tmp_path / "teacher_checkpoint.pth"
    torch.save(content, path)

    encoder = load_encoder(f"local-file:{path}", precision="fp32")

    require_equal(encoder, theirs, draw_pixels(2, DINOV2[family][2]["image_size"]))
    assert encoder.preprocessing.mean == (0.485, 0.456, 0.406)


def test_a_vit_without_layer_scale_is_one(tmp_path):
    """As DINO and MAE have them; eps and heads are those of timm."""
    model = disturb(
        timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=128, num_heads=2, depth=3,
                          num_classes=0)
    )  # fmt: skip
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "mae.pth")
    encoder = load_encoder(f"local-dir:{tmp_path}", precision="fp32")
    pixels = draw_pixels(2, 64)
    with torch.inference_mode():
        require_splits(encoder, model(encoder.prepare(pixels)), pixels)
    assert encoder.identity.name == f"local-file:{tmp_path / 'mae.pth'}"


IN_EVA_X = {
    "fc_norm": "norm",
    "mlp.fc1_g": "mlp.w1",
    "mlp.fc1_x": "mlp.w2",
    "mlp.fc2": "mlp.w3",
    "mlp.norm": "mlp.ffn_ln",
    "attn.norm": "attn.inner_attn_ln",
    "q_proj.bias": "q_bias",
    "v_proj.bias": "v_bias",
}


def make_eva(img_size: int = 64) -> Eva:
    return Eva(
        img_size=img_size, patch_size=16, embed_dim=128, depth=3, num_heads=2, qkv_fused=False,
        mlp_ratio=4 * 2 / 3, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True, num_classes=0,
        ref_feat_shape=(4, 4),
    )  # fmt: skip


@pytest.fixture
def eva(tmp_path: Path) -> tuple[Path, Any]:
    """EVA-X as it is published: masked pretraining, and numbers of NumPy in the file."""
    model = disturb(make_eva())
    tensors = {}
    for name, tensor in model.state_dict().items():
        for new, old in IN_EVA_X.items():
            name = name.replace(new, old)
        tensors[name] = tensor
    tensors |= {"mask_token": torch.ones(1, 1, 128), "lm_head.weight": torch.ones(9, 128)}
    content = {"model": tensors, "best": np.float64(0.5), "loss": np.float32(2), "n": np.int64(3)}
    torch.save(content, tmp_path / "eva_x_tiny.pt")
    return tmp_path / "eva_x_tiny.pt", model


@pytest.mark.parametrize("img_size", [64, 96])
def test_eva_x_is_timms_eva(eva, img_size):
    path, theirs = eva
    if img_size != 64:
        larger = make_eva(img_size).eval()
        larger.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), larger))
        theirs = larger
    size = "" if img_size == 64 else f"?img_size={img_size}"
    encoder = load_encoder(f"local-file:{path}{size}", precision="fp32")
    pixels = draw_pixels(2, img_size)
    with torch.inference_mode():
        require_splits(encoder, theirs(encoder.prepare(pixels)), pixels)
    assert encoder.preprocessing.resize_px == round(img_size * 256 / 224)
    assert encoder.identity.positions_from_px == (None if img_size == 64 else 64)


def test_numbers_of_older_numpy_are_read_and_other_objects_are_not(eva, tmp_path):
    path, _ = eva
    expected = load_encoder(f"local-file:{path}").identity
    content = torch.load(path, weights_only=False)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multi", b"numpy.core.multi"))
    assert load_encoder(f"local-file:{path}").identity == expected
    torch.save(content | {"history": np.array([object()])}, path)
    with pytest.raises(EncoderError, match=r"eva_x_tiny\.pt was refused.*could run code"):
        load_encoder(f"local-file:{path}")


# --- What a file does not say --------------------------------------------------------------------


def test_a_processor_beside_the_file_says_how_images_are_prepared(eva):
    path, _ = eva
    (note,) = load_encoder(f"local-file:{path}").identity.notes
    assert re.match(r"eva_x_tiny\.pt does not say how .*EVA-X's way was assumed.* mean 0\.49", note)
    (path.parent / "preprocessor_config.json").write_text(
        json.dumps(PROCESSING | {"size": {"height": 64, "width": 64}})
    )
    encoder = load_encoder(f"local-dir:{path.parent}")
    assert encoder.identity.notes == ()
    assert (encoder.preprocessing.mean, encoder.preprocessing.resize) == ((0.5, 0.4, 0.3), "squash")


def use_archive(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"")


def edit(change: Any) -> Any:
    """Make a damage that replaces the file's tensors by what `change` makes of them."""
    return lambda path: torch.save(change(torch.load(path, weights_only=False)["model"]), path)


DAMAGE: dict[str, tuple[Any, str]] = {
    "half a checkpoint": (
        edit(lambda tensors: {k: v for k, v in tensors.items() if "blocks.1." not in k}),
        r"(?s)does not fit.*missing in the file: trunk\.blocks\.1\.",
    ),
    "a key too many": (
        edit(lambda tensors: tensors | {"extra.scale": torch.ones(1)}),
        r"(?s)does not fit.*unknown to the tower: trunk\.extra\.scale",
    ),
    "a matrix of another size": (
        edit(lambda tensors: tensors | {"blocks.0.attn.proj.weight": torch.ones(2, 2)}),
        r"(?s)does not fit.*attn\.proj\.weight \(\(2, 2\) in the file, \(128, 128\) in the tower",
    ),
    "text only": (
        edit(lambda _: {"bert.embeddings.word.weight": torch.ones(2)}),
        "holds no image tower that its tensors tell: bert.*Known without a configuration are",
    ),
    "adapter": (
        edit(lambda _: {"base_model.model.q.lora_A.weight": torch.ones(2)}),
        r"holds an adapter \(LoRA: base_model.*Merge the two",
    ),
    "positions that are no square": (
        edit(lambda tensors: tensors | {"pos_embed": torch.ones(1, 12, 128)}),
        r"has 11 position embeddings of patches \(pos_embed\), which are no square",
    ),
    "heads that no shape shows": (
        edit(lambda tensors: tensors | {"patch_embed.proj.weight": torch.ones(100, 3, 16, 16)}),
        "100 wide, of which no shape shows how many attention heads",
    ),
    "NaN": (
        edit(lambda tensors: {k: v * torch.nan for k, v in tensors.items()}),
        "holds NaN or infinity in .*The file is damaged",
    ),
    "quantised": (
        edit(lambda tensors: {k: v.to(torch.uint8) for k, v in tensors.items()}),
        "holds quantised weights .*torch.uint8",
    ),
    "code in a pickle": (
        lambda path: torch.save({"model": {}, "x": Trace()}, path),
        "eva_x_tiny.pt was refused.*could run code",
    ),
    "TorchScript": (
        lambda path: use_archive(path, "clip/data.pkl", "clip/constants.pkl", "clip/code/x.py"),
        r"eva_x_tiny.pt is an archive of TorchScript.*torch\.jit\.load\('eva_x_tiny\.pt', 'cpu'\)",
    ),
    "no file": (lambda path: path.unlink(), "eva_x_tiny.pt is not a file. local-file: takes"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_an_unusable_file_is_refused_in_a_sentence(eva, damage, message):
    path, _ = eva
    damage(path)
    with pytest.raises(EncoderError, match=message):
        load_encoder(f"local-file:{path}")
