"""The report's word on noise: intervals, seeds, differences that exceed noise, and figures at equal L0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sae_research.reporting.comparisons import (
    SEEDS_FOR_A_CLAIM,
    Grid,
    area,
    at,
    common_l0,
    common_range,
    contenders,
    grids,
    recipes,
    seed_lines,
)
from sae_research.reporting.metrics import EVAL_TITLES, OPTIONAL, Metric, headline
from sae_research.reporting.results import Row, Run
from sae_research.reporting.tables import ABSENT, markdown, number, with_interval

if TYPE_CHECKING:
    from sae_research.reporting.comparisons import Comparison

FEW_CLUSTERS = 20
"""Below this *effective* number an interval is called rough."""
PAIRS_SHOWN = 60


# --- intervals ---------------------------------------------------------------------------------


def intervals(run: Run) -> str:
    """Every headline figure with its interval, what was resampled, and what has none."""
    keys = [key for key in run.headline if any(row.interval(key) for row in run.rows)]
    if not keys:
        return ""
    metrics = [headline(key) for key in keys]
    body = [[f"`{row.name}`", *(with_interval(row.value(key), row.interval(key)) for key in keys)] for row in run.rows]
    lines = [
        "## Intervals",
        "",
        "95 % intervals by the bootstrap (5,000 resamples, percentiles widened to the jackknife's error and Student's t for "
        "few clusters of unequal size): where the figure would lie on other text of the same kind, with the same SAE. "
        f"{probe_texts(run)}They hold no other training seed. *Fraction alive* has none: a resample repeats tokens and so "
        "always finds fewer latents.",
        "",
        *clusters(run.rows),
        "",
        markdown(["SAE", *(metric.label + metric.arrow for metric in metrics)], body),
    ]
    return "\n".join(lines)


def probe_texts(run: Run) -> str:
    """How often the probes' training texts were drawn, in a sentence; empty where they were drawn once."""
    outcomes = next((found for row in run.rows if (found := row.evals.get("sparse_probing", {}).get("outcomes"))), {})
    drawn = outcomes.get("train_draws", 1)
    return (
        f"Those of probing hold the choice of training texts too, drawn {drawn} times. "
        if drawn > 1
        else "Those of probing hold one choice of training texts. "
    )


def clusters(rows: Sequence[Row]) -> list[str]:
    """What was drawn with replacement, and how many there were of it."""
    core = next((row.evals["core"] for row in rows if row.evals.get("core", {}).get("clusters")), None)
    lines = [] if core is None else [_core_clusters(core, part, about) for part, about in sorted(core["clusters"].items())]
    outcomes = next((found for row in rows if (found := row.evals.get("sparse_probing", {}).get("outcomes"))), None)
    if outcomes is not None:
        asked = outcomes["asked"].values()
        texts = {number for classes in asked for parts in classes.values() for part in parts for number in part.split()}
        lines.append(
            f"- Probing accuracies: {len(texts)} test texts, drawn within their task and class; one text serves "
            "several classes."
        )
    return lines


def _core_clusters(core: dict[str, Any], part: str, about: dict[str, Any]) -> str:
    labels = [headline(key).label for key, sums in core["cluster_sums"].items() if sums["clusters"] == part]
    count, unit = about["clusters"], about["level"]
    effective = _effective(next(s for s in core["cluster_sums"].values() if s["clusters"] == part)["denominator"])
    of = f" ({about['documents']} documents)" if unit == "source" else ""
    of += f" of {_counted(about['sources'], 'source')}" if unit == "document" else ""
    rough = f" **Few {unit}s: take these intervals as rough.**" if effective < FEW_CLUSTERS else ""
    return f"- {', '.join(labels)}: {_counted(count, unit)}{of}, which vary as {effective:.1f} of equal size would.{rough}"


def _effective(sizes: Sequence[float]) -> float:
    """How many clusters of equal size would vary as these do: 1 / sum(share squared)."""
    squares = sum(size * size for size in sizes)
    return sum(sizes) ** 2 / squares if squares else 0.0


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")


# --- seeds -------------------------------------------------------------------------------------


def seeds(run: Run) -> str:
    """Mean and spread over the training seeds of every recipe that has several."""
    if not recipes(run.rows):
        return ""
    metrics = [headline(key) for key in run.headline]
    body = seed_lines(run.rows, metrics, number)
    return "\n".join(
        [
            "## Several seeds of one recipe",
            "",
            "Mean ± standard deviation between training runs that differ in their seed alone.",
            "",
            markdown(["Recipe", "SAEs", *(metric.label + metric.arrow for metric in metrics)], body, left=2),
        ]
    )


