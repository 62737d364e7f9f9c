"""Features made elsewhere come in as they are, or not at all."""

from __future__ import annotations

import contextlib
import re
import tracemalloc

import numpy as np
import pytest

from cxr_cache.errors import ConfigError, DiskError, TableError
from cxr_cache.store.feature_store import DONE, FAILED, FeatureStore
from cxr_cache.store.importing import import_embeddings
from tests.small_stores import make_cohort


def write(path, image_ids, width: int = 6, dtype=np.float32, **others):
    values = np.random.default_rng(len(image_ids)).normal(size=(len(image_ids), width))
    np.savez(path, image_id=image_ids, embeddings=values.astype(dtype), **others)
    return values.astype(dtype).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_find_their_image(tmp_path, dtype):
    """In the table's order, whatever the file's."""
    cohort = make_cohort(12)
    order = np.random.default_rng(0).permutation(12)[:9]
    ids = np.append(cohort.image_ids[order], "elsewhere.png")
    values = write(tmp_path / "e.npz", ids, dtype=dtype)
    summary = import_embeddings(tmp_path / "e.npz", cohort, tmp_path / "s.h5")
    assert (summary.n_done, summary.n_without_embedding, summary.n_not_in_cohort) == (9, 3, 1)
    assert "12 images = 9 done + 3 failed + 0 pending" in summary.to_text()
    with FeatureStore.open(tmp_path / "s.h5") as store:
        assert (store.status == DONE).sum() == 9
        np.testing.assert_array_equal(store.embeddings[order, 0], values[:9])
        failed = np.flatnonzero(store.status == FAILED)
        assert store.read_errors(failed) == ["no embedding in e.npz"] * 3
        assert store.header.encoder["imported"]
        assert len(store.find_damaged()) == 0


@pytest.mark.parametrize("what", ["image_id", "embeddings"])
def test_python_objects_are_refused_and_the_advice_helps(tmp_path, what):
    """Columns of pandas become arrays of objects; unpickling them could run anything."""
    path, cohort = tmp_path / "e.npz", make_cohort(3)
    ids, matrix = cohort.image_ids.tolist(), np.random.default_rng(0).normal(size=(3, 4)).tolist()
    arrays = {"image_id": np.array(ids), "embeddings": np.array(matrix)}
    np.savez(path, **arrays | {what: arrays[what].astype(object)})
    with pytest.raises(TableError, match=r"e\.npz holds Python objects.*Save it with") as refused:
        import_embeddings(path, cohort, tmp_path / "s.h5")
    advice = re.search(r"Save it with (.*)\.$", str(refused.value))[1]
    exec(advice, {"np": np, "path": path, "ids": ids, "matrix": matrix})
    assert import_embeddings(path, cohort, tmp_path / "s.h5").n_done == 3


def test_the_identity_is_that_of_the_file(tmp_path):
    cohort, digests = make_cohort(3), []
    for n_extra in (0, 1, 0):
        write(tmp_path / "e.npz", np.append(cohort.image_ids, ["x.png"] * n_extra))
        import_embeddings(tmp_path / "e.npz", cohort, tmp_path / "s.h5", overwrite=True)
        with FeatureStore.open(tmp_path / "s.h5") as store:
            digests.append(store.header.encoder["weights_sha256"])
    assert digests[0] != digests[1]


def test_an_existing_store_is_kept(tmp_path):
    cohort = make_cohort(3)
    write(tmp_path / "e.npz", cohort.image_ids)
    import_embeddings(tmp_path / "e.npz", cohort, tmp_path / "s.h5")
    with pytest.raises(ConfigError, match=r"exists already.*--overwrite"):
        import_embeddings(tmp_path / "e.npz", cohort, tmp_path / "s.h5")
    import_embeddings(tmp_path / "e.npz", cohort, tmp_path / "s.h5", overwrite=True)


