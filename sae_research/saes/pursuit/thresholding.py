"""Supports of the largest correlations, refitted by least squares: per sequence (union over its tokens) and per token.

With iterations this is hard thresholding pursuit (Foucart 2011): choose again by the correlations corrected for the
fit, `z + (x - z atoms) atoms^T`, and refit, until the support no longer changes. Least squares go the cheapest way that a
support's conditioning allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sae_research.saes.pursuit.dictionary import Dictionary
from sae_research.saes.pursuit.sequence_fits import one_thread_each, solve_on_support

PADDED_TO = 32
"""Supports are padded to a multiple of this where those of several sequences are solved together."""


class SequenceFit(NamedTuple):
    """One sequence's support and the coefficients of its tokens on it."""

    support: Tensor
    """Atoms, ascending [support]"""
    z: Tensor
    """[tokens, support]"""


def fit_sequences(
    x: Sequence[Tensor], dictionary: Dictionary, k_values: Sequence[int], *, iterations: int = 0
) -> list[list[SequenceFit]]:
    """For each k, each sequence's fit on the union of its tokens' k atoms of largest absolute correlation.

    x: the tokens that count of each sequence [tokens, d_in], finite. Correlations and the ranking of atoms are computed
    once for all k. An atom that correlates with nothing is named by nobody.
    """
    found: list[list[SequenceFit]] = [[] for _ in k_values]
    for chunk in _chunks(x, dictionary):
        correlations: Sequence[Tensor | None] = [None] * len(chunk)
        if sum(map(len, chunk)) > dictionary.tokens_at_a_time():  # one sequence, too long to keep its correlations
            ranked = [_ranked_in_parts(chunk[0], dictionary, max(k_values))]
        else:
            correlations = dictionary.correlations(torch.cat(chunk)).split([len(tokens) for tokens in chunk])
            ranked = [_ranked(c_TF, max(k_values)) for c_TF in correlations]
        supports = [[_union(values, atoms, k) for values, atoms in ranked] for k in k_values]
        fitted = _fit_together(dictionary, supports, chunk, correlations)
        for fits, done, k in zip(found, fitted, k_values, strict=True):
            fits += _iterate(done, chunk, correlations, dictionary, k, iterations)
    return found


def _chunks(x: Sequence[Tensor], dictionary: Dictionary) -> list[list[Tensor]]:
    """Sequences whose correlations together keep within the chunk limit; a longer one by itself."""
    limit, chunks, size = dictionary.tokens_at_a_time(), [], 0
    for tokens in x:
        if not chunks or size + len(tokens) > limit:
            chunks.append([])
            size = 0
        chunks[-1].append(tokens)
        size += len(tokens)
    return chunks


def _ranked(correlations_TF: Tensor, k: int) -> torch.return_types.topk:
    return correlations_TF.abs().topk(k, dim=-1)


def _ranked_in_parts(
    x_TD: Tensor, dictionary: Dictionary, k: int, fitted: SequenceFit | None = None
) -> tuple[Tensor, Tensor]:
    """Each token's k atoms of largest absolute correlation, corrected for a fit where there is one."""
    values, atoms = [], []
    size = dictionary.tokens_at_a_time()
    for start in range(0, max(len(x_TD), 1), size):
        part = x_TD[start : start + size]
        if fitted is None:
            correlations_TF = dictionary.correlations(part)
        else:
            z_TU = fitted.z[start : start + size]
            correlations_TF = dictionary.correlations(part - z_TU @ dictionary.atoms[fitted.support])
            correlations_TF[:, fitted.support] += z_TU
        best = _ranked(correlations_TF, k)
        values.append(best.values)
        atoms.append(best.indices)
    return torch.cat(values), torch.cat(atoms)


def _union(values_TK: Tensor, atoms_TK: Tensor, k: int) -> Tensor:
    # among atoms of zero correlation the order would be arbitrary
    return atoms_TK[:, :k][values_TK[:, :k] > 0].unique()


def _fit_together(
    dictionary: Dictionary, supports: Sequence[Sequence[Tensor]], x: Sequence[Tensor], correlations: Sequence[Tensor | None]
) -> list[list[SequenceFit]]:
    """Every sequence's fits on its supports: one list of them for each k, in and out. correlations: with all atoms
    [tokens, padded], or None.

    On the CPU each sequence and k by itself: padding was seen to cost more than it saves there.
    """
    if dictionary.atoms.device.type != "cpu":
        return [_fit_padded(dictionary, of_k, x, correlations) for of_k in supports]
    _ = dictionary.coherence, dictionary.precise_gram  # before threads ask for them
    by_sequence = one_thread_each(
        lambda i: [_fit_sequence(dictionary, of_k[i], x[i], correlations[i]) for of_k in supports], range(len(x))
    )
    return [list(fits) for fits in zip(*by_sequence, strict=True)]


