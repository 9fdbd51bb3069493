"""Recipe `standard_new`: L1 weighted by decoder norms, which are free (Anthropic, April 2024 update)."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.saes import SAEConfig, SparseAutoencoder, form_class
from sae_research.saes.folding import fold_decoder_norms
from sae_research.training.recipes.base import StepOutput
from sae_research.training.recipes.l1 import L1Family


class StandardNew(L1Family):
    """Minimises `mean over tokens of |x - x_hat|^2 + l1 * sum_i z_i |W_dec,i|`; gradients are clipped to a norm of 1.

    Rows are not constrained: shrinking activations while growing rows gains nothing. They are folded to unit norm in
    the SAE that comes out, which computes the same.
    """

    form = "standard"
    unit_rows = False
    clip_norm = 1.0

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        code = self.reconstruct(x_BD)
        residual_BD = x_BD - code.x_hat
        weighted = (code.activations * self.row_norms(code)).sum()
        loss = (residual_BD.square().sum() + self.penalty(progress) * weighted) / len(x_BD)
        return StepOutput(loss, residual_BD.detach(), code.l0, code.fired)

    @torch.no_grad()
    def export(self, scale: float, cfg: SAEConfig) -> SparseAutoencoder:
        sae = super().export(scale, cfg)
        return form_class(self.form)(cfg=sae.cfg, **fold_decoder_norms(self.form, sae.tensors()))
