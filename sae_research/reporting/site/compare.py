"""A page with two runs side by side: what `metrics/results.csv` of both holds, and which parameters differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_research.config.reporting import Visualization
from sae_research.reporting.metrics import Metric, headline
from sae_research.reporting.revisions import Snapshot, changed_params, shared
from sae_research.reporting.rows import Row
from sae_research.reporting.site.changes import Bounds, apart, changes, measured
from sae_research.reporting.site.charts import (
    BELOW,
    FIT,
    HEIGHT,
    L0_TITLE,
    MARKER_AREA,
    Chart,
    Marks,
    Spec,
    axis_floor,
    chart_notes,
    interval_layers,
    placed,
    scale,
    ticks,
)
from sae_research.reporting.site.content import Cell, Table, cell, sae
from sae_research.reporting.site.marks import mark
from sae_research.reporting.site.pages import SITE, write_page
from sae_research.reporting.style import chosen_styles, marker_styles
from sae_research.reporting.tables import RESULTS_CSV, points
from sae_research.runtime.files import replaced_folder
from sae_research.runtime.formatting import signed, with_interval


def write_comparison(one: Snapshot, other: Snapshot, style: Visualization, folder: Path) -> None:
    """Write the page and what it needs into a folder of its own, which is replaced."""
    rows = [*one.run.rows, *other.run.rows]
    styles = marker_styles(dict.fromkeys(row.group for row in rows), chosen_styles(style))
    marks = {name: mark(known) for name, known in styles.items()}
    floors = _floors(one, other)
    sides = [*_points(one, "one", floors), *_points(other, "other", floors)]
    charts = [chart for key in floors if (chart := _chart(key, sides, (one.name, other.name), marks))]
    tables = _tables(one, other)
    with replaced_folder(folder) as target:
        write_page(
            target,
            "compare",
            one=one.name,
            other=other.name,
            changes=changes(one, other),
            report=report_address(folder),
            params=changed_params(one, other),
            marks=marks,
            tables=tables,
            charts=charts,
            cut=any(BELOW in chart.notes for chart in charts),
            datasets={"sides": sides},
        )


def report_address(folder: Path) -> str | None:
    """Where the results site is, seen from a page's folder: that of the nearest folder around it which holds one."""
    place = folder.resolve()
    for around in place.parents:
        page = around / SITE / "index.html"
        if page.is_file() and (page.parent / RESULTS_CSV.name).is_file():
            return Path(os.path.relpath(page, place)).as_posix()
    return None


def _tables(one: Snapshot, other: Snapshot) -> list[Table]:
    """For every metric a row for each SAE that both have; those of the report's first table come first."""
    pairs = shared(one, other)
    return [table for metric in measured(one, other) if (table := _table(metric, pairs, one.name, other.name))]


def _table(metric: Metric, pairs: Sequence[tuple[Row, Row]], one: str, other: str) -> Table | None:
    rows = [{**sae(here), "cells": cells} for here, there in pairs if (cells := _cells(metric, here, there))]
    if not rows:
        return None
    columns = [
        {"key": label.lower(), "label": label, "arrow": "", "about": about, "part": "", "shown": True}
        for label, about in (
            (one, f"value in {one}"),
            (other, f"value in {other}"),
            ("Change", f"value in {other} minus value in {one}"),
            ("Intervals", "whether the two 95 % intervals overlap"),
        )
    ]
    return {"title": metric.full_label + metric.arrow, "about": metric.definition, "columns": columns, "rows": rows}


def _cells(metric: Metric, here: Row, there: Row) -> list[Cell]:
    before, after = here.value(metric.key, metric.eval), there.value(metric.key, metric.eval)
    bounds = here.interval(metric.key, metric.eval), there.interval(metric.key, metric.eval)
    if before is None and after is None:
        return []
    change: Cell = (
        [] if before is None or after is None else [after - before, "=" if after == before else signed(after - before)]
    )
    return [cell(before, bounds[0]), cell(after, bounds[1]), change, _overlap(*bounds)]


def _overlap(one: Bounds, other: Bounds) -> Cell:
    if one is None or other is None:
        return []
    return [1, "apart"] if apart(one, other) else [0, "overlap"]


# --- charts --------------------------------------------------------------------------------------


