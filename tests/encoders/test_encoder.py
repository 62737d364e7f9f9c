"""An encoder is open_clip's own image tower, whatever its file and wherever it is split."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import open_clip
import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from open_clip.model import _build_vision_tower
from safetensors.torch import load_file, save_file
from torch import nn

from cxr_cache.common import devices
from cxr_cache.common.devices import resolve_device, resolve_precision
from cxr_cache.datasets.images import read_image
from cxr_cache.datasets.preprocessing import Preprocessing, normalise
from cxr_cache.encoders import timm_vit
from cxr_cache.encoders.encoder import Encoder, trainable_parameter_names
from cxr_cache.encoders.encoding import cosines
from cxr_cache.encoders.identity import EncoderIdentity
from cxr_cache.encoders.loading import FAMILIES, load_encoder
from cxr_cache.encoders.sources import Family, Source
from cxr_cache.encoders.weights import WithoutDrawing
from cxr_cache.errors import ConfigError, EncoderError
from scripts.write_random_biomedclip import CONFIG, write_biomedclip_folder, write_checkpoint
from tests.encoders.equality import draw_pixels, relative_error

TINY_TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
TINY_VIT = {"image_size": 64, "patch_size": 16, "width": 64, "head_width": 16, "layers": 3}
TIMM_VIT = {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 160}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], config: Any) -> str:
    """A local-dir: with any configuration; gives its name as an encoder."""
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def write_open_clip_model(folder: Path, vision_cfg: dict[str, Any], **preprocess_cfg: Any) -> str:
    """A small model that open_clip itself builds, saves and can load again, text tower and all."""
    torch.manual_seed(3)
    model_cfg = {"embed_dim": 24, "vision_cfg": vision_cfg, "text_cfg": TINY_TEXT}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    model = open_clip.CLIP(**model_cfg)
    return write_folder(folder, model.state_dict(), config)


@pytest.fixture(scope="session")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """BiomedCLIP's layout in both formats: full-size image tower, a text tower cut short."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("safetensors", "bin")}
    tensors = write_biomedclip_folder(
        folders["safetensors"], seed=1, n_text_layers=1, vocabulary_size=128
    )
    write_checkpoint(folders["bin"], tensors, "bin")
    return folders


@pytest.fixture(scope="session")
def full_size_encoder(full_size: dict[str, Path]) -> Encoder:
    return load_encoder(f"local-dir:{full_size['safetensors']}", precision="fp32")


@pytest.fixture(scope="session")
def tiny() -> Encoder:
    return load_encoder("random:test_vit:5", precision="fp32")


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """BiomedCLIP's kind of folder around a small timm tower."""
    write_open_clip_model(tmp_path / "model", TIMM_VIT)
    return tmp_path / "model"


# --- Equal to open_clip --------------------------------------------------------------------------


def open_clips_tower(folder: Path) -> torch.nn.Module:
    tensors = load_file(folder / "open_clip_model.safetensors")
    vision = {k.removeprefix("visual."): v for k, v in tensors.items() if k.startswith("visual.")}
    with torch.device("meta"):  # drawing initial weights takes seconds
        tower = _build_vision_tower(512, CONFIG["model_cfg"]["vision_cfg"])
    tower.load_state_dict(vision, assign=True)
    return tower.eval()


@pytest.mark.slow
def test_full_size_embeddings_equal_open_clips_own_at_every_split(full_size, full_size_encoder):
    """The reason to trust a store: what is cached is what BiomedCLIP computes."""
    tower = open_clips_tower(full_size["safetensors"])
    pixels = draw_pixels(2, 224)
    normalised = normalise(pixels, full_size_encoder.preprocessing)
    with torch.inference_mode():
        expected_pooled = tower.trunk(normalised)
        expected = tower.head(expected_pooled)

    pooled, embedding = full_size_encoder.encode(pixels)

    assert pooled.shape == (2, 768)
    assert embedding.shape == (2, 512)
    assert relative_error(pooled, expected_pooled) < 1e-5
    assert relative_error(embedding, expected) < 1e-5
    assert relative_error(embedding[:1], expected[1:]) > 1e-2, "two images look alike"
    for n_unfrozen in (2, 3, 12):
        with torch.inference_mode():
            tokens = full_size_encoder.stem(normalised, n_unfrozen)
            _, split_embedding = full_size_encoder.tail(tokens, n_unfrozen)
        assert tokens.shape == (2, 197, 768)
        assert relative_error(split_embedding, expected) < 1e-5


def test_identity_does_not_depend_on_the_kind_of_file(full_size, full_size_encoder):
    """The same tensors in a pickle are the same encoder, and the text tower does not count."""
    from_bin = load_encoder(f"local-dir:{full_size['bin']}", precision="fp32")

    assert from_bin.identity.name != full_size_encoder.identity.name
    assert from_bin.identity.weights_sha256 == full_size_encoder.identity.weights_sha256
    assert from_bin.identity.differences(full_size_encoder.identity) == {}
    pixels = draw_pixels(1, 224, seed=8)
    assert torch.equal(from_bin.encode(pixels)[1], full_size_encoder.encode(pixels)[1])


