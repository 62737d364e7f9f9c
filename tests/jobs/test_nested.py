"""A nested cross-validation tests every image once, and compares scores of one model only."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    f1_score,
    log_loss,
    recall_score,
    roc_auc_score,
)

from cxr_cache.cli.main import cli
from cxr_cache.config import FinetuneConfig, TrainConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.splits import make_outer_split
from cxr_cache.errors import ConfigError, RunError
from cxr_cache.evaluation.audit import audit_store
from cxr_cache.evaluation.compare import compare_runs
from cxr_cache.evaluation.evaluate import NESTED_INTERVALS, NESTED_MODEL, score_run
from cxr_cache.evaluation.zero_shot import score_zero_shot
from cxr_cache.jobs.external import evaluate_on_store
from cxr_cache.models.run import Run
from cxr_cache.report.checklist import render_checklists
from cxr_cache.report.methods import describe_methods
from cxr_cache.report.page import render_page
from cxr_cache.report.report import write_joint_report, write_report
from cxr_cache.report.views import read_view
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.training.frozen_start import config_from_run
from cxr_cache.training.train import fit_run
from tests import synthetic
from tests.schemas import read_valid

K = 3
CONFIG = TrainConfig(
    epochs=(1, 4),
    n_folds=2,
    batch_size=16,
    learning_rate=1e-2,
    hidden=(),
    n_jobs=1,
    min_positives=3,
    protocol="nested",
    n_outer_folds=K,
)
RARE = "Hernia"
"""One patient has it, so that only one outer fold can score it."""


def stop(*_args: object, **_options: object) -> None:
    raise KeyboardInterrupt


def make_cohort(seed: int = 0) -> Cohort:
    """Two studies per patient, with two images each; some cells are unlabelled."""
    cohort = synthetic.make_cohort(60, seed=seed, unlabelled=0.05)
    targets = cohort.targets.copy()
    patients = np.arange(len(cohort)) // 4
    targets[:, cohort.findings.index(RARE)] = patients == 7
    ages = {"patient_id": [f"P{n}" for n in patients], "sex": np.where(patients % 2, "F", "M")}
    return replace(cohort, targets=targets).assign(**ages)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return synthetic.make_store(tmp_path_factory.mktemp("nested") / "s.h5", make_cohort())


@pytest.fixture(scope="module")
def run(store, tmp_path_factory) -> Run:
    made = fit_run(store, tmp_path_factory.mktemp("nested") / "run", CONFIG).run
    score_run(made, n_resamples=40)
    write_report(made)
    return made


@pytest.fixture(scope="module")
def second(store, tmp_path_factory) -> Run:
    """Another recipe on the same outer folds; evaluated when a test asks for it."""
    config = replace(CONFIG, weight_decay=0.5, baseline=False, epochs=(2,))
    return fit_run(store, tmp_path_factory.mktemp("nested") / "second", config).run


@pytest.fixture(scope="module")
def holdout(store, tmp_path_factory) -> Run:
    config = CONFIG.of_outer_fold
    return fit_run(store, tmp_path_factory.mktemp("nested") / "holdout", config).run


# -- who is tested where ----------------------------------------------------------------


def test_every_patient_is_tested_once_and_never_by_a_model_that_knows_them(run):
    cohort = make_cohort()
    patient_of = dict(zip(cohort.image_ids, cohort.patient_ids, strict=True))
    tested: list[str] = []
    for part in run.outer_runs:
        splits = part.splits.assign(patient=part.splits["image_id"].map(patient_of))
        train = splits[splits["split"] == "train"]
        assert not set(splits.loc[splits["split"] == "test", "patient"]) & set(train["patient"])
        places = train[["patient", "fold"]].drop_duplicates()
        assert places["patient"].is_unique, "a patient is in two inner folds"
        assert set(train["fold"]) == {1, 2}
        tested += splits.loc[splits["split"] == "test", "image_id"].tolist()
    assert sorted(tested) == sorted(cohort.image_ids)

    table = run.read_table("outer_predictions")
    assert table["image_id"].tolist() == run.targets["image_id"].tolist()
    assert table[["patient_id", "outer_fold"]].drop_duplicates()["patient_id"].is_unique
    assert set(run.splits["split"]) == {"train"}, "the model to use has no test images"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_outer_folds_are_balanced_and_do_not_depend_on_which_is_tested(seed):
    cohort = make_cohort(seed)
    options: dict[str, Any] = {"n_outer_folds": 4, "n_folds": 2, "seed": seed}
    splits = [make_outer_split(cohort.targets, cohort.groups, k, **options) for k in range(4)]
    assert (np.sum([split.is_test for split in splits], axis=0) == 1).all()
    for split in splits:
        assert abs(split.is_test.sum() - len(cohort) / 4) <= 8
        n_present = (cohort.targets[split.is_test] == 1).sum(axis=0)[:3]  # the frequent ones
        np.testing.assert_allclose(n_present, (cohort.targets == 1).sum(axis=0)[:3] / 4, atol=4)
    everything = make_outer_split(cohort.targets, cohort.groups, None, **options)
    assert not everything.is_test.any()


def test_an_outer_fold_is_a_holdout_run_on_that_split(run, tmp_path):
    """Nothing of the outer fold can have reached its model: the same run is made without it."""
    [part, *_] = run.outer_runs
    splits = part.splits.set_index("image_id").loc[make_cohort().image_ids]
    given = make_cohort().assign(
        given_split=splits["split"].to_numpy(),
        given_fold=splits["fold"].astype("Int64").astype(str).replace("<NA>", "").to_numpy(),
    )
    store = synthetic.make_store(
        tmp_path / "s.h5", given, embeddings=synthetic.make_embeddings(make_cohort())
    )
    alone = fit_run(store, tmp_path / "run", CONFIG.of_outer_fold).run
    pd.testing.assert_frame_equal(
        alone.predictions[list(synthetic.FINDINGS)], part.predictions[list(synthetic.FINDINGS)]
    )
    assert alone.thresholds == part.thresholds
    assert alone.calibration.to_dict() == part.calibration.to_dict()


# -- figures ----------------------------------------------------------------------------


def read_folds(run: Run) -> list[tuple[pd.DataFrame, pd.DataFrame, dict[str, float]]]:
    """Targets, calibrated probabilities and thresholds of each outer fold, from its own files."""
    folds, targets = [], run.targets.set_index("image_id")
    for part in run.outer_runs:
        table = part.predictions.query("split == 'test'").set_index("image_id")
        values = part.calibration.apply(table[list(synthetic.FINDINGS)].to_numpy())
        calibrated = pd.DataFrame(values, table.index, list(synthetic.FINDINGS))
        folds.append((targets.loc[table.index], calibrated, part.thresholds))
    return folds


def of_finding(
    run: Run, name: str, *, only_decided: bool = False
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Labels, probabilities and calls of each fold's labelled images."""
    found = []
    for targets, probabilities, thresholds in read_folds(run):
        if only_decided and thresholds[name] > 2:
            continue
        known = targets[name].notna()
        y, p = targets.loc[known, name].to_numpy(), probabilities.loc[known, name].to_numpy()
        found.append((y, p, p >= thresholds[name]))
    return found


