"""What a page says first, in plain words: on what, how good, and what a comparison found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from cxr_cache.common.wording import count, list_names
from cxr_cache.datasets.cohort import UNITS
from cxr_cache.datasets.collections.catalogue import FORMS
from cxr_cache.evaluation.evaluate import LEVEL, describe_sample
from cxr_cache.evaluation.matching import name_data_set

if TYPE_CHECKING:
    from cxr_cache.report.views import Record, RunView

_TITLES: Final = {
    "indiana": "Indiana University chest X-rays",
    "openi": "Indiana University chest X-rays (Open-i)",
    "phantoms": "Synthetic chest X-rays",
    **{form.format: form.title for form in reversed(FORMS)},
}
"""Published data sets by the names of their readers."""
_GUESSING: Final = 0.5


def title_data_set(name: str, store: str) -> str:
    """Name a data set for a title: as it is published, else by the file of its features."""
    return _TITLES.get(name) or f"Own data ({PurePosixPath(store).stem})"


def title_encoder(name: str) -> str:
    """Shorten the name of an encoder to what is said of it in a title.

    Examples
    --------
    >>> title_encoder("hf-hub:microsoft/rad-dino@0123abc"), title_encoder("random:test_vit:0")
    ('rad-dino', 'random weights (test_vit)')
    """
    kind, _, rest = name.partition(":")
    if kind == "imported":
        return f"imported features ({rest})"
    if kind == "random":
        return f"random weights ({rest.split(':')[0]})"
    return (rest or name).split("@")[0].split("?")[0].rstrip("/").rsplit("/", 1)[-1] or name


def title_page(views: Sequence[RunView]) -> tuple[str, str]:
    """Give the title of a page, from the data set and the encoder, and the line that follows it."""
    first = views[0]
    data_set = title_data_set(
        name_data_set(first.config["findings"], first.config.get("reading")),
        str(first.config["store"].get("path", "")),
    )
    if first.external is not None:
        there = title_data_set(first.external.get("data_set", ""), str(first.external["store"]))
        return there, f"tested with {_models(first)}, trained on {data_set}"
    encoders = list(dict.fromkeys(_models(view) for view in views))
    if len(views) == 1:
        return data_set, f"with {encoders[0]}"
    between = "with" if len(encoders) == 1 else "compared:"
    return data_set, f"{len(views)} runs {between} {' against '.join(encoders)}"


def _models(view: RunView) -> str:
    names = [title_encoder(str(store["encoder"]["name"])) for store in view.stores]
    tuned = "fine-tuned " if view.config["kind"] == "finetune" else ""
    return tuned + " and ".join(names)


def list_facts(view: RunView) -> list[tuple[str, str]]:
    """What was tested on what, and by whose split: labels and words for the first screen."""
    split = describe_split(view)
    if view.external is None and not view.outer_folds:
        split += f"; trained on {describe_sample(view.metrics, 'train')}"
    return [("Tested on", _describe_test(view)), ("Split", split)]


def _describe_test(view: RunView) -> str:
    """Images and studies, and patients where they are named."""
    sample = describe_sample(view.metrics, "test")
    people = view.metrics.get("demographics", {}).get("test", {}).get("n_patients")
    return f"{sample}, {count(people, 'patient')}" if people else sample


def describe_split(view: RunView) -> str:
    """Whose split it is, and what lies whole on either side of it."""
    if view.external is not None:
        return "none: all labelled images there"
    if view.outer_folds:
        return f"{len(view.outer_folds)} outer folds, in each of which a model is tested once"
    split = view.config.get("split", {})
    if split.get("whose"):
        return f"given by {split['whose']}"
    if view.options.get("split_by") == "image":
        return "made here, by single image"
    whole = UNITS[split["unit"]] if split.get("unit") else "patients or studies"
    return f"made here, whole {whole}"


def describe_dates(view: RunView) -> str:
    """Name of the run, and the days on which it was trained and evaluated."""
    days = [f"{verb} {day}" for verb, day in view.dates.items()]
    return ", ".join([view.name, *days])


def find_leak(view: RunView) -> str:
    """Say that the split lets a model see what it is tested on; empty where it does not."""
    if view.external is not None:
        return ""
    split = view.config.get("split", {})
    if split.get("n_shared"):
        return f"{count(split['n_shared'], split['unit'])} on both sides of the split"
    if view.options.get("split_by") == "image":
        return "Split by single image: images of one study may be on both sides"
    return ""


def judge(view: RunView) -> dict[str, Any]:
    """Sum up a run: ``sentence``, what follows it (``more``), and ``side`` of the interval.

    `side` is ``better`` or ``worse`` than guessing, ``unclear``, or ``unknown`` without an
    interval.
    """
    entry = view.metrics["test"]["macro_auroc"]
    side = _side(entry.get("low"), entry.get("high"), _GUESSING)
    return {"side": side, "sentence": _say_how_good(entry, side), "more": _count_judged(view)}


def _say_how_good(entry: Mapping[str, Any], side: str) -> str:
    if entry["value"] is None:
        return "No verdict: no finding has both positives and negatives in the test."
    pairs = f"{100 * entry['value']:.0f}"
    told = f"an image with a finding gets a higher score than one without it {pairs} times in 100"
    if side == "unknown":
        return f"No verdict without an interval: {told}; guessing gets 50."
    heads = {
        "better": "Better than guessing",
        "worse": "Worse than guessing",
        "unclear": "Cannot be told from guessing",
    }
    bounds = f"{100 * entry['low']:.0f} to {100 * entry['high']:.0f}"
    return f"{heads[side]}: {told} ({bounds}), where guessing gets 50."


def _count_judged(view: RunView) -> str:
    """How many of the findings that can be judged are better than guessing."""
    n = len(view.judged)
    if not n:
        return "No finding has enough positives in the test to be judged by itself."
    sides = [_side(row["auroc_low"], row["auroc_high"], _GUESSING) for row in view.judged]
    n_better, n_worse = sides.count("better"), sides.count("worse")
    said = [f"{_number(n_better)} better than guessing"]
    if n_worse:
        said.append(f"{_number(n_worse)} worse")
    if unclear := n - n_better - n_worse:
        said.append(f"{unclear} cannot be told from it")
    if n == 1:
        return f"Of the findings, a single one can be judged: {list_names(said)}."
    return f"Of the {n} findings that can be judged, {list_names(said)}."


def _number(n: int) -> str:
    return "none is" if n == 0 else "1 is" if n == 1 else f"{n} are"


def judge_differences(views: Sequence[RunView], differences: Mapping[str, Any]) -> dict[str, Any]:
    """Sum up a comparison with the first run, as :func:`judge` does one run."""
    first, *others = views
    found: dict[str, list[str]] = {}
    for view in others:
        row = differences[view.name]["auroc"][""]
        side = "unknown" if row is None else _side(row["low"], row["high"], 0)
        if len(others) > 1 and side in ("better", "worse") and row["p_holm"] >= 1 - LEVEL:
            side = "unclear"  # an interval is of one difference, and here are several
        found.setdefault(side, []).append(view.name)
    if len(others) == 1:
        sentence = _say_difference(first.name, others[0].name, row, side)
        more = _count_differing(others[0], differences[others[0].name]["auroc"])
        return {"side": side, "sentence": sentence, "more": more}
    sides = {**_SIDES, "unclear": f"not to be told from {first.name}"}
    said = [
        f"{list_names(names)} {'is' if len(names) == 1 else 'are'} {sides[side]}"
        for side, names in sorted(found.items())
    ]
    sentence = f"Beside {first.name}, by their mean AUROC: {'; '.join(said)}."
    more = "Differences, their intervals and p values stand below, for every finding."
    return {"side": min(found), "sentence": sentence, "more": more}


def _say_difference(first: str, name: str, row: Record | None, side: str) -> str:
    if row is None or row["difference"] is None:
        return f"{name} and {first} cannot be compared."
    points = f"{100 * abs(row['difference']):.1f}"
    if side == "unknown":
        return (
            f"No verdict without an interval: {name} and {first} differ by {points} in 100 pairs."
        )
    ends = sorted(100 * (row[bound] if row["difference"] >= 0 else -row[bound]) for bound in _ENDS)
    bounds = f"({ends[0]:.1f} to {ends[1]:.1f})"
    head = "cannot be told from" if side == "unclear" else f"is {side} than"
    more = "more" if row["difference"] >= 0 else "fewer"
    return (
        f"{name} {head} {first}: of 100 pairs of an image with a finding and one without it, it "
        f"ranks {points} {more} the right way {bounds}."
    )


_ENDS: Final = ("low", "high")
_SIDES: Final = {
    "better": "better",
    "worse": "worse",
    "unknown": "without a verdict, as there is no interval",
}


def _count_differing(view: RunView, rows: Mapping[str, Record]) -> str:
    """How many findings differ, once p values are corrected for how many were compared."""
    tested = [row for finding, row in rows.items() if finding and row["p_holm"] is not None]
    found = [row for row in tested if row["p_holm"] < 1 - LEVEL]
    if not tested:
        return "No single finding could be compared."
    n_better = sum(row["difference"] > 0 for row in found)
    if not found:
        return f"None of the {count(len(tested), 'finding')} compared differs beyond luck."
    return (
        f"Of the {count(len(tested), 'finding')} compared, {_number(n_better)} better with "
        f"{view.name} and {_number(len(found) - n_better)} worse, beyond luck."
    )


def judge_curve(rows: Sequence[Record], unit: str) -> dict[str, Any]:
    """Sum up the learning curve of one setting, the fewest first, as :func:`judge` does a run.

    The smallest number counts from which on no number can be told from the largest.
    """
    *fewer, most = rows
    if not fewer:
        return {"side": "unknown", "sentence": f"One number of {unit} is no curve.", "more": ""}
    whole = f"all {most[unit]:,.0f} {unit}" if most["n_train"] == "all" else f"{most[unit]:,.0f}"
    enough = most
    for row in reversed(fewer):
        if row["low"] is None or row["high"] < 0:
            break
        enough = row
    more = f"This is of the head that scores best on the most {unit}: {most['setting']}."
    if all(row["low"] is None for row in fewer):
        return {"side": "unknown", "sentence": "No verdict without intervals.", "more": more}
    if enough is most:
        last = fewer[-1]
        sentence = (
            f"More labels still help: on {last[unit]:,.0f} {unit} the mean AUROC is "
            f"{-last['difference']:.3f} lower than on {whole} "
            f"({-last['high']:.3f} to {-last['low']:.3f})."
        )
        return {"side": "better", "sentence": sentence, "more": more}
    bounds = f"({enough['low']:+.3f} to {enough['high']:+.3f})"
    sentence = (
        f"The mean AUROC on {enough[unit]:,.0f} {unit} cannot be told from that on {whole}: the "
        f"difference is {enough['difference']:+.3f} {bounds}."
    )
    return {"side": "unclear", "sentence": sentence, "more": more}


def _side(low: float | None, high: float | None, baseline: float) -> str:
    """On which side of what knowing nothing gets an interval lies."""
    if low is None or high is None:
        return "unknown"
    return "better" if low > baseline else "worse" if high < baseline else "unclear"