def _points(snapshot: Snapshot, side: str, floors: Mapping[str, float]) -> list[dict[str, Any]]:
    """The data set `sides`: for every metric what `placed` holds, beside each SAE's name, group, run and L0."""
    rows = []
    for row in snapshot.run.rows:
        l0 = row.value("l0")
        if l0 is None or l0 <= 0:
            continue
        point: dict[str, Any] = {"sae": row.name, "group": row.group, "side": side, "run": snapshot.name, "l0": l0}
        point["l0_text"] = with_interval(l0, row.interval("l0"))
        point["flags"] = ", ".join(row.flags) or "none"
        for key, floor in floors.items():
            value = row.value(key)
            if value is not None and not (headline(key).log and value <= 0):
                point |= placed(key, value, row.interval(key), floor)
        rows.append(point)
    return rows


def _floors(one: Snapshot, other: Snapshot) -> dict[str, float]:
    """Of every metric that has a chart the lowest place at which it draws anything."""
    keys = dict.fromkeys([*one.run.plotted, *other.run.plotted])
    found = {key: [point.y for side in (one, other) for point in points(side.run, key)] for key in keys}
    return {key: axis_floor(headline(key), values) for key, values in found.items()}


def _chart(key: str, sides: Sequence[Mapping[str, Any]], names: tuple[str, str], marks: Marks) -> Chart | None:
    """One metric against L0: the first run's markers filled, the other's hollow, one SAE's two joined by a line."""
    metric, rows = headline(key), [row for row in sides if key in row]
    if not rows:
        return None
    x: Spec = {
        "field": "l0",
        "type": "quantitative",
        "title": L0_TITLE,
        "scale": {"type": "log", "nice": False, "padding": 14},
        "axis": {"values": ticks([row["l0"] for row in rows]), "format": "~g", "labelOverlap": True},
    }
    y_scale: Spec = {"type": "log", "nice": False} if metric.log else {"zero": False, "nice": False}
    axis = {"format": "~g", **({"values": ticks([row[key] for row in rows])} if metric.log else {})}
    y: Spec = {
        "field": f"{key}_y",
        "type": "quantitative",
        "title": metric.label + (" (nats, log scale)" if metric.log else "") + metric.arrow,
        "scale": {**y_scale, "padding": 10},
        "axis": axis,
    }
    spec = {
        "data": {"name": "sides"},
        "transform": [{"filter": f"isValid(datum['{key}_y'])"}],
        "height": HEIGHT,
        "width": "container",
        "autosize": FIT,
        "layer": _layers(key, metric.label, x, y, marks, rows),
    }
    says = f"{metric.label} against L0 in both runs, {len(rows)} points; the table holds the values."
    signs = {f"Filled: {names[0]}; hollow: {names[1]}; a line joins one SAE in both.": True}
    return Chart(key, f"{metric.label} against L0", spec, says, notes=chart_notes(key, rows, signs))


def _layers(key: str, label: str, x: Spec, y: Spec, marks: Marks, rows: Sequence[Mapping[str, Any]]) -> list[Spec]:
    """Lines that join, intervals (the first run's a little to the left, the other's to the right), and markers."""
    color, place = scale("color", marks), {"x": x, "y": y}
    tooltip = [
        {"field": "sae", "title": "SAE"},
        {"field": "run", "title": "run"},
        {"field": "l0_text", "title": "L0"},
        {"field": f"{key}_text", "title": label},
        {"field": "flags", "title": "flags"},
    ]
    dots = {**place, "shape": scale("path", marks), "tooltip": tooltip}
    order = {"field": "side", "sort": "descending"}
    joined = {
        "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.5},
        "encoding": {**place, "detail": {"field": "sae"}, "color": color, "order": order},
    }
    filled = {
        "transform": [{"filter": "datum.side === 'one'"}],
        "mark": {"type": "point", "filled": True, "size": MARKER_AREA, "opacity": 1},
        "encoding": {**dots, "color": color},
    }
    hollow = {
        "transform": [{"filter": "datum.side === 'other'"}],
        "mark": {"type": "point", "fill": {"expr": "ground"}, "size": MARKER_AREA, "opacity": 1, "strokeWidth": 1.6},
        "encoding": {**dots, "stroke": color},
    }
    bars = [
        layer
        for side, shift in (("one", -2), ("other", 2))
        for layer in interval_layers(
            key, x, y, color, [row for row in rows if row["side"] == side], f"datum.side === '{side}'", shift
        )
    ]
    return [joined, *bars, filled, hollow]
