"""Tables and maps of results -> figures as PNG files; computes no numbers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.collections import PolyCollection
from numpy.typing import NDArray

from cxr_cache.common.tables import write_table
from cxr_cache.datasets.cohort import UNITS
from cxr_cache.evaluation.compare import MACRO, Comparison
from cxr_cache.evaluation.curves import POOLED
from cxr_cache.evaluation.evaluate import FEW_POSITIVES, LEVEL, find_few
from cxr_cache.metrics.scores import CONFUSION_COLUMNS
from cxr_cache.models.run import FINAL_FOLD, Run
from cxr_cache.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALETTE,
    ROWS_MARGINS,
    Axes,
    label_rows,
    label_width,
    open_figure,
    open_rows,
    put_legend_on_top,
    rows_height,
)
from cxr_cache.report.views import keep_longest

PLOTS = (
    "epoch_search",
    "training_curves",
    "per_finding",
    "class_distribution",
    "class_vs_performance",
    "confusion_matrices",
    "confusion_matrices_six",
    "curves",
)
PLOTS_OF_TRAINING = PLOTS[:2]
MAX_MATRICES = 35
N_COMMON_MATRICES = 6
_PANEL_MARGINS = 0.75, 0.15, 0.5, 0.35
_TILE = 2.6, 3.1
"""Width and height of a confusion matrix with its margin, in cells."""
_MIDDLE: Final[dict[str, Any]] = {"ha": "center", "va": "center"}
_CLASS_COLUMNS = ("finding", "n_images", "n_studies")
_MARKERS: Final = "osD^v*"  # runs differ by more than their colour
_MAX_SETTINGS: Final = 40  # of an ablation, the best
_MAX_CURVES: Final = 6  # as many as there are colours
_COUNTS_LABEL: Final = "with the finding (log scale)"
_AUROC_LABEL: Final = "AUROC in test"


# -- of one run ---


def draw_plots(run: Run) -> dict[str, Path]:
    """Draw every plot of a run that has been evaluated, into its ``plots`` folder.

    Gives PNG files by the plots' names; ``curves`` only where the evaluation kept them.
    """
    paths = {name: run.plot_path(name) for name in PLOTS_OF_TRAINING}
    search, chosen_epochs = run.read_table("epoch_search"), run.config["chosen_epochs"]
    _draw_epoch_search(search, chosen_epochs, paths["epoch_search"])
    _draw_training_curves(run.read_table("history"), paths["training_curves"])
    return paths | draw_test_plots(run)


def draw_test_plots(run: Run) -> dict[str, Path]:
    """Draw those plots that show how a test went; as :func:`draw_plots`."""
    per_finding = run.read_table("per_finding")
    is_shown = (per_finding["n_positive_test"] > 0) & per_finding["tp"].notna()
    occurring = per_finding[is_shown]
    common = occurring.nlargest(MAX_MATRICES, "n_positive_test")
    paths = {name: run.plot_path(name) for name in PLOTS if name not in PLOTS_OF_TRAINING}
    _draw_per_finding(per_finding, paths["per_finding"])
    names, images, studies = (per_finding[key].tolist() for key in _CLASS_COLUMNS)
    draw_class_distribution(names, images, studies, paths["class_distribution"])
    _draw_class_vs_performance(per_finding, paths["class_vs_performance"])
    _draw_confusion_matrices(common, 5, paths["confusion_matrices"])
    _draw_confusion_matrices(common[:N_COMMON_MATRICES], 3, paths["confusion_matrices_six"])
    if run.has_table("curves") and run.has_table("calibration"):
        _draw_curves(run.read_table("curves"), run.read_table("calibration"), paths["curves"])
    else:
        del paths["curves"]
    return paths


def _draw_epoch_search(search: pd.DataFrame, chosen_epochs: int, path: Path) -> None:
    with open_figure(path, 7, 4, _PANEL_MARGINS) as figure:
        axes = figure.add_subplot()
        epochs = search["epochs"]
        for fold in [name for name in search if str(name).startswith("fold_")]:
            axes.plot(epochs, search[fold], ".-", color=GREY, linewidth=0.8, alpha=0.7)
        axes.plot([], [], ".-", color=GREY, linewidth=0.8, label="one fold")
        axes.errorbar(
            epochs,
            search["mean_auroc"],
            yerr=search["std_auroc"],
            color=BLUE,
            marker="o",
            capsize=4,
            linewidth=2,
            label="mean ± standard deviation",
        )
        axes.axvline(
            chosen_epochs, color=ORANGE, linestyle="--", label=f"chosen: {chosen_epochs} epochs"
        )
        if len(epochs) <= 12:  # more would run into each other
            axes.set_xticks(epochs)
        axes.set_xlabel("epochs")
        axes.set_ylabel("macro AUROC of the held-out fold")
        axes.set_title("Search for the number of epochs")
        axes.legend()


def _draw_training_curves(history: pd.DataFrame, path: Path) -> None:
    history = keep_longest(history)
    folds = history[history["fold"] != FINAL_FOLD]
    final = history[history["fold"] == FINAL_FOLD]
    with open_figure(path, 9, 3.6, _PANEL_MARGINS) as figure:
        loss, auroc = figure.subplots(1, 2, gridspec_kw={"wspace": 0.22})
        _draw_folds(loss, folds, "train_loss", BLUE, "train")
        _draw_folds(loss, folds, "val_loss", GREEN, "held-out fold")
        if len(final):
            line = final.groupby("epoch")["train_loss"].mean()
            loss.plot(line.index, line, "--", color=ORANGE, label="train, final model")
        _draw_folds(auroc, folds, "val_auroc", GREEN, "held-out fold")
        loss.set(xlabel="epoch", ylabel="loss", title="Loss")
        auroc.set(xlabel="epoch", ylabel="macro AUROC", title="Macro AUROC")
        for axes in (loss, auroc):
            axes.xaxis.get_major_locator().set_params(integer=True)
        loss.legend()
        auroc.legend(loc="lower right")


def _draw_folds(axes: Axes, folds: pd.DataFrame, column: str, color: str, label: str) -> None:
    """Every fold as a thin line, their mean as a thick one."""
    curves = folds.pivot_table(index="epoch", columns="fold", values=column)
    if curves.empty:
        return
    axes.plot(curves.index, curves, color=color, linewidth=0.6, alpha=0.4)
    axes.plot(curves.index, curves.mean(axis=1), color=color, linewidth=2, label=label)


def _draw_per_finding(per_finding: pd.DataFrame, path: Path) -> None:
    table = per_finding.sort_values("auroc", na_position="first", kind="stable")
    names = zip(table["finding"], table["n_positive_test"], strict=True)
    labels = [f"{finding}  ({n})" for finding, n in names]
    ylabel = "finding (how many have it in test)"
    with open_rows(path, labels, xlabel=_AUROC_LABEL, ylabel=ylabel) as axes:
        _draw_auroc(axes, table)


def _draw_class_vs_performance(per_finding: pd.DataFrame, path: Path) -> None:
    table = per_finding.sort_values("n_images", kind="stable")
    margins = (label_width(table["finding"]), 0.15, *ROWS_MARGINS)
    with open_figure(path, 10.5, rows_height(len(table)), margins) as figure:
        counts, aurocs = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.05})
        _draw_counts(counts, table)
        _draw_auroc(aurocs, table)
        label_rows(counts, table["finding"])
        counts.set_title("")
        aurocs.tick_params(axis="y", length=0)


def _draw_auroc(axes: Axes, table: pd.DataFrame) -> None:
    """AUROC with its interval per row of the table, from the bottom up, and the chance line."""
    places = np.arange(len(table))
    axes.axvline(0.5, color=ORANGE, linestyle="--", linewidth=1.2, label="chance")
    is_rare = find_few(table)
    interval = f"AUROC, {100 * LEVEL:.0f} % interval"
    few = f"fewer than {FEW_POSITIVES} positive patients or studies"
    for chosen, color, label in ((~is_rare, BLUE, interval), (is_rare, GREY, few)):
        rows = table[chosen]
        bounds = [rows["auroc"] - rows["auroc_low"], rows["auroc_high"] - rows["auroc"]]
        axes.errorbar(
            rows["auroc"],
            places[chosen],
            xerr=np.nan_to_num(np.clip(bounds, 0, None)),
            fmt="o",
            color=color,
            markerfacecolor=color if color == BLUE else "white",
            elinewidth=1.4,
            markersize=4.5,
            label=label if rows["auroc"].notna().any() else None,
        )
    for place in places[table["auroc"].isna()]:
        axes.text(0.51, place, "not scored", va="center", color=GREY, style="italic", fontsize=8)
    axes.set_xlim(min(0.4, np.nanmin([0.4, *table["auroc_low"]]) - 0.02), 1.01)
    axes.set_xlabel(_AUROC_LABEL)
    put_legend_on_top(axes, 3, "right")


def draw_class_distribution(
    findings: Sequence[str], images: Sequence[int], studies: Sequence[int], path: str | Path
) -> None:
    """Bars of how many images and studies have each finding, on a log scale, most frequent first.

    Findings may come in any order; the folder of the PNG file exists.
    """
    table = pd.DataFrame(dict(zip(_CLASS_COLUMNS, (findings, images, studies), strict=True)))
    table = table.sort_values("n_images", kind="stable")
    with open_rows(path, table["finding"], xlabel=_COUNTS_LABEL) as axes:
        _draw_counts(axes, table)


def _draw_counts(axes: Axes, table: pd.DataFrame) -> None:
    places = np.arange(len(table))
    axes.barh(places + 0.2, table["n_images"], 0.4, color=BLUE, label="images")
    axes.barh(places - 0.2, table["n_studies"], 0.4, color=ORANGE, label="studies")
    for place, n_images in zip(places, table["n_images"], strict=True):
        axes.annotate(
            f"{n_images:,}",
            (max(n_images, 0.8), place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    axes.set_xscale("log")
    axes.set_xlim(0.8, max(10, table["n_images"].max()) * 2)
    axes.xaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    axes.set_xlabel(_COUNTS_LABEL)
    axes.legend(loc="lower right")
    axes.set_title("How often each finding occurs")


def _draw_confusion_matrices(per_finding: pd.DataFrame, n_columns: int, path: Path) -> None:
    """One 2 x 2 matrix per finding: counts, coloured and annotated by the share of their row.

    All in one pair of axes, in units of a cell: 35 pairs take seconds. Names of rows and columns
    stand at the edges of the picture.
    """
    n_rows = max(1, math.ceil(len(per_finding) / n_columns))
    width, height = n_columns * _TILE[0], n_rows * _TILE[1]
    size = 0.65 * (width + 0.3), 0.65 * (height + 0.2)
    tp, fp, fn, tn = (per_finding[column].to_numpy(int) for column in CONFUSION_COLUMNS)
    counts = np.stack([tp, fn, fp, tn], axis=-1).reshape(-1, 2, 2)  # (F, present, called)
    shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    corners = [
        (_TILE[0] * (place % n_columns), _TILE[1] * (place // n_columns))
        for place in range(len(counts))
    ]
    with open_figure(path, *size, margins=(0, 0, 0, 0)) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.add_collection(_colour_cells(corners, shares))
        for place, (left, top) in enumerate(corners):
            _write_cells(axes, counts[place], shares[place], left, top)
            title = textwrap.fill(str(per_finding["finding"].iloc[place]), 22)
            axes.text(
                left + 1, top - 0.1, title, fontsize=8, weight="bold", ha="center", va="bottom"
            )
            if not left:
                for i, name in enumerate(("present", "absent")):
                    axes.text(-0.15, top + i + 0.5, name, fontsize=7.5, rotation=90, **_MIDDLE)
            if place + n_columns >= len(corners):
                for j, name in enumerate(("called", "not called")):
                    axes.text(left + j + 0.5, top + 2.15, name, fontsize=7.5, **_MIDDLE)
        axes.set(xlim=(-0.5, width - 0.2), ylim=(height - 0.5, -0.7), aspect="equal")
        axes.set_axis_off()


def _colour_cells(
    corners: Sequence[tuple[float, float]], shares: NDArray[np.float64]
) -> PolyCollection:
    squares = [
        [(x + dx, y + dy) for dx, dy in ((0, 0), (1, 0), (1, 1), (0, 1))]
        for left, top in corners
        for y in (top, top + 1)
        for x in (left, left + 1)
    ]
    cells = PolyCollection(squares, array=shares.ravel(), cmap="Blues", edgecolors="none")
    cells.set_clim(0, 1)
    return cells


def _write_cells(
    axes: Axes, counts: NDArray[np.int64], shares: NDArray[np.float64], left: float, top: float
) -> None:
    for (i, j), count in np.ndenumerate(counts):
        text = f"{count:,}\n{shares[i, j]:.0%}"
        color = "white" if shares[i, j] > 0.55 else INK
        axes.text(left + j + 0.5, top + i + 0.5, text, fontsize=8, color=color, **_MIDDLE)


def _draw_curves(curves: pd.DataFrame, calibration: pd.DataFrame, path: Path) -> None:
    """ROC, precision-recall and calibration: a thin line per finding, thick for all pooled."""
    stage = "after" if (calibration["stage"] == "after").any() else "before"
    bins = calibration[calibration["stage"] == stage]
    with open_figure(path, 10.5, 3.7, _PANEL_MARGINS) as figure:
        roc, ranked, reliability = figure.subplots(1, 3, gridspec_kw={"wspace": 0.22})
        for finding, rows in curves.groupby("finding"):
            style = _curve_style(str(finding))
            roc.plot(1 - rows["specificity"], rows["sensitivity"], **style)
            ranked.plot(rows["sensitivity"], rows["ppv"], **style)
        for finding, rows in bins.groupby("finding"):
            marker = {"marker": "o", "markersize": 4} if finding == POOLED else {}
            reliability.plot(
                rows["mean_probability"], rows["observed"], **_curve_style(str(finding)), **marker
            )
        for axes in (roc, reliability):
            axes.plot([0, 1], [0, 1], color=ORANGE, linestyle="--", linewidth=1.2)
        roc.set(xlabel="1 − specificity", ylabel="sensitivity", title="ROC")
        ranked.set(xlabel="recall", ylabel="precision", title="Precision and recall")
        reliability.set(xlabel="stated probability", ylabel="share", title="Calibration")
        for axes in (roc, ranked, reliability):
            axes.set(xlim=(0, 1), ylim=(0, 1.02))
        roc.plot([], [], **_curve_style("one"), label="one finding")
        roc.plot([], [], **_curve_style(POOLED), label="all pooled")
        roc.legend(loc="lower right")


def _curve_style(finding: str) -> dict[str, Any]:
    if finding == POOLED:
        return {"color": BLUE, "linewidth": 2.2, "zorder": 3}
    return {"color": GREY, "linewidth": 0.7, "alpha": 0.6}


# -- of several runs, and of an ablation ---


def write_comparison(comparison: Comparison, folder: str | Path) -> tuple[Path, Path]:
    """Write ``comparison.csv`` and ``comparison.png`` into a folder, which is made if missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / "comparison.csv", folder / "comparison.png"
    write_table(table, comparison.table)
    draw_comparison(comparison, picture)
    return table, picture


