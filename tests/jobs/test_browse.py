"""The map of a store: scikit-learn's components, what is counted, what is refused."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from cxr_cache.cli.main import cli
from cxr_cache.common import extras
from cxr_cache.config import BrowseConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.errors import ConfigError, RunError, StoreFormatError, StoreIncompleteError
from cxr_cache.evaluation.embedding_map import measure_unlikeness, place
from cxr_cache.jobs import browse
from cxr_cache.jobs.browse import write_map
from cxr_cache.models.run import Run
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import to_unit_length
from cxr_cache.training.train import fit_run
from tests.synthetic import IMPORTED, QUICK, WIDTH, make_cohort, make_embeddings, make_store

ODD = 7
"""An image unlike all others."""
FAILED = {3: "the file is empty", 8: "the file is empty", 11: "not an image"}
PENDING = 13


def make_partial_store(path: Path, cohort: Cohort) -> Path:
    """A store with failed rows, one that is pending, and an odd image."""
    embeddings = make_embeddings(cohort) + np.float32(5)
    embeddings[ODD] -= np.float32(10)
    shapes = {"embeddings": embeddings.shape[1:]}
    with FeatureStore.create(path, cohort, encoder=IMPORTED, features=shapes) as store:
        rows = np.setdiff1d(np.arange(len(cohort)), [*FAILED, PENDING])
        store.commit(rows, {"embeddings": embeddings[rows]}, np.zeros((len(rows), 32), np.uint8))
        store.record_failures(list(FAILED), list(FAILED.values()))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("browse")


@pytest.fixture(scope="module")
def store(folder) -> Path:
    return make_partial_store(folder / "some.h5", make_cohort(60, unlabelled=0.1))


@pytest.fixture(scope="module")
def run(folder) -> Run:
    return fit_run(make_store(folder / "own.h5", make_cohort(30)), folder / "run", QUICK).run


@pytest.fixture(scope="module")
def images(folder) -> Path:
    (folder / "images").mkdir()
    draw_images(folder / "images", 120)
    return folder / "images"


def draw_images(folder: Path, n: int) -> None:
    """Image files, each of a brightness of its own."""
    ramp = np.tile(np.arange(64, dtype=np.uint8) // 32, (64, 1))
    for row in range(n):
        Image.fromarray(ramp + np.uint8(2 * row)).save(folder / f"{row:05d}.png")


def browse_store(store: Path, out: Path, **options: Any) -> browse.MapPage:
    with FeatureStore.open(store) as opened:
        return write_map(opened, out, **options)


def read_data(page: Path) -> dict[str, Any]:
    """What the page's program draws."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def read_array(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


@pytest.mark.parametrize("n_rows", [200, 20])
def test_places_are_scikit_learns_principal_components_up_to_sign(n_rows):
    """Of a long mean, as unit vectors have it; more and fewer images than dimensions."""
    rng = np.random.default_rng(0)
    embeddings = to_unit_length(rng.normal(5, 1, (n_rows, 48)).astype(np.float32))
    shown = np.arange(0, n_rows, 3)
    expected = PCA(2, svd_solver="full").fit(embeddings.astype(np.float64))
    places = expected.transform(embeddings.astype(np.float64))[shown]
    found = place(embeddings, shown)
    signs = np.sign((found.coordinates * places).sum(axis=0))
    np.testing.assert_allclose(found.coordinates * signs, places, atol=1e-5)
    np.testing.assert_allclose(found.variance, expected.explained_variance_ratio_, rtol=1e-4)


