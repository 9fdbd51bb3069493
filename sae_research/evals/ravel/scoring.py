"""What the answers to patched prompts add up to: cause, isolation, disentanglement, and how sure they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sae_research.evals.ravel.answers import right, right_sae_bench
from sae_research.evals.ravel.known import Known
from sae_research.evals.ravel.pairs import Pair, Task, seems_isolation
from sae_research.intervals import Ratio, interval, ratio, stored
from sae_research.store import fingerprint

KINDS = ("cause", "isolation")
CLUSTERS = "entities"


class Scores(NamedTuple):
    """Fractions of pairs."""

    cause: float
    """Of cause pairs: the patched model says the source's value."""
    isolation: float
    """Of isolation pairs: it still says the base's value."""

    @property
    def disentanglement(self) -> float:
        return (self.cause + self.isolation) / 2


def sae_bench_scores(known: Sequence[Known], pairs: Sequence[Pair], answers: Sequence[str]) -> Scores:
    """SAE Bench's, its way of telling the kinds of pairs and of comparing answers included."""
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for pair, answer in zip(pairs, answers, strict=True):
        hit = right_sae_bench(known[pair.base].prompt.text, known[pair.target].prompt.label, answer)
        hits[not seems_isolation(known, pair)].append(hit)
    return Scores(*(sum(hits[kind]) / len(hits[kind]) for kind in (True, False)))


def mean_scores(by_task: Mapping[str, Scores], tasks: Sequence[Task]) -> Scores:
    """The mean over a class's attributes, then over classes, as in SAE Bench."""
    classes = dict.fromkeys(task.entity_class for task in tasks)
    means = [np.mean([by_task[task.name] for task in tasks if task.entity_class == name], axis=0) for name in classes]
    return Scores(*(float(x) for x in np.mean(means, axis=0)))


class Outcomes:
    """Right answers to the held-out pairs, by task, kind and base entity: an entity's pairs vary together."""

    def __init__(self, known: Sequence[Known], tasks: Sequence[Task], answers: Mapping[str, Sequence[str]]) -> None:
        self.tasks = tasks
        self.entities = sorted({_base(known, pair) for task in tasks for pair in task.lab.test})
        """(class, entity) of every column."""
        classes = sorted({entity_class for entity_class, _ in self.entities})
        self.strata = [classes.index(entity_class) for entity_class, _ in self.entities]
        column = {entity: i for i, entity in enumerate(self.entities)}
        self.right, self.pairs = (np.zeros((len(tasks), len(KINDS), len(column))) for _ in range(2))
        for row, task in enumerate(tasks):
            for pair, answer in zip(task.lab.test, answers[task.name], strict=True):
                where = row, int(not pair.cause), column[_base(known, pair)]
                self.right[where] += right(known[pair.target].prompt.label, answer)
                self.pairs[where] += 1
        self.key = fingerprint([[task.name, [[known[row].prompt.text for row in pair[:2]] for pair in task.lab.test]]
                                for task in tasks])[:16]

    def scores(self) -> dict[str, Scores]:
        """By task."""
        shares = self.right.sum(-1) / self.pairs.sum(-1)
        return {task.name: Scores(*map(float, shares[row])) for row, task in enumerate(self.tasks)}

    def figures(self, only: Task | None = None) -> dict[str, Ratio]:
        """Cause, isolation and disentanglement of all tasks (`mean_scores`), or of one, as ratios of sums over entities.

        A mean of fractions is a ratio of sums once every pair weighs one over the pairs of its task and kind.
        """
        sizes: dict[str, int] = {}
        for task in self.tasks:
            sizes[task.entity_class] = sizes.get(task.entity_class, 0) + 1
        share = [float(only is None or task is only) / sizes[task.entity_class] for task in self.tasks]
        weight = np.asarray(share)[:, None, None] / self.pairs.sum(-1, keepdims=True)
        parts = {"cause": slice(0, 1), "isolation": slice(1, 2), "disentanglement": slice(0, 2)}
        return {key: Ratio((weight * self.right)[:, kinds].sum((0, 1)), (weight * self.pairs)[:, kinds].sum((0, 1)),
                           np.asarray(self.strata)) for key, kinds in parts.items()}

    def evidence(self, seed: int) -> dict[str, Any]:
        """What `lab_v1` holds on how sure its figures are: intervals, and the sums by entity behind them."""
        figures = self.figures()
        return {"intervals": bounds(figures, seed),
                "clusters": {CLUSTERS: {"level": "entity", "clusters": len(self.entities), "strata": self.strata,
                                        "key": self.key}},
                "cluster_sums": {key: stored(figure, CLUSTERS) for key, figure in figures.items()}}


def bounds(figures: Mapping[str, Ratio], seed: int) -> dict[str, list[float]]:
    """Intervals of those figures that rest on enough entities."""
    # entities without a pair of some kind say nothing of it, and are not drawn
    found = {key: interval(ratio(one.numerator, one.denominator, one.strata), seed) for key, one in figures.items()}
    return {key: list(limits) for key, limits in found.items() if limits is not None}


def _base(known: Sequence[Known], pair: Pair) -> tuple[str, str]:
    prompt = known[pair.base].prompt
    return prompt.entity_class, prompt.entity