def test_the_last_two_blocks_of_biomedclip_hold_14_million_parameters(full_size_encoder):
    parameters = dict(full_size_encoder.named_parameters())
    names = trainable_parameter_names(full_size_encoder, 2)

    assert sum(parameters[name].numel() for name in names) == 14_175_744
    assert sum(parameter.numel() for parameter in parameters.values()) == 86_191_872
    assert {name.split(".")[3] for name in names} == {"10", "11"}
    assert not any(parameter.requires_grad for parameter in parameters.values())


def test_identity_of_the_full_size_tower(full_size_encoder):
    identity = full_size_encoder.identity
    assert (identity.n_blocks, identity.n_tokens, identity.token_width) == (12, 197, 768)
    assert (identity.pooled_width, identity.embedding_width) == (768, 512)
    assert identity.preprocessing["image_size_px"] == 224
    assert identity.preprocessing["mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert identity.preprocessing["std"] == [0.26862954, 0.26130258, 0.27577711]
    assert not identity.is_random


@pytest.mark.parametrize(
    "vision_cfg",
    [
        TINY_VIT,
        TINY_VIT | {"ls_init_value": 0.5, "final_ln_after_pool": True},
        TINY_VIT | {"pool_type": "avg"},
        TINY_VIT | {"qk_norm": True},
        TINY_VIT | {"attentional_pool": True, "attn_pooler_heads": 4},
        TIMM_VIT,
        TIMM_VIT | {"timm_proj": "mlp"},
        TIMM_VIT | {"timm_proj": "", "timm_pool": "token"},
        TIMM_VIT | {"timm_model_name": "test_vit2"},
        TIMM_VIT | {"timm_model_name": "test_vit3"},
        TIMM_VIT | {"timm_model_name": "test_resnet", "timm_pool": "avg"},
        TIMM_VIT | {"timm_model_name": "test_convnext", "timm_pool": "abs_attn", "timm_proj": ""},
        {"image_size": 64, "width": 8, "layers": [1, 1, 1, 1]},
    ],
    ids=lambda cfg: "-".join(str(value) for value in cfg.values()),
)
def test_every_kind_of_tower_encodes_as_open_clip_does(tmp_path, vision_cfg):
    """open_clip's own loading, of both towers, is the reference."""
    name = write_open_clip_model(tmp_path / "model", vision_cfg)
    model = open_clip.create_model(name).eval()
    encoder = load_encoder(name, precision="fp32")
    pixels = draw_pixels(2, encoder.preprocessing.image_size_px)
    normalised = normalise(pixels, encoder.preprocessing)
    with torch.inference_mode():
        expected = model.encode_image(normalised)

    assert relative_error(encoder.encode(pixels)[1], expected) < 1e-5
    if encoder.is_splittable:
        for n_unfrozen in range(1, encoder.identity.n_blocks + 1):
            _, embedding = encoder.tail(encoder.stem(normalised, n_unfrozen), n_unfrozen)
            assert relative_error(embedding, expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "reads_class_token_only"),
    [
        ("vit_tiny_patch16_224", True),
        ("test_vit", True),
        ("test_vit2", False),  # average over patches, one register, layer scale
        ("test_vit3", False),  # attention pooling
        ("vit_xsmall_patch16_clip_224", True),  # norm before the blocks
    ],
)
def test_timm_towers_split_at_any_block(name, reads_class_token_only):
    encoder = load_encoder(f"random:{name}", precision="fp32")
    pixels = draw_pixels(2, encoder.preprocessing.image_size_px)
    normalised = normalise(pixels, encoder.preprocessing)
    with torch.inference_mode():
        expected = encoder.visual(normalised)

    assert encoder._split.reads_class_token_only == reads_class_token_only
    for n_unfrozen in (1, 2, encoder.identity.n_blocks):
        tokens, _, embedding = encoder.encode_with_tokens(pixels, n_unfrozen)
        assert tokens.shape[1:] == (encoder.identity.n_tokens, encoder.identity.token_width)
        assert relative_error(embedding, expected) < 1e-5


@pytest.mark.parametrize("vision_cfg", [TINY_VIT, TIMM_VIT], ids=["open_clip", "timm"])
def test_the_class_token_block_gives_the_full_blocks_gradients(tmp_path, vision_cfg):
    """Fine-tuning through the short last block must train what the long one would."""
    encoder = load_encoder(write_open_clip_model(tmp_path / "m", vision_cfg), precision="fp32")
    parameters = dict(encoder.named_parameters())
    trainable = [
        parameters[name].requires_grad_() for name in trainable_parameter_names(encoder, 2)
    ]
    pixels = normalise(draw_pixels(2, encoder.preprocessing.image_size_px), encoder.preprocessing)
    tokens = encoder.stem(pixels, 2)
    gradients = {}
    for encoder._split.reads_class_token_only in (True, False):
        loss = encoder.tail(tokens, 2)[1].square().sum()
        gradients[encoder._split.reads_class_token_only] = torch.autograd.grad(loss, trainable)

    for short, long in zip(gradients[True], gradients[False], strict=True):
        torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5 * float(long.abs().max()))


