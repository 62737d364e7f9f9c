"""Towers of Hugging Face's layout compute what transformers computes, which is not needed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from cxr_cache.datasets.images import read_image
from cxr_cache.datasets.preprocessing import Preprocessing, normalise
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.identity import EncoderIdentity
from cxr_cache.encoders.loading import load_encoder, recorded_options
from cxr_cache.errors import EncoderError
from tests.encoders.equality import (
    disturb,
    draw_pixels,
    relative_error,
    require_equal,
    require_gradients,
)
from tests.encoders.test_encoder import COMMIT, write_hub_cache

transformers = pytest.importorskip("transformers")

SHARED = Path(__file__).parents[3] / "shared"
DINOV2_SMALL = SHARED / "encoders" / "dinov2_small"
RADIOGRAPHS = SHARED / "data" / "indiana_256" / "images"

SMALL: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIGLIP = SMALL | {"intermediate_size": 100, "image_size": 64}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
TEXT |= {"num_attention_heads": 2}
CLIP = SMALL | {"image_size": 64, "patch_size": 16, "intermediate_size": 96, "projection_dim": 24}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dinov2": ("Dinov2Model", "Dinov2Config", SMALL | {"image_size": 70}),
    "dinov2 swiglu": (
        "Dinov2Model",
        "Dinov2Config",
        SMALL | {"image_size": 70, "use_swiglu_ffn": True, "layerscale_value": 0.5},
    ),
    "dinov2 without bias": (
        "Dinov2Model",
        "Dinov2Config",
        SMALL | {"image_size": 70, "qkv_bias": False, "mlp_ratio": 3},
    ),
    "dinov2 classifier": ("Dinov2ForImageClassification", "Dinov2Config", SMALL),
    "registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        SMALL | {"image_size": 64, "num_register_tokens": 3},
    ),
    "registers swiglu": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        SMALL | {"image_size": 64, "use_swiglu_ffn": True},
    ),
    "dinov3": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        SMALL | {"image_size": 64, "intermediate_size": 96, "num_register_tokens": 4},
    ),
    "dinov3 gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        SMALL
        | {"image_size": 64, "intermediate_size": 100, "use_gated_mlp": True, "hidden_act": "silu"}
        | {"query_bias": False, "value_bias": False},
    ),
    "vit": ("ViTModel", "ViTConfig", SMALL | {"image_size": 64, "intermediate_size": 96}),
    "vit classifier": (
        "ViTForImageClassification",
        "ViTConfig",
        SMALL | {"image_size": 64, "intermediate_size": 96},
    ),
    "clip vision": ("CLIPVisionModel", "CLIPVisionConfig", CLIP),
    "clip projected": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", CLIP),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"vision_config": CLIP, "text_config": TEXT, "projection_dim": 20},
    ),
    "siglip vision": ("SiglipVisionModel", "SiglipVisionConfig", SIGLIP),
    "siglip uneven": ("SiglipVisionModel", "SiglipVisionConfig", SIGLIP | {"patch_size": 15}),
    "siglip": ("SiglipModel", "SiglipConfig", {"vision_config": SIGLIP, "text_config": TEXT}),
}
PROCESSING = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.3, 0.2, 0.25],
    "resample": 3,
}


def write_model(
    folder: Path, model: str, config: str, settings: dict[str, Any], size_px: int | None = None
) -> tuple[str, Any]:
    """Save a family's model with seeded weights that all matter; give its name and itself."""
    torch.manual_seed(5)
    made = disturb(getattr(transformers, model)(getattr(transformers, config)(**settings)))
    made.save_pretrained(folder)
    size_px = size_px or settings.get("vision_config", settings).get("image_size", 224)
    write_processing(folder, size={"height": size_px, "width": size_px})
    return f"local-dir:{folder}", made


def write_processing(folder: Path, **changes: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSING | changes))


