"""From an evaluation's result files to one small `metrics/<eval>.json` that DVC shows and compares.

Metrics are rounded to 4 significant digits. A metric that is missing, null or not finite has no key: DVC
drops a null without a word and reports a NaN as a change in every comparison.

Merge all evaluations into one small file per SAE: `eval_results/merged/<sae>.json`.

Beside them `_evaluations.json` keeps what belongs to no single SAE: how each evaluation ended, with which
settings, and the order of the SAEs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sae_research.reporting.metrics import (
    EVALS,
    LAB,
    METRICS,
    sort_keys,
)
from sae_research.reporting.shapes import (
    evaluation_results,
    evaluation_status,
    manifest,
    shaped,
)
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_json, replaced_folder, round_significant, write_json

Result = dict[str, Any]
Metrics = dict[str, float]

STATUS_KEY = "_status"
"""Stands beside the SAEs of `metrics/<eval>.json`; no SAE's name begins with an underscore."""

NOT_A_NUMBER = -1.0
"""What SAE Bench's core evaluation writes where a metric is NaN."""


# --- one function per evaluation: add a metric by adding its record to `metrics.METRICS` --------


def extract_core_metrics(result: Result) -> Metrics:
    """Reconstruction, sparsity, and what the model loses when patched: ours, then SAE Bench's."""
    bench = {key: value for key, value in _structured(result, "core").items() if value != NOT_A_NUMBER}
    return _in_order({**bench, **_lab(result)}, "core")


def extract_table_metrics(eval_name: str, result: Result) -> Metrics:
    """Whatever the table of metrics names for this evaluation: SAE Bench's structured metrics and ours."""
    return _in_order({**_structured(result, eval_name), **_lab(result)}, eval_name)


EXTRACTORS: dict[str, Callable[[Result], Metrics]] = {
    **{name: partial(extract_table_metrics, name) for name in EVALS},
    "core": extract_core_metrics,
}


# --- the two commands --------------------------------------------------------------------------


def extract(eval_name: str, folder: Path, output: Path) -> None:
    """Write `metrics/<eval>.json`: `{sae: {metric: value}}` and the evaluation's own status beside them.

    A failed evaluation still yields the results that it finished; a disabled one only its status.
    """
    write_json(output, folder_metrics(eval_name, folder))


def folder_metrics(eval_name: str, folder: Path) -> dict[str, Any]:
    """What `extract` writes. Raises `UserError` when the folder is missing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run the stage that writes it, `dvc repro {eval_name}_eval`")
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


def is_number(value: Any) -> bool:
    """A finite number; True and False do not count."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def lab_block(result: Result) -> dict[str, Any]:
    """Our own part of a result file; empty in a file that SAE Bench itself wrote."""
    unstructured = result.get("eval_result_unstructured")
    return unstructured.get(LAB, {}) if isinstance(unstructured, dict) else {}


def _lab(result: Result) -> Metrics:
    return dict(lab_block(result).get("metrics", {}))


def _category(result: Result, category: str) -> Metrics:
    """Every metric of one category of SAE Bench's structured block, under SAE Bench's own names."""
    return dict(result.get("eval_result_metrics", {}).get(category) or {})


def _structured(result: Result, eval_name: str) -> Metrics:
    """The metrics of SAE Bench's structured block that the table names, under our keys."""
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


def _in_order(figures: dict[str, Any], eval_name: str) -> Metrics:
    return {key: round_significant(figures[key]) for key in sort_keys(figures, eval_name) if is_number(figures[key])}


def _status_figures(status: dict[str, Any], n_saes: int) -> dict[str, Any]:
    """Few and stable, for they appear in `dvc metrics diff`: `core._status.status: failed -> ok`."""
    figures = {"status": status["status"], "saes": n_saes, "skipped": len(status.get("skipped", {}))}
    if status["status"] not in ("ok", "disabled") and status.get("message"):
        figures["message"] = status["message"]
    return figures


RESULTS = Path("eval_results")
MERGED = RESULTS / "merged"
EVALUATIONS_FILE = "_evaluations.json"
MANIFEST = Path("downloaded_saes/manifest.json")

ROLES = ("baseline", "variant", "comparison", "control")
"""The groups of every table, in order."""

