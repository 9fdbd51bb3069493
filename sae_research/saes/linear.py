"""Linear SAE: an affine map with no nonlinearity, as PCA is."""

from __future__ import annotations

from torch import Tensor

from sae_research.saes.base import SparseAutoencoder


class LinearSAE(SparseAutoencoder):
    """`z = (x - b_dec) W_enc + b_enc`; activations are signed and dense."""

    form = "linear"
    signed = True

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.keep(self.centred(x) @ self.W_enc + self.b_enc, mask)
