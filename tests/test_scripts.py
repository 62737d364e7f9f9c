"""The measuring scripts run to their end at toy size; what they measure is for quiet machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def run(command: list[object], **environment: str) -> str:
    """Run a command of the repository on one thread; gives what it printed."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        text=True,
        timeout=300,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    return done.stdout


def test_fine_tuning_is_measured_against_the_plain_ways_and_the_floor(tmp_path):
    out = tmp_path / "made" / "finetune.json"
    script = REPOSITORY / "scripts" / "bench_finetune.py"

    printed = run([sys.executable, script, "--quick", "--rounds", 1, "--out", out])

    written = json.loads(out.read_text())
    assert set(written["results"]) == {
        *("files", "pixels", "plain_tail", "tail", "product_ram", "product_disk")
    }
    for result in written["results"].values():
        assert result["images_per_s"] > 0
        assert result["peak_mb"] > 0
    judged = [(goal["figure"], goal["against"]) for goal in written["goals"]]
    assert judged == [
        (f"product_{place}", against)
        for place in ("ram", "disk")
        for against in ("files", "pixels", "floor")
    ]
    assert written["loss_disagreement"] <= 1e-4
    assert {"cores", "cpu_flags", "torch", "threads"} <= set(written["machine"])
    assert "÷ floor" in printed
    assert str(Path.home()) not in out.read_text()


def test_extraction_is_measured_against_a_plain_script_and_the_bare_forward_pass(tmp_path):
    out = tmp_path / "extract.json"
    script = REPOSITORY / "scripts" / "bench_extract.py"

    printed = run([sys.executable, script, "--quick", "--rounds", 1, "--images", 8, "--out", out])

    written = json.loads(out.read_text())
    assert set(written["results"]) == {"plain", "shared", "alone", "product"}
    assert [goal["against"] for goal in written["goals"]] == ["plain", "floor"]
    assert written["disagreement"] <= 1e-5
    assert "÷ floor" in printed
    assert "the limit was: " in printed


def test_reading_tokens_is_measured_against_a_flat_file(tmp_path):
    out = tmp_path / "tokens.json"
    script = REPOSITORY / "scripts" / "bench_tokens.py"

    printed = run(
        [sys.executable, script, "--quick", "--rounds", 1, "--folder", tmp_path, "--out", out]
    )

    written = json.loads(out.read_text())
    warm, larger = written["results"]
    assert (warm, larger in ("cgroup", "fadvise")) == ("warm", True)
    for results in written["results"].values():
        assert set(results) == {"flat", "flat_pread", "read_views", "StoredTokens"}
    assert len(written["goals"]) == 4
    assert "÷ flat" in printed
    assert list(tmp_path.iterdir()) == [out]


def check_gpu(out: Path, sections: str, *more: str) -> dict[str, dict]:
    """Run the GPU check on the CPU; gives its sections."""
    script = REPOSITORY / "scripts" / "gpu_check.sh"
    options = ["--device", "cpu", "--quick", "--sections", sections, *more]
    run([script, *options], PYTHON=sys.executable, OUT=str(out))
    return json.loads((out / "gpu_check.json").read_text())["sections"]


@pytest.mark.slow
def test_the_gpu_check_goes_through_every_section_on_the_cpu(tmp_path):
    sections = check_gpu(tmp_path, "exactness,extraction,tuning,heads")

    assert list(sections) == ["exactness", "extraction", "tuning", "heads"]
    for section in sections.values():
        assert section["status"] == "done"
        assert section["rows"]
    exact = [row["value"] for row in sections["exactness"]["rows"] if row["limit"] is not None]
    assert max(exact) <= 1e-2


@pytest.mark.slow
def test_the_gpu_check_starts_several_processes(tmp_path):
    sections = check_gpu(tmp_path, "distributed", "--processes", "2")

    assert [row["unit"] for row in sections["distributed"]["rows"]] == ["images/s"] * 2


def test_a_section_that_fails_is_reported_and_the_others_go_on(tmp_path):
    out = tmp_path / "gpu_check.json"
    script = REPOSITORY / "scripts" / "gpu_check.py"
    breaking = (
        "import runpy, sys, cxr_cache.fit\n"
        "def fail(*args, **options): raise ValueError('broken on purpose')\n"
        "cxr_cache.fit.fit_heads = fail\n"
        "sys.argv[1:] = sys.argv[2:]\n"
        f"sys.path.insert(0, {str(script.parent)!r})\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", breaking, "", "--device", "cpu", "--quick"]

    done = subprocess.run(
        [*command, "--sections", "heads,exactness", "--out", str(out)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        timeout=300,
        capture_output=True,
    )

    assert done.returncode == 1
    sections = json.loads(out.read_text())["sections"]
    assert sections["heads"]["status"] == "failed: ValueError: broken on purpose"
    assert sections["exactness"]["status"] == "done"
