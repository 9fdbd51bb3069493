"""Recipe `standard`: ReLU with an L1 penalty (Bricken et al. 2023, Towards Monosemanticity)."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.params import Train, TrainedSAE
from sae_research.training.recipes.base import Recipe, StepOutput
from sae_research.training.schedules import warmup
from sae_research.training.sparse import Support


class Standard(Recipe):
    """Minimises `mean over tokens of |x - x_hat|^2 + l1 * sum_i z_i`, with unit decoder rows.

    The coefficient warms up linearly over the first `sparsity_warmup_fraction` of the run.
    """

    form = "standard"
    INITIAL_DENSITY = 0.05
    """Fraction of latents active at the start, set through `b_enc`: from half of them active, a short run
    spends itself on switching latents off."""

    def __init__(self, d_in: int, config: TrainedSAE, train: Train) -> None:
        super().__init__(d_in, config, train)
        assert config.l1_coefficient is not None  # params.py demands it
        self.l1 = config.l1_coefficient

    @torch.no_grad()
    def fit_encoder(self, rows_ND: Tensor) -> None:
        pre_NF = (rows_ND[:512] - self.b_dec) @ self.W_enc.T
        n = max(1, int(pre_NF.numel() * self.INITIAL_DENSITY))
        self.b_enc.fill_(-float(pre_NF.flatten().topk(n, sorted=True).values[-1]))
        super().fit_encoder(rows_ND)

    def select(self, pre_BF: Tensor) -> Support | None:
        n_active = int(torch.count_nonzero(pre_BF > 0))
        if not self.use_sparse(n_active / pre_BF.numel()):
            return None
        matrix = pre_BF.relu_().to_sparse_csr()
        return Support(matrix.crow_indices(), matrix.col_indices(), pre_BF.shape[1])

    def compute(self, x_BD: Tensor, progress: float) -> StepOutput:
        code = self.reconstruct(x_BD)
        residual_BD = x_BD - code.x_hat
        penalty = self.l1 * warmup(progress, self.train_config.sparsity_warmup_fraction)
        loss = (residual_BD.square().sum() + penalty * code.activations.sum()) / len(x_BD)
        self.last_fired_F[code.fired] = progress
        return StepOutput(loss, residual_BD.detach(), code.l0)
