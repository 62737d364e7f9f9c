"""The figures of a run are those that scikit-learn finds in its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as reference

from cxr_cache.errors import TableError
from cxr_cache.evaluate import (
    evaluate_predictions,
    evaluate_run,
    format_summary,
    parse_predictions,
)
from cxr_cache.metrics import NEVER, choose_thresholds
from cxr_cache.run import Run, SavedModel

FINDINGS = ("Cardiomegaly", "Pleural Effusion", "Nodule", "Hernia", "Mass", "Bronchiolitis")
PREVALENCE = np.array([0.35, 0.3, 0.2, 0.2, 0.2, 0.0])
N_STUDIES, N_FOLDS = 120, 3


def make_tables(seed: int) -> dict[str, pd.DataFrame]:
    """Two images per study, a fifth of the studies for the test; Bronchiolitis never occurs."""
    rng = np.random.default_rng(seed)
    study = np.repeat(np.arange(N_STUDIES), 2)
    present = (rng.random((N_STUDIES, len(FINDINGS))) < PREVALENCE)[study]
    targets = np.where(rng.random(present.shape) < 0.05, np.nan, present)
    images = pd.DataFrame(
        {
            "image_id": [f"{row:04d}.png" for row in range(len(study))],
            "study_uid": study.astype(str),
            "projection": np.where(np.arange(len(study)) % 2, "Lateral", "Frontal"),
            "split": np.where(study % 5 == 0, "test", "train"),
        }
    )
    is_train = (images["split"] == "train").to_numpy()
    fold = pd.array(study % N_FOLDS, dtype="Int64")
    fold[~is_train] = pd.NA
    epochs = [2, 4]
    aurocs = 0.6 + 0.1 * rng.random((len(epochs), N_FOLDS))

    def score() -> pd.DataFrame:
        noise = rng.random(present.shape)
        return pd.DataFrame((0.7 * noise + 0.3 * present).round(4), columns=FINDINGS)

    return {
        "splits": images[["image_id", "study_uid", "split"]].assign(fold=fold),
        "targets": images[["image_id"]].join(pd.DataFrame(targets, columns=FINDINGS)),
        "predictions": images.join(score()),
        "out_of_fold": images.join(score())[is_train],
        "epoch_search": pd.DataFrame(
            {"epochs": epochs, "mean_auroc": aurocs.mean(axis=1), "std_auroc": aurocs.std(axis=1)}
        ).join(pd.DataFrame(aurocs, columns=[f"fold_{k + 1}" for k in range(N_FOLDS)])),
        "history": pd.DataFrame(
            [
                {
                    "fold": fold,
                    "epoch": epoch,
                    "lr": 2e-5,
                    "train_loss": 0.05 / epoch,
                    "val_loss": np.nan if fold == "final" else 0.06 / epoch,
                    "val_auroc": np.nan if fold == "final" else 0.5 + 0.05 * epoch,
                    "seconds": 0.1,
                }
                for fold in ("1", "2", "3", "final")
                for epoch in range(1, 5)
            ]
        ),
    }


def make_run(path: Path, seed: int = 0, **config: Any) -> Run:
    """A finished run folder with every table that training leaves."""
    tables = make_tables(seed)
    run = Run.create(
        path,
        {
            "kind": "train",
            "findings": list(FINDINGS),
            "seed": seed,
            "store": {"path": "features.h5", "encoder": {"name": "tiny", "weights_sha256": "3f9c"}},
            "random_encoder": False,
            "warnings": [],
            "chosen_epochs": 4,
            "train": {"epochs": [2, 4], "n_folds": N_FOLDS, "split_by": "study"},
            **config,
        },
    )
    for name, table in tables.items():
        run.write_table(name, table)  # type: ignore[arg-type]
    out_of_fold = parse_predictions(tables["out_of_fold"], tables["targets"], FINDINGS)
    thresholds = choose_thresholds(out_of_fold.targets, out_of_fold.probabilities)
    run.save_model(
        SavedModel(
            tensors={"weight": torch.zeros(1)},
            findings=FINDINGS,
            thresholds=dict(zip(FINDINGS, thresholds.tolist(), strict=True)),
            encoder={},
            head={},
        )
    )
    run.finish()
    return run


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path / "run")


def read_test_split(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Probabilities and targets of the test images, straight from the files."""
    predictions = pd.read_csv(run.path / "predictions.csv").query("split == 'test'")
    targets = pd.read_csv(run.path / "targets.csv").set_index("image_id")
    return predictions.set_index("image_id"), targets.loc[predictions["image_id"]]


