"""What a page says first: titles, verdicts and whose split, in words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.report.headline import (
    describe_dates,
    describe_split,
    find_leak,
    judge,
    judge_curve,
    judge_differences,
    title_data_set,
    title_encoder,
    title_page,
)
from cxr_cache.report.views import RunView, read_view
from tests.evaluation.test_evaluate import make_run


@pytest.fixture(scope="module")
def view(tmp_path_factory) -> RunView:
    run = make_run(tmp_path_factory.mktemp("headline") / "run")
    score_run(run, n_resamples=20)
    return read_view(run)


def with_config(view: RunView, **config: object) -> RunView:
    return replace(view, config={**view.config, **config})


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("hf-hub:microsoft/rad-dino@0123abc", "rad-dino"),
        ("hf-hub:facebook/dinov2-small?img_size=518", "dinov2-small"),
        ("local-dir:/models/mine/", "mine"),
        ("imported:m.npz", "imported features (m.npz)"),
        ("random:test_vit:0", "random weights (test_vit)"),
        ("ViT-B-16", "ViT-B-16"),
    ],
)
def test_an_encoder_has_a_short_title(name, title):
    assert title_encoder(name) == title


def test_a_page_is_called_by_data_set_and_encoder(view):
    assert title_data_set("nih", "a.h5") == "NIH ChestX-ray14"
    assert title_data_set("table", "features/mine.h5") == "Own data (mine)"
    assert title_page([view]) == ("Own data (features)", "with tiny")
    store = {"path": "x.h5", "encoder": {"name": "hf-hub:microsoft/rad-dino"}}
    other = with_config(view, reading={"format": "indiana"}, store=store)
    assert title_page([other]) == ("Indiana University chest X-rays", "with rad-dino")
    assert title_page([other, view])[1] == "2 runs compared: rad-dino against tiny"
    assert title_page([other, other])[1] == "2 runs with rad-dino"
    tuned = with_config(other, kind="finetune")
    assert title_page([tuned])[1] == "with fine-tuned rad-dino"


@pytest.mark.parametrize(
    ("value", "low", "high", "side", "sentence"),
    [
        (0.76, 0.74, 0.79, "better", "Better than guessing: an image with a finding gets a higher"),
        (0.51, 0.45, 0.57, "unclear", "Cannot be told from guessing: an image"),
        (0.4, 0.35, 0.45, "worse", "Worse than guessing: an image"),
        (0.76, None, None, "unknown", "No verdict without an interval: an image"),
        (None, None, None, "unknown", "No verdict: no finding has both positives and negatives"),
    ],
)
def test_the_verdict_is_a_sentence(view, value, low, high, side, sentence):
    entry = {"value": value, "low": low, "high": high}
    metrics = view.metrics | {"test": view.metrics["test"] | {"macro_auroc": entry}}

    found = judge(replace(view, metrics=metrics))

    assert found["side"] == side
    assert found["sentence"].startswith(sentence)
    if low is not None:
        pairs = f"{100 * value:.0f} times in 100 ({100 * low:.0f} to {100 * high:.0f})"
        assert f"than one without it {pairs}, where guessing gets 50." in found["sentence"]


def test_findings_are_counted_by_what_their_intervals_say(view):
    row = view.judged[0]
    bounds = [(0.6, 0.8), (0.6, 0.9), (0.2, 0.4), (0.4, 0.6)]
    rows = {
        str(k): {**row, "finding": str(k), "auroc_low": low, "auroc_high": high}
        for k, (low, high) in enumerate(bounds)
    }
    few = {**row, "finding": "few", "is_few": True}

    said = judge(replace(view, per_finding=rows | {"few": few}))["more"]

    assert said == (
        "Of the 4 findings that can be judged, 2 are better than guessing, 1 is worse, "
        "1 cannot be told from it."
    )
    none = judge(replace(view, per_finding={"few": few}))["more"]
    assert none == "No finding has enough positives in the test to be judged by itself."


def difference(value: float, low: float | None, high: float | None, p: float = 0.5) -> dict:
    return {"difference": value, "low": low, "high": high, "p_holm": p}


@pytest.mark.parametrize(
    ("row", "side", "words"),
    [
        (difference(0.02, 0.01, 0.03), "better", "b is better than a: of 100 pairs"),
        (difference(-0.02, -0.03, -0.01), "worse", "ranks 2.0 fewer the right way (1.0 to 3.0)."),
        (difference(-0.02, -0.05, 0.01), "unclear", "2.0 fewer the right way (-1.0 to 5.0)."),
        (difference(0.02, None, None), "unknown", "No verdict without an interval: b and a differ"),
    ],
)
def test_a_comparison_says_which_is_better_and_by_how_much(view, row, side, words):
    views = [replace(view, name="a"), replace(view, name="b")]
    rows = {"": row, "Mass": difference(0.1, 0.05, 0.2, 0.01), "Hernia": difference(0, -1, 1)}

    found = judge_differences(views, {"b": {"auroc": rows}})

    assert found["side"] == side
    assert words in found["sentence"]
    assert found["more"] == (
        "Of the 2 findings compared, 1 is better with b and none is worse, beyond luck."
    )


def test_of_several_runs_each_is_named_on_its_side(view):
    views = [replace(view, name=name) for name in "abcd"]
    rows = {
        "b": {"auroc": {"": difference(0.1, 0.05, 0.2, 0.01)}},
        "c": {"auroc": {"": difference(-0.1, -0.2, -0.05, 0.01)}},
        "d": {"auroc": {"": difference(0.1, 0.02, 0.2, 0.01)}},
    }

    assert judge_differences(views, rows)["sentence"] == (
        "Beside a, by their mean AUROC: b, d are better; c is worse."
    )
    rows["d"] = {"auroc": {"": difference(0.1, 0.005, 0.2, 0.06)}}  # corrected for three
    assert judge_differences(views, rows)["sentence"] == (
        "Beside a, by their mean AUROC: b is better; d is not to be told from a; c is worse."
    )


def test_whose_split_it_is_and_whether_it_leaks(view):
    assert describe_split(view) == "made here, whole patients or studies"
    assert find_leak(view) == ""
    given = {"whose": "the data set", "n_shared": 2, "unit": "patient"}
    shared = with_config(view, split=given)
    assert describe_split(shared) == "given by the data set"
    assert find_leak(shared) == "2 patients on both sides of the split"
    by_image = with_config(view, train={**view.config["train"], "split_by": "image"})
    assert describe_split(by_image) == "made here, by single image"
    assert "images of one study may be on both sides" in find_leak(by_image)


def test_dates_are_those_of_the_manifest(tmp_path):
    run = make_run(tmp_path / "run")
    score_run(run, n_resamples=0)
    assert describe_dates(read_view(run)) == "run"  # called from Python
    entries = [
        {"command": "train", "started": "2026-11-02T21:41:54.905+00:00"},
        {"command": "report", "started": "2026-11-03T21:41:54.905+00:00"},
        {"command": "evaluate", "started": "2026-12-24T08:00:00.000+00:00"},
        {"command": "evaluate", "started": "2026-12-31T08:00:00.000+00:00"},
    ]
    (run.path / "manifest.json").write_text(json.dumps(entries))

    said = describe_dates(read_view(run))

    assert said == "run, trained 2 November 2026, evaluated 31 December 2026"


@pytest.mark.parametrize(
    ("bounds", "side", "sentence"),
    [
        (
            [(-0.2, -0.3, -0.1), (-0.1, -0.2, -0.05)],
            "better",
            "More labels still help: on 100 images the mean AUROC is 0.100 lower than on "
            "all 1,000 images (0.050 to 0.200).",
        ),
        (
            [(-0.2, -0.3, -0.1), (-0.01, -0.05, 0.03)],
            "unclear",
            "The mean AUROC on 100 images cannot be told from that on all 1,000 images: the "
            "difference is -0.010 (-0.050 to +0.030).",
        ),
        (
            [(0.0, -0.1, 0.1), (-0.1, -0.2, -0.05)],  # luck at the smallest number is not enough
            "better",
            "More labels still help",
        ),
        ([(-0.2, None, None), (-0.1, None, None)], "unknown", "No verdict without intervals."),
        ([], "unknown", "One number of images is no curve."),
    ],
)
def test_a_learning_curve_says_whether_more_labels_help(bounds, side, sentence):
    counts = [10, 100][-len(bounds) :]
    rows = [
        {"n_train": str(n), "images": n, "difference": value, "low": low, "high": high}
        for n, (value, low, high) in zip(counts, bounds, strict=bool(bounds))
    ]
    whole = {"n_train": "all", "images": 1000, "difference": 0.0, "low": 0.0, "high": 0.0}

    found = judge_curve([{**row, "setting": "as given"} for row in [*rows, whole]], "images")

    assert found["side"] == side
    assert found["sentence"].startswith(sentence)
