"""Runs on the same studies: one set of resamples for all, and only if the test is the same."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from cxr_cache.errors import RunError
from cxr_cache.evaluation.compare import COLUMNS, compare_runs, holm
from cxr_cache.models.run import Run
from cxr_cache.report.plots import write_comparison
from cxr_cache.training.train import fit_run
from tests.evaluation.test_evaluate import FINDINGS, make_run
from tests.oracles import bootstrap_weights
from tests.synthetic import QUICK, make_cohort, make_store

SCORES = {"auroc": roc_auc_score, "ap": average_precision_score}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    cohort = make_cohort(150, unlabelled=0.1)
    return make_store(tmp_path_factory.mktemp("compare") / "s.h5", cohort)


@pytest.fixture(scope="module")
def runs(store) -> tuple[Run, Run]:
    weak = replace(QUICK, epochs=(1,), learning_rate=1e-6)
    strong = replace(QUICK, epochs=(40,), learning_rate=1e-2)
    return tuple(
        fit_run(store, store.parent / name, config).run
        for name, config in (("weak", weak), ("strong", strong))
    )


def read_test_split(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    predictions = run.read_table("predictions")
    predictions = predictions[predictions["split"] == "test"].set_index("image_id")
    return predictions, run.read_table("targets").set_index("image_id").loc[predictions.index]


def score(run: Run, measure: str, weights=None) -> np.ndarray:
    """scikit-learn's figure on test, finding by finding, NaN labels left out."""
    predictions, targets = read_test_split(run)
    values = []
    for finding in run.config["findings"]:
        labelled = targets[finding].notna().to_numpy()
        y, p = targets[finding][labelled], predictions[finding][labelled]
        w = None if weights is None else weights[labelled]
        values.append(SCORES[measure](y, p, sample_weight=w) if y.nunique() == 2 else np.nan)
    return np.array(values)


def test_figures_intervals_and_p_values_are_those_of_an_independent_loop(runs):
    table = compare_runs(*runs, n_resamples=10, seed=3).table
    predictions, targets = read_test_split(runs[0])
    uids = predictions["study_uid"].to_numpy(object)
    weights = bootstrap_weights(uids, 10, 3)
    for measure in SCORES:
        first, second = (score(run, measure) for run in runs)
        resampled = np.array(
            [score(runs[1], measure, w) - score(runs[0], measure, w) for w in weights]
        )
        rows = table[(table["rows"] == "images") & (table["measure"] == measure)]
        assert rows["finding"].tolist() == [*runs[0].config["findings"], ""]
        np.testing.assert_allclose(rows["first"], [*first, first.mean()], atol=1e-6)
        np.testing.assert_allclose(rows["second"], [*second, second.mean()], atol=1e-6)
        n = np.array(
            [
                min(len(set(uids[targets[f] == value])) for value in (0, 1))
                for f in runs[0].config["findings"]
            ]
        )
        covariance = np.cov(resampled.T, ddof=0)
        shown = covariance.diagonal()
        own = shown * ((n + 1) / (n - 1) if measure == "auroc" else 1)  # not of AP
        total = covariance.sum() - shown.sum() + own.sum()  # what is shared is left as it is
        error = np.sqrt([*own, total / len(n) ** 2])
        freedom = np.append(n - 1, max(total, own.sum()) ** 2 / (own**2 / (n - 1)).sum())
        difference = rows["difference"].to_numpy()
        reach = stats.t.ppf(0.975, freedom) * error
        np.testing.assert_allclose(rows["low"], np.maximum(difference - reach, -1), atol=1e-6)
        np.testing.assert_allclose(rows["high"], np.minimum(difference + reach, 1), atol=1e-6)
        p = 2 * stats.t.sf(np.abs(difference) / error, freedom)
        np.testing.assert_allclose(rows["p"], p, rtol=1e-3)


def test_an_interval_without_zero_is_a_p_value_below_a_twentieth(runs):
    table = compare_runs(*runs, n_resamples=200).table.dropna(subset=["p"])

    excludes_zero = (table["low"] > 0) | (table["high"] < 0)
    assert (excludes_zero == (table["p"] < 0.05)).all()
    assert excludes_zero.any()
    assert not excludes_zero.all()


def test_a_clear_difference_is_clear_and_turns_its_sign_with_the_runs(runs):
    forth, back = compare_runs(*runs), compare_runs(*reversed(runs))

    np.testing.assert_allclose(forth.table["difference"], -back.table["difference"])
    np.testing.assert_allclose(forth.table["low"], -back.table["high"])
    np.testing.assert_allclose(forth.table["p_holm"], back.table["p_holm"])
    assert forth.macro("strong")["low"] > 0
    assert forth.macro("strong")["p"] < 0.001


