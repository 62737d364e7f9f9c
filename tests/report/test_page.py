"""The page in a browser: what a person sees, clicks and types."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_cache.datasets.cohort import Reading
from cxr_cache.evaluation.compare import compare_runs
from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.jobs.external import evaluate_on_store
from cxr_cache.models.run import Run
from cxr_cache.report.page import render_page
from cxr_cache.report.report import write_joint_report
from cxr_cache.report.views import collect_differences, read_view
from cxr_cache.training.train import fit_run
from tests.evaluation.test_evaluate import FINDINGS, make_run
from tests.report.test_report import copy_run, keep_zero_shot, make_rival
from tests.synthetic import QUICK, make_cohort, make_store

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ODD = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the path")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Watched:
    """A page that is open, with everything it logged, raised or asked for."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, **options}
        )
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(10_000)
        self.noise: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda message: self.noise.append(message.text))
        self.tab.on("pageerror", lambda error: self.noise.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(file.as_uri())

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.tab.locator(selector).all_inner_texts()]

    def shown_findings(self) -> list[str]:
        return self.tab.eval_on_selector_all(
            "#finding-table tbody tr[data-finding]:not([hidden]) th",
            "cells => cells.map(cell => cell.dataset.name)",
        )

    def unfold(self) -> None:
        """Open every section that is folded away."""
        self.tab.get_by_role("button", name="Open all").click()

    def follow(self, fragment: str) -> None:
        """Change the address, and wait until the page has followed it."""
        self.tab.evaluate(
            """fragment => new Promise((done) => {
              addEventListener("hashchange", done, { once: true });
              location.hash = fragment;
            }).then(() => null)""",
            fragment,
        )

    def width(self) -> int:
        return self.tab.evaluate("document.documentElement.scrollWidth")


@pytest.fixture
def see(browser) -> Iterator[Any]:
    """Open a file; afterwards, see that it was quiet and asked for nothing but itself."""
    opened: list[Watched] = []

    def open_file(file: Path, **options: Any) -> Watched:
        opened.append(Watched(browser, file, **options))
        return opened[-1]

    yield open_file
    for watched in opened:
        watched.context.close()
        assert watched.noise == []
        outside = [url for url in watched.requests if not url.startswith("data:image/jpeg")]
        assert len(outside) == 1, outside


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def run(folder) -> Run:
    run = make_run(folder / "run")
    score_run(run, n_resamples=50)
    return run


@pytest.fixture(scope="module")
def page(run, folder) -> Path:
    file = folder / "page.html"
    file.write_text(render_page([read_view(run)]))
    return file


@pytest.fixture(scope="module")
def rival(run, folder) -> Run:
    return make_rival(run, folder / "rival")


@pytest.fixture(scope="module")
def joint(run, rival, folder) -> Path:
    comparison = compare_runs(run, rival, n_resamples=50)
    file = folder / "joint.html"
    views = [read_view(run), read_view(rival)]
    differences = collect_differences(comparison)
    file.write_text(render_page(views, differences=differences, notes=comparison.notes))
    return file


@pytest.fixture(scope="module")
def decided(run, rival, folder) -> Path:
    """The page of two runs, had every finding differed, the rare ones too."""
    comparison = compare_runs(run, rival, n_resamples=20)
    table = comparison.table.assign(p_holm=comparison.table["p_holm"] * 0)  # undefined stays so
    differences = collect_differences(replace(comparison, table=table))
    file = folder / "decided.html"
    file.write_text(render_page([read_view(run), read_view(rival)], differences=differences))
    return file


def test_it_opens_with_its_figures_drawn(see, page, run):
    seen = see(page)
    seen.unfold()

    assert seen.texts("h1") == ["Own data (features) with tiny"]
    assert seen.tab.title() == "Own data (features), with tiny · cxr-cache"
    assert seen.tab.locator("#pooled svg path.line").count() == 3
    assert seen.tab.locator("[data-search] svg").count() == 3  # search, loss, AUROC
    assert seen.tab.locator("#search svg .dot").count() == len(run.read_table("epoch_search"))
    assert seen.tab.locator(".matrix").count() == len(FINDINGS)
    assert seen.tab.locator(".classes .aurocs b").count() == len(FINDINGS) - 1  # one not scored
    for svg in seen.tab.locator("svg[role=img]").all():
        assert svg.get_attribute("aria-label")
        box = svg.bounding_box()
        assert min(box["width"], box["height"]) > 100


