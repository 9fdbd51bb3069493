"""docs/study/index.md and its figures, made from the record alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages import rendered
from benchmarks.study_figures import CAPTIONS, TRAINED_RECIPES, Record, drawings, short
from benchmarks.study_findings import (
    LEVEL,
    MAIN,
    between_recipes,
    claimed,
    findings,
    held,
    name_of,
    outcome,
    pair_names,
    spelled,
)
from sae_research.plotting.axes import write_images
from sae_research.runtime.files import read_json, write_text
from sae_research.runtime.formatting import ABSENT, number

FOLDER = Path("docs/study")
RECORD = FOLDER / "record.json"
TEMPLATE = "study.md.j2"


def write_page(root: Path = Path(".")) -> None:
    """Write the page and its figures. root: the project's folder."""
    record = read_json(root / RECORD)
    write_images(root / FOLDER, drawings(record))
    write_text(root / FOLDER / "index.md", page(record))


def page(record: Record) -> str:
    """The page's text."""
    return rendered(
        TEMPLATE,
        record=record,
        findings=list(findings(record)),
        claims=claims_table(record),
        family=max((pair["family"] for pair in between_recipes(record, MAIN)), default=0),
        held=held_lines(record) if "further" in record else [],
        readings=readings_table(record),
        differences=differences_table(record),
        pictures={name: CAPTIONS[name] for name in drawings(record)},
        minutes=sum(one["cpu_seconds"] for one in record.get("cost", {}).values()) / 60,
        number=number,
    )


def claims_table(record: Record) -> list[list[str]]:
    """What the literature reports, and what was found."""
    rows = [
        [
            f"`{short(better)}` over `{short(other)}`",
            record["labels"][metric][0],
            source,
            spelled(pair["value"], pair["low"], pair["high"]),
            outcome(pair),
        ]
        for (better, other, metric, source), pair in claimed(record)
    ]
    return [["order", "in", "source", "difference here", "outcome"], *rows]


def held_lines(record: Record) -> list[str]:
    """How the differences fare under two further training seeds, a line for those that exceed noise and one for the others;
    then each that does not hold."""
    found = held(record)
    beyond = [one for one in found if one[0]["p_holm"] < LEVEL]
    within = [one for one in found if one[0]["p_holm"] >= LEVEL]
    lines = [
        ("No finding turns over. " if all(holds for *_, holds in beyond) else "")
        + f"Of {len(beyond)} differences that exceed noise {sum(holds for *_, holds in beyond)} keep their sign; "
        f"{sum(pair['low'] <= value <= pair['high'] for pair, value, _ in beyond)} of them stay inside their interval.",
        f"Of {len(within)} that do not exceed noise {sum(holds for *_, holds in within)} stay inside their interval.",
    ]
    for pair, value, holds in found:
        if not holds:
            names = pair_names(record, pair)
            label = record["labels"][pair["metric"]][0].lower()
            interval = spelled(pair["value"], pair["low"], pair["high"])
            lines.append(
                f"Does not hold: {names} in {label}, {interval} in the study, {spelled(value)} with the further seeds."
            )
    return lines


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
