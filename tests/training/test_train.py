"""Store to run folder: what a run says follows from its own files, and test is never touched."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as reference
from sklearn.model_selection import train_test_split

from cxr_cache.common.machine import describe_machine
from cxr_cache.config import TrainConfig
from cxr_cache.errors import (
    ConfigError,
    EncoderError,
    RunError,
    StoreFormatError,
    StoreIncompleteError,
    TableError,
    TrainingError,
)
from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.models.heads import HeadBank
from cxr_cache.models.run import Run
from cxr_cache.report.report import write_report
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import LabelledRows, load_training_data, prepare_embeddings
from cxr_cache.training import search as search_module
from cxr_cache.training.train import fit_run
from tests.synthetic import (
    FINDINGS,
    IMPORTED,
    QUICK,
    WIDTH,
    make_cohort,
    make_embeddings,
    make_store,
)

TABLES = (
    "splits",
    "targets",
    "epoch_search",
    "history",
    "predictions",
    "out_of_fold",
    "logistic",
    "per_finding",
)
QUICKER = replace(QUICK, epochs=(1, 2), n_folds=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    cohort = make_cohort(unlabelled=0.1)
    return make_store(tmp_path_factory.mktemp("store") / "tiny.h5", cohort)


@pytest.fixture(scope="module")
def run(store) -> Run:
    return fit_run(store, store.parent / "run", QUICK).run


def read(run: Run, table: str) -> pd.DataFrame:
    """A table as anybody would read it, without the package."""
    ids = {"image_id": str, "study_uid": str, "fold": str}
    return pd.read_csv(run.path / f"{table}.csv", dtype=ids, keep_default_na=False, na_values=[""])


def read_bytes(run: Run, *names: str) -> dict[str, bytes]:
    """Files of the run; of the history all but the time it took."""
    contents = {name: (run.path / name).read_bytes() for name in names if name != "history.csv"}
    if "history.csv" in names:
        contents["history.csv"] = read(run, "history").drop(columns="seconds").to_csv().encode()
    return contents


def trained_files(*except_for: str) -> set[str]:
    """What training leaves, before evaluation."""
    tables = {f"{name}.csv" for name in TABLES if name != "per_finding"}
    return (
        tables
        | {
            "config.json",
            "model.safetensors",
            "fold_heads.safetensors",
            "flow.csv",
            "training_distribution.safetensors",
        }
    ) - set(except_for)


def score(targets: pd.Series, probabilities: pd.Series) -> float:
    """scikit-learn's AUROC on the labelled rows; NaN where one class is missing."""
    labelled = targets.notna()
    if targets[labelled].nunique() < 2:
        return np.nan
    return float(reference.roc_auc_score(targets[labelled], probabilities[labelled]))


# --- The folder -----------------------------------------------------------------------------------


def test_training_leaves_the_files_of_the_design_and_no_others(run, store):
    assert {path.name for path in run.path.iterdir()} >= trained_files()
    splits, predictions = read(run, "splits"), read(run, "predictions")

    assert splits.columns.tolist() == ["image_id", "study_uid", "split", "fold"]
    assert read(run, "targets").columns.tolist() == ["image_id", *FINDINGS]
    folds = [f"fold_{k}" for k in (1, 2, 3)]
    assert read(run, "epoch_search").columns.tolist() == [
        *("epochs", "mean_auroc", "std_auroc"),
        *folds,
    ]
    history = ["fold", "epoch", "lr", "train_loss", "val_loss", "val_auroc", "seconds"]
    assert read(run, "history").columns.tolist() == history
    described = ["image_id", "study_uid", "patient_id", "projection", "split", *FINDINGS]
    assert predictions.columns.tolist() == read(run, "out_of_fold").columns.tolist() == described
    assert set(predictions["image_id"]) == set(splits["image_id"])
    is_train = splits["split"] == "train"
    assert set(read(run, "out_of_fold")["image_id"]) == set(splits["image_id"][is_train])
    assert set(splits["fold"][is_train]) == {"1", "2", "3"}
    assert splits["fold"][~is_train].isna().all()


