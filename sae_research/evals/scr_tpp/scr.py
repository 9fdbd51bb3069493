"""Spurious correlation removal: does ablating an attribute's latents make a biased probe read the other attribute?

A probe is trained on texts where two attributes always agree. Ablating the latents that matter to a probe of one
attribute should leave it reading the other: the score is the share of the lost accuracy that comes back. Direction 1
ablates the second attribute and reads the first, direction 2 the other way round.
Source: arXiv 2411.18895 and SAE Bench 0.6.0, sae_bench/evals/scr_and_tpp/main.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.evals.probes import Draw, ProbeTask
from sae_research.evals.scr_tpp.ablation import Definition, View, ablated_logits, effects, strongest
from sae_research.intervals import Ratio, interval
from sae_research.text.crossed_tasks import CELLS, Cells, CrossedTask

FIRST, SECOND, BIASED = 0, 1, 2
"""Order of a task's probes."""
MIN_GAP = 0.001
"""Least accuracy that the bias must cost for there to be something to give back (SAE Bench's bound)."""

Metrics = dict[str, float]


class ScrTask(NamedTuple):
    """One two-attribute task as rows of the pool of texts."""

    name: str
    probes: tuple[ProbeTask, ProbeTask, ProbeTask]
    """Of the first attribute, of the second, and the biased one. The first two meet the same rows in one order."""
    strata: tuple[int, ...]
    """How many of those test rows each cell gives, in order."""
    disagree: Draw
    """Training texts where the attributes disagree, which the biased probe has never met, labelled by the first."""


class Direction(NamedTuple):
    """Which test texts are read correctly."""

    clean: Tensor
    """By the attribute's own probe [texts]."""
    biased: Tensor
    """By the biased probe [texts]."""
    ablated: Tensor
    """By the biased probe after each ablation [thresholds, texts]."""
    count: list[int]
    """Latents ablated at each threshold."""

    @property
    def gap(self) -> float:
        return float(self.clean.mean() - self.biased.mean())


def scr_task(task: CrossedTask, row_of: dict[str, int]) -> ScrTask:
    """A task's probes. Half of each cell where the attributes agree goes into the balanced data, as in SAE Bench."""
    train, test = ({cell: torch.tensor([row_of[text] for text in part[cell]]) for cell in CELLS}
                   for part in (task.train, task.test))
    probes = [ProbeTask(*(_balanced(part, attribute) for part in (train, test))) for attribute in (0, 1)]
    biased = ProbeTask(*(_labelled([part[0, 0], part[1, 1]], [1, 0]) for part in (train, test)))
    return ScrTask(task.name, (probes[0], probes[1], biased), tuple(_quarter(task.test, cell) for cell in CELLS),
                   _labelled([train[0, 1], train[1, 0]], [1, 0]))


def _quarter(cells: Cells | dict[tuple[int, int], Tensor], cell: tuple[int, int]) -> int:
    return len(cells[cell]) // (2 if cell[0] == cell[1] else 1)


def _balanced(rows: dict[tuple[int, int], Tensor], attribute: int) -> Draw:
    """Equally many texts of every cell, labelled 1 where `attribute` has its first value."""
    return _labelled([rows[cell][:_quarter(rows, cell)] for cell in CELLS], [1 - cell[attribute] for cell in CELLS])


def _labelled(rows: Sequence[Tensor], labels: Sequence[int]) -> Draw:
    return Draw(torch.cat(list(rows)), torch.cat([torch.full((len(part),), float(label))
                                                  for part, label in zip(rows, labels, strict=True)]))


# --- outcomes --------------------------------------------------------------------------------

def directions(task: ScrTask, view: View, thresholds: Sequence[int], definition: Definition) -> tuple[Direction, Direction]:
    """Both directions' outcomes at every threshold."""
    return (_direction(task, view, FIRST, SECOND, thresholds, definition),
            _direction(task, view, SECOND, FIRST, thresholds, definition))


def _direction(task: ScrTask, view: View, read: int, ablate: int, thresholds: Sequence[int],
               definition: Definition) -> Direction:
    effect = effects(view, task.probes[ablate].train, ablate, "scr", definition)
    chosen = [strongest(effect, n, definition) for n in thresholds]
    rows, labels = task.probes[read].test
    logits = ablated_logits(view, rows, chosen)
    return Direction(_correct(view.logits[rows, read], labels), _correct(view.logits[rows, BIASED], labels),
                     _correct(logits[:, :, BIASED], labels), [len(latents) for latents in chosen])


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return ((logits > 0) == (labels > 0)).double()


# --- SAE Bench's definition ------------------------------------------------------------------

