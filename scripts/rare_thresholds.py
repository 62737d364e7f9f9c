"""How good thresholds chosen by few positive studies are: how many positives must there be?

    python scripts/rare_thresholds.py --repeats 100

Draws 2,600 training studies with 35 findings, of 1 to 1,100 positive studies each, as frequent as
those of the Indiana collection. Scores are normal, shifted where the finding is present, and their
AUROCs differ between findings (0.75 on average). What the model states are logits that are
compressed, more so for some findings than for others, as focal loss leaves them. Calibration and
thresholds are then chosen as `train` does, and judged on the population, whose F1 at any threshold
is known exactly. The table holds, by the number of positive studies: the F1 at the chosen
threshold as a share of the best that any threshold has there; the share of thresholds that are
worse than calling everything present; and between which shares of images (5th and 95th percentile)
the finding is called, where the best threshold calls so many.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking import format_table, write_json
from numpy.typing import NDArray
from scipy.special import expit, logit
from scipy.stats import norm

from cxr_cache.metrics.operating_point import choose_thresholds, fit_calibration
from cxr_cache.metrics.scores import f1_score

Array = NDArray[Any]
N_STUDIES = 2600
COUNTS = (
    *(1, 2, 3, 3, 4, 5, 6, 8, 9, 10, 12, 13, 14, 18, 23, 35, 37, 38, 43, 48, 54, 57, 61, 63, 68),
    *(70, 97, 100, 123, 201, 237, 286, 373, 479, 1104),
)
CLASSES = ((1, 1), (2, 2), (3, 4), (5, 6), (8, 10), (12, 23), (35, 70), (97, 1104))
WAYS: dict[str, tuple[str, float]] = {
    "own": ("platt", 0),
    "shrunk, 0": ("platt-shrunk", 0),
    "shrunk, 5": ("platt-shrunk", 5),
    "shrunk, 10": ("platt-shrunk", 10),
    "shrunk, 20": ("platt-shrunk", 20),
    "shrunk, 50": ("platt-shrunk", 50),
}
"""Calibration, and the positive clusters that its probabilities are worth for thresholds."""


def main() -> None:
    """Draw, judge, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    drawn: dict[tuple[str, int], list[tuple[float, float, float, float]]] = defaultdict(list)
    for _ in range(options.repeats):
        for way, of_findings in draw(rng).items():
            for n, judged in zip(COUNTS, of_findings, strict=True):
                drawn[way, n].append(judged)
    rows = [summarise(way, low, high, drawn) for low, high in CLASSES for way in WAYS]
    print(format_table([list(rows[0]), *(list(row.values()) for row in rows)]))
    if options.out is not None:
        write_json(options.out, {"repeats": options.repeats, "rows": rows})


def draw(rng: np.random.Generator) -> dict[str, list[tuple[float, float, float, float]]]:
    """One training set, and what each way of choosing thresholds makes of it."""
    counts = np.array(COUNTS)
    shift = np.sqrt(2) * norm.ppf(np.clip(rng.normal(0.75, 0.08, len(counts)), 0.55, 0.95))
    prevalence = counts / N_STUDIES
    present = rng.random((N_STUDIES, len(counts))).argsort(axis=0) < counts
    scores = rng.standard_normal(present.shape) + shift * present
    slope, level = rng.normal(0.7, 0.15, len(counts)).clip(0.3), rng.normal(0.5, 0.2, len(counts))
    true_logits = shift * scores - shift**2 / 2 + logit(prevalence)
    stated = expit(slope * true_logits + level)
    judged = {}
    for way, (method, prior) in WAYS.items():
        calibration = fit_calibration(present * 1.0, stated, method)
        calibrated = calibration.apply(stated)
        cuts = choose_thresholds(present * 1.0, calibrated, prior_positives=prior)
        cut_logits = (logit(np.minimum(cuts, 1)) - calibration.intercept) / calibration.slope
        cut_scores = ((cut_logits - level) / slope - logit(prevalence) + shift**2 / 2) / shift
        judged[way] = [judge(*of) for of in zip(cut_scores, shift, prevalence, strict=True)]
    return judged


def judge(cut: float, shift: float, prevalence: float) -> tuple[float, float, float, float]:
    """F1 as a share of the best, whether calling everything is better, and how much is called.

    All on the population; the shares that are called are those of this and of the best threshold.
    """
    grid = np.append(np.linspace(-4, 8, 1201), cut)
    tp, fp = prevalence * norm.sf(grid - shift), (1 - prevalence) * norm.sf(grid)
    f1 = f1_score(tp, fp, prevalence - tp)
    best = int(np.argmax(f1))
    of_all = 2 * prevalence / (1 + prevalence)
    called = tp + fp
    return f1[-1] / f1[best], float(f1[-1] < of_all), called[-1], called[best]


def summarise(way: str, low: int, high: int, drawn: dict[Any, list[Any]]) -> dict[str, str]:
    """A row of the table: one way, for findings with so many positives."""
    counts = [n for n in sorted(set(COUNTS)) if low <= n <= high]
    judged = np.array([of for n in counts for of in drawn[way, n]])
    f1, is_worse, called, best = judged.T
    return {
        "positive studies": f"{low}" if low == high else f"{low} to {high}",
        "way": way,
        "F1, share of the best": f"{f1.mean():.3f}",
        "worse than calling all": f"{is_worse.mean():.1%}",
        "called": f"{np.quantile(called, 0.05):.2%} to {np.quantile(called, 0.95):.2%}",
        "called by the best": f"{best.mean():.2%}",
    }


if __name__ == "__main__":
    main()
