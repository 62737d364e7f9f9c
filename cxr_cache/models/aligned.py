"""The images of a run, looked up among those of a store."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.splits import TEST
from cxr_cache.errors import RunError
from cxr_cache.models.run import Run


@dataclass(frozen=True, eq=False)
class AlignedImages:
    """M images of a run, in the order of the N images of a store among which they were found."""

    places: NDArray[np.intp]
    """Which of the N images these are, ``(M,)``, rising."""
    cohort: Cohort
    """The store's description of them, with the run's findings and targets: of a run of whole
    studies, those of its study for each."""
    fold: NDArray[np.int64]
    """Fold of each in the run, from 0; -1 for its test images; ``(M,)``."""

    @property
    def is_test(self) -> NDArray[np.bool_]:
        """Whether the run has left an image out of its training, ``(M,)``."""
        return np.asarray(self.fold == TEST)


def align_run(
    run: Run, cohort: Cohort, store_path: Path, *, only_test: bool = False
) -> AlignedImages:
    """Find the images of a run, or its test images alone, in the cohort of a store.

    The cohort holds those N images that can be used, of the store at `store_path`.

    Raises
    ------
    RunError
        An image of the run is not among those of `cohort`.
    """
    split = run.read_table("splits").set_index("image_id")
    what = "images"
    if only_test:
        split, what = split[split["split"] == "test"], "test images"
    missing = split.index[~split.index.isin(cohort.image_ids)]
    if len(missing):
        raise RunError(
            f"{len(missing):,} of the {len(split):,} {what} of {run.path} are not among the "
            f"{len(cohort):,} of {store_path} that can be used here; the first is "
            f"{missing[0]!r}. Give the run's own store."
        )
    rows = pd.Index(split.index).get_indexer(pd.Index(cohort.image_ids))  # (N,), -1: not the run's
    places = np.flatnonzero(rows >= 0)
    chosen = split.iloc[rows[places]]
    fold = chosen["fold"].to_numpy(np.float64, na_value=np.nan) - 1
    findings = tuple(run.config["findings"])
    targets = run.read_table("targets").set_index("image_id")[list(findings)]
    targets = targets.loc[chosen["study_uid"] if run.level == "study" else chosen.index]
    found = replace(cohort.take(places), targets=targets.to_numpy(np.float32), findings=findings)
    is_test = (chosen["split"] == "test").to_numpy()
    return AlignedImages(places, found, np.where(is_test, TEST, fold).astype(np.int64))
