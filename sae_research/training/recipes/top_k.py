"""Recipes of the TopK family: a token's k largest latents, and a loss that revives dead ones.

`top_k` (Gao et al. 2024), `batch_top_k`: the k * B largest activations of a batch (Bussmann et al. 2024), and
`matryoshka_batch_top_k`: nested dictionaries, each to reconstruct alone (Bussmann et al. 2025). `DeadLatents`, at the end,
is the auxiliary loss of all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sae_research.config.params import Train
from sae_research.config.recipes import KRecipe, MatryoshkaRecipe
from sae_research.saes import SAEConfig, SparseAutoencoder
from sae_research.training.products import Support, decode_at, fixed_support, support_of
from sae_research.training.recipes.base import Recipe, Reconstruction, StepOutput

ARCHITECTURES = {
    "top_k": "topk",
    "abs_top_k": "abs_topk",
    "batch_top_k": "batchtopk",
    "matryoshka_batch_top_k": "matryoshka_batchtopk",
}
"""SAELens' names of the architectures these recipes train."""
THRESHOLD_WINDOW = 0.02
"""Fraction of the run over which the threshold is averaged: long enough to be steady, short enough to belong to the
final weights."""
THRESHOLD_EVERY = 8
"""Steps between looks at the threshold, which need a partial sort of the whole batch."""


