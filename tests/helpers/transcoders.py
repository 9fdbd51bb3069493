"""Transcoders of the tiny model's MLP, in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_research.lm import LanguageModel
from sae_research.saes import SAEConfig, SparseAutoencoder
from sae_research.saes.forms import LinearSAE, StandardSAE

D, LAYER = 32, 1
READ, WRITTEN = f"blocks.{LAYER}.mlp.hook_in", f"blocks.{LAYER}.hook_mlp_out"


def config(form: str, d_sae: int = 64, **changes: Any) -> SAEConfig:
    hooks = {"hook_name": READ, "hook_out": WRITTEN, "apply_b_dec_to_input": False}
    return SAEConfig(form=form, d_in=D, d_sae=d_sae, **hooks | changes)


def random_transcoder(seed: int = 0, skip: bool = False, **changes: Any) -> StandardSAE:
    """Latents and decoder that have nothing to do with the model."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(64, D, generator=g), dim=1)
    return StandardSAE(
        config("standard", **changes),
        W_enc=torch.randn(D, 64, generator=g) / 6,
        b_enc=torch.full((64,), -0.2),
        W_dec=rows / 8,
        b_dec=torch.randn(D, generator=g) / 50,
        **({"W_skip": torch.randn(D, D, generator=g) / 20} if skip else {}),
    )


def writing(value: Tensor) -> LinearSAE:
    """Writes one value [d_out] whatever it reads."""
    zero = torch.zeros(D, 1)
    return LinearSAE(config("linear", 1), W_enc=zero, b_enc=torch.zeros(1), W_dec=zero.T, b_dec=value)


class TheMLP(SparseAutoencoder):
    """A dictionary whose latents are what the model's own MLP puts out."""

    form = "the_mlp"
    tensor_names = ("W_dec", "b_dec")
    signed = True

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__(config(self.form, D), W_dec=torch.eye(D), b_dec=torch.zeros(D))
        self.__dict__["mlp"] = lm.layers[LAYER].mlp

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.keep(self.__dict__["mlp"](x), mask)
