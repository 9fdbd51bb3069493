"""Greedy pursuit that refits all coefficients after every atom: orthogonal matching pursuit and its non-negative form.

Two ways to the same result. The reference keeps residuals and multiplies them by the whole dictionary at every step
(d_in * d_sae operations); the compiled one keeps correlations and the Gram matrix (d_sae operations for every atom
taken so far), as in Batch-OMP (Rubinstein, Zibulevsky and Elad 2008).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sae_research.saes.pursuit.dictionary import Dictionary

SWEEPS = 500
"""Most rounds of coordinate descent in one non-negative refit."""


def least_pivot(dtype: torch.dtype) -> float:
    """Squared distance of a unit atom from the span of those taken, below which it counts as lying in it."""
    return 1e3 * torch.finfo(dtype).eps


def accuracy(dtype: torch.dtype) -> float:
    """What counts as rounding, as a share of a token's norm: a correlation no larger is not worth another atom, a
    coefficient that moves no further is fitted."""
    return 10 * torch.finfo(dtype).eps


def orthogonal(
    x_ND: Tensor, dictionary: Dictionary, sizes: Sequence[int], *, tolerance: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """Orthogonal matching pursuit (Pati, Rezaiifar and Krishnaprasad 1993) to the largest of `sizes`.

    Each step takes the atom of largest absolute correlation with the residual, then fits the token on all atoms taken
    by least squares. Returns atoms [tokens, max(sizes)] and, for each size, the coefficients [tokens, size] of the fit
    after that many steps. An atom that lies in the span of those taken is passed over. Steps not made, because the
    residual norm is at most `tolerance` times the token's or nothing is left to explain, hold atom 0 and coefficient 0.
    """
    steps = max(sizes)
    atoms_NS, beta_NS = _empty(x_ND, steps)
    coefficients = [torch.zeros(len(x_ND), size, dtype=x_ND.dtype, device=x_ND.device) for size in sizes]
    compiled = _compiled(x_ND, dictionary)
    width = steps * steps + (0 if compiled else steps * x_ND.shape[1])
    for part in _parts(x_ND, dictionary, width):
        factor_NSS = torch.eye(steps, dtype=x_ND.dtype, device=x_ND.device).repeat(len(x_ND[part]), 1, 1)
        (_orthogonal_numba if compiled else _orthogonal_torch)(
            x_ND[part], dictionary, tolerance, atoms_NS[part], beta_NS[part], factor_NSS
        )
        # x is fitted by sum_j beta_j q_j, and atom_i = sum_j factor_ij q_j: the coefficients c solve factor^T c = beta
        for size, fit_NS in zip(sizes, coefficients, strict=True):
            fit_NS[part] = torch.linalg.solve_triangular(
                factor_NSS[:, :size, :size].mT, beta_NS[part, :size, None], upper=True
            )[..., 0]
    return atoms_NS, coefficients


def nonnegative_orthogonal(
    x_ND: Tensor, dictionary: Dictionary, sizes: Sequence[int], *, tolerance: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """Non-negative orthogonal matching pursuit (Bruckstein, Elad and Zibulevsky 2008).

    As `orthogonal`, with the largest positive correlation and a non-negative least-squares fit, by coordinate descent
    from the fit before. Ends where no correlation is positive. The fit may set earlier atoms to zero.
    """
    steps = max(sizes)
    atoms_NS, _ = _empty(x_ND, steps)
    coefficients = [torch.zeros(len(x_ND), size, dtype=x_ND.dtype, device=x_ND.device) for size in sizes]
    compiled = _compiled(x_ND, dictionary)
    for part in _parts(x_ND, dictionary, steps * steps + (0 if compiled else steps * x_ND.shape[1])):
        fits = (_nonnegative_numba if compiled else _nonnegative_torch)(
            x_ND[part], dictionary, sorted(set(sizes)), tolerance, atoms_NS[part]
        )
        for size, fit_NS in zip(sizes, coefficients, strict=True):
            fit_NS[part] = fits[size][:, :size]
    return atoms_NS, coefficients


def _empty(x_ND: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(len(x_ND), steps, dtype=torch.long, device=x_ND.device),
        torch.zeros(len(x_ND), steps, dtype=x_ND.dtype, device=x_ND.device),
    )


def _compiled(x_ND: Tensor, dictionary: Dictionary) -> bool:
    return x_ND.device.type == "cpu" and x_ND.dtype == torch.float32 and dictionary.gram_fits


def _parts(x_ND: Tensor, dictionary: Dictionary, width: int) -> list[slice]:
    """Slices of tokens whose correlations, and `width` further numbers each, keep within the chunk limit."""
    at_a_time = min(dictionary.tokens_at_a_time(), max(1, dictionary.max_chunk_bytes // (width * x_ND.dtype.itemsize)))
    return [slice(start, start + at_a_time) for start in range(0, len(x_ND), at_a_time)]


# --- orthogonal matching pursuit -------------------------------------------------------------


def _orthogonal_torch(
    x_ND: Tensor, dictionary: Dictionary, tolerance: float, atoms_NS: Tensor, beta_NS: Tensor, factor_NSS: Tensor
) -> None:
    """The reference: residuals and orthonormal directions q in the space of activations."""
    n, steps = atoms_NS.shape
    residual_ND, norm_N = x_ND.clone(), x_ND.norm(dim=1)
    directions_NSD = torch.zeros(n, steps, x_ND.shape[1], dtype=x_ND.dtype, device=x_ND.device)
    open_NF = torch.ones(n, len(dictionary.atoms), dtype=torch.bool, device=x_ND.device)
    made_N = torch.zeros(n, dtype=torch.long, device=x_ND.device)
    while True:
        key_NF = torch.where(open_NF, dictionary.correlations(residual_ND).abs(), 0.0)
        best_N, atom_N = key_NF.max(dim=1)
        going_N = (best_N > accuracy(x_ND.dtype) * norm_N) & (made_N < min(steps, x_ND.shape[1]))
        if tolerance:
            going_N &= residual_ND.norm(dim=1) > tolerance * norm_N
        going = going_N.nonzero()[:, 0]
        if len(going) == 0:
            return
        atom, step = atom_N[going], made_N[going]
        open_NF[going, atom] = False
        rows_GD, before_GSD = dictionary.atoms[atom], directions_NSD[going]
        parts_GS = (before_GSD @ rows_GD[:, :, None])[..., 0]
        pivot_G = rows_GD.square().sum(1) - parts_GS.square().sum(1)
        new = pivot_G >= least_pivot(x_ND.dtype)
        going, atom, step, parts_GS, pivot_G = going[new], atom[new], step[new], parts_GS[new], pivot_G[new]
        root_G = pivot_G.sqrt()
        direction_GD = (rows_GD[new] - (parts_GS[:, None] @ before_GSD[new])[:, 0]) / root_G[:, None]
        beta_G = (direction_GD * residual_ND[going]).sum(1)
        directions_NSD[going, step] = direction_GD
        factor_NSS[going, step] = parts_GS
        factor_NSS[going, step, step] = root_G
        atoms_NS[going, step], beta_NS[going, step] = atom, beta_G
        residual_ND[going] -= beta_G[:, None] * direction_GD
        made_N[going] += 1


def _orthogonal_numba(
    x_ND: Tensor, dictionary: Dictionary, tolerance: float, atoms_NS: Tensor, beta_NS: Tensor, factor_NSS: Tensor
) -> None:
    from sae_research.saes.pursuit import kernels_numba

    energy_N = x_ND.double().square().sum(1)
    kernels_numba.in_threads(
        kernels_numba.orthogonal,
        len(x_ND),
        dictionary.correlations(x_ND).numpy(),
        dictionary.gram().table.numpy(),
        min(atoms_NS.shape[1], x_ND.shape[1]),
        energy_N.numpy(),
        _stop(energy_N, tolerance).numpy(),
        least_pivot(x_ND.dtype),
        accuracy(x_ND.dtype),
        atoms_NS.numpy(),
        beta_NS.numpy(),
        factor_NSS.numpy(),
    )


def _stop(energy_N: Tensor, tolerance: float) -> Tensor:
    """Energy at which a token rests; out of reach without a tolerance. Finite, which compiled steps assume."""
    return tolerance**2 * energy_N if tolerance else torch.full_like(energy_N, -torch.finfo(energy_N.dtype).max)


# --- its non-negative form -------------------------------------------------------------------


def _nonnegative_torch(
    x_ND: Tensor, dictionary: Dictionary, sizes: Sequence[int], tolerance: float, atoms_NS: Tensor
) -> dict[int, Tensor]:
    """The reference: residuals, and coordinate descent on all tokens at once."""
    n, steps = atoms_NS.shape
    chosen_NSD = torch.zeros(n, steps, x_ND.shape[1], dtype=x_ND.dtype, device=x_ND.device)
    fit_NS = torch.zeros(n, steps, dtype=x_ND.dtype, device=x_ND.device)
    norm_N, residual_ND, found = x_ND.norm(dim=1), x_ND, {}
    resting_N = torch.zeros(n, dtype=torch.bool, device=x_ND.device)
    for step in range(steps):
        best_N, atom_N = dictionary.correlations(residual_ND).max(dim=1)
        again_N = (atoms_NS[:, :step] == atom_N[:, None]).any(dim=1)
        resting_N |= (best_N <= accuracy(x_ND.dtype) * norm_N) | again_N
        if tolerance:
            resting_N |= residual_ND.norm(dim=1) <= tolerance * norm_N
        going = (~resting_N).nonzero()[:, 0]
        atoms_NS[going, step] = atom_N[going]
        chosen_NSD[going, step] = dictionary.atoms[atom_N[going]]
        refit = _descend if x_ND.device.type in ("cpu", "mps") else active_set
        fit_NS[going, : step + 1] = refit(
            chosen_NSD[going, : step + 1], x_ND[going], fit_NS[going, : step + 1], norm_N[going]
        )
        residual_ND = x_ND - (fit_NS[:, None] @ chosen_NSD)[:, 0]
        if step + 1 in sizes:
            found[step + 1] = fit_NS.clone()
    return found


def _descend(chosen_GSD: Tensor, x_GD: Tensor, fit_GS: Tensor, norm_G: Tensor) -> Tensor:
    """Non-negative least squares on each token's atoms, by coordinate descent from `fit_GS`."""
    gram_GSS, target_GS = chosen_GSD @ chosen_GSD.mT, (chosen_GSD @ x_GD[..., None])[..., 0]
    fit_GS = fit_GS.clone()
    for _ in range(SWEEPS if len(x_GD) else 0):
        moved_G = torch.zeros_like(norm_G)
        for i in range(fit_GS.shape[1]):
            slope_G = target_GS[:, i] - (gram_GSS[:, i] * fit_GS).sum(1)
            changed_G = (fit_GS[:, i] + slope_G / gram_GSS[:, i, i]).clamp_min(0)
            moved_G = torch.maximum(moved_G, (changed_G - fit_GS[:, i]).abs())
            fit_GS[:, i] = changed_G
        if bool((moved_G <= accuracy(x_GD.dtype) * norm_G).all()):
            break
    return fit_GS


