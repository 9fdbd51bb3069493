"""A ReLU SAE that reads every token at one norm: SAELens' `normalize_activations: constant_norm_rescale`."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.saes.base import SparseAutoencoder


class NormRescaledSAE(SparseAutoencoder):
    """With s = |x| / sqrt(d_in): `z = s ReLU((x / s - b) W_enc + b_enc)`, `x_hat = z W_dec + s b`.

    The decoder's bias grows with the token, so it is a latent here: the last, whose decoder row is b and whose activation is
    s on every token. L0 counts it, its density is 1; `b_dec` itself is zero, and the last column of `W_enc` too.
    """

    form = "standard_norm_rescaled"

    @classmethod
    def widened(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of this form from a plain ReLU SAE's: one latent more."""
        W_enc, b_enc, W_dec, b_dec = (tensors[name] for name in cls.tensor_names)
        return {"W_enc": torch.cat([W_enc, W_enc.new_zeros(len(W_enc), 1)], 1),
                "b_enc": torch.cat([b_enc, b_enc.new_zeros(1)]),
                "W_dec": torch.cat([W_dec, b_dec[None]]), "b_dec": torch.zeros_like(b_dec)}

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.target(x)
        size = x.norm(dim=-1, keepdim=True).clamp_min(1e-12) / x.shape[-1] ** 0.5
        read = x / size - (self.W_dec[-1] if self.cfg.apply_b_dec_to_input else 0)
        z = torch.relu(read @ self.W_enc + self.b_enc) * size
        z[..., -1:] = size
        return self.keep(z, mask)
