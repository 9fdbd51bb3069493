"""Figures of an SAE's weights alone."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from sae_research.saes import SparseAutoencoder

CHUNK_ROWS = 2048
EXACT_WIDTH = 16_384
"""Widest dictionary whose nearest neighbours are all looked for: 2.7e8 cosines, 7 s of a CPU core at d = 576."""


class LatentWeights(NamedTuple):
    """One value per latent [d_sae], on the CPU."""

    encoder_bias: Tensor
    encoder_norm: Tensor
    encoder_decoder_cosine: Tensor
    max_encoder_cosine: Tensor
    """NaN where it was not looked for (`measured_rows`)."""
    max_decoder_cosine: Tensor
    """As for the encoder."""


def max_cosine(directions_FD: Tensor) -> Tensor:
    """Largest cosine of each row [d_sae, d] with any other row; memory grows with d_sae, not its square.

    Exact for every row up to `EXACT_WIDTH` rows. Beyond that the work would grow with their square: it stays that of
    `EXACT_WIDTH` rows, as exact maxima over all other rows for evenly spaced rows alone (`measured_rows`), and NaN for the
    rest, which no mean over latents may count.
    """
    unit = torch.nn.functional.normalize(directions_FD.float(), dim=1)
    rows = measured_rows(len(unit))
    best = torch.full((len(unit),), torch.nan, device=unit.device)
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS].to(unit.device)
        cosines = unit[chunk] @ unit.T
        cosines[torch.arange(len(chunk), device=unit.device), chunk] = -torch.inf
        best[chunk] = cosines.amax(dim=1)
    return best


def measured_rows(d_sae: int) -> Tensor:
    """The latents whose nearest neighbour is looked for [rows]: all up to `EXACT_WIDTH`, else `EXACT_WIDTH`² / d_sae,
    evenly spaced from the first on."""
    if d_sae <= EXACT_WIDTH:
        return torch.arange(d_sae)
    count = max(1, EXACT_WIDTH**2 // d_sae)
    return torch.arange(count) * d_sae // count


_looked_for: dict[tuple[str, str], Tensor] = {}
_REMEMBERED = 8


def _nearest(directions_FD: Tensor) -> Tensor:
    """`max_cosine` on the CPU, remembered by content: many SAEs of a comparison stand on one dictionary."""
    key = (hashlib.sha256(directions_FD.contiguous().cpu().numpy()).hexdigest(), directions_FD.device.type)
    if key not in _looked_for:
        while len(_looked_for) >= _REMEMBERED:
            del _looked_for[next(iter(_looked_for))]
        _looked_for[key] = max_cosine(directions_FD).cpu()
    return _looked_for[key]


@torch.no_grad()
def latent_weights(sae: SparseAutoencoder) -> LatentWeights:
    """Encoder norm and bias, cosine of encoder and decoder, and nearest neighbours of both."""
    W_enc, b_enc = sae.encoder_weights()
    encoder_FD, decoder_FD = W_enc.T.float(), sae.W_dec.float()
    return LatentWeights(
        *(
            value.cpu()
            for value in (
                b_enc.float(),
                encoder_FD.norm(dim=1),
                torch.nn.functional.cosine_similarity(encoder_FD, decoder_FD, dim=1),
                _nearest(encoder_FD),
                _nearest(decoder_FD),
            )
        )
    )
