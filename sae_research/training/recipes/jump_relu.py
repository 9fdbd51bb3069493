"""Recipe `jump_relu`: a threshold per latent, learned through straight-through estimates (Rajamanoharan et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sae_research.config.params import Train
from sae_research.config.recipes import JumpReLURecipe
from sae_research.training.recipes.base import Recipe, StepOutput, length_factor


class JumpReLU(Recipe):
    """Minimises `mean over tokens of |x - x_hat|^2 + sparsity_coefficient * (L0 / target_l0 - 1)^2`, unit rows.

    `pre = x W_enc^T + b_enc` reads x uncentred, as dictionary_learning has it, and no ReLU comes before the window: it
    would put every negative pre-activation at zero, inside a window wider than twice its threshold, where they outnumber
    all others. Gradients of one step equal SAELens' (its penalty is linear in L0; the square's slope is a coefficient).
    Both estimates look at the pre-activation on either side of the threshold, as there and in the paper;
    dictionary_learning hands the step what the jump left, so that it sees the window's upper half, and zeros where the
    window reaches them. Thresholds are kept from falling below zero.
    """

    form = "jumprelu"
    reads_b_dec = False
    clip_norm = 1.0
    betas = (0.0, 0.999)
    config: JumpReLURecipe

    def __init__(self, d_in: int, config: JumpReLURecipe, train: Train) -> None:
        super().__init__(d_in, config, train)
        self.threshold = torch.nn.Parameter(torch.full((config.d_sae,), config.initial_threshold))

    @torch.no_grad()
    def fit_encoder(self, rows_ND: Tensor) -> None:
        """Twice the wanted L0 at the start, so that thresholds have something to raise themselves over."""
        density = min(0.5, 2 * self.config.target_l0 / self.config.d_sae)
        exceeded = self.sparsify_start(rows_ND, density)
        self.b_enc.copy_(self.threshold - exceeded)
        z_NF = self._encode(rows_ND)[1]
        factor = length_factor(z_NF @ self.W_dec, self.written(rows_ND) - self.b_dec)
        self.W_enc.mul_(factor)
        self.b_enc.copy_(self.threshold - factor * exceeded)  # the same latents stay above their thresholds

    def _encode(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """(pre-activations, activations) [B, F]."""
        pre_BF = self.encode(x_BD)
        return pre_BF, _JumpReLU.apply(pre_BF, self.threshold, self.config.bandwidth)

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        pre_BF, z_BF = self._encode(x_BD)
        residual_BD = self.target(x_BD) - (self.decode(z_BF, self.W_dec) + self.b_dec)
        l0 = _Step.apply(pre_BF, self.threshold, self.config.bandwidth).sum() / len(x_BD)
        penalty = self.config.sparsity_coefficient * self.sparsity_warmup(progress)
        loss = residual_BD.square().sum() / len(x_BD) + penalty * (l0 / self.config.target_l0 - 1).square()
        return StepOutput(loss, residual_BD.detach(), l0.detach(), (z_BF.detach() > 0).any(0))

    @torch.no_grad()
    def after_step(self, optimiser: torch.optim.Adam, x_BD: Tensor, output: StepOutput, progress: float) -> None:
        self.threshold.clamp_(min=0)

    def own_tensors(self, scale: float) -> dict[str, Tensor]:
        return {**super().own_tensors(scale), "threshold": self.threshold / scale}


# --- gradients of the threshold ----------------------------------------------------------------


class Kernel(Function):
    """What estimates of a jump's gradient share."""

    generate_vmap_rule = True  # `training.stack` maps recipes over SAEs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pre_BF, threshold_F, ctx.bandwidth = inputs
        ctx.save_for_backward(pre_BF, threshold_F)


class _JumpReLU(Kernel):
    """`z = pre * 1[pre > threshold]`; the threshold's gradient is a kernel estimate over a window around it
    (arXiv 2407.14435, equation 11)."""

    @staticmethod
    def forward(pre_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        return pre_BF * (pre_BF > threshold_F)

    @staticmethod
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[Any, ...]:  # type: ignore[override]  # ty: ignore[incompatible-method-override]
        pre_BF, threshold_F = ctx.saved_tensors
        window_BF = (pre_BF - threshold_F).abs() < ctx.bandwidth / 2
        grad_threshold_F = -(threshold_F / ctx.bandwidth) * (grad_BF * window_BF).sum(0)
        return grad_BF * (pre_BF > threshold_F), grad_threshold_F, None


class _Step(Kernel):
    """`1[pre > threshold]`, whose gradient goes to the threshold alone (equation 12)."""

    @staticmethod
    def forward(pre_BF: Tensor, threshold_F: Tensor, bandwidth: float) -> Tensor:
        return (pre_BF > threshold_F).to(pre_BF.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[Any, ...]:  # type: ignore[override]  # ty: ignore[incompatible-method-override]
        pre_BF, threshold_F = ctx.saved_tensors
        window_BF = (pre_BF - threshold_F).abs() < ctx.bandwidth / 2
        return None, -(grad_BF * window_BF).sum(0) / ctx.bandwidth, None
