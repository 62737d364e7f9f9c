"""The run folder: whole files or none, and tables that come back as they were written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cxr_cache.errors import RunError, StoreBusyError
from cxr_cache.models.run import Run, SavedModel, require_free

MODEL = SavedModel(
    tensors={"weight_0": torch.arange(6.0).view(1, 2, 3), "bias_0": torch.tensor([[0.1]])},
    findings=("Pleural Effusion", "NA", "Ödem"),
    thresholds={"Pleural Effusion": 0.1 + 0.2, "NA": 2.0, "Ödem": 1e-9},
    encoder={"name": "random:test_vit", "preprocessing": {"mean": [0.5, 0.25, 0.1]}},
    head={"input_norm": "l2", "hidden": [12, 8], "dropout": 0.5, "norm": "batch"},
)


def make_run(path: Path, **config) -> Run:
    run = Run.create(path, {"kind": "train", **config})
    run.save_model(MODEL)
    run.finish()
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- Creating and opening -------------------------------------------------------------------------


def test_a_run_says_when_it_is_finished(tmp_path):
    run = Run.create(tmp_path / "deep" / "run", {"kind": "train", "seed": np.int64(3)})

    with pytest.raises(RunError, match=r"is not finished.*Run the same `cxr-cache train` command"):
        Run.open(run.path)
    run.config["chosen_epochs"] = 50
    run.finish()

    config = Run.open(run.path).config
    assert config["status"] == "finished"
    assert config["format_version"] == 1
    assert (config["kind"], config["seed"], config["chosen_epochs"]) == ("train", 3, 50)
    assert {"python", "torch", "cxr-cache"} <= set(config["versions"])


def test_a_finished_run_is_replaced_on_request_only(tmp_path):
    make_run(tmp_path / "run", seed=1)
    before = contents(tmp_path / "run")

    with pytest.raises(RunError, match=r"holds a finished run.*replace it with --overwrite"):
        Run.create(tmp_path / "run", {"seed": 2})

    assert contents(tmp_path / "run") == before
    Run.create(tmp_path / "run", {"seed": 2}, overwrite=True)
    assert set(contents(tmp_path / "run")) == {"config.json"}, "files of the old run are left"


def test_everything_of_an_old_run_goes_and_nothing_else(tmp_path):
    run = make_run(tmp_path / "run")
    run.write_table("per_finding", pd.DataFrame({"finding": ["Mass"]}))
    run.write_metrics({"test": {}})
    run.write_report("<html>")
    run.write_model_card("# card")
    run.plot_path("auroc").write_bytes(b"png")
    (run.path / "notes.txt").write_text("mine")

    Run.create(run.path, {}, overwrite=True)

    assert set(contents(run.path)) == {"config.json", "notes.txt"}


def test_an_unfinished_run_is_started_anew(tmp_path):
    first = Run.create(tmp_path / "run", {"seed": 1})
    first.write_table("splits", pd.DataFrame({"image_id": ["a"]}))

    again = Run.create(tmp_path / "run", {"seed": 2})

    assert again.config["seed"] == 2
    assert not (tmp_path / "run" / "splits.csv").exists()


def test_a_kill_while_replacing_a_run_leaves_a_folder_that_can_be_used(tmp_path, monkeypatch):
    """The configuration gives way first, so that no mixture passes for the old run."""
    make_run(tmp_path / "run")

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            Run.create(tmp_path / "run", {}, overwrite=True)

    with pytest.raises(RunError, match="is not finished"):
        Run.open(tmp_path / "run")
    Run.create(tmp_path / "run", {})


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")

    for overwrite in (False, True):
        with pytest.raises(RunError, match=r"holds other files and no run.*folder of its own"):
            Run.create(tmp_path, {}, overwrite=overwrite)

    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_welcome(tmp_path):
    (tmp_path / ".DS_Store").write_text("what macOS leaves everywhere")

    require_free(tmp_path, overwrite=False)
    require_free(tmp_path / "not there yet", overwrite=False)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")

    with pytest.raises(RunError, match="is a file; --run-dir needs a folder"):
        require_free(tmp_path / "run", overwrite=True)


def test_what_is_not_a_run_is_not_opened(tmp_path):
    with pytest.raises(RunError, match=r"is not a run folder.*`cxr-cache train` makes one"):
        Run.open(tmp_path)
    with pytest.raises(RunError, match="is not a run folder"):
        Run.open(tmp_path / "missing")


@pytest.mark.parametrize("text", ["{", "[]", "null", "\x00\xff"])
def test_a_damaged_configuration_is_named_with_a_remedy(tmp_path, text):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_bytes(text.encode("latin-1"))

    for attempt in (Run.open, lambda path: Run.create(path, {}, overwrite=True)):
        with pytest.raises(RunError, match=r"config\.json is not .*damaged.*another folder"):
            attempt(tmp_path / "run")


def test_a_run_of_another_format_version_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    config = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps({**config, "format_version": 7}))

    with pytest.raises(RunError, match="has format version 7, this cxr-cache reads 1"):
        Run.open(run.path)


def test_runs_of_version_0_1_0_have_the_decode_rule_in_words(tmp_path):
    words, number = {"decode_rule": "rule 1. Grey: as it was said."}, {"decode_rule": 1}
    old = replace(MODEL, encoder={"name": "x", "preprocessing": words})
    run = Run.create(tmp_path, {"kind": "train", "store": {"encoder": old.encoder}})
    run.save_model(old)
    run.save_state("fold-1", {})
    now = {"store": {"encoder": {"name": "x", "preprocessing": number}}}
    assert Run.resume(tmp_path, now) is not None
    run.finish()
    run = Run.open(tmp_path)
    assert run.load_model().encoder == now["store"]["encoder"]
    assert run.config["store"] == now["store"]


# --- Whole or not at all --------------------------------------------------------------------------


WRITES = {
    "splits.csv": lambda run: run.write_table("splits", pd.DataFrame({"image_id": ["new"]})),
    "metrics.json": lambda run: run.write_metrics({"new": 1}),
    "report.html": lambda run: run.write_report("new"),
    "model_card.md": lambda run: run.write_model_card("new"),
    "model.safetensors": lambda run: run.save_model(MODEL),
    "config.json": lambda run: run.finish(),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, name, failing):
    """A full disk or a kill in the middle: readers find the old file, and nothing beside it."""
    run = make_run(tmp_path / "run")
    (run.path / name).write_bytes(b"old")
    before = contents(run.path)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), fail)
        with pytest.raises(OSError, match=r"could not be written: .* bytes free"):
            WRITES[name](run)

    assert contents(run.path) == before
    WRITES[name](run)
    assert (run.path / name).read_bytes() != b"old"
    assert contents(run.path).keys() == before.keys()


# --- Tables ---------------------------------------------------------------------------------------


def test_ids_survive_whatever_they_look_like(tmp_path):
    """pandas would make numbers, missing values and booleans of these."""
    ids = [
        "NA",
        "00012",
        "1e5",
        "nan",
        "None",
        "null",
        "True",
        "1.0",
        "-inf",
        'a "b", c',
        "é/ü.png",
    ]
    table = pd.DataFrame(
        {
            "image_id": ids,
            "study_uid": ids[::-1],
            "patient_id": [*ids[1:], ""],
            "projection": ["", "Frontal"] * 5 + [""],
            "split": "train",
            "Mass": np.linspace(0, 1, len(ids)),
        }
    )
    run = Run.create(tmp_path / "run", {})

    run.write_table("predictions", table)
    restored = run.read_table("predictions")

    for column in ("image_id", "study_uid", "patient_id", "projection", "split"):
        assert restored[column].tolist() == table[column].tolist(), column
    np.testing.assert_allclose(restored["Mass"], table["Mass"], rtol=1e-8)


@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    ids=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\x00\r\n"), min_size=1),
        min_size=1,
        max_size=5,
    )
)
def test_any_text_survives_as_an_id(tmp_path, ids):
    run = Run(tmp_path, {})

    run.write_table("predictions", pd.DataFrame({"image_id": ids, "study_uid": "1", "Mass": 0.5}))

    assert run.read_table("predictions")["image_id"].tolist() == ids


def test_probabilities_survive_to_the_last_bit_of_float32(tmp_path):
    probabilities = np.random.default_rng(0).random(1000).astype(np.float32)
    probabilities[:4] = [0, 1, np.finfo(np.float32).tiny, np.nextafter(np.float32(1), 0)]
    run = Run(tmp_path, {})

    run.write_table("predictions", pd.DataFrame({"image_id": "a", "Mass": probabilities}))

    restored = run.read_table("predictions")["Mass"].to_numpy().astype(np.float32)
    np.testing.assert_array_equal(restored, probabilities)


def test_unlabelled_stays_unlabelled(tmp_path):
    table = pd.DataFrame({"image_id": ["1", "2", "3"], "Mass": [1.0, np.nan, 0.0]})
    run = Run(tmp_path, {})

    run.write_table("targets", table)

    assert (tmp_path / "targets.csv").read_text() == "image_id,Mass\n1,1\n2,\n3,0\n"
    np.testing.assert_array_equal(run.read_table("targets")["Mass"], table["Mass"])


def test_a_missing_table_is_named_with_a_remedy(tmp_path):
    run = make_run(tmp_path / "run")

    with pytest.raises(RunError, match=r"splits\.csv is missing.*Train again"):
        run.read_table("splits")
    with pytest.raises(RunError, match=r"metrics\.json is missing.*`cxr-cache evaluate"):
        run.read_metrics()


def test_metrics_come_back_and_hold_no_nan(tmp_path):
    """NaN is no JSON; what is undefined is null."""
    run = Run(tmp_path, {})
    metrics = {"test": {"macro_auroc": {"value": 0.7, "low": None}}, "n": 3}

    run.write_metrics({**metrics, "n": np.int64(3)})

    assert run.read_metrics() == metrics
    with pytest.raises(ValueError, match="JSON"):
        run.write_metrics({"value": float("nan")})
    assert run.read_metrics() == metrics


# --- The model ------------------------------------------------------------------------------------


def test_a_model_comes_back_with_all_it_needs(tmp_path):
    run = make_run(tmp_path / "run")

    model = Run.open(run.path).load_model()

    assert model.tensors.keys() == MODEL.tensors.keys()
    for name, tensor in MODEL.tensors.items():
        assert torch.equal(model.tensors[name], tensor), name
    for field in ("findings", "thresholds", "encoder", "head"):
        assert getattr(model, field) == getattr(MODEL, field), field
    assert list(Run.open(run.path).thresholds.items()) == list(MODEL.thresholds.items())


def test_a_model_is_the_same_bytes_every_time(tmp_path):
    """safetensors orders several metadata entries anew in every call; one has no order."""
    files = {make_run(tmp_path / str(i)).path / "model.safetensors" for i in range(8)}

    assert len({file.read_bytes() for file in files}) == 1


def test_a_model_saved_again_is_read_again(tmp_path):
    run = make_run(tmp_path / "run")
    assert run.thresholds == MODEL.thresholds

    run.save_model(SavedModel(MODEL.tensors, ("Mass",), {"Mass": 0.5}, {}, {}))

    assert run.thresholds == {"Mass": 0.5}
    assert run.threshold_rule == "f1"
    assert run.calibration.method == "none"
    assert run.load_model().findings == ("Mass",)


def test_what_is_no_model_of_ours_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    path = run.path / "model.safetensors"
    whole = path.read_bytes()

    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"is not a model of cxr-cache.*Train again"):
        run.load_model()
    save_file({"weight": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(RunError, match="is not a model of cxr-cache"):
        run.load_model()
    path.unlink()
    with pytest.raises(RunError, match=r"model\.safetensors is missing.*Train again"):
        run.load_model()


# --- What an interrupted training continues from --------------------------------------------------


def test_a_state_comes_back_as_it_was(tmp_path):
    run = Run.create(tmp_path / "run", {"kind": "finetune"})
    weights = {2: {"w": torch.arange(3)}}
    state = {"epoch": 3, "history": [{"lr": 1e-3}], "weights": weights, "scheduler": None}
    run.save_state("fold-1", state)
    loaded = run.load_state("fold-1")
    assert torch.equal(loaded["weights"][2].pop("w"), state["weights"][2].pop("w"))
    assert loaded == state
    assert run.load_state("fold-2") is None
    assert [path.name for path in (run.path / "unfinished").iterdir()] == ["fold-1.pt"]
    run.finish()
    assert not (run.path / "unfinished").exists()


def test_a_state_that_could_run_code_is_refused(tmp_path):
    run = Run.create(tmp_path / "run", {"kind": "finetune"})
    run.save_state("fold-1", {})
    with (run.path / "unfinished" / "fold-1.pt").open("wb") as file:
        torch.save({"path": Path("x")}, file)
    with pytest.raises(RunError, match=r"fold-1\.pt is damaged.*Delete this file"):
        run.load_state("fold-1")


def test_a_full_disk_is_named_and_the_last_state_stays(tmp_path):
    """A file size limit in a child is a full disk in small."""
    run = Run.create(tmp_path / "run", {"kind": "finetune"})
    run.save_state("fold-1", {"epoch": 1})
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from cxr_cache.models.run import Run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try: Run(Path(sys.argv[1]), {}).save_state('fold-1', {'w': torch.zeros(10_000)})\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    assert re.match(r"DiskFullError .*fold-1\.pt could not be written: .* bytes free", said)
    assert "Free some space and run the same command again" in said
    assert run.load_state("fold-1") == {"epoch": 1}
    assert [path.name for path in (run.path / "unfinished").iterdir()] == ["fold-1.pt"]


def test_an_interruption_while_a_state_is_written_is_still_one(tmp_path, monkeypatch):
    """torch's writer fails on the half file that it leaves; the command must end by Ctrl-C."""

    def stopped(_state, _file):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 5666368 vs 5666256")

    run = Run.create(tmp_path / "run", {"kind": "finetune"})
    run.save_state("fold-1", {"epoch": 1})
    monkeypatch.setattr(torch, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        run.save_state("fold-1", {"epoch": 2})
    assert run.load_state("fold-1") == {"epoch": 1}


# --- One writer at a time -------------------------------------------------------------------------


def begin_elsewhere(path: Path, wait: str = "sys.stdin.read()") -> subprocess.Popen:
    """Another process that begins a run, and is at it until its input ends."""
    code = (
        "import sys\n"
        "from cxr_cache.models.run import Run\n"
        "run = Run.create(sys.argv[1], {'kind': 'train', 'seed': 1})\n"
        "run.save_state('fold-1', {'epoch': 1})\n"
        "print('begun', flush=True)\n"
        f"{wait}\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    return process


def test_a_second_writer_is_told_who_the_first_is_and_changes_nothing(tmp_path):
    """A job that was queued twice: one run must not be mixed from two."""
    path = tmp_path / "run"
    with begin_elsewhere(path) as first:
        before = contents(path)
        said = rf"{path} is being written by process {first.pid} on .* \(since"
        attempts = (
            lambda: require_free(path, overwrite=False),
            lambda: require_free(path, overwrite=True),
            lambda: Run.create(path, {"kind": "train", "seed": 2}),
            lambda: Run.create(path, {"kind": "train", "seed": 2}, overwrite=True),
            lambda: Run.resume(path, {"kind": "train", "seed": 1}),
        )
        for attempt in attempts:
            with pytest.raises(StoreBusyError, match=said):
                attempt()
        assert Run.resume(path, {"kind": "train", "seed": 1}, writes=False)  # others of torchrun
        assert contents(path) == before
        first.stdin.close()
    assert first.returncode == 0
    assert ".lock" not in contents(path)
    Run.create(path, {"kind": "train", "seed": 2}).finish()


def test_a_killed_writer_stops_nobody(tmp_path):
    path = tmp_path / "run"
    with begin_elsewhere(path, "import os; os.kill(os.getpid(), 9)") as first:
        first.wait()
    assert (path / ".lock").exists()
    run = Run.resume(path, {"kind": "train", "seed": 1})
    assert run is not None
    run.finish()
    assert ".lock" not in contents(path)


def test_a_failed_training_can_be_repeated_in_the_same_process(tmp_path):
    """A notebook keeps the run of a cell that failed; the same cell must work again."""
    failed = Run.create(tmp_path / "run", {"kind": "train"})
    again = Run.create(tmp_path / "run", {"kind": "train"})
    del failed
    assert (tmp_path / "run" / ".lock").exists()
    again.finish()
    with pytest.raises(RunError, match="holds a finished run"):
        Run.create(tmp_path / "run", {"kind": "train"})
    assert not (tmp_path / "run" / ".lock").exists()


def test_another_thread_is_refused(tmp_path):
    run = Run.create(tmp_path / "run", {"kind": "train"})
    with ThreadPoolExecutor(1) as thread, pytest.raises(StoreBusyError, match="is being written"):
        thread.submit(Run.create, tmp_path / "run", {"kind": "train"}).result()
    run.finish()
