"""Architectures at equal L0: figures between the measured points of a sparsity grid, and areas under Pareto curves.

Between two measured points a figure is linear in log L0. Outside a grid's points nothing is said.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from sae_research.reporting.metrics import Metric, headline
from sae_research.reporting.run import Run
from sae_research.reporting.seeds import Contender, contenders

STEPS = 256
"""Steps of the area's trapezoids over log L0, besides the measured points."""

Curve = list[tuple[float, float]]
"""(L0, figure), ascending in L0."""


@dataclass(frozen=True)
class Grid:
    """The SAEs of one architecture over one dictionary size (or base), at several L0."""

    label: str
    group: str
    members: tuple[Contender, ...]

    def curve(self, metric: Metric) -> Curve:
        """Measured points; several at one L0 count as their mean."""
        by_l0: dict[float, list[float]] = {}
        for member in self.members:
            x, y = member.mean(headline("l0")), member.mean(metric)
            if x is not None and x > 0 and y is not None:
                by_l0.setdefault(x, []).append(y)
        return [(x, fmean(by_l0[x])) for x in sorted(by_l0)]


def grids(run: Run) -> list[Grid]:
    """All architectures but controls, interpolating rows left out, several seeds of a recipe as one point."""
    groups: dict[tuple[object, ...], list[Contender]] = {}
    for contender in contenders(row for row in run.rows if not row.interpolating and not row.is_control):
        row = contender.rows[0]
        place = row.group, row.cfg.get("base"), row.cfg.get("d_sae"), row.cfg.get("hook_name")
        groups.setdefault(place, []).append(contender)
    times = Counter(place[0] for place in groups)
    return [Grid(str(place[0]) if times[place[0]] == 1 else _distinct(place), str(place[0]), tuple(members))
            for place, members in groups.items()]


def _distinct(place: tuple[object, ...]) -> str:
    group, base, d_sae, hook = place
    return f"{group} ({', '.join(str(part) for part in (base, d_sae, hook) if part is not None)})"


def at(curve: Curve, l0: float) -> float | None:
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


def common_l0(curves: Sequence[Curve]) -> list[float]:
    """Powers of two that lie on at least one curve of two points or more."""
    wide = [curve for curve in curves if len(curve) > 1]
    if not wide:
        return []
    low, high = min(curve[0][0] for curve in wide), max(curve[-1][0] for curve in wide)
    powers = (2.0**exponent for exponent in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1))
    return [power for power in powers if any(at(curve, power) is not None for curve in wide)]


def common_range(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """The L0 that all curves of two points or more cover; None where they have no stretch in common."""
    wide = [curve for curve in curves if len(curve) > 1]
    if not wide:
        return None
    low, high = max(curve[0][0] for curve in wide), min(curve[-1][0] for curve in wide)
    return (low, high) if low < high else None


def pareto(curve: Curve, better: str) -> Curve:
    """The best figure at no higher an L0, along the curve: what spending up to that much L0 buys."""
    best = max if better == "higher" else min
    front: Curve = []
    for x, y in curve:
        front.append((x, best(y, front[-1][1]) if front else y))
    return front


def area(curve: Curve, better: str, low: float, high: float) -> float:
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
