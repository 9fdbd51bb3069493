"""Pursuit steps compiled for the CPU by numba, one token at a time, and the k largest entries of every row.

Pursuit works on float32 correlations whose width is a multiple of `LANES` (pad with zero atoms, which correlate with
nothing), on a range of tokens: `in_threads` gives each thread its own. (numba's own threads take three times as long to
compile and do not heed torch's.) What is computed is defined by the plain loops in `matching.py` and `orthogonal.py`.

`largest` is what a TopK SAE pays for once its other products are sparse. `torch.topk` copies each row into pairs and
sorts them in part: 6 ms for k = 32 and 12 ms for k = 64 on 512 rows of 2,304, where the encoder's product takes 7. Here a
row is bisected by value, counting the entries above a limit: 3 ms for either.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_research.runtime.numba_cache import numba

# One running maximum per lane lets the compiler update and compare whole vector registers; a single running maximum
# was seen to be four times slower.
LANES = 64
PARTS_PER_THREAD = 4
"""Tokens are dealt out in more parts than there are threads: some stop early, and a thread may be held up."""


def in_threads(kernel: Callable[..., Any], n_tokens: int, *arguments: Any) -> list[Any]:
    """Run a kernel on all tokens, by as many threads as torch uses; returns what it returned for each part."""
    threads = torch.get_num_threads()
    size = max(1, -(-n_tokens // (threads * PARTS_PER_THREAD if threads > 1 else 1)))
    starts = range(0, n_tokens, size)
    if len(starts) < 2:
        return [kernel(start, n_tokens, *arguments) for start in starts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda start: kernel(start, min(start + size, n_tokens), *arguments), starts))


@numba.njit(nogil=True, fastmath=True)
def _highest(row, flip, high, n_blocks):
    """Fill `high` with the largest key of every lane. A correlation's key is its absolute value with `flip` -1, its
    positive part with `flip` 0."""
    for lane in range(LANES):
        high[lane] = np.float32(0.0)
    for block in range(n_blocks):
        for lane in range(LANES):
            value = row[block * LANES + lane]
            high[lane] = max(high[lane], max(value, flip * value))


@numba.njit(nogil=True, fastmath=True)
def _find(row, flip, high, n_blocks):
    """The first atom of largest key, or -1 where no key is above zero."""
    best = np.float32(0.0)
    for lane in range(LANES):
        best = max(best, high[lane])
    if best == np.float32(0.0):
        return -1
    atom = n_blocks * LANES
    for lane in range(LANES):
        if high[lane] == best:
            for block in range(n_blocks):
                value = row[block * LANES + lane]
                if max(value, flip * value) == best:
                    atom = min(atom, block * LANES + lane)
                    break
    return atom


@numba.njit(nogil=True, fastmath=True, cache=True)
def pursue(
    begin,
    end,
    correlations_NF,
    table_RF,
    slot_F,
    flip,
    energy_N,
    stop_N,
    steps,
    atoms_NS,
    coefficients_NS,
    done_N,
    wanted_N,
):
    """`steps` matching-pursuit steps of tokens `begin` to `end`, as far as the Gram rows at hand reach.

    correlations_NF: float32, overwritten. table_RF: Gram rows, float32; slot_F: int32, where in
    the table an atom's row stands, -1 for one that is not there. flip: -1 for signed, 0 for non-negative pursuit.
    energy_N: squared norm of the residual, updated; stop_N: a token rests once its energy is at most this.
    atoms_NS, coefficients_NS: filled in the order taken. done_N: steps made so far, `steps` once a token rests.
    wanted_N: the atom whose row is missing, -1 for a token that needs none. Returns how many wait for a row.
    """
    n_blocks = correlations_NF.shape[1] // LANES
    high = np.empty(LANES, np.float32)
    waiting = 0
    for n in range(begin, end):
        wanted_N[n] = -1
        if done_N[n] >= steps:
            continue
        row = correlations_NF[n]
        _highest(row, flip, high, n_blocks)
        step = done_N[n]
        while step < steps:
            if energy_N[n] <= stop_N[n]:
                step = steps
                break
            atom = _find(row, flip, high, n_blocks)
            if atom < 0:
                step = steps
                break
            place = slot_F[atom]
            if place < 0:
                wanted_N[n] = atom
                waiting += 1
                break
            value = row[atom]
            atoms_NS[n, step] = atom
            coefficients_NS[n, step] = value
            energy_N[n] -= np.float64(value) * np.float64(value)
            step += 1
            other = table_RF[place]
            for lane in range(LANES):
                high[lane] = np.float32(0.0)
            for block in range(n_blocks):
                for lane in range(LANES):
                    changed = row[block * LANES + lane] - value * other[block * LANES + lane]
                    row[block * LANES + lane] = changed
                    high[lane] = max(high[lane], max(changed, flip * changed))
        done_N[n] = step
    return waiting


@numba.njit(nogil=True, fastmath=True, cache=True)
def orthogonal(
    begin, end, correlations_NF, gram_FF, steps, energy_N, stop_N, least_pivot, accuracy, atoms_NS, beta_NS, factor_NSS
):
    """Orthogonal matching pursuit of tokens `begin` to `end`.

    Each atom taken adds a direction q orthogonal to those before it; its correlations with all atoms, `A q`, are kept,
    so that a step costs d_sae operations for each atom taken so far. correlations_NF: float32, overwritten. gram_FF:
    the whole Gram matrix. A squared pivot below `least_pivot` marks an atom that lies in the span of those taken: it is
    passed over. A correlation of at most `accuracy` times the token's norm is rounding: the token rests. Fills
    atoms_NS, the coefficients on the directions beta_NS, and factor_NSS with `<atom, q>`.
    """
    d_sae = correlations_NF.shape[1]
    n_blocks = d_sae // LANES
    directions = np.empty((steps, d_sae), np.float32)
    high = np.empty(LANES, np.float32)
    passed = np.empty(d_sae, np.int64)
    total = np.empty(LANES, np.float32)
    for n in range(begin, end):
        row = correlations_NF[n]
        _highest(row, np.float32(-1.0), high, n_blocks)
        step = 0
        n_passed = 0
        least = accuracy * np.sqrt(energy_N[n])
        while step < steps and energy_N[n] > stop_N[n]:
            atom = _find(row, np.float32(-1.0), high, n_blocks)
            if atom < 0 or abs(row[atom]) <= least:
                break
            # float64: the pivot is a difference of nearly equal numbers where atoms are nearly dependent
            pivot = np.float64(gram_FF[atom, atom])
            for i in range(step):
                part = np.float64(directions[i, atom])
                pivot -= part * part
            passed[n_passed] = atom
            n_passed += 1
            if pivot < least_pivot:
                row[atom] = np.float32(0.0)
                _highest(row, np.float32(-1.0), high, n_blocks)
                continue
            root = np.sqrt(pivot)
            beta = np.float32(row[atom] / root)
            scale = np.float32(1.0 / root)
            for i in range(step):
                factor_NSS[n, step, i] = directions[i, atom]
            factor_NSS[n, step, step] = root
            weights = factor_NSS[n, step]
            atoms_NS[n, step] = atom
            beta_NS[n, step] = beta
            energy_N[n] -= np.float64(beta) * np.float64(beta)
            other = gram_FF[atom]
            for block in range(n_blocks):
                start = block * LANES
                for lane in range(LANES):
                    total[lane] = other[start + lane]
                for i in range(step):
                    weight = weights[i]
                    for lane in range(LANES):
                        total[lane] -= weight * directions[i, start + lane]
                for lane in range(LANES):
                    direction = scale * total[lane]
                    directions[step, start + lane] = direction
                    row[start + lane] -= beta * direction
            # an atom once taken is orthogonal to the residual; only rounding says otherwise
            for i in range(n_passed):
                row[passed[i]] = np.float32(0.0)
            _highest(row, np.float32(-1.0), high, n_blocks)
            step += 1


@numba.njit(nogil=True, fastmath=True, cache=True)
def nonnegative_orthogonal(
    begin, end, correlations_NF, gram_FF, sizes_M, energy_N, stop_N, accuracy, sweeps, atoms_NS, coefficients_MNS
):
    """Greedy pursuit with non-negative refit: each step takes the atom of largest positive correlation with the
    residual, then fits all taken ones by non-negative least squares (coordinate descent from the last fit).

    correlations_NF: float32, overwritten. gram_FF: the whole Gram matrix. sizes_M: ascending numbers of steps;
    coefficients_MNS gets the fit after each of them. accuracy: coordinate descent ends when no coefficient moves by
    more than this share of the token's norm, or after `sweeps`.
    """
    d_sae = correlations_NF.shape[1]
    n_blocks = d_sae // LANES
    steps = sizes_M[-1]
    small = np.empty((steps, steps), np.float64)
    target = np.empty(steps, np.float64)
    fit = np.empty(steps, np.float64)
    before = np.empty(steps, np.float64)
    high = np.empty(LANES, np.float32)
    for n in range(begin, end):
        start_row = correlations_NF[n].copy()
        row = correlations_NF[n]
        norm = np.sqrt(energy_N[n])
        count = 0
        member = 0
        resting = False
        while member < len(sizes_M):
            if count == sizes_M[member] or resting:
                for i in range(count):
                    coefficients_MNS[member, n, i] = fit[i]
                member += 1
                continue
            if energy_N[n] <= stop_N[n]:
                resting = True
                continue
            _highest(row, np.float32(0.0), high, n_blocks)
            atom = _find(row, np.float32(0.0), high, n_blocks)
            if atom < 0 or row[atom] <= accuracy * norm:
                resting = True
                continue
            again = False
            for i in range(count):
                if atoms_NS[n, i] == atom:
                    again = True
            if again:  # the fit left this much to a taken atom: it is as accurate as it can be
                resting = True
                continue
            atoms_NS[n, count] = atom
            for i in range(count):
                small[i, count] = gram_FF[atoms_NS[n, i], atom]
                small[count, i] = small[i, count]
                before[i] = fit[i]
            small[count, count] = gram_FF[atom, atom]
            target[count] = start_row[atom]
            fit[count] = 0.0
            before[count] = 0.0
            count += 1
            for _ in range(sweeps):
                moved = 0.0
                for i in range(count):
                    slope = target[i]
                    for j in range(count):
                        slope -= small[i, j] * fit[j]
                    changed = max(fit[i] + slope / small[i, i], 0.0)
                    moved = max(moved, abs(changed - fit[i]))
                    fit[i] = changed
                if moved <= accuracy * norm:
                    break
            explained = 0.0
            for i in range(count):
                change = np.float32(fit[i] - before[i])
                explained += fit[i] * target[i]
                if change != np.float32(0.0):
                    other = gram_FF[atoms_NS[n, i]]
                    for f in range(d_sae):
                        row[f] -= change * other[f]
            energy_N[n] = norm * norm - explained


STEPS = 64
"""Of the bisection, at most: by then the limits are neighbours among float32 numbers."""


def largest(values_BF: Tensor, k: int) -> Tensor:
    """Indices [B, k] of the k largest entries of each row, in no particular order; of equal ones any. float32 or
    float64, on the CPU. Rows that hold NaN get indices without meaning."""
    columns_BK = np.zeros((len(values_BF), k), dtype=np.int64)
    in_threads(_largest, len(values_BF), values_BF.contiguous().numpy(), columns_BK)
    return torch.from_numpy(columns_BK)


@numba.njit(nogil=True, cache=True, fastmath=True)
def _largest(start, stop, values_BF, columns_BK):
    k = columns_BK.shape[1]
    for b in range(start, stop):
        row = values_BF[b]
        low, high = row[0], row[0]
        for f in range(len(row)):
            high = row[f] if row[f] > high else high
            low = row[f] if row[f] < low else low
        low -= 1  # more than k entries lie above `low`, fewer than k above `high`
        if k == len(row):
            high = low
        for _ in range(STEPS):
            limit = row.dtype.type(0.5) * (low + high)
            if not low < limit < high:
                break
            above = np.int32(0)
            for f in range(len(row)):
                above += np.int32(row[f] > limit)
            if above == k:
                low = high = limit
            elif above > k:
                low = limit
            else:
                high = limit
        taken = 0
        for f in range(len(row)):
            if row[f] > high and taken < k:
                columns_BK[b, taken] = f
                taken += 1
        for f in range(len(row)):  # equal to the limit
            if taken == k:
                break
            if low < row[f] <= high:
                columns_BK[b, taken] = f
                taken += 1
