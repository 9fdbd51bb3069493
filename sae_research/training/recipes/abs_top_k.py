"""Recipe `abs_top_k`: a token's k latents of largest absolute value, signs and all (Zhu et al. 2025, arXiv 2510.00404)."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.config.recipes import AbsTopKRecipe
from sae_research.training.products import Support, fixed_support
from sae_research.training.recipes.top_k import TopK


class AbsTopK(TopK):
    """Minimises `mean over tokens of |x - x_hat|^2 + aux_k_coefficient * aux`, as `top_k`; but `z` keeps the k
    pre-activations of largest absolute value, so that one latent may stand for a direction and its opposite.

    `aux` looks at the dead latents of largest absolute value likewise. No threshold is recorded: the SAE that comes out
    takes the k largest of each token.
    """

    config: AbsTopKRecipe  # ty: ignore[incompatible-mutable-override]

    def activate(self, pre: Tensor) -> Tensor:
        return pre

    def select(self, pre_BF: Tensor) -> Support | None:
        if not self.use_sparse(self.k / pre_BF.shape[1]):
            return None
        from sae_research.saes.pursuit.kernels_numba import largest  # for the CPU alone

        self.limit = None
        return fixed_support(largest(pre_BF.abs(), self.k), pre_BF.shape[1])

    def dense_activations(self, pre_BF: Tensor) -> Tensor:
        self.limit = None
        index_BK = pre_BF.detach().abs().topk(self.largest_k, dim=1).indices
        values_BK = pre_BF.gather(1, index_BK)
        if not isinstance(self.k, int):
            values_BK = values_BK * (torch.arange(self.largest_k, device=pre_BF.device) < self.k)
        return torch.zeros_like(pre_BF).scatter(1, index_BK, values_BK)

    @property
    def form(self) -> str:  # type: ignore[override]
        return "abs_topk"
