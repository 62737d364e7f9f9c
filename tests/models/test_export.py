"""What is exported computes what the run computes, and says by itself how to use it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from cxr_cache.cli.main import cli
from cxr_cache.common import extras
from cxr_cache.common.files import WriterLock
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.preprocessing import normalise
from cxr_cache.encoders.encoder import Encoder, trainable_parameter_names
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import ConfigError, ExportError, RunError, StoreBusyError
from cxr_cache.metrics.operating_point import Calibration
from cxr_cache.models import export as export_module
from cxr_cache.models import export_onnx
from cxr_cache.models.export import export_run
from cxr_cache.models.export_onnx import build_whole_model, in_full_precision
from cxr_cache.models.heads import HeadBank
from cxr_cache.models.predict import Predictor, predict_images
from cxr_cache.models.run import Run, SavedModel
from cxr_cache.models.tuned import load_members
from scripts.write_random_biomedclip import write_biomedclip_folder
from tests.encoders.test_encoder import (
    TIMM_VIT,
    TINY_VIT,
    draw_pixels,
    relative_error,
    write_folder,
    write_open_clip_model,
)
from tests.synthetic import IMPORTED

FINDINGS = ("Cardiomegaly", "Pleural Effusion", "Nodule")
HF_TEXT = {"hf_model_name": "org/bert", "hf_tokenizer_name": "org/bert"}


def save_run(
    path: Path,
    encoder: Encoder,
    *,
    n_members: int = 1,
    n_unfrozen: int | None = None,
    tokens: str = "float32",
    precision: str = "fp32",
    input_norm: str = "l2",
    calibrates: bool = False,
    norm: str = "batch",
    hidden: tuple[int, ...] = (16, 8),
    **identity: Any,
) -> Run:
    """A finished run whose numbers are drawn: each member's head and blocks differ."""
    generator = torch.Generator().manual_seed(7)
    width = encoder.identity.embedding_width
    bank = HeadBank(n_members, width, len(FINDINGS), hidden=hidden, norm=norm)
    tensors = {
        # Far from initial weights, so that images get different probabilities
        name: 2 * tensor + 0.5 * torch.rand(tensor.shape, generator=generator)
        for name, tensor in bank.snapshot().items()
    }
    tail = None
    if n_unfrozen is not None:
        for name in trainable_parameter_names(encoder, n_unfrozen):
            tensor = encoder.get_parameter(name).detach()
            noise = torch.randn(n_members, *tensor.shape, generator=generator)
            tensors[name] = tensor + 0.3 * tensor.std().nan_to_num(1) * noise
        boundary = (encoder.identity.n_blocks or 0) - n_unfrozen
        tail = {
            "unfreeze_layers": n_unfrozen,
            "boundary_block": boundary,
            "precision": precision,
            "tokens": tokens,
        }
    trained_with = encoder.identity.to_dict() | {"precision": precision} | identity
    random_encoder = encoder.identity.is_random
    run = Run.create(path, {"kind": "test", "seed": 3, "random_encoder": random_encoder})
    thresholds = {finding: 0.2 + 0.1 * i for i, finding in enumerate(FINDINGS)}
    head = {"input_norm": input_norm, "hidden": hidden, "dropout": 0.5}
    slope, intercept = np.linspace(0.6, 1.7, len(FINDINGS)), np.linspace(-1, 0.5, len(FINDINGS))
    stored = Calibration("platt", slope, intercept).to_dict() if calibrates else None
    run.save_model(
        SavedModel(tensors, FINDINGS, thresholds, trained_with, head, tail, calibration=stored)
    )
    run.finish()
    return run


def tuned_embedding(run: Run, encoder: Encoder, pixels: torch.Tensor) -> torch.Tensor:
    """By our own stem and tail, from tokens that were not rounded."""
    model = run.load_model()
    if model.tail is None:
        return encoder.encode(pixels)[1]
    n_unfrozen = model.tail["unfreeze_layers"]
    with torch.no_grad():
        tokens = encoder.stem(encoder.prepare(pixels), n_unfrozen)
        (embedding,) = (m.encoder.tail(tokens, n_unfrozen)[1] for m in load_members(model, encoder))
    return embedding


