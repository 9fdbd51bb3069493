"""What the site's tables hold: values as they stand in metrics/, with their texts, ready for the page's script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sae_research.config.evaluations import EVALUATIONS
from sae_research.reporting.comparisons import RESIDUAL, SAME, Comparison, grids
from sae_research.reporting.metrics import EVALS, SAE_BENCH_SUFFIX, Metric, headline, metric_named, residual_key, sort_keys
from sae_research.reporting.rows import Row, Run
from sae_research.runtime.formatting import number, signed

Table = dict[str, Any]
Cell = list[Any]
"""[value, its text, its interval as text]; empty where there is no value."""

DIRECTIONS = {"higher": "higher is better", "lower": "lower is better", None: ""}
PLACES_LISTED = 40
"""Comparisons listed in one cell of the matrix."""


def cell(value: float | None, bounds: Sequence[float] | None = None) -> Cell:
    """A cell of a table."""
    if value is None:
        return []
    text = [value, number(value)]
    return text if bounds is None else [*text, f"[{number(bounds[0])}, {number(bounds[1])}]"]


# --- results -------------------------------------------------------------------------------------


def results_table(run: Run) -> Table:
    """Every metric that was measured of any SAE as a column; those of the report's first table are shown at first."""
    shown = set(run.headline)
    measured = [
        metric_named(key, name)
        for name in EVALS
        for key in sort_keys({key for row in run.rows for key in row.evals.get(name, {}).get("metrics", {})}, name)
    ]
    measured.sort(key=lambda metric: metric.key not in shown)  # stable: the first table's own columns first
    return {
        "columns": [
            column(metric, metric.key in shown and metric.eval in ("core", "sparse_probing")) for metric in measured
        ],
        "rows": [
            {
                **sae(row),
                "cells": [cell(row.value(one.key, one.eval), row.interval(one.key, one.eval)) for one in measured],
            }
            for row in run.rows
        ],
    }


def column(metric: Metric, shown: bool = True) -> dict[str, Any]:
    """A column of a table: its heading, what it means, which way is better, and the evaluation it comes from."""
    return {
        "key": metric.key,
        "label": metric.full_label,
        "arrow": metric.arrow.strip(),
        "about": " ".join(filter(None, (metric.definition, DIRECTIONS[metric.better]))),
        "part": EVALUATIONS[metric.eval].title if metric.eval in EVALUATIONS else metric.eval,
        "shown": shown,
    }


def sae(row: Row) -> dict[str, Any]:
    """What a table says of an SAE beside its values."""
    return {"name": row.name, "kind": row.architecture, "group": row.group, "role": row.role, "flags": row.flags}


def task_tables(run: Run) -> list[Table]:
    """Accuracy per task, a table for each k; the raw residual stream, where it was probed, as last rows."""
    records = {row.name: (row, row.evals.get("sparse_probing", {})) for row in run.rows}
    records = {name: (row, record) for name, (row, record) in records.items() if record.get("tasks")}
    tasks = list(dict.fromkeys(task for _, record in records.values() for task in record["tasks"]))
    keys = {key for _, record in records.values() for values in record["tasks"].values() for key in values}
    tables = []
    for metric in (headline(key) for key in sort_keys(keys, "sparse_probing") if key.startswith("sae_")):
        rows = [{**sae(row), "cells": _task_cells(record, tasks, metric.key)} for row, record in records.values()]
        reference = residual_key(metric.key)
        raw = next((record for _, record in records.values()), {})
        if reference is not None and reference in keys:
            about = {"name": RESIDUAL, "kind": "", "group": "", "role": "reference", "flags": []}
            rows.append({**about, "cells": _task_cells(raw, tasks, reference)})
        columns = [
            {"key": task, "label": task.replace("_", " "), "arrow": "", "about": "", "part": metric.label, "shown": True}
            for task in tasks
        ]
        if not metric.key.endswith(SAE_BENCH_SUFFIX):
            tables.append({"title": metric.label, "columns": columns, "rows": rows})
    return tables


def _task_cells(record: dict[str, Any], tasks: Sequence[str], key: str) -> list[Cell]:
    values, bounds = record["tasks"], record.get("task_intervals") or {}
    return [cell(values.get(task, {}).get(key), bounds.get(task, {}).get(key)) for task in tasks]


# --- equal L0 ------------------------------------------------------------------------------------


def reading(run: Run) -> dict[str, Any]:
    """Measured points of every architecture's sparsity grid, between which the page reads values at one L0."""
    metrics = [metric for key in run.headline if (metric := headline(key)).better]
    found = [(grid, {metric.key: grid.curve(metric) for metric in metrics}) for grid in grids(run, controls=True)]
    lines = [{"label": grid.label, "group": grid.group, "curves": curves} for grid, curves in found]
    measured = [x for _, curves in found for curve in curves.values() for x, _ in curve]
    return {
        "columns": [column(metric) for metric in metrics],
        "lines": lines,
        "range": [min(measured), max(measured)] if measured else [],
        "same": SAME,
    }


# --- differences ---------------------------------------------------------------------------------


def matrices(run: Run, found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """A matrix for each tested metric: rows and columns are architectures (or sizes of one), a cell holds row minus column
    at every L0 where they meet."""
    order = [*(grid.label for grid in grids(run, controls=True)), RESIDUAL]
    return [
        _matrix(metric, [item for item in found if item.metric == metric], order)
        for metric in dict.fromkeys(item.metric for item in found)
    ]


def _matrix(metric: Metric, items: Sequence[Comparison], order: Sequence[str]) -> dict[str, Any]:
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for item in items:
        one, other = item.one.grid.label, item.other.grid.label if item.other else RESIDUAL
        cells.setdefault((one, other), []).append(_entry(item, 1))
        if other != one:
            cells.setdefault((other, one), []).append(_entry(item, -1))
    tested = {name for pair in cells for name in pair}
    names = [name for name in order if name in tested]
    return {
        "metric": metric,
        "exceeding": sum(item.exceeds_noise for item in items),
        "tests": len(items),
        "names": names,
        "rows": [(name, [_summary(cells.get((name, other), [])) for other in names]) for name in names],
    }


def _entry(item: Comparison, sign: int) -> dict[str, Any]:
    """One comparison seen from the row of the matrix."""
    low, high = sorted((sign * item.found.low, sign * item.found.high))
    value = sign * item.found.value
    better = (value > 0) == (item.metric.better == "higher")
    pair = item.pair if sign > 0 else item.pair[::-1]
    return {
        "value": signed(value),
        "interval": f"[{signed(low)}, {signed(high)}]",
        "l0": number(item.l0),
        "pair": tuple(name.replace("`", "") for name in pair),
        "exceeds": item.exceeds_noise,
        "verdict": ("better" if better else "worse") if item.exceeds_noise else "within noise",
    }


def _summary(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    exceeding = [entry for entry in entries if entry["exceeds"]]
    verdicts = {entry["verdict"] for entry in exceeding}
    return {
        "entries": [*exceeding, *(entry for entry in entries if not entry["exceeds"])][:PLACES_LISTED],
        "hidden": max(0, len(entries) - PLACES_LISTED),
        "tests": len(entries),
        "exceeding": exceeding,
        "verdict": verdicts.pop() if len(verdicts) == 1 else "mixed" if verdicts else "none" if entries else "untested",
    }
