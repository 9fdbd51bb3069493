"""Recipes of ReLU SAEs with a penalty on activations.

`standard`: L1, unit decoder rows (Bricken et al. 2023). `standard_new`: L1 weighted by free decoder norms (Anthropic, April
2024 update). `relu`: uncentred, rows normalised in the forward pass (SAE-Interpretability). `p_anneal`: Lp with p falling
(Karvonen et al. 2024, arXiv 2408.00113). `L1Family` holds what they share: the sparse start and the resampling of dead
latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.config.params import Train
from sae_research.config.recipes import L1Recipe as L1Config
from sae_research.config.recipes import PAnnealRecipe
from sae_research.saes import SAEConfig, SparseAutoencoder, form_class
from sae_research.saes.forms import fold_decoder_norms
from sae_research.training.products import Support, support_of
from sae_research.training.recipes.base import Recipe, Reconstruction, StepOutput

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
        self.plain_state |= {"looked": 0.0}  # progress when resampling was last considered

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
        """Norm of the decoder row behind every entry of `code.activations`, with a graph; of a crosscoder's the sum over
        hooks."""
        norms_F = self.norm_sums()
        return norms_F if code.support is None else norms_F[code.support.col]

    # --- resampling ---

    def after_step(self, optimiser: torch.optim.Adam, x_BD: Tensor, output: StepOutput, progress: float) -> None:
        if self.resampling_due(self.plain_state["looked"], progress):
            self.resample(optimiser, x_BD, output.residual, progress)
        self.plain_state["looked"] = progress

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


class Standard(L1Family):
    """Minimises `mean over tokens of |x - x_hat|^2 + l1 * sum_i z_i`, with unit decoder rows.

    The coefficient warms up linearly over the first `sparsity_warmup_fraction` of the run.
    """

    form = "standard"

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        code = self.reconstruct(x_BD)
        residual_BD = self.target(x_BD) - code.x_hat
        loss = (residual_BD.square().sum() + self.penalty(progress) * code.activations.sum()) / len(x_BD)
        return StepOutput(loss, residual_BD.detach(), code.l0, code.fired)


class StandardNew(L1Family):
    """Minimises `mean over tokens of |x - x_hat|^2 + l1 * sum_i z_i |W_dec,i|`; gradients are clipped to a norm of 1.

    Rows are not constrained: shrinking activations while growing rows gains nothing. They are folded to unit norm in
    the SAE that comes out, which computes the same.

    A crosscoder minimises `mean over tokens of sum_h |x_h - x_hat_h|^2 + l1 * sum_i z_i sum_h |W_dec,h,i|` over its hooks h
    (Lindsey et al. 2024): norms are added over hooks, not taken of all hooks together.
    """

    form = "standard"
    unit_rows = False
    clip_norm = 1.0

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        code = self.reconstruct(x_BD)
        residual_BD = self.target(x_BD) - code.x_hat
        weighted = (code.activations * self.row_norms(code)).sum()
        loss = (residual_BD.square().sum() + self.penalty(progress) * weighted) / len(x_BD)
        return StepOutput(loss, residual_BD.detach(), code.l0, code.fired)

    @torch.no_grad()
    def export(self, scale: float, cfg: SAEConfig, read_scale: float | None = None) -> SparseAutoencoder:
        sae = super().export(scale, cfg, read_scale)
        if cfg.is_crosscoder:
            return sae
        return form_class(self.form)(cfg=sae.cfg, **fold_decoder_norms(self.form, sae.tensors()))


class Relu(L1Family):
    """Minimises `mean over tokens of (|x - x_hat|^2 + l1 * sum_i z_i) / d_in`, `z = ReLU(x W_enc^T + b_enc)`.

    The division by d_in is SAE-Interpretability's mean over dimensions; it scales both terms alike, so `l1_coefficient`
    means the same as in `standard`. Rows are normalised in the forward pass, so that only directions are learned.
    """

    form = "standard"
    unit_rows = False
    reads_b_dec = False
    clip_norm = 1.0

    def decoder(self) -> Tensor:
        return torch.nn.functional.normalize(self.W_dec, dim=1)

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        code = self.reconstruct(x_BD)
        residual_BD = self.target(x_BD) - code.x_hat
        loss = (residual_BD.square().sum() + self.penalty(progress) * code.activations.sum()) / residual_BD.numel()
        return StepOutput(loss, residual_BD.detach(), code.l0, code.fired)

    def own_tensors(self, scale: float) -> dict[str, Tensor]:
        return {**super().own_tensors(scale), "W_dec": self.decoder()}


class PAnneal(L1Family):
    """Minimises `mean over tokens of |x - x_hat|^2 + c * sum_i z_i^p`, with unit decoder rows.

    p goes from 1 to `p_end` in `sparsity_updates` steps between `anneal_start` and `anneal_end` of the run. At each
    step c is rescaled so that the penalty over the last `queue_length` batches is what it was. dictionary_learning
    fixes the start at 10,000 optimiser steps, so that its shorter runs never anneal.
    """

    form = "standard"
    config: PAnnealRecipe  # ty: ignore[incompatible-mutable-override]

    def __init__(self, d_in: int, config: PAnnealRecipe, train: Train) -> None:
        super().__init__(d_in, config, train)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("queue_Q2", torch.full((config.queue_length, 2), torch.nan))
        self.plain_state |= {"updates": 0, "seen": 0}

    def p_after(self, updates: int) -> float:
        """p once so many updates are done: 1 before the first, `p_end` after the last."""
        return 1.0 - (1.0 - self.config.p_end) * min(updates, self.config.sparsity_updates) / self.config.sparsity_updates

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        code = self.reconstruct(x_BD)
        residual_BD = self.target(x_BD) - code.x_hat
        updates = self.plain_state["updates"]
        penalty = power_sum(code, self.p_after(updates)) / len(x_BD)
        following = power_sum(code, self.p_after(updates + 1)) / len(x_BD)
        loss = residual_BD.square().sum() / len(x_BD) + self.penalty(progress) * self.scale * penalty
        return StepOutput(loss, residual_BD.detach(), code.l0, code.fired, torch.stack([penalty, following]).detach())

    def track(self, output: StepOutput, progress: float) -> None:
        super().track(output, progress)
        self.queue_Q2[self.plain_state["seen"] % len(self.queue_Q2)] = output.tracked
        self.plain_state["seen"] += 1

    def prepare(self, progress: float) -> None:
        """Lower p when a step of the schedule is reached."""
        config = self.config
        span = max(config.anneal_end - config.anneal_start, 1e-9)
        due = (
            int((progress - config.anneal_start) / span * config.sparsity_updates) + 1
            if (progress >= config.anneal_start)
            else 0
        )
        if min(due, config.sparsity_updates) > self.plain_state["updates"] and self.plain_state["seen"]:
            now, following = self.queue_Q2.nanmean(0)
            self.scale.mul_(now / following.clamp_min(1e-12))
            self.plain_state["updates"] += 1
            self.queue_Q2.fill_(torch.nan)
            self.plain_state["seen"] = 0


def power_sum(code: Reconstruction, p: float) -> Tensor:
    """`sum z^p` over the active latents of a batch; zeros are left out, where the power has no slope."""
    z = code.activations
    if p == 1.0:
        return z.sum()
    active = z > 0
    return (torch.where(active, z, 1.0).pow(p) * active).sum()