@pytest.fixture
def tiny() -> Encoder:
    return load_encoder("random:test_vit:5", precision="fp32")


@pytest.fixture
def clip(tmp_path) -> Encoder:
    """A small model of open_clip with both towers on disk."""
    return load_encoder(write_open_clip_model(tmp_path / "clip", TIMM_VIT), precision="fp32")


def write_biomedclips_kind(folder: Path, file_format: str) -> str:
    """A timm image tower and a text tower of Hugging Face, of which only names are needed."""
    write_open_clip_model(folder, TIMM_VIT, interpolation="bicubic", resize_mode="shortest")
    weights = folder / "open_clip_model.safetensors"
    tensors = load_file(weights)
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith("visual.")}
    embedding = torch.rand(16, 24)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in text}
    tensors |= {f"text.transformer.{name}": tensor for name, tensor in text.items()}
    tensors |= {"text.embeddings": embedding, "logit_scale": torch.tensor(4.2).half()}
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] = HF_TEXT
    write_folder(folder, tensors, config)
    if file_format == "bin":
        weights.unlink()
        tied = tensors | {"text.decoder": embedding}  # a pickle may hold one tensor twice
        torch.save({"state_dict": tied}, folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


# --- open_clip ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_unfrozen", [None, 1, 2], ids=["frozen", "one-block", "two-blocks"])
@pytest.mark.parametrize("vision_cfg", [TINY_VIT, TIMM_VIT], ids=["open_clip", "timm"])
def test_open_clip_itself_loads_the_folder_and_gives_the_tuned_embedding(
    tmp_path, vision_cfg, n_unfrozen
):
    encoder = load_encoder(write_open_clip_model(tmp_path / "m", vision_cfg), precision="fp32")
    run = save_run(tmp_path / "run", encoder, n_unfrozen=n_unfrozen)
    pixels = draw_pixels(3, encoder.preprocessing.image_size_px)
    expected = tuned_embedding(run, encoder, pixels)

    summary = export_run(run, tmp_path / "out", "open-clip")

    assert summary.notes == ()
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    with torch.inference_mode():
        embedding = model.encode_image(normalise(pixels, encoder.preprocessing))
    assert relative_error(embedding, expected) < 1e-5
    changed = relative_error(encoder.encode(pixels)[1], expected) > 1e-2
    assert changed == (n_unfrozen is not None)


@pytest.mark.parametrize(
    ("n_members", "n_unfrozen", "input_norm"), [(1, 2, "l2"), (3, None, "l2"), (1, None, "none")]
)
def test_head_json_is_enough_without_this_package(tmp_path, n_members, n_unfrozen, input_norm):
    """A file on disk to probabilities, by open_clip, torch and what head.json says."""
    name = write_open_clip_model(tmp_path / "m", TIMM_VIT, resize_mode="squash")
    encoder = load_encoder(name, precision="fp32", normalize="imagenet")
    options = {"n_members": n_members, "n_unfrozen": n_unfrozen, "input_norm": input_norm}
    options["calibrates"] = n_members > 1
    run = save_run(tmp_path / "run", encoder, **options)
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 310), np.uint8)).save(path)
    expected = predict_images(run, [path], encoder).probabilities
    folder = tmp_path / "out"

    export_run(run, folder, "open-clip")

    told = json.loads((folder / "head.json").read_text())
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    heads = nn.ModuleList(plain_head(24, told["hidden"], 3) for _ in range(told["n_members"]))
    heads.load_state_dict(load_file(folder / "head.safetensors"))
    with torch.no_grad():
        embedding = model.eval().encode_image(preprocess(Image.open(path).convert("RGB"))[None])
        if told["input_norm"] == "l2":
            embedding = F.normalize(embedding, dim=-1)
        probabilities = torch.stack([torch.sigmoid(h(embedding)) for h in heads.eval()]).mean(0)
    how_to_use = " ".join(told["how_to_use"])
    assert ("slope * torch.logit(probabilities) + intercept" in how_to_use) == (n_members > 1)
    if n_members > 1:
        slope, intercept = (torch.tensor(told["calibration"][k]) for k in ("slope", "intercept"))
        probabilities = torch.sigmoid(slope * torch.logit(probabilities) + intercept)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert told["findings"] == list(FINDINGS)
    assert told["thresholds"] == pytest.approx(run.thresholds)
    assert any("F.normalize" in s or "normalize(" in s for s in told["how_to_use"]) == (
        input_norm == "l2"
    )
    assert f"ModuleList of {n_members} such" in " ".join(told["how_to_use"])
    assert "Linear(24, 16), BatchNorm1d" in " ".join(told["how_to_use"])


