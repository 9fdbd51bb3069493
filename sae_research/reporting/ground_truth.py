"""The ground-truth evaluation's results: means and intervals over seeds, `metrics/ground_truth.json`, and the report's
section on how far known features were found and which metric follows that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_research.reporting.results import STATUS_KEY, is_number
from sae_research.reporting.shapes import NUMBER_OR_NONE, evaluation_status, shaped
from sae_research.reporting.stage_metrics import GROUND_TRUTH
from sae_research.reporting.tables import render
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_json, round_significant, slugify, write_json
from sae_research.runtime.formatting import ABSENT, markdown_table, number, text_table, with_interval

FOLDER = Path("eval_results/ground_truth")
RESULTS_FILE = "results.json"
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
    shape = {
        "setting!": object,
        "generator!": [{str: object}],
        "notes!": [str],
        "rows!": [{"method!": str, "dictionary!": str, "encoder!": str, "metrics!": {str: NUMBER_OR_NONE}, "flags!": [str]}],
        "follow!": {str: {"correlations!": object, "methods!": [str], "note": object}},
    }
    return shaped(read_json(path), shape, path, "run `dvc repro ground_truth_eval` again")


def lines(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Rows of all seeds as one line for each method and sparsity, in the order of the first seed."""
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in ("method", "dictionary", "encoder", "sparsity")), []).append(row)
    return [
        Line(
            *key,
            {metric: [row["metrics"][metric] for row in same if metric in row["metrics"]] for metric in same[0]["metrics"]},
            list(dict.fromkeys(flag for row in same for flag in row["flags"])),
        )
        for key, same in found.items()
    ]


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
    spearman = {
        scope: {
            f"{metric}_with_{truth}": values["spearman"]
            for metric, truths in found["correlations"].items()
            for truth, values in truths.items()
            if is_number(values.get("spearman"))
        }
        for scope, found in result["follow"].items()
    }
    write_json(
        output,
        round_significant(
            {
                **figures,
                "rank_correlations": spearman,
                STATUS_KEY: {"status": "ok", "seeds": result["setting"]["n_seeds"], "methods": len(figures)},
            }
        ),
    )


LABELS = {metric.key: metric.label for metric in GROUND_TRUTH}
DEFINED = ("mcc", "latent_f1", "absorption")
"""Whose definitions stand above the tables."""
TRAINED = (
    "l0",
    "variance_explained",
    "top_1_probing",
    "mcc",
    "mcc_activations",
    "latent_f1",
    "latent_precision",
    "latent_recall",
    "uniqueness",
    "fraction_dead",
    "fraction_duplicate",
    "absorption",
    "split_latents",
)
PURSUIT = ("l0", "variance_explained", "top_1_probing", "latent_f1", "latent_precision", "latent_recall", "mcc_activations")
SCOPES = {
    "all": "Trained SAEs, and pursuit over trained and untrained dictionaries",
    "trained_dictionaries": "Trained SAEs, and pursuit over a trained dictionary (whose MCC they share)",
    "trained": "Trained SAEs alone",
}
TRUTHS = {"mcc": "MCC", "latent_f1": "F1"}
OWN = "own encoder"
AMONG = {"all": "(untrained dictionaries among them)", "trained_dictionaries": "of trained dictionaries alone"}
DICTIONARIES = {"truth": "true features", "trained": "trained dictionary", "untrained": "untrained rows"}


def ground_truth(root: Path = Path(".")) -> str:
    """The whole section; empty where the evaluation left nothing."""
    run = read_ground_truth(root)
    if run is None:
        return ""
    generator = run.result["generator"]
    pursuit = [line for line in run.lines if " over " in line.method]
    return render(
        "ground_truth",
        setting=run.result["setting"],
        defined=[metric for metric in GROUND_TRUTH if metric.key in DEFINED],
        mean_active=sum(each["l0"] for each in generator) / len(generator),
        trained=_table([line for line in run.lines if line not in pursuit], TRAINED),
        notes=run.result["notes"],
        flags=_flags(run.lines),
        scopes=[_scope(run.follow(scope), title) for scope, title in SCOPES.items()],
        pursuit=_table(pursuit, PURSUIT),
        best=_best_pursuit(pursuit),
        own=next((line for line in run.lines if line.encoder == OWN and line.dictionary == "trained"), None),
    )


