"""Many small logistic regressions at once: Newton's method over a batch, in float64.

The optimum is the one of scikit-learn's `LogisticRegression(C=1, class_weight="balanced")`: half the squared weights
plus the weighted log losses, the intercept free.

One-vs-rest logistic probes: one linear output per letter, trained by Adam with the gradient written out.

Source: SAE Bench 0.6.0, sae_bench/evals/absorption/probing.py (`train_multi_probe`) and k_sparse_probing.py
(`train_sparse_multi_probe`): binary cross-entropy, positives weighted by negatives / positives, exponentially falling
learning rate. Outputs do not interact, so letters may be left out without changing the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import sparse
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


Features = np.ndarray | sparse.csr_matrix
"""float32 [rows, d], dense or sparse."""

N_LETTERS = 26
"""SAE Bench averages its loss over 26 outputs; the scale decides how strong L1 and weight decay are beside it."""


class Training(NamedTuple):
    """How probes are trained. The learning rate falls by one factor per epoch."""

    epochs: int
    batch_size: int
    weight_decay: float
    l1: float = 0.0
    """Times the mean over 26 outputs of the sum of absolute weights."""
    learning_rate: float = 0.01
    end_learning_rate: float = 1e-5


GROUND_TRUTH = Training(epochs=50, batch_size=64, weight_decay=1e-4)
"""SAE Bench's probe on the model's activations."""


class Probes(NamedTuple):
    """One logit per output: `x @ weights + biases`, float32."""

    weights: np.ndarray
    """[d, outputs]"""
    biases: np.ndarray
    """[outputs]"""

    def scores(self, x: Features) -> np.ndarray:
        """[rows, outputs]"""
        return np.asarray(x @ self.weights + self.biases)


def random_start(d: int, seed: Iterable[int]) -> Probes:
    """What torch draws for a linear layer of 26 outputs: uniform within 1 / sqrt(d)."""
    theta = np.random.default_rng(list(seed)).uniform(-(d**-0.5), d**-0.5, (d + 1, N_LETTERS)).astype(np.float32)
    return Probes(theta[:-1], theta[-1])


def zero_start(d: int) -> Probes:
    return Probes(np.zeros((d, N_LETTERS), np.float32), np.zeros(N_LETTERS, np.float32))


def epoch_order(rows: int, seed: Iterable[int]) -> np.ndarray:
    """The order in which an epoch meets its rows."""
    return np.random.default_rng(list(seed)).permutation(rows)


def one_vs_rest(labels: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """1 where a row has the output's label, float32 [rows, outputs]."""
    return (labels[:, None] == outputs[None]).astype(np.float32)


def train(x: Features, y: np.ndarray, start: Probes, how: Training, seed: tuple[int, ...]) -> Probes:
    """Probes for y [rows, outputs] of 0 and 1, each column with both; start has the same outputs.

    Batches follow `epoch_order(rows, (*seed, epoch))`.
    """
    theta = np.concatenate([start.weights, start.biases[None]])
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    positive = y.sum(0, dtype=np.float64)
    extra = ((len(y) - positive) / positive - 1).astype(np.float32)
    rate, fall = how.learning_rate, (how.end_learning_rate / how.learning_rate) ** (1 / how.epochs)
    whole = _transposed(x) if len(y) <= how.batch_size else None
    step = 0
    for epoch in range(how.epochs):
        order = None if whole is not None else epoch_order(len(y), (*seed, epoch))
        for begin in range(0, len(y), how.batch_size):
            rows = None if order is None else order[begin : begin + how.batch_size]
            xb, yb = (x, y) if rows is None else (x[rows], y[rows])
            step += 1
            gradient = _gradient(xb, whole if rows is None else xb.T, yb, theta, extra, how)
            _adam(theta, gradient, first, second, step, rate)
        rate *= fall
    return Probes(theta[:-1].copy(), theta[-1].copy())


def _transposed(x: Features) -> Features:
    return x.T if isinstance(x, np.ndarray) else x.T.tocsr()


def _gradient(x: Features, x_T: Features, y: np.ndarray, theta: np.ndarray, extra: np.ndarray, how: Training) -> np.ndarray:
    """Of mean weighted cross-entropy, L1 and weight decay, float32 [d + 1, outputs]. extra: weight of positives - 1."""
    error = expit(x @ theta[:-1] + theta[-1])
    error -= y
    error *= 1 + extra * y
    error *= np.float32(1 / (len(y) * N_LETTERS))
    gradient = np.empty_like(theta)
    gradient[:-1] = x_T @ error
    gradient[-1] = error.sum(0)
    if how.l1:
        gradient[:-1] += np.float32(how.l1 / N_LETTERS) * np.sign(theta[:-1])
    gradient += np.float32(how.weight_decay) * theta
    return gradient


def _adam(theta: np.ndarray, gradient: np.ndarray, first: np.ndarray, second: np.ndarray, step: int, rate: float) -> None:
    """One Adam update in place, with torch's defaults. step counts from 1."""
    gradient_squared = np.square(gradient)
    gradient_squared -= second
    gradient_squared *= np.float32(0.001)
    second += gradient_squared
    gradient -= first
    gradient *= np.float32(0.1)
    first += gradient
    scale = np.sqrt(second, out=gradient_squared)
    scale *= np.float32((1 - 0.999**step) ** -0.5)
    scale += np.float32(1e-8)
    change = np.divide(first, scale, out=scale)
    change *= np.float32(rate / (1 - 0.9**step))
    theta -= change


# --- scores ----------------------------------------------------------------------------------


def f1(scores: np.ndarray, y: np.ndarray) -> np.ndarray:
    """F1 of `scores > 0` along the first axis; 0 where nothing is found. y: 0 and 1, broadcast to scores [rows, ...]."""
    said = scores > 0
    hits = (said & (y > 0)).sum(0)
    total = said.sum(0) + np.broadcast_to(y > 0, scores.shape).sum(0)
    return np.divide(2 * hits, total, out=np.zeros(hits.shape), where=total > 0)
