"""An ablation's table -> one picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Final

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cxr_cache.run import write_whole

_N_SHOWN: Final = 40
_HEAD, _BASELINE = "#0072B2", "#D55E00"  # Okabe and Ito


def draw_ablation(table: pd.DataFrame, path: str | Path) -> Path:
    """Draw every setting's folds, their mean, and the baselines, best on top, as a PNG.

    Parameters
    ----------
    table
        Of :class:`cxr_cache.ablate.Ablation`; the best forty settings and all baselines are drawn.
    path
        File to write; its folder exists.
    """
    path = Path(path)
    n_before = (table["kind"] == "head").cumsum()
    shown = table[(table["kind"] == "baseline") | (n_before <= _N_SHOWN)][::-1]
    folds = shown[[name for name in shown if str(name).startswith("fold_")]].to_numpy()
    is_head = (shown["kind"] == "head").to_numpy()
    places = np.arange(len(shown))
    with mpl.rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(8, 1.2 + 0.27 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(folds, places, "|", color="#8A8F98", markersize=7)
        for kind, color, marker, name in (
            (is_head, _HEAD, "o", "head"),
            (~is_head, _BASELINE, "D", "baseline"),
        ):
            means = shown["mean_auroc"].to_numpy()[kind]
            if kind.any():
                axes.plot(
                    means, places[kind], marker, color=color, label=f"{name}, mean over folds"
                )
        axes.set_yticks(places, [str(label) for label in shown["setting"]])
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.set_xlabel("macro AUROC on held-out folds (each fold a line)")
        axes.grid(axis="x", color="#E4E7EB")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=130, metadata={"Software": None})
    write_whole(path, image.getvalue())
    return path