def draw_comparison(comparison: Comparison, path: str | Path) -> None:
    """Draw the AUROC difference of every run and finding, with its interval, as a PNG.

    Findings whose difference is beyond luck after Holm's correction are filled markers; the mean
    over findings is the top row. Intervals of very few studies run out of the frame. The folder of
    the file exists.
    """
    table = comparison.table
    table = table[(table["rows"] == comparison.rows[0]) & (table["measure"] == "auroc")]
    findings = _order_findings(table)
    runs = comparison.runs[1:]
    furthest = max(0.05, 1.4 * table["difference"].abs().max())
    labels = [name or "mean over findings" for name in findings]
    against = f"AUROC difference to {comparison.runs[0]}"
    xlabel = f"{against}, with {LEVEL:.0%} interval over {UNITS[comparison.unit]}"
    with open_rows(path, labels, xlabel=xlabel) as axes:
        axes.axvline(0, color=GREY, linewidth=1)
        for k, run in enumerate(runs):
            shift = 0.5 * ((k + 0.5) / len(runs) - 0.5)
            _draw_differences(axes, table[table["run"] == run], findings, run, k, shift)
        axes.set_xlim(-furthest, furthest)
        put_legend_on_top(axes, 3)


def _order_findings(table: pd.DataFrame) -> list[str]:
    """Findings that were compared, from the bottom up: fewest positives first, the mean on top."""
    first_run = table[table["run"] == table["run"].iloc[0]].dropna(subset=["difference"])
    of_findings = first_run[first_run["finding"] != MACRO]
    return [*of_findings.sort_values("n_positive", kind="stable")["finding"], MACRO]


