"""Matching-pursuit steps as one CUDA kernel launch by Triton: a program runs all steps of one token.

Up to `IN_REGISTERS` atoms a token's correlations stay in registers from first step to last, so that a step reads one row
of the Gram matrix and nothing else. Beyond, they lie in global memory (a token's fit the second-level cache) and are
walked in blocks. What is computed is defined by `matching._steps_torch`.
"""

from __future__ import annotations

import torch
import triton  # ty: ignore[import-not-found]
import triton.language as tl  # ty: ignore[import-not-found]
from torch import Tensor

IN_REGISTERS = 16_384
"""Widest dictionary whose correlations are held in registers: 64 KB of an SM's 256 KB a token."""
BLOCK = 4_096
"""Correlations walked at a time beyond that."""


def pursue(
    correlations_NF: Tensor,
    table_FF: Tensor,
    nonnegative: bool,
    energy_N: Tensor,
    stop_N: Tensor,
    steps: int,
    atoms_NS: Tensor,
    coefficients_NS: Tensor,
) -> None:
    """`steps` steps of every token; the whole Gram matrix must be at hand.

    correlations_NF: float32, contiguous, overwritten. table_FF: Gram matrix, float32. energy_N: squared
    norm of the residual, float64, updated; stop_N: energy at which a token rests. atoms_NS (int64) and coefficients_NS
    (float32) are filled in the order taken.
    """
    n_tokens, width = correlations_NF.shape
    if n_tokens == 0 or steps == 0:
        return
    fits = width <= IN_REGISTERS
    block = triton.next_power_of_2(width) if fits else BLOCK
    arguments = (
        correlations_NF,
        table_FF,
        energy_N,
        stop_N,
        atoms_NS,
        coefficients_NS,
        width,
        atoms_NS.stride(0),
        coefficients_NS.stride(0),
        steps,
    )
    warps = 4 if block <= 2048 else 8 if block <= 8192 else 16
    with _device(correlations_NF):
        (_steps_in_registers if fits else _steps_in_memory)[(n_tokens,)](
            *arguments, NONNEGATIVE=nonnegative, BLOCK=block, num_warps=warps
        )


def _device(tensor: Tensor) -> torch.cuda.device:
    """The tensor's CUDA device made current; the interpreter runs on CPU tensors, where there is none."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


@triton.jit
def _steps_in_registers(
    correlations,
    table,
    energies,
    stops,
    atoms,
    coefficients,
    width,
    atoms_stride,
    coefficients_stride,
    steps,
    NONNEGATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < width
    row = tl.load(correlations + token * width + place, mask=inside, other=0.0)
    energy = tl.load(energies + token)
    stop = tl.load(stops + token)
    for step in range(0, steps):
        key = row if NONNEGATIVE else tl.abs(row)
        best, atom = tl.max(key, axis=0, return_indices=True, return_indices_tie_break_left=True)
        going = (best > 0.0) & (energy > stop)
        value = tl.where(going, tl.sum(tl.where(place == atom, row, 0.0), axis=0), 0.0)
        chosen = tl.where(going, atom, 0).to(tl.int64)
        other = tl.load(table + chosen * width + place, mask=inside, other=0.0)
        row -= value * other
        energy -= value.to(tl.float64) * value.to(tl.float64)
        tl.store(atoms + token * atoms_stride + step, chosen)
        tl.store(coefficients + token * coefficients_stride + step, value)
    tl.store(energies + token, energy)


@triton.jit
def _steps_in_memory(
    correlations,
    table,
    energies,
    stops,
    atoms,
    coefficients,
    width,
    atoms_stride,
    coefficients_stride,
    steps,
    NONNEGATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    energy = tl.load(energies + token)
    stop = tl.load(stops + token)
    value = 0.0
    chosen = tl.zeros((), dtype=tl.int64)
    # pass number `step` subtracts what step - 1 took (nothing at first) and finds what step takes
    for step in range(0, steps):
        high = tl.zeros((BLOCK,), dtype=tl.float32)
        where = tl.zeros((BLOCK,), dtype=tl.int32)
        held = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, width, BLOCK):
            place = start + lane
            inside = place < width
            row = tl.load(correlations + token * width + place, mask=inside, other=0.0)
            if step > 0:
                row -= value * tl.load(table + chosen * width + place, mask=inside, other=0.0)
                tl.store(correlations + token * width + place, row, mask=inside)
            key = row if NONNEGATIVE else tl.abs(row)
            better = key > high
            high = tl.where(better, key, high)
            where = tl.where(better, place, where)
            held = tl.where(better, row, held)
        tl.debug_barrier()  # the next pass reads what this one wrote
        best = tl.max(high, axis=0)
        going = (best > 0.0) & (energy > stop)
        atom = tl.min(tl.where(high == best, where, width), axis=0)  # of equal ones the first, as elsewhere
        value = tl.where(going, tl.sum(tl.where((high == best) & (where == atom), held, 0.0), axis=0), 0.0)
        chosen = tl.where(going, atom, 0).to(tl.int64)
        energy -= value.to(tl.float64) * value.to(tl.float64)
        tl.store(atoms + token * atoms_stride + step, chosen)
        tl.store(coefficients + token * coefficients_stride + step, value)
    tl.store(energies + token, energy)