def plain_head(n_inputs: int, hidden: Sequence[int], n_outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(n_inputs, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout()]
        n_inputs = width
    return nn.Sequential(*layers, nn.Linear(n_inputs, n_outputs))


@pytest.mark.parametrize("hidden", [(16,), ()])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_an_export_tells_the_layers_that_the_head_has(tmp_path, clip, norm, hidden):
    """Built by the words of head.json alone, whatever norm and depth the recipe asked for."""
    run = save_run(tmp_path / "run", clip, norm=norm, hidden=hidden)
    export_run(run, tmp_path / "out", "open-clip")
    told = json.loads((tmp_path / "out" / "head.json").read_text())
    (sentence,) = (line for line in told["how_to_use"] if line.startswith("A head is"))
    words = sentence.removeprefix("A head is torch.nn.Sequential of ").partition(" in eval")[0]
    layers, n_units = [], 24
    for word in re.findall(r"[A-Z]\w+(?:\(.*?\))?", words):
        name, _, shape = word.rstrip(")").partition("(")
        n_units = int(shape.split(", ")[1]) if shape else n_units
        arguments = [int(n) for n in shape.split(", ")] if shape else []
        arguments = arguments or ([n_units] if "Norm" in name else [])
        layers.append(getattr(nn, name)(*arguments))
    heads = nn.ModuleList([nn.Sequential(*layers)]).eval()
    heads.load_state_dict(load_file(tmp_path / "out" / "head.safetensors"))
    assert told["norm"] == norm or not hidden  # without a hidden layer there is none
    assert told["features"] == "projected"
    embedding = torch.rand(5, 24)
    bank = HeadBank.from_snapshot(run.load_model().head_tensors)
    with torch.no_grad():
        torch.testing.assert_close(heads[0](embedding), bank(embedding)[0])


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_only_the_fine_tuned_blocks_differ_from_the_checkpoint(tmp_path, file_format):
    """In BiomedCLIP's layout: text tower and logit scale bit for bit, in their types."""
    encoder = load_encoder(write_biomedclips_kind(tmp_path / "m", file_format), precision="fp32")
    run = save_run(tmp_path / "run", encoder, n_unfrozen=2)
    pixels = draw_pixels(2, 160)
    expected = tuned_embedding(run, encoder, pixels)

    summary = export_run(run, tmp_path / "out", "open-clip")

    if file_format == "bin":
        original = torch.load(tmp_path / "m" / "open_clip_pytorch_model.bin")["state_dict"]
    else:
        original = load_file(tmp_path / "m" / "open_clip_model.safetensors")
    written = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    tuned = run.load_model().tail_tensors
    assert written.keys() == original.keys()
    assert tuned.keys() <= written.keys()
    for name, tensor in written.items():
        wanted = tuned[name][0] if name in tuned else original[name]
        assert tensor.dtype == wanted.dtype, name
        assert torch.equal(tensor, wanted), name
    exported = load_encoder(f"local-dir:{tmp_path / 'out'}", precision="fp32")
    assert relative_error(exported.encode(pixels)[1], expected) < 1e-5
    assert "text tower's configuration from org/bert" in summary.notes[0]
    assert "No tokenizer files" in summary.notes[1]


def test_the_runs_preprocessing_goes_with_the_folder(tmp_path):
    """Whatever options the features were extracted with, open_clip will prepare images so."""
    name = write_open_clip_model(tmp_path / "m", TIMM_VIT, resize_mode="shortest")
    options = {"resize": "squash", "normalize": "imagenet", "precision": "fp32"}
    encoder = load_encoder(name, **options)
    export_run(save_run(tmp_path / "run", encoder), tmp_path / "out", "open-clip")

    exported = load_encoder(f"local-dir:{tmp_path / 'out'}", precision="fp32")

    assert exported.preprocessing == encoder.preprocessing
    assert exported.identity.differences(encoder.identity) == {}


def test_tokenizer_and_licence_are_copied_and_nothing_else(tmp_path):
    encoder = load_encoder(write_biomedclips_kind(tmp_path / "m", "safetensors"), precision="fp32")
    for name in ("tokenizer.json", "vocab.txt", "LICENSE.md", "README.md", "private.csv"):
        (tmp_path / "m" / name).write_text(name)

    summary = export_run(save_run(tmp_path / "run", encoder), tmp_path / "out", "open-clip")

    ours = {"open_clip_config.json", "open_clip_model.safetensors", "head.json", "head.safetensors"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == ours | {"tokenizer.json", "vocab.txt", "LICENSE.md"}
    assert (tmp_path / "out" / "vocab.txt").read_text() == "vocab.txt"
    assert len(summary.notes) == 1, "the tokenizer is there"
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "a colleague can read all or none"
    assert summary.n_bytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())


def test_provenance_is_told(tmp_path, clip):
    run = save_run(tmp_path / "first", clip, n_unfrozen=2, tokens="float16")
    export_run(run, tmp_path / "out", "open-clip")
    told = json.loads((tmp_path / "out" / "head.json").read_text())

    assert told["fine_tuned_blocks"] == ["visual.trunk.blocks.4", "visual.trunk.blocks.5"]
    assert told["encoder"] == clip.identity.to_dict()
    assert told["run"]["name"] == "first"
    assert told["run"]["seed"] == 3
    assert "cxr-cache" in told["run"]["versions"]
    assert told["precision"].endswith("encoder fp32, blocks fp32, tokens float16.")
    assert told["notice"] == "Research software. Not for clinical use."


# --- what open_clip cannot hold -------------------------------------------------------------------


def test_random_weights_have_no_text_tower(tmp_path, tiny):
    run = save_run(tmp_path / "run", tiny)
    with pytest.raises(ExportError, match=r"random:test_vit:5.*text tower.*Use --format onnx"):
        export_run(run, tmp_path / "out", "open-clip")


def test_several_fine_tuned_towers_are_not_one_model(tmp_path, clip):
    run = save_run(tmp_path / "run", clip, n_members=3, n_unfrozen=1)
    with pytest.raises(ExportError, match=r"3 fine-tuned.*--final refit or --final best-fold"):
        export_run(run, tmp_path / "out", "open-clip")


def test_a_checkpoint_of_an_image_tower_alone(tmp_path):
    name = write_open_clip_model(tmp_path / "m", TIMM_VIT)
    weights = tmp_path / "m" / "open_clip_model.safetensors"
    vision = {k: v for k, v in load_file(weights).items() if k.startswith("visual.")}
    save_file(vision, weights)
    run = save_run(tmp_path / "run", load_encoder(name, precision="fp32"))

    with pytest.raises(ExportError, match=r"safetensors has no text tower.*--format onnx"):
        export_run(run, tmp_path / "out", "open-clip")
    assert {path.name for path in tmp_path.iterdir()} == {"m", "run"}


@pytest.mark.parametrize("file_format", ["open-clip", "onnx"])
def test_imported_embeddings_have_no_encoder_to_export(tmp_path, tiny, file_format):
    run = save_run(tmp_path / "run", tiny)
    run.save_model(replace(run.load_model(), encoder=IMPORTED))
    remedy = (
        r"imported from imported:tiny\.npz.* export .*`cxr-cache extract` on the images and train"
    )
    with pytest.raises(RunError, match=remedy):
        export_run(run, tmp_path / "out", file_format)


def test_another_encoder_is_refused(tmp_path, clip):
    run = save_run(tmp_path / "run", clip, n_unfrozen=1)
    other = write_folder(
        tmp_path / "other",
        {k: v + 1 for k, v in load_file(tmp_path / "clip/open_clip_model.safetensors").items()},
        json.loads((tmp_path / "clip" / "open_clip_config.json").read_text()),
    )
    with pytest.raises(RunError, match=r"weights_sha256: .* in the run"):
        export_run(run, tmp_path / "out", "open-clip", model=other)


# --- where it is written --------------------------------------------------------------------------


def test_an_export_is_replaced_only_when_asked(tmp_path, clip):
    run, out = save_run(tmp_path / "run", clip), tmp_path / "deep" / "out"
    out.mkdir(parents=True)  # empty, so free
    export_run(run, out, "open-clip")
    (out / "left_over.txt").write_text("")

    with pytest.raises(ConfigError, match=r"out exists\..*--overwrite"):
        export_run(run, out, "open-clip")
    export_run(run, out, "open-clip", overwrite=True)

    assert not (out / "left_over.txt").exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_things_is_never_replaced(tmp_path, clip, overwrite):
    run, out = save_run(tmp_path / "run", clip), tmp_path / "out"
    out.mkdir()
    (out / "thesis.docx").write_text("")
    with pytest.raises(ConfigError, match="exists" if not overwrite else "no export"):
        export_run(run, out, "open-clip", overwrite=overwrite)
    assert (out / "thesis.docx").exists()


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path, clip):
    run = save_run(tmp_path / "run", clip)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"is a file; --out needs a folder"):
        export_run(run, tmp_path / "file", "open-clip", overwrite=True)
    with pytest.raises(ConfigError, match=r"is a folder; --out needs a file, such as model\.onnx"):
        export_run(run, tmp_path / "clip", "onnx", overwrite=True)