EVIDENCE = "cluster_sums"
"""Sums from which differences between SAEs are taken keep all their digits."""


def merge(root: Path = Path(".")) -> list[str]:
    """Write `eval_results/merged/` afresh from all evaluations. Returns the SAEs' names in table order."""
    folders = {name: root / RESULTS / name for name in EVALS}
    if not any(folder.is_dir() for folder in folders.values()):
        raise UserError(f"{root / RESULTS}: no evaluation has run; start with `dvc repro core_eval`")
    statuses = {name: evaluation_status(folder) for name, folder in folders.items()}
    results = {
        name: {} if statuses[name]["status"] == "disabled" else evaluation_results(name, folder)
        for name, folder in folders.items()
    }
    configs = _configs(root, results)
    records = {
        sae: {
            "sae": sae,
            "cfg": cfg,
            "evals": {name: _evaluation(sae, name, results[name].get(sae), statuses[name]) for name in EVALS},
        }
        for sae, cfg in configs.items()
    }
    _write_afresh(
        root / MERGED,
        records,
        {
            "order": list(records),
            "evals": {name: {**statuses[name], "config": _eval_config(results[name])} for name in EVALS},
        },
    )
    return list(records)


def _write_afresh(folder: Path, records: dict[str, Any], evaluations: dict[str, Any]) -> None:
    """Replace the folder: the file of an SAE that is gone must not survive."""
    with replaced_folder(folder) as temporary:
        for sae, record in records.items():
            write_json(temporary / f"{sae}.json", record)
        write_json(temporary / EVALUATIONS_FILE, evaluations)


def _evaluation(sae: str, name: str, result: dict[str, Any] | None, status: dict[str, Any]) -> dict[str, Any]:
    """One SAE in one evaluation: metrics of both definitions, ours in full, no per-latent details."""
    if result is None:
        return _absent(sae, status)
    extras = {
        key: value if key == EVIDENCE else round_significant(value)
        for key, value in lab_block(result).items()
        if key != "metrics"
    }
    record = {"status": "ok", "metrics": EXTRACTORS[name](result), **extras}
    if name != "core":  # core's details are per latent, the others' per task or letter
        record["details_sae_bench"] = round_significant(result.get("eval_result_details") or [])
    return record


def _absent(sae: str, status: dict[str, Any]) -> dict[str, Any]:
    """Why an SAE has no result: skipped with a reason, or as the evaluation as a whole ended."""
    why = status.get("skipped", {}).get(sae)
    if why is not None:
        return {"status": "skipped", "message": why}
    if status["status"] == "ok":
        return {"status": "missing", "message": "the evaluation finished without this SAE"}
    return {"status": status["status"], "message": status.get("message", "")}


def _configs(root: Path, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is known of each SAE, in table order: the manifest says which exist, else whoever has a result."""
    found: dict[str, dict[str, Any]] = {}
    for by_sae in results.values():
        for sae, result in by_sae.items():
            # the first evaluation's word stands; later ones only add
            found[sae] = {**(result.get("sae_cfg_dict") or {}), **found.get(sae, {})}
    if not (root / MANIFEST).is_file():
        return {sae: found[sae] for sae in sorted(found, key=lambda sae: _table_order(sae, found[sae]))}
    listed = manifest(root / MANIFEST)
    known = listed["saes"]
    for sae in sorted(set(found) - set(known)):
        print(f"left out {sae}: it has results but is not in {MANIFEST}", flush=True)
    order = [sae for sae in listed.get("order") or [] if sae in known]
    return {sae: {**known[sae], **found.get(sae, {})} for sae in [*order, *sorted(set(known) - set(order))]}


def _table_order(sae: str, cfg: dict[str, Any]) -> tuple[Any, ...]:
    """Baseline, variants, comparison, controls; inside them by name, numbers by size."""
    role = cfg.get("role", "comparison")
    parts = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", sae)]
    return ROLES.index(role) if role in ROLES else len(ROLES), parts


def _eval_config(by_sae: dict[str, Any]) -> dict[str, Any]:
    """The settings an evaluation ran with, the same for all its SAEs."""
    return next((result.get("eval_config") or {} for result in by_sae.values()), {})