def sae_bench_metrics(both: tuple[Direction, Direction], thresholds: Sequence[int]) -> Metrics:
    """SAE Bench's figures of one task: 0 where there is no gap; no `scr_metric` at all where the biased probe reads
    both attributes equally well, because neither direction is then the neglected one."""
    metrics: Metrics = {}
    accuracy = [float(direction.biased.mean()) for direction in both]
    for number, direction in enumerate(both, start=1):
        for n, score in zip(thresholds, _scores(direction), strict=True):
            metrics[f"scr_dir{number}_threshold_{n}"] = score
            if accuracy[number - 1] < accuracy[2 - number]:
                metrics[f"scr_metric_threshold_{n}"] = score
    return metrics


def _scores(direction: Direction) -> list[float]:
    if direction.gap < MIN_GAP:
        return [0.0] * len(direction.ablated)
    return ((direction.ablated.mean(dim=1) - direction.biased.mean()) / direction.gap).tolist()


# --- ours ------------------------------------------------------------------------------------

class LabTask(NamedTuple):
    """One task's outcomes with what ours needs of them."""

    task: ScrTask
    both: tuple[Direction, Direction]
    neglected: tuple[int, ...]
    """Which direction `scr_metric` takes; both where the biased probe favours neither attribute."""


def lab_task(task: ScrTask, view: View, both: tuple[Direction, Direction]) -> LabTask:
    """The neglected attribute is told on training texts, so that no test text chooses the figure: where the attributes
    disagree the biased probe reads one of them, and the score is the other's."""
    reads_first = float(_correct(view.logits[task.disagree.rows, BIASED], task.disagree.labels).mean())
    neglected = (0, 1) if reads_first == 0.5 else (0,) if reads_first < 0.5 else (1,)
    return LabTask(task, both, neglected)


def lab_metrics(tasks: Sequence[LabTask], thresholds: Sequence[int], seed: int) -> tuple[Metrics, dict[str, list[float]]]:
    """(figures over all tasks, their intervals): accuracy given back, summed over tasks, over accuracy lost.

    Summing before dividing keeps a task whose bias costs next to nothing from deciding the figure. A direction whose
    gap is below `MIN_GAP` has nothing to give back and is left out; where all are, there is no figure.
    """
    metrics: Metrics = {}
    intervals: dict[str, list[float]] = {}
    wanted = {"scr_dir1": lambda entry: (0,), "scr_dir2": lambda entry: (1,), "scr_metric": lambda entry: entry.neglected}
    for prefix, which in wanted.items():
        used = [entry for entry in tasks if any(entry.both[number].gap >= MIN_GAP for number in which(entry))]
        parts = [_given_and_lost(entry, which(entry)) for entry in used]
        strata = np.repeat(np.arange(len(used) * len(CELLS)), [size for entry in used for size in entry.task.strata])
        for column, n in enumerate(thresholds if used else ()):
            figure = Ratio(np.concatenate([given[column] for given, _ in parts]),
                           np.concatenate([lost for _, lost in parts]), strata)
            metrics[f"{prefix}_threshold_{n}"] = figure.value
            bounds = interval(figure, seed)
            if bounds is not None:
                intervals[f"{prefix}_threshold_{n}"] = list(bounds)
    return metrics, intervals


def _given_and_lost(entry: LabTask, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """What each test text adds to the accuracy given back [thresholds, texts] and lost [texts] in one task."""
    used = [entry.both[number] for number in numbers if entry.both[number].gap >= MIN_GAP]
    given = sum((direction.ablated - direction.biased).numpy() for direction in used)
    lost = sum((direction.clean - direction.biased).numpy() for direction in used)
    share = sum(entry.task.strata) * len(numbers)
    return given / share, lost / share


def lab_details(entry: LabTask, thresholds: Sequence[int]) -> dict[str, Any]:
    """One task's accuracies and scores."""
    details: dict[str, Any] = {"direction": [number + 1 for number in entry.neglected]}
    for number, direction in enumerate(entry.both):
        read = ("first", "second")[number]
        details |= {f"{read}_clean_accuracy": float(direction.clean.mean()),
                    f"{read}_biased_accuracy": float(direction.biased.mean()),
                    f"{read}_ablated_accuracy": dict(zip(map(str, thresholds), direction.ablated.mean(dim=1).tolist(),
                                                         strict=True)),
                    f"{read}_latents_ablated": dict(zip(map(str, thresholds), direction.count, strict=True))}
        if direction.gap >= MIN_GAP:
            details |= {f"scr_dir{number + 1}_threshold_{n}": score
                        for n, score in zip(thresholds, _scores(direction), strict=True)}
    return details