def test_an_encoder_is_not_replaced_by_what_was_made_from_it(tmp_path, clip):
    """An export can be the encoder of a next run, whose export would pass the check for one."""
    export_run(save_run(tmp_path / "first", clip), tmp_path / "out", "open-clip")
    second = load_encoder(f"local-dir:{tmp_path / 'out'}", precision="fp32")
    run = save_run(tmp_path / "second", second, n_unfrozen=1)

    with pytest.raises(ConfigError, match="is the run's own encoder"):
        export_run(run, tmp_path / "out", "open-clip", overwrite=True)


@pytest.mark.parametrize("moment", ["write", "sync_folder"])
def test_a_failed_export_leaves_what_was_there(tmp_path, clip, monkeypatch, moment):
    run, out = save_run(tmp_path / "run", clip), tmp_path / "out"
    export_run(run, out, "open-clip")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_arguments: object) -> None:
        raise OSError("no space")

    if moment == "write":
        monkeypatch.setattr("cxr_cache.models.export_open_clip._copy_beside", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        export_run(run, out, "open-clip", overwrite=True)

    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"clip", "run", "out"}


def test_a_second_writer_of_an_export_is_refused(tmp_path, clip):
    """Even with --overwrite: each would delete what the other has just written."""
    run, out = save_run(tmp_path / "run", clip), tmp_path / "out"
    lock = WriterLock.acquire(out, tmp_path / ".out.lock")
    with pytest.raises(StoreBusyError, match=r"out is being written by process"):
        export_run(run, out, "open-clip", overwrite=True)
    assert not out.exists()
    lock.release()
    export_run(run, out, "open-clip")
    assert {path.name for path in tmp_path.iterdir()} == {"clip", "run", "out"}


