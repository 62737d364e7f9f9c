"""The measuring scripts run to their end at toy size; what they measure is for quiet machines."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cxr_cache.metrics.resampled import RankedScores, bootstrap

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


def import_script(name: str, monkeypatch) -> ModuleType:
    """Import a script with those that it imports from beside it."""
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    return importlib.import_module(name)


@pytest.mark.slow
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


@pytest.mark.slow
def test_extraction_is_measured_against_a_plain_script_and_the_bare_forward_pass(tmp_path):
    """In either precision on any processor: `auto` would be one here and the other elsewhere."""
    out = tmp_path / "extract.json"
    script = REPOSITORY / "scripts" / "bench_extract.py"
    options = ["--quick", "--rounds", 1, "--images", 8, "--precision", "fp32", "bf16", "--out", out]

    printed = run([sys.executable, script, *options])

    written = json.loads(out.read_text())
    floors = {"fp32": "floor", "bf16": "products"}
    assert set(written["precisions"]) == set(floors)
    for precision, measured in written["precisions"].items():
        assert set(measured["results"]) == {"plain", "shared", "alone", "product", "products"}
        assert [goal["against"] for goal in measured["goals"]] == ["plain", floors[precision]]
        assert measured["min_cosine"] >= 0.9999
    assert written["precisions"]["fp32"]["disagreement"] <= 1e-5
    assert "÷ floor" in printed
    assert "the limit was: " in printed


@pytest.mark.slow
def test_decoding_is_measured_per_library_and_changes_no_pixel(tmp_path):
    out = tmp_path / "decode.json"
    script = REPOSITORY / "scripts" / "bench_decode.py"

    printed = run([sys.executable, script, "--n-images", 1, "--rounds", 1, "--out", out])

    kinds = json.loads(out.read_text())["results"]
    assert {"PNG 1,024", "PNG 2,000 x 2,500", "JPEG 2,500 x 3,000"} < set(kinds)
    for ways in kinds.values():
        assert all(way["ms"] > 0 for way in ways.values())
        own = [way for name, way in ways.items() if name.startswith("to 224") and "," not in name]
        assert [way["difference"] for way in own] == [0, 0, 0]
    assert kinds["PNG 2,000 x 2,500"]["to 224: Pillow, torchvision's resize"]["difference"] == 1
    assert "floor: zlib" in printed


@pytest.mark.slow
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
    assert all(of["disk"] > 0 < of["ratio"] for of in written["training"].values())
    assert "÷ flat" in printed
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_growth_is_measured_step_by_step(tmp_path):
    out = tmp_path / "growth.json"
    script = REPOSITORY / "scripts" / "bench_growth.py"

    printed = run([sys.executable, script, "--quick", "--folder", tmp_path, "--out", out])

    written = json.loads(out.read_text())
    steps = ["describe", "import", "open", "train", "evaluate", "report", "audit"]
    assert list(written["results"]) == steps
    assert 0 < written["results"]["report"]["sizes"][-1]["page_mb"] < 1
    for result in written["results"].values():
        assert [size["rows"] for size in result["sizes"]] == [4000, 8000]
        assert all(size["cpu_seconds"] > 0 and size["peak_mb"] > 50 for size in result["sizes"])
    assert "x embeddings" in printed
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["figures.json", "growth.json"]  # of the data, nothing


@pytest.mark.slow
def test_resampling_is_measured_against_a_loop_over_scikit_learn(tmp_path):
    out = tmp_path / "statistics.json"
    script = REPOSITORY / "scripts" / "bench_statistics.py"
    small = ("--rows", 200, "--resamples", 40, "--looped", 1, "--rounds", 1, "--growth", "300,600")

    printed = run([sys.executable, script, *small, "--growth-resamples", 20, "--out", out])

    written = json.loads(out.read_text())
    loop_s, ranking_s, everything_s = written["seconds"].values()
    assert loop_s > ranking_s > 0 < everything_s
    assert [growth["rows"] for growth in written["growth"]] == [300, 600]
    assert "measured on 1 resamples" in printed


@pytest.mark.slow
def test_resampling_reaches_its_goals_at_full_size(tmp_path):
    """2,000 resamples x 35 findings x 1,500 rows: under 10 s, and 20 times a loop's speed."""
    out = tmp_path / "statistics.json"
    script = REPOSITORY / "scripts" / "bench_statistics.py"

    run([sys.executable, script, "--growth", "20000,80000", "--out", out])

    written = json.loads(out.read_text())
    loop_s, ranking_s, everything_s = written["seconds"].values()
    assert everything_s < 10
    assert loop_s > 20 * ranking_s
    few, many = written["growth"]
    assert many["cpu_seconds"] < 1.5 * 4 * few["cpu_seconds"]
    assert many["peak_mb"] < 1.2 * 4 * few["peak_mb"]


