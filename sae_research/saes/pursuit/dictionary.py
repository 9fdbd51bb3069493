"""A dictionary of unit atoms as pursuit reads it: checked, its Gram rows kept or computed on demand within limits."""

from __future__ import annotations

import weakref
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sae_research.runtime.errors import UserError

MAX_CHUNK_BYTES = 128 * 2**20
"""Largest block of correlations, gathered atoms or freshly computed Gram rows held at a time."""
MAX_GRAM_BYTES = 2 * 2**30
"""Largest table of Gram rows on the CPU. A dictionary whose Gram matrix is larger has its rows computed when an atom is
first taken. On CUDA the limit is a quarter of the device's memory, and all dictionaries there share it."""
NORM_TOLERANCE = 1e-3
"""A row whose norm differs from 1 by more is no unit atom but for rounding."""
MAX_PRECISE_BYTES = 512 * 2**20
"""Largest Gram matrix kept in float64."""
WIDTH_MULTIPLE = 64
"""Dictionaries are padded with zero atoms to a multiple of this, which compiled kernels ask for."""

Normalise = Literal["note", "refuse"]


class Checked(NamedTuple):
    """What `check_atoms` makes of decoder rows."""

    atoms: Tensor
    """Unit rows [d_sae, d_in]; a zero row stays zero."""
    usable: Tensor
    """False for zero rows and for repetitions of an earlier row [d_sae]."""
    notes: list[str]


def check_atoms(W_dec: Tensor, normalise: Normalise = "note", signed: bool = True) -> Checked:
    """Unit atoms of a decoder [d_sae, d_in], and what had to be assumed to get them.

    Rows are scaled to unit norm: with `note` the result says so where that changed them, with `refuse` it is an error.
    A zero row can explain nothing: noted, or refused. Of equal rows the first stands for all; of opposite ones too where
    activations are `signed`. Raises `UserError` also when no row is usable.
    """
    norms = W_dec.norm(dim=1, keepdim=True)
    zero_F = norms[:, 0] == 0
    off_F = ((norms[:, 0] - 1).abs() > NORM_TOLERANCE) & ~zero_F
    notes = []
    if off_F.any():
        low, high = norms[:, 0][off_F].aminmax()
        notes.append(
            f"{int(off_F.sum())} of {len(W_dec)} atoms are not of unit norm ({float(low):.3g} to {float(high):.3g})"
        )
    if zero_F.any():
        notes.append(f"{int(zero_F.sum())} of {len(W_dec)} atoms are zero vectors")
    if notes and normalise == "refuse":
        raise UserError(
            f"{' and '.join(notes)}; pursuit needs unit atoms: mend the decoder, or allow scaling (normalise: note)"
        )
    if zero_F.all():
        raise UserError("every atom of the dictionary is a zero vector; there is nothing to pursue")
    atoms, usable_F = unit_atoms(W_dec, signed)
    repeated_F = ~usable_F & ~zero_F
    if repeated_F.any():
        notes.append(
            f"{int(repeated_F.sum())} atoms repeat another{' up to sign' if signed else ''}: the first stands for all"
        )
    said = {"not of": ": scaled to it", "are zero": ": never taken"}
    notes = [note + next((end for key, end in said.items() if key in note), "") for note in notes]
    return Checked(atoms, usable_F, notes)


