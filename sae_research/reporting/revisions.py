"""Results as the files in Git hold them: of the workspace, a commit or an experiment. What is compared between two."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_research.config.evaluations import OF_SAES
from sae_research.config.yaml_files import parse
from sae_research.reporting.metrics import SAE_BENCH_SUFFIX, Metric, headline, metric_named, sort_keys
from sae_research.reporting.rows import Row, Run
from sae_research.reporting.tables import PLOTS, RESULTS_CSV
from sae_research.runtime.errors import UserError
from sae_research.runtime.formatting import number, signed, text_table, with_interval

PARAMS = "params.yaml"
_POINTS = (PLOTS / "variance_explained.json").as_posix()

NEEDED = ("sae", "architecture", "role", "eval", "metric", "value", "definition_version")
"""Columns without which results mean nothing; those of early commits have no intervals."""

ReadFile = Callable[[str], str | None]
"""The text of a file of the project; None where there is none."""


@dataclass(frozen=True)
class Snapshot:
    """The results of one commit, experiment or workspace."""

    name: str
    run: Run
    """Of each SAE what `metrics/results.csv` holds: values, intervals, architecture, role."""
    params: Mapping[str, Any]
    """By path, `train.tokens`."""


def read_snapshot(name: str, file: ReadFile) -> Snapshot:
    """The results under a name. Raises `UserError` where there are none, or they are damaged."""
    text = file(RESULTS_CSV.as_posix())
    if text is None:
        raise UserError(f"{name}: holds no {RESULTS_CSV}; run `dvc repro generate_report` there, and commit what it wrote")
    lines = csv.DictReader(io.StringIO(text))
    lacking = [column for column in NEEDED if column not in (lines.fieldnames or ())]
    if lacking:
        raise UserError(f"{name}: {RESULTS_CSV} lacks the column {lacking[0]}")
    interpolating = {row["sae"] for row in json.loads(file(_POINTS) or "[]") if row.get("interpolating")}
    rows: dict[str, Row] = {}
    for line in lines:
        sae = line["sae"]
        if sae not in rows:
            cfg = {"architecture": line["architecture"], "role": line["role"]}
            rows[sae] = Row(sae, cfg, {"core": {"interpolating": sae in interpolating}})
        _add(rows[sae].evals.setdefault(line["eval"], {}), line, name)
    evals = {one: {"status": "ok"} for one in OF_SAES}
    params = file(PARAMS)
    return Snapshot(name, Run(list(rows.values()), evals, {}, []), dict(_flat(parse(params, PARAMS) if params else {})))


def _add(record: dict[str, Any], line: Mapping[str, str], name: str) -> None:
    key = _key(line["metric"], line["eval"], line["definition_version"])
    try:
        record.setdefault("metrics", {})[key] = float(line["value"])
        if line.get("low"):
            record.setdefault("intervals", {})[key] = (float(line["low"]), float(line["high"]))
    except ValueError:
        raise UserError(f"{name}: {RESULTS_CSV}: {line['sae']}, {line['metric']}: not a number") from None


def _key(base: str, eval_name: str, version: str) -> str:
    """A metric's own key: the table leaves out the suffix of SAE Bench's, whose column says whose definition it is."""
    return base if metric_named(base, eval_name).version == version else base + SAE_BENCH_SUFFIX


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# --- of one --------------------------------------------------------------------------------------


def chosen_metrics(run: Run, keys: Sequence[str] = (), evaluation: str | None = None) -> list[Metric]:
    """The metrics asked for: by key, all of one evaluation, or those of the report's first table. Raises `UserError` for
    one that is not among the results."""
    measured = {
        name: sort_keys({key for row in run.rows for key in row.evals.get(name, {}).get("metrics", {})}, name)
        for name in OF_SAES
    }
    known = {key: metric_named(key, name) for name, found in measured.items() for key in found}
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise UserError(f"no metric {unknown[0]!r} in these results; there are {', '.join(known)}")
    if evaluation is not None:
        if not measured.get(evaluation):
            raise UserError(f"no results of {evaluation!r}; there are some of {', '.join(filter(measured.get, measured))}")
        return [known[key] for key in measured[evaluation]]
    return [known[key] for key in keys] or [headline(key) for key in run.headline if key in known]


def metrics_table(run: Run, metrics: Sequence[Metric], width: int, intervals: bool = False) -> str:
    """SAEs and metrics as text of at most `width` characters a line, in several tables where one does not fit."""
    body = [
        [
            row.name,
            *(with_interval(row.value(m.key, m.eval), row.interval(m.key, m.eval) if intervals else None) for m in metrics),
        ]
        for row in run.rows
    ]
    return fitted([["SAE", *(metric.full_label + metric.arrow for metric in metrics)], *body], width)


def fitted(rows: Sequence[Sequence[str]], width: int, left: int = 1) -> str:
    """A table as text; where it is wider than `width` characters, several below each other, each with the first column.

    rows: the header is the first, its words below each other where a column is narrow; the first `left` columns are words.
    """
    (header, *body), half = rows, max(12, width // 2)
    widest = max((len(shortened(cell, half)) for row in rows for cell in row[1:]), default=0)
    first = max(12, min(half, width - widest - 2))
    cells = [[shortened(cell, half if place else first) for place, cell in enumerate(row)] for row in body]
    heads = [_wrapped(head, [row[place] for row in cells]) for place, head in enumerate(header)]
    widths = [max(map(len, [*head, *(row[place] for row in cells)])) for place, head in enumerate(heads)]
    blocks: list[list[int]] = [[0]]
    for place in range(1, len(widths)):
        if len(blocks[-1]) > 1 and sum(widths[one] + 2 for one in [*blocks[-1], place]) - 2 > width:
            blocks.append([0])
        blocks[-1].append(place)
    return "\n\n".join(
        _block([heads[place] for place in block], [[row[place] for place in block] for row in cells], left)
        for block in blocks
    )


def _wrapped(head: str, column: Sequence[str]) -> list[str]:
    """A heading in lines no wider than its column needs to be anyway."""
    needed = max(map(len, [*head.replace(" ↑", "\u00a0↑").replace(" ↓", "\u00a0↓").split(" "), *column]))
    return textwrap.wrap(head, max(needed, 1), break_long_words=False) or [""]


def _block(heads: Sequence[Sequence[str]], body: Sequence[Sequence[str]], left: int) -> str:
    height = max(map(len, heads))
    lines = [[[*[""] * (height - len(head)), *head][line] for head in heads] for line in range(height)]
    return text_table([*lines, *body], left)


def shortened(text: str, width: int) -> str:
    """A text's two ends where it is too long: what tells SAEs apart may stand at either."""
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[: width - half - 1]}…{text[-half:]}"


