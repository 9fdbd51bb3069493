"""Linear probes on mean activations, all of a run trained side by side.

SAE Bench 0.6.0's recipe (sae_bench/evals/scr_and_tpp, sae_bench/evals/sparse_probing/probe_training.py): one linear
layer on all dimensions, binary cross-entropy with an L1 penalty on the weights, AdamW, batches of 16. At these sizes a
step is a few thousand multiplications, so one numpy step over all probes replaces one framework step per probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from sae_research.evals.probes import ProbeTask, adamw_step

BATCH_SIZE = 16
LEARNING_RATE = 1e-3
L1_PENALTY = 1e-3


class Probes(NamedTuple):
    weight: np.ndarray
    """[probes, d]"""
    bias: np.ndarray
    """[probes]"""

    def logits(self, features: np.ndarray) -> np.ndarray:
        """[texts, probes]"""
        return features @ self.weight.T + self.bias


class Start(NamedTuple):
    """Everything random in the training of one probe."""

    theta: np.ndarray
    """Weights and bias at the start [d + 1]."""
    orders: np.ndarray
    """The training texts' order in each epoch [epochs, texts]."""


def start(seed: int, number: int, d: int, texts: int, epochs: int) -> Start:
    """Weights as torch initialises a linear layer, and shuffled epochs; they depend on `seed` and `number` alone."""
    generator = np.random.default_rng([seed, number])
    bound = d**-0.5
    theta = generator.uniform(-bound, bound, d + 1).astype(np.float32)
    return Start(theta, np.stack([generator.permutation(texts) for _ in range(epochs)]))


def fit(features: np.ndarray, tasks: Sequence[ProbeTask], starts: Sequence[Start], pick_on_test: bool) -> Probes:
    """One probe per task, in order.

    With `pick_on_test` each probe keeps the epoch of highest accuracy on its own *test* texts, as SAE Bench does;
    without it, the last epoch, and test texts are never looked at. features: [texts, d] float32.
    """
    theta = np.stack([start.theta for start in starts])
    sizes = [len(task.train.rows) for task in tasks]
    for size in sorted(set(sizes)):
        members = [i for i, n in enumerate(sizes) if n == size]
        theta[members] = _fit_alike(features, [tasks[i] for i in members], [starts[i] for i in members], pick_on_test)
    return Probes(theta[:, :-1].copy(), theta[:, -1].copy())


def _fit_alike(features: np.ndarray, tasks: Sequence[ProbeTask], starts: Sequence[Start],
               pick_on_test: bool) -> np.ndarray:
    """Probes with equally many training texts. Returns weights and biases [probes, d + 1]."""
    theta = np.stack([start.theta for start in starts])
    orders = np.stack([start.orders for start in starts])  # [probes, epochs, texts]
    rows = np.stack([task.train.rows.numpy() for task in tasks])
    labels = np.stack([task.train.labels.numpy() for task in tasks]).astype(np.float32)
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    best, most = theta.copy(), np.full(len(tasks), -1)
    step = 0
    for epoch in range(orders.shape[1]):
        order = orders[:, epoch]
        shuffled, y = np.take_along_axis(rows, order, 1), np.take_along_axis(labels, order, 1)
        for at in range(0, rows.shape[1], BATCH_SIZE):
            step += 1
            gradient = _gradient(features[shuffled[:, at:at + BATCH_SIZE]], y[:, at:at + BATCH_SIZE], theta)
            adamw_step(theta, gradient, first, second, step, LEARNING_RATE)
        if pick_on_test:
            correct = np.array([_correct(features, task, own) for task, own in zip(tasks, theta, strict=True)])
            better = correct > most
            best[better], most[better] = theta[better], correct[better]
    return best if pick_on_test else theta


def _gradient(x: np.ndarray, y: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Of mean binary cross-entropy plus the L1 penalty [probes, d + 1]. x: [probes, batch, d]; y: [probes, batch]."""
    weight = theta[:, :-1]
    logits = (x @ weight[:, :, None])[..., 0] + theta[:, -1:]
    error = (expit(logits) - y) / np.float32(y.shape[1])
    slope = (error[:, None, :] @ x)[:, 0] + np.float32(L1_PENALTY) * np.sign(weight)
    return np.concatenate([slope, error.sum(axis=1, keepdims=True)], axis=1)


def _correct(features: np.ndarray, task: ProbeTask, theta: np.ndarray) -> int:
    """How many of the task's test texts the probe gets right."""
    logits = features[task.test.rows.numpy()] @ theta[:-1] + theta[-1]
    return int(((logits > 0) == (task.test.labels.numpy() > 0)).sum())
