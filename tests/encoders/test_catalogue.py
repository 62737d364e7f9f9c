"""Known encoders: what the table says is true, short names lead on, and a check tells all."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError
from PIL import Image

from cxr_cache.cli.main import cli
from cxr_cache.common.tables import hash_file
from cxr_cache.config import DEFAULT_ENCODER
from cxr_cache.datasets.readers import READERS
from cxr_cache.encoders.catalogue import check
from cxr_cache.encoders.catalogue.known import find_known, read_known, spell_out
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import EncoderError
from tests.encoders.test_encoder import COMMIT
from tests.encoders.test_timm_models import write_folder
from tests.test_docs import ROOT, commands_in

BIOMEDCLIP = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
PAGE = ROOT / "docs" / "encoders.md"
ARCHITECTURES = {
    "biomedclip": ("vit_base_patch16_224", {}),
    "rad-dino": ("vit_base_patch14_dinov2", {}),
    "rad-dino-maira-2": ("vit_base_patch14_dinov2", {}),
    "medsiglip": ("vit_so400m_patch14_siglip_384", {"img_size": 448}),
    "xraysiglip": ("vit_large_patch16_siglip_384", {"img_size": 512}),
    "eva-x-b": ("eva02_base_patch16_clip_224", {}),
    "chexzero": ("vit_base_patch32_clip_224", {}),
    "chexfound": ("vit_large_patch14_reg4_dinov2", {"img_size": 512, "patch_size": 16}),
    **{f"dinov3-{n[0]}": (f"vit_{n}_patch16_dinov3", {}) for n in ("small", "base", "large")},
    **{
        f"dinov2-{n[0]}": (f"vit_{n}_patch14_dinov2", {"img_size": 224})
        for n in ("small", "base", "large")
    },
}


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["encoders", *words])


@pytest.fixture
def no_network(tmp_path, monkeypatch) -> None:
    def refuse(*_, **__):
        raise RuntimeError("[Errno -2] Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An encoder in the folder that docs/encoders.md speaks of, beside some images."""
    monkeypatch.chdir(tmp_path)
    write_folder(Path("dinov2_small"), "test_vit")
    rng = np.random.default_rng(0)
    Path("xrays").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (48, 40), np.uint8)).save(f"xrays/{i}.png")
    return Path("dinov2_small")


# --- The table -----------------------------------------------------------------------------------


def test_sizes_of_known_encoders_are_those_of_their_towers():
    """timm builds one block of each, without memory; those that are not loaded have no tokens."""
    loaded = {name: known for name, known in read_known().items() if known.n_tokens}
    assert loaded.keys() == ARCHITECTURES.keys()
    for name, known in loaded.items():
        architecture, arguments = ARCHITECTURES[name]
        with torch.device("meta"):
            tower = timm.create_model(architecture, depth=1, **arguments)
        assert known.image_px == tower.patch_embed.img_size[0], name
        assert known.n_tokens == tower.patch_embed.num_patches + tower.num_prefix_tokens, name
        assert known.width == tower.embed_dim, name


def test_data_sets_that_were_seen_are_formats():
    for known in read_known().values():
        assert set(known.seen) <= {*READERS, "none"}, known.name
        assert known.page.startswith("https://")
        assert known.trained_on, known.licence