def test_a_whole_run_is_evaluated_and_reported(store, tmp_path):
    """Every file of the folder, and nothing temporary beside them."""
    run = fit_run(store, tmp_path / "run", QUICKER).run
    score_run(run, n_resamples=10)
    write_report(run)

    names = {path.name for path in run.path.iterdir()}

    assert names == trained_files() | {
        *("metrics.json", "per_finding.csv", "per_finding_by_study.csv", "subgroups.csv"),
        *(
            "group_differences.csv",
            "curves.csv",
            "decision_curves.csv",
            "calibration.csv",
            "label_counts.csv",
            "test_reads.json",
            "report.html",
            "model_card.md",
            "plots",
        ),
    }


def test_config_json_says_what_was_done(run, store):
    config = json.loads((run.path / "config.json").read_text())

    assert config["status"] == "finished"
    assert config["kind"] == "train"
    assert TrainConfig(**config["train"]) == QUICK
    assert config["findings"] == list(FINDINGS)
    assert config["seed"] == QUICK.seed
    assert config["store"]["path"] == str(store)
    assert config["store"]["encoder"] == IMPORTED
    assert config["store"]["cohort"] == {"synthetic": "0"}
    assert config["random_encoder"] is False
    assert config["warnings"] == []
    assert config["versions"].keys() >= {"python", "cxr-cache", "torch", "numpy", "scikit-learn"}
    assert config["machine"] == describe_machine(torch.device("cpu"))
    search = read(run, "epoch_search").set_index("epochs")
    assert config["chosen_epochs"] == search["mean_auroc"].idxmax()


def test_the_result_says_what_was_found(store, tmp_path):
    result = fit_run(store, tmp_path / "run", QUICKER)

    text = result.to_text()

    assert "2 held-out folds" in text
    chosen = result.search.set_index("epochs").loc[result.chosen_epochs]
    line = next(line for line in text.splitlines() if "<- chosen" in line)
    assert f"{result.chosen_epochs} epochs" in line
    assert f"{chosen['mean_auroc']:.4f} ± {chosen['std_auroc']:.4f}" in line


# --- Splits ---------------------------------------------------------------------------------------


def assert_whole(groups: pd.Series, splits: pd.DataFrame) -> None:
    for group, images in splits.groupby(groups):
        sides = set(zip(images["split"], images["fold"].fillna("none"), strict=True))
        assert len(sides) == 1, f"{group} is on several sides: {sides}"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_study_is_never_on_two_sides(store, tmp_path, seed):
    """Not of the test, and not of a fold: its two images share their labels."""
    run = fit_run(store, tmp_path / "run", replace(QUICKER, seed=seed)).run
    splits = read(run, "splits")

    assert_whole(splits["study_uid"], splits)
    assert 0.15 < (splits["split"] == "test").mean() < 0.25


