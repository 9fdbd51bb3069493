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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_research.config.recipes import PLUS
from sae_research.runtime.errors import UserError
from sae_research.saes.base import SparseAutoencoder
from sae_research.saes.config import SAEConfig
from sae_research.saes.reading import floats


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
        """What stands for what one hook has [..., d_written]: `decode_hook`, and what a skip makes of x.

        x: what its layer reads [..., d_in of a hook]; None where a part does not read that layer.
        """
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


class LayerWeights(NamedTuple):
    """One layer of a cross-layer transcoder, as files have them."""

    W_enc: Tensor
    """[d_in of a hook, F]"""
    b_enc: Tensor
    """[F]"""
    decoders: Sequence[Tensor]
    """Into its own layer and each later one [F, d_written]."""
    b_dec: Tensor
    """Of what its own layer writes [d_written]."""
    threshold: Tensor | None = None
    """[F]; None for a ReLU."""
    W_skip: Tensor | None = None
    """[d_written, d_in of a hook]"""


def of_layers(
    layers: Sequence[LayerWeights],
    hooks: Sequence[tuple[str, str]],
    where: object,
    model_name: str,
    library: str,
    k: int | None = None,
    part: bool = False,
    context_size: int = 128,
) -> CrossLayerTranscoder:
    """A cross-layer transcoder of its layers; as a `part` one of them alone, `hooks` then being its own layer's and the
    later ones'. hooks: (read, written) by layer; where: for messages; library: whose files they are. Raises `UserError` for
    layers that do not fit together."""
    n = len(hooks)
    for number, layer in enumerate(layers):
        _check_layer(layer, layers[0], n - number, f"{where}: layer {number} of {n}")
    into = [torch.cat([layer.decoders[m - number] for number, layer in enumerate(layers[: m + 1])]) for m in range(n)]
    skips = [layer.W_skip for layer in layers if layer.W_skip is not None]
    tensors = {
        "W_enc": torch.cat([layer.W_enc for layer in layers], dim=1),
        "b_enc": torch.cat([layer.b_enc for layer in layers]),
        "W_dec": torch.cat(into),
        "b_dec": torch.cat([layer.b_dec for layer in layers] + [torch.zeros_like(layers[0].b_dec)] * (n - len(layers))),
        "threshold": torch.cat([torch.zeros_like(one.b_enc) if one.threshold is None else one.threshold for one in layers]),
        **({"W_skip": torch.cat(skips)} if skips else {}),
    }
    kind = "topk" if k else "relu" if layers[0].threshold is None else "jumprelu"
    try:
        cfg = SAEConfig(
            form=CrossLayerTranscoder.form,
            d_in=layers[0].W_enc.shape[0] * len(layers),
            d_sae=tensors["b_enc"].numel(),
            d_out=tensors["b_dec"].numel(),
            model_name=model_name,
            hook_name=PLUS.join(read for read, _ in hooks[: len(layers)]),
            hook_out=PLUS.join(written for _, written in hooks),
            context_size=context_size,
            apply_b_dec_to_input=False,
            architecture=f"{kind}_cross_layer",
            options={"part": True} if part else {},
            provenance={"format": library},
        )
        return CrossLayerTranscoder(cfg, k=k, part=part, **floats(tensors, where))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_layer(layer: LayerWeights, first: LayerWeights, n_decoders: int, where: str) -> None:
    if len(layer.decoders) != n_decoders:
        raise UserError(f"{where} has {len(layer.decoders)} decoders, expected {n_decoders}; fetch it again")
    for name in ("W_enc", "b_enc", "b_dec", "threshold", "W_skip"):
        shape, expected = (None if one is None else tuple(one.shape) for one in (getattr(layer, name), getattr(first, name)))
        if shape != expected:
            raise UserError(f"{where}: {name} has shape {shape}, layer 0's {expected}; do they belong together?")
    if {tuple(rows.shape) for rows in layer.decoders} != {(*layer.b_enc.shape, *layer.b_dec.shape)}:
        raise UserError(f"{where}: its decoders have other shapes than its biases")
    if layer.threshold is not None and bool((layer.threshold < 0).any()):
        raise UserError(f"{where}: thresholds below 0 would make activations negative; a JumpReLU's are not")