def test_an_unknown_format(tmp_path, clip):
    with pytest.raises(ConfigError, match="format is 'tflite'; choose from open-clip, onnx"):
        export_run(save_run(tmp_path / "run", clip), tmp_path / "out", "tflite")


# --- ONNX -----------------------------------------------------------------------------------------


def run_onnx(path: Path, pixels: torch.Tensor) -> np.ndarray:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == ["pixels"]
    return session.run(["probabilities"], {"pixels": pixels.numpy()})[0]


TUNED = {"n_unfrozen": 2, "n_members": 2, "tokens": "float16"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Run, Path]:
    """A fine-tuned ensemble, and its ONNX file."""
    folder = tmp_path_factory.mktemp("onnx")
    run = save_run(folder / "run", load_encoder("random:test_vit:5", precision="fp32"), **TUNED)
    return run, export_run(run, folder / "model.onnx", "onnx").path


def test_an_onnx_file_averages_fine_tuned_members_for_any_number_of_images(exported, tiny):
    """Tokens that training read from a store are rounded as there."""
    run, path = exported
    pixels = draw_pixels(5, 160)
    expected = Predictor(run.load_model(), tiny).from_pixels(pixels)

    assert np.ptp(expected, axis=0).max() > 1e-2, "all images look alike"
    for n_images in (1, 2, 5):
        given = run_onnx(path, pixels[:n_images])
        np.testing.assert_allclose(given, expected[:n_images], atol=1e-5)


