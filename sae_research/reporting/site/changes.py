"""What changed between two runs, in sentences: parameters, SAEs, and the metrics whose values differ beyond rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sae_research.reporting.metrics import Metric
from sae_research.reporting.revisions import Snapshot, changed_params, chosen_metrics, only, shared
from sae_research.reporting.rows import Row
from sae_research.runtime.formatting import number, signed

Bounds = tuple[float, float] | None
NAMED = 8
"""Names in one sentence."""


class Change(NamedTuple):
    """A metric whose values changed."""

    label: str
    """As its table is called."""
    says: str
    apart: int
    """SAEs whose two intervals do not overlap."""


class Changes(NamedTuple):
    """What stands in the page's first section."""

    says: list[str]
    metrics: list[Change]
    """Those with intervals apart come first, then the others, both in the tables' order."""


def changes(one: Snapshot, other: Snapshot) -> Changes:
    """What changed from one run to the other."""
    params, gone, new = changed_params(one, other), only(one, other), only(other, one)
    pairs = shared(one, other)
    metrics = measured(one, other)
    compared = [metric for metric in metrics if any(_both(metric, *pair) for pair in pairs)]
    moved = [change for metric in compared if (change := _change(metric, pairs))]
    moved.sort(key=lambda change: not change.apart)
    if not params and not gone and not new and not moved and len(compared) == len(metrics):
        same = f"the same parameters, the same {_count(len(pairs), 'SAE')} and, as the tables round them, the same values"
        return Changes([f"Nothing changed: {same}."], [])
    says = [_params(params), _saes(one, other, gone, new, len(pairs))]
    if compared:
        says.append(_values(moved, len(compared)))
    back = [(there, here) for here, there in pairs]
    says += filter(None, (_alone(one.name, metrics, pairs), _alone(other.name, metrics, back)))
    return Changes(says, moved)


def measured(one: Snapshot, other: Snapshot) -> list[Metric]:
    """Every metric of either run; those of the report's first table come first."""
    runs = (one.run, other.run)
    evals = dict.fromkeys(
        name for run in runs for row in run.rows for name, found in row.evals.items() if found.get("metrics")
    )
    found = [metric for run in runs for metric in chosen_metrics(run)]
    for name in evals:
        for run in runs:
            if any(row.evals.get(name, {}).get("metrics") for row in run.rows):
                found += chosen_metrics(run, (), name)
    return list({(metric.key, metric.eval): metric for metric in found}.values())


def apart(one: Bounds, other: Bounds) -> bool:
    """Whether two intervals are known and do not overlap."""
    return one is not None and other is not None and (one[1] < other[0] or other[1] < one[0])


def _values_of(metric: Metric, pair: tuple[Row, Row]) -> tuple[float | None, float | None]:
    here, there = pair
    return here.value(metric.key, metric.eval), there.value(metric.key, metric.eval)


def _both(metric: Metric, here: Row, there: Row) -> bool:
    return None not in _values_of(metric, (here, there))


def _change(metric: Metric, pairs: Sequence[tuple[Row, Row]]) -> Change | None:
    """What a metric's values did; None where every SAE's two are the same as the tables round them."""
    values = [(pair, *_values_of(metric, pair)) for pair in pairs]
    known = [(pair, before, after) for pair, before, after in values if before is not None and after is not None]
    changed = [(pair, before, after) for pair, before, after in known if number(before) != number(after)]
    if not changed:
        return None
    distant = [
        here.name
        for (here, there), _, _ in changed
        if apart(here.interval(metric.key, metric.eval), there.interval(metric.key, metric.eval))
    ]
    (here, _), before, after = max(changed, key=lambda each: abs(each[2] - each[1]))
    says = f"changed in {len(changed)} of {_count(len(known), 'SAE')}, most in {here.name}: "
    says += f"{number(before)} → {number(after)} ({signed(after - before)})"
    if distant:
        says += f"; the two intervals are apart in {_listed(distant)}"
    return Change(metric.full_label + metric.arrow, f"{says}.", len(distant))


# --- sentences -----------------------------------------------------------------------------------


def _params(params: Sequence[tuple[str, str, str]]) -> str:
    if not params:
        return "No parameter differs."
    names = _listed([key for key, _, _ in params])
    return f"{_count(len(params), 'parameter')} {'differs' if len(params) == 1 else 'differ'}: {names}."


def _saes(one: Snapshot, other: Snapshot, gone: Sequence[str], new: Sequence[str], both: int) -> str:
    if not gone and not new:
        return f"Both hold the same {_count(both, 'SAE')}."
    says = [f"{_count(both, 'SAE')} of the same name {'is' if both == 1 else 'are'} in both."]
    for where, names in ((other, new), (one, gone)):
        if names:
            says.append(f"Only in {where.name}, {_count(len(names), 'SAE')}: {_listed(names)}.")
    return " ".join(says)


def _values(moved: Sequence[Change], compared: int) -> str:
    if not moved:
        return f"No value changed beyond rounding, in any of {_count(compared, 'metric')} that both hold."
    says = f"Values changed beyond rounding in {len(moved)} of {_count(compared, 'metric')} that both hold"
    distant = [change.label for change in moved if change.apart]
    if distant:
        return f"{says}; so far that an SAE's two intervals are apart in {len(distant)}: {_listed(distant)}."
    return f"{says}; nowhere so far that an SAE's two intervals are apart."


def _alone(name: str, metrics: Sequence[Metric], pairs: Sequence[tuple[Row, Row]]) -> str:
    """Which metrics the first SAEs of the pairs have, and the second ones have not."""
    labels = []
    for metric in metrics:
        values = [_values_of(metric, pair) for pair in pairs]
        if any(here is not None for here, _ in values) and all(there is None for _, there in values):
            labels.append(metric.full_label)
    return f"Measured in {name} alone: {_listed(labels)}." if labels else ""


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
