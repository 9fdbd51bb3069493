"""Intervals for means over tasks: tasks are drawn with replacement, and within each the test texts.

A task's own resamples are drawn once, within either class so that both are always there; then each resample of the mean
takes tasks and, of each, one of its resamples. Draws depend on seed, task and number of texts alone, so that every SAE
and every k meets the same ones.

Logistic regression on few dimensions, exactly, for a whole path of penalties: what thousands of small probes need.

    min over w and b:  |w|_1 + C sum_i log(1 + exp(-y_i (x_i w + b))),   y_i = -1 or 1

which is scikit-learn's `penalty="l1"` with an intercept that is not penalised. It is solved by proximal Newton steps (Lee,
Sun & Saunders 2014): a quadratic model of the loss, minimised with the penalty by coordinate descent in k dimensions,
then a line search on the true objective. A probe on five latents takes some tens of microseconds where stochastic
gradients take tens of milliseconds, and what comes out is the optimum rather than where the iterations stopped.

One probe of one task: which latents, which penalty, and how well it tells the test texts apart.

Source: sae-probes 0.4.2, `run_sae_evals.run_sae_eval` and `utils_training.find_best_reg`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from sae_research.runtime.files import fingerprint
from sae_research.runtime.numba_cache import numba

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


_NEWTON_STEPS = 200
_SWEEPS = 500
_TOLERANCE = 1e-11
"""Stop when a step promises to lower the objective by less than this share of it."""
_RIDGE = 1e-12
"""Added to the curvature of every dimension, so that equal latents do not make it singular."""


def l1_path(x: np.ndarray, y: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [costs, k] and intercepts [costs] at the optimum for every C. x: [n, k]; y: [n] of 0 and 1.

    A dimension that is zero on all of `x` gets weight 0. With one class alone the intercept has no optimum: raises
    `ValueError`.
    """
    x, signs = _checked(x, y)
    scale = np.sqrt(np.square(x).mean(axis=0))
    used = np.where(scale > 0, scale, 1.0)
    order = np.argsort(costs)  # from all zeros on: each solution starts the next
    weights, intercepts = _l1_path(np.ascontiguousarray(x / used), signs, np.asarray(costs, np.float64)[order], 1 / used)
    back = np.argsort(order)
    return (weights / used)[back], intercepts[back]


