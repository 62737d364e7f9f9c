"""What stands in the code blocks of the documents, and how its commands are run in small."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from cxr_cache.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path.name != "commands.md"  # made of the commands themselves
}
PROGRAMS = (
    *("cxr-cache", "dask", "git", "jupyter", "make", "pip", "python", "ray", "torchrun", "."),
)
"""How lines of a shell begin; a block without such a line shows data, or what is printed."""
SMALL = {
    "train": "--epochs 1,2 --folds 2 --hidden 12x8 --batch-size 4 --jobs 1",
    "finetune": "--epochs 1 --batch-size 16 --device cpu --num-workers 0",
    "ablate": "--folds 2 --workers 1 --epochs 1",
    "extract": "--num-workers 0",
    "evaluate": "--resamples 50",
    "compare": "--resamples 50",
    "report": "--resamples 50",
    "demo": "--studies 40",
    "audit": "--repeats 1 --jobs 1",
}
"""Options that make a command quick; they are added to what the page says."""
SET = {"batch_size": "8", "hidden": "8"}
"""Likewise `ablate --set NAME=VALUE`, where the page does not vary NAME."""


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: str
    language: str
    text: str

    @property
    def is_python(self) -> bool:
        return self.language == "python"

    @property
    def lines(self) -> list[str]:
        """The lines of a shell, continued ones joined and without what explains them."""
        joined = self.text.replace("\\\n", " ").splitlines()
        lines = [line.partition("  #")[0].strip() for line in joined]
        lines = [line for line in lines if line and not line.startswith("#")]
        is_shell = self.language in ("", "sh") and any(begins(line) for line in lines)
        return lines if is_shell else []


def begins(line: str) -> bool:
    return line.split()[0] in PROGRAMS


def read_blocks(page: str) -> list[Block]:
    """All code blocks of a page, in their order."""
    found = re.finditer(
        r"^( *)```(\w*)\n(.*?)^ *```$",
        PAGES[page].read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    return [Block(page, match[2], match[3]) for match in found]


def list_lines(page: str) -> Iterator[str]:
    """Every line of a shell that a page shows."""
    for block in read_blocks(page):
        yield from block.lines


def find_data(page: str, first_line: str) -> str:
    """The text of the block that begins so: a table, say."""
    [text] = {block.text for block in read_blocks(page) if block.text.startswith(first_line)}
    return text


class Encoders:
    """Small towers of random weights in place of encoders: one for each name."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str) -> str:
        if name.startswith("random:"):
            return name
        if name not in self.names:
            self.names.append(name)
        return f"random:test_vit:{self.names.index(name)}"


def make_small(line: str, encoders: Encoders) -> list[str]:
    """The words of a command as it is run here: small models, few epochs, few resamples."""
    _, name, *words = shlex.split(line)
    if name == "encoders" and words and words[0] != "--json":
        words[0] = encoders(words[0])
    if name == "extract" and "--model" not in words:
        words += ["--model", "biomedclip"]
    if name in ("extract", "encoders") and "--model" in words:
        place = words.index("--model") + 1
        words[place] = encoders(words[place])
    added = shlex.split(SMALL.get(name, ""))
    if name == "report" and len([w for w in words if w.startswith("runs/")]) == 1:
        added = []
    if name == "ablate":
        varied = [word.partition("=")[0] for word in words]
        for option, value in SET.items():
            added += [] if option in varied else ["--set", f"{option}={value}"]
    return [name, *words, *added]


def run_line(line: str, encoders: Encoders) -> str:
    """Run a line of `cxr-cache` in this process; what it printed."""
    result = CliRunner().invoke(cli, make_small(line, encoders))
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
    return result.output
