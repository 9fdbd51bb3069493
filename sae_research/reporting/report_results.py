"""The report's tables of figures: all SAEs, controls, both definitions, tasks, the optional evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sae_research.reporting.ground_truth import beside
from sae_research.reporting.metrics import (
    EVAL_NOTES,
    EVAL_TITLES,
    OPTIONAL,
    STOCK_SUFFIX,
    Metric,
    family_of,
    headline,
    metric_named,
    residual_key,
    sort_keys,
)
from sae_research.reporting.results import ROLES, Row, Run
from sae_research.reporting.tables import ABSENT, headline_columns, markdown, number, with_interval

GROUPS = {
    "baseline": "Baseline",
    "variant": "Variants of the baseline's dictionary",
    "comparison": "Comparison",
    "control": "Controls",
}
SIDE_BY_SIDE = ("l0", "variance_explained", "variance_explained_legacy", "loss_recovered", "kl", "fraction_alive")
"""Core figures shown in both definitions; probing accuracies follow."""
STRICTER = (
    "variance_explained",
    "variance_explained_per_dim",
    "loss_recovered",
    "loss_recovered_mean_ablation",
    "cosine_about_mean",
    "bias_about_mean",
)
"""Figures of the first table, each followed by what says the same more strictly, and what they leave out."""
FOLLOWED = ("variance_explained", "top_1_probing")
"""Figures of the first table that the ground-truth evaluation compares with the truth."""


def results(run: Run, root: Path = Path(".")) -> str:
    """One row per SAE, grouped by role, and how far two figures followed a known truth. root: the project's folder."""
    if not run.rows:
        return "## Results\n\nNo SAE has a result; see [how each evaluation ended](#how-each-evaluation-ended)."
    header, columns = headline_columns(run.rows, run.headline)
    lines = dict(zip((row.name for row in run.rows), zip(*columns, strict=True), strict=True))
    body = []
    for title, rows in _groups(run.rows):
        body.append([f"*{title}*", *[""] * (len(header) + 2)])
        body += [[f"`{row.name}`", row.architecture, *lines[row.name], ", ".join(row.flags)] for row in rows]
    table = markdown(["SAE", "Architecture", *header, "Flags"], body, left=2)
    return "\n".join(
        [
            "## Results",
            "",
            table,
            "",
            "↑ a higher value is wanted, ↓ a lower one; L0 is a price, not a virtue, and has neither. "
            "Nothing is marked as best: these SAEs differ in L0, which drives the first columns; "
            "[differences at equal L0](#which-differences-exceed-noise) are tested. "
            "*interpolating*: the encoder has as many free coefficients as "
            "equations, so its reconstruction says nothing. *not causal*: a token's code depends on later "
            "tokens. *signed*: activations may be negative. "
            f"{ABSENT}: not measured.",
            *(part for metric in FOLLOWED if (line := beside(metric, root)) for part in ("", line)),
        ]
    )


def stricter(run: Run) -> str:
    """The reconstruction figures of the first table beside the same by references that are harder to please."""
    keys = [key for key in STRICTER if run_value(run, key) is not None]
    if not {"variance_explained_per_dim", "loss_recovered_mean_ablation"} & set(keys):
        return ""
    header = ["SAE", *(headline(key).label + headline(key).arrow for key in keys)]
    body = [[f"`{row.name}`", *(number(row.value(key)) for key in keys)] for row in run.rows]
    return "\n".join(
        [
            "## By stricter references",
            "",
            "A few dimensions of large variance can carry *variance explained*, and zero in place of activations is a poor "
            "guess, which flatters *loss recovered*. The mean over dimensions and mean-ablation are harder to "
            "please. Cosine "
            "and bias are taken about the mean activation, which every SAE can add for nothing. A bias below 1 "
            "is shrinkage: "
            "activations too small for their directions.",
            "",
            markdown(header, body),
        ]
    )


def _groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    roles = [*ROLES, *sorted({row.role for row in rows} - set(ROLES))]
    grouped = [(GROUPS.get(role, role), [row for row in rows if row.role == role]) for role in roles]
    return [(title, members) for title, members in grouped if members]