NEWER, OLDER = export_onnx._EXPORTERS


@pytest.mark.parametrize(
    "exporter",
    [pytest.param(NEWER, marks=pytest.mark.slow, id="newer"), pytest.param(OLDER, id="older")],
)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("random:test_vit:5", {}),
        ("random:test_vit:5", {"n_members": 3, "input_norm": "none", "calibrates": True}),
        ("random:test_vit:5", {"n_unfrozen": 2, "tokens": "float16"}),
        ("random:test_vit3:5", {"n_unfrozen": 1}),  # attention pooling
        ("random:test_resnet:5", {}),
        ("open_clip", {"n_unfrozen": 2, "calibrates": True}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_an_onnx_file_gives_the_probabilities_of_predict(
    tmp_path, monkeypatch, exporter, name, options
):
    """Every kind of run and tower, by each of torch's exporters (the newer takes ten seconds)."""
    monkeypatch.setattr(export_onnx, "_EXPORTERS", (exporter,))
    if name == "open_clip":
        name = write_open_clip_model(tmp_path / "m", TINY_VIT)
    encoder = load_encoder(name, precision="fp32")
    run = save_run(tmp_path / "run", encoder, **options)
    pixels = draw_pixels(5, encoder.preprocessing.image_size_px)

    summary = export_run(run, tmp_path / "model.onnx", "onnx")

    expected = run.calibration.apply(Predictor(run.load_model(), encoder).from_pixels(pixels))
    assert np.ptp(expected, axis=0).max() > 1e-2, "all images look alike"
    for n_images in (1, 5):
        given = run_onnx(tmp_path / "model.onnx", pixels[:n_images])
        np.testing.assert_allclose(given, expected[:n_images], atol=1e-5)
    assert summary.notes[0].startswith("Checked with onnxruntime: probabilities of 8 ")
    assert {path.name for path in tmp_path.iterdir()} <= {"m", "run", "model.onnx"}, "one file"


def test_where_the_newer_exporter_fails_the_older_is_asked(tmp_path, tiny, monkeypatch):
    """Which of the two can, depends on torch's version and the model."""
    export, asked = torch.onnx.export, []

    def refuse_the_newer(*arguments: Any, dynamo: bool, **options: Any) -> None:
        asked.append(dynamo)
        if dynamo:
            raise RuntimeError("no such\nlowering")
        export(*arguments, dynamo=dynamo, **options)

    run = save_run(tmp_path / "run", tiny)
    monkeypatch.setattr(torch.onnx, "export", refuse_the_newer)
    export_run(run, tmp_path / "model.onnx", "onnx")
    assert asked == [True, False]

    monkeypatch.setattr(export_onnx, "_EXPORTERS", (NEWER,))
    with pytest.raises(
        ExportError, match=r"kept:\n  RuntimeError: no such\nTry other versions than torch"
    ):
        export_run(run, tmp_path / "other.onnx", "onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model.onnx"}


def test_an_onnx_file_explains_itself(exported, tiny):
    run, path = exported
    model = pytest.importorskip("onnx").load(path)
    told = {entry.key: entry.value for entry in model.metadata_props}

    assert next(o.version for o in model.opset_import if not o.domain) >= 17
    assert json.loads(told["findings"]) == list(FINDINGS)
    assert json.loads(told["thresholds"]) == pytest.approx(run.thresholds)
    preprocessing = json.loads(told["preprocessing"])
    in_words = preprocessing.pop("decode_rule_in_words")
    assert preprocessing == json.loads(json.dumps(tiny.preprocessing.to_dict()))
    assert {"decode_rule", "image_size_px", "resize", "interpolation"} <= preprocessing.keys()
    assert in_words.startswith("Grey: 8-bit values are used as stored")
    assert json.loads(told["encoder"])["weights_sha256"] == tiny.identity.weights_sha256
    assert json.loads(told["fine_tuned_blocks"]) == [
        "visual.trunk.blocks.4",
        "visual.trunk.blocks.5",
    ]
    assert "Not for clinical use" in told["notice"]
    assert "RANDOM WEIGHTS" in told["notice"]
    assert "uint8 (B, 3, S, S)" in told["how_to_use"]
    shape = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 3, 160, 160]
    content = path.read_bytes()
    assert b"site-packages" not in content, "where torch was installed is nobody's business"


