"""The model card is one that the Hugging Face Hub reads, and says what the run says."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard

from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.models.run import Run
from cxr_cache.report.model_card import render_card
from cxr_cache.report.views import RunView, read_view
from tests.evaluation.test_evaluate import make_run
from tests.report.test_report import copy_run, keep_zero_shot


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = make_run(tmp_path_factory.mktemp("card") / "run")
    score_run(run, n_resamples=50)
    return run


@pytest.fixture
def view(run) -> RunView:
    return read_view(run)


def test_the_header_is_yaml_in_the_form_of_the_hub(run, view):
    text = render_card(view, license_id="cc-by-nc-4.0", dataset_id="me/chest")

    _, header, body = text.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["license"] == "cc-by-nc-4.0"
    assert fields["datasets"] == ["me/chest"]
    assert fields["pipeline_tag"] == "image-classification"
    assert "chest-x-ray" in fields["tags"]
    (result,) = fields["model-index"][0]["results"]
    shown = {metric["name"]: metric for metric in result["metrics"]}
    test = run.read_metrics()["test"]
    for name, key in (("macro AUROC", "macro_auroc"), ("label accuracy", "label_accuracy")):
        assert shown[name]["value"] == pytest.approx(test[key]["value"], abs=5e-5)
        assert shown[name]["args"]["interval_low"] == pytest.approx(test[key]["low"], abs=5e-5)
    assert body.lstrip().startswith("# run\n")


def test_a_measure_that_came_after_the_evaluation_is_shown_without_a_value(run, tmp_path):
    """Whoever adds a measure keeps the pages and cards of older runs."""
    older = copy_run(run, tmp_path / "older")
    metrics = older.read_metrics()
    for name in ("auroc", "brier"):
        del metrics["test"][f"macro_{name}"]
    (older.path / "metrics.json").write_text(json.dumps(metrics))

    text = render_card(read_view(older))

    assert "| macro AUROC | \N{EN DASH} |" in text
    assert "| macro Brier score | \N{EN DASH} |" in text
    assert "AUROC" not in text.split("---\n")[1]  # the hub gets figures only


def test_the_hub_reads_it_back(view):
    card = ModelCard(render_card(view))

    assert card.data.license == "unknown"
    assert card.data.datasets is None  # a data set called unknown would be another one
    assert {result.metric_type for result in card.data.eval_results} == {
        "roc_auc", "average_precision", "f1", "accuracy",
    }  # fmt: skip
    assert card.data.model_name == "run"


def test_the_body_holds_data_metrics_use_and_limits(run, view):
    text = render_card(view)

    for heading in ("Intended use", "Data", "Metrics", "Limits", "Training"):
        assert f"\n## {heading}\n" in text
    assert "Not for clinical use" in text
    assert "Not scored, without a positive or a negative in test: Bronchiolitis." in text
    nothing = 100 * run.read_metrics()["test"]["label_accuracy_all_negative"]["value"]
    assert f"predicting nothing {nothing:.1f}" in text
    for row in run.read_table("per_finding").itertuples():
        assert f"| {row.finding} | {row.n_positive_test} |" in text
    assert "None" not in text
    assert "nan" not in text.lower().split()


def test_zero_shot_has_its_line_where_it_was_scored(run, tmp_path):
    copy = copy_run(run, tmp_path / "run")
    macro = keep_zero_shot(copy).loc["macro"]

    line = f"(zero-shot), 5 findings | {macro['zero_shot']:.3f} ("
    assert line in render_card(read_view(copy))
    assert "zero-shot" not in render_card(read_view(run))


def test_a_name_cannot_break_a_table(view):
    odd = "a|b\n<script>"
    view.per_finding[odd] = view.per_finding.pop("Nodule")

    lines = render_card(view).splitlines()

    (line,) = (line for line in lines if "script" in line)
    assert line.startswith(r"| a\|b \<script\> |")


def test_the_encoder_of_the_hub_is_the_base_model(run):
    store = {"path": "f.h5", "encoder": {"name": "hf-hub:microsoft/BiomedCLIP"}}
    view = read_view(Run(run.path, {**run.config, "store": store, "random_encoder": True}))

    card = ModelCard(render_card(view))

    assert card.data.base_model == "microsoft/BiomedCLIP"
    assert "The encoder has random weights." in card.text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"reading": {"format": "nih"}}, "by a program, not from the images. A model is scored on"),
        ({"reading": {"format": "vindr"}}, "are those of radiologists who looked at the images."),
        ({"reading": {"format": "table"}}, "those of your own table, and nothing is known here"),
        # A table given with --labels replaces those of the data set.
        ({"reading": {"format": "nih"}, "labels": {"file": "mine.csv"}}, "your own table"),
    ],
)
def test_how_labels_were_made_is_told_from_the_data_set(view, config, said):
    assert said in render_card(replace(view, config=view.config | config))


def test_the_epochs_of_the_final_model_are_those_that_it_was_trained_for(view):
    stopping = {**view.config["train"], "early_stopping": 3}
    history = pd.DataFrame(
        {
            "fold": ["1"] * 3 + ["2"] * 5 + ["final"] * 4,
            "epoch": [*range(1, 4), *range(1, 6), 1, 2, 3, 4],
        }
    )
    config = view.config | {"train": stopping, "chosen_epochs": 4}
    view = replace(view, config=config, tables=view.tables | {"history": history})
    ensemble = replace(view, tables={"history": history[history["fold"] != "final"]})

    assert "epochs of the final model: 4, by early stopping (4 were chosen)" in render_card(view)
    assert ensemble.final_epochs == "at most 4; by early stopping the folds' models have 3, 4"