def test_headings_sort_the_findings_and_blanks_stay_last(see, page, run):
    seen = see(page)
    view = read_view(run)
    judged, others = ([row["finding"] for row in rows] for rows in (view.judged, view.unjudged))
    assert judged
    assert others[-1] == "Bronchiolitis"  # not scored
    assert seen.shown_findings() == judged + others
    heading = seen.tab.locator("th[data-key=auroc]")

    def by_auroc(names: list[str], sign: int) -> list[str]:
        auroc = {name: view.per_finding[name]["auroc"] for name in names}
        return sorted(names, key=lambda name: (auroc[name] is None, sign * (auroc[name] or 0)))

    heading.locator("button").click()
    assert seen.shown_findings() == by_auroc(judged, -1) + by_auroc(others, -1)
    assert heading.get_attribute("aria-sort") == "descending"

    heading.locator("button").press("Enter")
    assert seen.shown_findings() == by_auroc(judged, 1) + by_auroc(others, 1)
    assert heading.get_attribute("aria-sort") == "ascending"

    seen.tab.locator("th[data-key=name] button").press("Space")
    assert seen.shown_findings() == sorted(judged) + sorted(others)
    assert heading.get_attribute("aria-sort") is None


def test_zero_shot_is_a_column_that_sorts(see, page, run, folder):
    """Beside AUROC; blank and last where there are no prompts; absent without the table."""
    copy = copy_run(run, folder / "prompted")
    table = keep_zero_shot(copy, without=("Hernia",)).drop(index="macro").dropna()
    file = folder / "prompted.html"
    file.write_text(render_page([read_view(copy)]))
    seen = see(file)

    cells = seen.tab.eval_on_selector_all(
        "#finding-table tbody td[data-zero-shot]",
        "cells => cells.map(c => [c.closest('tr').cells[0].dataset.name, c.innerText.trim()])",
    )
    assert dict(cells) == {name: f"{value:.3f}" for name, value in table["zero_shot"].items()}
    heading = seen.tab.locator("th[data-key=zero-shot]")
    heading.locator("button").click()
    best_first = table.sort_values("zero_shot", ascending=False).index.tolist()
    judged = {row["finding"] for row in read_view(copy).judged}
    few = [name for name in best_first if name not in judged]
    assert seen.shown_findings() == [
        *(name for name in best_first if name in judged),
        *few,
        *("Hernia", "Bronchiolitis"),
    ]
    assert heading.evaluate("cell => cell.cellIndex") == 5
    seen.tab.get_by_role("button", name="Nodule").click()
    words = seen.tab.locator("tr.detail p.zero-shot").inner_text()
    row = table.loc["Nodule"]
    assert f"have AUROC {row['zero_shot']:.3f} (" in words
    assert f"the run minus zero-shot is {row['difference']:+.3f} (" in words
    assert "They were “nodule is seen” against “no finding | normal”." in words
    assert "over the 4 of 5 scored findings" in seen.tab.locator("#zero-shot").inner_text()
    assert seen.width() == 1280

    without = see(page)
    assert without.tab.locator("th[data-key=zero-shot], [data-zero-shot], #zero-shot").count() == 0
    without.tab.get_by_role("button", name="Nodule").click()
    assert "zero-shot" not in without.tab.locator("main").inner_text().lower()


