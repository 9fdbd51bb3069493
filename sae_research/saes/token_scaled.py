"""Inference forms that scale each token before they encode it, and scale back what they decode. What they add to every
reconstruction then grows with the token; it stands as latents that fire on every token, so that `z W_dec` is all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.reading import whole


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
        return {
            "W_enc": torch.cat([W_enc, W_enc.new_zeros(len(W_enc), 1)], 1),
            "b_enc": torch.cat([b_enc, b_enc.new_zeros(1)]),
            "W_dec": torch.cat([W_dec, b_dec[None]]),
            "b_dec": torch.zeros_like(b_dec),
        }

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.read(x)
        size = x.norm(dim=-1, keepdim=True).clamp_min(1e-12) / x.shape[-1] ** 0.5
        read = x / size - (self.W_dec[-1] if self.cfg.apply_b_dec_to_input else 0)
        z = torch.relu(read @ self.W_enc + self.b_enc) * size
        z[..., -1:] = size
        return self.keep(z, mask)


class LayerNormSAE(SparseAutoencoder):
    """With m the mean of x over d_in and s the standard deviation (of d_in - 1 degrees of freedom):
    `n = (x - m) / (s + 1e-5)`, `z = s TopK(ReLU((n - b) W_enc + b_enc))`, `x_hat = z W_dec + s b + m`.

    As OpenAI's TopK autoencoders and SAELens' `layer_norm` do it (arXiv 2406.04093). Two latents are added: the last but one
    has the row b and the activation s, the last a row of ones and the activation m, which may be negative. L0 counts both.
    `b_dec` is zero. k = 0: no TopK.
    """

    form = "layer_norm"
    option_names = ("k",)
    signed = True
    EPSILON = 1e-5

    def __init__(self, cfg: SAEConfig | None = None, *, k: int, **tensors: Tensor) -> None:
        super().__init__(cfg, **tensors)
        self.k = whole(k, "k", self.form, least=0)
        if self.k > self.cfg.d_sae - 2:
            raise UserError(f"{self.form}: k = {k} is more than its {self.cfg.d_sae - 2} latents")

    @classmethod
    def widened(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of this form from a plain SAE's: two latents more."""
        W_enc, b_enc, W_dec, b_dec = (tensors[name] for name in cls.tensor_names)
        return {
            "W_enc": torch.cat([W_enc, W_enc.new_zeros(len(W_enc), 2)], 1),
            "b_enc": torch.cat([b_enc, b_enc.new_zeros(2)]),
            "W_dec": torch.cat([W_dec, b_dec[None], torch.ones_like(b_dec)[None]]),
            "b_dec": torch.zeros_like(b_dec),
        }

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.read(x)
        mean = x.mean(dim=-1, keepdim=True)
        size = (x - mean).std(dim=-1, keepdim=True)
        read = (x - mean) / (size + self.EPSILON) - (self.W_dec[-2] if self.cfg.apply_b_dec_to_input else 0)
        z = torch.relu(read @ self.W_enc[:, :-2] + self.b_enc[:-2])
        if self.k:
            values, indices = z.topk(self.k, dim=-1, sorted=False)
            z = torch.zeros_like(z).scatter_(-1, indices, values)
        return self.keep(torch.cat([z * size, size, mean], dim=-1), mask)
