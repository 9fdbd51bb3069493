"""What the transfer evaluation left behind, as the report, the metrics and the pictures read it."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_research.reporting.shapes import evaluation_status, transfer_results

FOLDER = Path("eval_results/transfer")
MAIN = "finetuned"
NAMES = {MAIN: "finetuned", "control_self": "control: itself", "control_perturbed": "control: perturbed"}
MODELS = ("base", "finetuned")


@dataclass(frozen=True)
class TransferRun:
    """All of one run of the stage."""

    status: dict[str, Any]
    results: dict[str, dict[str, Any]]
    """By pair: `finetuned`, then the controls."""
    table: dict[str, list[Any]]
    """The latents of the pair, column by column; None where a figure is not defined."""

    @property
    def main(self) -> dict[str, Any]:
        return self.results[MAIN]

    @property
    def hook(self) -> str:
        return str(self.main["setting"]["hook"])


def read_transfer(root: Path = Path(".")) -> TransferRun | None:
    """The finished run below `root`; None where the evaluation was switched off, failed or never ran."""
    folder = root / FOLDER
    status = evaluation_status(folder)
    found = transfer_results(folder) if folder.is_dir() else {}
    if MAIN not in found:
        return None
    order = [MAIN, *sorted((name for name in found if name != MAIN), reverse=True)]
    return TransferRun(status, {name: found[name] for name in order}, _read_table(folder / "latents.tsv"))


def _read_table(path: Path) -> dict[str, list[Any]]:
    if not path.is_file():
        return {}
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    return {name: [_cell(row[name]) for row in rows] for name in (rows[0] if rows else {})}


def _cell(text: str) -> Any:
    if text == "":
        return None
    try:
        return float(text)
    except ValueError:
        return text


def at(values: dict[str, Any] | None, *path: str) -> Any:
    """What stands at a path of keys; None where any part is missing or the figure is not finite."""
    found: Any = values
    for key in path:
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return None if isinstance(found, float) and not math.isfinite(found) else found
