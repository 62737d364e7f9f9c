"""docs/label_efficiency.md shows what its command prints, on phantoms (synthetic radiographs)."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.datasets.phantoms.dataset import write_phantoms

PAGE = Path(__file__).resolve().parents[1] / "docs" / "label_efficiency.md"


def run(line: str) -> str:
    result = CliRunner().invoke(cli, shlex.split(line.replace("\\\n", " "))[1:])
    assert result.exit_code == 0, result.output
    return result.output


def shape_of(text: str) -> list[str]:
    """Its lines with every number, and what aligns them, left out."""
    plain = [re.sub(r"[-+±]?[\d.,]+", "", line) for line in text.splitlines()]
    return [re.sub(r"\s+", " ", line).strip() for line in plain]


@pytest.mark.slow
def test_the_page_shows_what_the_command_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_phantoms(tmp_path / "phantoms", n_studies=90, image_size_px=64)
    blocks = re.findall(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    command = next(block for block in blocks if block.startswith("cxr-cache ablate phantoms.h5"))
    shown = blocks[blocks.index(command) + 1]
    images = "--csv-dir phantoms --image-dir phantoms/images"
    run(f"cxr-cache extract {images} --store phantoms.h5 --model random:test_vit")

    said = run(f"{command} --workers 1")

    of_curve = said[said.index("Learning curve:") : said.index("Note:")]
    assert shape_of(of_curve) == shape_of(shown)
    curve = pd.read_csv("curve/curve.csv", dtype={"n_train": str})
    assert curve["n_train"].tolist() == 3 * ["20", "80", "all"]
    assert (tmp_path / "curve" / "curve.png").stat().st_size > 10_000
