"""The record and the tables of docs/optional_evaluations.md, from a finished run of `presets/packaged.txt`.

make repro PRESET=packaged                          # in a clone
python -m benchmarks.optional_evaluations CLONE     # writes docs/optional_evaluations.json and the tables
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.pages import write_between
from sae_research.reporting.metrics import metric_named
from sae_research.reporting.rows import Row, read_run
from sae_research.runtime.errors import UserError, run_main
from sae_research.runtime.files import project_root, read_json, round_significant, write_json
from sae_research.runtime.formatting import ABSENT, markdown_table, with_interval

RECORD, PAGE = Path("docs/optional_evaluations.json"), Path("docs/optional_evaluations.md")
SHOWN = {
    "sparse_probing_sae_probes": ("sae_probes_top_1_accuracy", "sae_probes_top_2_accuracy", "sae_probes_top_5_accuracy"),
    "unlearning": ("unlearning_score", "unlearning_score_held_out", "retain_accuracy_held_out"),
    "ravel": ("disentanglement", "cause", "isolation"),
    "absorption": ("absorption_fraction", "full_absorption", "main_latents_f1"),
    "scr": ("scr_metric_threshold_10", "scr_metric_threshold_50"),
    "tpp": ("tpp_threshold_10_total_metric", "tpp_threshold_50_total_metric"),
}
"""By evaluation what its table holds."""
WHOLE = {
    "sparse_probing_sae_probes": {"sae_probes_top_1_accuracy": "sae_probes_llm_accuracy"},
    "ravel": {key: f"whole_activation_{key}" for key in SHOWN["ravel"]},
}
"""What the whole activation reaches under a column, the same for every SAE."""


def marks(evaluation: str) -> tuple[str, str]:
    """What stands before and after an evaluation's table."""
    return f"<!-- {evaluation} -->", f"<!-- end of {evaluation} -->"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optional_evaluations", description="The tables, from a run.")
    parser.add_argument("clone", type=Path, help="with a finished run of presets/packaged.txt")
    root, rows = project_root(), read_run(parser.parse_args().clone).rows
    write_json(root / RECORD, {evaluation: recorded(evaluation, rows) for evaluation in SHOWN})
    for evaluation in SHOWN:
        write_between(root / PAGE, *marks(evaluation), table(evaluation, root / RECORD))


def recorded(evaluation: str, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows in the run's order: `name`, and `values`, by metric the value with both ends of its interval. Raises
    `UserError` where the run lacks the evaluation."""
    keys = (*SHOWN[evaluation], *WHOLE.get(evaluation, {}).values())
    found = []
    for row in rows:
        values = {key: (row.value(key, evaluation), *(row.interval(key, evaluation) or (None, None))) for key in keys}
        if any(value is not None for value, *_ in values.values()):
            kept = {key: list(value) for key, value in values.items() if value[0] is not None}
            found.append({"name": row.name, "values": kept})
    if not found:
        raise UserError(f"this run has no results of {evaluation}; make repro PRESET=packaged")
    return round_significant(found)


def table(evaluation: str, record: Path) -> str:
    """Rows of the record, and the whole activation's where the evaluation measures it."""
    keys, found = SHOWN[evaluation], read_json(record)[evaluation]
    body = [[f"`{row['name']}`", *(_cell(row["values"].get(key)) for key in keys)] for row in found]
    if whole := WHOLE.get(evaluation):
        first = found[0]["values"]
        body.append(["whole activation", *(_cell(first.get(whole.get(key, ""))) for key in keys)])
    return markdown_table(["", *(metric_named(key, evaluation).label for key in keys)], body)


def _cell(value: list[float | None] | None) -> str:
    if value is None:
        return ABSENT
    number, low, high = value
    return with_interval(number, None if low is None or high is None else (low, high))


if __name__ == "__main__":
    run_main(main)
