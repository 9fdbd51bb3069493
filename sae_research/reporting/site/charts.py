"""The charts as Vega-Lite specifications, in the figures' own markers and colours.

A specification names data sets that the page gives it (`saes`, `curves`, ...), so that no rows stand there twice, and
parameters that the page sets: `shown`, the architectures that are drawn; `read_at`, the L0 at which all are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sae_research.plotting.axes import log_ticks
from sae_research.reporting.metrics import Metric, headline
from sae_research.reporting.rows import Run
from sae_research.reporting.site.marks import mark
from sae_research.reporting.style import MarkerStyle, marker_styles, short_names
from sae_research.reporting.tables import points, residual_baseline
from sae_research.runtime.formatting import number, with_interval

Spec = dict[str, Any]
Marks = Mapping[str, Mapping[str, Any]]

MARKER_AREA = 90.0
"""Square pixels of a circle."""
HEIGHT = 300
FIT = {"type": "fit-x", "contains": "padding"}
L0_TITLE = "L0 (latents per token, log scale)"
BARS = "Bars: 95 % intervals over other text of the same kind."
BELOW = "▾ below a bar: the interval goes on below the axis."


class Chart(NamedTuple):
    """A chart with what is said of it."""

    key: str
    title: str
    spec: Spec
    says: str
    """Read out in its place by screen readers."""
    wide: bool = False
    notes: Sequence[str] = ()
    """What its signs mean, a line each, for the chart saved as a picture: the page says it outside the chart."""


# --- metrics against L0 --------------------------------------------------------------------------


def run_marks(run: Run, chosen: Mapping[str, MarkerStyle]) -> dict[str, dict[str, Any]]:
    """`marks.mark` of every group of the run that has a place in figures, in table order."""
    found = marker_styles(dict.fromkeys(row.group for row in run.rows), chosen)
    return {name: mark(style) for name, style in found.items()}


def sae_rows(run: Run) -> list[dict[str, Any]]:
    """The data set `saes`: for every metric what `placed` holds, beside each SAE's name, group and L0."""
    labels = short_names(run.rows)
    rows = {
        row.name: {
            "sae": row.name,
            "label": labels[row.name],
            "group": row.group,
            "control": row.is_control,
            "hollow": row.interpolating,
            "family": f"{row.group} {row.cfg['base']}" if row.cfg.get("base") and not row.is_control else None,
            "l0": row.value("l0"),
            "l0_text": with_interval(row.value("l0"), row.interval("l0")),
        }
        for row in sorted(run.rows, key=lambda row: not row.is_control)  # controls lie below the others
    }
    for key in run.plotted:
        metric = headline(key)
        drawn = [point for point in points(run, key) if not metric.log or point.y > 0]
        floor = axis_floor(metric, (point.y for point in drawn))
        for row, _, y in drawn:
            rows[row.name] |= placed(key, y, row.interval(key), floor)
    return list(rows.values())


def axis_floor(metric: Metric, values: Iterable[float]) -> float:
    """The lowest place at which a chart of these values draws anything; on a logarithmic axis a third of the least."""
    return min((value for value in values if value > 0), default=0.0) / 3 if metric.log else metric.floor


def placed(key: str, y: float, bounds: tuple[float, float] | None, floor: float) -> dict[str, Any]:
    """A value under its metric's key; where it is drawn (`_y`: not below the floor), its interval (`_low`, `_high`), both as
    text (`_text`), and what says that the value (`_cut`, a text) or its interval (`_below`) goes on below the floor."""
    known: dict[str, Any] = {"": y, "_y": max(y, floor), "_text": with_interval(y, bounds)}
    if bounds is not None:
        known |= {"_low": max(bounds[0], floor), "_high": max(bounds[1], floor)}
        if bounds[0] < floor:
            known |= {"_below": True, "_text": f"{known['_text']}, which goes on below the axis"}
    if y < floor:
        known["_cut"] = f"{number(y)} ↓"
    return {key + suffix: value for suffix, value in known.items()}


