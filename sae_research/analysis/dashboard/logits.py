"""What latents' directions do to the next token, to first order: all of them at once, as a site shows it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.lm import LanguageModel
from sae_research.lm.generate import unembedding
from sae_research.saes import SparseAutoencoder

CHUNK_LATENTS = 256
BINS = 40


class LogitEffects(NamedTuple):
    """Logits that one unit of each latent adds directly, less their mean over the vocabulary. F latents."""

    raised: np.ndarray
    """Token ids, largest first int [F, k]"""
    raised_by: np.ndarray
    """float [F, k]"""
    lowered: np.ndarray
    """Token ids, smallest first int [F, k]"""
    lowered_by: np.ndarray
    """float [F, k]"""
    histogram: np.ndarray
    """Tokens of the vocabulary in `BINS` equal bins from the smallest logit to the largest int [F, BINS]"""
    skew: np.ndarray
    """[F]"""
    kurtosis: np.ndarray
    """Excess [F]"""


def in_residual_stream(sae: SparseAutoencoder, lm: LanguageModel) -> bool:
    """Whether an SAE's directions can be read through the unembedding."""
    return sae.cfg.d_out == lm.d_model and sae.cfg.in_stream


@torch.no_grad()
def logit_effects(sae: SparseAutoencoder, lm: LanguageModel, k: int) -> LogitEffects | None:
    """Effects of all latents, `W_dec W_U` with the final norm's gain folded in; None for an SAE outside the residual
    stream, whose latents promote no tokens directly."""
    if not in_residual_stream(sae, lm):
        return None
    out = unembedding(lm)
    parts = [_effects(out.logits(rows), k) for rows in sae.W_dec.detach().split(CHUNK_LATENTS)]
    return LogitEffects(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def _effects(logits: Tensor, k: int) -> tuple[Tensor, ...]:
    centred = logits - logits.mean(1, keepdim=True)
    up, down = (centred.topk(min(k, centred.shape[1]), largest=largest) for largest in (True, False))
    low, high = down.values[:, :1], up.values[:, :1]
    bins = ((centred - low) * (BINS / (high - low).clamp_min(1e-12))).to(torch.uint8).clamp_max_(BINS - 1)
    counts = torch.stack([torch.bincount(row, minlength=BINS) for row in bins])
    square = centred * centred
    deviation = square.mean(1).sqrt().clamp_min(1e-12)
    skew = (square * centred).mean(1) / deviation**3
    kurtosis = square.square_().mean(1) / deviation**4 - 3
    return up.indices, up.values, down.indices, down.values, counts, skew, kurtosis
