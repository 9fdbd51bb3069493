"""The charts of training curves and of densities as Vega-Lite specifications."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sae_research.reporting.rows import Run
from sae_research.reporting.site.charts import FIT, Chart, Marks, Spec, scale, ticks
from sae_research.reporting.site.marks import mark
from sae_research.reporting.style import MarkerStyle, marker_styles
from sae_research.reporting.tables import curve_rows
from sae_research.runtime.formatting import ABSENT, amount, percent

HEIGHT = 240
DENSITIES = 40
"""Histograms in one chart."""

CURVES = {"loss": "Training loss", "l0": "L0", "variance_explained": "Variance explained"}


def curve_data(run: Run) -> list[dict[str, Any]]:
    """The data set `curves`: the rows of `metrics/plots/training_curves.json`."""
    return [{**row, "at": amount(row["tokens"])} for curve in run.curves for row in curve_rows(curve) if "tokens" in row]


def curve_colors(run: Run, chosen: Mapping[str, MarkerStyle]) -> dict[str, str]:
    """Of every trained SAE: its architecture's, or a spare one where no result names it."""
    groups = {row.name: row.group for row in run.rows}
    known = marker_styles((row.group for row in run.rows), chosen)
    spare = marker_styles((curve.name for curve in run.curves if curve.name not in groups), known)
    styles = {curve.name: known[groups[curve.name]] if curve.name in groups else spare[curve.name] for curve in run.curves}
    return {name: mark(style)["color"] for name, style in styles.items()}


def training(run: Run, chosen: Mapping[str, MarkerStyle]) -> list[Chart]:
    """Loss, L0 and variance explained against training tokens; none where nothing was trained."""
    colors = curve_colors(run, chosen)
    shown = [column for column in CURVES if any(column in curve.columns for curve in run.curves)]
    color = {
        "field": "sae",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(colors), "range": list(colors.values())},
        "legend": {"orient": "bottom", "columns": 3, "symbolType": "stroke", "symbolStrokeWidth": 3},
    }
    return [
        Chart(
            f"training_{column}",
            CURVES[column],
            {
                "data": {"name": "curves"},
                "transform": [{"filter": f"isValid(datum['{column}'])"}],
                "height": HEIGHT,
                "width": "container",
                "autosize": FIT,
                "mark": {"type": "line", "strokeWidth": 1.8, "point": {"size": 60, "opacity": 0}},
                "encoding": {
                    "x": {
                        "field": "tokens",
                        "type": "quantitative",
                        "title": "Training tokens",
                        "axis": {
                            "format": "~s",
                            "labelExpr": "datum.value ? datum.label : '0'",
                            "tickCount": 4,
                            "labelOverlap": True,
                        },
                    },
                    "y": {
                        "field": column,
                        "type": "quantitative",
                        "title": CURVES[column] + (" (log scale)" if _spans(run, column) else ""),
                        **_curve_scale(run, column),
                    },
                    "color": color,
                    "tooltip": [
                        {"field": "sae", "title": "SAE"},
                        {"field": "at", "title": "tokens"},
                        {"field": column, "title": CURVES[column], "format": ".4~g"},
                    ],
                },
            },
            f"{CURVES[column]} of {len(run.curves)} SAEs while they were trained.",
        )
        for column in shown
    ]


def _spans(run: Run, column: str) -> bool:
    """Whether a logarithmic axis shows more, as in the figure."""
    values = _measured(run, column)
    return column != "variance_explained" and bool(values) and min(values) > 0 and max(values) > 5 * min(values)


def _measured(run: Run, column: str) -> list[float]:
    return [value for curve in run.curves for value in curve.columns.get(column, []) if math.isfinite(value)]


def _curve_scale(run: Run, column: str) -> Spec:
    if not _spans(run, column):
        return {"scale": {"zero": False}, "axis": {"format": ".4~g"}}
    values = ticks(_measured(run, column))
    return {"scale": {"type": "log", "nice": False, "padding": 8}, "axis": {"format": "~g", "values": values}}


def density_data(run: Run) -> list[dict[str, Any]]:
    """The data set `densities`: one row an SAE, its bars as lists (log10 density `from` and `to`, `latents`, `height`)."""
    rows = []
    for row in run.rows:
        histogram = row.evals.get("core", {}).get("density_histogram")
        if histogram:
            edges, counts = histogram["log10_edges"], histogram["counts"]
            tallest, total = max(counts, default=0) or 1, sum(counts) + histogram["dead"]
            bars = [bar for bar in zip(edges, edges[1:], counts, strict=False) if bar[2]]
            rows.append(
                {
                    "sae": row.name,
                    "group": row.group,
                    "dead": percent(histogram["dead"] / total) if total else ABSENT,
                    "from": [low for low, _, _ in bars],
                    "to": [high for _, high, _ in bars],
                    "latents": [count for _, _, count in bars],
                    "height": [round(count / tallest, 3) for _, _, count in bars],
                }
            )
    return rows


def densities(run: Run, marks: Marks) -> list[Chart]:
    """How often latents fire: a histogram for each SAE, `DENSITIES` of them in a chart."""
    rows = density_data(run)
    names = [row["sae"] for row in rows]
    edges = [edge for row in rows for edge in (*row["from"], *row["to"])]
    charts = []
    for start in range(0, len(names), DENSITIES):
        part = names[start : start + DENSITIES]
        which = "" if len(names) <= DENSITIES else f", {part[0]} to {part[-1]}"
        says = f"Histograms of how often latents fire, of {len(part)} SAEs{which}; the first table holds the fraction alive."
        charts.append(Chart(f"density_{start}", f"Density of latents{which}", _density(part, edges, marks), says, wide=True))
    return charts


def _density(names: Sequence[str], edges: Sequence[float], marks: Marks) -> Spec:
    """One histogram above the other on one axis, as in the figure."""
    above = len(names) - 1
    y: Spec = {
        "field": "foot",
        "type": "quantitative",
        "title": None,
        "scale": {"domain": [-0.1, len(names)], "nice": False},
        "axis": {
            "values": list(range(len(names))),
            "labelExpr": f"{json.dumps(list(names))}[{above} - datum.value]",
            "labelLimit": 150,
            "labelOverlap": False,
            "labelBaseline": "bottom",
            "grid": True,
            "ticks": False,
            "domain": False,
        },
    }
    x: Spec = {
        "field": "from",
        "type": "quantitative",
        "title": "log10 of the fraction of tokens",
        "scale": {"domain": [min(edges, default=-6), max(edges, default=0)], "nice": False},
        "axis": {"grid": False, "format": "~g", "tickCount": 6},
    }
    return {
        "data": {"name": "densities"},
        "transform": [
            {"filter": {"field": "sae", "oneOf": list(names)}},
            {"flatten": ["from", "to", "latents", "height"]},
            {"calculate": f"{above} - indexof({json.dumps(list(names))}, datum.sae)", "as": "foot"},
            {"calculate": "datum.foot + 0.9 * datum.height", "as": "top"},
        ],
        "height": 28 * len(names),
        "width": "container",
        "autosize": FIT,
        "mark": {"type": "rect", "opacity": 0.75},
        "encoding": {
            "x": x,
            "x2": {"field": "to"},
            "y": y,
            "y2": {"field": "top"},
            "color": scale("color", marks),
            "tooltip": [
                {"field": "sae", "title": "SAE"},
                {"field": "latents", "title": "latents"},
                {"field": "from", "title": "log10 density from"},
                {"field": "to", "title": "to"},
                {"field": "dead", "title": "dead latents of this SAE"},
            ],
        },
    }