def _flags(found: Sequence[Line]) -> dict[str, list[str]]:
    """The methods that carry a flag, by its first words."""
    names: dict[str, list[str]] = {}
    for line in found:
        for flag in dict.fromkeys(flag.partition(":")[0] for flag in line.flags if not flag.startswith("narrow")):
            names.setdefault(flag, []).append(line.name)
    return names


def _table(found: Sequence[Line], keys: Sequence[str]) -> str:
    shown = [key for key in keys if any(line.mean(key) is not None for line in found)]
    body = [[f"`{line.name}`", *(with_interval(line.mean(key), line.interval(key)) for key in shown)] for line in found]
    return markdown_table(["SAE", *(LABELS[key] for key in shown)], body)


def _scope(found: Mapping[str, Any], title: str) -> dict[str, Any]:
    """The table of rank correlations of one set of methods; where there is none, its note says why."""
    body = [
        [LABELS[metric], *(_correlation(truths.get(truth, {})) for truth in TRUTHS)]
        for metric, truths in found["correlations"].items()
    ]
    table = markdown_table(["Metric", *TRUTHS.values()], body) if body else ""
    return {**found, "title": title, "table": table, "methods": len(found["methods"])}


def _correlation(values: Mapping[str, Any]) -> str:
    if "spearman" not in values:
        return values.get("note", ABSENT)
    return with_interval(values["spearman"], values.get("interval"))


def beside(metric: str, root: Path = Path(".")) -> str:
    """One line on how far a metric followed the truth, for the tables of real models; empty where that is not known.

    metric: `variance_explained` or `top_1_probing`.
    """
    run = read_ground_truth(root)
    scopes = {} if run is None else {words: _followed(run.follow(scope), metric) for scope, words in AMONG.items()}
    found = [f"{followed} {words}" for words, followed in scopes.items() if followed]
    if not found:
        return ""
    return (
        f"*{LABELS[metric]} and the truth*: on synthetic activations with known features, its rank correlation at equal "
        f"L0 is {'; '.join(found)}. See [ground truth](#ground-truth)."
    )


def _followed(found: Mapping[str, Any], metric: str) -> str:
    """`0.69 [0.14, 0.92] with MCC and 0.44 [-0.19, 0.61] with F1 over 13 methods`; empty where that is not known."""
    truths = found["correlations"].get(metric, {})
    shown = {label: truths[key] for key, label in TRUTHS.items() if "spearman" in truths.get(key, {})}
    known = [f"{_correlation(values)} with {label}" for label, values in shown.items()]
    return f"{' and '.join(known)} over {len(found['methods'])} methods" if known else ""


def _best_pursuit(found: Sequence[Line]) -> list[dict[str, Any]]:
    """The pursuit encoder of highest F1 over every dictionary, and what IHTP and matching pursuit reach there."""
    best = []
    for dictionary, title in DICTIONARIES.items():
        rows = [line for line in found if line.method.endswith(f"over {dictionary}") and line.mean("latent_f1") is not None]
        if rows:
            others = [line for line in rows if line.encoder in ("ihtp", "mpsae")]
            highest = max(rows, key=lambda line: line.mean("latent_f1") or 0)
            best.append({"dictionary": title, "best": highest, "others": others})
    return best


def plain_table(result: dict[str, Any]) -> str:
    """All rows as text, for the command line."""
    keys = ("l0", "variance_explained", "top_1_probing", "mcc", "latent_f1", "uniqueness", "fraction_dead", "absorption")
    rows = [[line.name, *(number(line.mean(key)) for key in keys)] for line in lines(result["rows"])]
    table = text_table([["", *(LABELS[key] for key in keys)], *rows])
    return "\n".join([table, *(f"note: {note}" for note in result["notes"])])