def test_the_table_fits_a_narrow_terminal_and_imports_nothing_heavy():
    code = (
        "import sys; from cxr_cache.cli.main import cli; cli(['encoders'], 'x', None, False); "
        "print(sorted({'torch', 'timm', 'open_clip'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    *table, heavy = done.stdout.splitlines()
    assert heavy == "[]", done.stderr
    assert max(map(len, table)) <= 79
    rows = {line.split()[0]: line for line in table if line[:1].strip()}
    assert set(read_known()) <= set(rows)
    assert rows["rad-dino"].split()[1:4] == ["518", "768", "2.10"]
    assert rows["medsiglip"].endswith("HAI-DEF terms, gated")
    assert "Two\n    checkpoints" in "\n".join(table)


def test_the_documents_say_what_the_table_says():
    """A row of a page has one encoder, or several with commas."""
    for page in (PAGE, ROOT / "README.md"):
        rows = re.findall(r"^\| (`[\w`, -]+)(?: \(default\))? \|(.*)\|$", page.read_text(), re.M)
        found = []
        for names, cells in rows:
            for i, name in enumerate(re.findall(r"`([\w-]+)`", names)):
                if (known := read_known().get(name)) is None or " MB" not in cells:
                    continue
                *_, px, width, size = (cell.strip() for cell in cells.split("|"))
                assert int(px) == known.image_px, name
                assert int(width.split(", ")[i]) == known.width, name
                assert size.removesuffix(" MB").split(", ")[i] == f"{known.token_mb:.2f}", name
                found.append(name)
        assert found == [name for name, known in read_known().items() if known.model], page.name


def test_the_table_is_json_too():
    listed = json.loads(run("--json").stdout)
    assert [each["name"] for each in listed] == list(read_known())
    assert listed[0]["token_mb"] == 0.303


# --- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        ("RAD-DINO", "hf-hub:microsoft/rad-dino"),
        ("rad-dino@v1", "hf-hub:microsoft/rad-dino@v1"),
        ("biomedclip@main", f"hf-hub:{BIOMEDCLIP}@main"),
        ("dinov3-s?img_size=96", "timm:vit_small_patch16_dinov3.lvd1689m?img_size=96"),
        ("local-dir:rad-dino", "local-dir:rad-dino"),
        ("ViT-B-32/openai", "ViT-B-32/openai"),
        ("", ""),
    ],
)
def test_short_names_stand_for_others(name, spelled):
    assert spell_out(name) == spelled
    assert find_known(spelled) == find_known(name)
    assert (find_known(name) is None) == (spelled == name)


def test_the_default_is_pinned():
    assert re.fullmatch(rf"hf-hub:{BIOMEDCLIP}@[0-9a-f]{{40}}", spell_out(DEFAULT_ENCODER))
    assert re.fullmatch("[0-9a-f]{64}", read_known()[DEFAULT_ENCODER].file_sha256)


def test_an_encoder_that_no_name_leads_to_says_how_it_comes_in():
    with pytest.raises(
        EncoderError, match=r"weights of chexzero: download .*rajpurkarlab.* chexzero\?file=PA"
    ):
        load_encoder("chexzero")
    with pytest.raises(
        EncoderError, match=r"ark-plus \(https.*cannot be loaded here.*cxr-cache import"
    ):
        load_encoder("Ark-Plus")
    with pytest.raises(EncoderError, match=r"no architecture 'rad-din'. Did you mean rad-dino or"):
        load_encoder("rad-din")


def test_a_gated_model_is_one_sentence_with_its_page(monkeypatch, no_network):
    def refuse(*_, **__):
        raise GatedRepoError.__new__(GatedRepoError, "401 Client Error.")  # without its reply

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    result = run("medsiglip")
    assert result.exit_code == 1
    assert "HAI-DEF terms; gated" in result.stdout
    assert result.stderr == (
        "Error: google/medsiglip-448 is gated: sign in on "
        "https://huggingface.co/google/medsiglip-448, accept its terms there, and set HF_TOKEN to "
        "a token of the account that was given access.\n"
    )


def test_another_revision_in_the_cache_is_named(tmp_path, no_network):
    root = tmp_path / "hub" / f"models--{BIOMEDCLIP.replace('/', '--')}"
    (root / "snapshots" / COMMIT).mkdir(parents=True)
    with pytest.raises(EncoderError) as caught:
        load_encoder("biomedclip")
    message = str(caught.value)
    assert (
        f"{spell_out('biomedclip').removeprefix('hf-hub:')} is not in the Hugging Face" in message
    )
    assert f"It holds hf-hub:{BIOMEDCLIP}@{COMMIT}, whose weights may be others.\n" in message


# --- The check of one ----------------------------------------------------------------------------


