"""The sections of METRICS.md: results, controls, intervals, differences, training seeds, equal L0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_research.reporting.comparisons import (
    SEEDS_FOR_A_CLAIM,
    Comparison,
    Grid,
    area,
    at,
    common_l0,
    common_range,
    grids,
    seed_groups,
    unmatched,
)
from sae_research.reporting.ground_truth import beside
from sae_research.reporting.metrics import (
    EVAL_NOTES,
    EVAL_TITLES,
    METRICS,
    OPTIONAL,
    SAE_BENCH_SUFFIX,
    Metric,
    family_of,
    headline,
    hook_of,
    metric_named,
    residual_key,
    sort_keys,
)
from sae_research.reporting.results import ROLES
from sae_research.reporting.rows import Row, Run
from sae_research.reporting.tables import cells, difference, headings, render, sae_table
from sae_research.runtime.formatting import ABSENT, markdown_table, number, with_interval
from sae_research.stats.intervals import RESAMPLES

GROUPS = {
    "baseline": "Baseline",
    "variant": "Pursuit encoders over trained dictionaries",
    "comparison": "Comparison",
    "control": "Controls",
}
CONTROLS = {
    "control_random": "a random dictionary",
    "control_data_rows": "a dictionary of untrained rows: activations scaled to unit length",
    "control_pca": "the leading principal components",
    "control_linear_map": "the linear map that least squares fits from what a transcoder reads to what it writes",
    "control_skip": "the transcoder's own skip without its latents",
}
AGAINST_TRUTH = ("variance_explained", "top_1_probing")
"""Metrics of the first table that the ground-truth evaluation compares with the truth."""


def results(run: Run, root: Path = Path(".")) -> str:
    """One row per SAE, grouped by role, and how far two metrics followed a known truth. root: the project's folder."""
    metrics = [headline(key) for key in run.headline]
    body = []
    for role in dict.fromkeys([*ROLES, *sorted(row.role for row in run.rows)]):
        rows = [row for row in run.rows if row.role == role]
        if rows:
            body.append([f"*{GROUPS.get(role, role)}*", *[""] * (len(metrics) + 2)])
        body += [[f"`{row.name}`", row.architecture, *cells(row, metrics), ", ".join(row.flags)] for row in rows]
    return render(
        "results",
        table=markdown_table(["SAE", "Architecture", *headings(metrics), "Flags"], body, left=2) if body else "",
        elsewhere=any(row.hook_kind for row in run.rows),
        known_truth=[line for metric in AGAINST_TRUTH if (line := beside(metric, root))],
    )


def stricter(run: Run) -> str:
    """The reconstruction metrics of the first table beside the same by stricter references."""
    shown = [metric for metric in METRICS if metric.stricter and run_value(run, metric.key) is not None]
    if all(metric.table for metric in shown):
        return ""
    return render("stricter", table=sae_table(run.rows, shown))


def run_value(run: Run, key: str | None) -> float | None:
    """A value that belongs to the run rather than to one SAE: the first row that has it."""
    return next((value for row in run.rows if key and (value := row.value(key)) is not None), None)


# --- controls ------------------------------------------------------------------------------------


def controls(run: Run) -> str:
    """What the controls are, and where one of them has the better value than an SAE."""
    kinds: dict[str, list[str]] = {}
    for row in run.rows:
        if row.is_control:
            kinds.setdefault(row.kind, []).append(row.name)
    if not kinds and not any(run_value(run, residual_key(key)) is not None for key in run.probing_keys):
        return ""
    return render(
        "controls",
        kinds=[(names, CONTROLS.get(kind)) for kind, names in kinds.items()],
        better_controls=better_controls(run),
        residual=_at_or_below_residual(run),
    )


def better_controls(run: Run) -> list[dict[str, Any]]:
    """Every column and control where the control has the better value at no higher an L0 than the rows named. Rows that
    reconstruct something else than the control are not compared with it."""
    found = []
    for metric in run.ranking:
        for control in (row for row in run.rows if row.is_control):
            rows = [
                row
                for row in run.rows
                if row.may_be_marked and row.elsewhere == control.elsewhere
                if _better(control, row, metric) and _no_denser(control, row)
            ]
            found += [{"metric": metric, "control": control, "rows": rows}] if rows else []
    return found


def _better(one: Row, other: Row, metric: Metric) -> bool:
    mine, theirs = one.value(metric.key), other.value(metric.key)
    if mine is None or theirs is None:
        return False
    return mine > theirs if metric.better == "higher" else mine < theirs


