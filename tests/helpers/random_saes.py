"""Small random SAEs of every form."""

from __future__ import annotations

from typing import Any

import torch

from sae_research.saes import SAEConfig, SparseAutoencoder, form_class

D_IN, D_SAE = 12, 40
OPTIONS: dict[str, dict[str, Any]] = {
    "topk": {"k": 5},
    "abs_topk": {"k": 5},
    "groupmax": {"k": 5},
    "layer_norm": {"k": 5},
    "sae_lens_temporal": {"k": 5, "heads": 2, "epsilon": 1e-6},
    "ihtp": {"k": 2},
    "matching_pursuit": {"s": 4},
    "mapped_matching_pursuit": {"s": 4},
    "nonnegative_matching_pursuit": {"s": 4},
    "omp": {"s": 4},
    "nonnegative_omp": {"s": 4},
    "topk_refit": {"k": 3},
    **{
        name: {"beta": 0.5, "stretch": [-0.1, 1.1]}
        for name in ("hard_concrete", "signed_hard_concrete", "gated_hard_concrete")
    },
    "sae_lens_matching_pursuit": {"max_iterations": 4, "residual_threshold": 0.1, "stop_on_duplicate_support": True},
}
OWN_FORMS = (
    "standard",
    "linear",
    "topk",
    "abs_topk",
    "groupmax",
    "tanh_relu",
    "layer_norm",
    "sae_lens_temporal",
    "jumprelu",
    "gated",
    "ihtp",
    "matching_pursuit",
    "nonnegative_matching_pursuit",
    "omp",
    "nonnegative_omp",
    "topk_refit",
)


def make_sae(form: str, seed: int = 0, unit: bool = True, **config: Any) -> SparseAutoencoder:
    """A random SAE that fires on some, not all, latents of standard normal activations."""
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(D_SAE, D_IN, generator=g)
    if unit:
        W_dec = torch.nn.functional.normalize(W_dec, dim=1)
    pool = {
        "W_enc": torch.randn(D_IN, D_SAE, generator=g),
        "W_dec": W_dec,
        "b_dec": torch.randn(D_IN, generator=g) / 3,
        "b_in": torch.zeros(D_IN),
        "threshold": torch.rand(D_SAE, generator=g),
        **{name: torch.randn(D_SAE, generator=g) / 2 for name in ("b_enc", "b_gate", "b_mag", "r_mag")},
        "W_gate": torch.randn(D_IN, D_SAE, generator=g),
        "sharpness": torch.rand(D_SAE, generator=g) + 0.5,
        **{
            f"{part}_{kind}": torch.randn(2, out, *(D_SAE,) * (kind == "weight"), generator=g) / 4
            for part, out in (("key", 8), ("query", 8), ("value", D_SAE), ("out", D_SAE))
            for kind in ("weight", "bias")
        },
    }
    if form == "mapped_matching_pursuit":  # its atoms are the columns of W_enc
        pool["W_enc"] = torch.nn.functional.normalize(pool["W_enc"], dim=0)
    if form == "cross_layer":  # of two layers
        pool |= {"W_enc": pool["W_enc"][: D_IN // 2], "W_dec": torch.randn(3 * D_SAE // 2, D_IN // 2, generator=g)}
        read, written = (
            " + ".join(f"blocks.{layer}.{kind}" for layer in (0, 1)) for kind in ("mlp.hook_in", "hook_mlp_out")
        )
        config = {"hook_name": read, "hook_out": written, "apply_b_dec_to_input": False} | config
    cls = form_class(form)
    cfg = SAEConfig(
        form=form,
        d_in=D_IN,
        d_sae=D_SAE,
        options=OPTIONS.get(form, {}),
        **{"model_name": "org/tiny", "hook_name": "blocks.1.hook_resid_post", "context_size": 16, **config},
    )
    return cls.from_tensors(cfg, {name: pool[name] for name in cls.tensor_names})


def random_activations() -> torch.Tensor:
    """Activations [batch, seq, d_in]."""
    return torch.randn(3, 7, D_IN, generator=torch.Generator().manual_seed(5))