def test_a_run_in_bf16_is_exported_in_fp32_and_says_so(tmp_path, clip):
    """Compared with the same weights in fp32: the rounding is the run's, not the file's."""
    run = save_run(tmp_path / "run", clip, n_unfrozen=2, precision="bf16")
    in_bf16 = load_encoder(f"local-dir:{tmp_path / 'clip'}", precision="bf16")
    model, pixels = run.load_model(), draw_pixels(4, 160)

    summary = export_run(run, tmp_path / "out", "open-clip")
    with torch.inference_mode():
        probabilities = build_whole_model(model, clip)(pixels)

    expected = Predictor(in_full_precision(model), clip).from_pixels(pixels)
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    assert 1e-4 < np.abs(Predictor(model, in_bf16).from_pixels(pixels) - expected).max() < 0.05
    assert "in the run: encoder bf16, blocks bf16, tokens float32." in summary.notes[-1]


def test_exporting_leaves_the_encoder_as_it_was(tmp_path, tiny):
    """Members share the encoder's frozen tensors; their blocks must not stay in it."""
    run = save_run(tmp_path / "run", tiny, n_members=2, n_unfrozen=2)
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}

    whole = build_whole_model(run.load_model(), tiny)

    for name, tensor in tiny.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    tensors = {id(p): p for p in whole.parameters()}
    n_tail = sum(tiny.get_parameter(n).numel() for n in trainable_parameter_names(tiny, 2))
    n_heads = sum(p.numel() for p in whole.heads.parameters())  # norms are folded in
    n_encoder = sum(p.numel() for p in tiny.parameters())
    assert sum(p.numel() for p in tensors.values()) == n_encoder + 2 * n_tail + n_heads
    assert not any(p.requires_grad for p in tensors.values())


