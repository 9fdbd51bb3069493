"""Recipe `matryoshka_batch_top_k`: nested dictionaries, each to reconstruct alone (Bussmann et al. 2025)."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from sae_research.params import Train
from sae_research.recipe_params import MatryoshkaRecipe
from sae_research.training.recipes.base import Reconstruction
from sae_research.training.recipes.batch_top_k import BatchTopK
from sae_research.training.sparse import Support, decode_at


class MatryoshkaBatchTopK(BatchTopK):
    """BatchTopK whose loss is the mean over nested prefixes of the dictionary of `|x - x_hat_prefix|^2`
    (arXiv 2503.17547); the auxiliary loss sees the residual of the whole.

    dictionary_learning weights the prefixes by 1/n and then takes their mean as well, so that its reconstruction
    loss is n times smaller beside the auxiliary one; here the mean is taken once.
    """

    config: MatryoshkaRecipe

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
