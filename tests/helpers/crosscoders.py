"""Crosscoders of the tiny model's stream, in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_research.saes import SAEConfig
from sae_research.saes.forms import LinearSAE, StandardSAE

D = 32
HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post")
SCALES = (0.5, 2.0, 0.25)


def config(form: str, d_sae: int = 64, **changes: Any) -> SAEConfig:
    about = {"hook_name": " + ".join(HOOKS), "hook_scales": SCALES, "apply_b_dec_to_input": False}
    return SAEConfig(form=form, d_in=3 * D, d_sae=d_sae, **about | changes)


def random_crosscoder(seed: int = 0, **changes: Any) -> StandardSAE:
    """Latents and decoder that have nothing to do with the model."""
    g = torch.Generator().manual_seed(seed)
    return StandardSAE(
        config("standard", **changes),
        W_enc=torch.randn(3 * D, 64, generator=g) / 10,
        b_enc=torch.full((64,), -0.2),
        W_dec=torch.randn(64, 3 * D, generator=g) / 30,
        b_dec=torch.randn(3 * D, generator=g) / 50,
    )


def writing(factor: float, value: Tensor) -> LinearSAE:
    """Writes `factor` times what it reads, and a value [3 D]."""
    eye = torch.eye(3 * D)
    return LinearSAE(config("linear", 3 * D), W_enc=eye, b_enc=torch.zeros(3 * D), W_dec=factor * eye, b_dec=value)
