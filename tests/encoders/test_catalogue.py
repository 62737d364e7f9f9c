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
import open_clip
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
from cxr_cache.encoders.loading import load_encoder, recorded_options
from cxr_cache.errors import EncoderError
from tests.encoders.test_encoder import COMMIT, write_hub_cache
from tests.encoders.test_timm_models import write_folder
from tests.test_docs import ROOT, commands_in

BIOMEDCLIP = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
EVA_X = "eva_x_base_patch16_merged520k_mim.pt"
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
        (
            "rad-dino@v1?file=backbone_compatible.safetensors",
            "hf-hub:microsoft/rad-dino@v1?file=backbone_compatible.safetensors",
        ),
        ("eva-x-b@v1?img_size=96", f"hf-hub:MapleF/eva_x@v1?file={EVA_X}&img_size=96"),
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
        EncoderError, match=r"weights of chexzero: download .*rajpurkarlab.* file, chexzero\?file=P"
    ):
        load_encoder("chexzero")
    with pytest.raises(
        EncoderError, match=r"ark-plus \(https.*cannot be loaded here.*cxr-cache import"
    ):
        load_encoder("Ark-Plus")
    with pytest.raises(EncoderError, match=r"no architecture 'rad-din'. Did you mean rad-dino or"):
        load_encoder("rad-din")


@pytest.fixture
def chexzero(tmp_path) -> Path:
    """A file of CheXzero's kind and width, with one block."""
    vision = {"image_size": 64, "patch_size": 32, "width": 768, "layers": 1}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    torch.save(model.state_dict(), tmp_path / "best.pt")
    return tmp_path / "best.pt"


def test_what_an_encoders_own_code_does_with_images_is_in_the_catalogue(chexzero):
    """CheXzero: mean 101.48761 and standard deviation 83.43944 of 255, on padded images."""
    encoder = load_encoder(f"chexzero?file={chexzero}")
    alone = load_encoder(f"local-file:{chexzero}")
    pixels = encoder.preprocessing
    assert [255 * n for n in pixels.mean] == pytest.approx([101.48761] * 3, abs=1e-5)
    assert [255 * n for n in pixels.std] == pytest.approx([83.43944] * 3, abs=1e-5)
    assert (pixels.resize, pixels.image_size_px) == ("pad", 64)
    assert (encoder.identity.name, encoder.identity.notes) == (f"chexzero?file={chexzero}", ())
    recorded = json.loads(json.dumps(encoder.identity.to_dict()))
    assert load_encoder(**vars(recorded_options(recorded))).identity == encoder.identity
    assert encoder.identity.differences(alone.identity).keys() == {"mean", "std", "resize"}
    assert f"name it chexzero?file={chexzero}." in alone.identity.notes[0]
    assert load_encoder(f"chexzero?file={chexzero}", resize="crop").preprocessing.resize == "crop"
    larger = load_encoder(f"chexzero?file={chexzero}&img_size=96").identity
    assert larger.name == f"chexzero?file={chexzero}&img_size=96"


def test_a_file_of_another_width_is_not_the_encoder(chexzero):
    with pytest.raises(EncoderError, match=r"768 wide, and chexfound is 1024 wide\..* local-file:"):
        load_encoder(f"chexfound?file={chexzero}")


def test_a_file_of_a_known_repository_is_prepared_as_its_authors_do(tmp_path, no_network):
    model = timm.create_model(
        "vit_base_patch14_dinov2", img_size=28, depth=1, num_classes=0, init_values=1.0
    )
    torch.save(model.state_dict(), tmp_path / "backbone.pth")
    write_hub_cache(tmp_path / "hub", "microsoft/rad-dino", tmp_path, ("backbone.pth",))
    for name in ("rad-dino", "hf-hub:microsoft/rad-dino"):
        encoder = load_encoder(f"{name}?file=backbone.pth")
        assert (encoder.preprocessing.mean, encoder.preprocessing.std) == (
            (0.5307,) * 3, (0.2583,) * 3
        )  # fmt: skip
        assert encoder.identity.notes == ()
        assert encoder.identity.name == "hf-hub:microsoft/rad-dino?file=backbone.pth"
    assert find_known(encoder.identity.name) == read_known()["rad-dino"]


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
    assert "notes.pt is damaged, or not a checkpoint of torch (it begins with b'no w')" in (
        result.stderr
    )


def test_a_file_or_folder_may_ask_for_more(folder):
    said = run(f"{folder}?img_size=192").stdout
    assert "dinov2_small?img_size=192\n" in said
    assert "resampled from those of 160 px" in said
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "vit.safetensors")
    said = run(f"{folder}?file=vit.safetensors").stdout
    assert f"local-file:{folder.resolve() / 'vit.safetensors'}\n" in said


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
