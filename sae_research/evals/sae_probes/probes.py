"""Probes of one task: which latents, which penalty, how well they separate the test texts, and intervals over tasks.

Source: sae-probes 0.4.2, `run_sae_evals.run_sae_eval` and `utils_training.find_best_reg`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import expit
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from sae_research.runtime.files import fingerprint
from sae_research.stats.logistic import l1_path, l2_path, scikit_learn

RESAMPLES = 1000
LEVEL = 0.95

Path = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Texts [n, d], classes [n] and costs -> weights [costs, d] and intercepts [costs]."""

COSTS = np.logspace(5, -5, 10)
"""The inverse penalties to choose from; of equally good ones the first wins."""


class Scores(NamedTuple):
    """Decision values of the test texts, positive where the probe says class 1 [n]."""

    decisions: np.ndarray
    saturate: bool
    """Rank by probabilities in float32, as SAE Bench does: large decisions tie at 1."""

    def ranked(self) -> np.ndarray:
        """What the AUC orders texts by [n]."""
        return _ranked(self.decisions, self.saturate)

    def metrics(self, labels: np.ndarray) -> dict[str, float]:
        """Accuracy, AUC, and F1 averaged over both classes by their number of texts. labels: [n] of 0 and 1."""
        positive = labels > 0
        said = self.decisions > 0
        return {
            "accuracy": float((said == positive).mean()),
            "auc": auc(self.ranked(), positive),
            "f1": float(weighted_f1(said, positive)),
        }


def top_latents(x: Tensor, labels: np.ndarray, k: int) -> Tensor:
    """The k latents whose class means differ most, each first divided by its mean where it is not zero [k].

    x: [texts, d]. Operations and their order are sae-probes', because many rare latents tie up to rounding.
    """
    positive = torch.from_numpy(labels > 0)
    mean_where_active = x.abs().sum(dim=0) / ((x != 0).sum(dim=0) + 1e-6)
    scaled = x / (mean_where_active + 1e-6)
    difference = scaled[positive].mean(dim=0) - scaled[~positive].mean(dim=0)
    return torch.argsort(difference.abs(), descending=True)[:k]


def top_k_scores(
    train: Tensor, labels: np.ndarray, test: Tensor, ks: Sequence[int], seed: int, saturate: bool
) -> dict[int, Scores]:
    """Decision values of an l1 probe on the k best latents, for every k up to the number of latents.

    C has the highest AUC on validation texts taken from `train` [texts, d]; the probe is then fitted on all of them.
    sae-probes fits with stochastic gradients (saga, at most 1000 passes), which now and then stop short of the optimum;
    ours is the optimum, so that a metric may differ from SAE Bench's by a test text or two.
    """
    usable = [k for k in ks if k <= train.shape[1]]
    chosen = top_latents(train, labels, max(usable, default=0))
    x, x_test = (part[:, chosen].double().numpy() for part in (train, test))
    return {k: _choose_and_fit(l1_path, x[:, :k], labels, x_test[:, :k], seed, saturate) for k in usable}


def full_scores(train: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int) -> Scores:
    """Decision values of an l2 probe on all dimensions, C chosen likewise. train, test: [texts, d] float32."""
    return _choose_and_fit(l2_path, train.astype(np.float64), labels, test.astype(np.float64), seed, saturate=False)


def _choose_and_fit(path: Path, x: np.ndarray, labels: np.ndarray, x_test: np.ndarray, seed: int, saturate: bool) -> Scores:
    folds = []
    for train, held_out in _folds(labels, seed):
        weights, intercepts = path(x[train], labels[train], COSTS)
        decisions = x[held_out] @ weights.T + intercepts
        folds.append([auc(_ranked(column, saturate), labels[held_out] > 0) for column in decisions.T])
    weights, intercepts = path(x, labels, _best_cost(folds))
    return Scores(x_test @ weights[0] + intercepts[0], saturate)


def sae_bench_full_scores(train: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int) -> Scores:
    """The same as sae-probes fits it, by scikit-learn's own solver with its own tolerance: where the classes are
    separable that stops long before the optimum, which regularises beyond the penalty."""
    folds = []
    for fitted, held_out in _folds(labels, seed):
        decisions = [scikit_learn(train[fitted], labels[fitted], cost).decision_function(train[held_out]) for cost in COSTS]
        folds.append([auc(_ranked(column, saturate=True), labels[held_out] > 0) for column in decisions])
    order = np.random.RandomState(seed).permutation(len(train))
    probe = scikit_learn(train[order], labels[order], float(_best_cost(folds)[0]))
    return Scores(probe.decision_function(test).astype(np.float64), saturate=True)


def _best_cost(folds: list[list[float]]) -> np.ndarray:
    """The C of highest mean AUC over folds [1]. folds: AUC for every C."""
    best = int(np.argmax(np.mean(folds, axis=0)))
    return COSTS[best : best + 1]


def _folds(labels: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit and to validate on: the last fifth (at most 100) from 128 texts on, six folds below."""
    n = len(labels)
    if n >= 128:
        held_out = min(int(0.2 * n), 100)
        yield np.arange(n - held_out), np.arange(n - held_out, n)
        return
    yield from StratifiedKFold(6, shuffle=True, random_state=seed).split(labels, labels)


def _ranked(decisions: np.ndarray, saturate: bool) -> np.ndarray:
    return expit(decisions.astype(np.float32)) if saturate else decisions


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting half.

    scores: [n]; positive: bool [n]. NaN with one class alone.
    """
    _, place = np.unique(scores, return_inverse=True)
    ones = np.bincount(place, positive)
    zeros = np.bincount(place, ~positive)
    pairs = ones.sum() * zeros.sum()
    return float(ones @ (zeros.cumsum() - zeros / 2) / pairs) if pairs else math.nan


def weighted_f1(said: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """F1 of either class, weighted by its share of texts. said: bool [..., n]; positive: bool [n]; weights: how often
    each text counts [..., n]. Returns [...]; a class that is neither there nor predicted has F1 0."""
    weights = np.ones(said.shape) if weights is None else weights
    total = np.zeros(np.broadcast_shapes(said.shape, weights.shape)[:-1])
    for there, claimed in ((positive, said), (~positive, ~said)):
        hits = (weights * (there & claimed)).sum(-1)
        support = (weights * there).sum(-1)
        both = support + (weights * claimed).sum(-1)
        total += support * np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
    return total / weights.sum(-1)


# --- intervals ---------------------------------------------------------------------------------
#
# Tasks are drawn with replacement, and within each the test texts: a task's own resamples once, within either class so that
# both are always there; then each resample of the mean takes tasks and, of each, one of its resamples. Draws depend on seed,
# task and number of texts alone, so that every SAE and every k meets the same ones.


def resampled_metrics(scores: Scores, labels: np.ndarray, task: str, seed: int) -> dict[str, np.ndarray]:
    """Accuracy, AUC and F1 of one task in every resample of its test texts [RESAMPLES]. labels: [n] of 0 and 1."""
    positive = labels > 0
    weights_RN = _text_draws(tuple(positive.tolist()), task, seed)
    said = scores.decisions > 0
    ranked = scores.ranked()
    above = ranked[positive][:, None] - ranked[~positive]
    pairs = np.where(above > 0, 1.0, np.where(above == 0, 0.5, 0.0))  # positive against negative texts
    won = ((weights_RN[:, positive] @ pairs) * weights_RN[:, ~positive]).sum(1)
    return {
        "accuracy": weights_RN @ (said == positive) / len(labels),
        "auc": won / (positive.sum() * (~positive).sum()),
        "f1": weighted_f1(said, positive, weights_RN),
    }


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
