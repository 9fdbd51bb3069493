"""METRICS.md: what a reader may quote, under which terms the numbers hold, how every evaluation ended, and definitions.

Every sentence that compares is computed from the numbers, and none claims more than was tested. The wording is in
`templates/`; tables of results are in report_results.py, noise and equal L0 in report_noise.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sae_research.config.evaluations import AT_HOOK, EVALUATIONS
from sae_research.reporting.comparisons import (
    SEEDS_FOR_A_CLAIM,
    Comparison,
    comparisons,
    seed_groups,
    write_differences_csv,
)
from sae_research.reporting.ground_truth import ground_truth
from sae_research.reporting.metrics import EVAL_TITLES, EVALS, METRICS, SAE_BENCH_SUFFIX, Metric, headline
from sae_research.reporting.results import RESULTS
from sae_research.reporting.rows import Run
from sae_research.reporting.sections import (
    controls,
    differences,
    equal_l0,
    intervals,
    optional,
    probing_outcomes,
    probing_tasks,
    results,
    seeds,
    side_by_side,
    stricter,
)
from sae_research.reporting.tables import headings, one_line, render
from sae_research.reporting.transfer import transfer
from sae_research.runtime.files import write_text
from sae_research.runtime.formatting import ABSENT, amount, markdown_table, number, with_interval
from sae_research.runtime.stages import read_status

REPORT = Path("METRICS.md")
FIELD_TOKENS = 50e6
"""Fewest training tokens in common use; a run below it calls itself a smoke run."""
UNTRAINED = "control_data_rows"
"""The control that a reader asks for first: the same encoder over rows that nobody trained."""
MAIN = "variance_explained"
KNOWN_FROM_SETTING = {"model", "hooks", "text"}
"""Notes of an evaluation that the section on the setting holds already."""


def write_report(run: Run, found: list[Comparison] | None = None, root: Path = Path(".")) -> None:
    """Write METRICS.md and metrics/differences.csv. The same results give the same bytes.

    found: all comparisons of the run, made here unless given. root: the project's folder.
    """
    found = comparisons(run) if found is None else found
    write_text(root / REPORT, report(run, found, root))
    write_differences_csv(found, root)


def report(run: Run, found: list[Comparison] | None = None, root: Path = Path(".")) -> str:
    """The whole text. found: all comparisons of the run, made here unless given. root: the project's folder."""
    found = comparisons(run) if found is None else found
    tokens = run.training.get("tokens")
    sections = [
        summary(run, found),
        results(run, root),
        what_ran(run),
        stricter(run),
        intervals(run),
        crosscoders(run),
        seeds(run),
        differences(run, found),
        equal_l0(run),
        controls(run),
        side_by_side(run),
        probing_tasks(run),
        optional(run),
        training(run),
        transfer(root),
        ground_truth(root),
        statuses(run, root),
        images(run),
        definitions(run),
    ]
    return render("report", smoke_tokens=tokens if tokens and tokens < FIELD_TOKENS else None, sections=sections) + "\n"


# --- findings ------------------------------------------------------------------------------------


def summary(run: Run, found: Sequence[Comparison]) -> str:
    """What a reader may quote, in a few sentences; empty where nothing was compared."""
    if not found:
        return ""
    encoders = [item for item in found if item.other and not item.other.is_control and not item.one.is_control]
    largest = [item for item in encoders if item.metric.key == MAIN and item.exceeds_noise]
    metrics = dict.fromkeys(item.metric for item in encoders)
    trained = [row for role in ("baseline", "comparison") for row in run.rows if row.role == role]
    met = _compared(found)
    separated = {item.metric for item in encoders if item.exceeds_noise}
    return render(
        "summary",
        trained=[row for row in trained if row.name in met],
        alone=[row for row in trained if row.name not in met],
        variants=sum(row.role == "variant" for row in run.rows),
        dictionaries=[row for row in run.rows if row.name in {v.cfg.get("base") for v in run.rows if v.role == "variant"}],
        controls=sum(row.is_control for row in run.rows),
        exceeding=sum(item.exceeds_noise for item in found),
        tests=len(found),
        untrained=_against_untrained(found)[:2],
        largest=max(largest, key=lambda item: abs(item.found.value), default=None),
        not_separated=[metric.label for metric in metrics if metric not in separated],
        fixed=_not_varied(run),
    )