def within(score: Callable[..., float], weigh: Callable[[np.ndarray], float], run: Run, name: str):
    """A ranking figure in each outer fold that has both classes, and its weighted mean."""
    folds = [(y, p) for y, p, _ in of_finding(run, name) if len(set(y)) == 2]
    if not folds:
        return np.nan
    return np.average([score(y, p) for y, p in folds], weights=[weigh(y) for y, _ in folds])


def expected(run: Run, name: str) -> dict[str, float]:
    everything, decided = of_finding(run, name), of_finding(run, name, only_decided=True)
    y, p = (np.concatenate([fold[i] for fold in everything]) for i in (0, 1))
    figures = {
        "auroc": within(roc_auc_score, lambda y: y.sum() * (1 - y).sum(), run, name),
        "ap": within(average_precision_score, lambda y: y.sum(), run, name),
        "brier": brier_score_loss(y, p),
        "log_loss": log_loss(y, p, labels=[0, 1]),
    }
    if not decided:
        return figures | dict.fromkeys(("f1", "sensitivity", "specificity"), np.nan)
    y, called = (np.concatenate([fold[i] for fold in decided]) for i in (0, 2))
    return figures | {
        "f1": f1_score(y, called),
        "sensitivity": recall_score(y, called),
        "specificity": recall_score(y, called, pos_label=0),
    }