def test_a_tower_without_blocks_encodes_but_does_not_split():
    encoder = load_encoder("random:test_resnet", precision="fp32")
    pooled, embedding = encoder.encode(draw_pixels(1, 160))

    assert (pooled.shape, embedding.shape) == ((1, 96), (1, 512))
    assert encoder.identity.n_blocks is None
    with pytest.raises(EncoderError, match=r"random:test_resnet.*cannot be split.*ResNet"):
        encoder.stem(torch.zeros(1, 3, 160, 160), 1)
    with pytest.raises(EncoderError, match="cannot be split"):
        trainable_parameter_names(encoder, 1)


@pytest.mark.parametrize("n_unfrozen", [0, 7, -1])
def test_only_blocks_that_exist_can_be_unfrozen(tiny, n_unfrozen):
    with pytest.raises(EncoderError, match=f"has 6 blocks.* {n_unfrozen} .*from 1 to 6"):
        tiny.stem(torch.zeros(1, 3, 160, 160), n_unfrozen)


# --- Preprocessing, precision, device ------------------------------------------------------------


def test_preprocessing_is_what_open_clip_would_use(tmp_path):
    name = write_open_clip_model(
        tmp_path / "m", TIMM_VIT, mean=0.5, std=[0.1, 0.2, 0.3], interpolation="bilinear"
    )
    expected = open_clip.create_model(name).visual.preprocess_cfg

    preprocessing = load_encoder(name).preprocessing

    assert (preprocessing.image_size_px,) * 2 == expected["size"]
    assert preprocessing.mean == (0.5, 0.5, 0.5)
    assert list(preprocessing.std) == expected["std"]
    assert (preprocessing.interpolation, preprocessing.resize) == ("bilinear", "crop")
    assert expected["resize_mode"] == "shortest"


def test_options_override_the_configuration(tiny_folder):
    encoder = load_encoder(
        f"local-dir:{tiny_folder}", resize="squash", normalize="imagenet", bits_stored=12
    )
    assert encoder.preprocessing == Preprocessing(
        image_size_px=160,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bicubic",
        resize="squash",
        bits_stored=12,
    )
    assert encoder.identity.preprocessing == encoder.preprocessing.to_dict()


def test_a_way_of_resizing_that_is_not_offered_is_not_replaced_silently(tmp_path):
    name = write_open_clip_model(tmp_path / "m", TIMM_VIT, resize_mode="stretch")
    with pytest.raises(EncoderError, match=r"resize_mode 'stretch'.*--resize squash"):
        load_encoder(name)
    assert load_encoder(name, resize="squash").preprocessing.resize == "squash"
    name = write_open_clip_model(tmp_path / "p", TIMM_VIT, resize_mode="longest")
    assert load_encoder(name).preprocessing.resize == "pad"


def test_lower_precision_is_another_identity_and_still_gives_float32(tiny):
    pixels = draw_pixels(2, 160)
    bf16 = load_encoder("random:test_vit:5", precision="bf16")

    pooled, embedding = bf16.encode(pixels)

    assert pooled.dtype == embedding.dtype == torch.float32
    assert bf16.stem(torch.zeros(1, 3, 160, 160), 2).dtype == torch.float32
    assert bf16.identity.differences(tiny.identity) == {"precision": ("bf16", "fp32")}
    assert 1e-5 < relative_error(embedding, tiny.encode(pixels)[1]) < 3e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("vision_cfg", [TINY_VIT, TIMM_VIT], ids=["open_clip", "timm"])
def test_weights_cast_beforehand_give_the_same_features(tmp_path, vision_cfg, precision):
    """The same bits, but where blocks of timm run in bf16 by other products, to its rounding."""
    encoder = load_encoder(write_open_clip_model(tmp_path / "m", vision_cfg), precision=precision)
    pixels = draw_pixels(2, encoder.preprocessing.image_size_px)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    expected = encoder.encode_with_tokens(pixels, 2)
    with encoder.cast_weights():
        given = encoder.encode_with_tokens(pixels, 2)
        dtypes = {p.dtype for p in encoder.visual.parameters()}
    is_quick = precision == "bf16" and vision_cfg is TIMM_VIT and timm_vit.packs_bf16()
    for ours, theirs in zip(given, expected, strict=True):
        assert torch.equal(ours, theirs) != is_quick
        assert relative_error(ours, theirs) < 1e-2
    assert len(dtypes) == (1 if precision == "fp32" else 2)
    after = encoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


