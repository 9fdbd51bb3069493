"""Recipe `p_anneal`: an Lp^p penalty whose p falls from 1 towards 0 (Karvonen et al. 2024, arXiv 2408.00113)."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.params import Train
from sae_research.recipe_params import PAnnealRecipe
from sae_research.training.recipes.base import Reconstruction, StepOutput
from sae_research.training.recipes.l1 import L1Family


class PAnneal(L1Family):
    """Minimises `mean over tokens of |x - x_hat|^2 + c * sum_i z_i^p`, with unit decoder rows.

    p goes from 1 to `p_end` in `sparsity_updates` steps between `anneal_start` and `anneal_end` of the run. At each
    step c is rescaled so that the penalty over the last `queue_length` batches is what it was. dictionary_learning
    fixes the start at 10,000 optimiser steps, so that its shorter runs never anneal.
    """

    form = "standard"
    config: PAnnealRecipe

    def __init__(self, d_in: int, config: PAnnealRecipe, train: Train) -> None:
        super().__init__(d_in, config, train)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("queue_Q2", torch.full((config.queue_length, 2), torch.nan))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def p_after(self, updates: int) -> float:
        """p once so many updates are done: 1 before the first, `p_end` after the last."""
        return 1.0 - (1.0 - self.config.p_end) * min(updates, self.config.sparsity_updates) / self.config.sparsity_updates

    def compute(self, x_BD: Tensor, progress: float) -> StepOutput:
        self._update(progress)
        code = self.reconstruct(x_BD)
        residual_BD = x_BD - code.x_hat
        updates = int(self.updates)
        penalty = power_sum(code, self.p_after(updates)) / len(x_BD)
        with torch.no_grad():
            following = power_sum(code, self.p_after(updates + 1)) / len(x_BD)
            self.queue_Q2[int(self.seen) % len(self.queue_Q2)] = torch.stack([penalty.detach(), following])
            self.seen += 1
        loss = residual_BD.square().sum() / len(x_BD) + self.penalty(progress) * self.scale * penalty
        self.last_fired_F[code.fired] = progress
        return StepOutput(loss, residual_BD.detach(), code.l0)

    def _update(self, progress: float) -> None:
        """Lower p when a step of the schedule is reached."""
        config = self.config
        span = max(config.anneal_end - config.anneal_start, 1e-9)
        due = int((progress - config.anneal_start) / span * config.sparsity_updates) + 1 if (
            progress >= config.anneal_start) else 0
        if min(due, config.sparsity_updates) > int(self.updates) and int(self.seen):
            now, following = self.queue_Q2.nanmean(0)
            self.scale.mul_(now / following.clamp_min(1e-12))
            self.updates += 1
            self.queue_Q2.fill_(torch.nan)
            self.seen.zero_()


def power_sum(code: Reconstruction, p: float) -> Tensor:
    """`sum z^p` over the active latents of a batch; zeros are left out, where the power has no slope."""
    z = code.activations[code.activations > 0]
    return z.sum() if p == 1.0 else z.pow(p).sum()
