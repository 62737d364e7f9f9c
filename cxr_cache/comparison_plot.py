"""A comparison of runs -> one picture of its differences."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cxr_cache.clusters import UNITS
from cxr_cache.compare import MACRO, Comparison
from cxr_cache.run import write_whole

# Okabe and Ito's palette, told apart by people with any colour vision; markers differ as well.
_COLORS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS: Final = "osD^v*"


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
    with mpl.rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(8, 1.4 + 0.26 * len(findings)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color="#8A8F98", linewidth=1)
        for k, run in enumerate(runs):
            shift = 0.5 * ((k + 0.5) / len(runs) - 0.5)
            _draw_run(axes, table[table["run"] == run], findings, run, k, shift)
        axes.set_yticks(
            np.arange(len(findings)), [name or "mean over findings" for name in findings]
        )
        furthest = max(0.05, 1.4 * table["difference"].abs().max())
        axes.set_xlim(-furthest, furthest)
        axes.set_ylim(-0.7, len(findings) - 0.3)
        axes.set_xlabel(
            f"AUROC difference to {comparison.runs[0]}, with 95 % interval over "
            f"{UNITS[comparison.unit]}"
        )
        axes.grid(axis="x", color="#E4E7EB")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=130, metadata={"Software": None})
    write_whole(Path(path), image.getvalue())


def _order(table: pd.DataFrame) -> list[str]:
    """Findings that were compared, from the bottom up: fewest positives first, the mean on top."""
    first_run = table[table["run"] == table["run"].iloc[0]].dropna(subset=["difference"])
    of_findings = first_run[first_run["finding"] != MACRO]
    return [*of_findings.sort_values("n_positive", kind="stable")["finding"], MACRO]


def _draw_run(
    axes: Any, rows: pd.DataFrame, findings: list[str], run: str, k: int, shift: float
) -> None:
    rows = rows.set_index("finding").loc[findings]
    color, marker = _COLORS[k % len(_COLORS)], _MARKERS[k % len(_MARKERS)]
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
