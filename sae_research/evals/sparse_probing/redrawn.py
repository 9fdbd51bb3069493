"""Probes on few latents, and on all, with training texts drawn again: which test texts each draw gets right.

The texts that a probe is fitted on choose its latents and its weights, so one set of them is one draw of the accuracy. All
draws of a class are fitted together: logistic regressions with scikit-learn's penalty (L2, C = 1, intercept free) by
Newton's method, which stops at the optimum where scikit-learn's default stops within 1e-4 of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.evals.probing import Draw, draw
from sae_research.runtime.files import fingerprint
from sae_research.stats.logistic import newton


class TrainDraws(NamedTuple):
    """Draws of training texts for every class of a task."""

    of_class: dict[str, list[Draw]]
    share: float
    """Texts of a draw over texts of the pool."""
    replaced: bool
    """Whether a draw may hold a text several times: the pool is too small to draw without."""


def train_draws(pool: Mapping[str, Tensor], size: int, draws: int, times: float, seed: int) -> TrainDraws:
    """`draws` training sets of `size` texts a class for every class, as `probes.draw` makes them of all texts.

    pool: rows by class. Without replacement where every class has at least `times` `size` texts, else with.
    """
    replaced = min(len(rows) for rows in pool.values()) < times * size
    found: dict[str, list[Draw]] = {label: [] for label in pool}
    for number in range(draws):
        chosen = {label: rows[_chosen(len(rows), size, replaced, [seed, number, label])] for label, rows in pool.items()}
        for label in pool:
            found[label].append(draw(chosen, label, seed, f"train, draw {number}"))
    return TrainDraws(found, size / min(len(rows) for rows in pool.values()), replaced)


def _chosen(count: int, size: int, replaced: bool, key: list[object]) -> Tensor:
    generator = torch.Generator().manual_seed(int(fingerprint(key)[:12], 16))
    if replaced:
        return torch.randint(count, (size,), generator=generator)
    return torch.randperm(count, generator=generator)[:size]


def redrawn_correct(
    features: Tensor, drawn: TrainDraws, tests: Mapping[str, Draw], ks: Sequence[int], threads: int = 1
) -> dict[int | None, dict[str, np.ndarray]]:
    """Which test rows of every class the probes get right, by k, None standing for all dimensions. bool [draws, test rows]

    features: [rows, d]. threads: classes fitted at a time. The k dimensions are those whose class means differ most on each
    draw's training rows alone.
    """
    every = torch.cat([one.rows for draws in (*drawn.of_class.values(), tests.values()) for one in draws])
    used, place = every.unique(), torch.zeros(len(features), dtype=torch.long)
    place[used] = torch.arange(len(used))
    x = features[used].double().numpy()
    gram = x @ x.T

    def one_class(label: str) -> dict[int | None, np.ndarray]:
        trains, test = drawn.of_class[label], tests[label]
        train_RN, test_M = torch.stack([place[train.rows] for train in trains]).numpy(), place[test.rows].numpy()
        y_RN = torch.stack([train.labels for train in trains]).double().numpy()
        values = {**_top_k(x, train_RN, y_RN, test_M, ks), None: _full(gram, train_RN, y_RN, test_M)}
        return {k: (z_RM > 0) == (test.labels.numpy() > 0) for k, z_RM in values.items()}

    with ThreadPoolExecutor(threads) as pool:  # many small products: each thread takes a class
        classes = dict(zip(drawn.of_class, pool.map(one_class, drawn.of_class), strict=True))
    return {k: {label: found[k] for label, found in classes.items()} for k in (*ks, None)}


def _top_k(
    x: np.ndarray, train_RN: np.ndarray, y_RN: np.ndarray, test_M: np.ndarray, ks: Sequence[int]
) -> dict[int, np.ndarray]:
    """Decision values [draws, test rows] of the probes on k dimensions."""
    weights = np.zeros((len(train_RN), len(x)))  # class mean less class mean, as one product
    np.add.at(
        weights,
        (np.arange(len(train_RN))[:, None], train_RN),
        np.where(y_RN > 0, 1 / y_RN.sum(1, keepdims=True), -1 / (1 - y_RN).sum(1, keepdims=True)),
    )
    apart_RD = np.abs(weights @ x)
    most = min(max(ks, default=0), x.shape[1])
    best_RK = np.argpartition(-apart_RD, most - 1, axis=1)[:, :most] if most else np.zeros((len(weights), 0), int)
    order = np.lexsort((best_RK, -np.take_along_axis(apart_RD, best_RK, 1)), axis=1)
    best_RK = np.take_along_axis(best_RK, order, 1)
    found = {}
    for k in ks:
        chosen_RK = best_RK[:, :k]
        theta_RK = newton(x[train_RN[:, :, None], chosen_RK[:, None]], y_RN)
        found[k] = np.einsum("rmk,rk->rm", x[test_M[:, None], chosen_RK[:, None]], theta_RK[:, :-1]) + theta_RK[:, -1:]
    return found


def _full(gram: np.ndarray, train_RN: np.ndarray, y_RN: np.ndarray, test_M: np.ndarray) -> np.ndarray:
    """Decision values [draws, test rows] of the probes on all dimensions. gram: products of all rows.

    An L2 penalty is blind to rotations, so the fit happens in the space of the training texts, with equal predictions.
    """
    values_RN, vectors = np.linalg.eigh(gram[train_RN[:, :, None], train_RN[:, None]])
    kept_RN = values_RN > values_RN[:, -1:].clip(0) * 1e-12
    scale_RN = np.sqrt(np.where(kept_RN, values_RN, 1.0))
    theta_RN = newton(vectors * np.where(kept_RN, scale_RN, 0.0)[:, None], y_RN)
    # a test text's coordinates are its products with the training texts, in the axes that those span
    weight_RN = np.einsum("rnp,rp->rn", vectors, np.where(kept_RN, theta_RN[:, :-1] / scale_RN, 0.0))
    return np.einsum("rmn,rn->rm", gram[test_M[:, None], train_RN[:, None]], weight_RN) + theta_RN[:, -1:]


def pool_size(available: Mapping[str, Mapping[str, int]], size: int, times: float) -> int:
    """Texts a class to draw from: `times` `size` where every class has them, else as many as all have."""
    return max(size, min(math.ceil(times * size), *(have["train"] for have in available.values())))
