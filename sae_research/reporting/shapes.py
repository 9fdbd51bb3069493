"""What stages left on disk, read for the report: held against its shape before it is believed, in one line where it is not.

A shape is a type, a tuple of types, `[shape]` for a list of such items, `{str: shape}` for a mapping of names to such
values, or a mapping of keys to shapes; `key!` must be there, other keys may be absent or null.

What a finished run is worth: which evaluations failed, and whether its metrics match the committed ones.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_research.config.evaluations import EVALUATIONS
from sae_research.reporting.metrics import EVALS, LAB
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import checked_name, read_json
from sae_research.runtime.stages import read_results, read_status

Shape = Any
NUMBER = (int, float)
NUMBER_OR_NONE = (int, float, type(None))
CFG = {"form": str, "architecture": str, "role": str, "base": str, "provenance": {str: object}}
EVIDENCE = {
    "intervals": {str: [NUMBER]},
    "cluster_sums": {str: {"clusters!": str, "numerator!": [NUMBER], "denominator!": [NUMBER]}},
    "clusters": {str: {str: object}},
    "outcomes": {"key!": str, "asked!": {str: {str: [str]}}, "correct!": {str: {str: {str: (str, list)}}}},
    "density_histogram": {"log10_edges!": [NUMBER], "counts!": [NUMBER], "dead!": NUMBER},
    "tasks": {str: {str: object}},
}
"""What our own part of a result, and the merged record, keep for intervals, tests and pictures."""
RESULT = {
    "eval_result_metrics!": {str: {str: NUMBER_OR_NONE}},
    "eval_config": {str: object},
    "sae_cfg_dict": CFG,
    "eval_result_details": [object],
    "eval_type_id": str,
}
STATUS = {"status!": str, "message": str, "skipped": {str: str}, "notes": {"random_seed": NUMBER}, "config": {str: object}}
MERGED_RECORD = {"sae!": str, "cfg!": CFG, "evals!": {str: {"status!": str, "metrics": {str: NUMBER_OR_NONE}, **EVIDENCE}}}
MERGED_EVALUATIONS = {"order!": [str], "evals!": {f"{name}!": STATUS for name in EVALS}}
MANIFEST = {"saes!": {str: CFG}, "order": [str]}
TRAINING = {"saes": {str: {str: object}}, "tokens": NUMBER}
TRANSFER = {key: {str: object} for key in ("setting", "similarity", "quality", "losses", "latents")}


def shaped(value: Any, shape: Shape, path: Path, mend: str) -> Any:
    """The value, of this shape. path: the file it was read from. Raises `UserError` that names the first place that is of
    another shape; mend: what to do about it."""
    wrong = _mismatch(value, shape, "")
    if wrong:
        raise UserError(f"{path}: {wrong}; the file is damaged or no result of this project: {mend}")
    return value


def _mismatch(value: Any, shape: Shape, place: str) -> str | None:
    if isinstance(shape, dict):
        return _mapping_mismatch(value, shape, place)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{place or 'the whole'} is no list"
        found = (
            (_mismatch(item, shape[0], f"{place}[{index}]") for index, item in enumerate(value))
            if shape[0] is not object
            else iter(())
        )
        return next((wrong for wrong in found if wrong), None)
    if not isinstance(value, shape) or isinstance(value, bool) and shape is not object:
        kinds = shape if isinstance(shape, tuple) else (shape,)
        return f"{place} is no {'number' if int in kinds else 'text'}"
    return None


def _mapping_mismatch(value: Any, shape: dict[Any, Shape], place: str) -> str | None:
    if not isinstance(value, dict):
        return f"{place or 'the whole'} is no mapping"
    for key, inner in shape.items():
        if key is str:
            found = (
                (_mismatch(item, inner, f"{place}.{name}".lstrip(".")) for name, item in value.items())
                if inner is not object
                else iter(())
            )
            wrong = next((wrong for wrong in found if wrong), None)
        else:
            name = key.removesuffix("!")
            here = f"{place}.{name}".lstrip(".")
            if value.get(name) is None:
                wrong = f"{here} is missing" if key.endswith("!") else None
            else:
                wrong = _mismatch(value[name], inner, here)
        if wrong:
            return wrong
    return None


# --- what is read --------------------------------------------------------------------------------


def evaluation_status(folder: Path) -> dict[str, Any]:
    """The status of an evaluation's folder, complete. Raises `UserError` for one that is damaged."""
    found = shaped(read_status(folder), STATUS, folder / "_status.json", "run its stage again")
    return {**found, **{key: found.get(key) or empty for key, empty in (("message", ""), ("skipped", {}), ("notes", {}))}}


