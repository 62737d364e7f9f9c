"""Many recipes on the same folds: a ranked table, with baselines and paired differences."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from joblib import cpu_count

from cxr_cache.common.backends import open_backend, streams_results
from cxr_cache.common.tables import write_table
from cxr_cache.common.wording import count, first_lines, suggest
from cxr_cache.config import TrainConfig, kinds, option_of
from cxr_cache.datasets.cohort import Cohort
from cxr_cache.datasets.splits import Split
from cxr_cache.errors import ConfigError
from cxr_cache.metrics.intervals import (
    auroc_influence,
    clustered_error,
    count_rarer_class,
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
from cxr_cache.training.ablation_folds import Method, Results, Setting, train_folds
from cxr_cache.training.baselines import BASELINES, Baseline
from cxr_cache.training.fit import PlainRows
from cxr_cache.training.search import require_trainable_folds, split_cohort, weigh_findings

logger = logging.getLogger(__name__)

TABLE: Final = "ablation.csv"


@dataclass(frozen=True, eq=False)
class Ablation:
    """What an ablation found."""

    table: pd.DataFrame
    """One row per setting and baseline, the best first: rank, setting, kind, chosen, mean_auroc,
    std_auroc, fold_1 ... fold_K, difference, low, high, seconds."""
    settings: tuple[Setting, ...]
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

    def to_text(self, n_shown: int = 20) -> str:
        """The best settings and every baseline, for a terminal."""
        table = self.table
        n_before = (table["kind"] == "head").cumsum()
        shown = table[(table["kind"] == "baseline") | (n_before <= n_shown)]
        width = max(len("setting"), *(len(str(label)) for label in shown["setting"]))
        lines = [
            f"Ranked by {self.measure}, mean and spread over folds",
            f"{'rank':>4}  {'setting':<{width}}  {'chosen':>7}  AUROC over folds         "
            "difference to the first setting",
        ]
        for row in shown.to_dict("records"):
            bounds = f"[{row['low']:+.4f}, {row['high']:+.4f}]" if row["difference"] else ""
            bounds = "[no interval]" if np.isnan(row["low"]) else bounds
            lines.append(
                f"{row['rank']:>4}  {row['setting']:<{width}}  {row['chosen']:>7}  "
                f"{row['mean_auroc']:.4f} ± {row['std_auroc']:.4f}          "
                f"{row['difference']:+.4f} {bounds}"
            )
        if len(shown) < len(table):
            lines.append(f"      ... and {len(table) - len(shown):,} more in the table.")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def run_ablation(
    store_path: StorePaths,
    out: str | Path,
    settings: Sequence[Setting],
    *,
    labels: Path | None = None,
    allow_pending: bool = False,
    baselines: Sequence[Baseline] = BASELINES,
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
        Folder for ``ablation.csv`` and what was finished.
    settings
        From :func:`make_settings`; the others are compared with the first.
    labels, allow_pending
        As in :func:`cxr_cache.training.train.fit_run`.
    baselines
        Models to put into the table.
    backend, n_workers, scheduler
        Where to train, see :func:`cxr_cache.common.backends.open_backend`; one worker per core by
        default. On a GPU, settings that can are trained side by side in this process instead.
    on_progress
        Called with (folds done, folds to do), over all settings.

    Raises
    ------
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
    methods = [Method.of_setting(setting) for setting in settings]
    methods += _make_baselines(baselines, settings)
    with open_stores(store_path) as stores:
        is_random = any(bool(store.header.encoder.get("is_random")) for store in stores)
        found = find_labelled_rows(
            stores[0], further=stores[1:], labels=labels, allow_pending=allow_pending
        )
        sources = ((stores[0], found.rows), *found.further)
        split = split_cohort(found.cohort, base)
        weighing = weigh_findings(found.cohort.targets, found.cohort.groups, split, base.select_by)
        views: dict[str, None] = {}
        for setting in settings:
            require_trainable_folds(found.cohort.targets, split, setting.config)
            read = [stores[i] for i in setting.stores]
            for store in read:
                require_features(store, setting.config)
            views |= dict.fromkeys(note_views(read, setting.config))
        results = Results.open(out, _identify(sources, found.cohort, split), split.n_folds)
        folds = range(split.n_folds)
        todo = [method for method in methods if not results.has(method)]
        n_done = sum(results.has(method, k) for method in methods for k in folds)
        n_all = len(methods) * split.n_folds
        on_progress(n_done, n_all)
        n_workers = n_workers or cpu_count()
        for methods_of_data in _by_data(todo, base):
            config = methods_of_data[0].config or base
            first, *others = (sources[i] for i in methods_of_data[0].stores)
            embeddings = read_features(*first, config, others)
            missing = [(m, k) for m in methods_of_data for k in folds if not results.has(m, k)]
            trained = train_folds(
                PlainRows(embeddings, found.cohort.targets),
                missing,
                split=split,
                base=base,
                weighing=weighing,
                open_pool=partial(open_backend, backend, n_workers=n_workers, scheduler=scheduler),
                streams=streams_results(backend),
            )
            with closing(trained):  # a failed disk ends the workers too
                for fold in trained:
                    results.add(fold)
                    logger.info("Fold %s of %s is finished", fold.fold + 1, fold.key)
                    n_done += 1
                    on_progress(n_done, n_all)
    table = _tabulate(methods, results, found.cohort, split, weighing.weights)
    write_table(out / TABLE, table, digits=6)
    notes = (*found.notes, *views, *split.notes, *_describe_horizons(settings))
    return Ablation(table, tuple(settings), notes, is_random, weighing.measure)


# -- what there is to do ----------------------------------------------------------------


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


def _make_baselines(baselines: Sequence[Baseline], settings: Sequence[Setting]) -> list[Method]:
    """Every baseline on all that some setting reads; prevalence alone reads nothing."""
    base = settings[0].config
    read = {setting.stores: setting.varied.get("store") for setting in settings}
    methods = []
    for baseline in baselines:
        method = Method.of_baseline(baseline, base)
        for stores, name in list(read.items())[: None if baseline.knob else 1]:
            label = f"{method.label} store={name}" if name and baseline.knob else method.label
            methods.append(replace(method, stores=stores, label=label))
    return methods


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


# -- the table --------------------------------------------------------------------------


def _tabulate(
    methods: Sequence[Method],
    results: Results,
    cohort: Cohort,
    split: Split,
    weights: FloatArray,
) -> pd.DataFrame:
    """Every method against the first, by influence: a bootstrap of each would cost its training."""
    first, rows, first_influence = results.load(methods[0]), [], None
    groups = cohort.groups[~split.is_test]
    n_clusters = count_rarer_class(cohort.targets[~split.is_test], groups)
    for method in methods:
        finished = results.load(method)
        influence = np.zeros(cohort.targets.shape)
        for k, probabilities in enumerate(finished.probabilities):
            held_out = split.held_out(k)
            of_fold = auroc_influence(cohort.targets[held_out], probabilities)
            counted = weights * has_both_classes(cohort.targets[held_out])
            influence[held_out] = of_fold * counted / counted.sum() / split.n_folds
        first_influence = influence if first_influence is None else first_influence
        difference = float(finished.aurocs.mean() - first.aurocs.mean())
        of_difference = (influence - first_influence)[~split.is_test]
        spread = clustered_error(of_difference, groups, n_clusters)
        interval = student_interval(np.array(difference), *spread, "identity")
        rows.append(
            {
                "setting": method.label,
                "kind": "head" if method.baseline is None else "baseline",
                "chosen": _describe_choice(method, finished.chosen),
                "mean_auroc": finished.aurocs.mean(),
                "std_auroc": finished.aurocs.std(ddof=1),
                **{f"fold_{k}": value for k, value in enumerate(finished.aurocs, start=1)},
                "difference": difference,
                "low": float(interval.low),
                "high": float(interval.high),
                "seconds": finished.seconds,
            }
        )
    table: pd.DataFrame = pd.DataFrame(rows)
    table = table.sort_values("mean_auroc", ascending=False, kind="stable", ignore_index=True)
    table.insert(0, "rank", range(1, len(table) + 1))
    return table


def _describe_choice(method: Method, chosen: int) -> str:
    if method.baseline is None:
        return f"{method.candidates[chosen]} ep"
    return f"{method.baseline.knob}={method.candidates[chosen]}" if method.baseline.knob else ""


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
    *("n_folds", "test_fraction", "split", "split_by", "seed", "device", "n_jobs"),
    *("final", "threshold_rule", "min_positives", "calibration", "baseline"),
    *("select_by", "within_one_se"),
)
"""What all settings have in common: the folds, and what comes after the comparison."""
_OF_ABLATE: Final = {name: f"--{name.replace('_', '-')}" for name in _SHARED[:6]} | {
    **{"n_folds": "--folds", "n_jobs": "--workers", "select_by": "--select-by"}
}
"""Those of them that are options of `ablate`; the others are the recipe's."""
_FLAGS: Final = {
    option_of(field).flag.strip("-").replace("-", "_"): field.name for field in fields(TrainConfig)
}
"""Field of every option whose flag is another word, such as ``lr``."""
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
    has everything that they do not name. `n_sampled` takes so many at random by `seed`, the first
    among them; None takes all.

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
        differing = {name: written[name] for name in varied}
        settings.append(Setting(replace(base, **parsed), differing, which))
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
    allowed = [f.name for f in fields(TrainConfig) if f.name not in _SHARED]
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
    kind = kinds(TrainConfig)[_field(name)]
    if text == "none" and (kind.is_optional or kind.is_many):
        return () if kind.is_many else None
    parse = _parse_bool if kind.type is bool else kind.type
    try:
        return tuple(map(parse, text.split("x"))) if kind.is_many else parse(text)
    except ValueError as error:
        raise ConfigError(f"--set {name}: {text!r} is not a value for it ({error}).") from error


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false"):
        raise ValueError("yes or no")
    return text.lower() in ("yes", "true")
