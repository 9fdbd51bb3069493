"""What the ground-truth evaluation left behind: means and intervals over seeds, and `metrics/ground_truth.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_research.errors import UserError
from sae_research.reporting.extract import STATUS_KEY, is_figure
from sae_research.reporting.shapes import FIGURE, evaluation_status, shaped
from sae_research.store import read_json, round_significant, slugify, write_json

FOLDER = Path("eval_results/ground_truth")
RESULTS_FILE = "results.json"
METRICS_FILE = Path("metrics/ground_truth.json")
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t by degrees of freedom, from 1."""


@dataclass(frozen=True)
class Line:
    """One method at one sparsity, over seeds."""

    method: str
    dictionary: str
    encoder: str
    sparsity: str
    values: dict[str, list[float]]
    """By metric, one a seed"""
    flags: list[str]

    @property
    def name(self) -> str:
        return f"{self.method}, {self.sparsity}" if self.sparsity else self.method

    def mean(self, key: str) -> float | None:
        found = self.values.get(key)
        return sum(found) / len(found) if found else None

    def interval(self, key: str) -> tuple[float, float] | None:
        """95 % over seeds by Student's t; None for fewer than two."""
        found = self.values.get(key, [])
        if len(found) < 2:
            return None
        mean, n = sum(found) / len(found), len(found)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in found) / (n - 1))
        half = T_975[min(n - 1, len(T_975)) - 1] * deviation / math.sqrt(n)
        return mean - half, mean + half


@dataclass(frozen=True)
class GroundTruthRun:
    """All of one run of the stage."""

    result: dict[str, Any]

    @property
    def lines(self) -> list[Line]:
        return lines(self.result["rows"])

    def follow(self, scope: str) -> dict[str, Any]:
        return self.result["follow"][scope]


def read_ground_truth(root: Path = Path(".")) -> GroundTruthRun | None:
    """The finished run below `root`; None where the evaluation was switched off, failed or never ran."""
    path = root / FOLDER / RESULTS_FILE
    if evaluation_status(root / FOLDER)["status"] != "ok" or not path.is_file():
        return None
    return GroundTruthRun(_results(path))


def _results(path: Path) -> dict[str, Any]:
    """`results.json`. Raises `UserError` for one that is damaged."""
    shape = {"setting!": object, "generator!": [{str: object}], "notes!": [str],
             "rows!": [{"method!": str, "dictionary!": str, "encoder!": str, "metrics!": {str: FIGURE}, "flags!": [str]}],
             "follow!": {str: {"correlations!": object, "methods!": [str], "note": object}}}
    return shaped(read_json(path), shape, path, "run `dvc repro ground_truth_eval` again")


def lines(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Rows of all seeds as one line for each method and sparsity, in the order of the first seed."""
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in ("method", "dictionary", "encoder", "sparsity")), []).append(row)
    return [Line(*key, {metric: [row["metrics"][metric] for row in same if metric in row["metrics"]]
                        for metric in same[0]["metrics"]},
                 list(dict.fromkeys(flag for row in same for flag in row["flags"]))) for key, same in found.items()]


def extract_ground_truth(folder: Path, output: Path) -> None:
    """Write `{method_sparsity: {metric: mean over seeds}}`, rank correlations and the stage's status."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run the stage that writes it, `dvc repro ground_truth_eval`")
    status = evaluation_status(folder)
    if status["status"] != "ok":
        message = {"message": status["message"]} if status["status"] != "disabled" and status.get("message") else {}
        write_json(output, {STATUS_KEY: {"status": status["status"], **message}})
        return
    result = _results(folder / RESULTS_FILE)
    figures = {slugify(line.name): {key: line.mean(key) for key in line.values} for line in lines(result["rows"])}
    spearman = {scope: {f"{metric}_with_{truth}": values["spearman"] for metric, truths in found["correlations"].items()
                        for truth, values in truths.items() if is_figure(values.get("spearman"))}
                for scope, found in result["follow"].items()}
    write_json(output, round_significant({
        **figures, "rank_correlations": spearman,
        STATUS_KEY: {"status": "ok", "seeds": result["setting"]["n_seeds"], "methods": len(figures)}}))
