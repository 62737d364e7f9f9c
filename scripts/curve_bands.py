"""How often bands of curves hold the truth, and how wide intervals are beside what a plan expects.

    python scripts/curve_bands.py --repeats 300

Draws tests of one image a study whose scores are normal, so that the sensitivity at any specificity
and the precision at any recall are known. The first table holds, by numbers of positives and
negatives and by AUROC: how often the band of the sensitivity holds the truth at shares of false
alarms, and that of the precision at recalls. The second holds the half width that `describe --plan`
expects of the AUROC's interval, divided by that of the simulated tests on average, for findings by
themselves and for the mean over findings.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from benchmarking import format_table, write_json
from numpy.typing import NDArray
from scipy.stats import norm

from cxr_cache.evaluation.curves import ranking_curves
from cxr_cache.evaluation.figures import estimate
from cxr_cache.evaluation.scored import ScoredImages
from cxr_cache.metrics.planning import expected_half_width, expected_macro_half_width

TESTS: Final = ((10, 300, 0.8), (30, 600, 0.8), (100, 600, 0.8), (30, 600, 0.92))
"""Positives, negatives and AUROC."""
FALSE_ALARMS: Final = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6)
RECALLS: Final = (0.2, 0.4, 0.6, 0.8, 0.95)
PLANNED: Final = (8, 12, 25, 40, 150)
"""Positives of each finding among 400 studies."""
AUROCS: Final = (0.7, 0.8, 0.9, 0.95)


def main() -> None:
    """Draw, count, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--resamples", type=int, default=300)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bands = [count_held(*test, options.repeats, options.resamples) for test in TESTS]
    widths = [compare_widths(auroc, options.repeats, options.resamples) for auroc in AUROCS]
    names = [f"sens. at {x}" for x in FALSE_ALARMS] + [f"prec. at {x}" for x in RECALLS]
    rows = [["positives, negatives, AUROC", *names]]
    for row in bands:
        shares = [row["held"].get(name) for name in names]
        rows.append([row["test"], *("" if s is None else f"{s:.3f}" for s in shares)])
    print(format_table(rows))
    rows = [["expected / simulated half width", *map(str, PLANNED), "mean over findings"]]
    rows += [[f"AUROC {row['auroc']}", *(f"{r:.3f}" for r in row["ratios"])] for row in widths]
    print(format_table(rows))
    if options.out:
        write_json(options.out, {"bands": bands, "widths": widths})


def draw(rng: np.random.Generator, n_positive: list[int], n: int, distance: float) -> ScoredImages:
    """Studies of one image, with normal scores, each finding's by themselves."""
    targets = np.zeros((n, len(n_positive)))
    for f, n_present in enumerate(n_positive):
        targets[rng.permutation(n)[:n_present], f] = 1
    scores = rng.normal(size=targets.shape) + distance * targets
    ids, blank = np.arange(n).astype(str).astype(object), np.full(n, "", object)
    findings = tuple(f"finding {f}" for f in range(len(n_positive)))
    return ScoredImages(ids, ids, blank, blank, targets, norm.cdf(scores), findings)


def count_held(
    n_positive: int, n_negative: int, auroc: float, n_repeats: int, n_resamples: int
) -> dict[str, Any]:
    """Share of tests whose band holds the truth at each place, by the place's name."""
    distance, n = np.sqrt(2) * norm.ppf(auroc), n_positive + n_negative
    prevalence = n_positive / n
    held = defaultdict[str, list[bool]](list)
    for repeat in range(n_repeats):
        images = draw(np.random.default_rng([repeat, n_positive]), [n_positive], n, distance)
        table = ranking_curves(images, n_resamples=n_resamples, seed=repeat)
        rows = table[table["finding"] == "finding 0"]
        alarms, recalls = 1 - rows["specificity"].to_numpy(), rows["sensitivity"].to_numpy()
        for x in FALSE_ALARMS:
            row = rows[alarms <= x + 1e-12].iloc[-1]
            truth = norm.sf(norm.isf(1 - row["specificity"]) - distance)
            held[f"sens. at {x}"].append(row["sensitivity_low"] <= truth <= row["sensitivity_high"])
        for x in RECALLS:
            row = rows[recalls >= x - 1e-12].iloc[0]
            if row["sensitivity"] < 1:  # else it is known where the curve ends
                alarm = norm.sf(norm.isf(row["sensitivity"]) + distance)
                found = prevalence * row["sensitivity"]
                truth = found / (found + (1 - prevalence) * alarm)
                held[f"prec. at {x}"].append(row["ppv_low"] <= truth <= row["ppv_high"])
    return {
        "test": f"{n_positive}, {n_negative}, {auroc}",
        "held": {name: float(np.mean(each)) for name, each in held.items()},
    }


def compare_widths(auroc: float, n_repeats: int, n_resamples: int) -> dict[str, Any]:
    """Expected half widths over those of simulated tests, of findings and of their mean."""
    n, distance = 400, np.sqrt(2) * norm.ppf(auroc)
    widths: list[NDArray[np.float64]] = []
    for repeat in range(n_repeats):
        images = draw(np.random.default_rng(repeat), list(PLANNED), n, distance)
        cuts = np.full(len(PLANNED), 0.5)
        found = estimate(images, cuts, n_resamples=n_resamples, seed=repeat).intervals
        of_each, of_mean = found["auroc"], found["macro_auroc"]
        widths.append(np.append(of_each.high - of_each.low, of_mean.high - of_mean.low))
    positives = np.array(PLANNED, float)
    expected = np.append(
        expected_half_width(auroc, positives, n - positives),
        expected_macro_half_width(auroc, positives, n - positives)[0],
    )
    return {"auroc": auroc, "ratios": (2 * expected / np.mean(widths, axis=0)).tolist()}


if __name__ == "__main__":
    main()
