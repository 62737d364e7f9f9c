"""A comparison of runs -> one picture of its differences."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from cxr_cache.common.whole_files import write_whole
from cxr_cache.datasets.clusters import UNITS
from cxr_cache.evaluation.compare import MACRO, Comparison
from cxr_cache.report.drawing import (
    GREY,
    PALETTE,
    Axes,
    label_rows,
    open_figure,
    put_legend_on_top,
)

_MARKERS: Final = "osD^v*"  # runs differ by more than their colour


def write_comparison(comparison: Comparison, folder: str | Path) -> tuple[Path, Path]:
    """Write ``comparison.csv`` and ``comparison.png`` into a folder, which is made if missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / "comparison.csv", folder / "comparison.png"
    write_whole(table, comparison.table.to_csv(index=False, float_format="%.9g").encode())
    draw_comparison(comparison, picture)
    return table, picture


def draw_comparison(comparison: Comparison, path: str | Path) -> None:
    """Draw the AUROC difference of every run and finding, with its interval, as a PNG.

    Findings whose difference is beyond luck after Holm's correction are filled markers; the mean
    over findings is the top row. Intervals of very few studies run out of the frame.

    Parameters
    ----------
    comparison
        Of two or more runs.
    path
        File to write; its folder exists.
    """
    table = comparison.table
    table = table[(table["rows"] == "images") & (table["measure"] == "auroc")]
    findings = _order(table)
    runs = comparison.runs[1:]
    furthest = max(0.05, 1.4 * table["difference"].abs().max())
    with open_figure(path, 8, 1.4 + 0.26 * len(findings)) as figure:
        axes = figure.add_subplot()
        axes.axvline(0, color=GREY, linewidth=1)
        for k, run in enumerate(runs):
            shift = 0.5 * ((k + 0.5) / len(runs) - 0.5)
            _draw_run(axes, table[table["run"] == run], findings, run, k, shift)
        label_rows(axes, [name or "mean over findings" for name in findings])
        axes.set_xlim(-furthest, furthest)
        axes.set_xlabel(
            f"AUROC difference to {comparison.runs[0]}, with 95 % interval over "
            f"{UNITS[comparison.unit]}"
        )
        put_legend_on_top(axes, 3)


def _order(table: pd.DataFrame) -> list[str]:
    """Findings that were compared, from the bottom up: fewest positives first, the mean on top."""
    first_run = table[table["run"] == table["run"].iloc[0]].dropna(subset=["difference"])
    of_findings = first_run[first_run["finding"] != MACRO]
    return [*of_findings.sort_values("n_positive", kind="stable")["finding"], MACRO]


def _draw_run(
    axes: Axes, rows: pd.DataFrame, findings: list[str], run: str, k: int, shift: float
) -> None:
    rows = rows.set_index("finding").loc[findings]
    color, marker = PALETTE[k % len(PALETTE)], _MARKERS[k % len(_MARKERS)]
    places = np.arange(len(findings)) - shift
    bounds = [rows["difference"] - rows["low"], rows["high"] - rows["difference"]]
    reach = np.nan_to_num(np.array(bounds))
    differs = (rows["p_holm"] < 0.05).to_numpy()
    axes.errorbar(rows["difference"], places, xerr=reach, fmt="none", ecolor=color, elinewidth=1.2)
    for chosen, face, label in ((~differs, "white", run), (differs, color, f"{run}, differs")):
        axes.scatter(
            rows["difference"][chosen],
            places[chosen],
            s=22,
            marker=marker,
            edgecolors=color,
            facecolors=face,
            zorder=3,
            label=label if chosen.any() else None,
        )