def _fit_sequence(dictionary: Dictionary, support_U: Tensor, x_TD: Tensor, correlations_TF: Tensor | None) -> SequenceFit:
    """One sequence's fit on one support: by normal equations where there are fewer atoms than dimensions, in float32 where
    `fit` would try that, then in float64; else, and where those are singular, by `fit`."""
    if 0 < len(support_U) < x_TD.shape[1]:
        for solved_TU in _normal_equations(dictionary, support_U, x_TD, correlations_TF):
            if solved_TU is not None:
                return SequenceFit(support_U, solved_TU.to(x_TD.dtype))
    rhs_TU = _products(dictionary, support_U, x_TD, correlations_TF)
    return SequenceFit(support_U, fit(dictionary, support_U[None], x_TD[None], rhs_TU[None])[0])


def _normal_equations(
    dictionary: Dictionary, support_U: Tensor, x_TD: Tensor, correlations_TF: Tensor | None
) -> Iterator[Tensor | None]:
    if x_TD.dtype == torch.float32 and dictionary.coherence < COHERENT and dictionary.gram_fits:
        rhs_TU = _products(dictionary, support_U, x_TD, correlations_TF)
        yield solve_on_support(dictionary.gram().table, support_U, rhs_TU, WELL_CONDITIONED**0.5)
    if dictionary.precise_gram is not None:
        rhs_TU = x_TD.double() @ dictionary.atoms[support_U].double().T
        yield solve_on_support(dictionary.precise_gram, support_U, rhs_TU, SINGULAR)


def _fit_padded(
    dictionary: Dictionary, supports: Sequence[Tensor], x: Sequence[Tensor], correlations: Sequence[Tensor | None]
) -> list[SequenceFit]:
    """Every sequence's fit on one support, those of like size solved together."""
    found: list[SequenceFit | None] = [None] * len(x)
    for group in _groups(dictionary, supports, x):
        width = max(len(supports[i]) for i in group)
        support_NU = torch.stack([pad(supports[i], (0, width - len(supports[i])), value=-1) for i in group])
        rhs_NTU = torch.stack(
            [_products(dictionary, support_NU[row].clamp_min(0), x[i], correlations[i]) for row, i in enumerate(group)]
        )
        z_NTU = fit(dictionary, support_NU, torch.stack([x[i] for i in group]), rhs_NTU)
        for row, i in enumerate(group):
            found[i] = SequenceFit(supports[i], z_NTU[row, :, : len(supports[i])])
    return [item for item in found if item is not None]


def _products(dictionary: Dictionary, support_U: Tensor, x_TD: Tensor, correlations_TF: Tensor | None) -> Tensor:
    return x_TD @ dictionary.atoms[support_U].T if correlations_TF is None else correlations_TF[:, support_U]


