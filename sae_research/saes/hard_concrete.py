"""SAEs with hard-concrete gates (Louizos et al. 2018, arXiv 1712.01312), at inference with their median gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_research.errors import UserError
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.reading import number


def stretched_gate(logits: Tensor, beta: Tensor | float, stretch: Sequence[float]) -> Tensor:
    """`clip(sigmoid(logits / beta) (r - l) + l, 0, 1)`, (l, r) = `stretch`; elementwise."""
    low, high = stretch
    return (torch.sigmoid(logits / beta) * (high - low) + low).clamp(0, 1)


class _Gates(SparseAutoencoder):
    """What both forms have: the temperature and the limits of their gates."""

    option_names = ("beta", "stretch")

    def __init__(self, cfg: SAEConfig | None = None, *, beta: float, stretch: Sequence[float],
                 **tensors: Tensor) -> None:
        super().__init__(cfg, **tensors)
        self.beta = number(beta, "beta", self.form)
        if not isinstance(stretch, Sequence) or len(stretch) != 2 or not self.beta:
            raise UserError(f"{self.form}: beta must not be 0, and stretch two numbers (got {beta!r}, {stretch!r})")
        self.stretch = [number(limit, "stretch", self.form) for limit in stretch]


class HardConcreteSAE(_Gates):
    """`z = gate * ReLU(x W_enc + b_enc)`, `gate = clip(sigmoid((x W_gate + b_gate) / beta) (r - l) + l, 0, 1)`.

    In training the gate is random; this is its median, positive exactly where a random one is with a probability above
    one half.
    """

    form = "hard_concrete"
    tensor_names = ("W_enc", "b_enc", "W_dec", "b_dec", "W_gate", "b_gate")

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.centred(x)
        gate = stretched_gate(x @ self.W_gate + self.b_gate, self.beta, self.stretch)
        return self.keep(gate * torch.relu(x @ self.W_enc + self.b_enc), mask)


class SignedHardConcreteSAE(HardConcreteSAE):
    """`z = gate * (x W_enc + b_enc)`: magnitudes without a ReLU, as SAE-Interpretability trains them."""

    form = "signed_hard_concrete"
    signed = True

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.centred(x)
        gate = stretched_gate(x @ self.W_gate + self.b_gate, self.beta, self.stretch)
        return self.keep(gate * (x @ self.W_enc + self.b_enc), mask)


class GatedHardConcreteSAE(_Gates):
    """`z = gate * ReLU(exp(r_mag) pi + b_mag)`, `pi = (x - b_dec) W_enc`, the gate's logits `sharpness * pi + b_gate`."""

    form = "gated_hard_concrete"
    tensor_names = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag", "sharpness")

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        shared = self.centred(x) @ self.W_enc
        gate = stretched_gate(self.sharpness * shared + self.b_gate, self.beta, self.stretch)
        return self.keep(gate * torch.relu(shared * self.r_mag.exp() + self.b_mag), mask)

    def encoder_weights(self) -> tuple[Tensor, Tensor]:
        return self.W_enc, self.b_mag
