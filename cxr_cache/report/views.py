"""Runs' tables -> what their page shows: curves thinned, blanks as None; computes no figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd

from cxr_cache.common.manifest import read_manifest
from cxr_cache.datasets.collections.labelling import say_whose_labels
from cxr_cache.datasets.flow import parse_flow
from cxr_cache.evaluation.compare import MACRO, Comparison, Rows
from cxr_cache.evaluation.composition import WRITTEN
from cxr_cache.evaluation.curves import MAX_POINTS, POOLED
from cxr_cache.evaluation.evaluate import find_few
from cxr_cache.evaluation.figures import MEASURES
from cxr_cache.evaluation.matching import name_data_set_of_run
from cxr_cache.metrics.scores import CONFUSION_COLUMNS
from cxr_cache.models.run import FINAL_FOLD, Run, TableName
from cxr_cache.models.split_reads import SplitReads

POINTS_OF_ALL_CURVES: Final = 30_000
"""What a page draws at most: about 0.7 MB, however many findings and runs there are."""
MIN_POINTS: Final = 20
MAX_BAND_POINTS: Final = 40
"""Places at which the bands of a curve are drawn."""
MAX_EPOCHS: Final = 150
"""Epochs of one fold that a page draws; of more, evenly spaced ones."""

_DIGITS: Final = 4  # a curve is a few hundred pixels wide
_CURVE_COLUMNS: Final = ("sensitivity", "specificity", "ppv")
_BAND_COLUMNS: Final = (
    *("specificity", "sensitivity_low", "sensitivity_high"),
    *("sensitivity", "ppv_low", "ppv_high"),
)
_DECISION_COLUMNS: Final = (
    *("threshold", "net_benefit", "net_benefit_low", "net_benefit_high", "treat_all"),
)
_BIN_COLUMNS: Final = ("n", "mean_probability", "observed")
_POINT_COLUMNS: Final = (
    *("threshold", "prevalence_test", "n_positive_test", "n_test", *CONFUSION_COLUMNS),
    *("auroc_low", "auroc_high", "ap_low", "ap_high"),
    *(name for name in MEASURES if name != "prevalence"),
)
_GROUP_COLUMNS: Final = (
    *("group", "value", "n_positive_test", "n_test", "auroc", "auroc_low", "auroc_high"),
    *("sensitivity", "specificity"),
)
_FIGURES_OF_ZERO_SHOT: Final = ("zero_shot", "run", "difference")
_ZERO_SHOT_COLUMNS: Final = (
    *("finding", "n_positive"),
    *(name + bound for name in _FIGURES_OF_ZERO_SHOT for bound in ("", "_low", "_high")),
)
_FEATURES: Final = {
    "projected": "embeddings",
    "pooled": "pooled outputs (before the projection)",
    "both": "embeddings and pooled outputs",
}
_SAME_AUROC: Final = 1e-6
_VERBS: Final = {"train": "trained", "finetune": "trained", "evaluate": "evaluated"}
"""What commands do to a run, by their names in a manifest."""

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class ZeroShotRows:
    """What prompts alone score on a run's test images, and how much better the run is."""

    by_finding: dict[str, Record]
    """Rows of ``zero_shot.csv`` of the findings that have prompts."""
    macro: Record
    """Its last row."""
    n_findings: int
    """Over how many findings that is the mean."""


class FlowStep(NamedTuple):
    """Images that are left, what is lost of them next, and at the end the parts of them."""

    left: Record
    lost: list[Record]
    parts: list[Record]


class LabelRows(NamedTuple):
    """Rows of ``label_counts.csv`` that a page shows."""

    rows: list[Record]
    sides: list[str]
    has_codes: bool
    n_findings: int
    n_lacking: int
    """Findings that some images say nothing of."""


