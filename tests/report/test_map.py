"""The map of a store in a browser: what a person sees, points at and types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cxr_cache.jobs.browse import write_map
from cxr_cache.store.feature_store import FeatureStore
from tests.jobs.test_browse import draw_images, make_partial_store, read_array, read_data
from tests.report.test_page import browser, see  # noqa: F401  # fixtures
from tests.synthetic import FINDINGS, make_cohort

N_COLOURS = "canvas => { const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, \
canvas.height); const seen = new Set(); for (let i = 0; i < data.length; i += 4) if (data[i + 3]) \
seen.add(`${data[i]},${data[i + 1]},${data[i + 2]}`); return seen.size; }"
"""How many colours are on a canvas."""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("map")
    cohort = make_cohort(60, unlabelled=0.1)
    patients = [f"patient {row // 4}" for row in range(len(cohort))]
    store = make_partial_store(folder / "some.h5", cohort.assign(patient_id=patients))
    draw_images(folder, len(cohort))
    with FeatureStore.open(store) as opened:
        return write_map(opened, folder / "map.html", image_dir=folder).path


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_width_scrolls_sideways(see, page, width, scheme):  # noqa: F811
    seen = see(page, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert seen.width() == width
    assert seen.tab.eval_on_selector("#canvas", N_COLOURS) > 3, "the map is drawn"
    seen.tab.click("summary")
    assert seen.width() == width


def test_everything_works_by_keyboard(see, page):  # noqa: F811
    seen = see(page)
    tab = seen.tab
    tab.focus("#canvas")
    tab.keyboard.press("ArrowRight")
    first = tab.inner_text("#one h2")
    tab.keyboard.press("ArrowRight")
    second = tab.inner_text("#one h2")
    assert first != second
    tab.keyboard.press("ArrowLeft")
    assert tab.inner_text("#one h2") != second
    picture = tab.locator("#one img").bounding_box()
    assert picture["width"] == picture["height"], "a radiograph is not stretched"
    tab.keyboard.press("+")
    assert tab.get_attribute("#canvas", "class") == "zoomed"
    tab.keyboard.press("0")
    assert tab.get_attribute("#canvas", "class") == ""
    tab.keyboard.press("Escape")
    assert tab.inner_text("#one") == "No image is pointed at."
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_legend_counts_and_hides(see, page):  # noqa: F811
    seen = see(page)
    tab = seen.tab
    modes = tab.eval_on_selector_all("#mode option", "all => all.map(one => one.textContent)")
    assert modes == ["finding", "projection", "distance from the others"]
    assert len(seen.texts("#finding option")) == len(FINDINGS)
    tab.select_option("#mode", "projection")
    assert not tab.is_visible("#finding")
    assert [text.split() for text in seen.texts("#legend li")] == [
        ["Frontal", "59"],
        ["Lateral", "57"],
    ]
    before = tab.eval_on_selector("#canvas", "canvas => canvas.toDataURL()")
    tab.locator("#legend input").first.focus()
    tab.keyboard.press("Space")
    tab.wait_for_function("b => document.getElementById('canvas').toDataURL() !== b", arg=before)
    tab.select_option("#mode", "distance")
    assert ["furthest", "1", "%", "2"] in [text.split() for text in seen.texts("#legend li")]


def test_pointing_at_an_image_shows_it(see, page):  # noqa: F811
    seen = see(page)
    tab = seen.tab
    tab.click("#furthest button >> nth=0")
    assert tab.inner_text("#one h2") == "00007.png"
    assert "Lateral" in tab.inner_text("#one dl")
    assert "patient 1" in tab.inner_text("#one dl")
    assert "100.0 % quantile" in tab.inner_text("#one dl")
    tab.fill("#search", "00030.png")
    assert tab.inner_text("#found") == "1 of 1"
    assert tab.inner_text("#one h2") == "00030.png"
    tab.fill("#search", "patient 3")
    assert tab.inner_text("#found") == "1 of 3; Enter: the next"  # one of its four is pending
    tab.press("#search", "Enter")
    assert tab.inner_text("#found").startswith("2 of 3")
    tab.fill("#search", "nobody")
    assert tab.inner_text("#found") == "no image on the map"


def test_a_mouse_finds_the_image_under_it_and_a_click_keeps_it(see, page):  # noqa: F811
    data = read_data(page)
    places = read_array(data["places"], "<u2").reshape(-1, 2) / 65535
    extent = np.array(data["extent"])
    seen = see(page)
    tab = seen.tab
    tab.locator("#canvas").scroll_into_view_if_needed()
    box = tab.locator("#canvas").bounding_box()
    size = np.array([box["width"], box["height"]])
    unit = ((size - 28) / extent).min()  # one scale for both axes, with a margin of 14 pixels
    of_pixels = size / 2 + (places - extent / 2) * unit * [1, -1] + [box["x"], box["y"]]
    apart = np.linalg.norm(of_pixels[:, None] - of_pixels, axis=2) + 99 * np.eye(len(places))
    alone = np.flatnonzero(apart.min(axis=1) > 3)[:5]
    assert len(alone) == 5
    for image in alone:
        tab.mouse.move(*of_pixels[image])
        assert tab.inner_text("#one h2") == data["ids"][image]
    tab.mouse.click(*of_pixels[alone[0]])
    tab.mouse.move(box["x"] + box["width"] + 60, box["y"] + 10)
    assert tab.inner_text("#one h2") == data["ids"][alone[0]]
