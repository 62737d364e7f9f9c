"""Many recipes on the same folds: a ranked table, and a curve over numbers of training images."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from joblib import cpu_count
from numpy.typing import NDArray

from cxr_cache.common.backends import open_backend, streams_results
from cxr_cache.common.manifest import mark_written
from cxr_cache.common.tables import write_table
from cxr_cache.common.wording import count, first_lines, suggest
from cxr_cache.config import TrainConfig, kinds, option_of
from cxr_cache.datasets.cohort import UNITS, Cohort
from cxr_cache.datasets.splits import Split
from cxr_cache.errors import ConfigError
from cxr_cache.metrics.intervals import (
    auroc_influence,
    clustered_error,
    count_rarer_class,
    pool_clusters,
    student_interval,
)
from cxr_cache.metrics.scores import FloatArray, has_both_classes
from cxr_cache.store.rows import (
    find_labelled_rows,
    note_views,
    read_features,
    require_features,
)
from cxr_cache.store.side_by_side import Source, StorePaths, list_stores, open_stores
from cxr_cache.training.ablation_folds import (
    Amount,
    Draw,
    Method,
    Results,
    Setting,
    draw_tasks,
    name_amount,
    train_folds,
)
from cxr_cache.training.baselines import BASELINES, Baseline
from cxr_cache.training.fit import PlainRows
from cxr_cache.training.search import require_trainable_folds, split_rows, weigh_findings

logger = logging.getLogger(__name__)

TABLE: Final = "ablation.csv"
CURVE: Final = "curve.csv"


@dataclass(frozen=True, eq=False)
class Ablation:
    """What an ablation found."""

    table: pd.DataFrame
    """One row per setting and baseline, the best first: rank, setting, kind, chosen, mean_auroc,
    std_auroc (over folds), fold_1 ... fold_K, difference, low, high, seconds; and, of several
    repeats, repeats and std_repeats. With several numbers of training images, it is that of the
    most images."""
    settings: tuple[Setting, ...]
    curve: pd.DataFrame | None = None
    """Where settings draw their training images: a row per setting and number of images, the
    fewest first: setting, kind, n_train, images (unless studies are trained on), studies, patients,
    findings_with_positive, findings_scored, chosen, mean_auroc, std_repeats, std_folds, repeat_1
    ... repeat_R, difference, low, high, seconds."""
    notes: tuple[str, ...] = ()
    is_random: bool = False
    """Whether the encoder has random weights."""
    measure: str = "macro AUROC"
    """What the settings are ranked by, in words."""

    def __repr__(self) -> str:
        return first_lines(self.to_text(n_shown=8))

    @property
    def best(self) -> Setting:
        """The setting whose mean over folds is highest, baselines left aside."""
        heads = self.table[self.table["kind"] == "head"]
        by_label = {setting.label: setting for setting in self.settings}
        return by_label[str(heads["setting"].iloc[0])]

    def to_dict(self) -> dict[str, Any]:
        """All settings for programs, the best first, and the learning curve."""
        return {
            "measure": self.measure,
            "ranking": self.table,
            "curve": self.curve,
            "notes": self.notes,
        }

    def to_text(self, n_shown: int = 20) -> str:
        """The best settings and every baseline, for a terminal."""
        table = self.table
        n_before = (table["kind"] == "head").cumsum()
        shown = table[(table["kind"] == "baseline") | (n_before <= n_shown)]
        heading = self.measure if self.measure == Ablation.measure else "AUROC"
        lines = _lay_out(
            {
                "rank": shown["rank"].map(str),
                "setting": shown["setting"],
                "chosen": shown["chosen"],
                heading: shown["mean_auroc"].map("{:.4f}".format),
                "over folds": shown["std_auroc"].map("± {:.4f}".format),
                **_describe_repeats(shown),
                "difference to the first setting": _describe_differences(shown),
            }
        )
        if self.measure != Ablation.measure:
            lines.insert(0, f"Ranked by {self.measure}")
        if len(shown) < len(table):
            lines.append(f"      ... and {len(table) - len(shown):,} more in the table.")
        if self.curve is not None:
            of_shown = self.curve[self.curve["setting"].isin(shown["setting"])]
            most = self.curve["n_train"].iloc[-1]
            lines = [
                f"On n_train={most}:",
                *lines,
                "",
                "Learning curve:",
                *_write_curve(of_shown, heading),
            ]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def run_ablation(
    store_path: StorePaths,
    out: str | Path,
    settings: Sequence[Setting],
    *,
    labels: Path | None = None,
    allow_pending: bool = False,
    baselines: Sequence[Baseline] = BASELINES,
    n_repeats: int = 1,
    backend: str = "loky",
    n_workers: int | None = None,
    scheduler: str | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Ablation:
    """Train every setting in every fold, and rank them by what they score on held-out rows.

    Test rows take no part. Finished folds are kept in `out`, where the same call goes on after an
    interruption, and a call with further settings adds to them.

    Parameters
    ----------
    store_path
        Feature store; or several stores of the same images, of which every setting reads those that
        it names. All settings train on the images that have an embedding in all of them.
    out
        Folder for ``ablation.csv``, ``curve.csv`` and what was finished.
    settings
        From :func:`make_settings`; the others are compared with the first.
    labels, allow_pending
        As in :func:`cxr_cache.training.train.fit_run`.
    baselines
        Models to put into the table.
    n_repeats
        Trainings of every fold, each with other initial weights and, where a setting says how many
        images to train on, other images.
    backend, n_workers, scheduler
        Where to train, see :func:`cxr_cache.common.backends.open_backend`; one worker per core by
        default. On a GPU, settings that can are trained side by side in this process instead.
    on_progress
        Called with (folds done, folds to do), over all settings.

    Raises
    ------
    ConfigError
        A setting asks for more training images than a fold has; both numbers are named.
    RunError
        `out` holds an ablation of other data or folds; both values are named.
    StoreFormatError
        The store lacks features that one of the settings reads.
    StoreMismatchError
        Two stores hold other images, files or labels.
    ConfigError
        A store is read by no setting.
    TrainingError
        A setting diverges; it is named.

    Examples
    --------
    >>> settings = make_settings(TrainConfig(), ["lr=3e-4,1e-3", "hidden=512x256,256"])
    >>> len(settings)
    4
    >>> ablation = run_ablation("features.h5", "ablation", settings)  # doctest: +SKIP
    >>> ablation.table.head()  # doctest: +SKIP
    """
    out, base = Path(out), settings[0].config
    _require_all_read(store_path, settings)
    with open_stores(store_path) as stores:
        is_random = any(bool(store.header.encoder.get("is_random")) for store in stores)
        found = find_labelled_rows(
            stores[0],
            further=stores[1:],
            labels=labels,
            allow_pending=allow_pending,
            level=base.level,
        ).by(base.level)
        sources = ((stores[0], found.rows), *found.further)
        split = split_rows(found.cohort, found.studies, base)
        views: dict[str, None] = {}
        for setting in settings:
            require_trainable_folds(found.cohort.targets, split, setting.config)
            read = [stores[i] for i in setting.stores]
            for store in read:
                require_features(store, setting.config)
            views |= dict.fromkeys(note_views(read, setting.config))
        rows = _plan(settings, baselines, base, found.cohort, split, n_repeats)
        methods = list({method.key: method for row in rows for method in row.methods}.values())
        results = Results.open(out, _identify(sources, found.cohort, split), split.n_folds)
        mark_written(out)
        folds = range(split.n_folds)
        todo = [method for method in methods if not results.has(method)]
        n_done = sum(results.has(method, k) for method in methods for k in folds)
        n_all = len(methods) * split.n_folds
        on_progress(n_done, n_all)
        n_workers = n_workers or cpu_count()
        for methods_of_data in _by_data(todo, base):
            config = methods_of_data[0].config or base
            first, *others = (sources[i] for i in methods_of_data[0].stores)
            embeddings = read_features(*first, config, others, found.studies)
            missing = [(m, k) for m in methods_of_data for k in folds if not results.has(m, k)]
            trained = train_folds(
                PlainRows(embeddings, found.cohort.targets),
                missing,
                device=base.device,
                open_pool=partial(open_backend, backend, n_workers=n_workers, scheduler=scheduler),
                streams=streams_results(backend),
            )
            with closing(trained):  # a failed disk ends the workers too
                for fold in trained:
                    results.add(fold)
                    logger.info("Fold %s of %s is finished", fold.fold + 1, fold.key)
                    n_done += 1
                    on_progress(n_done, n_all)
    scores = Scores(results, found.cohort, split, base.level)
    table = scores.rank([row for row in rows if row.n_train == rows[-1].n_train])
    write_table(out / TABLE, table, digits=6)
    notes, curve = (*found.notes, *views, *split.notes, *_describe_horizons(settings)), None
    if any(setting.n_train is not None for setting in settings):
        curve = scores.trace(rows)
        write_table(out / CURVE, curve, digits=6)
        notes += (_describe_draws(split, base.level), *_describe_short(settings, curve))
    weighing = rows[0].methods[0].draw.weighing
    measure = Ablation.measure if weighing is None else weighing.measure
    return Ablation(table, tuple(settings), curve, notes, is_random, measure)


# -- what there is to do ----------------------------------------------------------------


class Row(NamedTuple):
    """A row of the tables: a setting or a baseline, on so many images."""

    label: str
    n_train: Amount
    n_images: float
    """Images drawn, mean over folds and repeats."""
    methods: list[Method]
    """One per repeat."""


def _plan(
    settings: Sequence[Setting],
    baselines: Sequence[Baseline],
    base: TrainConfig,
    cohort: Cohort,
    split: Split,
    n_repeats: int,
) -> list[Row]:
    """Every row, those of the fewest images first; settings before baselines."""
    groups = cohort.groups if base.split_by == "study" else np.arange(len(cohort))
    weighing = weigh_findings(cohort.targets, cohort.groups, split, base.select_by)
    rows: list[Row] = []
    for n_train in dict.fromkeys(setting.n_train for setting in settings):
        options = (split, groups, base.seed, n_train)
        draws = [draw_tasks(*options, r, weighing, base.level) for r in range(n_repeats)]
        n_images = float(np.mean([len(task.train_rows) for d in draws for task in d.tasks]))
        makers: list[tuple[str, Callable[[Draw], Method]]] = [
            (setting.label, partial(Method.of_setting, setting))
            for setting in settings
            if setting.n_train == n_train
        ]
        makers += [
            (label, partial(Method.of_baseline, baseline, base, stores=stores))
            for label, baseline, stores in _list_baselines(baselines, settings)
        ]
        rows += [Row(name, n_train, n_images, [make(d) for d in draws]) for name, make in makers]
    return sorted(rows, key=lambda row: row.n_images)


def _by_data(methods: Sequence[Method], base: TrainConfig) -> list[list[Method]]:
    """Methods that read the same prepared embeddings; baselines read those of `base`."""
    groups: dict[tuple[Any, ...], list[Method]] = {}
    for method in methods:
        config = method.config or base
        what_is_read = (method.stores, config.features, config.flip, config.input_norm == "l2")
        groups.setdefault(what_is_read, []).append(method)
    return list(groups.values())


def _require_all_read(paths: StorePaths, settings: Sequence[Setting]) -> None:
    read = {i for setting in settings for i in setting.stores}
    if idle := [str(path) for i, path in enumerate(list_stores(paths)) if i not in read]:
        raise ConfigError(
            f"{idle[0]} is given, and no setting reads it. Leave it out, or name it in --set store="
            "..., with + between stores that are read side by side."
        )


def _list_baselines(
    baselines: Sequence[Baseline], settings: Sequence[Setting]
) -> Iterator[tuple[str, Baseline, tuple[int, ...]]]:
    """Every baseline on all that some setting reads; prevalence alone reads nothing."""
    read = {setting.stores: setting.varied.get(_STORE) for setting in settings}
    for baseline in baselines:
        for stores, name in list(read.items())[: None if baseline.knob else 1]:
            label = f"{baseline.label} store={name}" if name and baseline.knob else baseline.label
            yield label, baseline, stores


def _identify(sources: Sequence[Source], cohort: Cohort, split: Split) -> dict[str, Any]:
    """What all results in a folder must have in common, JSON-able."""
    digest = hashlib.sha256()
    for array in (np.char.encode(cohort.image_ids, "utf-8"), cohort.targets):
        digest.update(np.ascontiguousarray(array).data)
    for store, rows in sources:
        digest.update(store.read_rows("row_digest", rows).data)
    return {
        "encoder": ", ".join(store.header.encoder["name"] for store, _ in sources),
        "n_images": len(cohort),
        "data_sha256": digest.hexdigest()[:16],
        "n_folds": split.n_folds,
        "split_sha256": hashlib.sha256(split.fold.tobytes()).hexdigest()[:16],
    }


# -- the tables -------------------------------------------------------------------------


class Scored(NamedTuple):
    """What a row of the tables scored."""

    chosen: str
    aurocs: NDArray[np.float64]
    """Mean AUROC of every repeat and fold, as findings are weighed, ``(R, K)``."""
    influence: NDArray[np.float64]
    """Of every image on their mean, by finding, ``(N, F)``."""
    seconds: float

    @property
    def std_repeats(self) -> float:
        """Standard deviation over repeats of the mean over folds; NaN of a single one."""
        return _deviation(self.aurocs.mean(axis=1))


@dataclass(frozen=True)
class Scores:
    """What is finished, ready to be put into tables."""

    results: Results
    cohort: Cohort
    split: Split
    level: str = "image"
    """What a row of the cohort is."""

    def rank(self, rows: Sequence[Row]) -> pd.DataFrame:
        """Every row against the first, the best first."""
        first, ranked = self._score(rows[0]), []
        for row in rows:
            scored = self._score(row)
            folds = scored.aurocs.mean(axis=0)
            n_repeats = len(row.methods)
            repeats = {"repeats": n_repeats, "std_repeats": scored.std_repeats}
            ranked.append(
                {
                    "setting": row.label,
                    "kind": row.methods[0].kind,
                    "chosen": scored.chosen,
                    "mean_auroc": folds.mean(),
                    "std_auroc": _deviation(folds),
                    **(repeats if n_repeats > 1 else {}),
                    **{f"fold_{k}": value for k, value in enumerate(folds, start=1)},
                    **self._compare(scored, first),
                    "seconds": scored.seconds,
                }
            )
        table: pd.DataFrame = pd.DataFrame(ranked)
        table = table.sort_values("mean_auroc", ascending=False, kind="stable", ignore_index=True)
        table.insert(0, "rank", range(1, len(table) + 1))
        return table

    def trace(self, rows: Sequence[Row]) -> pd.DataFrame:
        """Every row against the same setting on the most images, setting by setting.

        Prevalence, which learns nothing, is 0.5 on any number of images and left out.
        """
        traced, learning = [], [row for row in rows if row.methods[0].candidates != ("",)]
        for label in dict.fromkeys(row.label for row in learning):
            of_label = [row for row in rows if row.label == label]
            most = self._score(of_label[-1])
            for row in of_label:
                scored = self._score(row)
                repeats = scored.aurocs.mean(axis=1)
                traced.append(
                    {
                        "setting": label,
                        "kind": row.methods[0].kind,
                        "n_train": name_amount(row.n_train),
                        **self._count_drawn(row),
                        "chosen": scored.chosen,
                        "mean_auroc": repeats.mean(),
                        "std_repeats": scored.std_repeats,
                        "std_folds": _deviation(scored.aurocs.mean(axis=0)),
                        **{f"repeat_{r}": value for r, value in enumerate(repeats, start=1)},
                        **self._compare(scored, most),
                        "seconds": scored.seconds,
                    }
                )
        table: pd.DataFrame = pd.DataFrame(traced)
        return table

    def _score(self, row: Row) -> Scored:
        finished = [self.results.load(method) for method in row.methods]
        influence = np.zeros(self.cohort.targets.shape)
        for k in range(self.split.n_folds):
            held_out = self.split.held_out(k)
            targets = self.cohort.targets[held_out]
            counted = has_both_classes(targets) * _weights_of(row.methods[0])
            share = counted / max(counted.sum(), 1e-12) / self.split.n_folds / len(finished)
            for repeat in finished:
                influence[held_out] += auroc_influence(targets, repeat.probabilities[k]) * share
        return Scored(
            _describe_choices(row.methods[0], sorted({repeat.chosen for repeat in finished})),
            np.stack([repeat.aurocs for repeat in finished]),
            influence,
            sum(repeat.seconds for repeat in finished),
        )

    def _compare(self, ours: Scored, theirs: Scored) -> dict[str, float]:
        """Difference with its interval, by influence: a bootstrap would cost as much as training.

        The interval is over patients (or studies) and, of several repeats, over these too.
        """
        trained = ~self.split.is_test
        groups, by_repeat = self.cohort.groups[trained], (ours.aurocs - theirs.aurocs).mean(axis=1)
        n_clusters = count_rarer_class(self.cohort.targets[trained], groups)
        influence = (ours.influence - theirs.influence)[trained]
        error, n = clustered_error(influence, groups, n_clusters)
        if len(by_repeat) > 1:
            variances = np.array([error**2, by_repeat.var(ddof=1) / len(by_repeat)])
            n = pool_clusters(variances, np.array([n, len(by_repeat)]))
            error = math.sqrt(variances.sum())
        difference = np.array(by_repeat.mean())
        low, high = student_interval(difference, error, n, "identity")
        return {"difference": float(difference), "low": float(low), "high": float(high)}

    def _count_drawn(self, row: Row) -> dict[str, float]:
        """How much was drawn, and what can be learned from it; means over folds and repeats."""
        cohort, counts = self.cohort, []
        for method in row.methods:
            for k, task in enumerate(method.draw.tasks):
                drawn, held_out = task.train_rows, cohort.targets[self.split.held_out(k)]
                is_scored = has_both_classes(held_out) & (_weights_of(method) > 0)
                counts.append(
                    {
                        **({"images": len(drawn)} if self.level == "image" else {}),
                        "studies": len(np.unique(cohort.study_uids[drawn])),
                        "patients": len(set(cohort.patient_ids[drawn].tolist()) - {""}),
                        "findings_with_positive": (
                            (cohort.targets[drawn] == 1).any(axis=0) & is_scored
                        ).sum(),
                        "findings_scored": is_scored.sum(),
                    }
                )
        return {name: float(np.mean([one[name] for one in counts])) for name in counts[0]}


def _weights_of(method: Method) -> FloatArray:
    """How much each finding counts in its scores, ``(F,)`` or the same for all, ``()``."""
    weighing = method.draw.weighing
    return np.ones(()) if weighing is None else weighing.weights


def _deviation(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def _describe_choices(method: Method, chosen: Sequence[int]) -> str:
    """The candidate of all repeats, or the smallest and the largest of them."""
    ends = "-".join(dict.fromkeys(str(method.candidates[c]) for c in (chosen[0], chosen[-1])))
    if method.baseline is None:
        return f"{ends} ep"
    return f"{method.baseline.knob}={ends}" if method.baseline.knob else ""


# -- tables as text ---------------------------------------------------------------------


def _write_curve(curve: pd.DataFrame, heading: str) -> list[str]:
    """The curve as lines; what was drawn is a mean over folds and repeats."""
    positive, scored = (
        curve[name].map("{:.1f}".format) for name in ("findings_with_positive", "findings_scored")
    )
    differences = _describe_differences(curve)
    most = curve["n_train"].iloc[-1]
    return _lay_out(
        {
            **{name: curve[name] for name in ("setting", "n_train")},
            **{
                name: curve[name].map("{:,.0f}".format)
                for name in ("images", "studies", "patients")
                if name in curve and curve[name].any()
            },
            "findings with a positive": positive + " of " + scored,
            "chosen": curve["chosen"],
            heading: curve["mean_auroc"].map("{:.4f}".format),
            **_describe_repeats(curve),
            "over folds": curve["std_folds"].map("± {:.4f}".format),
            f"difference to {most}": differences.where(curve["n_train"] != most, ""),
        }
    )


def _describe_repeats(table: pd.DataFrame) -> dict[str, pd.Series[str]]:
    """The column of the spread over repeats; none of a single one."""
    if "std_repeats" not in table or table["std_repeats"].isna().all():
        return {}
    return {"over repeats": table["std_repeats"].map("± {:.4f}".format)}


def _describe_differences(table: pd.DataFrame) -> pd.Series[str]:
    columns = zip(table["difference"], table["low"], table["high"], strict=True)
    words = [
        f"{difference:+.4f} "
        + ("[no interval]" if math.isnan(low) else f"[{low:+.4f}, {high:+.4f}]")
        if difference
        else ""
        for difference, low, high in columns
    ]
    return pd.Series(words, table.index)


def _lay_out(columns: Mapping[str, Iterable[str]]) -> list[str]:
    """A heading and a line per row, cells to the right except for the settings' names."""
    aligned = []
    for heading, cells in columns.items():
        cells = [heading, *cells]
        width = max(map(len, cells))
        is_text = heading == "setting" or heading.startswith("difference")
        aligned.append([cell.ljust(width) if is_text else cell.rjust(width) for cell in cells])
    return ["  ".join(line).rstrip() for line in zip(*aligned, strict=True)]


