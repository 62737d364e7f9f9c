"""The scripts of docs/cluster.md run here, with shells in place of what SLURM gives."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cxr_cache.models.run import Run
from cxr_cache.store.feature_store import FeatureStore
from tests.documents.pages import ROOT, Encoders, read_blocks, run_line
from tests.documents.workplace import lay_out

SRUN = """#!/bin/bash
# As many tasks as the job has, on this machine.
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_LOCALID=$task "$@" &
done
wait
"""
ACTIVATE = ". .venv/bin/activate\n"

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """A folder with the data, where `srun` and `cxr-cache` can be called."""
    lay_out(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN)
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    (programs / "python").write_text(python)
    (programs / "cxr-cache").write_text(
        f'#!/bin/bash\nexec {sys.executable} -m cxr_cache "$@"\n', encoding="utf-8"
    )
    for name in ("dask", "torchrun"):
        found = shutil.which(name, path=str(Path(sys.executable).parent))
        (programs / name).symlink_to(found or pytest.skip(f"{name} is not installed"))
    for path in programs.iterdir():
        if not path.is_symlink():
            path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def script(name: str, **words: str) -> str:
    """A script of the page, but for the lines and words that are a cluster's own."""
    [text] = [b.text for b in read_blocks("docs/cluster.md") if f"--job-name={name}" in b.text]
    assert ACTIVATE in text
    text = text.replace(ACTIVATE, "set -e\n")
    for word, other in words.items():
        assert word in text
        text = text.replace(word, other)
    return text


def run_script(text: str, **slurm: str) -> str:
    found = subprocess.run(
        ["bash", "-c", text],
        env=os.environ | {f"SLURM_{name}": value for name, value in slurm.items()},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def count_done(store: str) -> int:
    with FeatureStore.open(store) as features:
        return len(features.embedded_rows)


def small(text: str) -> str:
    """With an encoder of random weights, which is no download."""
    return text.replace("cxr-cache extract", "cxr-cache extract --model random:test_vit")


def test_extraction_by_dask_on_several_tasks(cluster):
    text = small(script("cxr-extract")).replace("$(hostname)", "127.0.0.1")
    run_script(text, JOB_ID=str(os.getpid()), NTASKS="2")
    assert count_done("indiana.h5") == len(list(Path("DATA/images").iterdir()))
    assert not Path("indiana.h5.parts").exists()


def test_extraction_by_an_array_of_jobs(cluster):
    for task in ("1", "2"):
        run_script(small(script("cxr-part")), ARRAY_TASK_ID=task, ARRAY_TASK_COUNT="2")
    [merge] = [b.text for b in read_blocks("docs/cluster.md") if b.text.startswith("cxr-cache mer")]
    run_script(merge)
    assert count_done("indiana.h5") == len(list(Path("DATA/images").iterdir()))


def test_fine_tuning_by_several_processes(cluster):
    encoders = Encoders()
    data = "--csv-dir DATA --image-dir DATA/images"
    run_line(f"cxr-cache extract {data} --store indiana.h5 --tokens", encoders)
    run_line("cxr-cache train indiana.h5 --run-dir runs/first", encoders)
    text = script("cxr-finetune").rstrip() + " --epochs 1 --batch-size 16 --device cpu\n"
    run_script(text, GPUS_ON_NODE="2")
    assert Run.open("runs/tuned").config["processes"] == 2

    page = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    [line] = re.findall(r"^torchrun .*$", page, re.MULTILINE)
    line = line.replace("mine.h5", "indiana.h5").replace("runs/frozen", "runs/first")
    run_script(f"{line} --epochs 1 --batch-size 16 --device cpu")
    assert Run.open("runs/tuned2").config["processes"] == 2
