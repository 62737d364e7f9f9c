"""Extraction: every image once, whatever interrupts it, and never with another encoder."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_cache.cli.main import main
from cxr_cache.config import ExtractConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.images import read_image, require_stated_bits
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.encoding import cosines
from cxr_cache.encoders.identity import EncoderIdentity
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import ConfigError, EncoderError, StoreMismatchError, TooManyFailuresError
from cxr_cache.store.extract import extract_embeddings, resolve_for
from cxr_cache.store.feature_store import DONE, FAILED, FeatureStore

MODEL = "random:test_vit"
QUICK = ExtractConfig(batch_size=4, num_workers=0)


@pytest.fixture(scope="module")
def reference(phantoms, encoder, tmp_path_factory) -> FeatureStore:
    """An uninterrupted extraction of everything."""
    path = tmp_path_factory.mktemp("reference") / "s.h5"
    extract_embeddings(load_cohort(phantoms), phantoms / "images", path, encoder, QUICK)
    return FeatureStore.open(path)


@pytest.fixture
def encoded(encoder, monkeypatch) -> list[int]:
    """Sizes of the batches that were encoded since, canaries excluded."""
    sizes: list[int] = []
    encode = encoder.encode

    def count(pixels):
        sizes.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr("cxr_cache.encoders.encoding.encode_canaries", lambda _: None)
    monkeypatch.setattr(encoder, "encode", count)
    monkeypatch.setattr("cxr_cache.store.resume.encode_canaries", _canaries_of(encode))
    return sizes


def _canaries_of(encode):
    from cxr_cache.encoders.encoding import draw_canaries

    return lambda encoder: encode(
        torch.from_numpy(draw_canaries(encoder.preprocessing.image_size_px))
    )[1].numpy()


def assert_same_store(path: Path, reference: FeatureStore) -> None:
    with FeatureStore.open(path) as store:
        np.testing.assert_array_equal(store.status, reference.status)
        np.testing.assert_array_equal(store.image_ids, reference.image_ids)
        assert len(store.find_damaged()) == 0
        done = store.status == DONE
        for name in store.features:
            ours, theirs = store.read_column(name)[done], reference.read_column(name)[done]
            assert cosines(ours, theirs).min() >= 0.9999


# -- what is in the store ---------------------------------------------------------------


def test_rows_are_what_the_encoder_gives(reference, phantoms, encoder):
    pixels = [
        read_image(phantoms / "images", image_id, encoder.preprocessing).pixels
        for image_id in reference.image_ids
    ]
    pooled, embeddings = encoder.encode(torch.from_numpy(np.stack(pixels)))
    np.testing.assert_allclose(reference.embeddings[:, 0], embeddings.numpy(), atol=1e-5)
    np.testing.assert_allclose(reference.read_column("pooled")[:, 0], pooled.numpy(), atol=1e-5)


def test_the_second_view_is_the_mirror_image(phantoms, cohort, encoder, tmp_path, reference):
    config = dataclasses.replace(QUICK, flip=True)
    extract_embeddings(
        cohort.take(slice(3)), phantoms / "images", tmp_path / "s.h5", encoder, config
    )
    pixels = read_image(phantoms / "images", cohort.image_ids[1], encoder.preprocessing).pixels
    mirrored = torch.from_numpy(pixels[..., ::-1].copy())[None]
    with FeatureStore.open(tmp_path / "s.h5") as store:
        assert store.embeddings.shape[:2] == (3, 2)
        np.testing.assert_allclose(
            store.embeddings[1, 1], encoder.encode(mirrored)[1][0].numpy(), atol=1e-5
        )
        np.testing.assert_allclose(store.embeddings[:, 0], reference.embeddings[:3, 0], atol=1e-5)


def test_workers_change_nothing(phantoms, cohort, encoder, tmp_path, reference):
    config = ExtractConfig(batch_size=4, num_workers=2)
    extract_embeddings(cohort, phantoms / "images", tmp_path / "s.h5", encoder, config)
    assert_same_store(tmp_path / "s.h5", reference)


def test_without_a_compiler_the_extraction_goes_on(
    phantoms, cohort, encoder, tmp_path, monkeypatch, caplog, reference
):
    monkeypatch.setenv("CXX", "absent-compiler --fast")
    config = dataclasses.replace(QUICK, compile=True)
    summary = extract_embeddings(cohort, phantoms / "images", tmp_path / "s.h5", encoder, config)
    (said,) = (record.getMessage() for record in caplog.records)
    assert "there is no absent-compiler here. Install it, or name another in" in said
    assert said.endswith("It goes on without, at its usual speed.")
    assert (summary.compile_s, "compiling" in summary.to_text()) == (0, False)
    assert_same_store(tmp_path / "s.h5", reference)


def test_what_cannot_be_compiled_is_computed_as_it_is(
    phantoms, cohort, encoder, tmp_path, monkeypatch, caplog, reference
):
    def refuse(*_, **__):
        raise RuntimeError("no such operator\nand a page of advice")

    monkeypatch.setenv("CXX", sys.executable)  # a program that is there
    monkeypatch.setattr("torch.compile", refuse)
    config = dataclasses.replace(QUICK, compile=True)
    extract_embeddings(cohort, phantoms / "images", tmp_path / "s.h5", encoder, config)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == (
        "random:test_vit:0 cannot be compiled: no such operator. "
        "It goes on without, at its usual speed."
    )
    assert_same_store(tmp_path / "s.h5", reference)


@pytest.mark.slow
@pytest.mark.parametrize("n_images", [3, 10])
def test_compiled_features_are_the_same_to_rounding(
    phantoms, cohort, encoder, tmp_path, reference, n_images
):
    """In whole batches, in the one that is left over, and where there is no whole batch."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++")
    some, config = cohort.take(slice(n_images)), dataclasses.replace(QUICK, compile=True)
    summary = extract_embeddings(some, phantoms / "images", tmp_path / "s.h5", encoder, config)
    assert f"compiling the encoder took {summary.compile_s:.0f} s" in summary.to_text()
    assert 0 < summary.compile_s < summary.elapsed_s
    with FeatureStore.open(tmp_path / "s.h5") as store:
        for name in ("embeddings", "pooled"):
            ours, theirs = store.read_column(name), reference.read_column(name)[:n_images]
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert not encoder._compiled  # the weights may change from here on


