"""Figures of an SAE's weights alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae_research.saes import SparseAutoencoder

CHUNK_ROWS = 2048


class LatentWeights(NamedTuple):
    """One value per latent [d_sae], on the CPU."""

    encoder_bias: Tensor
    encoder_norm: Tensor
    encoder_decoder_cosine: Tensor
    max_encoder_cosine: Tensor
    max_decoder_cosine: Tensor


def max_cosine(directions_FD: Tensor) -> Tensor:
    """Largest cosine of each row [d_sae, d] with any other row; memory grows with d_sae, not its square."""
    unit = torch.nn.functional.normalize(directions_FD.float(), dim=1)
    best = []
    for start in range(0, len(unit), CHUNK_ROWS):
        cosines = unit[start:start + CHUNK_ROWS] @ unit.T
        cosines.diagonal(start).fill_(-torch.inf)
        best.append(cosines.amax(dim=1))
    return torch.cat(best)


@torch.no_grad()
def latent_weights(sae: SparseAutoencoder) -> LatentWeights:
    """Encoder norm and bias, cosine of encoder and decoder, and nearest neighbours of both."""
    W_enc, b_enc = sae.encoder_weights()
    encoder_FD, decoder_FD = W_enc.T.float(), sae.W_dec.float()
    nearest_decoder = max_cosine(decoder_FD)
    tied = encoder_FD.data_ptr() == decoder_FD.data_ptr()
    return LatentWeights(*(value.cpu() for value in (
        b_enc.float(), encoder_FD.norm(dim=1),
        torch.nn.functional.cosine_similarity(encoder_FD, decoder_FD, dim=1),
        nearest_decoder if tied else max_cosine(encoder_FD), nearest_decoder)))
