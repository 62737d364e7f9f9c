"""What a page shows -> one HTML file that needs no other."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import jinja2
from markupsafe import Markup, escape

from cxr_cache.common import wording
from cxr_cache.config import OPTIMISM_OF_PLATEAU
from cxr_cache.datasets.cohort import UNITS, Unit
from cxr_cache.datasets.labels import FINDINGS
from cxr_cache.evaluation.compare import COMPARED
from cxr_cache.evaluation.curves import MAX_POINTS
from cxr_cache.evaluation.evaluate import (
    FEW_POSITIVES,
    LEVEL,
    NESTED,
    NESTED_INTERVALS,
    NESTED_MODEL,
    describe_sample,
    describe_strength,
)
from cxr_cache.evaluation.figures import MEASURES
from cxr_cache.evaluation.matching import name_data_set
from cxr_cache.metrics.scores import NEVER
from cxr_cache.report.composition import count_line, tabulate_people
from cxr_cache.report.headline import (
    describe_dates,
    describe_split,
    find_leak,
    judge,
    judge_curve,
    judge_differences,
    list_facts,
    title_data_set,
    title_encoder,
    title_page,
)
from cxr_cache.report.views import RunView, collect_charts, to_records

if TYPE_CHECKING:
    from cxr_cache.store.layout import Header
    from cxr_cache.training.ablate import Ablation

MAX_RUNS: Final = 6
"""Runs on one page; more could not be told apart by colour and dash."""

UNDEFINED: Final = "–"


def render_page(
    views: list[RunView],
    *,
    differences: Mapping[str, Any] | None = None,
    by_study: Mapping[str, Any] | None = None,
    unit: Unit = "study",
    notes: Sequence[str] = (),
    cases: Sequence[Mapping[str, Any]] | None = None,
    pictures: Mapping[str, str] | None = None,
    maps: Mapping[str, Any] | None = None,
    problems: list[str] | None = None,
) -> str:
    """The page of one run, or of several with the same findings and test studies.

    Parameters
    ----------
    views
        The runs; the first is what the others are compared with.
    differences
        What :func:`cxr_cache.report.views.collect_differences` returns, for several runs.
    by_study
        The same by study, where `differences` are by image.
    unit
        What was resampled for their intervals.
    notes
        What the differences between runs do not speak of, in sentences.
    cases
        Per run, cases by finding as :func:`cxr_cache.report.cases.find_cases` returns them.
    pictures
        Data address by image id; None leaves the cases out.
    maps
        Where the first run looked in its cases, as
        :func:`cxr_cache.report.pictures.draw_maps` returns.
    problems
        What was wrong with images that have no picture.
    """
    environment = make_environment()
    charts = collect_charts(views)
    if pictures is not None:
        charts |= {"cases": cases, "pictures": dict(pictures), "maps": maps}
    return environment.get_template("page.html.j2").render(
        views=views,
        first=views[0],
        several=len(views) > 1,
        title=title_page(views),
        facts=list_facts(views[0]),
        dates=describe_dates(views[0]),
        split_words=describe_split(views[0]),
        leaks=list(dict.fromkeys(filter(None, map(find_leak, views)))),
        verdict_of_all=judge_differences(views, differences) if differences else judge(views[0]),
        places={finding: place for place, finding in enumerate(views[0].per_finding)},
        scale_ends=_choose_scale(views[0]),
        difference_ends=_choose_difference_scale(views[0], differences or {}),
        differences=differences,
        by_study=by_study,
        units=UNITS[unit],
        notes=notes,
        has_pictures=pictures is not None,
        problems=problems or [],
        charts=charts | {"rows": wording.plural(views[0].row)},
        warnings=_collect_warnings(views),
        **_program(environment, "page.js"),
        is_indiana=tuple(views[0].config["findings"]) == FINDINGS,
        never=NEVER,
        few_positives=FEW_POSITIVES,
        optimism=OPTIMISM_OF_PLATEAU,
        level=LEVEL,
        max_points=MAX_POINTS,
        nested=NESTED,
        nested_model=NESTED_MODEL,
        nested_intervals=NESTED_INTERVALS,
    )


def render_curve_page(ablation: Ablation, header: Header, store: str) -> str:
    """The page of a learning curve, on features that the header of a store describes.

    Parameters
    ----------
    ablation
        One whose settings say how many images to train on, so that it has a curve.
    header
        Of the store, or of the first of several.
    store
        Path of that store.
    """
    assert ablation.curve is not None
    unit = "images" if "images" in ablation.curve else "studies"
    rows = to_records(ablation.curve)
    settings = list(ablation.table["setting"])  # the best first
    for row in rows:
        row["place"] = settings.index(row["setting"])
    best = [row for row in rows if row["setting"] == ablation.best.label]
    names = title_data_set(name_data_set(header.findings, header.reading), store)
    scores = [row["mean_auroc"] - (row["std_repeats"] or 0) for row in rows]
    return (
        make_environment()
        .get_template("curve.html.j2")
        .render(
            title=(
                names,
                f"how many labelled {unit}, with {title_encoder(header.encoder['name'])}",
            ),
            facts=[
                ("Numbers tried", ", ".join(row["n_train"] for row in best)),
                (
                    "Settings",
                    str(len(settings))
                    + ", baselines among them" * ("baseline" in set(ablation.table["kind"])),
                ),
                ("Findings", f"{len(header.findings)}, scored by {ablation.measure}"),
            ],
            verdict=judge_curve(best, unit),
            rows=rows,
            unit=unit,
            ends=_choose_ends(scores),
            has_repeats=any(row["std_repeats"] is not None for row in rows),
            notes=ablation.notes,
            is_random=ablation.is_random,
            never=NEVER,
            level=LEVEL,
        )
    )


def render_map(**shown: Any) -> str:
    """The page with the map of a store; :mod:`cxr_cache.jobs.browse` says what it shows."""
    environment = make_environment()
    template = environment.get_template("map.html.j2")
    return template.render(**shown, **_program(environment, "map.js"))


def make_environment() -> jinja2.Environment:
    """Templates of this package, with the filters that write numbers."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cxr_cache.report", "templates"),
        autoescape=jinja2.select_autoescape(("html.j2",)),  # findings are the user's own words
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {
        "fixed": _fixed,
        "percent": _percent,
        "count": _count,
        "counted": wording.count,
        "names": wording.list_names,
        "plain": _plain,
        "log_share": _log_share,
        "plural": UNITS.get,
        "several": wording.plural,
        "sample": describe_sample,
        "strength": describe_strength,
        "folder_name": _folder_name,
        "ap_of_chance": _ap_of_chance,
        "f1_of_calling_all": _f1_of_calling_all,
        "beside": _beside,
        "capitalize_first": _capitalize_first,
        "counts": count_line,
        "people": tabulate_people,
        "place": _place,
        "by_difference": _sort_by_difference,
        "breakable": _allow_breaks,
    }
    environment.globals |= {"measures": MEASURES, "compared": COMPARED}
    return environment


