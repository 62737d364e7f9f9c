"""Hits, misses and false alarms, and the small pictures of them."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from cxr_cache.errors import ConfigError
from cxr_cache.evaluation.scored import ScoredImages
from cxr_cache.report.cases import MAX_FINDINGS, PER_KIND, find_cases
from cxr_cache.report.pictures import EDGE_PX, draw_thumbnails


def make_images(targets: np.ndarray, probabilities: np.ndarray) -> ScoredImages:
    N, F = targets.shape
    ids = np.array([f"{row}.png" for row in range(N)], object)
    empty = np.full(N, "", object)
    findings = tuple(f"f{k}" for k in range(F))
    return ScoredImages(ids, ids, empty, empty, targets, probabilities, findings)


@pytest.mark.parametrize("seed", range(5))
def test_cases_are_the_surest_of_their_kind(seed):
    """Against a loop that sorts all images of a kind."""
    rng = np.random.default_rng(seed)
    targets = rng.choice([0.0, 1.0, np.nan], (60, 3))
    images = make_images(targets, rng.random((60, 3)).round(1))  # many ties
    thresholds = [0.5, 0.3, 2.0]  # the last is never called

    cases = find_cases(images, thresholds)

    for f, finding in enumerate(images.findings):
        kinds: dict[str, list[tuple[float, int]]] = {"hits": [], "misses": [], "false_alarms": []}
        for row in range(60):
            p, called = images.probabilities[row, f], images.probabilities[row, f] >= thresholds[f]
            if targets[row, f] == 1:
                kinds["hits" if called else "misses"].append((-p if called else p, row))
            elif targets[row, f] == 0 and called:
                kinds["false_alarms"].append((-p, row))
        for kind, found in kinds.items():
            expected = [f"{row}.png" for _, row in sorted(found)[:PER_KIND]]
            assert [case["image_id"] for case in cases[finding][kind]] == expected
    assert cases["f2"]["hits"] == cases["f2"]["false_alarms"] == []


def test_of_many_findings_the_common_ones_are_shown():
    targets = np.triu(np.ones((MAX_FINDINGS + 5, MAX_FINDINGS + 5)))  # f0 once, f1 twice, ...
    cases = find_cases(make_images(targets, targets / 2), [0.4] * len(targets))

    assert list(cases) == [f"f{k}" for k in range(5, MAX_FINDINGS + 5)]


@pytest.fixture
def image_dir(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (
        ("tall.png", (400, 300)),
        ("wide.png", (200, 300)),
        ("rgb.png", (99, 99, 3)),
    ):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_thumbnails_are_small_square_pictures(image_dir):
    names = ["tall.png", "wide.png", "rgb.png", "tall.png"]
    pictures, problems = draw_thumbnails(image_dir, names, None)

    assert list(pictures) == names[:3]
    assert problems == []
    for name, address in pictures.items():
        assert address.startswith("data:image/jpeg;base64,")
        jpeg = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        assert jpeg.size == (EDGE_PX, EDGE_PX)
        assert jpeg.mode == ("RGB" if name == "rgb.png" else "L")


def test_thumbnails_are_cut_as_the_encoder_saw_them(tmp_path):
    """A white frame at the left and right of a wide image: cropped away, or squashed in."""
    pixels = np.full((100, 200), 90, np.uint8)
    pixels[40:60] = 120
    pixels[:, :40] = pixels[:, 160:] = 255
    Image.fromarray(pixels).save(tmp_path / "framed.png")

    def brightest(resize: str) -> int:
        pictures, _ = draw_thumbnails(tmp_path, ["framed.png"], {"resize": resize})
        data = base64.b64decode(pictures["framed.png"].partition(",")[2])
        return int(np.asarray(Image.open(io.BytesIO(data))).max())

    assert brightest("crop") < 160
    assert brightest("squash") > 240


def test_an_image_that_cannot_be_drawn_is_named(image_dir):
    pictures, problems = draw_thumbnails(image_dir, ["tall.png", "broken.png", "gone.png"], None)

    assert list(pictures) == ["tall.png"]
    assert problems[0].startswith("broken.png: the file begins like a PNG")
    assert problems[1] == "gone.png: the file does not exist."


def test_another_folder_is_refused(image_dir):
    with pytest.raises(ConfigError, match=r"is not a folder; give the one with the run's images"):
        draw_thumbnails(image_dir / "nowhere", ["tall.png"], None)
    with pytest.raises(
        ConfigError, match=r"holds none of the 2 images to show; the first is a\.png"
    ):
        draw_thumbnails(image_dir, ["a.png", "b.png"], None)
