"""SAEs on the tiny model whose first latents hardly ever fire."""

from __future__ import annotations

import torch

from sae_research.saes import SparseAutoencoder
from tests.helpers.tiny_saes import D_SAE, tiny_sae

SIZE = 32
EARLY, LATE = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


def biased(form: str, shift: float = 10.0, hook: str = LATE, seed: int = 0) -> SparseAutoencoder:
    """A random SAE whose first latents hardly ever fire; its reconstruction is nowhere near the activations."""
    sae = tiny_sae(form, seed=seed, hook_name=hook)
    if "b_enc" in sae.tensor_names:
        sae.b_enc.copy_(torch.linspace(-shift, 0.3, D_SAE))
    sae.b_dec.copy_(torch.linspace(-0.2, 0.2, sae.cfg.d_in))
    return sae
