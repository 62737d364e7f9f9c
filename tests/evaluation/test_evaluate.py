"""The figures of a run are those that scikit-learn finds in its tables."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors
import torch
from sklearn import metrics as reference

from cxr_cache.errors import ConfigError, RunError, TableError
from cxr_cache.evaluation.evaluate import evaluate_predictions, format_summary, score_run
from cxr_cache.evaluation.figures import estimate
from cxr_cache.evaluation.scored import parse_predictions, read_scored
from cxr_cache.metrics.operating_point import choose_thresholds
from cxr_cache.metrics.scores import NEVER, UNDECIDED, find_best_constant
from cxr_cache.models.run import Run, SavedModel

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


def test_out_of_fold_only_scores_of_one_model_are_ranked(run):
    """A fold whose model gives lower scores to all of its images changes no AUROC and no AP."""
    score_run(run, n_resamples=20)
    table = run.out_of_fold
    fold = run.splits.set_index("image_id")["fold"].loc[table["image_id"]].to_numpy()
    findings = list(FINDINGS)
    targets = run.targets.set_index("image_id").loc[table["image_id"], findings].to_numpy()
    aurocs = []
    for f, finding in enumerate(findings):
        areas, pairs = [], []
        for k in np.unique(fold):
            rows = (fold == k) & ~np.isnan(targets[:, f])
            n_present = int(targets[rows, f].sum())
            if 0 < n_present < rows.sum():
                areas.append(
                    reference.roc_auc_score(targets[rows, f], table[finding].to_numpy()[rows])
                )
                pairs.append(n_present * (rows.sum() - n_present))
        if areas:
            aurocs.append(np.average(areas, weights=pairs))
    before = run.read_metrics()["out_of_fold"]
    assert before["macro_auroc"]["value"] == pytest.approx(np.mean(aurocs), abs=1e-9)
    table.loc[fold == 1, findings] /= 10
    run.write_table("out_of_fold", table)
    score_run(run, n_resamples=20)
    after = run.read_metrics()["out_of_fold"]
    for name in ("macro_auroc", "macro_ap"):
        assert after[name]["value"] == pytest.approx(before[name]["value"], abs=1e-9)
    lost = table["image_id"][0]
    run.write_table("splits", run.splits.query("image_id != @lost"))
    with pytest.raises(TableError, match=rf"1 row of out_of_fold\.csv, such as '{lost}', without"):
        score_run(run, n_resamples=0)


def test_an_undecided_finding_is_ranked_and_counts_in_no_figure_at_thresholds(run, tmp_path):
    """All that thresholds decide is what it would be without the finding; ranking stays."""
    score_run(run, n_resamples=20)
    before = run.read_metrics()["test"]
    points = dict.fromkeys(FINDINGS, 0.5) | {"Mass": UNDECIDED}
    predictions = run.predictions.query("split == 'test'")

    found = evaluate_predictions(predictions, run.targets, points, n_resamples=20)
    rest = {name: cut for name, cut in points.items() if name != "Mass"}
    without = evaluate_predictions(predictions, run.targets, rest, n_resamples=20)

    ours, others = found.metrics["test"], without.metrics["test"]
    at_thresholds = ("f1", "sensitivity", "specificity", "ppv", "npv", "balanced_accuracy")
    decided = [f"{mean}_{name}" for mean in ("macro", "micro") for name in at_thresholds]
    decided += [name for name in ours if name.startswith(("label_accuracy", "exact_match"))]
    for name in (*decided, "macro_f1_of_calling_all"):
        assert ours[name]["value"] == pytest.approx(others[name]["value"]), name
    for name in ("macro_auroc", "macro_ap", "micro_auroc", "macro_brier", "micro_log_loss"):
        assert ours[name] == pytest.approx(before[name], rel=1e-5), name
    row = found.per_finding.set_index("finding").loc["Mass"]
    assert row[["threshold", "f1", "sensitivity", "specificity", "tp", "tn"]].isna().all()
    assert row[["auroc", "ap", "brier", "auroc_low"]].notna().all()
    assert found.metrics["findings_undecided"] == ["Mass"]
    assert found.metrics["findings_never_called"] == []
    assert "1 ranked only, with fewer than" in format_summary(found.metrics)
    assert format_summary(found.metrics).endswith("too few to decide by: Mass")


def test_positives_are_chosen_by_studies_and_can_be_chosen_anew(run):
    """A run of before has a threshold for every finding, until it is told to need evidence."""
    assert not run.operating_point.undecided.any()
    train = run.read_table("out_of_fold")
    targets = run.targets.set_index("image_id").loc[train["image_id"]]
    studies = {
        finding: train["study_uid"][(targets[finding] == 1).to_numpy()].nunique()
        for finding in FINDINGS
    }
    least = sorted(studies.values())[2]

    metrics = score_run(run, min_positives=least, n_resamples=2)

    expected = [finding for finding in FINDINGS if studies[finding] < least]
    assert metrics["findings_undecided"] == expected
    assert "Bronchiolitis" in expected
    assert run.operating_point.min_positives == metrics["min_positives"] == least
    assert score_run(run, n_resamples=2)["findings_undecided"] == expected  # it is kept


@pytest.mark.parametrize("seed", [0, 1])
def test_skill_scores_are_scikit_learns(tmp_path, seed):
    run = make_run(tmp_path / "run", seed)
    score_run(run, n_resamples=2)

    probabilities, targets = read_test_split(run)
    for row in run.per_finding.to_dict("records")[:-1]:
        labelled = targets[row["finding"]].notna()
        t, p = targets[row["finding"]][labelled], probabilities[row["finding"]][labelled]
        assert row["log_loss_skill"] == pytest.approx(reference.d2_log_loss_score(t, p))
        constant = reference.brier_score_loss(t, np.full(len(t), t.mean()))
        assert row["brier_skill"] == pytest.approx(1 - reference.brier_score_loss(t, p) / constant)
    test = run.read_metrics()["test"]
    assert test["macro_brier_skill"]["value"] == pytest.approx(
        run.per_finding["brier_skill"].mean()
    )
    assert test["macro_brier_skill"]["n_findings"] == len(FINDINGS) - 1


def test_the_interval_of_a_skill_score_is_as_wide_as_one_from_studies_drawn_with_replacement():
    """The constant of a finding with one positive is nearly zero where that positive weighs little.

    A quotient by it had an interval ten times as wide.
    """
    rng = np.random.default_rng(0)
    n_rows, n_positive = 400, [1, 1, 2, 3, 10, 40, 120]
    targets = (np.arange(n_rows)[:, None] < n_positive).astype(float)
    logits = np.log(np.mean(targets, axis=0)) + targets + 0.5 * rng.standard_normal(targets.shape)
    probabilities = 1 / (1 + np.exp(-logits))
    names = tuple("abcdefg")
    predictions = pd.DataFrame(probabilities, columns=list(names)).assign(
        image_id=np.arange(n_rows).astype(str), study_uid=np.arange(n_rows).astype(str)
    )
    images = parse_predictions(
        predictions.assign(projection=""),
        pd.DataFrame(targets, columns=list(names)).assign(image_id=predictions["image_id"]),
        names,
    )

    def skill(rows):
        drawn, p = targets[rows], probabilities[rows]
        defined = np.flatnonzero(drawn.any(axis=0))
        scores = [reference.d2_log_loss_score(drawn[:, f], p[:, f]) for f in defined]
        return np.mean(scores)

    spread = np.std([skill(rng.integers(n_rows, size=n_rows)) for _ in range(200)])
    found = estimate(images, np.full(7, 0.5), n_resamples=200).overall()["macro_log_loss_skill"]

    assert found["value"] == pytest.approx(skill(np.arange(n_rows)))
    assert 3 * spread < found["high"] - found["low"] < 8 * spread


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("unlabelled", [0.0, 0.1])
def test_the_best_constant_set_is_the_best_of_all_sets(seed, unlabelled):
    rng = np.random.default_rng(seed)
    targets = (rng.random((80, 4)) < [0.6, 0.5, 0.2, 0.1]).astype(float)
    targets[rng.random(targets.shape) < unlabelled] = np.nan

    best = find_best_constant(targets)

    def ratio(chosen: Any) -> float:
        return float(np.mean(((targets == chosen) | np.isnan(targets)).all(axis=1)))

    assert ratio(best) == max(map(ratio, itertools.product((0, 1), repeat=4)))


def read_test_split(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Probabilities and targets of the test images, straight from the files."""
    predictions = pd.read_csv(run.path / "predictions.csv").query("split == 'test'")
    targets = pd.read_csv(run.path / "targets.csv").set_index("image_id")
    return predictions.set_index("image_id"), targets.loc[predictions["image_id"]]


