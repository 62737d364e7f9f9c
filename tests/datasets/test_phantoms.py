from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from cxr_cache.datasets.labels import FINDINGS, assign_targets
from cxr_cache.datasets.phantoms.dataset import (
    PHANTOM_FINDINGS,
    PhantomSet,
    Study,
    draw_phantom,
    write_phantoms,
)
from cxr_cache.errors import ConfigError

SHOWN_FROM_THE_FRONT_ONLY = ("Pneumothorax", "Scoliosis")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def file_hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def findings_of_tags(problems: str) -> set[str]:
    """What the label rule makes of a cell of the Problems column."""
    (targets,) = assign_targets([problems])
    return {finding for finding, present in zip(FINDINGS, targets, strict=True) if present}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> PhantomSet:
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), n_studies=30, image_size_px=96)


def test_the_same_arguments_give_the_same_bytes(phantoms, tmp_path):
    again = write_phantoms(tmp_path / "again", n_studies=30, image_size_px=96)
    assert file_hashes(again.csv_dir) == file_hashes(phantoms.csv_dir)

    other = write_phantoms(tmp_path / "other", n_studies=30, image_size_px=96, seed=1)
    first = "images/1_IM-0001-1001.dcm.png"
    assert file_hashes(other.csv_dir)[first] != file_hashes(phantoms.csv_dir)[first]


def test_a_study_does_not_depend_on_how_many_are_written(phantoms, tmp_path):
    few = write_phantoms(tmp_path, n_studies=7, image_size_px=96)

    many_hashes, few_hashes = file_hashes(phantoms.csv_dir), file_hashes(few.csv_dir)
    images = [name for name in few_hashes if name.startswith("images/")]
    assert len(images) == few.n_images
    for name in images:
        assert few_hashes[name] == many_hashes[name], f"{name} differs"
    for name in ("indiana_reports.csv", "indiana_projections.csv", "phantoms.csv"):
        assert (phantoms.csv_dir / name).read_bytes().startswith((few.csv_dir / name).read_bytes())


def test_another_style_shows_the_same_patients_darker_grainier_and_framed(phantoms, tmp_path):
    named = write_phantoms(tmp_path / "named", n_studies=7, image_size_px=96, style="standard")
    other = write_phantoms(tmp_path / "other", n_studies=7, image_size_px=96, style="digitised")

    recipe = json.loads((named.csv_dir / "phantoms.json").read_text())
    assert recipe == {"n_studies": 7, "image_size_px": 96, "seed": 0}  # as before styles
    for name in ("indiana_reports.csv", "indiana_projections.csv"):
        assert (other.csv_dir / name).read_bytes() == (named.csv_dir / name).read_bytes()
    for path in named.image_dir.iterdir():
        assert path.read_bytes() == (phantoms.image_dir / path.name).read_bytes()
        plain, shown = (np.asarray(Image.open(p)) for p in (path, other.image_dir / path.name))
        assert shown[4:-4, 4:-4].mean() < plain[4:-4, 4:-4].mean()
        assert shown[:4].max() == shown[:, -4:].max() == 0
    boxes = read_csv(other.csv_dir / "phantoms.csv")
    assert all(int(box["x0"]) >= 4 and int(box["y1"]) <= 92 for box in boxes)


def test_the_marker_stands_at_the_patients_left_of_frontal_views_alone():
    for projection, expected in (("Frontal", True), ("Lateral", False)):
        pixels, _ = draw_phantom((), projection, np.random.default_rng(0), style="digitised")
        corner = pixels[10:40, 210:246]
        assert (np.count_nonzero(corner == 255) > 20) == expected


def test_styles_do_not_mix_in_a_folder_and_unknown_ones_are_refused(tmp_path):
    write_phantoms(tmp_path, n_studies=1, image_size_px=64)
    with pytest.raises(ConfigError, match=r"phantoms of .*digitised.* would mix with them"):
        write_phantoms(tmp_path, n_studies=1, image_size_px=64, style="digitised")
    with pytest.raises(ConfigError, match="style is 'sepia'; it must be one of: standard, digit"):
        write_phantoms(tmp_path / "new", n_studies=1, style="sepia")