def unit_atoms(W_dec: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(unit rows [d_sae, d_in], a zero row stays zero; False for zero rows and those that repeat an earlier one [d_sae]).

    Nothing here waits for the device: training does this at every step.
    """
    norms = W_dec.norm(dim=1, keepdim=True)
    atoms = torch.where(norms == 0, 0.0, W_dec / norms.clamp_min(torch.finfo(norms.dtype).tiny))
    return atoms, ~((norms[:, 0] == 0) | _repeated(atoms, signed))


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MIX = 0x1E3779B97F4A7C15


def _repeated(atoms_FD: Tensor, signed: bool) -> Tensor:
    """True for every row that an earlier one equals, up to sign if `signed` [d_sae], compared bit by bit.

    Rows are ordered by a hash of their bits, so that equal ones are neighbours, then neighbours are compared.
    """
    rows_FD = atoms_FD.detach() + 0.0  # no negative zero
    if signed:
        first_F1 = rows_FD.gather(1, (rows_FD != 0).to(torch.int8).argmax(1, keepdim=True))
        rows_FD = torch.where(first_F1 < 0, -rows_FD, rows_FD) + 0.0
    bits_FD = rows_FD.view(_BITS[rows_FD.dtype.itemsize])
    part = max(1, MAX_CHUNK_BYTES // (8 * bits_FD.shape[1]))
    weights_D = torch.randint(-(2**62), 2**62, bits_FD.shape[1:], generator=torch.Generator().manual_seed(0)).to(
        bits_FD.device
    )

    def hashed(bits: Tensor) -> Tensor:
        mixed = bits.long() * _MIX  # wraps around; without mixing, rows of one sign pattern each would hash alike
        return ((mixed ^ (mixed >> 32)) * weights_D).sum(1)

    keys_F, order_F = torch.cat([hashed(bits) for bits in bits_FD.split(part)]).sort(stable=True)
    same_F = keys_F[1:] == keys_F[:-1]
    starts = range(0, len(same_F), part)
    equal = [
        (bits_FD[order_F[i + 1 : i + part + 1]] == bits_FD[order_F[i : i + part][: len(same_F) - i]]).all(1) for i in starts
    ]
    repeated_F = torch.zeros(len(rows_FD), dtype=torch.bool, device=rows_FD.device)
    repeated_F[order_F[1:]] = same_F & torch.cat(equal) if equal else same_F
    return repeated_F


class GramRows:
    """Rows of `atoms atoms^T`: the whole matrix where it fits, else a table filled when rows are first asked for.

    `table` [capacity, d_sae]; `slot` [d_sae] int32 says where an atom's row stands, -1 where it does not. A full table
    is emptied before rows that are missing go in.
    """

    def __init__(self, atoms_FD: Tensor, max_bytes: int, max_chunk_bytes: int) -> None:
        self.atoms = atoms_FD
        width = len(atoms_FD)
        self.capacity = max(1, min(width, max_bytes // (width * atoms_FD.dtype.itemsize)))
        self.complete = self.capacity == width
        self._block = max(1, max_chunk_bytes // (width * atoms_FD.dtype.itemsize))
        self.table = atoms_FD.new_empty(self.capacity, width)
        self.slot = torch.full((width,), -1, dtype=torch.int32, device=atoms_FD.device)
        self._used = 0
        if self.complete:
            self.fetch(torch.arange(width, device=atoms_FD.device))

    def fetch(self, wanted: Tensor) -> None:
        """Make the rows of these atoms (different ones, at most `capacity`) stand in the table."""
        missing = wanted[self.slot[wanted] < 0]
        if self._used + len(missing) > self.capacity:
            if len(wanted) > self.capacity:
                raise RuntimeError(f"{len(wanted)} Gram rows asked for, the table holds {self.capacity}")
            self.slot.fill_(-1)
            self._used, missing = 0, wanted
        for part in missing.split(self._block):
            end = self._used + len(part)
            self.table[self._used : end] = self.atoms[part] @ self.atoms.T
            self.slot[part] = torch.arange(self._used, end, dtype=torch.int32, device=part.device)
            self._used = end


class Dictionary:
    """Usable unit atoms, padded for the kernels, with their Gram rows by precision. `atoms` [padded, d_in]."""

    def __init__(
        self, atoms_FD: Tensor, usable_F: Tensor, max_gram_bytes: int | None = None, max_chunk_bytes: int | None = None
    ) -> None:
        self.d_sae = len(atoms_FD)
        pad = -self.d_sae % WIDTH_MULTIPLE
        if not bool(usable_F.all()):
            atoms_FD = atoms_FD * usable_F[:, None]
        self.atoms = torch.nn.functional.pad(atoms_FD, (0, 0, 0, pad)) if pad else atoms_FD
        self.max_chunk_bytes = MAX_CHUNK_BYTES if max_chunk_bytes is None else max_chunk_bytes
        self.max_gram_bytes = _gram_limit(atoms_FD.device) if max_gram_bytes is None else max_gram_bytes
        self._rows: GramRows | None = None

    def gram(self) -> GramRows:
        """Gram rows, made when first asked for."""
        shared = self.atoms.device.type == "cuda"
        if self._rows is None:
            if shared:
                _make_room(self, min(len(self.atoms) ** 2 * self.atoms.dtype.itemsize, self.max_gram_bytes))
            self._rows = GramRows(self.atoms, self.max_gram_bytes, self.max_chunk_bytes)
        if shared:
            _HELD.pop(self, None)
            _HELD[self] = None
        return self._rows

    @property
    def gram_fits(self) -> bool:
        """Whether the whole Gram matrix, in the atoms' precision, keeps within the limit."""
        return len(self.atoms) ** 2 * self.atoms.dtype.itemsize <= self.max_gram_bytes

    @cached_property
    def precise_gram(self) -> Tensor | None:
        """The Gram matrix in float64 [padded, padded], on the CPU and within the limits; else None. Least squares on
        chosen atoms then gather its entries, which takes a fraction of the time of multiplying the atoms again."""
        if self.atoms.device.type != "cpu" or 8 * len(self.atoms) ** 2 > min(MAX_PRECISE_BYTES, self.max_gram_bytes):
            return None
        atoms = self.atoms.double()
        return atoms @ atoms.T

    @cached_property
    def coherence(self) -> float:
        """Largest absolute cosine of two different usable atoms, where the Gram matrix fits; else 0."""
        if not self.gram_fits:
            return 0.0
        highest = 0.0
        for start in range(0, len(self.atoms), 256):
            rows = self.gram().table[start : start + 256].abs()
            rows.diagonal(start).zero_()
            highest = max(highest, float(rows.max()))
        return highest

    @property
    def gram_bytes(self) -> int:
        """Memory that the Gram rows take now."""
        return 0 if self._rows is None else self._rows.table.nbytes

    def drop_gram(self) -> None:
        """Give the Gram rows' memory back; they are made again when asked for."""
        self._rows = None

    def correlations(self, x_ND: Tensor) -> Tensor:
        """Products with every atom [tokens, padded]."""
        return x_ND @ self.atoms.T

    def tokens_at_a_time(self, copies: int = 1) -> int:
        """Tokens whose correlations, `copies` times over, keep within the chunk limit; at least one."""
        return max(1, self.max_chunk_bytes // (len(self.atoms) * self.atoms.dtype.itemsize * copies))


_HELD: weakref.WeakKeyDictionary[Dictionary, None] = weakref.WeakKeyDictionary()
"""Dictionaries that have made Gram rows on CUDA, the one used last at the end."""


def _make_room(newcomer: Dictionary, needed: int) -> None:
    """Drop the Gram rows of other dictionaries on the device, the least recently used first, until `needed` bytes more keep
    within the limit: rows are made anew in milliseconds, memory that is not there ends a run."""
    others = [one for one in _HELD if one is not newcomer and one.atoms.device == newcomer.atoms.device]
    held = sum(one.gram_bytes for one in others)
    for one in others:
        if held + needed <= newcomer.max_gram_bytes:
            return
        held -= one.gram_bytes
        one.drop_gram()


_SHARED: weakref.WeakValueDictionary[tuple[str, str, str, int], Dictionary] = weakref.WeakValueDictionary()


def shared_dictionary(fingerprint: str, atoms_FD: Tensor, usable_F: Tensor) -> Dictionary:
    """The one `Dictionary` of these atoms on their device while anybody holds it: several encoders share its Gram
    matrix. `fingerprint` stands for the atoms' content."""
    # signed and non-negative encoders may hold different atoms usable, the former a subset
    key = (fingerprint, str(atoms_FD.device), str(atoms_FD.dtype), int(usable_F.sum()))
    found = _SHARED.get(key)
    if found is None:
        found = _SHARED[key] = Dictionary(atoms_FD, usable_F)
    return found


def _gram_limit(device: torch.device) -> int:
    if device.type != "cuda":
        return MAX_GRAM_BYTES
    return torch.cuda.get_device_properties(device).total_memory // 4
