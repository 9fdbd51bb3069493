"""Two pursuit encoders over a trained dictionary: IHTP per sequence, matching pursuit (MPSAE) per token.

Both read only the decoder: unit rows `W_dec` [d_sae, d_in] and `b_dec` [d_in]. Activations are signed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sae_research.errors import UserError
from sae_research.saes.base import SAEConfig, SparseAutoencoder

CHUNK_ELEMENTS = 32_000_000
"""Largest [tokens, d_sae] block of correlations held at a time (128 MB in float32)."""


class PursuitSAE(SparseAutoencoder):
    """What the pursuit encoders share: a unit-norm dictionary and its Gram matrix."""

    tensor_names = ("W_dec", "b_dec")
    signed = True
    size_name: ClassVar[str] = ""

    def __init__(self, W_dec: Tensor, b_dec: Tensor, size: int, cfg: SAEConfig | None = None) -> None:
        norms = W_dec.norm(dim=1, keepdim=True)
        if (norms == 0).any():
            raise UserError(f"{self.form}: {int((norms == 0).sum())} atoms of the dictionary are zero vectors")
        # Pursuit explains what is left beyond b_dec, however the SAE it takes its dictionary from was fed.
        cfg = None if cfg is None else cfg.replace(apply_b_dec_to_input=True)
        # Pursuit steps are projections only along unit atoms; trained decoders drift from 1 by rounding.
        super().__init__(cfg, W_dec=W_dec / norms, b_dec=b_dec)
        self._gram: Tensor | None = None
        self._dictionary: str | None = None
        if not 1 <= size <= self.cfg.d_sae:
            raise UserError(f"{self.form}: {self.size_name} = {size} must lie between 1 and d_sae = {self.cfg.d_sae}")

    def family_key(self) -> object:
        """Members over one dictionary share correlations: the same bytes, whichever files they came from."""
        return self.cfg.center_input, self.dictionary_fingerprint()

    def dictionary_fingerprint(self) -> str:
        """SHA-256 over the bytes of the dictionary, computed once: weights of an SAE do not change."""
        if self._dictionary is None:
            digest = hashlib.sha256(repr(tuple(self.W_dec.shape)).encode())
            for tensor in (self.W_dec, self.b_dec):
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
            self._dictionary = digest.hexdigest()
        return self._dictionary

    def gram(self) -> Tensor:
        """`W_dec W_dec^T` [d_sae, d_sae], computed once per dictionary in memory."""
        if self._gram is None or self._gram.device != self.W_dec.device:
            self._gram = self.W_dec @ self.W_dec.T
        return self._gram

    @classmethod
    def from_tensors(cls, cfg: SAEConfig, tensors: dict[str, Tensor]) -> Self:
        size: Any = cfg.options[cls.size_name]
        return cls(tensors["W_dec"], tensors["b_dec"], size, cfg)


class IHTPSAE(PursuitSAE):
    """Iterative hard thresholding pursuit over a whole sequence.

    Each token names its k atoms of largest absolute correlation; the union over the sequence is the support; every
    token's activations are the least-squares coefficients on it, of minimum norm where the support reaches d_in.
    A token's latents therefore depend on the whole sequence, later tokens included: not causal. L0 is the size of
    the union.
    """

    form = "ihtp"
    option_names = ("k",)
    size_name = "k"
    per_token = False
    causal = False

    def __init__(self, W_dec: Tensor, b_dec: Tensor, k: int = 10, cfg: SAEConfig | None = None) -> None:
        super().__init__(W_dec, b_dec, k, cfg)
        self.k = int(k)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return next(self.encode_family([self], x, mask))

    @classmethod
    def encode_family(cls, members: Sequence[Self], x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """Correlations and the ranking of atoms are computed once for all k."""
        first, k_max = members[0], max(member.k for member in members)
        x_BSD = first.centred(x)
        mask_BS = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
        dictionary = first.W_dec.double()
        ranked = [(x_BSD[b][mask_BS[b]] @ first.W_dec.T).abs().topk(k_max, dim=-1) for b in range(len(x))]
        for member in members:
            z_BSF = torch.zeros(*x.shape[:-1], first.cfg.d_sae, dtype=x_BSD.dtype, device=x.device)
            for b, (values_TK, top_TK) in enumerate(ranked):
                # an atom that correlates with nothing is named by nobody: among zeros the order would be arbitrary
                support = top_TK[:, :member.k][values_TK[:, :member.k] > 0].unique()
                if len(support):
                    tokens = mask_BS[b].nonzero()[:, 0]
                    z_BSF[b, tokens[:, None], support] = _least_squares(x_BSD[b, tokens], dictionary[support])
            yield z_BSF


def _least_squares(x_TD: Tensor, atoms_UD: Tensor) -> Tensor:
    """Coefficients [tokens, support] of minimum norm that minimise `|x - z atoms|`; atoms in float64.

    Normal equations by Cholesky where the support is smaller than d_in, the dual ones where it is not; where rounding
    or duplicate atoms make them singular, a least-squares solver that copes with deficient rank.
    """
    x64 = x_TD.double()
    support, d_in = atoms_UD.shape
    if support < d_in:
        factor, failed = torch.linalg.cholesky_ex(atoms_UD @ atoms_UD.T)
        right, left = x64 @ atoms_UD.T, None
    else:
        factor, failed = torch.linalg.cholesky_ex(atoms_UD.T @ atoms_UD)
        right, left = x64, atoms_UD
    smallest, largest = factor.diagonal().aminmax()
    if failed or smallest < 1e-6 * largest:
        solution = torch.linalg.pinv(atoms_UD.cpu()).to(x64.device)
        return (x64 @ solution).to(x_TD.dtype)
    solved = torch.cholesky_solve(right.T, factor).T
    return (solved if left is None else solved @ left.T).to(x_TD.dtype)


class MPSAE(PursuitSAE):
    """Matching pursuit (Mallat and Zhang 1993): s greedy steps per token.

    Each step takes the atom of largest absolute correlation with the residual, adds that correlation to its
    activation and subtracts its part from the residual. The same atom may be taken again, so L0 is at most s.
    """

    form = "matching_pursuit"
    option_names = ("s",)
    size_name = "s"

    def __init__(self, W_dec: Tensor, b_dec: Tensor, s: int = 50, cfg: SAEConfig | None = None) -> None:
        super().__init__(W_dec, b_dec, s, cfg)
        self.s = int(s)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return next(self.encode_family([self], x, mask))

    def atoms(self, x_ND: Tensor) -> Tensor:
        """The atoms that each token takes, in order [tokens, s]. x_ND: [tokens, d_in]."""
        return _pursue(self.centred(x_ND), self.W_dec, self.gram(), self.s)[0]

    @classmethod
    def encode_family(cls, members: Sequence[Self], x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """One run to the largest s serves every member: a smaller s is a prefix of its steps."""
        first, s_max = members[0], max(member.s for member in members)
        x_ND = first.centred(x).reshape(-1, first.cfg.d_in)
        keep_N = slice(None) if mask is None else mask.reshape(-1)
        x_KD = x_ND[keep_N]
        if not torch.isfinite(x_KD).all():  # the compiled steps look for a largest correlation, which NaN has not
            raise UserError("matching pursuit: the activations hold NaN or infinity; use model.torch_dtype float32 "
                            "or bfloat16")
        atoms_NS, coefficients_NS = _pursue(x_KD, first.W_dec, first.gram(), s_max)
        for member in members:
            z_KF = torch.zeros(len(atoms_NS), first.cfg.d_sae, dtype=x_ND.dtype, device=x.device)
            z_KF.scatter_add_(1, atoms_NS[:, :member.s], coefficients_NS[:, :member.s])
            if mask is not None:
                z_NF = torch.zeros(len(x_ND), first.cfg.d_sae, dtype=x_ND.dtype, device=x.device)
                z_NF[keep_N] = z_KF
                z_KF = z_NF
            yield z_KF.reshape(*x.shape[:-1], first.cfg.d_sae)


def _pursue(x_ND: Tensor, W_dec: Tensor, gram_FF: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Atoms [tokens, steps] and coefficients [tokens, steps] in the order they were taken.

    After the first product the residual itself is never formed: taking atom i with coefficient a changes all
    correlations by `-a * gram[i]`, d_sae operations a step instead of d_in * d_sae.
    """
    chunk = max(1, CHUNK_ELEMENTS // gram_FF.shape[0])
    step = _steps_numba if x_ND.device.type == "cpu" and x_ND.dtype == torch.float32 else _steps_torch
    parts = [step(part @ W_dec.T, gram_FF, steps) for part in x_ND.split(chunk)]
    if not parts:
        return (torch.zeros(0, steps, dtype=torch.long, device=x_ND.device),
                torch.zeros(0, steps, dtype=x_ND.dtype, device=x_ND.device))
    return torch.cat([atoms for atoms, _ in parts]), torch.cat([values for _, values in parts])


def _steps_torch(correlations_NF: Tensor, gram_FF: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The reference, and the path for CUDA and other precisions. Overwrites `correlations_NF`."""
    atoms, coefficients = [], []
    for _ in range(steps):
        index = correlations_NF.abs().argmax(dim=1)
        value = correlations_NF.gather(1, index[:, None])
        correlations_NF.addcmul_(gram_FF[index], value, value=-1)
        atoms.append(index)
        coefficients.append(value[:, 0])
    return torch.stack(atoms, dim=1), torch.stack(coefficients, dim=1)


def _steps_numba(correlations_NF: Tensor, gram_FF: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The same steps, compiled: a token's correlations stay in the processor's first cache."""
    from sae_research.pursuit_kernel import LANES, pursue

    pad = -gram_FF.shape[0] % LANES  # zero atoms correlate with nothing and are never taken before others
    if pad:
        correlations_NF = torch.nn.functional.pad(correlations_NF, (0, pad))
        gram_FF = torch.nn.functional.pad(gram_FF, (0, pad, 0, pad))
    atoms, coefficients = pursue(correlations_NF.contiguous().numpy(), gram_FF.contiguous().numpy(), steps)
    return torch.from_numpy(atoms), torch.from_numpy(coefficients)
