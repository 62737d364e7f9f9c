"""Tokens: cached in the pass that makes the embeddings, or given to a store later."""

from __future__ import annotations

import dataclasses
import shutil
import tracemalloc
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.common import files as durable
from cxr_cache.config import ExtractConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.images import read_image
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders import encoding
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.encoding import cosines, decode_tokens
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import (
    ConfigError,
    DiskFullError,
    EncoderError,
    StoreMismatchError,
    TooManyFailuresError,
)
from cxr_cache.store import feature_store
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.store.feature_store import DONE, FAILED, PENDING, WITHOUT_TOKENS, FeatureStore
from cxr_cache.store.importing import import_embeddings
from cxr_cache.store.inspect import format_store, summarise_store
from cxr_cache.store.verify import CORRUPT, INCOMPLETE, WHOLE, verify
from tests.small_stores import done_rows, flip_bit, make_cohort

MODEL = "random:test_vit"
PLAIN = ExtractConfig(batch_size=4, num_workers=0)
TOKENS = dataclasses.replace(PLAIN, unfreeze_layers=2)


@pytest.fixture(scope="module")
def plain(phantoms, encoder, tmp_path_factory) -> FeatureStore:
    """Embeddings alone."""
    path = tmp_path_factory.mktemp("plain") / "s.h5"
    extract_embeddings(load_cohort(phantoms), phantoms / "images", path, encoder, PLAIN)
    return FeatureStore.open(path)


@pytest.fixture(scope="module")
def whole(phantoms, encoder, tmp_path_factory) -> FeatureStore:
    """Embeddings and tokens from one extraction."""
    path = tmp_path_factory.mktemp("whole") / "s.h5"
    extract_embeddings(load_cohort(phantoms), phantoms / "images", path, encoder, TOKENS)
    return FeatureStore.open(path)


@pytest.fixture
def path(plain, tmp_path) -> Path:
    """A copy of the store without tokens."""
    return Path(shutil.copy(plain.path, tmp_path / "s.h5"))


@pytest.fixture
def half(path, cohort, phantoms, encoder) -> Path:
    """The same, interrupted when the first four rows had got their tokens."""
    with pytest.raises(KeyboardInterrupt):
        extract_embeddings(
            cohort, phantoms / "images", path, encoder, TOKENS, on_progress=interrupt
        )
    return path


def interrupt(*_: int) -> None:
    raise KeyboardInterrupt


def spoil_tokens(encoder: Encoder, monkeypatch, factor: float) -> None:
    """The tokens of every batch's second image become larger; embeddings stay."""
    encode = encoder.encode_with_tokens

    def spoil(pixels, n_unfrozen):
        tokens, pooled, embeddings = encode(pixels, n_unfrozen)
        if n_unfrozen == 2:
            tokens = tokens.clone()
            tokens[1 if len(tokens) > 1 else 0] *= factor
        return tokens, pooled, embeddings

    monkeypatch.setattr(encoder, "encode_with_tokens", spoil)


def assert_same_embeddings(store: FeatureStore, plain: FeatureStore, rows=slice(None)) -> None:
    """Bit for bit."""
    for name in ("embeddings", "pooled", "image_sha256"):
        np.testing.assert_array_equal(store.read_column(name)[rows], plain.read_column(name)[rows])


# -- what is in the store ---------------------------------------------------------------


