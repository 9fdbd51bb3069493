"""Targeted probe perturbation: do the latents of one class matter to that class's probe alone?

Every class has a probe against the others. Ablating the latents of one class should cost its probe accuracy (the
intended effect) and the other probes none (the unintended effect); the score is the difference.
Source: arXiv 2411.18895 and SAE Bench 0.6.0, sae_bench/evals/scr_and_tpp/main.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.evals.probes import Draw, ProbeTask, draw
from sae_research.evals.scr_tpp.ablation import Definition, View, ablated_logits, effects, strongest
from sae_research.evals.scr_tpp.scr import Metrics
from sae_research.intervals import Ratio, interval
from sae_research.text.tasks import Task

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
    rows = {split: {label: torch.tensor([row_of[text] for text in texts]) for label, texts in part.items()}
            for split, part in (("train", task.train), ("test", task.test))}
    probes = {label: ProbeTask(*(draw(rows[split], label, seed, split) for split in ("train", "test")))
              for label in task.train}
    return TppTask(task.name, probes, rows["test"])


def outcomes(task: TppTask, view: View, thresholds: Sequence[int], definition: Definition) -> Outcomes:
    """Every probe's answers under every ablation."""
    probes = list(task.probes.values())
    chosen = []
    for number, probe in enumerate(probes):
        effect = effects(view, probe.train, number, "tpp", definition)
        chosen.append([strongest(effect, n, definition) for n in thresholds])
    rows, own = torch.cat(list(task.test_rows.values())), [torch.from_numpy(place) for place in _places(task)]
    clean = [_correct(view.logits[probe.test.rows, number], probe.test) for number, probe in enumerate(probes)]
    ablated = []
    for sets in chosen:
        logits = ablated_logits(view, rows, sets)
        ablated.append([_correct(logits[:, own[number], number], probe.test) for number, probe in enumerate(probes)])
    return Outcomes(clean, ablated, [[len(latents) for latents in sets] for sets in chosen])


def _correct(logits: Tensor, test: Draw) -> Tensor:
    return ((logits > 0) == (test.labels > 0)).double()


# --- figures ---------------------------------------------------------------------------------

def class_metrics(task: TppTask, found: Outcomes, thresholds: Sequence[int]) -> dict[str, Metrics]:
    """class -> figures when its latents are ablated, with SAE Bench's names."""
    drops = [[float(found.clean[probe].mean()) - found.ablated[target][probe].mean(dim=1).numpy()
              for probe in range(len(task.probes))] for target in range(len(task.probes))]
    return {label: _named(_kinds(target, drops[target]), thresholds) for target, label in enumerate(task.probes)}


def _kinds(target: int, drops: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Total, intended and unintended loss of accuracy, from every probe's loss when `target` is ablated."""
    intended = drops[target]
    unintended = sum(drop for probe, drop in enumerate(drops) if probe != target) / (len(drops) - 1)
    return intended - unintended, intended, unintended


def _named(kinds: Sequence[np.ndarray], thresholds: Sequence[int]) -> Metrics:
    return {f"tpp_threshold_{n}_{kind}": float(values[i])
            for i, n in enumerate(thresholds) for kind, values in zip(KINDS, kinds, strict=True)}


def mean_metrics(each: Sequence[Metrics]) -> Metrics:
    """The mean of every figure over classes or tasks."""
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
    return sum(np.bincount(place, minlength=texts) / (len(place) * len(task.probes)) for place in _places(task))


def _lost(task: TppTask, found: Outcomes, kind: str, count: int) -> np.ndarray:
    """What each test text adds to the mean over classes of one figure [thresholds, texts]."""
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
    """One task's figures, the probes' clean accuracy, and how many latents were ablated."""
    return {**mean_metrics(list(class_metrics(task, found, thresholds).values())),
            "clean_accuracy": {label: float(clean.mean()) for label, clean in zip(task.probes, found.clean, strict=True)},
            "latents_ablated": {label: dict(zip(map(str, thresholds), count, strict=True))
                                for label, count in zip(task.probes, found.count, strict=True)}}