def test_resamples_without_end_have_the_spread_of_many(monkeypatch):
    """Coverage of AUROCs is simulated with a formula in place of resamples."""
    script = import_script("interval_coverage", monkeypatch)
    rng = np.random.default_rng(0)
    positives, negatives = 1.5 + rng.standard_normal((3, 7)), rng.standard_normal((3, 60))

    areas, spreads = script.resample_without_end(positives, negatives)

    targets = np.repeat([[1.0], [0.0]], [7, 60], axis=0).repeat(3, axis=1)
    ranked = RankedScores(targets, np.concatenate([positives, negatives], axis=1).T)
    np.testing.assert_allclose(areas, ranked.auroc_and_ap(np.ones((1, 67)))[0][0])
    resampled = bootstrap(
        lambda weights: {"auroc": ranked.auroc_and_ap(weights)[0]}, np.arange(67), 4000, 0
    )
    np.testing.assert_allclose(spreads, resampled["auroc"].std(axis=0), rtol=0.05)


@pytest.mark.slow
def test_coverage_is_simulated_for_both_kinds_of_intervals(tmp_path):
    out = tmp_path / "coverage.json"
    script = REPOSITORY / "scripts" / "interval_coverage.py"

    printed = run([sys.executable, script, "--repeats", 3, "--resamples", 20, "--out", out])

    written = json.loads(out.read_text())
    assert set(written["one_finding"]) == {"studies", "images"}
    assert set(written["patients"]) == {"patients", "studies"}
    assert {row["method"] for row in written["many_findings"]} == {"package", "percentiles"}
    assert {row["truth"] for row in written["many_findings"]} == {"population", "as large"}
    assert all(0 <= row["coverage"] <= 1 for row in written["many_findings"])
    assert "resampling studies" in printed


@pytest.mark.slow
def test_bands_and_planned_widths_are_simulated(tmp_path):
    out = tmp_path / "bands.json"
    script = REPOSITORY / "scripts" / "curve_bands.py"

    printed = run([sys.executable, script, "--repeats", 4, "--resamples", 20, "--out", out])

    written = json.loads(out.read_text())
    assert len(written["bands"]) == 4
    assert all(0 <= share <= 1 for row in written["bands"] for share in row["held"].values())
    assert all(0.5 < ratio < 2 for row in written["widths"] for ratio in row["ratios"])
    assert "expected / simulated half width" in printed


def check_gpu(out: Path, sections: str, *more: str) -> dict[str, dict]:
    """Run the GPU check on the CPU; gives its sections."""
    script = REPOSITORY / "scripts" / "gpu_check.sh"
    options = ["--device", "cpu", "--quick", "--sections", sections, *more]
    run([script, *options], PYTHON=sys.executable, OUT=str(out))
    return json.loads((out / "gpu_check.json").read_text())["sections"]