def run_theirs(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Pooled output, embedding, and the tokens that enter each block, as transformers has them."""
    kind, kwargs = type(model).__name__, {}
    if not kind.lower().startswith("dino"):
        kwargs["interpolate_pos_encoding"] = True
    if hasattr(model, "get_image_features") or kind == "CLIPVisionModelWithProjection":
        projection = getattr(model, "visual_projection", torch.nn.Identity())
        model = model.vision_model
    else:
        projection = torch.nn.Identity()
        model = getattr(model, "dinov2", getattr(model, "vit", model))
    with torch.inference_mode():
        output = model(pixels, output_hidden_states=True, **kwargs)
        pooled = output.pooler_output
        if pooled is None:  # a classifier's
            pooled = output.last_hidden_state[:, 0]
        embedding = projection(pooled)
        if kind == "ViTModel":
            pooled = output.last_hidden_state[:, 0]
    return pooled, embedding, output.hidden_states


def require_theirs(encoder: Encoder, model: Any, pixels: torch.Tensor) -> None:
    pooled, embedding, hidden = run_theirs(model, encoder.prepare(pixels))
    require_equal(encoder, pixels, pooled, embedding, hidden[:-1])


@pytest.mark.parametrize(("model", "config", "settings"), FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("scale", [1, 2], ids=["own size", "resampled"])
def test_every_family_computes_what_transformers_computes(tmp_path, model, config, settings, scale):
    own_px = settings.get("vision_config", settings).get("image_size", 224)
    size_px = own_px if scale == 1 else 98
    name, theirs = write_model(tmp_path / "m", model, config, settings, size_px)
    encoder = load_encoder(name, precision="fp32")

    require_theirs(encoder, theirs, draw_pixels(2, size_px))
    has_positions = not model.startswith("DINOv3")
    assert encoder.identity.positions_from_px == (own_px if scale > 1 and has_positions else None)


ACTIVATIONS = ("gelu_new", "gelu_fast", "quick_gelu", "silu", "relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_function_is_that_of_transformers(tmp_path, activation):
    model, config, settings = FAMILIES["vit"]
    settings = settings | {"hidden_act": activation, "pooler_act": activation}
    name, theirs = write_model(tmp_path / "m", model, config, settings)
    require_theirs(load_encoder(name, precision="fp32"), theirs, draw_pixels(2, 64))


OTHER_FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "in float16": ("dinov2", {"dtype": torch.float16}, {}),
    "in bfloat16": ("registers", {"dtype": torch.bfloat16}, {}),
    "rotary in bfloat16": ("dinov3", {"dtype": torch.bfloat16}, {}),
    "sides in lists": ("vit", {}, {"image_size": [64, 64], "patch_size": [16, 16]}),
    "no registers": ("registers", {}, {"num_register_tokens": 0}),
    "wider than its tower": ("vit", {}, {"pooler_output_size": 20}),
}


@pytest.mark.parametrize(("family", "how", "changes"), OTHER_FORMS.values(), ids=OTHER_FORMS.keys())
def test_other_forms_of_a_family_load_as_transformers_loads_them(tmp_path, family, how, changes):
    model, config, settings = FAMILIES[family]
    name, theirs = write_model(tmp_path / "m", model, config, settings | changes, 64)
    if how:
        theirs.to(how["dtype"]).save_pretrained(tmp_path / "m")
    theirs = type(theirs).from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    require_theirs(load_encoder(name, precision="fp32"), theirs, draw_pixels(2, 64))


def test_a_decoder_that_was_trained_on_top_is_left_out(tmp_path):
    settings = FAMILIES["vit"][2]
    name, theirs = write_model(tmp_path / "m", "ViTForMaskedImageModeling", "ViTConfig", settings)
    require_theirs(load_encoder(name, precision="fp32"), theirs.vit, draw_pixels(2, 64))


SWIN = {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
OTHERS = {
    "vit_mae": ("ViTMAEModel", "ViTMAEConfig", FAMILIES["vit"][2]),
    "beit": ("BeitModel", "BeitConfig", FAMILIES["vit"][2]),
    "deit": ("DeiTModel", "DeiTConfig", FAMILIES["vit"][2]),
    "swin": ("SwinModel", "SwinConfig", SWIN),
    "clip_text_model": ("CLIPTextModel", "CLIPTextConfig", TEXT),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_of_other_kinds_are_refused_by_their_names(tmp_path, kind):
    name, _ = write_model(tmp_path / "m", *OTHERS[kind])
    message = rf"has the model_type '{kind}', which is no image tower.*Known are dinov2.*import"
    with pytest.raises(EncoderError, match=message):
        load_encoder(name)


REFUSED_TOWERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "oblong images": (
        "vit",
        {"image_size": [64, 32]},
        r"image_size \[64, 32\], not a sq.*import",
    ),
    "oblong patches": ("dinov2", {"patch_size": [14, 7]}, r"patch_size \[14, 7\], not a square"),
    "a bias of keys": ("dinov3", {"key_bias": True}, r"built: biases of queries, keys .*import"),
    "no bias": ("dinov3", {"mlp_bias": False}, r"built: mlp_bias or proj_bias is false.*import"),
    "another gate": (
        "dinov3",
        {"hidden_act": "relu"},
        r"hidden_act is relu with .*import",
    ),
    "another pooler": (
        "vit",
        {"pooler_act": "laplace"},
        "pooler_act 'laplace', which is not",
    ),
}


@pytest.mark.parametrize(
    ("family", "changes", "message"), REFUSED_TOWERS.values(), ids=REFUSED_TOWERS.keys()
)
def test_towers_that_timm_has_not_are_refused_in_a_sentence(tmp_path, family, changes, message):
    model, config, settings = FAMILIES[family]
    name, _ = write_model(tmp_path / "m", model, config, settings | changes, 64)
    with pytest.raises(EncoderError, match=rf"config\.json .*{message}"):
        load_encoder(name)


LARGE = {
    "dinov2": ("Dinov2Model", "Dinov2Config", {"image_size": 518}),
    "registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"patch_size": 14}),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 4}),
    "vit": ("ViTModel", "ViTConfig", {}),
    "clip": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {"patch_size": 16}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "config", "settings"), LARGE.values(), ids=LARGE.keys())
def test_at_full_size_too(tmp_path, model, config, settings):
    name, theirs = write_model(tmp_path / "m", model, config, settings, 224)
    encoder, pixels = load_encoder(name, precision="fp32"), draw_pixels(2, 224)
    require_theirs(encoder, theirs, pixels)
    require_gradients(encoder, pixels)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dinov2", "registers"])
def test_a_full_size_tower_for_518_pixels_takes_224(tmp_path, family):
    """Tokens are a fifth as many: positions are resampled as transformers does for each image."""
    model, config, _ = LARGE[family]
    settings = {"image_size": 518, "patch_size": 14}
    name, theirs = write_model(tmp_path / "m", model, config, settings)
    encoder, pixels = load_encoder(f"{name}?img_size=224", precision="fp32"), draw_pixels(2, 224)
    require_theirs(encoder, theirs, pixels)
    assert (encoder.identity.positions_from_px, encoder.patch_grid) == (518, (16, 16))


@pytest.mark.parametrize("family", ["dinov2", "dinov3", "clip projected", "siglip"])
def test_the_tails_gradients_are_those_of_the_whole(tmp_path, family):
    name, _ = write_model(tmp_path / "m", *FAMILIES[family])
    encoder = load_encoder(name, precision="fp32")
    require_gradients(encoder, draw_pixels(2, encoder.preprocessing.image_size_px))


def test_transformers_is_not_needed(tmp_path, monkeypatch):
    name, _ = write_model(tmp_path / "m", *FAMILIES["dinov2"])
    for module in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it raises
    assert load_encoder(name).identity.n_blocks == 3


def test_siglip2_takes_squares_if_asked(tmp_path):
    """Its own images keep their shape, and come cut into patches."""
    settings = SIGLIP | {"num_patches": 16, "patch_size": 16}
    settings.pop("image_size")
    name, theirs = write_model(
        tmp_path / "m", "Siglip2VisionModel", "Siglip2VisionConfig", settings, 64
    )
    (tmp_path / "m" / "preprocessor_config.json").write_text(
        json.dumps(PROCESSING | {"image_processor_type": "Siglip2ImageProcessor"})
    )
    with pytest.raises(EncoderError, match=r"does not say how.*--resize squash"):
        load_encoder(name)
    encoder = load_encoder(name, resize="squash", precision="fp32")
    pixels = draw_pixels(2, 64)
    patches = encoder.prepare(pixels).unfold(2, 16, 16).unfold(3, 16, 16)  # (B, 3, 4, 4, 16, 16)
    patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    with torch.inference_mode():
        output = theirs(
            patches, pixel_attention_mask=torch.ones(2, 16), output_hidden_states=True,
            spatial_shapes=torch.tensor([[4, 4], [4, 4]]),
        )  # fmt: skip

    for n_unfrozen in (1, 3):
        tokens, _, embedding = encoder.encode_with_tokens(pixels, n_unfrozen)
        assert relative_error(tokens, output.hidden_states[3 - n_unfrozen]) < 1e-5
        assert relative_error(embedding, output.pooler_output) < 1e-5


@pytest.mark.parametrize("family", ["dinov2", "dinov2 swiglu"])
def test_names_of_the_dinov2_repository_are_the_same_tower(tmp_path, family):
    """As RAD-DINO's backbone_compatible.safetensors has them."""
    name, _ = write_model(tmp_path / "m", *FAMILIES[family])
    encoder = load_encoder(name)
    tensors = {
        key.removeprefix("visual.trunk.").replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        if "swiglu" in family
        else key.removeprefix("visual.trunk."): tensor
        for key, tensor in encoder.state_dict().items()
    }
    save_file(tensors | {"mask_token": torch.zeros(1, 48)}, tmp_path / "m" / "model.safetensors")
    assert load_encoder(name).identity == encoder.identity


def test_a_cached_repository_loads(tmp_path, monkeypatch):
    name, _ = write_model(tmp_path / COMMIT, *FAMILIES["dinov2"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    files = ("config.json", "model.safetensors", "preprocessor_config.json")
    write_hub_cache(tmp_path / "hub", "org/dino", tmp_path / COMMIT, files)

    identity = load_encoder("hf-hub:org/dino", precision="fp32").identity

    assert (identity.name, identity.revision) == ("hf-hub:org/dino", COMMIT)
    assert identity.differences(load_encoder(name, precision="fp32").identity) == {}
    (tmp_path / "hub" / "models--org--dino" / "refs" / "main").unlink()
    assert load_encoder(f"hf-hub:org/dino@{COMMIT}").identity.revision == COMMIT


# --- Pooling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dinov2", "registers", "clip projected", "siglip"])
@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean"])
def test_tokens_are_pooled_as_asked(tmp_path, family, pool):
    name, theirs = write_model(tmp_path / "m", *FAMILIES[family])
    if family == "siglip" and "cls" in pool:
        with pytest.raises(EncoderError, match=rf"no class token that --pool {pool[:3]}.*mean"):
            load_encoder(name, pool=pool)
        return
    encoder = load_encoder(name, precision="fp32", pool=pool)
    pixels = draw_pixels(2, encoder.preprocessing.image_size_px)
    hidden = run_theirs(theirs, encoder.prepare(pixels))[2][-1]
    normed = torch.nn.functional.layer_norm(
        hidden, hidden.shape[-1:], *(encoder.state_dict()[f"visual.trunk.norm.{n}"] for n in
        ("weight", "bias")), encoder.visual.trunk.norm.eps,
    )  # fmt: skip
    n_before = {"dinov2": 1, "registers": 4, "clip projected": 1, "siglip": 0}[family]
    parts = {"cls": normed[:, 0], "mean": normed[:, n_before:].mean(dim=1)}
    expected = torch.cat([parts[name] for name in pool.split("+")], dim=-1)

    for n_unfrozen in (1, 3):
        _, pooled, embedding = encoder.encode_with_tokens(pixels, n_unfrozen)
        assert torch.equal(pooled, embedding)
        assert relative_error(embedding, expected) < 1e-5
    assert relative_error(encoder.visual(encoder.prepare(pixels)), expected) < 1e-5


def test_pooling_is_part_of_the_identity(tmp_path):
    name, _ = write_model(tmp_path / "m", *FAMILIES["dinov2"])
    own, mean = (load_encoder(name, pool=pool, precision="fp32") for pool in ("default", "mean"))

    recorded = json.loads(json.dumps(mean.identity.to_dict()))

    assert "pool" not in own.identity.to_dict()
    assert own.identity.differences(mean.identity) == {"pool": ("default", "mean")}
    assert EncoderIdentity.from_dict(recorded) == mean.identity
    assert load_encoder(**vars(recorded_options(recorded))).identity == mean.identity


def test_only_vision_transformers_pool_otherwise():
    assert load_encoder("random:test_vit", pool="cls+mean").identity.embedding_width == 128
    with pytest.raises(EncoderError, match=r"test_resnet:0 pools in one way only.*ResNet"):
        load_encoder("random:test_resnet", pool="mean")


# --- Preprocessing -------------------------------------------------------------------------------

PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "larger, then cut": (
        "BitImageProcessor",
        {"size": {"shortest_edge": 80}, "crop_size": {"height": 64, "width": 64}},
    ),
    "RAD-DINO": (
        "BitImageProcessor",
        {
            "size": {"shortest_edge": 64},
            "crop_size": {"height": 64, "width": 64},
            "image_mean": [0.5307] * 3,
            "image_std": [0.2583] * 3,
        },
    ),
    "CLIP": ("CLIPImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": 64}),
    "SigLIP": ("SiglipImageProcessor", {"size": {"height": 64, "width": 64}, "resample": 2}),
    "DINOv3": ("DINOv3ViTImageProcessor", {"size": {"height": 64, "width": 64}}),
    "ViT": ("ViTImageProcessor", {"size": {"height": 64, "width": 64}, "resample": 2}),
    "size as a number": ("CLIPImageProcessor", {"size": 64, "crop_size": 64}),
    "no crop": (
        "CLIPImageProcessor",
        {"size": {"height": 64, "width": 64}, "do_center_crop": False},
    ),
    "Lanczos": ("ViTImageProcessor", {"size": {"height": 64, "width": 64}, "resample": 1}),
    "box": ("ViTImageProcessorPil", {"size": {"height": 64, "width": 64}, "resample": 4}),
    "Hamming": ("ViTImageProcessorPil", {"size": {"height": 64, "width": 64}, "resample": 5}),
    "pixels from 0 to 255": (
        "ViTImageProcessor",
        {"size": {"height": 64, "width": 64}, "do_rescale": False}
        | {"image_mean": [101.48761] * 3, "image_std": [83.43944] * 3},
    ),
    "pixels from 0 to 2": (
        "ViTImageProcessor",
        {"size": {"height": 64, "width": 64}, "rescale_factor": 1 / 127.5},
    ),
    "not normalised": (
        "ViTImageProcessor",
        {"size": {"height": 64, "width": 64}, "do_normalize": False},
    ),
}


@pytest.mark.parametrize(("kind", "settings"), PROCESSORS.values(), ids=PROCESSORS.keys())
def test_pixels_are_those_of_the_familys_own_processor(tmp_path, kind, settings):
    """To one grey level, for images of every shape; files that transformers itself writes."""
    family = FAMILIES["siglip vision"]
    name, _ = write_model(tmp_path / "m", *family, 64)
    if not hasattr(transformers, kind):
        pytest.skip(f"this version of transformers has no {kind}")
    processor = getattr(transformers, kind)(**settings)
    processor.save_pretrained(tmp_path / "m")
    preprocessing = load_encoder(name).preprocessing
    for size in ((300, 200), (201, 299), (97, 98), (96, 99), (333, 334), (64, 64)):
        _require_same_pixels(tmp_path / "image.png", draw_image(size), preprocessing, processor)


def draw_image(size: tuple[int, int]) -> Image.Image:
    generator = np.random.default_rng(sum(size))
    coarse = Image.fromarray(generator.integers(0, 256, (40, 40), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def _require_same_pixels(
    path: Path, image: Image.Image, preprocessing: Preprocessing, processor: Any
) -> None:
    image.save(path)
    pixels = torch.from_numpy(read_image(None, str(path), preprocessing).pixels)[None]
    theirs = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    std = torch.tensor(preprocessing.std).view(3, 1, 1)
    difference = (normalise(pixels, preprocessing) - theirs) * std * 255
    assert difference.abs().max() < 1.001, image.size


REFUSED_PROCESSING: dict[str, tuple[dict[str, Any], str]] = {
    "oblong": ({"size": {"height": 64, "width": 32}}, "64 x 32 pixels, not a square"),
    "any shape": (
        {"size": {"shortest_edge": 64}},
        "does not say how an image becomes a square .*--resize squash",
    ),
    "longest edge": ({"size": {"longest_edge": 64}}, "does not say how.*--resize squash"),
    "no size": ({"size": None}, "does not say how.*--resize squash"),
    "nearest": ({"resample": 0}, r"interpolation nearest .*not offered.*3 \(bicubic\).*in a copy"),
    "no interpolation": (
        {"resample": None, "image_processor_type": "OwnProcessor"},
        "does not say by which interpolation.*or add the line",
    ),
    "padding": ({"do_pad": True}, "pads images"),
    "another scale": (
        {"rescale_factor": "1/255"},
        "pixels times '1/255' .rescale_factor., where",
    ),
    "two means": ({"image_mean": [0.5, 0.5]}, r"has \[0\.5, 0\.5\] as mean .*one number or three"),
    "mean in words": ({"image_mean": "half"}, "has 'half' as mean .*one number or three"),
    "another step": ({"do_flip_channel_order": True}, r"does more .*do_flip_channel_order.*import"),
    "an offset": ({"offset": True}, r"does more to images than is offered .offset..*import"),
    "no statistics": ({"image_mean": None}, "no image_mean and image_std.*normalize imagenet"),
    "enlarged cut": (
        {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": 64},
        "resizes images to 32 pixels and cuts 64",
    ),
}


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED_PROCESSING.values(), ids=REFUSED_PROCESSING.keys()
)
def test_a_way_of_preparing_images_that_is_not_offered_is_refused(vit, changes, message):
    write_processing(vit, **({"size": {"height": 64, "width": 64}} | changes))
    with pytest.raises(EncoderError, match=rf"preprocessor_config\.json.*{message}"):
        load_encoder(f"local-dir:{vit}")


def test_an_image_processor_that_is_not_known_is_noted(vit):
    write_processing(
        vit, image_processor_type="OwnImageProcessor", size={"height": 64, "width": 64}
    )
    encoder = load_encoder(f"local-dir:{vit}")
    (note,) = encoder.identity.notes
    assert "names an image processor that is not known here (OwnImageProcessor)" in note
    assert encoder.preprocessing.image_size_px == 64


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_a_rule_for_images_of_any_shape_needs_the_caller(vit, resize):
    write_processing(vit, size={"shortest_edge": 64})
    preprocessing = load_encoder(f"local-dir:{vit}", resize=resize).preprocessing
    assert (preprocessing.resize, preprocessing.image_size_px) == (resize, 64)
    assert preprocessing.resize_px is None


def test_the_caller_decides_how_images_become_square(vit):
    write_processing(
        vit, size={"shortest_edge": 80}, do_center_crop=True, crop_size={"height": 64, "width": 64}
    )
    own, squashed = (load_encoder(f"local-dir:{vit}", resize=r).preprocessing for r in
                     (None, "squash"))  # fmt: skip
    assert (own.resize, own.image_size_px, own.resize_px) == ("crop", 64, 80)
    assert (squashed.resize, squashed.image_size_px, squashed.resize_px) == ("squash", 64, None)
    assert Preprocessing.from_dict(own.to_dict()) == own
    assert own.share_seen == 0.8
    assert (own.scaled_to(128).image_size_px, own.scaled_to(128).resize_px) == (128, 160)


# --- Files that cannot be used -------------------------------------------------------------------


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    write_model(tmp_path / "m", *FAMILIES["vit"])
    return tmp_path / "m"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors)
    save_file(tensors if changed is None else changed, folder / "model.safetensors")


class Trace:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def use_pickle(folder: Path, content: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def lose_a_part(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    model = transformers.ViTModel(transformers.ViTConfig(**FAMILIES["vit"][2]))
    model.save_pretrained(folder, max_shard_size="60KB")
    next(folder.glob("model-00002*")).unlink()


QUERY = "encoder.layer.0.attention.attention.query.weight"
DAMAGE: dict[str, tuple[Any, str]] = {
    "text only": (
        lambda folder: edit_config(folder, model_type="bert"),
        "config.json has the model_type 'bert', which is no image tower.*Known are dinov2",
    ),
    "code of its own": (
        lambda folder: edit_config(folder, model_type="own", auto_map={}),
        "'own'.*code of its own .auto_map., which is not run",
    ),
    "quantised": (
        lambda folder: edit_config(folder, quantization_config={"bits": 8}),
        "config.json describes quantised weights.*Take the model",
    ),
    "quantised file": (
        lambda folder: edit_weights(
            folder, lambda t: t.update({QUERY: torch.zeros(48, 48, dtype=torch.int8)})
        ),
        "model.safetensors holds quantised weights .*query.weight: torch.int8",
    ),
    "adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "holds an adapter .LoRA.*merge_and_unload",
    ),
    "adapter beside its model": (
        lambda folder: edit_weights(
            folder, lambda t: t.update({"base_model.vit.lora_A.weight": torch.ones(2, 48)})
        ),
        r"model\.safetensors holds an adapter \(LoRA: base_model\.vit\.lora_A\.weight\).*Merge",
    ),
    "adapter alone": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "holds an adapter .LoRA.*merge_and_unload",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "has a configuration, but no weights. Put one of these.*model.safetensors",
    ),
    "a part that is missing": (
        lose_a_part,
        r"lacks model-00002-of-0.*, a part of the weights that model\.safetensors\.index\.json",
    ),
    "a list of parts elsewhere": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a"}}'),
        ),
        r"model\.safetensors\.index\.json does not list the parts of a checkpoint",
    ),
    "no preprocessing": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        "no preprocessor_config.json, so it is unknown how images",
    ),
    "no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json cannot be read as JSON",
    ),
    "another size": (
        lambda folder: edit_config(folder, hidden_size=96),
        r"(?s)does not fit.*of another shape.*\(48,.* in the file.*\(96,.* in the tower",
    ),
    "a matrix of another size": (
        lambda folder: edit_weights(folder, lambda t: t.update({QUERY: torch.ones(48, 9)})),
        r"(?s)does not fit.*of another shape: \S+query.weight \+ \S+key.weight \+ \S+value.weight "
        r"\(\(48, 9\) \+ \(48, 48\) \+ \(48, 48\) in the file, \(144, 48\) in the tower\)\n",
    ),
    "positions of another size": (
        lambda folder: edit_weights(
            folder, lambda t: t.update({"embeddings.position_embeddings": torch.ones(9)})
        ),
        r"(?s)does not fit.*embeddings\.position_embeddings \(\(9,\) in the file, \(1, 17, 48\)",
    ),
    "another depth": (
        lambda folder: edit_config(folder, num_hidden_layers=4),
        r"(?s)does not fit.*missing in the file: encoder\.layer\.3\.",
    ),
    "half a checkpoint": (
        lambda folder: edit_weights(
            folder, lambda t: {k: v for k, v in t.items() if "layer.2." not in k}
        ),
        r"(?s)does not fit.*missing in the file: encoder\.layer\.2\.",
    ),
    "no image tower": (
        lambda folder: edit_weights(folder, lambda t: {f"text_model.{k}": v for k, v in t.items()}),
        "model.safetensors holds no image tower",
    ),
    "a key too many": (
        lambda folder: edit_weights(folder, lambda t: t.update({"extra.scale": torch.ones(1)})),
        "(?s)does not fit.*unknown to the tower: extra.scale",
    ),
    "layer scale that the configuration lacks": (
        lambda folder: edit_weights(
            folder,
            lambda t: t.update({"encoder.layer.0.layer_scale1.lambda1": torch.ones(48)}),
        ),
        r"(?s)does not fit.*unknown to the tower: encoder\.layer\.0\.layer_scale1\.lambda1\n",
    ),
    "twice the same": (
        lambda folder: edit_weights(
            folder, lambda t: t.update({"module.vit." + QUERY: t[QUERY].clone()})
        ),
        "holds the same tensor twice, as .*query.weight and as .*query.weight",
    ),
    "NaN": (
        lambda folder: edit_weights(folder, lambda t: t.update({QUERY: t[QUERY] * torch.nan})),
        "holds NaN or infinity in .*query.weight. The file is damaged",
    ),
    "no model_type": (
        lambda folder: edit_config(folder, model_type=None),
        "config.json does not name its model_type",
    ),
    "pointer of Git LFS": (
        lambda folder: (folder / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        ),
        "model.safetensors is a pointer of Git LFS.*Run git lfs pull",
    ),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-99]
        ),
        "model.safetensors is damaged",
    ),
    "code in a pickle": (
        lambda folder: use_pickle(folder, {"x": Trace()}),
        "pytorch_model.bin was refused.*could run code",
    ),
    "activation": (
        lambda folder: edit_config(folder, hidden_act="laplace"),
        "activation function 'laplace', which is not one of gelu",
    ),
    "channels": (
        lambda folder: edit_config(folder, num_channels=1),
        "for images of 1 channels, not of 3",
    ),
    "a width that is none": (
        lambda folder: edit_config(folder, hidden_size="48"),
        "hidden_size '48', where a whole number of at least 1 belongs",
    ),
    "heads that do not divide": (
        lambda folder: edit_config(folder, num_attention_heads=5),
        "config.json describes cannot be built",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_an_unusable_folder_is_refused_in_a_sentence(vit, damage, message):
    damage(vit)
    with pytest.raises(EncoderError, match=message):
        load_encoder(f"local-dir:{vit}")


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "backbone.", "module.vit."])
def test_prefixes_of_training_programs_are_taken_off(vit, prefix):
    expected = load_encoder(f"local-dir:{vit}").identity
    edit_weights(vit, lambda t: {prefix + name: tensor for name, tensor in t.items()})
    assert load_encoder(f"local-dir:{vit}").identity == expected
    use_pickle(vit, load_file(vit / "model.safetensors"))
    assert load_encoder(f"local-dir:{vit}").identity == expected


