"""Small stores with known content, and the same content as plain arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.datasets.cohort import Cohort
from cxr_cache.store.feature_store import DONE, FeatureStore

ENCODER = {"name": "made for a test", "weights_sha256": "0" * 64, "is_random": True}
SHAPES = {"embeddings": (1, 8), "pooled": (1, 12)}
WITH_TOKENS = {"embeddings": (2, 8), "pooled": (2, 12), "tokens": (2, 5, 6)}


def make_cohort(n_images: int, seed: int = 0, n_findings: int = 3) -> Cohort:
    """Images `a/00000.png` ..., some of them with letters that take several bytes."""
    rng = np.random.default_rng(seed)
    image_ids = [f"{'äö' if i % 5 == 0 else 'a'}/{i:05}.png" for i in range(n_images)]
    targets = rng.choice(np.array([0, 1, np.nan], np.float32), (n_images, n_findings))
    images = {
        "image_id": image_ids,
        "study_uid": [f"study {i // 2}" for i in range(n_images)],
        "projection": rng.choice(["Frontal", "Lateral", ""], n_images),
    }
    return Cohort(
        pd.DataFrame(images),
        targets=targets,
        findings=tuple(f"finding {f}" for f in range(n_findings)),
        source={"table.csv": "ab" * 32},
    )


def make_batch(
    rows: NDArray[np.intp], shapes: dict[str, tuple[int, ...]] = SHAPES, generation: int = 0
) -> tuple[dict[str, NDArray[Any]], NDArray[np.uint8]]:
    """Features and file digests that depend on the row (and a generation) alone."""
    features = {
        name: np.stack(
            [
                np.random.default_rng([len(name), int(row), generation]).normal(size=shape)
                for row in rows
            ]
        ).astype(np.float16 if name == "tokens" else np.float32)
        for name, shape in shapes.items()
    }
    sha256 = np.stack(
        [
            np.random.default_rng([int(row), generation]).integers(0, 256, 32, np.uint8)
            for row in rows
        ]
    )
    return features, sha256


def make_store(
    path: Path,
    n_images: int = 20,
    *,
    done: Any = slice(None),
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    **options: Any,
) -> FeatureStore:
    """A store open for writing, of which the rows `done` are committed."""
    store = FeatureStore.create(
        path, make_cohort(n_images), encoder=ENCODER, features=shapes, **options
    )
    rows = np.arange(n_images)[done]
    if len(rows):
        store.commit(rows, *make_batch(rows, shapes))
    return store


def done_rows(store: FeatureStore) -> NDArray[np.intp]:
    """Rows that hold every feature."""
    return np.flatnonzero(store.status == DONE)


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))