def test_the_filter_finds_names_and_hides_rare_findings(see, page, run):
    seen = see(page)
    words = seen.tab.get_by_label("Filter")

    words.fill("EFF")
    assert seen.shown_findings() == ["Pleural Effusion"]
    assert seen.texts("#shown") == [f"1 of {len(FINDINGS)} findings"]

    words.fill("")
    seen.tab.get_by_label("only with 10 positive studies or more").check()
    table = run.read_table("per_finding")
    has_enough = table["n_positive_studies_test"] >= 10
    assert set(seen.shown_findings()) == set(table[has_enough]["finding"])
    assert not seen.tab.locator("tr.group").is_visible()
    assert 0 < len(seen.shown_findings()) < len(FINDINGS)


def test_a_finding_opens_to_its_curves_by_mouse_and_keyboard(see, page, run):
    seen = see(page)
    button = seen.tab.get_by_role("button", name="Nodule")
    assert button.get_attribute("aria-expanded") == "false"

    button.click()
    detail = seen.tab.locator(f"#{button.get_attribute('aria-controls')}")
    assert detail.locator("figcaption").count() == 3
    assert detail.locator("path.line").count() == 3
    row = run.read_table("per_finding").set_index("finding").loc["Nodule"]
    assert f"AUROC {row['auroc']:.3f}" in detail.inner_text()
    cells = detail.locator("table").first.locator("td").all_inner_texts()
    assert cells[:4] == [str(int(row[name])) for name in ("tp", "fn", "fp", "tn")]
    assert detail.locator("text=projection Lateral").count() == 1

    button.press("Enter")
    assert button.get_attribute("aria-expanded") == "false"
    assert detail.count() == 0
    button.press("Enter")
    assert detail.count() == 1


def test_names_of_groups_are_written_in_words(see, run, folder):
    """Only the first of several underscores was replaced."""
    ids = run.read_table("predictions")["image_id"]
    rows = "".join(f"{image_id},{k % 2}0s\n" for k, image_id in enumerate(ids))
    (folder / "groups.csv").write_text("image_id,age_group_decade\n" + rows)
    grouped = copy_run(run, folder / "grouped")
    score_run(grouped, groups=folder / "groups.csv", n_resamples=20)
    file = folder / "grouped.html"
    file.write_text(render_page([read_view(grouped)]))
    opened = see(file)
    opened.tab.locator("#finding-table button.open").first.click()
    groups = opened.texts(".panel table tbody th")
    assert {"age group decade 00s", "age group decade 10s"} <= set(groups)
    assert "age_group" not in opened.tab.locator("body").inner_text().replace("groups.csv", "")


def test_the_roc_curve_ends_where_it_must_and_meets_the_threshold(see, page, run):
    """Back from pixels to rates: the drawing is that of the table."""
    seen = see(page)
    seen.tab.get_by_role("button", name="Cardiomegaly").click()
    roc = seen.tab.locator("tr.detail svg").first

    path = roc.locator("path.line").get_attribute("d")
    points = np.array([p.split() for p in path[1:].split("L")], float)
    left, right, top, bottom = 46, 308, 10, 218
    x, y = (points[:, 0] - left) / (right - left), (bottom - points[:, 1]) / (bottom - top)
    assert (x[0], y[0]) == pytest.approx((0, 0), abs=1e-3)
    assert (x[-1], y[-1]) == pytest.approx((1, 1), abs=1e-3)
    row = run.read_table("per_finding").set_index("finding").loc["Cardiomegaly"]
    # All of this small curve's points are drawn, so its area is the AUROC.
    assert np.trapezoid(y, x) == pytest.approx(row["auroc"], abs=2e-3)
    dot = roc.locator("circle")
    assert (float(dot.get_attribute("cx")) - left) / (right - left) == pytest.approx(
        1 - row["specificity"], abs=1e-3
    )


def test_a_finding_without_curves_says_why(see, page):
    seen = see(page)
    seen.tab.get_by_role("button", name="Bronchiolitis").click()

    assert "no positive or no negative" in seen.tab.locator("tr.detail").inner_text()


def test_an_open_finding_stays_with_its_row(see, page):
    seen = see(page)
    seen.tab.get_by_role("button", name="Nodule").click()
    seen.tab.locator("th[data-key=auroc] button").click()

    after = "row => row.nextElementSibling.id"
    row = seen.tab.locator("tr[data-finding='2']")
    assert row.evaluate(after) == "detail-2"
    seen.tab.get_by_label("Filter").fill("mass")
    assert not seen.tab.locator("#detail-2").is_visible()


