"""Checkpoints as other programs leave them load right, or are refused with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import EncoderError
from tests.encoders.equality import disturb, draw_pixels, relative_error
from tests.encoders.test_bare_files import require_timm
from tests.encoders.test_hugging_face import (
    FAMILIES,
    edit_config,
    edit_weights,
    require_theirs,
    write_model,
    write_processing,
)

TINY = {"img_size": 64, "embed_dim": 128, "num_heads": 2, "depth": 2, "num_classes": 0}


def make_vit(**changes: Any) -> Any:
    return disturb(timm.create_model("vit_tiny_patch16_224", **(TINY | changes)))


def put_before(prefix: str, tensors: dict[str, Tensor], shift: float = 0) -> dict[str, Tensor]:
    return {prefix + name: tensor + shift for name, tensor in tensors.items()}


# --- What training programs save -----------------------------------------------------------------


def save_mae(vit: dict[str, Tensor]) -> dict[str, Any]:
    """The masked autoencoder as it is pretrained, with the decoder that draws patches."""
    width = 32
    decoder = put_before("decoder_", make_vit(embed_dim=width, num_heads=1, depth=1).state_dict())
    decoder = {k: v for k, v in decoder.items() if "blocks" in k or "norm" in k}
    sizes = {"embed.weight": (width, 128), "embed.bias": (width,), "pred.weight": (768, width)}
    sizes |= {"pred.bias": (768,), "pos_embed": (1, 17, width)}
    decoder |= {f"decoder_{name}": torch.ones(size) for name, size in sizes.items()}
    return {"model": vit | decoder | {"mask_token": torch.ones(1, 1, width)}, "epoch": 799}


def save_dino(vit: dict[str, Tensor]) -> dict[str, Any]:
    """DINO's first version, where the teacher is what its authors publish."""
    head = {"head.mlp.0.weight": torch.ones(3, 128), "head.last_layer.weight_g": torch.ones(3, 1)}
    student = put_before("module.", put_before("backbone.", vit, 1) | head)
    teacher = put_before("backbone.", vit) | head
    return {"student": student, "teacher": teacher, "dino_loss": {"center": torch.zeros(1, 3)}}


def save_beside_optimizer(vit: dict[str, Tensor]) -> dict[str, Any]:
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    head = {"head.weight": torch.ones(14, 128), "head.bias": torch.ones(14)}
    averaged = put_before("", vit, 1)
    content = {"state_dict": vit | head, "state_dict_ema": averaged, "optimizer": optimizer}
    return content | {"best_auc": 0.9, "arch": "vit_tiny"}


def save_two_of_dinov2(vit: dict[str, Tensor]) -> dict[str, Any]:
    """DINOv2's trainer keeps both towers side by side; the teacher is the encoder."""
    heads = {"student.dino_head.mlp.0.weight": torch.ones(2), "teacher.ibot_head.x": torch.ones(2)}
    both = put_before("student.backbone.", vit, 1) | put_before("teacher.backbone.", vit)
    return {"model": both | heads, "iteration": 3}


def save_twice_wrapped(vit: dict[str, Tensor]) -> dict[str, Any]:
    return {"model": put_before("_orig_mod.module.model.", vit)}


def save_moco_alone(vit: dict[str, Tensor]) -> dict[str, Any]:
    """MoCo v3's tower after its message was followed: its projector has stayed."""
    return vit | {"head.0.weight": torch.ones(4, 128), "head.1.running_mean": torch.ones(4)}


def save_in_float64(vit: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.double() for name, tensor in vit.items()}


@pytest.mark.parametrize(
    "save",
    [
        save_mae,
        save_dino,
        save_beside_optimizer,
        save_two_of_dinov2,
        save_twice_wrapped,
        save_moco_alone,
        save_in_float64,
    ],
)
def test_what_training_programs_save_is_the_tower_that_they_trained(tmp_path, save):
    model = make_vit()
    torch.save(save(dict(model.state_dict())), tmp_path / "checkpoint.pth")
    encoder = load_encoder(f"local-file:{tmp_path / 'checkpoint.pth'}", precision="fp32")
    require_timm(encoder, model, draw_pixels(2, 64))


def save_moco(vit: dict[str, Tensor]) -> dict[str, Any]:
    both = put_before("module.base_encoder.", vit) | put_before("module.momentum_encoder.", vit)
    return {"state_dict": both | {"module.predictor.0.weight": torch.ones(4, 4)}, "epoch": 3}


def change(**tensors: Any) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    return lambda vit: vit | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


