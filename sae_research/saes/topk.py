"""TopK SAE: the k largest pre-activations of a token, after a ReLU (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.errors import UserError
from sae_research.saes.base import SAEConfig, SparseAutoencoder


class TopKSAE(SparseAutoencoder):
    """`z = TopK(ReLU((x - b_dec) W_enc + b_enc))`, exactly k or fewer positive latents a token."""

    form = "topk"
    option_names = ("k",)

    def __init__(self, cfg: SAEConfig | None = None, *, k: int, **tensors: Tensor) -> None:
        super().__init__(cfg, **tensors)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.cfg.d_sae:
            raise UserError(f"topk: k = {k!r} must be a whole number between 1 and d_sae = {self.cfg.d_sae}")
        self.k = k

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        positive = torch.relu(self.centred(x) @ self.W_enc + self.b_enc)
        values, indices = positive.topk(self.k, dim=-1, sorted=False)
        return self.keep(torch.zeros_like(positive).scatter_(-1, indices, values), mask)