def test_every_control_is_reached_by_the_tab_key(see, page):
    seen = see(page)
    n_controls = seen.tab.locator("a[href], button, input, select, [tabindex='0']").count()

    reached = set()
    for _ in range(n_controls):
        seen.tab.keyboard.press("Tab")
        reached.add(
            seen.tab.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)")
        )
    assert len(reached) == n_controls


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_colour_schemes(see, page, scheme):
    """WCAG 2: contrast of at least 4.5 for text, 3 for lines that carry meaning."""
    seen = see(page, color_scheme=scheme)
    seen.tab.get_by_role("button", name="Nodule").click()

    for selector, prop, least in [
        *((s, "color", 4.5) for s in ("h1", ".note", ".interval", "td", "#trust li", "#trust a")),
        *((s, "color", 4.5) for s in ("thead th", "tr.few td", "figcaption span", ".matrix td")),
        ("svg text", "fill", 4.5),
        ("svg path.line", "stroke", 3),
        ("svg path.base", "stroke", 3),
        (".scale b", "backgroundColor", 3),
        ("td.track b", "backgroundColor", 3),
    ]:
        ratio = seen.tab.locator(selector).first.evaluate(CONTRAST, prop)
        assert ratio >= least, (selector, ratio)
    brightness = seen.tab.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    )
    assert (brightness < 60) == (scheme == "dark")


CONTRAST = """(element, prop) => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parse = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let behind = element;
  if (prop === "backgroundColor") behind = behind.parentElement;
  while (parse(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
  const pair = [element, behind].map((one, k) =>
    parse(getComputedStyle(one)[k ? "backgroundColor" : prop]));
  const [low, high] = pair.map(luminance).sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}"""


@pytest.fixture(scope="module")
def external(folder) -> Path:
    """The page of a test on another data set, with a finding that is not labelled there."""
    run = fit_run(make_store(folder / "own.h5", make_cohort(60)), folder / "own", QUICK).run
    cohort = make_cohort(30, seed=4)
    ages = [str(20 + row) for row in range(len(cohort))]
    names = [f"other/{row}.png" for row in range(len(cohort))]
    other = replace(
        cohort.assign(age=ages, image_id=names),
        findings=("Fibrosis", *cohort.findings[1:]),
        reading=Reading("nih"),
    )
    store = make_store(folder / "other.h5", other)
    evaluate_on_store(run, store, out=folder / "external", n_resamples=20)
    return folder / "external" / "report.html"


def test_the_page_of_an_external_test_stands_beside_the_runs_own(see, external):
    seen = see(external)

    assert " ".join(seen.tab.locator("h1").inner_text().split()) == (
        "NIH ChestX-ray14 tested with imported features (tiny.npz), trained on Own data (own)"
    )
    assert "5 of its 6 findings" in seen.tab.locator(".lead").inner_text()
    for link in seen.tab.locator("a[href^='#']").all():
        assert seen.tab.locator(link.get_attribute("href")).count() == 1
    trusted = seen.tab.locator("#trust")
    assert "1 finding unlabelled here" in trusted.inner_text()
    trusted.get_by_text("1 finding unlabelled here").click()
    assert "1 of the run’s findings are unlabelled here" in seen.tab.locator("#trust").inner_text()
    assert not seen.tab.locator("#matching table").is_visible()
    trusted.get_by_role("link", name="which findings were compared").click()
    assert "Not labelled there: Cardiomegaly." in seen.tab.locator("#matching").inner_text()
    seen.tab.locator("#matching summary").first.click()
    assert not seen.tab.locator("#matching table").first.is_visible()
    trusted.get_by_role("link", name="which findings were compared").click()
    assert seen.tab.locator("#matching table").first.is_visible()
    seen.unfold()
    assert "Here, chosen anew (optimistic)" in seen.texts("#external thead th")
    assert not seen.tab.locator("#split, #search, #cases").count()
    seen.tab.get_by_role("button", name="Nodule").click()
    assert seen.tab.locator("tr.detail figure.chart").count() == 3


