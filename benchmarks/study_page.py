"""docs/study/index.md and its figures, made from the record alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.study_figures import TRAINED_RECIPES, UNTRAINED, Record, drawings, short
from sae_research.plotting.axes import write_images
from sae_research.runtime.files import read_json, write_text
from sae_research.runtime.formatting import ABSENT, number

FOLDER = Path("docs/study")
RECORD = FOLDER / "record.json"
TEMPLATE = "study.md.j2"
MAIN, PROBING = "variance_explained", "sae_top_1_accuracy"
LEVEL = 0.05


def write_page(root: Path = Path(".")) -> None:
    """Write the page and its figures. root: the project's folder."""
    record = read_json(root / RECORD)
    write_images(root / FOLDER, drawings(record))
    write_text(root / FOLDER / "index.md", page(record))


def page(record: Record) -> str:
    """The page's text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(TEMPLATE).render(
        record=record,
        findings=list(findings(record)),
        readings=readings_table(record),
        differences=differences_table(record),
        pictures=list(drawings(record)),
        number=number,
    )


def _at(record: Record) -> str:
    return f"{record['read_at']:g}"


def spelled(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """`+0.012 [+0.008, +0.016]`, or the value alone."""
    if value is None:
        return ABSENT
    return f"{value:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")


def name_of(record: Record, label: str) -> str:
    """A grid as the page writes it: the recipe of a trained architecture, else its own label."""
    kinds = {one["grid"]: one["kind"] for readings in record["readings"].values() for one in readings}
    return short(TRAINED_RECIPES.get(kinds.get(label, ""), label))


# --- findings ------------------------------------------------------------------------------------


def findings(record: Record) -> Iterator[tuple[str, str]]:
    """(what was found, what would overturn it)."""
    yield from _recipes(record, MAIN)
    yield from _seeds(record)
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
            "More texts: the interval is that wide because of them, not of the seeds.",
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


def _pair(record: Record, pair: Record) -> str:
    return (
        f"`{name_of(record, pair['one'])}` minus `{name_of(record, pair['other'])}` "
        f"{spelled(pair['value'], pair['low'], pair['high'])}"
    )


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


def _untrained(record: Record) -> Iterator[tuple[str, str]]:
    for metric in (MAIN, PROBING):
        control = next((one for one in record["readings"].get(metric, []) if one["kind"] == UNTRAINED), None)
        if control is None:
            continue
        against = [_from(pair, control["grid"]) for pair in record["differences"] if pair["metric"] == metric]
        found = [pair for pair in against if pair and pair["other"] in {one["grid"] for one in _trained(record, metric)}]
        above = [pair for pair in found if pair["p_holm"] < LEVEL and pair["value"] > 0]
        below = [pair for pair in found if pair["p_holm"] < LEVEL and pair["value"] < 0]
        label = record["labels"][metric][0].lower()
        yield (
            f"Untrained activations as a dictionary, under matching pursuit, reach {control['value']:.3f} in {label} at L0 "
            f"{_at(record)}: beyond noise above {_names(record, above)} and below {_names(record, below)} of "
            f"{len(found)} trained recipes with their own encoders.",
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
    found = [one for one in record["agreement"] if one["metric"] in (MAIN, PROBING) and one["truth"] in ("mcc", "latent_f1")]
    names = {"mcc": "MCC", "latent_f1": "F1"}
    if found:
        parts = [
            f"{record['labels'][one['metric']][0].lower()} with {names[one['truth']]} {one['spearman']:+.2f}"
            for one in found
        ]
        truth = record["ground_truth"]
        yield (
            f"Order of the {found[0]['recipes']} recipes on text at L0 {_at(record)} against known features "
            f"(L0 {format(truth['at'], 'g')}, {truth['seeds']} seeds, {truth['samples']:,} samples), Spearman: "
            f"{'; '.join(parts)}.",
            "With six recipes a correlation below 0.89 is within noise; other synthetic settings were not tried.",
        )


def _rates(record: Record) -> Iterator[tuple[str, str]]:
    bases: dict[str, list[Record]] = {}
    for one in record.get("rates", []):
        bases.setdefault(one["base"], []).append(one)
    parts = [
        f"`{base}` " + ", ".join(f"{one[MAIN][0]:.3f} at {one['learning_rate']:g} (L0 {number(one['l0'])})" for one in ones)
        for base, ones in bases.items()
    ]
    if parts:
        yield (
            f"Variance explained by learning rate after {record['tokens']:,} tokens, one seed: {'; '.join(parts)}.",
            "Runs of tens of millions of tokens, for which the literature's rate is chosen.",
        )


# --- tables --------------------------------------------------------------------------------------


def readings_table(record: Record) -> list[list[str]]:
    """A row a recipe: name, seeds, every metric at the L0 of reading with the deviation between seeds."""
    rows = []
    for kind, recipe in TRAINED_RECIPES.items():
        found = {metric: _of_kind(readings, kind) for metric, readings in record["readings"].items()}
        present = [one for one in found.values() if one]
        if present:
            cells = [ABSENT if one is None else _deviating(one) for one in found.values()]
            rows.append([f"`{short(recipe)}`", str(min(one["seeds"] for one in present)), *cells])
    return [["recipe", "seeds", *(record["labels"][metric][0] for metric in record["readings"])], *rows]


def _of_kind(readings: Sequence[Record], kind: str) -> Record | None:
    return next((one for one in readings if one["kind"] == kind), None)


def _deviating(one: Record) -> str:
    return f"{one['value']:.3f}" + ("" if one["seed_sd"] is None else f" ± {one['seed_sd']:.3f}")


def differences_table(record: Record) -> list[list[str]]:
    """Differences of trained recipes that exceed noise, by metric and size."""
    rows: list[list[str]] = []
    for metric in record["readings"]:
        beyond = [pair for pair in between_recipes(record, metric) if pair["p_holm"] < LEVEL]
        for pair in sorted(beyond, key=lambda pair: -abs(pair["value"])):
            names = f"`{name_of(record, pair['one'])}` − `{name_of(record, pair['other'])}`"
            value = spelled(pair["value"], pair["low"], pair["high"])
            rows.append([record["labels"][metric][0], names, value, f"{pair['p_holm']:.2g}"])
    return [["metric", "recipes", "difference", "p (Holm)"], *rows]


def median_alive(record: Record) -> float:
    """Median fraction of latents alive, over trained SAEs."""
    values: list[Any] = [row["fraction_alive"] for row in record["rows"] if row["kind"] in TRAINED_RECIPES]
    return statistics.median(values)
