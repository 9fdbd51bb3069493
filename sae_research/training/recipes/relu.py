"""Recipe `relu`: ReLU SAE without centring, decoder rows normalised in the forward pass (SAE-Interpretability)."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.training.recipes.base import StepOutput
from sae_research.training.recipes.l1 import L1Family


class Relu(L1Family):
    """Minimises `mean over tokens of (|x - x_hat|^2 + l1 * sum_i z_i) / d_in`, `z = ReLU(x W_enc^T + b_enc)`.

    The division by d_in is that framework's mean over dimensions; it scales both terms alike, so `l1_coefficient`
    means the same as in `standard`. Rows are normalised on the way, so that only directions are learned.
    """

    form = "standard"
    unit_rows = False
    reads_b_dec = False
    clip_norm = 1.0

    def decoder(self) -> Tensor:
        return torch.nn.functional.normalize(self.W_dec, dim=1)

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        code = self.reconstruct(x_BD)
        residual_BD = x_BD - code.x_hat
        loss = (residual_BD.square().sum() + self.penalty(progress) * code.activations.sum()) / x_BD.numel()
        return StepOutput(loss, residual_BD.detach(), code.l0, code.fired)

    def own_tensors(self, scale: float) -> dict[str, Tensor]:
        return {**super().own_tensors(scale), "W_dec": self.decoder()}