def _draw_differences(
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


def draw_ablation(table: pd.DataFrame, path: str | Path) -> Path:
    """Draw every setting's folds, their mean, and the baselines, best on top, as a PNG.

    Of the table of :class:`cxr_cache.training.ablate.Ablation`, the best forty settings and all
    baselines are drawn. The folder of the file exists.
    """
    path = Path(path)
    n_before = (table["kind"] == "head").cumsum()
    shown = table[(table["kind"] == "baseline") | (n_before <= _MAX_SETTINGS)][::-1]
    folds = shown[[name for name in shown if str(name).startswith("fold_")]].to_numpy()
    is_head = (shown["kind"] == "head").to_numpy()
    places = np.arange(len(shown))
    labels = [str(label) for label in shown["setting"]]
    xlabel = "macro AUROC on held-out folds (each fold a line)"
    with open_rows(path, labels, xlabel=xlabel) as axes:
        axes.plot(folds, places, "|", color=GREY, markersize=7)
        for kind, color, marker, name in (
            (is_head, BLUE, "o", "head"),
            (~is_head, ORANGE, "D", "baseline"),
        ):
            if kind.any():
                means = shown["mean_auroc"].to_numpy()[kind]
                label = f"{name}, mean over folds"
                axes.plot(means, places[kind], marker, color=color, label=label)
        put_legend_on_top(axes, 2)
    return path


def draw_curve(curve: pd.DataFrame, path: str | Path) -> Path:
    """Draw how the score grows with the number of training images, as a PNG.

    Of the curve of :class:`cxr_cache.training.ablate.Ablation`, baselines and those six settings
    are drawn that are best on the most images. Every repeat is a dot, and bars are the standard
    deviation over repeats. The folder of the file exists.
    """
    path, unit = Path(path), "images" if "images" in curve else "studies"
    last = curve.groupby("setting", sort=False).tail(1)
    heads = last[last["kind"] == "head"].nlargest(_MAX_CURVES, "mean_auroc")["setting"].tolist()
    baselines = last[last["kind"] == "baseline"]["setting"].tolist()
    repeats = [name for name in curve if str(name).startswith("repeat_")]
    with open_figure(path, 6.5, 4.2) as figure:
        axes = figure.add_subplot()
        axes.set_xscale("log")
        # Bars of one number of images stand side by side.
        n_curves = len(heads) + len(baselines)
        shifts = iter(1.03 ** (np.arange(n_curves) - (n_curves - 1) / 2))
        styles = [("-", PALETTE), ("--", (INK, GREY, *PALETTE))]
        for names, (line, colors) in zip((heads, baselines), styles, strict=True):
            for i, name in enumerate(names):
                rows, color = curve[curve["setting"] == name], colors[i % len(colors)]
                places = rows[unit] * next(shifts)
                axes.plot(places, rows[repeats], ".", color=color, markersize=3, alpha=0.5)
                axes.errorbar(
                    *(places, rows["mean_auroc"], rows["std_repeats"]),
                    color=color,
                    linestyle=line,
                    marker=_MARKERS[i % len(_MARKERS)],
                    markersize=5,
                    capsize=3,
                    label=name,
                )
        ticks = curve.drop_duplicates("n_train")
        labels = [
            f"{n:,.0f}" + ("" if n_train.isdigit() else f"\n({n_train})")
            for n, n_train in zip(ticks[unit], ticks["n_train"], strict=True)
        ]
        axes.set_xticks(ticks[unit], labels)
        axes.minorticks_off()
        spread = "mean ± standard deviation over repeats" if len(repeats) > 1 else "one repeat"
        axes.set(
            xlabel=f"training {unit} of each fold (log scale)",
            ylabel=f"macro AUROC on held-out folds\n{spread}",
        )
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8)
    return path