def test_tokens_are_what_enters_the_first_unfrozen_block(
    phantoms, cohort, encoder, tmp_path, plain
):
    """Of the image and of its mirror image, with the embeddings of an extraction without them."""
    config = dataclasses.replace(TOKENS, flip=True, unfreeze_layers=3)
    summary = extract_embeddings(cohort, phantoms / "images", tmp_path / "s.h5", encoder, config)
    assert summary.n_done == len(cohort)
    pixels = np.stack(
        [
            read_image(phantoms / "images", image_id, encoder.preprocessing).pixels
            for image_id in cohort.image_ids
        ]
    )
    views = [torch.from_numpy(pixels), torch.from_numpy(pixels[..., ::-1].copy())]
    with FeatureStore.open(tmp_path / "s.h5") as store:
        tokens = store.read_column("tokens")
        assert (tokens.dtype, tokens.shape) == (np.float16, (len(cohort), 2, 101, 64))
        assert store.header.boundary_block == encoder.identity.n_blocks - 3
        for v, view in enumerate(views):
            expected, pooled, embeddings = encoder.encode_with_tokens(view, 3)
            np.testing.assert_allclose(tokens[:, v], expected.numpy(), rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(store.embeddings[:, v], embeddings.numpy(), atol=1e-5)
            np.testing.assert_allclose(store.read_column("pooled")[:, v], pooled.numpy(), atol=1e-5)
        np.testing.assert_allclose(store.embeddings[:, :1], plain.embeddings, atol=1e-6)
        assert len(store.find_damaged()) == 0
    assert verify(tmp_path / "s.h5").exit_status == WHOLE


def test_the_tail_of_the_tokens_gives_the_embeddings(whole, encoder):
    """Up to their rounding to float16."""
    tokens = torch.from_numpy(np.array(whole.read_column("tokens")[:, 0]))
    with torch.inference_mode():
        pooled, embeddings = encoder.tail(tokens, 2)
    assert cosines(embeddings.numpy(), whole.embeddings[:, 0]).min() > 0.99999
    assert cosines(pooled.numpy(), whole.read_column("pooled")[:, 0]).min() > 0.99999


@pytest.mark.parametrize(("dtype", "version"), [("bfloat16", 3), ("float32", 3), ("float16", 1)])
def test_tokens_are_kept_in_the_number_format_asked_for(
    phantoms, cohort, encoder, tmp_path, dtype, version
):
    """Each is rounded once, as torch rounds; float32 is what the stem gave, to the bit."""
    config, path = dataclasses.replace(TOKENS, tokens_dtype=dtype), tmp_path / "s.h5"
    extract_embeddings(cohort, phantoms / "images", path, encoder, config)
    pixels = [
        read_image(phantoms / "images", i, encoder.preprocessing).pixels for i in cohort.image_ids
    ]
    with FeatureStore.open(path) as store:
        assert (store.header.format_version, store.header.tokens_dtype) == (version, dtype)
        kept = decode_tokens(np.array(store.read_column("tokens")))
        assert f"counted from 0, in {dtype}" in format_store(summarise_store(store))
    assert kept.dtype == getattr(torch, dtype)
    for start in range(0, len(pixels), 4):  # in the batches of the extraction
        batch = torch.from_numpy(np.stack(pixels[start : start + 4]))
        tokens = encoder.encode_with_tokens(batch, 2)[0].to(kept.dtype)
        torch.testing.assert_close(kept[start : start + 4, 0], tokens, rtol=1e-2, atol=1e-5)
    assert (
        verify(path, image_dir=phantoms / "images", encoder=encoder, n_sampled=3).exit_status
        == WHOLE
    )
    assert extract_embeddings(cohort, phantoms / "images", path, encoder, config).n_computed == 0
    other = "float32" if dtype == "float16" else "float16"
    with pytest.raises(
        StoreMismatchError, match=f"tokens_dtype: '{dtype}' in the store, '{other}'"
    ):
        extract_embeddings(
            cohort,
            phantoms / "images",
            path,
            encoder,
            dataclasses.replace(TOKENS, tokens_dtype=other),
        )


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(phantoms, cohort, encoder, tmp_path, monkeypatch):
    """Sixteen times the rows: hardly more memory, beside what their tokens take.

    How full the queues are is a matter of a batch or two; so many rows make that little.
    """

    def encode(*arguments, **options):  # torch's own memory is not traced, numpy's is
        features = encode_views(*arguments, **options)
        return {name: values.copy() for name, values in features.items()}

    encode_views = encoding.encode_views
    monkeypatch.setattr(encoding, "encode_views", encode)
    # Rows that are there are copied in blocks, which 24 of them do not fill.
    monkeypatch.setattr(feature_store, "_BYTES_AT_ONCE", 1 << 14)
    image = phantoms / "images" / str(cohort.image_ids[0])

    def measure_peak(n_images: int) -> int:
        folder, table = tmp_path / str(n_images), make_cohort(n_images)
        for image_id in table.image_ids:
            (folder / str(image_id)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, folder / str(image_id))
        tracemalloc.start()
        for config in (PLAIN, TOKENS):  # the tokens into a store that is there
            extract_embeddings(table, folder, folder / "s.h5", encoder, config)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        with FeatureStore.open(folder / "s.h5") as store:
            assert (store.status == DONE).all()
        return peak

    measure_peak(4)  # imports that happen at the first use
    small, large = measure_peak(24), measure_peak(384)  # 24 rows fill all queues
    assert large - small < 0.1 * (384 - 24) * 101 * 64 * 2


# -- given later ------------------------------------------------------------------------


def test_a_store_is_given_tokens_and_keeps_its_embeddings(
    phantoms, cohort, encoder, path, plain, whole
):
    summary = extract_embeddings(cohort, phantoms / "images", path, encoder, TOKENS)
    assert (summary.n_done, summary.n_taken_over) == (len(cohort), len(cohort))
    with FeatureStore.open(path) as store:
        assert_same_embeddings(store, plain)
        np.testing.assert_allclose(
            store.read_column("tokens").astype(np.float32),
            whole.read_column("tokens").astype(np.float32),
            rtol=1e-3,
            atol=1e-3,
        )
        assert store.header.boundary_block == whole.header.boundary_block
        assert len(store.find_damaged()) == 0
    again = extract_embeddings(cohort, phantoms / "images", path, encoder, TOKENS)
    assert again.n_computed == 0


def test_half_the_tokens_are_kept_and_the_rest_is_fetched(
    phantoms, cohort, encoder, half, plain, whole
):
    with FeatureStore.open(half) as store:
        assert done_rows(store).tolist() == [0, 1, 2, 3]
        assert len(store.embedded_rows) == len(cohort)
        assert_same_embeddings(store, plain)
        tokens = np.array(store.read_column("tokens")[:4])
        text = format_store(summarise_store(store))
    n_left = len(cohort) - 4
    assert f"4 done + 0 failed + {n_left} pending" in text
    assert f"{n_left} pending rows lack nothing but their tokens" in text
    assert "tokens enter    block 4, counted from 0" in text
    found = verify(half)
    assert (found.exit_status, found.n_pending, found.n_without_tokens) == (
        INCOMPLETE,
        n_left,
        n_left,
    )

    summary = extract_embeddings(cohort, phantoms / "images", half, encoder, TOKENS)
    assert (summary.n_computed, summary.n_done) == (n_left, len(cohort))
    with FeatureStore.open(half) as store:
        assert_same_embeddings(store, plain)
        np.testing.assert_array_equal(store.read_column("tokens")[:4], tokens)
        assert len(store.find_damaged()) == 0


def test_other_images_and_tokens_come_in_one_go(phantoms, cohort, encoder, tmp_path):
    path = tmp_path / "s.h5"
    (some := cohort.take(slice(5))).targets[:] = np.nan
    extract_embeddings(some, phantoms / "images", path, encoder, PLAIN)
    before = np.array(FeatureStore.open(path).embeddings)
    reverse = cohort.take(np.arange(len(cohort))[::-1])
    summary = extract_embeddings(reverse, phantoms / "images", path, encoder, TOKENS)
    assert (summary.n_taken_over, summary.n_computed) == (5, len(cohort))
    with FeatureStore.open(path) as store:
        assert (store.status == DONE).all()
        np.testing.assert_array_equal(store.embeddings[::-1][:5], before)
        np.testing.assert_array_equal(store.cohort.targets, reverse.targets)


def test_a_changed_table_moves_rows_with_what_they_have(phantoms, cohort, encoder, half, plain):
    reverse = cohort.take(np.arange(len(cohort))[::-1])
    with pytest.raises(KeyboardInterrupt):
        extract_embeddings(
            reverse, phantoms / "images", half, encoder, TOKENS, on_progress=interrupt
        )
    with FeatureStore.open(half) as store:
        np.testing.assert_array_equal(store.embeddings, plain.embeddings[::-1])
        n = len(cohort)
        assert done_rows(store).tolist() == [0, 1, 2, 3, n - 4, n - 3, n - 2, n - 1]


def test_a_damaged_row_is_written_anew(phantoms, cohort, encoder, half):
    with FeatureStore.open(half) as store:
        column = store.columns["embeddings"]
    flip_bit(half, column.offset + 6 * column.row_bytes + 3, 6)
    assert [bad.row for bad in verify(half).bad_rows] == [6]
    summary = extract_embeddings(cohort, phantoms / "images", half, encoder, TOKENS)
    assert (summary.n_damaged, summary.n_done) == (1, len(cohort))
    assert verify(half).exit_status == WHOLE


@pytest.mark.parametrize("recheck_images", [True, False])
def test_a_changed_image_gets_new_embeddings_with_its_tokens(
    cohort, images, encoder, path, plain, recheck_images
):
    """Never tokens of one picture beside the embedding of another."""
    shutil.copy(images / cohort.image_ids[0], images / cohort.image_ids[6])
    config = dataclasses.replace(TOKENS, recheck_images=recheck_images)
    extract_embeddings(cohort, images, path, encoder, config)
    with FeatureStore.open(path) as store:
        assert (store.status == DONE).all()
        assert_same_embeddings(store, plain, np.arange(len(cohort)) != 6)
        assert cosines(store.embeddings[6], plain.embeddings[0]).min() > 0.9999
    assert verify(path, image_dir=images, encoder=encoder, n_sampled=99).exit_status == WHOLE


def test_an_image_that_cannot_be_read_now_costs_no_embedding(cohort, images, encoder, path, plain):
    (images / cohort.image_ids[2]).unlink()
    summary = extract_embeddings(cohort, images, path, encoder, TOKENS)
    assert (summary.n_failed, summary.n_pending, summary.n_without_tokens) == (0, 1, 1)
    text = summary.to_text()
    assert f"{len(cohort) - 1} done + 0 failed + 1 pending" in text
    assert "1 pending rows lack nothing but their tokens" in text
    assert "1 got no tokens and keep their embedding: " in text
    assert f"(first: {cohort.image_ids[2]})" in text
    with FeatureStore.open(path) as store:
        assert store.status[2] == WITHOUT_TOKENS
        assert_same_embeddings(store, plain)
    stingy = dataclasses.replace(TOKENS, max_failures=0)
    with pytest.raises(TooManyFailuresError, match=rf"1 image failed.*\n  {cohort.image_ids[2]}"):
        extract_embeddings(cohort, images, path, encoder, stingy)


def test_other_embeddings_of_the_same_image_stop_it(
    phantoms, cohort, encoder, path, plain, monkeypatch
):
    encode = encoder.encode_with_tokens

    def drift(pixels, n_unfrozen):
        tokens, pooled, embeddings = encode(pixels, n_unfrozen)
        if n_unfrozen == 2:  # not the canaries
            embeddings = embeddings + 0.05 * embeddings.std() * torch.randn(embeddings.shape)
        return tokens, pooled, embeddings

    monkeypatch.setattr(encoder, "encode_with_tokens", drift)
    with pytest.raises(
        StoreMismatchError,
        match=rf"other embeddings of {cohort.image_ids[0]} than .* cosine 0\.99\d+, at least 0\.99",
    ):
        extract_embeddings(cohort, phantoms / "images", path, encoder, TOKENS)
    with FeatureStore.open(path) as store:
        assert (store.status == WITHOUT_TOKENS).all()
        assert_same_embeddings(store, plain)


# -- what float16 cannot hold -----------------------------------------------------------


def test_tokens_beyond_float16_fail_their_row(phantoms, cohort, encoder, tmp_path, monkeypatch):
    spoil_tokens(encoder, monkeypatch, 1e6)
    extract_embeddings(cohort, phantoms / "images", tmp_path / "s.h5", encoder, TOKENS)
    with FeatureStore.open(tmp_path / "s.h5") as store:
        failed = np.flatnonzero(store.status == FAILED)
        assert failed.tolist() == list(range(1, len(cohort), 4))
        reason = store.read_errors(failed)[0]
        assert (store.read_column("tokens")[failed] == 0).all()
    largest = int(reason.split()[3].strip(",").replace(",", ""))
    assert reason.startswith("its tokens reach ")
    assert largest > 65504
    assert "beyond the 65,504 of float16" in reason


def test_tokens_beyond_float16_cost_no_embedding(
    phantoms, cohort, encoder, path, plain, monkeypatch
):
    spoil_tokens(encoder, monkeypatch, 1e6)
    summary = extract_embeddings(cohort, phantoms / "images", path, encoder, TOKENS)
    assert summary.n_failed == 0
    assert [image_id for image_id, _ in summary.tokenless] == cohort.image_ids[1::4].tolist()
    with FeatureStore.open(path) as store:
        assert_same_embeddings(store, plain)


# -- refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unfreeze_layers": None}, r"features: \[.*'tokens'\] in the store, \[.*'pooled'\] in"),
        ({"unfreeze_layers": None}, "unfreeze_layers: 2 in the store, None in this run"),
        ({"unfreeze_layers": 3}, "unfreeze_layers: 2 in the store, 3 in this run"),
        ({"flip": True}, "views: 1 in the store, 2 in this run"),
        ({"part": (1, 2)}, "part: None in the store, 1 in this run"),
    ],
)
def test_other_tokens_are_refused(phantoms, cohort, encoder, tmp_path, whole, options, message):
    path = Path(shutil.copy(whole.path, tmp_path / "s.h5"))
    before = path.read_bytes()
    config = dataclasses.replace(TOKENS, **options)
    with pytest.raises(StoreMismatchError, match=message) as caught:
        extract_embeddings(cohort, phantoms / "images", path, encoder, config)
    assert "--unfreeze-layers, --tokens-dtype, --flip and --part" in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": True}, "views: 1 in the store, 2 in this run"),
        ({"part": (1, 2)}, "part: None in the store, 1 in this run"),
    ],
)
def test_tokens_do_not_come_with_other_views_or_rows(
    phantoms, cohort, encoder, path, options, message
):
    before = path.read_bytes()
    config = dataclasses.replace(TOKENS, **options)
    with pytest.raises(StoreMismatchError, match=message) as caught:
        extract_embeddings(cohort, phantoms / "images", path, encoder, config)
    assert "tokens'" not in str(caught.value)  # these are no difference
    assert path.read_bytes() == before