def test_the_summary_adds_up(cohort, images, encoder, tmp_path):
    (images / cohort.image_ids[2]).unlink()
    (images / cohort.image_ids[5]).write_bytes(b"")
    summary = extract_embeddings(cohort, images, tmp_path / "s.h5", encoder, QUICK)
    assert (summary.n_done, summary.n_failed, summary.n_pending) == (len(cohort) - 2, 2, 0)
    assert summary.n_images == summary.n_done + summary.n_failed + summary.n_pending
    text = summary.to_text()
    assert f"{len(cohort)} images = {len(cohort) - 2} done + 2 failed + 0 pending" in text
    assert f"1 failed: the file is empty (0 bytes) (first: {cohort.image_ids[5]})" in text
    assert "images/s; time went to disk" in text


def test_cores_that_each_have_a_batch_give_the_same_in_the_same_order(
    phantoms, cohort, encoder, tmp_path, reference, monkeypatch
):
    threads: list[tuple[str, int]] = []
    encode = encoder.encode

    def note(pixels):
        threads.append((threading.current_thread().name, torch.get_num_threads()))
        return encode(pixels)

    torch.set_num_threads(3)
    try:
        monkeypatch.setattr(encoder, "encode", note)
        config = dataclasses.replace(QUICK, batch_size=1)
        extract_embeddings(cohort, phantoms / "images", tmp_path / "s.h5", encoder, config)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert threads[0] == ("MainThread", 3)  # the canaries
    assert {number for _, number in threads[1:]} == {1}
    assert 1 < len({name for name, _ in threads[1:]}) <= 3
    assert_same_store(tmp_path / "s.h5", reference)