def test_the_tables_have_the_indiana_form(phantoms):
    reports = read_csv(phantoms.csv_dir / "indiana_reports.csv")
    projections = read_csv(phantoms.csv_dir / "indiana_projections.csv")

    columns = "uid,MeSH,Problems,image,indication,comparison,findings,impression"
    assert list(reports[0]) == columns.split(",")
    assert list(projections[0]) == ["uid", "filename", "projection"]
    assert len({row["uid"] for row in reports}) == len(reports) == phantoms.n_studies == 30
    assert {row["uid"] for row in projections} == {row["uid"] for row in reports}
    assert {row["projection"] for row in projections} == {"Frontal", "Lateral"}
    names = [row["filename"] for row in projections]
    assert len(set(names)) == len(names) == phantoms.n_images
    assert {path.name for path in phantoms.image_dir.iterdir()} == set(names)
    for name in names:
        with Image.open(phantoms.image_dir / name) as image:
            assert (image.mode, image.size) == ("L", (96, 96))


def test_the_boxes_name_findings_of_the_report_and_lie_in_the_picture(phantoms):
    problems = {
        row["uid"]: findings_of_tags(row["Problems"])
        for row in read_csv(phantoms.csv_dir / "indiana_reports.csv")
    }
    boxes = read_csv(phantoms.csv_dir / "phantoms.csv")

    assert list(boxes[0]) == ["filename", "finding", "x0", "y0", "x1", "y1"]
    for row in boxes:
        assert row["finding"] in problems[row["filename"].split("_")[0]]
        assert 0 <= int(row["x0"]) < int(row["x1"]) <= 96
        assert 0 <= int(row["y0"]) < int(row["y1"]) <= 96
    boxed_studies = {row["filename"].split("_")[0] for row in boxes}
    assert boxed_studies == {uid for uid, found in problems.items() if found != {"Normal"}}


@pytest.mark.parametrize("finding", PHANTOM_FINDINGS)
def test_every_tag_means_the_finding_drawn_and_no_other(finding):
    assert findings_of_tags(PHANTOM_FINDINGS[finding].tag) == {finding}


def test_reports_say_what_was_drawn():
    for uid in range(200):
        study = Study.sample(seed=5, uid=uid)
        _, mesh, problems, _, _, _, text, impression = study.report()
        assert findings_of_tags(problems) == (set(study.findings) or {"Normal"})
        assert [term.split("/")[0] for term in mesh.split(";")] == problems.split(";")
        assert (problems == "normal") == (not study.findings)
        assert "{" not in mesh + text + impression
        assert ("no pneumothorax" in text) == ("Pneumothorax" not in study.findings)


def test_the_mix_of_studies_is_plausible():
    studies = [Study.sample(seed=0, uid=uid) for uid in range(2000)]

    counts = Counter(finding for study in studies for finding in study.findings)
    assert 0.35 < np.mean([not study.findings for study in studies]) < 0.45
    assert set(counts) == set(PHANTOM_FINDINGS)
    assert min(counts.values()) > 40
    views = Counter(study.projections for study in studies)
    assert 0.7 < views["Frontal", "Lateral"] / 2000 < 0.9
    assert views["Frontal", "Frontal"] > 0 < views["Frontal", "Frontal", "Lateral"]
    assert all("Frontal" in projections for projections in views)


@pytest.mark.parametrize("projection", ["Frontal", "Lateral"])
@pytest.mark.parametrize("finding", PHANTOM_FINDINGS)
def test_a_finding_changes_the_picture_where_its_boxes_say(finding, projection):
    """The same patient and exposure with and without it; the boxes are what attention is due."""
    for seed in range(2):
        normal, no_boxes = draw_phantom([], projection, np.random.default_rng(seed), 128)
        sick, boxes = draw_phantom([finding], projection, np.random.default_rng(seed), 128)
        change = np.abs(sick.astype(int) - normal.astype(int))

        assert no_boxes == []
        if projection == "Lateral" and finding in SHOWN_FROM_THE_FRONT_ONLY:
            assert boxes == []
            assert change.max() == 0
            continue
        assert {name for name, _ in boxes} == {finding}
        inside = np.zeros(change.shape, dtype=bool)
        for _, (x0, y0, x1, y1) in boxes:
            inside[y0:y1, x0:x1] = True
        assert change[inside].mean() > 1.5, f"seed {seed}: hardly visible"
        assert change[inside].mean() > 1.5 * change[~inside].mean(), f"seed {seed}: elsewhere"


