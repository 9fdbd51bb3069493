"""Random SAEs that fit the tiny model."""

from __future__ import annotations

from typing import Any

import torch

from sae_research.saes import SAEConfig, SparseAutoencoder, form_class

D_IN, D_SAE, HOOK = 32, 64, "blocks.1.hook_resid_post"


def tiny_sae(form: str = "standard", seed: int = 0, **config: Any) -> SparseAutoencoder:
    """A random SAE for the tiny model's residual stream after layer 1."""
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=g), dim=1)
    options = {"k": 4} if form == "topk" else {}
    cls = form_class(form)
    cfg = SAEConfig(
        form=form, d_in=D_IN, d_sae=D_SAE, options=options, **{"model_name": "somewhere/tiny", "hook_name": HOOK, **config}
    )
    return cls(
        cfg,
        W_enc=W_dec.T.contiguous(),
        W_dec=W_dec,
        b_enc=torch.zeros(D_SAE),
        b_dec=torch.zeros(D_IN),
        **options,
    )
