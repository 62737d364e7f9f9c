"""How often intervals cover a known truth, and how often equal models are called different.

    python scripts/interval_coverage.py --repeats 500

Five simulations, scores being normal, shifted where the finding is present. In the first three,
the images of a study share most of their variance:

* one finding, 100 studies of three images: intervals over studies, and over images as if each
  were evidence of its own;
* one finding, 60 patients of one to six studies that are alike too: intervals over patients, and
  over studies;
* 35 findings as frequent as those of the Indiana collection, in a test split of 770 studies of two
  images: the intervals of this package, and percentiles of studies drawn with replacement;
* AUROCs from 0.6 to 0.97 of one finding with 5 to 200 positives among 800 studies of one image, the
  scores of positives being as spread out as those of negatives, or 1.5 times as much, with eight
  times as many repeats;
* the mean AUROC and AP of one to twenty findings with three to ten positives each among 200 studies
  of one image, and of the 35 findings among 770: how often two models that are equally good are
  called different at 5 %, where the noise of a model is that of each finding by itself, and where
  all findings of a study share it; and how often a recipe of several trainings is called different
  from itself.

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

from cxr_cache.evaluation.compare import tabulate_differences
from cxr_cache.evaluation.figures import MEASURES as REGISTERED
from cxr_cache.metrics.intervals import (
    Interval,
    auroc_interval,
    count_classes,
    count_rarer_class,
    macro_interval,
    standard_errors,
    student_interval,
)
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
AREAS = (0.6, 0.7, 0.8, 0.9, 0.95, 0.97)
N_POSITIVE = (5, 9, 14, 20, 50, 200)
SPREADS = (1.0, 1.5)
"""Standard deviations of the positives' scores; those of the negatives' have 1."""
AREA_REPEATS = 8
"""How many times as many repeats: those need no resamples."""
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
            n = count_classes(present.astype(float), groups)
            interval = auroc_interval(once, standard_errors(areas, n.min(axis=0)), *n)
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


# --- AUROCs up to nearly 1 -----------------------------------------------------------------------


def cover_auroc(repeats: int) -> list[dict[str, float]]:
    """Share of intervals that cover, by AUROC, number of positives and spread of their scores."""
    found = []
    for spread in SPREADS:
        for area in AREAS:
            for n_positive in N_POSITIVE:
                rng = np.random.default_rng([5, n_positive, int(100 * area), int(10 * spread)])
                distance = norm.ppf(area) * np.hypot(1, spread)
                positives = distance + spread * rng.standard_normal((repeats, n_positive))
                negatives = rng.standard_normal((repeats, 800 - n_positive))
                once, spreads = resample_without_end(positives, negatives)
                n = np.array([n_positive, 800 - n_positive])
                errors = spreads * np.sqrt((n.min() + 1) / (n.min() - 1))  # as standard_errors
                shares = {
                    "coverage": covers(auroc_interval(once, errors, *n), area).mean(),
                    "logit": covers(student_interval(once, errors, n.min(), "logit"), area).mean(),
                }
                found.append({"spread": spread, "auroc": area, "n_positive": n_positive, **shares})
    return found


def resample_without_end(positives: Array, negatives: Array) -> tuple[Array, Array]:
    """AUROCs, and their spread over infinitely many resamples, ``(R,)`` each, of untied scores.

    Scores of R samples are ``(R, m)`` and ``(R, n)``. Exponential weights that are divided by their
    sum have the covariance matrix (I - J / m) / (m (m + 1)), with J all ones, so the variance of an
    AUROC is a sum of squares: over positives, over negatives and over their pairs.
    """
    (m, n), R = (positives.shape[1], negatives.shape[1]), range(len(positives))
    positives, negatives = np.sort(positives), np.sort(negatives)
    beaten = np.array([np.searchsorted(negatives[r], positives[r]) for r in R]) / n  # (R, m)
    beating = 1 - np.array([np.searchsorted(positives[r], negatives[r]) for r in R]) / m  # (R, n)
    areas = beaten.mean(axis=1)
    pairs = m * n * (areas + areas**2)
    pairs -= n * np.square(beaten).sum(axis=1) + m * np.square(beating).sum(axis=1)
    variances = beaten.var(axis=1) / (m + 1) + beating.var(axis=1) / (n + 1)
    variances += np.maximum(pairs, 0) / (m * (m + 1) * n * (n + 1))
    return areas, np.sqrt(variances)


# --- equal models --------------------------------------------------------------------------------


def compare_equal_models(repeats: int, n_resamples: int) -> list[dict[str, Any]]:
    """How often a macro AUROC or AP is called different, and how often macro AUROC is covered."""
    few = [(f"{F} x {n}", np.full(F, n / 200), np.full(F, DISTANCE), 200) for F, n in FEW]
    of_35 = Population()
    designs = [*few, ("35 findings", of_35.prevalence, of_35.distances, N_STUDIES)]
    return [
        {"design": name, "is_shared": is_shared}
        | _compare_equal_models(prevalence, distances, n_studies, is_shared, repeats, n_resamples)
        for name, prevalence, distances, n_studies in designs
        for is_shared in (False, True)
    ]


def _compare_equal_models(
    prevalence: Array,
    distances: Array,
    n_studies: int,
    is_shared: bool,
    repeats: int,
    n_resamples: int,
) -> dict[str, float]:
    truth = norm.cdf(distances / np.sqrt(2))
    n_found: dict[str, int] = defaultdict(int)
    for repeat in range(repeats):
        rng = np.random.default_rng([4, len(prevalence), int(prevalence[0] * n_studies), repeat])
        targets = draw_targets(rng, prevalence, n_studies)
        F, rows = len(prevalence), np.arange(n_studies)
        of_both = rng.standard_normal(targets.shape)
        ranked = []
        for _ in range(2):
            own = rng.standard_normal((n_studies, 1 if is_shared else F))
            scores = targets * distances + np.sqrt(0.5) * (of_both + own)
            ranked.append(RankedScores(targets, scores))

        def statistics(weights: Array, ranked: list[RankedScores] = ranked) -> dict[str, Array]:
            pairs = np.stack([each.auroc_and_ap(weights) for each in ranked], axis=-1)
            return {"auroc": pairs[0], "ap": pairs[1]}  # (R, F, 2)

        once = statistics(np.ones((1, n_studies)))
        resampled = bootstrap(statistics, rows, n_resamples, repeat)
        n = count_rarer_class(targets, rows)
        for measure, figures in once.items():
            first, second = np.where(n > 0, figures[0].T, np.nan)
            changes = resampled[measure][..., 1] - resampled[measure][..., 0]
            widen = REGISTERED[measure].widen
            table = tabulate_differences(first, second, changes, n, widen=widen)
            n_found[f"{measure}_called_different"] += table["p"].iloc[-1] < 0.05
        first = np.where(n > 0, once["auroc"][0, :, 0], np.nan)
        macro = macro_interval(first, resampled["auroc"][..., 0], n, "logit")
        n_found["coverage"] += bool(covers(macro, truth[n > 0].mean()))
    return {name: count / repeats for name, count in n_found.items()}


def compare_same_recipe(
    repeats: int, n_resamples: int, *, n_trainings: int = 5
) -> dict[str, float]:
    """How often a recipe is called different from itself, with the training's variance and without.

    Ten findings of ten positives among 200 studies; a training moves all its positives by a normal
    number of spread 0.15, which is half of what other studies change.
    """
    n_found: dict[str, int] = defaultdict(int)
    for repeat in range(repeats):
        rng = np.random.default_rng([6, repeat])
        targets = draw_targets(rng, np.full(10, 0.05), 200)
        of_all = rng.standard_normal(targets.shape)
        ranked = [
            RankedScores(targets, targets * rng.normal(DISTANCE, 0.15) + of_all)
            for _ in range(2 * n_trainings)
        ]

        def areas(weights: Array, ranked: list[RankedScores] = ranked) -> Array:
            every = np.stack([each.auroc_and_ap(weights)[0] for each in ranked])
            return every.reshape(2, n_trainings, *every.shape[1:])  # (2, T, R, F)

        def changes(weights: Array) -> dict[str, Array]:
            means = areas(weights).mean(axis=1)
            return {"auroc": means[1] - means[0]}

        first, second = areas(np.ones((1, 200)))[:, :, 0]
        resampled = bootstrap(changes, np.arange(200), n_resamples, repeat)["auroc"]
        n = count_rarer_class(targets, np.arange(200))
        means = first.mean(axis=0), second.mean(axis=0)
        for name, pair in (("studies", means), ("studies_and_training", (first, second))):
            p = tabulate_differences(*pair, resampled, n)["p"].iloc[-1]
            n_found[name] += p < 0.05
    return {name: count / repeats for name, count in n_found.items()}


def draw_targets(rng: np.random.Generator, prevalence: Array, n_studies: int) -> Array:
    """Present (1) or not, ``(N, F)``; of rare findings in 200 studies exactly as many as stated."""
    if n_studies == N_STUDIES:
        return (rng.random((n_studies, len(prevalence))) < prevalence).astype(float)
    present = np.arange(n_studies) < np.round(prevalence * n_studies)[:, None]
    targets: Array = rng.permuted(present, axis=1).T.astype(float)
    return targets


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
        widen = name != "ap"
        errors = standard_errors(weighted[name], n, widen=widen)
        intervals[name, "package"] = (
            auroc_interval(values, errors, *count_classes(targets, study))
            if name == "auroc"
            else student_interval(values, errors, n, "logit"),
            macro_interval(values, weighted[name], n, "logit", widen=widen),
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
    areas = cover_auroc(AREA_REPEATS * options.repeats)
    equal = compare_equal_models(*of_one)
    same = compare_same_recipe(*of_one)
    many = cover_many_findings(*of_one)
    print("One finding; intervals of AUROC that cover, of 95 %:")
    for what, shares in (("100 studies of three images", one), ("60 patients", patients)):
        covered = ", ".join(
            f"resampling {name} {100 * share:.1f}" for name, share in shares.items()
        )
        print(f"  {what}: {covered}")
    print(f"AUROC by positives, {AREA_REPEATS * options.repeats:,} repeats; intervals that cover")
    print("(Student's on the logit scale), in %:")
    print(tabulate_areas(areas))
    print("Equal models called different, and coverage of the first one's macro AUROC, in %:")
    heads = ["findings x positives", "noise", "macro AUROC", "macro AP", "coverage"]
    lines = [
        [row["design"], "shared" if row["is_shared"] else "own"]
        + [f"{100 * row[name]:.1f}" for name in list(row)[2:]]
        for row in equal
    ]
    print(format_table([heads, *lines]))
    print(
        "A recipe called different from itself, five trainings of each, in %: "
        f"{100 * same['studies']:.1f} with the variance over studies alone, "
        f"{100 * same['studies_and_training']:.1f} with that of the training"
    )
    print(f"35 findings, 770 studies of two images, {options.repeats} repeats; coverage in %:")
    print(tabulate(many))
    print(f"{time.perf_counter() - started:.0f} s")
    if options.out:
        found = {
            "one_finding": one,
            "patients": patients,
            "areas": areas,
            "equal_models": equal,
            "same_recipe": same,
            "many_findings": many,
        }
        write_json(options.out, found | vars_of(options))


def vars_of(options: argparse.Namespace) -> dict[str, int]:
    """What the figures depend on."""
    return {"repeats": options.repeats, "resamples": options.resamples}


def tabulate_areas(found: list[dict[str, float]]) -> str:
    """One line per spread and AUROC, one column per number of positives."""
    lines = [["spread, AUROC", *map(str, N_POSITIVE)]]
    for spread in SPREADS:
        for area in AREAS:
            of_line = [row for row in found if (row["spread"], row["auroc"]) == (spread, area)]
            cells = [f"{100 * row['coverage']:.1f} ({100 * row['logit']:.1f})" for row in of_line]
            lines.append([f"{spread}, {area}", *cells])
    return format_table(lines)


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
