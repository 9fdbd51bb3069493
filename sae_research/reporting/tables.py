"""Tables as Markdown and CSV: numbers as text, the extreme value of a column, one tidy row per figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from sae_research.reporting.metrics import EVALS, Metric, headline, metric_named, sort_keys
from sae_research.reporting.run import Row, Run
from sae_research.store import write_text

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
