"""A folder with the files that the documents speak of, in small."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from cxr_cache.datasets.phantoms.dataset import write_phantoms
from tests.documents.pages import Encoders, find_data, run_line

N_PATIENTS = 30


def write_hospital(folder: Path, labels: pd.DataFrame, seed: int = 0) -> None:
    """A table and its images: noise, and brighter where the last finding is present."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    labels.to_csv(folder / "labels.csv", index=False)
    for name, present in zip(labels["image"], labels.iloc[:, -1], strict=True):
        path = folder / "xrays" / str(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = rng.integers(0, 155, (48, 40)) + 100 * (str(present) == "1")
        Image.fromarray(grey.astype(np.uint8)).save(path)


def draw_patients(n_patients: int, findings: Iterable[str], seed: int = 0) -> pd.DataFrame:
    """Two images of each patient, in the columns of docs/your_data.md."""
    rng = np.random.default_rng(seed)
    findings = list(findings)
    rows = [
        {"image": f"c/{patient}_{image}.png", "patient": f"P{patient}", "sex": sex, "age": age}
        | dict(zip(findings, present, strict=True))
        for patient in range(100, 100 + n_patients)
        for sex, age in [(rng.choice(["F", "M"]), rng.integers(20, 90))]
        for present in [rng.choice(["0", "1"], len(findings), p=[0.55, 0.45])]
        for image in range(2)
    ]
    return pd.DataFrame(rows).astype(str)


def lay_out(folder: Path) -> None:
    """Images and tables by the names that the documents give them."""
    lines = find_data("docs/your_data.md", "image,").splitlines()
    header, *shown = [line.split(",") for line in lines]
    labels = pd.concat(
        [pd.DataFrame(shown, columns=header), draw_patients(N_PATIENTS, header[4:])],
        ignore_index=True,
    )
    write_hospital(folder, labels)
    renamed = labels.rename(columns={header[-1]: "Edema"})
    renamed.to_csv(folder / "other.csv", index=False)
    theirs = draw_patients(20, ["Pneumonia", "Pleuraerguss", "Infiltrat"], seed=1)
    write_hospital(folder / "other", theirs, seed=1)
    (folder / "names.csv").write_text(find_data("docs/external_validation.md", "finding,store_"))
    write_phantoms(folder / "DATA", n_studies=40, image_size_px=64)
    first = min((folder / "DATA" / "images").iterdir())
    shutil.copy(first, folder / "chest.png")
    (folder / "new").mkdir()
    shutil.copy(first, folder / "new" / "chest.png")


MADE_BY = {
    "mine.h5": "cxr-cache extract --data labels.csv --image-dir xrays --store mine.h5 --tokens",
    "runs/first": "cxr-cache train mine.h5 --run-dir runs/first",
    "other_hospital.h5": "cxr-cache extract --data other/labels.csv --image-dir other/xrays "
    "--store other_hospital.h5",
    "external": "cxr-cache evaluate runs/first --store other_hospital.h5 --out external",
    "indiana.h5": "cxr-cache extract --csv-dir DATA --image-dir DATA/images --store indiana.h5 "
    "--tokens",
    "runs/indiana": "cxr-cache train indiana.h5 --run-dir runs/indiana",
    "runs/tuned": "cxr-cache finetune indiana.h5 --run-dir runs/tuned --from-run runs/indiana",
}
"""What a page takes for granted, and the command by which another page makes it."""


def make(names: Iterable[str], encoders: Encoders) -> None:
    """Make stores and runs in the present folder, and what they are made from."""
    for name in names:
        line = MADE_BY[name]
        needs = [other for other in MADE_BY if other != name and other in line.split()]
        make([other for other in needs if not Path(other).exists()], encoders)
        run_line(line, encoders)
