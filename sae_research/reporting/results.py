"""From an evaluation's result files to one small `metrics/<eval>.json` that DVC shows and compares.

Metrics are rounded to 4 significant digits. A metric that is missing, null or not finite has no key: DVC
drops a null without a word and reports a NaN as a change in every comparison.

Merge all evaluations into one small file per SAE: `eval_results/merged/<sae>.json`.

Beside them `_evaluations.json` keeps what belongs to no single SAE: how each evaluation ended, with which
settings, and the order of the SAEs.

What figures and tables are drawn from: the merged results of one run as rows, one per SAE.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sae_research.config.recipes import PLUS
from sae_research.reporting.metrics import (
    EVALS,
    LAB,
    METRICS,
    Metric,
    family_of,
    headline,
    home,
    leading_ks,
    sort_keys,
    top_k,
)
from sae_research.reporting.shapes import (
    MERGE_AGAIN,
    TRAINING,
    evaluation_results,
    evaluation_status,
    manifest,
    merged_evaluations,
    merged_record,
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