def against_l0(run: Run, key: str, marks: Marks, saes: Sequence[Mapping[str, Any]]) -> Chart:
    """One metric against L0: markers, 95 % intervals, families over one dictionary, and a line at the L0 that is read.

    saes: `sae_rows` of the run.
    """
    metric = headline(key)
    drawn = [point for point in points(run, key) if not metric.log or point.y > 0]
    unit = " (nats, log scale)" if metric.log else ""
    y_scale: Spec = {"type": "log" if metric.log else "linear", "nice": False, "padding": 10}
    y_axis: Spec = {"format": "~g"}
    if not metric.log:
        y_scale["zero"] = False
    else:
        y_axis["values"] = ticks([point.y for point in drawn])
    x: Spec = {
        "field": "l0",
        "type": "quantitative",
        "title": L0_TITLE,
        "scale": {"type": "log", "nice": False, "padding": 14},
        "axis": {"values": ticks([point.x for point in drawn]), "format": "~g", "labelOverlap": True},
    }
    y: Spec = {
        "field": f"{key}_y",
        "type": "quantitative",
        "title": metric.label + unit + metric.arrow,
        "scale": y_scale,
        "axis": y_axis,
    }
    rows = [row for row in saes if key in row]
    layer = _layers(key, metric.label, x, y, marks, rows)
    baseline = residual_baseline(run, key)
    if baseline is not None:
        layer = [_baseline(baseline), *layer]
    return Chart(
        key,
        f"{metric.label} against L0",
        {
            "params": [{"name": "shown", "value": list(marks)}, {"name": "read_at", "value": 0}],
            "data": {"name": "saes"},
            "transform": [{"filter": f"isValid(datum['{key}_y']) && indexof(shown, datum.group) >= 0"}],
            "height": HEIGHT,
            "width": "container",
            "autosize": FIT,
            "layer": layer,
        },
        f"Scatter plot of {metric.label.lower()} against L0 of {len(drawn)} SAEs; the table of results holds every value.",
        notes=chart_notes(key, rows, {"Hollow: interpolates, not comparable.": any(row["hollow"] for row in rows)}),
    )


def chart_notes(key: str, rows: Iterable[Mapping[str, Any]], more: Mapping[str, bool]) -> list[str]:
    """What the signs of a chart mean, those alone that it has."""
    suffixes = {name.removeprefix(f"{key}_") for row in rows for name in row if name.startswith(f"{key}_")}
    signs = {**more, BARS: "low" in suffixes, BELOW: "below" in suffixes}
    return [note for note, drawn in signs.items() if drawn]


def _layers(key: str, label: str, x: Spec, y: Spec, marks: Marks, rows: Sequence[Mapping[str, Any]]) -> list[Spec]:
    """What lies on the axes, those alone that have something to draw among the rows."""
    color = scale("color", marks)
    areas = ", ".join(f"{json.dumps(name)}: {MARKER_AREA * one['scale'] ** 2:.2f}" for name, one in marks.items())
    sized = {"calculate": f"({{{areas}}})[datum.group]", "as": "area"}
    dots = {
        "x": x,
        "y": y,
        "shape": scale("path", marks),
        "size": {"field": "area", "type": "quantitative", "scale": None},
        "tooltip": [
            {"field": "sae", "title": "SAE"},
            {"field": "group", "title": "architecture"},
            {"field": "l0_text", "title": "L0"},
            {"field": f"{key}_text", "title": label},
        ],
    }
    reading = {
        "data": {"values": [{}]},
        "transform": [{"filter": "read_at > 0"}, {"calculate": "read_at", "as": "read"}],
        "mark": {"type": "rule", "strokeWidth": 9, "opacity": 0.22, "style": "reading"},  # pale: intervals lie upon it
        "encoding": {"x": {**x, "field": "read"}},
    }
    families = {
        "transform": [{"filter": "isString(datum.family)"}],
        "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.45},
        "encoding": {"x": x, "y": y, "color": color, "detail": {"field": "family"}},
    }
    filled = {
        "transform": [{"filter": "!datum.hollow"}, sized],
        "mark": {"type": "point", "filled": True, "opacity": 1, "stroke": {"expr": "ground"}, "strokeWidth": 0.7},
        "encoding": {**dots, "fill": color},
    }
    hollow = {
        "transform": [{"filter": "datum.hollow"}, sized],
        "mark": {"type": "point", "filled": False, "fill": {"expr": "ground"}, "opacity": 1, "strokeWidth": 1.6},
        "encoding": {**dots, "stroke": color},
    }
    cut = {
        "transform": [{"filter": f"isValid(datum['{key}_cut'])"}],
        "mark": {"type": "text", "dy": -11, "fontSize": 10},
        "encoding": {"x": x, "y": y, "text": {"field": f"{key}_cut"}},
    }
    layers = [
        (reading, True),
        (families, any(row["family"] for row in rows)),
        *[(layer, True) for layer in interval_layers(key, x, y, color, rows)],
        (filled, any(not row["hollow"] for row in rows)),
        (hollow, any(row["hollow"] for row in rows)),
        (cut, any(f"{key}_cut" in row for row in rows)),
    ]
    return [layer for layer, drawn in layers if drawn]


