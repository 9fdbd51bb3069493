"""What a finished run is worth: which evaluations failed, and whether its figures match the committed ones."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from sae_research.reporting.metrics import EVALS
from sae_research.reporting.shapes import evaluation_status
from sae_research.store import read_json

RELATIVE_TOLERANCE = 0.02
ABSOLUTE_TOLERANCE = 0.02
"""Training amplifies rounding: another processor or thread count gives slightly other SAEs. Figures further than
either tolerance from the committed ones are named."""


def failures(root: Path = Path(".")) -> list[str]:
    """One line per evaluation that failed, never finished, or left no status."""
    lines = []
    for name in EVALS:
        status = evaluation_status(root / "eval_results" / name)
        if status["status"] not in ("ok", "disabled", "not_applicable"):
            lines.append(f"{name}: {status['status']}: {status['message']}")
    transfer = evaluation_status(root / "eval_results/transfer")
    if transfer["status"] in ("failed", "incomplete"):
        lines.append(f"transfer: {transfer['status']}: {transfer['message']}")
    dashboards = evaluation_status(root / "dashboards")
    if dashboards["status"] in ("failed", "incomplete"):
        lines.append(f"dashboards: {dashboards['status']}: {dashboards['message']}")
    if not (root / "METRICS.md").is_file():
        lines.append("METRICS.md was not written")
    return lines


def committed(path: str, root: Path = Path(".")) -> Any | None:
    """A JSON file as the last commit has it; None where it has none."""
    shown = subprocess.run(["git", "show", f"HEAD:./{path}"], cwd=root, capture_output=True, text=True, check=False)
    return json.loads(shown.stdout) if shown.returncode == 0 else None


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Figures of two metrics files that differ by more than both tolerances, and entries only one has."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = [f"{where}{key}: only in the {'committed' if key in old else 'new'} metrics"
                 for key in sorted(old.keys() ^ new.keys())]
        for key in sorted(old.keys() & new.keys()):
            lines += differences(old[key], new[key], f"{where}{key}.")
        return lines
    if isinstance(old, (int, float)) and isinstance(new, (int, float)):
        gap = abs(old - new)
        same = gap <= ABSOLUTE_TOLERANCE or gap <= RELATIVE_TOLERANCE * max(abs(old), abs(new))
    else:
        same = old == new
    return [] if same else [f"{where.rstrip('.')}: {old} -> {new}"]


def report(compare: bool, root: Path = Path(".")) -> int:
    """Print what failed and how the figures compare with the last commit's. Returns the exit code: 1 for failures."""
    failed = failures(root)
    for line in failed:
        print(f"failed: {line}")
    path = "metrics/all_metrics.json"
    old = committed(path, root) if compare and not failed else None
    if old is not None:
        changed = differences(old, read_json(root / path))
        print(f"{path}: {len(changed)} figures differ from the committed ones by more than "
              f"{RELATIVE_TOLERANCE:.0%} and {ABSOLUTE_TOLERANCE}" if changed else f"{path}: matches the committed figures")
        for line in changed[:20]:
            print(f"  {line}")
        if len(changed) > 20:
            print(f"  … and {len(changed) - 20} more (dvc metrics diff)")
    if not failed:
        print("done: METRICS.md, metrics/, images/")
    return 1 if failed else 0
