"""The audit finds what was planted, and nothing else; leaking pays where there is a leak."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from cxr_cache.cli.main import cli
from cxr_cache.config import AuditConfig, ExtractConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.errors import ConfigError, RunError, StoreIncompleteError
from cxr_cache.evaluation import audit_images
from cxr_cache.evaluation.audit import (
    CLOSE,
    NEAR_IDENTICAL,
    SAME_FILE,
    SAME_PIXELS,
    Audit,
    audit_store,
)
from cxr_cache.evaluation.audit_images import (
    describe_picture,
    describe_usual,
    find_embedding_outliers,
    find_neighbours,
    find_pixel_outliers,
    find_same_digests,
    shrink,
)
from cxr_cache.evaluation.leakage import BY_IMAGE, BY_STUDY, CLEAN, LEAKING, measure_leakage
from cxr_cache.models.run import Run
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.training.train import fit_run
from tests import small_stores, synthetic

PLANTED = ("copy", "resaved", "brighter", "inverted", "upside_down", "noise", "flat", "coloured")


def plant(image_dir: Path, source: str) -> dict[str, str]:
    """Files made from one phantom; by what was done, their names."""
    picture = np.asarray(Image.open(image_dir / source))
    names = {kind: f"{kind}.png" for kind in PLANTED}
    shutil.copy(image_dir / source, image_dir / names["copy"])
    noise = np.random.default_rng(0).integers(0, 256, picture.shape, dtype=np.uint8)
    brighter = np.clip(picture * 1.03 + 4, 0, 255).astype(np.uint8)
    pictures = {
        "resaved": picture,
        "brighter": brighter,
        "inverted": 255 - picture,
        "upside_down": picture[::-1, ::-1],
        "noise": noise,
        "flat": 128 + noise // 64,
        "coloured": np.stack([picture, picture // 2, picture // 3], axis=2),
    }
    for kind, pixels in pictures.items():
        Image.fromarray(np.ascontiguousarray(pixels)).save(image_dir / names[kind])
    return names


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Path, Path, str]:
    """A store of phantoms and planted files, each of these a study of its own; with its source."""
    folder = tmp_path_factory.mktemp("audit")
    phantoms = write_phantoms(folder / "phantoms", n_studies=24, image_size_px=96)
    cohort = load_cohort(phantoms.csv_dir)
    row = int(np.flatnonzero(cohort.projections == "Frontal")[0])
    source = str(cohort.image_ids[row])
    names = list(plant(phantoms.image_dir, source).values())
    labels = 1 - np.repeat(cohort.targets[row : row + 1], len(names), axis=0)
    more = pd.DataFrame(
        {
            "image_id": names,
            "study_uid": [f"planted {name}" for name in names],
            "projection": "Frontal",
        }
    )
    cohort = Cohort(
        pd.concat([cohort.images, more]),
        targets=np.concatenate([cohort.targets, labels]),
        findings=cohort.findings,
        source=cohort.source,
    )
    encoder = load_encoder("random:test_vit", precision="fp32")
    path = folder / "features.h5"
    extract_embeddings(cohort, phantoms.image_dir, path, encoder, ExtractConfig(num_workers=0))
    return path, phantoms.image_dir, source


@pytest.fixture(scope="module")
def audited(planted) -> Audit:
    path, image_dir, _ = planted
    with FeatureStore.open(path) as store:
        return audit_store(store, image_dir=image_dir)


def pairs_of(found: Audit, evidence: str) -> set[frozenset[str]]:
    pairs = found.duplicates[found.duplicates["evidence"] == evidence]
    return {frozenset(pair) for pair in zip(pairs["image_a"], pairs["image_b"], strict=True)}


# --- duplicates ----------------------------------------------------------------------------------


def test_every_copy_is_found_by_its_strongest_evidence(audited, planted):
    source = planted[2]
    assert pairs_of(audited, SAME_FILE) == {frozenset({source, "copy.png"})}
    # a group is the first of it with each of the others
    assert frozenset({source, "resaved.png"}) in pairs_of(audited, SAME_PIXELS)
    alike = {source, "copy.png", "resaved.png", "brighter.png", "coloured.png"}  # grey means
    near = pairs_of(audited, NEAR_IDENTICAL)
    assert any("brighter.png" in pair for pair in near)
    assert all(pair <= alike for pair in near | pairs_of(audited, SAME_PIXELS))


def test_pictures_that_were_compared_and_differ_are_no_longer_candidates(audited, planted):
    assert not pairs_of(audited, CLOSE)
    with FeatureStore.open(planted[0]) as store:
        without = audit_store(store)
    assert pairs_of(without, CLOSE), "embeddings alone cannot tell"
    assert pairs_of(without, SAME_FILE) == pairs_of(audited, SAME_FILE)
    assert "not verified" in without.to_text()
    assert "no picture was compared" in without.to_text()


def test_conflicting_labels_are_named(audited, planted):
    row = audited.duplicates.query("evidence == @SAME_FILE").iloc[0]
    with FeatureStore.open(planted[0]) as store:
        findings = store.findings
    assert row["conflicting"].split(";") == list(findings)  # planted with every label reversed
    assert row["study_a"] != row["study_b"]


def test_unlabelled_conflicts_with_nothing(tmp_path):
    cohort = replace(synthetic.make_cohort(10), targets=np.full((20, 6), np.nan, np.float32))
    embeddings = synthetic.make_embeddings(cohort)
    embeddings[1] = embeddings[0]
    path = synthetic.make_store(tmp_path / "features.h5", cohort, embeddings=embeddings)
    with FeatureStore.open(path) as store:
        pair = audit_store(store).duplicates.iloc[0]
    assert (pair["image_a"], pair["image_b"]) == ("00000.png", "00001.png")
    assert pair["distance"] == pytest.approx(0, abs=1e-6)
    assert pair["conflicting"] == ""


@pytest.mark.parametrize("seed", [0, 1])
def test_neighbours_equal_a_plain_loop(seed):
    embeddings = np.random.default_rng(seed).normal(1, 1, (40, 6)).astype(np.float32)
    embeddings[3] = embeddings[1] = embeddings[2]
    centred = embeddings - embeddings.mean(axis=0)
    near = find_neighbours(embeddings)
    assert near.rows.shape == (40, 10)
    for row in range(40):
        cosines = [
            x @ centred[row] / np.linalg.norm(x) / np.linalg.norm(centred[row]) for x in centred
        ]
        distances = np.sort([1 - c for k, c in enumerate(cosines) if k != row])
        np.testing.assert_allclose(near.distances[row], distances[:10], atol=1e-5)
        assert row not in near.rows[row]


def test_many_copies_do_not_hide_an_image_behind_them():
    """More equal rows than neighbours: every row still has others only."""
    embeddings = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    embeddings[:25] = embeddings[0]
    near = find_neighbours(embeddings)
    assert (near.rows != np.arange(40)[:, None]).all()
    assert near.distances[:25].max() == pytest.approx(0, abs=1e-6)


def test_near_others_of_many_images_tell_what_the_nearest_do(monkeypatch):
    """Copies and images far from all others, beyond the number up to which all are compared."""
    rng = np.random.default_rng(0)
    embeddings = (rng.normal(size=(8, 16))[rng.integers(8, size=2000)]).astype(np.float32)
    embeddings += 0.1 * rng.standard_normal((2000, 16), np.float32)
    embeddings[:20] = embeddings[1000:1020] + np.float32(1e-4)
    embeddings[500:503] = 5 * np.eye(16, dtype=np.float32)[:3] * [[1], [-1], [1]]
    nearest = find_neighbours(embeddings)
    monkeypatch.setattr(audit_images, "MOST_EXACT", 1000)
    monkeypatch.setattr(audit_images, "N_EXACT", 200)
    near = find_neighbours(embeddings)
    assert 200 <= len(near.exact) <= 400
    assert near.usual_distance == pytest.approx(nearest.usual_distance, rel=0.1)
    pairs = [{tuple(pair) for pair in of.close_pairs(0.1)[0].tolist()} for of in (near, nearest)]
    assert pairs[0] == pairs[1] >= {(k, 1000 + k) for k in range(20)}
    found = [set(find_embedding_outliers(of)["row"]) for of in (near, nearest)]
    assert found[0] == found[1] >= {500, 501, 502}


def test_equal_digests_are_the_first_with_the_rest_and_zeros_are_none():
    digests = np.zeros((6, 4), np.uint8)
    digests[[1, 3, 4]] = 7
    digests[2] = 9
    assert find_same_digests(digests).tolist() == [[1, 3], [1, 4]]
    assert find_same_digests(np.zeros((3, 4), np.uint8)).shape == (0, 2)


def test_the_real_copies_are_found(shared_data, tmp_path):
    """Three groups of byte-identical files among 6,352; the digests alone find them."""
    folder = shared_data / "indiana_256"
    cohort = load_cohort(folder)
    wanted = ("1015_IM-0001", "1015_IM-0013", "3245_IM-1537", "3549_IM-1739", "1_IM", "100_IM")
    chosen = [k for k, name in enumerate(cohort.image_ids) if name.startswith(wanted)]
    encoder = load_encoder("random:test_vit", precision="fp32")
    path = tmp_path / "features.h5"
    cohort = cohort.take(np.array(chosen))
    extract_embeddings(cohort, folder / "images", path, encoder, ExtractConfig(num_workers=0))
    with FeatureStore.open(path) as store:
        found = audit_store(store, image_dir=folder / "images", config=AuditConfig(closeness=1))
    assert {tuple(sorted(pair)) for pair in pairs_of(found, SAME_FILE)} == {
        ("1015_IM-0001-1001.dcm.jpg", "1015_IM-0013-1001.dcm.jpg"),
        ("1015_IM-0001-2001.dcm.jpg", "1015_IM-0013-2001.dcm.jpg"),
        ("3245_IM-1537-1001.dcm.jpg", "3245_IM-1537-4001.dcm.jpg"),
    }
    assert pairs_of(found, NEAR_IDENTICAL) == {
        frozenset({"3549_IM-1739-1001-0001.dcm.jpg", "3549_IM-1739-1001-0002.dcm.jpg"})
    }


# --- odd images ----------------------------------------------------------------------------------


def test_each_odd_image_is_named_for_what_it_is(audited):
    reasons = audited.outliers.groupby("image_id")["reason"].agg(" / ".join)
    assert reasons["inverted.png"].startswith("inverted")
    assert reasons["upside_down.png"].startswith("upside down")
    assert "unlike" in reasons["noise.png"]
    assert "blank" in reasons["flat.png"]
    assert "in colour" in reasons["coloured.png"]


def test_sound_images_are_left_alone(audited):
    planted = {f"{kind}.png" for kind in PLANTED}
    others = audited.outliers[~audited.outliers["image_id"].isin(planted)]
    assert len(others) <= 1, others
    odd = {"copy.png", "resaved.png", "brighter.png"} & set(audited.outliers["image_id"])
    assert not odd


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(
    ("n_turns", "reason"), [(0, None), (1, "on its side"), (2, "upside down"), (3, "on its side")]
)
def test_a_film_is_found_whichever_way_it_lies(planted, n_turns, reason, mirrored):
    """Eight ways: to the left, to the right, upside down, and each of them mirrored."""
    _, image_dir, source = planted
    names = [f for f in sorted(image_dir.iterdir()) if f.stem not in PLANTED]
    pictures = {row: np.asarray(Image.open(name)) for row, name in enumerate(names)}
    frontal = [row for row, name in enumerate(names) if name.name.endswith("1001.dcm.png")]
    row = names.index(image_dir / source)
    turned = np.rot90(pictures[row], n_turns)
    pictures[row] = np.fliplr(turned) if mirrored else turned
    facts = {row: describe_picture(pictures[row]) for row in sorted({*frontal, row})}
    found = find_pixel_outliers(facts, np.full(len(names), "Frontal"))
    reasons = found.loc[found["row"] == row, "reason"].tolist()
    assert len(reasons) == (reason is not None), reasons
    assert all(found_reason.startswith(reason) for found_reason in reasons)


def test_what_all_pictures_have_makes_none_of_them_odd():
    """12-bit values stored in 16 bits: all are dark, which is said once, of all of them."""
    rng = np.random.default_rng(0)
    dark = [rng.integers(0, 16, (32, 32), dtype=np.uint8) for _ in range(24)]
    facts = [describe_picture(picture) for picture in (*dark, np.full((32, 32), 3, np.uint8))]
    assert np.median([one.contrast for one in facts]) == 15
    found = find_pixel_outliers(dict(enumerate(facts)), np.full(25, "Frontal"))
    blank = found[found["reason"].str.startswith("blank")]
    assert blank["row"].tolist() == [24]
    assert blank["usual"].tolist() == [15]
    (note,) = describe_usual(facts)
    assert "15 of 255 grey levels" in note
    assert "--bits-stored 12" in note

    coloured = [describe_picture(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(24)]
    found = find_pixel_outliers(dict(enumerate(coloured)), np.full(24, "Frontal"))
    assert not len(found[found["reason"] == "in colour"])
    (note,) = describe_usual(coloured)
    assert "in colour" in note

    framed = np.zeros((32, 32), np.uint8)
    framed[:16, :16] = dark[0][:16, :16] * 16
    facts = [describe_picture(framed)] * 24
    assert not len(find_pixel_outliers(dict(enumerate(facts)), np.full(24, "Frontal")))
    (note,) = describe_usual(facts)
    assert "75% of their area" in note
    assert describe_usual([]) == []


def test_a_file_that_cannot_be_read_is_listed(planted, tmp_path):
    path, image_dir, source = planted
    shutil.copytree(image_dir, tmp_path / "images")
    (tmp_path / "images" / source).write_bytes(b"no image")
    with FeatureStore.open(path) as store:
        found = audit_store(store, image_dir=tmp_path / "images")
    assert found.unreadable["image_id"].tolist() == [source]
    assert "1 file could not be read" in found.to_text()


def test_facts_about_pictures():
    grey = np.zeros((40, 50), np.uint8)
    grey[10:30, 5:45] = np.random.default_rng(0).integers(0, 256, (20, 40))
    plain, coloured = describe_picture(grey), describe_picture(np.stack([grey] * 3, axis=2))
    assert plain.pixel_sha256 == coloured.pixel_sha256
    assert coloured.colour == 0
    assert plain.frame == pytest.approx(1 - 20 * 40 / (40 * 50))
    np.testing.assert_allclose(
        shrink(np.arange(64.0).reshape(8, 8).repeat(4, 0).repeat(4, 1), 8),
        np.arange(64.0).reshape(8, 8),
    )
    assert describe_picture(np.ones((16, 20), np.uint8)).thumbnail.shape == (32, 32)


# --- the split -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leaking(tmp_path_factory) -> tuple[Path, Path]:
    """Labels that nothing predicts but the study itself; a run that was split by image."""
    folder = tmp_path_factory.mktemp("leaking")
    cohort = synthetic.make_cohort(120, seed=3)
    rng = np.random.default_rng(0)
    of_study = rng.normal(size=(120, synthetic.WIDTH)).repeat(2, axis=0)
    embeddings = of_study + 0.1 * rng.normal(size=of_study.shape)
    embeddings = embeddings[:, None].astype(np.float32)
    store = synthetic.make_store(folder / "features.h5", cohort, embeddings=embeddings)
    config = replace(
        synthetic.QUICK, epochs=(25,), split_by="image", dropout=0.0, hidden=(64, 32), n_folds=2
    )
    fit_run(store, folder / "run", config)
    return store, folder / "run"


def test_studies_on_both_sides_are_counted(leaking):
    store, run_dir = leaking
    run = Run.open(run_dir)
    split = run.read_table("splits")
    sides = split.groupby("study_uid")["split"].agg(set)
    with FeatureStore.open(store) as features:
        found = audit_store(features, run=run)
    on_both = found.groups[found.groups["sides"].str.contains("test")]
    assert set(on_both["id"]) == set(sides.index[sides == {"test", "train"}])
    assert len(on_both) > 10
    assert f"{len(on_both):,} on test and train" in found.to_text()
    assert "no image names its patient" in found.to_text()


def test_a_patient_on_both_sides_is_found_where_studies_are_whole(tmp_path):
    """The run did not know that two studies are one patient's; the store does."""
    cohort = synthetic.make_cohort(40)
    known = cohort.assign(patient_id=np.char.add("p", (np.arange(80) // 8).astype(str)))
    fit_run(
        synthetic.make_store(tmp_path / "blind.h5", cohort),
        tmp_path / "run",
        replace(synthetic.QUICK, epochs=(1,)),
    )
    path = synthetic.make_store(tmp_path / "features.h5", known)
    with FeatureStore.open(path) as store:
        found = audit_store(store, run=Run.open(tmp_path / "run"))
    assert set(found.groups["kind"]) == {"patient"}
    split = Run.open(tmp_path / "run").read_table("splits")
    sides = split.groupby(known.patient_ids)["split"].agg(set)
    on_test = found.groups[found.groups["sides"].str.contains("test")]
    assert set(on_test["id"]) == set(sides.index[sides.map(len) == 2])


def test_leaking_pays_where_labels_hang_on_the_study_alone(leaking, tmp_path):
    """The honest figure is chance, and both ways of measuring the leak see it."""
    store, run_dir = leaking
    arguments = ["audit", store, "--run-dir", run_dir, "--leakage", "--repeats", 2]
    arguments += ["--out", tmp_path / "out"]
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "the leak alone" in result.output
    summary = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert len(pd.read_csv(tmp_path / "out" / "groups.csv")) == summary["n_groups_on_several_sides"]
    found = summary["leakage"]
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert arms[BY_STUDY]["n_shared"] == arms[CLEAN]["n_shared"] == 0
    assert arms[BY_IMAGE]["n_shared"] > 20
    assert arms[LEAKING]["n_train"] == arms[CLEAN]["n_train"]
    for name in (BY_STUDY, CLEAN):
        assert 0.35 < arms[name]["macro_auroc"]["value"] < 0.65
    assert found["gain"]["low"] > 0.05
    assert found["gain_on_same_images"]["low"] > 0.05


def test_nothing_is_gained_where_studies_hold_single_images(tmp_path):
    cohort = synthetic.make_cohort(80)
    cohort = cohort.assign(study_uid=np.arange(len(cohort)).astype(str))
    store = synthetic.make_store(tmp_path / "features.h5", cohort)
    fit_run(store, tmp_path / "run", replace(synthetic.QUICK, epochs=(4,)))
    with FeatureStore.open(store) as features:
        found = measure_leakage(features, Run.open(tmp_path / "run"), n_repeats=2, n_resamples=20)
    assert all(arm.n_shared == 0 for arm in found.arms)
    assert found.gain_on_same_images.value == pytest.approx(0, abs=0.05)
    assert "[95 % interval over studies]" in found.to_text()


def test_a_single_training_has_no_spread(leaking):
    """It said "sd nan", and wrote NaN, which JSON has not."""
    path, run_dir = leaking
    with FeatureStore.open(path) as store:
        found = measure_leakage(store, Run.open(run_dir), n_repeats=1, n_resamples=20)
    assert "nan" not in found.to_text()
    assert "mean of 1 training [" in found.to_text()
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_leak_is_measured_over_patients_where_they_are_known(tmp_path):
    cohort = synthetic.make_cohort(80)
    known = cohort.assign(patient_id=np.char.add("p", (np.arange(160) // 4).astype(str)))
    store = synthetic.make_store(tmp_path / "features.h5", known)
    fit_run(store, tmp_path / "run", replace(synthetic.QUICK, epochs=(2,)))
    with FeatureStore.open(store) as features:
        found = measure_leakage(features, Run.open(tmp_path / "run"), n_repeats=1, n_resamples=20)
    assert found.to_dict()["unit"] == "patient"
    assert "[95 % interval over patients]" in found.to_text()


# --- wording -------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_said(leaking, tmp_path):
    with FeatureStore.open(leaking[0]) as store, pytest.raises(ConfigError, match="--run-dir"):
        audit_store(store, with_leakage=True)
    with pytest.raises(ConfigError, match=r"closeness must lie in \(0, 1\]"):
        AuditConfig(closeness=0)
    small_stores.make_store(tmp_path / "pending.h5", done=slice(2)).close()
    with (
        FeatureStore.open(tmp_path / "pending.h5") as store,
        pytest.raises(StoreIncompleteError, match="2 finished rows; an audit compares at least 3"),
    ):
        audit_store(store)


def test_a_fine_tuned_run_has_no_head_of_its_own_to_leak(leaking):
    run = Run.open(leaking[1])
    run.config["kind"] = "finetune"
    with (
        FeatureStore.open(leaking[0]) as store,
        pytest.raises(RunError, match=r"was fine-tuned; .* Give a run of `cxr-cache train`"),
    ):
        audit_store(store, run=run, with_leakage=True)


def test_a_run_of_another_store_is_refused(leaking, tmp_path):
    other = synthetic.make_store(tmp_path / "other.h5", synthetic.make_cohort(20))
    run = Run.open(leaking[1])
    with FeatureStore.open(other) as store:
        with pytest.raises(RunError, match=r"200 of the 240 images .* is '00040\.png'.* own store"):
            measure_leakage(store, run)
        with pytest.raises(RunError, match=r"holds others\. Give the run's own store"):
            audit_store(store, run=run, with_leakage=True)