def test_metrics_equal_scikit_learn_on_the_files(run):
    """Computed here anew, finding by finding, from predictions.csv and targets.csv."""
    evaluate_run(run, n_resamples=20)

    probabilities, targets = read_test_split(run)
    rows = []
    for finding in FINDINGS[:-1]:
        labelled = targets[finding].notna()
        t, p = targets[finding][labelled], probabilities[finding][labelled]
        d = p >= run.thresholds[finding]
        rows.append(
            {
                "auroc": reference.roc_auc_score(t, p),
                "ap": reference.average_precision_score(t, p),
                "f1": reference.f1_score(t, d, zero_division=0),
                "balanced_accuracy": reference.balanced_accuracy_score(t, d),
                "brier": reference.brier_score_loss(t, p),
                "log_loss": reference.log_loss(t, p),
                "sensitivity": reference.recall_score(t, d),
                "specificity": reference.recall_score(1 - t, ~d),
                "n_test": labelled.sum(),
                "n_positive_test": t.sum(),
                "prevalence_test": t.mean(),
                "tp": (d & (t == 1)).sum(),
                "tn": (~d & (t == 0)).sum(),
            }
        )
    expected = pd.DataFrame(rows)
    stored = pd.read_csv(run.path / "per_finding.csv").iloc[:-1]
    pd.testing.assert_frame_equal(
        stored[expected.columns], expected, check_dtype=False, rtol=1e-7, atol=1e-9
    )

    test = json.loads((run.path / "metrics.json").read_text())["test"]
    assert test["macro_auroc"]["value"] == pytest.approx(expected["auroc"].mean())
    assert test["macro_ap"]["value"] == pytest.approx(expected["ap"].mean())
    assert test["macro_f1"]["value"] == pytest.approx(expected["f1"].mean())
    cells = targets.notna().to_numpy()
    decisions = (probabilities[list(FINDINGS)] >= pd.Series(run.thresholds)).to_numpy()
    truth = targets.to_numpy()
    assert test["label_accuracy"]["value"] == pytest.approx((decisions == truth)[cells].mean())
    assert test["label_accuracy_all_negative"]["value"] == pytest.approx((truth[cells] == 0).mean())


def test_every_test_figure_has_an_interval_around_it(run):
    metrics = evaluate_run(run, n_resamples=200)

    for name, entry in metrics["test"].items():
        if name != "macro_calibration_error":  # resampling biases it upwards
            assert entry["low"] <= entry["value"] <= entry["high"], name
    assert metrics["bootstrap"] == {"n_resamples": 200, "seed": 0, "level": 0.95, "unit": "study"}
    assert metrics["train"]["macro_auroc"].keys() == {"value"}
    assert metrics["out_of_fold"]["macro_auroc"].keys() == {"value"}
    assert metrics == run.read_metrics()


def test_undefined_findings_are_left_out_counted_and_named(run):
    metrics = evaluate_run(run, n_resamples=20)

    assert metrics["n_findings"] == 6
    assert metrics["n_findings_scored"] == 5
    assert metrics["findings_undefined"] == ["Bronchiolitis"]
    assert metrics["findings_never_called"] == ["Bronchiolitis"]
    assert run.thresholds["Bronchiolitis"] == NEVER
    last = run.read_table("per_finding").iloc[-1]
    assert last[["auroc", "auroc_low", "ap", "f1", "sensitivity"]].isna().all()
    assert last["n_undefined_resamples"] == 20
    assert last["specificity"] == 1


def test_class_counts_span_train_and_test(run):
    evaluate_run(run, n_resamples=0)

    targets = pd.read_csv(run.path / "targets.csv")
    studies = pd.read_csv(run.path / "splits.csv")["study_uid"]
    table = run.read_table("per_finding").set_index("finding")
    for finding in FINDINGS:
        positives = targets[finding] == 1
        assert table.loc[finding, "n_images"] == positives.sum()
        assert table.loc[finding, "n_studies"] == studies[positives].nunique()


def test_studies_average_their_images():
    tables = make_tables(0)
    images = parse_predictions(tables["predictions"], tables["targets"], FINDINGS)

    studies = images.by_study()

    by_uid = tables["predictions"].groupby("study_uid", sort=True)
    np.testing.assert_allclose(studies.probabilities, by_uid[list(FINDINGS)].mean())
    targets = tables["targets"].groupby(tables["predictions"]["study_uid"], sort=True)
    np.testing.assert_array_equal(studies.targets, targets[list(FINDINGS)].max())
    assert len(studies) == images.n_studies == N_STUDIES


