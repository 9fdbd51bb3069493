"""Least squares of tokens on chosen atoms, many supports at once, by the cheapest way that their conditioning allows."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.pursuit.dictionary import Dictionary

COHERENT = 0.9
"""Largest cosine of two atoms above which a dictionary's Gram matrices are not even tried in float32: with a trained
dictionary nearly every support of a sequence holds such a pair, and the attempt would be lost."""
WELL_CONDITIONED = 0.02
"""Smallest squared Cholesky pivot of a Gram matrix of unit atoms (1 for orthogonal ones) that is trusted in float32:
errors of coefficients stay near 1e-5."""
SINGULAR = 1e-5
"""Smallest ratio of Cholesky pivots that is trusted in float64."""
RANK_TOLERANCE = 1e-6
"""Directions weaker than this share of the strongest are left out: atoms are known to float32 precision only."""


def fit(dictionary: Dictionary, support_NU: Tensor, x_NTD: Tensor, correlations_NTU: Tensor) -> Tensor:
    """Coefficients [problems, tokens, support] of minimum norm that minimise `|x - z atoms|`.

    support_NU: different atoms of each problem, -1 where it has fewer than others. x_NTD: its tokens.
    correlations_NTU: their products with the support's atoms. Normal equations by Cholesky, in float32 where the
    dictionary is incoherent and the pivots say that is safe, else in float64; the dual equations where a support has d_in
    atoms or more; a singular value decomposition, problem by problem, where those are singular. Coefficients at -1 are
    zero.
    """
    valid_NU = support_NU >= 0
    z_NTU = torch.zeros_like(correlations_NTU)
    if z_NTU.numel() == 0:
        return z_NTU
    # any number at -1 would do; without zeros there a product could become NaN
    rhs_NTU = torch.where(valid_NU[:, None], correlations_NTU, 0.0)
    left = torch.arange(len(support_NU), device=support_NU.device)
    wide = valid_NU.sum(1) >= x_NTD.shape[2]
    if rhs_NTU.dtype == torch.float32 and dictionary.coherence < COHERENT:
        left = _attempt(z_NTU, left[~wide], lambda i: _normal_float32(dictionary, support_NU[i], rhs_NTU[i]))
        left = torch.cat([left, wide.nonzero()[:, 0]])
    for wanted, solve in ((~wide, _normal_float64), (wide, _dual_float64)):
        def attempt(i: Tensor, solve=solve) -> tuple[Tensor, Tensor]:
            return solve(dictionary, support_NU[i], x_NTD[i].double())

        remaining = _attempt(z_NTU, left[wanted[left]], attempt)
        for i in remaining.tolist():
            atoms = support_NU[i][valid_NU[i]]
            z_NTU[i, :, valid_NU[i]] = _decomposition(dictionary.atoms[atoms], x_NTD[i]).to(z_NTU)
    return z_NTU


def _attempt(z_NTU: Tensor, problems: Tensor, solve) -> Tensor:
    """Solve some problems; fill in what went well and return the numbers of the others."""
    if len(problems) == 0:
        return problems
    solved, good = solve(problems)
    z_NTU[problems[good]] = solved[good].to(z_NTU.dtype)
    return problems[~good]


def _gathered(dictionary: Dictionary, support_NU: Tensor) -> Tensor:
    """Atoms [problems, support, d_in] in float64, zero at -1."""
    return dictionary.atoms[support_NU.clamp_min(0)].double() * (support_NU >= 0)[..., None]


def _normal_float32(dictionary: Dictionary, support_NU: Tensor, rhs_NTU: Tensor) -> tuple[Tensor, Tensor]:
    """(coefficients, which can be trusted) from Gram entries in the atoms' precision."""
    index_NU = support_NU.clamp_min(0)
    if dictionary.gram_fits:
        table = dictionary.gram().table
        gram_NUU = table[index_NU[:, :, None], index_NU[:, None, :]]
    else:
        atoms_NUD = dictionary.atoms[index_NU]
        gram_NUU = atoms_NUD @ atoms_NUD.mT
    return _cholesky(gram_NUU, support_NU >= 0, rhs_NTU, WELL_CONDITIONED**0.5)


def _normal_float64(dictionary: Dictionary, support_NU: Tensor, x_NTD: Tensor) -> tuple[Tensor, Tensor]:
    atoms_NUD = _gathered(dictionary, support_NU)
    if dictionary.precise_gram is None:
        gram_NUU = atoms_NUD @ atoms_NUD.mT
    else:
        index_NU = support_NU.clamp_min(0)
        gram_NUU = dictionary.precise_gram[index_NU[:, :, None], index_NU[:, None, :]]
    return _cholesky(gram_NUU, support_NU >= 0, x_NTD @ atoms_NUD.mT, SINGULAR)


def _dual_float64(dictionary: Dictionary, support_NU: Tensor, x_NTD: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum norm where atoms span everything: `z = x (A^T A)^-1 A^T`."""
    atoms_NUD = _gathered(dictionary, support_NU)
    every = torch.ones(len(atoms_NUD), atoms_NUD.shape[2], dtype=torch.bool, device=atoms_NUD.device)
    solved, good = _cholesky(atoms_NUD.mT @ atoms_NUD, every, x_NTD, SINGULAR)
    return solved @ atoms_NUD.mT, good


def _cholesky(gram_NUU: Tensor, valid_NU: Tensor, rhs_NTU: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Solve `z gram = rhs`; False for a matrix whose smallest pivot is below `least` times its largest."""
    if not bool(valid_NU.all()):  # unknowns that are none stand alone, with pivot 1
        both = valid_NU[:, :, None] & valid_NU[:, None, :]
        gram_NUU = torch.where(both, gram_NUU, torch.eye(gram_NUU.shape[-1], dtype=gram_NUU.dtype, device=gram_NUU.device))
    factor_NUU, failed_N = torch.linalg.cholesky_ex(gram_NUU)
    pivots_NU = factor_NUU.diagonal(dim1=-2, dim2=-1)
    good_N = (failed_N == 0) & (pivots_NU.amin(1) >= least * pivots_NU.amax(1))
    return torch.cholesky_solve(rhs_NTU.mT, factor_NUU).mT, good_N


def _decomposition(atoms_UD: Tensor, x_TD: Tensor) -> Tensor:
    """Minimum norm by singular values in float64, for deficient rank. (torch's `lstsq`, driver gelsy, was seen to miss
    the minimum there with few right-hand sides.)"""
    return x_TD.double() @ torch.linalg.pinv(atoms_UD.double(), rtol=RANK_TOLERANCE)
