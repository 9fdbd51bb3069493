"""SAEs compared at equal L0: seeds of a recipe as one, values between the points of a sparsity grid, and which differences
exceed noise (paired on the same text, clustered, corrected for all comparisons at once).

Between two measured points a value is linear in log L0. Outside a grid's points nothing is said.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, zip_longest
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from sae_research.reporting.metrics import EVAL_NOTES, OPTIONAL, Metric, headline, metric_named, residual_key, sort_keys
from sae_research.reporting.rows import Row, Run
from sae_research.runtime.files import write_text
from sae_research.runtime.formatting import csv_text
from sae_research.stats.intervals import Difference, Ratio, accuracy, averaged, difference, holm, mixed, ratio

SEEDS_FOR_A_CLAIM = 3
"""Fewest training seeds on both sides before one recipe is called better than another."""


@dataclass(frozen=True)
class SeedGroup:
    """SAEs that differ in their training seed alone; one SAE where there is no other."""

    name: str
    rows: tuple[Row, ...]

    @property
    def seeds(self) -> int:
        return len(self.rows)

    @property
    def is_control(self) -> bool:
        return self.rows[0].is_control

    @property
    def interpolating(self) -> bool:
        return any(row.interpolating for row in self.rows)

    @property
    def title(self) -> str:
        """Its name in running text and tables."""
        return f"`{self.name}`" + (f" ({self.seeds} seeds)" if self.seeds > 1 else "")

    def values(self, metric: Metric) -> list[float]:
        """The value of every run that has one."""
        found = (row.value(metric.key, metric.eval) for row in self.rows)
        return [value for value in found if value is not None]

    def mean(self, metric: Metric) -> float | None:
        """Mean over its runs; None unless every run has a value."""
        values = self.values(metric)
        return statistics.fmean(values) if len(values) == self.seeds else None

    def spread(self, metric: Metric) -> float | None:
        """Standard deviation between its runs; None for a single one."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) == self.seeds > 1 else None


def seed_groups(rows: Iterable[Row]) -> list[SeedGroup]:
    """Rows with one `recipe_id` as one group, every other row by itself, in table order.

    The same weights under two names are one run, not two seeds.
    """
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        weights = row.cfg.get("weights_fingerprint") or row.name
        groups.setdefault(row.recipe or f"the row {row.name}", {}).setdefault(weights, row)
    return [SeedGroup(_name(tuple(runs.values())), tuple(runs.values())) for runs in groups.values()]


def _name(rows: Sequence[Row]) -> str:
    """`topk_seed1`, `topk_seed2` -> `topk`."""
    if len(rows) == 1:
        return rows[0].name
    shared = os.path.commonprefix([row.name for row in rows])
    return re.sub(r"_*(seed|s)?_*\d*_*$", "", shared) or rows[0].name


SAME = 1.02
"""Two L0 are equal where the larger is at most this many times the smaller."""
STEPS = 256
"""Steps of the area's trapezoids over log L0, besides the measured points."""

Points = list[tuple[float, float]]
"""(L0, value), ascending in L0."""


@dataclass(frozen=True)
class Grid:
    """The SAEs of one architecture over one dictionary size (or base), at several L0."""

    label: str
    group: str
    members: tuple[SeedGroup, ...]

    def curve(self, metric: Metric) -> Points:
        """Measured points; several at one L0 count as their mean."""
        by_l0: dict[float, list[float]] = {}
        for member in self.members:
            x, y = member.mean(headline("l0")), member.mean(metric)
            if x is not None and x > 0 and y is not None:
                by_l0.setdefault(x, []).append(y)
        return [(x, fmean(by_l0[x])) for x in sorted(by_l0)]


def grids(run: Run, controls: bool = False) -> list[Grid]:
    """All architectures, interpolating rows left out, several seeds of a recipe as one point; controls where wanted, one
    grid for each kind."""
    groups: dict[tuple[object, ...], list[SeedGroup]] = {}
    for group in seed_groups(row for row in run.rows if not row.interpolating and (controls or not row.is_control)):
        row = group.rows[0]
        width = None if row.is_control else row.cfg.get("d_sae")  # as many as it has components, where it is linear
        place = row.kind, row.cfg.get("base"), width, row.hooks, *row.training_options
        groups.setdefault(place, []).append(group)
    return [
        Grid(_distinct(place, [other for other in groups if other[0] == place[0]]), members[0].rows[0].group, tuple(members))
        for place, members in groups.items()
    ]


