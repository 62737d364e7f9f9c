"""docs/encoders_compared.md does what it says: which encoder is best, on phantoms."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from cxr_cache.cli.main import cli
from cxr_cache.models.run import Run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "encoders_compared.md"
HEAD = ["--folds", "2"]
QUICK = {
    "extract": [],
    "ablate": [
        *HEAD,
        "--workers",
        "1",
        "--set",
        "epochs=1",
        "--set",
        "batch_size=16",
        "--set",
        "hidden=8",
    ],
    "train": [*HEAD, "--epochs", "1,2", "--hidden", "8", "--batch-size", "16", "--jobs", "1"],
    "evaluate": ["--resamples", "50"],
    "compare": ["--resamples", "50"],
    "report": ["--resamples", "50"],
}
MODELS = iter(["random:test_vit:1", "random:test_vit:2"])


def commands() -> list[list[str]]:
    text = "".join(re.findall(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    return [shlex.split(line)[1:] for line in text.splitlines()]


def run_all(name: str) -> str:
    said = ""
    for words in commands():
        if words[0] == name:
            result = CliRunner().invoke(cli, [*words, *QUICK[name]])
            assert result.exit_code == 0, f"{words}\n{result.output}"
            said += result.output
    return said


@pytest.fixture
def hospital(tmp_path, monkeypatch) -> pd.DataFrame:
    """Thirty patients with two images each, bright where there is an effusion."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = []
    Path("xrays").mkdir()
    for patient in range(30):
        effusion, mass = rng.integers(0, 2, 2)
        for image in range(2):
            name = f"{patient}_{image}.png"
            pixels = rng.integers(0, 155, (40, 40)) + 100 * effusion
            Image.fromarray(pixels.astype(np.uint8)).save(Path("xrays", name))
            rows.append([name, f"P{patient}", effusion, mass])
    table = pd.DataFrame(rows, columns=["image", "patient", "Effusion", "Mass"])
    table.to_csv("labels.csv", index=False)
    return table


def test_the_page_ends_in_one_table_and_one_page(hospital, monkeypatch):
    for words in commands():
        if words[0] == "extract":
            kept = words[: words.index("--model")] if "--model" in words else words
            line = [*kept, "--model", next(MODELS), "--num-workers", "0"]
            assert CliRunner().invoke(cli, line).exit_code == 0

    said = run_all("ablate")
    for label in ("store=biomedclip ", "store=dino ", "store=biomedclip+dino ", "prevalence "):
        assert label in said
    assert "logistic regression store=dino" in said
    table = pd.read_csv("encoders/ablation.csv")
    assert table["difference"].notna().all()

    run_all("train")
    both = Run.open("runs/both")
    assert [store["path"] for store in both.stores] == ["biomedclip.h5", "dino.h5"]
    said = run_all("compare")
    lines = said.splitlines()
    start = lines.index("  macro AUROC, by study")
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == [
        *("biomedclip", "dino", "both")
    ]
    assert all(re.search(r"\[[+-].*\], p = ", line) for line in lines[start + 2 : start + 4])
    assert set(pd.read_csv("comparison/comparison.csv")["run"]) == {"dino", "both"}

    run_all("report")
    page = Path("comparison/page.html").read_text(encoding="utf-8")
    assert "frozen embeddings of random:test_vit:1 and of random:test_vit:2" in page

    for name in ("biomedclip", "dino"):
        Path(f"{name}.h5").rename(f"other_{name}.h5")
    assert "own data" in run_all("evaluate")  # it is no other hospital, and that is said
    assert Path("external/report.html").is_file()
    result = CliRunner().invoke(cli, ["predict", "runs/both", "xrays", "--out", "p.csv"])
    assert result.exit_code == 0, result.output
    assert len(pd.read_csv("p.csv")) == len(hospital)
