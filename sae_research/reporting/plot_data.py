"""The figures' numbers: points of the scatter plots, and the same as rows that `dvc plots` draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from sae_research.reporting.metrics import WANTED_K, residual_key
from sae_research.reporting.run import Curve, Row, Run
from sae_research.reporting.style import short_names
from sae_research.store import round_significant, write_json

PLOTS = Path("metrics/plots")
CURVE_POINTS = 100
"""Rows kept of each training curve: they are tracked in Git."""


class Point(NamedTuple):
    """One SAE at its L0."""

    row: Row
    x: float
    y: float


def points(run: Run, key: str) -> list[Point]:
    """Every SAE that has both an L0 and the figure. An L0 of 0 has no place on a logarithmic axis."""
    pairs = ((row, row.value("l0"), row.value(key)) for row in run.rows)
    return [Point(row, x, y) for row, x, y in pairs if x is not None and x > 0 and y is not None]


def residual_baseline(run: Run, key: str) -> float | None:
    """What the raw residual stream reaches on a probing figure; it is the same for every SAE of a run."""
    source = residual_key(key)
    values = (row.value(source) for row in run.rows) if source else iter(())
    return next((value for value in values if value is not None), None)


def write_plot_data(run: Run, root: Path = Path(".")) -> None:
    """Write `metrics/plots/<metric>.json` and `metrics/plots/training_curves.json`, a list of rows each.

    A list is empty where nothing was measured, never absent: `dvc plots` then draws the others.
    """
    # dvc.yaml names the files of WANTED_K, whichever values of k were measured
    for key in dict.fromkeys((*run.plotted, *(f"sae_top_{k}_accuracy" for k in WANTED_K))):
        write_json(root / PLOTS / f"{key}.json", plot_rows(run, key))
    rows = [row for curve in run.curves for row in curve_rows(curve)]
    write_json(root / PLOTS / "training_curves.json", rows)


def plot_rows(run: Run, key: str) -> list[dict[str, Any]]:
    """One row per point: everything a tooltip may show."""
    baseline, labels = residual_baseline(run, key), short_names(run.rows)
    shared = {} if baseline is None else {"residual_stream": baseline}
    return [{**_figures(run, point.row), **_bounds(point, key), "label": labels[point.row.name], **shared}
            for point in points(run, key)]


def _bounds(point: Point, key: str) -> dict[str, float]:
    bounds = point.row.interval(key)
    return {} if bounds is None else {"low": bounds[0], "high": bounds[1]}


def _figures(run: Run, row: Row) -> dict[str, Any]:
    figures = {key: row.value(key) for key in ("l0", *run.plotted)}
    return {
        "sae": row.name,
        "architecture": row.architecture,
        "role": row.role,
        "interpolating": row.interpolating,
        **{key: value for key, value in figures.items() if value is not None},
    }


def curve_rows(curve: Curve) -> list[dict[str, Any]]:
    """A training curve, thinned to `CURVE_POINTS` rows; the last one always stays."""
    length = len(next(iter(curve.columns.values())))
    stride = max(1, math.ceil(length / CURVE_POINTS))
    kept = sorted({*range(0, length, stride), length - 1})
    return [
        {
            "sae": curve.name,
            **{
                name: round_significant(column[index])
                for name, column in curve.columns.items()
                if math.isfinite(column[index])
            },
        }
        for index in kept
    ]
