"""Merge all evaluations into one small file per SAE: `eval_results/merged/<sae>.json`.

Beside them `_evaluations.json` keeps what belongs to no single SAE: how each evaluation ended, with which
settings, and the order of the SAEs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sae_research.errors import UserError
from sae_research.folders import replaced_folder
from sae_research.reporting.extract import EXTRACTORS, lab_block
from sae_research.reporting.metrics import EVALS
from sae_research.reporting.shapes import evaluation_results, evaluation_status, manifest
from sae_research.store import round_significant, write_json

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
            "evals": {
                name: {**statuses[name], "config": _eval_config(results[name])}
                for name in EVALS
            },
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
    """One SAE in one evaluation: figures of both definitions, ours in full, no per-latent details."""
    if result is None:
        return _absent(sae, status)
    extras = {key: value if key == EVIDENCE else round_significant(value)
              for key, value in lab_block(result).items() if key != "metrics"}
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
