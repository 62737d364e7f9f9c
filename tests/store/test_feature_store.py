"""What a feature store promises while nothing goes wrong, and what it says when something does."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import time
import tracemalloc
from collections import namedtuple
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import xxhash

from cxr_cache.common import files as durable
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.labels import load_labels
from cxr_cache.errors import (
    DiskFullError,
    StoreBusyError,
    StoreFormatError,
    StoreNotFoundError,
    TableError,
)
from cxr_cache.store.feature_store import (
    DONE,
    FAILED,
    PENDING,
    WITHOUT_TOKENS,
    FeatureStore,
    RowCounts,
)
from cxr_cache.store.layout import ERROR_WIDTH, FEATURES
from tests.small_stores import (
    ENCODER,
    SHAPES,
    WITH_TOKENS,
    done_rows,
    flip_bit,
    make_batch,
    make_cohort,
    make_store,
)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_committed_comes_back(tmp_path, seed):
    """Any rows, in any order and number of batches, through our reader and through plain h5py."""
    rng = np.random.default_rng(seed)
    n_images = int(rng.integers(2, 60))
    rows = rng.permutation(n_images)[: rng.integers(1, n_images + 1)]
    path = tmp_path / "s.h5"
    with make_store(path, n_images, done=slice(0), shapes=WITH_TOKENS) as store:
        for batch in np.array_split(rows, rng.integers(1, 5)):
            store.commit(batch, *make_batch(batch, WITH_TOKENS))

    expected, sha256 = make_batch(rows, WITH_TOKENS)
    with FeatureStore.open(path) as store, h5py.File(path, "r") as file:
        assert sorted(np.flatnonzero(store.status == DONE)) == sorted(rows)
        for name in FEATURES:
            np.testing.assert_array_equal(store.read_column(name)[rows], expected[name])
            np.testing.assert_array_equal(store.read_rows(name, rows), expected[name])
            np.testing.assert_array_equal(file[name][:][rows], expected[name])
        np.testing.assert_array_equal(file["image_sha256"][:][rows], sha256)
        np.testing.assert_array_equal(file["status"][:], store.status)
        assert len(store.find_damaged()) == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_single_views_are_read_alone(tmp_path, seed):
    """Any rows and views, repeated and out of order, and as neighbours in one call."""
    rng = np.random.default_rng(seed)
    rows, views = rng.integers(0, 20, 50), rng.integers(0, 2, 50)
    rows[10:20], views[10:20] = np.arange(10) // 2, np.arange(10) % 2
    with make_store(tmp_path / "s.h5", 20, shapes=WITH_TOKENS) as store:
        for name in FEATURES:
            expected = store.read_column(name)[rows, views]
            np.testing.assert_array_equal(store.read_views(name, rows, views), expected)
            buffer = np.full_like(expected, 7)
            assert store.read_views(name, rows, views, out=buffer) is buffer
            np.testing.assert_array_equal(buffer, expected)
        assert store.read_views("tokens", rows[:0], views[:0]).shape == (0, 5, 6)


def test_neighbouring_views_are_one_read_and_nothing_else_is_read(tmp_path, monkeypatch):
    with make_store(tmp_path / "s.h5", 20, shapes=WITH_TOKENS) as store:
        sizes, preadv = [], os.preadv

        def count(fd, buffers, offset):
            sizes.append(sum(map(len, buffers)))
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", count)
        store.read_views("tokens", np.array([3, 3, 4, 9]), np.array([0, 1, 0, 1]))
    view = 5 * 6 * 2  # bytes
    assert sizes == [3 * view, view]


def test_rows_views_and_buffers_that_do_not_fit_are_refused(tmp_path):
    with make_store(tmp_path / "s.h5", 20, shapes=WITH_TOKENS) as store:
        for row, view in ((20, 0), (-1, 0), (3, 2), (3, -1)):
            with pytest.raises(IndexError, match=r"s\.h5 has 20 rows of 2 views"):
                store.read_views("tokens", np.array([0, row]), np.array([0, view]))
        one = (np.array([0]), np.array([0]))
        sliced = np.empty((1, 5, 12), np.float16)[..., ::2]
        for out in (np.empty((1, 5, 6), np.float32), np.empty((2, 5, 6), np.float16), sliced):
            with pytest.raises(ValueError, match=r"not float16 \(1, 5, 6\) in one piece"):
                store.read_views("tokens", *one, out=out)


def test_a_file_cut_short_while_it_is_open_is_no_garbage(tmp_path):
    path = tmp_path / "s.h5"
    with make_store(path, 20, shapes=WITH_TOKENS) as store:
        column = store.columns["tokens"]
        os.truncate(path, column.offset + column.n_bytes - 50)
        rows = np.arange(20)
        with pytest.raises(StoreFormatError, match=r"s\.h5 was cut short .* bytes of tokens"):
            store.read_rows("tokens", rows)
        with pytest.raises(StoreFormatError, match="was cut short"):
            store.read_views("tokens", rows, rows % 2)
        store.read_rows("embeddings", rows)  # before the cut


def test_the_image_table_comes_back(tmp_path):
    cohort = make_cohort(30)
    make_store(tmp_path / "s.h5", 30).close()
    with FeatureStore.open(tmp_path / "s.h5") as store:
        stored = store.cohort
    for column in ("image_ids", "study_uids", "patient_ids", "projections", "targets"):
        np.testing.assert_array_equal(getattr(stored, column), getattr(cohort, column))
    assert (stored.findings, stored.source) == (cohort.findings, cohort.source)


def test_further_columns_of_the_image_table_come_back_under_any_name(tmp_path):
    facts = {"sex": ["F", "", "M"], "../age (years)": ["57", "ö" * 300, ""], "targets": "x"}
    cohort = make_cohort(3).assign(**facts)
    options = {"encoder": ENCODER, "features": SHAPES}
    with FeatureStore.create(tmp_path / "s.h5", cohort, **options) as store:
        assert store.header.format_version == 2
    with FeatureStore.open(tmp_path / "s.h5", "r+") as store:
        assert store.cohort.images.equals(cohort.images)
        fewer = make_cohort(3).assign(weight=70)
        taken = store.replace(fewer, np.arange(3), features=SHAPES)
    with taken:
        assert taken.cohort.images.equals(fewer.images)


def test_a_table_without_further_columns_is_written_as_version_0_1_0_reads_it(tmp_path):
    make_store(tmp_path / "s.h5").close()
    with h5py.File(tmp_path / "s.h5") as file:
        assert json.loads(bytes(file.attrs["format_version"])) == 1
        assert "image_columns" not in file.attrs
        assert not any(name.startswith("image_column") for name in file)


def test_rows_are_counted_by_their_state(tmp_path):
    with make_store(tmp_path / "s.h5", 9, done=slice(4), shapes=WITH_TOKENS) as store:
        features, sha256 = make_batch(np.array([4, 5]))
        two_views = {name: np.repeat(values, 2, axis=1) for name, values in features.items()}
        store.commit([4, 5], two_views, sha256)  # without tokens
        store.record_failures([8], ["too dark"])
        assert store.count_rows() == RowCounts(9, 4, 1, 4, n_without_tokens=2)


def test_a_store_is_a_table_with_its_features_where_they_are_asked_for(tmp_path):
    with make_store(tmp_path / "s.h5", 9, done=slice(4), shapes=WITH_TOKENS) as store:
        store.record_failures([8], ["too dark"])
        table = store.to_frame()
        cohort = store.cohort
        assert table[cohort.images.columns.tolist()].equals(cohort.images)
        assert table["status"].tolist() == ["done"] * 4 + ["pending"] * 4 + ["failed"]
        assert table["error"].tolist() == [""] * 8 + ["too dark"]
        np.testing.assert_array_equal(table[list(store.findings)].to_numpy(), cohort.targets)
        assert table.shape == (9, 4 + 2 + 3)
        table.assign(sex="F").to_csv(tmp_path / "labels.csv", index=False)
        findings, targets = load_labels(tmp_path / "labels.csv", store.image_ids)
        assert findings == store.findings  # the table can be given back as --labels
        np.testing.assert_array_equal(targets, cohort.targets)
        more = store.to_frame(features=["embeddings", "tokens"])
        assert more.shape == (9, 9 + 8 + 5 * 6)
        embeddings = more.filter(like="embeddings_").to_numpy()
        np.testing.assert_array_equal(embeddings[:4], store.embeddings[:4, 0])
        assert np.isnan(embeddings[4:]).all()
        tokens = store.read_column("tokens")[:4, 0].reshape(4, -1).astype(np.float32)
        np.testing.assert_array_equal(more.filter(like="tokens_").to_numpy()[:4], tokens)
        with pytest.raises(KeyError, match="no 'logits'; its features are embeddings, pooled, tok"):
            store.to_frame(features=["logits"])


@pytest.mark.parametrize("name", ["image_id", "sex"])
def test_a_text_too_long_for_the_image_table_is_refused_when_it_is_written(tmp_path, name):
    cohort = make_cohort(3).assign(**{name: ["a", "b" * 16_385, "c"]})
    with pytest.raises(TableError, match=f"{name} of image 2 of 3 is .* 16,385 bytes"):
        FeatureStore.create(tmp_path / "s.h5", cohort, encoder=ENCODER, features=SHAPES)
    assert not (tmp_path / "s.h5").exists()


def test_a_digest_is_xxh3_over_id_file_and_features(tmp_path):
    """Documented, so that others can check a store without this package."""
    make_store(tmp_path / "s.h5", 7, shapes=WITH_TOKENS).close()
    with h5py.File(tmp_path / "s.h5") as file:
        for row in range(7):
            digest = xxhash.xxh3_128()
            for name in ("image_id", "image_sha256", *FEATURES):
                digest.update(np.ascontiguousarray(file[name][row : row + 1]).tobytes())
            assert digest.digest() == file["row_digest"][row].tobytes()


def test_the_file_is_plain_contiguous_and_has_no_holes(tmp_path):
    path = tmp_path / "s.h5"
    make_store(path, 500, canary=np.ones((8, 8), np.float32), shapes=WITH_TOKENS).close()
    with h5py.File(path) as file:
        for name, dataset in file.items():
            assert dataset.chunks is None, name
            assert dataset.compression is None, name
            assert dataset.id.get_offset() % 64 == 0, name
            assert not h5py.h5t.check_string_dtype(dataset.dtype) or dataset.dtype.kind == "S"
        assert all(isinstance(value, np.bytes_) for value in file.attrs.values())
    status = path.stat()
    assert status.st_blocks * 512 >= status.st_size


def test_the_same_store_has_the_same_bytes(tmp_path):
    for name in ("a.h5", "b.h5"):
        make_store(tmp_path / name, 9).close()
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_creating_leaves_nothing_but_the_store(tmp_path):
    (tmp_path / ".s.h5.4711.tmp").write_bytes(b"left by a killed process")
    make_store(tmp_path / "s.h5").close()
    assert [file.name for file in tmp_path.iterdir()] == ["s.h5"]


def test_failures_keep_their_reason(tmp_path):
    """Cut at a whole letter where it is long."""
    long = "ö" * ERROR_WIDTH
    with make_store(tmp_path / "s.h5", 5, done=slice(0)) as store:
        store.record_failures([3, 1], ["the file is empty (0 bytes)", long])
        assert store.status.tolist() == [PENDING, FAILED, PENDING, FAILED, PENDING]
        reasons = store.read_errors(np.array([1, 3]))
        assert reasons == ["ö" * (ERROR_WIDTH // 2), "the file is empty (0 bytes)"]
        assert len(store.find_damaged()) == 0


@pytest.mark.parametrize("column", ["image_sha256", "row_digest", "embeddings", "pooled"])
def test_a_changed_bit_of_a_done_row_is_found(tmp_path, column):
    path = tmp_path / "s.h5"
    make_store(path, 20).close()
    with FeatureStore.open(path) as store:
        place = store.columns[column]
    flip_bit(path, place.offset + 13 * place.row_bytes + 5, 6)
    with FeatureStore.open(path) as store:
        assert store.find_damaged().tolist() == [13]
        assert store.find_damaged(np.arange(10)).tolist() == []


def test_a_changed_reason_and_a_status_without_meaning_are_found(tmp_path):
    path = tmp_path / "s.h5"
    with make_store(path, 6, done=slice(3)) as store:
        store.record_failures([3], ["no such file"])
        error, status = store.columns["error"], store.columns["status"]
    flip_bit(path, error.offset + 3 * error.row_bytes)
    flip_bit(path, status.offset + 1, 7)
    with FeatureStore.open(path) as store:
        assert store.find_damaged().tolist() == [1, 3]


def test_forgotten_rows_stay_forgotten(tmp_path):
    """Their old bytes do not count again, should only a new status reach the disk."""
    path = tmp_path / "s.h5"
    with make_store(path, 6) as store:
        store.mark_pending(np.array([2, 4]))
        assert np.flatnonzero(store.status == PENDING).tolist() == [2, 4]
        place = store.columns["status"].offset
    flip_bit(path, place + 2)  # done again, it says
    with FeatureStore.open(path) as store:
        assert store.find_damaged().tolist() == [2]


@pytest.mark.parametrize("seed", range(5))
def test_no_bit_outside_the_rows_changes_unnoticed(tmp_path, seed):
    path = tmp_path / "s.h5"
    with make_store(path, 12, canary=np.ones((8, 8), np.float32)) as store:
        rows = [store.columns[name] for name in ("status", "error", "row_digest", "image_sha256")]
        rows += [store.columns[name] for name in SHAPES]
    fixed = np.ones(path.stat().st_size, bool)
    for column in rows:
        fixed[column.offset : column.offset + column.n_bytes] = False
    rng = np.random.default_rng(seed)
    for position in rng.choice(np.flatnonzero(fixed), 40, replace=False):
        bit = int(rng.integers(8))
        flip_bit(path, position, bit)
        with pytest.raises(StoreFormatError):
            FeatureStore.open(path)
        flip_bit(path, position, bit)
    FeatureStore.open(path).close()


def test_a_longer_or_shorter_file_is_refused(tmp_path):
    path = tmp_path / "s.h5"
    make_store(path).close()
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0")
    with pytest.raises(StoreFormatError, match="damaged"):
        FeatureStore.open(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(StoreFormatError):
        FeatureStore.open(path)


def test_another_table_takes_rows_over(tmp_path):
    path, old, new = tmp_path / "s.h5", make_cohort(10), make_cohort(14, seed=1)
    with make_store(path, 10, done=slice(8)) as store:
        rows = np.array([*range(7, -1, -1), *[-1] * 6])
        replaced = store.replace(new, rows, features=SHAPES)
        with pytest.raises(StoreBusyError):  # still held
            FeatureStore.open(path, "r+")
        replaced.close()
    features, sha256 = make_batch(np.arange(8)[::-1])
    with FeatureStore.open(path) as store:
        assert (store.status == DONE).tolist() == [True] * 8 + [False] * 6
        np.testing.assert_array_equal(store.embeddings[:8], features["embeddings"])
        np.testing.assert_array_equal(store.read_column("image_sha256")[:8], sha256)
        np.testing.assert_array_equal(store.cohort.targets, new.targets)
        assert len(store.find_damaged()) == 0
    assert len(old) == 10
    assert [file.name for file in tmp_path.iterdir()] == ["s.h5"]


def test_a_store_can_be_given_tokens_later(tmp_path):
    """Its embeddings stay bit for bit, and count as before, while the tokens come."""
    path, rows = tmp_path / "s.h5", np.arange(10)
    old = {name: WITH_TOKENS[name] for name in SHAPES}
    everything, sha256 = make_batch(rows, WITH_TOKENS)
    with make_store(path, 10, done=slice(8), shapes=old) as store:
        store.record_failures([8], ["missing"])
        taken = np.where(store.status == DONE, rows, -1)
        given = store.replace(make_cohort(10), taken, features=WITH_TOKENS, boundary_block=10)
    with given as store:
        assert store.header.boundary_block == 10
        assert store.status.tolist() == [WITHOUT_TOKENS] * 8 + [PENDING] * 2
        store.commit([2, 5], {k: v[[2, 5]] for k, v in everything.items()}, sha256[[2, 5]])
        assert done_rows(store).tolist() == [2, 5]
        assert store.embedded_rows.tolist() == list(range(8))
        assert len(store.find_damaged()) == 0
        for name in old:
            np.testing.assert_array_equal(store.read_column(name)[:8], everything[name][:8])
        np.testing.assert_array_equal(store.read_rows("image_sha256", rows[:8]), sha256[:8])

        again = store.replace(make_cohort(8), rows[7::-1], features=WITH_TOKENS, boundary_block=10)
    with again as store:  # half-way: rows move with what they have
        assert done_rows(store).tolist() == [2, 5]
        assert (store.status[[0, 1, 3, 4, 6, 7]] == WITHOUT_TOKENS).all()
        np.testing.assert_array_equal(store.embeddings, everything["embeddings"][7::-1])
        np.testing.assert_array_equal(store.read_column("tokens")[2], everything["tokens"][5])
        assert len(store.find_damaged()) == 0


def test_a_row_without_tokens_has_a_digest_over_the_rest(tmp_path):
    path, rows = tmp_path / "s.h5", np.arange(6)
    features, sha256 = make_batch(rows, {name: WITH_TOKENS[name] for name in SHAPES})
    with make_store(path, 6, done=slice(0), shapes=WITH_TOKENS) as store:
        store.commit(rows, features, sha256)
        columns = {name: store.columns[name] for name in ("pooled", "tokens", "status")}
    flip_bit(path, columns["tokens"].offset + 2 * columns["tokens"].row_bytes)  # not there yet
    flip_bit(path, columns["pooled"].offset + 3 * columns["pooled"].row_bytes)
    flip_bit(path, columns["status"].offset + 4, 1)  # done, it says
    with FeatureStore.open(path) as store:
        assert store.find_damaged().tolist() == [3, 4]


def test_no_row_lacks_tokens_where_no_row_has_them(tmp_path):
    path = tmp_path / "s.h5"
    with make_store(path, 6) as store:
        status = store.columns["status"]
    flip_bit(path, status.offset + 3, 1)  # 1 -> 3
    with FeatureStore.open(path) as store:
        assert store.find_damaged().tolist() == [3]


def test_tokens_that_could_not_be_written_cost_no_embedding(tmp_path, monkeypatch):
    """A disk without reserved space (copy-on-write) is full: at any of the writes."""
    rows = np.arange(6)
    everything, sha256 = make_batch(rows, WITH_TOKENS)
    old = {name: everything[name] for name in SHAPES}
    pwrite = os.pwrite
    for n_before in range(6):
        path = tmp_path / f"{n_before}.h5"
        with make_store(path, 6, done=slice(0), shapes=WITH_TOKENS) as store:
            store.commit(rows, old, sha256)
            n_left = [n_before]

            def write(fd, data, offset, n_left=n_left):
                n_left[0] -= 1
                if n_left[0] == -1:
                    raise OSError(errno.ENOSPC, "no space")
                return pwrite(fd, data, offset)

            monkeypatch.setattr(os, "pwrite", write)
            with pytest.raises(DiskFullError):
                store.commit(rows, everything, sha256)
            monkeypatch.undo()
        with FeatureStore.open(path) as store:
            assert (store.status == WITHOUT_TOKENS).all()
            assert len(store.find_damaged()) == 0
            np.testing.assert_array_equal(store.embeddings, everything["embeddings"])


def test_a_reader_keeps_the_file_that_it_opened(tmp_path):
    """A writer that replaces the table must not shift rows under a training."""
    path = tmp_path / "s.h5"
    with make_store(path, 10) as store, FeatureStore.open(path) as reader:
        before = np.array(reader.embeddings)
        store.replace(make_cohort(30, seed=2), np.full(30, -1), features=SHAPES).close()
        np.testing.assert_array_equal(reader.embeddings, before)
        assert len(reader.find_damaged()) == 0


def test_arrays_outlive_their_store(tmp_path):
    with make_store(tmp_path / "s.h5", 5) as store:
        embeddings = store.embeddings
    np.testing.assert_array_equal(embeddings, make_batch(np.arange(5))[0]["embeddings"])
    with pytest.raises(ValueError, match="read-only"):
        embeddings[0] = 0


def test_a_store_travels_to_another_process(tmp_path):
    with make_store(tmp_path / "s.h5", 5) as store:
        copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.embeddings, make_batch(np.arange(5))[0]["embeddings"])
    with pytest.raises(ValueError, match="opened for reading"):
        copy.mark_pending(np.array([1]))


def test_a_link_to_a_store_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "s.h5"
    link.symlink_to(tmp_path / "disk" / "real.h5")
    with make_store(link, 4):
        assert link.is_symlink()
        with pytest.raises(StoreBusyError):
            FeatureStore.open(tmp_path / "disk" / "real.h5", "r+")
    assert FeatureStore.open(link).n_images == 4


def test_a_batch_of_the_wrong_shape_writes_nothing(tmp_path):
    with make_store(tmp_path / "s.h5", 5, done=slice(0)) as store:
        features, sha256 = make_batch(np.arange(2))
        with pytest.raises(ValueError, match="has shape"):
            store.commit([0, 1, 2], features, sha256)
        with pytest.raises(ValueError, match="the store has"):
            store.commit([0, 1], {"embeddings": features["embeddings"]}, sha256)
        with pytest.raises(ValueError, match="the store has"):
            store.commit([0, 1], make_batch(np.arange(2), WITH_TOKENS)[0], sha256)
        assert (store.status == PENDING).all()


# -- messages ---------------------------------------------------------------------------


def test_a_missing_store_is_said_to_be_missing(tmp_path):
    with pytest.raises(StoreNotFoundError, match=r"no feature store at .*s\.h5.*cxr-cache extract"):
        FeatureStore.open(tmp_path / "s.h5")


def test_other_files_are_not_stores(tmp_path):
    path = tmp_path / "s.h5"
    path.write_text("image_id,embedding\n")
    with pytest.raises(StoreFormatError, match=r"not a feature store.*cxr-cache import"):
        FeatureStore.open(path)
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros(3)
    with pytest.raises(StoreFormatError, match="no attribute 'format_version'"):
        FeatureStore.open(path)


def test_a_newer_format_is_named(tmp_path):
    path = tmp_path / "s.h5"
    make_store(path).close()
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = np.bytes_(b"4")
    wording = "format_version: 4 in the store, 1 or 2 or 3 in this"
    with pytest.raises(StoreFormatError, match=wording):
        FeatureStore.open(path)


def test_a_full_disk_is_met_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    with pytest.raises(DiskFullError, match=r"s\.h5 needs [\d,]+ bytes, .* has 1,000 free"):
        FeatureStore.create(tmp_path / "s.h5", make_cohort(9), encoder=ENCODER, features=SHAPES)
    assert list(tmp_path.iterdir()) == []


def test_the_space_is_stated_before_it_is_taken_or_refused(tmp_path, monkeypatch):
    stated = []
    usage = namedtuple("usage", "total used free")
    shapes = {"embeddings": (1, 8), "tokens": (1, 197, 768)}
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda _: usage(0, 0, 2_500_000_000))
    with make_store(
        tmp_path / "s.h5", 9, done=slice(0), shapes=shapes, on_space=stated.append
    ) as store:
        columns = store.columns.values()
        assert stated[0].n_bytes == sum(column.n_bytes for column in columns)
        assert stated[0].n_token_bytes == 9 * 197 * 768 * 2
        monkeypatch.setattr(durable.shutil, "disk_usage", lambda _: usage(0, 0, 1000))
        with pytest.raises(DiskFullError, match=r"needs [\d,]+ bytes, .* has 1,000 free"):
            store.require_space(make_cohort(9), shapes, stated.append)
    assert re.fullmatch(
        r".*s\.h5 takes 2\.7 MB \(tokens 2\.7 MB\); 2\.5 GB are free\.", stated[0].to_text()
    )
    assert stated[1].n_free == 1000


def test_what_a_killed_writer_left_is_gone_before_space_is_counted(tmp_path):
    make_store(tmp_path / "s.h5").close()
    (tmp_path / ".s.h5.4711.tmp").write_bytes(b"half of a new file")
    FeatureStore.open(tmp_path / "s.h5", "r+").close()
    assert [file.name for file in tmp_path.iterdir()] == ["s.h5"]


def test_reading_needs_no_permission_to_write(tmp_path):
    path = tmp_path / "s.h5"
    make_store(path, 3).close()
    path.chmod(0o444)
    with FeatureStore.open(path) as store:
        assert len(store) == 3
    assert os.listdir(tmp_path) == ["s.h5"]  # noqa: PTH208


def test_a_store_of_a_folder_is_refused(tmp_path: Path):
    with pytest.raises(StoreNotFoundError):
        FeatureStore.open(tmp_path)


@pytest.mark.slow
def test_a_million_rows_are_opened_without_reading_them(tmp_path, monkeypatch):
    """Checked, table included, in less than a second of processor time and a few megabytes."""
    monkeypatch.setattr(
        "cxr_cache.store.feature_store.reserve", lambda _: None
    )  # a sparse file is enough
    N = 1_000_000
    names = np.char.mod("files/p10/p10000032/s50414267/%040d.jpg", np.arange(N))
    studies = np.char.mod("s%08d", np.arange(N) // 2)
    cohort = Cohort(
        pd.DataFrame(
            {
                "image_id": names,
                "study_uid": studies,
                "patient_id": studies,
                "projection": "Frontal",
            }
        ),
        targets=np.zeros((N, 35), np.float32),
        findings=tuple(f"finding {f}" for f in range(35)),
        source={"table.csv": "ab" * 32},
    )
    shapes = {"embeddings": (1, 512), "pooled": (1, 768)}
    path = tmp_path / "s.h5"
    FeatureStore.create(path, cohort, encoder=ENCODER, features=shapes).close()
    tracemalloc.start()
    mark = time.process_time()
    with FeatureStore.open(path) as store:
        taken = time.process_time() - mark
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (len(store), len(done_rows(store))) == (N, 0)
        assert store.image_ids[-1] == names[-1]
    assert taken < 1
    assert peak < 10e6
