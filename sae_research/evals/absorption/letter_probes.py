"""One-vs-rest logistic probes: one linear output per letter, trained by Adam with the gradient written out.

Source: SAE Bench 0.6.0, sae_bench/evals/absorption/probing.py (`train_multi_probe`) and k_sparse_probing.py
(`train_sparse_multi_probe`): binary cross-entropy, positives weighted by negatives / positives, exponentially falling
learning rate. Outputs do not interact, so letters may be left out without changing the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.special import expit

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
            gradient = _gradient(xb, whole if rows is None else xb.T, yb, theta, extra, how)  # ty: ignore[invalid-argument-type]
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
