"""How all figures look, and how they reach a file."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from cxr_cache.common.files import write_whole

Axes: TypeAlias = Any  # matplotlib has no types of its own

# Okabe and Ito's palette, told apart by people with any colour vision.
PALETTE: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
BLUE, ORANGE, GREEN = PALETTE[:3]
GREY: Final = "#8A8F98"
INK: Final = "#22262B"

_PNG: Final = {"compress_level": 3}
"""Half the time of the usual 6, for a tenth more bytes."""
ROWS_MARGINS: Final = 0.55, 0.4
"""Inches below and above the rows of a plot."""
_LONGEST_LABEL: Final = 44
"""Characters; half of the narrowest figure."""

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": "#E4E7EB",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "savefig.dpi": 130,
    "text.color": INK,
    "text.parse_math": False,  # a finding may be called anything
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def open_figure(
    path: str | Path,
    width: float,
    height: float,
    margins: tuple[float, float, float, float] | None = None,
) -> Iterator[Figure]:
    """A figure of so many inches, written whole to `path` as a PNG when the block ends.

    `margins` are inches on the left, at the right, below and above; None works them out, which
    takes as long as drawing. No pyplot: it keeps global state, and would look for a screen.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout=None if margins else "constrained")
        if margins:
            left, right, bottom, top = margins
            figure.subplots_adjust(
                left=left / width,
                right=1 - right / width,
                bottom=bottom / height,
                top=1 - top / height,
            )
        yield figure
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None}, pil_kwargs=_PNG)
    write_whole(Path(path), image.getvalue())


@contextmanager
def open_rows(
    path: str | Path, labels: Sequence[str], *, xlabel: str = "", ylabel: str = ""
) -> Iterator[Axes]:
    """A plot with a labelled row per name, at the heights 0, 1, ... from the bottom up."""
    margins = (label_width(labels) + (0.25 if ylabel else 0), 0.15, *ROWS_MARGINS)
    with open_figure(path, 8, rows_height(len(labels)), margins) as figure:
        axes = figure.add_subplot()
        yield axes
        label_rows(axes, labels)
        axes.set(xlabel=xlabel, ylabel=ylabel)


def rows_height(n_rows: int) -> float:
    """Inches for a plot with so many rows."""
    return 1.2 + 0.23 * max(4, n_rows)


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """One label per row of a horizontal plot, from the bottom up, at the heights 0, 1, ...

    Long ones are cut in the middle: a finding may be called anything.
    """
    axes.set_yticks(np.arange(len(labels)), [_shorten(label) for label in labels])
    axes.set_ylim(-0.7, len(labels) - 0.3)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def label_width(labels: Sequence[str]) -> float:
    """Inches that the longest of some row labels takes, about."""
    return 0.25 + 0.078 * max((len(_shorten(label)) for label in labels), default=0)


def _shorten(label: str) -> str:
    if len(label) <= _LONGEST_LABEL:
        return label
    half = _LONGEST_LABEL // 2
    return f"{label[:half]}…{label[-half + 1 :]}"


def put_legend_on_top(axes: Axes, n_columns: int, side: Literal["left", "right"] = "left") -> None:
    """Outside, above a corner: rows may reach anywhere."""
    corner = (0, 1) if side == "left" else (1, 1)
    axes.legend(
        loc=f"lower {side}", bbox_to_anchor=corner, ncols=n_columns, borderaxespad=0.2, fontsize=8
    )
