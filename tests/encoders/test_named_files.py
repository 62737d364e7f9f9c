"""A file of weights that is named by its path is read as its folder is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from cxr_cache.encoders.identity import EncoderIdentity
from cxr_cache.encoders.loading import load_encoder, recorded_options
from cxr_cache.errors import EncoderError
from tests.encoders.equality import disturb
from tests.encoders.test_bare_files import DINOV2, name_as_dinov2
from tests.encoders.test_encoder import write_folder
from tests.encoders.test_hugging_face import FAMILIES, write_model

TINY = {"embed_dim": 128, "depth": 2, "num_heads": 2, "img_size": 64}
CLIP = {"image_size": 64, "patch_size": 16, "width": 128, "layers": 2}


def write_timms(folder: Path) -> Path:
    """A ViT of timm, whose names of tensors are those of the DINOv2 repository, too."""
    architecture = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"  # its mean is 0.5
    model = disturb(timm.create_model(architecture, num_classes=5, **TINY))
    save_for_hf(model, folder, model_args=TINY, safe_serialization=True)
    return folder / "model.safetensors"


def write_open_clips(folder: Path) -> Path:
    """A CLIP without QuickGELU, whose names of tensors are those of OpenAI's, which has it."""
    import open_clip

    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    cfg = {"embed_dim": 24, "vision_cfg": CLIP, "text_cfg": text}
    tensors = disturb(open_clip.CLIP(**cfg)).state_dict()
    write_folder(folder, tensors, {"model_cfg": cfg, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}})
    return next(folder.glob("open_clip*.safetensors"))


def write_transformers(folder: Path) -> Path:
    write_model(folder, *FAMILIES["dinov2"])
    return folder / "model.safetensors"


def require_as_folder(named: EncoderIdentity, folder: EncoderIdentity, config: str) -> None:
    assert named.differences(folder) == {}
    assert named.weights_sha256 == folder.weights_sha256
    assert (named.notes[:-1], named.preprocessing) == (folder.notes, folder.preprocessing)
    assert f"{config} beside it says what encoder it is" in named.notes[-1]
    assert named.notes[-1].startswith(Path(named.name).name.partition("?")[0])
    recorded = recorded_options(json.loads(json.dumps(named.to_dict())))
    assert load_encoder(**vars(recorded)).identity == named


@pytest.mark.parametrize(
    ("write", "config"),
    [
        (write_timms, "config.json"),
        (write_open_clips, "open_clip_config.json"),
        (write_transformers, "config.json"),
    ],
)
@pytest.mark.parametrize("scheme", ["local-dir", "local-file"])
def test_a_file_is_read_as_the_configuration_beside_it_says(tmp_path, write, config, scheme):
    path = write(tmp_path / "m")
    folder = load_encoder(f"local-dir:{tmp_path / 'm'}", precision="fp32").identity
    named = load_encoder(f"{scheme}:{path}", precision="fp32").identity
    require_as_folder(named, folder, config)
    # The same weights as a training program saves them, under another name
    torch.save({"state_dict": load_file(path), "epoch": 3}, path.parent / "best.pt")
    require_as_folder(
        load_encoder(f"{scheme}:{path.parent / 'best.pt'}", precision="fp32").identity,
        folder,
        config,
    )
    by_query = load_encoder(f"local-dir:{path.parent}?file=best.pt", precision="fp32").identity
    require_as_folder(by_query, folder, config)


def test_another_size_goes_with_a_named_file(tmp_path):
    path = write_transformers(tmp_path / "m")
    folder = load_encoder(f"local-dir:{tmp_path / 'm'}?img_size=98").identity
    named = load_encoder(f"local-dir:{path}?img_size=98").identity
    require_as_folder(named, folder, "config.json")
    assert (named.positions_from_px, named.name) == (70, f"local-file:{path}?img_size=98")


def test_weights_of_transformers_in_a_repository_of_open_clip_are_read_by_config_json(tmp_path):
    """Published CLIPs often hold both, each with its own configuration."""
    write_model(tmp_path / "m", *FAMILIES["clip"])
    expected = load_encoder(f"local-dir:{tmp_path / 'm'}").identity
    (tmp_path / "m" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": 24, "vision_cfg": CLIP}})
    )
    named = load_encoder(f"local-dir:{tmp_path / 'm' / 'model.safetensors'}").identity
    require_as_folder(named, expected, "config.json")