@pytest.fixture(params=["random", "real"])
def pretrained(request, full_size) -> tuple[str, torch.Tensor]:
    """BiomedCLIP's layout at full size with noise on noise, and DINOv2-small on radiographs."""
    if request.param == "random":
        return f"local-dir:{full_size['safetensors']}", draw_pixels(2, 224)
    folder = request.getfixturevalue("shared_data")
    paths = sorted((folder / "indiana_256").rglob("*.jpg"))[::1600]
    name = f"local-dir:{folder.parent / 'encoders' / 'dinov2_small'}"
    read = load_encoder(name, precision="fp32").preprocessing
    pixels = [read_image(path.parent, path.name, read).pixels for path in paths]
    return name, torch.from_numpy(np.stack(pixels))


@pytest.mark.slow
def test_bf16_keeps_the_directions_of_fp32(pretrained):
    """As autocast computes it, and as an extraction does."""
    name, pixels = pretrained
    exact, bf16 = (load_encoder(name, precision=precision) for precision in ("fp32", "bf16"))
    expected = exact.encode_with_tokens(pixels, 2)
    with bf16.cast_weights():
        given = bf16.encode_with_tokens(pixels, 2)
    for tokens, _, embedding in (given, bf16.encode_with_tokens(pixels, 2)):
        assert cosines(embedding.numpy(), expected[2].numpy()).min() >= 0.9999
        assert np.median(cosines(tokens.numpy(), expected[0].numpy())) >= 0.9999


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_bf16_keeps_its_directions_when_compiled(tiny):
    bf16, pixels = load_encoder("random:test_vit:5", precision="bf16"), draw_pixels(2, 160)
    expected = tiny.encode_with_tokens(pixels, 2)
    with bf16.cast_weights():
        assert bf16.compile_pass(2, 2) > 0
        given = bf16.encode_with_tokens(pixels, 2)
        bf16.drop_compiled()
    for ours, theirs in zip(given, expected, strict=True):
        assert cosines(ours.numpy(), theirs.numpy()).min() >= 0.9999


