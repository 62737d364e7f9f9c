"""Runs on the same test studies: how much better is one, and is that more than luck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from cxr_cache.common.machine import compare_machines
from cxr_cache.common.wording import count, first_lines, list_names
from cxr_cache.config import OF_THE_MACHINE, CompareConfig
from cxr_cache.datasets.cohort import UNITS, Unit
from cxr_cache.errors import RunError
from cxr_cache.evaluation.figures import MEASURES, to_number
from cxr_cache.evaluation.overlap import note_overlap
from cxr_cache.evaluation.scored import ScoredImages, read_scored, read_trainings
from cxr_cache.metrics.intervals import (
    LEVEL,
    add_training_error,
    count_rarer_class,
    drop_rounding,
    macro_error,
    standard_errors,
    student_interval,
)
from cxr_cache.metrics.operating_point import OperatingPoint
from cxr_cache.metrics.resampled import bootstrap, rank_scores
from cxr_cache.metrics.scores import FloatArray, macro_mean
from cxr_cache.models.run import Run
from cxr_cache.models.split_reads import SplitReads, count_reading, count_reading_beside

COMPARED: Final = ("auroc", "ap")
MACRO: Final = ""
"""What stands for the finding where the mean over findings is compared."""

COLUMNS: Final = (
    *("run", "against", "rows", "measure", "finding", "n_positive"),
    *("first", "second", "difference", "low", "high", "p", "p_holm", "n_undefined_resamples"),
)

Rows: TypeAlias = Literal["images", "studies"]
_MACRO_FIGURES: Final[tuple[tuple[str, str, Rows], ...]] = (
    ("macro AUROC", "auroc", "images"),
    ("macro AP", "ap", "images"),
    ("macro AUROC, by study", "auroc", "studies"),
    ("macro AP, by study", "ap", "studies"),
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs against the first of them, on test images that are the same."""

    runs: tuple[str, ...]
    """Names, the first being what the others are compared with."""
    n_images: int
    n_studies: int
    unit: Unit
    """What was resampled."""
    table: pd.DataFrame
    """As ``comparison.csv``: one row per run, kind of rows, measure and finding."""
    notes: tuple[str, ...] = ()
    """What the differences do not speak of."""
    reads: SplitReads | None = None
    """How often the test split has been read, this time included."""

    def __repr__(self) -> str:
        return first_lines(self.to_text())

    def to_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_text` for programs, with every finding."""
        return {
            "runs": self.runs,
            "n_images": self.n_images,
            "n_studies": self.n_studies,
            "unit": self.unit,
            "level": LEVEL,
            "differences": self.table,
            "notes": self.notes,
            "test_reads": None if self.reads is None else self.reads.to_dict(),
        }

    @property
    def rows(self) -> tuple[Rows, ...]:
        """What is compared: images and studies, or studies alone where a run predicts these."""
        found: tuple[Rows, ...] = tuple(self.table["rows"].unique())
        return found

    def macro(self, run: str, measure: str = "auroc", rows: Rows | None = None) -> pd.Series[Any]:
        """The row of one mean over findings, by image unless studies alone are compared."""
        table, rows = self.table, rows or self.rows[0]
        chosen = (table["run"] == run) & (table["measure"] == measure) & (table["rows"] == rows)
        row: pd.Series[Any] = table[chosen & (table["finding"] == MACRO)].iloc[0]
        return row

    def to_text(self) -> str:
        """Macro figures, and the findings that differ, for a terminal."""
        lines = [
            f"{count(self.n_images, 'test image')} of {count(self.n_studies, 'study')}; "
            "differences to "
            f"{self.runs[0]} with {LEVEL:.0%} paired intervals over {UNITS[self.unit]}",
        ]
        lines += self._pair() if len(self.runs) == 2 else self._several()
        reads = [] if self.reads is None else [self.reads.to_text()]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes), *reads])

    def _pair(self) -> list[str]:
        first, second = self.runs
        width = max(len(first), len(second), 10)
        lines = [f"  {'':<22}{first:>{width}}  {second:>{width}}  difference"]
        for name, measure, rows in self._macro_figures():
            row = self.macro(second, measure, rows)
            lines.append(
                f"  {name:<22}{row['first']:>{width}.3f}  {row['second']:>{width}.3f}  "
                + _describe(row)
            )
        return lines + self._differing(second)

    def _several(self) -> list[str]:
        """A table of all runs per figure, and what each has of findings that differ."""
        first, *others = self.runs
        width = max(22, *map(len, self.runs))
        lines = []
        for name, measure, rows in self._macro_figures():
            of_runs = {run: self.macro(run, measure, rows) for run in others}
            lines += [f"  {name}", f"    {first:<{width}}{of_runs[others[0]]['first']:.3f}"]
            lines += [
                f"    {run:<{width}}{row['second']:.3f}  {_describe(row)}"
                for run, row in of_runs.items()
            ]
        for run in others:
            lines += [f"  {run}", *(f"  {line}" for line in self._differing(run))]
        return lines

    def _macro_figures(self) -> list[tuple[str, str, Rows]]:
        return [figure for figure in _MACRO_FIGURES if figure[-1] in self.rows]

    def _differing(self, run: str) -> list[str]:
        """Findings whose AUROC differs beyond luck, largest difference first."""
        table = self.table
        chosen = (
            (table["run"] == run) & (table["rows"] == self.rows[0]) & (table["finding"] != MACRO)
        )
        areas = table[chosen & (table["measure"] == "auroc")].dropna(subset=["p_holm"])
        found = areas[areas["p_holm"] < 1 - LEVEL].sort_values("difference", key=abs)[::-1]
        n_tested = count(len(areas), "finding")
        if not len(found):
            return [f"  No AUROC of the {n_tested} tested differs (Holm, 5 %)."]
        head = f"  AUROC differs for {len(found)} of {n_tested} tested (Holm, 5 %):"
        return [head] + [
            f"    {row['finding']}: {row['first']:.3f} and {row['second']:.3f}, {_describe(row)}"
            for row in found.to_dict("records")
        ]


class ExternalTest(Run):
    """A run as it was tested on another data set: tables of the test, the model of the run."""

    def __init__(self, path: Path, external: dict[str, Any]) -> None:
        self.run = Run.open(external["run"])
        self.external = external
        super().__init__(path, self.run.config)

    @property
    def operating_point(self) -> OperatingPoint:
        """That of the run, with which it was tested."""
        return self.run.operating_point

    @property
    def is_nested(self) -> bool:
        """No: the one model that a run delivers is tested, however its recipe was."""
        return False


def open_tested(path: str | Path) -> Run:
    """Open a run, or the folder of its test on another data set, for :func:`compare_runs`.

    Raises
    ------
    RunError
        `path` is neither, or is the test of a run that is not where it was.
    """
    test = Run(Path(path), {})
    if not (test.path / "matching.csv").is_file():
        return Run.open(path)
    return ExternalTest(test.path, test.read_metrics()["external"])


def _describe(row: Any) -> str:
    bounds = (
        " [no interval]" if np.isnan(row["low"]) else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
    )
    p = "" if np.isnan(row["p_holm"]) else f", p = {row['p_holm']:.2g}"
    return f"{row['difference']:+.3f}{bounds}{p}"


def compare_runs(
    *runs: Run, n_resamples: int = CompareConfig.n_resamples, seed: int = CompareConfig.seed
) -> Comparison:
    """Compare runs with the first by a paired bootstrap: each resample scores all.

    Where every run has several trainings (``train --repeats``), figures are means over them, and
    the variance of a recipe's training is added to that over studies: recipes are compared. Else
    the runs' models are, and the result says so.

    The interval of a difference is the difference and Student's t times its standard error over
    the resamples, and its p value belongs to the same statistic (as in pROC's bootstrap test;
    Robin et al., 2011), so that the two agree. With one image per study the standard error is
    DeLong's up to the bootstrap's error. P values are corrected by Holm's method (1979) over all
    findings of all runs, and macro figures over all runs, each kind of rows and measure by itself.

    Notes say where test images of a run are, or may be, images that it was trained on under other
    names, by file or by embedding; see :func:`cxr_cache.evaluation.overlap.note_overlap`.

    Parameters
    ----------
    runs
        Two or more finished runs with the same test images, findings and targets; or their tests on
        one other data set, which :func:`open_tested` opens. Where one of
        them predicts whole studies, the others' probabilities are averaged by study, and studies
        alone are compared.
        What is resampled are the patients of the first of them that names any, else studies.
    n_resamples, seed
        As in :func:`cxr_cache.metrics.resampled.bootstrap`.

    Raises
    ------
    RunError
        Two runs were tested on other images, findings or targets, or in other outer folds; or one
        is nested and one is not; or there are not two.

    Examples
    --------
    >>> comparison = compare_runs(Run.open("runs/first"), Run.open("runs/tuned"))  # doctest: +SKIP
    >>> comparison.table.query("finding == ''")  # the macro figures  # doctest: +SKIP
    """
    if len(runs) < 2:
        raise RunError("There is nothing to compare: give two runs or more.")
    require_one_protocol(runs)
    names = _name(runs)
    trainings = [read_trainings(run) for run in runs]
    n_trainings = min(map(len, trainings))
    if n_trainings == 1:  # then only the models that the runs keep can be compared
        trainings = [[read_scored(run)] for run in runs]
    if any(each.rows == "studies" for of_run in trainings for each in of_run):
        trainings = [[each.by_study() for each in of_run] for of_run in trainings]
    first = trainings[0][0]
    images = [
        [_align(runs[0], first, run, each) for each in of_run]
        for run, of_run in zip(runs, trainings, strict=True)
    ]
    images = _share_patients(images)
    kinds: dict[Rows, list[list[ScoredImages]]] = {
        "studies": [[each.by_study() for each in of_run] for of_run in images]
    }
    if first.rows == "images":
        kinds = {"images": images, **kinds}
    tables = [
        _tabulate(names, rows, parts, _score(parts, n_resamples, seed))
        for rows, parts in kinds.items()
    ]
    table = pd.concat(tables, ignore_index=True)
    notes = _list_notes(names, runs, [len(of_run) for of_run in trainings])
    external = [run for run in runs if isinstance(run, ExternalTest)]
    if external:
        texts = dict.fromkeys(text for run in external for text in run.external["warnings"])
        notes += tuple(texts)
        store, image_ids = Path(external[0].external["store"]), first.image_ids
        own = [run.run if isinstance(run, ExternalTest) else run for run in runs]
        reads = count_reading_beside(store, image_ids, "compare", own)
    else:
        notes += tuple(note_overlap(names, runs))
        reads = count_reading("compare", *runs)
    return Comparison(
        names,
        first.count_images(),
        first.n_studies,
        images[0][0].unit,
        table,
        notes,
        reads,
    )


def require_one_protocol(runs: Sequence[Run]) -> None:
    """Raise RunError unless all runs are nested, or none is."""
    for run in runs[1:]:
        if run.is_nested != runs[0].is_nested:
            nested, other = (run, runs[0]) if run.is_nested else (runs[0], run)
            raise RunError(
                f"{nested.path} tests every image in a nested cross-validation and {other.path} "
                "one part of them, so there is no difference between the two. Train both with the "
                "same --protocol."
            )


def _list_notes(
    names: Sequence[str], runs: Sequence[Run], n_trainings: Sequence[int]
) -> tuple[str, ...]:
    """Say what is compared, and what else differs from the first run's recipe."""
    notes = [
        f"This compares recipes: figures are means over {' and '.join(map(str, n_trainings))} "
        "trainings, and intervals hold both the test sample and the training."
        if min(n_trainings) > 1
        else "This compares trained models, not recipes: of one run or more only one training is "
        "known, and another seed of the same recipe gives another model. Train with --repeats to "
        "compare recipes."
    ]
    finals = [run.config.get(run.config.get("kind", ""), {}).get("final") for run in runs]
    for name, final in zip(names[1:], finals[1:], strict=True):
        if None not in (final, finals[0]) and final != finals[0]:
            notes.append(
                f"{names[0]} has --final {finals[0]} and {name} --final {final}. An average of "
                "models is better than one of them, so the difference is not of the recipes alone; "
                "train both with the same --final."
            )
    if runs[0].is_nested:
        notes.append(
            "These are nested cross-validations on the same outer folds. AUROC and AP compare "
            "images of one outer fold only; intervals hold the test sample, not that the models "
            "of the folds share training images, and p values are therefore somewhat too small."
        )
    for name, run in zip(names[1:], runs[1:], strict=True):
        if differences := _differ_by_machine(runs[0], run):
            notes.append(
                f"{name} has the recipe and the seed of {names[0]}, and was trained on another "
                f"machine: {differences}. Numbers are rounded otherwise there, and training "
                "enlarges that, so what differs between the two is luck, as between two seeds."
            )
    return tuple(notes)


def _differ_by_machine(first: Run, second: Run) -> str:
    """What differs between the machines of two runs of one recipe and seed; else nothing."""
    recipes = [
        {
            **{
                name: value
                for name, value in run.config.get(run.config.get("kind", ""), {}).items()
                if name not in OF_THE_MACHINE
            },
            "kind": run.config.get("kind"),
            "encoders": [store.get("encoder") for store in run.stores],
            "from_run": run.config.get("from_run") is not None,
        }
        for run in (first, second)
    ]
    machines = [
        {"torch": run.config.get("versions", {}).get("torch")} | run.config.get("machine", {})
        for run in (first, second)
    ]
    both_known = all("machine" in run.config for run in (first, second))
    return compare_machines(*machines) if both_known and recipes[0] == recipes[1] else ""


def _name(runs: Sequence[Run]) -> tuple[str, ...]:
    """Folder names, or paths where two folders share theirs."""
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise RunError("A run is given twice; comparing it with itself says nothing.")
    return tuple(names)


def _align(first: Run, ours: ScoredImages, second: Run, theirs: ScoredImages) -> ScoredImages:
    """The second run's images in the order of the first's, or RunError."""
    _require_same_test(first, ours, second, theirs)
    theirs = theirs.take(pd.Index(theirs.image_ids).get_indexer(pd.Index(ours.image_ids)))
    if ours.folds is not None and theirs.folds is not None:
        pairs = {*zip(ours.folds.tolist(), theirs.folds.tolist(), strict=True)}
        if len(pairs) > len(set(ours.folds)) or len(pairs) > len(set(theirs.folds)):
            raise RunError(
                f"{first.path} and {second.path} have other outer folds, so that their figures "
                "are of other groups of images. Train both with the same --outer-folds, --seed "
                "and labels."
            )
    for what, mine, other in (
        ("targets", ours.targets, theirs.targets),
        ("studies", ours.study_uids[:, None], theirs.study_uids[:, None]),
    ):
        differs = ((mine != other) & ((mine == mine) | (other == other))).any(axis=1)
        if differs.any():
            raise RunError(
                f"{first.path} and {second.path} were tested on other {what} for "
                f"{differs.sum():,} of {_count_rows(ours)}, the first is "
                f"{ours.image_ids[differs.argmax()]!r}. Train both with the same labels."
            )
    return theirs


def _count_rows(images: ScoredImages) -> str:
    return count(len(images), "image" if images.rows == "images" else "study")


def _share_patients(images: Sequence[Sequence[ScoredImages]]) -> list[list[ScoredImages]]:
    """All runs with the patients of the first that names any; those of old versions name none."""
    known = (of_run[0].patient_ids for of_run in images if of_run[0].unit != "study")
    patient_ids = next(known, images[0][0].patient_ids)
    return [[replace(each, patient_ids=patient_ids) for each in of_run] for of_run in images]


def _require_same_test(first: Run, ours: ScoredImages, second: Run, theirs: ScoredImages) -> None:
    if ours.findings != theirs.findings:
        other = sorted(set(ours.findings) ^ set(theirs.findings)) or ["their order"]
        raise RunError(
            f"{first.path} and {second.path} do not have the same findings: {list_names(other)}."
        )
    shared = np.isin(ours.image_ids, theirs.image_ids).sum()
    if shared != len(ours) or len(ours) != len(theirs):
        raise RunError(
            f"{first.path} was tested on {_count_rows(ours)} and {second.path} on "
            f"{len(theirs):,}, of which {shared:,} are the same. Only runs with the same split can "
            "be compared: train with the same store and seed, or fine-tune with --from-run."
        )


@dataclass(frozen=True, eq=False)
class _Scores:
    """AUROC and AP of K runs by measure."""

    trainings: dict[str, list[FloatArray]]  # of every run, (T, F)
    resampled: dict[str, FloatArray]  # means over trainings, (R, K, F), the same resamples for all


def _score(images: Sequence[Sequence[ScoredImages]], n_resamples: int, seed: int) -> _Scores:
    ranked = [
        [rank_scores(each.targets, each.probabilities, each.folds) for each in of_run]
        for of_run in images
    ]

    def of_trainings(weights: NDArray[Any]) -> dict[str, list[FloatArray]]:  # each (R, T, F)
        pairs = [[each.auroc_and_ap(weights) for each in of_run] for of_run in ranked]
        return {
            measure: [np.stack([pair[i] for pair in of_run], axis=1) for of_run in pairs]
            for i, measure in enumerate(COMPARED)
        }

    def statistics(weights: NDArray[Any]) -> dict[str, FloatArray]:
        return {
            measure: np.stack([of_run.mean(axis=1) for of_run in of_runs], axis=1)
            for measure, of_runs in of_trainings(weights).items()
        }

    first = images[0][0]
    once = of_trainings(np.ones((1, len(first))))
    resampled = bootstrap(statistics, first.clusters, n_resamples, seed)
    return _Scores(
        {measure: [of_run[0] for of_run in of_runs] for measure, of_runs in once.items()}, resampled
    )


def describe_recipe(run: Run, *, n_resamples: int, seed: int) -> dict[str, Any]:
    """Estimate the macro AUROC and AP of a run's recipe from its trainings, as metrics.json has it.

    Each is the mean over trainings; its interval holds the test studies (or patients) and the
    training, ``std`` is the spread of single trainings. Empty for a run without repeats.
    """
    if not n_resamples or not run.has_table("repeats"):
        return {}
    trainings = read_trainings(run)
    scores = _score([trainings], n_resamples, seed)
    n_clusters = count_rarer_class(trainings[0].targets, trainings[0].clusters)
    described: dict[str, Any] = {"n_trainings": len(trainings)}
    for measure in COMPARED:
        [of_trainings], resampled = scores.trainings[measure], scores.resampled[measure]
        means, macros = of_trainings.mean(axis=0), macro_mean(of_trainings)
        spread = macro_error(means, resampled[:, 0], n_clusters, widen=MEASURES[measure].widen)
        error, freedom = add_training_error(
            np.array(spread.error), np.array(spread.n_clusters - 1), [macros]
        )
        interval = student_interval(macros.mean(), error, freedom + 1, "logit")
        described[f"macro_{measure}"] = {
            "value": to_number(macros.mean()),
            "low": to_number(interval.low),
            "high": to_number(interval.high),
            "std": to_number(macros.std(ddof=1)),
        }
    return described


def _tabulate(
    names: Sequence[str],
    rows: Rows,
    images: Sequence[Sequence[ScoredImages]],
    scores: _Scores,
) -> pd.DataFrame:
    """All runs but the first against the first, finding by finding and their mean."""
    targets = images[0][0].targets
    n_positive = (targets == 1).sum(axis=0)
    n_clusters = count_rarer_class(targets, images[0][0].clusters)
    parts = []
    for measure in COMPARED:
        trainings, resampled = scores.trainings[measure], scores.resampled[measure]
        of_runs = [
            tabulate_differences(
                trainings[0],
                trainings[k],
                resampled[:, k] - resampled[:, 0],
                n_clusters,
                widen=MEASURES[measure].widen,
            ).assign(run=names[k], finding=[*images[0][0].findings, MACRO])
            for k in range(1, len(names))
        ]
        part = pd.concat(of_runs, ignore_index=True).assign(measure=measure)
        is_macro = part["finding"] == MACRO
        part["p_holm"] = part["p"].groupby(is_macro).transform(holm)
        part["n_positive"] = np.tile([*n_positive, n_positive.sum()], len(of_runs))
        parts.append(part)
    whole = pd.concat(parts, ignore_index=True).assign(against=names[0], rows=rows)
    table: pd.DataFrame = whole[list(COLUMNS)]
    return table


def tabulate_differences(
    first: FloatArray,
    second: FloatArray,
    resampled: FloatArray,
    n_clusters: FloatArray,
    *,
    widen: bool = True,
) -> pd.DataFrame:
    """Differences with interval and p value, per finding and, last, of their mean, F + 1 rows.

    Parameters
    ----------
    first, second
        Figures whose difference, second minus first, is asked for, ``(F,)``; or those of several
        trainings of either recipe, ``(T, F)``, whose means are compared.
    resampled
        These differences on resampled clusters, ``(R, F)``.
    n_clusters
        Number of clusters on which each difference rests, ``(F,)``.
    widen
        As in :func:`cxr_cache.metrics.intervals.standard_errors`.
    """
    trainings = [
        np.column_stack([values, macro_mean(values)])
        for values in (np.atleast_2d(first), np.atleast_2d(second))
    ]
    first, second = (values.mean(axis=0) for values in trainings)
    difference = second - first
    n_undefined = np.isnan(resampled).sum(axis=0)
    of_macro = macro_error(difference[:-1], resampled, n_clusters, widen=widen)
    error = np.append(standard_errors(resampled, n_clusters, widen=widen), of_macro.error)
    freedom = np.append(np.maximum(n_clusters - 1, 1.0), of_macro.n_clusters - 1)
    if min(map(len, trainings)) > 1:
        error, freedom = add_training_error(error, freedom, trainings)
    error = drop_rounding(difference, error)
    with np.errstate(invalid="ignore"):
        t = np.where(difference == 0, 0.0, np.abs(difference) / error)
    reach = stdtrit(freedom, (1 + LEVEL) / 2) * error
    table: pd.DataFrame = pd.DataFrame(
        {
            "first": first,
            "second": second,
            "difference": difference,
            "low": np.maximum(difference - reach, -1),  # no two shares differ by more
            "high": np.minimum(difference + reach, 1),
            "p": np.where(np.isnan(error), np.nan, 2 * stdtr(freedom, -t)),
            "n_undefined_resamples": np.append(n_undefined, n_undefined.sum()),
        }
    )
    return table


def holm(p: pd.Series[float]) -> pd.Series[float]:
    """P values corrected for their number by Holm's step-down method; NaN is no test and stays."""
    order = p.dropna().sort_values(kind="stable")
    factors = np.arange(len(order), 0, -1)
    return (order * factors).cummax().clip(upper=1).reindex(p.index)
