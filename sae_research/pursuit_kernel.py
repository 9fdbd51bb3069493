"""Matching-pursuit steps compiled for CPU by numba, one token at a time."""

from __future__ import annotations

import os

from sae_research.store import cache_dir

# Compiled code belongs with the other caches, not beside the source. Read by numba when it is imported.
os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir("numba")))

import numba
import numpy as np

# One running maximum per lane lets the compiler update and compare whole vector registers; a single
# running maximum was seen to be four times slower.
LANES = 64


@numba.njit(parallel=True, fastmath=True, cache=True)
def pursue(correlations_NF: np.ndarray, gram_FF: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy steps from correlations [tokens, d_sae] and the Gram matrix [d_sae, d_sae], both float32 and finite.

    d_sae must be a multiple of LANES (pad with zero atoms). Returns atoms [tokens, steps] int64 and coefficients
    [tokens, steps] float32, in order. Of equal correlations the first wins. Overwrites `correlations_NF`.
    """
    n_tokens, d_sae = correlations_NF.shape
    atoms = np.zeros((n_tokens, steps), np.int64)
    coefficients = np.zeros((n_tokens, steps), np.float32)
    n_blocks = d_sae // LANES
    for n in numba.prange(n_tokens):
        row = correlations_NF[n]
        high = np.zeros(LANES, np.float32)
        for block in range(n_blocks):
            for lane in range(LANES):
                high[lane] = max(high[lane], abs(row[block * LANES + lane]))
        for step in range(steps):
            best = np.float32(0.0)
            for lane in range(LANES):
                best = max(best, high[lane])
            atom = d_sae
            for lane in range(LANES):
                if high[lane] == best:
                    for block in range(n_blocks):
                        if abs(row[block * LANES + lane]) == best:
                            atom = min(atom, block * LANES + lane)
                            break
            value = row[atom]
            atoms[n, step] = atom
            coefficients[n, step] = value
            other = gram_FF[atom]
            for lane in range(LANES):
                high[lane] = np.float32(0.0)
            for block in range(n_blocks):
                for lane in range(LANES):
                    changed = row[block * LANES + lane] - value * other[block * LANES + lane]
                    row[block * LANES + lane] = changed
                    high[lane] = max(high[lane], abs(changed))
    return atoms, coefficients