def test_every_figure_is_that_of_a_plain_loop(run):
    table = run.per_finding.set_index("finding")
    by_finding = {name: expected(run, name) for name in synthetic.FINDINGS}
    for name, figures in by_finding.items():
        for measure, value in figures.items():
            np.testing.assert_allclose(
                table.loc[name, measure], value, rtol=1e-6, err_msg=f"{measure} of {name}"
            )
    test = run.metrics["test"]
    for measure in by_finding[RARE]:
        mean = np.nanmean([figures[measure] for figures in by_finding.values()])
        assert test[f"macro_{measure}"]["value"] == pytest.approx(mean, rel=1e-6)
        low, high = (test[f"macro_{measure}"][bound] for bound in ("low", "high"))
        assert low < mean < high
    cells = [(t.to_numpy().ravel(), p.to_numpy().ravel()) for t, p, _ in read_folds(run)]
    cells = [(y[~np.isnan(y)], p[~np.isnan(y)]) for y, p in cells]
    pairs = [y.sum() * (1 - y).sum() for y, _ in cells]
    micro = np.average([roc_auc_score(y, p) for y, p in cells], weights=pairs)
    assert test["micro_auroc"]["value"] == pytest.approx(micro, rel=1e-6)


@pytest.mark.slow
def test_labels_without_signal_are_ranked_by_chance(tmp_path):
    """Neither a leak nor the pooling of several models moves the estimate from 0.5."""
    config, areas = replace(CONFIG, baseline=False, epochs=(1, 4)), []
    for seed in range(12):
        cohort = synthetic.make_cohort(60, seed=seed)
        noise = np.random.default_rng([seed, 2]).normal(size=(len(cohort), 1, synthetic.WIDTH))
        path = synthetic.make_store(
            tmp_path / f"{seed}.h5", cohort, embeddings=noise.astype(np.float32)
        )
        run = fit_run(path, tmp_path / f"run {seed}", config).run
        areas.append(score_run(run, n_resamples=0)["test"]["macro_auroc"]["value"])
    error = np.std(areas, ddof=1) / np.sqrt(len(areas))
    assert abs(np.mean(areas) - 0.5) < 3 * error
    assert error < 0.015


def test_groups_and_studies_are_compared_within_outer_folds_too(run):
    folds = run.read_table("outer_predictions").set_index("image_id")
    targets = run.targets.set_index("image_id")
    name = synthetic.FINDINGS[0]
    rows = folds.assign(y=targets[name], p=folds[name]).query("sex == 'F'").dropna(subset="y")
    areas, pairs = [], []
    for _, own in rows.groupby("outer_fold"):
        areas.append(roc_auc_score(own["y"], own["p"]))
        pairs.append(own["y"].sum() * (1 - own["y"]).sum())
    subgroups = run.read_table("subgroups").query("group == 'sex' and value == 'F'")
    auroc = subgroups.set_index("finding").loc[name, "auroc"]
    assert auroc == pytest.approx(np.average(areas, weights=pairs), rel=1e-6)
    areas, pairs = [], []
    rows = folds.assign(y=targets[name], p=folds[name])
    studies = rows.groupby("study_uid").agg(
        fold=("outer_fold", "first"), y=("y", "max"), p=("p", "mean")
    )
    for _, own in studies.dropna().groupby("fold"):
        areas.append(roc_auc_score(own["y"], own["p"]))
        pairs.append(own["y"].sum() * (1 - own["y"]).sum())
    by_study = run.read_table("per_finding_by_study").set_index("finding")
    assert by_study.loc[name, "auroc"] == pytest.approx(np.average(areas, weights=pairs), rel=1e-6)