def _describe_draws(split: Split, level: str) -> str:
    rows = UNITS["study"] if level == "study" else "images"
    whole = "single images" if split.by == "image" else "whole patients (or studies)"
    return (
        f"n_train counts {rows}, of {whole} that are drawn at random. Every number is scored on "
        f"the same {rows} and findings, also on those without a positive among the drawn {rows}, "
        f"which cannot be learned. An epoch takes as many steps as on all {rows}."
    )


def _describe_short(settings: Sequence[Setting], curve: pd.DataFrame) -> tuple[str, ...]:
    """Say where a smaller number of epochs should be tried."""
    all_epochs = {setting.label: setting.config.epochs for setting in settings}
    fewest = {label: f"{epochs[0]} ep" for label, epochs in all_epochs.items() if epochs[0] > 1}
    n = sum(
        chosen == fewest.get(label)
        for label, chosen in zip(curve["setting"], curve["chosen"], strict=True)
    )
    if not n:
        return ()
    return (
        f"{count(n, 'row')} of the curve {'is' if n == 1 else 'are'} best at the smallest number "
        "of epochs that was tried. Add smaller ones to --epochs.",
    )


def _describe_horizons(settings: Sequence[Setting]) -> tuple[str, ...]:
    """Say why some settings took longer."""
    n = sum(setting.config.has_horizon and len(setting.config.epochs) > 1 for setting in settings)
    if not n:
        return ()
    return (
        f"{count(n, 'setting')} {'has' if n == 1 else 'have'} a schedule that depends on the "
        "number of epochs, so that every candidate number was trained by itself.",
    )