def _allow_breaks(name: str) -> Markup:
    """A long name that may break after its dashes and slashes, and not within a word."""
    return Markup(re.sub(r"([/_.-])(?=\w)", r"\1<wbr>", str(escape(name))))


def _collect_warnings(views: list[RunView]) -> dict[str, list[str]]:
    """What to know about the runs, and which of them it concerns."""
    warnings: dict[str, list[str]] = {}
    for view in views:
        for warning in view.config["warnings"]:
            warnings.setdefault(warning, []).append(view.name)
    return warnings


@dataclass(frozen=True)
class _Ends:
    """The scale that the bars of a column share."""

    low: float
    high: float
    ticks: tuple[float, ...]
    form: str


def _choose_scale(view: RunView) -> _Ends:
    """From 0.4, or lower where an interval of a finding that can be judged reaches lower, to 1."""
    bounds = (row["auroc_low"] for row in view.judged)
    return _choose_ends([low for low in bounds if low is not None])


def _choose_ends(bounds: Sequence[float]) -> _Ends:
    """A scale of AUROCs from 0.4, or the tenth below the smallest of the bounds, to 1."""
    low = max(0, math.floor(10 * min([0.4, *bounds])) / 10)
    step = 0.1 if low > 0.3 else 0.25
    ticks = [k * step for k in range(11) if low <= k * step <= 1]
    return _Ends(low, 1, tuple(ticks), "%.1f" if step == 0.1 else "%.2g")