def _distinct(place: tuple[object, ...], alike: Sequence[tuple[object, ...]]) -> str:
    """An architecture and what tells its grid from others of that name: base, width, hooks, options of training."""
    columns = zip_longest(*alike)  # grids differ in how many options they have
    told = [part for part, column in zip(place, columns, strict=False) if len(set(column)) > 1 and part is not None]
    return f"{place[0]} ({', '.join(map(str, told))})" if told else str(place[0])


@dataclass(frozen=True)
class Point:
    """A grid at one L0: a measured point, or between the two beside it."""

    grid: Grid
    l0: float
    lower: SeedGroup
    upper: SeedGroup | None = None
    """None at a measured point."""
    weight: float = 0.0
    """Share of `upper`, linear in log L0."""

    @property
    def members(self) -> tuple[SeedGroup, ...]:
        return (self.lower,) if self.upper is None else (self.lower, self.upper)

    @property
    def seeds(self) -> int:
        return min(member.seeds for member in self.members)

    @property
    def is_control(self) -> bool:
        return self.lower.is_control

    @property
    def name(self) -> str:
        """One name, or two with a slash between."""
        return "/".join(member.name for member in self.members)

    @property
    def title(self) -> str:
        """Its name in running text and tables."""
        if self.upper is None:
            return self.lower.title
        return f"{self.grid.label}, between `{self.lower.name}` and `{self.upper.name}`"


def point(grid: Grid, l0: float) -> Point | None:
    """The grid at an L0: the measured point where one lies within 2 %, else between its neighbours; None outside."""
    measured = sorted(
        ((x, member) for member in grid.members if (x := member.mean(headline("l0"))) is not None and x > 0),
        key=lambda pair: pair[0],
    )
    near = [(x, member) for x, member in measured if max(x, l0) <= SAME * min(x, l0)]
    if near:
        x, member = min(near, key=lambda pair: abs(math.log(pair[0] / l0)))
        return Point(grid, x, member)
    for (x0, lower), (x1, upper) in zip(measured, measured[1:], strict=False):
        if x0 < l0 < x1:
            return Point(grid, l0, lower, upper, math.log(l0 / x0) / math.log(x1 / x0))
    return None


def alike(grid: Grid) -> list[tuple[Point, Point]]:
    """Members of one grid that were measured at equal L0: two recipes of one architecture."""
    placed = [Point(grid, l0, member) for member in grid.members if (l0 := member.mean(headline("l0")))]
    return [(one, other) for one, other in combinations(placed, 2) if max(one.l0, other.l0) <= SAME * min(one.l0, other.l0)]


def meetings(one: Grid, other: Grid) -> list[tuple[Point, Point]]:
    """Both grids at every L0 at which the one of fewer points was measured and the other has points on both sides."""
    few, many = (one, other) if len(one.members) <= len(other.members) else (other, one)
    found = []
    for member in few.members:
        l0 = member.mean(headline("l0"))
        there = point(many, l0) if l0 else None
        if l0 and there is not None:
            here = Point(few, l0, member)
            found.append((here, there) if few is one else (there, here))
    return found


def at(curve: Points, l0: float) -> float | None:
    """The value at an L0, linear in log L0 between the points beside it; None outside the measured range.

    >>> at([(10.0, 0.0), (1000.0, 1.0)], 100.0), at([(10.0, 0.0), (1000.0, 1.0)], 9.9)
    (0.5, None)
    """
    xs = [x for x, _ in curve]
    if not xs or not xs[0] <= l0 <= xs[-1]:
        return None
    right = min(bisect_right(xs, l0), len(xs) - 1)
    if right == 0:
        return curve[0][1]
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * math.log(l0 / x0) / math.log(x1 / x0)


