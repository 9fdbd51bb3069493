"""The form of SAELens' `temporal` architecture (arXiv 2511.01836): what earlier tokens predict is taken away before a token
is encoded."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.reading import number, whole

ATTENTION = tuple(f"{part}_{kind}" for part in ("key", "query", "value", "out") for kind in ("weight", "bias"))


class TemporalSAE(SparseAutoencoder):
    """Per attention layer, on what is left r of a sequence (at first x - b_dec):

        a_t = ReLU(r_t W_enc);  p_t = ReLU(attention of a_t to 0, a_1, ..., a_(t-1));  q_t = p_t W_dec
        r_t <- r_t - q_t (q_t . r_t) / (|q_t| + epsilon)^2

    Then `z = TopK(ReLU(r W_enc))`, the latents, k = 0: no TopK. The reconstruction is `z W_dec + b_dec` and all that was
    taken away, which is dense in the latents and none of them: `decode` leaves it out, `reconstruct` has it. Latents depend
    on earlier tokens; those that do not count are as if they were not there.

    Attention is over latents, tensors [layers, ...]: `key_weight`, `query_weight` [width, d_sae], `value_weight`,
    `out_weight` [d_sae, d_sae], each with its bias; heads split the first dimension of each.
    """

    form = "sae_lens_temporal"
    tensor_names = ("W_enc", "W_dec", "b_dec", *ATTENTION)
    option_names = ("k", "heads", "epsilon")
    per_token = False

    def __init__(self, cfg: SAEConfig | None = None, *, k: int, heads: int, epsilon: float, **tensors: Tensor) -> None:
        super().__init__(cfg, **tensors)
        self.k, self.heads = whole(k, "k", self.form, least=0), whole(heads, "heads", self.form)
        self.epsilon = number(epsilon, "epsilon", self.form)
        if self.k > self.cfg.d_sae:
            raise UserError(f"{self.form}: k = {k} is more than its {self.cfg.d_sae} latents")
        if self.key_weight.shape[1] % self.heads or self.cfg.d_sae % self.heads:
            raise UserError(
                f"{self.form}: {self.key_weight.shape[1]} dimensions of keys and {self.cfg.d_sae} latents do not split into "
                f"{heads} heads"
            )

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        left, _ = self._unpredicted(x, mask)
        z = torch.relu(left @ self.W_enc)
        if self.k:
            values, indices = z.topk(self.k, dim=-1, sorted=False)
            z = torch.zeros_like(z).scatter_(-1, indices, values)
        return self.keep(z, mask)

    def reconstruct(self, x: Tensor, mask: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """`decode(z)` and what earlier tokens predict [batch, seq, d_in]."""
        return self.decode(self.encode(x, mask) if z is None else z) + self._unpredicted(x, mask)[1]

    def _unpredicted(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(what is left of x - b_dec, what was taken away), each [batch, seq, d_in]."""
        left = self.centred(x)
        taken = torch.zeros_like(left)
        seen = self._seen(x.shape[1], mask, x.device)
        for layer in range(len(self.key_weight)):
            a = torch.relu(left @ self.W_enc)
            q = self._predicted(a, seen, layer) @ self.W_dec
            share = (q * left).sum(-1, keepdim=True) / (q.norm(dim=-1, keepdim=True) + self.epsilon).square()
            left, taken = left - share * q, taken + share * q
        return left, taken

    @staticmethod
    def _seen(length: int, mask: Tensor | None, device: torch.device) -> Tensor:
        """Which places of (0, a_1, ..., a_(n-1)) a token attends to [batch or 1, 1, seq, seq]: its own and those before, but
        for those of tokens that do not count."""
        seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
        if mask is None:
            return seen
        counts = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1)
        return seen & counts[:, None, None, :]

    def _predicted(self, a: Tensor, seen: Tensor, layer: int) -> Tensor:
        """Attention's answer for every token [batch, seq, d_sae]."""

        def linear(name: str, values: Tensor) -> Tensor:
            return values @ getattr(self, f"{name}_weight")[layer].T + getattr(self, f"{name}_bias")[layer]

        before = torch.cat([torch.zeros_like(a[:, :1]), a[:, :-1]], dim=1)
        query, key, value = (
            linear(name, values).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, values in (("query", a), ("key", before), ("value", before))
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return torch.relu(linear("out", mixed.transpose(1, 2).flatten(-2)))

    def _check_shapes(self) -> None:
        attention = {name: getattr(self, name) for name in ATTENTION}
        layers, width, d_sae = self.key_weight.shape[:1].numel(), self.key_bias.shape[-1:].numel(), self.cfg.d_sae
        for name, tensor in attention.items():
            out = width if name.startswith(("key", "query")) else d_sae
            expected = (layers, out, d_sae) if name.endswith("weight") else (layers, out)
            if tuple(tensor.shape) != expected:
                raise UserError(f"{self.form}: {name} has shape {tuple(tensor.shape)}, expected {expected}")
            if not torch.isfinite(tensor).all():
                raise UserError(f"{self.form}: {name} holds NaN or infinity; the weights are damaged or diverged")
        self._check_own({name: t for name, t in self.tensors().items() if name not in attention})