def test_batches_that_do_not_fit_are_encoded_in_pieces(
    phantoms, cohort, encoder, tmp_path, reference, monkeypatch
):
    """Whatever the size asked for; once the memory was short, it is not tried again."""
    sizes: list[int] = []
    encode = encoder.encode

    def refuse(pixels):
        sizes.append(len(pixels))
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return encode(pixels)

    monkeypatch.setattr("cxr_cache.store.resume.encode_canaries", _canaries_of(encode))
    monkeypatch.setattr(encoder, "encode", refuse)
    config = ExtractConfig(batch_size=9, num_workers=0)
    summary = extract_embeddings(cohort, phantoms / "images", tmp_path / "s.h5", encoder, config)
    assert sizes[:3] == [9, 4, 2]
    assert set(sizes[2:]) <= {2, 1}
    assert "the device's memory took 2 images at a time" in summary.to_text()
    assert_same_store(tmp_path / "s.h5", reference)


def test_memory_for_not_even_one_image_is_said(phantoms, cohort, encoder, tmp_path, monkeypatch):
    def refuse(_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("cxr_cache.store.resume.encode_canaries", _canaries_of(encoder.encode))
    monkeypatch.setattr(encoder, "encode", refuse)
    with pytest.raises(EncoderError, match=r"cpu has not enough free memory to encode a single"):
        extract_embeddings(cohort, phantoms / "images", tmp_path / "s.h5", encoder, QUICK)


@pytest.mark.parametrize(
    ("slow", "limit"),
    [
        ("cxr_cache.datasets.decoding.decode_image", "decode"),
        ("cxr_cache.datasets.decoding.read_bytes", "disk"),
        ("cxr_cache.store.extract._write", "disk"),
        ("cxr_cache.encoders.encoding.encode_views", "encoder"),
    ],
)
def test_the_summary_names_the_limit(phantoms, cohort, encoder, tmp_path, monkeypatch, slow, limit):
    """Whatever is slowed down is what the others are found to wait for."""

    def encode_nothing(_, pixels, **__):
        return {
            name: np.zeros((len(pixels), 1, width), np.float32)
            for name, width in (("embeddings", 512), ("pooled", 64))
        }

    monkeypatch.setattr("cxr_cache.encoders.encoding.encode_views", encode_nothing)
    module, _, name = slow.rpartition(".")
    quick = getattr(sys.modules[module], name)

    def take_long(*arguments, **options):
        time.sleep(0.05)
        return quick(*arguments, **options)

    monkeypatch.setattr(slow, take_long)
    config = dataclasses.replace(QUICK, batch_size=1)
    summary = extract_embeddings(cohort, phantoms / "images", tmp_path / "s.h5", encoder, config)
    assert summary.to_text().endswith(f"the limit was: {limit}")


@pytest.mark.parametrize(("cores", "cpu", "gpu"), [(2, (8, 0), (256, 2)), (64, (8, 16), (256, 16))])
def test_what_is_not_given_depends_on_the_device(cores, cpu, gpu, monkeypatch):
    monkeypatch.setattr("cxr_cache.store.extract.cpu_count", lambda: cores)
    for device, expected in (("cpu", cpu), ("cuda", gpu)):
        config = resolve_for(ExtractConfig(), torch.device(device))
        assert (config.batch_size, config.num_workers) == expected
    given = ExtractConfig(batch_size=3, num_workers=5)
    assert resolve_for(given, torch.device("cuda")) == given


# -- what cannot be used ----------------------------------------------------------------


def test_a_bad_image_fails_alone_and_is_tried_again(cohort, images, encoder, tmp_path, reference):
    good = (images / cohort.image_ids[1]).read_bytes()
    (images / cohort.image_ids[1]).write_bytes(good[:300])
    (images / cohort.image_ids[6]).write_text("<html>Not found</html>")
    summary = extract_embeddings(cohort, images, tmp_path / "s.h5", encoder, QUICK)
    with FeatureStore.open(tmp_path / "s.h5") as store:
        assert np.flatnonzero(store.status == FAILED).tolist() == [1, 6]
        assert (store.embeddings[[1, 6]] == 0).all()  # nothing stands in for them
    assert [image_id for image_id, _ in summary.failures] == cohort.image_ids[[1, 6]].tolist()

    shutil.copy(reference_image(cohort, images), images / cohort.image_ids[6])
    (images / cohort.image_ids[1]).write_bytes(good)
    assert extract_embeddings(cohort, images, tmp_path / "s.h5", encoder, QUICK).n_computed == 2


def reference_image(cohort: Cohort, images: Path) -> Path:
    return images / str(cohort.image_ids[0])


def test_the_wrong_folder_is_refused_before_anything_is_written(
    phantoms, cohort, encoder, tmp_path, encoded
):
    """It used to end with "nothing was left to compute" and status 0."""
    (tmp_path / "empty").mkdir()
    first = str(cohort.image_ids[0])
    for folder, hint in {
        tmp_path / "empty": "holds nothing. Give the folder that the names in the table start",
        phantoms: rf"That image is in {phantoms / 'images'}: give this folder",
    }.items():
        said = rf"None of the {len(cohort)} images of the table is in {folder}.*{first}.*{hint}"
        with pytest.raises(ConfigError, match=said):
            extract_embeddings(cohort, folder, tmp_path / "s.h5", encoder, QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert encoded == []


def test_the_wrong_folder_is_refused_when_continuing_unless_nothing_is_left(
    phantoms, cohort, encoder, tmp_path
):
    """Images of a whole store may be gone: labels can be given anew without them."""
    (tmp_path / "empty").mkdir()
    some, path = cohort.take(slice(4)), tmp_path / "s.h5"
    extract_embeddings(some, phantoms / "images", path, encoder, QUICK)
    summary = extract_embeddings(some, tmp_path / "empty", path, encoder, QUICK)
    assert "nothing was left to compute" in summary.to_text()
    with FeatureStore.open(path, "r+") as store:
        store.mark_pending(np.array([1]))
    with pytest.raises(ConfigError, match="None of the 4 images of the table is in"):
        extract_embeddings(some, tmp_path / "empty", path, encoder, QUICK)
    with FeatureStore.open(path) as store:
        assert store.count_rows().n_failed == 0


def test_12_bit_values_in_16_bit_files_are_refused_before_anything_is_written(
    cohort, encoder, tmp_path
):
    """They would be encoded as nearly black; the remedy makes the same images usable."""
    rng = np.random.default_rng(0)
    for image_id in cohort.image_ids:
        values = rng.integers(0, 4096, (32, 32)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / image_id, "PNG")
    with pytest.raises(ConfigError, match="Give --bits-stored 12 to scale them"):
        extract_embeddings(cohort, tmp_path, tmp_path / "s.h5", encoder)
    assert not (tmp_path / "s.h5").exists()
    for bits in (12, 16):
        stated = dataclasses.replace(encoder.preprocessing, bits_stored=bits)
        require_stated_bits(tmp_path, cohort.image_ids, stated)


def test_an_extraction_in_which_every_image_failed_is_no_success(cohort, encoder, tmp_path):
    (tmp_path / "images").mkdir()
    few, path = cohort.take(slice(3)), tmp_path / "s.h5"
    for image_id in few.image_ids:
        (tmp_path / "images" / image_id).write_bytes(b"<html>not logged in</html>")
    for _ in range(2):  # also when it is repeated
        summary = extract_embeddings(few, tmp_path / "images", path, encoder, QUICK)
        text = summary.to_text()
        assert "3 images = 0 done + 3 failed + 0 pending" in text
        assert "none of 3 images could be used" in text
        assert "nothing was left to compute" not in text
        assert summary.failure(QUICK) == f"No image could be used, so {path} holds no embedding."


def test_more_failures_than_tolerated_stop_it(cohort, images, encoder, tmp_path):
    for image_id in cohort.image_ids[:3]:
        (images / image_id).unlink()
    config = dataclasses.replace(QUICK, max_failures=2)
    with pytest.raises(TooManyFailuresError, match=r"3 images failed, more than the 2 tolerated"):
        extract_embeddings(cohort, images, tmp_path / "s.h5", encoder, config)
    with FeatureStore.open(tmp_path / "s.h5") as store:
        assert (store.status[:4] == [FAILED] * 3 + [DONE]).all()
    summary = extract_embeddings(
        cohort, images, tmp_path / "s.h5", encoder, dataclasses.replace(QUICK, max_failures=3)
    )
    assert summary.n_failed == 3


def test_an_embedding_of_nan_fails_its_row(phantoms, cohort, encoder, tmp_path, monkeypatch):
    encode = encoder.encode

    def spoil(pixels):
        pooled, embeddings = (values.clone() for values in encode(pixels))
        if len(pixels) != 8:  # not the canaries
            embeddings[1] = torch.nan
        return pooled, embeddings

    monkeypatch.setattr(encoder, "encode", spoil)
    extract_embeddings(cohort, phantoms / "images", tmp_path / "s.h5", encoder, QUICK)
    with FeatureStore.open(tmp_path / "s.h5") as store:
        failed = np.flatnonzero(store.status == FAILED)
        assert failed.tolist() == list(range(1, len(cohort), 4))
        assert "NaN or infinity" in store.read_errors(failed)[0]


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"num_workers": -1}, {"max_failures": -1}, {"part": (4, 3)}]
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} must"):
        ExtractConfig(**options)


