"""Two runs on the same test studies: how much better is one, and is that more than luck."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cxr_cache.errors import RunError
from cxr_cache.evaluate import LEVEL, ScoredImages, parse_predictions
from cxr_cache.metrics import FloatArray, RankedScores, bootstrap, macro_mean, percentile_interval
from cxr_cache.run import Run

_NAMES: Final = {"macro_auroc": "macro AUROC", "macro_ap": "macro AP"}


@dataclass(frozen=True)
class Difference:
    """One figure of two runs, and an interval of their difference over resampled studies."""

    figure: str
    first: float
    second: float
    low: float
    high: float

    @property
    def value(self) -> float:
        """How much more the second run has."""
        return self.second - self.first


@dataclass(frozen=True)
class Comparison:
    """The second of two runs against the first, on test images that are the same."""

    first: str
    second: str
    n_images: int
    n_studies: int
    by_image: tuple[Difference, ...]
    by_study: tuple[Difference, ...]
    """Probabilities averaged over a study's images."""

    def to_text(self) -> str:
        """A table for a terminal."""
        width = max(len(self.first), len(self.second), 10)
        lines = [
            f"{self.n_images:,} test images of {self.n_studies:,} studies; differences with "
            f"{LEVEL:.0%} paired intervals over studies",
            f"  {'':<22}{self.first:>{width}}  {self.second:>{width}}  difference",
        ]
        for by, differences in (("", self.by_image), (", by study", self.by_study)):
            lines += [
                f"  {_NAMES[d.figure] + by:<22}{d.first:>{width}.3f}  {d.second:>{width}.3f}  "
                f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
                for d in differences
            ]
        return "\n".join(lines)


def compare_runs(first: Run, second: Run, *, n_resamples: int = 1000, seed: int = 0) -> Comparison:
    """Compare two runs by a paired bootstrap: each resample of studies scores both.

    Parameters
    ----------
    first, second
        Finished runs with the same test images, findings and targets.
    n_resamples, seed
        As in :func:`cxr_cache.metrics.bootstrap`.

    Raises
    ------
    RunError
        The runs were tested on other images, findings or targets.
    """
    ours, theirs = _test_images(first), _test_images(second)
    _require_same_test(first, ours, second, theirs)
    theirs = theirs.take(_order(theirs.image_ids, ours.image_ids))
    if not np.array_equal(ours.targets, theirs.targets, equal_nan=True):
        raise RunError(
            f"{first.path} and {second.path} were tested on other targets for the same images. "
            "Train both with the same labels."
        )
    return Comparison(
        first.path.resolve().name,
        second.path.resolve().name,
        len(ours),
        ours.n_studies,
        _differences(ours, theirs, n_resamples, seed),
        _differences(ours.by_study(), theirs.by_study(), n_resamples, seed),
    )


def _test_images(run: Run) -> ScoredImages:
    predictions = run.read_table("predictions")
    tested = predictions[predictions["split"] == "test"]
    return parse_predictions(tested, run.read_table("targets"), run.config["findings"])


def _require_same_test(first: Run, ours: ScoredImages, second: Run, theirs: ScoredImages) -> None:
    if ours.findings != theirs.findings:
        other = sorted(set(ours.findings) ^ set(theirs.findings)) or ["their order"]
        raise RunError(
            f"{first.path} and {second.path} do not have the same findings: {', '.join(other)}."
        )
    shared = np.isin(ours.image_ids, theirs.image_ids).sum()
    if shared != len(ours) or len(ours) != len(theirs):
        raise RunError(
            f"{first.path} was tested on {len(ours):,} images and {second.path} on "
            f"{len(theirs):,}, of which {shared:,} are the same. Only runs with the same split can "
            "be compared: train with the same store and seed, or fine-tune with --from-run."
        )


def _order(image_ids: NDArray[np.object_], wanted: NDArray[np.object_]) -> NDArray[np.intp]:
    place = {image_id: row for row, image_id in enumerate(image_ids)}
    return np.array([place[image_id] for image_id in wanted], np.intp)


def _differences(
    ours: ScoredImages, theirs: ScoredImages, n_resamples: int, seed: int
) -> tuple[Difference, ...]:
    ranked = [RankedScores(images.targets, images.probabilities) for images in (ours, theirs)]

    def statistics(weights: NDArray[np.float32]) -> dict[str, FloatArray]:
        (auroc, ap), (other_auroc, other_ap) = (r.auroc_and_ap(weights) for r in ranked)
        pairs = {"macro_auroc": (auroc, other_auroc), "macro_ap": (ap, other_ap)}
        return {
            name: np.stack([macro_mean(a), macro_mean(b)], axis=-1)  # (R, 2)
            for name, (a, b) in pairs.items()
        }

    once = statistics(np.ones((1, len(ours)), np.float32))
    resampled = bootstrap(statistics, ours.study_uids, n_resamples, seed)
    differences = []
    for name, pairs in resampled.items():
        low, high, _ = percentile_interval(pairs[:, 1] - pairs[:, 0], LEVEL)
        first, second = once[name][0]
        differences.append(Difference(name, float(first), float(second), float(low), float(high)))
    return tuple(differences)