def test_weights_in_parts_are_the_same_tower(tmp_path):
    name, theirs = write_model(tmp_path / "m", *FAMILIES["vit"])
    expected = load_encoder(name).identity
    (tmp_path / "m" / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path / "m", max_shard_size="60KB")
    assert len([*(tmp_path / "m").glob("model-*.safetensors")]) > 2
    assert load_encoder(name).identity == expected


@pytest.mark.parametrize("family", ["dinov2", "registers", "siglip vision", "dinov3"])
def test_a_name_may_ask_for_another_size(tmp_path, family):
    """As if the processor of the folder said so."""
    name, theirs = write_model(tmp_path / "m", *FAMILIES[family])
    own_px = FAMILIES[family][2]["image_size"]
    px = 96 if own_px == 64 else 98
    encoder = load_encoder(f"{name}?img_size={px}", precision="fp32")
    require_theirs(encoder, theirs, draw_pixels(2, px))
    assert encoder.identity.name == f"{name}?img_size={px}"
    assert encoder.identity.positions_from_px == (None if family == "dinov3" else own_px)
    recorded = recorded_options(encoder.identity.to_dict())
    assert load_encoder(**vars(recorded)).identity == encoder.identity


def test_another_size_sees_the_same_part_of_an_image(vit):
    write_processing(vit, size={"shortest_edge": 80}, do_center_crop=True, crop_size=64)
    preprocessing = load_encoder(f"local-dir:{vit}?img_size=128").preprocessing
    assert (preprocessing.image_size_px, preprocessing.resize_px) == (128, 160)