@dataclass(frozen=True, eq=False)
class RunView:
    """One run as its page shows it; what is undefined is None."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    per_finding: dict[str, Record]
    """Rows of ``per_finding.csv`` by finding, with ``is_few``."""
    search: list[Record]
    """Rows of ``epoch_search.csv``."""
    n_folds: int
    tables: dict[str, pd.DataFrame]
    """``history``, and those that are there of ``curves``, ``decision_curves``, ``calibration``,
    ``subgroups``, ``flow`` and ``label_counts``."""
    zero_shot: ZeroShotRows | None
    zero_shot_is_stale: bool
    """Whether ``zero_shot.csv`` is there and of other predictions than the figures."""
    external: Record | None = None
    """Of a test on another data set, what ``metrics.json`` says of it."""
    reads: SplitReads | None = None
    """How often its test split has been read; None where that was never counted."""
    dates: dict[str, str] = field(default_factory=dict)
    """The days on which it was ``trained`` and last ``evaluated``, as its manifest knows them."""

    @property
    def judged(self) -> list[Record]:
        """Findings that the test has enough positives of to judge them, the best first."""
        rows = [row for row in self.per_finding.values() if _is_judged(row)]
        return sorted(rows, key=lambda row: -row["auroc"])

    @property
    def unjudged(self) -> list[Record]:
        """The other findings, those with the most positives first."""
        rows = [row for row in self.per_finding.values() if not _is_judged(row)]
        return sorted(rows, key=lambda row: -row["n_positive_test"])

    @property
    def names_nobody(self) -> bool:
        """Whether each image was split by itself: patients are unknown, and studies have one."""
        sides = [side for side in ("test", "train") if f"n_{side}_images" in self.metrics]
        return self.metrics["bootstrap"]["unit"] == "study" and all(
            self.metrics[f"n_{side}_images"] == self.metrics[f"n_{side}_studies"] for side in sides
        )

    @property
    def outer_folds(self) -> list[Record]:
        """What metrics.json says of each outer fold; empty unless the run is nested."""
        folds: list[Record] = self.metrics.get("outer_folds", [])
        return folds

    @property
    def flow(self) -> list[FlowStep]:
        """What was left of the images, and what was lost next; empty for runs of before."""
        steps: list[FlowStep] = []
        for row in to_records(parse_flow(self.tables["flow"])) if "flow" in self.tables else ():
            if row["kind"] == "left":
                steps.append(FlowStep(row, [], []))
            else:
                (steps[-1].lost if row["kind"] == "lost" else steps[-1].parts).append(row)
        return steps

    @property
    def labels(self) -> LabelRows:
        """Findings that some images say nothing of, and whether codes as written are known."""
        rows = to_records(self.tables["label_counts"]) if "label_counts" in self.tables else []
        sides = [side for side in ("train", "test") if rows and f"{side}_present" in rows[0]]
        has_codes = bool(rows) and WRITTEN[0] in rows[0]
        lacking = [row for row in rows if any(row[f"{side}_unlabelled"] for side in sides)]
        return LabelRows(rows if has_codes else lacking, sides, has_codes, len(rows), len(lacking))

    @property
    def options(self) -> dict[str, Any]:
        """What it was trained with; thresholds and calibration as `evaluate` chose them since."""
        options: dict[str, Any] = dict(self.config[self.config["kind"]])
        calibration = (self.metrics.get("calibration") or {}).get("method")
        later = {"threshold_rule": self.metrics.get("threshold_rule"), "calibration": calibration}
        for name, now in later.items():
            trained = options.get(name, now)
            if now is not None:
                options[name] = (
                    now if now == trained else f"{now} (chosen after training, which had {trained})"
                )
        return options

    @property
    def probability(self) -> str:
        """What the numbers are that the model gives: probabilities only where calibrated."""
        method = (self.metrics.get("calibration") or {}).get("method", "none")
        return "score" if method == "none" else "probability"

    @property
    def labelling(self) -> str:
        """How the labels that it is scored on were made, in a sentence."""
        if self.external is None:
            return say_whose_labels(name_data_set_of_run(self.config))
        return say_whose_labels(self.external.get("data_set", ""))

    @property
    def head(self) -> str:
        """What the trained head is; runs that do not say have the reference's."""
        hidden = self.options.get("hidden", (512, 256))
        norm = {"batch": "batch norm", "layer": "layer norm"}[self.options.get("norm", "batch")]
        layers = ("linear", "two-layer", "three-layer", "four-layer")
        kind = layers[len(hidden)] if len(hidden) < len(layers) else f"{len(hidden) + 1}-layer"
        return f"{kind} head" + (f" with {norm}" if hidden else "")

    @property
    def final_epochs(self) -> str:
        """For how many epochs the final model was trained, also where early stopping ended it."""
        chosen = int(self.config["chosen_epochs"])
        history = self.tables["history"]
        if self.options.get("early_stopping") is None or "epoch" not in history:
            return str(chosen)
        if "horizon" in history:
            history = history[history["horizon"] == chosen]
        last = history.groupby("fold", sort=False)["epoch"].max().clip(upper=chosen)
        if FINAL_FOLD in last:
            return f"{last[FINAL_FOLD]}, by early stopping ({chosen} were chosen)"
        epochs = ", ".join(str(n) for n in last)
        return f"at most {chosen}; by early stopping the folds' models have {epochs}"

    @property
    def stores(self) -> list[dict[str, Any]]:
        """What is recorded of each store that it was trained on: path, encoder, cohort."""
        return [self.config["store"], *self.config.get("further_stores", ())]

    @property
    def encoders(self) -> str:
        """Names of the encoders whose features it reads."""
        return " and of ".join(str(store["encoder"]["name"]) for store in self.stores)

    @property
    def row(self) -> str:
        """What is given a prediction: ``"image"`` or ``"study"``."""
        return "study" if self.metrics.get("rows") == "studies" else "image"

    @property
    def averaged(self) -> str:
        """How the images of a study come together, to be added to a sentence."""
        return ", averaged over a study’s images by projection" if self.row == "study" else ""

    @property
    def features(self) -> str:
        """Which outputs of the encoder it reads."""
        return _FEATURES[self.options.get("features", "projected")]


