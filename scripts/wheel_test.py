"""Build wheel and source distribution, install the wheel into an empty environment, use it there.

By default pip installs all that the wheel asks for: gigabytes, from the network. With --borrow the
new environment sees the packages of this one instead, which tests the wheel itself: its files, its
metadata and its command.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
_CLEAN: Final = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
"""Else the source tree would be found, and taken for the installed package."""
_IN_SDIST: Final = ("README.md", "LICENSE", "pyproject.toml")


def build(out: Path) -> tuple[Path, Path]:
    """Build both, the wheel from the source distribution, with the setuptools that is here."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    [wheel], [sdist] = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def find_missing(wheel: Path, sdist: Path) -> list[str]:
    """Files of the package, data included, that one of the two lacks."""
    tracked = ["git", "-C", str(ROOT), "ls-files", "cxr_cache"]
    files = subprocess.run(tracked, check=True, capture_output=True, text=True).stdout.split()
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    missing = [f"{wheel.name}: {file}" for file in files if file not in in_wheel]
    return missing + [
        f"{sdist.name}: {file}" for file in (*files, *_IN_SDIST) if file not in in_sdist
    ]


def make_environment(folder: Path, wheel: Path, *, borrows: bool) -> Path:
    """Install the wheel into a new environment; gives the folder of its programs."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", str(wheel)]
    subprocess.run([*pip, "--no-deps"] if borrows else pip, check=True, env=_CLEAN)
    if borrows:
        site = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        found = subprocess.run(
            [str(python), "-c", site], check=True, capture_output=True, text=True
        )
        places = sysconfig.get_paths()
        borrowed = "\n".join({places["purelib"], places["platlib"]})
        Path(found.stdout.strip(), "borrowed.pth").write_text(borrowed + "\n")
    return folder / "bin"


def use(programs: Path, folder: Path, *, demo: bool) -> str:
    """Run the command away from the source tree; gives what `--version` says."""

    def run(*arguments: str) -> str:
        command = [str(programs / "cxr-cache"), *arguments]
        done = subprocess.run(
            command, cwd=folder, env=_CLEAN, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"cxr-cache {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    where = "import cxr_cache; print(cxr_cache.__file__)"
    python = [str(programs / "python"), "-c", where]
    found = subprocess.run(
        python, cwd=folder, env=_CLEAN, capture_output=True, text=True, check=True
    ).stdout
    if not found.startswith(str(programs.parent)):
        raise SystemExit(f"cxr_cache was imported from {found.strip()}, not from the wheel")
    version = run("--version").strip()
    run("encoders")  # reads package data
    run("doctor")
    if demo:
        run("demo", "demo", "--studies", "60")
        if not (folder / "demo" / "comparison.html").is_file():
            raise SystemExit("the demo left no page")
    return version


def main() -> None:
    """Do all of it in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--borrow", action="store_true", help="see this environment's packages")
    parser.add_argument("--no-demo", action="store_true", help="leave out the demo")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        wheel, sdist = build(place / "dist")
        if missing := find_missing(wheel, sdist):
            raise SystemExit("missing:\n" + "\n".join(missing))
        programs = make_environment(place / "venv", wheel, borrows=given.borrow)
        print(use(programs, place, demo=not given.no_demo), "works from", wheel.name)


if __name__ == "__main__":
    main()
