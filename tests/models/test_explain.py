"""Where a run looked: the attention is the tower's own, and the map finds what can be found."""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from cxr_cache.cli.main import cli
from cxr_cache.config import ExtractConfig, FinetuneConfig, TrainConfig
from cxr_cache.datasets import images as images_module
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.phantoms.dataset import draw_phantom
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import ConfigError, EncoderError, ImageError, RunError
from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.models.explain import (
    Explanation,
    TraceableModel,
    explain_images,
    find_extent,
    parse_findings,
    roll_out,
)
from cxr_cache.models.export_onnx import plain_heads
from cxr_cache.models.predict import predict_images
from cxr_cache.models.run import Run
from cxr_cache.models.tuned import TailAndHead
from cxr_cache.report.cases import Case
from cxr_cache.report.explanations import write_explanations
from cxr_cache.report.pictures import draw_maps
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.training.finetune import tune_run
from cxr_cache.training.train import fit_run
from tests import synthetic
from tests.encoders.test_encoder import TINY_VIT, draw_pixels, write_open_clip_model
from tests.encoders.test_timm_models import EVA
from tests.encoders.test_timm_models import write_folder as write_timm_folder
from tests.report.test_report import Page

FINDINGS = ("Cardiomegaly", "Consolidation", "Pleural Effusion", "Pneumothorax")
SIZE_PX = 160


@pytest.fixture(scope="module")
def tiny() -> Encoder:
    torch.set_num_threads(1)
    return load_encoder("random:test_vit", precision="fp32")


def draw_cohort(folder: Path, n_images: int, seed: int = 5) -> Cohort:
    """Frontal phantoms with some of the findings, written as files."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    targets = (rng.random((n_images, len(FINDINGS))) < 0.35).astype(np.float32)
    for k, row in enumerate(targets):
        shown = [finding for finding, there in zip(FINDINGS, row, strict=True) if there]
        pixels, _ = draw_phantom(shown, "Frontal", np.random.default_rng([seed, k]), SIZE_PX)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    images = {
        "image_id": [f"{k}.png" for k in range(n_images)],
        "study_uid": np.arange(n_images),
        "projection": "Frontal",
    }
    return Cohort(
        pd.DataFrame(images),
        targets=targets,
        findings=FINDINGS,
        source={},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny) -> dict[str, Path]:
    """Runs of a few steps: what they learnt does not matter."""
    folder = tmp_path_factory.mktemp("explain")
    cohort = draw_cohort(folder / "images", 32)
    caching = ExtractConfig(num_workers=0, unfreeze_layers=2)
    extract_embeddings(cohort, folder / "images", folder / "f.h5", tiny, caching)
    frozen = TrainConfig(
        epochs=(1,), n_folds=2, batch_size=8, hidden=(16,), final="ensemble", n_jobs=1
    )
    tuned = FinetuneConfig.of_recipe(
        "reference",
        epochs=(1,),
        n_folds=2,
        batch_size=8,
        hidden=(16,),
        precision="fp32",
        device="cpu",
    )
    fit_run(folder / "f.h5", folder / "frozen", frozen)
    tune_run(folder / "f.h5", folder / "tuned", tuned)
    return {name: folder / name for name in ("frozen", "tuned", "images")}


# --- the arithmetic ------------------------------------------------------------------------------


@pytest.mark.parametrize("n_blocks", [1, 3])
@pytest.mark.parametrize("kind", ["timm", "open_clip", "eva"])
def test_attention_spelled_out_is_the_towers(kind, n_blocks, tiny, tmp_path):
    """The embedding that depends on the attention is the one that the quick way gives."""
    encoder = tiny
    if kind == "open_clip":
        encoder = load_encoder(write_open_clip_model(tmp_path / "m", TINY_VIT), precision="fp32")
    if kind == "eva":  # DINOv3's kind, with four registers behind the class token
        name, _ = write_timm_folder(
            tmp_path / "m", "vit_small_patch16_dinov3", **EVA, img_size=SIZE_PX
        )
        encoder = load_encoder(name, precision="fp32")
    size_px = encoder.preprocessing.image_size_px
    with torch.no_grad():
        tokens = encoder.stem(encoder.prepare(draw_pixels(2, size_px)), n_blocks)
        expected = encoder.tail(tokens, n_blocks)[1]
        embedding, attentions = encoder.tail_with_attention(tokens, n_blocks)
    torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)
    rows, columns = encoder.patch_grid
    assert len(attentions) == n_blocks
    for attention in attentions:
        assert attention.shape[-1] == rows * columns + (5 if kind == "eva" else 1)
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


def test_a_tower_that_pools_other_tokens_says_that_it_cannot_show_where_it_looked(tmp_path):
    """EVA-X's kind takes the mean, unless it is told to take the class token."""
    name, _ = write_timm_folder(tmp_path / "m", "eva02_tiny_patch14_224", **EVA, img_size=56)
    tokens = torch.zeros(1, 17, EVA["embed_dim"])
    with pytest.raises(EncoderError, match=r"cannot show where it looked: .*pools other tokens"):
        load_encoder(name, precision="fp32").tail_with_attention(tokens, 1)
    assert load_encoder(name, precision="fp32", pool="cls").tail_with_attention(tokens, 1)


