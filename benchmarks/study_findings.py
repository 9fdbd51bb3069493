"""The findings of docs/study: sentences that follow from its record, each with what would overturn it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from benchmarks.study_figures import TRAINED_RECIPES, UNTRAINED, Record, short
from sae_research.reporting.comparisons import Points, at
from sae_research.runtime.formatting import ABSENT, number

MAIN, PROBING = "variance_explained", "sae_top_1_accuracy"
LEVEL = 0.05
SPEARMAN_CRITICAL = 0.89
"""Two-sided, of six pairs at `LEVEL` (exact permutation distribution)."""
CLAIMS = (
    ("top_k", "standard", "variance_explained", "Gao et al. 2024, arXiv 2406.04093"),
    ("gated_rajamanoharan", "standard", "loss_recovered", "Rajamanoharan et al. 2024, arXiv 2404.16014"),
    ("jump_relu", "gated_rajamanoharan", "loss_recovered", "Rajamanoharan et al. 2024, arXiv 2407.14435"),
    ("jump_relu", "top_k", "loss_recovered", "Rajamanoharan et al. 2024, arXiv 2407.14435"),
    ("batch_top_k", "top_k", "variance_explained", "Bussmann et al. 2024, arXiv 2412.06410"),
    ("batch_top_k", "matryoshka_batch_top_k", "variance_explained", "Bussmann et al. 2025, arXiv 2503.17547"),
    ("matryoshka_batch_top_k", "batch_top_k", "sae_top_1_accuracy", "Bussmann et al. 2025, arXiv 2503.17547"),
)
"""Orders that the literature reports: the better recipe, the other one, in what, and where."""


def _at(record: Record) -> str:
    return f"{record['read_at']:g}"


def spelled(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """`+0.012 [+0.008, +0.016]`, or the value alone."""
    if value is None:
        return ABSENT
    return f"{value:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")


def _grids(record: Record) -> dict[str, Record]:
    """A reading of every grid, by its label: each says the grid's kind and what it reads."""
    return {one["grid"]: one for readings in record["readings"].values() for one in readings}


def name_of(record: Record, label: str) -> str:
    """A grid as the page writes it: the recipe of a trained architecture, a pursuit encoder over what it reads, else its own
    label."""
    found = _grids(record).get(label, {"kind": "", "base": None})
    kind, base = found["kind"], found["base"]
    if kind == UNTRAINED:
        return "untrained"
    return f"{kind} over {base}" if base is not None else short(TRAINED_RECIPES.get(kind, label))


def findings(record: Record) -> Iterator[tuple[str, str]]:
    """(what was found, what would overturn it)."""
    yield from _recipes(record, MAIN)
    yield from _seeds(record)
    yield from _claims(record)
    for metric in (PROBING, "sae_probes_top_1_accuracy"):
        yield from _recipes(record, metric)
    yield from _untrained(record)
    yield from _pursuit(record)
    yield from _truth(record)
    yield from _rates(record)


def between_recipes(record: Record, metric: str) -> list[Record]:
    """Differences of two trained recipes in a metric."""
    trained = {one["grid"] for one in record["readings"].get(metric, []) if one["kind"] in TRAINED_RECIPES}
    return [d for d in record["differences"] if d["metric"] == metric and {d["one"], d["other"]} <= trained]


def _recipes(record: Record, metric: str) -> Iterator[tuple[str, str]]:
    pairs = between_recipes(record, metric)
    if not pairs:
        return
    label, l0 = record["labels"][metric][0].lower(), _at(record)
    beyond = [pair for pair in pairs if pair["p_holm"] < LEVEL]
    seeds = min(min(pair["seeds"]) for pair in pairs)
    if not beyond:
        largest = max(pairs, key=lambda pair: abs(pair["value"]))
        yield (
            f"In {label} at L0 {l0} none of the {len(pairs)} differences between two recipes exceeds noise ({seeds} "
            f"training seeds each); the largest is {_pair(record, largest)}.",
            "More probing tasks, texts and training seeds.",
        )
        return
    largest = max(beyond, key=lambda pair: abs(pair["value"]))
    order = sorted(_trained(record, metric), key=lambda one: -one["value"])
    yield (
        f"In {label} at L0 {l0}, {len(beyond)} of {len(pairs)} differences between two recipes exceed noise ({seeds} "
        f"training seeds each); from most to least: {', '.join(_with_value(record, one) for one in order)}. The largest is "
        f"{_pair(record, largest)}.",
        "Longer training, another width, layer or model: none of these was varied.",
    )


