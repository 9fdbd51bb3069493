"""The tables of docs/gpu.md, from the record that `benchmarks.gpu` wrote; "not measured" where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import write_between
from sae_research.runtime.files import read_json

NOT_MEASURED = "Not measured: no record was made on a GPU yet (`make gpu`)."
BEGIN, END = "<!-- begin record -->", "<!-- end record -->"


def write_page(page: Path, record: Path) -> None:
    """Put the tables between the page's marks. Raises `UserError` where it lacks them."""
    write_between(page, BEGIN, END, shown(record))


def shown(record: Path) -> str:
    """The record as tables, in Markdown."""
    if not record.is_file():
        return NOT_MEASURED
    values = read_json(record)
    return "\n\n".join(part for part in (_machine(values), *_tables(values), _left_out(values)) if part)


def _machine(values: dict[str, Any]) -> str:
    about = values["machine"]
    memory = f", {about['memory_gib']:.0f} GiB" if about["memory_gib"] else ""
    return f"Measured on {about['device']}{memory}; torch {about['torch']}, CUDA {about['cuda']}."


def _tables(values: dict[str, Any]) -> list[str]:
    found = []
    if tests := values.get("tests"):
        passed = tests["tests"] - tests["failures"] - tests["errors"] - tests["skipped"]
        found.append(
            f"Tests marked `gpu`: {passed} passed, {tests['failures']} failed, {tests['errors']} files not read, "
            f"{tests['skipped']} skipped."
        )
    if rows := values.get("training"):
        found.append(
            _table(
                ("model's shape", "recipe", "SAEs", "d_sae", "tokens/s", "SAE-tokens/s", "peak GiB"),
                [
                    (
                        row["model"],
                        row["recipe"],
                        row["saes"],
                        f"{row['d_sae']:,}",
                        f"{row['tokens_per_second']:,.0f}",
                        f"{row['tokens_per_second'] * row['saes']:,.0f}",
                        f"{row['peak_gib']:.1f}",
                    )
                    for row in rows
                ],
            )
        )
    for row in values.get("pursuit", []):
        found.append(f"Pursuit, {row['d_in']:,} x {row['d_sae']:,}; compiled steps {_used(row['compiled_steps'])}:")
        against = row["against"].items()
        found.append(
            _table(
                ("", "ours, s", "plain loop, s", "ratio"),
                [
                    (n, v["ours_seconds"], v["loop_seconds"], _times(v["loop_seconds"], v["ours_seconds"]))
                    for n, v in against
                ],
            )
        )
        found.append(_table(("encoder", "tokens/s"), [(n, f"{v:,.0f}") for n, v in row["tokens_per_second"].items()]))
    return found + _evaluations(values)


def _evaluations(values: dict[str, Any]) -> list[str]:
    found = []
    if (part := values.get("evaluations")) and part["by_evaluation"]:
        found.append(f"Evaluations on {part['model']}'s shape, SAEs of {part['d_sae']:,} latents:")
        rows = [(n, v["seconds_per_sae"], f"{v['peak_gib']:.1f}") for n, v in part["by_evaluation"].items()]
        found.append(_table(("evaluation", "seconds per SAE", "peak GiB"), rows))
    if part := values.get("sae_bench"):
        rows = [
            (n, v["ours_seconds"], v["sae_bench_seconds"], _times(v["sae_bench_seconds"], v["ours_seconds"]))
            for n, v in part.items()
        ]
        found.append(_table(("against SAE Bench on the same device", "ours, s", "SAE Bench, s", "ratio"), rows))
    return found


def _used(compiled: bool | None) -> str:
    return "not asked for" if compiled is None else "used" if compiled else "not used: plain torch"


def _times(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.1f}x"


def _left_out(values: dict[str, Any]) -> str:
    lines = [f"- {what}: {why}" for what, why in values["left_out"].items()]
    lines += [f"- {what} failed: {why}" for what, why in values["failed"].items()]
    return "\n".join(["Not measured:", "", *lines]) if lines else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
