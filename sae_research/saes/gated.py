"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.saes.base import SparseAutoencoder


class GatedSAE(SparseAutoencoder):
    """`z = 1[pi + b_gate > 0] * ReLU(exp(r_mag) * pi + b_mag)`, with `pi = (x - b_dec) W_enc`."""

    form = "gated"
    tensor_names = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        shared = self.centred(x) @ self.W_enc
        magnitude = torch.relu(shared * self.r_mag.exp() + self.b_mag)
        return self.keep(magnitude * (shared + self.b_gate > 0), mask)

    def encoder_weights(self) -> tuple[Tensor, Tensor]:
        return self.W_enc, self.b_mag
