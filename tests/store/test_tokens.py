"""Tokens of a batch are the same wherever they wait."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from cxr_cache.common import devices
from cxr_cache.config import TrainConfig
from cxr_cache.errors import ConfigError, StoreFormatError
from cxr_cache.store import rows as stored_rows
from cxr_cache.store import tokens as token_sources
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.tokens import ResidentTokens, StoredTokens, open_tokens
from tests.small_stores import WITH_TOKENS, make_store

N_IMAGES = 30
STORE_ROWS = np.array([i for i in range(N_IMAGES) if i % 3])  # every third image has no label, say
CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path):
    with make_store(tmp_path / "s.h5", N_IMAGES, shapes=WITH_TOKENS) as store:
        yield store


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(STORE_ROWS), generator=generator)
    return rows, torch.randint(2, rows.shape, generator=generator)


@pytest.mark.parametrize("place", ["ram", "device", "disk", "auto"])
@pytest.mark.parametrize("batch_size", [1, 7, 20, 64])
def test_batches_are_the_rows_and_views_asked_for(store, place, batch_size):
    rows, views = draw(batch_size)
    source = open_tokens(store, STORE_ROWS, CPU, place)
    batches = [batch.clone() for batch in source.batches(rows, views, batch_size)]
    assert source.n_views == 2
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    expected = store.read_column("tokens")[STORE_ROWS[rows.numpy()], views.numpy()]
    np.testing.assert_array_equal(torch.cat(batches).numpy(), expected)


def test_a_reader_that_stops_early_leaves_nothing_behind(store):
    rows, views = draw(0)
    batches = StoredTokens(store, STORE_ROWS).batches(rows, views, 3)
    first = next(batches).clone()
    batches.close()
    again = next(StoredTokens(store, STORE_ROWS).batches(rows, views, 3))
    assert torch.equal(first, again)


def test_a_batch_stays_what_it_is_while_it_is_used(store):
    """Its memory is filled anew only when the next one has been asked for."""
    rows, views = draw(3)
    expected = store.read_column("tokens")[STORE_ROWS[rows.numpy()], views.numpy()]
    for i, batch in enumerate(StoredTokens(store, STORE_ROWS).batches(rows, views, 2)):
        time.sleep(0.01)  # the reading thread has time to be ahead
        np.testing.assert_array_equal(batch.numpy(), expected[2 * i : 2 * i + 2])


def test_an_error_of_the_reading_thread_reaches_the_training(store):
    rows, views = draw(0)
    source = StoredTokens(store, STORE_ROWS)
    batches = source.batches(rows, views, 4)
    next(batches)
    store.path.open("r+b").truncate(store.columns["tokens"].offset)
    with pytest.raises(StoreFormatError, match="was cut short while it was read"):
        list(source.batches(rows, views, 4))


def test_tokens_that_do_not_fit_stay_on_the_disk(store, monkeypatch):
    n_bytes = len(STORE_ROWS) * store.columns["tokens"].row_bytes
    monkeypatch.setattr(token_sources, "free_ram_bytes", lambda: 2 * n_bytes)
    assert isinstance(open_tokens(store, STORE_ROWS, CPU, "auto"), ResidentTokens)
    monkeypatch.setattr(token_sources, "free_ram_bytes", lambda: 2 * n_bytes - 2)
    assert isinstance(open_tokens(store, STORE_ROWS, CPU, "auto"), StoredTokens)


def test_what_cannot_be_in_memory_is_refused_with_numbers_and_advice(store, monkeypatch):
    monkeypatch.setattr(devices, "free_ram_bytes", lambda: 1000)
    monkeypatch.setattr(stored_rows, "_MUCH", 0)
    taken = r"GB of memory, and 0\.0 GB are free\. "
    with pytest.raises(ConfigError, match=rf"^The tokens of 20 images .*{taken}.*--tokens-in disk"):
        open_tokens(store, STORE_ROWS, CPU, "ram")
    with pytest.raises(ConfigError, match=rf"^The features of 20 images .*{taken}.* by --labels"):
        stored_rows.read_features(store, STORE_ROWS, TrainConfig())


def test_free_memory_is_a_number_of_this_machine():
    assert 10**8 < token_sources.free_ram_bytes() < 10**14


def test_opened_for_reading_is_enough(store):
    with FeatureStore.open(store.path) as reader:
        rows, views = draw(1)
        (batch,) = StoredTokens(reader, STORE_ROWS).batches(rows, views, 64)
    assert batch.dtype == torch.float16
