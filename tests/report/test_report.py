"""The page of a run: one file, nothing fetched, nothing hidden."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_cache.datasets.labels import FINDINGS
from cxr_cache.encoders.text import PromptPair
from cxr_cache.errors import ConfigError, RunError
from cxr_cache.evaluation.compare import compare_runs
from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.evaluation.scored import read_scored
from cxr_cache.evaluation.zero_shot import name_prompts, tabulate_areas
from cxr_cache.jobs import scoring as jobs
from cxr_cache.metrics.paired import ScoredRows, score_jointly
from cxr_cache.models.run import Run
from cxr_cache.report.model_card import read_card, render_card
from cxr_cache.report.page import render_page
from cxr_cache.report.plots import PLOTS, draw_class_distribution, draw_plots
from cxr_cache.report.report import write_joint_report, write_report
from cxr_cache.report.views import (
    MIN_POINTS,
    POINTS_OF_ALL_CURVES,
    collect_charts,
    collect_differences,
    read_view,
)
from tests.evaluation.test_evaluate import make_run

FIGURES_OF_0_1 = (
    *("macro_auroc", "macro_ap", "macro_prevalence", "macro_f1", "micro_f1", "macro_brier"),
    *("macro_balanced_accuracy", "macro_log_loss", "macro_calibration_error"),
    *("label_accuracy", "label_accuracy_all_negative", "label_accuracy_gain"),
    *("exact_match", "exact_match_all_negative"),
)


class Page(HTMLParser):
    """What a browser would see without running anything: texts, references, blocks of data."""

    VOID = frozenset({"meta", "img", "br", "link", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.references: list[str] = []
        self.ids: set[str] = set()
        self.tags: list[str] = []
        self.policy = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        if "id" in values:
            self.ids.add(values["id"])
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        self.references += [values[key] for key in ("href", "src", "srcset") if key in values]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> dict:
        """What the page's program reads."""
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Run:
    run = make_run(tmp_path_factory.mktemp("report") / "run")
    score_run(run, n_resamples=50)
    return run


@pytest.fixture(scope="module")
def page(evaluated) -> Page:
    return Page(write_report(evaluated).read_text())


def render(run: Run, **config: object) -> Page:
    """The page of the same run, had its configuration been another."""
    return Page(render_page([read_view(Run(run.path, {**run.config, **config}))]))


def make_rival(run: Run, path: Path) -> Run:
    """A run on the same split whose model is another one."""
    rival = make_run(path)
    predictions = rival.read_table("predictions")
    noise = np.random.default_rng(1).random((len(predictions), len(run.config["findings"])))
    predictions[run.config["findings"]] = (
        0.5 * predictions[run.config["findings"]] + 0.5 * noise
    ).round(4)
    rival.write_table("predictions", predictions)
    score_run(rival, n_resamples=50)
    return rival


def keep_zero_shot(run: Run, without: tuple[str, ...] = ()) -> pd.DataFrame:
    """The table of `zero-shot` in an evaluated run's folder, had the prompts told nothing."""
    images = read_scored(run)
    chosen = [f for f, finding in enumerate(images.findings) if finding not in without]
    rows, targets = np.arange(len(images)), images.targets[:, chosen]
    noise = np.random.default_rng(2).random(targets.shape)
    models = {
        "zero_shot": ScoredRows(rows, targets, noise),
        "run": ScoredRows(rows, targets, images.probabilities[:, chosen]),
    }
    areas = score_jointly(models, images.study_uids, n_resamples=50)
    areas["difference"] = areas["run"].minus(areas["zero_shot"])
    names = [images.findings[f] for f in chosen]
    pairs = [PromptPair((f"{name.lower()} is seen",), ("no finding", "normal")) for name in names]
    table = tabulate_areas(names, (targets == 1).sum(axis=0), areas).assign(**name_prompts(pairs))
    run.write_table("zero_shot", table)
    return table.set_index("finding")


