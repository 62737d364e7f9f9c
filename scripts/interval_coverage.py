"""How often intervals cover: known AUROC, AP and F1, of images and studies that are alike.

    python scripts/interval_coverage.py --repeats 500

Four simulations, scores being normal, shifted where the finding is present, with most of their
variance shared by the images of a study:

* one finding, 100 studies of three images: intervals over studies, and over images as if each
  were evidence of its own;
* one finding, 60 patients of one to six studies that are alike too: intervals over patients, and
  over studies;
* 35 findings as frequent as those of the Indiana collection, in a test split of 770 studies of two
  images: the intervals of this package, and percentiles of studies drawn with replacement;
* one to twenty findings with three to ten positives each among 200 studies of one image: their mean
  AUROC, and its difference between two models that are equally good.

AP and F1 of a finding with few positives are biased: those of another test split as large are not
those of the population. Coverage is given for both, "as large" being the mean over all repeats.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking import format_table, write_json
from numpy.typing import NDArray
from scipy.stats import norm

from cxr_cache.metrics.intervals import (
    Interval,
    count_rarer_class,
    macro_interval,
    standard_errors,
    student_interval,
)
from cxr_cache.metrics.paired import ScoredRows, score_jointly
from cxr_cache.metrics.resampled import RankedScores, bootstrap
from cxr_cache.metrics.scores import FloatArray, confusion_counts, macro_mean, rates

Array = NDArray[Any]
Draw = tuple[Array, Array, dict[str, Array]]
"""Present or not and scores, ``(N, 1)``, and what may be resampled as a whole, by name."""
MEASURES = ("auroc", "ap", "f1")
N_STUDIES = 770  # a fifth of the Indiana collection
DISTANCE = 1.0  # in the simulations of one finding
SHARED = 0.8  # of the variance of a score, by the images of a study
FEW = ((1, 3), (1, 5), (5, 3), (20, 3), (20, 10))
"""Findings, and studies with a positive of each."""
CLASSES = ((1, 1), (2, 4), (5, 9), (10, 19), (20, 49), (50, 10**6))
"""Findings by their number of studies with a positive."""


# --- one finding ---------------------------------------------------------------------------------


def draw_alike_images(rng: np.random.Generator) -> Draw:
    """100 studies of three images."""
    study = np.repeat(np.arange(100), 3)
    present = (rng.random((100, 1)) < 0.4)[study]
    scores = draw_scores(rng, present, np.array([DISTANCE]), study, shared=0.9)
    return present, scores, {"studies": study, "images": np.arange(len(study))}


def draw_alike_studies(rng: np.random.Generator) -> Draw:
    """60 patients of one to six studies of two images."""
    patient_of_study = np.repeat(np.arange(60), rng.integers(1, 7, 60))
    study = np.repeat(np.arange(len(patient_of_study)), 2)
    patient = patient_of_study[study]
    present = (rng.random((60, 1)) < 0.4)[patient]
    of_patient = rng.standard_normal((60, 1))[patient]
    of_study = draw_scores(rng, np.zeros_like(present), np.zeros(1), study, shared=0.75)
    scores = present * DISTANCE + np.sqrt(0.6) * of_patient + np.sqrt(0.4) * of_study
    return present, scores, {"patients": patient, "studies": study}


def cover_one_finding(
    draw: Callable[[np.random.Generator], Draw], repeats: int, n_resamples: int
) -> dict[str, float]:
    """Share of intervals of AUROC that cover, by what is resampled as a whole."""
    truth = float(norm.cdf(DISTANCE / np.sqrt(2)))
    n_covered: dict[str, int] = defaultdict(int)
    for repeat in range(repeats):
        present, scores, groupings = draw(np.random.default_rng([1, repeat]))
        ranked = RankedScores(present.astype(float), scores)
        once = ranked.auroc_and_ap(np.ones((1, len(scores))))[0][0]
        for name, groups in groupings.items():
            areas = bootstrap(partial(_areas, ranked), groups, n_resamples, repeat)["auroc"]
            n = count_rarer_class(present.astype(float), groups)
            interval = student_interval(once, standard_errors(areas, n), n, "logit")
            n_covered[name] += bool(covers(interval, truth)[0])
    return {name: count / repeats for name, count in n_covered.items()}


def _areas(ranked: RankedScores, weights: Array) -> dict[str, FloatArray]:
    return {"auroc": ranked.auroc_and_ap(weights)[0]}


def draw_scores(
    rng: np.random.Generator, present: Array, distances: Array, study: Array, *, shared: float
) -> Array:
    """Normal scores of unit variance, so far apart, ``(N, F)``."""
    of_study = rng.standard_normal((study[-1] + 1, len(distances)))[study]
    own = rng.standard_normal(present.shape)
    scores: Array = present * distances + np.sqrt(shared) * of_study + np.sqrt(1 - shared) * own
    return scores


def covers(interval: Interval, truth: Array | float) -> Array:
    """Where the truth lies inside."""
    covered: Array = np.logical_and(interval.low <= truth, truth <= interval.high)
    return covered


# --- few positives -------------------------------------------------------------------------------


def cover_few_positives(repeats: int, n_resamples: int) -> list[dict[str, float]]:
    """Coverage of a macro AUROC, and how often equal models are called different at 5 %."""
    truth = float(norm.cdf(DISTANCE / np.sqrt(2)))
    found = []
    for n_findings, n_positive in FEW:
        n_covered = n_different = 0
        for repeat in range(repeats):
            rng = np.random.default_rng([4, n_findings, n_positive, repeat])
            targets = rng.permuted(np.tile(np.arange(200) < n_positive, (n_findings, 1)), axis=1).T
            shared, *own = rng.standard_normal((3, *targets.shape))
            scores = [targets * DISTANCE + np.sqrt(0.5) * (shared + z) for z in own]
            rows = np.arange(len(targets))
            models = {str(k): ScoredRows(rows, targets * 1.0, z) for k, z in enumerate(scores)}
            areas = score_jointly(models, rows, n_resamples=n_resamples, seed=repeat)
            macro, difference = areas["0"].macro(), areas["1"].minus(areas["0"]).macro()
            n_covered += macro.low <= truth <= macro.high
            n_different += not difference.low <= 0 <= difference.high
        shares = {"coverage": n_covered / repeats, "false_differences": n_different / repeats}
        found.append({"n_findings": n_findings, "n_positive": n_positive, **shares})
    return found


# --- 35 findings ---------------------------------------------------------------------------------


class Population:
    """35 findings with known AUROC, AP, best F1, and the threshold that has it."""

    def __init__(self) -> None:
        rules = json.loads((resources.files("cxr_cache.datasets") / "findings35.json").read_text())
        n_images = np.array([rule["images"] for rule in rules["findings"]])
        self.prevalence = n_images / rules["images"]
        self.distances = np.random.default_rng(5).uniform(0.4, 1.6, len(n_images))
        z = np.linspace(-8, 10, 100_001)
        columns = [
            self._of_finding(z, *pair) for pair in zip(self.prevalence, self.distances, strict=True)
        ]
        self.truth = np.array([column[:3] for column in columns]).T  # (3, F)
        self.thresholds = np.array([column[3] for column in columns])

    @staticmethod
    def _of_finding(z: Array, prevalence: float, distance: float) -> tuple[float, ...]:
        found, false = norm.sf(z - distance), norm.sf(z)
        tp, fp = prevalence * found, (1 - prevalence) * false
        f1 = 2 * tp / (prevalence + tp + fp)
        ap = -np.trapezoid(tp / (tp + fp), found)
        return norm.cdf(distance / np.sqrt(2)), ap, f1.max(), z[f1.argmax()]

    def draw(self, seed: int) -> tuple[Array, Array, Array]:
        """Targets, scores and studies of a test split."""
        rng = np.random.default_rng([2, seed])
        study = np.repeat(np.arange(N_STUDIES), 2)
        present = (rng.random((N_STUDIES, len(self.prevalence))) < self.prevalence)[study]
        return (
            present.astype(float),
            draw_scores(rng, present, self.distances, study, shared=SHARED),
            study,
        )


def simulate(population: Population, seed: int, n_resamples: int) -> dict[str, Any]:
    """One test split: estimates, studies behind them, and intervals of both kinds."""
    targets, scores, study = population.draw(seed)
    ranked, decisions = RankedScores(targets, scores), scores >= population.thresholds

    def statistics(weights: Array) -> dict[str, Array]:
        areas, precisions = ranked.auroc_and_ap(weights)
        f1 = rates(confusion_counts(targets, decisions, weights)).f1
        return {"auroc": areas, "ap": precisions, "f1": f1}

    rng = np.random.default_rng([3, seed])
    even = np.full(N_STUDIES, 1 / N_STUDIES)
    drawn = statistics(rng.multinomial(N_STUDIES, even, size=n_resamples)[:, study])
    weighted = bootstrap(statistics, study, n_resamples, seed)
    n = count_rarer_class(targets, study)
    once = statistics(np.ones((1, len(study))))
    estimates = {name: np.where(n > 0, once[name][0], np.nan) for name in MEASURES}
    scored = n > 0
    intervals: dict[tuple[str, str], tuple[Interval, Interval]] = {}
    for name, values in estimates.items():
        errors = standard_errors(weighted[name], n)
        intervals[name, "package"] = (
            student_interval(values, errors, n, "logit"),
            macro_interval(values, weighted[name], n, "logit"),
        )
        intervals[name, "percentiles"] = (
            percentiles(drawn[name]),
            percentiles(macro_mean(drawn[name][:, scored])),
        )
    return {"n": n, "estimates": np.stack(list(estimates.values())), "intervals": intervals}


def cover_many_findings(repeats: int, n_resamples: int) -> list[dict[str, Any]]:
    """Coverage of single findings and of their mean, by method, measure and truth."""
    population = Population()
    splits = [simulate(population, seed, n_resamples) for seed in range(repeats)]
    as_large = np.nanmean([split["estimates"] for split in splits], axis=0)
    truths = {"population": population.truth, "as large": as_large}
    results: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    for split in splits:
        for (measure, method), intervals in split["intervals"].items():
            for target, truth in truths.items():
                of_findings = truth[MEASURES.index(measure)]
                for what, covered in judge(split["n"], intervals, of_findings):
                    results[measure, target, method, what].append(covered)
    return [
        dict(zip(("measure", "truth", "method", "of"), key, strict=True))
        | {"coverage": float(np.mean(covered)), "n": len(covered)}
        for key, covered in sorted(results.items())
    ]


def judge(
    n: Array, intervals: tuple[Interval, Interval], truth: Array
) -> Iterator[tuple[str, bool]]:
    """What an interval is of, and whether it covers."""
    single, macro = intervals
    for first, last in CLASSES:
        chosen = (n >= first) & (n <= last) & ~np.isnan(single.low)
        for covered in covers(single, truth)[chosen]:
            yield f"{first}-{last} positives", bool(covered)
    yield "macro", bool(covers(macro, truth[n > 0].mean()))


def percentiles(resampled: Array) -> Interval:
    """95 % of the resamples that are defined."""
    with np.errstate(invalid="ignore"):
        defined = ~np.isnan(resampled).all(axis=0)
    bounds = np.full((2, *resampled.shape[1:]), np.nan)
    bounds[:, defined] = np.nanquantile(resampled[:, defined], [0.025, 0.975], axis=0)
    return Interval(bounds[0], bounds[1])


def main() -> None:
    """Simulate, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--resamples", type=int, default=300)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    started = time.perf_counter()
    of_one = options.repeats, options.resamples
    one = cover_one_finding(draw_alike_images, *of_one)
    patients = cover_one_finding(draw_alike_studies, *of_one)
    few = cover_few_positives(*of_one)
    many = cover_many_findings(*of_one)
    print("One finding; intervals of AUROC that cover, of 95 %:")
    for what, shares in (("100 studies of three images", one), ("60 patients", patients)):
        covered = ", ".join(
            f"resampling {name} {100 * share:.1f}" for name, share in shares.items()
        )
        print(f"  {what}: {covered}")
    print(
        "Macro AUROC of findings with few positive studies; coverage, and false differences, in %:"
    )
    for row in few:
        print(
            f"  {row['n_findings']} x {row['n_positive']}: {100 * row['coverage']:.1f}, "
            f"{100 * row['false_differences']:.1f}"
        )
    print(f"35 findings, 770 studies of two images, {options.repeats} repeats; coverage in %:")
    print(tabulate(many))
    print(f"{time.perf_counter() - started:.0f} s")
    if options.out:
        found = {
            "one_finding": one,
            "patients": patients,
            "few_positives": few,
            "many_findings": many,
        }
        write_json(options.out, found | vars_of(options))


def vars_of(options: argparse.Namespace) -> dict[str, int]:
    """What the figures depend on."""
    return {"repeats": options.repeats, "resamples": options.resamples}


def tabulate(results: list[dict[str, Any]]) -> str:
    """One line per measure, truth and method; one column per class of findings."""
    by_key = {(r["measure"], r["truth"], r["method"], r["of"]): r for r in results}
    columns = ["macro", *(f"{first}-{last} positives" for first, last in CLASSES)]
    heads = ["macro", *(f"n={a}" if a == b else f"{a}-{b}" for a, b in CLASSES)]
    lines = [["measure, truth, method", *(h.replace("-1000000", "+") for h in heads)]]
    for measure, truth, method in dict.fromkeys(key[:3] for key in by_key):
        cells = [by_key.get((measure, truth, method, column)) for column in columns]
        shown = ["" if cell is None else f"{100 * cell['coverage']:.1f}" for cell in cells]
        lines.append([f"{measure}, {truth}, {method}", *shown])
    return format_table(lines)


if __name__ == "__main__":
    main()