# --- differences -------------------------------------------------------------------------------


def differences(run: Run, found: Sequence[Comparison]) -> str:
    """Which paired differences exceed noise, and how that was decided."""
    title = "## Which differences exceed noise"
    if not found:
        why = (
            "No two SAEs of equal L0 have figures on the same text with enough documents, so nothing was tested."
            if run.rows
            else ""
        )
        return f"{title}\n\n{why}" if why else ""
    exceeding = [item for item in found if item.exceeds_noise]
    pairs = list(dict.fromkeys(item.pair for item in found))
    lines = [
        title,
        "",
        f"{_counted(len(found), 'test')}: {_counted(len(pairs), 'pair')}, "
        f"{', '.join(dict.fromkeys(item.metric.label for item in found))}. SAEs are compared at equal L0: where one of two "
        "was measured at several, its figure between the nearest two is interpolated, linear in log L0, and nowhere beyond "
        "them. In probing every SAE is also compared with the raw residual stream. No two controls, no interpolating rows. "
        "Both sides are measured on the same text (paired), clustered as above; Student's t of the difference over its "
        "jackknife error, with degrees of freedom for few clusters of unequal size and skewed noise "
        "([docs/noise.md](docs/noise.md)); all p-values corrected together by Holm's method, at 5 %. Every test: "
        "[metrics/differences.csv](metrics/differences.csv).",
        "",
        *_seed_terms(run),
        *_unmatched(run),
        "",
    ]
    if not exceeding:
        return "\n".join([*lines, "**No difference exceeds noise.**"])
    shown = {item.pair for item in exceeding}
    lines += [
        f"{len(exceeding)} of {len(found)} differences exceed noise, in {len(shown)} of {len(pairs)} pairs. "
        "First SAE less second, with the 95 % interval of that difference alone; "
        f"·: does not exceed noise; {ABSENT}: not tested.",
        *_difference_tables(found),
    ]
    claims = list(dict.fromkeys(_claim(item) for item in exceeding if item.may_claim))
    return "\n".join([*lines, *(["", *claims] if claims else [])])


def _seed_terms(run: Run) -> list[str]:
    several = recipes(run.rows)
    if not several:
        return [
            "One training seed stands behind every SAE: what exceeds noise here does so on this text, and another "
            "seed may differ."
        ]
    enough = [recipe.title for recipe in several if recipe.seeds >= SEEDS_FOR_A_CLAIM]
    alone = sum(1 for contender in contenders(run.rows) if contender.seeds == 1)
    return [
        "Where a recipe was trained with several seeds their mean is compared, and their spread is part of the error. "
        + (
            f"At least {SEEDS_FOR_A_CLAIM} seeds stand behind {', '.join(enough)}. "
            if enough
            else f"No recipe has the {SEEDS_FOR_A_CLAIM} seeds that a claim about recipes would need. "
        )
        + (
            f"{_counted(alone, 'row')} without a second seed: what exceeds noise there does so on this text, and another "
            "seed may differ."
            if alone
            else ""
        )
    ]


def _unmatched(run: Run) -> list[str]:
    """Which SAEs were not compared, for want of a common L0."""
    from sae_research.reporting.comparisons import unmatched  # numpy, which no other part needs

    pairs = unmatched(run)
    if not pairs:
        return []
    partners: dict[str, list[str]] = {}
    for one, other in pairs:
        partners.setdefault(_spanned(one), []).append(_spanned(other))
    return [
        "",
        "Not compared, for they share no L0: "
        + "; ".join(f"{one} with {', '.join(others)}" for one, others in partners.items())
        + ".",
    ]


def _spanned(grid: Grid) -> str:
    curve = grid.curve(headline("l0"))
    low, high = number(curve[0][0]), number(curve[-1][0])
    return f"`{grid.label}` (L0 {low if low == high else f'{low} to {high}'})"