@pytest.fixture(scope="module")
def rival(evaluated, tmp_path_factory) -> Run:
    return make_rival(evaluated, tmp_path_factory.mktemp("report") / "rival")


# --- one run -------------------------------------------------------------------------------------


def test_the_page_needs_nothing_but_itself(page, evaluated):
    """It is mailed around, opened offline and on ward computers."""
    html = evaluated.report_path.read_text()

    assert page.references
    for reference in page.references:
        assert reference.startswith("#"), reference[:80]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", html)
    assert not {"link", "iframe", "object", "embed"} & set(page.tags)
    assert {reference[1:] for reference in page.references} <= page.ids
    assert page.policy.startswith("default-src 'none'; img-src data:;")


def test_plots_are_on_disk(page, evaluated):
    for name in PLOTS:
        with Image.open(evaluated.plot_path(name)) as plot:
            plot.load()
            assert min(plot.size) >= 200, name


def test_headline_figures_stand_beside_what_doing_nothing_scores(page, evaluated):
    test = evaluated.read_metrics()["test"]

    for name in ("macro_auroc", "macro_ap", "macro_f1"):
        entry = test[name]
        shown = f"{entry['value']:.3f} 95 % interval {entry['low']:.3f} to {entry['high']:.3f}"
        assert shown in page.text, name
    nothing = 100 * test["label_accuracy_all_negative"]["value"]
    assert f"Predicting nothing scores {nothing:.1f} %." in page.text
    for name, words in (
        ("macro_ap_of_chance", "Guessing scores"),
        ("macro_prevalence", "the mean prevalence is"),
        ("macro_f1_of_calling_all", "Calling everything present scores"),
    ):
        assert f"{words} {test[name]['value']:.3f}" in page.text


def test_a_run_of_an_earlier_version_is_shown_with_what_it_knows(evaluated):
    view = read_view(evaluated)
    for name in ("macro_ap_of_chance", "macro_f1_of_calling_all"):
        del view.metrics["test"][name]

    text = Page(render_page([view])).text

    prevalence = view.metrics["test"]["macro_prevalence"]["value"]
    assert f"Guessing scores {prevalence:.3f}" in text
    assert "Calling everything present scores –" in text


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.51, 0.6, "Better than guessing."),
        (0.4, 0.6, "Cannot be told from guessing."),
        (0.3, 0.49, "Worse than guessing."),
        (None, None, "No interval, so no verdict against guessing."),
    ],
)
def test_the_verdict_follows_the_interval(evaluated, low, high, verdict):
    view = read_view(evaluated)
    view.metrics["test"]["macro_auroc"] |= {"low": low, "high": high}

    assert verdict in Page(render_page([view])).text


def test_what_not_to_trust_is_named(page):
    assert "What not to trust" in page.text
    assert "no positive or no negative: Bronchiolitis." in page.text
    assert "not scored in test" in page.text
    assert "never" in page.text  # its threshold
    assert page.text.lower().count("not for clinical use") >= 2
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text


def test_the_table_shows_the_figures_of_per_finding_csv(page, evaluated):
    for row in evaluated.read_table("per_finding").itertuples():
        if pd.notna(row.auroc):
            interval = f"{row.auroc_low:.3f}–{row.auroc_high:.3f}"
            assert f"{row.finding} {row.n_positive_test}" in page.text
            assert f"{row.auroc:.3f} {interval} {row.ap:.3f}" in page.text


def test_every_finding_has_its_confusion_matrix(page, evaluated):
    for row in evaluated.read_table("per_finding").itertuples():
        cells = re.search(
            rf"{row.finding} called not called present ([\d,]+) .+? ([\d,]+) .+? "
            r"absent ([\d,]+) .+? ([\d,]+) ",
            page.text,
        )
        assert cells, row.finding
        assert [int(cell) for cell in cells.groups()] == [row.tp, row.fn, row.fp, row.tn]


