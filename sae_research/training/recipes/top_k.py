"""Recipe `top_k`: a token's k largest latents, and a loss that revives dead ones (Gao et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_research.params import Train, TrainedSAE
from sae_research.training.recipes.base import Recipe, StepOutput
from sae_research.training.sparse import Support, fixed_support


class TopK(Recipe):
    """Minimises `mean over tokens of |x - x_hat|^2 + aux_k_coefficient * aux` (arXiv 2406.04093).

    `aux` is the fraction of the residual's variance that the k_aux most active *dead* latents leave
    unexplained, k_aux = min(d_in / 2, dead). A latent is dead when silent for `dead_fraction` of the run.
    """

    form = "topk"
    REFRESHES = 10
    """How often the list of dead latents is made afresh per `dead_fraction`: reading it stops a GPU, so not
    each step."""

    def __init__(self, d_in: int, config: TrainedSAE, train: Train) -> None:
        super().__init__(d_in, config, train)
        assert config.k is not None  # params.py demands it
        self.k = config.k
        self.k_aux = max(1, d_in // 2)
        self.dead_N = torch.empty(0, dtype=torch.long)
        self._refreshed = 0.0

    def options(self) -> dict[str, Any]:
        return {"k": self.k}

    def select(self, pre_BF: Tensor) -> Support | None:
        if not self.use_sparse(self.k / pre_BF.shape[1]):
            return None
        return fixed_support(pre_BF.topk(self.k, dim=1, sorted=False).indices, pre_BF.shape[1])

    def dense_activations(self, pre_BF: Tensor) -> Tensor:
        values_BK, index_BK = torch.relu(pre_BF).topk(self.k, dim=1, sorted=False)
        return torch.zeros_like(pre_BF).scatter(1, index_BK, values_BK)

    def compute(self, x_BD: Tensor, progress: float) -> StepOutput:
        code = self.reconstruct(x_BD)
        residual_BD = x_BD - code.x_hat
        loss = residual_BD.square().sum() / len(x_BD)
        detached_BD = residual_BD.detach()
        self.last_fired_F[code.fired] = progress
        self.refresh_dead(progress)
        if len(self.dead_N) and self.config.aux_k_coefficient > 0:
            loss = loss + self.config.aux_k_coefficient * self.auxiliary_loss(code.centred, detached_BD)
        return StepOutput(loss, detached_BD, code.l0)

    def refresh_dead(self, progress: float) -> None:
        window = self.train_config.dead_fraction
        if progress - self._refreshed < window / self.REFRESHES:
            return
        self._refreshed = progress
        self.dead_N = (progress - self.last_fired_F >= window).nonzero().flatten()

    def auxiliary_loss(self, centred_BD: Tensor, residual_BD: Tensor) -> Tensor:
        """Fraction of the residual's variance that dead latents leave. Neither argument has a graph.

        Only the dead rows are touched; `b_dec` gets no gradient from here, it belongs to the living.
        """
        W_enc_ND, W_dec_ND = self.W_enc[self.dead_N], self.W_dec[self.dead_N]
        z_BN = torch.relu(torch.addmm(self.b_enc[self.dead_N], centred_BD, W_enc_ND.T))
        if len(self.dead_N) > self.k_aux:
            values_BK, index_BK = z_BN.topk(self.k_aux, dim=1, sorted=False)
            z_BN = torch.zeros_like(z_BN).scatter(1, index_BK, values_BK)
        variance = (residual_BD - residual_BD.mean(0)).square().sum().clamp_min(1e-12)
        return (residual_BD - z_BN @ W_dec_ND).square().sum() / variance
