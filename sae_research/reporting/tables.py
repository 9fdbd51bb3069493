"""What every part of the report is made of: templates, tables of SAEs and metrics, results.csv, and the rows of plots."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from sae_research.reporting.metrics import EVALS, METRICS, WANTED_K, Metric, metric_named, residual_key, sort_keys
from sae_research.reporting.rows import Curve, Row, Run
from sae_research.reporting.style import short_names
from sae_research.runtime import formatting
from sae_research.runtime.files import round_significant, write_json, write_text
from sae_research.runtime.formatting import ABSENT, csv_text, markdown_table, with_interval

if TYPE_CHECKING:
    from sae_research.reporting.comparisons import Comparison

TEMPLATES = Path(__file__).parent / "templates"
_STARTS_A_LINE = ("#", "|", "- ", "![")

# --- templates -----------------------------------------------------------------------------------


def render(template: str, **values: Any) -> str:
    """A section of the report from `templates/<template>.md.j2`. A value that the template needs and does not get is an
    error."""
    return _one_line_a_paragraph(_environment().get_template(f"{template}.md.j2").render(values, ABSENT=ABSENT))


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    filters = (formatting.number, formatting.amount, formatting.counted, formatting.percent, code, at_l0, difference)
    environment.filters |= {each.__name__: each for each in filters}
    return environment


def _one_line_a_paragraph(text: str) -> str:
    """Templates are wrapped for those who read them; in Markdown a paragraph or list item is one line, a table a block."""
    blocks = []
    for block in re.split(r"\n\s*\n|(?<=\n)(?<!\|\n)(?=\|)", text):
        lines: list[str] = []
        for line in (line if line.startswith("|") else " ".join(line.split()) for line in block.splitlines()):
            if lines and not line.startswith(_STARTS_A_LINE):
                lines[-1] += f" {line}"
            else:
                lines.append(line)
        blocks.append("\n".join(lines).strip())
    return "\n\n".join(filter(None, blocks))


def code(names: Iterable[str | Row]) -> str:
    """`a`, `b`: names of SAEs or settings."""
    return ", ".join(f"`{name.name if isinstance(name, Row) else name}`" for name in names)


def at_l0(row: Row, metric: Metric) -> str:
    """0.739 at L0 30.4."""
    l0 = row.value("l0")
    return formatting.number(row.value(metric.key)) + ("" if l0 is None else f" at L0 {formatting.number(l0)}")


def difference(item: Comparison) -> str:
    """+0.093 [+0.088, +0.100], within noise."""
    value, low, high = (formatting.signed(each) for each in (item.found.value, item.found.low, item.found.high))
    return f"{value} [{low}, {high}]" + ("" if item.exceeds_noise else ", within noise")


def one_line(value: object) -> str:
    """A message as a cell of a table: no line break, no bar that would end the cell."""
    text = formatting.number(value) if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


# --- tables --------------------------------------------------------------------------------------


def headings(metrics: Iterable[Metric]) -> list[str]:
    """Labels with the direction that is better."""
    return [metric.label + metric.arrow for metric in metrics]


def cells(row: Row, metrics: Iterable[Metric], intervals: bool = False) -> list[str]:
    """An SAE's values, with their intervals where wanted and known."""
    return [
        with_interval(row.value(metric.key, metric.eval), row.interval(metric.key, metric.eval) if intervals else None)
        for metric in metrics
    ]


def sae_table(rows: Iterable[Row], metrics: Sequence[Metric], intervals: bool = False) -> str:
    """A line an SAE, a column a metric."""
    body = [[f"`{row.name}`", *cells(row, metrics, intervals)] for row in rows]
    return markdown_table(["SAE", *headings(metrics)], body)


RESULTS_CSV = Path("metrics/results.csv")
CSV_COLUMNS = ("sae", "architecture", "role", "eval", "metric", "value", "low", "high", "definition_version", "better")


def write_results_csv(run: Run, root: Path = Path(".")) -> None:
    """Write `metrics/results.csv`: every value of the run, one a row, a column telling whose definition."""
    lines = []
    for row in run.rows:
        for name in EVALS:
            values = row.evals.get(name, {}).get("metrics", {})
            for key in sort_keys(values, name):
                metric, bounds = metric_named(key, name), row.interval(key, name) or (None, None)
                where = (row.name, row.architecture, row.role, name, metric.base_key)
                lines.append([*where, values[key], *bounds, metric.version, metric.better])
    write_text(root / RESULTS_CSV, csv_text(CSV_COLUMNS, lines))


# --- rows of plots -------------------------------------------------------------------------------

PLOTS = Path("metrics/plots")
CURVE_POINTS = 100
"""Rows kept of each training curve: they are tracked in Git."""


class Point(NamedTuple):
    """One SAE at its L0."""

    row: Row
    x: float
    y: float


def points(run: Run, key: str) -> list[Point]:
    """Every SAE that has both an L0 and the value. An L0 of 0 has no place on a logarithmic axis."""
    pairs = ((row, row.value("l0"), row.value(key)) for row in run.rows)
    return [Point(row, x, y) for row, x, y in pairs if x is not None and x > 0 and y is not None]


def residual_baseline(run: Run, key: str) -> float | None:
    """What the raw residual stream reaches in a probing metric; it is the same for every SAE of a run."""
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
    groups = {row.name: {"architecture": row.group} for row in run.rows}
    rows = [{**row, **groups.get(curve.name, {})} for curve in run.curves for row in curve_rows(curve)]
    write_json(root / PLOTS / "training_curves.json", rows)


def plot_rows(run: Run, key: str) -> list[dict[str, Any]]:
    """One row per point: everything a tooltip may show."""
    baseline, labels = residual_baseline(run, key), short_names(run.rows)
    shared = {} if baseline is None else {"residual_stream": baseline}
    return [
        {**_values(run, point.row), **_bounds(point, key), "label": labels[point.row.name], **shared}
        for point in points(run, key)
    ]


def _bounds(point: Point, key: str) -> dict[str, float]:
    bounds = point.row.interval(key)
    return {} if bounds is None else {"low": bounds[0], "high": bounds[1]}


def _values(run: Run, row: Row) -> dict[str, Any]:
    values = {key: row.value(key) for key in ("l0", *run.plotted)}
    return {
        "sae": row.name,
        "architecture": row.architecture,
        "role": row.role,
        "interpolating": row.interpolating,
        **{key: value for key, value in values.items() if value is not None},
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