def test_curves_are_those_of_the_tables(page, evaluated):
    curves, findings = evaluated.read_table("curves"), page.data["findings"]

    assert findings == [*evaluated.config["findings"], ""]
    for finding, drawn in zip(findings, page.data["curves"][0], strict=True):
        rows = curves[curves["finding"] == finding]
        if drawn is None:
            assert rows.empty
            continue
        assert drawn["sensitivity"] == pytest.approx(rows["sensitivity"], abs=1e-4)
        assert drawn["specificity"] == pytest.approx(rows["specificity"], abs=1e-4)
    bins = evaluated.read_table("calibration")
    drawn = page.data["calibration"][0][0]["before"]
    rows = bins[(bins["finding"] == findings[0]) & (bins["stage"] == "before")]
    assert drawn["observed"] == pytest.approx(rows["observed"], abs=1e-4)


def test_curves_are_thinned_however_many_findings_there_are(evaluated):
    view = read_view(evaluated)
    n_findings = 2000
    names = [f"finding {f}" for f in range(n_findings)]
    row = next(iter(view.per_finding.values()))
    curve = pd.DataFrame(
        {"sensitivity": np.linspace(0, 1, 200), "specificity": np.linspace(1, 0, 200), "ppv": 0.5}
    )
    view.per_finding.clear()
    view.per_finding.update(dict.fromkeys(names, row))
    view.tables["curves"] = pd.concat([curve] * n_findings).assign(finding=np.repeat(names, 200))

    curves = collect_charts([view])["curves"][0]

    assert all(len(c["ppv"]) == MIN_POINTS for c in curves if c is not None)
    assert POINTS_OF_ALL_CURVES // n_findings < MIN_POINTS
    assert curves[0]["sensitivity"][0] == 0
    assert curves[0]["sensitivity"][-1] == 1


def test_a_run_evaluated_before_curves_were_kept_still_gets_its_page(evaluated, tmp_path):
    run = make_run(tmp_path / "run")
    score_run(run, n_resamples=0)
    for table in ("curves", "calibration", "subgroups"):
        (run.path / f"{table}.csv").unlink()
    metrics = run.read_metrics()
    for part in ("test", "out_of_fold", "train"):
        metrics[part] = {
            name: entry for name, entry in metrics[part].items() if name in FIGURES_OF_0_1
        }
    del metrics["calibration"], metrics["threshold_rule"], metrics["test_by_group"]
    del metrics["bootstrap"]["interval"]
    run.write_metrics(metrics)
    old = run.read_table("per_finding")
    run.write_table("per_finding", old.drop(columns=[c for c in old if c.endswith("_before")]))

    assert all(curve is None for curve in render(run).data["curves"][0])


def test_the_chosen_number_of_epochs_is_marked(page):
    assert "4 epochs were chosen" in page.text
    assert "4 (chosen)" in page.text


def test_a_card_tells_what_it_states_of_licence_and_data(evaluated, tmp_path):
    """So that it can be written again; whatever a person made of it in the meantime."""
    run = copy_run(evaluated, tmp_path / "run")
    write_report(run, license_id="cc-by-4.0", dataset_id="me/chest")
    stated = {"license_id": "cc-by-4.0", "dataset_id": "me/chest"}
    assert read_card(run) == stated
    jobs.evaluate_run(run, threshold_rule="sensitivity=0.9", calibration="platt", n_resamples=20)
    for text in (run.report_path.read_text(), run.read_model_card()):
        assert "sensitivity=0.9" in text
    run = Run.open(run.path)
    run.config["train"] |= {"threshold_rule": "f1", "calibration": "none"}
    view = read_view(run)
    for text in (Page(render_page([view])).text, render_card(view)):
        assert "sensitivity=0.9 (chosen after training, which had f1)" in text
        assert "platt (chosen after training, which had none)" in text
    assert read_card(run) == stated
    card = run.path / "model_card.md"
    for changed in ("", "# no header", "---\ndatasets: []\n---\n", "---\n: {\n---\n"):
        card.write_text(changed)
        assert read_card(run) == {}
    card.unlink()
    assert read_card(run) == {}