def test_what_a_fold_cannot_score_is_said(run):
    metrics = run.metrics
    assert metrics["findings_undefined_in_some_folds"] == [RARE]
    assert run.per_finding.set_index("finding")["n_outer_folds_scored"][RARE] == 1
    assert metrics["findings_undefined"] == []
    scored = [fold["n_findings_scored"] for fold in metrics["outer_folds"]]
    assert sorted(scored) == [5, 5, 6]
    assert sum(fold["n_test_images"] for fold in metrics["outer_folds"]) == 120
    assert metrics["n_test_images"] == metrics["n_train_images"] == 120
    page = run.report_path.read_text()
    assert f"averaged over the others: {RARE}" in page


def test_each_outer_fold_has_the_figures_of_its_own_run(run):
    for part, fold in zip(run.outer_runs, run.metrics["outer_folds"], strict=True):
        assert fold["test"] == part.metrics["test"]
        assert fold["chosen_epochs"] == part.config["chosen_epochs"]
    table = run.read_table("outer_folds")
    assert table["outer_fold"].tolist() == np.repeat(range(1, K + 1), 6).tolist()


def test_logistic_regressions_are_compared_within_outer_folds(run):
    names, targets = list(synthetic.FINDINGS), run.targets.set_index("image_id")
    areas = []
    for name in names:
        of_folds, pairs = [], []
        for part in run.outer_runs:
            table = part.read_table("logistic").set_index("image_id")
            y = targets.loc[table.index, name].dropna()
            if y.nunique() == 2:
                of_folds.append(roc_auc_score(y, table.loc[y.index, name]))
                pairs.append(y.sum() * (1 - y).sum())
        areas.append(np.average(of_folds, weights=pairs))
    entry = run.metrics["logistic"]
    assert entry["macro_auroc"]["value"] == pytest.approx(np.mean(areas), rel=1e-5)
    assert len(entry["C"]) == K


def test_an_interrupted_evaluation_leaves_no_figures_of_before(second, monkeypatch):
    score_run(second, n_resamples=0)
    with pytest.raises(ConfigError, match="is no rule"):
        score_run(second, threshold_rule="best", n_resamples=0)
    assert second.metrics, "what is refused changes nothing"
    monkeypatch.setattr("cxr_cache.evaluation.evaluate.read_outer_folds", stop)
    with pytest.raises(KeyboardInterrupt):
        score_run(second, threshold_rule="youden", n_resamples=0)
    with pytest.raises(RunError, match=r"metrics.json is missing. `cxr-cache evaluate"):
        second.read_metrics()
    monkeypatch.undo()
    score_run(second, threshold_rule="f1", n_resamples=0)


def test_chosen_anew_thresholds_are_chosen_in_every_outer_fold(second):
    before = [part.thresholds for part in second.outer_runs], second.thresholds
    metrics = score_run(second, threshold_rule="youden", calibration="none", n_resamples=0)
    assert metrics["threshold_rule"] == "youden"
    assert metrics["calibration"]["method"] == "none"
    for part, cuts in zip(second.outer_runs, before[0], strict=True):
        assert part.thresholds != cuts
        assert part.threshold_rule == "youden"
    assert second.thresholds != before[1]
    table = second.per_finding.set_index("finding")
    for measure, value in expected(second, synthetic.FINDINGS[0]).items():
        assert table.loc[synthetic.FINDINGS[0], measure] == pytest.approx(value, rel=1e-6)


# -- what is said of the model that the run delivers ----------------------------------------


def test_nothing_claims_that_the_model_to_use_was_tested(run):
    page, card = html.unescape(run.report_path.read_text()), run.read_model_card()
    checklist, methods = render_checklists(read_view(run)), describe_methods(run)
    for text in (page, card, checklist, methods):
        assert NESTED_MODEL in text
        assert "used neither for training" not in text
        assert "set aside for the test" not in text
        assert "which it has not been trained on" not in text
    assert NESTED_INTERVALS in page
    assert NESTED_INTERVALS in card
    assert "no unbiased variance is known [Bengio 2004]" in methods
    assert "Further options" not in methods
    assert "3 outer folds of whole patients" in methods
    assert "Nested cross-validation: 3 outer folds" in checklist
    assert "split: nested cross-validation" in card
    flow = run.read_table("flow")
    assert not flow["what"].str.contains("test,|^test$").any()


