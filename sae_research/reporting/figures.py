"""Draw `images/*.png` without pyplot: no display, no state, less to import."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from matplotlib.transforms import IdentityTransform, blended_transform_factory

from sae_research.config.reporting import Visualization
from sae_research.plotting.axes import (
    GRID,
    INK,
    MUTED,
    SMALL,
    TEXT,
    Box,
    log_axis,
    place_labels,
    plain,
    say,
    span,
    write_images,
)
from sae_research.reporting.equal_l0_figure import equal_l0
from sae_research.reporting.metrics import headline
from sae_research.reporting.rows import Row, Run
from sae_research.reporting.style import chosen_styles, marker_size, marker_styles, short_names
from sae_research.reporting.tables import Point, points, residual_baseline

IMAGES = Path("images")
MARKER = 7.0
CUT = r"$\downarrow$"


def draw_all(run: Run, style: Visualization, root: Path = Path("."), workers: int = 1) -> list[Path]:
    """Write every image under `images/` and delete images that no longer exist. Returns what was written."""
    figures = RunFigures(run, style)
    draw: dict[str, Callable[[], Figure]] = {f"l0_vs_{key}": partial(figures.against_l0, key) for key in run.plotted}
    draw |= {
        "overview": figures.overview,
        "equal_l0": figures.equal_l0,
        "latent_density": figures.latent_density,
        "training_curves": figures.training_curves,
    }
    return write_images(root / IMAGES, draw, workers)


class RunFigures:
    """The figures of one run in one style. Panels are placed by hand, since names of points need their final places."""

    def __init__(self, run: Run, style: Visualization) -> None:
        self.run, self.style = run, style
        self.markers = marker_styles((row.group for row in run.rows), chosen_styles(style))
        self.names = short_names(run.rows)
        self.cut = False
        """Whether the panels drawn so far cut an interval."""

    def against_l0(self, key: str) -> Figure:
        """One metric against L0, the legend beside it."""
        figure = self._figure()
        self._panel(figure.subplots(gridspec_kw={"left": 0.103, "right": 0.745, "bottom": 0.125, "top": 0.96}), key)
        self._legend(figure, loc="upper left", bbox_to_anchor=(0.76, 0.96))
        return figure

    def overview(self) -> Figure:
        """The first four of the plotted metrics against L0, the legend below them."""
        figure = self._figure(1.52, 2.09)
        margins: dict[str, Any] = {
            "left": 0.0675,
            "right": 0.99,
            "bottom": 0.102,
            "top": 0.981,
            "wspace": 0.183,
            "hspace": 0.198,
        }
        keys = self.run.plotted
        panels = figure.subplot_mosaic([[*keys[:2]], [*keys[2:4]]], gridspec_kw=margins)
        for key, axes in panels.items():
            self._panel(axes, key)
        self._legend(figure, loc="lower center", bbox_to_anchor=(0.5, 0.015), ncols=5)
        return figure

    def equal_l0(self) -> Figure:
        """Every architecture's sparsity grid, and where grids can be compared."""
        return equal_l0(self._figure(1.45, 1.2), self.run, self.markers)

    def latent_density(self) -> Figure:
        """How often latents fire: one small histogram over log10 density per SAE, all on one axis."""
        shown = [row for row in self.run.rows if row.evals["core"].get("density_histogram")]
        figure = self._figure()
        figure.set_figheight(1.1 + 0.42 * max(len(shown), 5))
        width, height = figure.get_size_inches()
        left = 0.3 + 0.082 * max((len(row.name) for row in shown), default=0)  # inches for the longest name
        axes = figure.add_axes((left / width, 0.62 / height, 1 - (left + 0.75) / width, 1 - 1.0 / height))
        if not shown:
            say(axes, self.run.unavailable("core") or "core evaluation: no density histograms")
            return figure
        for index, row in enumerate(shown):
            self._density(axes, row, base=len(shown) - 1 - index)
        plain(axes, "log10 of the fraction of tokens on which a latent is non-zero", "")
        axes.set_yticks([len(shown) - 1 - index for index in range(len(shown))], [row.name for row in shown])
        axes.set_ylim(-0.12, len(shown))
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(visible=False, axis="y")
        axes.text(1.02, 1.01, "dead", transform=axes.transAxes, fontsize=TEXT - 1, color=MUTED)
        return figure

    def training_curves(self) -> Figure:
        """Loss, L0 and variance explained against training tokens."""
        figure = self._figure(1.45, 0.7)
        columns = {"loss": "Training loss", "l0": "L0", "variance_explained": "Variance explained"}
        margins: dict[str, Any] = {"left": 0.06, "right": 0.975, "bottom": 0.165, "top": 0.845, "wspace": 0.226}
        for column, axes in figure.subplot_mosaic([[*columns]], gridspec_kw=margins).items():
            self._curves(axes, column, columns[column])
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(
                handles,
                labels,
                loc="upper center",
                ncols=6,
                frameon=False,
                fontsize=TEXT,
                labelcolor=INK,
                borderaxespad=0.2,
            )
        return figure

    # --- parts ---------------------------------------------------------------------------------

    def _figure(self, width: float = 1.0, height: float = 1.0) -> Figure:
        """width and height: over those of a single image."""
        size = (width * self.style.width_inches, height * self.style.height_inches)
        return Figure(figsize=size, dpi=self.style.dpi, facecolor="white")

    def _panel(self, axes: Axes, key: str) -> None:
        metric = headline(key)
        unit = " accuracy" if key.startswith("sae_") else " (nats, log scale)" if metric.log else ""
        plain(axes, "L0 (latents per token, log scale)", metric.label + unit + metric.arrow)
        shown = [point for point in points(self.run, key) if not metric.log or point.y > 0]
        if not shown:
            reason = self.run.unavailable("core") or self.run.unavailable(metric.eval)
            say(axes, reason or f"{metric.label} was not measured", keep_labels=True)
            return
        floor = metric.floor
        drawn = [(point, max(point.y, floor)) for point in shown]
        baseline = residual_baseline(self.run, key)
        log_axis(axes.xaxis, *span([point.x for point in shown], log=True))
        bars = _bars(shown, key, min(point.y for point in shown) / 3 if metric.log else floor)
        heights = [y for _, y in drawn] + [end for _, low, high, _ in bars for end in (low, high)]
        heights += [baseline] if baseline is not None else []
        if metric.log:
            log_axis(axes.yaxis, *span(heights, log=True))
        else:
            axes.set_ylim(*span(heights, log=False))
        self._families(axes, shown, floor)
        taken = self._intervals(axes, bars)
        self._marks(axes, drawn)
        taken += self._baseline(axes, key, baseline) if baseline is not None else []
        self._label(axes, drawn, floor, taken)

    def _marks(self, axes: Axes, drawn: Sequence[tuple[Point, float]]) -> None:
        groups: dict[tuple[str, bool, bool], list[tuple[float, float]]] = {}
        for point, y in drawn:
            group = point.row.group, point.row.interpolating, point.row.is_control
            groups.setdefault(group, []).append((point.x, y))
        for (name, hollow, control), places in groups.items():
            marker = self.markers[name]
            face, edge, width = ("white", marker.color, 1.3) if hollow else (marker.color, "white", 0.6)
            axes.plot(
                *zip(*places, strict=True),
                linestyle="none",
                marker=marker.marker,
                markersize=marker_size(marker, MARKER),
                color=marker.color,
                markerfacecolor=face,
                markeredgecolor=edge,
                markeredgewidth=width,
                zorder=2.5 if control else 3,
            )

    def _intervals(self, axes: Axes, bars: Sequence[Bar]) -> list[Box]:
        """Intervals as thin upright lines behind the markers, with an arrow where one is cut; returns their places."""
        places = []
        for point, low, high, cut in bars:
            color = self.markers[point.row.group].color
            if cut:
                arrow: dict[str, Any] = {
                    "marker": CUT,
                    "markersize": 6,
                    "markeredgewidth": 0,
                    "color": color,
                    "alpha": 0.8,
                    "zorder": 2.2,
                }
                axes.plot([point.x], [low], **arrow)
                self.cut = True
            axes.plot(
                [point.x, point.x], [low, high], color=color, linewidth=1.1, alpha=0.55, zorder=2.2, solid_capstyle="butt"
            )
            (x, bottom), (_, top) = axes.transData.transform([(point.x, low), (point.x, high)])
            places.append(Box(x - 1, bottom, 2, top - bottom))
        return places

    def _families(self, axes: Axes, shown: Sequence[Point], floor: float) -> None:
        """A thin line through the members of one family (same architecture, same dictionary)."""
        families: dict[tuple[str, str], list[Point]] = {}
        for point in shown:
            base = point.row.cfg.get("base")
            if base and not point.row.is_control:
                families.setdefault((point.row.group, base), []).append(point)
        for (name, _), members in families.items():
            members.sort(key=lambda point: point.x)
            heights = [max(point.y, floor) for point in members]
            axes.plot(
                [point.x for point in members],
                heights,
                color=self.markers[name].color,
                linewidth=0.9,
                alpha=0.45,
                zorder=2,
            )

    def _baseline(self, axes: Axes, key: str, baseline: float) -> list[Box]:
        """The raw residual stream as a dashed line; returns the places of its name and the line."""
        axes.axhline(baseline, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
        y = axes.transData.transform((1, baseline))[1]
        text = f"raw residual stream, {headline(key).label.split()[-1]}"
        size = self._pixels(SMALL)
        across_axes_up_pixels = blended_transform_factory(axes.transAxes, IdentityTransform())
        axes.text(
            0.995,
            y + 0.3 * size,
            text,
            transform=across_axes_up_pixels,
            ha="right",
            fontsize=SMALL,
            color=MUTED,
        )
        width = 0.55 * size * len(text)
        return [Box(axes.bbox.x1 - width, y, width, 1.4 * size), Box(axes.bbox.x0, y - 1, axes.bbox.width, 2)]

    def _label(self, axes: Axes, drawn: Sequence[tuple[Point, float]], floor: float, taken: Sequence[Box]) -> None:
        size = self._pixels(SMALL)
        texts = [self.names[point.row.name] + (f" ({point.y:.2g}↓)" if point.y < floor else "") for point, _ in drawn]
        places = [tuple(axes.transData.transform((point.x, y))) for point, y in drawn]
        frame = Box(axes.bbox.x0, axes.bbox.y0, axes.bbox.width, axes.bbox.height)
        radius = self._pixels(MARKER) / 2
        boxes = place_labels(places, [(0.58 * size * len(text), 0.95 * size) for text in texts], frame, radius, taken)
        for text, box, place, (point, _) in zip(texts, boxes, places, drawn, strict=True):
            _leader(axes, place, box, nearest=2 * radius)
            edge, side = _facing_edge(box, place[0])
            color = MUTED if point.row.is_control else INK
            axes.text(
                edge,
                box.middle[1],
                text,
                transform=IdentityTransform(),
                ha=side,
                va="center",
                fontsize=SMALL,
                color=color,
                zorder=4,
            )

    def _legend(self, figure: Figure, **where: Any) -> None:
        rows = [row for row in self.run.rows if row.value("l0") is not None]
        if not rows:
            return
        dot: dict[str, Any] = {"linestyle": "none", "markersize": MARKER}
        edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.6}
        handles = []
        for name in dict.fromkeys(row.group for row in rows):
            known = self.markers[name]
            style: dict[str, Any] = {"marker": known.marker, "color": known.color, "markersize": marker_size(known, MARKER)}
            handles.append(Line2D([], [], label=name, **{**dot, **edge, **style}))
        if any(row.interpolating for row in rows):
            label = "hollow: interpolates," + (" " if "ncols" in where else "\n") + "not comparable"
            handles.append(Line2D([], [], marker="o", markerfacecolor="white", color=MUTED, label=label, **dot))
        if any(row.interval(key) for row in rows for key in self.run.plotted):
            label = "bar: 95 % interval," + (" " if "ncols" in where else "\n") + "other text"
            handles.append(Line2D([], [], marker="|", color=MUTED, label=label, **dot))
        if self.cut:
            label = "arrow: interval" + (" " if "ncols" in where else "\n") + "goes on below"
            handles.append(Line2D([], [], marker=CUT, color=MUTED, label=label, **dot))
        spacing: dict[str, Any] = {"handletextpad": 0.3, "borderaxespad": 0.0, "columnspacing": 1.4}
        figure.legend(handles=handles, frameon=False, fontsize=TEXT, labelcolor=INK, **spacing, **where)

    def _density(self, axes: Axes, row: Row, base: int) -> None:
        histogram = row.evals["core"]["density_histogram"]
        edges, counts = histogram["log10_edges"], histogram["counts"]
        total = sum(counts) + histogram["dead"]
        tallest = max(counts, default=0) or 1
        color = self.markers[row.group].color
        tops = [base + 0.86 * count / tallest for count in counts]
        axes.stairs(tops, edges, baseline=base, fill=True, color=color, alpha=0.55, linewidth=0)
        axes.axhline(base, color=color, linewidth=0.7)
        dead = f"{100 * histogram['dead'] / total:.0f} %" if total else "–"
        beside_axes = axes.get_yaxis_transform()
        axes.text(1.02, base + 0.1, dead, transform=beside_axes, fontsize=SMALL + 0.5, color=INK)

    def _curves(self, axes: Axes, column: str, label: str) -> None:
        plain(axes, "Training tokens", label)
        axes.yaxis.set_label_coords(-0.17, 0.5)
        curves = [curve for curve in self.run.curves if column in curve.columns and "tokens" in curve.columns]
        if not curves:
            say(axes, "no SAE was trained in this run", keep_labels=True)
            return
        by_name = {row.name: row.group for row in self.run.rows}
        spare = marker_styles((curve.name for curve in curves if by_name.get(curve.name) not in self.markers), self.markers)
        for curve in curves:
            marker = spare.get(curve.name) or self.markers[by_name[curve.name]]
            x, y = curve.columns["tokens"], curve.columns[column]
            axes.plot(x, y, color=marker.color, linewidth=1.4, label=curve.name)
        values = [value for curve in curves for value in curve.columns[column] if math.isfinite(value)]
        if column != "variance_explained" and values and min(values) > 0 and max(values) > 5 * min(values):
            log_axis(axes.yaxis, *span(values, log=True))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    def _pixels(self, typographic_points: float) -> float:
        return typographic_points * self.style.dpi / 72


class Bar(NamedTuple):
    """An interval as it is drawn."""

    point: Point
    low: float
    high: float
    cut: bool
    """Whether it goes on below `low`."""


def _bars(shown: Sequence[Point], key: str, floor: float) -> list[Bar]:
    """The interval of every point that has one, cut at the floor."""
    found = [(point, bounds) for point in shown if (bounds := point.row.interval(key)) is not None]
    return [Bar(point, max(low, floor), max(high, floor), low < floor) for point, (low, high) in found]


def _leader(axes: Axes, place: tuple[float, float], box: Box, nearest: float) -> None:
    """A thin line from a point to a label that had to move away from it."""
    (x, y), (to_x, to_y) = place, box.middle
    if max(abs(to_x - x) - box.width / 2, abs(to_y - y) - box.height / 2) > nearest:
        axes.add_artist(Line2D([x, to_x], [y, to_y], transform=IdentityTransform(), color=GRID, linewidth=0.8, zorder=1))


def _facing_edge(box: Box, x: float) -> tuple[float, str]:
    """Where to anchor a label: the edge that faces the point is exact, its width only estimated."""
    if box.left > x:
        return box.left, "left"
    if box.left + box.width < x:
        return box.left + box.width, "right"
    return box.middle[0], "center"
