"""`doctor` says what works, tries it, and calls broken what is broken and nothing else."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.common.extras import EXTRAS
from cxr_cache.jobs import doctor
from cxr_cache.jobs.doctor import Check, Diagnosis, diagnose

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def find(found: Diagnosis, name: str) -> Check:
    [check] = [check for check in found.checks if check.name == name]
    return check


def test_it_fits_a_screen_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines[2:])) <= 120
    assert lines[-1] == "All that the main job needs works here."
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    result = CliRunner().invoke(cli, ["doctor", str(tmp_path / "absent")])
    assert result.exit_code == 1
    assert result.output == f"Error: {tmp_path / 'absent'} is not a folder.\n"


@pytest.mark.parametrize("absent", ["torchvision", "h5py", "open_clip"])
def test_what_is_broken_is_named_and_ends_with_status_1(absent, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, absent, None)  # which makes its import fail
    result = CliRunner().invoke(cli, ["doctor", str(tmp_path)])
    assert result.exit_code == 1
    name = "HDF5" if absent == "h5py" else "torch"
    assert re.search(rf"BROKEN +{name} +import of {absent} halted", result.output)
    assert f"Broken: {name}. Nothing that needs this will run." in result.output


def test_a_package_that_is_too_old_is_named_with_both_versions(monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.metadata,
        "requires",
        lambda _: ["numpy>=999", "no-such-package>=1", "nothing>1; extra == 'x'"],
    )
    status, message, facts = doctor._check_packages()
    assert status == "broken"
    assert re.search(r"numpy>=999 \(here: \d[\d.]*\), no-such-package>=1 \(here: none\)", message)
    assert facts["versions"].keys() == {"numpy", "no-such-package"}


def test_locks_are_tried_by_a_second_process(tmp_path, monkeypatch):
    """Not believed: where the kernel lets the second writer in, the answer is another one."""
    assert doctor._check_locks(tmp_path)[0] == "ok"
    import fcntl

    monkeypatch.setattr(fcntl, "lockf", lambda *_: None)  # as where locks are only pretended
    status, message, facts = doctor._check_locks(tmp_path)
    assert (status, facts) == ("note", {"works": False})
    assert "does not keep a second writer out" in message


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_the_cache_of_encoders_is_described(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check = find(diagnose(tmp_path), "encoders")
    assert check.status == "note", "offline and empty: no encoder can be had"
    assert check.facts["is_writable"]
    assert "offline (HF_HUB_OFFLINE), biomedclip is not in it" in check.message


def test_extras_are_those_of_the_package_and_of_the_documents():
    """One list in three places: what is installed, what doctor says, what people read."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    assert declared.keys() - {"dev", "docs"} == EXTRAS.keys()  # those are for work on the project
    page = (ROOT / "docs" / "install.md").read_text()
    for name, extra in EXTRAS.items():
        packages = {re.split(r"[><=;\s]", line)[0] for line in declared[name]}
        assert packages == set(extra.packages)
        assert f"cxr-cache[{name}]" in page
        assert extra.gives in page.replace("`", ""), f"docs/install.md: {name}"


def test_a_missing_extra_is_shown_with_its_pip_line(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "missing_packages", lambda name: ["x"] if name == "ray" else [])
    found = diagnose(tmp_path)
    assert "pip install 'cxr-cache[ray]'" in find(found, "[ray]").message
    assert found.is_working, "an extra is not needed"
    assert find(found, "[dask]").status == "ok"