def _no_denser(control: Row, row: Row) -> bool:
    """Whether the control uses no more latents: with more, a better value would be no surprise."""
    control_l0, l0 = control.value("l0"), row.value("l0")
    return control_l0 is None or l0 is None or control_l0 <= l0 * 1.05


def _at_or_below_residual(run: Run) -> list[dict[str, Any]]:
    """Which SAEs stay at or below the raw residual stream, for every probing column."""
    found = []
    for key in run.probing_keys:
        reference = run_value(run, residual_key(key))
        measured = [(row, value) for row in run.rows if not row.is_control and (value := row.value(key)) is not None]
        if reference is not None and measured:
            below = [row for row, value in measured if value <= reference]
            found.append({"metric": headline(key), "reference": reference, "below": below, "measured": len(measured)})
    return found


# --- both definitions, tasks ---------------------------------------------------------------------


def side_by_side(run: Run) -> str:
    """Our metrics beside SAE Bench's, for every pair that was measured."""
    keys = [*(metric.base_key for metric in METRICS if metric.both), *run.probing_keys]
    both = [(key + suffix, owner) for key in keys for suffix, owner in _OWNERS.items()]
    shown = {key: f"{headline(key).label}<br>{owner}" for key, owner in both if run_value(run, key) is not None}
    if not any(key.endswith(SAE_BENCH_SUFFIX) for key in shown):
        return ""
    body = [[f"`{row.name}`", *(number(row.value(key)) for key in shown)] for row in run.rows]
    return render("side_by_side", table=markdown_table(["SAE", *shown.values()], body))


_OWNERS = {"": "lab", SAE_BENCH_SUFFIX: "SAE Bench"}


def probing_tasks(run: Run) -> str:
    """Accuracy per task for each k, with the raw residual stream as last rows."""
    records = {row.name: row.evals.get("sparse_probing", {}) for row in run.rows}
    records = {name: record for name, record in records.items() if record.get("tasks")}
    tables = [
        (headline(key), _task_table(records, key))
        for key in (f"sae_top_{k}_accuracy" for k in run.ks)
        if any(key in values for record in records.values() for values in record["tasks"].values())
    ]
    return render("probing_tasks", tables=tables) if tables else ""


def _task_table(records: dict[str, dict[str, Any]], key: str) -> str:
    """records: by SAE, its accuracies in `tasks` and their intervals in `task_intervals`, by task and metric."""
    tasks = list(dict.fromkeys(task for record in records.values() for task in record["tasks"]))
    body = []
    for name, record in records.items():
        values, bounds = record["tasks"], record.get("task_intervals") or {}
        cells = [with_interval(values.get(task, {}).get(key), bounds.get(task, {}).get(key)) for task in tasks]
        body.append([f"`{name}`", *cells])
    for source in (residual_key(key) or key, "llm_full_accuracy"):
        found = {task: record["tasks"][task] for record in records.values() for task in record["tasks"]}
        label = metric_named(source, "sparse_probing").label.lower()
        body.append([f"*{label}*", *(number(found[task].get(source)) for task in tasks)])
    return markdown_table(["SAE", *tasks], body)


# --- the optional evaluations --------------------------------------------------------------------


def optional(run: Run) -> str:
    """A section for every optional evaluation that has results, with what should be known of it."""
    sections = []
    for name in OPTIONAL:
        rows = [row for row in run.rows if row.evals.get(name, {}).get("metrics")]
        if rows:
            keys = sort_keys({key for row in rows for key in row.evals[name]["metrics"]}, name)
            sections.append(
                render(
                    "evaluation",
                    title=EVAL_TITLES[name],
                    note=EVAL_NOTES.get(name),
                    tables=_evaluation_tables(rows, keys, name),
                    trivial=_above_trivial(rows, keys, name),
                )
            )
    return "\n\n".join(sections)


def _above_trivial(rows: Sequence[Row], keys: Sequence[str], name: str) -> list[dict[str, Any]]:
    """For every metric that is reached without any SAE: which SAEs lie above that value."""
    found = []
    for metric in (metric_named(key, name) for key in keys):
        measured = [(row, reached) for row in rows if (reached := row.value(metric.key, name)) is not None]
        measured = [(row, reached) for row, reached in measured if not row.is_control]
        if metric.trivial is not None and measured:
            value, by = metric.trivial
            above = [row for row, reached in measured if reached > value]
            sure = [row for row in above if (bounds := row.interval(metric.key, name)) and bounds[0] > value]
            found.append(
                {"metric": metric, "value": value, "by": by, "above": above, "sure": sure, "measured": len(measured)}
            )
    return found


