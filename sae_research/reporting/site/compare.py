"""A page with two runs side by side: what `metrics/results.csv` of both holds, and which parameters differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_research.config.reporting import Visualization
from sae_research.reporting.metrics import Metric, headline
from sae_research.reporting.revisions import Snapshot, changed_params, chosen_metrics, only, shared
from sae_research.reporting.rows import Row
from sae_research.reporting.site.charts import FIT, HEIGHT, L0_TITLE, MARKER_AREA, Chart, Marks, Spec, scale, ticks
from sae_research.reporting.site.content import Cell, Table, cell, sae
from sae_research.reporting.site.marks import mark
from sae_research.reporting.site.pages import write_page
from sae_research.reporting.style import chosen_styles, marker_styles
from sae_research.runtime.files import replaced_folder
from sae_research.runtime.formatting import signed, with_interval


def write_comparison(one: Snapshot, other: Snapshot, style: Visualization, folder: Path) -> None:
    """Write the page and what it needs into a folder of its own, which is replaced."""
    rows = [*one.run.rows, *other.run.rows]
    styles = marker_styles(dict.fromkeys(row.group for row in rows), chosen_styles(style))
    marks = {name: mark(known) for name, known in styles.items()}
    keys = list(dict.fromkeys([*one.run.plotted, *other.run.plotted]))
    with replaced_folder(folder) as target:
        write_page(
            target,
            "compare",
            one=one.name,
            other=other.name,
            only=[(here.name, only(here, there)) for here, there in ((one, other), (other, one))],
            params=changed_params(one, other),
            marks=marks,
            tables=_tables(one, other),
            both=len(shared(one, other)),
            charts=[chart for key in keys if (chart := _chart(key, one, other, marks))],
            datasets={"sides": [*_points(one, "one", keys), *_points(other, "other", keys)]},
        )


def _tables(one: Snapshot, other: Snapshot) -> list[Table]:
    """For every metric a row for each SAE that both have; those of the report's first table come first."""
    first = chosen_metrics(one.run)
    every = dict.fromkeys([*first, *(metric for name in _evaluations(one) for metric in chosen_metrics(one.run, (), name))])
    pairs = shared(one, other)
    return [table for metric in every if (table := _table(metric, pairs, one.name, other.name))]


def _evaluations(snapshot: Snapshot) -> list[str]:
    return list(dict.fromkeys(name for row in snapshot.run.rows for name, found in row.evals.items() if "metrics" in found))


def _table(metric: Metric, pairs: Sequence[tuple[Row, Row]], one: str, other: str) -> Table | None:
    rows = [{**sae(here), "cells": cells} for here, there in pairs if (cells := _cells(metric, here, there))]
    if not rows:
        return None
    labels = {"one": one, "other": other, "change": "Change", "intervals": "Intervals"}
    about = {"change": f"value in {other} minus value in {one}", "intervals": "whether the two 95 % intervals overlap"}
    columns = [
        {"key": key, "label": label, "arrow": "", "about": about.get(key, ""), "part": "", "shown": True}
        for key, label in labels.items()
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


def _overlap(one: tuple[float, float] | None, other: tuple[float, float] | None) -> Cell:
    if one is None or other is None:
        return []
    apart = one[1] < other[0] or other[1] < one[0]
    return [1, "apart"] if apart else [0, "overlap"]


# --- charts --------------------------------------------------------------------------------------


def _points(snapshot: Snapshot, side: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for row in snapshot.run.rows:
        l0 = row.value("l0")
        if l0 is None or l0 <= 0:
            continue
        point: dict[str, Any] = {"sae": row.name, "group": row.group, "side": side, "run": snapshot.name, "l0": l0}
        point["l0_text"] = with_interval(l0, row.interval("l0"))
        point["flags"] = ", ".join(row.flags) or "none"
        for key in keys:
            metric, value = headline(key), row.value(key)
            if value is not None and not (metric.log and value <= 0):
                point |= {key: max(value, metric.floor), f"{key}_text": with_interval(value, row.interval(key))}
        rows.append(point)
    return rows


def _chart(key: str, one: Snapshot, other: Snapshot, marks: Marks) -> Chart | None:
    """One metric against L0: the first run's markers filled, the other's hollow, one SAE's two joined by a line."""
    metric = headline(key)
    points = [point for snapshot in (one, other) for point in _points(snapshot, "", [key]) if key in point]
    if not points:
        return None
    x: Spec = {
        "field": "l0",
        "type": "quantitative",
        "title": L0_TITLE,
        "scale": {"type": "log", "nice": False, "padding": 14},
        "axis": {"values": ticks([point["l0"] for point in points]), "format": "~g", "labelOverlap": True},
    }
    y_scale: Spec = {"type": "log", "nice": False} if metric.log else {"zero": False, "nice": False}
    axis = {"format": "~g", **({"values": ticks([point[key] for point in points])} if metric.log else {})}
    y: Spec = {
        "field": key,
        "type": "quantitative",
        "title": metric.label + (" (log scale)" if metric.log else "") + metric.arrow,
        "scale": {**y_scale, "padding": 10},
        "axis": axis,
    }
    tooltip = [
        {"field": "sae", "title": "SAE"},
        {"field": "run", "title": "run"},
        {"field": "l0_text", "title": "L0"},
        {"field": f"{key}_text", "title": metric.label},
        {"field": "flags", "title": "flags"},
    ]
    dots = {"shape": scale("path", marks), "tooltip": tooltip}
    color = scale("color", marks)
    spec = {
        "data": {"name": "sides"},
        "transform": [{"filter": f"isValid(datum['{key}'])"}],
        "height": HEIGHT,
        "width": "container",
        "autosize": FIT,
        "encoding": {"x": x, "y": y},
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.5},
                "encoding": {"detail": {"field": "sae"}, "color": color, "order": {"field": "side", "sort": "descending"}},
            },
            {
                "transform": [{"filter": "datum.side === 'one'"}],
                "mark": {"type": "point", "filled": True, "size": MARKER_AREA, "opacity": 1},
                "encoding": {**dots, "color": color},
            },
            {
                "transform": [{"filter": "datum.side === 'other'"}],
                "mark": {"type": "point", "fill": {"expr": "ground"}, "size": MARKER_AREA, "opacity": 1, "strokeWidth": 1.6},
                "encoding": {**dots, "stroke": color},
            },
        ],
    }
    says = f"{metric.label} against L0 in both runs, {len(points)} points; the table holds the values."
    return Chart(key, f"{metric.label} against L0", spec, says)
