"""Architectures at equal L0: figures between the measured points of a sparsity grid, and areas under Pareto curves.

Between two measured points a figure is linear in log L0. Outside a grid's points nothing is said.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from sae_research.reporting.metrics import Metric, headline
from sae_research.reporting.run import Run
from sae_research.reporting.seeds import Contender, contenders

SAME = 1.02
"""Two L0 are equal where the larger is at most this many times the smaller."""
STEPS = 256
"""Steps of the area's trapezoids over log L0, besides the measured points."""

Points = list[tuple[float, float]]
"""(L0, figure), ascending in L0."""


@dataclass(frozen=True)
class Grid:
    """The SAEs of one architecture over one dictionary size (or base), at several L0."""

    label: str
    group: str
    members: tuple[Contender, ...]

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
    groups: dict[tuple[object, ...], list[Contender]] = {}
    for contender in contenders(row for row in run.rows if not row.interpolating and (controls or not row.is_control)):
        row = contender.rows[0]
        width = None if row.is_control else row.cfg.get("d_sae")  # as many as it has components, where it is linear
        place = row.kind, row.cfg.get("base"), width, row.cfg.get("hook_name")
        groups.setdefault(place, []).append(contender)
    times = Counter(place[0] for place in groups)
    return [Grid(str(place[0]) if times[place[0]] == 1 else _distinct(place), members[0].rows[0].group, tuple(members))
            for place, members in groups.items()]


def _distinct(place: tuple[object, ...]) -> str:
    group, base, d_sae, hook = place
    return f"{group} ({', '.join(str(part) for part in (base, d_sae, hook) if part is not None)})"


@dataclass(frozen=True)
class Point:
    """A grid at one L0: a measured point, or between the two beside it."""

    grid: Grid
    l0: float
    lower: Contender
    upper: Contender | None = None
    """None at a measured point."""
    weight: float = 0.0
    """Share of `upper`, linear in log L0."""

    @property
    def members(self) -> tuple[Contender, ...]:
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
    measured = sorted(((x, member) for member in grid.members if (x := member.mean(headline("l0"))) is not None and x > 0),
                      key=lambda pair: pair[0])
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
    return [(one, other) for one, other in combinations(placed, 2)
            if max(one.l0, other.l0) <= SAME * min(one.l0, other.l0)]


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
    """The figure at an L0, linear in log L0 between the points beside it; None outside the measured range.

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
    """The best figure at no higher an L0, along the curve: what spending up to that much L0 buys."""
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
    front = pareto([*before, *((x, at(curve, x)) for x in places)], better)[len(before):]
    total = sum((y0 + y1) / 2 * math.log(x1 / x0) for (x0, y0), (x1, y1) in zip(front, front[1:], strict=False))
    return total / math.log(high / low)
