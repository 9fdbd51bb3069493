"""Matching pursuit (Mallat and Zhang 1993) through the Gram matrix: many tokens, greedy steps, within memory limits.

Each step takes the atom of largest correlation with what is left of a token and subtracts its part. The residual
itself is never formed: taking atom i with coefficient c changes all correlations by `-c * gram[i]`, d_sae operations a
step instead of d_in * d_sae.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from sae_research.saes.pursuit.dictionary import Dictionary, GramRows

CHECKED_TOKENS = 16
"""Tokens on which compiled CUDA steps are held against the torch steps before they are used."""
TORCH_CHECKS_EVERY = 8
"""On a device the torch steps ask only so often whether any token goes on, because they wait for the answer."""


def pursue(
    x_ND: Tensor,
    dictionary: Dictionary,
    steps: int,
    *,
    nonnegative: bool = False,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Atoms [tokens, steps] (int64) and coefficients [tokens, steps] in the order they were taken.

    x_ND: finite. nonnegative: take the largest positive correlation and stop where there is none. tolerance: a token
    rests once its residual norm is at most this share of its own; 0 never does. Steps not made hold atom 0 with
    coefficient 0.
    """
    gram = dictionary.gram()
    atoms_NS = torch.zeros(len(x_ND), steps, dtype=torch.long, device=x_ND.device)
    coefficients_NS = torch.zeros(len(x_ND), steps, dtype=x_ND.dtype, device=x_ND.device)
    size = min(dictionary.tokens_at_a_time(), gram.capacity)
    for start in range(0, len(x_ND), size):
        end = min(start + size, len(x_ND))
        run = _Run(x_ND[start:end], dictionary, atoms_NS[start:end], coefficients_NS[start:end], nonnegative, tolerance)
        _backend(run, gram, steps)(run, gram, steps)
    return atoms_NS, coefficients_NS


class _Run:
    """Tokens under way: what they are, what was taken so far, how much is left."""

    def __init__(
        self,
        x_ND: Tensor,
        dictionary: Dictionary,
        atoms_NS: Tensor,
        coefficients_NS: Tensor,
        nonnegative: bool,
        tolerance: float,
    ) -> None:
        self.x = x_ND
        self.atoms, self.coefficients = atoms_NS, coefficients_NS
        self.nonnegative = nonnegative
        # each step takes c^2 off the energy: in float32 the small rest of a large sum would be rounding
        wide = torch.float32 if x_ND.device.type == "mps" else torch.float64
        self.energy = x_ND.to(wide).square().sum(1)
        # without a tolerance nobody rests, however far rounding takes the energy below zero
        # (a finite bound: compiled steps assume that no number is infinite)
        self.stop = tolerance**2 * self.energy if tolerance else torch.full_like(self.energy, -torch.finfo(wide).max)
        self.correlations = dictionary.correlations(x_ND)

    def first(self, n: int) -> _Run:
        """The first n tokens as they stand, to try something on: nothing that happens to them is seen here."""
        trial = copy.copy(self)
        for name in ("x", "energy", "stop", "correlations"):
            setattr(trial, name, getattr(self, name)[:n].clone())
        trial.atoms, trial.coefficients = torch.zeros_like(self.atoms[:n]), torch.zeros_like(self.coefficients[:n])
        return trial


Steps = Callable[[_Run, GramRows, int], None]


def _backend(run: _Run, gram: GramRows, steps: int) -> Steps:
    device, dtype = run.x.device.type, run.x.dtype
    if device == "cpu" and dtype == torch.float32:
        return _steps_numba
    if device == "cuda" and dtype == torch.float32 and gram.complete and _triton_serves(run, gram, steps):
        return _steps_triton
    return _steps_torch


SERVES: dict[tuple[str, int, bool], bool] = {}
"""Whether the compiled CUDA steps gave what the torch steps give, by device, width and sign."""


