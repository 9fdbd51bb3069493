"""Scores of SCR and TPP from what probes read before and after ablation.

Spurious correlation removal: a probe is trained on texts where two attributes always agree. Ablating the latents that matter
to a probe of one attribute should leave it reading the other: the score is the share of the lost accuracy that comes back.
Direction 1 ablates the second attribute and reads the first, direction 2 the other way round.

Targeted probe perturbation: every class has a probe against the others. Ablating the latents of one class should cost its
probe accuracy (the intended effect) and the other probes none (the unintended effect); the score is the difference.

Source of both: arXiv 2411.18895 and SAE Bench 0.6.0, sae_bench/evals/scr_and_tpp/main.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.evals.probing import Draw, ProbeTask, draw
from sae_research.evals.scr_tpp.ablation import Definition, View, ablated_logits, effects, strongest
from sae_research.stats.intervals import Ratio, interval
from sae_research.text.crossed_tasks import CELLS, Cells, CrossedTask
from sae_research.text.tasks import Task

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
    train, test = (
        {cell: torch.tensor([row_of[text] for text in part[cell]]) for cell in CELLS} for part in (task.train, task.test)
    )
    probes = [ProbeTask(*(_balanced(part, attribute) for part in (train, test))) for attribute in (0, 1)]
    biased = ProbeTask(*(_labelled([part[0, 0], part[1, 1]], [1, 0]) for part in (train, test)))
    return ScrTask(
        task.name,
        (probes[0], probes[1], biased),
        tuple(_quarter(task.test, cell) for cell in CELLS),
        _labelled([train[0, 1], train[1, 0]], [1, 0]),
    )


def _quarter(cells: Cells | dict[tuple[int, int], Tensor], cell: tuple[int, int]) -> int:
    return len(cells[cell]) // (2 if cell[0] == cell[1] else 1)


def _balanced(rows: dict[tuple[int, int], Tensor], attribute: int) -> Draw:
    """Equally many texts of every cell, labelled 1 where `attribute` has its first value."""
    return _labelled([rows[cell][: _quarter(rows, cell)] for cell in CELLS], [1 - cell[attribute] for cell in CELLS])


def _labelled(rows: Sequence[Tensor], labels: Sequence[int]) -> Draw:
    return Draw(
        torch.cat(list(rows)),
        torch.cat([torch.full((len(part),), float(label)) for part, label in zip(rows, labels, strict=True)]),
    )


# --- outcomes --------------------------------------------------------------------------------


def directions(task: ScrTask, view: View, thresholds: Sequence[int], definition: Definition) -> tuple[Direction, Direction]:
    """Both directions' outcomes at every threshold."""
    return (
        _direction(task, view, FIRST, SECOND, thresholds, definition),
        _direction(task, view, SECOND, FIRST, thresholds, definition),
    )


def _direction(
    task: ScrTask, view: View, read: int, ablate: int, thresholds: Sequence[int], definition: Definition
) -> Direction:
    effect = effects(view, task.probes[ablate].train, ablate, "scr", definition)
    chosen = [strongest(effect, n, definition) for n in thresholds]
    rows, labels = task.probes[read].test
    logits = ablated_logits(view, rows, chosen)
    return Direction(
        _correct(view.logits[rows, read], labels),
        _correct(view.logits[rows, BIASED], labels),
        _correct(logits[:, :, BIASED], labels),
        [len(latents) for latents in chosen],
    )


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return ((logits > 0) == (labels > 0)).double()


# --- SAE Bench's definition ------------------------------------------------------------------


def sae_bench_metrics(both: tuple[Direction, Direction], thresholds: Sequence[int]) -> Metrics:
    """SAE Bench's metrics of one task: 0 where there is no gap; no `scr_metric` at all where the biased probe reads
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
    """The neglected attribute is told on training texts, so that no test text has a part in the choice: where the attributes
    disagree the biased probe reads one of them, and the score is the other's."""
    reads_first = float(_correct(view.logits[task.disagree.rows, BIASED], task.disagree.labels).mean())
    neglected = (0, 1) if reads_first == 0.5 else (0,) if reads_first < 0.5 else (1,)
    return LabTask(task, both, neglected)


