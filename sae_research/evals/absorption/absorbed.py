"""Which latents stand for a letter: k-sparse probing, and how many latents the letter is split over.

Source: SAE Bench 0.6.0, sae_bench/evals/absorption/k_sparse_probing.py. Linear probes under L1 rank the latents; a
logistic regression is fitted on the first 1, 2, ... of them; a letter is split over k latents when every one up to the
k-th added more than `f1_jump_threshold` to F1.

SAE Bench ranks by signed weight, starts its L1 probes at random, stops after 50 passes however few steps those are, and
picks k by F1 on the test words. Ours (`lab_v1`) starts at zero, makes as many steps as SAE Bench makes on a whole
vocabulary, ranks by the weight in the direction in which the latent moves on the letter's words (so that a latent and
its negative count the same), and picks k by F1 on the training words.

How far a letter's direction is carried by other latents than its main ones, word by word.

Source: SAE Bench 0.6.0, sae_bench/evals/absorption/feature_absorption_calculator.py, after arXiv 2409.14507. The probe's
weights give the letter's direction p, a unit vector; a latent's projection is what it contributes along p.

Absorption fraction of a word: the share of the (at most three) strongest absorbing latents in what they and the main
latents contribute, where the absorbers contribute at least 40 % of the word's own projection; an absorber lies along p
by a cosine of at least 0.1. Full absorption: no main latent fires, and the strongest latent contributes at least 40 %.
Lower is better for both.

SAE Bench counts a negative main activation as not firing, looks for absorbers among positive directions only, takes
decoder rows for unit vectors, and measures against the projection of the whole activation, decoder bias included. Ours
(`lab_v1`) lets a main latent fire in its own direction, where an activation below 1 % of its usual one counts as none
(least-squares codes are never exactly zero); takes a latent with a negative direction and a negative activation for what
it is; uses decoder rows as they are; and measures against what latents can supply, the activation less the decoder's bias.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from sae_research.config.evaluation_params import Absorption
from sae_research.evals.absorption.letter_probes import (
    Features,
    Probes,
    Training,
    f1,
    one_vs_rest,
    random_start,
    train,
    zero_start,
)
from sae_research.stats.logistic import balanced, newton

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
