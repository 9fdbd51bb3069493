"""What figures and tables are drawn from: the merged results of one run as rows, one per SAE."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sae_research.config.recipes import PLUS
from sae_research.reporting.metrics import METRICS, Metric, family_of, headline, home, leading_ks, top_k
from sae_research.reporting.results import EVALUATIONS_FILE, MERGED
from sae_research.reporting.shapes import MERGE_AGAIN, TRAINING, merged_evaluations, merged_record, shaped
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_json

TRAINED = Path("trained_saes")
CURVE_FILE = "training_curve.tsv"
REPORT_FILE = "training_report.json"


@dataclass(frozen=True)
class Row:
    """One SAE: what it is and what was measured of it."""

    name: str
    cfg: dict[str, Any]
    evals: dict[str, dict[str, Any]]

    @property
    def architecture(self) -> str:
        """Display group; of a class of one's own, `my_module:MySAE`, the class."""
        return (self.cfg.get("architecture") or self.cfg.get("form") or "unknown").rpartition(":")[2]

    @property
    def role(self) -> str:
        return self.cfg.get("role") or "comparison"

    @property
    def hook_out(self) -> str | None:
        """The hook that a transcoder writes; None of an SAE."""
        written = self.cfg.get("hook_out")
        return None if written == self.cfg.get("hook_name") else written

    @property
    def elsewhere(self) -> str | None:
        """What it stands for, where not one hook that it reads: what a transcoder writes, all of a crosscoder's hooks."""
        read = self.cfg.get("hook_name")
        return self.hook_out if read is None or PLUS not in read else self.hook_out or read

    @property
    def crosscoder_hooks(self) -> list[str]:
        """The hooks of a crosscoder, those that a cross-layer transcoder writes; none of anything else."""
        stands_for = str(self.elsewhere or "")
        return stands_for.split(PLUS) if PLUS in stands_for else []

    @property
    def hook_kind(self) -> str | None:
        """What it is where its reconstruction is not of the one hook that it reads; None of an SAE."""
        if not self.crosscoder_hooks:
            return "transcoder" if self.hook_out else None
        return "cross-layer transcoder" if self.hook_out else "crosscoder"

    @property
    def training_options(self) -> tuple[str, ...]:
        """Switches of training that make another architecture of one name: points on either side are no curve."""
        chosen = (self.cfg.get("provenance") or {}).get("hyper_parameters") or {}
        return tuple(word for key, word in (("whiten", "whitened"), ("skip", "skip")) if chosen.get(key))

    @property
    def hooks(self) -> str | None:
        """The hook it reads, and the one that a transcoder writes; None where its result does not say."""
        read = self.cfg.get("hook_name")
        return read if self.hook_out is None else f"{read} -> {self.hook_out}"

    @property
    def is_control(self) -> bool:
        return self.role == "control"

    @property
    def group(self) -> str:
        """What its marker and colour stand for: controls look alike whatever they are made of."""
        if self.is_control:
            return "control"
        further = [word for word in (self.hook_kind, *self.training_options) if word]
        return ", ".join([self.architecture, *further])

    @property
    def kind(self) -> str:
        """Its architecture; of a control what it is made of."""
        made_of = (self.cfg.get("provenance") or {}).get("kind") if self.is_control else None
        return f"control_{made_of}" if made_of else self.name if self.is_control else self.architecture

    @property
    def interpolating(self) -> bool:
        """Its reconstruction has as many free coefficients as equations: reconstruction says nothing."""
        return bool(self.evals.get("core", {}).get("interpolating", False))

    @property
    def may_be_marked(self) -> bool:
        """Controls and interpolating encoders are never marked as holding a column's extreme value."""
        return not self.is_control and not self.interpolating

    @property
    def flags(self) -> list[str]:
        flags = [self.hook_kind] if self.hook_kind else []
        flags += ["interpolating"] if self.interpolating else []
        flags += ["not causal"] if self.cfg.get("causal") is False else []
        return flags + (["signed"] if self.cfg.get("signed") else [])

    @property
    def recipe(self) -> str | None:
        """What it shares with SAEs trained alike but for the seed; None for what was not trained here."""
        return (self.cfg.get("provenance") or {}).get("recipe_id")

    def value(self, key: str, eval_name: str | None = None) -> float | None:
        """The value under a metric's key, by default of core or sparse probing; None where it was not measured."""
        return self.evals.get(eval_name or home(key), {}).get("metrics", {}).get(key)

    def interval(self, key: str, eval_name: str | None = None) -> tuple[float, float] | None:
        """Its 95 % interval (low, high); None where none was computed."""
        bounds = self.evals.get(eval_name or home(key), {}).get("intervals", {}).get(key)
        return tuple(bounds) if bounds and self.value(key, eval_name) is not None else None


