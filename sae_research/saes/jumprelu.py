"""JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435); also how BatchTopK SAEs run at inference."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.saes.base import SparseAutoencoder


class JumpReLUSAE(SparseAutoencoder):
    """`z = ReLU(pre) where pre > threshold`, with `pre = (x - b_dec) W_enc + b_enc`."""

    form = "jumprelu"
    tensor_names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        pre = self.centred(x) @ self.W_enc + self.b_enc
        return self.keep(torch.relu(pre) * (pre > self.threshold), mask)
