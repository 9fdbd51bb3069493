"""Recipe `standard`: ReLU with an L1 penalty (Bricken et al. 2023, Towards Monosemanticity)."""

from __future__ import annotations

from torch import Tensor

from sae_research.training.recipes.base import StepOutput
from sae_research.training.recipes.l1 import L1Family


class Standard(L1Family):
    """Minimises `mean over tokens of |x - x_hat|^2 + l1 * sum_i z_i`, with unit decoder rows.

    The coefficient warms up linearly over the first `sparsity_warmup_fraction` of the run.
    """

    form = "standard"

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        code = self.reconstruct(x_BD)
        residual_BD = x_BD - code.x_hat
        loss = (residual_BD.square().sum() + self.penalty(progress) * code.activations.sum()) / len(x_BD)
        return StepOutput(loss, residual_BD.detach(), code.l0, code.fired)
