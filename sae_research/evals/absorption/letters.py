"""Which latents stand for a first letter, and which letters other latents have absorbed.

A letter's direction is a logistic regression on activations of words. Latents are ranked by a probe with an L1 penalty;
then a logistic regression is fitted on the first 1, 2, ... of them; a letter is split over k latents when every one up to
the k-th raises F1. A word counts as absorbed where none of them fires and another latent writes the letter's direction.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.special import expit

from sae_research.config.evaluation_params import Absorption
from sae_research.stats.logistic import balanced, newton

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


_DENSE_ABOVE = 0.08
"""Share of non-zero latents from which dense products are faster than sparse ones."""
_DENSE_ELEMENTS = 250_000_000
"""Largest [words, d_sae] table made dense (1 GB in float32)."""
_LAB_STEPS = 300
"""Six batches of 4,096 words times 50 passes: SAE Bench on a vocabulary of 30,000."""


class WordLatents(NamedTuple):
    """One SAE's latents at the words that take part, and the letters asked about."""

    train: sparse.csr_matrix
    test: sparse.csr_matrix
    train_labels: np.ndarray
    test_labels: np.ndarray
    letters: np.ndarray
    """Numbers of the letters that qualify [letters]."""


class MainLatents(NamedTuple):
    """A letter's main latents."""

    latents: list[int]
    """In order of rank; none where no latent moves with the letter."""
    f1: list[float]
    """F1 on test words of the probe on the first 1, 2, ... latents."""

    @property
    def split_f1(self) -> float:
        """F1 on test words of the probe on the main latents."""
        return self.f1[len(self.latents) - 1] if self.latents else 0.0


def sae_bench_main_latents(data: WordLatents, config: Absorption, seed: int) -> list[MainLatents]:
    """Every letter's main latents in SAE Bench's definition."""
    how = Training(epochs=50, batch_size=4096, weight_decay=1e-6, l1=config.k_sparse_probe_l1_decay)
    weights = _l1_probes(data, random_start(data.train.shape[1], (seed, 3)), how, (seed, 4)).weights
    ranked = np.argsort(-weights, axis=0, kind="stable")[: config.max_k_value].T
    scores = _f1_by_k(data, list(ranked))
    return [
        MainLatents(row[: _split(test, config.f1_jump_threshold)].tolist(), test)
        for row, (_, test) in zip(ranked, scores, strict=True)
    ]


