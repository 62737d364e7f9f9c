"""The package's door: names that exist, layers that only look down."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cxr_cache

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path for path in (ROOT / "cxr_cache").glob("*.py") if path.stem[0] != "_")


def test_every_public_name_is_there():
    assert set(cxr_cache.__all__) == set(cxr_cache._HOMES)
    for name in cxr_cache.__all__:
        assert getattr(cxr_cache, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        cxr_cache.absent  # noqa: B018


@pytest.mark.parametrize(
    "what",
    [
        "import cxr_cache",
        "from cxr_cache.cli import cli; cli(['--help'], 'cxr-cache', None, False)",
    ],
)
def test_importing_the_package_and_asking_for_help_import_nothing_heavy(what):
    heavy = {"torch", "numpy", "pandas", "sklearn", "scipy", "h5py", "matplotlib", "joblib", "PIL"}
    code = f"import sys; {what}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_a_process_that_trains_imports_what_it_needs_alone():
    """One starts on every core; SciPy would cost each a quarter of a second."""
    code = (
        "import sys, cxr_cache.fit_on_cores; "
        "print(sorted({'scipy.special', 'sklearn', 'matplotlib', 'h5py'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def layers() -> dict[str, int]:
    """Level of each module, as the design lists them."""
    listing = (ROOT / "docs" / "design.md").read_text().split("## 4.")[1].split("```")[1]
    levels: dict[str, int] = {}
    level = 0
    for line in listing.splitlines():
        if match := re.match(r"(\d| )  (\w+)(\*?)\.py ", line):
            level = int(match[1]) if match[1].strip() else level
            names = [m.stem for m in MODULES if m.stem.startswith(match[2])] if match[3] else None
            levels |= dict.fromkeys(names or [match[2]], level)
    return levels


def test_the_design_lists_every_module():
    assert set(layers()) == {module.stem for module in MODULES}


def test_imports_only_point_down():
    """A module imports from lower levels, or from its own."""
    levels = layers()
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cxr_cache."):
                imported = node.module.split(".")[1]
                assert levels[imported] <= levels[module.stem], f"{module.stem} -> {imported}"


@pytest.mark.parametrize(
    ("library", "modules"),
    [
        ("h5py", {"layout", "store"}),
        ("PIL", {"images", "phantoms", "phantom_film", "phantom_anatomy", "thumbnails"}),
        ("open_clip", {"encoder", "checkpoints", "towers", "text_encoder"}),
        ("click", {"cli", "cli_parts", "cli_store", "cli_train", "cli_score", "cli_use"}),
        ("tqdm", {"cli_parts"}),
    ],
)
def test_few_modules_know_a_library(library, modules):
    knowing = {
        module.stem
        for module in MODULES
        if re.search(rf"^\s*(?:import|from) {library}\b", module.read_text(), re.MULTILINE)
    }
    assert knowing <= modules, f"{library} is imported by {sorted(knowing - modules)}"