@pytest.mark.parametrize(
    ("kind", "width"),
    [("page", 320), ("page", 390), ("joint", 390), ("decided", 390), ("external", 390)],
)
def test_nothing_sticks_out_of_a_small_screen(see, request, kind, width):
    seen = see(request.getfixturevalue(kind), viewport={"width": width, "height": 800})
    seen.tab.get_by_role("button", name="Nodule").click()

    assert seen.width() == width
    charts = seen.tab.locator("tr.detail figure.chart")
    for chart in charts.all():
        box = chart.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


def test_paper_gets_all_but_the_controls(see, page):
    seen = see(page, viewport={"width": 695, "height": 1000}, color_scheme="dark")
    seen.tab.emulate_media(media="print")

    assert seen.width() == 695
    assert not seen.tab.locator(".tools").first.is_visible()
    assert seen.tab.locator("#finding-table .track").first.is_visible()
    assert not seen.tab.locator("#pooled").is_visible()
    seen.tab.evaluate("document.querySelector('#all > details').open = true")
    assert seen.tab.locator("#pooled svg").first.is_visible()
    background = "getComputedStyle(document.body).backgroundColor"
    assert seen.tab.evaluate(background) == "rgb(255, 255, 255)"


def test_markup_in_a_name_does_nothing(see, run, folder):
    """Neither in the table, nor in the block of data, nor where the program writes it."""
    view = read_view(run)
    for name in ("curves", "calibration", "subgroups"):
        view.tables[name] = view.tables[name].replace({"finding": {"Nodule": ODD}})
    view.per_finding[ODD] = {**view.per_finding.pop("Nodule"), "finding": ODD}
    cases = {ODD: {"hits": [], "misses": [], "false_alarms": [{"image_id": ODD, "probability": 1}]}}
    file = folder / "odd.html"
    file.write_text(render_page([view], cases=[cases], pictures={}))
    seen = see(file)

    seen.tab.get_by_role("button", name=ODD).click()

    assert ODD in seen.shown_findings()
    assert seen.texts("tr.detail h3") == [ODD]
    assert seen.tab.locator("tr.detail figure span[title]").inner_text() == ODD
    assert seen.tab.evaluate("window.hacked") is None


def test_a_script_that_got_in_all_the_same_would_not_run(browser, page, folder):
    """The page's policy names its own program by hash, and forbids every address."""
    file = folder / "forged.html"
    forged = page.read_text().replace(
        "<main>", "<main><script>window.hacked = 1</script><img src='https://example.org/x.png'>"
    )
    file.write_text(forged)

    seen = Watched(browser, file)

    assert seen.tab.evaluate("window.hacked") is None
    assert seen.tab.locator("#pooled svg").count() == 3  # its own program runs
    assert sum("Content Security Policy" in line for line in seen.noise) >= 2
    seen.context.close()


def test_several_runs_are_drawn_beside_each_other(see, joint, run, rival):
    seen = see(joint)
    seen.tab.get_by_role("button", name="Nodule").click()

    lines = seen.tab.locator("tr.detail svg[role=img]").first.locator("path.line")
    assert lines.count() == 2
    styles = "e => [getComputedStyle(e).stroke, getComputedStyle(e).strokeDasharray]"
    (color, dash), (other_color, other_dash) = (line.evaluate(styles) for line in lines.all())
    assert color != other_color
    assert dash != other_dash  # for those who see no colours
    differences = rival.read_table("per_finding")["auroc"] - run.read_table("per_finding")["auroc"]
    seen.tab.locator("th[data-key=d1] button").click()
    best = FINDINGS[int(differences.argmax())]
    assert best in (seen.shown_findings()[0], read_view(run).unjudged[0]["finding"])
    assert "This compares trained models, not recipes" in seen.tab.text_content("#trust")


