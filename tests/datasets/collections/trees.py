"""Published data sets in small: folders and tables of each as it comes, with noise as pictures.

Each function lays out one data set of twelve patients with two images each, where it knows
patients, and returns what a reader should find in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

N_PATIENTS = 12
CHEXPERT = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion"),
    *("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    *("Pleural Other", "Fracture", "Support Devices"),
)
VINDR = (
    *("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture"),
    *("Consolidation", "Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity"),
    *("Lung cavity", "Lung cyst", "Mediastinal shift", "Nodule/Mass", "Pleural effusion"),
    *("Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture", "Other lesion"),
    *("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding"),
)


@dataclass(frozen=True)
class Tree:
    """What a reader should find in a data set laid out here."""

    n_images: int
    n_patients: int
    n_findings: int
    split: dict[str, int]
    """Images by the side that is given; empty where none is."""
    present: dict[str, int]
    """Images with some of the findings."""


def write_pictures(folder: Path, names: Iterable[str]) -> None:
    """Small noise under these paths."""
    rng = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 24), np.uint8)).save(path)


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False)


def sides(patient: int) -> str:
    """Patients 0 to 7 are for training, 8 and 9 for validation, 10 and 11 for testing."""
    return "train" if patient < 8 else "val" if patient < 10 else "test"


def chexpert_codes(patient: int, image: int) -> dict[str, str]:
    """Each finding present in every third patient, absent in the next, and uncertain in some."""
    codes = {name: ("1.0", "0.0", "")[(patient + place) % 3] for place, name in enumerate(CHEXPERT)}
    codes["No Finding"] = "1.0" if patient % 3 == 0 else ""
    codes["Edema"] = ("1.0", "0.0", "-1.0", "")[(patient + image) % 4]
    return codes


def lay_out_nih(folder: Path) -> Tree:
    rows, lists = [], {"train_val_list.txt": [], "test_list.txt": []}
    labels = ("No Finding", "Effusion|Mass", "Pleural_Thickening", "Mass")
    for patient in range(N_PATIENTS):
        for image in range(2):
            name = f"{patient + 1:08d}_{image:03d}.png"
            write_pictures(folder, [f"images_{1 + patient // 6:03d}/images/{name}"])
            lists["test_list.txt" if sides(patient) == "test" else "train_val_list.txt"].append(
                name
            )
            rows.append(
                f"{name},{labels[(patient + image) % 4]},{image},{patient + 1},"
                f"{414 if patient == 3 else 50},{'MF'[patient % 2]},PA,2500,2048,0.168,0.168,"
            )
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
        "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    )
    (folder / "Data_Entry_2017.csv").write_text("\n".join([header, *rows]) + "\n")
    for name, names in lists.items():
        (folder / name).write_text("\n".join(names) + "\n")
    return Tree(24, 12, 14, {"train": 20, "test": 4}, {"Effusion": 6, "Mass": 12})


def lay_out_chexpert(folder: Path) -> Tree:
    root = folder / "CheXpert-v1.0-small"
    folders = {"train": "train", "val": "valid"}
    tables: dict[str, list[dict[str, object]]] = {"train": [], "val": [], "test": []}
    for patient in range(N_PATIENTS):
        side = sides(patient)
        inner = folders.get(side, "test")
        for image, view in enumerate(("frontal", "lateral")):
            path = f"{inner}/patient{patient:05d}/study1/view{image + 1}_{view}.jpg"
            write_pictures(root, [path])
            codes = chexpert_codes(patient, image)
            if side == "test":
                known = {name: 0 if code != "1.0" else 1 for name, code in codes.items()}
                known["Airspace Opacity"] = known.pop("Lung Opacity")
                tables[side].append({"Path": path, **known})
                continue
            facts = {
                "Sex": ("Female", "Male", "Unknown")[patient % 3],
                "Age": 0 if patient == 1 else 60,
                "Frontal/Lateral": view.capitalize(),
                "AP/PA": "AP" if image == 0 else "",
            }
            tables[side].append({"Path": f"CheXpert-v1.0-small/{path}", **facts, **codes})
    for side, name in (("train", "train"), ("val", "valid"), ("test", "test_labels")):
        write_csv(root / f"{name}.csv", tables[side])
    return Tree(24, 12, 14, {"train": 16, "val": 4, "test": 4}, {"No Finding": 8, "Edema": 6})


def lay_out_chexpert_plus(folder: Path) -> Tree:
    rows, lines = [], []
    for patient in range(N_PATIENTS):
        inner = "valid" if sides(patient) == "val" else "train"
        for image, view in enumerate(("frontal", "lateral")):
            path = f"{inner}/patient{patient:05d}/study1/view{image + 1}_{view}.jpg"
            write_pictures(folder, [f"PNG/{path.removesuffix('.jpg')}.png"])
            rows.append(
                {
                    "path_to_image": path,
                    "path_to_dcm": path.replace(".jpg", ".dcm"),
                    "frontal_lateral": view.capitalize(),
                    "ap_pa": "PA",
                    "deid_patient_id": f"patient{patient:05d}",
                    "patient_report_date_order": 1,
                    "report": "No change, as before.",
                    "age": 60.0,
                    "sex": "Female",
                    "race": "White",
                    "split": inner,
                }
            )
            codes = chexpert_codes(patient, image)
            numbers = {name: float(code) if code else None for name, code in codes.items()}
            lines.append(json.dumps({"path_to_image": path, **numbers}))
    write_csv(folder / "df_chexpert_plus_240401.csv", rows)
    (folder / "impression_fixed.json").write_text("\n".join(lines) + "\n")
    return Tree(24, 12, 14, {"train": 20, "val": 4}, {"No Finding": 8})


def lay_out_mimic(folder: Path) -> Tree:
    images, split, labels, tested = [], [], [], []
    for patient in range(N_PATIENTS):
        subject, study = 10000032 + patient, 50414267 + patient
        ids = {"subject_id": subject, "study_id": study}
        for image, view in enumerate(("PA", "LATERAL")):
            name = f"{patient:08x}-{image:08x}"
            write_pictures(folder, [f"files/p{str(subject)[:2]}/p{subject}/s{study}/{name}.jpg"])
            images.append({"dicom_id": name, **ids, "ViewPosition": view, "Rows": 24})
            side = {"val": "validate"}.get(sides(patient), sides(patient))
            split.append(
                {"dicom_id": name, "study_id": study, "subject_id": subject, "split": side}
            )
        if patient != 7:  # a study without labels
            codes = chexpert_codes(patient, 0)
            labels.append({**ids, **(dict.fromkeys(codes, "") if patient == 6 else codes)})
        if sides(patient) == "test":
            known = {name: int(name == "Edema") for name in CHEXPERT}
            known["Airspace Opacity"] = known.pop("Lung Opacity")
            tested.append({"study_id": study, **known})
    for name, rows in (("metadata", images), ("split", split), ("chexpert", labels)):
        write_csv(folder / f"mimic-cxr-2.0.0-{name}.csv.gz", rows)
    write_csv(folder / "mimic-cxr-2.1.0-test-set-labeled.csv", tested)
    return Tree(24, 12, 14, {"train": 16, "val": 4, "test": 4}, {"Edema": 10})


def lay_out_padchest(folder: Path) -> Tree:
    labels = (
        "['cardiomegaly', ' pneumonia']",
        "['normal']",
        "['pneumonia']",
        "['exclude']",
        "[' cardiomegaly', 'suboptimal study']",
        "",
    )
    rows = []
    for patient in range(N_PATIENTS):
        for image, view in enumerate(("PA", "L")):
            name = f"{patient}_{image}.png"
            write_pictures(folder, [f"{patient % 3}/{name}"])
            rows.append(
                {
                    "ImageID": name,
                    "ImageDir": patient % 3,
                    "StudyDate_DICOM": 20140915,
                    "StudyID": f"study{patient}",
                    "PatientID": f"p{patient}",
                    "PatientBirth": "" if patient == 1 else 1930.0,
                    "PatientSex_DICOM": "F",
                    "ViewPosition_DICOM": "POSTEROANTERIOR",
                    "Projection": view,
                    "Report": "sin hallazgos",
                    "Labels": labels[patient % 6],
                }
            )
    write_csv(folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", rows)
    return Tree(24, 12, 3, {}, {"cardiomegaly": 4, "pneumonia": 8, "normal": 4})


def lay_out_vindr(folder: Path) -> Tree:
    train, test = [], []
    for image in range(18):
        write_pictures(folder, [f"train/{image:032x}.png"])
        for reader in range(3):
            codes = {name: int((image + place) % 3 == 0) for place, name in enumerate(VINDR)}
            codes["Edema"] = int(reader < image % 4)
            train.append({"image_id": f"{image:032x}", "rad_ID": f"R{reader}", **codes})
    for image in range(18, 24):
        write_pictures(folder, [f"test/{image:032x}.png"])
        codes = {name: int((image + place) % 2 == 0) for place, name in enumerate(VINDR)}
        codes["Other disease"] = codes.pop("Other diseases")
        test.append({"image_id": f"{image:032x}", **codes})
    write_csv(folder / "annotations" / "image_labels_train.csv", train)
    write_csv(folder / "annotations" / "image_labels_test.csv", test)
    return Tree(24, 0, 28, {"train": 18, "test": 6}, {"Edema": 8 + 3})


def lay_out_vinbigdata(folder: Path) -> Tree:
    rows = []
    for image in range(18):
        write_pictures(folder, [f"train/{image:032x}.png"])
        for reader in range(3):
            drawn = reader < image % 4  # of three: none, one, two or all
            name, number = ("Cardiomegaly", 3) if drawn else ("No finding", 14)
            box = {"x_min": 1, "y_min": 2} if drawn else {}
            row = {"image_id": f"{image:032x}", "class_name": name, "class_id": number}
            rows += [{**row, "rad_id": f"R{reader}", **box}] * (1 + drawn)
            if image % 2:
                rows.append({**row, "class_name": "ILD", "class_id": 5, "rad_id": f"R{reader}"})
    write_csv(folder / "train.csv", rows)
    return Tree(18, 0, 2, {}, {"Cardiomegaly": 8, "ILD": 9})


def lay_out_brax(folder: Path) -> Tree:
    rows = []
    for patient in range(N_PATIENTS):
        for image, view in enumerate(("PA", "L")):
            name = f"id_{patient}/Study_1/Series_{image}/image.png"
            write_pictures(folder, [f"images/{name}"])
            rows.append(
                {
                    "DicomPath": f"Anonymized_DICOMs/{name.replace('.png', '.dcm')}",
                    "PngPath": f"images/{name}",
                    "PatientID": f"id_{patient}",
                    "PatientSex": "M",
                    "PatientAge": "85 or more" if patient == 0 else "45",
                    "AccessionNumber": "Study_1",
                    "StudyDate": 20080101,
                    **chexpert_codes(patient, image),
                    "ViewPosition": view,
                    "Rows": 24,
                }
            )
    write_csv(folder / "master_spreadsheet_update.csv", rows)
    return Tree(24, 12, 14, {}, {"No Finding": 8})


def lay_out_rsna(folder: Path) -> Tree:
    rows, classes = [], []
    for image in range(24):
        name = f"{image:08d}-0000-4000"
        write_pictures(folder, [f"stage_2_train_images/{name}.png"])
        boxes = [1.0, 2.0][: 1 + (image % 6 == 0)] if image % 3 == 0 else [""]
        target = int(image % 3 == 0)
        rows += [
            {"patientId": name, "x": x, "y": x, "width": x, "height": x, "Target": target}
            for x in boxes
        ]
        classes += [{"patientId": name, "class": "Lung Opacity" if target else "Normal"}] * len(
            boxes
        )
    write_csv(folder / "stage_2_train_labels.csv", rows)
    write_csv(folder / "stage_2_detailed_class_info.csv", classes)
    return Tree(24, 0, 1, {}, {"Pneumonia": 8})


def lay_out_siim(folder: Path) -> Tree:
    rows = []
    for image in range(24):
        name = f"1.2.276.0.7230010.3.1.4.{image}"
        write_pictures(folder, [f"dicom-images-train/1.2.{image}/1.3.{image}/{name}.png"])
        outlines = ["-1"] if image % 3 else ["10 20 30 40"] * (1 + image % 2)
        rows += [{"ImageId": name, " EncodedPixels": f" {outline}"} for outline in outlines]
    write_csv(folder / "train-rle.csv", rows)
    return Tree(24, 0, 1, {}, {"Pneumothorax": 8})


def lay_out_taix_ray(folder: Path) -> Tree:
    findings = ["HeartSize", "PulmonaryCongestion"] + [
        f"{name}_{side}"
        for name in ("PleuralEffusion", "PulmonaryOpacities", "Atelectasis")
        for side in ("Right", "Left")
    ]
    rows, split = [], []
    for patient in range(N_PATIENTS):
        for image in range(2):
            name = f"{patient}{image:03d}"
            write_pictures(folder, [f"data/{name}.png"])
            steps = dict.fromkeys(findings, (patient + image) % 4)
            rows.append({"UID": name, "PatientID": patient, "Age": 66, "Sex": "F", **steps})
            split.append({"UID": name, "Split": sides(patient)})
    write_csv(folder / "metadata" / "annotation.csv", rows)
    write_csv(folder / "metadata" / "split.csv", split)
    return Tree(24, 12, 8, {"train": 16, "val": 4, "test": 4}, {"HeartSize": 12})


def lay_out_openi(folder: Path) -> Tree:
    terms = ("normal", "Cardiomegaly/borderline", "Cardiomegaly/mild</major><major>Opacity/lung")
    for study in range(1, N_PATIENTS + 1):
        names = [f"CXR{study}_{study}_IM-0001-{view}001" for view in (3, 4)]
        write_pictures(folder / "NLMCXR_png", [f"{name}.png" for name in names])
        report = folder / "ecgen-radiology" / f"{study}.xml"
        report.parent.mkdir(exist_ok=True)
        images = "".join(
            f'<parentImage id="{name}"><caption>PA</caption></parentImage>' for name in names
        )
        report.write_text(
            f'<eCitation><uId id="CXR{study}"/><MeSH><major>{terms[study % 3]}</major>'
            f"<automatic>effusion</automatic></MeSH>{images}</eCitation>"
        )
    return Tree(24, 12, 35, {}, {"Normal": 8, "Cardiomegaly": 16, "Lesion": 8})


def lay_out_paediatric(folder: Path) -> Tree:
    for patient in range(N_PATIENTS):
        side = sides(patient)
        kind = ("virus", "bacteria")[patient % 2]
        names = [f"PNEUMONIA/person{patient}_{kind}_{image}.jpeg" for image in range(2)]
        other = "test" if patient == 0 else side  # this patient is on both sides
        write_pictures(folder / "chest_xray" / side, names[:1])
        write_pictures(folder / "chest_xray" / other, names[1:])
        prefix = "NORMAL2-" if patient % 2 else ""
        write_pictures(folder / "chest_xray" / side, [f"NORMAL/{prefix}IM-{patient:04d}-0001.jpeg"])
    return Tree(36, 24, 1, {"train": 23, "val": 6, "test": 7}, {"PNEUMONIA": 24})


def lay_out_covid(folder: Path) -> Tree:
    for name in ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"):
        root = folder / "COVID-19_Radiography_Dataset" / name
        write_pictures(root / "images", [f"{name}-{image}.png" for image in range(1, 9)])
        write_pictures(root / "masks", [f"{name}-{image}.png" for image in range(1, 9)])
    return Tree(32, 0, 3, {}, {"COVID": 8, "Viral Pneumonia": 8})


def lay_out_shenzhen(folder: Path) -> Tree:
    write_pictures(folder / "CXR_png", [f"CHNCXR_{n:04d}_{n % 2}.png" for n in range(1, 21)])
    return Tree(20, 20, 1, {}, {"Tuberculosis": 10})


TREES: dict[str, tuple[str, Callable[[Path], Tree]]] = {
    "nih": ("nih", lay_out_nih),
    "chexpert": ("chexpert", lay_out_chexpert),
    "chexpert-plus": ("chexpert-plus", lay_out_chexpert_plus),
    "mimic-cxr-jpg": ("mimic-cxr-jpg", lay_out_mimic),
    "padchest": ("padchest", lay_out_padchest),
    "vindr": ("vindr", lay_out_vindr),
    "vinbigdata": ("vindr", lay_out_vinbigdata),
    "brax": ("brax", lay_out_brax),
    "rsna": ("rsna", lay_out_rsna),
    "siim": ("siim", lay_out_siim),
    "taix-ray": ("taix-ray", lay_out_taix_ray),
    "openi": ("openi", lay_out_openi),
    "paediatric": ("classes", lay_out_paediatric),
    "covid": ("classes", lay_out_covid),
    "shenzhen": ("images", lay_out_shenzhen),
}
"""The format that each is read as, and what lays it out."""
