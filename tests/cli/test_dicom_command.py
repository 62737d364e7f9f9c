"""The commands on a folder of DICOM files, and what is left in the store."""

from __future__ import annotations

import pytest

pytest.importorskip("pydicom", minversion="3")

import numpy as np

from cxr_cache.cli.main import main
from cxr_cache.store.feature_store import FeatureStore
from tests.datasets.dicoms import dicom


def test_a_folder_of_dicom_goes_into_a_store_without_names(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "set").mkdir()
    for number in range(3):
        values = np.random.default_rng(number).integers(0, 4096, (40, 32)).astype(np.uint16)
        who = {"PatientName": "Doe^Jane", "PatientID": "MRN77", "PatientBirthDate": "19600615"}
        more = {"BitsStored": 12, "ViewPosition": "PA", "StudyDate": "20200101"}
        (tmp_path / "set" / f"IM{number}").write_bytes(dicom(values, **who, **more))
    store_path = tmp_path / "s.h5"
    arguments = ["--data", str(tmp_path / "set"), "--store", str(store_path)]
    monkeypatch.setattr(
        "sys.argv", ["cxr-cache", "extract", *arguments, "--model", "random:test_vit"]
    )
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0, capfd.readouterr().err
    content = store_path.read_bytes()
    for secret in (b"Doe", b"Jane", b"MRN77", b"19600615", b"20200101"):
        assert secret not in content
    with FeatureStore.open(store_path) as store:
        assert store.cohort.images["age"].tolist() == ["59"] * 3
        assert store.cohort.images["projection"].tolist() == ["Frontal"] * 3
        assert np.isfinite(store.embeddings[:]).all()