def active_set(chosen_GSD: Tensor, x_GD: Tensor, fit_GS: Tensor, norm_G: Tensor) -> Tensor:
    """What `_descend` comes to, for devices: exact solutions on sets of positive coefficients (Lawson and Hanson 1974), of
    all tokens at once. Each round is some twenty operations on all tokens, and few rounds are needed, where coordinate
    descent takes several operations a coordinate and up to `SWEEPS` sweeps. fit_GS: least squares on its positive atoms.

    Tokens whose atoms depend on each other so far that the equations cannot be solved, and those that do not come to an end,
    are left to `_descend`.
    """
    wide_GSD = chosen_GSD.double()
    gram_GSS, target_GS = wide_GSD @ wide_GSD.mT, (wide_GSD @ x_GD.double()[..., None])[..., 0]
    fit_GS, limit_G1 = fit_GS.double(), accuracy(x_GD.dtype) * norm_G.double()[:, None]
    eye_SS = torch.eye(fit_GS.shape[1], dtype=torch.float64, device=fit_GS.device)
    positive_GS = fit_GS > 0
    solved_G = torch.ones_like(norm_G, dtype=torch.bool)
    for _ in range(3 * fit_GS.shape[1] + 3):
        slope_GS = torch.where(positive_GS, -torch.inf, target_GS - (gram_GSS @ fit_GS[..., None])[..., 0])
        steepest_G1, where_G1 = slope_GS.max(1, keepdim=True)
        going_G1 = steepest_G1 > limit_G1
        if not bool(going_G1.any()):
            break
        positive_GS.scatter_(1, where_G1, positive_GS.gather(1, where_G1) | going_G1)
        fit_GS, positive_GS, solved_G = _settled(gram_GSS, target_GS, fit_GS, positive_GS, solved_G, eye_SS)
    else:
        solved_G &= ~going_G1[:, 0]
    found_GS = fit_GS.to(x_GD.dtype)
    if not bool(solved_G.all()):
        left = ~solved_G
        found_GS[left] = _descend(chosen_GSD[left], x_GD[left], found_GS[left].clamp_min(0), norm_G[left])
    return found_GS


