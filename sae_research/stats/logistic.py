"""Logistic regression on few texts: thousands of small fits, each to its optimum.

`newton` fits many problems of one shape at once with an l2 penalty, `l2_path` and `l1_path` one problem for many penalties,
`scikit_learn` and `fit_by_adamw` as other libraries do, stopping where they stop. With y_i = -1 or 1 the optimum is

    min over w and b:  penalty(w) + sum_i c_i log(1 + exp(-y_i (x_i w + b))),   penalty(w) = |w|^2 / 2 or |w|_1

which is scikit-learn's for C = c_i, with an intercept that is not penalised.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from scipy.special import expit, log_expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from sae_research.runtime.numba_cache import numba

_STEPS = 100
_DECREASE = 1e-12
"""Newton stops when a step promises to lower the objective by less than this share of it."""


def scikit_learn(x: np.ndarray, labels: np.ndarray, cost: float = 1.0) -> LogisticRegression:
    """scikit-learn's own fit with its own tolerance, as SAE Bench and sae-probes have it: 1000 steps, converged or not.

    Where the classes are separable it stops long before the optimum, which regularises beyond the penalty.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=cost, max_iter=1000).fit(x, labels.astype(np.int64))


# --- l2 penalty: Newton's method over a batch --------------------------------------------------


def balanced(y: np.ndarray) -> np.ndarray:
    """Weights of rows for scikit-learn's `class_weight="balanced"`: rows / (2 * rows of its class). y: 0 and 1, each problem
    with both [problems, rows]."""
    positives = y.sum(1, keepdims=True)
    return y.shape[1] / (2 * np.where(y > 0, positives, y.shape[1] - positives))


def newton(x: np.ndarray, y: np.ndarray, weight: np.ndarray | float = 1.0, start: np.ndarray | None = None) -> np.ndarray:
    """Weights and, last, intercept of every problem [problems, k + 1], in float64.

    x: [problems, rows, k]; y: 0 and 1 [problems, rows]. weight: c_i, for all or [problems, rows]. start: where to begin
    [problems, k + 1]. Each problem stops by itself.
    """
    n_problems, n_rows, k = x.shape
    x1 = np.concatenate([x, np.ones((n_problems, n_rows, 1))], axis=2)
    weight = np.broadcast_to(np.asarray(weight, np.float64), y.shape)
    theta = np.zeros((n_problems, k + 1)) if start is None else start.copy()
    ridge = np.append(np.ones(k), 0.0)
    value, open_ = _objective(x1, y, weight, theta, ridge), np.arange(n_problems)
    for _ in range(_STEPS):
        a, t = x1[open_], theta[open_]
        p = expit(_logits(a, t))
        gradient = ((weight[open_] * (p - y[open_]))[:, None] @ a)[:, 0] + ridge * t
        curvature = (a * (weight[open_] * p * (1 - p))[..., None]).transpose(0, 2, 1) @ a
        # a trace of ridge on the intercept too: with every row certain, its curvature vanishes
        curvature += np.diag(np.maximum(ridge, 1e-10))
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        going = (gradient * step).sum(1) > _DECREASE * value[open_]
        open_ = open_[going]
        if not len(open_):
            break
        theta[open_], value[open_], moved = _shortened(
            a[going], y[open_], weight[open_], t[going], value[open_], step[going], ridge
        )
        open_ = open_[moved]
    return theta