def test_attention_is_what_timm_computes(tiny):
    """Seen from inside timm's own slow path."""
    seen = []
    attn = tiny.visual.trunk.blocks[-1].attn
    fused, attn.fused_attn = attn.fused_attn, False
    hook = attn.attn_drop.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        pixels = tiny.prepare(draw_pixels(2, SIZE_PX))
        tiny.visual.trunk(pixels)
        ours = tiny.tail_with_attention(tiny.stem(pixels, 1), 1)[1][0]
    hook.remove()
    attn.fused_attn = fused
    torch.testing.assert_close(ours, seen[0])


def test_rolling_out_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    attentions = [torch.rand(2, 3, 5, 5, generator=generator) for _ in range(2)]
    gradients = [torch.randn(2, 3, 5, 5, generator=generator) for _ in range(2)]
    relevance = roll_out(attentions, gradients)
    for b in range(2):
        R = np.eye(5)
        for a, g in zip(attentions, gradients, strict=True):
            counted = np.maximum(a[b].numpy() * g[b].numpy(), 0).mean(axis=0)
            R = R + counted @ R
        np.testing.assert_allclose(relevance[b], R[0, 1:], rtol=1e-5)


def test_a_map_is_attention_times_gradient_seen_from_inside_timm(runs, tiny):
    """By another way: timm's slow path, the plain head, and a backward pass."""
    model = Run.open(runs["frozen"]).load_model()
    pixels = draw_pixels(2, SIZE_PX)
    seen = []
    attn = tiny.visual.trunk.blocks[-1].attn
    fused, attn.fused_attn = attn.fused_attn, False
    hook = attn.attn_drop.register_forward_hook(lambda _m, _i, output: seen.append(output))
    tiny.requires_grad_(True)
    try:
        embeddings = torch.nn.functional.normalize(tiny.visual(tiny.prepare(pixels)), dim=-1)
        maps = []
        for head in plain_heads(model):
            logits = head(embeddings)[:, 1].sum()
            (gradient,) = torch.autograd.grad(logits, seen, retain_graph=True)
            maps.append((seen[0] * gradient).clamp(min=0).mean(dim=1)[:, 0, 1:])
    finally:
        tiny.requires_grad_(False)
        hook.remove()
        attn.fused_attn = fused
    assert len(maps) == 2, "two members"
    expected = torch.stack(maps).mean(dim=0).view(2, *tiny.patch_grid).detach()
    found = TraceableModel(model, tiny).map_findings(pixels, [1, 0], 1)
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-9)
    assert not torch.allclose(found[1], expected, rtol=1e-2, atol=1e-9), "each finding has its own"