# -- interruptions ----------------------------------------------------------------------


@pytest.mark.parametrize("n_before", [1, 2])
def test_an_interrupted_extraction_goes_on(
    phantoms, cohort, encoder, tmp_path, reference, encoded, n_before
):
    n_calls = iter(range(1, 100))

    def stop(*_):
        if next(n_calls) == n_before:
            raise KeyboardInterrupt

    path = tmp_path / "s.h5"
    with pytest.raises(KeyboardInterrupt):
        extract_embeddings(cohort, phantoms / "images", path, encoder, QUICK, on_progress=stop)
    with FeatureStore.open(path) as store:
        assert (store.status == DONE).sum() == 4 * n_before  # what was finished is there
    encoded.clear()
    summary = extract_embeddings(cohort, phantoms / "images", path, encoder, QUICK)
    assert sum(encoded) == summary.n_computed == len(cohort) - 4 * n_before
    assert_same_store(path, reference)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_leaves_nothing_running(
    phantoms, cohort, encoder, tmp_path, monkeypatch, num_workers
):
    """Not even while somebody keeps the error, and with it all that was under way."""
    encode, before = encoder.encode, set(threading.enumerate())

    def fail(pixels):
        if len(pixels) == 2:  # not the canaries
            raise OSError("the driver is gone")
        return encode(pixels)

    monkeypatch.setattr(encoder, "encode", fail)
    config = ExtractConfig(batch_size=2, num_workers=num_workers)
    with pytest.raises(OSError, match="the driver is gone") as kept:
        extract_embeddings(cohort, phantoms / "images", tmp_path / "s.h5", encoder, config)

    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive(), thread.name
    assert multiprocessing.active_children() == []
    assert kept.value.__traceback__ is not None


