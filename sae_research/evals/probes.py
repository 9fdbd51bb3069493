"""Binary probes on one vector per text: which texts, which dimensions, how accurate.

Source: SAE Bench 0.6.0, sae_bench/evals/sparse_probing/probe_training.py, and arXiv 2305.01610 for the top-k rule.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from sae_research.store import fingerprint


class Draw(NamedTuple):
    """Rows of one binary task, as (class, row within the class) pairs packed into row numbers of the pool."""

    rows: Tensor
    """Positives first, then as many negatives [2 * n]."""
    labels: Tensor
    """1 for the class, 0 for the others [2 * n]."""


def draw(rows_of: Mapping[str, Tensor], positive: str, seed: int, split: str) -> Draw:
    """All texts of class `positive`, and as many negatives spread evenly over the other classes.

    SAE Bench draws anew at each call from a global generator; here the draw depends on seed, class and split alone,
    so that every SAE and every k meets the same texts. rows_of: pool rows of each class.
    """
    digest = fingerprint([seed, positive, split, {name: len(rows) for name, rows in rows_of.items()}])
    generator = torch.Generator().manual_seed(int(digest[:12], 16))
    positives = rows_of[positive]
    others = [name for name in rows_of if name != positive]
    each = math.ceil(len(positives) / len(others))
    pool = torch.cat([rows_of[name][torch.randperm(len(rows_of[name]), generator=generator)[:each]] for name in others])
    negatives = pool[torch.randperm(len(pool), generator=generator)[:len(positives)]]
    labels = torch.cat([torch.ones(len(positives)), torch.zeros(len(negatives))])
    return Draw(torch.cat([positives, negatives]), labels)


class ProbeTask(NamedTuple):
    """One class against the others: what a probe is fitted on and what it is scored on."""

    train: Draw
    test: Draw


def top_dimensions(x: Tensor, labels: Tensor, k: int) -> Tensor:
    """The k dimensions whose class means differ most [k]. x: [texts, d]; labels: [texts] of 0 and 1."""
    difference = (x[labels == 1].mean(0) - x[labels == 0].mean(0)).abs()
    return torch.argsort(difference, descending=True)[:k]


def top_k_correct(features: Tensor, train: Draw, test: Draw, k: int) -> np.ndarray:
    """Which test rows a logistic regression (L2, C = 1) on the k most different dimensions of `features` [pool, d] gets
    right. bool [test rows]

    The dimensions are chosen on the training rows alone.
    """
    x_train = features[train.rows]
    chosen = top_dimensions(x_train, train.labels, k)
    probe = _logistic(x_train[:, chosen].float().cpu().numpy(), train.labels.numpy())
    predicted = probe.predict(features[test.rows][:, chosen].float().cpu().numpy())
    return predicted == test.labels.numpy()


def top_k_accuracy(features: Tensor, train: Draw, test: Draw, k: int) -> float:
    """Test accuracy of that probe."""
    return float(top_k_correct(features, train, test, k).mean())


class FullProbe(NamedTuple):
    weight: np.ndarray
    """[d]"""
    bias: float

    def accuracy(self, x: np.ndarray, labels: np.ndarray) -> float:
        return float(((x @ self.weight + self.bias > 0) == (labels > 0)).mean())


def adamw_step(theta: np.ndarray, gradient: np.ndarray, first: np.ndarray, second: np.ndarray, step: int,
               learning_rate: float) -> None:
    """One AdamW update of `theta` and its two moments in place, with torch's defaults (betas 0.9 and 0.999, weight
    decay 0.01). step counts from 1."""
    first += np.float32(0.1) * (gradient - first)
    second += np.float32(0.001) * (gradient * gradient - second)
    theta *= np.float32(1 - learning_rate * 0.01)
    theta -= np.float32(learning_rate / (1 - 0.9**step)) * first / (
        np.sqrt(second / np.float32(1 - 0.999**step)) + np.float32(1e-8))


def fit_full_probe(x: np.ndarray, labels: np.ndarray, select_x: np.ndarray, select_labels: np.ndarray, seed: int,
                   epochs: int = 100, learning_rate: float = 1e-2, batch_size: int = 250,
                   patience: int = 10) -> tuple[FullProbe, float]:
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
    best, best_accuracy, waited, step = FullProbe(theta[:-1].copy(), float(theta[-1])), -1.0, 0, 0
    for _ in range(epochs):
        order = generator.permutation(len(x))
        for start in range(0, len(x), batch_size):
            rows = order[start:start + batch_size]
            batch = x[rows] if len(rows) < len(x) else x
            y = labels[rows] if len(rows) < len(x) else labels
            error = (expit(batch @ theta[:-1] + theta[-1]) - y) / np.float32(len(y))
            gradient = np.append(error @ batch, error.sum())
            step += 1
            adamw_step(theta, gradient, first, second, step, learning_rate)
        accuracy = FullProbe(theta[:-1], float(theta[-1])).accuracy(select_x, select_labels)
        if accuracy > best_accuracy:
            best, best_accuracy, waited = FullProbe(theta[:-1].copy(), float(theta[-1])), accuracy, 0
        else:
            waited += 1
            if waited >= patience:
                break
    return best, best_accuracy


def sae_bench_full_accuracy(features: Tensor, task: ProbeTask, seed: int) -> float:
    """SAE Bench's accuracy of a probe on all of `features` [pool, d]: the best epoch on the test texts themselves."""
    (x, y), test = _read(features, task.train), _read(features, task.test)
    return fit_full_probe(x, y, *test, seed)[1]


def full_correct(features: Tensor, task: ProbeTask) -> np.ndarray:
    """Which test rows the top-k probes' own logistic regression (L2, C = 1) on all of `features` [pool, d] gets right.
    bool [test rows]

    An L2 penalty is blind to rotations, so the fit happens in the space of the training texts [texts, texts], which is
    far smaller than d and gives the same predictions.
    """
    (x, y), (x_test, y_test) = _read(features, task.train), _read(features, task.test)
    x64 = x.astype(np.float64)
    values, vectors = np.linalg.eigh(x64 @ x64.T)
    used = values > values[-1] * 1e-12
    if not used.any():  # all zero: the probe knows nothing, and answers as the top-k probes do then
        return y_test == 0
    axes = vectors[:, used] / np.sqrt(values[used])  # x.T @ axes are orthonormal directions in feature space
    probe = _logistic(x64 @ (x64.T @ axes), y)
    predicted = probe.predict(x_test.astype(np.float64) @ (x64.T @ axes))
    return predicted == y_test


def full_accuracy(features: Tensor, task: ProbeTask) -> float:
    """Test accuracy of that probe."""
    return float(full_correct(features, task).mean())


def _logistic(x: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    with warnings.catch_warnings():
        # SAE Bench stops at 1000 iterations as well; a probe short of convergence still has an accuracy
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=1.0, max_iter=1000).fit(x, labels.astype(np.int64))


def _read(features: Tensor, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    return features[draw.rows].float().numpy(), draw.labels.numpy()
