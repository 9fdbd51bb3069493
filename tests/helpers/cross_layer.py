"""Cross-layer transcoders of the tiny model's MLPs, in memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from sae_research.lm import LanguageModel
from sae_research.saes import SAEConfig
from sae_research.saes.cross_layer import CrossLayerTranscoder

D, LAYERS, F = 32, 3, 20
READ = tuple(f"blocks.{layer}.mlp.hook_in" for layer in range(LAYERS))
WRITTEN = tuple(f"blocks.{layer}.hook_mlp_out" for layer in range(LAYERS))
PAIRS = LAYERS * (LAYERS + 1) // 2


def config(layers: int = LAYERS, width: int = F, **changes: Any) -> SAEConfig:
    about = {
        "hook_name": " + ".join(READ[:layers]),
        "hook_out": " + ".join(WRITTEN[:layers]),
        "apply_b_dec_to_input": False,
    }
    return SAEConfig("cross_layer", layers * D, layers * width, d_out=layers * D, **about | changes)


def random_clt(seed: int = 0, skip: bool = False, k: int | None = None, thresholds: bool = True, **changes: Any) -> Any:
    """Latents and decoders that have nothing to do with the model."""
    g = torch.Generator().manual_seed(seed)
    return CrossLayerTranscoder(
        config(**changes),
        k=k,
        W_enc=torch.randn(D, LAYERS * F, generator=g) / 6,
        b_enc=torch.randn(LAYERS * F, generator=g) / 10,
        W_dec=torch.randn(PAIRS * F, D, generator=g) / 30,
        b_dec=torch.randn(LAYERS * D, generator=g) / 50,
        threshold=torch.rand(LAYERS * F, generator=g) / 4 * thresholds,
        **({"W_skip": torch.randn(LAYERS * D, D, generator=g) / 20} if skip else {}),
    )


def writing(value: Tensor, W_skip: Tensor | None = None) -> CrossLayerTranscoder:
    """Writes one value [LAYERS * D] whatever it reads, and what a skip makes of it."""
    return CrossLayerTranscoder(
        config(width=1),
        W_enc=torch.zeros(D, LAYERS),
        b_enc=torch.zeros(LAYERS),
        W_dec=torch.zeros(PAIRS, D),
        b_dec=value,
        threshold=torch.zeros(LAYERS),
        **({} if W_skip is None else {"W_skip": W_skip}),
    )


class TheMLPs(CrossLayerTranscoder):
    """Latents are what each of the model's own MLPs puts out; decoders hand them on to their own layer alone."""

    form = "the_mlps"

    def __init__(self, lm: LanguageModel) -> None:
        own = [
            torch.eye(D) if source == written else torch.zeros(D, D)
            for written in range(LAYERS)
            for source in range(written + 1)
        ]
        super().__init__(
            config(width=D),
            W_enc=torch.zeros(D, LAYERS * D),
            b_enc=torch.zeros(LAYERS * D),
            W_dec=torch.cat(own),
            b_dec=torch.zeros(LAYERS * D),
            threshold=torch.zeros(LAYERS * D),
        )
        self.__dict__["mlps"] = [
            copy.deepcopy(layer.mlp) for layer in lm.layers
        ]  # hooks on the model's see no call of these

    @torch.no_grad()
    def encode_hook(self, number: int, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.keep(self.__dict__["mlps"][number](x), mask)