def _evaluation_tables(rows: Sequence[Row], keys: Sequence[str], name: str) -> list[str]:
    """One table of all plain metrics, then one for every metric that comes for several k, a column each."""
    families: dict[str, list[str]] = {"": []}
    for key in keys:
        families.setdefault(family_of(key, name) or "", []).append(key)
    tables = (family for family in families.values() if family)
    return [_evaluation_table(rows, [metric_named(key, name) for key in family]) for family in tables]


def _evaluation_table(rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    titles = [metric.label + metric.arrow + ("<br>SAE Bench" if metric.source else "") for metric in metrics]
    return markdown_table(["SAE", *titles], [[f"`{row.name}`", *cells(row, metrics, intervals=True)] for row in rows])


FEW_CLUSTERS = 20
"""Below this *effective* number an interval is called rough."""
PAIRS_SHOWN = 60


# --- intervals -----------------------------------------------------------------------------------


def intervals(run: Run) -> str:
    """Every headline metric with its interval, what was resampled, and what has none."""
    metrics = [headline(key) for key in run.headline if any(row.interval(key) for row in run.rows)]
    if not metrics:
        return ""
    outcomes = probing_outcomes(run)
    asked = outcomes.get("asked", {}).values()
    texts = {text for classes in asked for parts in classes.values() for part in parts for text in part.split()}
    return render(
        "intervals",
        resamples=RESAMPLES,
        train_draws=outcomes.get("train_draws", 1),
        clusters=_clusters(run.rows),
        probing_texts=len(texts),
        table=sae_table(run.rows, metrics, intervals=True),
    )


def probing_outcomes(run: Run) -> dict[str, Any]:
    """Which probe answered which test text rightly, of the first SAE that has it; empty where none has."""
    return next((found for row in run.rows if (found := row.evals.get("sparse_probing", {}).get("outcomes"))), {})


def _clusters(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What was drawn with replacement in the core evaluation, and how many there were of it."""
    core = next((row.evals["core"] for row in rows if row.evals.get("core", {}).get("clusters")), {"clusters": {}})
    found = []
    for part, about in sorted(core["clusters"].items()):
        sums = {key: sums for key, sums in core["cluster_sums"].items() if sums["clusters"] == part}
        effective = _effective(next(iter(sums.values()))["denominator"])
        labels = [headline(key).label for key in sums if hook_of(key) is None]
        found.append(
            {**about, "labels": labels, "unit": about["level"], "effective": effective, "few": effective < FEW_CLUSTERS}
        )
    return found


def _effective(sizes: Sequence[float]) -> float:
    """How many clusters of equal size would vary as these do: 1 / sum(share squared)."""
    squares = sum(size * size for size in sizes)
    return sum(sizes) ** 2 / squares if squares else 0.0


# --- seeds ---------------------------------------------------------------------------------------


def seeds(run: Run) -> str:
    """Mean and spread over the training seeds of every recipe that has several."""
    several = [group for group in seed_groups(run.rows) if group.seeds > 1]
    if not several:
        return ""
    metrics = [headline(key) for key in run.headline]
    body = []
    for group in several:
        values = [
            number(mean) if (mean := group.mean(metric)) is None else f"{number(mean)} ± {number(group.spread(metric))}"
            for metric in metrics
        ]
        body.append([f"`{group.name}`", ", ".join(f"`{row.name}`" for row in group.rows), *values])
    return render("seeds", table=markdown_table(["Recipe", "SAEs", *headings(metrics)], body, left=2))


# --- differences ---------------------------------------------------------------------------------


def differences(run: Run, found: Sequence[Comparison]) -> str:
    """Which paired differences exceed noise, and how that was decided."""
    if not found and not run.rows:
        return ""
    exceeding = [item for item in found if item.exceeds_noise]
    groups = seed_groups(run.rows)
    several = [group for group in groups if group.seeds > 1]
    return render(
        "differences",
        tests=len(found),
        pairs=len({item.pair for item in found}),
        labels=list(dict.fromkeys(item.metric.label for item in found)),
        several_seeds=bool(several),
        enough_seeds=[group.title for group in several if group.seeds >= SEEDS_FOR_A_CLAIM],
        single_seeds=len(groups) - len(several),
        SEEDS_FOR_A_CLAIM=SEEDS_FOR_A_CLAIM,
        unmatched=_unmatched(run) if found else {},
        exceeding=len(exceeding),
        exceeding_pairs=len({item.pair for item in exceeding}),
        tables=_difference_tables(found),
        claims=[_claim(item) for item in exceeding if item.may_claim],
    )


def _unmatched(run: Run) -> dict[str, list[str]]:
    """Which SAEs were not compared, because they share no L0."""
    partners: dict[str, list[str]] = {}
    for one, other in unmatched(run):
        partners.setdefault(_range(one), []).append(_range(other))
    return partners


def _range(grid: Grid) -> str:
    curve = grid.curve(headline("l0"))
    low, high = number(curve[0][0]), number(curve[-1][0])
    return f"`{grid.label}` (L0 {low if low == high else f'{low} to {high}'})"


def _difference_tables(found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """One table for core and sparse probing, one for every other evaluation that was tested."""
    groups: dict[str, list[Comparison]] = {}
    for item in found:
        title = EVAL_TITLES[item.metric.eval] if item.metric.eval in OPTIONAL else ""
        groups.setdefault(title, []).append(item)
    tables = []
    for title, items in groups.items():
        shown = list(dict.fromkeys((item.pair, item.l0) for item in items if item.exceeds_noise))
        metrics = list(dict.fromkeys(item.metric for item in items))
        cells = {(item.pair, item.l0, item.metric): difference(item) if item.exceeds_noise else "·" for item in items}
        body = [
            [*pair, number(l0), *(cells.get((pair, l0, metric), ABSENT) for metric in metrics)]
            for pair, l0 in shown[:PAIRS_SHOWN]
        ]
        table = markdown_table(["SAE", "minus", "at L0", *headings(metrics)], body, left=2)
        if shown:
            tables.append({"title": title, "table": table, "hidden": max(0, len(shown) - PAIRS_SHOWN)})
    return tables


def _claim(item: Comparison) -> dict[str, Any]:
    """The one sentence that may call a recipe better: three seeds or more stand behind both sides."""
    favourable = (item.found.value > 0) == (item.metric.better == "higher")
    better, worse = item.pair if favourable else item.pair[::-1]
    return {"metric": item.metric, "better": better, "worse": worse, "by": abs(item.found.value)}


# --- equal L0 ------------------------------------------------------------------------------------


def equal_l0(run: Run) -> str:
    """Every headline metric between the points of each architecture's sparsity grid, and areas under Pareto curves."""
    metrics = [metric for key in run.headline if (metric := headline(key)).better]
    found = [grid for grid in grids(run) if any(grid.curve(metric) for metric in metrics)]
    if not found:
        return ""
    l0_curves = [grid.curve(headline("l0")) for grid in found]
    wide = [grid for grid, curve in zip(found, l0_curves, strict=True) if len(curve) > 1]
    body = []
    for grid in found:
        curves = {metric: grid.curve(metric) for metric in metrics}
        for l0 in common_l0(list(curves.values())):
            body.append([grid.label, f"{l0:g}", *(number(at(curves[metric], l0)) for metric in metrics)])
    spans = {metric: common_range([grid.curve(metric) for grid in found]) for metric in metrics}
    return render(
        "equal_l0",
        interpolating=[row for row in run.rows if row.interpolating],
        single_points=[
            (grid.members[0].name, curve[0][0]) for grid, curve in zip(found, l0_curves, strict=True) if len(curve) == 1
        ],
        table=_architectures(metrics, sorted(body, key=lambda line: float(line[1])), "L0") if body else "",
        ranges=sorted({f"{number(low)} to {number(high)}" for low, high in filter(None, spans.values())}),
        one_grid=len(wide) == 1,
        areas=_architectures(metrics, [[grid.label, *_areas(grid, spans)] for grid in wide]),
    )


def _architectures(metrics: Sequence[Metric], body: Sequence[Sequence[str]], *columns: str) -> str:
    return markdown_table(["Architecture", *columns, *headings(metrics)], body)


def _areas(grid: Grid, spans: dict[Metric, tuple[float, float] | None]) -> list[str]:
    """Areas over the L0 that all grids cover, as cells."""
    curves = [(metric, grid.curve(metric), span) for metric, span in spans.items()]
    return [
        number(area(curve, metric.better, *span) if span and metric.better and len(curve) > 1 else None)
        for metric, curve, span in curves
    ]