def test_metrics_equal_scikit_learn_on_the_files(run):
    """Computed here anew, finding by finding, from predictions.csv and targets.csv."""
    score_run(run, n_resamples=20)

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
    metrics = score_run(run, n_resamples=200)

    groups = [metrics["test"], metrics["test_by_study"], *metrics["test_by_projection"].values()]
    for group in groups:
        for name, entry in group.items():
            # Resampling biases the first upwards; the others know nothing that could vary.
            known_nothing = ("ap_of_chance", "f1_of_calling_all", "_of_prevalence")
            if name.endswith(("calibration_error", *known_nothing)):
                assert entry.keys() <= {"value", "n_findings"}
            elif not isinstance(entry, int):
                assert entry["low"] <= entry["value"] <= entry["high"], name
    table = run.read_table("per_finding").iloc[:-1]
    for name in ("auroc", "ap", "f1", "ppv", "brier", "log_loss"):
        assert (table[f"{name}_low"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_high"]).all()
    bootstrap = metrics["bootstrap"]
    assert (bootstrap["n_resamples"], bootstrap["level"], bootstrap["unit"]) == (200, 0.95, "study")
    assert bootstrap["n_undefined"] == dict.fromkeys(  # of Bronchiolitis, which never occurs
        (
            *("auroc", "ap", "f1", "sensitivity", "ppv", "balanced_accuracy", "prevalence"),
            *("brier_skill", "log_loss_skill"),
        ),
        200,
    )
    assert metrics["train"]["macro_auroc"].keys() == {"value", "n_findings"}
    assert metrics["out_of_fold"]["label_accuracy"].keys() == {"value"}
    assert metrics == run.read_metrics()


def test_undefined_findings_are_left_out_counted_and_named(run):
    metrics = score_run(run, n_resamples=20)

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
    score_run(run, n_resamples=0)

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
    metrics = score_run(run, n_resamples=20)

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
        if name != "macro_ap_of_chance":  # ten times as many rows to put in order
            # A skill is the small difference of 1 and a quotient of sums in float32.
            expected = pytest.approx(entry, abs=1e-6 if name.endswith("_skill") else None)
            assert tenfold.metrics["test"][name] == expected, name


def test_same_seed_same_intervals(run):
    first, second = (score_run(run, n_resamples=30, seed=1) for _ in range(2))

    assert first == second
    assert score_run(run, n_resamples=30, seed=2)["test"] != first["test"]


def test_wrong_tables_are_named():
    tables = make_tables(0)
    predictions, targets = tables["predictions"], tables["targets"]

    with pytest.raises(TableError, match=r"predictions: no column 'Mass'"):
        parse_predictions(predictions.drop(columns="Mass"), targets, FINDINGS)
    with pytest.raises(TableError, match=r"no row for 1 predicted image, the first is '0007.png'"):
        parse_predictions(predictions, targets.drop(index=7), FINDINGS)
    with pytest.raises(TableError, match=r"image_id '0003.png' has more than one row"):
        parse_predictions(predictions, pd.concat([targets, targets.iloc[[3]]]), FINDINGS)
    with pytest.raises(TableError, match=r"predictions: image_id '0004.png' has more than one row"):
        parse_predictions(pd.concat([predictions, predictions.iloc[[4]]]), targets, FINDINGS)
    uncertain = targets.assign(Nodule=targets["Nodule"].where(targets.index != 2, -1))
    with pytest.raises(
        TableError, match=r"0002.png has -1 for 'Nodule'; write 1 for present, 0 fo"
    ):
        parse_predictions(predictions, uncertain, FINDINGS)
    predictions.loc[5, "Nodule"] = 1.5
    with pytest.raises(TableError, match=r"0005.png has 1.5 for 'Nodule', which is no probab"):
        parse_predictions(predictions, targets, FINDINGS)
    with pytest.raises(TableError, match="no image to evaluate"):
        evaluate_predictions(tables["predictions"][:0], targets, dict.fromkeys(FINDINGS, 0.5))


def test_one_resample_is_no_spread(run):
    with pytest.raises(ConfigError, match="1 resamples show no spread; 2 or more do"):
        score_run(run, n_resamples=1)


def test_summary_sets_accuracy_beside_predicting_nothing(run):
    """95 % accuracy says little where doing nothing earns 94.98 %; so both share a line."""
    metrics = score_run(run, n_resamples=20)

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


def test_averages_over_findings_equal_scikit_learn():
    """Macro, weighted and micro, on tables without blanks, where its averages are defined."""
    tables = make_tables(1)
    columns = list(FINDINGS[:-1])
    targets = tables["targets"].fillna(0)
    thresholds = dict.fromkeys(columns, 0.5)

    test = evaluate_predictions(tables["predictions"], targets, thresholds, n_resamples=0).metrics[
        "test"
    ]

    t, p = targets[columns].to_numpy(), tables["predictions"][columns].to_numpy()
    d = p >= 0.5
    for average in ("macro", "weighted", "micro"):
        for name, score, stated in (
            ("auroc", reference.roc_auc_score, p),
            ("ap", reference.average_precision_score, p),
            ("f1", reference.f1_score, d),
            ("sensitivity", reference.recall_score, d),
            ("ppv", reference.precision_score, d),
        ):
            expected = score(t, stated, average=average)
            assert test[f"{average}_{name}"]["value"] == pytest.approx(expected), (average, name)
        flipped = reference.recall_score(1 - t, ~d, average="macro" if average == "macro" else None)
        if average == "macro":
            assert test["macro_specificity"]["value"] == pytest.approx(flipped)
    assert test["micro_brier"]["value"] == pytest.approx(
        reference.brier_score_loss(t.ravel(), p.ravel())
    )
    assert test["micro_log_loss"]["value"] == pytest.approx(
        reference.log_loss(t.ravel(), p.ravel())
    )
    assert test["exact_match"]["value"] == pytest.approx(reference.accuracy_score(t, d))
    assert test["exact_match_all_negative"]["value"] == pytest.approx((t == 0).all(axis=1).mean())
    assert test["micro_prevalence"]["value"] == pytest.approx(t.mean())
    assert test["weighted_prevalence"]["value"] == pytest.approx(
        np.average(t.mean(axis=0), weights=t.sum(axis=0))
    )


def test_studies_have_a_table_of_their_own(run):
    score_run(run, n_resamples=20)

    probabilities, targets = read_test_split(run)
    by = probabilities["study_uid"]
    table = run.read_table("per_finding_by_study").set_index("finding")
    for finding in FINDINGS[:-1]:
        t, p = targets[finding].groupby(by).max(), probabilities[finding].groupby(by).mean()
        labelled = t.notna()
        expected = reference.roc_auc_score(t[labelled], p[labelled])
        assert table.loc[finding, "auroc"] == pytest.approx(expected)
        assert table.loc[finding, "n_test"] == labelled.sum()
        assert table.loc[finding, "tp"] == ((t == 1) & (p >= run.thresholds[finding])).sum()


def test_a_rare_finding_has_a_wide_interval_and_one_study_none():
    """Three studies with the finding, then one."""
    tables = make_tables(0)
    predictions, targets = tables["predictions"], tables["targets"].fillna(0)
    thresholds = dict.fromkeys(FINDINGS, 0.5)
    targets["Bronchiolitis"] = (predictions["study_uid"].isin(["3", "4", "5"])).astype(float)
    targets["Mass"] = (predictions["study_uid"] == "3").astype(float)

    evaluation = evaluate_predictions(predictions, targets, thresholds, n_resamples=200)

    table = evaluation.per_finding.set_index("finding")
    width = table["auroc_high"] - table["auroc_low"]
    assert width["Bronchiolitis"] > 3 * width["Cardiomegaly"]
    assert np.isnan(table.loc["Mass", ["auroc_low", "auroc_high"]].astype(float)).all()
    assert table.loc["Mass", "n_positive_studies_test"] == 1
    assert table.loc["Mass", "specificity_low"] > 0  # that rests on all the others
    assert table["n_undefined_resamples"].eq(0).all()


def test_an_interval_that_cannot_be_computed_is_said_to_be_so():
    """All images are of one patient: nothing shows how much another patient would change."""
    tables = make_tables(0)
    predictions = tables["predictions"].assign(patient_id="one")

    evaluation = evaluate_predictions(
        predictions, tables["targets"], dict.fromkeys(FINDINGS, 0.5), n_resamples=50
    )

    macro = evaluation.metrics["test"]["macro_auroc"]
    assert (macro["low"], macro["high"]) == (None, None)
    assert f"macro AUROC     {macro['value']:.3f} [no interval]" in format_summary(
        evaluation.metrics
    )
    written = evaluation.per_finding.to_csv(columns=["auroc_low", "auroc_high"], index=False)
    assert set(written.splitlines()[1:]) == {","}


@pytest.mark.parametrize("rows", ["one row", "all positive", "all negative", "all unlabelled"])
def test_degenerate_tables_are_evaluated_without_a_figure_that_is_not_there(rows):
    tables = make_tables(0)
    predictions, targets = tables["predictions"], tables["targets"]
    if rows == "one row":
        predictions = predictions.iloc[[3]]
    else:
        value = {"all positive": 1.0, "all negative": 0.0, "all unlabelled": np.nan}[rows]
        targets = targets.assign(**dict.fromkeys(FINDINGS, value))

    evaluation = evaluate_predictions(
        predictions, targets, dict.fromkeys(FINDINGS, 0.5), n_resamples=10
    )

    json.dumps(evaluation.metrics, allow_nan=False)
    assert evaluation.metrics["n_findings_scored"] == 0
    assert evaluation.metrics["test"]["macro_auroc"]["value"] is None
    assert evaluation.metrics["test"]["macro_auroc"]["low"] is None
    assert evaluation.per_finding["auroc"].isna().all()
    assert set(evaluation.tables["curves"]["finding"]) <= {""}
    if rows == "all positive":
        assert evaluation.metrics["test"]["label_accuracy_all_negative"]["value"] is None
        assert evaluation.per_finding["sensitivity"].isna().all()  # so does everything else
    if rows == "all unlabelled":
        assert evaluation.metrics["test"]["label_accuracy"]["value"] is None
        assert evaluation.tables["calibration"].empty
    assert "undefined" in format_summary(evaluation.metrics)


# --- thresholds and calibration ------------------------------------------------------------------


def test_another_rule_is_chosen_out_of_fold_and_stored_with_the_model(run):
    score_run(run, n_resamples=0)
    f1 = run.thresholds

    metrics = score_run(run, threshold_rule="sensitivity=0.9", n_resamples=0)

    assert metrics["threshold_rule"] == Run.open(run.path).threshold_rule == "sensitivity=0.9"
    assert run.thresholds != f1
    out_of_fold = read_scored(run, "out_of_fold")
    expected = choose_thresholds(out_of_fold.targets, out_of_fold.probabilities, "sensitivity=0.9")
    assert list(run.thresholds.values()) == expected.tolist()
    assert metrics["out_of_fold"]["macro_sensitivity"]["value"] >= 0.9
    score_run(run, threshold_rule="f1", n_resamples=0)
    assert run.thresholds == f1
    with pytest.raises(ConfigError, match="is no rule"):
        score_run(run, threshold_rule="best")


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_calibration_is_fitted_out_of_fold_stored_and_shown_before_and_after(run, method):
    before = score_run(run, n_resamples=0)

    metrics = score_run(run, calibration=method, n_resamples=0)

    shown = metrics["calibration"]
    assert shown["method"] == Run.open(run.path).calibration.method == method
    raw = read_scored(run, "test", calibrated=False)
    test = read_scored(run, "test")
    assert (test.probabilities != raw.probabilities).any()
    for stage, images in (("test_before", raw), ("test_after", test)):
        cells = ~np.isnan(images.targets)
        expected = reference.brier_score_loss(images.targets[cells], images.probabilities[cells])
        assert shown[stage]["micro_brier"]["value"] == pytest.approx(expected)
        assert shown[stage].keys() == {
            f"{kind}_{name}"
            for kind in ("macro", "micro")
            for name in ("brier", "log_loss", "calibration_error")
        }
    for name in ("micro_brier", "micro_log_loss", "micro_calibration_error"):
        assert shown["test_after"][name]["value"] < shown["test_before"][name]["value"]
        assert metrics["test"][name]["value"] == pytest.approx(shown["test_after"][name]["value"])
    assert metrics["test"]["macro_auroc"] == before["test"]["macro_auroc"]
    assert (shown["temperature"] is None) == (method == "platt")
    assert shown["findings_uncalibrated"] == (["Bronchiolitis"] if method == "platt" else [])
    table = run.read_table("per_finding").set_index("finding")
    assert (table["calibration_slope"] > 0).all()
    assert (table["log_loss"] != table["log_loss_before"]).any()
    stages = run.read_table("calibration")
    assert set(stages["stage"]) == {"before", "after"}
    assert stages[stages["finding"] == ""].groupby("stage")["n"].sum().tolist() == [cells.sum()] * 2


def test_predictions_stay_what_the_model_said_so_that_choosing_again_is_free(run):
    tables = [run.path / f"{name}.csv" for name in ("predictions", "out_of_fold")]
    said = [table.read_bytes() for table in tables]
    plain = score_run(run, n_resamples=10)
    thresholds = run.thresholds

    score_run(run, calibration="platt", threshold_rule="youden", n_resamples=0)
    assert [table.read_bytes() for table in tables] == said

    assert score_run(run, calibration="none", threshold_rule="f1", n_resamples=10) == plain
    assert run.thresholds == thresholds


def test_what_test_says_changes_neither_thresholds_nor_calibration(run, tmp_path):
    """Test targets turned upside down: the stored choices stay the same."""
    score_run(run, calibration="platt", threshold_rule="youden", n_resamples=0)
    stored = run.thresholds, run.calibration.to_dict()
    targets, splits = run.read_table("targets"), run.read_table("splits")
    is_test = (splits["split"] == "test").to_numpy()
    targets.loc[is_test, list(FINDINGS)] = 1 - targets.loc[is_test, list(FINDINGS)]
    run.write_table("targets", targets)

    score_run(run, calibration="platt", threshold_rule="youden", n_resamples=0)

    assert (run.thresholds, run.calibration.to_dict()) == stored


# --- groups --------------------------------------------------------------------------------------


def write_groups(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_groups_of_a_table_are_scored_one_by_one(run, tmp_path):
    rng = np.random.default_rng(0)
    sex, age = rng.choice(["F", "M", ""], N_STUDIES), rng.integers(0, 95, N_STUDIES)
    lines = [f"{uid},{s},{a}" for uid, (s, a) in enumerate(zip(sex, age, strict=True))]
    path = write_groups(tmp_path / "g.csv", "\n".join(["study_uid,sex,age", *lines]))

    metrics = score_run(run, groups=path, n_resamples=20)

    assert metrics["test_by_group"].keys() == {"sex", "age_band"}
    assert metrics["test_by_group"]["age_band"].keys() <= {
        *("0-17", "18-39", "40-59", "60-79", "80+")
    }
    probabilities, targets = read_test_split(run)
    for value in ("F", "M"):
        rows = probabilities["study_uid"].astype(int).map(dict(enumerate(sex))) == value
        areas = []
        for finding in FINDINGS[:-1]:
            labelled = rows & targets[finding].notna()
            t, p = targets[finding][labelled], probabilities[finding][labelled]
            if t.nunique() == 2:
                areas.append(reference.roc_auc_score(t, p))
        entry = metrics["test_by_group"]["sex"][value]
        assert entry["n_images"] == rows.sum()
        assert entry["macro_auroc"]["value"] == pytest.approx(np.mean(areas))
    table = run.read_table("subgroups")
    assert table["group"].unique().tolist() == ["projection", "sex", "age_band"]
    band = table[(table["group"] == "age_band") & (table["value"] == "18-39")]
    in_band = (age >= 18) & (age < 40) & (np.arange(N_STUDIES) % 5 == 0)
    assert (band["n_studies_group"] == in_band.sum()).all()
    path.unlink()
    again = score_run(run, n_resamples=0)["test_by_group"]
    assert again.keys() == {"sex", "age_band"}, "they are kept with the run"
    for value, entry in metrics["test_by_group"]["age_band"].items():
        assert again["age_band"][value]["macro_auroc"]["value"] == pytest.approx(
            entry["macro_auroc"]["value"], nan_ok=True
        )
    run.groups_path.unlink()
    assert score_run(run, n_resamples=0)["test_by_group"] == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patient,sex\n1,F", "needs a column image_id or study_uid, and a column to group by"),
        ("study_uid\n1", "needs a column image_id or study_uid, and a column to group by"),
        ("study_uid,sex\n0,F\n0,M", "study_uid '0' is on line 2 and on line 3"),
        ("study_uid,sex\nx,F", "no row for any of the 48 images: its first study_uid is 'x'"),
        ("study_uid,age\n0,old", "line 2: age 'old' is not a number of years"),
        ("study_uid,age\n0,-3", "line 2: age '-3' is not a number of years"),
        ("study_uid,age\n0,inf", "line 2: age 'inf' is not a number of years"),
        (
            "study_uid,age,age_band\n0,9,child",
            "has a column 'age_band', but its column 'age' becom",
        ),
        ("study_uid,projection\n0,AP", "has a column 'projection', but figures by projection are"),
        (
            "study_uid,name\n" + "\n".join(f"{5 * uid},n{uid}" for uid in range(24)),
            "column 'name' has 24 values among the images, and at most 20",
        ),
    ],
)
def test_group_tables_that_cannot_be_used_are_named(run, tmp_path, text, message):
    path = write_groups(tmp_path / "g.csv", text)

    with pytest.raises(TableError, match=message):
        score_run(run, groups=path, n_resamples=0)


# --- curves --------------------------------------------------------------------------------------


def test_curves_are_points_of_scikit_learns(run):
    score_run(run, n_resamples=0)

    probabilities, targets = read_test_split(run)
    curves = run.read_table("curves")
    assert set(curves["finding"]) == {"", *FINDINGS[:-1]}
    for finding in FINDINGS[:-1]:
        labelled = targets[finding].notna()
        t, p = targets[finding][labelled], probabilities[finding][labelled]
        false_alarms, found, thresholds = reference.roc_curve(t, p, drop_intermediate=False)
        points = curves[curves["finding"] == finding]
        assert points["threshold"].iloc[0] == NEVER
        assert (points["sensitivity"].iloc[-1], points["specificity"].iloc[-1]) == (1, 0)
        theirs = dict(zip(thresholds.round(9), zip(false_alarms, found, strict=True), strict=True))
        for row in points.iloc[1:].to_dict("records"):
            x, y = theirs[round(row["threshold"], 9)]
            assert (1 - row["specificity"], row["sensitivity"]) == pytest.approx((x, y))
            d = p >= row["threshold"] - 1e-12
            assert row["ppv"] == pytest.approx(t[d].mean())


def test_a_long_curve_is_thinned_but_keeps_its_area():
    rng = np.random.default_rng(0)
    n = 20_000
    present = rng.random(n) < 0.03
    predictions = pd.DataFrame(
        {
            "image_id": np.arange(n).astype(str),
            "study_uid": np.arange(n).astype(str),
            "projection": "",
            "Nodule": rng.random(n) * 0.8 + 0.2 * present,
        }
    )
    targets = predictions[["image_id"]].assign(Nodule=present.astype(float))

    evaluation = evaluate_predictions(predictions, targets, {"Nodule": 0.5}, n_resamples=0)

    curve = evaluation.tables["curves"].query("finding == 'Nodule'")
    assert 100 < len(curve) <= 200
    area = np.trapezoid(curve["sensitivity"], 1 - curve["specificity"])
    assert area == pytest.approx(evaluation.per_finding["auroc"][0], abs=1e-3)


def test_a_run_without_its_tables_says_so(run):
    (run.path / "out_of_fold.csv").unlink()

    with pytest.raises(RunError, match=r"out_of_fold.csv is missing; the run folder is not whole"):
        score_run(run, threshold_rule="youden")


def test_the_file_of_weights_is_opened_once(run, monkeypatch):
    """It was opened 38 times: once for each threshold."""
    opened = []
    real = safetensors.safe_open
    monkeypatch.setattr(
        safetensors, "safe_open", lambda *a, **k: (opened.append(a[0]), real(*a, **k))[1]
    )
    score_run(run, n_resamples=0)
    assert len(opened) == 1
    score_run(run, threshold_rule="youden", n_resamples=0)
    assert len(opened) == 3, "once more, with the weights, to store the new thresholds"


@pytest.mark.parametrize("fails_at", ["save_model", "subgroups", "curves"])
def test_an_interrupted_evaluation_leaves_no_figures_of_another(run, monkeypatch, fails_at):
    """New tables beside an old metrics.json would make a page of both."""
    score_run(run, n_resamples=0)
    write_table, save_model = Run.write_table, Run.save_model

    def stop(self: Run, name: Any, *rest: Any) -> Any:
        if fails_at == "save_model" and not rest:
            raise KeyboardInterrupt
        if name == fails_at:
            raise KeyboardInterrupt
        return write_table(self, name, *rest) if rest else save_model(self, name)

    monkeypatch.setattr(Run, "write_table", stop)
    monkeypatch.setattr(Run, "save_model", stop)
    with pytest.raises(KeyboardInterrupt):
        score_run(run, threshold_rule="sensitivity=0.9", n_resamples=0)
    monkeypatch.undo()
    with pytest.raises(
        RunError, match=r"metrics\.json is missing\. `cxr-cache evaluate .*` writes"
    ):
        run.read_metrics()
    score_run(run, threshold_rule="sensitivity=0.9", n_resamples=0)
    assert run.read_metrics()["threshold_rule"] == "sensitivity=0.9"


def test_what_cannot_be_evaluated_leaves_the_figures_that_are_there(run, tmp_path):
    before = score_run(run, n_resamples=0)
    (tmp_path / "groups.csv").write_text("image_id,sex\nnobody,F\n")
    with pytest.raises(TableError, match="has no row for any of"):
        score_run(run, threshold_rule="youden", groups=tmp_path / "groups.csv", n_resamples=0)
    assert run.read_metrics()["test"] == before["test"]
    assert run.threshold_rule == "f1", "and the model keeps its thresholds"


@pytest.mark.parametrize("name", ["metrics.json", "predictions.csv"])
def test_a_damaged_file_of_a_run_is_named(run, name):
    score_run(run, n_resamples=0)
    (run.path / name).write_bytes(b'image_id,"\xff\n1')
    with pytest.raises(RunError, match=rf"{name} is damaged"):
        run.read_metrics() if name == "metrics.json" else run.read_table("predictions")
