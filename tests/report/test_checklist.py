"""The checklists hold all items, facts that the run knows, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.models.run import Run
from cxr_cache.report.checklist import (
    CHECKLISTS,
    TO_BE_WRITTEN,
    fill_checklist,
    render_checklists,
)
from cxr_cache.report.facts import FACTS
from cxr_cache.report.report import write_report
from cxr_cache.report.views import RunView, read_view
from cxr_cache.training.train import fit_run
from tests.evaluation.test_evaluate import make_run
from tests.synthetic import QUICK, make_cohort, make_store


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> RunView:
    """A run of before: without flow, split, label codes or most options."""
    run = make_run(tmp_path_factory.mktemp("bare") / "run")
    score_run(run, n_resamples=20)
    return read_view(run)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run of now, with every fact that a training leaves."""
    folder = tmp_path_factory.mktemp("checklist")
    cohort = make_cohort(60, unlabelled=0.1)
    cohort = cohort.assign(
        sex=["F", "F", "M", "M"] * 30, age=[str(30 + i // 2) for i in range(120)]
    )
    store = make_store(folder / "features.h5", cohort)
    fit_run(store, folder / "run", QUICK)
    run = Run.open(folder / "run")
    score_run(run, n_resamples=20, calibration="platt-shrunk")
    return run


def test_all_items_are_there_and_every_fact_has_a_place(bare):
    claim, tripod = (fill_checklist(bare, name) for name in CHECKLISTS)
    assert [item.number for item in claim] == [str(n) for n in range(1, 45)]
    assert len(tripod) == 52
    assert list(dict.fromkeys(int(re.match(r"\d+", item.number)[0]) for item in tripod)) == list(
        range(1, 28)
    )
    folder = Path(__file__).parents[2] / "cxr_cache" / "report" / "checklists"
    rows = [line for path in folder.glob("*.csv") for line in path.read_text().splitlines()[1:]]
    named = {word for row in rows for word in re.split(r"[, ]", row)} & FACTS.keys()
    assert named == FACTS.keys()


@pytest.mark.parametrize("name", FACTS)
def test_a_fact_is_a_sentence_or_unknown_and_holds_no_gap(name, bare, run):
    for view in (bare, read_view(run)):
        fact = FACTS[name](view)
        assert fact is None or fact.endswith("."), fact
        assert not re.search(r"None|nan|\{|\}|\d\.0 (image|stud|patient)", fact or ""), fact


def test_what_a_run_does_not_know_is_left_to_the_authors(bare):
    """An old run: whatever it does not say is marked, not filled with a default."""
    for name in ("flow", "exclusions", "disjoint", "partition", "label_source", "preprocessing"):
        assert FACTS[name](bare) is None, name
    claim = {item.number: item for item in fill_checklist(bare, "claim2024")}
    assert claim["35"].facts == ()
    assert claim["44"].facts == ()
    text = render_checklists(bare)
    assert (
        f"| 44 | Other information | Funding, and what the funders did | *{TO_BE_WRITTEN}.* |"
        in text
    )


def test_facts_are_those_of_the_runs_own_files(run, bare):
    view = read_view(run)
    metrics = run.metrics
    area = metrics["test"]["macro_auroc"]
    assert f"macro AUROC {area['value']:.3f} ({area['low']:.3f} to {area['high']:.3f})" in (
        FACTS["performance"](view)
    )
    flow = run.read_table("flow")
    n_test = int(flow.loc[flow["what"] == "test", "images"].item())
    assert f"test {n_test} images" in FACTS["flow"](view)
    per_finding = run.read_table("per_finding")
    missed = int(per_finding["fn"].sum())
    assert f"{missed} positives were missed" in FACTS["failures"](view)
    assert FACTS["selection"](view).startswith(f"{run.config['chosen_epochs']} epochs of 2, 4, 6")
    assert FACTS["ensembling"](view).startswith("No ensemble: one model is trained again")
    assert "6 of 6 findings are unlabelled in some images" in FACTS["missing_labels"](view)
    assert "Sex F:" in FACTS["people"](view)
    assert "projection Lateral minus Frontal: mean AUROC" in FACTS["groups"](bare)
    assert FACTS["test_reads"](view).startswith("This test split has been read once by 1 run.")


def test_the_command_prints_or_writes_and_names_both_sources(run, tmp_path):
    invoke = CliRunner().invoke
    shown = invoke(cli, ["checklist", str(run.path)])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == render_checklists(read_view(run))
    assert "https://doi.org/10.1148/ryai.240300" in shown.stdout
    assert "BMJ 2024;385:e078378" in shown.stdout
    table = [line for line in shown.stdout.splitlines() if line.startswith("| ")]
    assert {line.count(" | ") for line in table} == {3}, "no cell breaks its table"
    out = tmp_path / "checklists.md"
    written = invoke(cli, ["checklist", str(run.path), "--out", str(out)])
    assert written.stdout == f"{out} written\n"
    assert out.read_text() == shown.stdout
    nowhere = invoke(cli, ["checklist", str(tmp_path)])
    assert nowhere.exit_code == 1
    assert "is not a run folder" in nowhere.stderr


def test_page_and_card_show_flow_people_missing_labels_and_readings(run):
    page = re.sub(r"<[^>]+>", " ", write_report(run).read_text())
    page, card = " ".join(page.split()), run.read_model_card()
    for text in (
        "Images to train and test on: 120 images, 60 studies",
        "6 of 6 findings are unlabelled in some images",
        "Missing labels, finding by finding",
        "Age at the study in years",
        "This test split has been read once by 1 run.",
    ):
        assert text in page, text
    for text in (
        "* 120 images, 60 studies: images to train and test on",
        "| sex F |",
        "Missing labels: 6 of 6 findings",
        "| finding | unlabelled in train | unlabelled in test |",
        "* This test split has been read once by 1 run.",
        "Differences between groups:",
    ):
        assert text in card, text
    assert "\n\n\n" not in card
