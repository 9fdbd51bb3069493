"""Which latents belong together: nearest by decoder cosine within an SAE, matched by cosine or correlation between two."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from sae_research.analysis.store import LatentStats
from sae_research.saes import SparseAutoencoder

CHUNK_LATENTS = 1024
CORRELATIONS = 8_000_000
"""Held at a time."""


class Matches(NamedTuple):
    """For every latent of one SAE the likest of another."""

    partner: np.ndarray
    """int [F], -1 where none is like it at all"""
    score: np.ndarray
    """float [F]: cosine or correlation"""


@torch.no_grad()
def nearest(W_dec: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(latents, cosines) of the k other latents whose decoder rows are likest, likest first. [F, k] each"""
    unit = functional.normalize(W_dec.detach().float(), dim=1)
    k = min(k, len(unit) - 1)
    found = []
    for first in range(0, len(unit), CHUNK_LATENTS):
        cosine = unit[first : first + CHUNK_LATENTS] @ unit.T
        rows = torch.arange(len(cosine), device=cosine.device)
        cosine[rows, rows + first] = -torch.inf
        found.append(cosine.topk(k))
    return (
        torch.cat([part.indices for part in found]).cpu().numpy(),
        torch.cat([part.values for part in found]).cpu().numpy(),
    )


@torch.no_grad()
def match_by_decoder(one: SparseAutoencoder, other: SparseAutoencoder) -> Matches:
    """By cosine of decoder rows, which must live in the same space."""
    a, b = (functional.normalize(sae.W_dec.detach().float().cpu(), dim=1) for sae in (one, other))
    best = [(part @ b.T).max(1) for part in a.split(CHUNK_LATENTS)]
    return Matches(torch.cat([part.indices for part in best]).numpy(), torch.cat([part.values for part in best]).numpy())


def match_by_activation(one: LatentStats, other: LatentStats) -> Matches:
    """By Pearson correlation of activations over the tokens that count in both stores, which hold the same text.

    With n tokens, r = (E[ab] - E[a]E[b]) / (sd(a) sd(b)): the products come from one sparse matrix product.
    """
    n, (a, b) = _same_tokens(one, other)
    (mean_a, sd_a), (mean_b, sd_b) = _moments(a), _moments(b)
    transposed = b.T.tocsr()
    partner, score = np.full(a.shape[0], -1), np.zeros(a.shape[0])
    step = max(1, CORRELATIONS // b.shape[0])
    for first in range(0, a.shape[0], step):
        rows = slice(first, first + step)
        covariance = (a[rows] @ transposed).toarray() / n - np.outer(mean_a[rows], mean_b)
        scale = np.outer(sd_a[rows], sd_b)
        correlation = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
        partner[rows], score[rows] = correlation.argmax(1), correlation.max(1)
    partner[score <= 0] = -1
    return Matches(partner, np.maximum(score, 0))


def same_text(one: LatentStats, other: LatentStats) -> bool:
    """Whether two stores hold activations on the same tokens."""
    return one.token_ids.shape == other.token_ids.shape and np.array_equal(one.token_ids, other.token_ids)


def activation_correlation(one: LatentStats, other: LatentStats) -> np.ndarray:
    """Pearson correlation of every latent with the latent of the same number, over the same text [F]."""
    n, (a, b) = _same_tokens(one, other)
    (mean_a, sd_a), (mean_b, sd_b) = _moments(a), _moments(b)
    covariance = np.asarray(a.multiply(b).sum(1)).ravel() / n - mean_a * mean_b
    scale = sd_a * sd_b
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)


def _moments(z: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation) of every row, zeros included."""
    mean = np.asarray(z.sum(1)).ravel() / z.shape[1]
    square = np.asarray(z.multiply(z).sum(1)).ravel() / z.shape[1]
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def _same_tokens(one: LatentStats, other: LatentStats) -> tuple[int, list[sparse.csr_matrix]]:
    """(n tokens that count in both, activations of each [F, n])."""
    both = np.asarray(one.counted).reshape(-1) & np.asarray(other.counted).reshape(-1)
    column = np.cumsum(both) - 1
    return int(both.sum()), [_matrix(stats, both, column) for stats in (one, other)]


def _matrix(stats: LatentStats, kept: np.ndarray, column: np.ndarray) -> sparse.csr_matrix:
    tokens, values, start = [], [], [0]
    for latent in range(stats.d_sae):
        token, value = stats.activations(latent)
        inside = kept[token]
        tokens.append(column[token[inside]])
        values.append(value[inside].astype(np.float64))
        start.append(start[-1] + int(inside.sum()))
    return sparse.csr_matrix(
        (np.concatenate(values), np.concatenate(tokens), np.array(start)), shape=(stats.d_sae, int(kept.sum()))
    )