def _trained(record: Record, metric: str) -> list[Record]:
    return [one for one in record["readings"].get(metric, []) if one["kind"] in TRAINED_RECIPES]


def _with_value(record: Record, one: Record) -> str:
    return f"`{name_of(record, one['grid'])}` {one['value']:.3f}"


def pair_names(record: Record, pair: Record) -> str:
    """`one` minus `other`, as the page writes them."""
    return f"`{name_of(record, pair['one'])}` minus `{name_of(record, pair['other'])}`"


def _pair(record: Record, pair: Record) -> str:
    return f"{pair_names(record, pair)} {spelled(pair['value'], pair['low'], pair['high'])}"


def _seeds(record: Record) -> Iterator[tuple[str, str]]:
    spreads = {one["grid"]: one["seed_sd"] for one in _trained(record, MAIN) if one["seed_sd"] is not None}
    beyond = [abs(pair["value"]) for pair in between_recipes(record, MAIN) if pair["p_holm"] < LEVEL]
    if spreads:
        widest = max(spreads, key=lambda grid: spreads[grid])
        least = f"; the smallest difference that exceeds noise is {min(beyond):.4f}" if beyond else ""
        yield (
            f"Training seeds move variance explained at L0 {_at(record)} by a standard deviation of at most "
            f"{spreads[widest]:.4f} (`{name_of(record, widest)}`){least}.",
            "A recipe whose seeds differ more: three seeds bound a standard deviation loosely.",
        )


def claimed(record: Record) -> list[tuple[tuple[str, str, str, str], Record]]:
    """Every claim of `CLAIMS` that the study can hold against its data, with the difference better minus other."""
    found = []
    for better, other, metric, source in CLAIMS:
        grids = {TRAINED_RECIPES.get(one["kind"]): one["grid"] for one in record["readings"].get(metric, [])}
        pairs = [_from(pair, grids.get(better, "")) for pair in record["differences"] if pair["metric"] == metric]
        found += [
            ((better, other, metric, source), pair)
            for pair in pairs
            if pair is not None and pair["other"] == grids.get(other)
        ]
    return found


def outcome(pair: Record) -> str:
    """Of a claimed order, in words."""
    if pair["p_holm"] >= LEVEL:
        return "within noise"
    return "as reported" if pair["value"] > 0 else "the other way round"


def _claims(record: Record) -> Iterator[tuple[str, str]]:
    found = claimed(record)
    if not found:
        return
    parts = []
    for kind in ("as reported", "within noise", "the other way round"):
        mine = [
            f"`{short(better)}` over `{short(other)}` in {record['labels'][metric][0].lower()} "
            f"({spelled(pair['value'], pair['low'], pair['high'])})"
            for (better, other, metric, _), pair in found
            if outcome(pair) == kind
        ]
        if mine:
            parts.append(f"{len(mine)} {kind}: {', '.join(mine)}")
    seeds = min(min(pair["seeds"]) for _, pair in found)
    yield (
        f"Of {len(found)} orders of recipes that the literature reports, at L0 {_at(record)} with {seeds} training seeds "
        f"each: {'; '.join(parts)}.",
        "The literature's models, widths and training lengths, which are far larger; tuning each recipe's learning rate.",
    )