# -- text of options to settings --------------------------------------------------------

_SHARED: Final = (
    *("n_folds", "test_fraction", "split", "split_by", "level", "seed", "device", "n_jobs"),
    *("final", "threshold_rule", "min_positives", "calibration", "baseline"),
    *("select_by", "within_one_se", "protocol", "n_outer_folds"),
)
"""What all settings have in common: the folds, and what comes after the comparison."""
_OF_ABLATE: Final = {name: f"--{name.replace('_', '-')}" for name in _SHARED[:7]} | {
    **{"n_folds": "--folds", "n_jobs": "--workers", "select_by": "--select-by"}
}
"""Those of them that are options of `ablate`; the others are the recipe's."""
_FLAGS: Final = {
    option_of(field).flag.strip("-").replace("-", "_"): field.name for field in fields(TrainConfig)
}
"""Field of every option whose flag is another word, such as ``lr``."""
_N_TRAIN: Final = "n_train"
"""The one thing to set that is no option of `train`."""
_LARGEST_GRID: Final = 10_000
_STORE: Final = "store"
"""The option that says which of several stores are read."""


def make_settings(
    base: TrainConfig,
    options: Sequence[str],
    *,
    n_sampled: int | None = None,
    seed: int = 0,
    stores: Sequence[str | Path] = (),
) -> list[Setting]:
    """Every combination of the options' values, the first values first, or a sample of them.

    Options are ``NAME=VALUE,VALUE...``, with widths and epoch candidates joined by ``x``; `base`
    has everything that they do not name. ``n_train`` says how many images the folds train on: a
    number, a share such as ``10%``, or ``all``. `n_sampled` takes so many combinations of the other
    options at random by `seed`, the first among them; None takes all.

    Of several `stores`, ``store=a,b,a+b`` says which are read, by the names of their files without
    ending. Where that is not given, settings read each store by itself, and then all side by side.

    Raises
    ------
    ConfigError
        An option or value is unknown or out of range, or there are too many combinations.
    """
    choices: dict[str, list[str]] = {}
    names = _name_stores(stores)
    if len(names) > 1 and not any(option.partition("=")[0].strip() == _STORE for option in options):
        choices[_STORE] = [*names, "+".join(names)]
    for option in options:
        name, listed = _parse_option(option, names)
        if _field(name) in map(_field, choices):
            raise ConfigError(f"--set {option}: {name} was given before. List all values at once.")
        choices[name] = listed
    amounts = [_parse_value(_N_TRAIN, text) for text in choices.pop(_N_TRAIN, ["all"])]
    n_settings = math.prod(map(len, choices.values()))
    if n_settings > _LARGEST_GRID and n_sampled is None:
        raise ConfigError(
            f"--set makes {n_settings:,} settings. Use --sample N to try some of them, or fewer "
            "values."
        )
    combinations = itertools.product(*choices.values())
    if n_sampled is not None and n_sampled < n_settings:
        others = np.random.default_rng(seed).choice(n_settings - 1, n_sampled - 1, replace=False)
        combinations = (_nth(choices, n) for n in [0, *sorted(others + 1)])  # type: ignore[assignment]
    varied = [name for name, values in choices.items() if len(values) > 1]
    settings = []
    for combination in combinations:
        written = dict(zip(choices, combination, strict=True))
        parsed = {_field(name): _parse(name, text, names) for name, text in written.items()}
        which = parsed.pop(_STORE, (0,))
        config = replace(base, **parsed)
        differing = {name: written[name] for name in varied}
        settings += [Setting(config, differing, which, n_train) for n_train in amounts]
    return settings


