"""What the pictures of transfer are built from: panels that fit a page, legends, histograms as shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sae_research.reporting.canvas import INK, SMALL, TEXT, plain
from sae_research.visualization_params import Visualization


def new_figure(style: Visualization, columns: int, rows: int = 1, height: float = 0.75, legend: float = 0.0) -> Figure:
    """Panels of equal size, small enough that text stays legible where the picture fills a page's width. height: of a panel,
    over its width; legend: inches below the panels."""
    width = style.width_inches * {1: 0.7, 2: 0.58, 3: 0.5}.get(columns, 0.45)
    figure = Figure(figsize=(width * columns, height * width * rows + legend), dpi=style.dpi, facecolor="white",
                    layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure


def panel(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """A panel's title and labels."""
    plain(axes, x_label, y_label)
    axes.yaxis.set_label_coords(-0.16, 0.5)
    axes.set_title(title, fontsize=TEXT + 1, color=INK)


def legend(axes: Axes, **options: Any) -> None:
    """A legend inside the panel."""
    axes.legend(fontsize=SMALL, frameon=False, labelcolor=INK, **options)


def legend_below(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """One panel's legend under all panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False,
                  labelcolor=INK)


def stairs(axes: Axes, histogram: dict[str, Any], label: str, color: str, **options: Any) -> None:
    """A histogram as shares of its own total."""
    edges = histogram["edges"] if "edges" in histogram else histogram["log10_edges"]
    counts = np.asarray(histogram["counts"], float)
    if counts.sum():
        axes.stairs(counts / counts.sum(), edges, label=label, color=color, linewidth=1.3, **options)


def trim(axes: Axes, histograms: Sequence[dict[str, Any]]) -> None:
    """Limit x to where any histogram holds something."""
    filled = [(edges[index], edges[index + 1]) for histogram in histograms
              for edges in [histogram.get("edges") or histogram["log10_edges"]]
              for index, number in enumerate(histogram["counts"]) if number]
    if filled:
        low, high = min(low for low, _ in filled), max(high for _, high in filled)
        margin = 0.03 * (high - low)
        axes.set_xlim(low - margin, high + margin)


def short(hook: str) -> str:
    """`blocks.8.hook_resid_post` -> `layer 8, resid_post`."""
    layer, _, kind = hook.removeprefix("blocks.").partition(".")
    return f"layer {layer}, {kind.replace('hook_', '')}"
