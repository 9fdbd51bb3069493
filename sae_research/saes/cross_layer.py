"""Cross-layer transcoders: each layer's latents write that layer's MLP output and all later ones' (Ameisen et al. 2025,
*Circuit Tracing*).

With x_l what layer l's MLP reads, y_m what layer m's MLP puts out, and F latents a layer,

    z_l = act(x_l W_enc,l + b_enc,l)        y_hat_m = sum over l <= m of z_l W_dec,l,m  +  b_dec,m  (+ x_m W_skip,m^T)

`cfg.hook_name` is `A + B + ...`, what is read, in the order of layers, `cfg.hook_out` what is written; activations,
latents and reconstructions lie side by side in that order. With one layer it is a transcoder.

A released layer that comes without the others (`part`) reads one hook and writes several. Its latents are those of the
whole; what it decodes is its own share of sums over all layers, and stands for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes.base import SparseAutoencoder
from sae_research.saes.config import SAEConfig


class CrossLayerTranscoder(SparseAutoencoder):
    """`act` is JumpReLU, `ReLU(pre) where pre > threshold`, which with thresholds of zero is a ReLU; with `k` the k largest
    of each layer.

    | tensor | shape | |
    |---|---|---|
    | `W_enc` | [d_in of a hook, layers * F] | columns of a layer's latents read that layer's hook |
    | `b_enc`, `threshold` | [layers * F] | |
    | `W_dec` | [pairs * F, d_out of a hook] | for each written hook in turn the rows of all latents that write it |
    | `b_dec` | [written hooks * d_out of a hook] | |
    | `W_skip` | [layers * d_out of a hook, d_in of a hook] | from what a layer reads to what it writes |
    """

    form = "cross_layer"
    tensor_names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")

    def __init__(self, cfg: SAEConfig | None = None, *, k: int | None = None, part: bool = False, **tensors: Tensor) -> None:
        if cfg is None:
            raise UserError(f"{self.form}: needs a configuration: its tensors do not say which hooks it reads and writes")
        options = ({} if k is None else {"k": k}) | ({"part": True} if part else {})
        super().__init__(cfg.replace(options=options), **tensors)
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.width):
            raise UserError(
                f"{self.form}: k = {k!r} must be a whole number between 1 and the {self.width} latents of a layer"
            )
        self.k = k

    # --- shape ---

    @property
    def width(self) -> int:
        """Latents of one layer."""
        return self.cfg.d_sae // len(self.cfg.hook_names)

    @property
    def d_written(self) -> int:
        """Dimensions of one written hook."""
        return self.cfg.d_out // len(self.cfg.hooks_out)

    def options(self) -> dict[str, Any]:
        return dict(self.cfg.options)

    def sides(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is read [..., d_in], hook by hook."""
        return x.chunk(len(self.cfg.hook_names), dim=-1)

    def decoder(self, number: int) -> Tensor:
        """Rows of all latents that write the written hook of this number [sources * F, d_written]: those of the layers up to
        its own."""
        sources = self.cfg.sources
        start = sum(sources[:number]) * self.width
        return self.W_dec[start : start + sources[number] * self.width]

    def decoder_rows(self, number: int) -> Tensor:
        """Of the latents of the read hook of this number all decoder rows side by side [F, n * d_written]."""
        own = slice(number * self.width, (number + 1) * self.width)
        written = [m for m, count in enumerate(self.cfg.sources) if count > number]
        return torch.cat([self.decoder(m)[own] for m in written], dim=1)

    # --- the whole at once ---

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.cat([self.encode_hook(number, side, mask) for number, side in enumerate(self.sides(x))], dim=-1)

    def decode(self, z: Tensor) -> Tensor:
        return torch.cat([self.decode_hook(number, z) for number in range(len(self.cfg.hooks_out))], dim=-1)

    def reconstruct(self, x: Tensor, mask: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        z = self.encode(x, mask) if z is None else z
        sides = self.sides(x)
        written = [self.written_hook(m, z, sides[m] if m < len(sides) else None) for m in range(len(self.cfg.hooks_out))]
        return torch.cat(written, dim=-1)

    # --- layer by layer, as a model runs ---

    def encode_hook(self, number: int, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Activations of one layer's latents [..., F] from what its hook has [..., d_in of a hook]."""
        own = slice(number * self.width, (number + 1) * self.width)
        pre = self.read(x) @ self.W_enc[:, own] + self.b_enc[own]
        z = torch.relu(pre) * (pre > self.threshold[own])
        if self.k is not None:
            values, indices = z.topk(self.k, dim=-1, sorted=False)
            z = torch.zeros_like(z).scatter_(-1, indices, values)
        return self.keep(z, mask)

    def decode_hook(self, number: int, z: Tensor) -> Tensor:
        """What latents write at one hook [..., d_written]; z: [..., at least those of the layers up to its own]."""
        rows = self.decoder(number)
        bias = self.b_dec[number * self.d_written : (number + 1) * self.d_written]
        return z[..., : len(rows)] @ rows + bias

    def written_hook(self, number: int, z: Tensor, x: Tensor | None) -> Tensor:
        """What stands for what one hook has [..., d_written]: `decode_hook`, and what the skip makes of what its layer reads,
        x [..., d_in of a hook]; None where a part does not read that layer."""
        decoded = self.decode_hook(number, z)
        if self.W_skip is None or x is None:
            return decoded
        return decoded + self.read(x) @ self.W_skip[number * self.d_written : (number + 1) * self.d_written].T

    # --- checks ---

    def _check_shapes(self) -> None:
        cfg = self.cfg
        if not cfg.is_transcoder:
            raise UserError(f"{self.form}: it reads and writes {cfg.hook_name}; say which hooks it writes (hook_out)")
        d_hook = cfg.d_in // len(cfg.hook_names)
        expected = {
            "W_enc": (d_hook, cfg.d_sae),
            "b_enc": (cfg.d_sae,),
            "threshold": (cfg.d_sae,),
            "W_dec": (sum(cfg.sources) * self.width, self.d_written),
            "b_dec": (cfg.d_out,),
            "W_skip": (len(cfg.hook_names) * self.d_written, d_hook),
        }
        for name, tensor in self.tensors().items():
            if tuple(tensor.shape) != expected[name]:
                raise UserError(
                    f"{self.form}: {name} has shape {tuple(tensor.shape)}, expected {expected[name]} for {cfg.d_sae} "
                    f"latents and {cfg.hooks}"
                )
        self._check_finite(self.tensors())


def packed(by_source: Sequence[Sequence[Tensor]]) -> Tensor:
    """`W_dec` [pairs * F, d_written] of decoders [F, d_written] by source layer l, and by written hook from l on."""
    n = len(by_source)
    return torch.cat([by_source[layer][written - layer] for written in range(n) for layer in range(written + 1)])
