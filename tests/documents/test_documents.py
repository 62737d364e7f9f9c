"""Every command in the documents runs, on small data; what cannot run is listed with the reason."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cxr_cache.models.run import Run
from tests.datasets.collections.trees import TREES
from tests.documents.pages import (
    PAGES,
    Encoders,
    begins,
    list_lines,
    read_blocks,
    run_line,
)
from tests.documents.workplace import lay_out, make

NETWORK = "downloads from a package index, or from a repository whose address is not fixed yet"
SETUP = "makes an environment, which takes minutes and gigabytes; .ci/run does it"
REAL_DATA = "real radiographs and pretrained weights, which may not be redistributed; takes hours"
SERVER = "starts a program that waits; tests/documents/test_cluster.py runs the scripts of the page"
NOT_RUN = {
    ("*", "pip install"): NETWORK,
    ("*", "git clone"): NETWORK,
    ("*", "python -m venv"): SETUP,
    ("*", ". .venv/bin/activate"): SETUP,
    ("*", "make "): SETUP,
    ("docs/measurements.md", ""): REAL_DATA,
    ("docs/cluster.md", ""): SERVER,
    ("docs/notebooks.md", "jupyter"): "opens a browser; tests/test_notebooks.py runs the notebooks",
    ("docs/finetuning.md", "torchrun"): "tests/documents/test_cluster.py runs this line",
    ("docs/zero_shot.md", "cxr-cache zero-shot"): "needs an encoder with a text tower, which is "
    "downloaded; tests/evaluation/test_zero_shot.py runs the command on one of random weights",
    ("docs/data_sets/dicom.md", ""): "tests/cli/test_dicom_command.py runs these on DICOM files",
}
"""Page (or every page) and beginning of the lines that are not run here, and why."""
NEEDS = {
    "docs/audit.md": ["runs/indiana"],
    "docs/browse.md": ["runs/indiana"],
    "docs/checklists.md": ["runs/first"],
    "docs/explain.md": ["runs/tuned"],
    "docs/external_validation.md": ["runs/first"],
    "docs/label_efficiency.md": ["mine.h5", "indiana.h5"],
    "docs/methods_section.md": ["runs/first", "external"],
    "docs/reading_the_page.md": ["runs/first"],
}
"""Stores and runs that a page takes for granted."""
NAMES = {
    "docs/audit.md": {"runs/first": "runs/indiana"},
    "docs/checklists.md": {"DATA": "labels.csv"},
    "docs/label_efficiency.md": {
        **{"50,200,1000,all": "10,20,all", "50,1000,all": "10,all", "phantoms.h5": "indiana.h5"},
        **{"20,80,all": "10,20,all", "batch_size=32": "batch_size=8"},
    },
    "README.md": {"runs/mine": "runs/own"},
}
"""Words of a page that stand for others here: names it leaves open, numbers too large."""
QUICK = (
    "docs/your_data.md",
    "docs/methods_section.md",
    "docs/external_validation.md",
)
"""Pages whose commands take a few seconds; `make test-slow` runs the others."""


def why_not(page: str, line: str) -> str:
    """Why a line is not run; blank if it is."""
    for (where, beginning), why in NOT_RUN.items():
        if where in ("*", page) and line.startswith(beginning):
            return why
    return ""


RUNNABLE = [
    page
    for page in PAGES
    if any(not why_not(page, line) for line in list_lines(page))
    or any(block.is_python for block in read_blocks(page))
]


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("documents") / "work"
    folder.mkdir()
    lay_out(folder)
    return folder


@pytest.fixture
def workplace(laid_out, tmp_path, monkeypatch) -> Path:
    """A folder of its own with the files that pages speak of, where commands are run.

    Plots are not drawn: they take half of the time, and tests/report looks at them.
    """
    for draws in ("draw_plots", "draw_test_plots"):
        monkeypatch.setattr(f"cxr_cache.report.report.{draws}", lambda _run: None)
    folder = Path(shutil.copytree(laid_out, tmp_path / "work"))
    monkeypatch.chdir(folder)
    return folder


# -- what a page needs before a line, and what must be so after it --------------------------------


def copy_store(page: str, line: str) -> None:
    """The other hospital's stores are the page's own stores by another name."""
    for name in re.findall(r"--store (other_\w+\.h5)", line):
        if page != "docs/external_validation.md" and not Path(name).exists():
            own = {"other_hospital.h5": "mine.h5"}.get(name, name.removeprefix("other_"))
            shutil.copy(own, name)


def check_your_data(said: dict[str, str]) -> None:
    table = pd.read_csv("labels.csv", dtype=str)
    described = said["cxr-cache describe --data labels.csv --image-dir xrays"]
    n_patients = table["patient"].nunique()
    assert f"{len(table)} images of {len(table)} studies of {n_patients} patients" in described
    assert "missing files:     0" in described
    assert "RANDOM WEIGHTS" in "".join(said.values())
    run = Run.open("runs/first")
    assert run.report_path.is_file()
    splits = run.read_table("splits").merge(table, left_on="image_id", right_on="image")
    assert len(splits[["patient", "split"]].drop_duplicates()) == n_patients
    assert set(run.per_finding["finding"]) == {"Pneumonia", "Effusion"}
    assert Run.open("runs/mine").config["findings"] == ["Pneumonia", "Edema"]
    assert Path("runs/first_elsewhere/report.html").is_file()
    assert any("same file" in text or "own data" in text for text in said.values())
    with np.load("features.npz") as file:
        assert sorted(file["image_id"].tolist()) == sorted(table["image"])


def check_encoders_compared(said: dict[str, str]) -> None:
    ablated = said["cxr-cache ablate biomedclip.h5 dino.h5 --out encoders"]
    for label in ("store=biomedclip ", "store=dino ", "store=biomedclip+dino ", "prevalence "):
        assert label in ablated
    assert pd.read_csv("encoders/ablation.csv")["difference"].notna().all()
    assert [one["path"] for one in Run.open("runs/both").stores] == ["biomedclip.h5", "dino.h5"]
    [compared] = [text for line, text in said.items() if line.startswith("cxr-cache compare")]
    lines = compared.splitlines()
    start = lines.index("  macro AUROC, by study")
    names = [line.split()[0] for line in lines[start + 1 : start + 4]]
    assert names == ["biomedclip", "dino", "both"]
    assert all(re.search(r"\[[+-].*\], p = ", line) for line in lines[start + 2 : start + 4])
    assert set(pd.read_csv("comparison/comparison.csv")["run"]) == {"dino", "both"}
    page = Path("comparison/page.html").read_text(encoding="utf-8")
    assert "frozen embeddings of random:test_vit:0 and of random:test_vit:1" in page
    assert Path("external/report.html").is_file()


def check_external_validation(said: dict[str, str]) -> None:
    first = Run(Path("external"), {}).read_metrics()
    mapped = Run(Path("external_mapped"), {}).read_metrics()
    assert first["n_findings_scored"] == 1  # Pneumonia, by its name
    assert "Pleuraerguss" in "".join(said.values())
    assert mapped["external"]["map"] == "names.csv"
    [methods] = [text for line, text in said.items() if line.startswith("cxr-cache methods")]
    assert "On the external test set" in methods


def check_methods(said: dict[str, str]) -> None:
    """The page shows the first blanks that the command lists."""
    [printed] = said.values()
    page = PAGES["docs/methods_section.md"].read_text(encoding="utf-8")
    for blank in re.findall(r"^  (\[.*\])$", page, re.MULTILINE):
        assert blank in printed
    assert "## Results" in Path("methods.md").read_text(encoding="utf-8")


def shape_of(text: str) -> list[str]:
    """Its lines with every number, and what aligns them, left out."""
    plain = [re.sub(r"[-+±]?[\d.,]+", "", line) for line in text.splitlines()]
    return [re.sub(r"\s+", " ", line).strip() for line in plain]


def check_label_efficiency(said: dict[str, str]) -> None:
    """The curve that the page shows has the lines and columns of what is printed."""
    [printed] = [text for line, text in said.items() if "phantoms.h5" in line]
    of_curve = printed[printed.index("Learning curve:") : printed.index("Note:")]
    [shown] = [
        b.text for b in read_blocks("docs/label_efficiency.md") if "Learning curve" in b.text
    ]
    assert shape_of(of_curve) == shape_of(shown)
    curve = pd.read_csv("curve/curve.csv", dtype={"n_train": str})
    assert curve["n_train"].tolist() == 3 * ["10", "20", "all"]
    assert Path("curve/curve.png").stat().st_size > 10_000


CHECKS: dict[str, Callable[[dict[str, str]], None]] = {
    "docs/your_data.md": check_your_data,
    "docs/encoders_compared.md": check_encoders_compared,
    "docs/external_validation.md": check_external_validation,
    "docs/methods_section.md": check_methods,
    "docs/label_efficiency.md": check_label_efficiency,
}


# -- the tests ------------------------------------------------------------------------------------


def run_python(text: str, scope: dict[str, Any], page: str) -> None:
    """Run a block of Python, with a small encoder and few epochs."""
    small = "cxr_cache.TrainConfig(epochs=(1, 2), n_folds=2, hidden=(8,), batch_size=4)"
    for long, short in {
        '"biomedclip"': '"random:test_vit"',
        '"runs/first"': f'"runs/python", {small}',
        "FocalHeadClassifier(epochs=10": "FocalHeadClassifier(batch_size=8, epochs=2",
        "my_cohort(path)": "__import__('cxr_cache').load_cohort(path)",
    }.items():
        text = text.replace(long, short)
    exec(compile(text, page, "exec"), scope)


def run_page(page: str, encoders: Encoders) -> dict[str, str]:
    """Run what a page shows, from top to bottom; what each line printed."""
    said: dict[str, str] = {}
    scope: dict[str, Any] = {}
    for block in read_blocks(page):
        if block.is_python:
            run_python(block.text, scope, page)
        for line in block.lines:
            if why_not(page, line):
                continue
            assert line.startswith("cxr-cache "), f"{page}: {line} is neither run nor in NOT_RUN"
            as_run = line
            for word, other in NAMES.get(page, {}).items():
                as_run = as_run.replace(word, other)
            if as_run.startswith("cxr-cache ablate"):
                shutil.rmtree("curve", ignore_errors=True)  # an ablation of other numbers
            copy_store(page, as_run)
            said[line] = run_line(as_run, encoders)
    return said


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if page in QUICK else [pytest.mark.slow])
        for page in RUNNABLE
        if not page.startswith("docs/data_sets/")
    ],
)
def test_a_page_does_what_it_says(page, workplace):
    encoders = Encoders()
    make(NEEDS.get(page, ()), encoders)
    said = run_page(page, encoders)
    if page in CHECKS:
        CHECKS[page](said)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUNNABLE if page.startswith("docs/data_sets/")])
def test_a_published_data_set_is_used_as_its_page_says(page, tmp_path, monkeypatch):
    """Each is laid out in small, under the name that the page gives it."""
    monkeypatch.chdir(tmp_path)
    name = Path(page).stem
    if name in ("images", "indiana"):
        lay_out(tmp_path)
        Path("xrays").rename("images") if name == "images" else Path("DATA").rename("indiana")
    else:
        [folder] = {
            match[1] for line in list_lines(page) if (match := re.search(r"--data (\S+)", line))
        }
        _, write = TREES["paediatric" if name == "classes" else name]
        write(tmp_path if name == "chexpert" else tmp_path / folder)
    run_page(page, Encoders())


def test_every_line_of_a_shell_is_run_or_listed_with_the_reason():
    for page in PAGES:
        languages = {block.language for block in read_blocks(page)} - {"", "sh", "python"}
        assert languages <= ({"bash"} if page == "docs/cluster.md" else set())
        for line in list_lines(page):
            assert begins(line), f"{page}: {line!r} begins with no program of pages.PROGRAMS"
            is_run = page in RUNNABLE and line.startswith("cxr-cache ")
            assert is_run or why_not(page, line), f"{page}: {line} is neither run nor in NOT_RUN"


def test_the_list_of_what_is_not_run_is_no_longer_than_it_must_be():
    for where, beginning in NOT_RUN:
        pages = PAGES if where == "*" else [where]
        lines = [line for page in pages for line in list_lines(page)]
        assert any(line.startswith(beginning) for line in lines), f"{where}: {beginning!r} is gone"
    for table in (NEEDS, NAMES, CHECKS, dict.fromkeys(QUICK)):
        assert set(table) <= set(RUNNABLE)
    for page, names in NAMES.items():
        for word in names:
            assert any(word in line for line in list_lines(page)), f"{page}: {word} is gone"
