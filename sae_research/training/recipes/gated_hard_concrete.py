"""Recipe `gated_hard_concrete`: hard-concrete gates on the gated SAE's shared pre-activation."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.params import Train
from sae_research.recipe_params import HardConcreteRecipe
from sae_research.saes.hard_concrete import stretched_gate
from sae_research.training import products
from sae_research.training.recipes.base import Recipe, StepOutput, length_factor
from sae_research.training.recipes.hard_concrete import INITIAL_SHARPNESS, HardConcrete
from sae_research.training.recipes.l1 import INITIAL_DENSITY


class GatedHardConcrete(HardConcrete):
    """Minimises `mean over tokens of |x - x_hat|^2 + l0_coefficient * E[L0] + aux * |x - x_hat_gate|^2`.

    `pi = (x - b_dec) W_enc^T`; `log_alpha = exp(s) (pi + b_gate)`; `z = gate * ReLU(exp(r_mag) pi + b_mag)`, gates as in
    `hard_concrete`; `x_hat_gate = ReLU(pi + b_gate) sg(W_dec) + sg(b_dec)`: the gate's own reconstruction in the units of
    pi, as in the gated SAE. s, a learned scalar, is the sharpness of the gates: activations of unit mean square norm alone
    would leave them near a coin's toss. Dead latents are left alone: raising their gates, as `hard_concrete` does, moves
    what the gate reconstructs, and cost more variance explained than it brought latents back.

    SAE-Interpretability reconstructs with the gates themselves, numbers in [0, 1] with no bearing on how much of a
    direction is present, and never anneals beta here; both are mended. `b_enc` stands for `b_gate`.
    """

    form = "gated_hard_concrete"
    reads_b_dec = True

    def __init__(self, d_in: int, config: HardConcreteRecipe, train: Train) -> None:
        Recipe.__init__(self, d_in, config, train)
        self.r_mag = torch.nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = torch.nn.Parameter(torch.zeros(config.d_sae))
        self.log_sharpness = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("beta", torch.tensor(float(config.initial_beta)))

    @torch.no_grad()
    def fit_encoder(self, rows_ND: Tensor) -> None:
        """Gates half open where pi is among its `INITIAL_DENSITY` largest."""
        pi_NF = (rows_ND[:512] - self.b_dec) @ self.W_enc.T
        sharpness = INITIAL_SHARPNESS / pi_NF.std().clamp_min(1e-6)
        self.log_sharpness.copy_(sharpness.log())
        self.b_enc.fill_(self.half_open() / sharpness - self.sparsify_start(rows_ND, INITIAL_DENSITY))
        log_alpha_NF, z_NF = self._gate_and_magnitude(rows_ND)
        z_NF = z_NF * stretched_gate(log_alpha_NF, self.beta, self.config.stretch)
        if z_NF.any():
            factor = length_factor(z_NF @ self.W_dec, rows_ND - self.b_dec).clamp_min(1e-6)
            self.W_enc.mul_(factor)
            self.b_enc.mul_(factor)
            self.log_sharpness.sub_(factor.log())

    def _gate_and_magnitude(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        pi_BF = products.encode(x_BD, self.W_enc, None, self.b_dec, self.bfloat16)
        return (self.log_sharpness.exp() * (pi_BF + self.b_enc), torch.relu(self.r_mag.exp() * pi_BF + self.b_mag))

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        log_alpha_BF, magnitude_BF = self._gate_and_magnitude(x_BD)
        z_BF = magnitude_BF * self.sample(log_alpha_BF, noise)
        residual_BD = x_BD - (self.decode(z_BF, self.W_dec) + self.b_dec)
        gate_BF = torch.relu(log_alpha_BF) * torch.exp(-self.log_sharpness)
        gate_error_BD = x_BD - (self.decode(gate_BF, self.W_dec.detach()) + self.b_dec.detach())
        penalty = self.config.l0_coefficient * self.sparsity_warmup(progress)
        loss = ((residual_BD.square().sum() + self.config.aux_coefficient * gate_error_BD.square().sum()) / len(x_BD)
                + penalty * self.expected_l0(log_alpha_BF))
        active_BF = z_BF.detach() > 0
        return StepOutput(loss, residual_BD.detach(), active_BF.sum() / len(x_BD), self.fired(log_alpha_BF, magnitude_BF))

    def own_tensors(self, scale: float) -> dict[str, Tensor]:
        sharpness = self.log_sharpness.exp()
        return {"W_enc": self.W_enc.T, "W_dec": self.W_dec, "b_dec": self.b_dec / scale, "b_gate": self.b_enc * sharpness,
                "b_mag": self.b_mag / scale, "r_mag": self.r_mag, "sharpness": (sharpness * scale).expand_as(self.b_enc)}
