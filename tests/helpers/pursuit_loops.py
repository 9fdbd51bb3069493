"""Pursuit as the textbook has it: one token or sequence at a time, residual and all, in float64."""

from __future__ import annotations

import numpy as np
import scipy.optimize
import torch
from torch import Tensor


def unit(W: Tensor) -> Tensor:
    return torch.nn.functional.normalize(W.double(), dim=1)


def loop_matching(x: Tensor, W: Tensor, s: int, nonnegative: bool = False) -> tuple[Tensor, list[list[int]]]:
    """(coefficients [tokens, d_sae], atoms in the order taken) of tokens [tokens, d_in]."""
    W, z, taken = unit(W), torch.zeros(len(x), len(W), dtype=torch.float64), []
    for n, residual in enumerate(x.double()):
        atoms = []
        for _ in range(s):
            correlations = W @ residual
            atom = int((correlations if nonnegative else correlations.abs()).argmax())
            if nonnegative and correlations[atom] <= 0:
                break
            z[n, atom] += correlations[atom]
            residual = residual - correlations[atom] * W[atom]
            atoms.append(atom)
        taken.append(atoms)
    return z, taken


def least_squares(atoms: Tensor, x: Tensor) -> Tensor:
    """Coefficients [tokens, support] of minimum norm."""
    return torch.linalg.lstsq(atoms.T, x.T, driver="gelsd").solution.T


def loop_orthogonal(x: Tensor, W: Tensor, s: int, nonnegative: bool = False) -> tuple[Tensor, list[list[int]]]:
    W, z, taken = unit(W), torch.zeros(len(x), len(W), dtype=torch.float64), []
    for n, token in enumerate(x.double()):
        atoms, residual = [], token
        for _ in range(s):
            correlations = W @ residual
            atom = int((correlations if nonnegative else correlations.abs()).argmax())
            if nonnegative and correlations[atom] <= 1e-12:
                break
            atoms.append(atom)
            if nonnegative:
                fit = torch.from_numpy(scipy.optimize.nnls(W[atoms].T.numpy(), token.numpy())[0])
            else:
                fit = least_squares(W[atoms], token[None])[0]
            residual = token - fit @ W[atoms]
        z[n, atoms] = fit
        taken.append(atoms)
    return z, taken


def loop_ihtp(x: Tensor, W: Tensor, k: int, mask: Tensor, iterations: int = 0) -> Tensor:
    """Least squares on the union of each counted token's k best atoms, one sequence at a time. x: [batch, seq, d_in]."""
    W, z = unit(W), torch.zeros(*x.shape[:2], len(W), dtype=torch.float64)
    for b in range(len(x)):
        kept = mask[b].nonzero()[:, 0]
        if len(kept) == 0:
            continue
        rows, support, fit = x[b, kept].double(), [], torch.zeros(len(kept), 0, dtype=torch.float64)
        for _ in range(iterations + 1):
            corrected = (rows - fit @ W[support]) @ W.T
            corrected[:, support] += fit
            chosen = sorted({int(i) for row in corrected for i in row.abs().topk(k).indices})
            if chosen == support:
                break
            support, fit = chosen, least_squares(W[chosen], rows)
        z[b, kept[:, None], torch.tensor(support)] = fit
    return z


def loop_topk_refit(x: Tensor, W: Tensor, k: int, iterations: int = 0) -> Tensor:
    """The same with every token a sequence of its own. x: [tokens, d_in]."""
    return loop_ihtp(x[:, None], W, k, torch.ones(len(x), 1, dtype=torch.bool), iterations)[:, 0]


def relative_error(x: Tensor, z: Tensor, W: Tensor) -> np.ndarray:
    """|x - z W| / |x| of every token, in float64."""
    x = x.double().reshape(-1, x.shape[-1])
    return ((x - z.double().reshape(len(x), -1) @ unit(W)).norm(dim=1) / x.norm(dim=1)).numpy()