def l2_path(x: np.ndarray, y: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same with the penalty |w|^2 / 2, on any number of dimensions: weights [costs, d] and intercepts [costs].

    An l2 penalty is blind to rotations, so that where d exceeds n the fit happens in the n dimensions that the texts
    span, with equal predictions. Newton steps with a line search.
    """
    x, signs = _checked(x, y)
    axes = np.eye(x.shape[1])
    if x.shape[1] > len(x):
        values, vectors = np.linalg.eigh(x @ x.T)
        kept = values > max(values[-1], 0.0) * 1e-12
        axes = x.T @ (vectors[:, kept] / np.sqrt(values[kept]))  # orthonormal columns [d, n]
    with_one = np.column_stack([x @ axes, np.ones(len(x))])
    theta = np.zeros(with_one.shape[1])
    found = np.zeros((len(costs), len(theta)))
    for i in np.argsort(costs):
        theta = found[i] = _l2_newton(with_one, signs, float(costs[i]), theta)
    return found[:, :-1] @ axes.T, found[:, -1]


def _checked(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = np.asarray(y)
    if labels.min() == labels.max():
        raise ValueError("a probe needs texts of both classes")
    return np.asarray(x, np.float64), np.where(labels > 0, 1.0, -1.0)


# --- the l1 solver ------------------------------------------------------------------------------


@numba.njit(cache=True)
def _objective(x: np.ndarray, signs: np.ndarray, cost: float, penalty: np.ndarray, u: np.ndarray, b: float) -> float:
    total = 0.0
    for i in range(len(x)):
        margin = b
        for j in range(len(u)):
            margin += x[i, j] * u[j]
        margin *= signs[i]
        total += np.log1p(np.exp(-margin)) if margin > 0 else np.log1p(np.exp(margin)) - margin
    total *= cost
    for j in range(len(u)):
        total += penalty[j] * abs(u[j])
    return total


@numba.njit(cache=True)
def _model(
    x: np.ndarray, signs: np.ndarray, cost: float, u: np.ndarray, b: float, gradient: np.ndarray, curvature: np.ndarray
) -> None:
    """Gradient [k + 1] and Hessian [k + 1, k + 1] of the loss, the intercept last, written in place."""
    k = len(u)
    gradient[:] = 0.0
    curvature[:] = 0.0
    row = np.ones(k + 1)
    for i in range(len(x)):
        margin = b
        for j in range(k):
            row[j] = x[i, j]
            margin += row[j] * u[j]
        margin *= signs[i]
        # the share of the other class, without overflow
        wrong = 1 / (1 + np.exp(margin)) if margin < 0 else np.exp(-margin) / (1 + np.exp(-margin))
        slope, bend = -cost * signs[i] * wrong, cost * wrong * (1 - wrong)
        for j in range(k + 1):
            gradient[j] += slope * row[j]
            for m in range(j + 1):
                curvature[j, m] += bend * row[j] * row[m]
    for j in range(k + 1):
        for m in range(j):
            curvature[m, j] = curvature[j, m]


@numba.njit(cache=True)
def _step(gradient: np.ndarray, curvature: np.ndarray, penalty: np.ndarray, u: np.ndarray, ridge: float) -> np.ndarray:
    """The step [k + 1] that minimises the quadratic model plus the penalty, by coordinate descent."""
    k = len(u)
    step = np.zeros(k + 1)
    pull = gradient.copy()  # gradient of the model at the present step
    for _ in range(_SWEEPS):
        largest = 0.0
        for j in range(k + 1):
            bend = curvature[j, j] + ridge
            if bend <= 0:
                continue
            here = u[j] + step[j] if j < k else step[j]
            target = here - pull[j] / bend
            if j < k:
                shrink = penalty[j] / bend
                target = max(target - shrink, 0.0) if target > 0 else min(target + shrink, 0.0)
            change = target - here
            if change != 0.0:
                step[j] += change
                for m in range(k + 1):
                    pull[m] += change * curvature[m, j]
                pull[j] += change * ridge
                largest = max(largest, change * change * bend)
        if largest <= 1e-24 * max(1.0, -_decrease(gradient, curvature, penalty, u, step)):
            break
    return step


@numba.njit(cache=True)
def _decrease(gradient: np.ndarray, curvature: np.ndarray, penalty: np.ndarray, u: np.ndarray, step: np.ndarray) -> float:
    """What the first-order model promises of a step: negative unless the step is none."""
    total = 0.0
    for j in range(len(u)):
        total += gradient[j] * step[j] + penalty[j] * (abs(u[j] + step[j]) - abs(u[j]))
    return total + gradient[len(u)] * step[len(u)]


@numba.njit(cache=True)
def _l1_path(x: np.ndarray, signs: np.ndarray, costs: np.ndarray, penalty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n, k = x.shape
    weights, intercepts = np.zeros((len(costs), k)), np.zeros(len(costs))
    positives = (signs > 0).sum()
    u, b = np.zeros(k), np.log(positives / (n - positives))  # the optimum without dimensions
    gradient, curvature = np.zeros(k + 1), np.zeros((k + 1, k + 1))
    for c in range(len(costs)):
        cost = costs[c]
        value = _objective(x, signs, cost, penalty, u, b)
        for _ in range(_NEWTON_STEPS):
            _model(x, signs, cost, u, b, gradient, curvature)
            step = _step(gradient, curvature, penalty, u, _RIDGE * cost)
            promise = _decrease(gradient, curvature, penalty, u, step)
            if promise > -_TOLERANCE * value:
                break
            size, moved = 1.0, False
            for _ in range(40):
                trial = u + size * step[:k]
                there = _objective(x, signs, cost, penalty, trial, b + size * step[k])
                if there <= value + 1e-4 * size * promise:
                    moved = True
                    break
                size /= 2
            if not moved:  # rounding hides what is left to gain
                break
            u, b, value = trial, b + size * step[k], there
        weights[c], intercepts[c] = u, b
    return weights, intercepts


# --- the l2 solver ----------------------------------------------------------------------------


def _l2_newton(x: np.ndarray, signs: np.ndarray, cost: float, theta: np.ndarray) -> np.ndarray:
    """The optimum for one C. x: [n, d + 1], its last column ones; theta [d + 1] is where to start."""
    penalty = np.ones(len(theta))
    penalty[-1] = 0.0

    def objective(at: np.ndarray) -> float:
        return cost * np.logaddexp(0, -signs * (x @ at)).sum() + (penalty * at * at).sum() / 2

    value = objective(theta)
    for _ in range(_NEWTON_STEPS):
        wrong = np.exp(-np.logaddexp(0, signs * (x @ theta)))
        gradient = -cost * (x.T @ (signs * wrong)) + penalty * theta
        curvature = cost * (x.T * (wrong * (1 - wrong))) @ x
        curvature[np.diag_indices_from(curvature)] += penalty + _RIDGE * cost
        step = -np.linalg.solve(curvature, gradient)
        promise = float(gradient @ step)
        if promise > -_TOLERANCE * value:
            break
        size = 1.0
        while (there := objective(theta + size * step)) > value + 1e-4 * size * promise and size > 1e-12:
            size /= 2
        if there >= value:  # rounding hides what is left to gain
            break
        theta, value = theta + size * step, there
    return theta


Path = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Texts [n, d], classes [n] and costs -> weights [costs, d] and intercepts [costs]."""

COSTS = np.logspace(5, -5, 10)
"""The inverse penalties to choose from; of equally good ones the first wins."""


class Scores(NamedTuple):
    """Decision values of the test texts, positive where the probe says class 1 [n]."""

    decisions: np.ndarray
    saturate: bool
    """Rank by probabilities in float32, as stock does: large decisions tie at 1."""

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
    ours is the optimum, so that a figure may differ from stock's by a test text or two.
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
        decisions = [_lbfgs(cost, seed, train[fitted], labels[fitted]).decision_function(train[held_out]) for cost in COSTS]
        folds.append([auc(_ranked(column, saturate=True), labels[held_out] > 0) for column in decisions])
    order = np.random.RandomState(seed).permutation(len(train))
    probe = _lbfgs(float(_best_cost(folds)[0]), seed, train[order], labels[order])
    return Scores(probe.decision_function(test).astype(np.float64), saturate=True)


def _lbfgs(cost: float, seed: int, x: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # as in stock: 1000 steps, converged or not
        return LogisticRegression(C=cost, random_state=seed, max_iter=1000).fit(x, labels)


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
