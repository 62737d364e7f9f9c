"""The page of a run: one file, nothing fetched, nothing hidden."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from PIL import Image

from cxr_cache.errors import RunError
from cxr_cache.evaluate import evaluate_run
from cxr_cache.findings import FINDINGS
from cxr_cache.report import PLOTS, draw_class_distribution, render_page, write_report
from cxr_cache.run import Run
from tests.test_evaluate import make_run


class Page(HTMLParser):
    """What a browser would see: texts, links, pictures, and whether tags close."""

    VOID = frozenset({"meta", "img", "br", "link", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.references: list[str] = []
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.add(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "img":
            self.images.append(values)
        if "id" in values:
            self.ids.add(values["id"])
        self.references += [values[key] for key in ("href", "src", "srcset") if key in values]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Run:
    run = make_run(tmp_path_factory.mktemp("report") / "run")
    evaluate_run(run, n_resamples=50)
    return run


@pytest.fixture(scope="module")
def page(evaluated) -> Page:
    return Page(write_report(evaluated).read_text())


def render(run: Run, **config: object) -> Page:
    """The page of the same run, had its configuration been another."""
    plots = {name: run.plot_path(name) for name in PLOTS}
    return Page(render_page(Run(run.path, {**run.config, **config}), plots))


def test_the_page_needs_nothing_but_itself(page, evaluated):
    """It is mailed around, opened offline and on ward computers."""
    html = evaluated.report_path.read_text()

    for reference in page.references:
        assert reference.startswith(("#", "data:image/png;base64,")), reference[:80]
    assert not re.search(r"https?://|@import|url\(", html)
    assert not {"script", "link", "iframe"} & page.tags
    assert {reference[1:] for reference in page.references if reference[0] == "#"} <= page.ids


def test_every_figure_is_embedded_described_and_on_disk(page, evaluated):
    for name in PLOTS:
        with Image.open(evaluated.plot_path(name)) as plot:
            plot.load()
            assert min(plot.size) >= 200, name
    stored = {evaluated.plot_path(name).read_bytes() for name in PLOTS}
    embedded = {base64.b64decode(image["src"].partition(",")[2]) for image in page.images}
    assert embedded <= stored
    assert len(embedded) == len(page.images) == 6  # the class sizes alone are for `describe`
    for image in page.images:
        assert Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        assert len(image["alt"]) > 20


def test_headline_figures_stand_beside_what_doing_nothing_scores(page, evaluated):
    test = evaluated.read_metrics()["test"]

    for name in ("macro_auroc", "macro_ap", "macro_f1"):
        entry = test[name]
        shown = f"{entry['value']:.3f} {entry['low']:.3f} to {entry['high']:.3f}"
        assert shown in page.text, name
    nothing = 100 * test["label_accuracy_all_negative"]["value"]
    assert f"Predicting nothing scores {nothing:.2f} %" in page.text
    assert f"Guessing scores {test['macro_prevalence']['value']:.3f}" in page.text


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
            assert f"{row.finding} {row.n_positive_test} {row.n_images}" in page.text
            assert f"{row.auroc:.3f} {interval} {row.ap:.3f}" in page.text


def test_the_chosen_number_of_epochs_is_marked(page):
    assert "4 epochs were chosen" in page.text
    assert "4 (chosen)" in page.text


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


def test_names_are_shown_as_text_whatever_they_hold(evaluated, tmp_path):
    """A finding is the user's own word; markup in it must not become markup of the page."""
    run = make_run(tmp_path / "run")
    evaluate_run(run, n_resamples=0)
    odd = "<script>alert('$x^')</script>"
    per_finding = run.read_table("per_finding").replace({"finding": {"Nodule": odd}})
    run.write_table("per_finding", per_finding)
    run.config["warnings"] = ["<b>bold</b>"]

    page = Page(write_report(run).read_text())

    assert "script" not in page.tags
    assert odd in page.text
    assert "<b>bold</b>" in page.text
    assert "bootstrap" not in page.text  # this run was evaluated without intervals


def test_a_run_that_was_not_evaluated_is_refused(tmp_path):
    run = make_run(tmp_path / "run")

    with pytest.raises(RunError, match=r"metrics\.json is missing.*cxr-cache evaluate"):
        write_report(run)


def test_class_distribution_is_drawn_without_a_run(tmp_path):
    path = tmp_path / "classes.png"

    def draw() -> bytes:
        draw_class_distribution(["Normal", "$Odd_", "Absent"], [3162, 2, 0], [1600, 1, 0], path)
        return path.read_bytes()

    assert draw() == draw()  # same table, same bytes
    with Image.open(path) as plot:
        assert plot.format == "PNG"
    assert [entry.name for entry in tmp_path.iterdir()] == ["classes.png"]


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    """A notebook's own plots must not change because a report was written in between."""
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    draw_class_distribution(["Normal"], [10], [5], tmp_path / "classes.png")

    assert dict(mpl.rcParams) == before