UNCLEAR: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "MoCo v3": (
        save_moco,
        r"An image tower lies under module\.base_encoder\.\*, module\.momentum_encoder\.\*: save "
        r"the one that is meant alone, .*k\.removeprefix\('module\.base_encoder\.'\)",
    ),
    "a name of one's own": (
        lambda vit: {"state_dict": put_before("net.module.", vit)},
        r"names no tensors as an encoder does\. An image tower lies under net\.module\.\*: save",
    ),
    "a student alone": (
        lambda vit: {"student": vit, "optimizer": {"state": {}}},
        r"holds tensors under student, and under none of state_dict, .*teacher, module, where an "
        r"encoder is looked for\. Save .*torch\.load\('x\.pth', 'cpu'\)\['student'\], 'weights\.pt",
    ),
    "parts of a model": (
        lambda vit: {"model": {"encoder": vit, "head": {"weight": torch.ones(2)}}},
        r"holds tensors under encoder, head, .*\['model'\]\['encoder'\], 'weights\.pt'",
    ),
    "registers of timm's": (
        change(reg_token=torch.ones(1, 4, 128)),
        r"more than its tensors explain \(reg_token\)\. Put timm's config\.json beside it",
    ),
    "a distilled one": (
        change(dist_token=torch.ones(1, 1, 128)),
        r"more than its tensors explain \(dist_token\)\. Put timm's config\.json beside it",
    ),
    "a mean that is normalised": (
        lambda vit: {k.replace("norm.", "fc_norm.") if k[:5] == "norm." else k: v
                     for k, v in vit.items()},
        r"(?s)unknown to the tower: fc_norm\.bias, fc_norm\.weight.*put its config\.json beside",
    ),
    "normalised keys": (
        change(blocks__0__attn__k_norm__weight=torch.ones(64)),
        r"(?s)unknown to the tower: blocks\.0\.attn\.k_norm\.weight\n.*config\.json beside it",
    ),
    "quantised by GPTQ": (
        lambda vit: {k.replace("qkv.weight", "qkv.qweight"): torch.ones(2, dtype=torch.int32)
                     if k.endswith("qkv.weight") else v for k, v in vit.items()},
        r"holds quantised weights \(blocks\.0\.attn\.qkv\.qweight, .*Take the model before",
    ),
    "TorchXRayVision": (
        lambda _: timm.create_model("test_resnet").state_dict() | {
            "op_threshs": torch.full((18,), torch.nan)},
        r"holds no image tower that its tensors tell: .*Put the configuration of any other beside "
        r"it: .*config\.json of timm, .*come in by cxr-cache import",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("save", "message"), UNCLEAR.values(), ids=UNCLEAR.keys())
def test_what_could_mean_several_things_is_refused_with_what_to_do(tmp_path, save, message):
    torch.save(save(dict(make_vit().state_dict())), tmp_path / "x.pth")
    with pytest.raises(EncoderError, match=message):
        load_encoder(f"local-file:{tmp_path / 'x.pth'}")


def test_what_a_message_advises_for_a_prefix_works(tmp_path):
    model = make_vit()
    torch.save(save_moco(dict(model.state_dict())), tmp_path / "x.pth")
    with pytest.raises(EncoderError) as refused:
        load_encoder(f"local-file:{tmp_path / 'x.pth'}")
    advice = "torch.save(" + str(refused.value).partition("torch.save(")[2].rstrip(".")
    advice = advice.replace("'weights.pt'", "path")
    state_dict = torch.load(tmp_path / "x.pth")["state_dict"]
    exec(advice, {"torch": torch, "state_dict": state_dict, "path": tmp_path / "weights.pt"})
    encoder = load_encoder(f"local-file:{tmp_path / 'weights.pt'}", precision="fp32")
    require_timm(encoder, model, draw_pixels(2, 64))


# --- Folders -------------------------------------------------------------------------------------


def test_the_wrapper_of_transformers_is_timms_model(tmp_path):
    cfg = timm.models.get_pretrained_cfg("test_vit").to_dict()
    config = transformers.TimmWrapperConfig(architecture="test_vit", pretrained_cfg=cfg)
    model = disturb(transformers.TimmWrapperModel(config))
    model.save_pretrained(tmp_path / "m")
    encoder = load_encoder(f"local-dir:{tmp_path / 'm'}", precision="fp32")
    pixels = draw_pixels(2, 160)
    with torch.inference_mode():
        expected = model(encoder.prepare(pixels)).pooler_output
    assert relative_error(encoder.encode_with_tokens(pixels, 2)[2], expected) < 1e-5
    assert (encoder.preprocessing.mean, encoder.identity.notes) == ((0.5, 0.5, 0.5), ())


