"""The flow of images adds up, whatever images are lost to."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxr_cache.config import ExtractConfig, TrainConfig
from cxr_cache.datasets.cohort import Cohort, Reading
from cxr_cache.datasets.flow import Flow, format_flow, parse_flow
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.models.run import Run
from cxr_cache.report.composition import count_line
from cxr_cache.report.views import to_records
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.training.train import fit_run

NUMBERS = ["images", "studies", "patients"]
FINDINGS = ("Cardiomegaly", "Nodule")


def require_adding_up(table: pd.DataFrame) -> None:
    """What is left is what was left before, less what was lost; the parts are what is left."""
    left, first = None, True
    for row in table.to_dict("records"):
        numbers = np.array([row[name] for name in NUMBERS])
        if row["kind"] == "lost":
            left = left - numbers
        elif row["kind"] == "left":
            assert first or (left == numbers).all(), row
            left, first = numbers, False
    of = {kind: table.loc[table["kind"] == kind, NUMBERS].sum() for kind in ("part", "shared")}
    assert (of["part"] - of["shared"] == left).all()


@pytest.mark.parametrize("seed", range(4))
def test_it_adds_up_for_images_studies_and_patients(seed):
    rng = np.random.default_rng(seed)
    n = 200
    study = rng.integers(0, 90, n)
    images = pd.DataFrame(
        {
            "image_id": [f"{i}.png" for i in range(n)],
            "study_uid": study.astype(str),
            "patient_id": np.where(study % 7 == 0, "", (study // 2).astype(str)),
        }
    )
    cohort = Cohort(images, np.zeros((n, 1), np.float32), ("Mass",))
    whole = {"rows": n + 40, "images": n + 25, "studies": 100, "patients": 60}
    flow = Flow.begin(cohort, whole, None)
    for why in ("no file", "no label", "nothing"):
        flow = flow.lose(why, rng.random(n) < 0.2 * (why != "nothing"))
    flow = flow.lose("row numbers", rng.choice(n, 10, replace=False))
    n_left = int(flow.is_left.sum())
    by_image = rng.random(n_left) < 0.3  # studies and patients on both sides

    table = flow.divide(by_image, 3, rng.integers(0, 40, (n_left, 1))).to_table()

    require_adding_up(table)
    whats = table["what"].tolist()
    assert whats[:5] == [
        "rows of the table",
        "more rows of the same image",
        "images of the table",
        "not in the store (--limit, --part)",
        "images of the store",
    ]
    assert "nothing" not in whats, "what lost no image is no line"
    assert {"in train and in test", "images with the same file as another"} <= set(whats)
    assert table.loc[table["what"] == "test", "images"].item() == by_image.sum()


def test_labels_that_the_policy_leaves_out_are_told_from_labels_that_are_not_there(tmp_path):
    table = pd.DataFrame(
        {
            "image": [f"{i}.png" for i in range(6)],
            "study": list("aabbcd"),
            "Mass": ["1", "-1", "-1", "-1", "", "0"],
            "Edema": ["0", "", "", "-1", "", ""],
        }
    )
    path = tmp_path / "labels.csv"
    table.to_csv(path, index=False)

    cohort = load_cohort(path)

    counts = cohort.reading.counts
    assert counts == {
        **{"rows": 6, "images": 6, "studies": 4, "patients": 0},
        **{"dropped_images": 3, "dropped_studies": 1, "dropped_patients": 0},
    }
    flow = Flow.begin(cohort, counts, cohort.reading)
    flow = flow.lose("no label", np.isnan(cohort.targets).all(axis=1))
    lost = flow.to_table().query("kind == 'lost'")
    assert lost[["images", "studies"]].to_numpy().tolist() == [[3, 1], [1, 1]]
    assert "no label but those that are left out (uncertain: ignore; blank: ignore)" in set(
        lost["what"]
    )


def test_the_number_of_rows_is_that_of_readers_and_boxes(tmp_path):
    rows = [("a.png", "r1", "1"), ("a.png", "r2", "0"), ("a.png", "r3", "1"), ("b.png", "r1", "0")]
    path = tmp_path / "labels.csv"
    pd.DataFrame(rows, columns=["image", "reader", "Mass"]).to_csv(path, index=False)
    counts = load_cohort(path).reading.counts
    assert (counts["rows"], counts["images"]) == (4, 2)


def write_table(folder: Path) -> pd.DataFrame:
    """Phantoms of 30 patients with every kind of loss, a row per image and reader."""
    write_phantoms(folder, n_studies=30, image_size_px=64, seed=5)
    images = pd.read_csv(folder / "indiana_projections.csv", dtype=str)
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "image": images["filename"],
            "study": images["uid"],
            "patient": "p" + (images["uid"].astype(int) // 2).astype(str),
            "split": np.where(images["uid"].astype(int) % 5 == 0, "test", "train"),
            "sex": np.where(images["uid"].astype(int) % 2, "F", "M"),
            "reader": "one",
        }
    )
    study = images["uid"].astype(int)
    table["split"] = table["split"].where(study % 5 != 1, "val")
    for finding in FINDINGS:
        of_study = dict(zip(study.unique(), rng.integers(0, 2, study.nunique()), strict=True))
        table[finding] = study.map(of_study).astype(str)
    train = np.flatnonzero(table["split"] == "train")
    unknown, blank = train[3:6], train[9:11]
    table.loc[unknown, list(FINDINGS)] = ["-1", ""]
    table.loc[blank, list(FINDINGS)] = ""
    (folder / "images" / table["image"][train[14]]).unlink()  # no file
    broken = folder / "images" / table["image"][train[17]]
    broken.write_bytes(broken.read_bytes()[:200])  # cannot be decoded
    test = np.flatnonzero(table["split"] == "test")
    source, copy = (folder / "images" / table["image"][row] for row in (train[20], test[0]))
    shutil.copy(source, copy)  # duplicates, on both sides
    again = table.loc[train[25:27]].assign(reader="two")
    return pd.concat([table, again], ignore_index=True)


@pytest.fixture(scope="module")
def run_of_losses(tmp_path_factory, encoder) -> tuple[Run, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("flow")
    table = write_table(folder / "data")
    path = folder / "data" / "labels.csv"
    table.to_csv(path, index=False)
    images = folder / "data" / "images"
    cohort = load_cohort(path, image_dir=images)
    store = folder / "s.h5"
    extract_embeddings(cohort, images, store, encoder, ExtractConfig(num_workers=0))
    config = TrainConfig(
        epochs=(1,), n_folds=2, batch_size=8, hidden=(4,), baseline=False, n_jobs=1
    )
    fit_run(store, folder / "run", config)
    return Run.open(folder / "run"), table


def test_every_kind_of_loss_is_counted_on_a_phantom_set(run_of_losses):
    """From 2 readers' rows to the test: each number is counted anew from the table itself."""
    run, table = run_of_losses
    flow = parse_flow(run.read_table("flow"))

    require_adding_up(flow)
    numbers = {
        row["what"]: tuple(None if pd.isna(row[name]) else row[name] for name in NUMBERS)
        for row in flow.to_dict("records")
    }
    single = table.drop_duplicates("image")

    def count(rows: pd.DataFrame) -> tuple[int, int, int]:
        return len(rows), rows["study"].nunique(), rows["patient"].nunique()

    def lose(rows: pd.DataFrame, lost: pd.Series) -> tuple[pd.DataFrame, tuple[int, ...]]:
        left = rows[~lost]
        return left, tuple(a - b for a, b in zip(count(rows), count(left), strict=True))

    assert numbers["rows of the table"] == (len(table), *count(single)[1:])
    assert numbers["more rows of the same image"] == (2, 0, 0)
    left, unknown = lose(single, single["Cardiomegaly"] == "-1")
    policy = "no label but those that are left out (uncertain: ignore; blank: ignore)"
    assert numbers[policy] == unknown
    assert unknown[0] == 3
    left, blank = lose(left, left["Cardiomegaly"] == "")
    assert numbers["no label"] == blank
    train = single.index[single["split"] == "train"]
    for row, reason in ((14, "the file does not exist"), (17, "the file is truncated")):
        left, lost = lose(left, left.index == train[row])
        [what] = [name for name in numbers if name.startswith(reason)]
        assert numbers[what] == lost
        assert lost[0] == 1
    assert numbers["images to train and test on"] == count(left)
    assert numbers["train, in 2 folds"] == count(left[left["split"] != "test"])
    assert numbers["train images that are val in the given split"] == count(
        left[left["split"] == "val"]
    )
    assert numbers["test"] == count(left[left["split"] == "test"])
    assert numbers["images with the same file as another"][0] == 2
    assert numbers["test images with the same file as a train image"][0] == 1


def test_the_flow_is_printed_in_lines_that_a_person_reads(run_of_losses):
    run, _ = run_of_losses
    table = parse_flow(run.read_table("flow"))
    lines = format_flow(table)
    assert lines[0] == "Flow, images / studies / patients:"
    assert len(lines) == 1 + len(table)
    assert any(line.endswith("- the file does not exist") for line in lines)
    assert not any(re.search(r"\d\.0", line) for line in lines), "no number is a fraction"
    lost = next(row for row in to_records(table) if row["what"] == "the file does not exist")
    assert count_line(lost).startswith("1 image")


def test_a_flow_without_a_data_set_begins_with_the_store():
    images = pd.DataFrame({"image_id": ["a", "b"], "study_uid": ["1", "1"]})
    cohort = Cohort(images, np.zeros((2, 0), np.float32), (), reading=Reading("old"))
    flow = Flow.begin(cohort, {}, cohort.reading)
    table = flow.divide(np.array([True, False]), 1, None).to_table()
    assert table["what"].tolist()[0] == "images of the store"
    assert table["patients"].isna().all()
    assert format_flow(table)[-1].strip().startswith("images with the same file cannot be told")