@pytest.mark.skipif(not timm_vit.packs_bf16(), reason="oneDNN has no bf16 on this processor")
@pytest.mark.parametrize("act_layer", ["gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("options", [{}, {"init_values": 0.5}, {"qkv_bias": False}], ids=str)
def test_blocks_in_bf16_are_those_of_timm(options, act_layer):
    torch.manual_seed(0)
    block = timm.models.vision_transformer.Block(
        64, 4, act_layer=timm.layers.get_act_layer(act_layer), **{"qkv_bias": True} | options
    )
    block.eval().requires_grad_(False)
    tokens = torch.randn(2, 17, 64)
    before = tokens.clone()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = block(tokens)
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
        assert timm_vit._may_be_quick(block)
        given = timm_vit._QuickBlock(block)(tokens)
    assert given.dtype == torch.float32
    assert torch.equal(tokens, before)
    assert relative_error(given - tokens, expected - tokens) < 1e-2
    with torch.inference_mode():
        exact = block.float()(tokens)
    assert cosines(given.numpy(), exact.numpy()).min() >= 0.9999


def test_auto_precision_asks_the_processor(monkeypatch):
    cpu = torch.device("cpu")
    for is_native, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(devices, "_has_native_bf16", lambda device, n=is_native: n)
        assert resolve_precision("auto", cpu) == expected
        assert resolve_precision("fp16", cpu) == "fp16"


def test_a_device_that_is_not_there_is_named():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cuda", "mps", "cpu")
    for device in ("cuda:99", "toaster", "meta"):
        with pytest.raises(EncoderError, match=f"no device '{device}'.*cpu"):
            resolve_device(device)


@pytest.mark.parametrize(
    ("option", "value"),
    [("precision", "int8"), ("resize", "stretch"), ("normalize", "none"), ("bits_stored", 99)],
)
def test_options_out_of_range_name_what_was_given(option, value):
    with pytest.raises(ConfigError, match=f"{option} is '?{value}"):
        load_encoder("random:test_vit", **{option: value})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_a_gpu_agrees_with_the_processor(full_size, full_size_encoder, precision, tolerance):
    name = f"local-dir:{full_size['safetensors']}"
    on_gpu = load_encoder(name, device="cuda", precision=precision)
    pixels = draw_pixels(4, 224)
    _, embedding = on_gpu.encode(pixels)
    assert embedding.device.type == "cuda"
    assert relative_error(embedding.cpu(), full_size_encoder.encode(pixels)[1]) < tolerance


# --- Identity ------------------------------------------------------------------------------------


def test_identity_survives_json(tiny):
    values = json.loads(json.dumps(tiny.identity.to_dict()))
    assert EncoderIdentity.from_dict(values) == tiny.identity
    assert Preprocessing.from_dict(values["preprocessing"]) == tiny.preprocessing
    with pytest.raises(EncoderError, match="weights_sha256"):
        EncoderIdentity.from_dict({"name": "half"})


def test_differences_are_what_makes_features_incomparable(tiny):
    mine = tiny.identity
    renamed = replace(mine, name="local-dir:/elsewhere", revision="abc", is_random=False)
    squashed = replace(mine, preprocessing={**mine.preprocessing, "resize": "squash"})
    other_weights = replace(mine, name="other", weights_sha256="00")

    assert mine.differences(renamed) == {}
    assert mine.differences(squashed) == {"resize": ("crop", "squash")}
    assert mine.differences(other_weights) == {
        "name": ("random:test_vit:5", "other"),
        "weights_sha256": (mine.weights_sha256, "00"),
    }


def test_random_encoders_are_labelled_reproducible_and_leave_randomness_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)

    first, again, other = (
        load_encoder(f"random:test_vit{seed}").identity for seed in ("", ":0", ":1")
    )

    assert torch.equal(torch.rand(3), expected)
    assert first == again
    assert first.name == "random:test_vit:0"
    assert first.is_random
    assert first.weights_sha256 != other.weights_sha256


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224", "test_vit2"])
def test_random_features_tell_images_apart(name):
    """Embeddings that all point one way would make a demonstration of nothing."""
    encoder = load_encoder(f"random:{name}", precision="fp32")
    _, embedding = encoder.encode(draw_pixels(8, encoder.preprocessing.image_size_px))
    unit = torch.nn.functional.normalize(embedding, dim=1)

    assert embedding.shape == (8, 512)
    assert embedding.std(dim=0).mean() > 0.1
    assert (unit @ unit.T).triu(1).max() < 0.999


# --- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ftp:somewhere", "'ftp:somewhere' names no encoder.*hf-hub:ORG/REPO"),
        ("local-dir:", "names no encoder"),
        ("", "'' names no encoder"),
        ("microsoft/BiomedCLIP", "no architecture.*hf-hub:ORG/REPO"),
        ("ViT-B-3", "no architecture 'ViT-B-3'.*Did you mean ViT-B-32"),
        ("ViT-B-32", "does not say which weights.*ViT-B-32/laion2b_s34b_b79k"),
        ("ViT-B-32/nonsense", "does not say which weights.*ViT-B-32/laion2b_s34b_b79k"),
        ("ViT-B/32/openai", "another activation.*Use ViT-B-32-quickgelu/openai"),
        ("random:vit_tinny_patch16_224", "Did you mean vit_tiny_patch16_224"),
        (
            "random:test_vit?img_size=7",
            r"7 x 7 .*patches of 16 x 16 .*not fill: .*, \?img_size=16\.",
        ),
        (
            "random:test_vit?img_size=150",
            r"150 x 150 pixels.* nearest size that they do, \?img_size=144 or \?img_size=160\.",
        ),
        ("random:test_vit?img_size=", r"'\?img_size=' in .* is not of the form \?img_size=224"),
        (
            "random:test_vit?file=x.pt",
            r"\?file= in random.* goes with local-dir: and hf-hub:",
        ),
        ("random:test_vit:x", "seed in random:test_vit:x"),
        ("random:hf-hub:org/repo", "no architecture 'hf-hub'"),
    ],
)
def test_a_name_that_means_nothing_says_what_would(name, message):
    with pytest.raises(EncoderError, match=message):
        load_encoder(name)


def test_the_name_of_a_folder_alone_says_what_to_put_before_it(tiny_folder, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    with pytest.raises(EncoderError, match=f"What lies here is named local-dir:{tiny_folder.name}"):
        load_encoder(tiny_folder.name)


def test_open_clips_own_names_load_published_weights(tmp_path, monkeypatch):
    """An architecture and a tag, as open_clip lists them; the tag's file stands for a download."""
    name = write_open_clip_model(tmp_path / "m", TINY_VIT)
    config = json.loads((tmp_path / "m" / "open_clip_config.json").read_text())
    tag = {"file": str(tmp_path / "m" / "open_clip_model.safetensors"), "mean": [0.5, 0.5, 0.5]}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-mini", config["model_cfg"])
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-mini", {"our_tag": tag})

    encoder = load_encoder("ViT-mini/our_tag")

    assert encoder.identity.name == "ViT-mini/our_tag"
    assert load_encoder("ViT-mini").identity == encoder.identity  # there is only one tag
    differences = encoder.identity.differences(load_encoder(name).identity)
    assert set(differences) == {"mean"}


# --- Files that cannot be used -------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"] |= changes
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Any) -> None:
    path = folder / "open_clip_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def use_pickle(folder: Path, content: Any) -> Path:
    """Replace the weights by a file of torch's own kind."""
    (folder / "open_clip_model.safetensors").unlink()
    path = folder / "open_clip_pytorch_model.bin"
    torch.save(content, path)
    return path


