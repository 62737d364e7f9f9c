"""How long 2,000 bootstrap resamples take, beside a loop over scikit-learn.

    OMP_NUM_THREADS=2 python scripts/bench_statistics.py

35 findings as rare as real ones, two images per study. The loop resamples studies by index and
calls scikit-learn for each finding, as a notebook would; it runs on a stated part of the
resamples, in the same process, and is extrapolated. Its figures are compared with the package's on
the same rows before anything is timed. Last, the package alone on more and more rows: time should
grow as they do, memory no faster.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking import describe_machine, format_table, results_path, write_json
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from cxr_cache.evaluation.figures import estimate
from cxr_cache.evaluation.scored import ScoredImages
from cxr_cache.metrics.resampled import RankedScores, bootstrap

Array = NDArray[Any]
N_FINDINGS = 35


def make_images(n_rows: int) -> ScoredImages:
    """Random findings and probabilities, prevalence from 42 % to 0.5 %."""
    rng = np.random.default_rng(0)
    prevalence = np.geomspace(0.42, 0.005, N_FINDINGS)
    present = (rng.random((n_rows, N_FINDINGS)) < prevalence).astype(np.float64)
    uids = np.array([f"{row // 2:07d}" for row in range(n_rows)], object)
    return ScoredImages(
        image_ids=np.arange(n_rows).astype(str).astype(object),
        study_uids=uids,
        patient_ids=np.full(n_rows, "", object),
        projections=np.full(n_rows, "", object),
        targets=present,
        probabilities=(rng.random(present.shape) * 0.8 + 0.2 * present),
        findings=tuple(f"Finding {f}" for f in range(N_FINDINGS)),
    )


def loop_once(images: ScoredImages, rows: Array) -> tuple[Array, Array]:
    """AUROC and AP of every finding on some rows, by scikit-learn; NaN without both classes."""
    pairs = np.full((2, N_FINDINGS), np.nan)
    for f in range(N_FINDINGS):
        t, p = images.targets[rows, f], images.probabilities[rows, f]
        if 0 < t.sum() < len(t):
            pairs[:, f] = roc_auc_score(t, p), average_precision_score(t, p)
    return pairs[0], pairs[1]


def loop(images: ScoredImages, n_resamples: int) -> float:
    """Seconds that a loop over scikit-learn takes for so many resamples of studies."""
    rng = np.random.default_rng(0)
    starts = np.arange(0, len(images), 2)
    started = time.perf_counter()
    for _ in range(n_resamples):
        drawn = rng.choice(starts, len(starts))
        loop_once(images, np.concatenate([drawn, drawn + 1]))
    return time.perf_counter() - started


def resample_ranking(images: ScoredImages, n_resamples: int) -> None:
    """AUROC and AP, which is what the loop does."""
    ranked = RankedScores(images.targets, images.probabilities)

    def statistics(weights: Array) -> dict[str, Array]:
        areas, precisions = ranked.auroc_and_ap(weights)
        return {"auroc": areas, "ap": precisions}

    bootstrap(statistics, images.clusters, n_resamples, seed=0)


def resample_everything(images: ScoredImages, n_resamples: int) -> None:
    """Every figure of an evaluation, micro averages included."""
    estimate(images, np.full(N_FINDINGS, 0.5), n_resamples=n_resamples)


def best_of(rounds: int, work: Callable[[], Any]) -> float:
    """Seconds of the quickest of some rounds."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def require_equal(images: ScoredImages) -> None:
    """Stop unless both ways give the same figures on the rows as they are."""
    theirs = loop_once(images, np.arange(len(images)))
    ranked = RankedScores(images.targets, images.probabilities)
    for ours, expected in zip(ranked.auroc_and_ap(np.ones((1, len(images)))), theirs, strict=True):
        np.testing.assert_allclose(ours[0], expected, atol=1e-12)


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(status.split()[0]) / 1e3


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--looped", type=int, default=20, help="resamples that the loop does")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", default="25000,100000", help="rows, for the second table")
    parser.add_argument("--growth-resamples", type=int, default=200)
    parser.add_argument("--out", type=Path, default=results_path("statistics"))
    options = parser.parse_args()
    images = make_images(options.rows)
    require_equal(images)
    whole_loop_s = loop(images, options.looped) * options.resamples / options.looped
    times = {
        "scikit-learn loop, AUROC and AP": whole_loop_s,
        "cxr-cache, AUROC and AP": best_of(
            options.rounds, lambda: resample_ranking(images, options.resamples)
        ),
        "cxr-cache, every figure": best_of(
            options.rounds, lambda: resample_everything(images, options.resamples)
        ),
    }
    heads = [f"{options.resamples:,} resamples, {options.rows:,} rows", "seconds", "loop ÷ it"]
    lines = [[name, f"{s:.2f}", f"{whole_loop_s / s:.0f}"] for name, s in times.items()]
    print(format_table([heads, *lines]))
    print(f"(the loop: measured on {options.looped} resamples)")
    growth = []
    for n_rows in map(int, options.growth.split(",")):
        grown = make_images(n_rows)
        started = time.process_time()
        resample_everything(grown, options.growth_resamples)
        cpu_s = time.process_time() - started
        growth.append({"rows": n_rows, "cpu_seconds": cpu_s, "peak_mb": peak_mb()})
    heads = [f"every figure, {options.growth_resamples:,} resamples", "CPU seconds", "peak MB"]
    lines = [
        [f"{g['rows']:,} rows", f"{g['cpu_seconds']:.1f}", f"{g['peak_mb']:.0f}"] for g in growth
    ]
    print(format_table([heads, *lines]))
    described = {"machine": describe_machine(), "looped": options.looped}
    write_json(options.out, {"seconds": times, "growth": growth, **described})


if __name__ == "__main__":
    main()