@dataclass(frozen=True)
class Curve:
    """How one SAE's training went, column by column."""

    name: str
    columns: dict[str, list[float]]


@dataclass(frozen=True)
class Run:
    """Everything the reporting stages read."""

    rows: list[Row]
    evals: dict[str, dict[str, Any]]
    """By evaluation: status, message, skipped, notes, config."""
    training: dict[str, Any]
    """`trained_saes/training_report.json`; empty where nothing was trained here."""
    curves: list[Curve]

    @cached_property
    def ks(self) -> list[int]:
        """The values of k that sparse probing measured, ascending."""
        keys = {key for row in self.rows for key in row.evals.get("sparse_probing", {}).get("metrics", {})}
        return sorted({k for key in keys if (k := top_k(key)) is not None})

    @property
    def headline(self) -> tuple[str, ...]:
        """Columns of the report's first table."""
        return self._keys(metric for metric in METRICS if metric.table)

    @property
    def ranking(self) -> list[Metric]:
        """The metrics of the first table that rank SAEs."""
        return [metric for metric in map(headline, self.headline) if metric.better and metric.ranks]

    @property
    def plotted(self) -> tuple[str, ...]:
        """What is drawn against L0."""
        return self._keys(sorted((metric for metric in METRICS if metric.plot), key=lambda metric: metric.plot))

    @property
    def probing_keys(self) -> tuple[str, ...]:
        return tuple(f"sae_top_{k}_accuracy" for k in leading_ks(self.ks))

    def _keys(self, metrics: Iterable[Metric]) -> tuple[str, ...]:
        """Concrete keys, a `{k}` at the values that lead among those measured."""
        return tuple(
            key
            for metric in metrics
            for key in (
                [metric.key.replace("{k}", str(k)) for k in leading_ks(self._ks_of(metric))]
                if "{k}" in metric.key
                else [metric.key]
            )
        )

    def _ks_of(self, metric: Metric) -> set[int]:
        prefix, suffix = metric.key.split("{k}")
        return {
            int(key.removeprefix(prefix).removesuffix(suffix))
            for row in self.rows
            for key in row.evals.get(metric.eval, {}).get("metrics", {})
            if family_of(key, metric.eval) == metric.key
        }

    def unavailable(self, eval_name: str) -> str | None:
        """Why an evaluation has no metrics at all, in words; None when it has some."""
        if any(row.evals.get(eval_name, {}).get("metrics") for row in self.rows):
            return None
        state = self.evals[eval_name]
        message = f": {state['message']}" if state.get("message") else ""
        status = state["status"] if state["status"] != "ok" else "finished without results"
        return f"{eval_name} evaluation: {status}{message}"


def read_run(root: Path = Path(".")) -> Run:
    """Read `eval_results/merged` and, where they exist, the training report and curves."""
    folder = root / MERGED
    if not (folder / EVALUATIONS_FILE).is_file():
        raise UserError(f"{folder}: no merged results; run `python -m scripts.process_results` first")
    evaluations = merged_evaluations(folder / EVALUATIONS_FILE)
    records = [merged_record(folder / f"{sae}.json") for sae in evaluations["order"]]
    for name, record in zip(evaluations["order"], records, strict=True):
        if record["sae"] != name:
            raise UserError(f"{folder / name}.json: holds {record['sae']!r}, another SAE; {MERGE_AGAIN}")
    rows = [Row(record["sae"], record["cfg"], record["evals"]) for record in records]
    report = root / TRAINED / REPORT_FILE
    return Run(
        rows,
        evaluations["evals"],
        shaped(read_json(report), TRAINING, report, "run the train stage again") if report.is_file() else {},
        list(_read_curves(root / TRAINED)),
    )


def _read_curves(folder: Path) -> Iterator[Curve]:
    for path in sorted(folder.glob(f"*/{CURVE_FILE}")):
        lines = [line.split("\t") for line in path.read_text(errors="replace").splitlines() if line]
        if len(lines) < 2:  # training stopped before its first report
            continue
        try:
            columns = [[float(cell) if cell else math.nan for cell in column] for column in zip(*lines[1:], strict=True)]
            yield Curve(path.parent.name, dict(zip(lines[0], columns, strict=True)))
        except ValueError:
            raise UserError(f"{path}: not a table of numbers; run the train stage again") from None
