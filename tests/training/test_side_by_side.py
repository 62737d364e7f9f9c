"""Several stores of the same images are read side by side, or refused with what differs."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from cxr_cache.cli.main import cli
from cxr_cache.config import TrainConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.errors import ConfigError, RunError, StoreIncompleteError, StoreMismatchError
from cxr_cache.models.predict import predict_images, predict_store
from cxr_cache.models.run import Run
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import load_training_data, prepare_embeddings
from cxr_cache.store.side_by_side import match_rows
from cxr_cache.training.ablate import make_settings, run_ablation
from cxr_cache.training.finetune import tune_run
from cxr_cache.training.train import fit_run
from tests.synthetic import FINDINGS, IMPORTED, QUICK, make_cohort, make_embeddings, make_store

QUICKER = replace(QUICK, epochs=(2,), n_folds=2, final="ensemble")
WIDER = IMPORTED | {"name": "imported:wider.npz", "weights_sha256": "aa", "embedding_width": 24}
ROWS = np.arange(120)


def write_store(
    path: Path,
    cohort: Cohort,
    embeddings: np.ndarray,
    *,
    encoder: dict = IMPORTED,
    done: np.ndarray = ROWS,
    digest: int = 0,
) -> Path:
    """A store whose files have equal digests in all stores that are made with the same number."""
    shapes = {"embeddings": embeddings.shape[1:]}
    with FeatureStore.create(path, cohort, encoder=encoder, features=shapes) as store:
        sha256 = np.full((len(done), 32), digest, np.uint8)
        store.commit(done, {"embeddings": embeddings[done]}, sha256)
    return path


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    return make_cohort(unlabelled=0.1)


@pytest.fixture(scope="module")
def wide(cohort) -> np.ndarray:
    """A second encoder's: wider, on another scale, without a mirrored view."""
    rng = np.random.default_rng(8)
    return (30 * rng.normal(size=(len(cohort), 1, 24))).astype(np.float32)


@pytest.fixture(scope="module")
def pair(cohort, wide, tmp_path_factory) -> list[Path]:
    """Two stores of the same images in different orders."""
    folder = tmp_path_factory.mktemp("pair")
    order = np.random.default_rng(0).permutation(len(cohort))
    a = make_store(folder / "a.h5", cohort, n_views=2)
    b = make_store(folder / "b.h5", cohort.take(order), embeddings=wide[order], encoder=WIDER)
    return [a, b]


@pytest.fixture(scope="module")
def run(pair, tmp_path_factory) -> Run:
    return fit_run(pair, tmp_path_factory.mktemp("run") / "both", QUICKER).run


def load(paths, config=QUICKER, **options):
    stores = [FeatureStore.open(path) for path in paths]
    try:
        return load_training_data(stores[0], config, further=stores[1:], **options)
    finally:
        for store in stores:
            store.close()


# --- What a head reads ----------------------------------------------------------------------------


def test_features_stand_side_by_side_each_prepared_by_itself(pair, cohort, wide):
    data = load(pair)

    first = prepare_embeddings(make_embeddings(cohort, n_views=2)[:, 0], "l2")
    expected = np.concatenate([first, prepare_embeddings(wide[:, 0], "l2")], axis=1)
    assert list(data.cohort.image_ids) == list(cohort.image_ids)
    np.testing.assert_allclose(data.embeddings, expected[None], rtol=1e-6)
    assert any("by the name of the file alone" in note for note in data.notes)
    assert any(f"not trained on, since {pair[1]} has none" in note for note in data.notes)


def test_two_halves_of_one_store_train_what_the_whole_does(cohort, tmp_path):
    whole = make_embeddings(cohort)
    narrow = IMPORTED | {"embedding_width": 8}
    one = make_store(tmp_path / "one.h5", cohort, embeddings=whole)
    halves = [
        make_store(tmp_path / f"{i}.h5", cohort, embeddings=half, encoder=narrow)
        for i, half in enumerate(np.split(whole, 2, axis=-1))
    ]
    config = replace(QUICKER, input_norm="standard")

    alone = fit_run(one, tmp_path / "alone", config).run
    both = fit_run(halves, tmp_path / "both", config).run

    np.testing.assert_allclose(
        both.predictions[list(FINDINGS)], alone.predictions[list(FINDINGS)], atol=1e-6
    )