def held(record: Record) -> list[tuple[Record, float, bool]]:
    """Every difference that the page speaks of (two recipes; untrained rows, or pursuit by matching, and a recipe), what two
    further training seeds make of it, and whether it holds: of one that exceeds noise the sign, of another that it stays
    inside the interval."""
    known_grids = _grids(record)
    spoken_of = (*TRAINED_RECIPES, UNTRAINED, "mpsae")
    found = []
    for pair in record["differences"]:
        if not all(known_grids.get(pair[side], {}).get("kind") in spoken_of for side in ("one", "other")):
            continue
        new = record["further"]["values"].get(pair["metric"], {})
        known = {one["grid"]: one["value"] for one in record["readings"][pair["metric"]]}
        sides = [pair["one"], pair["other"]]
        means = [
            statistics.fmean(new[side]) if new.get(side) and None not in new[side] else known.get(side) for side in sides
        ]
        if not any(new.get(side) for side in sides) or None in means:
            continue
        value = means[0] - means[1]
        holds = value * pair["value"] > 0 if pair["p_holm"] < LEVEL else pair["low"] <= value <= pair["high"]
        found.append((pair, value, holds))
    return found


def _untrained(record: Record) -> Iterator[tuple[str, str]]:
    parts = []
    for metric in (MAIN, PROBING):
        control = next((one for one in record["readings"].get(metric, []) if one["kind"] == UNTRAINED), None)
        if control is None:
            continue
        against = [_from(pair, control["grid"]) for pair in record["differences"] if pair["metric"] == metric]
        found = [pair for pair in against if pair and pair["other"] in {one["grid"] for one in _trained(record, metric)}]
        above = [pair for pair in found if pair["p_holm"] < LEVEL and pair["value"] > 0]
        below = [pair for pair in found if pair["p_holm"] < LEVEL and pair["value"] < 0]
        label = record["labels"][metric][0].lower()
        nearest = min(found, key=lambda pair: abs(pair["value"]), default=None)
        said = "" if nearest is None else f" (nearest: {_pair(record, nearest)})"
        parts.append(
            f"{control['value']:.3f} in {label}{said}, beyond noise above {_names(record, above)} and below "
            f"{_names(record, below)} of {len(found)} trained recipes with their own encoders"
        )
    if parts:
        yield (
            f"Untrained activations as a dictionary, under matching pursuit, reach at L0 {_at(record)} {'; '.join(parts)}.",
            "A trained dictionary under the same encoder, which is the fair comparison: see the next lines.",
        )


def _from(pair: Record, grid: str) -> Record | None:
    """A difference as grid minus the other; None where the grid takes no part."""
    if pair["one"] == grid:
        return pair
    if pair["other"] != grid:
        return None
    flipped = {"value": -pair["value"], "low": -pair["high"], "high": -pair["low"]}
    return {**pair, "one": grid, "other": pair["one"], **flipped}


def _names(record: Record, pairs: Sequence[Record]) -> str:
    return ", ".join(f"`{name_of(record, pair['other'])}`" for pair in pairs) or "none"


def _pursuit(record: Record) -> Iterator[tuple[str, str]]:
    kinds = {row["name"]: row["kind"] for row in record["rows"]}
    for one in record["readings"].get(MAIN, []):
        if one["kind"] != "mpsae" or one["base"] is None:
            continue
        own = next((other for other in record["readings"][MAIN] if other["kind"] == kinds[one["base"]]), None)
        parts = []
        for metric in (MAIN, "loss_recovered", PROBING):
            pair = next(
                (
                    found
                    for d in record["differences"]
                    if d["metric"] == metric and own and (found := _from(d, one["grid"])) and found["other"] == own["grid"]
                ),
                None,
            )
            if pair:
                beyond = "" if pair["p_holm"] < LEVEL else ", within noise"
                label = record["labels"][metric][0].lower()
                parts.append(f"{label} {spelled(pair['value'], pair['low'], pair['high'])}{beyond}")
        if parts:
            yield (
                f"Matching pursuit over the dictionary of `{one['base']}`, against the recipe's own encoder at L0 "
                f"{_at(record)}: {'; '.join(parts)}.",
                "An encoder trained for the same dictionary as long again.",
            )