def controls(run: Run) -> str:
    """What the controls are, and where one of them has a more favourable value than an SAE."""
    names = [row.name for row in run.rows if row.is_control]
    if not names and not any(run_value(run, residual_key(key)) is not None for key in run.probing_keys):
        return ""
    known = {
        "control_random": "a random dictionary",
        "control_data_rows": "a dictionary of untrained rows: activations scaled to unit length",
        "control_pca": "the leading principal components",
    }
    kinds = {
        kind: [row.name for row in run.rows if row.is_control and row.kind == kind]
        for kind in dict.fromkeys(row.kind for row in run.rows if row.is_control)
    }
    lines = [
        f"- {', '.join(f'`{name}`' for name in members)}" + (f": {known[kind]}" if kind in known else "")
        for kind, members in kinds.items()
    ]
    lines.append("- raw residual stream: the probe on the model's own dimensions (probing only)")
    findings = control_findings(run) + residual_findings(run)
    return "\n".join(
        [
            "## Controls",
            "",
            "A figure that a control reaches as well is no evidence that training found anything.",
            "",
            *lines,
            "",
            *findings,
        ]
    )


def control_findings(run: Run) -> list[str]:
    """One line per column and control where the control has the more favourable value at no higher an L0."""
    lines, rows = [], run.rows
    for metric in (metric for key in run.headline if (metric := headline(key)).better and key != "fraction_alive"):
        for control in (row for row in rows if row.is_control):
            passed = [
                row for row in rows if row.may_be_marked and _exceeds(control, row, metric) and _no_denser(control, row)
            ]
            if passed:
                listed = ", ".join(f"`{row.name}` ({_at_l0(row, metric)})" for row in passed)
                lines.append(
                    f"- {metric.label}: `{control.name}` ({_at_l0(control, metric)}) has a "
                    f"{metric.better} value than {listed}."
                )
    if not lines and any(row.is_control for row in rows):
        return ["No control has a more favourable value than an SAE of the same or a higher L0 in any column above."]
    return (
        [
            "Where a control of the same or a lower L0 has the more favourable value (interpolating rows left out):",
            "",
            *lines,
        ]
        if lines
        else []
    )


def _exceeds(one: Row, other: Row, metric: Metric) -> bool:
    mine, theirs = one.value(metric.key), other.value(metric.key)
    if mine is None or theirs is None:
        return False
    return mine > theirs if metric.better == "higher" else mine < theirs


def _no_denser(control: Row, row: Row) -> bool:
    """Whether the control uses no more latents: with more, a more favourable value would be no surprise."""
    control_l0, l0 = control.value("l0"), row.value("l0")
    return control_l0 is None or l0 is None or control_l0 <= l0 * 1.05


def _at_l0(row: Row, metric: Metric) -> str:
    l0 = row.value("l0")
    return number(row.value(metric.key)) + (f" at L0 {number(l0)}" if l0 is not None else "")


def residual_findings(run: Run) -> list[str]:
    """How many SAEs stay at or below the raw residual stream in probing."""
    lines = []
    for key in run.probing_keys:
        reference = run_value(run, residual_key(key))
        measured = [row for row in run.rows if not row.is_control and row.value(key) is not None]
        if reference is None or not measured:
            continue
        below = [row for row in measured if row.value(key) <= reference]
        lines.append(
            f"- {headline(key).label}: the raw residual stream reaches {number(reference)}; {len(below)} of "
            f"{len(measured)} SAEs stay at or below it"
            + (f" ({', '.join(f'`{row.name}`' for row in below)})." if below else ".")
        )
    return ["", *lines] if lines else []


def run_value(run: Run, key: str) -> float | None:
    """A figure that belongs to the run rather than to one SAE: the first row that has it."""
    return next((value for row in run.rows if (value := row.value(key)) is not None), None)


def side_by_side(run: Run) -> str:
    """Our figures beside SAE Bench's, for every pair that was measured."""
    header, columns = ["SAE"], [[f"`{row.name}`" for row in run.rows]]
    for key in (*SIDE_BY_SIDE, *run.probing_keys):
        for full, owner in ((key, "lab"), (key + STOCK_SUFFIX, "SAE Bench")):
            if run_value(run, full) is not None:
                header.append(f"{headline(full).label}<br>{owner}")
                columns.append([number(row.value(full)) for row in run.rows])
    if not any("SAE Bench" in title for title in header):
        return ""
    return "\n".join(
        [
            "## Beside SAE Bench's own definitions",
            "",
            "*lab* is the definition of this report (`lab_v1`), *SAE Bench* that of its version 0.6.0.",
            "",
            markdown(header, list(zip(*columns, strict=True))),
        ]
    )