QKV = "visual.trunk.blocks.0.attn.qkv.weight"
DAMAGE = {
    "no config": (
        lambda folder: (folder / "open_clip_config.json").unlink(),
        "has no open_clip_config.json.*Copy it",
    ),
    "config is no JSON": (
        lambda folder: (folder / "open_clip_config.json").write_text("{"),
        "open_clip_config.json cannot be read as JSON.*again",
    ),
    "config is a list": (
        lambda folder: (folder / "open_clip_config.json").write_text("[]"),
        "open_clip_config.json has no model_cfg",
    ),
    "config lacks parts": (
        lambda folder: (folder / "open_clip_config.json").write_text('{"model_cfg": {}}'),
        "open_clip_config.json does not describe an open_clip model.*vision_cfg",
    ),
    "config of another program": (
        lambda folder: edit_config(folder, hidden_size=7),
        "open_clip_config.json does not describe an open_clip model.*hidden_size",
    ),
    "unknown architecture": (
        lambda folder: edit_config(folder, timm_model_name="test_vitt"),
        "'test_vitt', which timm .* does not have. Did you mean test_vit",
    ),
    "architecture to be downloaded": (
        lambda folder: edit_config(folder, timm_model_name="hf-hub:someone/something"),
        "'hf-hub:someone/something', which timm .* does not have",
    ),
    "architecture that cannot be built": (
        lambda folder: edit_config(folder, timm_proj="diagonal"),
        "image tower that .*open_clip_config.json describes cannot be built",
    ),
    "image size of another tower": (
        lambda folder: edit_config(folder, image_size=100),
        "cannot encode an image of 100 x 100 pixels",
    ),
    "no weights": (
        lambda folder: (folder / "open_clip_model.safetensors").unlink(),
        "has no weights. Put one of these.*open_clip_model.safetensors",
    ),
    "truncated safetensors": (
        lambda folder: cut(folder / "open_clip_model.safetensors"),
        "open_clip_model.safetensors is damaged.*again",
    ),
    "empty safetensors": (
        lambda folder: (folder / "open_clip_model.safetensors").write_bytes(b""),
        "open_clip_model.safetensors is damaged.*again",
    ),
    "truncated pickle": (
        lambda folder: cut(use_pickle(folder, {"visual.a": torch.zeros(999)})),
        "open_clip_pytorch_model.bin (is damaged|was refused).*again",
    ),
    "empty pickle": (
        lambda folder: use_pickle(folder, {}).write_bytes(b""),
        "open_clip_pytorch_model.bin is damaged.*again",
    ),
    "garbage pickle": (
        lambda folder: use_pickle(folder, {}).write_bytes(b"radiograph" * 99),
        "open_clip_pytorch_model.bin (is damaged|was refused).*again",
    ),
    "pickle of something else": (
        lambda folder: use_pickle(folder, [1, 2, 3]),
        r"open_clip_pytorch_model.bin holds no tensor named visual\.",
    ),
    "missing tensor": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.pop(QKV)),
        r"(?s)does not fit.*missing in the file: visual.trunk.blocks.0.attn.qkv.weight\n.*same mod",
    ),
    "tensor too many": (
        lambda folder: edit_weights(folder, lambda t: t.update({"visual.extra": torch.ones(1)})),
        "(?s)does not fit.*unknown to the tower: visual.extra\n",
    ),
    "wrong shape": (
        lambda folder: edit_weights(folder, lambda t: t.update({QKV: torch.ones(2, 3)})),
        r"(?s)does not fit.*shape: visual.*qkv.weight \(\(2, 3\) in the file, \(192, 64\) in",
    ),
    "NaN": (
        lambda folder: edit_weights(folder, lambda t: t[QKV].fill_(torch.nan)),
        "holds NaN or infinity in visual.trunk.blocks.0.attn.qkv.weight.*damaged",
    ),
    "quantised": (
        lambda folder: edit_weights(folder, lambda t: t.update({QKV: t[QKV].to(torch.int8)})),
        "holds quantised weights .visual.trunk.blocks.0.attn.qkv.weight: torch.int8.",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_an_unusable_folder_names_the_file_and_the_remedy(tiny_folder, damage, message):
    damage(tiny_folder)
    with pytest.raises(EncoderError, match=message):
        load_encoder(f"local-dir:{tiny_folder}")


def test_a_tower_that_pools_nothing_gives_no_embedding(tmp_path):
    name = write_open_clip_model(tmp_path / "m", TIMM_VIT | {"timm_proj": ""})
    with pytest.raises(EncoderError, match=r"shape \(1, 101, 24\) .*not one embedding.*must pool"):
        load_encoder(name)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(EncoderError, match=r"nowhere is not a folder.*open_clip_config\.json"):
        load_encoder(f"local-dir:{tmp_path / 'nowhere'}")


def test_a_tower_of_timm_takes_images_of_another_size_as_open_clip_has_it(tiny_folder):
    encoder = load_encoder(f"local-dir:{tiny_folder}?img_size=192", precision="fp32")
    theirs = open_clip.create_model(f"local-dir:{tiny_folder}").visual.eval()
    theirs.set_input_size(192)
    pixels = draw_pixels(2, 192)
    with torch.inference_mode():
        expected = theirs(encoder.prepare(pixels))
    for n_unfrozen in (1, encoder.identity.n_blocks):
        embedding = encoder.encode_with_tokens(pixels, n_unfrozen)[2]
        assert relative_error(embedding, expected) < 1e-5
    assert encoder.identity.positions_from_px == 160


@pytest.mark.parametrize("wrap", ["module.", "state_dict"])
def test_checkpoints_of_training_runs_load_as_open_clip_loads_them(tiny_folder, wrap):
    expected = load_encoder(f"local-dir:{tiny_folder}").identity
    tensors = load_file(tiny_folder / "open_clip_model.safetensors")
    named = {f"module.{name}": tensor for name, tensor in tensors.items()}
    use_pickle(tiny_folder, {"epoch": 3, "state_dict": named} if wrap == "state_dict" else named)

    assert load_encoder(f"local-dir:{tiny_folder}").identity == expected


class LeavesATrace:
    """What an attacker would put into a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused_unrun(tiny_folder, tmp_path, writer):
    trace = tmp_path / "trace"
    content = {"visual.trunk.norm.weight": torch.ones(64), "more": LeavesATrace(trace)}
    path = use_pickle(tiny_folder, content)
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))

    message = r"model\.bin was refused.*could run code.*\(.*GLOBAL.*\)\. Use the .*safetensors"
    with pytest.raises(EncoderError, match=message) as refusal:
        load_encoder(f"local-dir:{tiny_folder}")
    assert "weights_only" not in str(refusal.value)  # torch's advice would run it
    assert not trace.exists()


# --- The hub -------------------------------------------------------------------------------------


def write_hub_cache(hub: Path, repo: str, model: Path, files: tuple[str, ...]) -> None:
    """The cache's layout: blobs, snapshots that link to them, and a ref to the commit."""
    root = hub / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for i, file in enumerate(files):
        (root / "blobs" / str(i)).write_bytes((model / file).read_bytes())
        (snapshot / file).symlink_to(root / "blobs" / str(i))


def bare_vit() -> nn.Module:
    """A tower of a kind that loads without a configuration."""
    sizes = {"img_size": 32, "embed_dim": 64, "depth": 1, "num_heads": 1, "num_classes": 0}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **sizes)
    return model


