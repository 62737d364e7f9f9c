"""Checkpoints without a configuration compute what their own family computes, wherever they lie."""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import open_clip
import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor

from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import load_encoder, recorded_options
from cxr_cache.errors import EncoderError
from tests.encoders.equality import (
    disturb,
    draw_pixels,
    require_equal,
    require_gradients,
    trace,
)
from tests.encoders.test_encoder import COMMIT, write_hub_cache
from tests.encoders.test_hugging_face import PROCESSING, Trace, require_theirs, write_model

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


IN_DINOV3 = {
    r"^embeddings\.patch_embeddings": "patch_embed.proj",
    r"^embeddings\.register_tokens": "storage_tokens",
    r"^embeddings\.": "",
    r"^layer\.": "blocks.",
    r"attention\.o_proj": "attn.proj",
    r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
}
IN_DINOV3_MLP = {"up_proj": "fc1", "down_proj": "fc2"}
IN_DINOV3_GATED_MLP = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"}


def name_as_dinov3(tensors: dict[str, Tensor], head_width: int) -> dict[str, Tensor]:
    """Undo what transformers' convert_dinov3_vit_to_hf.py does to a file of the repository.

    Biases of keys were there while it was trained, multiplied by a mask of 0.
    """
    is_gated = any("gate_proj" in name for name in tensors)
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if re.search(r"\.[kv]_proj\.", name):
            continue
        if ".q_proj." in name:
            of_keys = torch.full_like(tensor, 7.0)
            parts = [tensors.get(name.replace("q_proj", f"{n}_proj"), of_keys) for n in "qkv"]
            name, tensor = name.replace("attention.q_proj", "attn.qkv"), torch.cat(parts)
        for pattern, new in IN_DINOV3.items():
            name = re.sub(pattern, new, name)
        for old, new in (IN_DINOV3_GATED_MLP if is_gated else IN_DINOV3_MLP).items():
            name = name.replace(old, new)
        named[name] = tensor
        if name.endswith(".qkv.bias"):
            ones = torch.ones(len(tensor) // 3)
            named[f"{name}_mask"] = torch.cat([ones, 0 * ones, ones])
    named["mask_token"] = named["mask_token"][0]
    n = head_width // 4
    return named | {"rope_embed.periods": 100.0 ** (torch.arange(n) / n)}


# --- Families ------------------------------------------------------------------------------------


def require_clip(encoder: Encoder, visual: Any, pixels: Tensor) -> None:
    """Compare with a tower of open_clip, whose projection follows the pooled output."""
    pixels_in = encoder.prepare(pixels)
    embedding, tokens = trace(visual.transformer.resblocks, lambda: visual(pixels_in))
    with torch.inference_mode():
        normed = visual.ln_post(visual.transformer(visual._embeds(pixels_in)))
    require_equal(encoder, pixels, normed[:, 0], embedding, tokens)


def require_timm(encoder: Encoder, model: Any, pixels: Tensor) -> None:
    """Compare with a model of timm without a classifier."""
    pixels_in = encoder.prepare(pixels)
    embedding, tokens = trace(model.blocks, lambda: model(pixels_in))
    require_equal(encoder, pixels, embedding, embedding, tokens)


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
    require_clip(encoder, model.visual, pixels)
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
    require_clip(encoder, theirs.visual, pixels)
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

    require_theirs(encoder, theirs, draw_pixels(2, DINOV2[family][2]["image_size"]))
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
    require_timm(encoder, model, pixels)
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


EVA_TINY = {"embed_dim": 128, "depth": 3, "num_heads": 2, "ref_feat_shape": (4, 4)}


def make_eva(img_size: int = 64, **sizes: Any) -> Eva:
    return Eva(
        img_size=img_size, patch_size=16, qkv_fused=False, mlp_ratio=4 * 2 / 3, swiglu_mlp=True,
        scale_mlp=True, use_rot_pos_emb=True, num_classes=0, **(EVA_TINY | sizes),
    )  # fmt: skip


def name_as_eva_x(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give timm's tensors EVA-X's names, with what its masked pretraining needed."""
    named = {}
    for name, tensor in tensors.items():
        for new, old in IN_EVA_X.items():
            name = name.replace(new, old)
        named[name] = tensor
    width = tensors["cls_token"].shape[-1]
    return named | {"mask_token": torch.ones(1, 1, width), "lm_head.weight": torch.ones(9, width)}


@pytest.fixture
def eva(tmp_path: Path) -> tuple[Path, Any]:
    """EVA-X as it is published: masked pretraining, and numbers of NumPy in the file."""
    model = disturb(make_eva())
    tensors = name_as_eva_x(model.state_dict())
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
    require_timm(encoder, theirs, pixels)
    assert encoder.preprocessing.resize_px == round(img_size * 256 / 224)
    assert encoder.identity.positions_from_px == (None if img_size == 64 else 64)


DINOV3_SMALL = SMALL | {"image_size": 64, "intermediate_size": 256}
DINOV3: dict[str, dict[str, Any]] = {
    "plain": DINOV3_SMALL | {"num_register_tokens": 4},
    "gated": DINOV3_SMALL | {"use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 2},
    "without biases": DINOV3_SMALL
    | {"query_bias": False, "value_bias": False, "num_register_tokens": 4},
}


def write_dinov3(folder: Path, settings: dict[str, Any]) -> tuple[Path, dict[str, Tensor], Any]:
    """Save a tower as the DINOv3 repository does; give the file, its tensors and transformers'."""
    _, theirs = write_model(folder / "hf", "DINOv3ViTModel", "DINOv3ViTConfig", settings)
    head_width = settings["hidden_size"] // settings["num_attention_heads"]
    tensors = name_as_dinov3(load_file(folder / "hf" / "model.safetensors"), head_width)
    path = folder / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    torch.save(tensors, path)
    return path, tensors, theirs


@pytest.mark.parametrize("kind", DINOV3)
def test_a_file_of_the_dinov3_repository_is_what_transformers_has(tmp_path, kind):
    """Keys keep no bias, although the file has one, and a mask that says so."""
    path, _, theirs = write_dinov3(tmp_path, DINOV3[kind])
    encoder = load_encoder(f"local-file:{path}?img_size=64", precision="fp32")
    require_theirs(encoder, theirs, draw_pixels(2, 64))
    require_gradients(encoder, draw_pixels(2, 64))
    assert encoder.identity.positions_from_px is None
    (note,) = encoder.identity.notes
    assert "DINOv3's way was assumed: squeezed into a square (bilinear), mean 0.485" in note
    assert load_encoder(f"local-file:{path}").preprocessing.image_size_px == 224


def test_files_of_dinov3s_own_training_load_too(tmp_path):
    """Beside the teacher's tower they hold what it was trained by, and a norm for small crops."""
    path, tensors, theirs = write_dinov3(tmp_path, DINOV3["plain"])
    tensors = tensors | {f"local_cls_norm.{n}": torch.ones(128) for n in ("weight", "bias")}
    named = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"teacher": named | {"ibot_head.mlp.0.weight": torch.ones(2)}}, path)
    encoder = load_encoder(f"local-file:{path}?img_size=64", precision="fp32")
    require_theirs(encoder, theirs, draw_pixels(2, 64))


