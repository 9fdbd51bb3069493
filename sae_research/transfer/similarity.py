"""How alike two models' activations are at one hook, token by token, by position, and as a whole. Sums only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_research.transfer.sums import counted, sums_dtype

COSINE_EDGES = [x / 200 for x in range(-200, 201)]
LOG_EDGES = [x / 20 for x in range(-80, 101)]
"""log10 of a distance, from 1e-4 to 1e5; what lies outside is counted in the outermost bin."""
METRICS = ("cosine", "euclidean", "relative_error", "cosine_shuffled")


class Similarity:
    """Additive sums over pairs of activations x (base) and y (finetuned) of the same token.

    - `cosine` <x, y> / |x| |y|; `euclidean` |x - y|; `relative_error` |x - y| / |x|: means over tokens.
    - `cosine_shuffled`: of x with the y of another token of the batch, the level that no relation gives.
    - `cka`: linear CKA |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms, columns centred (Kornblith et al. 2019, equation 3),
      from second moments about a fixed shift: equal to the definition over all tokens at once.
    Sums are float64 (float32 on MPS).
    """

    def __init__(self, d_in: int, context_size: int, shift: tuple[Tensor, Tensor]) -> None:
        """shift: a point near either model's mean [d_in] each: takes cancellation out of the moments."""
        self.shift = shift
        device = shift[0].device
        self.dtype = sums_dtype(device)

        def zeros(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=self.dtype, device=device)

        self.n = 0
        self.sums, self.by_position = zeros(len(METRICS)), zeros(len(METRICS), context_size)
        self.at_position = zeros(context_size)
        self.cosine_counts, self.distance_counts = zeros(len(COSINE_EDGES) - 1), zeros(len(LOG_EDGES) - 1)
        self.x_sum, self.y_sum = zeros(d_in), zeros(d_in)
        self.xx, self.yy, self.yx = zeros(d_in, d_in), zeros(d_in, d_in), zeros(d_in, d_in)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, positions: Tensor, shuffle: Tensor) -> Tensor:
        """Add tokens: x, y [n, d_in]; positions [n], those beyond the context size count in the last; shuffle: a
        permutation [n]. Returns the values [len(METRICS), n]."""
        x, y = x.to(self.dtype), y.to(self.dtype)
        values = token_values(x, y, shuffle)
        if len(x) == 0:
            return values
        self.n += len(x)
        self.sums += values.sum(1)
        place = positions.clamp_max(len(self.at_position) - 1)
        self.by_position.index_add_(1, place, values)
        self.at_position += torch.bincount(place, minlength=len(self.at_position)).to(self.dtype)
        self.cosine_counts += counted(values[0], COSINE_EDGES)
        self.distance_counts += counted(values[1].clamp_min(1e-30).log10(), LOG_EDGES)
        x, y = x - self.shift[0], y - self.shift[1]
        self.x_sum += x.sum(0)
        self.y_sum += y.sum(0)
        self.xx.addmm_(x.T, x)
        self.yy.addmm_(y.T, y)
        self.yx.addmm_(y.T, x)
        return values

    @property
    def cka(self) -> float | None:
        """Linear CKA; None where one side does not vary."""
        if self.n < 2:
            return None
        cross = self.yx - torch.outer(self.y_sum, self.x_sum) / self.n
        x = self.xx - torch.outer(self.x_sum, self.x_sum) / self.n
        y = self.yy - torch.outer(self.y_sum, self.y_sum) / self.n
        below = float(x.norm() * y.norm())
        return float(cross.square().sum()) / below if below > 0 else None

    def means(self) -> dict[str, float]:
        """Every figure above; empty when no token was seen."""
        if self.n == 0:
            return {}
        found = dict(zip(METRICS, (self.sums / self.n).tolist(), strict=True))
        return found | ({} if self.cka is None else {"cka": self.cka})

    def profile(self) -> dict[str, Any]:
        """Means by position (None where no token stands) and histograms, for pictures."""
        seen = self.at_position.clamp_min(1)
        positions = {name: [value if count else None for value, count in zip(row, self.at_position.tolist(), strict=True)]
                     for name, row in zip(METRICS, (self.by_position / seen).tolist(), strict=True)}
        return {"by_position": positions,
                "cosine_histogram": {"edges": COSINE_EDGES, "counts": [int(c) for c in self.cosine_counts]},
                "euclidean_histogram": {"log10_edges": LOG_EDGES, "counts": [int(c) for c in self.distance_counts]}}


def token_values(x: Tensor, y: Tensor, shuffle: Tensor) -> Tensor:
    """Every metric of `METRICS` for each token [len(METRICS), n]. x, y: [n, d_in]; shuffle: a permutation [n]."""
    x_norm, y_norm = x.norm(dim=1), y.norm(dim=1)
    distance = (x - y).norm(dim=1)
    return torch.stack([
        torch.linalg.vecdot(x, y) / (x_norm * y_norm).clamp_min(1e-30), distance, distance / x_norm.clamp_min(1e-30),
        torch.linalg.vecdot(x, y[shuffle]) / (x_norm * y_norm[shuffle]).clamp_min(1e-30)])
