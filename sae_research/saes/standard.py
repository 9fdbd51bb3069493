"""Standard SAE: ReLU of an affine map (Bricken et al. 2023, Towards Monosemanticity)."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.saes.base import SparseAutoencoder


class StandardSAE(SparseAutoencoder):
    """`z = ReLU((x - b_dec) W_enc + b_enc)`."""

    form = "standard"

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.keep(torch.relu(self.centred(x) @ self.W_enc + self.b_enc), mask)
