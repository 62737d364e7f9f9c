"""Parts of an extraction come together as if there had been one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from cxr_cache.config import ExtractConfig, TrainConfig
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.encoding import cosines
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import ConfigError, StoreBusyError, StoreIncompleteError, StoreMismatchError
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.store.feature_store import DONE, FAILED, PENDING, FeatureStore
from cxr_cache.store.merge import merge
from cxr_cache.training.train import fit_run
from tests.small_stores import done_rows, flip_bit

QUICK = ExtractConfig(batch_size=4, num_workers=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, n_studies=6, image_size_px=64, seed=2)
    cohort = load_cohort(folder)
    (folder / "images" / cohort.image_ids[3]).write_bytes(b"")  # one row fails
    encoder = load_encoder("random:test_vit", precision="fp32")
    extract_embeddings(cohort, folder / "images", folder / "whole.h5", encoder, QUICK)
    return folder, cohort, encoder


@pytest.fixture
def parts(data, tmp_path) -> list[Path]:
    return [make_part(data, tmp_path, number, 3) for number in (1, 2, 3)]


def make_part(data, folder: Path, number: int, of: int, **options) -> Path:
    root, cohort, encoder = data
    path = folder / f"{number}-of-{of}.h5"
    config = dataclasses.replace(QUICK, part=(number, of), **options)
    extract_embeddings(cohort, root / "images", path, encoder, config)
    return path


def test_merged_parts_equal_one_extraction(data, parts, tmp_path):
    root, cohort, encoder = data
    summary = merge(reversed(parts), tmp_path / "s.h5")
    assert (summary.n_done, summary.n_failed, summary.n_pending) == (len(cohort) - 1, 1, 0)
    with (
        FeatureStore.open(tmp_path / "s.h5") as merged,
        FeatureStore.open(root / "whole.h5") as whole,
    ):
        np.testing.assert_array_equal(merged.image_ids, whole.image_ids)
        np.testing.assert_array_equal(merged.status, whole.status)
        done, failed = whole.status == DONE, np.flatnonzero(whole.status == FAILED)
        assert cosines(merged.embeddings[done], whole.embeddings[done]).min() >= 0.9999
        assert merged.read_errors(failed) == whole.read_errors(failed)
        assert merged.header.part is None
        assert len(merged.find_damaged()) == 0
    again = extract_embeddings(cohort, root / "images", tmp_path / "s.h5", encoder, QUICK)
    assert again.n_computed == 0  # it is a store like any other


def test_facts_about_images_go_from_the_table_to_the_tables_of_a_run(data, tmp_path):
    """In parts, merged, continued from a table that has them only later, and trained."""
    root, cohort, encoder = data
    labels = np.arange(len(cohort)) % 2 == np.arange(35)[:, None] % 2
    known = dataclasses.replace(
        cohort.assign(sex="F", age=np.arange(len(cohort)) + 7), targets=labels.T.astype(np.float32)
    )
    paths = [make_part((root, known, encoder), tmp_path, number, 2) for number in (1, 2)]
    merge(paths, tmp_path / "s.h5")
    with FeatureStore.open(tmp_path / "s.h5") as store:
        assert store.cohort.images.equals(known.images)
    later = known.assign(age=lambda images: "0" + images["age"], view_position="PA")
    summary = extract_embeddings(later, root / "images", tmp_path / "s.h5", encoder, QUICK)
    assert (summary.n_computed, summary.n_taken_over) == (0, len(cohort) - 1)
    config = TrainConfig(epochs=(1,), n_folds=2, batch_size=2, hidden=(4,), n_jobs=1)
    run = fit_run(tmp_path / "s.h5", tmp_path / "run", config).run
    for name in ("predictions", "out_of_fold"):
        table = run.read_table(name).set_index("image_id")
        wanted = later.images.set_index("image_id").loc[table.index]
        assert table[wanted.columns.tolist()].equals(wanted.astype(table["age"].dtype))


def test_parts_cover_every_row_once(data, tmp_path):
    _, cohort, _ = data
    for of in (1, 2, 5, len(cohort)):
        ids = []
        for number in range(1, of + 1):
            folder = tmp_path / str(of)
            folder.mkdir(exist_ok=True)
            with FeatureStore.open(make_part(data, folder, number, of)) as part:
                ids += part.image_ids.tolist()
        assert ids == cohort.image_ids.tolist()
    with pytest.raises(ConfigError, match="fewer parts"):
        make_part(data, tmp_path, 1, 100)


def test_pending_and_damaged_rows_stay_pending(data, parts, tmp_path):
    root, cohort, encoder = data
    with FeatureStore.open(parts[1], "r+") as part:
        part.mark_pending(np.array([0]))
        column, first_row = part.columns["embeddings"], part.header.part["first_row"]
    flip_bit(parts[1], column.offset + column.row_bytes)
    summary = merge(parts, tmp_path / "s.h5")
    assert (summary.n_pending, summary.n_damaged) == (2, 1)
    assert "`cxr-cache extract` without --part" in summary.to_text()
    with FeatureStore.open(tmp_path / "s.h5") as store:
        pending = np.flatnonzero(store.status == PENDING)
        assert pending.tolist() == [first_row, first_row + 1]
    extract_embeddings(cohort, root / "images", tmp_path / "s.h5", encoder, QUICK)
    with FeatureStore.open(tmp_path / "s.h5") as store:
        assert (store.status != PENDING).all()


def test_parts_that_have_half_their_tokens_are_merged_as_they_are(data, parts, tmp_path):
    root, cohort, encoder = data
    merge(parts, tmp_path / "plain.h5")
    with FeatureStore.open(tmp_path / "plain.h5") as store:
        plain, usable = np.array(store.embeddings), done_rows(store)

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    config = dataclasses.replace(QUICK, batch_size=2, unfreeze_layers=2)
    for number, part in enumerate(parts, 1):
        with pytest.raises(KeyboardInterrupt):
            extract_embeddings(
                cohort,
                root / "images",
                part,
                encoder,
                dataclasses.replace(config, part=(number, 3)),
                on_progress=stop,
            )
    summary = merge(parts, tmp_path / "s.h5")
    assert summary.n_done + summary.n_without_tokens == len(usable)
    assert summary.n_without_tokens > 0
    assert f"{summary.n_without_tokens} pending rows lack nothing but" in summary.to_text()
    with FeatureStore.open(tmp_path / "s.h5") as store:
        np.testing.assert_array_equal(store.embedded_rows, usable)
        np.testing.assert_array_equal(store.embeddings[usable], plain[usable])
        assert store.header.boundary_block == encoder.identity.n_blocks - 2
        assert len(store.find_damaged()) == 0
    extract_embeddings(cohort, root / "images", tmp_path / "s.h5", encoder, config)
    with FeatureStore.open(tmp_path / "s.h5") as store:
        np.testing.assert_array_equal(done_rows(store), usable)
        np.testing.assert_array_equal(store.embeddings[usable], plain[usable])


def test_parts_with_other_tokens_are_named(data, parts, tmp_path):
    with_tokens = make_part(data, tmp_path / "two", 2, 3, unfreeze_layers=2)
    with pytest.raises(StoreMismatchError, match=r"features: .* in the first, .*tokens.* in the"):
        merge([parts[0], with_tokens, parts[2]], tmp_path / "s.h5")
    others = [make_part(data, tmp_path / "three", n, 3, unfreeze_layers=3) for n in (1, 3)]
    with pytest.raises(StoreMismatchError, match="boundary_block: 3 in the first, 4 in the other"):
        merge([others[0], with_tokens, others[1]], tmp_path / "s.h5")


def test_missing_double_and_foreign_parts_are_named(data, parts, tmp_path):
    target = tmp_path / "s.h5"
    with pytest.raises(StoreMismatchError, match=r"Part 2 of 3 is missing.*--part 2/3"):
        merge([parts[0], parts[2]], target)
    copy = tmp_path / "copy.h5"
    copy.write_bytes(parts[1].read_bytes())
    with pytest.raises(StoreMismatchError, match="are both part 2 of 3"):
        merge([*parts, copy], target)
    with pytest.raises(StoreMismatchError, match="is a whole store and no part"):
        merge([*parts, data[0] / "whole.h5"], target)
    with pytest.raises(StoreMismatchError, match="no part to merge"):
        merge([], target)
    flipped = make_part(data, tmp_path / "other", 2, 3, flip=True)
    with pytest.raises(StoreMismatchError, match=r"features: .*\(1, .*\(2, "):
        merge([parts[0], flipped, parts[2]], target)
    folder, cohort, _ = data
    other = load_encoder("random:test_vit:4", precision="fp32")
    foreign = tmp_path / "foreign.h5"
    extract_embeddings(
        cohort, folder / "images", foreign, other, dataclasses.replace(QUICK, part=(2, 3))
    )
    with pytest.raises(StoreMismatchError, match=r"weights_sha256: '.*' in the first, '.*' in the"):
        merge([parts[0], foreign, parts[2]], target)
    assert not target.exists()


def test_a_part_that_is_written_and_a_store_that_exists_are_refused(parts, tmp_path):
    with FeatureStore.open(parts[0], "r+"), pytest.raises(StoreBusyError, match=r"1-of-3\.h5"):
        merge(parts, tmp_path / "s.h5")
    merge(parts, tmp_path / "s.h5")
    with pytest.raises(ConfigError, match=r"exists already.*--overwrite"):
        merge(parts, tmp_path / "s.h5")
    merge(parts, tmp_path / "s.h5", overwrite=True)


def test_a_part_goes_on_as_itself_only(data, parts):
    root, cohort, encoder = data
    with pytest.raises(StoreMismatchError, match="part: 1 in the store, 2 in this run"):
        extract_embeddings(
            cohort, root / "images", parts[0], encoder, dataclasses.replace(QUICK, part=(2, 3))
        )
    again = dataclasses.replace(QUICK, part=(1, 3))
    assert extract_embeddings(cohort, root / "images", parts[0], encoder, again).n_computed == 0


def test_parts_without_any_embedding_are_no_success(parts, tmp_path):
    for path in parts:
        with FeatureStore.open(path, "r+") as part:
            part.mark_pending(part.embedded_rows)
    with pytest.raises(StoreIncompleteError, match="No row of the 3 parts holds an embedding"):
        merge(parts, tmp_path / "s.h5")
    assert not (tmp_path / "s.h5").exists()
