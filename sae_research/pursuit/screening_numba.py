"""Screened correlations ranked on the CPU, one token at a time, compiled by numba."""

from __future__ import annotations

import numpy as np

from sae_research import numba_cache  # noqa: F401  (before numba: says where compiled code is kept)
from sae_research.pursuit.kernels_numba import LANES

import numba  # isort: skip

HALF_ULP = 2.0**-8
"""Largest relative error of rounding to bfloat16."""


@numba.njit(nogil=True, cache=True)
def rank(start, stop, products_NF, error_N, x_ND, atoms_FD, values_NK, atoms_NK):
    """Fill tokens `start` to `stop`. products_NF: bfloat16 bits; those of absolute values sort as integers do."""
    width, k = products_NF.shape[1], values_NK.shape[1]
    highest = np.empty(width // LANES, dtype=np.int16)
    top = np.empty(k, dtype=np.int32)
    word = np.empty(1, dtype=np.int32)
    for n in range(start, stop):
        row = products_NF[n]
        top[:] = 0
        for block in range(len(highest)):
            highest[block] = _block_maximum(row, block)
            if highest[block] > top[k - 1]:
                _insert_block(row, block, top)
        word[0] = top[k - 1] << 16
        kth = word.view(np.float32)[0]
        # the k-th largest is at least this; whatever cannot reach it is out
        lower = kth * np.float32(1 - 1.01 * HALF_ULP) - error_N[n]
        word.view(np.float32)[0] = max(np.float32(0.0), (lower - error_N[n]) / np.float32(1 + 1.01 * HALF_ULP))
        least = word[0] >> 16  # rounded down
        values_NK[n] = -1.0
        for block in range(len(highest)):
            if highest[block] >= least:
                for atom in range(block * LANES, (block + 1) * LANES):
                    if (row[atom] & 0x7FFF) >= least:
                        _insert(abs(_dot(x_ND[n], atoms_FD[atom])), atom, values_NK[n], atoms_NK[n])


@numba.njit(nogil=True, cache=True)
def _block_maximum(row, block):
    high = np.int16(0)
    for lane in range(LANES):
        high = max(high, np.int16(row[block * LANES + lane] & np.int16(0x7FFF)))
    return high


@numba.njit(nogil=True, cache=True)
def _insert_block(row, block, top):
    for lane in range(LANES):
        key = np.int32(row[block * LANES + lane] & 0x7FFF)
        place = len(top) - 1
        if key > top[place]:
            while place > 0 and key > top[place - 1]:
                top[place] = top[place - 1]
                place -= 1
            top[place] = key


@numba.njit(nogil=True, cache=True)
def _insert(value, atom, values, atoms):
    place = len(values) - 1
    if value > values[place]:
        while place > 0 and value > values[place - 1]:
            values[place], atoms[place] = values[place - 1], atoms[place - 1]
            place -= 1
        values[place], atoms[place] = value, atom


@numba.njit(nogil=True, cache=True, fastmath=True)
def _dot(a, b):
    total = np.float32(0.0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total