def test_rounded_periods_are_computed_anew_and_other_ones_are_refused(tmp_path):
    """As transformers and timm do; a copy of theirs must have the same features."""
    path, tensors, theirs = write_dinov3(tmp_path, DINOV3["plain"])
    periods = tensors["rope_embed.periods"]
    torch.save(tensors | {"rope_embed.periods": periods.bfloat16()}, path)
    encoder = load_encoder(f"local-file:{path}?img_size=64", precision="fp32")
    require_theirs(encoder, theirs, draw_pixels(2, 64))
    assert "rounded to bfloat16. They are computed in float32 here" in encoder.identity.notes[1]

    torch.save(tensors | {"rope_embed.periods": periods**0.5}, path)
    encoder = load_encoder(f"local-file:{path}?img_size=64", precision="fp32")
    theirs.rope_embeddings.inv_freq **= 0.5
    require_theirs(encoder, theirs, draw_pixels(2, 64))

    torch.save(tensors | {"rope_embed.periods": periods + 1}, path)
    with pytest.raises(EncoderError, match=r"periods .* from 2 to .* not powers of one number"):
        load_encoder(f"local-file:{path}")


def test_a_bias_of_keys_that_no_mask_takes_away_is_refused(tmp_path):
    path, tensors, _ = write_dinov3(tmp_path, DINOV3["plain"])
    torch.save({k: v for k, v in tensors.items() if not k.endswith("bias_mask")}, path)
    with pytest.raises(EncoderError, match=r"unknown to the tower: blocks\.0\.attn\.qkv\.bias"):
        load_encoder(f"local-file:{path}")
    untied = {f"cls_norm.{n}": torch.ones(128) for n in ("weight", "bias")}
    torch.save(tensors | untied, path)
    with pytest.raises(EncoderError, match=r"unknown to the tower: cls_norm\.bias, cls_norm\.weig"):
        load_encoder(f"local-file:{path}")


