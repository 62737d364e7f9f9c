"""An ablation says what separate searches would, in one table, and goes on where it stopped."""

from __future__ import annotations

import re
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from cxr_cache.cli.main import cli
from cxr_cache.config import TrainConfig
from cxr_cache.datasets.splits import Split
from cxr_cache.errors import (
    ConfigError,
    RunError,
    StoreBusyError,
    StoreFormatError,
    TrainingError,
)
from cxr_cache.metrics.scores import auroc, macro_mean
from cxr_cache.models.run import Run
from cxr_cache.report.plots import draw_ablation, draw_curve
from cxr_cache.report.report import write_curve_page
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import load_training_data
from cxr_cache.training import ablation_folds as ablation_fit
from cxr_cache.training import baselines
from cxr_cache.training.ablate import Ablation, Row, Scored, Scores, make_settings, run_ablation
from cxr_cache.training.ablation_folds import draw_tasks
from cxr_cache.training.baselines import (
    BASELINES,
    Baseline,
    predict_logistic,
    predict_neighbours,
    predict_prevalence,
    train_logistic,
)
from cxr_cache.training.fit import PlainRows, fit_heads
from cxr_cache.training.search import Weighing, fold_tasks, search_epochs, split_cohort
from tests.synthetic import IMPORTED, QUICK, make_cohort, make_store

FOLDS = [f"fold_{k + 1}" for k in range(QUICK.n_folds)]
SETTINGS = make_settings(QUICK, ["lr=3e-3,3e-2", "input_norm=l2,standard"])
NEIGHBOURS = Baseline("nearest neighbours", "k", (3, 9), predict_neighbours)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    cohort = make_cohort(unlabelled=0.1)
    return make_store(tmp_path_factory.mktemp("store") / "tiny.h5", cohort, n_views=2)


def ablate(store: Path, out: Path, settings=SETTINGS, **options) -> Ablation:
    return run_ablation(
        store, out, settings, **{"baselines": [NEIGHBOURS], "n_workers": 1, **options}
    )


@pytest.fixture(scope="module")
def ablation(store, tmp_path_factory) -> Ablation:
    return ablate(store, tmp_path_factory.mktemp("out") / "ablation")


def load(store: Path, config=QUICK):
    with FeatureStore.open(store) as opened:
        return load_training_data(opened, config)


# --- The table ------------------------------------------------------------------------------------


def test_a_setting_scores_what_a_search_of_its_own_does(store, ablation):
    table = ablation.table.set_index("setting")
    for setting in SETTINGS:
        data = load(store, setting.config)
        search = search_epochs(data, split_cohort(data.cohort, setting.config), setting.config)
        best = search.table.set_index("epochs").loc[search.chosen]

        row = table.loc[setting.label]
        assert row["chosen"] == f"{search.chosen} ep"
        np.testing.assert_allclose(
            row[["mean_auroc", "std_auroc", *FOLDS]].astype(float),
            best[["mean_auroc", "std_auroc", *FOLDS]].astype(float),
            rtol=1e-5,  # the search stacks the folds in one bank
        )


def test_the_table_is_ranked_and_differences_are_to_the_first_setting(ablation):
    table = ablation.table

    assert list(table["rank"]) == list(range(1, len(SETTINGS) + 2))
    assert table["mean_auroc"].is_monotonic_decreasing
    assert set(table["kind"]) == {"head", "baseline"}
    first = table.set_index("setting").loc[SETTINGS[0].label]
    np.testing.assert_allclose(table["difference"], table["mean_auroc"] - first["mean_auroc"])
    assert (first["difference"], first["low"], first["high"]) == (0, 0, 0)
    others = table[table["setting"] != SETTINGS[0].label]
    assert ((others["low"] < others["difference"]) & (others["difference"] < others["high"])).all()
    assert (table["seconds"] > 0).all()
    assert ablation.best.label == table[table["kind"] == "head"]["setting"].iloc[0]