def test_the_page_holds_the_places_labels_and_groups_of_the_store(store, tmp_path):
    page = browse_store(store, tmp_path / "map.html")
    data = read_data(page.path)
    with FeatureStore.open(store) as opened:
        rows, cohort = opened.embedded_rows, opened.cohort
        embeddings = normalize(opened.embeddings[rows, 0])
    assert data["ids"] == cohort.image_ids[rows].tolist()
    expected = PCA(2, svd_solver="full").fit_transform(embeddings.astype(np.float64))
    places = read_array(data["places"], "<u2").reshape(-1, 2).astype(float)
    for axis in (0, 1):
        assert abs(np.corrcoef(places[:, axis], expected[:, axis])[0, 1]) > 0.99999
    spans, expected_spans = np.ptp(places, axis=0), np.ptp(expected, axis=0)
    np.testing.assert_allclose(
        spans[1] / spans[0], expected_spans[1] / expected_spans[0], rtol=1e-3
    )
    targets = np.where(np.isnan(cohort.targets), 2, cohort.targets)[rows]
    for f, finding in enumerate(data["findings"]):
        packed = read_array(finding["codes"], "u1")
        codes = (packed[:, None] >> np.array([0, 2, 4, 6]) & 3).ravel()[: len(rows)]
        assert codes.tolist() == targets[:, f].tolist()
    projection = data["groupings"]["projection"]
    names = np.array(projection["names"])[read_array(projection["codes"], "u1")]
    assert names.tolist() == cohort.projections[rows].tolist()
    assert "split" not in data["groupings"]
    assert data["ids"][data["unusual"][0]] == page.furthest[0] == f"{ODD:05d}.png"


def test_failures_are_counted_by_reason_and_listed(store, tmp_path):
    page = browse_store(store, tmp_path / "map.html")
    assert page.failures == {"the file is empty": 2, "not an image": 1}
    assert (page.n_images, page.n_shown, page.n_pending) == (116, 116, 1)
    html = page.path.read_text()
    for row, reason in FAILED.items():
        assert f'<th scope="row">{row:05d}.png</th><td class="words why">{reason}</td>' in html
    assert "2 not on the map, failed: the file is empty" in page.to_text()
    assert "1 not on the map: they are still to be embedded" in page.to_text()
    first, second = (f"{100 * share:.1f}" for share in page.variance)
    assert f"first principal component, {first}\N{NO-BREAK SPACE}% of the variance" in html
    assert f"with {first} % and {second} % of the variance" in page.to_text()


def test_more_images_than_fit_are_a_random_sample_that_is_said(store, tmp_path, monkeypatch):
    monkeypatch.setattr(browse, "MAX_POINTS", 50)
    page = browse_store(store, tmp_path / "map.html")
    data = read_data(page.path)
    assert (page.n_shown, data["n"], len(set(data["ids"]))) == (50, 50, 50)
    assert set(page.furthest) < set(data["ids"])
    assert "50 of these 116" in page.path.read_text()
    assert "Of 116 images this is a random sample, with the furthest in it." in page.to_text()
    whole = read_data(browse_store(store, tmp_path / "again.html").path)
    assert whole["ids"] == data["ids"], "the same sample each time"


def test_pictures_up_to_the_limit_and_the_page_says_what_it_holds(
    store, images, tmp_path, monkeypatch
):
    every = browse_store(store, tmp_path / "all.html", image_dir=images)
    assert every.n_pictures == 116
    assert "This page holds 116 pictures.</strong>" in every.path.read_text()
    monkeypatch.setattr(browse, "MAX_PICTURES", 30)
    some = browse_store(store, tmp_path / "some.html", image_dir=images)
    data = read_data(some.path)
    assert len(data["pictures"]) == 30
    drawn = {data["ids"][int(number)] for number in data["pictures"]}
    assert set(some.furthest) < drawn
    assert "This page holds 30 pictures of its 116 images.</strong>" in some.path.read_text()
    assert "a random sample, and the 20 furthest from the others" in some.path.read_text()
    assert "It holds 30 pictures. If these are real radiographs, do not share" in some.to_text()