# --- of two --------------------------------------------------------------------------------------


def shared(one: Snapshot, other: Snapshot) -> list[tuple[Row, Row]]:
    """The SAEs that both have, by name, in the first one's order."""
    there = {row.name: row for row in other.run.rows}
    return [(row, there[row.name]) for row in one.run.rows if row.name in there]


def only(one: Snapshot, other: Snapshot) -> list[str]:
    """The SAEs that the first alone has."""
    names = {row.name for row in other.run.rows}
    return [row.name for row in one.run.rows if row.name not in names]


def changed_params(one: Snapshot, other: Snapshot) -> list[tuple[str, str, str]]:
    """(path, value in one, value in the other) of all that differ; an absent one is empty."""
    keys = dict.fromkeys([*one.params, *other.params])
    shown = [(key, *(_value(side.params, key) for side in (one, other))) for key in keys]
    return [(key, here, there) for key, here, there in shown if here != there]


def _value(params: Mapping[str, Any], key: str) -> str:
    return json.dumps(params[key], ensure_ascii=False, default=str) if key in params else ""


def comparison_table(one: Snapshot, other: Snapshot, metrics: Sequence[Metric], width: int) -> str:
    """A line an SAE that both have; a cell holds the value in one, in the other, and the change."""
    body = [
        [here.name, *(_change(here.value(m.key, m.eval), there.value(m.key, m.eval)) for m in metrics)]
        for here, there in shared(one, other)
    ]
    return fitted([["SAE", *(metric.full_label + metric.arrow for metric in metrics)], *body], width)


def _change(before: float | None, after: float | None) -> str:
    if before == after:
        return f"{number(before)} ="
    if before is None or after is None:
        return f"{number(before)} → {number(after)}"
    return f"{number(before)} → {number(after)} ({signed(after - before)})"
