"""Messages name tensors as files do, also those that a file lacks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cxr_cache.encoders.layouts import read_settings
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.encoders.tensor_names import EVA_X_GATED, make_speller, rename_tensors, spell
from cxr_cache.errors import EncoderError
from tests.encoders.test_bare_files import (
    DINOV2,
    DINOV3,
    disturb,
    make_eva,
    name_as_dinov2,
    name_as_eva_x,
    write_dinov3,
)
from tests.encoders.test_hugging_face import FAMILIES, write_model

NORM = re.compile(r"(norm1|layernorm_before|layer_norm1)\.weight$")


def require_spelled(
    tower: dict[str, Tensor], tensors: dict[str, Tensor], model_type: str, settings: Any
) -> None:
    """Names of a file follow from one of them, up to those of tensors that no image needs."""
    (known,) = [n for n in tensors if NORM.search(n) and ".0." in n and "text" not in n]
    speller = make_speller([known], model_type, settings)
    spelled = {each for name in tower for each in speller(name)}
    assert spelled <= tensors.keys()
    left = {name: tensors[name] for name in tensors.keys() - spelled if "bias_mask" not in name}
    assert rename_tensors(left, "") == {}, left.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_of_transformers_is_spelled(tmp_path, family):
    name, _ = write_model(tmp_path / "m", *FAMILIES[family])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    tower = load_encoder(name).visual.state_dict()
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    require_spelled(tower, tensors, config["model_type"], read_settings(config, ""))


@pytest.mark.parametrize("family", DINOV2)
def test_every_name_of_the_dinov2_repository_is_spelled(tmp_path, family):
    write_model(tmp_path / "m", *DINOV2[family])
    tensors = name_as_dinov2(load_file(tmp_path / "m" / "model.safetensors"))
    torch.save(tensors, tmp_path / "dinov2.pth")
    tower = load_encoder(f"local-file:{tmp_path / 'dinov2.pth'}").visual.state_dict()
    require_spelled(tower, tensors, "dinov2", DINOV2[family][2])


@pytest.mark.parametrize("kind", DINOV3)
def test_every_name_of_the_dinov3_repository_is_spelled(tmp_path, kind):
    path, tensors, _ = write_dinov3(tmp_path, DINOV3[kind])
    tower = load_encoder(f"local-file:{path}").visual.state_dict()
    require_spelled(tower, tensors, "dinov3_vit", DINOV3[kind])


def test_every_name_of_eva_x_is_spelled():
    model = disturb(make_eva())
    tensors = name_as_eva_x(model.state_dict())
    names = [f"trunk.{name}" for name in model.state_dict()]
    spelled = {each for name in names for each in spell(name, EVA_X_GATED)}
    assert tensors.keys() - spelled == {"mask_token", "lm_head.weight"}
    assert spelled <= tensors.keys()


def save_without(folder: Path, pattern: str, prefix: str = "") -> None:
    path = folder / "model.safetensors"
    kept = {f"{prefix}{k}": v for k, v in load_file(path).items() if not re.search(pattern, k)}
    save_file(kept, path)


@pytest.mark.parametrize("prefix", ["", "module.", "module.dinov2."])
def test_what_a_training_program_put_before_the_names_is_in_the_message(tmp_path, prefix):
    name, _ = write_model(tmp_path / "m", *FAMILIES["dinov2"])
    save_without(tmp_path / "m", r"layer\.1\..*key|layer_scale2|layernorm", prefix)
    with pytest.raises(EncoderError) as caught:
        load_encoder(name)
    (line,) = [line for line in str(caught.value).splitlines() if "missing" in line]
    assert line == (
        f"  missing in the file: {prefix}encoder.layer.0.layer_scale2.lambda1, "
        f"{prefix}encoder.layer.1.attention.attention.key.bias, "
        f"{prefix}encoder.layer.1.attention.attention.key.weight and 4 more"
    )
    assert "unknown" not in str(caught.value)
