"""Small cohorts, embeddings and stores with something to learn in them, for tests that train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.config import TrainConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.store.feature_store import FeatureStore
from cxr_cache.store.rows import TrainingData, prepare_embeddings

FINDINGS = ("Cardiomegaly", "Pleural Effusion", "Nodule", "Hernia", "Mass", "Scoliosis")
PREVALENCE = np.array([0.5, 0.4, 0.3, 0.3, 0.25, 0.2])
WIDTH = 16  # D
IMPORTED = {
    "name": "imported:tiny.npz",
    "imported": True,
    "is_random": False,
    "weights_sha256": "3f9c21",
    "embedding_width": WIDTH,
}

QUICK = TrainConfig(
    epochs=(2, 4, 6),
    n_folds=3,
    batch_size=16,
    learning_rate=3e-3,
    hidden=(12, 8),
    final="refit",
    calibration="none",
    select_by="macro",
    n_jobs=1,
)
"""Every part of the reference's recipe, at a hundredth of its size."""


def make_cohort(n_studies: int = 60, *, seed: int = 0, unlabelled: float = 0.0) -> Cohort:
    """A frontal and a lateral image per study, which share the labels of their report."""
    rng = np.random.default_rng(seed)
    study = np.repeat(np.arange(n_studies), 2)
    targets = (rng.random((n_studies, len(FINDINGS))) < PREVALENCE).astype(np.float32)[study]
    targets[rng.random(targets.shape) < unlabelled] = np.nan
    images = {
        "image_id": [f"{row:05d}.png" for row in range(len(study))],
        "study_uid": study.astype(str),
        "projection": np.where(np.arange(len(study)) % 2, "Lateral", "Frontal"),
    }
    return Cohort(
        pd.DataFrame(images),
        targets=targets,
        findings=FINDINGS,
        source={"synthetic": "0"},
    )


def make_embeddings(cohort: Cohort, *, n_views: int = 1, seed: int = 0) -> NDArray[np.float32]:
    """A direction per finding, and noise about as long as the signal, ``(N, V, D)``."""
    rng = np.random.default_rng([seed, 1])
    signal = np.nan_to_num(cohort.targets) @ rng.normal(size=(len(cohort.findings), WIDTH))
    noise = rng.normal(size=(len(cohort), n_views, WIDTH))
    return (signal[:, None] + 1.5 * noise).astype(np.float32)


def make_data(
    n_studies: int = 60, *, seed: int = 0, n_views: int = 1, unlabelled: float = 0.0
) -> TrainingData:
    """What :func:`cxr_cache.store.rows.load_training_data` would read from :func:`make_store`."""
    cohort = make_cohort(n_studies, seed=seed, unlabelled=unlabelled)
    embeddings = make_embeddings(cohort, n_views=n_views, seed=seed).swapaxes(0, 1)
    return TrainingData(prepare_embeddings(np.ascontiguousarray(embeddings), "l2"), cohort)


def make_store(
    path: Path,
    cohort: Cohort,
    *,
    n_views: int = 1,
    encoder: dict[str, Any] = IMPORTED,
    embeddings: NDArray[np.float32] | None = None,
) -> Path:
    """A finished store of the cohort with its :func:`make_embeddings`."""
    if embeddings is None:
        embeddings = make_embeddings(cohort, n_views=n_views)
    shapes = {"embeddings": embeddings.shape[1:]}
    with FeatureStore.create(path, cohort, encoder=encoder, features=shapes) as store:
        rows = np.arange(len(cohort))
        store.commit(rows, {"embeddings": embeddings}, np.zeros((len(cohort), 32), np.uint8))
    return path