def test_the_model_to_use_is_the_recipe_on_all_images(run, store, tmp_path):
    """The same search, on a split that tests nothing of what the store holds."""
    assert len(run.out_of_fold) == len(make_cohort())
    assert run.load_fold_heads()["weight_0"].shape[0] == CONFIG.n_folds
    assert run.load_model().n_members == CONFIG.n_folds
    found = evaluate_on_store(run, store, n_resamples=0)
    own = found.tables["per_finding"].set_index("finding")["auroc_own_test"]
    nested = run.per_finding.set_index("finding")["auroc"]
    np.testing.assert_allclose(own, nested[own.index], rtol=1e-6)


# -- comparing --------------------------------------------------------------------------


def test_nested_runs_are_compared_within_their_outer_folds(run, second, tmp_path):
    score_run(second, n_resamples=0)
    comparison = compare_runs(run, second, n_resamples=20)
    for name in synthetic.FINDINGS:
        [row] = comparison.table.query(
            f"finding == '{name}' and measure == 'auroc' and rows == 'images'"
        ).to_dict("records")
        difference = expected(second, name)["auroc"] - expected(run, name)["auroc"]
        assert row["difference"] == pytest.approx(difference, abs=1e-6)
    assert "nested cross-validations on the same outer folds" in comparison.to_text()
    assert "120 test images" in comparison.to_text()
    page = write_joint_report([run, second], tmp_path / "both.html", n_resamples=2).read_text()
    assert "outer folds, in each of which a model is tested once" in page


def test_a_nested_run_is_not_compared_with_a_holdout(run, holdout):
    for pair in ((run, holdout), (holdout, run)):
        with pytest.raises(RunError, match=r"tests every image in a nested .* the same --protocol"):
            compare_runs(*pair)


def test_runs_of_other_outer_folds_are_not_compared(run, store, tmp_path):
    other = fit_run(store, tmp_path / "other", replace(CONFIG, seed=7, epochs=(1,))).run
    with pytest.raises(RunError, match="have other outer folds, so that their figures"):
        compare_runs(run, other)


# -- options, and what is refused -----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_by": "image"}, "split_by must be study where the protocol is nested"),
        ({"test_fraction": 0.3}, "test_fraction goes with the protocol holdout"),
        ({"n_outer_folds": 1}, "n_outer_folds must be 2 or more, not 1"),
        ({"protocol": "holdout"}, "n_outer_folds goes with the protocol nested"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **options)


def test_five_outer_folds_are_the_default():
    assert TrainConfig(protocol="nested").n_outer_folds == 5
    assert TrainConfig().n_outer_folds is None


def test_repeats_are_refused(store, tmp_path):
    with pytest.raises(ConfigError, match=r"--repeats 2 trains again on one split, and --protocol"):
        fit_run(store, tmp_path / "run", CONFIG, n_repeats=2)
    assert not (tmp_path / "run").exists()


