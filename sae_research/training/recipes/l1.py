"""What the recipes with a penalty on activations share: the support of a ReLU, a sparse start, resampling."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.params import Train
from sae_research.recipe_params import L1Recipe as L1Config
from sae_research.training.recipes.base import Recipe, Reconstruction, StepOutput
from sae_research.training.sparse import Support, support_of

INITIAL_DENSITY = 0.05
"""Fraction of latents active at the start, set through `b_enc`."""
RESAMPLED_ENCODER = 0.2
"""Length of a resampled encoder row over the mean of the living (Bricken et al. 2023)."""
RESAMPLING_ENDS = 0.5
"""Fraction of the run after which nothing is resampled: new latents need time to settle."""


class L1Family(Recipe):
    """ReLU latents, kept few by a penalty."""

    config: L1Config

    def __init__(self, d_in: int, config: L1Config, train: Train) -> None:
        super().__init__(d_in, config, train)
        self.host |= {"looked": 0.0}  # progress when resampling was last considered

    def select(self, pre_BF: Tensor) -> Support | None:
        support = support_of(pre_BF > 0)
        return support if self.use_sparse(len(support.col) / pre_BF.numel()) else None

    @torch.no_grad()
    def fit_encoder(self, rows_ND: Tensor) -> None:
        self.b_enc.fill_(-float(self.sparsify_start(rows_ND, INITIAL_DENSITY)))
        super().fit_encoder(rows_ND)

    def penalty(self, progress: float) -> float:
        """The coefficient at this moment."""
        return self.config.l1_coefficient * self.sparsity_warmup(progress)

    def row_norms(self, code: Reconstruction) -> Tensor:
        """Norm of the decoder row behind every entry of `code.activations`, with a graph."""
        norms_F = torch.linalg.vector_norm(self.W_dec, dim=1)
        return norms_F if code.support is None else norms_F[code.support.col]

    # --- resampling ---

    def after_step(self, optimiser: torch.optim.Adam, x_BD: Tensor, output: StepOutput, progress: float) -> None:
        if self.resampling_due(self.host["looked"], progress):
            self.resample(optimiser, x_BD, output.residual, progress)
        self.host["looked"] = progress

    def resampling_due(self, before: float, now: float) -> bool:
        """Whether a multiple of `resample_every` lies in (before, now]."""
        every = self.config.resample_every
        return 0 < every <= now <= RESAMPLING_ENDS and int(now / every) > int(before / every)

    @torch.no_grad()
    def resample(self, optimiser: torch.optim.Adam, x_BD: Tensor, residual_BD: Tensor, progress: float) -> int:
        """Point dead latents at badly reconstructed tokens of this batch; returns how many (Bricken et al. 2023).

        A token is drawn with probability proportional to its squared error; its activation less `b_dec`, made a unit
        row, becomes the decoder row, and at 0.2 times the mean length of living encoder rows the encoder row. The
        bias is 0, the optimiser forgets the latent. (dictionary_learning's `standard` does the same; its `p_anneal`
        writes into a copy, so that nothing happens.)
        """
        dead_F = progress - self.last_fired_F >= self.config.resample_window
        n = min(int(dead_F.sum()), len(x_BD))
        if n == 0 or bool(dead_F.all()):
            return 0
        chosen = dead_F.nonzero().flatten()[:n]
        weights_B = residual_BD.square().sum(1)
        # drawn on the CPU, so that a run draws the same on every device
        picked = torch.multinomial(weights_B.double().cpu(), n, generator=self.generator).to(x_BD.device)
        rows_ND = torch.nn.functional.normalize(x_BD[picked] - self.b_dec, dim=1)
        length = torch.linalg.vector_norm(self.W_enc[~dead_F], dim=1).mean()
        self.W_dec[chosen] = rows_ND
        self.W_enc[chosen] = rows_ND * length * RESAMPLED_ENCODER
        self.b_enc[chosen] = 0.0
        self.last_fired_F[chosen] = progress
        for parameter in (self.W_enc, self.b_enc, self.W_dec):
            state = optimiser.state[parameter]
            state["exp_avg"][chosen] = 0.0
            state["exp_avg_sq"][chosen] = 0.0
        return n
