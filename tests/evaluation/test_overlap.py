"""Images that a run knows are found by file and embedding, whatever they are called."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from cxr_cache.cli.main import cli
from cxr_cache.config import ExtractConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import RunError
from cxr_cache.evaluation.audit import audit_store
from cxr_cache.evaluation.audit_images import find_copies
from cxr_cache.evaluation.compare import compare_runs
from cxr_cache.evaluation.evaluate import score_run
from cxr_cache.evaluation.overlap import find_overlap
from cxr_cache.models.run import Run
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.training.train import fit_run
from tests.synthetic import IMPORTED, QUICK, WIDTH, make_cohort, make_embeddings, make_store

N_SAME, N_CLOSE = 5, 7


def write_store(
    path: Path, cohort: Cohort, embeddings: np.ndarray, digests: np.ndarray, **encoder: object
) -> Path:
    """A finished store; `digests` are numbers from 1, and 0 for none."""
    sha256 = np.zeros((len(cohort), 32), np.uint8)
    sha256[:, :2] = digests[:, None] >> np.array([0, 8])
    shapes = {"embeddings": embeddings.shape[1:]}
    with FeatureStore.create(path, cohort, encoder=IMPORTED | encoder, features=shapes) as store:
        store.commit(np.arange(len(cohort)), {"embeddings": embeddings}, sha256)
    return path


def encode_again(embeddings: np.ndarray) -> np.ndarray:
    """As of the same pictures in other files: almost the same numbers."""
    noise = np.random.default_rng(9).normal(0, 0.02, embeddings.shape)
    return (embeddings + noise).astype(np.float32)


def call_otherwise(cohort: Cohort) -> Cohort:
    images = cohort.images.assign(
        image_id=[f"other/{row}.png" for row in range(len(cohort))],
        study_uid=[f"other {uid}" for uid in cohort.study_uids],
    )
    return replace(cohort, images=images)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> tuple[Path, Run]:
    """A store of 80 studies with digests, and a run on it."""
    folder, cohort = tmp_path_factory.mktemp("overlap"), make_cohort(80)
    path = folder / "own.h5"
    write_store(path, cohort, make_embeddings(cohort), np.arange(1, 161))
    run = fit_run(path, folder / "run", QUICK).run
    score_run(run, n_resamples=0)
    return path, run


@pytest.fixture(scope="module")
def copied(own, tmp_path_factory) -> Path:
    """Sixty images of another hospital, and among them train images of the run under other names.

    Five have the same bytes, seven are the same pictures in other files.
    """
    path, run = own
    trained_on = run.splits.loc[run.splits["split"] == "train", "image_id"]
    with FeatureStore.open(path) as store:
        chosen = np.flatnonzero(np.isin(store.image_ids, trained_on))[: N_SAME + N_CLOSE]
        known = np.array(store.embeddings[chosen])
    cohort = call_otherwise(make_cohort(30, seed=3))
    embeddings, digests = make_embeddings(make_cohort(30, seed=3), seed=3), np.arange(900, 960)
    embeddings[: len(chosen)] = encode_again(known)
    embeddings[:N_SAME], digests[:N_SAME] = known[:N_SAME], chosen[:N_SAME] + 1
    return write_store(tmp_path_factory.mktemp("copied") / "other.h5", cohort, embeddings, digests)


def call(*arguments: object) -> str:
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.output


FOUND = (
    f"{N_SAME} of the 60 images belong to the run's own data: {N_SAME} to its train split, "
    "0 to its test split; figures on images that it was trained on are too good.",
    f"{N_CLOSE} of the 60 images are near-identical to images of the run's own data by their "
    f"embeddings (not verified as pictures): {N_CLOSE} to its train split, 0 to its test split; "
    "overlap.csv names them. If they are the same, figures on images that it was trained on are "
    "too good.",
)


def test_an_external_test_finds_train_images_under_other_names(own, copied):
    with FeatureStore.open(copied) as store:
        found = find_overlap(own[1], store, store.cohort.images)
    assert found.warnings == FOUND
    said = call("evaluate", own[1].path, "--store", copied, "--resamples", 0)
    assert all(sentence in said for sentence in FOUND)


def test_an_audit_of_another_store_finds_them_too(own, copied, tmp_path):
    path, run = own
    said = call("audit", copied, "--run-dir", run.path, "--out", tmp_path / "audit")
    assert (
        f"This store does not hold the images of {run.path} (by name or file), so there is" in said
    )
    assert all(sentence in said for sentence in FOUND)
    table = pd.read_csv(tmp_path / "audit" / "overlap.csv")
    assert table["evidence"].value_counts().to_dict() == {
        "same file": N_SAME,
        "close embeddings": N_CLOSE,
    }
    with FeatureStore.open(path) as store:
        ids = store.image_ids
    assert set(table["run_image_id"]) <= set(ids)
    summary = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert summary["overlap"]["n_near_identical"] == N_CLOSE


def test_an_audit_of_a_store_without_such_images_says_so(own, tmp_path):
    cohort = call_otherwise(make_cohort(30, seed=3))
    embeddings = np.random.default_rng(3).normal(size=(60, 1, WIDTH)).astype(np.float32)
    path = write_store(tmp_path / "clean.h5", cohort, embeddings, np.arange(900, 960))
    with FeatureStore.open(path) as store:
        assert "  None is the run's own." in audit_store(store, run=own[1]).to_text()
        with pytest.raises(RunError, match=r"--leakage trains on the images of .*, and .*clean.h5"):
            audit_store(store, run=own[1], with_leakage=True)


def test_other_images_of_the_same_names_are_not_the_runs(own, tmp_path):
    """Names like 00001.png are given in every hospital."""
    cohort = make_cohort(80)
    embeddings = np.random.default_rng(4).normal(size=(160, 1, WIDTH)).astype(np.float32)
    for digests in (np.arange(900, 1060), np.zeros(160, int)):
        path = write_store(tmp_path / f"{digests[0]}.h5", cohort, embeddings, digests)
        with FeatureStore.open(path) as store:
            assert not len(find_overlap(own[1], store, store.cohort.images).table)
    with FeatureStore.open(tmp_path / "900.h5") as store:
        assert "None is the run's own." in audit_store(store, run=own[1]).to_text()


def test_another_encoder_leaves_the_files_to_be_compared(own, copied):
    """A run's store may have been written anew with another encoder: its digests still count."""
    path, run = own
    with FeatureStore.open(copied) as store:
        cohort, embeddings = store.cohort, np.array(store.embeddings[:])
        sha256 = np.asarray(store.read_column("image_sha256"))
    other = copied.parent / "encoded_otherwise.h5"
    digests = sha256[:, 0] + 256 * sha256[:, 1].astype(int)
    write_store(other, cohort, embeddings, digests, weights_sha256="0a1b2c")
    with FeatureStore.open(other) as store:
        *_, note = (found := find_overlap(run, store, store.cohort.images)).warnings
    assert (found.count("same file"), found.count("close embeddings")) == (N_SAME, 0)
    assert note == (
        "Which images are the run's own was told by their files alone, since the embeddings of "
        f"{path} are of another encoder."
    )