def test_a_finding_stays_where_it_is_when_others_join_it():
    alone = draw_phantom(["Nodule"], "Frontal", np.random.default_rng(3))[1]
    joined = draw_phantom(["Mass", "Nodule"], "Frontal", np.random.default_rng(3))[1]
    assert alone[0] in joined


@pytest.mark.parametrize("seed", range(5))
def test_an_enlarged_heart_takes_more_than_half_of_the_chest(seed):
    """Cardiothoracic ratio, from the boxes of the heart and of the lungs."""
    asked = ["Cardiomegaly", "Emphysema"]
    _, boxes = draw_phantom(asked, "Frontal", np.random.default_rng(seed), 256)
    (_, heart), (_, lungs) = boxes
    assert 0.55 < (heart[2] - heart[0]) / (lungs[2] - lungs[0]) < 0.75


def test_another_exposure_of_the_patient_is_another_picture():
    first, _ = draw_phantom([], "Frontal", np.random.default_rng(0), 64)
    second, _ = draw_phantom([], "Frontal", np.random.default_rng(0), 64, view=1)
    assert (first != second).mean() > 0.5


@pytest.mark.parametrize("image_size_px", [100, 225, 512])
def test_pictures_of_any_size_show_the_same_scene(image_size_px):
    reference, _ = draw_phantom(["Mass"], "Frontal", np.random.default_rng(1), 256)
    pixels, _ = draw_phantom(["Mass"], "Frontal", np.random.default_rng(1), image_size_px)

    assert pixels.shape == (image_size_px, image_size_px)
    assert pixels.dtype == np.uint8
    thumbnails = [
        np.asarray(Image.fromarray(picture).resize((32, 32), Image.Resampling.BOX), dtype=float)
        for picture in (reference, pixels)
    ]
    assert np.abs(thumbnails[0] - thumbnails[1]).mean() < 3


def test_cardiomegaly_can_be_learnt_but_not_from_brightness():
    """A linear probe on 32 x 32 pixels, one frontal view a study, trained on half of them."""
    studies = [Study.sample(seed=0, uid=uid) for uid in range(300)]
    pictures = np.stack(
        [
            draw_phantom(study.findings, "Frontal", np.random.default_rng(study.seed), 64)[0]
            for study in studies
        ]
    )
    small = pictures.reshape(300, 32, 2, 32, 2).mean(axis=(2, 4)).reshape(300, -1) / 255
    target = np.array(["Cardiomegaly" in study.findings for study in studies])
    train, test = slice(0, 150), slice(150, 300)

    probe = LogisticRegression(C=0.1, max_iter=300).fit(small[train], target[train])

    assert roc_auc_score(target[test], probe.decision_function(small[test])) > 0.7
    assert roc_auc_score(target, small.mean(axis=1)) < 0.7


def test_a_folder_with_other_content_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("not yours")

    with pytest.raises(ConfigError, match=r"already holds other files.*Choose another folder") as e:
        write_phantoms(tmp_path, n_studies=1)

    assert str(tmp_path) in str(e.value)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_of_phantoms_is_completed_with_the_same_arguments_only(tmp_path):
    written = write_phantoms(tmp_path, n_studies=2, image_size_px=64)
    before = file_hashes(tmp_path)
    (written.image_dir / "1_IM-0001-1001.dcm.png").write_bytes(b"cut off")

    assert write_phantoms(tmp_path, n_studies=2, image_size_px=64) == written
    assert file_hashes(tmp_path) == before
    with pytest.raises(ConfigError, match=r'phantoms of .*"seed": 0.*"seed": 1.* mix'):
        write_phantoms(tmp_path, n_studies=2, image_size_px=64, seed=1)


@pytest.mark.parametrize(
    "wrong", [{"n_studies": 0}, {"image_size_px": 63}, {"seed": -1}], ids=lambda w: next(iter(w))
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(wrong, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        write_phantoms(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_drawn_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match=r"'Gout'.*Cardiomegaly"):
        draw_phantom(["Gout"], "Frontal", rng)
    with pytest.raises(ConfigError, match="'Oblique'"):
        draw_phantom([], "Oblique", rng)


def test_progress_sees_every_study(tmp_path):
    seen = []

    def progress(uids):
        for uid in uids:
            seen.append(uid)
            yield uid

    write_phantoms(tmp_path, n_studies=3, image_size_px=64, progress=progress)
    assert seen == [1, 2, 3]