def test_numbers_of_older_numpy_are_read_and_other_objects_are_not(eva, tmp_path):
    path, _ = eva
    expected = load_encoder(f"local-file:{path}").identity
    content = torch.load(path, weights_only=False) | {"args": argparse.Namespace(lr=1e-3)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multi", b"numpy.core.multi"))
    assert load_encoder(f"local-file:{path}").identity == expected
    torch.save(content | {"history": np.array([object()])}, path)
    with pytest.raises(EncoderError, match=r"eva_x_tiny\.pt was refused.*could run code"):
        load_encoder(f"local-file:{path}")


# --- Full size -----------------------------------------------------------------------------------


def write_large_clip(folder: Path, architecture: str) -> tuple[Path, Any]:
    """The whole of OpenAI's CLIP as its state dict has it, but for the length of its text tower."""
    cfg = open_clip.get_model_config(architecture)
    cfg |= {"quick_gelu": True, "text_cfg": cfg["text_cfg"] | {"layers": 1, "vocab_size": 64}}
    model = disturb(open_clip.CLIP(**cfg)).half().float()
    torch.save({k: v.half() for k, v in model.state_dict().items()}, folder / "clip.pt")
    return folder / "clip.pt", lambda encoder, pixels: require_clip(encoder, model.visual, pixels)


def write_large_dinov2(folder: Path, **settings: Any) -> tuple[Path, Any]:
    _, theirs = write_model(folder / "hf", "Dinov2Model", "Dinov2Config", settings)
    torch.save(
        name_as_dinov2(load_file(folder / "hf" / "model.safetensors")), folder / "vitb14.pth"
    )
    return folder / "vitb14.pth", lambda encoder, pixels: require_theirs(encoder, theirs, pixels)


def write_large_dinov3(folder: Path, **settings: Any) -> tuple[Path, Any]:
    path, _, theirs = write_dinov3(folder, settings | {"num_register_tokens": 4})
    return path, lambda encoder, pixels: require_theirs(encoder, theirs, pixels)


def write_large_eva_x(folder: Path, **sizes: Any) -> tuple[Path, Any]:
    model = disturb(make_eva(224, **sizes, ref_feat_shape=(14, 14)))
    torch.save({"module": name_as_eva_x(model.state_dict())}, folder / "eva_x_base.pt")
    return folder / "eva_x_base.pt", lambda encoder, pixels: require_timm(encoder, model, pixels)


BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
FULL_SIZE: dict[str, tuple[Any, dict[str, Any], int]] = {
    "CLIP ViT-B/32": (write_large_clip, {"architecture": "ViT-B-32"}, 224),
    "CLIP ViT-B/16": (write_large_clip, {"architecture": "ViT-B-16"}, 224),
    "DINOv2 ViT-B/14": (write_large_dinov2, {"image_size": 518}, 518),
    "DINOv3 ViT-S/16": (write_large_dinov3, {"hidden_size": 384, "num_attention_heads": 6}, 224),
    "DINOv3 ViT-B/16": (write_large_dinov3, BASE, 224),
    "EVA-X-B": (write_large_eva_x, {"embed_dim": 768, "depth": 12, "num_heads": 12}, 224),
}


@pytest.mark.slow
@pytest.mark.parametrize(("write", "sizes", "px"), FULL_SIZE.values(), ids=FULL_SIZE.keys())
def test_bare_files_of_full_size_are_what_their_family_computes(tmp_path, write, sizes, px):
    path, require_family = write(tmp_path, **sizes)
    encoder = load_encoder(f"local-file:{path}", precision="fp32")
    assert (encoder.identity.n_blocks, encoder.preprocessing.image_size_px) == (12, px)
    pixels = draw_pixels(2, px)
    require_family(encoder, pixels)
    require_gradients(encoder, pixels)


# --- Folders and repositories --------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, without a network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("[Errno -2] Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    return tmp_path / "hub"


def test_a_repository_may_hold_weights_alone(eva, cache):
    path, _ = eva
    write_hub_cache(cache, "org/eva", path.parent, (path.name,))
    alone = load_encoder(f"local-file:{path}", precision="fp32")
    for name in ("hf-hub:org/eva", f"hf-hub:org/eva@{COMMIT}"):
        encoder = load_encoder(f"{name}?img_size=96", precision="fp32")
        identity = load_encoder(name, precision="fp32").identity
        assert identity.differences(alone.identity) == {}
        assert (identity.name, identity.revision) == (f"{name}?file={path.name}", COMMIT)
        assert encoder.identity.name == f"{name}?file={path.name}&img_size=96"
        recorded = recorded_options(encoder.identity.to_dict())
        assert load_encoder(**vars(recorded)).identity == encoder.identity


def test_several_weights_need_the_name_of_one(eva, clip, cache):
    """Also where they lie beside a configuration, as RAD-DINO's do."""
    (path, _), (other, _) = eva, clip
    names = (path.name, other.name)
    write_hub_cache(cache, "org/two", path.parent, names)
    listed = re.escape(f"several files of weights: {', '.join(sorted(names))}. Say which one, such")
    for place in ("hf-hub:org/two", f"local-dir:{path.parent}"):
        with pytest.raises(EncoderError, match=rf"{listed} as {place}\?file=best_64"):
            load_encoder(place)
        for file in (path, other):
            named = load_encoder(f"{place}?file={file.name}").identity
            assert named.differences(load_encoder(f"local-file:{file}").identity) == {}
    with pytest.raises(EncoderError, match=r"has no eva\.pt\. It holds best_64_0\.0001"):
        load_encoder(f"local-dir:{path.parent}?file=eva.pt")
    with pytest.raises(EncoderError, match=r"(?s)eva\.pt of org/two is not in the Hugging Face"):
        load_encoder("hf-hub:org/two?file=eva.pt")


def test_a_file_beside_a_configuration_can_be_named(tmp_path, cache):
    """Statistics are those of the repository, not what is assumed of bare weights."""
    write_model(tmp_path / "m", *DINOV2["dinov2"])
    tensors = name_as_dinov2(load_file(tmp_path / "m" / "model.safetensors"))
    save_file(tensors, tmp_path / "m" / "backbone_compatible.safetensors")
    files = ("config.json", "model.safetensors", "preprocessor_config.json")
    write_hub_cache(cache, "org/dino", tmp_path / "m", (*files, "backbone_compatible.safetensors"))
    whole = load_encoder("hf-hub:org/dino").identity
    bare = load_encoder("hf-hub:org/dino?file=backbone_compatible.safetensors").identity
    assert whole.differences(bare) == {}
    (note,) = bare.notes
    assert "config.json beside it says what encoder it is" in note
    assert whole.name == "hf-hub:org/dino"


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """A repository of the hub that holds what a folder holds."""
    snapshot = tmp_path / COMMIT

    def ask(url: str, **_: Any) -> None:
        if not (snapshot / url.partition("/resolve/main/")[2]).is_file():
            raise EntryNotFoundError(url)

    def list_files(*_: Any, **__: Any) -> Any:
        names = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", list_files)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, file, revision: str(snapshot / file)
    )
    snapshot.mkdir()
    return snapshot


