"""Features go out with the ids of their images, and come back as they were."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.errors import ConfigError, StoreFormatError, StoreIncompleteError
from cxr_cache.store.exporting import export_features
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.importing import import_embeddings
from tests.small_stores import make_batch, make_store

DONE = np.array([0, 1, 2, 5, 7])


@pytest.fixture
def store(tmp_path):
    with make_store(tmp_path / "s.h5", 9, done=DONE) as opened:
        opened.record_failures(np.array([8]), ["the file is empty (0 bytes)"])
        yield opened


@pytest.mark.parametrize(
    ("features", "names"),
    [
        ("projected", ["embeddings"]),
        ("pooled", ["pooled"]),
        ("both", ["embeddings", "pooled"]),
    ],
)
def test_an_npz_file_and_a_table_hold_what_was_committed(store, tmp_path, features, names):
    said = export_features(store, tmp_path / "f.npz", features=features)
    assert said == (
        f"{tmp_path / 'f.npz'}: features of 5 images; 4 of 9 failed or are pending, and are left "
        "out"
    )
    committed, _ = make_batch(DONE)
    expected = np.concatenate([committed[name][:, 0] for name in names], axis=1)
    with np.load(tmp_path / "f.npz") as file:
        np.testing.assert_array_equal(file["embeddings"], expected)
        assert file["image_id"].tolist() == store.image_ids[DONE].tolist()
        assert file["study_uid"].tolist() == store.cohort.study_uids[DONE].tolist()
        np.testing.assert_array_equal(file["targets"], store.cohort.targets[DONE])
        assert tuple(file["findings"].tolist()) == store.findings

    export_features(store, tmp_path / "f.csv", features=features)
    table = pd.read_csv(tmp_path / "f.csv")
    assert table["image_id"].tolist() == store.image_ids[DONE].tolist()
    np.testing.assert_array_equal(table[list(store.findings)], store.cohort.targets[DONE])
    of_features = table.filter(regex=r"^(embeddings|pooled)_\d+$").astype("f4")
    np.testing.assert_array_equal(of_features, expected)
    assert not {"status", "error"} & set(table)


def test_what_goes_out_comes_in_again(store, tmp_path):
    export_features(store, tmp_path / "f.npz")
    import_embeddings(tmp_path / "f.npz", store.cohort, tmp_path / "back.h5")
    with FeatureStore.open(tmp_path / "back.h5") as back:
        rows = back.embedded_rows
        np.testing.assert_array_equal(rows, DONE)
        np.testing.assert_array_equal(back.embeddings[rows], store.embeddings[rows])


def test_a_parquet_file_or_the_name_of_its_library(store, tmp_path):
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"f\.parquet needs .* pip install pyarrow"):
            export_features(store, tmp_path / "f.parquet")
        assert not (tmp_path / "f.parquet").exists()
        return
    export_features(store, tmp_path / "f.parquet")
    assert len(pd.read_parquet(tmp_path / "f.parquet")) == len(DONE)


def test_refusals_say_what_to_do(store, tmp_path):
    with pytest.raises(ConfigError, match=r"f\.xlsx ends in \.xlsx; end it in \.npz, \.csv"):
        export_features(store, tmp_path / "f.xlsx")
    narrow = make_store(tmp_path / "narrow.h5", 2, shapes={"embeddings": (1, 8)})
    empty = make_store(tmp_path / "empty.h5", 2, done=[])
    with narrow, pytest.raises(StoreFormatError, match="holds no 'pooled'"):
        export_features(narrow, tmp_path / "f.npz", features="pooled")
    with empty, pytest.raises(StoreIncompleteError, match="has no finished row"):
        export_features(empty, tmp_path / "f.npz")
    assert not (tmp_path / "f.npz").exists()


def test_the_command_says_what_it_wrote(store, tmp_path):
    store.close()
    command = ["features", str(tmp_path / "s.h5"), "--out", str(tmp_path / "f.npz")]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert "features of 5 images; 4 of 9" in result.output