def test_statistics_that_are_not_the_encoders_own_are_noted(vit):
    (note,) = load_encoder(f"local-dir:{vit}", normalize="imagenet").identity.notes
    assert re.match(
        "Pixels were normalised by ImageNet's mean .*, not by those that local-dir:.* was trained "
        r"with \(mean 0\.5, 0\.4, 0\.3; .*Extract again without --normalize imagenet",
        note,
    )
    assert load_encoder(f"local-dir:{vit}").identity.notes == ()
    write_processing(vit, size={"height": 64, "width": 64}, **{
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]
    })  # fmt: skip
    assert load_encoder(f"local-dir:{vit}", normalize="imagenet").identity.notes == ()


def test_notes_are_recorded_and_keep_no_features_apart(vit):
    noted = load_encoder(f"local-dir:{vit}", normalize="imagenet").identity
    recorded = json.loads(json.dumps(noted.to_dict()))
    assert EncoderIdentity.from_dict(recorded) == noted
    older = {name: value for name, value in recorded.items() if name != "notes"}
    assert EncoderIdentity.from_dict(older).differences(noted) == {}


# --- A real tower and real radiographs -----------------------------------------------------------


@pytest.mark.parametrize("n_images", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_a_real_tower_on_real_radiographs(n_images):
    """Pixels included: transformers reads the same files by its own processor."""
    if not (DINOV2_SMALL.is_dir() and RADIOGRAPHS.is_dir()):
        pytest.skip(f"needs {DINOV2_SMALL} and {RADIOGRAPHS}")
    encoder = load_encoder(f"local-dir:{DINOV2_SMALL}", precision="fp32")
    theirs = transformers.Dinov2Model.from_pretrained(DINOV2_SMALL, dtype=torch.float32).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(DINOV2_SMALL)
    paths = sorted(RADIOGRAPHS.iterdir())
    paths = paths[:: len(paths) // n_images][:n_images]
    pixels = torch.stack(
        [torch.from_numpy(read_image(None, str(p), encoder.preprocessing).pixels) for p in paths]
    )
    images = [Image.open(path).convert("RGB") for path in paths]
    own_pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        output = theirs(own_pixels, output_hidden_states=True)

    for n_unfrozen, part in ((1, slice(None)), (2, slice(2)), (12, slice(2))):
        tokens, _, embedding = encoder.encode_with_tokens(pixels[part], n_unfrozen)
        cosine = torch.nn.functional.cosine_similarity(embedding, output.pooler_output[part])
        assert cosine.min() >= 0.99999
        assert relative_error(tokens, output.hidden_states[12 - n_unfrozen][part]) < 1e-5
    assert (encoder.identity.n_tokens, encoder.identity.positions_from_px) == (257, 518)