def _shortened(
    x1: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    theta: np.ndarray,
    value: np.ndarray,
    step: np.ndarray,
    ridge: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Newton's step, halved per problem until the objective falls. Returns weights, objectives, and which problems moved."""
    found, best, moved = theta.copy(), value.copy(), np.zeros(len(theta), dtype=bool)
    pending = np.arange(len(theta))
    for halvings in range(40):
        tried = theta[pending] - step[pending] * 0.5**halvings
        there = _objective(x1[pending], y[pending], weight[pending], tried, ridge)
        better = there < value[pending]
        found[pending[better]], best[pending[better]], moved[pending[better]] = tried[better], there[better], True
        pending = pending[~better]
        if not len(pending):
            break
    return found, best, moved


def _objective(x1: np.ndarray, y: np.ndarray, weight: np.ndarray, theta: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    logits = _logits(x1, theta)
    losses = -log_expit(np.where(y > 0, logits, -logits))
    return (weight * losses).sum(1) + 0.5 * (ridge * theta**2).sum(1)


def _logits(x1: np.ndarray, theta: np.ndarray) -> np.ndarray:
    return (x1 @ theta[..., None])[..., 0]


def l2_path(x: np.ndarray, y: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [costs, d] and intercepts [costs] at the optimum for every C. x: [n, d]; y: [n] of 0 and 1.

    An l2 penalty is blind to rotations, so that where d exceeds n the fit happens in the n dimensions that the rows span,
    with equal predictions. With one class alone the intercept has no optimum: raises `ValueError`.
    """
    x, signs = _checked(x, y)
    axes = np.eye(x.shape[1])
    if x.shape[1] > len(x):
        values, vectors = np.linalg.eigh(x @ x.T)
        kept = values > max(values[-1], 0.0) * 1e-12
        axes = x.T @ (vectors[:, kept] / np.sqrt(values[kept]))  # orthonormal columns [d, n]
    inside, positive = (x @ axes)[None], (signs > 0)[None].astype(np.float64)
    found, theta = np.zeros((len(costs), axes.shape[1] + 1)), None
    for i in np.argsort(costs):  # each solution starts the next
        theta = newton(inside, positive, costs[i], theta)
        found[i] = theta[0]
    return found[:, :-1] @ axes.T, found[:, -1]


def _checked(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = np.asarray(y)
    if labels.min() == labels.max():
        raise ValueError("a probe needs texts of both classes")
    return np.asarray(x, np.float64), np.where(labels > 0, 1.0, -1.0)


# --- l1 penalty: proximal Newton ---------------------------------------------------------------

_NEWTON_STEPS = 200
_SWEEPS = 500
_TOLERANCE = 1e-11
"""Stop when a step promises to lower the objective by less than this share of it."""
_RIDGE = 1e-12
"""Added to the curvature of every dimension, so that equal latents do not make it singular."""


def l1_path(x: np.ndarray, y: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `l2_path` with the penalty |w|_1, on few dimensions.

    Proximal Newton steps (Lee, Sun & Saunders 2014): a quadratic model of the loss, minimised with the penalty by
    coordinate descent in k dimensions, then a line search on the true objective. A probe on five latents takes some tens of
    microseconds where stochastic gradients take tens of milliseconds. A dimension that is zero on all of `x` gets weight 0.
    """
    x, signs = _checked(x, y)
    scale = np.sqrt(np.square(x).mean(axis=0))
    used = np.where(scale > 0, scale, 1.0)
    order = np.argsort(costs)  # from all zeros on: each solution starts the next
    weights, intercepts = _l1_path(np.ascontiguousarray(x / used), signs, np.asarray(costs, np.float64)[order], 1 / used)
    back = np.argsort(order)
    return (weights / used)[back], intercepts[back]


@numba.njit(cache=True)
def _l1_objective(x: np.ndarray, signs: np.ndarray, cost: float, penalty: np.ndarray, u: np.ndarray, b: float) -> float:
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
        value = _l1_objective(x, signs, cost, penalty, u, b)
        for _ in range(_NEWTON_STEPS):
            _model(x, signs, cost, u, b, gradient, curvature)
            step = _step(gradient, curvature, penalty, u, _RIDGE * cost)
            promise = _decrease(gradient, curvature, penalty, u, step)
            if promise > -_TOLERANCE * value:
                break
            size, moved = 1.0, False
            for _ in range(40):
                trial = u + size * step[:k]
                there = _l1_objective(x, signs, cost, penalty, trial, b + size * step[k])
                if there <= value + 1e-4 * size * promise:
                    moved = True
                    break
                size /= 2
            if not moved:  # rounding hides what is left to gain
                break
            u, b, value = trial, b + size * step[k], there
        weights[c], intercepts[c] = u, b
    return weights, intercepts


# --- AdamW -------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """A fitted probe."""

    weight: np.ndarray
    """[d]"""
    bias: float

    def accuracy(self, x: np.ndarray, labels: np.ndarray) -> float:
        """Share of the rows x [n, d] that it puts on the side of their labels [n]."""
        return float(((x @ self.weight + self.bias > 0) == (labels > 0)).mean())


def adamw_step(
    theta: np.ndarray, gradient: np.ndarray, first: np.ndarray, second: np.ndarray, step: int, learning_rate: float
) -> None:
    """One AdamW update of `theta` and its two moments in place, with torch's defaults (betas 0.9 and 0.999, weight
    decay 0.01). step counts from 1."""
    first += np.float32(0.1) * (gradient - first)
    second += np.float32(0.001) * (gradient * gradient - second)
    theta *= np.float32(1 - learning_rate * 0.01)
    theta -= (
        np.float32(learning_rate / (1 - 0.9**step))
        * first
        / (np.sqrt(second / np.float32(1 - 0.999**step)) + np.float32(1e-8))
    )


def fit_by_adamw(
    x: np.ndarray,
    labels: np.ndarray,
    select_x: np.ndarray,
    select_labels: np.ndarray,
    seed: int,
    epochs: int = 100,
    learning_rate: float = 1e-2,
    batch_size: int = 250,
    patience: int = 10,
) -> tuple[Linear, float]:
    """Logistic regression on all dimensions by AdamW, keeping the epoch of highest accuracy on `select_x`.

    Returns that probe and that accuracy. With the test set as `select_x` the accuracy is SAE Bench's
    `*_test_accuracy`, which chooses the epoch on the very texts it reports.
    x: [texts, d] float32; labels: [texts] of 0 and 1. The gradient is written out: at these sizes a general
    framework's own costs exceed the arithmetic.
    """
    generator = np.random.default_rng(seed)
    bound = x.shape[1] ** -0.5  # torch's initialisation of a linear layer
    # weight and bias are one vector, so that one AdamW step serves both
    theta = generator.uniform(-bound, bound, x.shape[1] + 1).astype(np.float32)
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    best, best_accuracy, waited, step = Linear(theta[:-1].copy(), float(theta[-1])), -1.0, 0, 0
    for _ in range(epochs):
        order = generator.permutation(len(x))
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            batch = x[rows] if len(rows) < len(x) else x
            y = labels[rows] if len(rows) < len(x) else labels
            error = (expit(batch @ theta[:-1] + theta[-1]) - y) / np.float32(len(y))
            gradient = np.append(error @ batch, error.sum())
            step += 1
            adamw_step(theta, gradient, first, second, step, learning_rate)
        accuracy = Linear(theta[:-1], float(theta[-1])).accuracy(select_x, select_labels)
        if accuracy > best_accuracy:
            best, best_accuracy, waited = Linear(theta[:-1].copy(), float(theta[-1])), accuracy, 0
        else:
            waited += 1
            if waited >= patience:
                break
    return best, best_accuracy