def test_the_encoder_is_as_before_and_fine_tuned_blocks_count(runs, tiny):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    model = Run.open(runs["tuned"]).load_model()
    pixels = draw_pixels(1, SIZE_PX)
    tuned = TraceableModel(model, tiny).map_findings(pixels, [0], 2)
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(parameter.requires_grad for parameter in tiny.parameters())
    head_alone = replace(model, tensors=model.head_tensors, tail=None)
    assert not torch.allclose(
        tuned, TraceableModel(head_alone, tiny).map_findings(pixels, [0], 2), rtol=1e-3
    )


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["frozen", "tuned"])
def test_the_probability_is_the_one_of_predict(runs, tiny, kind):
    run, path = Run.open(runs[kind]), runs["images"] / "3.png"
    (found,) = explain_images(run, [path], ["Consolidation"], tiny)
    assert isinstance(found, Explanation)
    expected = predict_images(run, [path], tiny)
    assert found.probability == pytest.approx(float(expected.probabilities[0, 1]))
    assert found.threshold == run.thresholds["Consolidation"]
    assert found.picture.shape == (SIZE_PX, SIZE_PX)


@pytest.mark.parametrize("kind", ["frozen", "tuned"])
def test_each_file_is_read_once_and_the_model_once_in_all(runs, tiny, kind, monkeypatch):
    """A file was read three times, and the model loaded again for every image."""
    opened: Counter[str] = Counter()
    read_file, safe_open, init = (
        images_module._read_file,
        safetensors.safe_open,
        TailAndHead.__init__,
    )

    def count(name: str, function: Any) -> Any:
        return lambda *args, **options: (opened.update([name]), function(*args, **options))[1]

    monkeypatch.setattr(images_module, "_read_file", count("files", read_file))
    monkeypatch.setattr(safetensors, "safe_open", count("models", safe_open))
    monkeypatch.setattr(TailAndHead, "__init__", count("members", init))
    paths = [runs["images"] / f"{k}.png" for k in range(3)]
    found = list(explain_images(Run.open(runs[kind]), paths, FINDINGS[:2], tiny))
    assert len(found) == 6
    assert opened["files"] == 3
    assert opened["models"] == 1
    assert opened["members"] == (kind == "tuned")


def test_the_map_lies_where_the_encoder_looked():
    """Squashed, it saw everything; cropped, the central square."""
    assert find_extent((300, 200), "squash") == (0, 200, 300, 0)
    assert find_extent((300, 200), "crop") == (0, 200, 250, 50)
    assert find_extent((200, 300), "crop") == (50, 250, 200, 0)
    assert find_extent((200, 300), "pad") == (0, 300, 250, -50)
    assert find_extent((200, 300), "crop", 0.5) == (100, 200, 150, 50)


def test_the_command_writes_pictures_and_maps(runs, tmp_path):
    images = [runs["images"] / "0.png", runs["images"] / "1.png"]
    options = ["--finding", "consolidation", "--finding", "Pneumothorax", "--raw"]
    arguments = ["explain", runs["tuned"], *images, *options, "--out", tmp_path / "out"]
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "4 pictures written to" in result.output
    names = {f"{k}_{finding}" for k in (0, 1) for finding in ("Consolidation", "Pneumothorax")}
    assert {path.stem for path in (tmp_path / "out").iterdir()} == names
    assert Image.open(tmp_path / "out" / "0_Consolidation.png").width > 800
    assert np.load(tmp_path / "out" / "0_Consolidation.npy").shape == (10, 10)


def test_images_of_one_name_do_not_overwrite_each_other(runs, tiny, tmp_path):
    path = runs["images"] / "0.png"
    found = explain_images(Run.open(runs["frozen"]), [path, path], ["Pneumothorax"], tiny)
    assert write_explanations(found, tmp_path) == (2, [])
    assert {p.name for p in tmp_path.iterdir()} == {"0_Pneumothorax.png", "0_Pneumothorax_2.png"}


def test_what_cannot_be_explained_is_said(runs, tiny, tmp_path):
    run = Run.open(runs["frozen"])
    with pytest.raises(ConfigError, match=r"has no finding 'Pneumonia'\. It has: Cardiomegaly, "):
        parse_findings(run, ["Pneumonia"])
    (failed,) = explain_images(run, [tmp_path / "absent.png"], ["Pneumothorax"], tiny)
    assert isinstance(failed, ImageError)
    assert "absent.png: the file does not exist" in str(failed)
    bad = ["explain", runs["frozen"], tmp_path / "absent.png", runs["images"] / "0.png"]
    arguments = [*bad, "--finding", "Pneumothorax", "--out", tmp_path / "out"]
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 1
    assert "1 of 2 images could not be used" in result.output
    other = load_encoder("random:test_vit:9", precision="fp32")
    with pytest.raises(RunError, match="another encoder"):
        next(explain_images(run, [runs["images"] / "0.png"], ["Pneumothorax"], other))