def _difference_tables(found: Sequence[Comparison]) -> list[str]:
    """One table for core and sparse probing, one for every other evaluation that was tested."""
    groups: dict[str, list[Comparison]] = {}
    for item in found:
        title = EVAL_TITLES[item.metric.eval] if item.metric.eval in OPTIONAL else ""
        groups.setdefault(title, []).append(item)
    lines: list[str] = []
    for title, items in groups.items():
        shown = list(dict.fromkeys((item.pair, item.l0) for item in items if item.exceeds_noise))
        metrics = list(dict.fromkeys(item.metric for item in items))
        cells = {(item.pair, item.l0, item.metric): _cell(item) for item in items}
        body = [
            [*pair, number(l0), *(cells.get((pair, l0, metric), ABSENT) for metric in metrics)]
            for pair, l0 in shown[:PAIRS_SHOWN]
        ]
        if shown:
            lines += [
                "",
                *([f"{title}:", ""] if title else []),
                markdown(["SAE", "less", "at L0", *(metric.label + metric.arrow for metric in metrics)], body, left=2),
            ]
        if len(shown) > PAIRS_SHOWN:
            lines += ["", f"{len(shown) - PAIRS_SHOWN} more pairs stand in metrics/differences.csv."]
    return lines


def _cell(item: Comparison) -> str:
    if not item.exceeds_noise:
        return "·"
    return f"{_signed(item.found.value)} [{_signed(item.found.low)}, {_signed(item.found.high)}]"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value).replace("-", "−")


def _claim(item: Comparison) -> str:
    """The one sentence that may call a recipe better: three seeds or more stand behind both sides."""
    favourable = (item.found.value > 0) == (item.metric.better == "higher")
    one, other = item.pair if favourable else item.pair[::-1]
    return f"- {item.metric.label}: {one} is better than {other}, by {number(abs(item.found.value))}."


# --- equal L0 ----------------------------------------------------------------------------------


def equal_l0(run: Run) -> str:
    """Every headline figure between the points of each architecture's sparsity grid, and areas under Pareto curves."""
    metrics = [metric for key in run.headline if (metric := headline(key)).better]
    found = [grid for grid in grids(run) if any(grid.curve(metric) for metric in metrics)]
    if not found:
        return ""
    lines = [
        "## At equal L0",
        "",
        "![Figures at equal L0](images/equal_l0.png)",
        "",
        "Between the measured points of one architecture figures are interpolated, linear in log L0, and nowhere beyond "
        "them. Several seeds of a recipe are one point, their mean. Interpolating rows are left out"
        + (
            f" ({', '.join(f'`{row.name}`' for row in run.rows if row.interpolating)})."
            if any(row.interpolating for row in run.rows)
            else "; this run has none."
        ),
        *[""] * bool(_alone(found)),
        *_alone(found),
    ]
    body = []
    for grid in found:
        curves = {metric: grid.curve(metric) for metric in metrics}
        for l0 in common_l0(list(curves.values())):
            body.append([grid.label, f"{l0:g}", *(number(at(curves[metric], l0)) for metric in metrics)])
    if not body:
        return "\n".join([*lines, "", "No architecture has two points yet: give `train.saes` a grid of sparsities."])
    header = ["Architecture", "L0", *(metric.label + metric.arrow for metric in metrics)]
    table = markdown(header, sorted(body, key=lambda line: float(line[1])))
    return "\n".join([*lines, "", table, "", *_areas(found, metrics)])


def _alone(found: Sequence[Grid]) -> list[str]:
    single = [(grid, grid.curve(headline("l0"))) for grid in found]
    names = [f"`{grid.members[0].name}` (L0 {number(curve[0][0])})" for grid, curve in single if len(curve) == 1]
    return [f"One point only, drawn as a point: {', '.join(names)}."] if names else []


def _areas(found: Sequence[Grid], metrics: Sequence[Metric]) -> list[str]:
    """A table of areas over the L0 that all grids cover."""
    spans = {metric: common_range([grid.curve(metric) for grid in found]) for metric in metrics}
    wide = [grid for grid in found if len(grid.curve(headline("l0"))) > 1]
    ranges = {f"{number(low)} to {number(high)}" for low, high in filter(None, spans.values())}
    if not ranges:
        return ["The grids share no range of L0, so areas under their Pareto curves would not compare."]
    body = []
    for grid in wide:
        cells = []
        for metric in metrics:
            curve, span = grid.curve(metric), spans[metric]
            cells.append(number(area(curve, metric.better, *span) if span and len(curve) > 1 else None))
        body.append([grid.label, *cells])
    alone = " Only one architecture has a grid, so there is nothing to compare it with yet." if len(wide) == 1 else ""
    return [
        f"Area under the Pareto curve (the most favourable figure at no higher an L0) over log L0 from "
        f"{' and '.join(sorted(ranges))}, divided by that range's width, so that it reads like the figure itself.{alone}",
        "",
        markdown(["Architecture", *(metric.label + metric.arrow for metric in metrics)], body),
    ]
