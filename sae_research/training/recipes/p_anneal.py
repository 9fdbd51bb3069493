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
        self.host |= {"updates": 0, "seen": 0}

    def p_after(self, updates: int) -> float:
        """p once so many updates are done: 1 before the first, `p_end` after the last."""
        return 1.0 - (1.0 - self.config.p_end) * min(updates, self.config.sparsity_updates) / self.config.sparsity_updates

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        code = self.reconstruct(x_BD)
        residual_BD = x_BD - code.x_hat
        updates = self.host["updates"]
        penalty = power_sum(code, self.p_after(updates)) / len(x_BD)
        following = power_sum(code, self.p_after(updates + 1)) / len(x_BD)
        loss = residual_BD.square().sum() / len(x_BD) + self.penalty(progress) * self.scale * penalty
        return StepOutput(loss, residual_BD.detach(), code.l0, code.fired, torch.stack([penalty, following]).detach())

    def follow(self, output: StepOutput, progress: float) -> None:
        super().follow(output, progress)
        self.queue_Q2[self.host["seen"] % len(self.queue_Q2)] = output.noted
        self.host["seen"] += 1

    def prepare(self, progress: float) -> None:
        """Lower p when a step of the schedule is reached."""
        config = self.config
        span = max(config.anneal_end - config.anneal_start, 1e-9)
        due = int((progress - config.anneal_start) / span * config.sparsity_updates) + 1 if (
            progress >= config.anneal_start) else 0
        if min(due, config.sparsity_updates) > self.host["updates"] and self.host["seen"]:
            now, following = self.queue_Q2.nanmean(0)
            self.scale.mul_(now / following.clamp_min(1e-12))
            self.host["updates"] += 1
            self.queue_Q2.fill_(torch.nan)
            self.host["seen"] = 0


def power_sum(code: Reconstruction, p: float) -> Tensor:
    """`sum z^p` over the active latents of a batch; zeros are left out, where the power has no slope."""
    z = code.activations
    if p == 1.0:
        return z.sum()
    active = z > 0
    return (torch.where(active, z, 1.0).pow(p) * active).sum()