def test_one_of_a_thing_is_in_the_singular_and_commas_in_names_separate_nothing(evaluated):
    """As in "1 images of 1 studies", and findings whose names run together in a list."""
    view = read_view(evaluated)
    names = ["Opacity, lung", "Mass"]
    metrics = view.metrics | {"n_test_images": 1, "n_test_studies": 1, "findings_undefined": names}
    one = replace(view, metrics=metrics)
    for text in (Page(render_page([one])).text, render_card(one)):
        assert "1 images" not in text
        assert "1 studies" not in text
        assert "Opacity, lung; Mass" in text
    assert "Tested on 1 image of 1 study" in Page(render_page([one])).text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "three-layer head with batch norm on frozen embeddings of"),
        (
            {"hidden": [64], "norm": "layer", "features": "pooled"},
            "two-layer head with layer norm on frozen pooled outputs (before the projection) of",
        ),
        ({"hidden": [], "features": "both"}, "linear head on frozen embeddings and pooled outputs"),
    ],
)
def test_page_and_card_tell_which_head_was_trained(evaluated, options, words):
    """They said a three-layer head on embeddings, whatever the recipe asked for."""
    view = read_view(evaluated)
    view = replace(view, config=view.config | {"train": view.options | options})
    assert f"A {words}" in Page(render_page([view])).text
    assert f"a {words}" in render_card(view)


def test_random_weights_get_a_banner(evaluated, page):
    banner = "The encoder has random weights"

    assert banner not in page.text
    assert banner in render(evaluated, random_encoder=True).text


def test_a_split_by_image_is_called_out(evaluated, page):
    warning = "1,134 of 1,494 test images have another image of the same study in train."

    leaky = render(evaluated, train={"split_by": "image"}, warnings=[warning])

    assert "Split by image." in leaky.text
    assert warning in leaky.text
    assert "no test image shares its report" in page.text
    assert "no test image shares its report" not in leaky.text


def test_limits_of_the_indiana_labels_are_told_with_those_labels_only(evaluated, page):
    oddity = "Rib Fracture holds no coded rib fracture"

    assert oddity not in page.text
    assert oddity in render(evaluated, findings=list(FINDINGS)).text


def test_names_are_shown_as_text_whatever_they_hold(tmp_path):
    """A finding is the user's own word; markup in it must not become markup of the page."""
    run = make_run(tmp_path / "run")
    score_run(run, n_resamples=0)
    odd = "</script><script>alert('$x^')</script><!--"
    for table in ("per_finding", "curves", "calibration", "subgroups"):
        run.write_table(table, run.read_table(table).replace({"finding": {"Nodule": odd}}))
    run.config["warnings"] = ["<b>bold</b>"]

    page = render(run)

    assert page.tags.count("script") == 2  # the data and the program, as always
    assert odd in page.data["findings"]
    assert odd in page.text
    assert "<b>bold</b>" in page.text
    assert "bootstrap resamples" not in page.text  # this run was evaluated without intervals


def test_a_run_that_was_not_evaluated_is_refused(tmp_path):
    run = make_run(tmp_path / "run")

    with pytest.raises(RunError, match=r"metrics\.json is missing.*cxr-cache evaluate"):
        write_report(run)


# --- zero-shot -----------------------------------------------------------------------------------


def copy_run(run: Run, path: Path) -> Run:
    shutil.copytree(run.path, path)
    return Run.open(path)


def test_zero_shot_stands_beside_the_headline_over_the_same_findings(evaluated, tmp_path):
    run = copy_run(evaluated, tmp_path / "run")
    macro = keep_zero_shot(run).loc["macro"]

    text = render(run).text

    assert f"Macro AUROC, zero-shot {macro['zero_shot']:.3f} 95 % interval " in text
    assert "over the same 5 findings." in text  # Bronchiolitis is not scored
    low, high = macro["difference_low"], macro["difference_high"]
    assert f"Run minus zero-shot: {macro['difference']:+.3f} {low:+.3f} to {high:+.3f}" in text
    assert macro["run"] == pytest.approx(run.read_metrics()["test"]["macro_auroc"]["value"])