FORK = multiprocessing.get_context("fork")  # spares the child the import of torch


def run_command(arguments: list[str], log: Path) -> None:
    """The console script, as a shell would run it: signals as they come by default."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["cxr-cache", *arguments]
    with log.open("w") as sys.stderr:
        main()


def start_extraction(phantoms: Path, store: Path, log: Path, *options: str):
    command = ["extract", "--csv-dir", phantoms, "--image-dir", phantoms / "images"]
    command += ["--store", store, "--model", MODEL, "--precision", "fp32", "--batch-size", "1"]
    process = FORK.Process(target=run_command, args=([*map(str, command), *options], log))
    process.start()
    return process


def wait_for_rows(path: Path, n_rows: int) -> None:
    """Until an extraction in another process has finished that many."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists():
            with FeatureStore.open(path) as store:
                if (store.status == DONE).sum() >= n_rows:
                    return
        time.sleep(0.002)
    raise AssertionError("the extraction did not come so far in a minute")


@pytest.mark.parametrize(
    ("number", "workers", "status"),
    [(signal.SIGINT, 0, 130), (signal.SIGTERM, 2, 143), (signal.SIGKILL, 2, -9)],
)
def test_signals_keep_what_is_finished(
    phantoms, cohort, encoder, tmp_path, reference, number, workers, status
):
    path = tmp_path / "s.h5"
    process = start_extraction(phantoms, path, tmp_path / "log", "--num-workers", str(workers))
    wait_for_rows(path, random.Random(number).randrange(1, 4))
    os.kill(process.pid, number)
    process.join(60)
    if process.exitcode == 0:
        pytest.skip("the extraction was over before the signal")
    assert process.exitcode == status
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    if number != signal.SIGKILL:
        assert f"the same command continues:\n  cxr-cache extract --csv-dir {phantoms}" in log
    with FeatureStore.open(path) as store:
        n_done = int((store.status == DONE).sum())
        assert len(store.find_damaged()) == 0
    summary = extract_embeddings(cohort, phantoms / "images", path, encoder, QUICK)
    assert summary.n_computed == len(cohort) - n_done
    assert_same_store(path, reference)