def test_heads_side_by_side_are_heads_trained_alone(store):
    """What a GPU would do, on the CPU: settings and folds in one bank, to 1e-5."""
    data = load(store)
    rows = PlainRows(data.embeddings, data.targets)
    draw = draw_tasks(split_cohort(data.cohort, QUICK), data.cohort.groups, QUICK.seed, None, 0)
    methods = [
        ablation_fit.Method.of_setting(setting, draw)
        for setting in make_settings(QUICK, ["lr=3e-3,3e-2", "loss=focal,weighted-bce"])
    ]
    pairs = [(method, k) for method in methods for k in range(QUICK.n_folds)]

    stacked = list(ablation_fit._train_stacked(rows, pairs))

    assert [(fold.key, fold.fold) for fold in stacked] == [(m.key, k) for m, k in pairs]
    for fold, (method, k) in zip(stacked, pairs, strict=True):
        alone = ablation_fit._fit_fold(rows.embeddings, rows.targets, method, k)
        np.testing.assert_allclose(fold.aurocs, alone.aurocs, rtol=1e-5)
        for ours, theirs in zip(fold.probabilities, alone.probabilities, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_text_and_plot_show_every_baseline(ablation, tmp_path):
    text = ablation.to_text(n_shown=1)

    assert "nearest neighbours" in text
    assert ablation.best.label in text
    assert "more in the table" in text
    assert draw_ablation(ablation.table, tmp_path / "plot.png").stat().st_size > 10_000


# --- Baselines ------------------------------------------------------------------------------------


def test_baselines_beat_chance_where_there_is_a_signal_and_prevalence_does_not(store):
    data = load(store)
    split = split_cohort(data.cohort, QUICK)
    scores = {}
    for baseline in BASELINES:
        train, held_out = split.trained_on(0), split.held_out(0)
        predictions = baseline.predict(
            data.embeddings[0, train],
            data.targets[train],
            data.embeddings[0, held_out],
            baseline.candidates,
        )
        assert len(predictions) == len(baseline.candidates)
        assert all(((p >= 0) & (p <= 1)).all() for p in predictions)
        scores[baseline.label] = max(
            float(macro_mean(auroc(data.targets[held_out], p))) for p in predictions
        )
    assert scores["prevalence"] == 0.5
    assert scores["logistic regression"] > 0.65
    assert scores["nearest neighbours"] > 0.6


def test_a_neighbour_without_a_label_does_not_vote():
    embeddings = np.array([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0]], np.float32)
    targets = np.array([[1.0, np.nan], [np.nan, np.nan], [0.0, 1.0]], np.float32)

    (votes,) = predict_neighbours(embeddings, targets, embeddings[:1], (2,))

    (share,) = predict_prevalence(embeddings, targets, embeddings[:1], (None,))
    np.testing.assert_allclose(votes[0], [(1 + share[0, 0]) / 2, share[0, 1]])


@pytest.mark.parametrize("seed", [0, 1])
def test_logistic_regressions_are_scikit_learns(seed):
    """All findings and strengths in one fit of shared products, some cells unlabelled."""
    rng = np.random.default_rng(seed)
    embeddings = rng.standard_normal((300, 12)).astype(np.float32) * rng.uniform(0.1, 5, 12)
    embeddings = embeddings.astype(np.float32)
    chance = 1 / (1 + np.exp(2 - embeddings @ rng.standard_normal((12, 3)) / 4))
    targets = (rng.random(chance.shape) < chance).astype(np.float32)
    targets[rng.random(targets.shape) < 0.1] = np.nan
    strengths = (1e-3, 1e-2, 1.0)

    ours = predict_logistic(embeddings, targets, embeddings[:50], strengths)

    x = StandardScaler().fit_transform(embeddings)
    for prediction, C in zip(ours, strengths, strict=True):
        for f in range(3):
            labelled = ~np.isnan(targets[:, f])
            theirs = LogisticRegression(C=C, tol=1e-8, max_iter=1000)
            theirs.fit(x[labelled], targets[labelled, f])
            expected = theirs.predict_proba(x[:50])[:, 1]
            np.testing.assert_allclose(prediction[:, f], expected, atol=2e-3)


def test_a_regression_beside_a_head_holds_one_copy_of_many_rows(monkeypatch):
    """One fold after the other; of few rows, which are fitted side by side, it finds the same."""
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((1, 20_000, 128), np.float32)
    targets = (rng.random((20_000, 2)) < 0.3).astype(np.float32)
    fold = rng.integers(-1, 2, 20_000)
    data, split = PlainRows(embeddings, targets), Split(fold == -1, fold)
    arguments = data, split, Weighing(np.ones(2), "macro AUROC"), TrainConfig()
    side_by_side = train_logistic(*arguments)
    monkeypatch.setattr(baselines, "_MUCH", 0)
    tracemalloc.start()
    one_by_one = train_logistic(*arguments)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * embeddings.nbytes
    np.testing.assert_array_equal(one_by_one.probabilities, side_by_side.probabilities)


