"""Which differences between SAEs exceed noise: paired on the same text, clustered, corrected for all comparisons at once.

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

from sae_research.intervals import Difference, Ratio, accuracy, difference, holm, ratio
from sae_research.reporting.metrics import EVAL_NOTES, EVALS, Metric, headline, metric_named, residual_key, sort_keys
from sae_research.reporting.run import Row, Run
from sae_research.reporting.seeds import SEEDS_FOR_A_CLAIM, Contender, contenders
from sae_research.store import write_text

LEVEL = 0.05
COMPARABLE = 1.5
"""Two SAEs are compared where the larger L0 is at most this many times the smaller."""
RESIDUAL = "raw residual stream"
DIFFERENCES_CSV = Path("metrics/differences.csv")
CSV_COLUMNS = ("one", "other", "eval", "metric", "difference", "low", "high", "p", "p_holm", "seeds_one", "seeds_other")


class Evidence(NamedTuple):
    """A figure as a ratio of sums over clusters. Equal keys mean equal clusters, which makes a comparison paired."""

    key: str
    figure: Ratio


@dataclass(frozen=True)
class Comparison:
    """Two contenders in one metric."""

    one: Contender
    other: Contender | None
    """None for the raw residual stream."""
    metric: Metric
    found: Difference
    adjusted: float = 1.0
    """p after Holm's correction over all tests of the report."""

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
    return None if correct is None else Evidence(outcomes["key"], accuracy(outcomes["asked"], correct))


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


def _uncorrected(run: Run) -> Iterator[Comparison]:
    rivals = [rival for rival in contenders(run.rows) if not rival.interpolating]
    for metric in tested_metrics(run):
        sides = [(rival, _all_evidence(rival, metric)) for rival in rivals]
        seed = int(run.evals[metric.eval].get("notes", {}).get("random_seed", 0))
        for (one, mine), (other, theirs) in combinations(sides, 2):
            if _comparable(one, other):
                yield from _compare(one, other, metric, mine, theirs, seed)
        reference = residual_key(metric.key) if metric.eval == "sparse_probing" else None
        if reference is not None:
            for rival, mine in sides:
                raw = None if rival.is_control else evidence(rival.rows[0], headline(reference))
                yield from _compare(rival, None, metric, mine, [raw] if raw else [], seed)


def _comparable(one: Contender, other: Contender) -> bool:
    """Not two controls, and of like L0: at another price another figure is no surprise."""
    prices = [contender.mean(headline("l0")) for contender in (one, other)]
    if one.is_control and other.is_control or any(price is None or price <= 0 for price in prices):
        return False
    return max(prices) <= COMPARABLE * min(prices)


def _all_evidence(contender: Contender, metric: Metric) -> list[Evidence]:
    """Of every run; empty unless all have it on the same clusters."""
    found = [evidence(row, metric) for row in contender.rows]
    return found if None not in found and len({item.key for item in found}) == 1 else []


def _compare(one: Contender, other: Contender | None, metric: Metric, mine: Sequence[Evidence],
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
        writer.writerow([item.one.name, item.other.name if item.other else RESIDUAL, item.metric.eval, item.metric.key,
                         *(f"{value:.4g}" for value in numbers), item.one.seeds, item.other.seeds if item.other else ""])
    write_text(root / DIFFERENCES_CSV, buffer.getvalue())