def read_view(run: Run, name: str | None = None) -> RunView:
    """Read what the page shows of an evaluated run, which it calls `name`, or as its folder.

    Runs that were evaluated before curves were kept are read without them.

    Raises
    ------
    RunError
        The run has not been evaluated, or a table is missing.
    """
    metrics = _read_metrics(run)
    search = run.read_table("epoch_search")
    tables = {"history": run.read_table("history"), **_read_optional(run)}
    per_finding = _read_findings(run)
    has_zero_shot = run.has_table("zero_shot")
    zero_shot = _read_zero_shot(run, per_finding) if has_zero_shot else None
    return RunView(
        name=name or run.path.resolve().name,
        config=run.config,
        metrics=metrics,
        per_finding=per_finding,
        search=to_records(search),
        n_folds=sum(column.startswith("fold_") for column in search.columns),
        tables=tables,
        zero_shot=zero_shot,
        zero_shot_is_stale=has_zero_shot and zero_shot is None,
        reads=SplitReads.of_run(run),
        dates=_read_dates(run),
    )


def read_external_view(test: Run) -> RunView:
    """Read what the page of a test on another data set shows, out of the test's folder."""
    metrics = _read_metrics(test)
    external = metrics["external"]
    return RunView(
        name=f"{Path(external['run']).resolve().name} on {Path(external['store']).stem}",
        config=test.config,
        metrics=metrics,
        per_finding=_read_findings(test),
        search=[],
        n_folds=0,
        tables=_read_optional(test),
        zero_shot=None,
        zero_shot_is_stale=False,
        external=external,
        reads=SplitReads.of_run(test),
        dates=_read_dates(test),
    )


def _read_dates(run: Run) -> dict[str, str]:
    """Days of the first training and the last evaluation; a call from Python leaves none."""
    started = [
        (_VERBS[entry["command"]], datetime.fromisoformat(entry["started"]))
        for entry in read_manifest(run.path)
        if entry.get("command") in _VERBS
    ]
    return {verb: f"{day.day} {day:%B %Y}" for verb, day in started}


def _is_judged(row: Record) -> bool:
    return row["auroc"] is not None and not row["is_few"]


def _read_metrics(run: Run) -> Record:
    """Its figures; one that was evaluated before a measure came into use has no value for it."""
    metrics = run.read_metrics()
    unknown = {f"macro_{name}": {"value": None, "n_findings": 0} for name in MEASURES}
    return metrics | {"test": unknown | metrics["test"]}


def _read_findings(run: Run) -> dict[str, Record]:
    """Rows of ``per_finding.csv``, and which of them rest on few positives."""
    table = run.read_table("per_finding")
    return {row["finding"]: row for row in to_records(table.assign(is_few=find_few(table)))}


def _read_optional(run: Run) -> dict[str, pd.DataFrame]:
    names: tuple[TableName, ...] = (
        *("curves", "calibration", "subgroups", "flow", "label_counts", "decision_curves"),
    )
    return {name: run.read_table(name) for name in names if run.has_table(name)}


