"""Matching pursuit over atoms of one hook, decoded at another: how a transcoder's untrained controls read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from torch import Tensor

from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.pursuit.encoders import MPSAE


class MappedMPSAE(SparseAutoencoder):
    """`z` of `MPSAE` over the unit columns of `W_enc` [d_in, d_sae] on `x - b_in` [d_in]; s steps a token. `W_dec`
    [d_sae, d_out] says what each atom stands for at the written hook."""

    form = "mapped_matching_pursuit"
    tensor_names = ("W_enc", "b_in", "W_dec", "b_dec")
    option_names = ("s",)
    signed = True

    def __init__(self, cfg: SAEConfig | None = None, *, s: int, **tensors: Tensor) -> None:
        super().__init__(cfg, **tensors)
        read = SAEConfig(MPSAE.form, self.cfg.d_in, self.cfg.d_sae, hook_name=self.cfg.hook_name, options={"s": s})
        self.pursuit = MPSAE(self.W_enc.T.contiguous(), self.b_in, s, read)
        self.s = self.pursuit.size

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.pursuit.encode(x, mask)

    def family_key(self) -> object:
        return self.pursuit.family_key()

    @classmethod
    def encode_family(cls, members: Sequence[Self], x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        return MPSAE.encode_family([member.pursuit for member in members], x, mask)