def _name_stores(paths: Sequence[str | Path]) -> list[str]:
    """Names of the files without ending, or paths where two files share theirs."""
    names = [Path(path).stem for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _nth(choices: Mapping[str, Sequence[str]], n: int) -> tuple[str, ...]:
    """Combination `n`, in the order in which itertools.product counts."""
    places = np.unravel_index(n, [len(values) for values in choices.values()])
    return tuple(values[int(i)] for values, i in zip(choices.values(), places, strict=True))


def _parse_option(option: str, stores: Sequence[str]) -> tuple[str, list[str]]:
    name, equals, values = option.partition("=")
    name = name.strip().replace("-", "_")
    listed = [value.strip() for value in values.split(",")]
    if not equals or not all(listed):
        raise ConfigError(f"--set {option}: write NAME=VALUE,VALUE, such as lr=1e-4,1e-3.")
    if len({_parse(name, value, stores) for value in listed}) < len(listed):
        raise ConfigError(f"--set {option}: a value is given twice.")
    return name, listed


def _field(name: str) -> str:
    """The field that an option means, if settings may differ in it."""
    field = _FLAGS.get(name, name)
    if field == _STORE:
        return field
    allowed = [_N_TRAIN, *(f.name for f in fields(TrainConfig) if f.name not in _SHARED)]
    if field in _SHARED:
        instead = (
            f"Use {_OF_ABLATE[field]} instead." if field in _OF_ABLATE else "It is the recipe's."
        )
        raise ConfigError(f"--set {name}: all settings share it. {instead}")
    if field not in allowed:
        hint = suggest(name, [*_FLAGS, *allowed]) or f" Choose from {', '.join(allowed)}."
        raise ConfigError(f"--set {name}: there is no such option.{hint}")
    return field


def _parse(name: str, text: str, stores: Sequence[str]) -> Any:
    """A value of an option of train; of ``store``, the numbers of the stores with + between."""
    if name != _STORE:
        return _parse_value(name, text)
    if unknown := [part for part in text.split("+") if part not in stores]:
        raise ConfigError(
            f"--set store={text}: there is no store {unknown[0]!r}. Choose from "
            f"{', '.join(stores)}, and join those that are read side by side with +."
        )
    chosen = tuple(map(stores.index, text.split("+")))
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"--set store={text}: a store is named twice.")
    return chosen


def _parse_value(name: str, text: str) -> Any:
    """A value of the kind that the option takes; widths and epochs are joined by ``x``."""
    if name == _N_TRAIN:
        return _parse_amount(text)
    kind = kinds(TrainConfig)[_field(name)]
    if text == "none" and (kind.is_optional or kind.is_many):
        return () if kind.is_many else None
    parse = _parse_bool if kind.type is bool else kind.type
    try:
        return tuple(map(parse, text.split("x"))) if kind.is_many else parse(text)
    except ValueError as error:
        raise ConfigError(f"--set {name}: {text!r} is not a value for it ({error}).") from error


def _parse_amount(text: str) -> Amount:
    """``all`` and ``100%`` are None, other shares lie below 1."""
    number, percent, rest = text.partition("%")
    try:
        amount = float(number) / 100 if percent else int(number)
    except ValueError:
        amount = 0
    if text == "all" or (percent and amount == 1):
        return None
    if rest or not (0 < amount < 1 if percent else amount >= 1):
        raise ConfigError(
            f"--set n_train: {text!r} is no number of images; write a whole number from 1, a share "
            "such as 10%, or all."
        )
    return amount


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false"):
        raise ValueError("yes or no")
    return text.lower() in ("yes", "true")