def _read_zero_shot(run: Run, per_finding: Mapping[str, Record]) -> ZeroShotRows | None:
    """The table, or None where what it says of the run is not what the run's own figures say.

    So a table of other test images, targets or predictions is never shown beside these.
    """
    table = run.read_table("zero_shot")
    if table.empty or not set(_ZERO_SHOT_COLUMNS) <= set(table):
        return None
    *rows, macro = to_records(table)
    by_finding = {row["finding"]: row for row in rows}
    if not all(
        finding in per_finding
        and row["n_positive"] == per_finding[finding]["n_positive_test"]
        and _is_same(row["run"], per_finding[finding]["auroc"])
        for finding, row in by_finding.items()
    ):
        return None
    return ZeroShotRows(by_finding, macro, sum(row["zero_shot"] is not None for row in rows))


def _is_same(left: float | None, right: float | None) -> bool:
    """Equal but for the digits that a table keeps."""
    return left is right if left is None or right is None else abs(left - right) < _SAME_AUROC


def to_records(table: pd.DataFrame) -> list[Record]:
    """Rows as dictionaries, None where a cell is blank."""
    return [
        {str(name): None if pd.isna(cell) else cell for name, cell in row.items()}
        for row in table.to_dict("records")
    ]


def collect_differences(
    comparison: Comparison, rows: Rows | None = None
) -> dict[str, dict[str, dict[str, Record]]]:
    """Rows of a comparison by run, measure and finding or blank; over images if it has them."""
    of_images = comparison.table[comparison.table["rows"] == (rows or comparison.rows[0])]
    nested: dict[str, dict[str, dict[str, Record]]] = {}
    for row in to_records(of_images):
        by_measure = nested.setdefault(row["run"], {}).setdefault(row["measure"], {})
        by_measure[row["finding"] or MACRO] = row
    return nested


def collect_charts(views: Sequence[RunView]) -> dict[str, Any]:
    """What the page's own program draws of runs with the same findings, ready for JSON.

    ``runs`` holds names, searches and histories; ``findings`` the F names and then a blank one for
    all cells pooled; ``curves``, ``bands`` (of a single run), ``decisions``, ``calibration``,
    ``points``, ``groups`` and ``zero_shot`` hold a list per run with one entry per finding, in that
    order, None where there is nothing to draw; what is unknown of a point is None. ``measures``
    names those of the figures of a point that a table shows, with their labels.
    """
    findings = [*views[0].per_finding, POOLED]
    n_points = POINTS_OF_ALL_CURVES // (len(findings) * len(views))
    n_points = int(np.clip(n_points, MIN_POINTS, MAX_POINTS))
    return {
        "runs": [
            {"name": view.name, "search": _search(view), "history": _history(view)}
            for view in views
        ],
        "findings": findings,
        "curves": [_curves(view, findings, n_points) for view in views],
        "bands": [_bands(view, findings) for view in views[:1] if len(views) == 1],
        "decisions": [_decisions(view, findings) for view in views],
        "calibration": [_calibration(view, findings) for view in views],
        "points": [
            [*(_point(view, finding) for finding in view.per_finding), _pooled(view)]
            for view in views
        ],
        "groups": [_groups(view, findings) for view in views],
        "zero_shot": [_zero_shot(view, findings) for view in views],
        "n_points": n_points,
        "measures": [[name, of.label] for name, of in MEASURES.items() if of.is_in_panel],
    }


def _search(view: RunView) -> Record:
    return {
        "epochs": [row["epochs"] for row in view.search],
        "mean": _round(row["mean_auroc"] for row in view.search),
        "folds": [
            _round(row[f"fold_{k}"] for row in view.search) for k in range(1, view.n_folds + 1)
        ],
        "chosen": view.config["chosen_epochs"],
    }


def _history(view: RunView) -> list[Record]:
    """Epochs of every fold; where each candidate was trained by itself, of the longest."""
    if "history" not in view.tables:
        return []
    history = keep_longest(view.tables["history"])
    return [
        {
            "fold": fold,
            "epoch": thinned["epoch"].tolist(),
            "train_loss": _round(thinned["train_loss"], significant=True),
            "val_loss": _round(thinned["val_loss"], significant=True),
            "val_auroc": _round(thinned["val_auroc"]),
        }
        for fold, rows in history.groupby("fold", sort=False)
        for thinned in [_thin(rows, MAX_EPOCHS)]
    ]


def _curves(view: RunView, findings: Sequence[str], n_points: int) -> list[Record | None]:
    if "curves" not in view.tables:
        return [None] * len(findings)
    by_finding = dict(iter(view.tables["curves"].groupby("finding")))
    return [
        _columns(_thin(by_finding[finding], n_points), _CURVE_COLUMNS)
        if finding in by_finding
        else None
        for finding in findings
    ]


