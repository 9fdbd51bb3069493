"""Axes, panels and the placement of labels, shared by every figure."""

from __future__ import annotations

import io
import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

from sae_research.config.reporting import Visualization
from sae_research.runtime.files import write_bytes

INK, MUTED, GRID = "#222222", "#6B6B6B", "#E6E6E6"
TEXT, SMALL = 9.0, 7.5
"""Font sizes in points."""

# --- files ---------------------------------------------------------------------------------------


def save(figure: Figure, path: Path) -> None:
    """Draw a figure as PNG. The same figure gives the same bytes: no software version or date goes in."""
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()  # once, where `savefig` draws a figure with a layout twice
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    Image.fromarray(pixels).save(buffer, format="png", compress_level=2, dpi=(figure.dpi, figure.dpi))
    write_bytes(path, buffer.getvalue())


def write_images(folder: Path, draw: Mapping[str, Callable[[], Figure]], workers: int = 1) -> list[Path]:
    """Write `<name>.png` for every name and delete the folder's other images. Returns what was written, sorted.

    workers: processes to draw on; above 1 by forking, and `draw` must be picklable.
    """
    for path in folder.glob("*.png"):
        if path.stem not in draw:
            path.unlink()
    jobs = [(folder / f"{name}.png", drawn) for name, drawn in draw.items()]
    if workers == 1:
        for job in jobs:
            _draw(*job)
    else:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            pool.starmap(_draw, jobs, chunksize=1)
    return sorted(path for path, _ in jobs)


def _draw(path: Path, drawn: Callable[[], Figure]) -> None:
    save(drawn(), path)


# --- panels --------------------------------------------------------------------------------------


def panels(
    style: Visualization, columns: int, rows: int = 1, height: float = 0.75, legend: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, row by row, so small that text stays legible where it fills a page's width. height: of a
    panel, over its width; legend: inches below the panels."""
    width = style.width_inches * {1: 0.7, 2: 0.58, 3: 0.5}.get(columns, 0.45)
    size = (width * columns, height * width * rows + legend)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=size, dpi=style.dpi, facecolor="white", layout=layout)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def panel(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """A panel's title and labels."""
    plain(axes, x_label, y_label)
    axes.yaxis.set_label_coords(-0.16, 0.5)
    axes.set_title(title, fontsize=TEXT + 1, color=INK)


def legend_below(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """One panel's legend under all panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False, labelcolor=INK)


# --- axes ----------------------------------------------------------------------------------------


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


def say(axes: Axes, message: str, keep_labels: bool = False) -> None:
    """An empty panel that says why it is empty."""
    axes.set_xticks([])
    axes.set_yticks([])
    if not keep_labels:
        axes.set_axis_off()
    axes.text(0.5, 0.5, _wrapped(message), fontsize=TEXT, color=MUTED, ha="center", va="center", transform=axes.transAxes)


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
    """A logarithmic axis with plain numbers at `log_ticks`."""
    set_scale, set_limits = (
        (axis.axes.set_xscale, axis.axes.set_xlim) if isinstance(axis, XAxis) else (axis.axes.set_yscale, axis.axes.set_ylim)
    )
    set_scale("log")
    axis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    set_limits(low, high)


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two values; the powers alone over three decades, more where there would be
    fewer than three.

    >>> log_ticks(9.2, 60), log_ticks(25, 75), log_ticks(31, 34)
    ([10.0, 20.0, 50.0], [30.0, 40.0, 50.0, 60.0, 70.0], [31.2, 32.0, 32.8, 33.6])
    """
    for steps in ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)):
        if steps == (1.0,) and high / low <= 2000:
            continue
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [float(f"{step:g}e{decade}") for decade in decades for step in steps]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 3:
            return inside
    return [float(f"{tick:.6g}") for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]


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
        costs = {
            box: 2 * (width * height - box.overlap(frame)) + sum(box.overlap(other) for other in (*markers, *placed, *taken))
            for box in _candidates(x, y, width, height, radius)
        }
        placed.append(min(costs, key=lambda box: round(costs[box], 6)))
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