class TopK(Recipe):
    """Minimises `mean over tokens of |x - x_hat|^2 + aux_k_coefficient * aux` (arXiv 2406.04093).

    `aux` is the fraction of the residual's variance that the k_aux most active *dead* latents leave
    unexplained, k_aux = min(d_in / 2, dead). A latent is dead when silent for `dead_fraction` of the run.

    The pre-activation that k latents a token exceed on average is recorded as a threshold. With `inference: threshold`
    the SAE that comes out is a JumpReLU SAE with that threshold: each latent then answers for itself, so that any
    subset can be encoded, and L0 stays k on average. (dictionary_learning records the mean over tokens of the smallest
    active activation. These are skewed, so that fewer than k latents a token exceed their mean.)
    """

    config: KRecipe
    unit_rows = True
    clip_norm = 1.0

    def __init__(self, d_in: int, config: KRecipe, train: Train) -> None:
        super().__init__(d_in, config, train)
        self.largest_k = config.k
        """In a stack the largest of its SAEs' k; each keeps its own of so many."""
        self.plain_state["steps"] = 0
        self.dead = DeadLatents(self)
        self.register_buffer("threshold", torch.full((), -1.0))
        self.register_buffer("observed", torch.zeros(()))  # progress at the last look

    @property
    def k(self) -> int:
        return self.config.k

    # --- loss ---

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        code, target_BD = self.reconstruct(x_BD), self.target(x_BD)
        loss = self.reconstruction_loss(target_BD, code)
        residual_BD = (target_BD - code.x_hat).detach()
        if len(self.dead.index_N) and self.config.aux_k_coefficient > 0:
            loss = loss + self.config.aux_k_coefficient * self.dead.auxiliary_loss(code.centred, residual_BD)
        return StepOutput(loss, residual_BD, code.l0, code.fired, self.limit)

    def reconstruction_loss(self, x_BD: Tensor, code: Reconstruction) -> Tensor:
        return (x_BD - code.x_hat).square().sum() / len(x_BD)

    def select(self, pre_BF: Tensor) -> Support | None:
        if not self.use_sparse(self.k / pre_BF.shape[1]):
            return None
        from sae_research.saes.pursuit.kernels_numba import largest  # for the CPU alone

        self.look(pre_BF)
        return fixed_support(largest(pre_BF, self.k), pre_BF.shape[1])

    def dense_activations(self, pre_BF: Tensor) -> Tensor:
        self.look(pre_BF.detach())
        if isinstance(self.k, int):
            values_BK, index_BK = torch.relu(pre_BF).topk(self.k, dim=1, sorted=False)
        else:
            values_BK, index_BK = torch.relu(pre_BF).topk(self.largest_k, dim=1, sorted=True)
            values_BK = values_BK * (torch.arange(self.largest_k, device=pre_BF.device) < self.k)
        return torch.zeros_like(pre_BF).scatter(1, index_BK, values_BK)

    def look(self, pre_BF: Tensor) -> None:
        """Note the batch's limit, now and then."""
        self.limit = self.batch_limit(pre_BF) if self.plain_state["steps"] % THRESHOLD_EVERY == 0 else None

    def batch_limit(self, pre_BF: Tensor) -> Tensor:
        """The smallest of the k * B largest pre-activations of a batch, zero where they are not all positive."""
        n = min(self.largest_k * len(pre_BF), pre_BF.numel())
        if isinstance(self.k, int):
            return pre_BF.flatten().topk(n, sorted=False).values.min().clamp_min(0)
        last = (self.k * len(pre_BF)).clamp_max(n) - 1
        return pre_BF.flatten().topk(n, sorted=True).values.gather(0, last[None])[0].clamp_min(0)

    # --- between steps ---

    def prepare(self, progress: float) -> None:
        self.dead.refresh(progress)

    @torch.no_grad()
    def track(self, output: StepOutput, progress: float) -> None:
        """Exponential average of the batches' limits, over a window of the run."""
        super().track(output, progress)
        if output.tracked is not None:
            share = torch.where(self.threshold < 0, 1.0, 1 - torch.exp((self.observed - progress) / THRESHOLD_WINDOW))
            self.threshold.add_(share * (output.tracked - self.threshold))
            self.observed.fill_(progress)
        self.plain_state["steps"] += 1

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "dead": self.dead.index_N.tolist()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self.dead.index_N = torch.tensor(state["dead"], dtype=torch.long, device=self.W_dec.device)

    # --- stacks ---

    @classmethod
    def shared_inputs(cls, recipes: Sequence[TopK]) -> dict[str, Tensor]:  # type: ignore[override]  # ty: ignore[incompatible-method-override]
        """The lists of dead latents, filled up to the longest [M, N]; nothing where no SAE has any."""
        lists = [recipe.dead.index_N for recipe in recipes]
        lengths = [len(index_N) for index_N in lists]
        if not any(lengths):
            return {}
        index_MN = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True)
        places_N, length_M = torch.arange(max(lengths)), torch.tensor(lengths)
        return {"dead_index": index_MN, "dead_valid": (places_N < length_M[:, None]).to(index_MN.device)}

    def take_inputs(self, inputs: dict[str, Tensor]) -> None:
        self.dead.index_N = inputs.get("dead_index", self.dead.index_N[:0])
        self.dead.valid_N = inputs.get("dead_valid")

    # --- export ---

    @property
    def form(self) -> str:  # type: ignore[override]  # ty: ignore[incompatible-property-override]
        return "jumprelu" if self.config.inference == "threshold" else "topk"

    def options(self) -> dict[str, Any]:
        return {} if self.form == "jumprelu" else {"k": self.k}

    def own_tensors(self, scale: float) -> dict[str, Tensor]:
        tensors = super().own_tensors(scale)
        if self.form != "jumprelu":
            return tensors
        threshold_F = torch.full_like(self.b_enc, float(self.threshold.clamp_min(0)))
        if self.n_hooks > 1:  # it was taken of weighted activations
            threshold_F = threshold_F / self.norm_sums()
        return {**tensors, "threshold": threshold_F / scale}

    def export(self, scale: float, cfg: SAEConfig, read_scale: float | None = None) -> SparseAutoencoder:
        # tables name it by how it was trained, not by the form it is written in
        return super().export(scale, cfg.replace(architecture=ARCHITECTURES[self.config.recipe]), read_scale)


class BatchTopK(TopK):
    """As `top_k`, with k on average rather than for every token.

    At inference tokens must not depend on one another: the SAE that comes out has one threshold, the average of
    recent batches' smallest active activation.

    A crosscoder chooses by activations times the sum over hooks of their decoder norms, as Minder et al. 2025 (arXiv
    2504.02922) do, and weighs them so in its threshold. Its rows have unit norm over all hooks together, which fixes a scale
    that neither the choice nor the reconstruction depends on. Of dead latents the auxiliary loss takes the most active
    without such weights, which lie between 1 and the root of the number of hooks.
    """

    def select(self, pre_BF: Tensor) -> Support | None:
        if not self.use_sparse(self.k / pre_BF.shape[1]):
            return None
        return support_of(self.active(pre_BF))

    def dense_activations(self, pre_BF: Tensor) -> Tensor:
        return torch.relu(pre_BF) * self.active(pre_BF.detach())

    def active(self, pre_BF: Tensor) -> Tensor:
        """The k * B largest positive entries of a batch; among equals at the limit all count."""
        if self.n_hooks > 1:
            pre_BF = pre_BF * self.norm_sums().detach()
        self.limit = self.batch_limit(pre_BF)
        return (pre_BF >= self.limit) & (pre_BF > 0)