def probing_tasks(run: Run) -> str:
    """Accuracy per task for each k, with the raw residual stream as last rows."""
    tasks = {row.name: row.evals.get("sparse_probing", {}).get("tasks") or {} for row in run.rows}
    names = list(dict.fromkeys(task for by_task in tasks.values() for task in by_task))
    if not names:
        return ""
    shown = [
        key
        for key in (f"sae_top_{k}_accuracy" for k in run.ks)
        if any(key in figures for by_task in tasks.values() for figures in by_task.values())
    ]
    parts = ["## Sparse probing by task", ""]
    for key in shown:
        body = [
            [
                f"`{row.name}`",
                *(with_interval(tasks[row.name].get(task, {}).get(key), _task_interval(row, task, key)) for task in names),
            ]
            for row in run.rows
            if tasks[row.name]
        ]
        body += [
            [
                f"*{metric_named(source, 'sparse_probing').label.lower()}*",
                *(number(_first(tasks.values(), task, source)) for task in names),
            ]
            for source in (residual_key(key), "llm_full_accuracy")
        ]
        parts += [f"{headline(key).label} accuracy:", "", markdown(["SAE", *names], body), ""]
    return "\n".join(parts).rstrip()


def _task_interval(row: Row, task: str, key: str) -> tuple[float, float] | None:
    bounds = (row.evals.get("sparse_probing", {}).get("task_intervals") or {}).get(task, {}).get(key)
    return None if bounds is None else (bounds[0], bounds[1])


def _first(by_sae: Iterable[dict[str, Any]], task: str, key: str) -> float | None:
    return next((by_task[task][key] for by_task in by_sae if key in by_task.get(task, {})), None)


# --- the optional evaluations ------------------------------------------------------------------


def optional(run: Run) -> str:
    """A section for every optional evaluation that has figures, with what should be known of it."""
    sections = []
    for name in OPTIONAL:
        rows = [row for row in run.rows if row.evals.get(name, {}).get("metrics")]
        if rows:
            note = [EVAL_NOTES[name], ""] if name in EVAL_NOTES else []
            sections.append(
                "\n".join(
                    [f"## {EVAL_TITLES[name]}", "", *note, *_evaluation_tables(rows, name), *idle_findings(rows, name)]
                ).rstrip()
            )
    return "\n\n".join(sections)


def idle_findings(rows: Sequence[Row], name: str) -> list[str]:
    """For every figure of an evaluation that has a value for nothing: which SAEs lie above it, or that none does."""
    lines = []
    for metric in (metric_named(key, name) for key in _keys(rows, name)):
        measured = [row for row in rows if not row.is_control and row.value(metric.key, name) is not None]
        if metric.idle is None or not measured:
            continue
        value, by = metric.idle
        above = [row for row in measured if row.value(metric.key, name) > value]
        sure = [row for row in above if (bounds := row.interval(metric.key, name)) and bounds[0] > value]
        if above:
            lines.append(
                f"- {metric.label}: {by} has {number(value)}; {len(above)} of {len(measured)} SAEs lie above it, "
                f"{len(sure)} with their whole interval" + (f" ({_listed(sure)})." if sure else ".")
            )
        else:
            lines.append(
                f"- {metric.label}: **no SAE lies above {number(value)}**, which {by} has. Their order says "
                "nothing in favour of any."
            )
    return [*lines, ""] if lines else []


def _listed(rows: Sequence[Row]) -> str:
    return ", ".join(f"`{row.name}`" for row in rows)


def _keys(rows: Sequence[Row], name: str) -> list[str]:
    """Every figure of an evaluation, in the order of every table."""
    return sort_keys({key for row in rows for key in row.evals[name]["metrics"]}, name)


def _evaluation_tables(rows: Sequence[Row], name: str) -> list[str]:
    """One table of all plain figures, then one for every figure that comes for several k, a column each."""
    keys = _keys(rows, name)
    families = {key: family_of(key, name) for key in keys}
    plain = [key for key in keys if families[key] is None]
    lines = _evaluation_table(rows, name, plain) if plain else []
    for family in dict.fromkeys(family for family in families.values() if family is not None):
        lines += _evaluation_table(rows, name, [key for key in keys if families[key] == family])
    return lines


def _evaluation_table(rows: Sequence[Row], name: str, keys: Sequence[str]) -> list[str]:
    metrics = [metric_named(key, name) for key in keys]
    titles = [metric.label + metric.arrow + ("<br>SAE Bench" if metric.source else "") for metric in metrics]
    body = [
        [f"`{row.name}`", *(with_interval(row.value(key, name), row.interval(key, name)) for key in keys)] for row in rows
    ]
    return [markdown(["SAE", *titles], body), ""]
