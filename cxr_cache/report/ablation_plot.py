"""An ablation's table -> one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from cxr_cache.report.drawing import (
    BLUE,
    GREY,
    ORANGE,
    label_rows,
    open_figure,
    put_legend_on_top,
)

_N_SHOWN: Final = 40


def draw_ablation(table: pd.DataFrame, path: str | Path) -> Path:
    """Draw every setting's folds, their mean, and the baselines, best on top, as a PNG.

    Parameters
    ----------
    table
        Of :class:`cxr_cache.training.ablate.Ablation`; the best forty settings and all baselines are drawn.
    path
        File to write; its folder exists.
    """
    path = Path(path)
    n_before = (table["kind"] == "head").cumsum()
    shown = table[(table["kind"] == "baseline") | (n_before <= _N_SHOWN)][::-1]
    folds = shown[[name for name in shown if str(name).startswith("fold_")]].to_numpy()
    is_head = (shown["kind"] == "head").to_numpy()
    places = np.arange(len(shown))
    with open_figure(path, 8, 1.2 + 0.27 * len(shown)) as figure:
        axes = figure.add_subplot()
        axes.plot(folds, places, "|", color=GREY, markersize=7)
        for kind, color, marker, name in (
            (is_head, BLUE, "o", "head"),
            (~is_head, ORANGE, "D", "baseline"),
        ):
            means = shown["mean_auroc"].to_numpy()[kind]
            if kind.any():
                axes.plot(
                    means, places[kind], marker, color=color, label=f"{name}, mean over folds"
                )
        label_rows(axes, [str(label) for label in shown["setting"]])
        axes.set_xlabel("macro AUROC on held-out folds (each fold a line)")
        put_legend_on_top(axes, 2)
    return path
