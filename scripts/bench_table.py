"""Everything that `make bench` measured, on every kind of processor: tables, page and picture.

    python scripts/bench_table.py [--check] [--folder benchmarks] [--page docs/performance.md]

A figure is a time. Beside it stand the plain way's and the floor's, measured in the same run as it,
and the two ratios. Ratios of all processors are put into the page, between two comments, and into
the picture beside it. With --check nothing is written: the status is 1 if either is stale.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from benchmarking import RESULTS, format_table
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cxr_cache.report.drawing import (
    BLUE,
    INK,
    ORANGE,
    Axes,
    label_rows,
    open_figure,
    put_legend_on_top,
)

PAGE: Final = RESULTS.parent / "docs" / "performance.md"
MARKS: Final = (
    "<!-- made by scripts/bench_table.py -->",
    "<!-- end of what scripts/bench_table.py makes -->",
)


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
        f"fine-tuning, tokens in memory, {results['settings']['precision']}",
        1 / ours["images_per_s"],
        1 / ways["files"]["images_per_s"],
        1 / ways["tail"]["floor_images_per_s"],
    )


def _of_extract(results: Any) -> Iterator[Line]:
    for precision, measured in results["precisions"].items():
        speed = {name: way["images_per_s"] for name, way in measured["results"].items()}
        floor = max(speed["shared"], speed["alone"])
        what = f"extraction, ViT-B/16, {precision}"
        yield Line(what, 1 / speed["product"], 1 / speed["plain"], 1 / floor)


def _of_decode(results: Any) -> Iterator[Line]:
    for kind in ("PNG 1,024", "PNG 2,000 x 2,500"):
        ways = {name: way["ms"] / 1000 for name, way in results["results"][kind].items()}
        floor = min(seconds for name, seconds in ways.items() if name.startswith("floor"))
        yield Line(f"{kind} to 224 pixels", ways["to 224: as it is"], ways["to 224: before"], floor)


def _of_tokens(results: Any) -> Iterator[Line]:
    ways = {name: way["mb_per_s"] for name, way in results["results"]["warm"].items()}
    mb = 16 * 197 * 768 * 2 / 1e6
    for way, reader in (("read_views", "read_views"), ("StoredTokens", "finetune's reader")):
        yield Line(f"tokens of 16 rows, {reader}", mb / ways[way], floor=mb / ways["flat"])


def _of_statistics(results: Any) -> Iterator[Line]:
    plain, ours, _ = results["seconds"].values()
    yield Line("2,000 resamples of AUROC and AP", ours, plain)


READERS: dict[str, Callable[[Any], Iterator[Line]]] = {
    "search": _of_search,
    "finetune": _of_finetune,
    "extract": _of_extract,
    "decode": _of_decode,
    "tokens": _of_tokens,
    "statistics": _of_statistics,
}

Measured: TypeAlias = dict[str, dict[str, Line]]
"""What was measured, and on which processor."""


def read_results(folder: Path) -> Measured:
    """Read all results in the folders of processors."""
    found: Measured = {}
    for name, read in READERS.items():
        for path in sorted(folder.glob(f"*/{name}.json")):
            for line in read(json.loads(path.read_text(encoding="utf-8"))):
                found.setdefault(line.what, {})[path.parent.name] = line
    return found


def list_processors(measured: Measured) -> list[str]:
    """Names of all processors that have a result."""
    return sorted({processor for lines in measured.values() for processor in lines})


def tabulate(lines: list[Line], title: str) -> str:
    """Times, and how many times faster than plain and slower than the floor."""
    rows = [[title, "ours", "plain way", "floor", "plain ÷ ours", "ours ÷ floor"]]
    for line in lines:
        rows.append([line.what, *map(_in_words, line[1:]), *_ratios(line, "")])
    return format_table(rows)


def _in_words(seconds: float) -> str:
    if np.isnan(seconds):
        return ""
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def _ratios(line: Line | None, missing: str) -> list[str]:
    """Plain way by ours, and ours by the floor, with three digits."""
    ratios = (line.plain / line.ours, line.ours / line.floor) if line else (np.nan, np.nan)
    return [
        missing if np.isnan(r) else f"{r:.2f}" if r < 10 else f"{r:.1f}" if r < 100 else f"{r:,.0f}"
        for r in ratios
    ]


def write_table(measured: Measured) -> str:
    """Write the table of the page: two columns for each processor."""
    processors = list_processors(measured)
    heads = [f"{name}: plain ÷ ours | ours ÷ floor" for name in processors]
    rows = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * 2 * len(processors)]
    for what, lines in measured.items():
        cells = [cell for name in processors for cell in _ratios(lines.get(name), "–")]
        rows.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def put_between_marks(page: str, table: str) -> str:
    """Give the page with another table."""
    start, end = map(re.escape, MARKS)
    made = "\n\n".join([MARKS[0], table, MARKS[1]])
    page, n_places = re.subn(f"{start}.*?{end}", lambda _: made, page, flags=re.DOTALL)
    if n_places != 1:
        raise SystemExit(f"The page has {n_places} places between {MARKS[0]} and {MARKS[1]}.")
    return page


def draw(measured: Measured, path: Path) -> None:
    """Each line's times on a common scale, on which ours is 1, for each processor."""
    processors, shown = list_processors(measured), list(measured)[::-1]
    with open_figure(path, 4 + 4 * len(processors), 1.1 + 0.42 * len(shown)) as figure:
        panels = figure.subplots(1, len(processors), sharex=True, sharey=True, squeeze=False)[0]
        for axes, processor in zip(panels, processors, strict=True):
            lines = [measured[what].get(processor, Line(what, np.nan)) for what in shown]
            _draw_ratios(axes, lines)
            axes.set_title(processor, pad=22)
            axes.set_xlabel("time, as a multiple of cxr-cache's")
            label_rows(axes, shown)
        put_legend_on_top(panels[0], 2)


