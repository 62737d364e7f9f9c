"""Everything that `make bench` measured, as one table and one picture.

    python scripts/bench_table.py [--folder benchmarks] [--plot docs/performance.png]

A figure is a time. Beside it stand the plain way's and the floor's, measured in the same run as it,
and the two ratios.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from benchmarking import format_table

from cxr_cache.report.drawing import BLUE, INK, ORANGE, label_rows, open_figure, put_legend_on_top

ROOT = Path(__file__).parent.parent


class Line(NamedTuple):
    """Seconds for the same work, three ways; NaN where a way was not measured."""

    what: str
    ours: float
    plain: float = np.nan
    floor: float = np.nan


def _of_search(results: Any) -> Iterator[Line]:
    for what, result in results["results"].items():
        times = (result.get(way, np.nan) for way in ("seconds", "plain", "floor"))
        yield Line(what, *times)


def _of_finetune(results: Any) -> Iterator[Line]:
    ways = results["results"]
    ours = ways["product_ram"]
    yield Line(
        "fine-tuning, per image (plain: from files)",
        1 / ours["images_per_s"],
        1 / ways["files"]["images_per_s"],
        1 / ways["tail"]["floor_images_per_s"],
    )


def _of_extract(results: Any) -> Iterator[Line]:
    speed = {name: way["images_per_s"] for name, way in results["results"].items()}
    floor = max(speed["shared"], speed["alone"])
    yield Line("extraction, per image", 1 / speed["product"], 1 / speed["plain"], 1 / floor)


def _of_tokens(results: Any) -> Iterator[Line]:
    ways = {name: way["mb_per_s"] for name, way in results["results"]["warm"].items()}
    mb = 16 * 197 * 768 * 2 / 1e6
    yield Line(
        "16 random rows of tokens (floor: memory map)",
        mb / ways["read_views"],
        floor=mb / ways["flat"],
    )


def _of_statistics(results: Any) -> Iterator[Line]:
    plain, ours, _ = results["seconds"].values()
    yield Line("2,000 resamples, AUROC and AP", ours, plain)


READERS: dict[str, Callable[[Any], Iterator[Line]]] = {
    "search": _of_search,
    "finetune": _of_finetune,
    "extract": _of_extract,
    "tokens": _of_tokens,
    "statistics": _of_statistics,
}


def read_lines(folder: Path) -> list[Line]:
    """Lines of all results that are there."""
    lines: list[Line] = []
    for name, read in READERS.items():
        path = folder / f"{name}.json"
        if path.is_file():
            lines += read(json.loads(path.read_text(encoding="utf-8")))
    return lines


def tabulate(lines: list[Line]) -> str:
    """Times, and how many times faster than plain and slower than the floor."""
    rows = [["", "ours", "plain way", "floor", "plain ÷ ours", "ours ÷ floor"]]
    for line in lines:
        times = [_in_words(seconds) for seconds in line[1:]]
        ratios = (line.plain / line.ours, line.ours / line.floor)
        rows.append([line.what, *times, *("" if np.isnan(r) else f"{r:.3g}" for r in ratios)])
    return format_table(rows)


def _in_words(seconds: float) -> str:
    if np.isnan(seconds):
        return ""
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def draw(lines: list[Line], path: Path) -> None:
    """Each line's three times on a common scale: ours is 1."""
    shown = lines[::-1]
    places = np.arange(len(shown))
    with open_figure(path, 8, 0.9 + 0.42 * len(shown)) as figure:
        axes = figure.add_subplot()
        axes.axvline(1, color=INK, linewidth=1)
        for way, color, marker, label in (
            ("floor", BLUE, "s", "floor: the bare arithmetic"),
            ("plain", ORANGE, "o", "plain way"),
        ):
            ratios = np.array([getattr(line, way) / line.ours for line in shown])
            axes.hlines(places, np.minimum(ratios, 1), np.maximum(ratios, 1), color, alpha=0.35)
            axes.plot(ratios, places, marker, color=color, label=label)
            for place, ratio in zip(places, ratios, strict=True):
                if not np.isnan(ratio):
                    axes.annotate(
                        f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}",
                        (ratio, place),
                        xytext=(0, 6),
                        textcoords="offset points",
                        ha="right" if way == "floor" else "left",
                        fontsize=8,
                        color=color,
                    )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
        label_rows(axes, [line.what for line in shown])
        axes.set_xlabel("time, as a multiple of cxr-cache's (measured in the same run)")
        put_legend_on_top(axes, 2)


def main() -> None:
    """Read, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "performance.png")
    options = parser.parse_args()
    lines = read_lines(options.folder)
    if not lines:
        raise SystemExit(f"{options.folder} holds no results; run `make bench` first.")
    print(tabulate(lines))
    draw(lines, options.plot)


if __name__ == "__main__":
    main()