def test_a_picture_is_that_of_its_image(store, images, tmp_path):
    data = read_data(browse_store(store, tmp_path / "all.html", image_dir=images).path)
    for number, address in list(data["pictures"].items())[::17]:
        jpeg = base64.b64decode(address.partition(",")[2])
        (tmp_path / "one.jpg").write_bytes(jpeg)
        grey = np.asarray(Image.open(tmp_path / "one.jpg")).mean()
        assert abs(grey - 2 * int(data["ids"][int(number)][:5])) < 2


def test_the_split_and_the_labels_of_a_run_are_shown(run, folder, tmp_path):
    page = browse_store(folder / "own.h5", tmp_path / "map.html", run=run)
    data = read_data(page.path)
    split = data["groupings"]["split"]
    names = np.array(split["names"])[read_array(split["codes"], "u1")]
    expected = run.splits.set_index("image_id")["split"].loc[data["ids"]]
    assert names.tolist() == expected.tolist()
    assert set(names) == {"train", "test"}
    assert "The split is the one of the run run." in page.path.read_text()


def test_a_run_of_other_images_is_refused(run, store, tmp_path):
    other = make_cohort(40)
    other = replace(other, images=other.images.assign(image_id=[f"b{k}" for k in range(80)]))
    path = make_store(tmp_path / "other.h5", other)
    with pytest.raises(RunError, match=r"was not trained on the images of .*other.h5"):
        browse_store(path, tmp_path / "map.html", run=run)


def test_a_split_of_the_table_is_shown_without_a_run(tmp_path):
    cohort = make_cohort(20)
    given = np.where(np.arange(40) < 30, "train", "test")
    path = make_store(tmp_path / "given.h5", cohort.assign(given_split=given))
    page = browse_store(path, tmp_path / "map.html")
    assert read_data(page.path)["groupings"]["split"]["names"][:2] == ["test", "train"]
    assert "The split is the one that the data set comes with." in page.path.read_text()


def test_few_patients_or_wide_embeddings_have_no_distance(tmp_path):
    page = browse_store(make_store(tmp_path / "few.h5", make_cohort(4)), tmp_path / "map.html")
    assert (page.n_unusual, page.furthest) == (None, ())
    assert "Distance from the others was not measured" in page.path.read_text()
    assert read_data(page.path)["unlikeness"] is None
    wide = np.ones((40, 2049), np.float32)
    assert measure_unlikeness(wide, make_cohort(20)) is None


def test_no_image_is_measured_against_its_own_study():
    """A study of two equal images far from all others would hide itself."""
    cohort, rng = make_cohort(100), np.random.default_rng(0)
    embeddings = rng.normal(size=(200, WIDTH)).astype(np.float32)
    embeddings[:2] = 30 * rng.normal(size=WIDTH)
    found = measure_unlikeness(embeddings, cohort)
    assert found[:2].tolist() == [1.0, 1.0]
    assert ((found > 0) & (found <= 1)).all()


def test_labels_names_and_ids_are_text_on_the_page(tmp_path):
    odd = "</script><script>window.hacked = 1</script>"
    cohort = make_cohort(6)
    images = cohort.images.assign(image_id=[f"{odd}{k}" for k in range(12)])
    findings = (odd, *cohort.findings[1:])
    path = make_store(tmp_path / "odd.h5", replace(cohort, images=images, findings=findings))
    page = browse_store(path, tmp_path / "map.html")
    assert odd not in page.path.read_text()
    assert read_data(page.path)["findings"][0]["name"] == odd