def _bands(view: RunView, findings: Sequence[str]) -> list[Record | None]:
    """Bounds of every finding's curves, at a few places of each."""
    if not set(_BAND_COLUMNS) <= set(view.tables.get("curves", ())):
        return [None] * len(findings)
    by_finding = dict(iter(view.tables["curves"].groupby("finding")))
    return [
        _columns(_thin(by_finding[finding], MAX_BAND_POINTS), _BAND_COLUMNS)
        if finding in by_finding
        else None
        for finding in findings
    ]


def _decisions(view: RunView, findings: Sequence[str]) -> list[Record | None]:
    """Decision curves up to the first threshold from which on nothing is called."""
    table = view.tables.get("decision_curves")
    if table is None or table.empty:
        return [None] * len(findings)
    entries = {}
    for finding, rows in table.groupby("finding"):
        n_shown = 1 + int((rows["n_called"] > 0).sum())
        entries[finding] = _columns(rows.iloc[:n_shown], _DECISION_COLUMNS)
    return [entries.get(finding) for finding in findings]


def _calibration(view: RunView, findings: Sequence[str]) -> list[Record | None]:
    """Bins of every finding, by stage."""
    if "calibration" not in view.tables:
        return [None] * len(findings)
    entries: dict[str, Record] = {}
    for (finding, stage), bins in view.tables["calibration"].groupby(["finding", "stage"]):
        entries.setdefault(str(finding), {})[str(stage)] = _columns(bins, _BIN_COLUMNS)
    return [entries.get(finding) for finding in findings]


def _point(view: RunView, finding: str) -> Record:
    """Figures of a finding."""
    return {name: _tidy(view.per_finding[finding].get(name)) for name in _POINT_COLUMNS}


def _pooled(view: RunView) -> Record:
    """The few figures of all cells pooled that a drawing needs."""
    test = view.metrics["test"]
    point: Record = dict.fromkeys(_POINT_COLUMNS)
    for name in ("auroc", "ap"):
        entry = test.get(f"micro_{name}", {})
        point |= {name: _tidy(entry.get("value"))}
        point |= {f"{name}_{bound}": _tidy(entry.get(bound)) for bound in ("low", "high")}
    point["prevalence_test"] = _tidy(test.get("micro_prevalence", {}).get("value"))
    return point


def _groups(view: RunView, findings: Sequence[str]) -> list[list[Record] | None]:
    if "subgroups" not in view.tables or view.tables["subgroups"].empty:
        return [None] * len(findings)
    entries = {
        finding: [
            {name: _tidy(cell) for name, cell in row.items()}
            for row in to_records(rows[list(_GROUP_COLUMNS)])
        ]
        for finding, rows in view.tables["subgroups"].groupby("finding")
    }
    return [entries.get(finding) for finding in findings]


def _zero_shot(view: RunView, findings: Sequence[str]) -> list[Record | None]:
    rows = {} if view.zero_shot is None else view.zero_shot.by_finding
    return [
        {name: _tidy(cell) for name, cell in rows[finding].items()} if finding in rows else None
        for finding in findings
    ]


def _thin(table: pd.DataFrame, n_rows: int) -> pd.DataFrame:
    """At most so many rows, evenly spaced, the first and the last among them."""
    if len(table) <= n_rows:
        return table
    rows = np.linspace(0, len(table) - 1, n_rows).round().astype(int)
    thinned: pd.DataFrame = table.iloc[rows]
    return thinned


def _columns(table: pd.DataFrame, names: Sequence[str]) -> dict[str, list[float | None]]:
    return {name: _round(table[name]) for name in names}


def _round(values: Iterable[Any], *, significant: bool = False) -> list[float | None]:
    return [_tidy(value, significant=significant) for value in values]


def _tidy(value: Any, *, significant: bool = False) -> Any:
    """As short as a drawing needs it; None where undefined."""
    if isinstance(value, str) or value is None:
        return value
    if pd.isna(value):
        return None
    if isinstance(value, int | np.integer):
        return int(value)
    return float(f"{value:.{_DIGITS}g}") if significant else round(float(value), _DIGITS)


def keep_longest(history: pd.DataFrame) -> pd.DataFrame:
    """Of a history whose candidates were trained one by one, the longest, and the final model."""
    if "horizon" not in history:
        return history
    is_longest = history["horizon"] == history["horizon"].max()
    kept: pd.DataFrame = history[is_longest | (history["fold"] == FINAL_FOLD)]
    return kept
