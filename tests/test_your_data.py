"""docs/your_data.md does what it says, with images and a table that are nobody's data set."""

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

PAGE = Path(__file__).resolve().parents[1] / "docs" / "your_data.md"
QUICK = {
    "extract": ["--model", "random:test_vit"],
    "train": [
        "--epochs",
        "1,2",
        "--folds",
        "2",
        "--hidden",
        "12x8",
        "--batch-size",
        "16",
        "--jobs",
        "1",
    ],
    "evaluate": ["--resamples", "50"],
}


def blocks() -> list[str]:
    return re.findall(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def run_lines(block: str) -> str:
    said = ""
    for line in block.replace("\\\n", " ").splitlines():
        _, name, *words = shlex.split(line)
        result = CliRunner().invoke(cli, [name, *words, *QUICK.get(name, [])])
        assert result.exit_code == 0, f"{line}\n{result.output}"
        said += result.output
    return said


@pytest.fixture
def hospital(tmp_path, monkeypatch) -> pd.DataFrame:
    """The page's own table, continued: 60 patients with two images each."""
    monkeypatch.chdir(tmp_path)
    header, *rows = next(b for b in blocks() if b.startswith("image,")).splitlines()
    rng = np.random.default_rng(0)
    for patient in range(5, 65):
        present = rng.choice(["0", "1"], 2, p=[0.6, 0.4])
        for image in range(2):
            rows.append(f"c/{patient}_{image}.png,P{patient},F,50,{','.join(present)}")
    Path("labels.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    table = pd.read_csv("labels.csv", dtype=str, keep_default_na=False)
    for name in table["image"]:
        path = Path("xrays", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (48, 40), np.uint8)).save(path)
    return table


def test_a_table_becomes_a_page_in_three_commands(hospital):
    said = run_lines(next(b for b in blocks() if "cxr-cache describe" in b))
    assert f"{len(hospital)} images of {len(hospital)} studies of 63 patients" in said
    assert "missing files:     0" in said
    assert "RANDOM WEIGHTS" in said
    run = Run.open("runs/first")
    assert run.report_path.is_file()
    splits = run.read_table("splits").merge(hospital, left_on="image_id", right_on="image")
    sides = splits.groupby("patient")["split"].nunique()
    assert len(sides) == 63
    assert (sides == 1).all()
    assert set(pd.read_csv(run.path / "per_finding.csv")["finding"]) == {"Pneumonia", "Effusion"}

    Path("other.csv").write_text(Path("labels.csv").read_text().replace("Effusion", "Edema"))
    run_lines(next(b for b in blocks() if "--labels other.csv" in b))
    assert Run.open("runs/mine").config["findings"] == ["Pneumonia", "Edema"]

    Path("mine.h5").rename("other_hospital.h5")
    said = run_lines(next(b for b in blocks() if "--store other_hospital.h5" in b))
    assert "own data" in said or "same" in said  # it is no other hospital, and that is said
    assert Path("runs/first_elsewhere/report.html").is_file()


def test_images_alone_become_features(hospital):
    run_lines(next(b for b in blocks() if "cxr-cache features" in b))
    with np.load("features.npz") as file:
        assert sorted(file["image_id"].tolist()) == sorted(hospital["image"])
        assert len(file["embeddings"]) == len(hospital)
