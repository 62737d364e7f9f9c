"""How another hospital's machine shows the same patients: exposure, grain, frame and marker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cxr_cache.datasets.phantoms.film import Box
from cxr_cache.errors import ConfigError

STANDARD: Final = "standard"


@dataclass(frozen=True)
class Style:
    """What a machine does to every picture; factors are 1 and shares 0 for the standard one."""

    exposure: float = 1.0  # factor; below 1 the picture is darker
    contrast: float = 1.0  # factor of the tone curve's exponent
    grain: float = 1.0  # factor of the noise
    frame: float = 0.0  # width of the black frame, as a share of the picture's side
    marker: float = 0.0  # height of the letter L at the patient's left, likewise

    def finish(self, pixels: NDArray[np.uint8], *, is_frontal: bool) -> NDArray[np.uint8]:
        """Lay the frame round a picture ``(S, S)`` and the marker on it; a copy, or itself."""
        if not self.frame and not self.marker:
            return pixels
        size = len(pixels)
        edge = self._edge(size)
        framed = np.zeros_like(pixels)
        inner = slice(edge, size - edge)
        framed[inner, inner] = pixels[inner, inner]
        if self.marker and is_frontal:
            height = max(3, round(self.marker * size))
            stroke = max(1, height // 5)
            top, left = edge + stroke, size - edge - stroke - 3 * height // 5
            bottom, right = top + height, left + 3 * height // 5
            framed[top:bottom, left : left + stroke] = 255
            framed[bottom - stroke : bottom, left:right] = 255
        return framed

    def clip(self, box: Box, size: int) -> Box | None:
        """The part of a box ``(x0, y0, x1, y1)`` in pixels that the frame leaves visible."""
        edge = self._edge(size)
        x0, y0 = (max(edge, start) for start in box[:2])
        x1, y1 = (min(size - edge, end) for end in box[2:])
        return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None

    def _edge(self, size: int) -> int:
        return round(self.frame * size)


STYLES: Final[Mapping[str, Style]] = {
    STANDARD: Style(),
    "digitised": Style(exposure=0.55, contrast=1.25, grain=2.5, frame=0.04, marker=0.07),
}
"""By name. ``digitised`` is a scanned film: darker, grainier, with a frame and a side marker."""


def find_style(name: str) -> Style:
    """The style of this name, or ConfigError with the names that there are."""
    if name not in STYLES:
        raise ConfigError(f"style is {name!r}; it must be one of: {', '.join(STYLES)}.")
    return STYLES[name]