def lab_main_latents(data: WordLatents, config: Absorption, seed: int) -> list[MainLatents]:
    """Every letter's main latents in our definition."""
    batches = -(-data.train.shape[0] // 4096)
    how = Training(
        epochs=max(1, _LAB_STEPS // batches), batch_size=4096, weight_decay=1e-6, l1=config.k_sparse_probe_l1_decay
    )
    weights = _l1_probes(data, zero_start(data.train.shape[1]), how, (seed, 5)).weights
    ranked = []
    for column, letter in enumerate(data.letters):
        moves = np.sign(np.asarray(data.train[data.train_labels == letter].sum(0))[0])
        rank = weights[:, column] * moves
        order = np.argsort(-rank, kind="stable")[: config.max_k_value]
        ranked.append(order[rank[order] > 0])
    scores = _f1_by_k(data, ranked)
    return [
        MainLatents(row[: _split(on_train, config.f1_jump_threshold)].tolist(), on_test)
        for row, (on_train, on_test) in zip(ranked, scores, strict=True)
    ]


def _l1_probes(data: WordLatents, start: Probes, how: Training, seed: tuple[int, ...]) -> Probes:
    """Probes of the letters asked about. The other outputs change nothing in these, so they are left out."""
    x: Features = data.train
    elements = x.shape[0] * x.shape[1]
    if x.nnz > _DENSE_ABOVE * elements and elements <= _DENSE_ELEMENTS:
        x = x.toarray()
    y = one_vs_rest(data.train_labels, data.letters)
    return train(x, y, Probes(start.weights[:, data.letters], start.biases[data.letters]), how, seed)


def _split(scores: list[float], threshold: float) -> int:
    """Over how many latents a letter is split: up to the first k that does not add more than `threshold` to F1."""
    best, k = -np.inf, 0
    for score in scores:
        if score <= best + threshold:
            break
        best, k = score, k + 1
    return k


def _f1_by_k(data: WordLatents, ranked: list[np.ndarray]) -> list[tuple[list[float], list[float]]]:
    """For every letter, F1 on training and on test words of a probe on its first 1, 2, ... latents."""
    n_letters, most = len(ranked), max((len(row) for row in ranked), default=0)
    x_train, x_test = (_columns(x, ranked, most) for x in (data.train, data.test))
    y_train, y_test = (one_vs_rest(labels, data.letters).T for labels in (data.train_labels, data.test_labels))
    scores: list[tuple[list[float], list[float]]] = [([], []) for _ in ranked]
    theta, weight = np.zeros((n_letters, 1)), balanced(y_train)
    for k in range(1, most + 1):
        theta = np.insert(theta, k - 1, 0.0, axis=1)
        theta = newton(x_train[:, :, :k], y_train, weight, theta)
        for values, x, y in ((0, x_train, y_train), (1, x_test, y_test)):
            found = f1((x[:, :, :k] @ theta[:, :k, None])[..., 0].T + theta[:, k], y.T)
            for letter, row in enumerate(ranked):
                if k <= len(row):
                    scores[letter][values].append(float(found[letter]))
    return scores


def _columns(x: sparse.csr_matrix, ranked: list[np.ndarray], most: int) -> np.ndarray:
    """The letters' latents, float64 [letters, rows, most]; zero where a letter has fewer."""
    by_column, values = x.tocsc(), np.zeros((len(ranked), x.shape[0], most))
    for letter, row in enumerate(ranked):
        values[letter, :, : len(row)] = by_column[:, row].toarray()
    return values


FULL_COSINE = 0.025
FRACTION_COSINE = 0.1
PROPORTION = 0.4
MAX_ABSORBERS = 3
_SAE_BENCH_SILENT = 1e-8
_LAB_SILENT = 0.01


class Absorbed(NamedTuple):
    """One letter's words."""

    fraction: np.ndarray
    """Absorption fraction [words]."""
    full: np.ndarray
    """Full absorption, bool [words]."""


def sae_bench_absorbed(z: np.ndarray, word_projection: np.ndarray, cosine: np.ndarray, main: list[int]) -> Absorbed:
    """SAE Bench's definition. z: latents [words, d_sae]; word_projection: of the activations on p [words]; cosine: of
    the decoder rows with p [d_sae]; main: the letter's main latents."""
    projection = z * cosine
    other = np.ones(len(cosine), bool)
    other[main] = False
    fraction = _fraction(projection, other & (cosine >= FRACTION_COSINE), projection[:, main].sum(1), word_projection)
    silent = (z[:, main] < _SAE_BENCH_SILENT).all(1)
    return Absorbed(fraction, silent & _carried(projection, np.ones_like(other), cosine, word_projection))


def lab_absorbed(
    z: np.ndarray,
    word_projection: np.ndarray,
    rows_projection: np.ndarray,
    cosine: np.ndarray,
    main: list[int],
    usual: np.ndarray,
) -> Absorbed:
    """Our definition. word_projection: of the activations less the decoder's bias [words]; rows_projection: of the
    decoder rows on p [d_sae]; usual: the main latents' mean activation over the letter's training words that they move
    on, signed [main]. The rest as above."""
    projection = z * rows_projection
    other = np.ones(len(cosine), bool)
    other[main] = False
    fraction = _fraction(projection, other & (abs(cosine) >= FRACTION_COSINE), projection[:, main].sum(1), word_projection)
    silent = (z[:, main] * np.sign(usual) <= _LAB_SILENT * abs(usual)).all(1)
    return Absorbed(fraction, silent & _carried(projection, other, abs(cosine), word_projection))


def usual_activation(z: np.ndarray) -> np.ndarray:
    """Mean activation of latents where they fire in their own direction, signed [latents]. z: [words, latents]."""
    direction = np.sign(z.sum(0))
    along = np.maximum(z * direction, 0)
    return direction * along.sum(0) / np.maximum((along > 0).sum(0), 1)


def _fraction(projection: np.ndarray, absorber: np.ndarray, by_main: np.ndarray, word_projection: np.ndarray) -> np.ndarray:
    """Absorption fraction [words]. projection: [words, d_sae]; absorber: which latents may absorb [d_sae]; by_main: what
    the main latents contribute [words]."""
    candidates = np.maximum(projection[:, absorber], 0)
    count = min(MAX_ABSORBERS, candidates.shape[1])
    absorbed = (
        np.partition(candidates, candidates.shape[1] - count, axis=1)[:, candidates.shape[1] - count :].sum(1)
        if count
        else np.zeros(len(projection))
    )
    enough = (word_projection > 0) & (absorbed >= PROPORTION * word_projection) & (by_main < word_projection)
    share = np.minimum(absorbed, word_projection - by_main)
    total = share + by_main
    part = np.divide(share, total, out=np.ones_like(total), where=(by_main > 0) & (total > 0))
    return np.where(enough, np.clip(part, 0, 1), 0.0)


def _carried(projection: np.ndarray, candidate: np.ndarray, cosine: np.ndarray, word_projection: np.ndarray) -> np.ndarray:
    """Whether the strongest candidate latent lies along p and contributes enough [words]."""
    values = np.where(candidate, projection, -np.inf)
    top = values.argmax(1)
    strongest = values[np.arange(len(values)), top]
    return (cosine[top] >= FULL_COSINE) & (word_projection > 0) & (strongest >= PROPORTION * word_projection)