def _groups(dictionary: Dictionary, supports: Sequence[Tensor], x: Sequence[Tensor]) -> list[list[int]]:
    """Sequences to be solved together."""
    alike: dict[tuple[int, int], list[int]] = {}
    for i, support in enumerate(supports):
        alike.setdefault((-(-len(support) // PADDED_TO), len(x[i])), []).append(i)
    groups = []
    for (steps, tokens), members in alike.items():
        width, d_in = steps * PADDED_TO, dictionary.atoms.shape[1]
        numbers = width * max(width, d_in) + tokens * (width + d_in)
        size = max(1, dictionary.max_chunk_bytes // (8 * max(numbers, 1)))
        groups += [members[start : start + size] for start in range(0, len(members), size)]
    return groups


def _iterate(
    fits: list[SequenceFit],
    x: Sequence[Tensor],
    correlations: Sequence[Tensor | None],
    dictionary: Dictionary,
    k: int,
    iterations: int,
) -> list[SequenceFit]:
    changing = list(range(len(x)))
    for _ in range(iterations):
        changed = {}
        for i in changing:
            chosen = _union(*_ranked_in_parts(x[i], dictionary, k, fits[i]), k)
            if not torch.equal(chosen, fits[i].support):
                changed[i] = chosen
        if not changed:
            break
        changing = list(changed)
        (refitted,) = _fit_together(
            dictionary, [list(changed.values())], [x[i] for i in changing], [correlations[i] for i in changing]
        )
        for i, item in zip(changing, refitted, strict=True):
            fits[i] = item
    return fits


def fit_tokens(
    x_ND: Tensor, dictionary: Dictionary, k_values: Sequence[int], *, iterations: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """For each k: every token's k atoms of largest absolute correlation [tokens, k] and their least-squares
    coefficients [tokens, k]. Places without an atom, of zero correlation, hold atom 0 and coefficient 0."""
    empty: dict[str, Any] = {"dtype": x_ND.dtype, "device": x_ND.device}
    found = [
        (torch.zeros(len(x_ND), k, dtype=torch.long, device=x_ND.device), torch.zeros(len(x_ND), k, **empty))
        for k in k_values
    ]
    gathered = max(k_values) * (max(k_values) + x_ND.shape[1]) * 8
    size = min(dictionary.tokens_at_a_time(), max(1, dictionary.max_chunk_bytes // gathered))
    for start in range(0, len(x_ND), size):
        part = slice(start, start + size)
        correlations_NF = dictionary.correlations(x_ND[part])
        values, ranked = _ranked(correlations_NF, max(k_values))
        for (atoms_NK, z_NK), k in zip(found, k_values, strict=True):
            support_NK = torch.where(values[:, :k] > 0, ranked[:, :k], -1)
            support_NK, fitted_NK = _refit_tokens(x_ND[part], dictionary, correlations_NF, support_NK, iterations)
            atoms_NK[part], z_NK[part] = support_NK.clamp_min(0), fitted_NK
    return found


def _refit_tokens(
    x_ND: Tensor, dictionary: Dictionary, correlations_NF: Tensor, support_NK: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    def refit(index: Tensor, support: Tensor) -> Tensor:
        rhs = correlations_NF[index].gather(1, support.clamp_min(0))
        return fit(dictionary, support, x_ND[index, None], rhs[:, None])[:, 0]

    changing = torch.arange(len(x_ND), device=x_ND.device)
    z_NK = refit(changing, support_NK)
    for _ in range(iterations):
        support, z = support_NK[changing], z_NK[changing]
        fitted = (z[:, None] @ dictionary.atoms[support.clamp_min(0)])[:, 0]
        corrected = dictionary.correlations(x_ND[changing] - fitted).scatter_add(1, support.clamp_min(0), z)
        values, atoms = _ranked(corrected, support.shape[1])
        chosen = torch.where(values > 0, atoms, -1)
        moved = (chosen.sort(1).values != support.sort(1).values).any(1)
        changing = changing[moved]
        if len(changing) == 0:
            break
        support_NK[changing] = chosen[moved]
        z_NK[changing] = refit(changing, chosen[moved])
    return support_NK, z_NK


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
    atoms or more; where those are singular, a decomposition by singular values: problem by problem on the CPU, all together
    elsewhere. Coefficients at -1 are zero.
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
        if z_NTU.device.type != "cpu":
            for part in remaining.split(_singular_at_a_time(dictionary, support_NU, x_NTD)):
                z_NTU[part] = least_norm(_gathered(dictionary, support_NU[part]), x_NTD[part].double()).to(z_NTU)
            continue
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


def _singular_at_a_time(dictionary: Dictionary, support_NU: Tensor, x_NTD: Tensor) -> int:
    """Problems whose atoms, Gram matrices and tokens in float64 keep within the chunk limit."""
    width, (tokens, d_in) = support_NU.shape[1], x_NTD.shape[1:]
    side = min(width, d_in)
    return max(1, dictionary.max_chunk_bytes // (8 * max(1, width * d_in + 2 * side * side + tokens * (width + d_in))))


def least_norm(atoms_NUD: Tensor, x_NTD: Tensor) -> Tensor:
    """`x pinv(atoms)` [problems, tokens, support] of many problems at once, for deficient rank. Rows of zeros get zero.

    By the eigenvectors of the smaller of the Gram matrix and its dual, which devices decompose in batches, unlike singular
    values; in float64, so that squaring the singular values leaves `RANK_TOLERANCE` far above rounding.
    """
    wide = atoms_NUD.shape[1] > atoms_NUD.shape[2]
    square = atoms_NUD.mT @ atoms_NUD if wide else atoms_NUD @ atoms_NUD.mT
    values_NE, vectors_NEE = torch.linalg.eigh(square)
    kept_NE = values_NE > RANK_TOLERANCE**2 * values_NE[:, -1:].clamp_min(torch.finfo(values_NE.dtype).tiny)
    inverse_NE = torch.where(kept_NE, 1 / torch.where(kept_NE, values_NE, 1.0), 0.0)

    def solved(rhs_NTE: Tensor) -> Tensor:
        return ((rhs_NTE @ vectors_NEE) * inverse_NE[:, None]) @ vectors_NEE.mT

    z_NTU = solved(x_NTD) @ atoms_NUD.mT if wide else solved(x_NTD @ atoms_NUD.mT)
    return torch.where(atoms_NUD.any(2)[:, None], z_NTU, 0.0)