def test_tokens_of_another_encoder_are_refused(phantoms, cohort, path):
    other = load_encoder("random:test_vit:7", precision="fp32")
    with pytest.raises(
        StoreMismatchError, match=r"weights_sha256: '.*' in the store, '.*' in this"
    ):
        extract_embeddings(cohort, phantoms / "images", path, other, TOKENS)


def test_tokens_beside_imported_embeddings_are_refused(phantoms, cohort, encoder, tmp_path):
    values = np.random.default_rng(0).normal(size=(len(cohort), 6)).astype(np.float32)
    np.savez(tmp_path / "e.npz", image_id=cohort.image_ids, embeddings=values)
    import_embeddings(tmp_path / "e.npz", cohort, tmp_path / "s.h5")
    with pytest.raises(StoreMismatchError, match=r"imported from .*no encoder here can continue"):
        extract_embeddings(cohort, phantoms / "images", tmp_path / "s.h5", encoder, TOKENS)


@pytest.mark.parametrize(
    ("model", "n_unfrozen", "message"),
    [
        ("random:test_resnet", 2, "cannot be split into frozen.* without --tokens"),
        (MODEL, 7, "has 6 blocks, of which 7 cannot be unfrozen. Choose from 1 to 6"),
    ],
)
def test_a_tower_without_such_blocks_is_refused_before_anything_is_made(
    phantoms, cohort, tmp_path, model, n_unfrozen, message
):
    config = dataclasses.replace(TOKENS, unfreeze_layers=n_unfrozen)
    encoder = load_encoder(model, precision="fp32")
    with pytest.raises(EncoderError, match=message):
        extract_embeddings(cohort, phantoms / "images", tmp_path / "s.h5", encoder, config)
    assert list(tmp_path.iterdir()) == []


