"""Recipe `cross_layer`: transcoders of one layer's MLP or, across layers, of many (Ameisen et al. 2025, *Circuit Tracing*,
https://transformer-circuits.pub/2025/attribution-graphs/methods.html)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sae_research.config.params import Train
from sae_research.config.recipes import CrossLayerRecipe
from sae_research.saes import SAEConfig, SparseAutoencoder
from sae_research.saes.cross_layer import CrossLayerTranscoder
from sae_research.saes.forms import fold_decoder_norms
from sae_research.training import products
from sae_research.training.recipes.base import StepOutput, length_factor, orthonormal, unit_rows
from sae_research.training.recipes.tanh_jump_relu import TanhJumpReLU


class CrossLayer(TanhJumpReLU):
    """Minimises `mean over tokens of sum_m |y_m - y_hat_m|^2 + c_s * p * sum_i tanh(tanh_scale * |W_dec,i| z_i)
    + c_p * sum_i |W_dec,i| ReLU(exp(t_i) - pre_i)` over the written layers m and all layers' latents i; c_s, c_p, p and the
    jump are those of `tanh_jump_relu`.

    `|W_dec,i|` is the norm of all decoders of a latent together, with its gradient: rows are free. A layer's latents read
    its hook alone and write their own layer and all later ones; each hook is normalised by itself, so that layers count
    alike. At the start latents write their own layer alone, as those of so many transcoders. `W_dec` is packed as in
    `saes.cross_layer`. What comes out has activations in the units in which sparsity is weighed: a latent's decoders have a
    norm of 1 together, on normalised outputs.

    Of one hook it is an SAE or transcoder with that loss. The source has no skip; learned thresholds start equal, there too.
    """

    unit_rows = False
    config: CrossLayerRecipe  # ty: ignore[incompatible-mutable-override]

    def __init__(self, d_in: int, config: CrossLayerRecipe, train: Train) -> None:
        super().__init__(d_in, config, train)
        n = self.n_hooks
        self.d_hook, self.width = d_in // n, config.d_sae // n
        """Dimensions of a hook, and latents of a layer."""
        if n == 1:
            return
        self.stackable = False  # ty: ignore[invalid-attribute-access]
        self.unit = self.d_hook**-0.5
        with torch.no_grad():
            self.log_threshold.add_(math.log(self.unit * d_in**0.5))
        self.W_enc = nn.Parameter(torch.zeros(config.d_sae, self.d_hook))
        self.W_dec = nn.Parameter(torch.zeros(n * (n + 1) // 2 * self.width, self.d_hook))
        self.W_skip = None if self.W_skip is None else nn.Parameter(torch.zeros(d_in, self.d_hook))
        self.register_buffer("_scratch_FD", torch.empty(0), persistent=False)

    # --- the layers ---

    def sides(self, x_BD: Tensor) -> tuple[Tensor, ...]:
        """What a batch has at each hook [B, d_hook]; x_BD: what is read, or what is written."""
        return x_BD.split(self.d_hook, dim=1)

    def latents(self, layer: int) -> slice:
        """Those that read a layer."""
        return slice(layer * self.width, (layer + 1) * self.width)

    def decoder_of(self, layer: int) -> Tensor:
        """Rows of all latents that write a layer [(layer + 1) * width, d_hook]."""
        start = layer * (layer + 1) // 2 * self.width
        return self.W_dec[start : start + (layer + 1) * self.width]

    def norms(self) -> Tensor:
        """Of every latent the norm of all its decoders together [F], with a graph."""
        if self.n_hooks == 1:
            return torch.linalg.vector_norm(self.W_dec, dim=1)
        squares = [torch.linalg.vector_norm(self.decoder_of(layer), dim=1).square() for layer in range(self.n_hooks)]
        longest = self.n_hooks * self.width
        return torch.stack([nn.functional.pad(own, (0, longest - len(own))) for own in squares]).sum(0).sqrt()

    def encode(self, x_BD: Tensor, known_BF: Tensor | None = None) -> Tensor:
        if self.n_hooks == 1:
            return super().encode(x_BD, known_BF)
        parts = [
            products.encode(
                side, self.W_enc[self.latents(layer)], self.b_enc[self.latents(layer)], None, self.bfloat16, None
            )
            for layer, side in enumerate(self.sides(self.read(x_BD)))
        ]
        return torch.cat(parts, dim=1)

    def decode(self, z_BF: Tensor, W_FD: Tensor) -> Tensor:
        if self.n_hooks == 1:
            return super().decode(z_BF, W_FD)
        rows = [self.decoder_of(layer) for layer in range(self.n_hooks)]
        return torch.cat([products.product(z_BF[:, : len(own)], own, self.bfloat16) for own in rows], dim=1)

    def target(self, x_BD: Tensor) -> Tensor:
        if self.n_hooks == 1 or self.W_skip is None:
            return super().target(x_BD)
        skips = zip(self.sides(self.read(x_BD)), self.W_skip.split(self.d_hook), strict=True)
        return self.written(x_BD) - torch.cat([products.product(x, W.T, self.bfloat16) for x, W in skips], dim=1)

    # --- loss ---

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        config, unit = self.config, self.unit
        pre_BF, z_BF = self._encode(x_BD)
        residual_BD = self.target(x_BD) - (self.decode(z_BF, self.W_dec) + self.b_dec)
        norms_F = self.norms()
        sparsity = config.sparsity_coefficient * progress * torch.tanh(config.tanh_scale / unit * (z_BF * norms_F)).sum()
        below_BF = torch.relu(self.log_threshold.exp() - pre_BF) * norms_F
        loss = residual_BD.square().sum() + unit**2 * sparsity + unit * config.pre_activation_coefficient * below_BF.sum()
        active_BF = z_BF.detach() > 0
        return StepOutput(loss / len(x_BD), residual_BD.detach(), active_BF.sum() / len(x_BD), active_BF.any(0))

    # --- start ---

    @torch.no_grad()
    def initialise(self, rows_ND: Tensor, generator: torch.Generator) -> None:
        """Each layer as a transcoder of its own: a latent's encoder and its decoder into its own layer are what one token
        has at either hook, less the mean, or random directions; a tenth of the latents active, reconstructions of the
        right length."""
        if self.n_hooks == 1:
            super().initialise(rows_ND, generator)
            return
        self.generator = generator
        self.b_dec.copy_(self.written(rows_ND).mean(0))
        pairs = zip(self.sides(self.read(rows_ND)), self.sides(self.written(rows_ND)), strict=True)
        for layer, (x, y) in enumerate(pairs):
            self._initialise_layer(layer, x, y - y.mean(0), generator)

    def _initialise_layer(self, layer: int, x_ND: Tensor, y_ND: Tensor, generator: torch.Generator) -> None:
        own, n = self.latents(layer), len(x_ND)
        index = torch.randperm(n, generator=generator).repeat(-(-self.width // n))[: self.width].to(x_ND.device)
        for rows, parameter in (x_ND - x_ND.mean(0), self.W_enc[own]), (y_ND, self.decoder_of(layer)[own]):
            drawn = torch.randn(parameter.shape, generator=generator)
            noise = (orthonormal(drawn) if self.config.init == "orthogonal" else drawn).to(rows.device)
            chosen = rows[index]
            copies = 0.1 * chosen.norm(dim=1, keepdim=True) * noise / self.d_hook**0.5 if self.width > n else 0
            parameter.copy_(chosen + copies if self.config.init == "data_rows" else noise)
            unit_rows(parameter)
        threshold_F, pre_NF = self.log_threshold[own].exp(), x_ND[:4096] @ self.W_enc[own].T
        exceeded = pre_NF[:512].flatten().topk(max(1, pre_NF[:512].numel() // 10)).values[-1]
        z_NF = torch.where(pre_NF > exceeded, pre_NF - exceeded + threshold_F, 0)
        factor = length_factor(z_NF @ self.decoder_of(layer)[own], y_ND[:4096])
        self.W_enc[own] *= factor
        self.b_enc[own] = threshold_F - factor * exceeded  # the same latents stay above their thresholds

    # --- end ---

    @torch.no_grad()
    def export(self, scale: float, cfg: SAEConfig, read_scale: float | None = None) -> SparseAutoencoder:
        sae = super().export(scale, cfg, read_scale)
        return type(sae)(cfg=sae.cfg, **fold_decoder_norms("jumprelu", sae.tensors()))

    @torch.no_grad()
    def export_layers(self, scales: list[float], cfg: SAEConfig) -> SparseAutoencoder:
        """A cross-layer transcoder in the model's own units. scales: factors that its data were normalised by, of the hooks
        that are read, then of those that are written."""
        n, d = self.n_hooks, self.d_hook
        read, written = scales[:n], scales[n:]
        norms_F = self.norms().clamp_min(1e-12)
        per_latent = torch.tensor(read).repeat_interleave(self.width).to(self.W_enc)
        tensors = {
            "W_enc": (self.W_enc * (norms_F * per_latent)[:, None]).T,
            "b_enc": self.b_enc * norms_F,
            "threshold": self.log_threshold.exp() * norms_F,
            "W_dec": torch.cat([self.decoder_of(m) / norms_F[: (m + 1) * self.width, None] / written[m] for m in range(n)]),
            "b_dec": self.b_dec / torch.tensor(written).repeat_interleave(d).to(self.b_dec),
        }
        if self.W_skip is not None:
            tensors["W_skip"] = torch.cat([W * (read[m] / written[m]) for m, W in enumerate(self.W_skip.split(d))])
        cfg = cfg.replace(form=CrossLayerTranscoder.form, options={}, architecture="jumprelu_cross_layer")
        own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        return CrossLayerTranscoder.from_tensors(cfg, own)