def test_pictures_are_shown_with_their_warning(see, run, rival, folder):
    """Through the report, with an image folder: both runs' cases, every picture once."""
    image_dir = folder / "images"
    image_dir.mkdir()
    rng = np.random.default_rng(0)
    for image_id in run.read_table("splits")["image_id"]:
        Image.fromarray(rng.integers(0, 255, (40, 50), dtype=np.uint8)).save(image_dir / image_id)
    file = write_joint_report(
        [run, rival], folder / "pictures.html", image_dir=image_dir, n_resamples=50
    )
    seen = see(file)
    seen.unfold()

    assert "do not share it" in seen.tab.locator("header").inner_text()
    seen.tab.locator("#case-finding").select_option("Mass")
    pictures = seen.tab.locator("#case-rows img")
    assert pictures.count() > 4  # two runs
    for picture in pictures.all():
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 144
        assert "Mass, probability 0." in picture.get_attribute("alt")


def test_maps_are_laid_over_the_pictures_by_one_switch(see, run, folder):
    """Two patches by two, the strongest at the lower left; the second image has no map."""
    cases = {
        "Nodule": {
            "hits": [{"image_id": "a.png", "probability": 0.9}],
            "misses": [{"image_id": "b.png", "probability": 0.1}],
            "false_alarms": [],
        }
    }
    jpeg = io.BytesIO()
    Image.new("L", (144, 144), 90).save(jpeg, format="JPEG")
    picture = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
    packed = base64.b64encode(bytes([0, 51, 255, 0])).decode()
    maps = {"rows": 2, "columns": 2, "by_finding": {"Nodule": {"a.png": packed}}}
    file = folder / "maps.html"
    pictures = dict.fromkeys(("a.png", "b.png"), picture)
    file.write_text(render_page([read_view(run)], cases=[cases], pictures=pictures, maps=maps))
    seen = see(file, viewport={"width": 390, "height": 800})
    seen.unfold()
    canvas, switch = seen.tab.locator("#case-rows canvas"), seen.tab.locator("#cases input")

    assert canvas.count() == 1
    assert not canvas.is_visible()
    switch.press("Space")
    assert canvas.is_visible()
    box, of_image = canvas.bounding_box(), seen.tab.locator("#case-rows img").first.bounding_box()
    assert box == pytest.approx(of_image)
    assert canvas.get_attribute("aria-label") == (
        "where it looked for Nodule, strongest 25 % from the left and 75 % from the top"
    )
    data = canvas.evaluate("c => [...c.getContext('2d').getImageData(0, 0, 2, 2).data]")
    assert np.array(data)[3::4] == pytest.approx([0, 0.2 * 191, 191, 0], abs=1)  # opacity
    assert data[8:11] == pytest.approx([254, 232, 56], abs=2)
    assert "not whether the answer is right" in seen.tab.locator("#cases").inner_text()

    seen.tab.get_by_role("button", name="Nodule").click()
    detail = seen.tab.locator("tr.detail")
    assert detail.locator("canvas").is_visible()
    detail.get_by_label("show where it looked").uncheck()
    assert not switch.is_checked()
    assert not canvas.is_visible()
    assert seen.width() == 390


@pytest.mark.slow
def test_the_picture_of_the_readme_is_made_from_a_page_without_radiographs(page, folder):
    script, picture = REPOSITORY / "scripts" / "report_picture.py", folder / "picture.png"

    subprocess.run([sys.executable, script, page, picture], check=True)

    assert picture.stat().st_size < 300_000
    with Image.open(picture) as image, Image.open(REPOSITORY / "docs" / "report.png") as shown:
        assert image.width == shown.width == 1280
    file = folder / "radiographs.html"
    cases = '<img alt="" src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">'
    file.write_text(page.read_text().replace("</main>", f"{cases}</main>"))
    refused = subprocess.run(
        [sys.executable, script, file, picture], capture_output=True, text=True
    )
    assert "holds pictures; write it without --image-dir" in refused.stderr


