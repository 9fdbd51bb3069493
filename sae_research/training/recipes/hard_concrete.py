"""Recipe `hard_concrete`: stochastic gates with an expected L0 that has a gradient (Louizos et al. 2018)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sae_research.params import Train
from sae_research.recipe_params import HardConcreteRecipe
from sae_research.saes.hard_concrete import stretched_gate
from sae_research.training import products
from sae_research.training.recipes.base import Recipe, StepOutput, length_factor

INITIAL_OPEN = 0.3
"""Probability of an open gate at the start."""


class HardConcrete(Recipe):
    """Minimises `mean over tokens of |x - x_hat|^2 + l0_coefficient * E[L0]` (arXiv 1712.01312).

    `magnitude = ReLU(x W_enc^T + b_enc)`; `log_alpha = x W_gate^T + b_gate`, or `b_gate` alone with
    `input_dependent_gates: false`. In training a gate is `clip(sigmoid((log_alpha + logit u) / beta) (r - l) + l, 0, 1)`
    with u uniform, and `P(gate > 0) = sigmoid(log_alpha - beta log(-l / r))`, whose sum is E[L0]. At inference
    u = 1/2: the median gate, open exactly where P > 1/2, for every beta. With `beta_annealing`, beta goes
    geometrically from `initial_beta` to `final_beta` after the learning rate's warm-up.

    SAE-Interpretability lets magnitudes be negative (then counts only positive ones), drops beta at inference, so that
    its test gates agree with training at beta = 1 alone, ignores `input_dependent_gates`, and divides error and
    penalty by d_in, which scales both alike. Decoder rows have unit norm here.
    """

    form = "hard_concrete"
    reads_b_dec = False
    clip_norm = 1.0
    config: HardConcreteRecipe

    def __init__(self, d_in: int, config: HardConcreteRecipe, train: Train) -> None:
        super().__init__(d_in, config, train)
        if config.input_dependent_gates:
            self.W_gate = torch.nn.Parameter(torch.zeros(config.d_sae, d_in))
        self.b_gate = torch.nn.Parameter(torch.zeros(config.d_sae))
        self.register_buffer("beta", torch.tensor(float(config.initial_beta)))

    @torch.no_grad()
    def fit_encoder(self, rows_ND: Tensor) -> None:
        """Gates open with probability `INITIAL_OPEN` on average; input-dependent ones where the magnitude is large."""
        beta, (low, high) = float(self.beta), self.config.stretch
        shift = math.log(INITIAL_OPEN / (1 - INITIAL_OPEN)) + beta * math.log(-low / high)
        if self.config.input_dependent_gates:
            self.W_gate.copy_(self.W_enc / ((rows_ND[:512] @ self.W_enc.T).std().clamp_min(1e-6)))
            logits_NF = rows_ND[:512] @ self.W_gate.T
            self.b_gate.fill_(shift - float(logits_NF.mean()))
        else:
            self.b_gate.fill_(shift)
        z_NF = self.magnitudes(rows_ND) * stretched_gate(self.log_alpha(rows_ND), beta, self.config.stretch)
        if z_NF.any():
            factor = length_factor(z_NF @ self.W_dec, rows_ND - self.b_dec)
            self.W_enc.mul_(factor)
            self.b_enc.mul_(factor)

    def magnitudes(self, x_BD: Tensor) -> Tensor:
        return torch.relu(self.encode(x_BD))

    def log_alpha(self, x_BD: Tensor) -> Tensor:
        """[B, F], or [F] where gates do not depend on the input."""
        if not self.config.input_dependent_gates:
            return self.b_gate
        return products.encode(x_BD, self.W_gate, self.b_gate, None, self.bfloat16)

    def anneal(self, progress: float) -> None:
        config, start = self.config, self.train_config.warmup_fraction
        if config.beta_annealing and config.final_beta is not None:
            done = min(1.0, max(0.0, (progress - start) / max(1 - start, 1e-9)))
            self.beta.fill_(config.initial_beta * (config.final_beta / config.initial_beta) ** done)

    def expected_l0(self, log_alpha: Tensor) -> Tensor:
        """Expected number of open gates: a mean over tokens."""
        low, high = self.config.stretch
        open_F = torch.sigmoid(log_alpha - self.beta * math.log(-low / high))
        return open_F.sum() / (len(open_F) if open_F.dim() == 2 else 1)

    def sample(self, log_alpha: Tensor, shape: torch.Size) -> Tensor:
        """Gates [B, F] in [0, 1], drawn from this SAE's own generator."""
        u_BF = torch.rand(shape, generator=self.generator).clamp_(1e-6, 1 - 1e-6).to(log_alpha.device)
        return stretched_gate(log_alpha + torch.logit(u_BF), self.beta, self.config.stretch)

    def compute(self, x_BD: Tensor, progress: float) -> StepOutput:
        self.anneal(progress)
        magnitude_BF, log_alpha = self.magnitudes(x_BD), self.log_alpha(x_BD)
        z_BF = magnitude_BF * self.sample(log_alpha, magnitude_BF.shape)
        residual_BD = x_BD - (self.decode(z_BF, self.W_dec) + self.b_dec)
        penalty = self.config.l0_coefficient * self.sparsity_warmup(progress)
        loss = residual_BD.square().sum() / len(x_BD) + penalty * self.expected_l0(log_alpha)
        active_BF = z_BF.detach() > 0
        self.last_fired_F[active_BF.any(0)] = progress
        return StepOutput(loss, residual_BD.detach(), active_BF.sum() / len(x_BD))

    def options(self) -> dict[str, Any]:
        return {"beta": float(self.beta), "stretch": list(self.config.stretch)}

    def own_tensors(self, scale: float) -> dict[str, Tensor]:
        W_gate_DF = (self.W_gate * scale).T if self.config.input_dependent_gates else torch.zeros_like(self.W_enc).T
        return {**super().own_tensors(scale), "W_gate": W_gate_DF, "b_gate": self.b_gate}