def test_the_run_records_all_stores_and_a_run_of_one_store_does_not_say_more(pair, run, tmp_path):
    single = fit_run([pair[0]], tmp_path / "single", QUICKER).run
    as_ever = fit_run(pair[0], tmp_path / "as_ever", QUICKER).run

    assert [store["path"] for store in run.stores] == list(map(str, pair))
    assert [one["name"] for one in run.load_model().encoders] == [IMPORTED["name"], WIDER["name"]]
    assert "imported:tiny.npz, imported:wider.npz" in repr(run)
    assert "further_stores" not in single.config
    written = [path / "model.safetensors" for path in (single.path, as_ever.path)]
    assert written[0].read_bytes() == written[1].read_bytes()
    assert b"further" not in written[0].read_bytes()
    assert single.config == as_ever.config


def test_images_that_only_one_store_has_finished_are_left_out_and_counted(cohort, wide, tmp_path):
    a = write_store(tmp_path / "a.h5", cohort, make_embeddings(cohort), digest=7)
    b = write_store(tmp_path / "b.h5", cohort, wide, encoder=WIDER, done=ROWS[3:], digest=7)

    with pytest.raises(StoreIncompleteError, match=r"b\.h5 is not complete: 3 of 120 rows"):
        load([a, b])
    data = load([a, b], allow_pending=True)

    assert list(data.cohort.image_ids) == list(cohort.image_ids[3:])
    assert data.notes == (
        f"3 of 120 images of {a} have no embedding in {b} and are left out.",
    )  # equal digests: nothing to say of names


# --- Refusals -------------------------------------------------------------------------------------


def test_other_images_are_refused_with_counts_and_ids(cohort, wide, tmp_path):
    a = make_store(tmp_path / "a.h5", cohort.take(ROWS[2:]))
    b = make_store(tmp_path / "b.h5", cohort.take(ROWS[:-1]), embeddings=wide[:-1], encoder=WIDER)

    with pytest.raises(StoreMismatchError) as refused:
        load([a, b])

    assert str(refused.value).startswith(
        f"{a} and {b} hold different images: 1 image only in {a} (the first is '00119.png') and "
        f"2 images only in {b} (the first is '00000.png'), 117 in both."
    )


def test_other_files_are_refused_with_both_digests(cohort, wide, tmp_path):
    a = write_store(tmp_path / "a.h5", cohort, make_embeddings(cohort), digest=7)
    b = write_store(tmp_path / "b.h5", cohort, wide, encoder=WIDER, digest=8)

    with pytest.raises(StoreMismatchError, match=r"different files for 120 of 120 images") as found:
        load([a, b])

    assert "'00000.png', of SHA-256 070707070707... in the one and 080808080808..." in str(
        found.value
    )


def relabel(cohort: Cohort, row: int, value: float) -> Cohort:
    targets = cohort.targets.copy()
    targets[row, 2] = value
    return replace(cohort, targets=targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: relabel(c, 5, np.nan),
            r"differ in Nodule for 1 of 120 images; .* '00005.png': ",
        ),
        (
            lambda c: c.assign(patient_id=["p" + s for s in c.study_uids]),
            r"differ in patient_id for 120 .*: blank in .*a\.h5, 'p0' in .*b\.h5",
        ),
        (lambda c: c.assign(given_split="test"), r"differ in given_split for 120 .*: blank in "),
        (
            lambda c: c.assign(study_uid=["s" + s for s in c.study_uids]),
            r"differ in study_uid for 120 .*: '0' in .*a\.h5, 's0' in .*b\.h5",
        ),
        (
            lambda c: replace(c, findings=(*FINDINGS[:-1], "Edema")),
            r"different findings: only .*a\.h5 has Scoliosis and only .*b\.h5 has Edema",
        ),
    ],
)
def test_other_labels_are_refused_with_both_values(cohort, wide, tmp_path, change, message):
    cohort = relabel(cohort, 5, 1)
    a = make_store(tmp_path / "a.h5", cohort)
    b = make_store(tmp_path / "b.h5", change(cohort), embeddings=wide, encoder=WIDER)

    with pytest.raises(StoreMismatchError, match=message):
        load([a, b])


