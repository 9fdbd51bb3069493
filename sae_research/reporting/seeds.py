"""Several training seeds of one recipe: which rows they are, their mean and their spread."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sae_research.reporting.metrics import Metric
from sae_research.reporting.run import Row

SEEDS_FOR_A_CLAIM = 3
"""Fewest training seeds on both sides before one recipe is called better than another."""


@dataclass(frozen=True)
class Contender:
    """One recipe with all its training runs, or one SAE that stands alone."""

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
        """The figure of every run that has it."""
        found = (row.value(metric.key, metric.eval) for row in self.rows)
        return [value for value in found if value is not None]

    def mean(self, metric: Metric) -> float | None:
        """Mean over its runs; None unless every run has the figure."""
        values = self.values(metric)
        return statistics.fmean(values) if len(values) == self.seeds else None

    def spread(self, metric: Metric) -> float | None:
        """Standard deviation between its runs; None for a single one."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) == self.seeds > 1 else None


def contenders(rows: Iterable[Row]) -> list[Contender]:
    """Rows with one `recipe_id` as one contender, every other row by itself, in table order.

    The same weights under two names are one run, not two seeds.
    """
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        weights = row.cfg.get("weights_fingerprint") or row.name
        groups.setdefault(row.recipe or f"the row {row.name}", {}).setdefault(weights, row)
    return [Contender(_name(tuple(runs.values())), tuple(runs.values())) for runs in groups.values()]


def recipes(rows: Iterable[Row]) -> list[Contender]:
    """The contenders that several seeds stand behind."""
    return [contender for contender in contenders(rows) if contender.seeds > 1]


def _name(rows: Sequence[Row]) -> str:
    """`topk_seed1`, `topk_seed2` -> `topk`."""
    if len(rows) == 1:
        return rows[0].name
    shared = os.path.commonprefix([row.name for row in rows])
    return re.sub(r"_*(seed|s)?_*\d*_*$", "", shared) or rows[0].name


def seed_lines(rows: Iterable[Row], metrics: Sequence[Metric], shown: Callable[[float | None], str]) -> list[list[str]]:
    """One line a recipe: its name, its SAEs, then mean ± standard deviation of every metric."""
    lines = []
    for recipe in recipes(rows):
        cells = [f"{shown(recipe.mean(metric))} ± {shown(recipe.spread(metric))}"
                 if recipe.mean(metric) is not None else shown(None) for metric in metrics]
        lines.append([f"`{recipe.name}`", ", ".join(f"`{row.name}`" for row in recipe.rows), *cells])
    return lines