def lab_metrics(tasks: Sequence[LabTask], thresholds: Sequence[int], seed: int) -> tuple[Metrics, dict[str, list[float]]]:
    """(metrics over all tasks, their intervals): accuracy given back, summed over tasks, over accuracy lost.

    Summing before dividing keeps a task whose bias costs next to nothing from deciding the metric. A direction whose
    gap is below `MIN_GAP` has nothing to give back and is left out; where all are, there is no metric.
    """
    metrics: Metrics = {}
    intervals: dict[str, list[float]] = {}
    wanted = {"scr_dir1": lambda entry: (0,), "scr_dir2": lambda entry: (1,), "scr_metric": lambda entry: entry.neglected}
    for prefix, which in wanted.items():
        used = [entry for entry in tasks if any(entry.both[number].gap >= MIN_GAP for number in which(entry))]
        parts = [_given_and_lost(entry, which(entry)) for entry in used]
        strata = np.repeat(np.arange(len(used) * len(CELLS)), [size for entry in used for size in entry.task.strata])
        for column, n in enumerate(thresholds if used else ()):
            figure = Ratio(
                np.concatenate([given[column] for given, _ in parts]), np.concatenate([lost for _, lost in parts]), strata
            )
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
        details |= {
            f"{read}_clean_accuracy": float(direction.clean.mean()),
            f"{read}_biased_accuracy": float(direction.biased.mean()),
            f"{read}_ablated_accuracy": dict(zip(map(str, thresholds), direction.ablated.mean(dim=1).tolist(), strict=True)),
            f"{read}_latents_ablated": dict(zip(map(str, thresholds), direction.count, strict=True)),
        }
        if direction.gap >= MIN_GAP:
            details |= {
                f"scr_dir{number + 1}_threshold_{n}": score for n, score in zip(thresholds, _scores(direction), strict=True)
            }
    return details


MIN_CLASSES = 3
"""The two probes of a two-class task mirror each other: what one loses the other loses."""
KINDS = ("total_metric", "intended_diff_only", "unintended_diff_only")


class TppTask(NamedTuple):
    """One task's probes by class, and all its test texts as rows of the pool of texts, by class."""

    name: str
    probes: dict[str, ProbeTask]
    test_rows: dict[str, Tensor]


class Outcomes(NamedTuple):
    """How often each probe reads its test texts correctly, before and after ablating each class's latents."""

    clean: list[Tensor]
    """Per probe: which of its test texts are read correctly [texts]."""
    ablated: list[list[Tensor]]
    """Per ablated class and per probe [thresholds, texts]."""
    count: list[list[int]]
    """Latents ablated, per ablated class and threshold."""


def tpp_task(task: Task, row_of: dict[str, int], seed: int) -> TppTask:
    """Probes over the draws of sparse probing: all texts of a class, and as many of the others."""
    rows = {
        split: {label: torch.tensor([row_of[text] for text in texts]) for label, texts in part.items()}
        for split, part in (("train", task.train), ("test", task.test))
    }
    probes = {
        label: ProbeTask(*(draw(rows[split], label, seed, split) for split in ("train", "test"))) for label in task.train
    }
    return TppTask(task.name, probes, rows["test"])


def outcomes(task: TppTask, view: View, thresholds: Sequence[int], definition: Definition) -> Outcomes:
    """Every probe's answers under every ablation."""
    probes = list(task.probes.values())
    chosen = []
    for number, probe in enumerate(probes):
        effect = effects(view, probe.train, number, "tpp", definition)
        chosen.append([strongest(effect, n, definition) for n in thresholds])
    rows, own = torch.cat(list(task.test_rows.values())), [torch.from_numpy(place) for place in _places(task)]
    clean = [_class_correct(view.logits[probe.test.rows, number], probe.test) for number, probe in enumerate(probes)]
    ablated = []
    for sets in chosen:
        logits = ablated_logits(view, rows, sets)
        ablated.append([_class_correct(logits[:, own[number], number], probe.test) for number, probe in enumerate(probes)])
    return Outcomes(clean, ablated, [[len(latents) for latents in sets] for sets in chosen])


def _class_correct(logits: Tensor, test: Draw) -> Tensor:
    return ((logits > 0) == (test.labels > 0)).double()


# --- figures ---------------------------------------------------------------------------------