def evaluation_results(eval_name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Every SAE's result of an evaluation, by name. Raises `UserError` for one that is damaged or another evaluation's."""
    results = read_results(folder)
    for name, result in results.items():
        path = folder / f"{checked_name(name, folder)}_eval_results.json"
        mend = f"remove it and run `dvc repro {eval_name}_eval`"
        shaped(result, RESULT, path, mend)
        unstructured = result.get("eval_result_unstructured")
        if isinstance(unstructured, dict):
            shaped(unstructured, {LAB: {"metrics": {str: NUMBER_OR_NONE}, **EVIDENCE}}, path, mend)
        kind = result.get("eval_type_id", eval_name)
        if kind not in (eval_name, EVALUATIONS[eval_name].result_type):
            raise UserError(f"{path}: a result of the evaluation {kind}; it belongs in another folder")
    return results


def transfer_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every pair's result of the transfer evaluation, by name. Raises `UserError` for one that is damaged."""
    results = read_results(folder)
    for name, result in results.items():
        shaped(result, TRANSFER, folder / f"{name}_eval_results.json", "remove it and run `dvc repro transfer_eval`")
    return results


def manifest(path: Path) -> dict[str, Any]:
    """`{"saes": by name, "order": names}` of `downloaded_saes/manifest.json`, names fit for files."""
    found = shaped(read_json(path), MANIFEST, path, "run the setup stage again")
    for name in (*found["saes"], *(found.get("order") or ())):
        checked_name(name, path)
    return found


def merged_evaluations(path: Path) -> dict[str, Any]:
    """`eval_results/merged/_evaluations.json`, names fit for files."""
    found = shaped(read_json(path), MERGED_EVALUATIONS, path, MERGE_AGAIN)
    for name in found["order"]:
        checked_name(name, path)
    return found


MERGE_AGAIN = "run `python -m scripts.process_results`"


def merged_record(path: Path) -> dict[str, Any]:
    """One SAE's `eval_results/merged/<sae>.json`."""
    return shaped(read_json(path), MERGED_RECORD, path, MERGE_AGAIN)


RELATIVE_TOLERANCE = 0.02
ABSOLUTE_TOLERANCE = 0.02
"""Training amplifies rounding: another processor or thread count gives slightly other SAEs. Metrics further than
either tolerance from the committed ones are named."""


def failures(root: Path = Path(".")) -> list[str]:
    """One line per evaluation that failed, never finished, or left no status."""
    lines = []
    for name in EVALS:
        status = evaluation_status(root / "eval_results" / name)
        if status["status"] not in ("ok", "disabled", "not_applicable"):
            lines.append(f"{name}: {status['status']}: {status['message']}")
    others = [f"eval_results/{name}" for name in EVALUATIONS if name not in EVALS]
    for folder in (*others, "dashboards"):
        status = evaluation_status(root / folder)
        if status["status"] in ("failed", "incomplete"):
            lines.append(f"{folder.rpartition('/')[2]}: {status['status']}: {status['message']}")
    if not (root / "METRICS.md").is_file():
        lines.append("METRICS.md was not written")
    return lines


def committed(path: str, root: Path = Path(".")) -> Any | None:
    """A JSON file as the last commit has it; None where it has none."""
    shown = subprocess.run(["git", "show", f"HEAD:./{path}"], cwd=root, capture_output=True, text=True, check=False)
    return json.loads(shown.stdout) if shown.returncode == 0 else None


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Metrics of two metrics files that differ by more than both tolerances, and entries only one has."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = [
            f"{where}{key}: only in the {'committed' if key in old else 'new'} metrics"
            for key in sorted(old.keys() ^ new.keys())
        ]
        for key in sorted(old.keys() & new.keys()):
            lines += differences(old[key], new[key], f"{where}{key}.")
        return lines
    if isinstance(old, (int, float)) and isinstance(new, (int, float)):
        gap = abs(old - new)
        same = gap <= ABSOLUTE_TOLERANCE or gap <= RELATIVE_TOLERANCE * max(abs(old), abs(new))
    else:
        same = old == new
    return [] if same else [f"{where.rstrip('.')}: {old} -> {new}"]


def report(compare: bool, root: Path = Path("."), unfinished: Callable[[], list[str]] = list) -> int:
    """Print what failed and how the metrics compare with the last commit's. Returns the exit code: 1 for failures.

    unfinished: asked where no evaluation failed; lines on stages that ended otherwise than well.
    """
    failed = failures(root) or unfinished()
    for line in failed:
        print(f"failed: {line}")
    path = "metrics/all_metrics.json"
    old = committed(path, root) if compare and not failed else None
    if old is not None:
        changed = differences(old, read_json(root / path))
        print(
            f"{path}: {len(changed)} figures differ from the committed ones by more than "
            f"{RELATIVE_TOLERANCE:.0%} and {ABSOLUTE_TOLERANCE}"
            if changed
            else f"{path}: matches the committed figures"
        )
        for line in changed[:20]:
            print(f"  {line}")
        if len(changed) > 20:
            print(f"  … and {len(changed) - 20} more (dvc metrics diff)")
    if not failed:
        print("done: report/index.html (the results), METRICS.md, metrics/, images/")
    return 1 if failed else 0