def test_a_run_does_not_differ_from_its_copy(runs, tmp_path):
    copy = Run.open(shutil.copytree(runs[0].path, tmp_path / "copy"))

    table = compare_runs(runs[0], copy, n_resamples=20).table.dropna(subset=["difference"])

    assert (table[["difference", "low", "high"]] == 0).all(axis=None)
    assert (table[["p", "p_holm"]] == 1).all(axis=None)


def test_several_runs_are_compared_with_the_first(runs, tmp_path):
    copy = Run.open(shutil.copytree(runs[0].path, tmp_path / "copy"))

    three = compare_runs(*runs, copy, n_resamples=50)
    two = compare_runs(*runs, n_resamples=50)

    assert three.runs == ("weak", "strong", "copy")
    strong = three.table[three.table["run"] == "strong"].reset_index(drop=True)
    unchanged = [name for name in COLUMNS if name != "p_holm"]
    pd.testing.assert_frame_equal(
        strong[unchanged], two.table[unchanged].reset_index(drop=True), check_exact=False
    )
    assert (strong["p_holm"] >= two.table["p_holm"] - 1e-12).all()  # more tests, more caution


def test_holm_is_the_stepwise_procedure():
    """A hypothesis is rejected at a level exactly where its corrected p is at most that level."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = pd.Series(rng.random(6) ** 3)
        corrected = holm(p)
        for level in rng.random(5):
            rejected, order = set(), p.sort_values()
            for step, (name, value) in enumerate(order.items()):
                if value > level / (len(p) - step):
                    break
                rejected.add(name)
            assert set(corrected.index[corrected <= level]) == rejected
    with_gap = holm(pd.Series([0.01, np.nan, 0.04]))
    assert with_gap.tolist() == [0.02, pytest.approx(np.nan, nan_ok=True), 0.04]
    assert holm(pd.Series([np.nan])).isna().all()


# --- DeLong --------------------------------------------------------------------------------------


def delong(present: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Standard error of the difference of two AUROCs, and its two-sided p value.

    DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver
    operating characteristic curves" (1988), from the placements of each case, by definition.
    """
    placements = []
    for scores in (first, second):
        wins = (scores[present][:, None] > scores[~present]).astype(float)
        wins += 0.5 * (scores[present][:, None] == scores[~present])
        placements.append((wins.mean(axis=1), wins.mean(axis=0)))
    v10, v01 = placements[1][0] - placements[0][0], placements[1][1] - placements[0][1]
    error = np.sqrt(v10.var(ddof=1) / len(v10) + v01.var(ddof=1) / len(v01))
    return error, 2 * stats.norm.sf(abs(v10.mean()) / error)


@pytest.mark.parametrize("seed", [0, 1])
def test_delongs_test_agrees_where_every_study_has_one_image(tmp_path, seed):
    """The same standard error to a few per cent, and p values that tell the same story."""
    rng = np.random.default_rng(seed)
    n = 600
    present = rng.random((n, len(FINDINGS))) < np.array([0.5, 0.4, 0.3, 0.2, 0.15, 0.1])
    shared = rng.standard_normal(present.shape)
    strength = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])  # of what the second has and the first not
    runs, scores = [], []
    for number, distance in enumerate((1.0, 1.0 + strength)):
        logits = distance * present + shared + 0.5 * rng.standard_normal(present.shape)
        p = (1 / (1 + np.exp(-logits))).astype(np.float32)
        run = make_run(tmp_path / f"run{number}")
        images = pd.DataFrame({"image_id": np.arange(n).astype(str)})
        described = images.assign(study_uid=images["image_id"], projection="", split="test")
        run.write_table("predictions", described.join(pd.DataFrame(p, columns=FINDINGS)))
        run.write_table("targets", images.join(pd.DataFrame(present * 1.0, columns=FINDINGS)))
        runs.append(run)
        scores.append(p)

    table = compare_runs(*runs, n_resamples=2000).table

    rows = table[(table["rows"] == "images") & (table["measure"] == "auroc")].iloc[:-1]
    n_fewer = present.sum(axis=0)
    for f, row in enumerate(rows.to_dict("records")):
        error, p = delong(present[:, f], scores[0][:, f], scores[1][:, f])
        reach = stats.t.ppf(0.975, n_fewer[f] - 1)
        assert (row["high"] - row["low"]) / 2 / reach == pytest.approx(error, rel=0.06)
        assert row["p"] == pytest.approx(p, abs=0.02, rel=0.25)
    assert rows["p"].min() < 0.01 < 0.1 < rows["p"].max()