# -- continuing -------------------------------------------------------------------------


def copy_of(reference: FeatureStore, tmp_path: Path) -> Path:
    return Path(shutil.copy(reference.path, tmp_path / "s.h5"))


def test_a_grown_table_encodes_only_what_is_new(
    phantoms, cohort, encoder, tmp_path, reference, encoded
):
    path = tmp_path / "s.h5"
    extract_embeddings(cohort.take(slice(9)), phantoms / "images", path, encoder, QUICK)
    encoded.clear()
    summary = extract_embeddings(cohort, phantoms / "images", path, encoder, QUICK)
    assert sum(encoded) == summary.n_computed == len(cohort) - 9
    assert summary.n_taken_over == 9
    assert_same_store(path, reference)


def test_other_labels_and_another_order_encode_nothing(
    phantoms, cohort, encoder, tmp_path, reference, encoded
):
    path = copy_of(reference, tmp_path)
    changed = cohort.take(np.arange(len(cohort))[::-1])
    changed.targets[:, 0] = np.nan
    summary = extract_embeddings(changed, phantoms / "images", path, encoder, QUICK)
    assert encoded == []
    assert summary.n_taken_over == len(cohort)
    with FeatureStore.open(path) as store:
        np.testing.assert_array_equal(store.embeddings, reference.embeddings[::-1])
        assert np.isnan(store.cohort.targets[:, 0]).all()


def test_a_changed_image_is_encoded_again(cohort, images, encoder, tmp_path, reference, encoded):
    """Also when two files have changed places: both are known, but not there."""
    path = copy_of(reference, tmp_path)
    first, second, third = (images / image_id for image_id in cohort.image_ids[:3])
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    third.unlink()  # nothing shows that it has changed
    summary = extract_embeddings(cohort, images, path, encoder, QUICK)
    assert sum(encoded) == 2
    assert [text.split(":")[0] for text in summary.changed] == cohort.image_ids[:2].tolist()
    assert "2 image files have changed" in summary.to_text()
    with FeatureStore.open(path) as store:
        assert (store.status == DONE).all()
        assert cosines(store.embeddings[:2], reference.embeddings[[1, 0]]).min() > 0.9999
    one_again = dataclasses.replace(QUICK, recheck_images=False)
    first.write_bytes(one)
    assert extract_embeddings(cohort, images, path, encoder, one_again).n_computed == 0


def test_a_damaged_row_is_encoded_again(phantoms, cohort, encoder, tmp_path, reference, encoded):
    from tests.small_stores import flip_bit

    path = copy_of(reference, tmp_path)
    column = reference.columns["embeddings"]
    flip_bit(path, column.offset + 4 * column.row_bytes)
    summary = extract_embeddings(cohort, phantoms / "images", path, encoder, QUICK)
    assert (summary.n_damaged, sum(encoded)) == (1, 1)
    assert_same_store(path, reference)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "random:test_vit:7"}, "weights_sha256: '.*' in the store, '.*' in this run"),
        ({"precision": "bf16"}, "precision: 'fp32' in the store, 'bf16' in this run"),
        ({"normalize": "imagenet"}, r"mean: \[0.*\] in the store, \[0.485"),
        ({"resize": "squash"}, "resize: 'crop' in the store, 'squash' in this run"),
        ({"bits_stored": 12}, "bits_stored: None in the store, 12 in this run"),
    ],
)
def test_another_encoder_is_refused(
    phantoms, cohort, encoder, tmp_path, reference, options, message
):
    other = load_encoder(**{"name": MODEL, "precision": "fp32", **options})
    path = copy_of(reference, tmp_path)
    before = path.read_bytes()
    with pytest.raises(StoreMismatchError, match=message):
        extract_embeddings(cohort, phantoms / "images", path, other, QUICK)
    assert path.read_bytes() == before