def test_the_gpu_check_goes_through_every_section_on_the_cpu(tmp_path, monkeypatch, capsys):
    script, out = import_script("gpu_check", monkeypatch), tmp_path / "gpu_check.json"
    names = [name for name in script.SECTIONS if name != "distributed"]  # which has its own test
    options = ["--device", "cpu", "--quick", "--sections", ",".join(names), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *options])

    script.main()

    sections = json.loads(out.read_text())["sections"]
    assert list(sections) == names
    assert sections.pop("tests")["status"] == "skipped: they need a GPU"
    for section in sections.values():
        assert section["status"] == "done"
        assert all(row["value"] is not None for row in section["rows"])
    exact = [row["value"] for row in sections["exactness"]["rows"] if row["limit"] is not None]
    assert max(exact) <= 1e-2
    apart = [row for row in sections["encoders"]["rows"] if row["limit"] is not None]
    assert len(apart) == 2 * 6, "fp32 and bf16 of every kind of encoder"
    assert max(row["value"] for row in apart) <= 1e-3
    assert [row["note"] for row in sections["files"]["rows"]][-1].partition("limit was")[1]
    assert "fine-tuning from tokens" in capsys.readouterr().out


def test_the_gpu_check_knows_which_wheels_the_package_needs():
    check = (REPOSITORY / "scripts" / "gpu_check.sh").read_text()
    project = (REPOSITORY / "pyproject.toml").read_text()

    listed = {name for names in re.findall(r'"\w+": "([^"]+)"', check) for name in names.split()}
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1]
    needed = set(re.findall(r'^ *"([\w-]+)[^;\n]*$', dependencies, re.MULTILINE))
    assert len(needed) > 15
    assert needed <= listed


@pytest.mark.slow
def test_the_gpu_check_starts_several_processes(tmp_path):
    sections = check_gpu(tmp_path, "distributed", "--processes", "2")

    assert [row["unit"] for row in sections["distributed"]["rows"]] == ["images/s"] * 2


@pytest.mark.slow
def test_a_section_that_fails_is_reported_and_the_others_go_on(tmp_path):
    out = tmp_path / "gpu_check.json"
    script = REPOSITORY / "scripts" / "gpu_check.py"
    breaking = (
        "import runpy, sys, cxr_cache.training.fit\n"
        "def fail(*args, **options): raise ValueError('broken on purpose')\n"
        "cxr_cache.training.fit.fit_heads = fail\n"
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
    assert sections["heads"]["status"].startswith("failed: 5 folds in one bank, cpu; 5 folds one")
    assert sections["heads"]["rows"][0]["note"] == "ValueError: broken on purpose"
    assert sections["exactness"]["status"] == "done"


@pytest.mark.slow
def test_the_search_is_measured_against_the_plain_loop_and_the_floor(tmp_path):
    out = tmp_path / "search.json"

    printed = run(
        [sys.executable, REPOSITORY / "scripts" / "bench_search.py", "--quick", "--out", out]
    )

    results = json.loads(out.read_text())["results"]
    assert list(results) == [
        "search, batch 16",
        "search, batch 256",
        "search, batch 16, 1,024 wide",
        "100 settings, batch 256",
        "macro AUROC of 5 folds",
    ]
    assert all(seconds > 0 for times in results.values() for seconds in times.values())
    assert "plain/ours" in printed


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
            "flags\t\t: fma avx2 avx512f avx512_bf16",
            "amd-epyc-zen4-avx512bf16",
        ),
        (
            "cpu family : 23\nmodel : 49\nmodel name : AMD EPYC-Rome Processor\nflags : avx2",
            "amd-epyc-zen2-avx2",
        ),
        (
            "model name : Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz\n"
            "flags : avx2 avx512f avx512_bf16 amx_bf16",
            "intel-xeon-amx",
        ),
        ("model name : 13th Gen Intel(R) Core(TM) i7-1360P\nflags : avx2", "intel-core-avx2"),
        ("model name : Apple M2 Pro\n", "apple-m2"),
        ("model name : Neoverse-N1\nFeatures : fp asimd", "neoverse-n1-neon"),
    ],
)
def test_a_processor_is_named_by_its_make_and_what_it_computes_with(monkeypatch, cpuinfo, name):
    assert import_script("benchmarking", monkeypatch).name_processor(cpuinfo) == name


