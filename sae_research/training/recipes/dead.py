"""Dead latents of the TopK family: which they are, and the auxiliary loss that revives them (Gao et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.training.recipes.base import Recipe

REFRESHES = 10
"""How often the list of dead latents is made afresh per `dead_fraction`: reading it stops a GPU, so not each step."""


class DeadLatents:
    """The list of latents silent for `dead_fraction` of the run, and their auxiliary loss."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.window = recipe.train_config.dead_fraction
        self.k_aux = max(1, recipe.W_dec.shape[1] // 2)
        self.index_N = torch.empty(0, dtype=torch.long)
        self.valid_N: Tensor | None = None
        """Where lists of several SAEs are filled up to one length: which entries count."""
        recipe.host["refreshed"] = 0.0

    def refresh(self, progress: float) -> None:
        if progress - self.recipe.host["refreshed"] < self.window / REFRESHES:
            return
        self.recipe.host["refreshed"] = progress
        self.index_N = (progress - self.recipe.last_fired_F >= self.window).nonzero().flatten()

    def auxiliary_loss(self, centred_BD: Tensor, residual_BD: Tensor) -> Tensor:
        """Fraction of the residual's variance that the k_aux = d_in / 2 most active dead latents leave unexplained.

        Neither argument has a graph. Only the dead rows are touched; `b_dec` gets no gradient from here, it belongs
        to the living.
        """
        recipe = self.recipe
        W_enc_ND, W_dec_ND = recipe.W_enc[self.index_N], recipe.W_dec[self.index_N]
        z_BN = torch.relu(torch.addmm(recipe.b_enc[self.index_N], centred_BD, W_enc_ND.T))
        if self.valid_N is not None:
            z_BN = z_BN * self.valid_N
        if len(self.index_N) > self.k_aux:
            values_BK, index_BK = z_BN.topk(self.k_aux, dim=1, sorted=False)
            z_BN = torch.zeros_like(z_BN).scatter(1, index_BK, values_BK)
        variance = (residual_BD - residual_BD.mean(0)).square().sum().clamp_min(1e-12)
        unexplained = (residual_BD - z_BN @ W_dec_ND).square().sum() / variance
        return unexplained if self.valid_N is None else unexplained * self.valid_N.any()