ENCODE_OFFLINE = """
import json, sys
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import EncoderError
for name in sys.argv[1:]:
    try:
        print(json.dumps(load_encoder(name).identity.to_dict()))
    except EncoderError as error:
        print(json.dumps(str(error)))
"""


def test_a_cached_repository_loads_offline_and_one_that_is_not_says_what_to_do(
    tiny_folder, tmp_path
):
    """In a process of its own: the hub's variables are read when its library is imported."""
    files = ("open_clip_config.json", "open_clip_model.safetensors")
    write_hub_cache(tmp_path / "home" / "hub", "org/whole", tiny_folder, files)
    write_hub_cache(tmp_path / "home" / "hub", "org/half", tiny_folder, files[:1])
    torch.save(bare_vit().state_dict(), tiny_folder / "vit.pth")
    write_hub_cache(tmp_path / "home" / "hub", "org/bare", tiny_folder, ("vit.pth",))
    names = ("org/whole", "org/half", "org/none", "org/bare")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)

    finished = subprocess.run(
        [sys.executable, "-c", ENCODE_OFFLINE, *(f"hf-hub:{name}" for name in names)],
        env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert finished.returncode == 0, finished.stderr
    identity, half, none, bare = map(json.loads, finished.stdout.splitlines())
    assert bare["name"] == "hf-hub:org/bare?file=vit.pth"
    local = load_encoder(f"local-dir:{tiny_folder}").identity
    assert EncoderIdentity.from_dict(identity).differences(local) == {}
    assert (identity["name"], identity["revision"]) == ("hf-hub:org/whole", COMMIT)
    for message, missing in ((half, "model.safetensors"), (none, "open_clip_config.json")):
        for part in (missing, "HF_HUB_OFFLINE is set", "HF_HOME", "local-dir:PATH", str(tmp_path)):
            assert part in message
    assert "Traceback" not in finished.stderr


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache in this process."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_revision_can_be_named(hub, tiny_folder):
    files = ("open_clip_config.json", "open_clip_model.safetensors")
    write_hub_cache(hub, "org/whole", tiny_folder, files)
    (hub / "models--org--whole" / "refs" / "main").unlink()

    assert load_encoder(f"hf-hub:org/whole@{COMMIT}").identity.revision == COMMIT


def test_without_a_network_the_hub_is_asked_once(hub, monkeypatch):
    asked = []

    def refuse(url, **_):
        asked.append(url)
        raise RuntimeError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    with pytest.raises(
        EncoderError, match=r"(?s)config\.json of org/repo is not in .*Name or service.*HF_HOME"
    ):
        load_encoder("hf-hub:org/repo")
    assert len(asked) == 1


def test_the_hub_is_asked_for_one_file_after_the_other(hub, tiny_folder, monkeypatch):
    """BiomedCLIP had no safetensors file for years."""
    use_pickle(tiny_folder, load_file(tiny_folder / "open_clip_model.safetensors"))
    snapshot = tiny_folder.rename(tiny_folder.parent / COMMIT)

    def ask(url, **_):
        if not (snapshot / Path(url).name).is_file():
            raise EntryNotFoundError(url)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, file, revision: str(snapshot / file)
    )
    identity = load_encoder("hf-hub:org/repo").identity

    assert identity.revision == COMMIT
    assert identity.differences(load_encoder(f"local-dir:{snapshot}").identity) == {}
    (snapshot / "open_clip_config.json").unlink()
    with pytest.raises(EncoderError, match=r"org/repo on .* has none of open_clip_config\.json"):
        load_encoder("hf-hub:org/repo")