# --- runs that are compared ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def doubled(tmp_path_factory) -> tuple[Run, Run]:
    """Two runs on a store in which each picture is there twice, under two names and studies."""
    folder, half = tmp_path_factory.mktemp("doubled"), make_cohort(30)
    cohort = make_cohort(60)
    cohort = replace(cohort, targets=np.concatenate([half.targets, half.targets]))
    once = make_embeddings(half)
    embeddings = np.concatenate([once, encode_again(once)])
    digests = np.arange(1, 121)
    digests[60:80] = digests[:20]  # these are the same files
    path = write_store(folder / "doubled.h5", cohort, embeddings, digests)
    runs = [fit_run(path, folder / name, replace(QUICK, epochs=n)).run for name, n in NAMES.items()]
    return runs[0], runs[1]


NAMES = {"short": (2,), "longer": (4,)}


def test_a_comparison_says_that_test_images_were_trained_on_under_other_names(doubled):
    split = doubled[0].splits.set_index("image_id")["split"]
    of_row = split.loc[[f"{row:05d}.png" for row in range(120)]].to_numpy()
    crosses = of_row[:60] != of_row[60:]
    n, n_same = int(crosses.sum()), int(crosses[:20].sum())
    assert n_same > 0

    [note] = [note for note in compare_runs(*doubled, n_resamples=10).notes if "trained on" in note]

    assert note.startswith(
        f"short and longer: {n} of {(of_row == 'test').sum()} test images are or may be trained on "
        f"under other names: {n_same} by their files, {n - n_same} by near-identical embeddings "
        "(not verified as pictures). The first is "
    )
    assert f"doubled.h5 --run-dir {doubled[0].path}` lists them. Figures on images that it" in note


def test_a_comparison_without_the_store_says_what_was_not_checked(doubled):
    gone = [Run(run.path, run.config | {"store": {"path": "gone.h5"}}) for run in doubled]
    notes = compare_runs(*gone, n_resamples=10).notes
    [note] = [note for note in notes if "under other names" in note]
    assert note.startswith(
        "short and longer: whether test images were trained on under other names was not checked. "
    )
    assert "gone.h5" in note