def test_no_blocks_at_all_are_refused():
    with pytest.raises(ConfigError, match=r"unfreeze_layers must be 1 or more, not 0"):
        ExtractConfig(unfreeze_layers=0)


# -- space ------------------------------------------------------------------------------


def test_space_is_stated_when_a_file_is_made_or_replaced(phantoms, cohort, encoder, tmp_path):
    path, stated = tmp_path / "s.h5", []

    def extract(cohort: Cohort, config: ExtractConfig) -> None:
        extract_embeddings(
            cohort, phantoms / "images", path, encoder, config, on_space=stated.append
        )

    extract(cohort.take(slice(4)), PLAIN)
    extract(cohort.take(slice(4)), TOKENS)
    extract(cohort.take(slice(4)), TOKENS)  # all is there
    extract(cohort, TOKENS)
    row = 101 * 64 * 2
    assert [space.n_token_bytes for space in stated] == [0, 4 * row, len(cohort) * row]
    assert 0 < path.stat().st_size - stated[-1].n_bytes < 20_000  # HDF5's own


def test_a_store_stays_as_it_is_where_tokens_have_no_room(
    phantoms, cohort, encoder, path, monkeypatch
):
    usage, stated = namedtuple("usage", "total used free"), []
    before = path.read_bytes()
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda _: usage(0, 0, 100_000))
    monkeypatch.setattr(
        "cxr_cache.store.resume.read_bytes", lambda *_: pytest.fail("images were read")
    )
    with pytest.raises(DiskFullError, match=r"s\.h5 needs [\d,]+ bytes, .* has 100,000 free"):
        extract_embeddings(
            cohort, phantoms / "images", path, encoder, TOKENS, on_space=stated.append
        )
    assert stated[0].n_bytes > stated[0].n_free == 100_000
    assert path.read_bytes() == before


