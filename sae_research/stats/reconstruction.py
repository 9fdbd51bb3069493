"""Streaming statistics of a reconstruction: one pass over batches, memory that does not grow with tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HISTOGRAM_EDGES = [x / 4 for x in range(-20, 1)]
"""log10 of density, from 1e-5 to 1"""


def density_histogram(density_F: Tensor) -> dict[str, Any]:
    """Latents by the decimal logarithm of the fraction of tokens they fire on [d_sae]; those that never do apart."""
    alive = density_F[density_F > 0].log10()
    counts = torch.histc(alive.clamp(HISTOGRAM_EDGES[0], 0), len(HISTOGRAM_EDGES) - 1, HISTOGRAM_EDGES[0], 0)
    return {"log10_edges": HISTOGRAM_EDGES, "counts": [int(c) for c in counts], "dead": int((density_F == 0).sum())}


class ReconstructionStats:
    """How well `x_hat` stands for `x`, and how sparsely, over all tokens that count.

    Definitions (lab_v1), over counted tokens t and dimensions d, sums in float64:
    - `variance_explained`: 1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2, the mean taken over all tokens seen.
    - `variance_explained_per_dim`: the same for each dimension, averaged over dimensions of non-zero variance, so
      that one dimension holding much of the variance does not decide alone.
    - `mse`: mean over tokens and dimensions of (x - x_hat)^2.
    - `cosine_similarity`, `l2_ratio`: means over tokens of cos(x, x_hat) and |x_hat| / |x|.
    - `relative_reconstruction_bias`: mean |x_hat|^2 / mean <x, x_hat> (arXiv 2404.16014, equation 10).
    - `l0`: mean number of activations != 0; `l1`: mean sum of absolute activations.
    - `fraction_alive`: fraction of latents with an activation != 0 on any token.
    """

    def __init__(self, d_in: int, d_sae: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            # float64 sums: MPS has none and falls back to float32
            return torch.zeros(*shape, dtype=torch.float32 if str(device).startswith("mps") else torch.float64,
                               device=device)

        self.tokens = 0
        self.sum_D, self.sum_squares_D, self.residual_D = zeros(d_in), zeros(d_in), zeros(d_in)
        self.firing_F = zeros(d_sae)
        self.cosine, self.ratio, self.norm_squared, self.dot, self.l1 = zeros(5)

    @torch.no_grad()
    def update(self, x: Tensor, x_hat: Tensor, z: Tensor, mask: Tensor) -> None:
        """Add a batch. x, x_hat: [batch, seq, d_in]; z: [batch, seq, d_sae]; mask: bool [batch, seq]."""
        x_TD, hat_TD, z_TF = x[mask].float(), x_hat[mask].float(), z[mask]
        wide = self.sum_D.dtype
        self.tokens += len(x_TD)
        self.sum_D += x_TD.sum(0, dtype=wide)
        self.sum_squares_D += x_TD.square().sum(0, dtype=wide)
        self.residual_D += (x_TD - hat_TD).square().sum(0, dtype=wide)
        self.firing_F += (z_TF != 0).float().sum(0)  # sums of booleans are slow
        self.l1 += torch.linalg.vector_norm(z_TF, 1, dim=1, dtype=torch.float32).sum(dtype=wide)
        norm_T, hat_norm_T, dot_T = x_TD.norm(dim=1), hat_TD.norm(dim=1), (x_TD * hat_TD).sum(1)
        self.cosine += (dot_T / (norm_T * hat_norm_T).clamp_min(1e-12)).sum(dtype=wide)
        self.ratio += (hat_norm_T / norm_T.clamp_min(1e-12)).sum(dtype=wide)
        self.norm_squared += hat_norm_T.square().sum(dtype=wide)
        self.dot += dot_T.sum(dtype=wide)

    @property
    def density(self) -> Tensor:
        """Fraction of counted tokens on which each latent fires [d_sae]."""
        return (self.firing_F / max(self.tokens, 1)).float().cpu()

    def metrics(self) -> dict[str, float]:
        """Every figure above, as plain floats; empty when no token counted. A 0/0 is left out, never NaN."""
        if self.tokens == 0:
            return {}
        n = self.tokens
        total_D = self.sum_squares_D - self.sum_D.square() / n
        # A dimension that is constant but for rounding has no variance to explain.
        varied = total_D > 1e-9 * self.sum_squares_D.clamp_min(1e-30)
        values = {
            "tokens": float(n),
            "l0": float(self.firing_F.sum() / n),
            "l1": float(self.l1 / n),
            "mse": float(self.residual_D.sum() / (n * len(self.residual_D))),
            "cosine_similarity": float(self.cosine / n),
            "l2_ratio": float(self.ratio / n),
            "fraction_alive": float((self.firing_F > 0).float().mean()),
        }
        if varied.any():
            values["variance_explained"] = float(1 - self.residual_D.sum() / total_D.sum())
            values["variance_explained_per_dim"] = float((1 - self.residual_D[varied] / total_D[varied]).mean())
        if float(self.dot) != 0:
            values["relative_reconstruction_bias"] = float(self.norm_squared / self.dot)
        return values