def test_a_comparison_of_stores_with_other_files_says_so(own, tmp_path):
    """Names may be equal by chance; or the same pictures in another size, which is fine."""
    cohort = make_cohort(80)
    embeddings = make_embeddings(cohort, seed=1)
    digests = np.arange(1, 161)
    path = write_store(tmp_path / "same_files.h5", cohort, embeddings, digests)
    same = fit_run(path, tmp_path / "same", replace(QUICK, epochs=(2,))).run
    path = write_store(tmp_path / "other_files.h5", cohort, embeddings, digests + 500)
    other = fit_run(path, tmp_path / "other", replace(QUICK, epochs=(2,))).run

    notes = compare_runs(own[1], same, other, n_resamples=10).notes

    n_test = (other.splits["split"] == "test").sum()
    [note] = [note for note in notes if "SHA-256" in note]
    assert note == (
        f"run and other: of {n_test} test images {n_test} have other bytes in the second's store "
        "(by SHA-256), and were matched by their names alone. Make sure that they are the same "
        "pictures."
    )


# --- the nearest of many -------------------------------------------------------------------------


def test_copies_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    others = rng.normal(1, 1, (60, 6)).astype(np.float32)
    images = rng.normal(1, 1, (40, 6)).astype(np.float32)
    images[[3, 17, 30]] = others[[50, 1, 2]] + 0.05
    mean = others.mean(axis=0)

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - mean, b - mean
        return 1 - float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    distances = np.array([[distance(a, b) for b in others] for a in images])
    nearest, tenth = np.sort(distances, axis=1)[:, [0, 9]].T

    rows, of_others, found = find_copies(images, others)

    np.testing.assert_array_equal(rows, np.flatnonzero(nearest < 0.25 * tenth))
    assert {3, 17, 30} <= set(rows) < set(range(40))
    np.testing.assert_array_equal(of_others, distances.argmin(axis=1)[rows])
    np.testing.assert_allclose(found, nearest[rows], atol=1e-6)


def test_a_copy_is_found_among_many():
    """The distance to the tenth of them is no measure then."""
    others = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    others[:25] = others[0]
    rows, _, distances = find_copies(others[[0, 30]], others)
    assert rows.tolist() == [0, 1]
    assert distances.max() == pytest.approx(0, abs=1e-6)


def test_nothing_is_close_to_almost_nothing():
    one = np.ones((1, 4), np.float32)
    assert not len(find_copies(one, np.ones((2, 4), np.float32))[0])
    assert not len(find_copies(one[:0], np.eye(4, dtype=np.float32))[0])


@pytest.mark.slow
def test_a_data_set_as_large_as_nihs_is_compared_in_a_minute():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(112_120, 512)).astype(np.float32)
    others = rng.normal(size=(6352, 512)).astype(np.float32)
    images[1000:1100] = others[:100] * 1.1
    start = time.process_time()
    rows, of_others, _ = find_copies(images, others)
    assert time.process_time() - start < 60
    np.testing.assert_array_equal(rows, np.arange(1000, 1100))
    np.testing.assert_array_equal(of_others, np.arange(100))


@pytest.mark.slow
def test_real_radiographs_saved_again_are_found_and_others_are_not(shared_data, tmp_path):
    """A pretrained encoder, 300 radiographs; 50 of them as other files, and 50 others."""
    folder = shared_data / "indiana_256"
    cohort = load_cohort(folder)
    is_there = [(folder / "images" / name).is_file() for name in cohort.image_ids]
    cohort = cohort.take(np.flatnonzero(is_there)[:350])
    encoder = load_encoder(f"local-dir:{shared_data.parent / 'encoders' / 'dinov2_small'}")
    saved = tmp_path / "saved"
    saved.mkdir()
    for name in cohort.image_ids[:50]:
        with Image.open(folder / "images" / name) as image:
            image.resize((230, 230)).save(saved / name, quality=80)

    def embed(name: str, rows: slice, images: Path) -> np.ndarray:
        part = cohort.take(np.arange(350)[rows])
        path, config = tmp_path / f"{name}.h5", ExtractConfig(num_workers=0)
        extract_embeddings(part, images, path, encoder, config)
        with FeatureStore.open(path) as store:
            return np.array(store.embeddings[:, 0])

    own = embed("own", slice(300), folder / "images")
    copies = find_copies(embed("saved", slice(50), saved), own)
    others = find_copies(embed("others", slice(300, 350), folder / "images"), own)
    assert len(copies[0]) >= 40
    np.testing.assert_array_equal(copies[0], copies[1])
    assert len(others[0]) <= 1


def test_a_store_of_the_runs_own_images_elsewhere_is_audited_as_its_own(own, tmp_path):
    """A copy of the store, or one without digests: nothing says that the images are others."""
    cohort = make_cohort(80)
    path = make_store(tmp_path / "copy.h5", cohort)
    with FeatureStore.open(path) as store:
        found = audit_store(store, run=own[1])
    assert found.overlap is None
    assert "on several sides of the split" in found.to_text()
