"""The package's door and its house: names that exist, and imports that only point down."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cxr_cache

ROOT = Path(__file__).resolve().parents[1]
_COMMANDS = ("store", "train", "score", "use")
PACKAGE = ROOT / "cxr_cache"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
INNER = sorted(
    ".".join(path.parent.relative_to(PACKAGE).parts) for path in PACKAGE.glob("*/*/__init__.py")
)
"""Packages in packages, which do not count as files of those: the third and last level."""


def read_ladder() -> dict[str, int]:
    """Step of each package and of the modules beside them, as docs/design.md shows the ladder."""
    shown = (ROOT / "docs" / "design.md").read_text().split("## 4.")[1].split("```")[1]
    steps: dict[str, int] = {}
    for line in shown.splitlines():
        if match := re.match(r" ?(\d+)  (\w+)", line):
            steps[match[2]] = int(match[1])
    return steps


def imports_of(module: str) -> Iterator[str]:
    """The modules of the package that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cxr_cache."):
            imported = (node.module or "").removeprefix("cxr_cache.")
            for alias in node.names:
                inside = f"{imported}.{alias.name}"
                yield inside if inside in MODULES else imported


def test_the_ladder_in_the_design_names_every_package():
    beside = {path.stem for path in PACKAGE.glob("*.py") if path.stem[0] != "_"}
    assert set(read_ladder()) == {*PACKAGES, *beside}


def test_imports_only_point_down():
    """A package imports what stands below it on the ladder, or itself; steps are shared by two."""
    steps = read_ladder()
    for module in MODULES:
        home = module.partition(".")[0]
        if home[0] == "_":  # the door, and `python -m`
            continue
        for imported in imports_of(module):
            target = imported.partition(".")[0]
            assert steps[target] < steps[home] or target == home, f"{module} -> {imported}"


def test_no_module_imports_itself_in_a_circle():
    graph = {module: set(imports_of(module)) for module in MODULES if module[0] != "_"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_the_house_has_few_files_in_a_room():
    assert len(list(PACKAGE.glob("*.py"))) == 4
    assert not [*PACKAGE.glob("*/*/*/__init__.py")]
    for package in [*PACKAGES, *INNER]:
        files = [name for name in MODULES if name.rpartition(".")[0] == package]
        files = [name for name in files if name not in INNER]
        assert len(files) < 16, f"{package} has {len(files)} files beside its __init__.py"


@pytest.mark.parametrize("package", [*PACKAGES, *INNER])
def test_a_package_says_what_it_is_for_and_no_more(package):
    assert len(MODULES[package].read_text().splitlines()) == 1


def test_every_public_name_is_there():
    assert set(cxr_cache.__all__) == set(cxr_cache._HOMES) <= set(dir(cxr_cache))
    assert 20 <= len(cxr_cache.__all__) <= 30
    for name in cxr_cache.__all__:
        named = getattr(cxr_cache, name)
        assert named.__name__ == name
        assert "Examples\n" in named.__doc__, f"{name} shows no example"
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        cxr_cache.absent  # noqa: B018


@pytest.mark.parametrize(
    "what",
    [
        "import cxr_cache",
        "from cxr_cache.cli.main import cli; cli(['--help'], 'cxr-cache', None, False)",
    ],
)
def test_importing_the_package_and_asking_for_help_import_nothing_heavy(what):
    heavy = {"torch", "numpy", "pandas", "sklearn", "scipy", "h5py", "matplotlib", "joblib", "PIL"}
    heavy |= {f"cxr_cache.{name}" for name in ("config", *(f"cli.{room}" for room in _COMMANDS))}
    code = f"import sys; {what}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


@pytest.mark.parametrize(
    ("job", "heavy"),
    [
        ("runs", {"torch._dynamo", "torchvision", "sympy", "sklearn"}),
        ("scoring", {"torch", "sklearn"}),
    ],
)
def test_a_job_imports_nothing_heavy_that_it_does_without(job, heavy):
    """Each takes longer than the rest of what `train` and `evaluate` import."""
    code = f"import sys, cxr_cache.jobs.{job}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_a_process_that_trains_imports_what_it_needs_alone():
    """One starts on every core; SciPy would cost each a quarter of a second."""
    code = (
        "import sys, cxr_cache.training.fit_on_cores; "
        "print(sorted({'scipy.special', 'sklearn', 'matplotlib', 'h5py'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


@pytest.mark.parametrize(
    ("library", "modules"),
    [
        ("h5py", {"store.layout", "store.feature_store", "jobs.doctor"}),
        (
            "PIL",
            {
                *("datasets.images", "datasets.preprocessing", "report.pictures"),
                *("datasets.raster.png", "datasets.raster.shrink"),
                *(f"datasets.phantoms.{name}" for name in ("dataset", "film", "anatomy")),
            },
        ),
        (
            "open_clip",
            {f"encoders.{name}" for name in ("loading", "open_clip", "text", "timm_vit", "towers")},
        ),
        (
            "click",
            {f"cli.{name}" for name in ("main", "options", "output", *_COMMANDS)},
        ),
        ("tqdm", {"cli.progress"}),
        ("kornia_rs", {"datasets.raster.png"}),
    ],
)
def test_few_modules_know_a_library(library, modules):
    knowing = {
        module
        for module, path in MODULES.items()
        if re.search(rf"^\s*(?:import|from) {library}\b", path.read_text(), re.MULTILINE)
    }
    assert knowing <= modules, f"{library} is imported by {sorted(knowing - modules)}"
