"""Intervals for means over tasks: tasks are drawn with replacement, and within each the test texts.

A task's own resamples are drawn once, within either class so that both are always there; then each resample of the mean
takes tasks and, of each, one of its resamples. Draws depend on seed, task and number of texts alone, so that every SAE
and every k meets the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from sae_research.evals.sae_probes.fit import Scores, weighted_f1
from sae_research.store import fingerprint

RESAMPLES = 1000
LEVEL = 0.95


def resampled_metrics(scores: Scores, labels: np.ndarray, task: str, seed: int) -> dict[str, np.ndarray]:
    """Accuracy, AUC and F1 of one task in every resample of its test texts [RESAMPLES]. labels: [n] of 0 and 1."""
    positive = labels > 0
    weights_RN = _text_draws(tuple(positive.tolist()), task, seed)
    said = scores.decisions > 0
    ranked = scores.ranked()
    above = ranked[positive][:, None] - ranked[~positive]
    pairs = np.where(above > 0, 1.0, np.where(above == 0, 0.5, 0.0))  # positive against negative texts
    won = ((weights_RN[:, positive] @ pairs) * weights_RN[:, ~positive]).sum(1)
    return {"accuracy": weights_RN @ (said == positive) / len(labels),
            "auc": won / (positive.sum() * (~positive).sum()),
            "f1": weighted_f1(said, positive, weights_RN)}


@lru_cache(maxsize=128)
def _text_draws(labels: tuple[bool, ...], task: str, seed: int) -> np.ndarray:
    """How often each text is drawn in each resample [RESAMPLES, n] float32; as many of either class as there are."""
    positive = np.array(labels)
    generator = _generator(seed, task, len(positive))
    weights_RN = np.zeros((RESAMPLES, len(positive)), np.float32)
    for of_class in (positive, ~positive):
        n = int(of_class.sum())
        weights_RN[:, of_class] = generator.multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return weights_RN


def mean_interval(resampled: Mapping[str, np.ndarray], seed: int) -> list[float]:
    """[low, high] of a mean over tasks, from the resampled values of each task [RESAMPLES], by percentiles."""
    bank_TR = np.stack(list(resampled.values()))
    n_tasks = len(bank_TR)
    generator = _generator(seed, "tasks", n_tasks)
    tasks = generator.integers(n_tasks, size=(RESAMPLES, n_tasks))
    which = generator.integers(RESAMPLES, size=(RESAMPLES, n_tasks))
    low, high = np.quantile(bank_TR[tasks, which].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def _generator(*what: object) -> np.random.Generator:
    return np.random.default_rng(int(fingerprint(list(what))[:12], 16))