def _truth(record: Record) -> Iterator[tuple[str, str]]:
    truth = record["ground_truth"]
    means = {
        recipe: statistics.fmean(found["mcc"]) for recipe, found in truth["methods"].items() if None not in found["mcc"]
    }
    order = sorted((recipe for recipe in means if recipe in TRAINED_RECIPES.values()), key=lambda one: -means[one])
    found = [one for one in record["agreement"] if one["metric"] in (MAIN, PROBING) and one["truth"] in ("mcc", "latent_f1")]
    if not found or not order:
        return
    spread = max(statistics.stdev(truth["methods"][recipe]["mcc"]) for recipe in order)
    names = {"mcc": "MCC", "latent_f1": "F1"}
    parts = [
        f"{record['labels'][one['metric']][0].lower()} with {names[one['truth']]} {one['spearman']:+.2f}" for one in found
    ]
    listed = ", ".join(f"`{short(one)}` {means[one]:.3f}" for one in order)
    alike = max(one["spearman"] for one in found if one["metric"] == MAIN) >= SPEARMAN_CRITICAL
    order_is = "as" if alike else "otherwise than"
    yield (
        f"Known features order the recipes {order_is} reconstruction of text does: by MCC at L0 {truth['at']:g} "
        f"({truth['seeds']} seeds, standard deviation at most {spread:.3f}) {listed}. Spearman's correlation over "
        f"{found[0]['recipes']} recipes with the order on text at L0 {_at(record)}: {'; '.join(parts)}.",
        f"With six recipes a correlation below {SPEARMAN_CRITICAL} is within noise; one synthetic setting was tried.",
    )


def rated(record: Record) -> dict[str, tuple[float, dict[float, list[float]]]]:
    """By recipe the L0 at which its learning rates are compared, and variance explained there by learning rate, with the
    bounds of its interval: the L0 of all where they have one, else the middle of what the rates' curves have in common,
    linear in log L0."""
    rows: dict[str, dict[float, list[Record]]] = {}
    for one in record.get("rates", []):
        recipe = one["base"].rstrip("0123456789").rstrip("_")
        rows.setdefault(recipe, {}).setdefault(one["learning_rate"], []).append(one)
    found = {}
    for recipe, by_rate in rows.items():
        reached = [sorted(one["l0"] for one in ones) for ones in by_rate.values()]
        low, high = max(l0s[0] for l0s in reached), min(l0s[-1] for l0s in reached)
        if low <= high:
            there = math.sqrt(low * high)
            found[recipe] = there, {rate: _read_at(ones, there) for rate, ones in by_rate.items()}
    return found


def _read_at(rows: Sequence[Record], l0: float) -> list[float]:
    """Value, low and high of variance explained at an L0 that the rows reach."""
    curves: list[Points] = [sorted((one["l0"], one[MAIN][part]) for one in rows) for part in range(3)]
    return [value for curve in curves if (value := at(curve, min(max(l0, curve[0][0]), curve[-1][0]))) is not None]


def _rates(record: Record) -> Iterator[tuple[str, str]]:
    parts = []
    for recipe, (l0, values) in rated(record).items():
        best = max(values, key=lambda rate: values[rate][0])
        listed = ", ".join(
            f"{value:.3f} [{low:.3f}, {high:.3f}] at {rate:g}"
            for rate, (value, low, high) in sorted(values.items(), reverse=True)
        )
        parts.append(f"`{short(recipe)}` at L0 {number(l0)} {listed} (best {best:g})")
    if parts:
        yield (
            f"Variance explained by learning rate after {record['tokens']:,} tokens, one seed each, intervals over text "
            f"that all share: {'; '.join(parts)}.",
            "Runs of tens of millions of tokens, for which the literature's rate, 3e-4 or less, is chosen; further seeds.",
        )
