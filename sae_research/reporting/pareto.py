"""L0 against loss recovered for every recipe of one or more folders of trained SAEs, in one picture.

    python -m sae_research pareto trained_saes other_run=before --out pareto.png

Reads the `eval_results.json` beside each SAE. A panel for every hook; in it a marker and colour for each recipe, a line
through its sparsities, and in grey the frontier: SAEs that no other beats in both at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from sae_research.plotting.axes import INK, MUTED, SMALL, TEXT, log_axis, plain, save, span
from sae_research.reporting.metric_table import METRICS
from sae_research.reporting.results import is_number
from sae_research.reporting.style import KNOWN, MarkerStyle, marker_styles
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_json

EVAL_FILE = "eval_results.json"
SHOWN = {metric.key: metric for metric in METRICS if metric.eval == "core" and metric.table and metric.better == "higher"}
"""What may be drawn: core's columns of the report's first table that should be high."""
LINES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1)))
"""One for each folder; the first one's markers are filled, the others' hollow."""
PANEL_WIDTH, PANEL_HEIGHT, LEGEND_WIDTH, DPI = 5.4, 4.4, 2.3, 110
MARKER = 7.0


class Point(NamedTuple):
    """One SAE in the picture."""

    name: str
    recipe: str
    label: str
    """Of the folder it comes from; empty where there is one folder."""
    hook: str
    l0: float
    value: float


def draw_pareto(folders: Sequence[str], path: Path, metric: str = "loss_recovered") -> list[Point]:
    """Draw the picture; the same results give the same bytes. folders: `FOLDER` or `FOLDER=LABEL`.

    Raises `UserError` for a folder without results and for an unknown metric.
    """
    if metric not in SHOWN:
        raise UserError(f"--metric {metric}: unknown; known: {', '.join(SHOWN)}")
    if path.suffix != ".png":
        raise UserError(f"--out {path}: must end with .png")
    found = read_points(folders, metric)
    save(_figure(found, metric), path)
    return found


def read_points(folders: Sequence[str], metric: str) -> list[Point]:
    """One point for each `eval_results.json` below the folders that holds the metric and an L0 above zero."""
    found = []
    for given in folders:
        place, _, label = given.partition("=")
        folder = Path(place)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        label = label or (folder.resolve().name if len(folders) > 1 else "")
        files = sorted(folder.rglob(EVAL_FILE))
        points = [point for file in files if (point := _point(file, label, metric)) is not None]
        if not points:
            raise UserError(
                f"{folder}: no {EVAL_FILE} with an L0 and {metric} below it; train with train.evaluate_tokens above 0"
                if not files
                else f"{folder}: none of {len(files)} {EVAL_FILE} holds an L0 above zero and {metric}"
            )
        found += points
    return found


def _point(file: Path, label: str, metric: str) -> Point | None:
    values: dict[str, Any] = read_json(file)
    l0, value = values.get("l0", math.nan), values.get(metric, math.nan)
    if not (is_number(l0) and l0 > 0 and is_number(value)):
        return None
    return Point(
        file.parent.name,
        str(values.get("recipe") or values.get("form") or "unknown"),
        label,
        " -> ".join(str(values[key]) for key in ("hook_name", "hook_out") if key in values),
        float(l0),
        float(value),
    )


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other equals or beats in both L0 (lower) and value (higher), by L0."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.l0, -point.value)):
        if not best or point.value > best[-1].value:
            best.append(point)
    return best


def _figure(points: Sequence[Point], metric: str) -> Figure:
    hooks = sorted({point.hook for point in points}, key=_hook_order)
    labels = list(dict.fromkeys(point.label for point in points))
    markers = _recipe_markers(point.recipe for point in points)
    columns = min(3, len(hooks))
    rows = -(-len(hooks) // columns)
    size = (columns * PANEL_WIDTH + LEGEND_WIDTH, rows * PANEL_HEIGHT)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    for hook, axes in zip_longest(hooks, figure.subplots(rows, columns, squeeze=False).flat):
        if hook is None:
            axes.set_axis_off()
            continue
        _panel(axes, [point for point in points if point.hook == hook], labels, markers, metric)
        axes.set_title(hook, fontsize=TEXT, color=MUTED, loc="left")
    _legend(figure, markers, labels)
    return figure


def _panel(axes: Axes, points: Sequence[Point], labels: Sequence[str], markers: dict[str, MarkerStyle], metric: str) -> None:
    plain(axes, "L0 (latents per token, log scale)", SHOWN[metric].label + SHOWN[metric].arrow)
    log_axis(axes.xaxis, *span([point.l0 for point in points], log=True))
    axes.set_ylim(*span([point.value for point in points], log=False))
    best = frontier(points)
    axes.plot(
        [point.l0 for point in best],
        [point.value for point in best],
        color="#C8C8C8",
        linewidth=4,
        solid_capstyle="round",
        zorder=1,
    )
    for recipe, shown in markers.items():
        for number, label in enumerate(labels):
            line = sorted((p for p in points if (p.recipe, p.label) == (recipe, label)), key=lambda p: p.l0)
            if line:
                axes.plot([p.l0 for p in line], [p.value for p in line], **_style(shown, number), zorder=3)


def _style(marker: MarkerStyle, number: int) -> dict[str, Any]:
    """How a recipe of the folder with this number is drawn."""
    face = marker.color if number == 0 else "white"
    return {
        "color": marker.color,
        "marker": marker.marker,
        "markersize": MARKER,
        "linewidth": 1.2,
        "linestyle": LINES[number % len(LINES)],
        "markerfacecolor": face,
        "markeredgecolor": "white" if number == 0 else marker.color,
        "markeredgewidth": 0.6 if number == 0 else 1.3,
    }


def _legend(figure: Figure, markers: dict[str, MarkerStyle], labels: Sequence[str]) -> None:
    handles = [Line2D([], [], label=recipe, **_style(shown, 0)) for recipe, shown in markers.items()]
    if len(labels) > 1:
        grey = MarkerStyle("o", MUTED)
        handles += [Line2D([], [], label=label, **_style(grey, number)) for number, label in enumerate(labels)]
    handles.append(Line2D([], [], color="#C8C8C8", linewidth=4, label="frontier: no SAE is\nbetter in both"))
    figure.legend(
        handles=handles,
        loc="outside right center",
        frameon=False,
        fontsize=SMALL + 1,
        labelcolor=INK,
        handlelength=2.6,
        labelspacing=0.8,
    )


def _recipe_markers(recipes: Iterable[str]) -> dict[str, MarkerStyle]:
    """A marker for every recipe: that of the architecture of its name (`top_k`: `topk`), else a spare one."""
    known = {_plain(architecture): architecture for architecture in KNOWN}
    called = {name: known.get(_plain(name), name) for name in sorted(set(recipes))}
    found = marker_styles(called.values())
    return {name: found[style] for name, style in called.items()}


def _plain(name: str) -> str:
    return name.replace("_", "")


def _hook_order(hook: str) -> tuple[int, str]:
    layer = next((int(part) for part in hook.split(".") if part.isdigit()), -1)
    return layer, hook