def _choose_difference_scale(view: RunView, differences: Mapping[str, Any]) -> _Ends:
    """As far on either side of 0 as the widest interval of a finding that can be judged."""
    rows = [of["auroc"].get(row["finding"]) for of in differences.values() for row in view.judged]
    bounds = [
        abs(row[end])
        for row in rows
        for end in ("difference", "low", "high")
        if row and row.get(end) is not None
    ]
    reach = next(
        end
        for end in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1)
        if end >= min(max(bounds, default=0), 1)
    )
    return _Ends(-reach, reach, (-reach / 2, 0, reach / 2), "%+.3g")


def _place(value: float, ends: _Ends) -> float:
    """Where a value lies on a scale, in percent of it; at its end where it lies outside."""
    share = (value - ends.low) / (ends.high - ends.low)
    return round(100 * min(max(share, 0), 1), 1)


def _sort_by_difference(
    rows: Sequence[Mapping[str, Any]], differences: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """Rows of findings, those that gain most first, and those not compared last."""

    def gain(row: Mapping[str, Any]) -> float:
        difference: float | None = differences[row["finding"]]["difference"]
        return -math.inf if difference is None else difference

    return sorted(rows, key=gain, reverse=True)


def _program(environment: jinja2.Environment, name: str) -> dict[str, str]:
    """A page's own program, and the hash by which the page allows it and no other."""
    program = _source(environment, name)
    digest = hashlib.sha256(program.encode()).digest()
    return {"program": program, "program_hash": base64.b64encode(digest).decode()}


def _source(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _fixed(value: float | None, digits: int = 3) -> str:
    return UNDEFINED if value is None else f"{value:.{digits}f}"


def _ap_of_chance(figures: Mapping[str, Any]) -> float | None:
    """What guessing gets as macro AP; metrics of earlier versions know its limit only."""
    value: float | None = figures.get("macro_ap_of_chance", figures["macro_prevalence"])["value"]
    return value


def _f1_of_calling_all(figures: Mapping[str, Any]) -> float | None:
    """What calling everything present gets as macro F1, where metrics.json says."""
    value: float | None = figures.get("macro_f1_of_calling_all", {"value": None})["value"]
    return value


def _beside(measure: str, figures: Mapping[str, Any]) -> str:
    """What the mean of a measure over findings is to be compared with, in words."""
    known = MEASURES[measure]
    if known.baseline is None:
        return "lower is better" if known.lower_is_better else ""
    if isinstance(known.baseline, float):
        scored: float | None = known.baseline
    elif known.baseline == "ap_of_chance":
        scored = _ap_of_chance(figures)
    else:
        scored = figures.get(f"macro_{known.baseline}", {"value": None})["value"]
    return f"{known.baseline_label} {_fixed(scored)}"


def _capitalize_first(text: str) -> str:
    """The text with which a sentence begins; ``capitalize`` would lower what follows."""
    return text[:1].upper() + text[1:]


def _percent(value: float | None, digits: int = 1) -> str:
    return UNDEFINED if value is None else f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def _count(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:,.0f}"


def _plain(value: Any) -> str:
    """A setting as a reader would write it down."""
    if value is None:
        return UNDEFINED
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_plain(entry)}" for key, entry in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _folder_name(path: str) -> str:
    """What a reader elsewhere can do something with."""
    return Path(path).name or path


def _log_share(count: float, largest: float) -> float:
    """Place of a count on a logarithmic axis, in percent; 0 and 1 lie at its start."""
    return 100 * math.log10(max(count, 1)) / math.log10(max(largest, 10))