def test_patients_stay_whole_where_they_are_known(tmp_path):
    cohort = make_cohort()
    patients = (np.arange(len(cohort)) // 6).astype(str)  # three studies each
    store = make_store(tmp_path / "s.h5", cohort.assign(patient_id=patients))

    splits = read(fit_run(store, tmp_path / "run", QUICKER).run, "splits")

    assert_whole(pd.Series(patients), splits)


def test_split_by_image_is_the_references_and_says_what_it_leaks(store, tmp_path):
    """scikit-learn's own choice of rows, and the count of test images that are not new."""
    config = replace(QUICKER, split_by="image")

    result = fit_run(store, tmp_path / "run", config)

    splits, targets = read(result.run, "splits"), read(result.run, "targets")[list(FINDINGS)]
    present = (targets == 1).to_numpy()
    first = np.where(present.any(axis=1), np.array(FINDINGS)[present.argmax(axis=1)], "")
    _, rows = train_test_split(
        np.arange(len(first)), test_size=0.2, random_state=42, stratify=first
    )
    is_test = (splits["split"] == "test").to_numpy()
    np.testing.assert_array_equal(np.flatnonzero(is_test), np.sort(rows))
    n_shared = splits["study_uid"][is_test].isin(splits["study_uid"][~is_test]).sum()
    assert n_shared > 0
    (note,) = result.notes
    assert f"{n_shared} of {is_test.sum()} test images" in note
    assert "Use --split-by study" in note
    assert json.loads((result.run.path / "config.json").read_text())["warnings"] == [note]


# --- Every number follows from the files ----------------------------------------------------------


def test_fold_scores_are_those_of_the_out_of_fold_predictions(run):
    """Fold k of splits.csv is fold_k of the search: scikit-learn finds its AUROC in the tables."""
    splits, out_of_fold = read(run, "splits"), read(run, "out_of_fold")
    targets = read(run, "targets").set_index("image_id").loc[out_of_fold["image_id"]]
    search = read(run, "epoch_search").set_index("epochs").loc[run.config["chosen_epochs"]]
    fold = splits.set_index("image_id")["fold"].loc[out_of_fold["image_id"]].to_numpy()

    for k in ("1", "2", "3"):
        rows = fold == k
        scores = [
            score(targets[finding].reset_index(drop=True)[rows], out_of_fold[finding][rows])
            for finding in FINDINGS
        ]
        assert search[f"fold_{k}"] == pytest.approx(np.nanmean(scores), rel=1e-8)


def test_history_has_every_epoch_of_every_fold_and_of_the_final_model(run):
    history, chosen = read(run, "history"), run.config["chosen_epochs"]

    lengths = history.groupby("fold")["epoch"].agg(list).to_dict()

    longest = list(range(1, 7))
    assert lengths == {"1": longest, "2": longest, "3": longest, "final": longest[:chosen]}
    final = history[history["fold"] == "final"]
    assert final[["val_loss", "val_auroc"]].isna().all(axis=None), "the refit holds nothing out"
    assert history[["lr", "train_loss"]].notna().all(axis=None)
    search = read(run, "epoch_search").set_index("epochs")
    for k in ("1", "2", "3"):
        scored = history[history["fold"] == k].set_index("epoch")["val_auroc"]
        np.testing.assert_array_equal(scored.loc[search.index], search[f"fold_{k}"])


def test_history_tells_the_horizons_of_a_schedule_that_has_them_apart(store, tmp_path):
    run = fit_run(store, tmp_path / "run", replace(QUICKER, schedule="cosine")).run

    history = read(run, "history")

    lengths = history.groupby(["fold", "horizon"])["epoch"].max().to_dict()
    chosen = run.config["chosen_epochs"]
    assert lengths == {
        **{(fold, horizon): horizon for fold in ("1", "2") for horizon in (1, 2)},
        ("final", chosen): chosen,
    }


def f1_at_every_cut(targets: pd.Series, probabilities: pd.Series) -> pd.Series:
    """F1 by threshold, for every probability that occurs."""
    labelled = targets.notna().to_numpy()
    t, p = targets.to_numpy()[labelled], probabilities.to_numpy()[labelled]
    cuts = np.unique(p)
    called = p >= cuts[:, None]
    return pd.Series(2 * (called & (t == 1)).sum(axis=1) / (called.sum(axis=1) + t.sum()), cuts)


def test_thresholds_come_from_out_of_fold_predictions_alone(run):
    """No other cut gives a better F1 there; on test, for some findings, another would."""
    out_of_fold = read(run, "out_of_fold")
    on_test = read(run, "predictions").query("split == 'test'")
    targets = read(run, "targets").set_index("image_id")
    is_better_on_test = []
    for finding in FINDINGS:
        f1 = f1_at_every_cut(targets[finding].loc[out_of_fold["image_id"]], out_of_fold[finding])
        chosen = f1.index[f1.index >= run.thresholds[finding]].min()
        assert f1[chosen] == f1.max(), finding
        f1 = f1_at_every_cut(targets[finding].loc[on_test["image_id"]], on_test[finding])
        chosen = f1.index[f1.index >= run.thresholds[finding]].min()
        is_better_on_test.append(f1.max() > f1.get(chosen, 0.0))
    assert any(is_better_on_test)


@pytest.mark.parametrize("final", ["refit", "ensemble", "best-fold"])
def test_predictions_are_those_of_the_stored_model(store, tmp_path, final):
    """Recomputed from model.safetensors by plain nn.Sequentials, averaged over the members."""
    run = fit_run(store, tmp_path / "run", replace(QUICK, final=final)).run
    model = run.load_model()
    bank = HeadBank.from_snapshot(model.tensors)
    with FeatureStore.open(store) as features:
        x = torch.from_numpy(np.array(features.embeddings[:, 0]))
    x = torch.nn.functional.normalize(x, dim=-1)

    with torch.no_grad():
        members = torch.stack([bank.as_sequential(h)(x).sigmoid() for h in range(bank.n_heads)])

    assert bank.n_heads == (3 if final == "ensemble" else 1)
    predictions = read(run, "predictions")[list(FINDINGS)].to_numpy()
    np.testing.assert_allclose(predictions, members.mean(dim=0), atol=1e-6)
    splits, out_of_fold = read(run, "splits"), read(run, "out_of_fold").set_index("image_id")
    search = read(run, "epoch_search").set_index("epochs").loc[run.config["chosen_epochs"]]
    best = int(np.argmax([search[f"fold_{k}"] for k in (1, 2, 3)])) + 1
    seen_by = {"ensemble": [1, 2, 3], "best-fold": [best], "refit": []}[final]
    for member, k in zip(members, seen_by, strict=False):  # a refit has a member and no fold
        rows = (splits["fold"] == str(k)).to_numpy()
        expected = out_of_fold.loc[splits["image_id"][rows], list(FINDINGS)]
        np.testing.assert_allclose(member.numpy()[rows], expected, atol=1e-6)
    n_final = (read(run, "history")["fold"] == "final").sum()
    assert n_final == (run.config["chosen_epochs"] if final == "refit" else 0)


def test_metrics_equal_scikit_learn_on_the_tables(run):
    """The figures of the test split, from predictions.csv, targets.csv and the thresholds."""
    score_run(run, n_resamples=10)
    metrics = json.loads((run.path / "metrics.json").read_text())
    predictions = read(run, "predictions").set_index("image_id")
    targets = read(run, "targets").set_index("image_id")

    fold_of = read(run, "splits").set_index("image_id")["fold"]
    for split in ("test", "train", "out_of_fold"):
        p = read(run, split).set_index("image_id") if split == "out_of_fold" else predictions
        p = p[p["split"] == ("test" if split == "test" else "train")]
        aurocs, precisions, f1s, n_right, n_absent, n_labelled = [], [], [], 0, 0, 0
        for finding in FINDINGS:
            t = targets[finding].loc[p.index]
            labelled = t.notna()
            t, q = t[labelled], p[finding][labelled]
            called = q >= run.thresholds[finding]
            folds = fold_of.loc[t.index] if split == "out_of_fold" else t * 0  # one model, one rank
            parts = [(t[folds == k], q[folds == k]) for k in np.unique(folds)]
            parts = [(of, scores) for of, scores in parts if 0 < of.sum() < len(of)]
            n_present = np.array([of.sum() for of, _ in parts])
            n_pairs = n_present * [(of == 0).sum() for of, _ in parts]
            areas = [reference.roc_auc_score(*part) for part in parts]
            aurocs.append(np.average(areas, weights=n_pairs))
            of_parts = [reference.average_precision_score(*part) for part in parts]
            precisions.append(np.average(of_parts, weights=n_present))
            f1s.append(reference.f1_score(t, called))
            n_right += (called == t).sum()
            n_absent += (t == 0).sum()
            n_labelled += len(t)
        expected = {
            "macro_auroc": np.mean(aurocs),
            "macro_ap": np.mean(precisions),
            "macro_f1": np.mean(f1s),
            "label_accuracy": n_right / n_labelled,
            "label_accuracy_all_negative": n_absent / n_labelled,
        }
        found = {name: metrics[split][name]["value"] for name in expected}
        assert found == pytest.approx(expected, rel=1e-6), split
    assert metrics["n_findings_scored"] == len(FINDINGS)


# --- Test is not touched --------------------------------------------------------------------------


def test_the_test_rows_influence_nothing_but_their_own_predictions(tmp_path, monkeypatch):
    """With other targets and other embeddings for them, every other byte of the run is the same.

    Only the split looks at all targets, to balance them; it is held fixed here.
    """
    cohort = make_cohort(unlabelled=0.1)
    embeddings = make_embeddings(cohort)
    run = fit_run(make_store(tmp_path / "a.h5", cohort), tmp_path / "a", QUICK).run
    is_test = (read(run, "splits")["split"] == "test").to_numpy()
    split = search_module.make_split(
        cohort.targets, cohort.groups, cohort.findings, n_folds=3, seed=QUICK.seed
    )
    np.testing.assert_array_equal(split.is_test, is_test)
    monkeypatch.setattr(search_module, "make_split", lambda *_, **__: split)
    targets, changed = cohort.targets.copy(), embeddings.copy()
    targets[is_test] = 1 - targets[is_test]
    changed[is_test] += 1

    other = replace(cohort, targets=targets)
    labels_only = make_store(tmp_path / "b.h5", other, embeddings=embeddings)
    images_too = make_store(tmp_path / "c.h5", other, embeddings=changed)
    second = fit_run(labels_only, tmp_path / "b", QUICK).run
    third = fit_run(images_too, tmp_path / "c", QUICK).run

    same = trained_files("config.json", "targets.csv")
    assert read_bytes(second, *same) == read_bytes(run, *same)
    same = same - {"predictions.csv", "logistic.csv"}
    assert read_bytes(third, *same) == read_bytes(run, *same)
    for name in ("predictions", "logistic"):
        ours, theirs = read(run, name), read(third, name)
        of_test = (ours["split"] == "test").to_numpy()
        assert of_test.sum() == is_test.sum()
        pd.testing.assert_frame_equal(ours[~of_test], theirs[~of_test])
        assert (ours[of_test][list(FINDINGS)] != theirs[of_test][list(FINDINGS)]).any(axis=None)
    assert not read(run, "targets")[is_test].equals(read(second, "targets")[is_test])


# --- Again ----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(run, store, tmp_path):
    again = fit_run(store, tmp_path / "again", QUICK).run
    other = fit_run(store, tmp_path / "other", replace(QUICK, seed=1)).run

    files = trained_files("config.json")
    assert read_bytes(again, *files) == read_bytes(run, *files)
    for name, content in read_bytes(other, *files - {"targets.csv", "flow.csv"}).items():
        assert content != read_bytes(run, name)[name], name


def test_a_finished_run_is_not_overwritten_unasked(store, tmp_path):
    run = fit_run(store, tmp_path / "run", QUICKER).run
    before = read_bytes(run, *trained_files())

    with pytest.raises(RunError, match=r"holds a finished run.*--overwrite"):
        fit_run(store, run.path, replace(QUICKER, seed=1))

    assert read_bytes(run, *trained_files()) == before
    replaced = fit_run(store, run.path, replace(QUICKER, seed=1), overwrite=True).run
    assert read_bytes(replaced, "model.safetensors") != {
        "model.safetensors": before["model.safetensors"]
    }


def test_what_can_fail_early_leaves_the_old_run_alone(store, tmp_path):
    """--overwrite replaces a run by a better one, not by an error message."""
    run = fit_run(store, tmp_path / "run", QUICKER).run
    before = read_bytes(run, *trained_files())

    for change, error in [
        ({"batch_size": 1000}, ConfigError),
        ({"n_folds": 59}, ConfigError),
        ({"device": "cuda:99"}, EncoderError),
    ]:
        with pytest.raises(error):
            fit_run(store, run.path, replace(QUICKER, **change), overwrite=True)
        assert read_bytes(run, *trained_files()) == before


def test_an_interrupted_training_is_no_run_and_can_be_repeated(store, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_run(store, tmp_path / "run", QUICKER, on_progress=interrupt)

    with pytest.raises(RunError, match="is not finished"):
        Run.open(tmp_path / "run")
    fit_run(store, tmp_path / "run", QUICKER)
    assert Run.open(tmp_path / "run").config["chosen_epochs"] in (1, 2)


# --- Which rows -----------------------------------------------------------------------------------


def make_partial_store(
    path: Path, *, n_pending: int, n_failed: int, encoder: dict[str, Any] | None = None
) -> Path:
    """The last rows pending, those before failed."""
    cohort = make_cohort()
    n_done = len(cohort) - n_pending - n_failed
    shapes = {"embeddings": (1, WIDTH)}
    encoder = encoder or IMPORTED
    with FeatureStore.create(path, cohort, encoder=encoder, features=shapes) as store:
        rows = np.arange(n_done)
        values = {"embeddings": make_embeddings(cohort)[:n_done]}
        if n_done:
            store.commit(rows, values, np.zeros((n_done, 32), np.uint8))
        if n_failed:
            store.record_failures(np.arange(n_done, n_done + n_failed), ["broken"] * n_failed)
    return path


def test_a_store_with_pending_rows_is_refused_unless_allowed(tmp_path):
    store = make_partial_store(tmp_path / "s.h5", n_pending=4, n_failed=0)

    with pytest.raises(StoreIncompleteError, match=r"4 of 120 rows are pending.*--allow-pending"):
        fit_run(store, tmp_path / "run", QUICKER)

    assert not (tmp_path / "run").exists()
    result = fit_run(store, tmp_path / "run", QUICKER, allow_pending=True)
    assert result.notes == ("4 of 120 images were still pending and are left out.",)
    assert len(read(result.run, "predictions")) == 116


def test_what_to_know_of_the_encoder_is_a_warning_of_every_run(tmp_path):
    note = "Pixels were normalised by ImageNet's mean."
    encoder = IMPORTED | {"notes": [note]}
    store = make_partial_store(tmp_path / "s.h5", n_pending=0, n_failed=0, encoder=encoder)

    result = fit_run(store, tmp_path / "run", QUICKER)
    score_run(result.run, n_resamples=10)
    write_report(result.run)

    assert result.notes == (note,)
    files = ("report.html", "model_card.md")
    page, card = ((tmp_path / "run" / name).read_text() for name in files)
    assert note.replace("'", "&#39;") in page
    assert f"* {note}" in card


def test_failed_rows_are_left_out_and_counted(tmp_path):
    store = make_partial_store(tmp_path / "s.h5", n_pending=0, n_failed=6)

    result = fit_run(store, tmp_path / "run", QUICKER)

    assert result.notes == ("6 of 120 images failed in extraction and are left out.",)
    assert "Note: 6 of 120" in result.to_text()
    assert len(read(result.run, "splits")) == 114


@pytest.mark.parametrize(("n_pending", "n_failed"), [(120, 0), (0, 120)])
def test_a_store_without_a_finished_row_is_refused(tmp_path, n_pending, n_failed):
    store = make_partial_store(tmp_path / "s.h5", n_pending=n_pending, n_failed=n_failed)

    with pytest.raises(
        StoreIncompleteError,
        match=f"no finished row: {n_pending} are pending and {n_failed} failed",
    ):
        fit_run(store, tmp_path / "run", QUICKER, allow_pending=True)


@pytest.mark.parametrize(
    ("imported", "remedy"),
    [(True, "`cxr-cache import --overwrite`"), (False, "`cxr-cache extract`")],
)
def test_a_damaged_row_is_named_and_not_trained_on(tmp_path, imported, remedy):
    cohort = make_cohort()
    encoder = {**IMPORTED, "imported": imported}
    store = make_store(tmp_path / "s.h5", cohort, encoder=encoder)
    with h5py.File(store, "r") as file:
        place = file["embeddings"].id.get_offset() + 17 * WIDTH * 4 + 5
    content = bytearray(store.read_bytes())
    content[place] ^= 1
    store.write_bytes(content)

    with pytest.raises(StoreFormatError, match=f"1 damaged row .*'00017.png'.*{remedy}"):
        fit_run(store, tmp_path / "run", QUICKER)


def test_unlabelled_images_are_left_out_and_unlabelled_cells_are_not_scored(tmp_path):
    """A row without any label teaches nothing; one with some counts for those."""
    cohort = make_cohort(unlabelled=0.3)
    targets = cohort.targets.copy()
    targets[10:17] = np.nan
    n_unlabelled = int(np.isnan(targets).all(axis=1).sum())
    store = make_store(tmp_path / "s.h5", replace(cohort, targets=targets))

    result = fit_run(store, tmp_path / "run", QUICKER)

    assert result.notes == (f"{n_unlabelled} of 120 images have no label and are left out.",)
    kept = read(result.run, "targets").set_index("image_id")
    assert len(kept) == 120 - n_unlabelled
    expected = pd.DataFrame(targets, cohort.image_ids, list(FINDINGS)).loc[kept.index]
    np.testing.assert_array_equal(kept, expected)
    assert read(result.run, "predictions")[list(FINDINGS)].notna().all(axis=None)


def test_a_store_without_labels_asks_for_them(tmp_path):
    cohort = make_cohort()
    store = make_store(
        tmp_path / "s.h5", replace(cohort, targets=np.full_like(cohort.targets, np.nan))
    )

    with pytest.raises(TrainingError, match=r"None of the 120 .* has a label\. .*--labels"):
        fit_run(store, tmp_path / "run", QUICKER)


def test_labels_of_the_users_own_replace_the_stores(store, tmp_path):
    """Other findings, other targets, and only the images that the file names."""
    cohort = make_cohort()
    labels = pd.DataFrame(
        {
            "image_id": cohort.image_ids[:100],
            "Tall": cohort.targets[:100, 0].astype(int),
            "Wide": 1 - cohort.targets[:100, 1].astype(int),
        }
    )
    labels.to_csv(tmp_path / "labels.csv", index=False)

    result = fit_run(store, tmp_path / "run", QUICKER, labels=tmp_path / "labels.csv")

    assert result.run.config["findings"] == ["Tall", "Wide"]
    assert result.run.config["labels"] == {
        "path": str(tmp_path / "labels.csv"),
        "sha256": hashlib.sha256((tmp_path / "labels.csv").read_bytes()).hexdigest(),
    }
    assert result.notes == ("20 of 120 images have no label and are left out.",)
    pd.testing.assert_frame_equal(
        read(result.run, "targets").astype({"Tall": int, "Wide": int}), labels, check_dtype=False
    )
    assert list(result.run.thresholds) == ["Tall", "Wide"]


def test_labels_of_other_images_are_refused(store, tmp_path):
    pd.DataFrame({"image_id": ["elsewhere.png"], "Tall": [1]}).to_csv(
        tmp_path / "labels.csv", index=False
    )

    with pytest.raises(TableError, match=r"labels\.csv"):
        fit_run(store, tmp_path / "run", QUICKER, labels=tmp_path / "labels.csv")


def test_every_view_is_trained_on_and_the_first_is_predicted(tmp_path):
    cohort = make_cohort()
    embeddings = make_embeddings(cohort, n_views=2)
    store = make_store(tmp_path / "s.h5", cohort, embeddings=embeddings)
    mirrored = make_store(tmp_path / "m.h5", cohort, embeddings=embeddings[:, ::-1])
    single = make_store(tmp_path / "v.h5", cohort, embeddings=embeddings[:, :1])

    with FeatureStore.open(store) as features:
        data = load_training_data(features, QUICKER)
    lengths = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    np.testing.assert_allclose(data.embeddings, (embeddings / lengths).swapaxes(0, 1), rtol=1e-6)
    runs = [fit_run(path, tmp_path / path.stem, QUICKER).run for path in (store, mirrored, single)]
    weights = [run.load_model().tensors["weight_0"] for run in runs]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    bank = HeadBank.from_snapshot(runs[0].load_model().tensors)
    with torch.no_grad():
        expected = bank(torch.from_numpy(data.embeddings[0])).sigmoid()[0]
    np.testing.assert_allclose(read(runs[0], "predictions")[list(FINDINGS)], expected, atol=1e-6)


def test_embeddings_are_not_normalised_where_that_is_asked_for(store, tmp_path):
    config = replace(QUICKER, input_norm="none")

    with FeatureStore.open(store) as features:
        data = load_training_data(features, config)
        np.testing.assert_array_equal(data.embeddings[0], features.embeddings[:, 0])
    run = fit_run(store, tmp_path / "run", config).run

    assert run.load_model().head == {
        "input_norm": "none",
        "features": "projected",
        "level": "image",
        "hidden": list(config.hidden),
        "dropout": config.dropout,
        "norm": config.norm,
    }
    assert asdict(config)["input_norm"] == run.config["train"]["input_norm"]


@pytest.mark.parametrize("n_views", [1, 2])
def test_embeddings_are_in_memory_once(tmp_path, monkeypatch, n_views):
    """Read and normalised part by part: the same numbers, and no second copy of them."""
    cohort = make_cohort(n_studies=2000)
    path = make_store(tmp_path / "s.h5", cohort, n_views=n_views)
    monkeypatch.setattr("cxr_cache.store.rows._ROWS_AT_ONCE", 300)
    rows = np.arange(10, len(cohort))
    found = LabelledRows(rows, cohort.take(rows), ())  # what this takes is another matter
    monkeypatch.setattr("cxr_cache.store.rows.find_labelled_rows", lambda *_, **__: found)
    with FeatureStore.open(path) as store:
        tracemalloc.start()
        data = load_training_data(store, TrainConfig())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        whole = np.array(store.embeddings[10:].swapaxes(0, 1))

    np.testing.assert_array_equal(data.embeddings, prepare_embeddings(whole, "l2"))
    assert peak < 1.6 * data.embeddings.nbytes