def test_a_page_without_pictures_says_how_to_get_them(see, page):
    seen = see(page)
    seen.unfold()

    assert "--image-dir DIR adds small pictures" in seen.tab.locator("#cases").inner_text()
    assert seen.tab.locator("img, canvas, #cases input").count() == 0


# --- the first screen, other widths, links and machines that read aloud --------------------------

HEIGHTS = {390: 844, 820: 1180, 1280: 800, 1920: 1080}
KINDS = ("page", "joint", "external")


@pytest.fixture(scope="module")
def full(run, rival, folder) -> Path:
    """The page of a run with 35 findings, of which the test has enough positives for most."""
    view = read_view(run)
    rows = (view.judged * 35)[: 35 - len(view.unjudged)] + view.unjudged
    per_finding = {
        f"{row['finding']} {k}": {**row, "finding": f"{row['finding']} {k}"}
        for k, row in enumerate(rows)
    }
    file = folder / "full.html"
    file.write_text(render_page([replace(view, per_finding=per_finding)]))
    return file


@pytest.mark.parametrize("width", HEIGHTS)
@pytest.mark.parametrize("kind", [*KINDS, "full"])
def test_the_first_screens_say_on_what_and_how_good(see, request, kind, width):
    """Data set, verdict and five findings within one and a half screens; nothing beside them."""
    height = HEIGHTS[width]
    seen = see(request.getfixturevalue(kind), viewport={"width": width, "height": height})

    first = [seen.tab.locator(s).first for s in ("h1", ".facts", ".judged", ".tiles", "#trust")]
    findings = seen.tab.locator("#finding-table tr[data-finding]").all()[:5]
    for element in [*first, *findings]:
        box = element.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert 0 <= box["y"] <= box["y"] + box["height"] <= 1.5 * height
    assert seen.width() == width
    seen.unfold()
    assert seen.tab.locator("#figures table").first.is_visible()
    findings[0].locator("button.open").click()
    assert seen.tab.locator("tr.detail").is_visible()
    assert seen.width() == width


def test_a_phone_shows_a_third_of_what_it_did(see, full):
    """17,300 pixels were the page of 35 findings, of which nobody saw the end."""
    seen = see(full, viewport={"width": 390, "height": 844})

    assert seen.tab.locator("tr[data-finding]").count() == 35
    assert seen.tab.evaluate("document.documentElement.scrollHeight") < 17_300 / 3
    seen.unfold()
    cell = seen.tab.locator("#figures tbody td").first
    label = cell.evaluate("cell => getComputedStyle(cell, '::before').content")
    assert label == '"Macro: mean over findings"'


def test_bars_lie_on_one_scale_and_the_head_stays_in_sight(see, page, run):
    seen = see(page)
    low, high = 0.4, 1.0

    bars = seen.tab.eval_on_selector_all(
        "#finding-table tbody tr:not(.few) .bar",
        """bars => bars.map(bar => {
          const own = bar.getBoundingClientRect();
          const mark = bar.querySelector("b").getBoundingClientRect();
          return [own.left, own.width, (mark.left + mark.width / 2 - own.left) / own.width];
        })""",
    )
    judged = read_view(run).judged
    assert len(bars) == len(judged)
    assert len({(left, width) for left, width, _ in bars}) == 1
    lows = [row["auroc_low"] for row in judged]
    low = min(low, np.floor(10 * min(lows)) / 10)
    for (_, _, share), row in zip(bars, judged, strict=True):
        assert share == pytest.approx((row["auroc"] - low) / (high - low), abs=2e-3)
    seen.tab.set_viewport_size({"width": 1280, "height": 300})
    seen.tab.evaluate("document.querySelector('tr.few').scrollIntoView()")
    head = seen.tab.locator("#finding-table thead th").first.bounding_box()
    assert 0 <= head["y"] < 2