# -- verification -----------------------------------------------------------------------


def test_tokens_of_another_image_are_found(phantoms, encoder, tmp_path, whole):
    """Their digest is sound: another program wrote them."""
    path = Path(shutil.copy(whole.path, tmp_path / "s.h5"))
    with FeatureStore.open(path, "r+") as store:
        row = np.array([3])
        features = {name: store.read_rows(name, row) for name in store.features}
        features["tokens"] = store.read_rows("tokens", np.array([5]))
        store.commit(row, features, store.read_rows("image_sha256", row))
    found = verify(path, image_dir=phantoms / "images", encoder=encoder, n_sampled=99)
    assert found.exit_status == CORRUPT
    assert [bad.row for bad in found.bad_rows] == [3]
    assert "its tokens have cosine 0." in found.bad_rows[0].reason


def test_rows_without_tokens_are_compared_by_what_they_have(phantoms, encoder, half):
    found = verify(half, image_dir=phantoms / "images", encoder=encoder, n_sampled=99)
    assert (found.exit_status, found.n_compared) == (INCOMPLETE, found.n_images)
    found = verify(half, repair=True)
    assert not found.is_repaired
    with FeatureStore.open(half) as store:
        assert not (store.status == PENDING).any()


# -- the command ------------------------------------------------------------------------