def test_a_failed_import_leaves_nothing(tmp_path, monkeypatch):
    cohort = make_cohort(3)
    write(tmp_path / "e.npz", cohort.image_ids)

    def fail(*_):
        raise DiskError("the disk is gone")

    monkeypatch.setattr(FeatureStore, "commit", fail)
    with pytest.raises(DiskError):
        import_embeddings(tmp_path / "e.npz", cohort, tmp_path / "s.h5")
    assert [file.name for file in tmp_path.iterdir()] == ["e.npz"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image_id": ["a"]}, r"lacks the key\(s\) \['embeddings'\]"),
        ({"embeddings": np.ones((1, 2))}, r"lacks the key\(s\) \['image_id'\]"),
        ({"image_id": ["a"], "embeddings": np.ones((2, 2))}, r"expected \(M, D\) and \(M,\)"),
        ({"image_id": ["a"], "embeddings": np.ones(1)}, r"expected \(M, D\) and \(M,\)"),
        ({"image_id": ["a"], "embeddings": np.ones((1, 2), int)}, "not floats"),
        ({"image_id": ["a", "a"], "embeddings": np.ones((2, 2))}, "lists an image_id twice"),
        ({"image_id": ["a"], "embeddings": np.full((1, 2), np.nan)}, "NaN, infinity.*'a'"),
        ({"image_id": ["a"], "embeddings": np.full((1, 2), 1e300)}, "too large for float32"),
        ({"image_id": ["zz"], "embeddings": np.ones((1, 2))}, "names none of the 4 images"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, arrays, message):
    np.savez(tmp_path / "e.npz", **arrays)
    with pytest.raises(TableError, match=message):
        import_embeddings(tmp_path / "e.npz", make_cohort(4), tmp_path / "s.h5")
    assert not (tmp_path / "s.h5").exists()


def test_an_encrypted_file_is_refused(tmp_path):
    path = tmp_path / "e.npz"
    np.savez(path, image_id=["a"], embeddings=np.ones((1, 2)))
    content = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(mark, at + 1)) >= 0:
            content[at + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(TableError, match=r"e\.npz cannot be read as an \.npz file: .*encrypted"):
        import_embeddings(path, make_cohort(4), tmp_path / "s.h5")


@pytest.mark.parametrize("seed", range(60))
def test_damaged_files_are_refused(tmp_path, seed):
    cohort, rng = make_cohort(4), np.random.default_rng(seed)
    write(tmp_path / "e.npz", cohort.image_ids)
    content = bytearray((tmp_path / "e.npz").read_bytes())
    position = int(rng.integers(len(content)))
    if seed % 3 == 0:
        del content[position:]
    else:
        content[position : position + 4] = rng.bytes(4)
    (tmp_path / "e.npz").write_bytes(content)
    with contextlib.suppress(TableError):  # any other error fails the test
        import_embeddings(tmp_path / "e.npz", cohort, tmp_path / "s.h5")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TableError, match=r"no file .*e\.npz"):
        import_embeddings(tmp_path / "e.npz", make_cohort(2), tmp_path / "s.h5")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_embeddings_are_read_part_by_part(tmp_path, monkeypatch, save, order):
    """In any order of the file's rows; but what lies column by column is read whole."""
    monkeypatch.setattr("cxr_cache.store.importing._ROWS_AT_ONCE", 300)
    cohort, rng = make_cohort(4000), np.random.default_rng(0)
    values = rng.standard_normal((4000, 512), np.float32)
    shuffled = rng.permutation(4000)
    matrix = np.asarray(values[shuffled], order=order)
    save(tmp_path / "e.npz", image_id=cohort.image_ids[shuffled], embeddings=matrix)
    tracemalloc.start()
    import_embeddings(tmp_path / "e.npz", cohort, tmp_path / "s.h5")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < {"C": 0.6, "F": 1.6}[order] * values.nbytes
    with FeatureStore.open(tmp_path / "s.h5") as store:
        np.testing.assert_array_equal(store.embeddings[:, 0], values)