# --- words, tables, pictures ---------------------------------------------------------------------


def test_the_text_names_runs_figures_and_findings_that_differ(runs):
    text = compare_runs(*runs, n_resamples=200).to_text()

    assert text.splitlines()[0].endswith(
        "differences to weak with 95% paired intervals over studies"
    )
    assert "weak      strong  difference" in text
    assert "macro AUROC, by study" in text
    assert "findings tested (Holm, 5 %)" in text
    same = compare_runs(runs[0], runs[1], n_resamples=2).to_text()
    assert "nan" not in same


def test_the_text_says_of_what_it_speaks(runs, tmp_path):
    """A difference of ensembling is no difference of recipes, and one training is no recipe."""
    copy = Run.open(shutil.copytree(runs[1].path, tmp_path / "averaged"))
    copy.config["train"]["final"] = "ensemble"
    assert runs[0].config["train"]["final"] == "refit"

    alike, mixed = (compare_runs(runs[0], run, n_resamples=5) for run in (runs[1], copy))

    (note,) = alike.notes
    assert note.startswith("This compares trained models, not recipes: of one run or more only one")
    assert f"Note: {note}" in alike.to_text()
    assert mixed.notes[1].startswith(
        "weak has --final refit and averaged --final ensemble. An average of models is better"
    )


def test_a_difference_without_an_interval_says_so(runs):
    comparison = compare_runs(*runs, n_resamples=5)
    is_macro = comparison.table["finding"] == ""
    comparison.table.loc[is_macro, ["low", "high", "p", "p_holm"]] = np.nan

    macro = comparison.macro("strong")
    assert f"{macro['difference']:+.3f} [no interval]" in comparison.to_text()


def test_table_and_picture_are_written(runs, tmp_path):
    comparison = compare_runs(*runs, n_resamples=20)

    table, picture = write_comparison(comparison, tmp_path / "new" / "folder")

    read = pd.read_csv(table, keep_default_na=False, na_values=[""])
    assert tuple(read.columns) == COLUMNS
    assert len(read) == 2 * 2 * (len(runs[0].config["findings"]) + 1)
    np.testing.assert_allclose(read["difference"], comparison.table["difference"])
    with Image.open(picture) as image:
        assert image.size[0] == 1040
        assert len(image.convert("RGB").getcolors(10**6)) > 10
    assert sorted(path.name for path in table.parent.iterdir()) == [
        *("comparison.csv", "comparison.png")
    ]


# --- refusals ------------------------------------------------------------------------------------


def test_another_test_split_is_refused_naming_both_runs(runs, store, tmp_path):
    other = fit_run(store, tmp_path / "other", replace(QUICK, epochs=(1,), seed=7)).run

    with pytest.raises(
        RunError, match=r"was tested on \d+ images and .* \d+ are the same\. Only"
    ) as e:
        compare_runs(*runs, other)
    assert str(runs[0].path) in str(e.value)
    assert str(other.path) in str(e.value)


def test_other_targets_are_refused_naming_the_image(runs, tmp_path):
    copy = Run.open(shutil.copytree(runs[1].path, tmp_path / "copy"))
    table = copy.read_table("targets")
    finding = copy.config["findings"][0]
    first = read_test_split(copy)[0].index[0]
    row = table["image_id"] == first
    table.loc[row, finding] = 0.0 if table.loc[row, finding].item() == 1 else 1.0
    copy.write_table("targets", table)

    with pytest.raises(RunError, match=f"other targets for 1 of .* images, the first is '{first}'"):
        compare_runs(runs[0], copy)


def test_other_studies_of_the_same_images_are_refused(runs, tmp_path):
    copy = Run.open(shutil.copytree(runs[1].path, tmp_path / "copy"))
    copy.write_table("predictions", copy.read_table("predictions").assign(study_uid="one"))

    with pytest.raises(RunError, match="were tested on other studies for"):
        compare_runs(runs[0], copy)


def test_one_run_is_nothing_to_compare(runs):
    with pytest.raises(RunError, match="nothing to compare: give two runs or more"):
        compare_runs(runs[0])
    with pytest.raises(RunError, match="A run is given twice"):
        compare_runs(runs[0], Run.open(Path(runs[0].path)))


def test_runs_of_one_folder_name_are_told_apart_by_their_paths(runs, tmp_path):
    copy = Run.open(shutil.copytree(runs[0].path, tmp_path / runs[0].path.name))

    comparison = compare_runs(runs[0], copy, n_resamples=5)

    assert comparison.runs == (str(runs[0].path), str(copy.path))
