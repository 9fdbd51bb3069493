"""PCA of the training activations: what a linear code of n components explains, to hold an SAE against."""

from __future__ import annotations

import torch
from torch import Tensor


class StreamingPCA:
    """Mean and covariance of rows seen in batches; float64 sums over float32 products."""

    def __init__(self, d_in: int, device: torch.device | str = "cpu") -> None:
        # MPS has no float64; its sums stay in float32
        wide = torch.float32 if str(device).startswith("mps") else torch.float64
        self.n = 0
        self.sum_D = torch.zeros(d_in, dtype=wide, device=device)
        self.products_DD = torch.zeros(d_in, d_in, dtype=wide, device=device)

    @torch.no_grad()
    def update(self, x_ND: Tensor) -> None:
        """Add float32 rows, on the device the sums are on: nothing here waits for it."""
        self.n += len(x_ND)
        self.sum_D += x_ND.sum(0)
        self.products_DD += x_ND.T @ x_ND

    def components(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and orthonormal rows [D, D], most variance first, float32."""
        mean_D = self.sum_D.cpu().double() / self.n
        covariance_DD = self.products_DD.cpu().double() / self.n - torch.outer(mean_D, mean_D)
        _, vectors_DD = torch.linalg.eigh(covariance_DD)
        return mean_D.float(), vectors_DD.flip(1).T.contiguous().float()


def pca_variance_explained(pca: StreamingPCA, x_ND: Tensor, numbers: tuple[int, ...]) -> dict[int, float]:
    """For each n: `1 - |x - x_hat|^2 / |x - mean(x)|^2` over rows, x_hat from n components.

    Numbers above d_in are left out. Same units as the rows that `pca` saw.
    """
    mean_D, rows_DD = pca.components()
    x_ND = x_ND.cpu().float()
    total = (x_ND - x_ND.mean(0)).square().sum(dtype=torch.float64)
    centred_ND = x_ND - mean_D
    # The rows are orthonormal, so the residual's square is the square less that of the coefficients.
    squares_D = (centred_ND @ rows_DD.T).square().sum(0, dtype=torch.float64)
    residual = centred_ND.square().sum(dtype=torch.float64)
    return {n: float(1 - (residual - squares_D[:n].sum()) / total) for n in numbers if n <= len(mean_D)}