def interval_layers(
    key: str, x: Spec, y: Spec, color: Spec, rows: Sequence[Mapping[str, Any]], where: str = "true", shift: float = 0
) -> list[Spec]:
    """Upright lines from `_low` to `_high`, and a small triangle below each that goes on below the axis.

    where: an expression that chooses rows. shift: pixels to the right.
    """
    bars = {
        "transform": [{"filter": f"isValid(datum['{key}_low']) && {where}"}],
        "mark": {"type": "rule", "strokeWidth": 1.4, "opacity": 0.7, "xOffset": shift, "aria": False},
        "encoding": {"x": x, "y": {**y, "field": f"{key}_low"}, "y2": {"field": f"{key}_high"}, "color": color},
    }
    triangle = {"type": "point", "shape": "triangle-down", "filled": True, "size": 40, "opacity": 0.9, "aria": False}
    below = {
        "transform": [{"filter": f"datum['{key}_below'] === true && {where}"}],
        "mark": {**triangle, "xOffset": shift, "yOffset": 3, "style": "below"},
        "encoding": {"x": x, "y": {**y, "field": f"{key}_low"}, "color": color},
    }
    layers = [(bars, any(f"{key}_low" in row for row in rows)), (below, any(f"{key}_below" in row for row in rows))]
    return [layer for layer, drawn in layers if drawn]


def scale(what: str, marks: Marks) -> Spec:
    """The channel `color` or `path` (a shape) of the marks, by architecture."""
    return {
        "field": "group",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": list(marks), "range": [one[what] for one in marks.values()]},
    }


def _baseline(value: float) -> Spec:
    """The raw residual stream as a dashed line with its name."""
    shared = {"data": {"values": [{"value": value, "text": f"raw residual stream {number(value)}"}]}}
    y = {"field": "value", "type": "quantitative"}
    return {
        **shared,
        "encoding": {"y": y},
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [5, 4], "style": "reference"}},
            {
                "mark": {"type": "text", "align": "right", "baseline": "bottom", "dy": -3, "style": "reference-name"},
                "encoding": {"text": {"field": "text"}, "x": {"value": "width"}},
            },
        ],
    }


def ticks(values: Iterable[float]) -> list[float]:
    """Of a logarithmic axis, from below the least value to above the largest: intervals reach further than values.

    >>> ticks([9.2, 60]), ticks([30, 64])
    ([5, 10, 20, 50, 100], [20, 30, 40, 50, 60, 70, 100])
    """
    positive = [value for value in values if value > 0]
    if not positive:
        return []
    low, high = min(positive), max(positive)
    found = {*log_ticks(low / 1.1, high * 1.1), *log_ticks(low / 2.5, high * 2.5)}
    return [int(tick) if tick % 1 == 0 else tick for tick in sorted(found)]