def test_a_configuration_of_timms_may_be_no_more_than_an_architecture(tmp_path):
    """What timm itself has for it is assumed, which is not always ImageNet's mean, and noted."""
    model = disturb(timm.create_model("test_vit"))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    encoder = load_encoder(f"local-dir:{tmp_path}", precision="fp32")
    pixels = draw_pixels(2, 160)
    with torch.inference_mode():
        features = model.forward_features(encoder.prepare(pixels))
        expected = model.forward_head(features, pre_logits=True)
    assert relative_error(encoder.encode(pixels)[1], expected) < 1e-5
    assert encoder.preprocessing.mean == (0.5, 0.5, 0.5)
    (note,) = encoder.identity.notes
    assert "does not say how images are prepared (pretrained_cfg)" in note
    assert "What timm has for test_vit was assumed" in note


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    write_model(tmp_path / "m", *FAMILIES["vit"])
    return tmp_path / "m"


def test_an_empty_vision_config_is_none(vit):
    expected = load_encoder(f"local-dir:{vit}").identity
    edit_config(vit, vision_config=None)
    assert load_encoder(f"local-dir:{vit}").identity == expected


def test_a_list_of_parts_may_be_named(tmp_path):
    name, theirs = write_model(tmp_path / "m", *FAMILIES["vit"])
    (tmp_path / "m" / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path / "m", max_shard_size="60KB")
    encoder = load_encoder(f"{name}/model.safetensors.index.json", precision="fp32")
    require_theirs(encoder, theirs, draw_pixels(2, 64))


def name_parts(folder: Path, part: Any) -> None:
    """List every tensor in a part of a name of one's own."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    index = {"weight_map": dict.fromkeys([*tensors, "lost.weight"], part)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_timms(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"architecture": "test_vit"} | changes))


def make_open_clips(folder: Path, **changes: Any) -> None:
    cfg = {"model_cfg": {"embed_dim": 8, "vision_cfg": {"image_size": 64}}}
    (folder / "open_clip_config.json").write_text(json.dumps(cfg | changes))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a part that is nowhere": (
        lambda folder: name_parts(folder, "elsewhere.safetensors"),
        r"lacks elsewhere\.safetensors, a part of the weights that model\.safetensors\.index\.json",
    ),
    "parts that are numbers": (
        lambda folder: name_parts(folder, 1),
        r"index\.json does not list the parts of a checkpoint",
    ),
    "weights in eight bits": (
        lambda folder: edit_weights(
            folder, lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}
        ),
        r"holds quantised weights .*float8_e4m3fn",
    ),
    "weights under a name of one's own": (
        lambda folder: edit_weights(folder, lambda t: put_before("model.encoder.vit.", t)),
        r"holds no image tower, but .*config\.json asks for a vit\. An image tower lies under "
        r"model\.encoder\.vit\.\*: save the one that is meant alone",
    ),
    "a model of language that sees": (
        lambda folder: edit_config(
            folder, model_type="llava", vision_config={"model_type": "clip_vision_model"}
        ),
        r"model_type 'llava', which .*Its image tower is a clip_vision_model: load the model by "
        r"transformers, and save that part alone by its save_pretrained",
    ),
    "a list for a model_type": (
        lambda folder: edit_config(folder, model_type=["vit"]),
        r"has the model_type \['vit'\], which is no image tower that is known",
    ),
    "a word for a vision_config": (
        lambda folder: edit_config(folder, vision_config="vit"),
        r"config\.json has the vision_config 'vit', where the settings of the image tower belong",
    ),
    "no patch": (
        lambda folder: edit_config(folder, patch_size=0),
        r"config\.json has patch_size 0, where a whole number of at least 1 belongs",
    ),
    "no heads": (
        lambda folder: edit_config(folder, num_attention_heads=0),
        r"config\.json has num_attention_heads 0, where a whole number of at least 1 belongs",
    ),
    "a size that is no whole number": (
        lambda folder: write_processing(folder, size={"height": 64.0, "width": 64.0}),
        r"preprocessor_config\.json asks for 64\.0 x 64\.0 pixels, where whole numbers belong",
    ),
    "timm's arguments in a list": (
        lambda folder: make_timms(folder, model_args=[1]),
        r"config\.json has a pretrained_cfg or model_args that is no table of settings",
    ),
    "open_clip's pixels in a list": (
        lambda folder: make_open_clips(folder, preprocess_cfg=[1]),
        r"open_clip_config\.json has no model_cfg, or none that is a table, or such a preproc",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_foreign_folders_are_refused_in_a_sentence(vit, damage, message):
    damage(vit)
    with pytest.raises(EncoderError, match=message):
        load_encoder(f"local-dir:{vit}")