def test_a_given_split_is_refused_and_may_be_left_aside(tmp_path):
    cohort = make_cohort().assign(given_split=["test"] * 20 + ["train"] * 100)
    store = synthetic.make_store(tmp_path / "s.h5", cohort)
    with pytest.raises(ConfigError, match=r"comes with a split, .* Add --split new to leave"):
        fit_run(store, tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()
    quick = replace(CONFIG, split="new", epochs=(1,), baseline=False, n_outer_folds=2)
    run = fit_run(store, tmp_path / "run", quick).run
    assert len(run.outer_runs) == 2


def test_what_needs_a_test_of_the_model_is_refused(run, store, tmp_path):
    why = (
        r"nested cross-validation \(--protocol nested\), whose model has no test images of its own"
    )
    with pytest.raises(RunError, match=f"{why}, and a fine-tuning is tested on those"):
        config_from_run(run)
    assert "protocol" not in vars(FinetuneConfig())
    with pytest.raises(RunError, match=f"{why}, and the pictures on a page"):
        write_report(run, image_dir=tmp_path)
    with (
        FeatureStore.open(store) as features,
        pytest.raises(RunError, match=f"{why}, and an audit"),
    ):
        audit_store(features, run=run)
    prompts = pytest.raises(RunError, match=f"{why}, and prompts are scored on these")
    with FeatureStore.open(store) as features, prompts:
        score_zero_shot(features, None, {}, run=run)
    first = run.outer_path(1)
    with pytest.raises(RunError, match=re.escape(f"or one of its outer folds, such as {first}.")):
        run.require_holdout("that is needed")
    Run.open(first).require_holdout("and this one is a holdout")


def test_an_outer_fold_that_is_missing_is_named(run, tmp_path):
    moved = run.outer_path(2).rename(tmp_path / "away")
    try:
        with pytest.raises(RunError, match=r"outer_fold_2 is not a run folder"):
            score_run(run)
    finally:
        moved.rename(run.outer_path(2))


def test_whole_studies_can_be_nested(store, tmp_path):
    config = replace(CONFIG, level="study", epochs=(1,), baseline=False, n_outer_folds=2)
    config = replace(config, batch_size=8)
    run = fit_run(store, tmp_path / "run", config).run
    metrics = score_run(run, n_resamples=0)
    assert "60 studies with 120 images" in render_page([read_view(run)])
    assert metrics["rows"] == "studies"
    assert metrics["n_test_studies"] == 60
    tested = pd.concat([part.splits.query("split == 'test'") for part in run.outer_runs])
    assert sorted(tested["image_id"]) == sorted(make_cohort().image_ids)


def test_an_interrupted_run_is_not_finished_and_starts_anew(run, store, tmp_path, monkeypatch):
    path = tmp_path / "run"
    for k in (1, 9):  # what an earlier run of more folds left
        Run.create(path / f"outer_fold_{k}", {"kind": "train"})
    (path / "config.json").write_text(json.dumps({"kind": "train", "status": "running"}))
    made, create = [], Run.create

    def count(*args: Any, **options: Any) -> Run:
        made.append(args[0])
        return create(*args, **options) if len(made) < 3 else stop()

    with monkeypatch.context() as patch:
        patch.setattr(Run, "create", count)
        with pytest.raises(KeyboardInterrupt):
            fit_run(store, path, CONFIG)
    assert (path / "outer_fold_1" / "model.safetensors").is_file()
    assert not (path / "outer_fold_9").exists()
    with pytest.raises(RunError, match="is not finished: its training was interrupted"):
        Run.open(path)

    again = fit_run(store, path, CONFIG).run
    for ours, theirs in zip(again.outer_runs, run.outer_runs, strict=True):
        pd.testing.assert_frame_equal(ours.predictions, theirs.predictions)
    fit_run(store, path, replace(CONFIG.of_outer_fold, epochs=(1,)), overwrite=True)
    assert not list(path.glob("outer_*")), "a holdout run has none"


def test_the_command_prints_both_tests_and_what_the_model_is(run, store, tmp_path, monkeypatch):
    monkeypatch.setattr("cxr_cache.jobs.runs.score_run", partial(score_run, n_resamples=0))
    monkeypatch.setattr("cxr_cache.jobs.runs.write_report", lambda run: run.report_path)
    options = "--epochs 1 --folds 2 --batch-size 16 --hidden none --jobs 1 --no-baseline"
    command = f"train {store} --run-dir {tmp_path / 'run'} {options} --protocol nested"
    done = CliRunner().invoke(cli, [*command.split(), "--outer-folds", "2", "--json"])
    assert done.exit_code == 0, done.output
    assert len(read_valid("train", done.stdout)["metrics"]["outer_folds"]) == 2
    for verb in ("checklist", "methods"):
        result = CliRunner().invoke(cli, [verb, str(run.path), "--json"])
        assert result.exit_code == 0, result.output
        read_valid(verb, result.stdout)
    result = CliRunner().invoke(cli, ["evaluate", str(tmp_path / "run"), "--resamples", "0"])
    assert "nested test: 120 images of 60 studies" in result.output
    assert "outer fold 2    AUROC" in result.output
    assert NESTED_MODEL in result.output


def test_progress_counts_all_trainings(store, tmp_path):
    told: list[tuple[int, int]] = []
    config = replace(CONFIG, epochs=(1,), baseline=False, n_outer_folds=2)
    fit_run(store, tmp_path / "run", config, on_progress=lambda *n: told.append(n))
    assert told[-1] == (6, 6), "two folds of two outer folds and of all images, an epoch each"
    assert [n for n, _ in told] == sorted(n for n, _ in told)