def _compared(found: Sequence[Comparison]) -> set[str]:
    """Names of what was set against another row, not against the raw residual stream alone."""
    points = [point for item in found if item.other is not None for point in (item.one, item.other)]
    return {row.name for point in points for member in point.members for row in member.rows}


def _against_untrained(found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Every trained SAE against untrained rows, in the headline metric and in probing."""
    return [
        {
            "comparison": item,
            "probing": [
                other
                for other in found
                if (other.pair, other.l0) == (item.pair, item.l0) and other.metric.key.startswith("sae_top_")
            ],
        }
        for item in found
        if item.other is not None
        and item.other.grid.label == UNTRAINED
        and item.one.lower.rows[0].role != "variant"
        and item.metric.key == MAIN
    ]


def _not_varied(run: Run) -> list[str]:
    trained = [group.seeds for group in seed_groups(run.rows) if group.rows[0].recipe]
    fixed = ["the language model", "the layer", "the length of training"]
    if not trained or min(trained) < SEEDS_FOR_A_CLAIM:
        fixed.insert(0, "the training seed")
    probing = probing_outcomes(run)
    if probing and probing.get("train_draws", 1) < 2:
        fixed.append("the probes' training texts")
    return fixed


# --- terms ---------------------------------------------------------------------------------------


def what_ran(run: Run) -> str:
    """Model, hook, text, training tokens, contexts: the terms under which the numbers hold."""

    def distinct(key: str) -> list[str]:
        return list(dict.fromkeys(str(row.cfg[key]) for row in run.rows if row.cfg.get(key) is not None))

    return render(
        "setting",
        models=distinct("model_name"),
        hooks=list(dict.fromkeys(row.hooks for row in run.rows if row.hooks is not None)),
        n_saes=len(run.rows),
        tokens=run.training.get("tokens"),
        trained=run.training.get("saes", {}),
        core=_core_setting(run),
        probing=_probing_setting(run.evals["sparse_probing"].get("config", {})),
        has_intervals=any(row.evals.get(name, {}).get("intervals") for row in run.rows for name in EVALS),
    )


def _core_setting(run: Run) -> list[str]:
    config = run.evals["core"].get("config", {})
    parts = [f"text `{config['dataset']}`"] if config.get("dataset") else []
    parts += [f"contexts of {config['context_size']} tokens"] if config.get("context_size") else []
    tokens = next((value for row in run.rows if (value := row.value("tokens")) is not None), None)
    if tokens is not None:
        parts.append(f"{amount(tokens)} tokens counted")
        sums = next((kl for row in run.rows if (kl := row.evals.get("core", {}).get("cluster_sums", {}).get("kl"))), None)
        if sums is not None:  # losses rest on far fewer tokens than L0 and variance
            parts[-1] += f" for L0 and variance, {amount(round(sum(sums['denominator'])))} for loss and KL"
    return parts


def _probing_setting(config: dict[str, Any]) -> list[str]:
    parts = [", ".join(f"`{name}`" for name in config["dataset_names"])] if config.get("dataset_names") else []
    if {"probe_train_set_size", "probe_test_set_size"} <= set(config):
        train, test = config["probe_train_set_size"], config["probe_test_set_size"]
        parts.append(f"{train} training and {test} test texts for each class against the others")
    return parts + ([f"contexts of {config['context_length']} tokens"] if config.get("context_length") else [])


# --- what else the run left ----------------------------------------------------------------------


def crosscoders(run: Run) -> str:
    """What each crosscoder and cross-layer transcoder explains at every hook that it writes, and what the model loses with
    that one alone replaced."""
    rows = [(row, hook) for row in run.rows for hook in row.crosscoder_hooks]
    at = {metric: [row.value(metric.key + AT_HOOK + hook, "core") for row, hook in rows] for metric in METRICS}
    shown = [metric for metric, values in at.items() if (metric.table or metric.stricter) and set(values) - {None}]
    body = []
    for row, hook in rows:
        keys = [metric.key + AT_HOOK + hook for metric in shown]
        found = [with_interval(row.value(key, "core"), row.interval(key, "core")) for key in keys]
        body.append([f"`{row.name}`", f"`{hook}`", *found])
    return render("crosscoders", table=markdown_table(["SAE", "Hook", *headings(shown)], body, left=2)) if shown else ""


def training(run: Run) -> str:
    """Findings of the train stage as a table; empty where nothing was trained or the stage is older than they."""
    diagnosed = run.training.get("diagnose")
    if not diagnosed:
        return ""
    found = [("text", finding) for finding in diagnosed.get("text", [])]
    found += [(f"`{name}`", finding) for name, findings in diagnosed["saes"].items() for finding in findings]
    header = ["SAE", "Finding", "Measured", "Limit", "Change"]
    return render(
        "training",
        table=markdown_table(header, [[name, *_finding(finding)] for name, finding in found], left=2) if found else "",
        healthy=[name for name, findings in diagnosed["saes"].items() if not findings],
    )


def _finding(finding: dict[str, Any]) -> list[str]:
    key, _, change = finding["change"].partition(":")
    measured = f"{finding['figure']} {number(finding['value'])}"
    return [one_line(finding["says"]), measured, number(finding["limit"]), f"`{key}`:{change}"]


def statuses(run: Run, root: Path = Path(".")) -> str:
    """How each evaluation ended, and what was skipped for which reason. root: the project's folder."""
    body, skipped, notes = [], [], []
    for name in EVALS:
        state, title = run.evals[name], EVAL_TITLES[name]
        n_saes = sum(1 for row in run.rows if row.evals.get(name, {}).get("status") == "ok")
        body.append([title, state["status"], str(n_saes), one_line(state.get("message", ""))])
        skipped += [(title, what, one_line(why)) for what, why in sorted(state.get("skipped", {}).items())]
        notes += [
            (title, key.replace("_", " "), one_line(value))
            for key, value in sorted(state.get("notes", {}).items())
            if isinstance(value, (str, int, float)) and key not in KNOWN_FROM_SETTING
        ]
    for other in (one for name, one in EVALUATIONS.items() if name not in EVALS):
        state = read_status(root / RESULTS / other.name)
        if state["status"] != "missing":
            body.append([other.title, state["status"], ABSENT, one_line(state["message"])])
    table = markdown_table(["Evaluation", "Status", "SAEs", "Message"], body, left=4)
    return render("statuses", table=table, skipped=skipped, notes=notes)


def images(run: Run) -> str:
    """The figures, by relative path."""
    return render("figures", plotted=[headline(key) for key in run.plotted], curves=run.curves)


def definitions(run: Run) -> str:
    """Every metric in one sentence, for the evaluations that ran."""
    ran = {name for name in EVALS if run.unavailable(name) is None}
    metrics = [metric for metric in METRICS if metric.eval in ran]
    theirs = [metric for metric in metrics if metric.key.endswith(SAE_BENCH_SUFFIX)]
    ours = [metric for metric in metrics if metric not in theirs]
    at_hooks = AT_HOOK if any(row.crosscoder_hooks for row in run.rows) else ""
    return (
        render("definitions", ours=_definition_table(ours), sae_bench=_definition_table(theirs), at_hooks=at_hooks)
        if ours
        else ""
    )


def _definition_table(metrics: Iterable[Metric]) -> str:
    body = [[f"`{metric.key.replace('{k}', 'k')}`", metric.label + metric.arrow, metric.definition] for metric in metrics]
    return markdown_table(["Key", "Label", "Definition"], body, left=3).replace("{k}", "*k*") if body else ""