def common_l0(curves: Sequence[Points]) -> list[float]:
    """Powers of two that lie on at least one curve of two points or more."""
    wide = [curve for curve in curves if len(curve) > 1]
    if not wide:
        return []
    low, high = min(curve[0][0] for curve in wide), max(curve[-1][0] for curve in wide)
    powers = (2.0**exponent for exponent in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1))
    return [power for power in powers if any(at(curve, power) is not None for curve in wide)]


def common_range(curves: Sequence[Points]) -> tuple[float, float] | None:
    """The L0 that all curves of two points or more cover; None where they have no stretch in common."""
    wide = [curve for curve in curves if len(curve) > 1]
    if not wide:
        return None
    low, high = max(curve[0][0] for curve in wide), min(curve[-1][0] for curve in wide)
    return (low, high) if low < high else None


def pareto(curve: Points, better: str) -> Points:
    """The best value at no higher an L0, along the curve: what spending up to that much L0 buys."""
    best = max if better == "higher" else min
    front: Points = []
    for x, y in curve:
        front.append((x, best(y, front[-1][1]) if front else y))
    return front


def area(curve: Points, better: str, low: float, high: float) -> float:
    """Mean of the Pareto curve over log L0 from `low` to `high`: its area there, divided by the width.

    The curve must cover the range. The best so far counts from the curve's own start, also where that lies below `low`.
    """
    logs = [math.log(low) + (math.log(high) - math.log(low)) * step / STEPS for step in range(STEPS + 1)]
    inside = {math.log(x) for x, _ in curve if low < x < high}
    before = [point for point in curve if point[0] < low]
    places = [low, *(math.exp(log) for log in sorted({*logs[1:-1], *inside})), high]
    front = pareto([*before, *((x, y) for x in places if (y := at(curve, x)) is not None)], better)[len(before) :]
    total = sum((y0 + y1) / 2 * math.log(x1 / x0) for (x0, y0), (x1, y1) in zip(front, front[1:], strict=False))
    return total / math.log(high / low)


LEVEL = 0.05
RESIDUAL = "raw residual stream"
DIFFERENCES_CSV = Path("metrics/differences.csv")
CSV_COLUMNS = (
    "one",
    "other",
    "l0",
    "eval",
    "metric",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "seeds_one",
    "seeds_other",
)


class Evidence(NamedTuple):
    """A value as a ratio of sums over clusters. Equal keys mean equal clusters, which makes a comparison paired."""

    key: str
    figure: Ratio


@dataclass(frozen=True)
class Comparison:
    """Two SAEs or recipes in one metric, at one L0."""

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
    """What stands behind one value of one SAE; None where an evaluation stored nothing of the kind."""
    record = row.evals.get(metric.eval, {})
    sums = record.get("cluster_sums", {}).get(metric.key)
    if sums is not None:
        clusters = record["clusters"][sums["clusters"]]
        return Evidence(clusters["key"], ratio(sums["numerator"], sums["denominator"], clusters.get("strata")))
    outcomes = record.get("outcomes", {})
    correct = outcomes.get("correct", {}).get(metric.key)
    if correct is None:
        return None
    return Evidence(
        outcomes["key"],
        accuracy(outcomes["asked"], correct, outcomes.get("train_share", 0.0), outcomes.get("train_replaced", False)),
    )


def tested_metrics(run: Run) -> list[Metric]:
    """Headline metrics that have a direction, and those of other evaluations that stored evidence; none of an evaluation
    that should not be relied on."""
    chosen = [headline(key) for key in run.headline]
    for name in OPTIONAL:
        if name not in EVAL_NOTES:
            keys = {
                key
                for row in run.rows
                for record in (row.evals.get(name, {}),)
                for key in (*record.get("cluster_sums", {}), *record.get("outcomes", {}).get("correct", {}))
            }
            chosen += [metric_named(key, name) for key in sort_keys(keys, name)]
    return [metric for metric in dict.fromkeys(chosen) if metric.better]


def comparisons(run: Run) -> list[Comparison]:
    """Every comparison, p-values corrected over all of them."""
    found = list(_uncorrected(run))
    adjusted = holm([item.found.p for item in found])
    return [replace(item, adjusted=p) for item, p in zip(found, adjusted, strict=True)]


