"""What the figures are drawn on: plain axes, logarithmic ticks, and sheets put together from drawn panels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sae_research.drawing import GRID, INK, MUTED, SMALL, TEXT, pixels_of, plain, save

__all__ = ["GRID", "INK", "MUTED", "SMALL", "TEXT", "below", "beside", "count", "log_axis", "pixels_of", "plain", "save",
           "say", "sheet", "span"]

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
        (axis.axes.set_xscale, axis.axes.set_xlim)
        if axis.axis_name == "x"
        else (axis.axes.set_yscale, axis.axes.set_ylim)
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