@pytest.mark.parametrize(("error", "shown"), [(3e-4, r"0\.0003, more"), (np.nan, "nan, more")])
def test_a_file_that_computes_something_else_is_not_kept(
    exported, tmp_path, monkeypatch, error, shown
):
    run, path = exported
    monkeypatch.setattr(export_onnx, "_convert", lambda *given: shutil.copy(path, given[-1]))
    sound = Predictor.from_pixels
    monkeypatch.setattr(Predictor, "from_pixels", lambda *given: sound(*given) + np.float32(error))
    with pytest.raises(ExportError, match=rf"none was kept:\n.*torch's by {shown}[\s\S]*torch 2"):
        export_run(run, tmp_path / "model.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_beyond_what_onnx_holds_is_refused(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(export_onnx, "_MAX_BYTES", 10**6)
    with pytest.raises(ExportError, match=r"weights, and an ONNX file holds at most"):
        export_run(save_run(tmp_path / "run", tiny), tmp_path / "model.onnx", "onnx")


def test_without_the_extra_the_error_says_what_to_install(tmp_path, tiny, monkeypatch):
    """Before the encoder is loaded; open-clip needs none of it."""
    monkeypatch.setattr(extras, "package_versions", lambda name, *_: "script" not in name)
    monkeypatch.setattr(export_module, "reload_encoder", pytest.fail)
    with pytest.raises(ConfigError, match=r"needs onnxscript, .*pip install 'cxr-cache\[onnx\]'"):
        export_run(save_run(tmp_path / "run", tiny), tmp_path / "model.onnx", "onnx")


def test_importing_export_imports_no_onnx():
    code = "import sys, cxr_cache.models.export; print({'onnx', 'onnxruntime'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()"


# --- the command ----------------------------------------------------------------------------------


def succeed(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_from_images_to_an_onnx_file_that_predicts_as_the_run(tmp_path):
    """The whole path by the command line, fine-tuned from cached tokens."""
    data = write_phantoms(tmp_path / "data", n_studies=24, image_size_px=64)
    store, run, out = tmp_path / "s.h5", tmp_path / "run", tmp_path / "model.onnx"
    extract = ["extract", "--csv-dir", tmp_path / "data", "--image-dir", data.image_dir]
    options = ["--model", "random:test_vit", "--precision", "fp32", "--num-workers", 0]
    succeed(*extract, "--store", store, "--tokens", *options)
    quick = ["--epochs", 2, "--folds", 2, "--lr", 1e-3, "--precision", "fp32"]
    quick += ["--batch-size", 8, "--final", "refit"]
    succeed("finetune", store, "--run-dir", run, *quick)

    refusal = CliRunner().invoke(
        cli, ["export", str(run), "--format", "open-clip", "--out", str(tmp_path / "folder")]
    )
    output = succeed("export", run, "--format", "onnx", "--out", out)

    assert refusal.exit_code == 1
    assert "Use --format onnx" in refusal.output
    assert f"{out} written, " in output
    assert "within" in output
    assert "RANDOM WEIGHTS" in output
    images = sorted(data.image_dir.iterdir())[:5]
    succeed("predict", run, *images, "--out", tmp_path / "p.csv")
    findings = Run.open(run).load_model().findings
    expected = pd.read_csv(tmp_path / "p.csv")[list(findings)].to_numpy()
    resized = [Image.open(i).resize((160, 160), Image.Resampling.BICUBIC) for i in images]
    pixels = torch.from_numpy(np.stack([np.stack([np.asarray(image)] * 3) for image in resized]))
    np.testing.assert_allclose(run_onnx(out, pixels), expected, atol=2e-5)


# --- full size ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_biomedclip_at_full_size(tmp_path):
    """196 M parameters: both formats, and every tensor that was not trained."""
    original = write_biomedclip_folder(tmp_path / "m")
    encoder = load_encoder(f"local-dir:{tmp_path / 'm'}", precision="fp32")
    run = save_run(tmp_path / "run", encoder, n_unfrozen=2, tokens="float16")
    pixels = draw_pixels(2, 224)
    expected = tuned_embedding(run, encoder, pixels)

    export_run(run, tmp_path / "out", "open-clip")
    export_run(run, tmp_path / "model.onnx", "onnx")

    exported = load_encoder(f"local-dir:{tmp_path / 'out'}", precision="fp32")
    assert relative_error(exported.encode(pixels)[1], expected) < 1e-5
    written = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    tuned = run.load_model().tail_tensors
    assert len(tuned) == 24
    assert all(torch.equal(written[k], v) for k, v in original.items() if k not in tuned)
    np.testing.assert_allclose(
        run_onnx(tmp_path / "model.onnx", pixels),
        Predictor(run.load_model(), encoder).from_pixels(pixels),
        atol=1e-4,
    )