def _settled(
    gram_GSS: Tensor, target_GS: Tensor, fit_GS: Tensor, positive_GS: Tensor, solved_G: Tensor, eye_SS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(fit, positive set, which are solved) after solving on the set and leaving out, one boundary after the other, what
    would become negative."""
    for _ in range(fit_GS.shape[1] + 1):
        both_GSS = positive_GS[:, :, None] & positive_GS[:, None, :]
        factor_GSS, failed_G = torch.linalg.cholesky_ex(torch.where(both_GSS, gram_GSS, eye_SS))
        solved_G = solved_G & (failed_G == 0)
        rhs_GS1 = torch.where(positive_GS, target_GS, 0.0)[..., None]
        exact_GS = torch.cholesky_solve(rhs_GS1, factor_GSS)[..., 0]
        exact_GS = torch.where(solved_G[:, None], exact_GS, fit_GS.clamp_min(0))
        below_GS = positive_GS & (exact_GS <= 0)
        stuck_G1 = below_GS.any(1, keepdim=True)
        # from the fit towards the solution, to the first coefficient that reaches zero
        share_GS = torch.where(below_GS, fit_GS / (fit_GS - exact_GS).clamp_min(torch.finfo(fit_GS.dtype).tiny), 1.0)
        step_G1 = torch.where(stuck_G1, share_GS.amin(1, keepdim=True), 1.0)
        positive_GS = positive_GS & ~(below_GS & (share_GS <= step_G1))
        fit_GS = torch.where(positive_GS, fit_GS + step_G1 * (exact_GS - fit_GS), 0.0)
        if not bool(stuck_G1.any()):
            break
    return fit_GS, positive_GS, solved_G


def _nonnegative_numba(
    x_ND: Tensor, dictionary: Dictionary, sizes: Sequence[int], tolerance: float, atoms_NS: Tensor
) -> dict[int, Tensor]:
    from sae_research.saes.pursuit import kernels_numba

    energy_N = x_ND.double().square().sum(1)
    fits_MNS = torch.zeros(len(sizes), *atoms_NS.shape)
    kernels_numba.in_threads(
        kernels_numba.nonnegative_orthogonal,
        len(x_ND),
        dictionary.correlations(x_ND).numpy(),
        dictionary.gram().table.numpy(),
        np.array(sizes, dtype=np.int64),
        energy_N.numpy(),
        _stop(energy_N, tolerance).numpy(),
        accuracy(x_ND.dtype),
        SWEEPS,
        atoms_NS.numpy(),
        fits_MNS.numpy(),
    )
    return dict(zip(sizes, fits_MNS, strict=True))
