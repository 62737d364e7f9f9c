"""Neighbours of an image: scikit-learn's, with what they share with it, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.neighbors import NearestNeighbors

from cxr_cache.cli.main import cli
from cxr_cache.config import ExtractConfig, SimilarConfig
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import ConfigError, StoreIncompleteError, StoreMismatchError
from cxr_cache.jobs.similar import encode_file, find_similar
from cxr_cache.store import feature_store
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.store.feature_store import FeatureStore
from tests.jobs.test_browse import FAILED, PENDING, make_partial_store
from tests.synthetic import make_cohort


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("similar")


@pytest.fixture(scope="module")
def store(folder) -> Path:
    """Three studies of two images make a patient."""
    cohort = make_cohort(60)
    patients = [f"p{row // 6}" for row in range(len(cohort))]
    return make_partial_store(folder / "some.h5", cohort.assign(patient_id=patients))


@pytest.fixture(scope="module")
def encoded(folder, encoder) -> tuple[Path, Path]:
    """Store and image folder of phantoms, through a small encoder."""
    written = write_phantoms(folder / "phantoms", n_studies=6, image_size_px=64)
    cohort = load_cohort(folder / "phantoms")
    config = ExtractConfig(num_workers=0)
    extract_embeddings(cohort, written.image_dir, folder / "phantoms.h5", encoder, config)
    return folder / "phantoms.h5", written.image_dir


@pytest.mark.parametrize("bytes_at_once", [1, 1 << 22])
def test_neighbours_are_scikit_learns(store, monkeypatch, bytes_at_once):
    """However few rows are read at a time."""
    monkeypatch.setattr(feature_store, "_BYTES_AT_ONCE", bytes_at_once)
    with FeatureStore.open(store) as opened:
        rows = opened.embedded_rows
        embeddings, ids = opened.embeddings[rows, 0], opened.image_ids[rows]
        search = NearestNeighbors(n_neighbors=11, metric="cosine").fit(embeddings)
        distances, expected = search.kneighbors(embeddings[[20]])
        found = find_similar(opened, str(ids[20]))
    assert found.neighbours["image_id"].tolist() == ids[expected[0, 1:]].tolist()
    np.testing.assert_allclose(found.neighbours["similarity"], 1 - distances[0, 1:], atol=1e-6)
    assert found.n_compared == len(rows) - 1


def test_it_is_said_who_is_of_the_same_study_and_patient(store):
    with FeatureStore.open(store) as opened:
        found = find_similar(opened, "00030.png", SimilarConfig(count=1000)).neighbours
    relation = found.set_index("image_id")["relation"]
    assert relation["00031.png"] == "same study"
    assert {relation[f"{row:05d}.png"] for row in (32, 33, 34, 35)} == {"same patient"}
    assert (relation != "").sum() == 5


def test_every_embedding_is_read_once(store, monkeypatch):
    read: list[int] = []
    plain = FeatureStore.read_views

    def watch(self, name, rows, *args):
        read.extend(rows.tolist())
        return plain(self, name, rows, *args)

    monkeypatch.setattr(FeatureStore, "read_views", watch)
    with FeatureStore.open(store) as opened:
        find_similar(opened, "00030.png")
        assert sorted(read) == opened.embedded_rows.tolist()


def test_the_same_projection_alone(store):
    with FeatureStore.open(store) as opened:
        found = find_similar(opened, "00030.png", SimilarConfig(count=99, same_projection=True))
    assert set(found.neighbours["projection"]) == {"Frontal"}
    assert found.n_compared == len(found.neighbours) == 60 - 1 - 1  # itself, and a failed one


def test_the_table_has_what_is_known(store):
    result = CliRunner().invoke(cli, ["similar", str(store), "00030.png", "--count", "3"])
    assert result.exit_code == 0, result.output
    about, compared, blank, head, *rows = result.output.splitlines()
    assert about.startswith("00030.png (Frontal; study 15; patient p5; ")
    assert compared == f"compared with 115 images of {store}"
    names = ["similarity", "image", "study", "patient", "projection", "relation", "findings"]
    assert (blank, head.split()) == ("", names)
    assert len(rows) == 3
    assert all(re.match(r"0\.\d{4} +\d{5}\.png  ", row) for row in rows)


def test_a_file_of_the_store_is_found_as_itself(encoded, encoder):
    store, image_dir = encoded
    path = min(image_dir.iterdir())
    with FeatureStore.open(store) as opened:
        query = encode_file(opened, str(path), encoder)
        found = find_similar(opened, query, SimilarConfig(count=2))
        row = opened.image_ids.tolist().index(path.name)
        np.testing.assert_allclose(query.embedding, opened.embeddings[row, 0], rtol=1e-4, atol=1e-5)
    first = found.neighbours.iloc[0]
    assert (first["image_id"], first["relation"]) == (path.name, "same file")
    assert first["similarity"] == pytest.approx(1, abs=1e-5)
    assert found.is_file
    assert "a file, of which study and patient are not known" in found.to_text()


def test_the_command_encodes_a_file_by_the_encoder_of_the_store(encoded, tmp_path):
    store, image_dir = encoded
    copy = tmp_path / "new.png"
    copy.write_bytes(min(image_dir.iterdir()).read_bytes())
    result = CliRunner().invoke(cli, ["similar", str(store), str(copy), "--count", "1"])
    assert result.exit_code == 0, result.output
    assert "same file" in result.output


# -- what is refused -------------------------------------------------------------------------------


def refuse(*words: object, status: int = 1) -> str:
    result = CliRunner().invoke(cli, ["similar", *map(str, words)])
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    return result.stderr


def test_an_unknown_image_is_refused_with_the_closest_ids(store):
    said = refuse(store, "0030.png")
    assert "has no image '0030.png', and there is no such file. Did you mean 00030.png" in said
    with (
        FeatureStore.open(store) as opened,
        pytest.raises(ConfigError, match=r"Did you mean 00030"),
    ):
        find_similar(opened, "0030.png")


def test_images_without_an_embedding_are_refused_with_the_reason(store):
    failed, reason = next(iter(FAILED.items()))
    said = refuse(store, f"{failed:05d}.png")
    assert f"00003.png of {store} has no embedding (it failed: {reason}). Give another" in said
    assert "(it is pending)" in refuse(store, f"{PENDING:05d}.png")


def test_files_that_cannot_be_compared_are_refused(store, encoded, tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("no image")
    assert f"{text} cannot be used: " in refuse(encoded[0], text)
    said = refuse(store, text)
    assert "there is no encoder here to compare them with. Give the id of an image" in said
    said = refuse(encoded[0], text, "--same-projection")
    assert "--same-projection needs the projection of" in said
    assert "There is no feature store at" in refuse(tmp_path / "no.h5", text)


def test_another_encoder_is_refused(encoded):
    with (
        FeatureStore.open(encoded[0]) as opened,
        pytest.raises(
            StoreMismatchError, match=r"was made by another encoder:\n.*\n  weights_sha256"
        ),
    ):
        encode_file(opened, "any.png", load_encoder("random:test_vit:9", precision="fp32"))


def test_options_of_a_file_are_refused_with_an_id(store):
    said = refuse(store, "00030.png", "--model", "biomedclip", status=2)
    assert "--model goes with an image file; 00030.png is an id." in said


def test_an_unknown_projection_is_refused(tmp_path):
    cohort = make_cohort(10)
    blank = replace(cohort, images=cohort.images.assign(projection=""))
    path = make_partial_store(tmp_path / "blank.h5", blank)
    said = refuse(path, "00000.png", "--same-projection")
    assert "--same-projection needs the projection of the image, which is not known" in said


def test_an_image_alone_has_no_neighbours(tmp_path):
    cohort = make_cohort(10)
    shapes = {"embeddings": (1, 4)}
    path = tmp_path / "one.h5"
    with FeatureStore.create(path, cohort, encoder={"name": "x"}, features=shapes) as store:
        one = np.ones((1, 1, 4), np.float32)
        store.commit([2], {"embeddings": one}, np.zeros((1, 32), np.uint8))
        with pytest.raises(StoreIncompleteError, match=r"a comparison needs 2"):
            find_similar(store, "00002.png")