def test_an_address_leads_to_a_finding(see, page, folder):
    file = folder / "addressed.html"
    shutil.copy(page, file)
    seen = see(file, viewport={"width": 1280, "height": 500})
    seen.follow("#finding=Pleural%20Effusion")
    row = seen.tab.locator("tr[data-finding].lit")

    assert row.locator("th").get_attribute("data-name") == "Pleural Effusion"
    assert seen.tab.locator("tr.detail h3").inner_text() == "Pleural Effusion"
    head = seen.tab.locator("#finding-table > thead").bounding_box()
    box = row.bounding_box()
    assert head["y"] + head["height"] <= box["y"] + 2
    assert box["y"] + box["height"] <= 500
    assert seen.tab.evaluate("document.activeElement.innerText") == "Pleural Effusion"

    seen.tab.get_by_role("button", name="Nodule").click()
    assert seen.tab.evaluate("location.hash") == "#finding=Nodule"
    seen.tab.get_by_label("Filter").fill("mass")
    seen.follow("#finding=hernia")  # hidden by the filter, in small letters
    assert row.locator("th").get_attribute("data-name") == "Hernia"
    assert row.is_visible()
    seen.follow("#finding=%E0")  # not even text
    assert row.count() == 0
    seen.follow("#limits")
    assert "Not for clinical use" in seen.tab.locator("#limits").inner_text()


def test_what_not_to_trust_opens_to_names(see, page):
    seen = see(page)
    trusted = seen.tab.locator("#trust")

    assert "1 finding not scored" in trusted.inner_text()
    assert "Bronchiolitis" not in trusted.inner_text()
    trusted.get_by_text("1 finding not scored").click()
    assert "no positive or no negative: Bronchiolitis." in trusted.inner_text()


def test_a_comparison_says_which_side_is_better(see, run, rival, folder):
    file = write_joint_report([run, rival], folder / "by_study.html", n_resamples=50)
    table = compare_runs(run, rival, n_resamples=50).table.set_index(["rows", "measure", "finding"])
    seen = see(file)

    row = table.loc[("images", "auroc", "")]
    points = f"{100 * abs(row['difference']):.1f}"
    sentence = seen.tab.locator(".judged").inner_text()
    assert sentence.startswith("rival is worse than run: of 100 pairs of an image with a finding")
    assert f"it ranks {points} fewer the right way" in sentence
    tile = seen.tab.locator(".duel .tile").nth(2).inner_text()
    assert f"{table.loc[('studies', 'auroc', ''), 'difference']:+.3f}" in tile
    better = seen.tab.locator("tr[data-finding='2'] .who").inner_text()
    p = table.loc[("images", "auroc", "Nodule"), "p_holm"]
    assert better == ("run" if p < 0.05 else "cannot be told")
    seen.unfold()
    by_study = seen.tab.locator("#by-study tbody tr", has_text="Nodule").inner_text()
    nodule = table.loc[("studies", "auroc", "Nodule")]
    assert f"{nodule['difference']:+.3f} {nodule['low']:+.3f} to {nodule['high']:+.3f}" in by_study


def test_paper_gets_two_pages(see, full):
    seen = see(full)

    paper = seen.tab.pdf(format="A4")

    assert len(re.findall(rb"/Type\s*/Page\b", paper)) == 2


@pytest.fixture(scope="session")
def axe() -> str:
    """The program of axe-core, from npm."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm, which has axe-core")
    shared = subprocess.run([npm, "root", "-g"], capture_output=True, text=True).stdout.strip()
    for modules in (REPOSITORY / "node_modules", Path(shared)):
        if (modules / "axe-core" / "axe.min.js").exists():
            return (modules / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
    pytest.skip("no axe-core; `npm install --no-save axe-core` puts it into node_modules")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_nothing_serious(see, axe, request, kind, scheme):
    """Contrast, names, roles and keys, on a phone and on a desk, with everything opened."""
    for width in (390, 1280):
        options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
        seen = see(request.getfixturevalue(kind), **options)
        seen.unfold()
        seen.tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        seen.tab.get_by_role("button", name="Nodule").click()
        seen.tab.evaluate(axe)

        found = seen.tab.evaluate("axe.run().then(result => result.violations)")

        grave = [one for one in found if one["impact"] in ("serious", "critical")]
        assert [(one["id"], one["nodes"][0]["html"][:200]) for one in grave] == []
