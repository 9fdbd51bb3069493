"""From an evaluation's result files to one small `metrics/<eval>.json` that DVC shows and compares.

Figures are rounded to 4 significant digits. A figure that is missing, null or not finite has no key: DVC
drops a null without a word and reports a NaN as a change in every comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sae_research.errors import UserError
from sae_research.reporting.metrics import EVALS, LAB, METRICS, sort_keys
from sae_research.reporting.shapes import evaluation_results, evaluation_status, shaped
from sae_research.store import read_json, round_significant, write_json

Result = dict[str, Any]
Figures = dict[str, float]

STATUS_KEY = "_status"
"""Stands beside the SAEs of `metrics/<eval>.json`; no SAE's name begins with an underscore."""

NOT_A_NUMBER = -1.0
"""What SAE Bench's core evaluation writes where a figure is NaN."""


# --- one function per evaluation: add a metric by adding its record to `metrics.METRICS` --------


def extract_core_metrics(result: Result) -> Figures:
    """Reconstruction, sparsity, and what the model loses when patched: ours, then SAE Bench's."""
    stock = {key: value for key, value in _structured(result, "core").items() if value != NOT_A_NUMBER}
    return _in_order({**stock, **_lab(result)}, "core")


def extract_table_metrics(eval_name: str, result: Result) -> Figures:
    """Whatever the table of metrics names for this evaluation: SAE Bench's structured figures and ours."""
    return _in_order({**_structured(result, eval_name), **_lab(result)}, eval_name)


EXTRACTORS: dict[str, Callable[[Result], Figures]] = {
    **{name: partial(extract_table_metrics, name) for name in EVALS}, "core": extract_core_metrics}


# --- the two commands --------------------------------------------------------------------------


def extract(eval_name: str, folder: Path, output: Path) -> None:
    """Write `metrics/<eval>.json`: `{sae: {metric: value}}` and the evaluation's own status beside them.

    A failed evaluation still yields the results that it finished; a disabled one only its status.
    """
    write_json(output, folder_metrics(eval_name, folder))


def folder_metrics(eval_name: str, folder: Path) -> dict[str, Any]:
    """What `extract` writes. Raises `UserError` when the folder is missing."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; run the stage that writes it, `dvc repro {eval_name}_eval`"
        )
    status = evaluation_status(folder)
    if status["status"] == "disabled":
        return {STATUS_KEY: {"status": "disabled"}}
    results = evaluation_results(eval_name, folder)
    metrics = {name: EXTRACTORS[eval_name](result) for name, result in results.items()}
    return {**metrics, STATUS_KEY: _status_figures(status, len(results))}


def aggregate(inputs: list[Path], output: Path) -> None:
    """Write `{sae: {eval: {metric: value}}}` from several files, each named after its evaluation."""
    merged: dict[str, dict[str, Any]] = {}
    for path in inputs:
        if path.stem not in EVALS:
            raise UserError(f"{path}: its name must be one of {', '.join(f'{name}.json' for name in EVALS)}")
        found = shaped(read_json(path), {str: {str: object}}, path, f"run `dvc repro -f {path.stem}_metrics`")
        for sae, figures in found.items():
            if sae != STATUS_KEY:
                merged.setdefault(sae, {})[path.stem] = figures
    write_json(output, merged)


# --- parts -------------------------------------------------------------------------------------


def is_figure(value: Any) -> bool:
    """A finite number; True and False are no figures."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def lab_block(result: Result) -> dict[str, Any]:
    """Our own part of a result file; empty in a file that stock SAE Bench wrote."""
    unstructured = result.get("eval_result_unstructured")
    return unstructured.get(LAB, {}) if isinstance(unstructured, dict) else {}


def _lab(result: Result) -> Figures:
    return dict(lab_block(result).get("metrics", {}))


def _category(result: Result, category: str) -> Figures:
    """Every figure of one category of SAE Bench's structured block, under SAE Bench's own names."""
    return dict(result.get("eval_result_metrics", {}).get(category) or {})


def _structured(result: Result, eval_name: str) -> Figures:
    """The figures of SAE Bench's structured block that the table names, under our keys."""
    figures = {}
    for metric in METRICS:
        if metric.eval != eval_name or metric.source is None:
            continue
        category, name = metric.source.split(".")
        prefix, _, suffix = name.partition("{k}")
        for found, value in _category(result, category).items():
            k = found.removeprefix(prefix).removesuffix(suffix) if "{k}" in name else ""
            if found == name.replace("{k}", k) and ("{k}" not in name or k.isdigit()):
                figures[metric.key.replace("{k}", k)] = value
    return figures


def _in_order(figures: dict[str, Any], eval_name: str) -> Figures:
    return {
        key: round_significant(figures[key])
        for key in sort_keys(figures, eval_name)
        if is_figure(figures[key])
    }


def _status_figures(status: dict[str, Any], n_saes: int) -> dict[str, Any]:
    """Few and stable, for they appear in `dvc metrics diff`: `core._status.status: failed -> ok`."""
    figures = {"status": status["status"], "saes": n_saes, "skipped": len(status.get("skipped", {}))}
    if status["status"] not in ("ok", "disabled") and status.get("message"):
        figures["message"] = status["message"]
    return figures