def test_its_own_tensors_are_asked_where_the_configuration_names_no_known_tower(tmp_path):
    """Some repositories hold a config.json for nothing but the hub's count of downloads."""
    write_model(tmp_path / "m", *DINOV2["dinov2"])
    tensors = name_as_dinov2(load_file(tmp_path / "m" / "model.safetensors"))
    (tmp_path / "m" / "config.json").unlink()
    save_file(tensors, tmp_path / "m" / "vit.safetensors")
    path = tmp_path / "m" / "vit.safetensors"
    alone = load_encoder(f"local-file:{path}").identity
    for content in ({}, {"model_type": "own"}):
        (tmp_path / "m" / "config.json").write_text(json.dumps(content))
        assert load_encoder(f"local-file:{path}").identity == alone


def test_a_name_that_says_what_the_file_is_is_not_overruled_by_a_configuration(tmp_path):
    path = write_open_clips(tmp_path / "m")
    message = "holds a tower 128 wide, and chexzero is 768 wide"
    with pytest.raises(EncoderError, match=message):
        load_encoder(f"chexzero?file={path}")


REFUSED: dict[str, tuple[Any, str]] = {
    "a tower that is unknown": (
        {"model_type": "bert"},
        r"config\.json has the model_type 'bert', which is no image tower that is known",
    ),
    "no JSON": ("{", r"config\.json cannot be read as JSON"),
    "of another model": (
        {"model_type": "vit", "hidden_size": 96, "num_attention_heads": 4},
        r"(?s)model\.safetensors does not fit the image tower that the configuration describes",
    ),
    "of timm's with an architecture that is none": (
        {"architecture": "vit_none"},
        r"config\.json wants the architecture 'vit_none', which timm",
    ),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_configuration_beside_a_file_that_does_not_fit_is_refused(tmp_path, content, message):
    path = write_transformers(tmp_path / "m")
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "m" / "config.json").write_text(text)
    with pytest.raises(EncoderError, match=message):
        load_encoder(f"local-dir:{path}")


# --- Sizes that patches do not fill --------------------------------------------------------------

SIZES: dict[str, tuple[str, int, str]] = {
    "timm's 16": ("timm", 225, r"16 x 16 pixels .*\?img_size=224 or \?img_size=240\.$"),
    "open_clip's 16": ("open_clip", 225, r"16 x 16 pixels .*\?img_size=224 or \?img_size=240\.$"),
    "transformers' 14": (
        "transformers",
        225,
        r"14 x 14 pixels .*\?img_size=224 or \?img_size=238\.$",
    ),
    "OpenAI's 16": ("clip", 100, r"16 x 16 pixels .*\?img_size=96 or \?img_size=112\.$"),
    "DINOv2's 14": ("dinov2", 13, r"14 x 14 pixels .*\?img_size=14\.$"),
    "random": ("random", 225, r"16 x 16 pixels .*\?img_size=224 or \?img_size=240\.$"),
    "oblong": ("oblong", 225, r"16 x 8 pixels .*\?img_size=224 or \?img_size=240\.$"),
    "windows": ("swin", 226, r"4 x 4 pixels .*\?img_size=224 or \?img_size=228\.$"),
}


def write_by_kind(folder: Path, kind: str) -> str:
    if kind == "random":
        return "random:test_vit"
    if kind in ("oblong", "swin"):
        architecture, changes = {
            "oblong": ("vit_tiny_patch16_224", TINY | {"patch_size": (16, 8)}),
            "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "num_heads": (2,) * 4}),
        }[kind]
        save_for_hf(timm.create_model(architecture, **changes), folder, model_args=changes)
        return f"local-dir:{folder}"
    if kind == "dinov2":
        write_model(folder / "hf", *DINOV2["dinov2"])
        tensors = name_as_dinov2(load_file(folder / "hf" / "model.safetensors"))
        save_file(tensors, folder / "vit.safetensors")
        return f"local-file:{folder / 'vit.safetensors'}"
    if kind == "clip":
        path = write_open_clips(folder)
        return f"local-file:{path.rename(folder.parent / 'clip.safetensors')}"
    write = {"timm": write_timms, "open_clip": write_open_clips, "transformers": write_transformers}
    return f"local-dir:{write[kind](folder).parent}"


@pytest.mark.parametrize(("kind", "px", "message"), SIZES.values(), ids=SIZES.keys())
def test_a_size_that_patches_do_not_fill_is_refused_with_the_nearest(tmp_path, kind, px, message):
    name = write_by_kind(tmp_path / "m", kind)
    start = rf"asks for images of {px} x {px} pixels, which the encoder's patches of "
    with pytest.raises(EncoderError, match=start + message) as refused:
        load_encoder(f"{name}?img_size={px}")
    assert "\n" not in str(refused.value)
