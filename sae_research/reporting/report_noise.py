"""The report's statistics: intervals, seeds, differences that exceed noise, and metrics at equal L0."""

from __future__ import annotations

from collections.abc import Sequence
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
from sae_research.reporting.metrics import EVAL_TITLES, OPTIONAL, Metric, headline
from sae_research.reporting.results import Row, Run
from sae_research.reporting.tables import difference, headings, render, sae_table
from sae_research.runtime.formatting import ABSENT, markdown_table, number
from sae_research.stats.intervals import RESAMPLES

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
        labels = [headline(key).label for key in sums]
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