def test_a_check_says_what_an_extraction_would_do(folder):
    encoder = load_encoder(f"local-dir:{folder}", precision="fp32", pool="cls+mean", resize="pad")
    found = json.loads(run(str(folder), "--pool", "cls+mean", "--resize", "pad", "--json").stdout)
    assert encoder.identity.to_dict().items() <= found.items()
    assert found["n_parameters"] == sum(p.numel() for p in encoder.parameters())
    assert found["token_mb"] == 101 * 64 * 2 / 1e6
    assert found["file_sha256"] == hash_file(folder / "model.safetensors")

    said = run(str(folder)).stdout
    for fact in (
        "timm test_vit",
        "VisionTransformer, 0.3 M parameters, 6 blocks",
        "101 of width 64 per image, 0.01 MB in float16",
        "centre of 160 x 160 cut out, bicubic",
        "from tokens, up to 6 blocks",
        found["file_sha256"],
        load_encoder(f"local-dir:{folder}").identity.weights_sha256,
    ):
        assert fact in said, said


def test_a_file_is_read_as_weights(folder):
    Path("notes.pt").write_text("no weights")
    result = run("notes.pt")
    assert result.exit_code == 1
    assert "notes.pt was refused" in result.stderr
    assert "()" not in result.stderr  # torch's reason is there


def test_no_name_is_not_this_folder(folder):
    result = run("")
    assert result.exit_code == 1
    assert "'' names no encoder" in result.stderr


def test_a_tower_that_is_not_taken_apart_says_so():
    said = run("random:test_resnet").stdout
    assert "none: this tower is not taken apart" in said
    assert "not from tokens" in said
    assert "RANDOM WEIGHTS" in said


def test_a_copy_of_the_pinned_file_is_known_as_such(folder, monkeypatch):
    digest = hash_file(folder / "model.safetensors")
    biomedclip = replace(read_known()["biomedclip"], file_sha256=digest)
    monkeypatch.setattr(check, "read_known", lambda: {"biomedclip": biomedclip})
    assert "(the file that biomedclip stands for)" in run(str(folder)).stdout

    other = replace(biomedclip, file_sha256="0" * 64)
    monkeypatch.setattr(check, "read_known", dict)
    monkeypatch.setattr(check, "find_known", lambda _: other)
    assert "(NOT the file that biomedclip stands for)" in run(str(folder)).stdout


def test_an_encoder_that_is_not_here_is_described_before_it_is_refused(no_network):
    result = run("rad-dino")
    assert result.exit_code == 1
    said = " ".join(result.stdout.split())
    assert "has seen mimic-cxr-jpg, chexpert, chexpert-plus, nih, rsna, siim, padchest" in said
    assert "config.json of microsoft/rad-dino is not in the Hugging Face cache" in result.stderr
    assert run("nowhere").exit_code == 1
    assert run("--pool", "mean").stderr.endswith("Error: --pool goes with NAME.\n")


# --- Extraction ----------------------------------------------------------------------------------


def extract(*words: str) -> Result:
    return CliRunner().invoke(cli, ["extract", "--data", "xrays", "--store", "x.h5", *words])


def test_an_extraction_says_which_weights_and_refuses_to_go_on_with_others(folder):
    result = extract("--model", f"local-dir:{folder}")
    identity = load_encoder(f"local-dir:{folder}").identity
    assert f"encoder: {identity.name}, weights sha256 {identity.weights_sha256}\n" in result.stderr

    result = extract("--model", "random:test_vit")
    assert result.exit_code == 1
    assert f"weights_sha256: '{identity.weights_sha256}' in the store" in result.stderr


def test_a_test_on_images_that_the_encoder_has_seen_is_warned_of(folder, monkeypatch):
    seen = replace(read_known()["rad-dino"], seen=("images",))
    monkeypatch.setattr("cxr_cache.encoders.catalogue.known.find_known", lambda _: seen)
    result = extract("--model", f"local-dir:{folder}")
    assert result.exit_code == 0
    assert "rad-dino was trained on images of the data set that images reads" in result.stderr


# --- The page ------------------------------------------------------------------------------------


def test_commands_of_the_page_do_what_it_says(folder, no_network):
    """Those that name an encoder of the hub end with the sentence that it is not here."""
    ran = 0
    for line in commands_in(PAGE):
        result = CliRunner().invoke(cli, shlex.split(line)[1:])
        is_here = "rad-dino" not in line
        assert result.exit_code == (0 if is_here else 1), f"{line}\n{result.output}"
        assert is_here or "is not in the Hugging Face cache" in result.stderr
        ran += is_here
    assert ran >= 4
