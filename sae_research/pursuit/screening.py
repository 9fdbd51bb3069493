"""Each token's atoms of largest absolute correlation at the speed of bfloat16 products, and exactly.

The product with the whole dictionary is what thresholding pays for. CPUs with matrix units multiply bfloat16 three times
as fast as float32, with an error that can be bounded: products of rounded numbers are exact in float32, so
`|c - c'| <= |x - x'| |d| + |x'| |d - d'|` plus the rounding of the sum and of the result. Only atoms that this bound does
not rule out (some tens of thousands) are multiplied again in float32, and ranked by that.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sae_research.precision import has_bfloat16
from sae_research.pursuit.dictionary import Dictionary

FLOAT32_ULP = 2.0**-23


def can_screen(x_ND: Tensor) -> bool:
    """Whether screening is at hand for these activations, and faster: float32 on a CPU with bfloat16 matrix units."""
    return x_ND.device.type == "cpu" and x_ND.dtype == torch.float32 and has_bfloat16(x_ND.device)


def largest(x_ND: Tensor, dictionary: Dictionary, k: int) -> tuple[Tensor, Tensor]:
    """(absolute correlations [tokens, k], atoms [tokens, k]), largest first; of equal ones the first atom.

    As `(x @ atoms.T).abs().topk(k)` in float32, but for rounding of the correlations themselves. x_ND: finite, float32.
    """
    from sae_research.pursuit import kernels_numba, screening_numba

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
        kernels_numba.in_threads(screening_numba.rank, len(x), products_NF.view(torch.int16).numpy(), error_N.numpy(),
                                 x.numpy(), dictionary.atoms.numpy(), values[start:start + size],
                                 atoms[start:start + size])
    return torch.from_numpy(values), torch.from_numpy(atoms)


def _rounded(dictionary: Dictionary) -> tuple[Tensor, float, float]:
    """(atoms in bfloat16, the largest norm of an atom, the largest norm of what rounding took from one)."""
    if dictionary.rounded is None:
        atoms16 = dictionary.atoms.bfloat16()
        error = float((dictionary.atoms - atoms16.float()).norm(dim=1).max())
        dictionary.rounded = atoms16, float(dictionary.atoms.norm(dim=1).max()), error
    return dictionary.rounded