def test_findings_without_prompts_are_left_out_of_both_figures(evaluated, tmp_path):
    run = copy_run(evaluated, tmp_path / "run")
    macro = keep_zero_shot(run, without=("Mass", "Hernia")).loc["macro"]
    run.config["kind"] = "finetune"
    run.config["finetune"] = run.config["train"] | {"unfreeze_layers": 1, "source": "tokens"}
    run.config["from_run"], run.config["store"]["encoder"]["n_blocks"] = None, 2

    text = render(run).text

    shown = "over the 3 of 5 scored findings that have prompts; over these the run has {:.3f}."
    assert shown.format(macro["run"]) in text
    assert macro["run"] != pytest.approx(run.read_metrics()["test"]["macro_auroc"]["value"])
    assert "It is the encoder before fine-tuning." in text


@pytest.mark.parametrize("change", ["labels", "predictions", "columns"])
def test_zero_shot_of_other_test_images_is_left_out_and_said(evaluated, tmp_path, change):
    """A table that was written before the run's figures changed, or by hand."""
    run = copy_run(evaluated, tmp_path / "run")
    table = keep_zero_shot(run).reset_index()
    if change == "columns":  # scored without the run
        run.write_table("zero_shot", table[["finding", "n_positive", "zero_shot"]])
    else:
        name = "targets" if change == "labels" else "predictions"
        changed = run.read_table(name)
        test = run.read_table("predictions")["split"] == "test"
        changed.loc[test, "Nodule"] = changed.loc[test, "Nodule"].to_numpy()[::-1]
        run.write_table(name, changed)
        score_run(run, n_resamples=0)

    page = render(run)

    assert "Zero-shot is left out" in page.text
    assert "cxr-cache zero-shot STORE --run-dir RUN" in page.text
    assert "zero-shot" not in page.ids
    assert set(page.data["zero_shot"][0]) == {None}


def test_a_page_of_several_runs_has_the_macro_figure(evaluated, rival, tmp_path):
    run = copy_run(evaluated, tmp_path / "run")
    macro = keep_zero_shot(run).loc["macro"]
    comparison = compare_runs(run, rival, n_resamples=20)
    views = [read_view(run), read_view(rival)]

    page = Page(render_page(views, differences=collect_differences(comparison)))

    assert f"prompts alone, without training {macro['zero_shot']:.3f}" in page.text
    assert "zero-shot" not in page.ids


# --- several runs --------------------------------------------------------------------------------


def test_several_runs_share_a_page_with_their_paired_differences(evaluated, rival, tmp_path):
    path = write_joint_report([evaluated, rival], tmp_path / "both.html", n_resamples=50)

    page = Page(path.read_text())
    macro = compare_runs(evaluated, rival, n_resamples=50).macro("rival")
    assert f"{macro['first']:.3f}" in page.text
    assert f"{macro['difference']:+.3f} {macro['low']:+.3f} to {macro['high']:+.3f}" in page.text
    assert [run["name"] for run in page.data["runs"]] == ["run", "rival"]
    assert len(page.data["curves"]) == 2
    assert write_joint_report([evaluated, rival], path, n_resamples=50) == path  # its own page


def test_a_warning_that_all_runs_share_is_told_once(evaluated, rival):
    views = [
        read_view(Run(run.path, {**run.config, "warnings": ["told of both", name]}))
        for run, name in ((evaluated, "ours"), (rival, "theirs"))
    ]
    comparison = compare_runs(evaluated, rival, n_resamples=20)

    text = Page(render_page(views, differences=collect_differences(comparison))).text

    assert text.count("told of both") == 1
    assert "run: ours" in text
    assert "rival: theirs" in text