@pytest.mark.parametrize("name", ["random:resnet10t", "random:test_vit4"])
def test_towers_without_a_class_tokens_attention_are_refused(name):
    encoder = load_encoder(name, precision="fp32")
    tokens = torch.zeros(1, encoder.identity.n_tokens or 1, encoder.identity.token_width or 1)
    with pytest.raises(EncoderError, match=r"cannot be split|cannot show where it looked"):
        encoder.tail_with_attention(tokens, 1)


def test_a_run_on_imported_embeddings_has_no_encoder(tmp_path):
    store = synthetic.make_store(tmp_path / "f.h5", synthetic.make_cohort(30))
    fit_run(store, tmp_path / "run", replace(synthetic.QUICK, epochs=(1,)))
    arguments = ["explain", tmp_path / "run", tmp_path / "a.png", "--finding", "Mass"]
    result = CliRunner().invoke(cli, [*map(str, arguments), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "there is no encoder to run new images through" in " ".join(result.output.split())


# --- on the page ---------------------------------------------------------------------------------


def test_maps_of_a_page_are_those_of_explain(runs, tiny):
    """A byte per patch, though several images went through the encoder together."""
    run, names = Run.open(runs["tuned"]), ["3.png", "gone.png", "5.png"]
    cases = [Case(image_id=name, probability=0.5) for name in names]
    calls = []

    maps = draw_maps(
        run,
        {"Consolidation": {"hits": cases[:2], "misses": [], "false_alarms": cases[2:]}},
        runs["images"],
        tiny,
        on_progress=lambda *numbers: calls.append(numbers),
    )

    assert calls == [(3, 3)]
    assert list(maps["by_finding"]["Consolidation"]) == ["3.png", "5.png"]
    for name, packed in maps["by_finding"]["Consolidation"].items():
        drawn = np.frombuffer(base64.b64decode(packed), np.uint8)
        (expected,) = explain_images(run, [runs["images"] / name], ["Consolidation"], tiny)
        assert isinstance(expected, Explanation)
        shares = expected.relevance / expected.relevance.max()
        assert shares.shape == (maps["rows"], maps["columns"]) == (10, 10)
        np.testing.assert_allclose(drawn, 255 * shares.ravel(), atol=1)
        assert drawn.max() == 255


def test_the_report_shows_maps_on_request(runs):
    run = Run.open(runs["frozen"])
    score_run(run, n_resamples=0)
    arguments = ["report", run.path, "--image-dir", runs["images"], "--maps"]
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "RANDOM WEIGHTS" in result.output
    data = Page(run.report_path.read_text()).data
    for finding, kinds in data["cases"][0].items():
        ids = {case["image_id"] for of_kind in kinds.values() for case in of_kind}
        assert set(data["maps"]["by_finding"].get(finding, {})) == ids


def test_a_report_without_an_encoder_says_so_before_it_draws(tmp_path):
    store = synthetic.make_store(tmp_path / "f.h5", synthetic.make_cohort(30))
    fit_run(store, tmp_path / "run", replace(synthetic.QUICK, epochs=(1,)))
    arguments = ["report", tmp_path / "run", "--image-dir", tmp_path, "--maps"]
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 1
    assert "there is no encoder to run new images through" in " ".join(result.output.split())
    assert not (tmp_path / "run" / "report.html").exists()
    result = CliRunner().invoke(cli, ["report", str(tmp_path / "run"), "--device", "cpu"])
    assert (result.exit_code, "--device goes with --maps" in result.output) == (2, True)
    for wrong in (["--maps"], [str(tmp_path / "run"), "--image-dir", str(tmp_path), "--maps"]):
        result = CliRunner().invoke(cli, ["report", str(tmp_path / "run"), *wrong])
        assert result.exit_code == 2
        assert "--maps goes with --image-dir and one run" in result.output


# --- does it find what is known to be there? -----------------------------------------------------


def locate(run: Run, encoder: Encoder, n_blocks: int, n_images: int = 40) -> dict[str, float]:
    """How often a point lies in the finding's boxes: the map's maximum, and what it must beat.

    Averaged over findings. `chance` is the boxes' share of the area, `centre` the middle of the
    picture, `other` the maximum of another image's map for the same finding, `mean` that of the
    others' mean map.
    """
    shares = []
    for f, finding in enumerate(FINDINGS):
        pictures, inside = [], []
        for k in range(n_images):
            rng = np.random.default_rng([1234, k])
            pixels, boxes = draw_phantom([finding], "Frontal", rng, SIZE_PX)
            pictures.append(np.stack([pixels] * 3))
            inside.append(np.zeros((SIZE_PX, SIZE_PX), bool))
            for _, (x0, y0, x1, y1) in boxes:
                inside[-1][y0:y1, x0:x1] = True
        batch = torch.from_numpy(np.stack(pictures))
        maps = (
            TraceableModel(run.load_model(), encoder).map_findings(batch, [f], n_blocks)[0].numpy()
        )
        scaled = maps / maps.sum(axis=(1, 2), keepdims=True)
        own, regions = np.arange(n_images), np.stack(inside)

        def hits(maps: NDArray, regions: NDArray = regions, own: NDArray = own) -> float:
            rows, columns = np.unravel_index(maps.reshape(len(maps), -1).argmax(1), maps.shape[1:])
            px = SIZE_PX // maps.shape[1]
            return regions[own, rows * px + px // 2, columns * px + px // 2].mean()

        shares.append(
            {
                "map": hits(maps),
                "chance": regions.mean(),
                "centre": regions[:, SIZE_PX // 2, SIZE_PX // 2].mean(),
                "other": hits(np.roll(maps, 1, axis=0)),
                "mean": hits(scaled.sum(axis=0) - scaled),
            }
        )
    return {name: float(np.mean([share[name] for share in shares])) for name in shares[0]}


@pytest.mark.slow
def test_fine_tuned_runs_look_where_the_finding_is(tmp_path, tiny):
    """Five trainings, measured: 0.58 of maxima in the region, whose share of the area is 0.11.

    Another image's map has 0.41, the others' mean map 0.50. Trainings differ (0.48 to 0.71), so
    three are averaged here. Every block is fine-tuned, on 600 phantoms. A frozen run with random
    weights shows chance level: a map can be no better than the model.
    """
    cohort = draw_cohort(tmp_path / "images", 600)
    store = tmp_path / "features.h5"
    caching = ExtractConfig(num_workers=0, unfreeze_layers=6)
    extract_embeddings(cohort, tmp_path / "images", store, tiny, caching)
    tuned = FinetuneConfig.of_recipe(
        "reference",
        epochs=(30,),
        unfreeze_layers=6,
        batch_size=32,
        learning_rate=1e-3,
        head_learning_rate=1e-3,
        loss="bce",
        dropout=0.2,
        schedule="cosine",
        precision="fp32",
        device="cpu",
    )
    trainings = []
    for seed in (1, 2, 3):
        tune_run(store, tmp_path / f"tuned{seed}", replace(tuned, seed=seed))
        trainings.append(locate(Run.open(tmp_path / f"tuned{seed}"), tiny, 6))
        print(trainings[-1])
    frozen = TrainConfig(epochs=(40,), n_folds=2, batch_size=32, learning_rate=1e-3, n_jobs=1)
    fit_run(store, tmp_path / "frozen", frozen)

    found = {name: np.mean([one[name] for one in trainings]) for name in trainings[0]}
    assert found["map"] > 3 * found["chance"]
    assert found["map"] > found["centre"] + 0.1
    assert found["map"] > found["other"] + 0.1
    assert found["map"] > found["mean"]
    of_noise = locate(Run.open(tmp_path / "frozen"), tiny, 6)
    print(of_noise)
    assert abs(of_noise["map"] - of_noise["chance"]) < 0.1
