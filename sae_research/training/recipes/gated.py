"""Recipes `gated_rajamanoharan` (Rajamanoharan et al. 2024, arXiv 2404.16014) and `gated` (SAE-Interpretability).

Gates decide which latents are active, magnitudes how much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.config.params import Train
from sae_research.config.recipes import GatedRecipe
from sae_research.training.recipes.base import StepOutput, length_factor
from sae_research.training.recipes.l1 import INITIAL_DENSITY, L1Family


class GatedRajamanoharan(L1Family):
    """Minimises `mean over tokens of |x - x_hat|^2 + l1 * sum_i ReLU(gate_i) + aux * |x - x_hat_gate|^2`.

    `pi = (x - b_dec) W_enc^T`; `gate = pi + b_gate`; `z = 1[gate > 0] ReLU(exp(r_mag) pi + b_mag)`;
    `x_hat_gate = ReLU(gate) sg(W_dec) + sg(b_dec)`, sg stopping the gradient (equations 6 to 8; SAELens lets it
    through). Decoder rows have unit norm. `b_enc` stands for `b_gate`.
    """

    form = "gated"
    betas = (0.0, 0.999)
    config: GatedRecipe  # ty: ignore[incompatible-mutable-override]

    def __init__(self, d_in: int, config: GatedRecipe, train: Train) -> None:
        super().__init__(d_in, config, train)
        self.r_mag = torch.nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = torch.nn.Parameter(torch.zeros(config.d_sae))

    @torch.no_grad()
    def fit_encoder(self, rows_ND: Tensor) -> None:
        self.b_enc.fill_(-float(self.sparsify_start(rows_ND, INITIAL_DENSITY)))
        self.b_mag.copy_(self.b_enc)
        _, z_NF, _ = self._encode(rows_ND)
        factor = length_factor(z_NF @ self.W_dec, self.written(rows_ND) - self.b_dec)
        for parameter in (self.W_enc, self.b_enc, self.b_mag):
            parameter.mul_(factor)

    def _encode(self, x_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(ReLU of the gate, activations, which are active) [B, F]."""
        pi_BF = self.directions(x_BD)
        gate_BF = pi_BF + self.b_enc
        z_BF = (gate_BF > 0) * torch.relu(self.r_mag.exp() * pi_BF + self.b_mag)
        return torch.relu(gate_BF), z_BF, z_BF.detach() > 0

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        gate_BF, z_BF, active_BF = self._encode(x_BD)
        target_BD = self.target(x_BD)
        residual_BD = target_BD - (self.decode(z_BF, self.W_dec) + self.b_dec)
        gate_error_BD = target_BD.detach() - (self.decode(gate_BF, self.W_dec.detach()) + self.b_dec.detach())
        loss = (
            residual_BD.square().sum()
            + self.penalty(progress) * gate_BF.sum()
            + self.config.aux_coefficient * gate_error_BD.square().sum()
        ) / len(x_BD)
        return StepOutput(loss, residual_BD.detach(), active_BF.sum() / len(x_BD), active_BF.any(0))

    def own_tensors(self, scale: float) -> dict[str, Tensor]:
        return {
            "W_enc": self.W_enc.T,
            "W_dec": self.W_dec,
            "b_dec": self.b_dec / scale,
            "b_gate": self.b_enc / scale,
            "b_mag": self.b_mag / scale,
            "r_mag": self.r_mag,
        }


class Gated(GatedRajamanoharan):
    """The loss of `gated_rajamanoharan` under SAE-Interpretability's optimiser: Adam with momentum, gradients clipped to a
    norm of 1.

    Two things of it are mended. It leaves decoder rows free and charges `ReLU(gate)` unweighted, so that growing a
    row and shrinking its gate lowers the penalty for nothing; rows have unit norm here. And it takes the mean over
    dimensions of the errors but not of the penalty, so that coefficients do not compare with its other recipes; here
    all are sums over dimensions, and `l1_coefficient` means what it does in `standard`.
    """

    betas = (0.9, 0.999)
    clip_norm = 1.0