def test_a_page_does_not_replace_what_is_not_one(evaluated, rival, tmp_path):
    path = tmp_path / "thesis.html"
    path.write_text("<p>years of work")

    with pytest.raises(ConfigError, match="is not a page of cxr-cache; choose another name"):
        write_joint_report([evaluated, rival], path)
    assert path.read_text() == "<p>years of work"
    with pytest.raises(ConfigError, match="there is no folder"):
        write_joint_report([evaluated, rival], tmp_path / "gone" / "page.html")


def test_runs_that_cannot_share_a_page_are_refused(evaluated, rival, tmp_path):
    other = make_run(tmp_path / "other", seed=1)
    score_run(other, n_resamples=0)

    with pytest.raises(RunError, match="were tested on other targets"):
        write_joint_report([evaluated, other], tmp_path / "both.html")
    with pytest.raises(RunError, match="7 runs do not fit on one page; give at most 6"):
        write_joint_report([evaluated] * 7, tmp_path / "both.html")
    with pytest.raises(RunError, match=r"metrics\.json is missing"):
        write_joint_report([evaluated, make_run(tmp_path / "third")], tmp_path / "both.html")
    assert not (tmp_path / "both.html").exists()


# --- plots ---------------------------------------------------------------------------------------


def test_class_distribution_is_drawn_without_a_run(tmp_path):
    path = tmp_path / "classes.png"

    def draw() -> bytes:
        draw_class_distribution(["Normal", "$Odd_", "Absent"], [3162, 2, 0], [1600, 1, 0], path)
        return path.read_bytes()

    assert draw() == draw()  # same table, same bytes
    with Image.open(path) as plot:
        assert plot.format == "PNG"
    assert [entry.name for entry in tmp_path.iterdir()] == ["classes.png"]


def test_a_finding_may_have_a_long_name(evaluated, tmp_path):
    run = copy_run(evaluated, tmp_path / "run")
    table = run.read_table("per_finding")
    table.loc[0, "finding"] = "Opacity of unknown meaning, " * 10
    run.write_table("per_finding", table)

    assert all(path.stat().st_size for path in draw_plots(run).values())


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    """A notebook's own plots must not change because a report was written in between."""
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    draw_class_distribution(["Normal"], [10], [5], tmp_path / "classes.png")

    assert dict(mpl.rcParams) == before


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_of_a_million_rows_is_small_and_soon_made(tmp_path):
    """The page reads tables whose size depends on findings, never the predictions."""
    N, F = 1_000_000, len(FINDINGS)
    rng = np.random.default_rng(0)
    present = rng.random((N, F), np.float32) < np.geomspace(0.4, 0.001, F)
    logits = rng.normal(size=(N, F)).astype(np.float32) + present - 2
    rows = np.arange(N)
    images = pd.DataFrame(
        {
            "image_id": [f"{row:07d}.png" for row in rows],
            "study_uid": (rows // 2).astype(str),
            "projection": np.where(rows % 2, "Lateral", "Frontal"),
            "split": np.where(rows // 2 % 5 == 0, "test", "train"),
        }
    )
    scored = images.join(pd.DataFrame(1 / (1 + np.exp(-logits)), columns=FINDINGS))
    run = make_run(tmp_path / "run", findings=list(FINDINGS))
    run.write_table("predictions", scored)
    run.write_table("out_of_fold", scored[scored["split"] == "train"][:1000])
    run.write_table("splits", images.drop(columns="projection").assign(fold=1 + rows // 2 % 5))
    targets = pd.DataFrame(present.astype(np.float32), columns=FINDINGS)
    run.write_table("targets", images[["image_id"]].join(targets))
    model = run.load_model()
    run.save_model(replace(model, findings=FINDINGS, thresholds=dict.fromkeys(FINDINGS, 0.3)))
    score_run(run, n_resamples=0)

    started = time.process_time()
    size = len(render_page([read_view(run)]).encode())

    assert size < 1_000_000  # 5 MB were asked for
    assert time.process_time() - started < 5
    assert len(write_report(run).read_bytes()) == size
