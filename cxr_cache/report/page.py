"""What a page shows -> one HTML file that needs no other."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2

from cxr_cache.common import wording
from cxr_cache.config import OPTIMISM_OF_PLATEAU
from cxr_cache.datasets.cohort import UNITS, Unit
from cxr_cache.datasets.labels import FINDINGS
from cxr_cache.evaluation.compare import COMPARED
from cxr_cache.evaluation.curves import MAX_POINTS
from cxr_cache.evaluation.evaluate import FEW_POSITIVES, LEVEL, describe_sample
from cxr_cache.evaluation.figures import MEASURES
from cxr_cache.metrics.scores import NEVER
from cxr_cache.report.composition import count_line, tabulate_people
from cxr_cache.report.views import RunView, collect_charts

MAX_RUNS: Final = 6
"""Runs on one page; more could not be told apart by colour and dash."""

UNDEFINED: Final = "–"


def render_page(
    views: list[RunView],
    *,
    differences: Mapping[str, Any] | None = None,
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
        differences=differences,
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
        "folder_name": _folder_name,
        "ap_of_chance": _ap_of_chance,
        "f1_of_calling_all": _f1_of_calling_all,
        "beside": _beside,
        "capitalize_first": _capitalize_first,
        "counts": count_line,
        "people": tabulate_people,
    }
    environment.globals |= {"measures": MEASURES, "compared": COMPARED}
    return environment


def _collect_warnings(views: list[RunView]) -> dict[str, list[str]]:
    """What to know about the runs, and which of them it concerns."""
    warnings: dict[str, list[str]] = {}
    for view in views:
        for warning in view.config["warnings"]:
            warnings.setdefault(warning, []).append(view.name)
    return warnings


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
