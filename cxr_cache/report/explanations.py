"""Drawings of where a finding was seen on single radiographs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np

from cxr_cache.errors import ImageError
from cxr_cache.models.explain import Explanation
from cxr_cache.report.drawing import open_figure

_MAP_COLOURS: Final = "cividis"  # made to look the same to colour-blind people
_MAP_OPACITY: Final = 0.75  # of the map's maximum; its zero is transparent


def write_explanations(
    explanations: Iterable[Explanation | ImageError], folder: Path, *, raw: bool = False
) -> tuple[int, list[str]]:
    """Draw every explanation into a folder as ``IMAGE_FINDING.png``.

    Parameters
    ----------
    explanations
        As :func:`cxr_cache.models.explain.explain_images` gives them.
    folder
        Made where it is not there.
    raw
        Also write the map itself, ``.npy``, float32, rows and columns of patches.

    Returns
    -------
    n_written
        Pictures.
    failures
        What was said about images that could not be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names: Counter[str] = Counter()
    failures = []
    for one in explanations:
        if isinstance(one, ImageError):
            failures.append(str(one))
            continue
        name = f"{one.path.stem}_{one.finding}"
        name = re.sub(r"[^\w.-]+", "_", name)
        names[name] += 1  # images of two folders may share a name
        name += f"_{names[name]}" if names[name] > 1 else ""
        draw_explanation(one, folder / f"{name}.png")
        if raw:
            np.save(folder / f"{name}.npy", one.relevance)
    return names.total(), failures


def draw_explanation(explanation: Explanation, path: Path) -> None:
    """Draw the radiograph, alone and with the map over it, into a PNG.

    The map is scaled to its own maximum, so that colours do not compare between pictures; where it
    is zero, nothing covers the radiograph.
    """
    height, width = explanation.picture.shape[:2]
    relevance = explanation.relevance / max(float(explanation.relevance.max()), 1e-12)
    with open_figure(path, 10, 1 + 4.8 * min(height / width, 2)) as figure:
        plain, covered = figure.subplots(1, 2)
        for axes in (plain, covered):
            frame = (0, width, height, 0)
            axes.imshow(explanation.picture, cmap="gray", vmin=0, vmax=255, extent=frame)
            axes.set_axis_off()
        shown = covered.imshow(
            relevance,
            cmap=_MAP_COLOURS,
            vmin=0,
            vmax=1,
            alpha=_MAP_OPACITY * relevance,
            extent=explanation.extent,
            interpolation="bilinear",
        )
        covered.set(xlim=(0, width), ylim=(height, 0))
        figure.colorbar(shown, ax=covered, label="relevance, share of the maximum", shrink=0.8)
        figure.suptitle(
            f"{explanation.finding}: {explanation.decision}\n"
            f"{explanation.path.name}. Not for clinical use."
        )
