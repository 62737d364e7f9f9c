"""Towers of timm compute what timm computes, from its own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config

from cxr_cache.datasets.images import read_image
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import EncoderError
from tests.encoders.equality import disturb, draw_pixels, relative_error, require_gradients
from tests.encoders.test_encoder import COMMIT, write_hub_cache
from tests.encoders.test_hugging_face import draw_image

EVA = {"embed_dim": 48, "depth": 3, "num_heads": 4}


def write_folder(folder: Path, architecture: str, **model_args: Any) -> tuple[str, Any]:
    """Save a model in timm's own layout, with seeded weights that all matter."""
    torch.manual_seed(7)
    model = disturb(timm.create_model(architecture, num_classes=5, **model_args))
    folder.mkdir(exist_ok=True)
    cfg = model.pretrained_cfg | {"num_classes": 5}
    if img_size := model_args.get("img_size"):
        cfg |= {"input_size": (3, img_size, img_size)}
    config = {"architecture": architecture, "num_classes": 5, "pretrained_cfg": cfg}
    pool = getattr(model, "global_pool", "avg")  # a ResNet's is a layer
    config |= {"global_pool": pool if isinstance(pool, str) else "avg", "model_args": model_args}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return f"local-dir:{folder}", model


@pytest.mark.parametrize(
    ("architecture", "model_args"),
    [
        ("test_vit", {}),
        ("test_vit2", {}),  # average, one register, layer scale
        ("test_vit3", {}),  # attention pooling
        ("test_convnext", {}),
        ("vit_small_patch16_dinov3", EVA | {"img_size": 64}),
        ("vit_small_plus_patch16_dinov3", EVA | {"img_size": 64}),  # SwiGLU
        ("eva02_tiny_patch14_224", EVA | {"img_size": 56}),  # EVA-X's kind
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_encodes_as_timm_does(tmp_path, architecture, model_args):
    name, model = write_folder(tmp_path / "m", architecture, **model_args)
    encoder = load_encoder(name, precision="fp32")
    pixels = encoder.prepare(draw_pixels(2, encoder.preprocessing.image_size_px))
    with torch.inference_mode():
        features = model.forward_features(pixels)
        expected = model.forward_head(features, pre_logits=True)
        if "dinov3" in architecture:  # upstream takes the class token, timm the mean
            expected = features[:, 0]

    assert relative_error(encoder.visual(pixels), expected) < 1e-5
    assert encoder.is_splittable == (architecture != "test_convnext")
    for n_unfrozen in (1, 2, encoder.identity.n_blocks) if encoder.is_splittable else ():
        tokens = encoder.stem(pixels, n_unfrozen)
        assert relative_error(encoder.tail(tokens, n_unfrozen)[1], expected) < 1e-5
    if encoder.is_splittable:
        require_gradients(encoder, draw_pixels(2, encoder.preprocessing.image_size_px))


SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4, "img_size": 64}


@pytest.mark.parametrize(
    ("architecture", "model_args"),
    [
        ("test_convnext", {}),
        ("test_resnet", {}),
        ("swin_tiny_patch4_window7_224", SWIN),
        ("densenet121", {}),
    ],
)
def test_towers_of_other_kinds_embed_and_say_that_they_have_no_tokens(
    tmp_path, architecture, model_args
):
    name, model = write_folder(tmp_path / "m", architecture, **model_args)
    if architecture.startswith("swin"):  # as older files have them
        path = tmp_path / "m" / "model.safetensors"
        index = torch.zeros(16, 16, dtype=torch.int64)
        save_file(load_file(path) | {"layers.0.blocks.0.attn.relative_position_index": index}, path)
    encoder = load_encoder(name, precision="fp32")
    pixels = draw_pixels(2, encoder.preprocessing.image_size_px)
    with torch.inference_mode():
        features = model.forward_features(encoder.prepare(pixels))
        expected = model.forward_head(features, pre_logits=True)
    assert relative_error(encoder.encode(pixels)[1], expected) < 1e-5
    assert encoder.identity.n_tokens is None
    for ask in (lambda: encoder.stem(pixels, 1), lambda: encoder.encode_with_tokens(pixels, 2)):
        with pytest.raises(
            EncoderError,
            match=rf"cannot be split .*is a {type(model).__name__}, .*Extract without --tokens",
        ):
            ask()


def test_towers_for_images_of_any_size_take_another_too(tmp_path):
    name, model = write_folder(tmp_path / "m", "test_convnext")
    encoder = load_encoder(f"{name}?img_size=96", precision="fp32")
    pixels = draw_pixels(2, 96)
    with torch.inference_mode():
        features = model.forward_features(encoder.prepare(pixels))
        expected = model.forward_head(features, pre_logits=True)
    assert relative_error(encoder.encode(pixels)[1], expected) < 1e-5
    assert encoder.identity.positions_from_px is None


def test_dinov3_can_still_be_pooled_as_timm_does(tmp_path):
    name, model = write_folder(tmp_path / "m", "vit_small_patch16_dinov3", **EVA, img_size=64)
    encoder = load_encoder(name, precision="fp32", pool="mean")
    pixels = draw_pixels(2, 64)
    with torch.inference_mode():
        features = model.forward_features(encoder.prepare(pixels))
        expected = model.forward_head(features, pre_logits=True)
    assert relative_error(encoder.encode(pixels)[1], expected) < 1e-5


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("crop_pct", [0.9, 1.0])
def test_pixels_are_those_of_timms_own_transform(tmp_path, crop_mode, crop_pct):
    name, _ = write_folder(tmp_path / "m", "test_vit")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"] |= {"crop_mode": crop_mode, "crop_pct": crop_pct}
    path.write_text(json.dumps(config))
    encoder = load_encoder(name)
    transform = create_transform(**resolve_data_config({}, config["pretrained_cfg"]))
    for size in ((300, 200), (201, 299), (180, 178)):
        draw_image(size).save(tmp_path / "image.png")
        pixels = read_image(None, str(tmp_path / "image.png"), encoder.preprocessing).pixels
        theirs = transform(Image.open(tmp_path / "image.png").convert("RGB"))
        ours = encoder.prepare(torch.from_numpy(pixels)[None])[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_border_in_the_mean_colour_is_not_offered(tmp_path):
    name, _ = write_folder(tmp_path / "m", "test_vit")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["crop_mode"] = "border"
    path.write_text(json.dumps(config))
    with pytest.raises(EncoderError, match=r"crop_mode 'border'.*--resize squash, crop or pad"):
        load_encoder(name)
    assert load_encoder(name, resize="pad").preprocessing.resize == "pad"


def test_another_size_of_a_folder_is_that_of_the_name(published):
    folder = load_encoder(f"local-dir:{published}?img_size=96", precision="fp32").identity
    named = load_encoder("timm:test_vit?img_size=96", precision="fp32").identity
    assert folder.differences(named) == {}


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """timm's weights of test_vit, which stand for a download."""
    write_folder(tmp_path / COMMIT, "test_vit")
    snapshot = tmp_path / COMMIT
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, file, revision: str(snapshot / file)
    )
    return snapshot


def test_a_name_of_timm_loads_its_published_weights(published):
    encoder = load_encoder("timm:test_vit", precision="fp32")
    folder = load_encoder(f"local-dir:{published}", precision="fp32")

    assert (encoder.identity.name, encoder.identity.revision) == ("timm:test_vit", COMMIT)
    assert encoder.identity.differences(folder.identity) == {}


def test_a_revision_of_a_repository_in_timms_layout_can_be_named(tmp_path, monkeypatch):
    write_folder(tmp_path / "m", "test_vit")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    files = ("config.json", "model.safetensors")
    write_hub_cache(tmp_path / "hub", "org/vit", tmp_path / "m", files)
    (tmp_path / "hub" / "models--org--vit" / "refs" / "main").unlink()
    assert load_encoder(f"hf-hub:org/vit@{COMMIT}").identity.revision == COMMIT


def test_another_input_size_resamples_positions_and_says_so(published):
    encoder = load_encoder("timm:test_vit?img_size=96", precision="fp32")
    tensors = load_file(published / "model.safetensors")
    theirs = timm.create_model("test_vit", num_classes=5, img_size=96).eval()
    theirs.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(tensors, theirs))
    pixels = draw_pixels(2, 96)
    with torch.inference_mode():
        features = theirs.forward_features(encoder.prepare(pixels))
        expected = theirs.forward_head(features, pre_logits=True)

    assert relative_error(encoder.encode(pixels)[1], expected) < 1e-5
    assert encoder.identity.positions_from_px == 160
    assert encoder.preprocessing.image_size_px == 96
    assert "positions_from_px" not in load_encoder("timm:test_vit").identity.to_dict()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_tinny_patch16_224", "no architecture.*Did you mean vit_tiny_patch16_224"),
        ("timm:test_vit.nothing", r"Invalid pretrained tag.*Published are test_vit\."),
        ("timm:test_vit?size=3", r"'\?size=3' in timm:test_vit\?size=3 is not of the form"),
        ("timm:vit_small_patch16_18x2_224", "no weights on the Hugging Face hub"),
    ],
)
def test_a_name_that_means_nothing_says_what_would(name, message):
    with pytest.raises(EncoderError, match=message):
        load_encoder(name)


def test_every_tensor_has_its_place(tmp_path):
    name, _ = write_folder(tmp_path / "m", "test_vit2")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if "ls1" not in k}, path)
    with pytest.raises(EncoderError, match=r"(?s)does not fit.*missing in the file.*ls1\.gamma"):
        load_encoder(name)
    save_file(tensors | {"extra": torch.ones(2)}, path)
    with pytest.raises(EncoderError, match=r"(?s)does not fit.*unknown to the tower: extra\n"):
        load_encoder(name)
