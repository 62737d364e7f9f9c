"""Flow of images, ages, sexes and missing labels in words, for page, model card and checklists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cxr_cache.common.wording import count
from cxr_cache.datasets.cohort import UNITS

_NOUNS = {"images": "image", "studies": "study", "patients": "patient"}


def count_line(line: Mapping[str, Any]) -> str:
    """Say the numbers of a line of the flow: ``"38 images, 2 studies"``; empty if none is known."""
    known = {name: line[name] for name in _NOUNS if line[name] is not None}
    parts = [count(n, _NOUNS[name]) for name, n in known.items() if n or name == "images"]
    return ", ".join(parts)


def tabulate_people(demographics: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Lay out what metrics.json says of age and sex: a header, then a line per characteristic."""
    sides = list(demographics.values())
    lines = [
        ["", *(side.capitalize() for side in demographics)],
        ["images", *(f"{side['n_images']:,}" for side in sides)],
        ["studies", *(f"{side['n_studies']:,}" for side in sides)],
        ["patients", *(_or_unknown(side["n_patients"]) for side in sides)],
        ["age at the study in years: median (quartiles; range)", *map(_describe_age, sides)],
    ]
    sexes = sorted({sex for side in sides for sex in (side["sex"] or {}).get("n", {})})
    lines += [[f"sex {sex}", *(_count_sex(side, sex) for side in sides)] for sex in sexes]
    lines.append(["sex unknown", *(_count_unknown(side) for side in sides)])
    views = sorted({view for side in sides for view in side["projection"]})
    lines += [
        [f"projection {view}", *(f"{side['projection'].get(view, 0):,}" for side in sides)]
        for view in views
    ]
    return lines


def _or_unknown(n: int | None) -> str:
    return "not named" if n is None else f"{n:,}"


def _describe_age(side: Mapping[str, Any]) -> str:
    age = side["age"]
    if age is None or not age["n_studies"]:
        return "unknown"
    first, third = age["quartiles"]
    low, high = age["range"]
    unknown = f"; unknown of {count(age['n_unknown'], 'study')}" if age["n_unknown"] else ""
    return f"{age['median']:g} ({first:g} to {third:g}; {low:g} to {high:g}){unknown}"


def _count_sex(side: Mapping[str, Any], sex: str) -> str:
    of = side["sex"]
    return "unknown" if of is None else f"{of['n'].get(sex, 0):,} {_name_several(of['unit'])}"


def _count_unknown(side: Mapping[str, Any]) -> str:
    of = side["sex"]
    if of is None:
        return "all"
    several = _name_several(of["unit"])
    stated_twice = f", and {of['n_contradictory']:,} with both" if of["n_contradictory"] else ""
    return f"{of['n_unknown']:,} {several}{stated_twice}"


def _name_several(unit: Any) -> str:
    return UNITS[unit]  # beside a number of one, too: the column is of such numbers