def run(phantoms: Path, store: Path, *options: object):
    command = ["extract", "--csv-dir", phantoms, "--image-dir", phantoms / "images"]
    command += ["--store", store, "--model", MODEL, "--precision", "fp32", "--num-workers", 0]
    return CliRunner().invoke(cli, [*map(str, [*command, *options])])


def test_the_command_states_the_space_and_gives_tokens(phantoms, path, plain):
    result = run(phantoms, path, "--tokens")
    assert result.exit_code == 0, result.output
    assert "s.h5 takes 0.3 MB (tokens 0.2 MB); " in result.output
    assert "rows taken over from the store as it was" in result.output
    with FeatureStore.open(path) as store:
        assert store.header.boundary_block == 4  # of 6: two by default
        assert_same_embeddings(store, plain)
    refused = run(phantoms, path, "--tokens", "--unfreeze-layers", 1)
    assert refused.exit_code == 1
    assert "unfreeze_layers: 2 in the store, 1 in this run" in refused.output
    assert "Traceback" not in refused.output


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--unfreeze-layers", 3], 2, "--unfreeze-layers goes with --tokens"),
        (["--tokens-dtype", "float16"], 2, "--tokens-dtype goes with --tokens"),
        (["--tokens", "--unfreeze-layers", 0], 1, "--unfreeze-layers must be 1 or more, not 0"),
    ],
)
def test_misuse_of_the_options_is_said(phantoms, tmp_path, options, status, message):
    result = run(phantoms, tmp_path / "s.h5", *options)
    assert (result.exit_code, message in result.output) == (status, True), result.output
    assert list(tmp_path.iterdir()) == []
