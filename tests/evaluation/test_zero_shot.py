"""Zero-shot is open_clip's own arithmetic, on the run's own test images, and without a network."""

from __future__ import annotations

import json
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
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from cxr_cache.cli.main import cli
from cxr_cache.datasets.labels import FINDINGS
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.encoders.text import PromptPair, load_prompts, load_text_encoder
from cxr_cache.errors import ConfigError, EncoderError, StoreMismatchError
from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.evaluation.zero_shot import require_text_tower_of, score_prompts, score_zero_shot
from cxr_cache.models.run import Run
from cxr_cache.report.views import read_view
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.training.train import fit_run
from scripts.write_random_biomedclip import write_biomedclip_folder
from tests import synthetic
from tests.encoders.test_encoder import TIMM_VIT, draw_pixels, write_folder, write_open_clip_model
from tests.schemas import read_valid

transformers = pytest.importorskip("transformers")

WORDS = ["no", "a", "normal", "heart", "enlarged", "pleural", "effusion", "nodule", "mass", "lung"]
PROMPTS = {
    finding: PromptPair((f"a {finding}", f"enlarged {finding}"), (f"no {finding}",))
    for finding in synthetic.FINDINGS
}


def write_tokenizer(folder: Path, n_fillers: int = 0) -> None:
    """BERT's tokenizer with a vocabulary of its own, in the files that repositories have."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [letter for c in "abcdefghijklmnopqrstuvwxyz" for letter in (c, f"##{c}")]
    words = [*special, *WORDS, *letters, *(f"[unused{k}]" for k in range(n_fillers))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    vocabulary = {word: k for k, word in enumerate(words)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """BiomedCLIP's kind of folder around small towers: timm's ViT, BERT with an MLP projection."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(folder)
    transformers.BertConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    ).save_pretrained(folder)
    text_cfg = {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": str(folder),
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "hf_model_pretrained": False,
        "context_length": 24,
    }
    model_cfg: dict[str, Any] = {
        "embed_dim": synthetic.WIDTH,
        "vision_cfg": {**TIMM_VIT, "timm_proj": "linear"},
        "text_cfg": text_cfg,
    }
    model = open_clip.CustomTextCLIP(**model_cfg)
    state = {
        # BERT begins with weights so small that all texts are one
        name: tensor * 10 if name.startswith("text.") and tensor.ndim > 1 else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    write_folder(folder, state, {"model_cfg": model_cfg, "preprocess_cfg": {}})
    return folder


@pytest.fixture(scope="module")
def encoder(folder) -> Encoder:
    return load_encoder(f"local-dir:{folder}", precision="fp32")


@pytest.fixture(scope="module")
def store(folder, encoder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("store") / "features.h5"
    return synthetic.make_store(
        path, synthetic.make_cohort(100), encoder=encoder.identity.to_dict()
    )


def test_image_and_text_meet_as_in_open_clip(folder, encoder):
    """Tokenizer, text tower, projection, scale: logits equal those of open_clip's own model."""
    name = f"local-dir:{folder}"
    theirs, _, _ = open_clip.create_model_and_transforms(name)
    theirs.eval()
    tokenize = open_clip.get_tokenizer(name)
    pixels = draw_pixels(3, 160)
    texts = ["a normal heart", "no pleural effusion"]
    with torch.inference_mode():
        images = theirs.encode_image(encoder.prepare(pixels), normalize=True)
        expected = (
            theirs.logit_scale.exp()
            * images
            @ theirs.encode_text(tokenize(texts), normalize=True).T
        )  # (3, 2)

    ours = load_text_encoder(name)
    embeddings = encoder.encode(pixels)[1].numpy()
    logits = score_prompts(embeddings, ours, [PromptPair((texts[0],), (texts[1],))])
    difference = (expected[:, 0] - expected[:, 1]).numpy()
    np.testing.assert_allclose(logits[:, 0], difference, rtol=1e-3, atol=1e-4)
    assert np.abs(difference).min() > 0.02, "the texts differ"
    softmax = torch.softmax(expected, dim=1)[:, 0].numpy()
    np.testing.assert_allclose(1 / (1 + np.exp(-logits[:, 0])), softmax, rtol=1e-4)


def test_a_plain_clip_needs_no_transformers(tmp_path, monkeypatch):
    """open_clip's own text tower, whose tensors lie without a prefix in the checkpoint."""
    name = write_open_clip_model(tmp_path / "model", TIMM_VIT)
    config = json.loads((tmp_path / "model" / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["vocab_size"] = 49408  # of the tokenizer that goes with it
    torch.manual_seed(0)
    model = open_clip.CLIP(**config["model_cfg"])
    write_folder(tmp_path / "model", model.state_dict(), config)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    texts = ["no nodule", "a mass"]
    model.eval()
    with torch.inference_mode():
        tokens = open_clip.SimpleTokenizer(context_length=8)(texts)
        expected = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(load_text_encoder(name).embed(texts), expected)


def test_sentences_are_averaged_at_length_one(folder):
    ours = load_text_encoder(f"local-dir:{folder}")
    pair = PromptPair(("a heart", "enlarged heart"), ("no heart",))
    image = np.random.default_rng(0).normal(size=(1, synthetic.WIDTH)).astype(np.float32)
    first, second, absent = ours.embed(["a heart", "enlarged heart", "no heart"])
    present = F.normalize((first + second) / 2, dim=0)
    cosines = F.normalize(torch.from_numpy(image), dim=-1) @ (present - absent)
    np.testing.assert_allclose(
        score_prompts(image, ours, [pair])[:, 0],
        ours.logit_scale * cosines.numpy(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_figures_are_scikit_learns_on_the_runs_test_images(folder, store, tmp_path):
    fit_run(store, tmp_path / "run", replace(synthetic.QUICK, epochs=(4,)))
    run = Run.open(tmp_path / "run")
    ours = load_text_encoder(f"local-dir:{folder}")
    with FeatureStore.open(store) as features:
        found = score_zero_shot(features, ours, PROMPTS, run=run, n_resamples=50)
        predictions = run.read_table("predictions").query("split == 'test'")
        rows = pd.Index(features.image_ids).get_indexer(pd.Index(predictions["image_id"]))
        logits = score_prompts(np.array(features.embeddings[rows, 0]), ours, list(PROMPTS.values()))
        targets = np.array(features.cohort.targets[rows])
    table = found.table.set_index("finding")
    for f, finding in enumerate(synthetic.FINDINGS):
        row = table.loc[finding]
        assert row["zero_shot"] == pytest.approx(roc_auc_score(targets[:, f], logits[:, f]))
        assert row["run"] == pytest.approx(roc_auc_score(targets[:, f], predictions[finding]))
        assert row["difference"] == pytest.approx(row["run"] - row["zero_shot"])
        assert row["zero_shot_low"] <= row["zero_shot"] <= row["zero_shot_high"]
    per_finding = table.drop(index="macro")
    assert table.loc["macro", "run"] == pytest.approx(per_finding["run"].mean())
    assert table.loc["macro", "difference"] == pytest.approx(per_finding["difference"].mean())
    assert f"the test images of {run.path}" in found.to_text()


def test_patients_of_the_store_are_resampled_with_and_without_a_run(folder, store, tmp_path):
    """As studies of that name would be, to the bit."""
    ours = load_text_encoder(f"local-dir:{folder}")
    fit_run(store, tmp_path / "run", replace(synthetic.QUICK, epochs=(2,)))
    run = Run.open(tmp_path / "run")
    with FeatureStore.open(store) as features:
        cohort, embeddings = features.cohort, np.array(features.embeddings)
        encoder = features.header.encoder
        by_study = score_zero_shot(features, ours, PROMPTS, run=run, n_resamples=20)
    patients = np.char.add("p", (np.arange(len(cohort)) // 6).astype(str))  # three studies each
    named = {"patient_id": patients}, {"study_uid": patients}
    found = []
    for k, names in enumerate(named):
        path = tmp_path / f"{k}.h5"
        synthetic.make_store(path, cohort.assign(**names), encoder=encoder, embeddings=embeddings)
        with FeatureStore.open(path) as features:
            found += [
                score_zero_shot(features, ours, PROMPTS, run=tested, n_resamples=20)
                for tested in (run, None)
            ]
    for by_patient, merged in zip(found[:2], found[2:], strict=True):
        pd.testing.assert_frame_equal(by_patient.table, merged.table)
        assert by_patient.n_studies > merged.n_studies
        assert "[95 % intervals over patients]" in by_patient.to_text()
    assert "[95 % intervals over studies]" in by_study.to_text()
    assert by_study.n_studies == found[0].n_studies
    assert not by_study.table["zero_shot_low"].equals(found[0].table["zero_shot_low"])


def test_the_command_and_its_table(store, folder, tmp_path):
    out = tmp_path / "zero_shot.csv"
    prompts = tmp_path / "prompts.json"
    entries = {f: {"present": [f"a {f}"], "absent": [f"no {f}"]} for f in list(PROMPTS)[:2]}
    prompts.write_text(json.dumps(entries))
    arguments = ["zero-shot", store, "--prompts", prompts, "--out", out, "--resamples", 20]
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "all labelled images: 200 images of 100 studies" in result.output
    assert "No prompts for: Nodule, Hernia, Mass, Scoliosis" in result.output
    table = pd.read_csv(out, keep_default_na=False)
    assert table["finding"].tolist() == [*entries, "macro"]
    assert table["present"].tolist() == [*(f"a {f}" for f in entries), ""]
    assert table["absent"].tolist() == [*(f"no {f}" for f in entries), ""]

    printed = CliRunner().invoke(cli, [*map(str, arguments), "--json"]).stdout
    rows = read_valid("zero-shot", printed)["findings"]
    assert [row["finding"] for row in rows] == table["finding"].tolist()


def test_a_runs_table_is_kept_with_it_until_it_is_trained_anew(store, folder, tmp_path):
    """What `zero-shot --run-dir` writes is what the run's page reads, to the last digit."""
    recipe = replace(synthetic.QUICK, epochs=(2,))
    fit_run(store, tmp_path / "run", recipe)
    run = Run.open(tmp_path / "run")
    score_run(run, n_resamples=10)
    prompts = tmp_path / "prompts.json"
    entries = {f: {"present": [f"a {f}"], "absent": [f"no {f}"]} for f in list(PROMPTS)[:4]}
    prompts.write_text(json.dumps(entries))
    arguments = ["zero-shot", store, "--run-dir", run.path, "--prompts", prompts]

    result = CliRunner().invoke(cli, [*map(str, arguments), "--resamples", "20"])

    assert result.exit_code == 0, result.output
    kept = run.path / "zero_shot.csv"
    assert f"Kept as {kept}; `cxr-cache report {run.path}` puts it on the run's page." in (
        " ".join(result.output.split())
    )
    view = read_view(run)
    assert view.zero_shot is not None
    assert list(view.zero_shot.by_finding) == list(entries)
    assert view.zero_shot.n_findings == 4
    by_finding = view.zero_shot.by_finding.values()
    assert view.zero_shot.macro["run"] == pytest.approx(np.mean([r["run"] for r in by_finding]))
    score_run(run, calibration="platt", n_resamples=0)
    assert not read_view(run).zero_shot_is_stale, "calibration leaves the order as it is"
    fit_run(store, run.path, recipe, overwrite=True)
    assert not kept.exists()


def test_a_table_of_another_encoder_is_not_kept(folder, store, tmp_path):
    fit_run(store, tmp_path / "run", replace(synthetic.QUICK, epochs=(2,)))
    run = Run.open(tmp_path / "run")
    ours = load_text_encoder(f"local-dir:{folder}")
    with FeatureStore.open(store) as features:
        assert score_zero_shot(features, ours, PROMPTS, run=run, n_resamples=5).is_of_run
        run.config["store"]["encoder"]["weights_sha256"] = "0" * 64
        found = score_zero_shot(features, ours, PROMPTS, run=run, n_resamples=5)
    assert not found.is_of_run
    assert "the table is not kept with the run" in found.to_text()


def test_a_fine_tuned_run_is_said_not_to_fit(folder, store, tmp_path):
    fit_run(store, tmp_path / "run", replace(synthetic.QUICK, epochs=(2,)))
    run = Run.open(tmp_path / "run")
    run.config["kind"] = "finetune"
    with FeatureStore.open(store) as features:
        ours = load_text_encoder(f"local-dir:{folder}")
        found = score_zero_shot(features, ours, PROMPTS, run=run, n_resamples=5)
    assert "Zero-shot is that of the encoder before" in found.to_text()


def test_the_packages_prompts_are_complete():
    prompts = load_prompts()
    assert set(prompts) == set(FINDINGS)
    assert all(set(pair.present).isdisjoint(pair.absent) for pair in prompts.values())


# --- wording -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"A": {"present": "a"}}', '{"A": {"present": [], "absent": ["b"]}}']
)
def test_other_files_are_no_prompts(tmp_path, content):
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(ConfigError, match=r"prompts.json is not a file of prompts"):
        load_prompts(tmp_path / "prompts.json")


def test_no_text_tower_is_said(tmp_path, folder):
    with pytest.raises(EncoderError, match="has no text tower"):
        load_text_encoder("random:test_vit")
    config = json.loads((folder / "open_clip_config.json").read_text())
    tensors = load_file(folder / "open_clip_model.safetensors")
    vision = {k: v for k, v in tensors.items() if not k.startswith("text.")}
    name = write_folder(tmp_path / "vision", vision, config)
    with pytest.raises(EncoderError, match="holds no text tower"):
        load_text_encoder(name)


def test_missing_pieces_are_named(folder, tmp_path, monkeypatch):
    config = json.loads((folder / "open_clip_config.json").read_text())
    tensors = load_file(folder / "open_clip_model.safetensors")
    name = write_folder(tmp_path / "bare", tensors, config)
    (tmp_path / "bare" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(EncoderError, match="also needs the tokenizer's files"):
        load_text_encoder(name)
    write_tokenizer(tmp_path / "bare")
    del tensors["text.proj.0.weight"]
    save_file(tensors, tmp_path / "bare" / "open_clip_model.safetensors")
    with pytest.raises(EncoderError, match=r"(?s)does not fit the text tower .*proj\.0\.weight"):
        load_text_encoder(name)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(EncoderError, match=r"pip install 'cxr-cache\[text\]'"):
        load_text_encoder(f"local-dir:{folder}")


def test_texts_of_another_model_are_refused(store, encoder):
    other = replace(encoder.identity, weights_sha256="0" * 64)
    with (
        FeatureStore.open(store) as features,
        pytest.raises(StoreMismatchError, match=r"weights_sha256: .* in the store, '0{64}'"),
    ):
        require_text_tower_of(features, other)


@pytest.mark.slow
def test_the_full_layout_of_biomedclip_without_a_network(tmp_path, monkeypatch):
    """Its configuration names BERT by a repository, which is not asked; 784 MB of noise."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tensors = write_biomedclip_folder(tmp_path)
    write_tokenizer(tmp_path, n_fillers=30522 - 5 - len(WORDS) - 52)
    ours = load_text_encoder(f"local-dir:{tmp_path}")
    bert = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False).eval()
    prefix = "text.transformer."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    bert.load_state_dict(weights)
    texts = ["no pleural effusion", "a mass"]
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)(
        texts, return_tensors="pt", padding="max_length", max_length=256
    )
    with torch.inference_mode():
        first = bert(**tokens).last_hidden_state[:, 0]
        hidden = F.gelu(first @ tensors["text.proj.0.weight"].T)
        expected = F.normalize(hidden @ tensors["text.proj.2.weight"].T, dim=-1)
    torch.testing.assert_close(ours.embed(texts), expected, rtol=1e-4, atol=1e-4)