def _draw_ratios(axes: Axes, lines: list[Line]) -> None:
    """Plain way and floor, as multiples of ours, one row per line from the bottom up."""
    places = np.arange(len(lines))
    axes.axvline(1, color=INK, linewidth=1)
    for way, color, marker, label in (
        ("floor", BLUE, "s", "floor: the bare arithmetic"),
        ("plain", ORANGE, "o", "plain way"),
    ):
        ratios = np.array([getattr(line, way) / line.ours for line in lines])
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


def note_source(plot: Path, table: str) -> None:
    """Write into the picture what it was drawn from."""
    source = PngInfo()
    source.add_text("Source", table)
    with Image.open(plot) as image:
        image.load()
        image.save(plot, pnginfo=source, optimize=True)


def list_stale(table: str, page: Path, plot: Path) -> list[str]:
    """Name page and picture where the results say something else by now."""
    text = page.read_text(encoding="utf-8")
    with Image.open(plot) as image:
        drawn_from = image.info.get("Source")
    fresh = {page.name: text == put_between_marks(text, table), plot.name: drawn_from == table}
    return [name for name, is_fresh in fresh.items() if not is_fresh]


def main() -> None:
    """Read and print; write the table into the page, and draw the picture beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="write nothing; is the page stale?")
    options = parser.parse_args()
    measured = read_results(options.folder)
    if not measured:
        raise SystemExit(f"{options.folder} holds no results; run `make bench` first.")
    table, plot = write_table(measured), options.page.with_suffix(".png")
    if options.check:
        if stale := list_stale(table, options.page, plot):
            raise SystemExit(f"Stale: {', '.join(stale)}. Run: python scripts/bench_table.py")
        return
    for processor in list_processors(measured):
        lines = [lines[processor] for lines in measured.values() if processor in lines]
        print(tabulate(lines, processor), end="\n\n")
    page = put_between_marks(options.page.read_text(encoding="utf-8"), table)
    options.page.write_text(page, encoding="utf-8")
    draw(measured, plot)
    note_source(plot, table)


if __name__ == "__main__":
    main()
