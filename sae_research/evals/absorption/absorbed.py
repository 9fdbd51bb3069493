"""How far a letter's direction is carried by other latents than its main ones, word by word.

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


def lab_absorbed(z: np.ndarray, word_projection: np.ndarray, rows_projection: np.ndarray, cosine: np.ndarray,
                 main: list[int], usual: np.ndarray) -> Absorbed:
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
    absorbed = np.partition(candidates, candidates.shape[1] - count, axis=1)[:, candidates.shape[1] - count:].sum(1) \
        if count else np.zeros(len(projection))
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
