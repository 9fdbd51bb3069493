"""Many small logistic regressions at once: Newton's method over a batch, in float64.

The optimum is the one of scikit-learn's `LogisticRegression(C=1, class_weight="balanced")`: half the squared weights
plus the weighted log losses, the intercept free.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit, log_expit

_MAX_STEPS = 60
_TOLERANCE = 1e-12
"""Stop when a step promises to lower the loss by less than this share of it."""


def fit_balanced(x: np.ndarray, y: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """Weights and intercept of every problem [problems, k + 1].

    x: [problems, rows, k]; y: 0 and 1, each problem with both [problems, rows]. start: where to begin
    [problems, k + 1]. Each row weighs rows / (2 * rows of its class).
    """
    n_problems, n_rows, k = x.shape
    x1 = np.concatenate([x, np.ones((n_problems, n_rows, 1))], axis=2)
    positives = y.sum(1, keepdims=True)
    weight = n_rows / (2 * np.where(y > 0, positives, n_rows - positives))
    theta = np.zeros((n_problems, k + 1)) if start is None else start.copy()
    ridge = np.append(np.ones(k), 0.0)
    value, open_ = _loss(x1, y, weight, theta, ridge), np.arange(n_problems)
    for _ in range(_MAX_STEPS):
        a, t = x1[open_], theta[open_]
        p = expit(_logits(a, t))
        gradient = ((weight[open_] * (p - y[open_]))[:, None] @ a)[:, 0] + ridge * t
        curvature = (a * (weight[open_] * p * (1 - p))[..., None]).transpose(0, 2, 1) @ a
        # a trace of ridge on the intercept too: with every row certain, its curvature vanishes
        curvature += np.diag(np.maximum(ridge, 1e-10))
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        going = (gradient * step).sum(1) > _TOLERANCE * value[open_]
        open_ = open_[going]
        if not len(open_):
            break
        theta[open_], value[open_], moved = _shortened(a[going], y[open_], weight[open_], t[going], value[open_],
                                                       step[going], ridge)
        open_ = open_[moved]
    return theta


def _shortened(x1: np.ndarray, y: np.ndarray, weight: np.ndarray, theta: np.ndarray, value: np.ndarray,
               step: np.ndarray, ridge: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Newton's step, halved per problem until the loss falls. Returns weights, losses, and which problems moved."""
    found, best, moved = theta.copy(), value.copy(), np.zeros(len(theta), dtype=bool)
    pending = np.arange(len(theta))
    for halvings in range(40):
        tried = theta[pending] - step[pending] * 0.5**halvings
        loss = _loss(x1[pending], y[pending], weight[pending], tried, ridge)
        better = loss < value[pending]
        found[pending[better]], best[pending[better]], moved[pending[better]] = tried[better], loss[better], True
        pending = pending[~better]
        if not len(pending):
            break
    return found, best, moved


def _loss(x1: np.ndarray, y: np.ndarray, weight: np.ndarray, theta: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    logits = _logits(x1, theta)
    losses = -log_expit(np.where(y > 0, logits, -logits))
    return (weight * losses).sum(1) + 0.5 * (ridge * theta**2).sum(1)


def _logits(x1: np.ndarray, theta: np.ndarray) -> np.ndarray:
    return (x1 @ theta[..., None])[..., 0]
