"""An evaluated run -> reporting checklists, filled as far as the run knows, the rest marked."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from io import StringIO
from typing import Final

import pandas as pd

from cxr_cache.report.facts import FACTS
from cxr_cache.report.model_card import to_cell
from cxr_cache.report.views import RunView

TO_BE_WRITTEN: Final = "To be written by the authors"
CHECKLISTS: Final = {
    "claim2024": (
        "CLAIM 2024",
        "Tejani AS, Klontzas ME, Gatti AA, et al. Checklist for Artificial Intelligence in Medical "
        "Imaging (CLAIM): 2024 Update. Radiology: Artificial Intelligence 2024;6(4):e240300. "
        "https://doi.org/10.1148/ryai.240300",
    ),
    "tripod_ai": (
        "TRIPOD+AI",
        "Collins GS, Moons KGM, Dhiman P, et al. TRIPOD+AI statement: updated guidance for "
        "reporting clinical prediction models that use regression or machine learning methods. BMJ "
        "2024;385:e078378. https://doi.org/10.1136/bmj-2023-078378",
    ),
}
"""Title and source of each list, by the name of its table in ``checklists/``."""


@dataclass(frozen=True)
class Item:
    """One item of a list, and what a run says to it."""

    number: str
    section: str
    asks: str
    """What is asked for, in words of our own."""
    facts: tuple[str, ...]
    """What the run knows, in sentences."""
    left: str
    """What the authors have to add; blank where the facts are all."""


def fill_checklist(view: RunView, name: str) -> tuple[Item, ...]:
    """Fill one of :data:`CHECKLISTS` with the facts of an evaluated run."""
    folder = files("cxr_cache.report") / "checklists"
    text = (folder / f"{name}.csv").read_text("utf-8")
    table = pd.read_csv(StringIO(text), dtype=str, keep_default_na=False)
    return tuple(
        Item(row["item"], row["section"], row["asks"], _state(view, row["facts"]), row["left"])
        for row in table.to_dict("records")
    )


def _state(view: RunView, names: str) -> tuple[str, ...]:
    stated = (FACTS[name](view) for name in names.split())
    return tuple(fact for fact in stated if fact)


def render_checklists(view: RunView) -> str:
    """Write both lists as Markdown tables.

    Each item has what the run knows, or says that it is to be written by the authors; nothing is
    guessed.
    """
    parts = [
        f"# Reporting checklists of {to_cell(view.name)}",
        "Filled by cxr-cache from the files of the run. What a run cannot know is marked. Items "
        "are in words of our own, so read the lists themselves, too.",
    ]
    for name, (title, source) in CHECKLISTS.items():
        items = fill_checklist(view, name)
        n_filled = sum(bool(item.facts) for item in items)
        n_whole = sum(bool(item.facts) and not item.left for item in items)
        parts += [
            f"## {title}",
            f"{n_filled} of {len(items)} entries hold facts of the run; {n_whole} of them leave "
            f"nothing to the authors. {source}",
            "\n".join(
                [
                    "| item | section | asks for | from the run |",
                    "|---|---|---|---|",
                    *(
                        f"| {item.number} | {item.section} | {to_cell(item.asks)} | {_cell(item)} |"
                        for item in items
                    ),
                ]
            ),
        ]
    return "\n\n".join(parts) + "\n"


def _cell(item: Item) -> str:
    """The text of an item with its own emphasis, and nothing else of Markdown's."""
    facts = to_cell(" ".join(item.facts))
    if item.facts and not item.left:
        return facts
    left = f": {to_cell(item.left)}" if item.left else "."
    return f"{facts} *{TO_BE_WRITTEN}{left}*".strip()