def comparisons_at(run: Run, l0: float, metrics: Sequence[Metric] | None = None) -> list[Comparison]:
    """Every pair of grids that covers one L0, read there (linear in log L0 between two measured points), p-values corrected
    over all of them.

    metrics: None for those of `tested_metrics`. Where both neighbours of a side have several training seeds, the spread
    between seeds joins the error.
    """
    met = [
        (one, other)
        for one, other in ((point(mine, l0), point(theirs, l0)) for mine, theirs in _pairs(run))
        if one is not None and other is not None
    ]
    found = []
    for metric in tested_metrics(run) if metrics is None else metrics:
        seed = int(run.evals[metric.eval].get("notes", {}).get("random_seed", 0))
        for one, other in met:
            found += _compare(one, other, metric, _all_evidence(one, metric), _all_evidence(other, metric), seed)
    adjusted = holm([item.found.p for item in found])
    return [replace(item, adjusted=p) for item, p in zip(found, adjusted, strict=True)]


def unmatched(run: Run) -> list[tuple[Grid, Grid]]:
    """Pairs of grids that share no L0 and so are not compared; no two controls."""
    return [pair for pair in _pairs(run) if not meetings(*pair)]


def _pairs(run: Run) -> list[tuple[Grid, Grid]]:
    """Grids to be compared: no two controls, of transcoders only those that write one hook, of crosscoders only those of the
    same hooks. What reconstructs something else explains another variance, and recovers another loss."""
    found = [grid for grid in grids(run, controls=True) if grid.curve(headline("l0"))]
    return [
        (one, other)
        for one, other in combinations(found, 2)
        if not (one.members[0].is_control and other.members[0].is_control)
        and one.members[0].rows[0].elsewhere == other.members[0].rows[0].elsewhere
    ]


def _uncorrected(run: Run) -> Iterator[Comparison]:
    met = [meeting for pair in _pairs(run) for meeting in meetings(*pair)]
    met += [pair for grid in grids(run) for pair in alike(grid)]
    alone = [
        Point(grid, member.mean(headline("l0")) or 0.0, member)
        for grid in grids(run, controls=True)
        for member in grid.members
    ]
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
    sides = [[found for row in member.rows if (found := evidence(row, metric))] for member in point.members]
    complete = all(len(side) == member.seeds for side, member in zip(sides, point.members, strict=True))
    if not complete or len({item.key for side in sides for item in side}) != 1:
        return []
    if point.upper is None:
        return sides[0]
    lower, upper = sides
    if len(lower) != len(upper):  # the mean over runs of either side; their spread is then not known
        lower, upper = ([Evidence(side[0].key, averaged([item.figure for item in side]))] for side in sides)
    found = [(low.key, mixed(low.figure, high.figure, point.weight)) for low, high in zip(lower, upper, strict=True)]
    return [Evidence(key, figure) for key, figure in found if figure is not None] if all(f for _, f in found) else []


def _compare(
    one: Point, other: Point | None, metric: Metric, mine: Sequence[Evidence], theirs: Sequence[Evidence], seed: int
) -> Iterator[Comparison]:
    if not (mine and theirs) or mine[0].key != theirs[0].key:
        return
    found = difference([item.figure for item in mine], [item.figure for item in theirs], seed)
    if found is not None:
        yield Comparison(one, other, metric, found)


def write_differences_csv(found: Sequence[Comparison], root: Path = Path(".")) -> None:
    """Write `metrics/differences.csv`: every comparison, whether or not it exceeds noise."""
    rows = []
    for item in found:
        other, seeds = (item.other.name, item.other.seeds) if item.other else (RESIDUAL, None)
        numbers = (item.found.value, item.found.low, item.found.high, item.found.p, item.adjusted)
        values = [item.metric.eval, item.metric.key, *(f"{value:.4g}" for value in numbers)]
        rows.append([item.one.name, other, f"{item.l0:.4g}", *values, item.one.seeds, seeds])
    write_text(root / DIFFERENCES_CSV, csv_text(CSV_COLUMNS, rows))
