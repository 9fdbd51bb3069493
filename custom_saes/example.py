"""An SAE of one's own, whole. Try it:

    # params.yaml
    comparison_saes:
      python: [custom_saes.example:AbsTopK]

Setup builds it from the baseline's weights (`SparseAutoencoder.from_baseline`; define that classmethod
yourself to load or compute others), and from there on it is a row in every table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.saes import SparseAutoencoder


class AbsTopK(SparseAutoencoder):
    """Keeps the k pre-activations of largest absolute value, signs and all."""

    form = "abs_topk"
    signed = True
    k = 32

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        pre = self.centred(x) @ self.W_enc + self.b_enc
        top = pre.abs().topk(min(self.k, pre.shape[-1]), dim=-1).indices
        return self.keep(torch.zeros_like(pre).scatter(-1, top, pre.gather(-1, top)), mask)
