"""Pursuit encoders over a trained dictionary: IHTP per sequence; matching pursuit (MPSAE) and its relatives per token.

All read only the decoder: unit rows `W_dec` [d_sae, d_in] and `b_dec` [d_in]. docs/pursuit.md describes and compares
them; what they compute with lies beside this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes.base import SAEConfig, SparseAutoencoder, all_finite
from sae_research.saes.pursuit import matching, orthogonal, thresholding
from sae_research.saes.pursuit.dictionary import Dictionary, Normalise, check_atoms, shared_dictionary


class PursuitSAE(SparseAutoencoder):
    """What the pursuit encoders share: a checked dictionary of unit atoms, its size option, families.

    Bad input, here and in every subclass: rows not of unit norm are scaled, with a line in `notes`, or refused
    (`normalise="refuse"`); a zero atom is never taken, likewise; of equal atoms only the first is taken, and of opposite
    ones, unless activations are never negative; a size beyond d_sae is refused; a sequence with no token that counts
    has no latents; NaN or infinity is refused in a token that counts, ignored in others. Refusals are `UserError`s.
    """

    tensor_names = ("W_dec", "b_dec")
    signed = True
    size_name: ClassVar[str] = ""
    """The option that says how sparse: k or s."""
    defaults: ClassVar[dict[str, Any]] = {}
    """The form's further options, kept in files only where they differ from these."""

    def __init__(
        self, W_dec: Tensor, b_dec: Tensor, size: int, cfg: SAEConfig | None = None, normalise: Normalise = "note"
    ) -> None:
        if normalise not in ("note", "refuse"):
            raise UserError(f"{self.form}: normalise must be note or refuse (got {normalise!r})")
        try:
            atoms, usable, self.notes = check_atoms(W_dec.detach(), normalise, self.signed)
        except UserError as error:
            raise UserError(f"{self.form}: {error}") from None
        if cfg is not None and cfg.is_transcoder:
            raise UserError(f"{self.form}: its atoms explain what it reads: it writes no other hook ({cfg.hooks})")
        # Pursuit explains what is left beyond b_dec, however the SAE it takes its dictionary from was fed.
        cfg = None if cfg is None else cfg.replace(apply_b_dec_to_input=True)
        super().__init__(cfg, W_dec=atoms, b_dec=b_dec)
        self.normalise = normalise
        self.register_buffer("usable", usable, persistent=False)
        self._dictionary: Dictionary | None = None
        self._fingerprint: tuple[object, str] | None = None
        if not 1 <= size <= self.cfg.d_sae:
            raise UserError(f"{self.form}: {self.size_name} = {size} must lie between 1 and d_sae = {self.cfg.d_sae}")
        setattr(self, self.size_name, int(size))

    @property
    def size(self) -> int:
        return getattr(self, self.size_name)

    def options(self) -> dict[str, Any]:
        """The size, and every further option that is not at its default."""
        further = {**self.defaults, "normalise": "note"}
        return {self.size_name: self.size} | {
            name: getattr(self, name) for name, value in further.items() if getattr(self, name) != value
        }

    @classmethod
    def from_tensors(cls, cfg: SAEConfig, tensors: dict[str, Tensor]) -> Self:
        options = dict(cfg.options)
        return cls(tensors["W_dec"], tensors["b_dec"], options.pop(cls.size_name), cfg, **options)

    def family_key(self) -> object:
        """Members over one dictionary share work: the same bytes, whichever files they came from, and equal options
        but for the size."""
        return (
            self.cfg.center_input,
            self.dictionary_fingerprint(),
            tuple((name, getattr(self, name)) for name in self.defaults),
        )

    def dictionary_fingerprint(self) -> str:
        """SHA-256 over the bytes of the dictionary, computed once while torch counts no change to its tensors."""
        state = self._state()
        if self._fingerprint is None or self._fingerprint[0] != state:
            digest = hashlib.sha256(repr((tuple(self.W_dec.shape), self.W_dec.dtype)).encode())
            for tensor in (self.W_dec, self.b_dec):
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._fingerprint = state, digest.hexdigest()
        return self._fingerprint[1]

    def _state(self) -> object:
        """Tells of changes that were made through the tensors themselves; of others (`.data`) `weights_fingerprint` does."""
        tensors = (self.W_dec, self.b_dec)
        return self.W_dec.dtype, [0 if one.is_inference() else one._version for one in tensors], [id(one) for one in tensors]

    def weights_fingerprint(self) -> str:
        """As for every SAE. Each evaluation asks for it first, so that a dictionary changed since then is not used."""
        before, self._fingerprint = self._fingerprint, None
        if before is not None and before[1] != self.dictionary_fingerprint():
            self._dictionary = None
        # what is prepared for encoding is no part of the SAE, whose own class's attributes count
        prepared, self._dictionary, self._fingerprint = (self._dictionary, self._fingerprint), None, None
        try:
            return super().weights_fingerprint()
        finally:
            self._dictionary, self._fingerprint = prepared

    def dictionary(self) -> Dictionary:
        """The usable atoms with their Gram rows, shared by all encoders over them in this process."""
        held, known = self._dictionary, self._fingerprint
        if held is None or known is None or known[0] != self._state() or held.atoms.device != self.W_dec.device:
            held = self._dictionary = shared_dictionary(self.dictionary_fingerprint(), self.W_dec, self.usable)
        return held

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return next(self.encode_family([self], x, mask))

    @classmethod
    def encode_family(cls, members: Sequence[Self], x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """Each member's activations from one run: smaller sizes cost next to nothing beside the largest."""
        first = members[0]
        x_ND = first.centred(x).reshape(-1, first.cfg.d_in)
        kept_N = torch.arange(len(x_ND), device=x.device) if mask is None else mask.reshape(-1).nonzero()[:, 0]
        x_KD = x_ND if mask is None else x_ND[kept_N]
        if not all_finite(x_KD):  # there is no largest correlation where one is NaN
            raise UserError(f"{cls.form}: the activations hold NaN or infinity; use model.torch_dtype float32 or bfloat16")
        for atoms_KS, coefficients_KS in first.chosen(x_KD.detach(), [member.size for member in members]):
            z_NF = torch.zeros(len(x_ND), first.cfg.d_sae, dtype=x_ND.dtype, device=x.device)
            if mask is not None:  # tokens that do not count: atom 0, coefficient 0
                atoms_NS = torch.zeros(len(x_ND), atoms_KS.shape[1], dtype=torch.long, device=x.device)
                values_NS = torch.zeros(atoms_NS.shape, dtype=x_ND.dtype, device=x.device)
                atoms_NS[kept_N], values_NS[kept_N] = atoms_KS, coefficients_KS
                atoms_KS, coefficients_KS = atoms_NS, values_NS
            z_NF.scatter_add_(1, atoms_KS, coefficients_KS)
            yield z_NF.reshape(*x.shape[:-1], first.cfg.d_sae)

    def chosen(self, x_ND: Tensor, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each size: atoms [tokens, size] and coefficients [tokens, size] of tokens that count; an atom may stand
        there more than once, and stands for the sum."""
        raise NotImplementedError


class _Thresholding(PursuitSAE):
    """The k atoms of largest absolute correlation, by `iterations` further rounds of choosing them."""

    option_names = ("k",)
    size_name = "k"
    defaults = {"iterations": 0}

    def __init__(
        self,
        W_dec: Tensor,
        b_dec: Tensor,
        k: int = 10,
        cfg: SAEConfig | None = None,
        *,
        iterations: int = 0,
        normalise: Normalise = "note",
    ) -> None:
        super().__init__(W_dec, b_dec, k, cfg, normalise)
        self.iterations = _not_negative(self.form, "iterations", iterations)


class IHTPSAE(_Thresholding):
    """Iterative hard thresholding pursuit over a whole sequence.

    Each token names its k atoms of largest absolute correlation; the union over the sequence is the support; every
    token's activations are the least-squares coefficients on it, of minimum norm where the support reaches d_in.
    A token's latents therefore depend on the whole sequence, later tokens included: not causal. L0 is the size of
    the union. `iterations`: at most so many rounds of choosing again by the correlations that the fit leaves (Foucart's
    hard thresholding pursuit), ending once the support no longer changes; 0 keeps the first choice.
    """

    form = "ihtp"
    per_token = False
    causal = False

    @classmethod
    def encode_family(cls, members: Sequence[Self], x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """Correlations and the ranking of atoms are computed once for all k."""
        first = members[0]
        x_BSD = first.centred(x)
        mask_BS = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
        tokens = [row.nonzero()[:, 0] for row in mask_BS]
        kept = [x_SD[index].detach() for x_SD, index in zip(x_BSD, tokens, strict=True)]
        if not all(all_finite(x_TD) for x_TD in kept):
            raise UserError(f"{cls.form}: the activations hold NaN or infinity; use model.torch_dtype float32 or bfloat16")
        found = thresholding.fit_sequences(
            kept, first.dictionary(), [member.k for member in members], iterations=first.iterations
        )
        for fits in found:
            z_BSF = torch.zeros(*x.shape[:-1], first.cfg.d_sae, dtype=x_BSD.dtype, device=x.device)
            for b, (support, z_TU) in enumerate(fits):
                z_BSF[b, tokens[b][:, None], support] = z_TU
            yield z_BSF


class TopKRefitSAE(_Thresholding):
    """Each token's k atoms of largest absolute correlation, with least-squares coefficients.

    Thresholding with one refit; with `iterations` it is hard thresholding pursuit (Foucart 2011) of each token by itself,
    ending once its support no longer changes. L0 is k.
    """

    form = "topk_refit"

    def chosen(self, x_ND: Tensor, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        yield from thresholding.fit_tokens(x_ND, self.dictionary(), sizes, iterations=self.iterations)


class _Greedy(PursuitSAE):
    """At most s greedy steps per token, fewer where `tolerance` is reached; s: by default the class's `default_s`."""

    option_names = ("s",)
    size_name = "s"
    defaults = {"tolerance": 0.0}
    default_s: ClassVar[int] = 50

    def __init__(
        self,
        W_dec: Tensor,
        b_dec: Tensor,
        s: int | None = None,
        cfg: SAEConfig | None = None,
        *,
        tolerance: float = 0.0,
        normalise: Normalise = "note",
    ) -> None:
        super().__init__(W_dec, b_dec, self.default_s if s is None else s, cfg, normalise)
        self.tolerance = _share(self.form, tolerance)


class MPSAE(_Greedy):
    """Matching pursuit (Mallat and Zhang 1993): s greedy steps per token.

    Each step takes the atom of largest absolute correlation with the residual, adds that correlation to its
    activation and subtracts its part from the residual. The same atom may be taken again, so L0 is at most s.
    `tolerance`: a token stops once its residual norm is at most this share of its own (0: never).
    """

    form = "matching_pursuit"
    nonnegative: ClassVar[bool] = False

    def chosen(self, x_ND: Tensor, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """A smaller s is a prefix of the largest one's steps."""
        atoms_NS, coefficients_NS = matching.pursue(
            x_ND,
            self.dictionary(),
            max(sizes),
            nonnegative=self.nonnegative,
            tolerance=self.tolerance,
        )
        for size in sizes:
            yield atoms_NS[:, :size], coefficients_NS[:, :size]


class NonNegativeMPSAE(MPSAE):
    """Matching pursuit that takes the largest positive correlation and stops where there is none: activations are
    never negative, as those of a trained SAE."""

    form = "nonnegative_matching_pursuit"
    signed = False
    nonnegative = True


class OMPSAE(_Greedy):
    """Orthogonal matching pursuit: s greedy steps per token, all coefficients fitted by least squares after each.

    No atom is taken twice: L0 is s, at most d_in. `tolerance` as for MPSAE.
    """

    form = "omp"
    pursuit: ClassVar[Any] = staticmethod(orthogonal.orthogonal)

    default_s = 10

    def chosen(self, x_ND: Tensor, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        atoms_NS, fits = self.pursuit(x_ND, self.dictionary(), sizes, tolerance=self.tolerance)
        for size, fit_NS in zip(sizes, fits, strict=True):
            yield atoms_NS[:, :size], fit_NS


class NonNegativeOMPSAE(OMPSAE):
    """Orthogonal matching pursuit with positive correlations and non-negative least squares. L0 is at most s: a later
    fit may set an earlier atom to zero."""

    form = "nonnegative_omp"
    signed = False
    pursuit = staticmethod(orthogonal.nonnegative_orthogonal)


def _not_negative(form: str, name: str, value: int) -> int:
    if value < 0:
        raise UserError(f"{form}: {name} = {value} must not be negative")
    return int(value)


def _share(form: str, value: float) -> float:
    if not 0 <= value < 1:
        raise UserError(f"{form}: tolerance = {value} must be at least 0 and less than 1")
    return float(value)