def _triton_serves(run: _Run, gram: GramRows, steps: int) -> bool:
    """Whether the Triton kernels can be used here: each is compiled and held against the torch steps on a few tokens when it
    is first wanted. Where it does not compile or differs, one line says so, and the torch steps serve from then on."""
    key = (str(run.x.device), run.correlations.shape[1], run.nonnegative)
    if key not in SERVES:
        reason = "" if triton_there() else "Triton is not installed"
        reason = reason or check_steps(_steps_triton, run, gram, steps)
        if reason:
            print(f"matching pursuit uses plain torch on {key[0]}: {reason}", file=sys.stderr, flush=True)
        SERVES[key] = not reason
    return SERVES[key]


def check_steps(compiled: Steps, run: _Run, gram: GramRows, steps: int) -> str:
    """Why compiled steps cannot be used, by the first `CHECKED_TOKENS` tokens of a run, which stays as it is; "" where they
    give what the torch steps give: the same atoms but for near-ties, and as much energy left."""
    found = []
    for way in (_steps_torch, compiled):
        trial = run.first(CHECKED_TOKENS)
        try:
            way(trial, gram, steps)
        except Exception as error:
            if way is not compiled or isinstance(error, torch.OutOfMemoryError):
                raise
            lines = str(error).strip().splitlines()  # compilers raise what they like, at length
            return f"the compiled steps failed ({type(error).__name__}: {lines[0][:120] if lines else ''})"
        found.append(trial)
    plain, other = found
    whole_N = run.first(CHECKED_TOKENS).energy.clamp_min(torch.finfo(run.x.dtype).tiny)
    apart = float(((plain.energy - other.energy).abs() / whole_N).max())
    equal = float((plain.atoms == other.atoms).float().mean())
    if apart <= 1e-3 and equal >= 0.9:
        return ""
    return f"the compiled steps give other results ({equal:.0%} of the atoms equal, energies apart by {apart:.2g})"


def triton_there() -> bool:
    try:
        import triton  # noqa: F401  # ty: ignore[import-not-found]
    except ImportError:
        return False
    return True


def _steps_torch(run: _Run, gram: GramRows, steps: int) -> None:
    """The reference, and the path for other precisions and devices, and for CUDA without Triton."""
    correlations_NF = run.correlations
    every = 1 if run.x.device.type == "cpu" else TORCH_CHECKS_EVERY
    for step in range(steps):
        key = correlations_NF if run.nonnegative else correlations_NF.abs()
        best, atom = key.max(dim=1)
        going = (best > 0) & (run.energy > run.stop)
        if step % every == 0 and not going.any():
            return
        atom = torch.where(going, atom, 0)
        value = torch.where(going, correlations_NF.gather(1, atom[:, None])[:, 0], 0.0)
        if not gram.complete:
            gram.fetch(atom.unique())
        rows = gram.table[gram.slot[atom].long()].to(correlations_NF.dtype)
        correlations_NF.addcmul_(rows, value[:, None], value=-1)
        run.energy -= value.to(run.energy.dtype).square()
        run.atoms[:, step], run.coefficients[:, step] = atom, value


def _steps_numba(run: _Run, gram: GramRows, steps: int) -> None:
    """The same steps, compiled: a token's correlations stay in the processor's near caches."""
    import numpy as np

    from sae_research.saes.pursuit import kernels_numba

    done = np.zeros(len(run.x), np.int64)
    wanted = np.full(len(run.x), -1, np.int32)
    arguments = (
        run.correlations.numpy(),
        gram.table.numpy(),
        gram.slot.numpy(),
        np.float32(0 if run.nonnegative else -1),
        run.energy.numpy(),
        run.stop.numpy(),
        steps,
        run.atoms.numpy(),
        run.coefficients.numpy(),
        done,
        wanted,
    )
    while sum(kernels_numba.in_threads(kernels_numba.pursue, len(run.x), *arguments)):
        gram.fetch(torch.from_numpy(wanted[wanted >= 0]).long().unique())


def _steps_triton(run: _Run, gram: GramRows, steps: int) -> None:
    """The same steps in one CUDA kernel launch."""
    from sae_research.saes.pursuit import kernels_triton

    kernels_triton.pursue(
        run.correlations, gram.table, run.nonnegative, run.energy, run.stop, steps, run.atoms, run.coefficients
    )
