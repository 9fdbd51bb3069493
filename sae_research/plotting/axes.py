"""What every figure is drawn with: colours, plain axes, and PNGs of equal bytes for equal pixels.

What the figures are drawn on: plain axes, logarithmic ticks, and sheets put together from drawn panels.

Where to write the names of points so that they cover neither points nor each other.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image

from sae_research.runtime.files import write_bytes

INK, MUTED, GRID = "#222222", "#6B6B6B", "#E6E6E6"
TEXT, SMALL = 9.0, 7.5
"""Font sizes in points."""


def pixels_of(figure: Figure) -> np.ndarray:
    """Draw a figure. [height, width, 3] of uint8"""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def save(pixels: np.ndarray, path: Path, dpi: int) -> None:
    """Write a PNG. The same pixels give the same bytes: no software version or date goes in."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", compress_level=2, dpi=(dpi, dpi))
    write_bytes(path, buffer.getvalue())


def plain(axes: Axes, x_label: str, y_label: str) -> None:
    """Axes without box: two spines, a light grid, muted numbers."""
    axes.set_xlabel(x_label, fontsize=TEXT, color=INK)
    axes.set_ylabel(y_label, fontsize=TEXT, color=INK)
    axes.yaxis.set_label_coords(-0.115, 0.5)  # so that the panels of a sheet line up
    axes.tick_params(labelsize=TEXT - 1, colors=MUTED, length=3)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#B0B0B0")


__all__ = [
    "GRID",
    "INK",
    "MUTED",
    "SMALL",
    "TEXT",
    "below",
    "beside",
    "count",
    "log_axis",
    "pixels_of",
    "plain",
    "save",
    "say",
    "sheet",
    "span",
]

# --- pixels ------------------------------------------------------------------------------------


def beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two images in a row, the lower one padded with white."""
    height = max(left.shape[0], right.shape[0])
    return np.hstack([_padded(left, height, left.shape[1]), _padded(right, height, right.shape[1])])


def below(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Two images in a column, the narrower one padded with white."""
    width = max(top.shape[1], bottom.shape[1])
    return np.vstack([_padded(top, top.shape[0], width), _padded(bottom, bottom.shape[0], width)])


def sheet(panels: Sequence[np.ndarray]) -> np.ndarray:
    """Four panels, two by two."""
    return below(beside(panels[0], panels[1]), beside(panels[2], panels[3]))


def _padded(image: np.ndarray, height: int, width: int) -> np.ndarray:
    missing = ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0))
    return np.pad(image, missing, constant_values=255)


# --- axes --------------------------------------------------------------------------------------


def say(axes: Axes, message: str, keep_labels: bool = False) -> Figure:
    """An empty panel that says why it is empty."""
    axes.set_xticks([])
    axes.set_yticks([])
    if not keep_labels:
        axes.set_axis_off()
    centred = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.5, _wrapped(message), fontsize=TEXT, color=MUTED, **centred)
    return axes.figure


def _wrapped(message: str, width: int = 46) -> str:
    lines = [""]
    for word in message.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:8])


def span(values: Sequence[float], log: bool) -> tuple[float, float]:
    """Limits with a margin on both sides, also around a single value."""
    low, high = (math.log10(min(values)), math.log10(max(values))) if log else (min(values), max(values))
    margin = max(0.09 * (high - low), 0.12 if log else 0.02 * max(abs(low), abs(high), 1e-3))
    return (10 ** (low - margin), 10 ** (high + margin)) if log else (low - margin, high + margin)


def log_axis(axis: Axis, low: float, high: float) -> None:
    """A logarithmic axis with plain numbers at 1, 2, 5 (at powers of ten where it spans three decades)."""
    set_scale, set_limits = (
        (axis.axes.set_xscale, axis.axes.set_xlim) if axis.axis_name == "x" else (axis.axes.set_yscale, axis.axes.set_ylim)
    )
    set_scale("log")
    steps = (1,) if high / low > 2000 else (1, 2, 5)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    set_limits(low, high)


def count(value: float) -> str:
    """1200000 -> 1.2M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    bottom: float
    width: float
    height: float

    @property
    def middle(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.bottom + self.height / 2

    def overlap(self, other: Box) -> float:
        """Area shared with another box."""
        across = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        up = min(self.bottom + self.height, other.bottom + other.height) - max(self.bottom, other.bottom)
        return max(across, 0.0) * max(up, 0.0)


# right, left, above, below and the diagonals: where the label's box sits against the point
_DIRECTIONS = ((1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_REACHES = (1.0, 2.2, 3.6)


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    radius: float,
    taken: Sequence[Box] = (),
) -> list[Box]:
    """A box for each label, in pixels: the nearest free place around its point, tried in a fixed order.

    `radius` is the markers' size, `taken` holds what else must stay readable. Where every place is covered
    the least covered one is used.
    """
    markers = [Box(x - radius, y - radius, 2 * radius, 2 * radius) for x, y in points]
    placed: list[Box] = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        best: tuple[float, Box] | None = None
        for box in _candidates(x, y, width, height, radius):
            outside = width * height - box.overlap(frame)
            cost = 2 * outside + sum(box.overlap(other) for other in (*markers, *placed, *taken))
            if best is None or cost < best[0] - 1e-9:
                best = cost, box
            if cost == 0:
                break
        placed.append(best[1])
    return placed


def _candidates(x: float, y: float, width: float, height: float, radius: float) -> list[Box]:
    boxes = []
    for reach in _REACHES:
        gap = radius * 1.45 * reach
        for across, up in _DIRECTIONS:
            slant = 0.7 if across and up else 1.0
            left = x + across * gap * slant - width * (1 - across) / 2
            bottom = y + up * gap * slant - height * (1 - up) / 2
            boxes.append(Box(left, bottom, width, height))
    return boxes