def test_a_store_of_many_images_makes_a_page_that_opens(tmp_path, monkeypatch):
    """Long names, many findings, and more pictures than fit."""
    n = 21_000
    rng = np.random.default_rng(0)
    small = make_cohort(8)
    images = small.images.loc[np.zeros(n, int)].assign(
        image_id=[f"files/p10/p{k:08d}/s{k:08d}/{'0123abcd-' * 4}{k:08d}.jpg" for k in range(n)],
        study_uid=[f"s{k:08d}" for k in range(n)],
        patient_id=[f"p{k:08d}" for k in range(n)],
    )
    findings = tuple(f"finding {f}" for f in range(40))
    targets = (rng.random((n, 40)) < 0.1).astype(np.float32)
    path = make_store(
        tmp_path / "large.h5",
        Cohort(images, targets=targets, findings=findings, source={}),
        embeddings=rng.normal(size=(n, 1, 8)).astype(np.float32),
    )
    shares = np.linspace(1 / n, 1, n)
    monkeypatch.setattr(browse, "measure_unlikeness", lambda *_: shares)
    picture = "data:image/jpeg;base64," + 5_600 * "A"
    drawn = lambda _, ids, __: (dict.fromkeys(ids, picture), [])  # noqa: E731
    monkeypatch.setattr(browse, "draw_thumbnails", drawn)
    page = browse_store(path, tmp_path / "map.html", image_dir=tmp_path)
    assert (page.n_shown, page.n_pictures) == (20_000, 1_000)
    assert page.path.stat().st_size < 10e6
    assert "20,000 of these 21,000" in page.path.read_text()


# -- what is refused -------------------------------------------------------------------------------


def refuse(*words: object) -> str:
    """What a command says that fails."""
    result = CliRunner().invoke(cli, ["browse", *map(str, words)])
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    return result.stderr


def test_what_is_not_there_is_refused(store, tmp_path):
    out = ["--out", tmp_path / "map.html"]
    assert "There is no feature store at" in refuse(tmp_path / "no.h5", *out)
    assert "is not a folder" in refuse(store, *out, "--image-dir", tmp_path / "no")
    said = refuse(store, *out, "--image-dir", tmp_path)
    assert "holds none of the 116 images to show" in said
    assert "there is no folder" in refuse(store, "--out", tmp_path / "no" / "map.html")
    (tmp_path / "thesis.html").write_text("three years of work")
    said = refuse(store, "--out", tmp_path / "thesis.html")
    assert "is not a page of cxr-cache; choose another name with --out." in said
    assert (tmp_path / "thesis.html").read_text() == "three years of work"
    assert not (tmp_path / "map.html").exists()


def test_a_store_without_embeddings_is_refused(tmp_path):
    cohort = make_cohort(5)
    shapes = {"embeddings": (1, WIDTH)}
    path = tmp_path / "pending.h5"
    FeatureStore.create(path, cohort, encoder=IMPORTED, features=shapes).close()
    with pytest.raises(StoreIncompleteError, match=r"of 0 of its 10 images \(0 failed, 10 pending"):
        browse_store(path, tmp_path / "map.html")


def test_an_embedding_that_is_not_finite_is_refused(tmp_path):
    cohort = make_cohort(10)
    embeddings = make_embeddings(cohort)
    embeddings[4, 0, 2] = np.nan
    path = make_store(tmp_path / "nan.h5", cohort, embeddings=embeddings)
    with pytest.raises(StoreFormatError, match=r"'00004.png' holds NaN or infinity"):
        browse_store(path, tmp_path / "map.html")


def test_umap_is_refused_where_it_is_not_installed(store, tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "package_versions", lambda *_: {})
    with pytest.raises(ConfigError, match=r"--method umap needs umap-learn.*cxr-cache\[umap\]"):
        browse_store(store, tmp_path / "map.html", config=BrowseConfig(method="umap"))


def test_umap_places_what_is_shown_and_says_that_it_has_no_shares(store, tmp_path):
    pytest.importorskip("umap", reason="umap-learn is not installed")
    page = browse_store(store, tmp_path / "map.html", config=BrowseConfig(method="umap"))
    assert page.variance is None
    assert "UMAP: the axes have no unit" in page.path.read_text()
    places = read_array(read_data(page.path)["places"], "<u2").reshape(-1, 2)
    assert len(np.unique(places, axis=0)) == 116
