"""Recipe `batch_top_k`: the k * B largest activations of a batch (Bussmann et al. 2024, arXiv 2412.06410)."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.training.recipes.top_k import TopK
from sae_research.training.sparse import Support, support_of


class BatchTopK(TopK):
    """As `top_k`, with k on average rather than for every token.

    At inference tokens must not depend on one another: the SAE that comes out has one threshold, the average of
    recent batches' smallest active activation.
    """

    def select(self, pre_BF: Tensor) -> Support | None:
        if not self.use_sparse(self.k / pre_BF.shape[1]):
            return None
        return support_of(self.active(pre_BF))

    def dense_activations(self, pre_BF: Tensor) -> Tensor:
        return torch.relu(pre_BF) * self.active(pre_BF.detach())

    def active(self, pre_BF: Tensor) -> Tensor:
        """The k * B largest positive entries of a batch; among equals at the limit all count."""
        self.limit = self.batch_limit(pre_BF)
        return (pre_BF >= self.limit) & (pre_BF > 0)
