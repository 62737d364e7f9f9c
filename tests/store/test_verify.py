"""Verification: what is wrong with a store is found, named and can be repaired."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.config import ExtractConfig
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import ConfigError, StoreBusyError
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.store.feature_store import PENDING, FeatureStore
from cxr_cache.store.verify import CORRUPT, INCOMPLETE, MISMATCH, WHOLE, verify
from tests.small_stores import WITH_TOKENS, flip_bit, make_batch, make_cohort, make_store


def spoil(path: Path, name: str, row: int) -> None:
    with FeatureStore.open(path) as store:
        column = store.columns[name]
    flip_bit(path, column.offset + row * column.row_bytes, 1)


def run(*arguments: object):
    return CliRunner().invoke(cli, ["verify", *map(str, arguments)])


def test_a_whole_store_is_whole(tmp_path):
    with make_store(tmp_path / "s.h5", 20, done=slice(18), shapes=WITH_TOKENS) as store:
        store.record_failures([18, 19], ["missing", "empty"])
    found = verify(tmp_path / "s.h5")
    assert (found.n_done, found.n_failed, found.n_pending) == (18, 2, 0)
    assert (found.exit_status, found.bad_rows, found.duplicates) == (WHOLE, [], [])
    result = run(tmp_path / "s.h5")
    assert result.exit_code == 0
    assert "20 images = 18 done + 2 failed + 0 pending" in result.output
    assert "WHOLE" in result.output


def test_pending_rows_make_it_incomplete(tmp_path):
    make_store(tmp_path / "s.h5", 20, done=slice(5)).close()
    assert verify(tmp_path / "s.h5").exit_status == INCOMPLETE
    result = run(tmp_path / "s.h5")
    assert (result.exit_code, "INCOMPLETE" in result.output) == (1, True)


def test_failed_rows_are_said(tmp_path):
    """A store of which 12 of 19 rows had failed was called whole."""
    with make_store(tmp_path / "s.h5", 19, done=slice(7)) as store:
        store.record_failures(np.arange(7, 19), ["the file does not exist"] * 12)
    found = verify(tmp_path / "s.h5")
    assert found.exit_status == WHOLE
    said = "WHOLE BUT FOR 12 failed rows (63% of all): every other row is sound, and training"
    assert said in found.to_text()
    assert found.to_dict()["result"] == "whole but for failed rows"
    with FeatureStore.open(tmp_path / "s.h5", "r+") as store:
        store.mark_pending(np.array([3]))
    found = verify(tmp_path / "s.h5")
    assert found.exit_status == INCOMPLETE
    assert "12 failed rows (63% of all)" in found.to_text()


def test_a_store_in_which_every_row_failed_is_incomplete(tmp_path):
    with make_store(tmp_path / "s.h5", 1, done=slice(0)) as store:
        store.record_failures([0], ["the file does not exist"])
    found = verify(tmp_path / "s.h5")
    assert (found.exit_status, found.to_dict()["result"]) == (INCOMPLETE, "incomplete")
    assert "1 image = 0 done + 1 failed" in found.to_text()
    assert "no row holds an embedding; 1 failed row (100% of all)" in found.to_text()


def test_the_wrong_folder_does_not_make_sound_rows_bad(tmp_path):
    """With --repair they would be forgotten."""
    make_store(tmp_path / "s.h5", 5).close()
    with pytest.raises(ConfigError, match=r"None of the 5 images of the table is in .*s\.h5"):
        verify(tmp_path / "s.h5", image_dir=tmp_path, n_sampled=3, repair=True)
    assert verify(tmp_path / "s.h5").exit_status == WHOLE


def test_advice_for_imported_rows_is_to_import_them_again(tmp_path):
    encoder = {"name": "imported:x.npz", "imported": True, "weights_sha256": "0"}
    shapes, cohort = {"embeddings": (1, 4)}, make_cohort(3)
    with FeatureStore.create(tmp_path / "s.h5", cohort, encoder=encoder, features=shapes) as store:
        store.commit([0], *make_batch(np.array([0]), shapes))
        store.record_failures([1, 2], ["no embedding"] * 2)
    assert "`cxr-cache import --overwrite` tries again" in verify(tmp_path / "s.h5").to_text()


def test_corrupt_rows_are_listed_and_repaired(tmp_path):
    path = tmp_path / "s.h5"
    with make_store(path, 20, done=slice(19)) as store:
        store.record_failures([19], ["missing"])
        image_ids = store.image_ids
    spoil(path, "embeddings", 7)
    spoil(path, "row_digest", 11)
    spoil(path, "error", 19)
    result = run(path)
    assert result.exit_code == 3
    for row in (7, 11, 19):
        assert f"row {row}, {image_ids[row]}: " in result.output
    assert "do not match their digest" in result.output
    listed = json.loads(run(path, "--json").stdout)
    assert [bad["row"] for bad in listed["bad_rows"]] == [7, 11, 19]
    assert listed["result"] == "corrupt"

    result = run(path, "--repair")
    assert (result.exit_code, "REPAIRED: 3 bad rows" in result.output) == (1, True)
    with FeatureStore.open(path) as store:
        assert np.flatnonzero(store.status == PENDING).tolist() == [7, 11, 19]
    assert verify(path).exit_status == INCOMPLETE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["embeddings", "pooled", "tokens"])
def test_numbers_that_are_none_are_found(tmp_path, name, value):
    """Written with a sound digest: by another program, or by an encoder that went wrong."""
    rows = np.arange(6)
    features, sha256 = make_batch(rows, WITH_TOKENS)
    features[name].reshape(6, -1)[4, -1] = value
    with make_store(tmp_path / "s.h5", 6, done=slice(0), shapes=WITH_TOKENS) as store:
        store.commit(rows, features, sha256)
    found = verify(tmp_path / "s.h5")
    assert [(bad.row, bad.reason) for bad in found.bad_rows] == [
        (4, f"its {name} hold NaN or infinity")
    ]
    assert found.exit_status == CORRUPT


@pytest.mark.parametrize("value", [0, 0.25])
def test_constant_rows_are_found(tmp_path, value):
    rows = np.arange(6)
    features, sha256 = make_batch(rows, WITH_TOKENS)
    features["pooled"][2, 1] = value  # in the second view only
    with make_store(tmp_path / "s.h5", 6, done=slice(0), shapes=WITH_TOKENS) as store:
        store.commit(rows, features, sha256)
    found = verify(tmp_path / "s.h5")
    assert [(bad.row, bad.reason) for bad in found.bad_rows] == [
        (2, "its pooled are one number repeated")
    ]


def test_equal_embeddings_of_different_files_are_noted(tmp_path):
    """Not an error: a picture may have been saved twice. Equal files are no news at all."""
    rows = np.arange(6)
    features, sha256 = make_batch(rows)
    features["embeddings"][[3, 5]] = features["embeddings"][[1, 2]]
    sha256[5] = sha256[2]
    with make_store(tmp_path / "s.h5", 6, done=slice(0)) as store:
        store.commit(rows, features, sha256)
        image_ids = store.image_ids
    found = verify(tmp_path / "s.h5")
    assert found.duplicates == [(image_ids[1], image_ids[3])]
    assert found.exit_status == WHOLE


def test_a_damaged_structure_is_corrupt_and_a_missing_store_is_not(tmp_path):
    path = tmp_path / "s.h5"
    make_store(path, 20).close()
    with FeatureStore.open(path) as store:
        targets = store.columns["targets"]
    flip_bit(path, targets.offset)
    result = CliRunner().invoke(cli, ["verify", str(path)])
    assert result.exit_code == 3
    assert "image table" in result.output
    assert run(tmp_path / "none.h5").exit_code == 1


def test_a_store_is_not_repaired_while_it_is_written(tmp_path):
    with make_store(tmp_path / "s.h5", 20):
        assert verify(tmp_path / "s.h5").exit_status == WHOLE
        with pytest.raises(StoreBusyError):
            verify(tmp_path / "s.h5", repair=True)


# -- against the images -----------------------------------------------------------------


@pytest.fixture(scope="module")
def extracted(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder / "data", n_studies=4, image_size_px=64, seed=5)
    encoder = load_encoder("random:test_vit", precision="fp32")
    extract_embeddings(
        load_cohort(folder / "data"),
        folder / "data" / "images",
        folder / "s.h5",
        encoder,
        ExtractConfig(num_workers=0, flip=True),
    )
    return folder


@pytest.fixture
def copied(extracted, tmp_path) -> Path:
    return shutil.copytree(extracted, tmp_path / "copy")


def test_a_sample_encoded_again_agrees(copied):
    result = run(copied / "s.h5", "--images", copied / "data" / "images", "--sample", 3)
    assert result.exit_code == 0, result.output
    assert "3 images encoded again" in result.output


def test_changed_images_and_features_are_found(copied):
    images = copied / "data" / "images"
    with FeatureStore.open(copied / "s.h5", "r+") as store:
        image_ids = store.image_ids
        features = {name: store.read_rows(name, np.array([4])) for name in store.features}
        features["embeddings"] = features["embeddings"] + features["embeddings"].std()
        store.commit([4], features, store.read_rows("image_sha256", np.array([4])))
    shutil.copy(images / image_ids[0], images / image_ids[1])
    (images / image_ids[2]).unlink()
    result = run(copied / "s.h5", "--images", images)
    assert result.exit_code == 3
    assert f"row 1, {image_ids[1]}: its image has changed: sha256 " in result.output
    assert f"row 2, {image_ids[2]}: its image cannot be read any more" in result.output
    assert f"row 4, {image_ids[4]}: its embeddings have cosine 0." in result.output


def test_another_encoder_is_a_mismatch(copied):
    options = ["--images", copied / "data" / "images", "--model", "random:test_vit:9"]
    result = run(copied / "s.h5", *options)
    assert result.exit_code == MISMATCH
    assert "weights_sha256" in result.output


def test_imported_features_have_no_encoder(tmp_path):
    from cxr_cache.store.importing import import_embeddings
    from tests.small_stores import make_cohort

    cohort = make_cohort(4)
    values = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    np.savez(tmp_path / "e.npz", image_id=cohort.image_ids, embeddings=values)
    import_embeddings(tmp_path / "e.npz", cohort, tmp_path / "s.h5")
    assert run(tmp_path / "s.h5").exit_code == 0
    result = run(tmp_path / "s.h5", "--images", tmp_path)
    assert (result.exit_code, "imported" in result.output) == (4, True)