def test_a_repository_needs_a_name_of_the_right_form(hub):
    with pytest.raises(EncoderError, match="'a/b/c' is not the name of a repository"):
        load_encoder("hf-hub:a/b/c")


# --- Full size, all of it ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_the_whole_of_biomedclips_layout_loads(tmp_path, file_format, full_size_encoder):
    """With the 109 million parameters of the text tower, which are there but not read."""
    tensors = write_biomedclip_folder(tmp_path, file_format=file_format, seed=1)
    assert round(sum(tensor.numel() for tensor in tensors.values()) / 1e6, 1) == 195.9

    encoder = load_encoder(f"local-dir:{tmp_path}", precision="fp32")

    assert sum(parameter.numel() for parameter in encoder.parameters()) == 86_191_872
    assert encoder.identity.differences(full_size_encoder.identity) == {}


@pytest.mark.slow
def test_open_clips_own_vision_transformer_at_full_size(tmp_path):
    model_cfg = open_clip.get_model_config("ViT-B-32")
    model = open_clip.CLIP(**model_cfg).eval()
    name = write_folder(tmp_path / "m", model.state_dict(), {"model_cfg": model_cfg})
    encoder = load_encoder(name, precision="fp32")
    pixels = draw_pixels(2, 224)
    with torch.inference_mode():
        expected = model.encode_image(normalise(pixels, encoder.preprocessing))

    assert relative_error(encoder.encode(pixels)[1], expected) < 1e-5
    assert encoder.identity.n_tokens == 50


# --- families ---------------------------------------------------------------------------------


def test_a_family_more_is_one_entry_and_leaves_the_others_their_names(tmp_path, monkeypatch):
    """It shares `local-dir:` with open_clip's, and takes the folders that hold its own file."""

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3 * 16, 4))
            self.head = nn.Linear(4, 2)

    def find(identifier: str) -> Source | None:
        config, weights = (Path(identifier, name) for name in ("tiny.json", "tiny.safetensors"))
        if not config.is_file():
            return None
        return Source(f"local-dir:{identifier}", str(config), {}, {}, weights)

    def read_preprocessing(source, visual, resize, normalize, bits_stored) -> Preprocessing:
        half = (0.5, 0.5, 0.5)
        return Preprocessing(32, half, half, "bilinear", resize or "squash", bits_stored)

    family = Family(
        find={"local-dir": find},
        build=lambda _: Tiny(),
        fill=lambda visual, source: visual.load_state_dict(load_file(source.weights)),
        read_preprocessing=read_preprocessing,
        split=lambda _: None,
    )
    monkeypatch.setattr("cxr_cache.encoders.loading.FAMILIES", {"tiny": family, **FAMILIES})
    original = Tiny()
    (tmp_path / "tiny.json").write_text("{}")
    save_file(original.state_dict(), tmp_path / "tiny.safetensors")
    encoder = load_encoder(f"local-dir:{tmp_path}", precision="fp32")
    black = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    pooled, embedding = encoder.encode(black)
    with torch.inference_mode():
        torch.testing.assert_close(pooled, original.trunk(torch.full((2, 3, 32, 32), -1.0)))
        torch.testing.assert_close(embedding, original.head(pooled))
    assert not encoder.is_splittable
    assert not encoder.identity.is_random
    (tmp_path / "tiny.json").unlink()
    with pytest.raises(EncoderError, match=r"has no open_clip_config\.json"):
        load_encoder(f"local-dir:{tmp_path}")


def test_no_weights_are_drawn_for_a_checkpoint_to_replace():
    """That every tensor is then replaced, the tests of each family see: none of it is luck."""

    def build() -> None:
        linear, norm, convolution = nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv2d(3, 4, 2)
        timm.layers.trunc_normal_(linear.weight, std=0.02)
        nn.init.normal_(convolution.weight)
        assert norm.weight.tolist() == [1.0] * 4  # what is not drawn is set

    before = torch.get_rng_state()
    with WithoutDrawing():
        build()
    assert torch.equal(torch.get_rng_state(), before)
    build()
    assert not torch.equal(torch.get_rng_state(), before)