def test_study_and_projection_figures_equal_scikit_learn(run):
    metrics = evaluate_run(run, n_resamples=20)

    probabilities, targets = read_test_split(run)
    columns = list(FINDINGS)

    def macro(t: pd.DataFrame, p: pd.DataFrame) -> float:
        areas = []
        for finding in columns:
            labelled = t[finding].notna()
            if t[finding][labelled].nunique() == 2:
                areas.append(reference.roc_auc_score(t[finding][labelled], p[finding][labelled]))
        return float(np.mean(areas))

    by_study = probabilities["study_uid"]
    expected = macro(
        targets.groupby(by_study).max(), probabilities.groupby(by_study)[columns].mean()
    )
    assert metrics["test_by_study"]["macro_auroc"]["value"] == pytest.approx(expected)
    for projection in ("Frontal", "Lateral"):
        rows = probabilities["projection"] == projection
        entry = metrics["test_by_projection"][projection]
        assert entry["macro_auroc"]["value"] == pytest.approx(
            macro(targets[rows], probabilities[rows])
        )
        assert entry["n_images"] == rows.sum()


def test_copies_of_an_image_do_not_narrow_the_interval():
    """Ten copies of every image in its study are no more evidence than one."""
    tables = make_tables(0)
    predictions, targets = tables["predictions"], tables["targets"]
    copies = pd.concat([predictions.assign(copy=n) for n in range(10)], ignore_index=True)
    copies["image_id"] += copies["copy"].astype(str)
    copied_targets = targets.loc[targets.index.repeat(10)].copy()
    copied_targets["image_id"] += np.tile(np.arange(10).astype(str), len(targets))
    thresholds = dict.fromkeys(FINDINGS, 0.5)

    once = evaluate_predictions(predictions, targets, thresholds, n_resamples=100)
    tenfold = evaluate_predictions(copies, copied_targets, thresholds, n_resamples=100)

    for name, entry in once.metrics["test"].items():
        assert tenfold.metrics["test"][name] == pytest.approx(entry), name


def test_same_seed_same_intervals(run):
    first, second = (evaluate_run(run, n_resamples=30, seed=1) for _ in range(2))

    assert first == second
    assert evaluate_run(run, n_resamples=30, seed=2)["test"] != first["test"]


def test_wrong_tables_are_named():
    tables = make_tables(0)
    predictions, targets = tables["predictions"], tables["targets"]

    with pytest.raises(TableError, match=r"predictions: no column 'Mass'"):
        parse_predictions(predictions.drop(columns="Mass"), targets, FINDINGS)
    with pytest.raises(TableError, match=r"no row for 1 predicted images, the first is '0007.png'"):
        parse_predictions(predictions, targets.drop(index=7), FINDINGS)
    with pytest.raises(TableError, match=r"image_id '0003.png' has more than one row"):
        parse_predictions(predictions, pd.concat([targets, targets.iloc[[3]]]), FINDINGS)
    predictions.loc[5, "Nodule"] = 1.5
    with pytest.raises(TableError, match=r"0005.png has 1.5 for 'Nodule', which is no probab"):
        parse_predictions(predictions, targets, FINDINGS)
    with pytest.raises(TableError, match="no image to evaluate"):
        evaluate_predictions(tables["predictions"][:0], targets, dict.fromkeys(FINDINGS, 0.5))


def test_summary_sets_accuracy_beside_predicting_nothing(run):
    """95 % accuracy says little where doing nothing earns 94.98 %; so both share a line."""
    metrics = evaluate_run(run, n_resamples=20)

    summary = format_summary(metrics)

    auroc = metrics["test"]["macro_auroc"]
    assert f"{auroc['value']:.3f} [{auroc['low']:.3f}, {auroc['high']:.3f}]" in summary
    (line,) = [line for line in summary.splitlines() if "label accuracy" in line]
    assert f"{metrics['test']['label_accuracy']['value']:.2%}" in line
    assert f"{metrics['test']['label_accuracy_all_negative']['value']:.2%}" in line
    assert "1 not scored" in summary
    assert "Bronchiolitis" in summary
    assert "nan" not in summary.lower()


def test_summary_of_an_evaluation_without_intervals():
    tables = make_tables(0)
    nothing = tables["targets"].assign(**dict.fromkeys(FINDINGS, 0.0))

    evaluation = evaluate_predictions(
        tables["predictions"], nothing, dict.fromkeys(FINDINGS, 0.5), n_resamples=0
    )

    summary = format_summary(evaluation.metrics)
    assert "macro AUROC     undefined" in summary
    assert "[" not in summary
    json.dumps(evaluation.metrics, allow_nan=False)
