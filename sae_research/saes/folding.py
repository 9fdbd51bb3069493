"""Unit decoder rows: the scale of a latent moved from its decoder row into its encoder."""

from __future__ import annotations

import torch
from torch import Tensor

ENCODER_SCALES: dict[str, tuple[str, ...]] = {
    "standard": ("W_enc", "b_enc"),
    "topk": ("W_enc", "b_enc"),
    "jumprelu": ("W_enc", "b_enc", "threshold"),
    "gated": ("W_enc", "b_gate", "b_mag"),
}
"""What grows with a latent's activation in each form. `r_mag` of gated SAEs multiplies and stays."""
UNIT_TOLERANCE = 1e-6


def fold_decoder_norms(form: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same SAE with unit rows in `W_dec` [d_sae, d_in]: same support, same reconstruction, rescaled
    activations.

    Exact for ReLU-like forms. For TopK it changes which latents win, so call it only where the SAE ranked its
    latents by activation times norm to begin with. Weights that are unit already come back untouched; zero
    rows stay zero.
    """
    norms_F = tensors["W_dec"].norm(dim=1)
    norms_F = torch.where(norms_F > 0, norms_F, torch.ones_like(norms_F))
    if (norms_F - 1).abs().max() <= UNIT_TOLERANCE:
        return tensors
    scaled = {name: tensors[name] * norms_F for name in ENCODER_SCALES[form]}
    return {**tensors, **scaled, "W_dec": tensors["W_dec"] / norms_F[:, None]}