def test_a_table_of_labels_stands_for_all_stores(cohort, wide, tmp_path):
    a = make_store(tmp_path / "a.h5", cohort)
    b = make_store(tmp_path / "b.h5", relabel(cohort, 5, 1), embeddings=wide, encoder=WIDER)
    table = pd.DataFrame({"image_id": cohort.image_ids, "Edema": (ROWS // 2 % 3 == 0).astype(int)})
    table.to_csv(tmp_path / "l.csv", index=False)

    data = load([a, b], labels=tmp_path / "l.csv")

    assert data.cohort.findings == ("Edema",)
    assert data.embeddings.shape == (1, 120, 40)


def test_no_image_in_common_and_a_store_given_twice(cohort, wide, pair, tmp_path):
    a = write_store(tmp_path / "a.h5", cohort, make_embeddings(cohort), done=ROWS[:50])
    b = write_store(tmp_path / "b.h5", cohort, wide, encoder=WIDER, done=ROWS[50:])
    with (
        FeatureStore.open(a) as first,
        FeatureStore.open(b) as second,
        pytest.raises(StoreIncompleteError, match="No image has an embedding in all of"),
    ):
        match_rows((first, ROWS[:50]), [(second, ROWS[50:])])
    with pytest.raises(ConfigError, match=r"a\.h5 is given twice"):
        fit_run([pair[0], pair[0]], tmp_path / "run", QUICKER)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"one encoder, .* 2 stores are given"):
        tune_run(pair, tmp_path / "run")


# --- The run in use -------------------------------------------------------------------------------


def test_a_run_is_tested_on_stores_as_many_as_its_own(run, pair):
    a, b = map(FeatureStore.open, pair)
    with a, b:
        predictions, _ = predict_store(run, a, further=[b])
        with pytest.raises(
            StoreMismatchError, match=r"features of 2 stores \(imported:tiny.* 1 is"
        ):
            predict_store(run, a)
        with pytest.raises(StoreMismatchError, match=r"embedding_width: 24 in the store, 16"):
            predict_store(run, b, further=[a])

    own = run.predictions.set_index("image_id").loc[predictions["image_id"], list(FINDINGS)]
    np.testing.assert_allclose(predictions[list(FINDINGS)], own, atol=1e-6)


def test_what_needs_one_encoder_says_so(run, pair, tmp_path):
    def refuse(*words) -> str:
        result = CliRunner().invoke(cli, list(map(str, words)))
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        return result.output

    sentence = (
        r"reads the features of 2 encoders side by side \(imported:tiny.*; an export holds one"
    )
    out = ["--out", tmp_path / "out"]
    assert re.search(sentence, refuse("export", run.path, "--format", "onnx", *out))
    leak = refuse("audit", pair[0], "--run-dir", run.path, "--leakage")
    assert "reads 2 stores side by side; the leak is measured with heads on one" in leak
    start = refuse("finetune", pair[0], "--run-dir", tmp_path / "t", "--from-run", run.path)
    assert "2 stores side by side, and fine-tuning trains the blocks of one" in start
    assert "imported from imported:tiny.npz" in refuse("predict", run.path, pair[0])
    assert "b.h5 is given, and no setting reads it" in refuse(
        *("ablate", *pair, "--set", "store=a", *out)
    )


# --- Ablation -------------------------------------------------------------------------------------


def test_an_ablation_compares_stores_on_the_same_folds(pair, tmp_path):
    settings = make_settings(QUICKER, [], stores=pair)
    ablation = run_ablation(pair, tmp_path / "out", settings, n_workers=1, baselines=())

    assert [setting.label for setting in settings] == ["store=a", "store=b", "store=a+b"]
    table = ablation.table.set_index("setting")
    for label, paths in (("store=a", pair[:1]), ("store=a+b", pair)):
        search = fit_run(paths, tmp_path / label, QUICKER).search
        assert table.loc[label, "mean_auroc"] == pytest.approx(search["mean_auroc"][0], rel=1e-5)
    assert table.loc["store=a", "difference"] == 0
    assert any("by the name of the file alone" in note for note in ablation.notes)


def test_store_names_and_what_is_wrong_with_them(tmp_path):
    stores = [tmp_path / "x" / "f.h5", tmp_path / "y" / "f.h5"]
    assert make_settings(QUICK, [], stores=stores)[0].label == f"store={stores[0]}"
    named = make_settings(QUICK, ["store=b+a,b", "lr=1e-3,1e-2"], stores=["a.h5", "b.h5"])
    assert [setting.stores for setting in named] == [(1, 0), (1, 0), (1,), (1,)]
    for text, message in (
        ("store=c", "there is no store 'c'. Choose from a, b, and join"),
        ("store=a+a", "a store is named twice"),
        ("store=a,a", "a value is given twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_settings(QUICK, [text], stores=["a.h5", "b.h5"])


# --- With encoders at hand ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def towers():
    from cxr_cache.encoders.loading import load_encoder

    return [
        load_encoder("random:test_vit:1", precision="fp32"),
        load_encoder("random:test_vit:2", precision="fp32", resize="squash", normalize="imagenet"),
    ]


@pytest.fixture(scope="module")
def of_towers(towers, tmp_path_factory) -> tuple[Path, Run]:
    from cxr_cache.config import ExtractConfig
    from cxr_cache.datasets.phantoms.dataset import write_phantoms
    from cxr_cache.datasets.readers import load_cohort

    folder = tmp_path_factory.mktemp("towers")
    images = write_phantoms(folder / "phantoms", n_studies=16, image_size_px=64).image_dir
    stores = [folder / "one.h5", folder / "two.h5"]
    for path, tower in zip(stores, towers, strict=True):
        cohort = load_cohort(images.parent)
        extract_embeddings(cohort, images, path, tower, ExtractConfig(num_workers=0))
    config = TrainConfig(epochs=(2,), n_folds=2, batch_size=4, hidden=(8,), n_jobs=1)
    return images, fit_run(stores, folder / "run", config).run


def test_images_get_what_the_run_gave_them_through_every_encoder(of_towers, towers):
    images, run = of_towers
    rows = run.predictions.iloc[:3]
    paths = [images / name for name in rows["image_id"]]

    predicted = predict_images(run, paths, towers)

    own = run.calibration.apply(rows[list(predicted.findings)].to_numpy(np.float32))
    np.testing.assert_allclose(predicted.probabilities, own, atol=1e-5)
    assert not any("by the name" in warning for warning in run.config["warnings"])
    with pytest.raises(RunError, match=r"2 encoders \(random:test_vit:1, .*, and 1 is given"):
        predict_images(run, paths, towers[0])
    with pytest.raises(RunError, match="another encoder"):
        predict_images(run, paths, towers[::-1])


def test_the_command_loads_every_encoder(of_towers, tmp_path):
    images, run = of_towers
    image = str(images / run.predictions["image_id"][0])

    result = CliRunner().invoke(cli, ["predict", str(run.path), image, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "%" in result.output
    once = CliRunner().invoke(cli, ["predict", str(run.path), image, "--model", "random:test_vit"])
    assert once.exit_code == 2
    assert "--model is given 1 time, and" in once.output
    explained = CliRunner().invoke(
        cli, ["explain", str(run.path), image, "--finding", "Mass", "--out", str(tmp_path)]
    )
    assert explained.exit_code == 1
    assert "a map follows one encoder back" in explained.output


def test_page_and_card_name_every_encoder(of_towers, tmp_path):
    from cxr_cache.evaluation.evaluate import score_run
    from cxr_cache.report.report import write_report

    path = shutil.copytree(of_towers[1].path, tmp_path / "run")
    run = Run.open(path)
    score_run(run, n_resamples=20)
    page = write_report(run).read_text(encoding="utf-8")

    assert "embeddings of random:test_vit:1 and of random:test_vit:2." in page
    assert "two.h5" in page
    card = run.read_model_card()
    assert card.count("* encoder: random:test") == 2
    for encoder in run.load_model().encoders:
        assert encoder["weights_sha256"] in card
    assert json.loads((path / "config.json").read_text())["random_encoder"]