def test_a_finding_of_one_class_keeps_its_prevalence():
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((40, 3)).astype(np.float32)
    targets = np.stack([np.zeros(40), rng.integers(0, 2, 40)], axis=1).astype(np.float32)

    (prediction,) = predict_logistic(embeddings, targets, embeddings[:5], (1.0,))

    assert (prediction[:, 0] == 0).all()
    assert len(np.unique(prediction[:, 1])) == 5


# --- Fewer training images ------------------------------------------------------------------------

AMOUNTS = make_settings(QUICK, ["n_train=8,50%,all"])


@pytest.fixture(scope="module")
def curve(store, tmp_path_factory) -> Ablation:
    return ablate(store, tmp_path_factory.mktemp("out") / "curve", AMOUNTS, n_repeats=2)


def draw(store: Path, n_train, repeat=0, groups=None):
    data = load(store)
    groups = data.cohort.groups if groups is None else groups
    return draw_tasks(split_cohort(data.cohort, QUICK), groups, QUICK.seed, n_train, repeat)


@pytest.mark.parametrize("repeat", range(3))
def test_a_fold_draws_whole_studies_of_its_own_training_part(store, repeat):
    groups, smaller = load(store).cohort.groups, draw(store, 8, repeat)
    half, whole = draw(store, 0.5, repeat), draw(store, None, repeat)
    plain = fold_tasks(split_cohort(load(store).cohort, QUICK), QUICK.seed)
    for few, some, task, as_ever in zip(smaller.tasks, half.tasks, whole.tasks, plain, strict=True):
        assert set(few.train_rows) < set(some.train_rows) < set(task.train_rows)
        left = np.setdiff1d(task.train_rows, some.train_rows)
        assert not set(groups[left]) & set(groups[some.train_rows])
        assert (len(few.train_rows), len(some.train_rows)) == (8, len(task.train_rows) // 2)
        for drawn in (few, some, task):
            np.testing.assert_array_equal(drawn.held_out_rows, as_ever.held_out_rows)
            assert (drawn.seed == as_ever.seed) == (repeat == 0)
        np.testing.assert_array_equal(task.train_rows, as_ever.train_rows)
    assert (whole.identity == {}) == (repeat == 0)


def test_repeats_draw_others_and_every_draw_has_a_key_of_its_own(store):
    draws = [draw(store, n, repeat) for n in (8, 0.5, None) for repeat in range(3)]
    methods = [ablation_fit.Method.of_setting(AMOUNTS[0], one) for one in draws]
    assert len({method.key for method in methods}) == len(draws)
    baselines = [ablation_fit.Method.of_baseline(NEIGHBOURS, QUICK, one) for one in draws]
    assert len({method.key for method in baselines}) == 7  # on all images they know no repeats
    by_image = draw(store, 8, groups=np.arange(len(load(store).cohort)))
    assert by_image.identity != draws[0].identity


def test_more_images_than_a_fold_has_are_refused_before_anything_is_written(store, tmp_path):
    settings = make_settings(QUICK, ["n_train=8,9000"])
    with pytest.raises(
        ConfigError, match=r"n_train=9000: fold . of 3 has 6\d images .*n_train=all"
    ):
        ablate(store, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_a_row_of_the_curve_is_a_training_on_the_drawn_images_alone(store, curve):
    """Fewer of them than a batch are no obstacle; and an epoch takes as many steps as ever."""
    data, drawn = load(store), [draw(store, 8, repeat) for repeat in range(2)]
    n_steps = draw(store, None).n_passed // QUICK.batch_size
    scores = np.empty((2, QUICK.n_folds, len(QUICK.epochs)))
    for r, of_repeat in enumerate(drawn):
        for k, task in enumerate(of_repeat.tasks):
            (head,) = fit_heads(data, [task], QUICK, n_epochs=6, keep=[6], n_steps=n_steps)
            scores[r, k] = [head.auroc_after(epochs) for epochs in QUICK.epochs]
    best = scores.mean(axis=1).max(axis=1)

    row = curve.curve.set_index(["setting", "n_train"]).loc[("as given", "8")]
    np.testing.assert_allclose(row[["repeat_1", "repeat_2"]].astype(float), best, rtol=1e-5)
    assert (row["images"], row["studies"], row["patients"]) == (8, 4, 0)
    np.testing.assert_allclose(
        [row["mean_auroc"], row["std_repeats"]], [best.mean(), best.std(ddof=1)], rtol=1e-5
    )
    assert row["findings_with_positive"] < row["findings_scored"] == len(data.cohort.findings)


def test_a_baseline_of_the_curve_reads_the_drawn_images_alone(store, curve):
    data, scores = load(store), []
    for task in draw(store, 0.5, 1).tasks:
        x, y, held_out = data.embeddings[0], data.targets, task.held_out_rows
        rows = task.train_rows
        predictions = NEIGHBOURS.predict(x[rows], y[rows], x[held_out], NEIGHBOURS.candidates)
        scores.append([float(macro_mean(auroc(y[held_out], p))) for p in predictions])
    row = curve.curve.set_index(["setting", "n_train"]).loc[("nearest neighbours", "50%")]
    np.testing.assert_allclose(row["repeat_2"], np.mean(scores, axis=0).max())


def test_on_all_images_the_tables_say_what_they_say_without_a_curve(store, curve, tmp_path):
    plain = ablate(store, tmp_path / "a", make_settings(QUICK, []), n_repeats=2)

    untimed = [name for name in plain.table if name != "seconds"]
    pd.testing.assert_frame_equal(curve.table[untimed], plain.table[untimed])
    assert plain.curve is None
    assert plain.best == AMOUNTS[-1]
    whole = curve.curve[curve.curve["n_train"] == "all"].set_index("setting")["mean_auroc"]
    ranked = curve.table.set_index("setting")["mean_auroc"]
    assert whole.to_dict() == pytest.approx(ranked.to_dict())
    once = ablate(store, tmp_path / "b", make_settings(QUICK, []))
    assert "over repeats" in plain.to_text()
    assert "repeats" not in once.to_text()
    assert not (tmp_path / "b" / "curve.csv").exists()


def test_the_curve_compares_each_setting_with_itself_on_the_most_images(curve):
    for _, rows in curve.curve.groupby("setting"):
        assert list(rows["n_train"]) == ["8", "50%", "all"]
        assert len(set(rows["findings_scored"])) == 1
        most, others = rows.iloc[-1], rows.iloc[:-1]
        np.testing.assert_allclose(rows["difference"], rows["mean_auroc"] - most["mean_auroc"])
        assert (most["low"], most["high"]) == (0, 0)
        assert (others["low"] < others["difference"]).all()
        assert (others["difference"] < others["high"]).all()


def test_the_spread_over_repeats_is_part_of_the_interval(store):
    """Where images tell nothing of the error, it is the paired t interval over repeats."""
    cohort = load(store).cohort
    aurocs = np.random.default_rng(0).random((2, 5, 3))
    ours, theirs = (
        Scored("", of_model, np.zeros(cohort.targets.shape), 0.0) for of_model in aurocs
    )
    scores = Scores(ablation_fit.Results(Path(), 3), cohort, split_cohort(cohort, QUICK))

    found = scores._compare(ours, theirs)

    by_repeat = (aurocs[0] - aurocs[1]).mean(axis=1)
    expected = stats.ttest_1samp(by_repeat, 0).confidence_interval()
    np.testing.assert_allclose([found["low"], found["high"]], expected)


def test_the_curve_counts_the_findings_that_count_in_its_scores(store):
    cohort = load(store).cohort
    split = split_cohort(cohort, QUICK)
    weighing = Weighing(np.eye(len(cohort.findings))[0], "the AUROC of the first finding")
    draw = draw_tasks(split, cohort.groups, QUICK.seed, 8, 0, weighing)
    method = ablation_fit.Method.of_setting(SETTINGS[0], draw)

    counted = Scores(ablation_fit.Results(Path(), 3), cohort, split)._count_drawn(
        Row("as given", 8, 8.0, [method])
    )

    folds = [set(cohort.targets[split.held_out(k), 0]) >= {0, 1} for k in range(3)]
    assert counted["findings_scored"] == np.mean(folds) > 0
    assert counted["findings_with_positive"] <= counted["findings_scored"]


def test_of_studies_studies_are_counted(store, tmp_path):
    base = replace(QUICK, level="study", batch_size=8)
    found = ablate(store, tmp_path / "a", make_settings(base, ["n_train=6,all"]), baselines=[])

    assert found.curve["studies"].tolist()[0] == 6
    assert "images" not in found.curve
    assert "n_train counts studies, of whole patients" in found.to_text()
    assert draw_curve(found.curve, tmp_path / "curve.png").exists()
    with pytest.raises(ConfigError, match=r"of 3 has 3\d studies to train on, fewer than that"):
        ablate(store, tmp_path / "b", make_settings(base, ["n_train=60"]))


def test_text_and_plot_of_a_curve(curve, tmp_path):
    said = curve.to_text()

    heading = next(line for line in said.splitlines() if line.startswith("setting"))
    assert " findings with a positive " in heading
    assert heading.endswith("difference to all")
    assert "n_train counts images, of whole patients (or studies)" in said
    assert draw_curve(curve.curve, tmp_path / "curve.png").stat().st_size > 10_000


def test_the_page_of_a_curve_has_its_rows_and_a_verdict(curve, store, tmp_path):
    page = write_curve_page(curve, store, tmp_path / "curve.html").read_text()

    text = " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S).split())
    assert "how many labelled images, with imported features" in text
    assert "cannot be told from that on all" in text or "More labels still help" in text
    for row in curve.curve.to_dict("records"):
        shown = f"{row['setting']} {row['n_train']} {row['images']:,.0f}"
        assert shown in text
        assert f"{row['mean_auroc']:.3f}" in text
    assert "script" not in page.split("</style>")[1]
    assert f"{len(curve.notes)} note" in text


def test_a_point_that_is_best_at_the_fewest_epochs_asks_for_fewer(store, tmp_path):
    settings = make_settings(replace(QUICK, epochs=(40,)), ["n_train=50%"])
    (note,) = [n for n in ablate(store, tmp_path / "a", settings).notes if "epochs" in n]
    assert note.startswith("1 row of the curve is best at the smallest number of epochs")


def test_an_interrupted_curve_goes_on_and_further_numbers_are_added(store, curve, tmp_path):
    calls: list[tuple[int, int]] = []

    def stop_midway(*call: int) -> None:
        calls.append(call)
        if call[0] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablate(store, tmp_path / "a", AMOUNTS, n_repeats=2, on_progress=stop_midway)
    calls.clear()
    ablate(store, tmp_path / "a", AMOUNTS[1:], n_repeats=1, on_progress=lambda *c: calls.append(c))
    again = ablate(
        store, tmp_path / "a", AMOUNTS, n_repeats=2, on_progress=lambda *c: calls.append(c)
    )

    assert calls[-1] == (33, 33)  # three folds of 3 x 2 heads, and of 2 x 2 + 1 baselines
    assert calls[0][0] < 10  # of what is asked for now
    untimed = [name for name in again.curve if name != "seconds"]
    pd.testing.assert_frame_equal(again.curve[untimed], curve.curve[untimed])
    written = pd.read_csv(tmp_path / "a" / "curve.csv", dtype={"n_train": str})
    np.testing.assert_allclose(written["mean_auroc"], curve.curve["mean_auroc"], rtol=1e-5)


# --- Going on -------------------------------------------------------------------------------------


def test_an_interrupted_ablation_goes_on_and_says_the_same(store, ablation, tmp_path):
    calls: list[tuple[int, int]] = []

    def stop_midway(*call: int) -> None:
        calls.append(call)
        if call[0] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablate(store, tmp_path / "a", on_progress=stop_midway)
    calls.clear()
    again = ablate(store, tmp_path / "a", on_progress=lambda *call: calls.append(call))

    assert calls[0] == (7, 15)
    assert calls[-1] == (15, 15)
    untimed = [name for name in again.table if name != "seconds"]
    pd.testing.assert_frame_equal(again.table[untimed], ablation.table[untimed])


def test_a_finished_ablation_is_read_and_further_settings_are_added(
    store, ablation, tmp_path, monkeypatch
):
    ablate(store, tmp_path / "a", SETTINGS[:2])
    trained = []
    monkeypatch.setattr(
        "cxr_cache.training.ablate.train_folds",
        lambda rows, missing, **options: (
            trained.append(len(missing)) or ablation_fit.train_folds(rows, missing, **options)
        ),
    )

    whole = ablate(store, tmp_path / "a", SETTINGS)
    again = ablate(store, tmp_path / "a", SETTINGS)

    assert sum(trained) == 2 * QUICK.n_folds
    pd.testing.assert_frame_equal(again.table, whole.table)
    written = pd.read_csv(tmp_path / "a" / "ablation.csv")
    np.testing.assert_allclose(written["mean_auroc"], whole.table["mean_auroc"], rtol=1e-5)


def test_a_second_writer_into_the_folder_is_refused(store, tmp_path):
    """Two jobs of an array with one --out: the second is told so, and changes nothing."""
    first = ablation_fit.Results.open(tmp_path / "out", {"data": "its own"}, 3)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with ThreadPoolExecutor(1) as thread, pytest.raises(StoreBusyError, match="is being written"):
        thread.submit(ablation_fit.Results.open, tmp_path / "out", {"data": "its own"}, 3).result()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    del first
    assert not (tmp_path / "out" / ".lock").exists()


def test_another_store_or_another_split_is_refused(store, tmp_path):
    ablate(store, tmp_path / "a", SETTINGS[:1], baselines=[])
    other = make_store(tmp_path / "other.h5", make_cohort(seed=5))
    split = make_settings(replace(QUICK, seed=3), [])

    with pytest.raises(RunError, match=r"(?s)ablation of other data .*in the|now.*--out"):
        ablate(other, tmp_path / "a", SETTINGS[:1])
    with pytest.raises(RunError, match="split_sha256"):
        ablate(store, tmp_path / "a", split)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        ablate(store, tmp_path / "full", SETTINGS[:1])


def test_features_that_the_store_lacks_are_named(store, tmp_path):
    with pytest.raises(StoreFormatError, match="holds no 'pooled', which --features pooled reads"):
        ablate(store, tmp_path / "a", make_settings(QUICK, ["features=pooled"]))


# --- Command line ---------------------------------------------------------------------------------


def test_names_of_images_may_be_of_any_alphabet(tmp_path):
    cohort = make_cohort(20)
    image_ids = cohort.image_ids.astype("<U12")
    image_ids[0] = "größe 胸.png"
    path = make_store(tmp_path / "s.h5", cohort.assign(image_id=image_ids))
    assert len(ablate(path, tmp_path / "out", SETTINGS[:1], baselines=[]).table) == 1


def test_features_that_are_not_there_are_missed_before_anything_is_trained(store, tmp_path):
    settings = make_settings(QUICK, ["features=projected,pooled"])
    with pytest.raises(StoreFormatError, match="holds no 'pooled'"):
        ablate(store, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_a_setting_that_diverges_is_named(store, tmp_path):
    settings = make_settings(QUICK, ["lr=3e-3,1e38"])
    with pytest.raises(TrainingError, match=r"Setting lr=1e38: .*finite.*leave this one out of"):
        ablate(store, tmp_path / "out", settings, baselines=[])


def test_the_command_warns_of_random_weights_and_refits_on_as_many_cores(tmp_path):
    path = make_store(tmp_path / "s.h5", make_cohort(40), encoder=IMPORTED | {"is_random": True})
    arguments = ["ablate", path, "--out", tmp_path / "out", "--set", "batch_size=16"]
    arguments += ["--epochs", 1, "--folds", 2, "--workers", 1, "--no-baselines", "--refit"]
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "This encoder has RANDOM WEIGHTS" in result.output
    assert Run.open(tmp_path / "out" / "best").config["train"]["n_jobs"] == 1


def test_the_command_ranks_and_refits(store, tmp_path):
    out = tmp_path / "a"
    arguments = ["ablate", store, "--out", out, "--epochs", "2,4", "--folds", "3", "--workers", "1"]
    values = ["--set", "lr=3e-3,3e-2", "--set", "hidden=12x8", "--set", "batch_size=16"]

    result = CliRunner().invoke(cli, [*map(str, [*arguments, *values]), "--refit"])

    assert result.exit_code == 0, result.output
    assert "logistic regression" in result.output
    assert (out / "ablation.png").exists()
    assert (out / "best" / "metrics.json").exists()
    wrong = CliRunner().invoke(cli, [*map(str, arguments), "--set", "lr=fast"])
    assert (wrong.exit_code, "'fast' is not a value" in wrong.output) == (1, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "package"), [("loky", "joblib"), ("dask", "distributed"), ("ray", "ray")]
)
def test_processes_and_clusters_say_the_same(store, ablation, tmp_path, backend, package):
    pytest.importorskip(package)

    spread = ablate(store, tmp_path / "a", backend=backend, n_workers=2)

    untimed = [name for name in spread.table if name != "seconds"]
    pd.testing.assert_frame_equal(spread.table[untimed], ablation.table[untimed])
    shutil.rmtree(tmp_path / "a")
