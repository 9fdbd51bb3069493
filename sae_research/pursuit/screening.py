"""Each token's atoms of largest absolute correlation at the speed of bfloat16 products, and exactly.

The product with the whole dictionary is what thresholding pays for. CPUs with matrix units multiply bfloat16 three times
as fast as float32, with an error that can be bounded: products of rounded numbers are exact in float32, so
`|c - c'| <= |x - x'| |d| + |x'| |d - d'|` plus the rounding of the sum and of the result. Only atoms that this bound does
not rule out (some tens of thousands) are multiplied again in float32, and ranked by that.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from sae_research import numba_cache  # noqa: F401  (says where compiled code is kept)
from sae_research.pursuit.dictionary import Dictionary
from sae_research.pursuit.kernels_numba import LANES, in_threads

HALF_ULP = 2.0**-8
"""Largest relative error of rounding to bfloat16."""
FLOAT32_ULP = 2.0**-23


def can_screen(x_ND: Tensor) -> bool:
    """Whether screening is at hand for these activations, and faster: float32 on a CPU with bfloat16 matrix units."""
    return x_ND.device.type == "cpu" and x_ND.dtype == torch.float32 and _fast_bfloat16()


def _fast_bfloat16() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def largest(x_ND: Tensor, dictionary: Dictionary, k: int) -> tuple[Tensor, Tensor]:
    """(absolute correlations [tokens, k], atoms [tokens, k]), largest first; of equal ones the first atom.

    As `(x @ atoms.T).abs().topk(k)` in float32, but for rounding of the correlations themselves. x_ND: finite, float32.
    """
    values = np.empty((len(x_ND), k), dtype=np.float32)
    atoms = np.empty((len(x_ND), k), dtype=np.int64)
    rounded_FD, largest_norm, largest_error = _rounded(dictionary)
    size = dictionary.tokens_at_a_time()
    for start in range(0, len(x_ND), size):
        x = x_ND[start:start + size].contiguous()
        x16 = x.bfloat16()
        norm_N = x.norm(dim=1)
        error_N = ((x - x16.float()).norm(dim=1) * largest_norm + x16.float().norm(dim=1) * largest_error
                   + x.shape[1] * FLOAT32_ULP * norm_N * largest_norm)
        products_NF = x16 @ rounded_FD.T
        in_threads(_rank, len(x), products_NF.view(torch.int16).numpy(), error_N.numpy(), x.numpy(),
                   dictionary.atoms.numpy(), values[start:start + size], atoms[start:start + size])
    return torch.from_numpy(values), torch.from_numpy(atoms)


def _rounded(dictionary: Dictionary) -> tuple[Tensor, float, float]:
    """(atoms in bfloat16, the largest norm of an atom, the largest norm of what rounding took from one)."""
    if dictionary.rounded is None:
        atoms16 = dictionary.atoms.bfloat16()
        error = float((dictionary.atoms - atoms16.float()).norm(dim=1).max())
        dictionary.rounded = atoms16, float(dictionary.atoms.norm(dim=1).max()), error
    return dictionary.rounded


@numba.njit(nogil=True, cache=True)
def _rank(start, stop, products_NF, error_N, x_ND, atoms_FD, values_NK, atoms_NK):
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