def test_a_store_of_version_0_1_0_that_has_the_decode_rule_in_words_is_continued(
    phantoms, cohort, encoder, tmp_path, encoded, monkeypatch
):
    old = encoder.identity.to_dict()
    old["preprocessing"] = {**old["preprocessing"], "decode_rule": "rule 1. Grey: as it was said."}
    monkeypatch.setattr(EncoderIdentity, "to_dict", lambda _: old)
    with monkeypatch.context() as patch:
        patch.setattr("cxr_cache.store.layout.number_decode_rule", dict)
        extract_embeddings(
            cohort.take(slice(4)), phantoms / "images", tmp_path / "s.h5", encoder, QUICK
        )
        with FeatureStore.open(tmp_path / "s.h5") as store:
            assert "as it was said" in str(store.header.encoder)
    monkeypatch.undo()
    with FeatureStore.open(tmp_path / "s.h5") as store:
        assert store.header.encoder == encoder.identity.to_dict()
    summary = extract_embeddings(
        cohort.take(slice(6)), phantoms / "images", tmp_path / "s.h5", encoder, QUICK
    )
    assert (summary.n_taken_over, summary.n_computed, summary.n_failed) == (4, 2, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": True}, "views: 1 in the store, 2 in this run"),
        ({"part": (1, 2)}, "part: None in the store, 1 in this run"),
    ],
)
def test_other_rows_and_views_are_refused(
    phantoms, cohort, encoder, tmp_path, reference, options, message
):
    config = dataclasses.replace(QUICK, **options)
    with pytest.raises(StoreMismatchError, match=message):
        extract_embeddings(
            cohort, phantoms / "images", copy_of(reference, tmp_path), encoder, config
        )


def test_an_encoder_that_computes_something_else_is_refused(
    phantoms, cohort, encoder, tmp_path, reference, monkeypatch
):
    """Same weights, other results: a driver, a library, a broken card. The canaries tell."""
    encode = encoder.encode

    def drift(pixels):
        pooled, embeddings = encode(pixels)
        return pooled, embeddings + 0.05 * embeddings.std() * torch.randn(embeddings.shape)

    monkeypatch.setattr(encoder, "encode", drift)
    with pytest.raises(StoreMismatchError, match=r"cosine 0\.99\d+ on the worst of 8 test images"):
        extract_embeddings(
            cohort, phantoms / "images", copy_of(reference, tmp_path), encoder, QUICK
        )


def test_a_table_without_rows_and_a_missing_folder_are_refused(phantoms, cohort, encoder, tmp_path):
    with pytest.raises(ConfigError, match="no rows"):
        extract_embeddings(
            cohort.take(slice(0)), phantoms / "images", tmp_path / "s.h5", encoder, QUICK
        )
    with pytest.raises(ConfigError, match="is not a folder"):
        extract_embeddings(cohort, phantoms / "nowhere", tmp_path / "s.h5", encoder, QUICK)


@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_to_the_whole_group_is_one_message(tmp_path, signum, status):
    """Terminals and schedulers signal the decoding workers too; they must not die of it."""
    write_phantoms(tmp_path / "data", n_studies=100, image_size_px=96)
    store = tmp_path / "f.h5"
    command = [sys.executable, "-m", "cxr_cache", "extract", "--model", "random:test_vit"]
    command += ["--csv-dir", "data", "--image-dir", "data/images", "--store", str(store)]
    command += ["--batch-size", "1", "--num-workers", "2"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background, a shell has made them ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (store.exists() and (FeatureStore.open(store).status == DONE).sum() >= 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert "the same command continues" in stderr
    assert "Traceback" not in stderr


def test_a_killed_decoding_worker_ends_the_run_and_loses_nothing(tmp_path):
    """Its sibling must not be waited for: it cannot hand over what nobody fetches."""
    write_phantoms(tmp_path / "data", n_studies=60, image_size_px=96)
    store = tmp_path / "f.h5"
    command = [sys.executable, "-m", "cxr_cache", "extract", "--model", "random:test_vit"]
    command += ["--csv-dir", "data", "--image-dir", "data/images", "--store", str(store)]
    command += ["--batch-size", "1", "--num-workers", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (store.exists() and (FeatureStore.open(store).status == DONE).sum() >= 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "A decoding process was killed" in stderr
    assert "Traceback" not in stderr
    assert len(FeatureStore.open(store).find_damaged()) == 0
