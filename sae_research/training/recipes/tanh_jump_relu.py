"""Recipe `tanh_jump_relu`: JumpReLU whose penalty saturates, with straight-through gradients for the encoder too
(Anthropic, January 2025 update, https://transformer-circuits.pub/2025/january-update)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sae_research.config.params import Train
from sae_research.config.recipes import TanhPenaltyRecipe
from sae_research.training.recipes.base import Recipe, StepOutput, length_factor
from sae_research.training.recipes.jump_relu import Kernel


class TanhJumpReLU(Recipe):
    """Minimises `mean over tokens of |x - x_hat|^2 + c_s * p * sum_i tanh(tanh_scale * z_i)
    + c_p * sum_i ReLU(exp(t_i) - pre_i)`, unit decoder rows; c_s, c_p: the coefficients; p: progress through the run.

    `z_i = pre_i * 1[pre_i > exp(t_i)]`, `pre = x W_enc^T + b_enc` of x uncentred. The jump's estimated gradient goes to the
    threshold and, with the other sign, to the pre-activation, so that the encoder learns which latents to switch on. The
    last term draws latents that stay below their threshold towards it. Coefficients, `tanh_scale`, `bandwidth` and
    `initial_threshold` are in the source's units, in which a token's mean square norm is d_in. The source leaves rows free
    and weighs both terms by their norms, which is the same function of other parameters. Gradients of one step equal
    SAELens' (`jumprelu_sparsity_loss_mode="tanh"`, `jumprelu_ste_to_input=True`), whose last term looks at dead latents.
    """

    form = "jumprelu"
    reads_b_dec = False
    clip_norm = 1.0
    config: TanhPenaltyRecipe

    def __init__(self, d_in: int, config: TanhPenaltyRecipe, train: Train) -> None:
        super().__init__(d_in, config, train)
        self.unit = d_in**-0.5
        """The source's unit of activations in ours."""
        self.log_threshold = torch.nn.Parameter(torch.full((config.d_sae,), math.log(config.initial_threshold * self.unit)))

    @torch.no_grad()
    def fit_encoder(self, rows_ND: Tensor) -> None:
        """A tenth of the latents active at the start, reconstructions of the right length."""
        threshold_F, exceeded = self.log_threshold.exp(), self.sparsify_start(rows_ND, 0.1)
        self.b_enc.copy_(threshold_F - exceeded)
        factor = length_factor(self._encode(rows_ND)[1] @ self.W_dec, self.written(rows_ND) - self.b_dec)
        self.W_enc.mul_(factor)
        self.b_enc.copy_(threshold_F - factor * exceeded)  # the same latents stay above their thresholds

    def _encode(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """(pre-activations, activations) [B, F]."""
        pre_BF = self.encode(x_BD)
        return pre_BF, _JumpReLU.apply(pre_BF, self.log_threshold.exp(), self.config.bandwidth * self.unit)

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        config, unit = self.config, self.unit
        pre_BF, z_BF = self._encode(x_BD)
        residual_BD = self.target(x_BD) - (self.decode(z_BF, self.W_dec) + self.b_dec)
        sparsity = config.sparsity_coefficient * progress * torch.tanh(config.tanh_scale / unit * z_BF).sum()
        below = config.pre_activation_coefficient * torch.relu(self.log_threshold.exp() - pre_BF).sum() / unit
        loss = (residual_BD.square().sum() + unit**2 * (sparsity + below)) / len(x_BD)
        active_BF = z_BF.detach() > 0
        return StepOutput(loss, residual_BD.detach(), active_BF.sum() / len(x_BD), active_BF.any(0))

    def own_tensors(self, scale: float) -> dict[str, Tensor]:
        return {**super().own_tensors(scale), "threshold": self.log_threshold.exp() / scale}


class _JumpReLU(Kernel):
    """`z = pre * 1[pre > threshold]`; what the jump passes on, `threshold / bandwidth` inside a window around the threshold,
    goes to the pre-activation and, with the other sign, to the threshold."""

    @staticmethod
    def forward(pre_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        return pre_BF * (pre_BF > threshold_F)

    @staticmethod
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[Any, ...]:  # type: ignore[override]  # ty: ignore[incompatible-method-override]
        pre_BF, threshold_F = ctx.saved_tensors
        jump_BF = (threshold_F / ctx.bandwidth) * grad_BF * ((pre_BF - threshold_F).abs() < ctx.bandwidth / 2)
        return grad_BF * (pre_BF > threshold_F) + jump_BF, -jump_BF.sum(0), None