def test_results_lie_in_a_folder_of_the_processor(monkeypatch):
    benchmarking = import_script("benchmarking", monkeypatch)
    path = benchmarking.results_path("search")

    assert path.relative_to(REPOSITORY).parts[0] == "benchmarks"
    assert path.name == "search.json"
    assert path.parent.name == benchmarking.describe_machine()["processor"]


@pytest.fixture
def measured(tmp_path):
    """Results of two processors, of which one has more, and a page for their table."""
    search = {"a search": {"seconds": 2.0, "plain": 50.0, "floor": 1.6}}
    slow = {"a search": {"seconds": 4.0, "plain": 40.0}, "scores": {"seconds": 1.0, "floor": 0.5}}
    for name, results in {"fast": search, "slow": slow}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "search.json").write_text(json.dumps({"results": results}))
    (tmp_path / "page.md").write_text(
        "Above\n<!-- made by scripts/bench_table.py -->\nold\n"
        "<!-- end of what scripts/bench_table.py makes -->\nbelow\n"
    )
    return tmp_path


def test_all_measurements_make_one_table_and_one_picture(measured, monkeypatch, capsys):
    script = import_script("bench_table", monkeypatch)
    options = ["bench_table.py", "--folder", str(measured), "--page", str(measured / "page.md")]
    monkeypatch.setattr(sys, "argv", options)
    script.main()

    assert "a search   2 s       50 s  1.6 s          25.0          1.25" in capsys.readouterr().out
    page = (measured / "page.md").read_text()
    assert page.startswith("Above\n<!-- made")
    assert page.endswith("makes -->\nbelow\n")
    assert page.splitlines()[3:7] == [
        "| | fast: plain ÷ ours | ours ÷ floor | slow: plain ÷ ours | ours ÷ floor |",
        "|---|---|---|---|---|",
        "| a search | 25.0 | 1.25 | 10.0 | – |",
        "| scores | – | – | – | 2.00 |",
    ]
    assert (measured / "page.png").stat().st_size > 5000

    monkeypatch.setattr(sys, "argv", [*options, "--check"])
    script.main()
    shutil.rmtree(measured / "slow")
    with pytest.raises(SystemExit, match=r"Stale: page\.md, page\.png\. Run: python"):
        script.main()


def test_the_page_on_performance_has_the_figures_of_the_last_benchmarks(monkeypatch):
    script = import_script("bench_table", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["bench_table.py", "--check"])

    script.main()  # or else: python scripts/bench_table.py


def test_figures_of_the_documents_that_need_no_data_are_not_stale():
    printed = run([sys.executable, REPOSITORY / "scripts" / "figures.py"])

    lines = printed.splitlines()[1:]
    needing = [line for line in lines if "needs --" in line]
    assert len(lines) > len(needing)
    assert needing, "figures of real radiographs are named, too"
    assert "STALE" not in printed


@pytest.mark.slow
def test_splits_of_many_seeds_are_compared(tmp_path):
    rows = [f"{s}_{i}.png,{s},{int(s < 40)},{int(s < 4)}" for s in range(120) for i in (0, 1)]
    (tmp_path / "data.csv").write_text("\n".join(["image_id,study_uid,Common,Rare", *rows]))
    out = tmp_path / "splits.json"
    script = REPOSITORY / "scripts" / "split_exchangeability.py"

    printed = run([sys.executable, script, tmp_path / "data.csv", "--seeds", 30, "--out", out])

    written = json.loads(out.read_text())
    common, rare = written["findings"]
    assert (common["n"], rare["n"], rare["missing"]) == (40, 4, 0)
    assert rare["in_test"] == pytest.approx(1, abs=0.2)
    assert common["shared"] == pytest.approx(common["independent"], abs=0.05)
    assert written["summary"]["test"]["error, 50 images or more"] < 0.05
    assert "random studies" in printed