def test_the_hub_lists_the_weights_of_a_repository(eva, online):
    path, _ = eva
    (online / "README.md").write_text("EVA-X")
    (online / "weights").mkdir()
    (online / "weights" / path.name).write_bytes(path.read_bytes())
    identity = load_encoder("hf-hub:MapleF/eva").identity
    assert identity.name == f"hf-hub:MapleF/eva?file=weights/{path.name}"
    assert identity.revision == COMMIT
    (online / "second.pth").write_bytes(path.read_bytes())
    with pytest.raises(EncoderError, match=r"several files of weights: second\.pth, weights/eva"):
        load_encoder("hf-hub:MapleF/eva")
    with pytest.raises(EncoderError, match=r"the Hugging Face hub has no x\.pt. It holds second"):
        load_encoder("hf-hub:MapleF/eva?file=x.pt")


def test_weights_of_usual_names_wait_for_their_configuration(tmp_path, cache):
    """Half of a repository in the cache is not taken for weights that never had one."""
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=128, num_heads=2, depth=1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    write_hub_cache(cache, "org/half", tmp_path, ("model.safetensors",))
    with pytest.raises(EncoderError, match=r"config\.json of org/half is not in the Hugging Face"):
        load_encoder("hf-hub:org/half")


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
        r"(?s)does not fit .* that its own tensors describe:.*missing in the file: blocks\.1\."
        r".*half a checkpoint.*Download it again",
    ),
    "a key too many": (
        edit(lambda tensors: tensors | {"extra.scale": torch.ones(1)}),
        r"(?s)does not fit.*unknown to the tower: extra\.scale\n",
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
    "no patch embedding": (
        edit(lambda tensors: {k: v for k, v in tensors.items() if "patch_embed" not in k}),
        r"is half a checkpoint, or .*: it holds no patch_embed\.proj\.weight\. Copy",
    ),
    "NaN": (
        edit(lambda tensors: {k: v * torch.nan for k, v in tensors.items()}),
        "holds NaN or infinity in .*The file is damaged",
    ),
    "quantised": (
        edit(lambda tensors: {k: v.to(torch.uint8) for k, v in tensors.items()}),
        "holds quantised weights .*torch.uint8",
    ),
    "no names": (
        lambda path: torch.save([torch.ones(2)], path),
        r"holds no tensors by their names, .*torch\.save\(model\.state_dict\(\)",
    ),
    "a web page": (
        lambda path: path.write_text("<!DOCTYPE html>"),
        r"is damaged, or not a checkpoint of torch \(it begins with b'<!DO'\)\. Copy",
    ),
    "nothing": (lambda path: path.write_bytes(b""), r"not a checkpoint of torch \(it is empty\)"),
    "no positions": (
        edit(lambda tensors: {k: v for k, v in tensors.items() if k != "pos_embed"}),
        "holds no image tower that its tensors tell: cls_token",
    ),
    "a whole program": (
        lambda path: torch.save(torch.nn.Linear(2, 2), path),
        r"was refused.*GLOBAL torch\.nn\.modules\.linear\.Linear\)\. Use the.*weights saved alone",
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
