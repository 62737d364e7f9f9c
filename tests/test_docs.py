"""What the documents name is there: commands with their options, files, headings, modules."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import cxr_cache
from cxr_cache.cli.main import cli
from scripts.write_commands import OUT, render

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
CODE = sorted((ROOT / "cxr_cache").rglob("*.py"))
LOGGERS = {"cxr_cache.training.epochs"}  # a channel's name, not a module's
PACKAGES = {path.parent.name for path in (ROOT / "cxr_cache").glob("*/__init__.py")}
FOLDERS = {"cxr_cache", "docs", "scripts", "tests", *PACKAGES}


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands_in(page: Path) -> list[str]:
    """Every `cxr-cache ...` line of a page's code blocks, continued lines joined.

    Variables of a shell, in scripts for a cluster, are numbers here.
    """
    blocks = re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL)
    text = re.sub(r'"?\$\w+"?', "8", "\n".join(blocks))
    lines = text.replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.startswith("cxr-cache ")]


def headings_of(page: Path) -> set[str]:
    """Anchors, as GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_page_of_commands_is_what_the_commands_say():
    assert OUT.read_text(encoding="utf-8") == render(), "run: python scripts/write_commands.py"


@pytest.mark.parametrize("page", [page for page in PAGES if page != OUT], ids=page_id)
def test_commands_in_the_documents_take_the_options_that_they_are_shown_with(page):
    """Files need not exist: options and arguments are parsed, and nothing is run."""
    for line in commands_in(page):
        name, *words = shlex.split(line)[1:]
        command = cli.commands[name]
        try:
            command.make_context(name, words, parent=click.Context(cli, **cli.context_settings))
        except click.UsageError as error:
            pytest.fail(f"{page.name}: {line}\n{error.format_message()}")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):  # the web, which tests do not ask
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name} -> {target}"
        assert not anchor or anchor in headings_of(path), f"{page.name} -> {target}"


def test_the_site_has_every_page_once_and_the_reference_every_public_name():
    """`make docs` builds it; here is what needs no MkDocs."""
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    in_nav = re.findall(r"([\w/.-]+\.md)$", site.split("\nnav:")[1], re.MULTILINE)
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if "docs" in page.parts]
    assert sorted(in_nav) == sorted(pages)
    named = re.findall(r"^::: cxr_cache\.(\w+)$", (ROOT / "docs" / "python.md").read_text(), re.M)
    assert sorted(named) == cxr_cache.__all__


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path, monkeypatch):
    """A dead link or anchor, a page that is nowhere and a bad docstring are warnings."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "python.html").read_text(encoding="utf-8")
    assert not re.search(r":(func|class|data|meth|attr|mod):", page)
    for html in (tmp_path / "site").rglob("*.html"):  # it can be read without a network
        assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="https?:', html.read_text())


@pytest.mark.parametrize("page", [*PAGES, *CODE], ids=page_id)
def test_files_that_are_written_about_exist(page):
    """Files of this repository, by their paths from its root (a module also from the package's)."""
    for name in re.findall(r"\b((?:\w+/)+\w+\.(?:py|sh|md|json))\b", page.read_text()):
        if name.split("/")[0] in FOLDERS:
            found = any((root / name).exists() for root in (ROOT, ROOT / "cxr_cache"))
            assert found, f"{page_id(page)} speaks of {name}, which is not there"


@pytest.mark.parametrize("page", [*PAGES, *CODE], ids=page_id)
def test_modules_and_names_that_are_written_about_exist(page):
    for name in set(re.findall(r"[`\"]~?(cxr_cache(?:\.\w+)+)", page.read_text())) - LOGGERS:
        found: object = importlib.import_module("cxr_cache")
        path = "cxr_cache"
        for part in name.split(".")[1:]:
            path = f"{path}.{part}"
            if part in getattr(found, "__dataclass_fields__", ()):
                break  # a field without a default is no attribute of its class
            if hasattr(found, part):
                found = getattr(found, part)
            else:
                try:
                    found = importlib.import_module(path)
                except ImportError:
                    pytest.fail(f"{page_id(page)} speaks of {name}, which is not there")
