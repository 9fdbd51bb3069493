"""Tables as Markdown and CSV: numbers as text, the extreme value of a column, one tidy row per figure.

The figures' numbers: points of the scatter plots, and the same as rows that `dvc plots` draws.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_research.reporting.metrics import EVALS, METRICS, WANTED_K, Metric, headline, metric_named, residual_key, sort_keys
from sae_research.reporting.results import Curve, Row, Run
from sae_research.reporting.style import short_names
from sae_research.runtime.files import round_significant, write_json, write_text

RESULTS_CSV = Path("metrics/results.csv")
CSV_COLUMNS = ("sae", "architecture", "role", "eval", "metric", "value", "low", "high", "definition_version", "better")
ABSENT = "–"


def write_results_csv(run: Run, root: Path = Path(".")) -> None:
    """Write `metrics/results.csv`: every figure of the run, one a row, a column telling whose definition."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in run.rows:
        for name in EVALS:
            figures = row.evals.get(name, {}).get("metrics", {})
            for key in sort_keys(figures, name):
                metric = metric_named(key, name)
                writer.writerow(
                    [
                        row.name,
                        row.architecture,
                        row.role,
                        name,
                        metric.base_key,
                        figures[key],
                        *(row.interval(key, name) or ("", "")),
                        metric.version,
                        metric.better or "",
                    ]
                )
    write_text(root / RESULTS_CSV, buffer.getvalue())


def number(value: float | None) -> str:
    """At most three decimals for ordinary sizes, two significant digits for small ones.

    >>> number(0.70712), number(12.345), number(331.0), number(0.00041), number(-0.02), number(None)
    ('0.707', '12.3', '331', '0.00041', '-0.020', '–')
    """
    if value is None:
        return ABSENT
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 0.01:
        return f"{value:.3f}"
    return f"{value:.2g}"


def with_interval(value: float | None, bounds: tuple[float, float] | None) -> str:
    """0.763 [0.751, 0.774]; the value alone where there is no interval."""
    return number(value) if bounds is None else f"{number(value)} [{number(bounds[0])}, {number(bounds[1])}]"


def count(value: float) -> str:
    """300000 -> 0.3M, 8128 -> 8,128."""
    if value >= 1e9:
        return f"{value / 1e9:.3g}B"
    return f"{value / 1e6:.3g}M" if value >= 1e5 else f"{value:,.0f}"


def cells(rows: Sequence[Row], metric: Metric) -> list[str]:
    """One column of a table."""
    return [number(row.value(metric.key, metric.eval)) for row in rows]


def headline_columns(rows: Sequence[Row], keys: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headings with arrows, and the columns under them."""
    metrics = [headline(key) for key in keys]
    return [metric.label + metric.arrow for metric in metrics], [cells(rows, metric) for metric in metrics]


def markdown(header: Sequence[str], body: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are words, the others numbers."""
    ruler = [":--" if index < left else "--:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ruler, *body))


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
    named = [
        metric.key.replace("{k}", str(k)) for metric in METRICS if metric.plot and "{k}" in metric.key for k in WANTED_K
    ]
    for key in dict.fromkeys((*run.plotted, *named)):
        write_json(root / PLOTS / f"{key}.json", plot_rows(run, key))
    rows = [row for curve in run.curves for row in curve_rows(curve)]
    write_json(root / PLOTS / "training_curves.json", rows)


def plot_rows(run: Run, key: str) -> list[dict[str, Any]]:
    """One row per point: everything a tooltip may show."""
    baseline, labels = residual_baseline(run, key), short_names(run.rows)
    shared = {} if baseline is None else {"residual_stream": baseline}
    return [
        {**_figures(run, point.row), **_bounds(point, key), "label": labels[point.row.name], **shared}
        for point in points(run, key)
    ]


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