def class_metrics(task: TppTask, found: Outcomes, thresholds: Sequence[int]) -> dict[str, Metrics]:
    """class -> metrics when its latents are ablated, with SAE Bench's names."""
    drops = [
        [
            float(found.clean[probe].mean()) - found.ablated[target][probe].mean(dim=1).numpy()
            for probe in range(len(task.probes))
        ]
        for target in range(len(task.probes))
    ]
    return {label: _named(_kinds(target, drops[target]), thresholds) for target, label in enumerate(task.probes)}


def _kinds(target: int, drops: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Total, intended and unintended loss of accuracy, from every probe's loss when `target` is ablated."""
    intended = drops[target]
    unintended = sum(drop for probe, drop in enumerate(drops) if probe != target) / (len(drops) - 1)
    return intended - unintended, intended, unintended  # ty: ignore[invalid-explicit-return]


def _named(kinds: Sequence[np.ndarray], thresholds: Sequence[int]) -> Metrics:
    return {
        f"tpp_threshold_{n}_{kind}": float(values[i])
        for i, n in enumerate(thresholds)
        for kind, values in zip(KINDS, kinds, strict=True)
    }


def mean_metrics(each: Sequence[Metrics]) -> Metrics:
    """The mean of every metric over classes or tasks."""
    return {key: sum(values[key] for values in each) / len(each) for key in each[0]}


def intervals(tasks: Sequence[tuple[TppTask, Outcomes]], thresholds: Sequence[int], seed: int) -> dict[str, list[float]]:
    """Of the mean over tasks. Test texts are drawn within their task and class, with every probe's answers to them, clean
    and ablated; probes and chosen latents are held fixed."""
    weight = np.concatenate([_weights(task) for task, _ in tasks]) / len(tasks)
    sizes = [len(rows) for task, _ in tasks for rows in task.test_rows.values()]
    strata = np.repeat(np.arange(len(sizes)), sizes)
    found: dict[str, list[float]] = {}
    for kind in KINDS:
        lost = np.concatenate([_lost(task, own, kind, len(thresholds)) for task, own in tasks], axis=1) / len(tasks)
        for i, n in enumerate(thresholds):
            bounds = interval(Ratio(lost[i], weight, strata), seed)
            if bounds is not None:
                found[f"tpp_threshold_{n}_{kind}"] = list(bounds)
    return found


def _places(task: TppTask) -> list[np.ndarray]:
    """Of each probe's test texts among all of the task's."""
    place = {int(row): i for i, row in enumerate(torch.cat(list(task.test_rows.values())))}
    return [np.array([place[int(row)] for row in probe.test.rows]) for probe in task.probes.values()]


def _weights(task: TppTask) -> np.ndarray:
    """How much each test text counts in the mean over probes of their accuracy [texts]; they add up to 1."""
    texts = sum(len(rows) for rows in task.test_rows.values())
    return sum(np.bincount(place, minlength=texts) / (len(place) * len(task.probes)) for place in _places(task))  # ty: ignore[invalid-explicit-return]


def _lost(task: TppTask, found: Outcomes, kind: str, count: int) -> np.ndarray:
    """What each test text adds to the mean over classes of one metric [thresholds, texts]."""
    classes, places = len(task.probes), _places(task)
    lost = np.zeros((count, sum(len(rows) for rows in task.test_rows.values())))
    for target in range(classes):
        for probe, place in enumerate(places):
            intended = {"total_metric": 1.0, "intended_diff_only": 1.0, "unintended_diff_only": 0.0}[kind]
            others = {"total_metric": -1.0, "intended_diff_only": 0.0, "unintended_diff_only": 1.0}[kind] / (classes - 1)
            share = (intended if probe == target else others) / (classes * len(place))
            lost[:, place] += share * (found.clean[probe] - found.ablated[target][probe]).numpy()
    return lost


def details(task: TppTask, found: Outcomes, thresholds: Sequence[int]) -> dict[str, Any]:
    """One task's metrics, the probes' clean accuracy, and how many latents were ablated."""
    return {
        **mean_metrics(list(class_metrics(task, found, thresholds).values())),
        "clean_accuracy": {label: float(clean.mean()) for label, clean in zip(task.probes, found.clean, strict=True)},
        "latents_ablated": {
            label: dict(zip(map(str, thresholds), count, strict=True))
            for label, count in zip(task.probes, found.count, strict=True)
        },
    }
