"""Which differences at equal L0 exceed noise: paired on the same text, clustered, corrected for all comparisons at once.

The only reporting module that needs numpy; the report imports it when it gets there.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from sae_research.intervals import Difference, Ratio, accuracy, averaged, difference, holm, mixed, ratio
from sae_research.reporting.equal_l0 import Grid, Point, alike, grids, meetings
from sae_research.reporting.metrics import EVAL_NOTES, EVALS, Metric, headline, metric_named, residual_key, sort_keys
from sae_research.reporting.run import Row, Run
from sae_research.reporting.seeds import SEEDS_FOR_A_CLAIM
from sae_research.store import write_text

LEVEL = 0.05
RESIDUAL = "raw residual stream"
DIFFERENCES_CSV = Path("metrics/differences.csv")
CSV_COLUMNS = ("one", "other", "l0", "eval", "metric", "difference", "low", "high", "p", "p_holm", "seeds_one",
               "seeds_other")


class Evidence(NamedTuple):
    """A figure as a ratio of sums over clusters. Equal keys mean equal clusters, which makes a comparison paired."""

    key: str
    figure: Ratio


@dataclass(frozen=True)
class Comparison:
    """Two contenders in one metric, at one L0."""

    one: Point
    other: Point | None
    """None for the raw residual stream."""
    metric: Metric
    found: Difference
    adjusted: float = 1.0
    """p after Holm's correction over all tests of the report."""

    @property
    def l0(self) -> float:
        return self.one.l0

    @property
    def exceeds_noise(self) -> bool:
        return self.adjusted < LEVEL

    @property
    def may_claim(self) -> bool:
        """Whether three training seeds stand behind both sides."""
        return self.other is not None and min(self.one.seeds, self.other.seeds) >= SEEDS_FOR_A_CLAIM

    @property
    def pair(self) -> tuple[str, str]:
        return self.one.title, self.other.title if self.other else RESIDUAL


def evidence(row: Row, metric: Metric) -> Evidence | None:
    """What stands behind one figure of one SAE; None where an evaluation stored nothing of the kind."""
    record = row.evals.get(metric.eval, {})
    sums = record.get("cluster_sums", {}).get(metric.key)
    if sums is not None:
        clusters = record["clusters"][sums["clusters"]]
        return Evidence(clusters["key"], ratio(sums["numerator"], sums["denominator"], clusters.get("strata")))
    outcomes = record.get("outcomes", {})
    correct = outcomes.get("correct", {}).get(metric.key)
    if correct is None:
        return None
    return Evidence(outcomes["key"], accuracy(outcomes["asked"], correct, outcomes.get("train_share", 0.0),
                                              outcomes.get("train_replaced", False)))


def tested_metrics(run: Run) -> list[Metric]:
    """Headline figures that have a direction, and those of other evaluations that stored evidence; none of an evaluation
    that should not be relied on."""
    chosen = [headline(key) for key in run.headline]
    for name in EVALS:
        if name not in ("core", "sparse_probing", *EVAL_NOTES):
            keys = {key for row in run.rows for record in (row.evals.get(name, {}),)
                    for key in (*record.get("cluster_sums", {}), *record.get("outcomes", {}).get("correct", {}))}
            chosen += [metric_named(key, name) for key in sort_keys(keys, name)]
    return [metric for metric in chosen if metric.better]


def comparisons(run: Run) -> list[Comparison]:
    """Every comparison, p-values corrected over all of them."""
    found = list(_uncorrected(run))
    adjusted = holm([item.found.p for item in found])
    return [replace(item, adjusted=p) for item, p in zip(found, adjusted, strict=True)]


def unmatched(run: Run) -> list[tuple[Grid, Grid]]:
    """Pairs of grids that share no L0 and so are not compared; no two controls."""
    return [pair for pair in _pairs(run) if not meetings(*pair)]


def _pairs(run: Run) -> list[tuple[Grid, Grid]]:
    found = [grid for grid in grids(run, controls=True) if grid.curve(headline("l0"))]
    return [(one, other) for one, other in combinations(found, 2)
            if not (one.members[0].is_control and other.members[0].is_control)]


def _uncorrected(run: Run) -> Iterator[Comparison]:
    met = [meeting for pair in _pairs(run) for meeting in meetings(*pair)]
    met += [pair for grid in grids(run) for pair in alike(grid)]
    alone = [Point(grid, member.mean(headline("l0")) or 0.0, member) for grid in grids(run, controls=True)
             for member in grid.members]
    for metric in tested_metrics(run):
        seed = int(run.evals[metric.eval].get("notes", {}).get("random_seed", 0))
        for one, other in met:
            yield from _compare(one, other, metric, _all_evidence(one, metric), _all_evidence(other, metric), seed)
        reference = residual_key(metric.key) if metric.eval == "sparse_probing" else None
        if reference is not None:
            for one in alone:
                raw = None if one.is_control else evidence(one.lower.rows[0], headline(reference))
                yield from _compare(one, None, metric, _all_evidence(one, metric), [raw] if raw else [], seed)


def _all_evidence(point: Point, metric: Metric) -> list[Evidence]:
    """Of every run, between the two neighbours where nothing was measured; empty unless all have it on the same clusters."""
    sides = [[evidence(row, metric) for row in member.rows] for member in point.members]
    if any(item is None for side in sides for item in side) or len({item.key for side in sides for item in side}) != 1:
        return []
    if point.upper is None:
        return sides[0]
    lower, upper = sides
    if len(lower) != len(upper):  # the mean over runs of either side; their spread is then not known
        lower, upper = ([Evidence(side[0].key, averaged([item.figure for item in side]))] for side in sides)
    found = [(low.key, mixed(low.figure, high.figure, point.weight)) for low, high in zip(lower, upper, strict=True)]
    return [Evidence(key, figure) for key, figure in found if figure is not None] if all(f for _, f in found) else []


def _compare(one: Point, other: Point | None, metric: Metric, mine: Sequence[Evidence],
             theirs: Sequence[Evidence], seed: int) -> Iterator[Comparison]:
    if not (mine and theirs) or mine[0].key != theirs[0].key:
        return
    found = difference([item.figure for item in mine], [item.figure for item in theirs], seed)
    if found is not None:
        yield Comparison(one, other, metric, found)


def write_differences_csv(found: Sequence[Comparison], root: Path = Path(".")) -> None:
    """Write `metrics/differences.csv`: every comparison, whether or not it exceeds noise."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for item in found:
        numbers = (item.found.value, item.found.low, item.found.high, item.found.p, item.adjusted)
        writer.writerow([item.one.name, item.other.name if item.other else RESIDUAL, f"{item.l0:.4g}", item.metric.eval,
                         item.metric.key, *(f"{value:.4g}" for value in numbers), item.one.seeds,
                         item.other.seeds if item.other else ""])
    write_text(root / DIFFERENCES_CSV, buffer.getvalue())
