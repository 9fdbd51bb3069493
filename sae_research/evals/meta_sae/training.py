"""A small BatchTopK SAE trained on the rows of a decoder.

Source: SAE Bench 0.6.0, sae_bench/evals/meta_structure/main.py, and what SAELens 6 does there: Adam at a constant rate,
gradients clipped to norm 1, no auxiliary loss within 2000 steps. Of a batch of n rows the k n largest activations stay,
each measured by its pre-activation times the norm of its decoder row; that norm cancels in the reconstruction, so that it
only decides what is active. Stock trains under bfloat16 autocast; here everything is float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_research.params import MetaSAE
from sae_research.training.sparse import Support, decode_at, encode_at

INIT_NORM = 0.1


class Code(NamedTuple):
    """Rows encoded and decoded."""

    x_hat: Tensor
    """[rows, d_in]"""
    active: Tensor
    """Numbers of the active entries of [rows, width], flattened, in order [N]."""


class BatchTopKSAE(nn.Module):
    """`x_hat = z W_dec + b_dec`, `z = (x - b_dec) W_enc^T + b_enc` at the active entries and zero elsewhere."""

    def __init__(self, d_in: int, width: int, k: float, generator: torch.Generator) -> None:
        super().__init__()
        directions_FD = torch.rand(width, d_in, generator=generator) - 0.5  # SAELens' initial directions are uniform too
        rows_FD = INIT_NORM * nn.functional.normalize(directions_FD, dim=1)
        self.k = k
        self._hint = 0.0
        self.W_enc, self.W_dec = nn.Parameter(rows_FD.clone()), nn.Parameter(rows_FD.clone())
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(d_in))

    def forward(self, x_BD: Tensor) -> Code:
        width = len(self.b_enc)
        with torch.no_grad():
            centred_BD = x_BD - self.b_dec
            pre_BF = torch.addmm(self.b_enc, centred_BD, self.W_enc.T)
            acts = (pre_BF * self.W_dec.norm(dim=1)).relu().flatten()
            active = self._largest(acts, min(int(self.k * len(x_BD)), len(acts)))
        if x_BD.device.type != "cpu":
            return Code(self._decode_densely(x_BD, active), active)
        crow = torch.zeros(len(x_BD) + 1, dtype=torch.long)
        crow[1:] = torch.bincount(active // width, minlength=len(x_BD)).cumsum(0)
        support = Support(crow, active % width, width)
        z_N = encode_at(support, pre_BF.flatten()[active], centred_BD, self.W_enc, self.b_enc, self.b_dec)
        return Code(decode_at(support, z_N, self.W_dec) + self.b_dec, active)

    def _largest(self, acts: Tensor, n: int) -> Tensor:
        """Numbers of the n largest of `acts` that are not zero, in order.

        Sorting partially is a third of a step's work, so it looks above the limit of the last batch, lowered a little,
        and at everything only where too few are there. The outcome is the same.
        """
        candidates = (acts > self._hint).nonzero()[:, 0]
        if len(candidates) < n and self._hint > 0:
            candidates = (acts > 0).nonzero()[:, 0]
        if len(candidates) > n:
            candidates = candidates[acts[candidates].topk(n, sorted=False).indices].sort().values
        self._hint = 0.8 * float(acts[candidates].min()) if len(candidates) else 0.0
        return candidates

    def _decode_densely(self, x_BD: Tensor, active: Tensor) -> Tensor:
        """The same by plain autograd, which a GPU prefers."""
        pre_BF = torch.addmm(self.b_enc, x_BD - self.b_dec, self.W_enc.T)
        kept = torch.zeros(pre_BF.numel(), device=pre_BF.device)
        kept[active] = 1.0
        return (pre_BF * kept.view_as(pre_BF)) @ self.W_dec + self.b_dec


def train_meta_sae(rows_ND: Tensor, config: MetaSAE, seed: int) -> BatchTopKSAE:
    """Trained on `rows_ND` [d_sae, d_in] float32, whose device it uses; batches are drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    n_rows, d_in = rows_ND.shape
    width = max(math.ceil(n_rows * config.width_ratio), config.k)
    sae = BatchTopKSAE(d_in, width, config.k, generator).to(rows_ND.device)
    optimiser = torch.optim.Adam(sae.parameters(), lr=config.learning_rate, fused=rows_ND.device.type != "mps")
    for _ in range(config.train_steps):
        index = torch.randint(n_rows, (config.train_batch_size,), generator=generator)
        x_BD = rows_ND[index.to(rows_ND.device)]
        loss = (sae(x_BD).x_hat - x_BD).square().sum() / len(x_BD)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
    return sae