class MatryoshkaBatchTopK(BatchTopK):
    """BatchTopK whose loss is the mean over nested prefixes of the dictionary of `|x - x_hat_prefix|^2`
    (arXiv 2503.17547); the auxiliary loss sees the residual of the whole.

    dictionary_learning weights the prefixes by 1/n and then takes their mean as well, so that its reconstruction
    loss is n times smaller beside the auxiliary one; here the mean is taken once.
    """

    config: MatryoshkaRecipe  # ty: ignore[incompatible-mutable-override]

    def __init__(self, d_in: int, config: MatryoshkaRecipe, train: Train) -> None:
        super().__init__(d_in, config, train)
        sizes = [int(fraction * config.d_sae) for fraction in config.group_fractions[:-1]]
        self.bounds = [0, *accumulate(sizes), config.d_sae]
        """Where each group begins, and the width."""

    def reconstruction_loss(self, x_BD: Tensor, code: Reconstruction) -> Tensor:
        total, x_hat_BD = x_BD.new_zeros(()), self.b_dec.expand_as(x_BD)
        groups = list(zip(self.bounds, self.bounds[1:], strict=False))
        for start, end in groups[:-1]:
            if end > start:
                x_hat_BD = x_hat_BD + self._part(code, start, end)
            total = total + (x_BD - x_hat_BD).square().sum()
        total = total + (x_BD - code.x_hat).square().sum()  # the whole dictionary is there already
        return total / (len(groups) * len(x_BD))

    def _part(self, code: Reconstruction, start: int, end: int) -> Tensor:
        """What latents `start` to `end` add to the reconstruction [B, D]."""
        if code.support is None:
            return self.decode(code.activations[:, start:end], self.W_dec[start:end])
        crow, col, width = code.support.crow, code.support.col, code.support.n_latents
        inside_N = (col >= start) & (col < end)
        counts = torch.cat([inside_N.new_zeros(1, dtype=torch.long), inside_N.long().cumsum(0)])
        return decode_at(Support(counts[crow], col[inside_N], width), code.activations[inside_N], self.W_dec)


# --- dead latents ------------------------------------------------------------------------------

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
        recipe.plain_state["refreshed"] = 0.0

    def refresh(self, progress: float) -> None:
        if progress - self.recipe.plain_state["refreshed"] < self.window / REFRESHES:
            return
        self.recipe.plain_state["refreshed"] = progress
        self.index_N = (progress - self.recipe.last_fired_F >= self.window).nonzero().flatten()

    def auxiliary_loss(self, centred_BD: Tensor, residual_BD: Tensor) -> Tensor:
        """Fraction of the residual's variance that the k_aux = d_in / 2 most active dead latents leave unexplained.

        Neither argument has a graph. Only the dead rows are touched; `b_dec` gets no gradient from here, it belongs
        to the living.
        """
        recipe = self.recipe
        W_enc_ND, W_dec_ND = recipe.W_enc[self.index_N], recipe.W_dec[self.index_N]
        z_BN = recipe.activate(torch.addmm(recipe.b_enc[self.index_N], centred_BD, W_enc_ND.T))
        if self.valid_N is not None:
            z_BN = z_BN * self.valid_N
        if len(self.index_N) > self.k_aux:
            index_BK = z_BN.detach().abs().topk(self.k_aux, dim=1, sorted=False).indices
            z_BN = torch.zeros_like(z_BN).scatter(1, index_BK, z_BN.gather(1, index_BK))
        variance = (residual_BD - residual_BD.mean(0)).square().sum().clamp_min(1e-12)
        unexplained = (residual_BD - z_BN @ W_dec_ND).square().sum() / variance
        return unexplained if self.valid_N is None else unexplained * self.valid_N.any()
