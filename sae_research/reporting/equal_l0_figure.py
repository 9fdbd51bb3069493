"""One picture of all sparsity grids: lines between measured points, and the range of L0 that all of them cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sae_research.plotting.axes import INK, MUTED, SMALL, TEXT, log_axis, plain, say, span
from sae_research.reporting.comparisons import Grid, Points, at, common_l0, common_range, grids
from sae_research.reporting.metrics import Metric, headline
from sae_research.reporting.rows import Run
from sae_research.reporting.style import MarkerStyle, marker_size

COLUMNS = 3
STEPS = 12
"""Pieces that a line between two measured points is drawn in."""
LINES = ("-", (0, (4, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
"""For grids of one architecture that differ in dictionary or base."""


def equal_l0(figure: Figure, run: Run, markers: Mapping[str, MarkerStyle]) -> Figure:
    """A panel for each metric that ranks SAEs, against L0: one line per grid, one marker per single point."""
    found = grids(run)
    metrics = {metric.key: metric for metric in run.ranking}
    keys = [*metrics, *["."] * (-len(metrics) % COLUMNS)]
    margins: dict[str, Any] = {"left": 0.065, "right": 0.97, "bottom": 0.155, "top": 0.96, "wspace": 0.275, "hspace": 0.333}
    rows: list[Any] = [keys[start : start + COLUMNS] for start in range(0, len(keys), COLUMNS)]
    for key, axes in figure.subplot_mosaic(rows, gridspec_kw=margins).items():
        _panel(axes, found, metrics[key], run, markers)
    _legend(figure, found, markers)
    return figure


def _panel(axes: Axes, found: Sequence[Grid], metric: Metric, run: Run, markers: Mapping[str, MarkerStyle]) -> None:
    curves = [grid.curve(metric) for grid in found]
    log = metric.log and all(y > 0 for curve in curves for _, y in curve)
    plain(axes, "L0 (log scale)", metric.label + (" (nats, log)" if log else "") + metric.arrow)
    axes.yaxis.set_label_coords(-0.19, 0.5)
    if not any(curves):
        say(
            axes,
            run.unavailable("core") or run.unavailable(metric.eval) or f"{metric.label} was not measured",
            keep_labels=True,
        )
        return
    log_axis(axes.xaxis, *span([x for curve in curves for x, _ in curve], log=True))
    heights = [y for curve in curves for _, y in curve]
    if log:
        log_axis(axes.yaxis, *span(heights, log=True))
    else:
        axes.set_ylim(*span(heights, log=False))
    shared = common_range(curves)
    if shared and sum(len(curve) > 1 for curve in curves) > 1:
        axes.axvspan(*shared, color="#F1F1F1", zorder=0, linewidth=0)
    places = common_l0(curves)
    for grid, curve, line in zip(found, curves, _line_styles(found), strict=True):
        style = markers[grid.group]
        if curve:
            axes.plot(*zip(*_drawn(curve), strict=True), color=style.color, linestyle=line, linewidth=1.4, zorder=2.8)
            axes.plot(
                *zip(*curve, strict=True),
                linestyle="none",
                color=style.color,
                marker=style.marker,
                markersize=marker_size(style, 6.0),
                markeredgecolor="white",
                markeredgewidth=0.6,
                zorder=3,
            )
        ticks = [(x, y) for x in places if len(curve) > 1 and (y := at(curve, x)) is not None]
        if ticks:
            axes.plot(*zip(*ticks, strict=True), linestyle="none", marker="|", markersize=7, color=style.color, zorder=2.5)


def _drawn(curve: Points) -> Points:
    """The curve with places between its points: linear in log L0, it is bent where the axis is logarithmic."""
    between = [(x0 * (x1 / x0) ** (step / STEPS)) for (x0, _), (x1, _) in pairwise(curve) for step in range(STEPS)]
    return [*((x, y) for x in between if (y := at(curve, x)) is not None), curve[-1]]


def _line_styles(found: Sequence[Grid]) -> list[Any]:
    seen: dict[str, int] = {}
    styles = []
    for grid in found:
        styles.append(LINES[seen.get(grid.group, 0) % len(LINES)])
        seen[grid.group] = seen.get(grid.group, 0) + 1
    return styles


def _legend(figure: Figure, found: Sequence[Grid], markers: Mapping[str, MarkerStyle]) -> None:
    handles: list[Line2D | Patch] = []
    for grid, line in zip(found, _line_styles(found), strict=True):
        style, alone = markers[grid.group], len(grid.curve(headline("l0"))) < 2
        handles.append(
            Line2D(
                [],
                [],
                color=style.color,
                linestyle="none" if alone else line,
                marker=style.marker,
                markersize=marker_size(style, 6.0),
                markeredgecolor="white",
                label=grid.label + (" (one point)" if alone else ""),
            )
        )
    wide = [grid for grid in found if len(grid.curve(headline("l0"))) > 1]
    if wide:
        handles.append(Line2D([], [], color=MUTED, linestyle="none", marker="|", markersize=7, label="interpolated"))
    if len(wide) > 1:
        handles.append(Patch(color="#F1F1F1", label="L0 that all grids cover"))
    if handles:
        figure.legend(
            handles=handles,
            loc="lower center",
            ncols=min(len(handles), 6),
            frameon=False,
            fontsize=TEXT if len(handles) <= 6 else SMALL,
            labelcolor=INK,
            borderaxespad=0.2,
        )
