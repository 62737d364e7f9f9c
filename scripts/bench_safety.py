"""What the store's safety costs an extraction: the real loop against one that writes unprotected.

    python scripts/bench_safety.py [--studies 150] [--repeats 7] [--folder DIR]

Both run ``extract_embeddings`` with an encoder of random weights on generated images. In the
second, commits write the same bytes to plain memory maps: no digest, no status, no fsync. The two
take turns in one process, so that a busy machine slows both alike. Each is timed by the clock and
by the processor time of this process (encoder and writer, not the decoding worker).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from cxr_cache.config import ExtractConfig
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.phantoms.dataset import write_phantoms
from cxr_cache.datasets.readers import load_cohort
from cxr_cache.encoders.encoder import Encoder
from cxr_cache.encoders.loading import load_encoder
from cxr_cache.store.extract import extract_embeddings
from cxr_cache.store.feature_store import FeatureStore

ENCODER = "random:vit_tiny_patch16_224"
Commit = Callable[[FeatureStore, NDArray[np.intp], Mapping[str, NDArray[Any]], NDArray[Any]], None]


class Stopwatch:
    """Wall clock and processor time of each turn, in seconds, and of the commits in them."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.commits: list[float] = []
        """By the clock, waiting for the disk included."""
        self.commits_cpu: list[float] = []

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Time what is done inside."""
        self.commits.append(0.0)
        self.commits_cpu.append(0.0)
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def timing(self, commit: Commit) -> Commit:
        """The same commit, its time added to the current turn's."""

        def timed(
            store: FeatureStore,
            rows: NDArray[np.intp],
            features: Mapping[str, NDArray[Any]],
            image_sha256: NDArray[Any],
        ) -> None:
            wall, cpu = time.perf_counter(), time.thread_time()
            commit(store, rows, features, image_sha256)
            self.commits[-1] += time.perf_counter() - wall
            self.commits_cpu[-1] += time.thread_time() - cpu

        return timed


def unprotected_commit(folder: Path, n_images: int) -> Commit:
    """A commit that copies rows to memory maps and leaves the rest to chance."""
    columns: dict[str, NDArray[Any]] = {}

    def commit(
        _: FeatureStore,
        rows: NDArray[np.intp],
        features: Mapping[str, NDArray[Any]],
        image_sha256: NDArray[Any],
    ) -> None:
        for name, values in {"image_sha256": image_sha256, **features}.items():
            if name not in columns:
                shape = (n_images, *values.shape[1:])
                columns[name] = np.memmap(folder / name, values.dtype, "w+", shape=shape)
            columns[name][rows] = values

    return commit


def extract_once(
    cohort: Cohort, images: Path, folder: Path, encoder: Encoder, commit: Commit, watch: Stopwatch
) -> None:
    """Extract to a new store with this way to commit."""
    store_path = folder / "s.h5"
    store_path.unlink(missing_ok=True)
    with patch.object(FeatureStore, "commit", watch.timing(commit)), watch.turn():
        summary = extract_embeddings(
            cohort, images, store_path, encoder, ExtractConfig(num_workers=1)
        )
    assert summary.n_computed == len(cohort), summary.to_text()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--studies", type=int, default=150, help="about 1.9 images each")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each kind")
    parser.add_argument("--folder", type=Path, help="where to write; the disk that is measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_phantoms(folder / "data", n_studies=arguments.studies, image_size_px=96)
        cohort, images = load_cohort(folder / "data"), folder / "data" / "images"
        encoder = load_encoder(ENCODER, device="cpu")
        commits = {
            "protected": FeatureStore.commit,
            "unprotected": unprotected_commit(folder, len(cohort)),
        }
        watches = {kind: Stopwatch() for kind in commits}
        for kind in commits:  # once to warm up, not counted
            extract_once(cohort, images, folder, encoder, commits[kind], Stopwatch())
        for number in range(arguments.repeats):
            for kind in sorted(commits, reverse=bool(number % 2)):
                extract_once(cohort, images, folder, encoder, commits[kind], watches[kind])
    print(f"{len(cohort)} images, {arguments.repeats} turns each, batches of 32; medians:")
    for kind, watch in watches.items():
        wall, cpu = median(watch.wall), median(watch.cpu)
        print(
            f"{kind:>11}: {wall:.2f} s by the clock ({min(watch.wall):.2f} to "
            f"{max(watch.wall):.2f}), {cpu:.2f} s of processor ({min(watch.cpu):.2f} to "
            f"{max(watch.cpu):.2f}); commits "
            f"{median(watch.commits):.3f} s by the clock, {median(watch.commits_cpu):.3f} s of "
            f"processor"
        )
    safe, plain = watches["protected"], watches["unprotected"]
    print(
        f"protected / unprotected: {median(safe.wall) / median(plain.wall):.3f} by the clock, "
        f"{median(safe.cpu) / median(plain.cpu):.3f} in processor time; commits are "
        f"{median(safe.commits) / median(safe.wall):.1%} of the clock, beside the encoder, and "
        f"{median(safe.commits_cpu) / median(safe.cpu):.1%} of the processor time"
    )


if __name__ == "__main__":
    main()
