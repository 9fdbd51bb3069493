"""Objects of other libraries, and a user's own modules, as SAEs of this project.

All that is asked of them is `encode` and `decode`. In which precision and on which device they compute, whether they take
[batch, seq, d_in] or [tokens, d_in], and what their latents depend on, is found by trying, on activations of the model at
the hook that they read: an encoder with thresholds is silent on noise of another scale.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint
from sae_research.saes import SAEConfig, SparseAutoencoder
from sae_research.saes.formats.sae_lens import from_sae_lens
from sae_research.saes.identity import Unidentified, identity

_TEXT = (
    "The museum reopened on Tuesday after two years of repairs, and the first visitors queued before dawn. 'It was "
    "worth the wait,' said Maria, who had come from Lisbon with 3 friends. def area(r): return 3.14 * r ** 2  # m2. "
    "Patients who were given the drug recovered faster than those in the control group (p < 0.05). What did you do "
    "yesterday? Nothing, really; I stayed at home, read the news and cooked soup for the children. "
) * 2
_SEQUENCES, _TOKENS = 4, 32
_ALONE = 12
"""Tokens that are encoded one by one, to see whether others matter."""
_ROWS_AT_ONCE = 1024
_USER_CODE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What an `encode` raises for a shape or type that it was not written for."""


def adapt(sae: Any, lm: LanguageModel | None = None, hook: str | None = None) -> SparseAutoencoder:
    """Any object with `encode` and `decode` as an SAE of this project. Raises `UserError` for one without."""
    if isinstance(sae, SparseAutoencoder):
        return sae if sae.W_dec.dtype != torch.float64 else copy.deepcopy(sae).float()
    if not callable(getattr(sae, "encode", None)) or not callable(getattr(sae, "decode", None)):
        raise UserError(f"{type(sae).__name__} has no encode and decode")
    model_name = ""
    if type(sae).__module__.startswith("sae_lens"):
        try:
            return from_sae_lens(sae)
        except UserError:
            scaled = (getattr(sae.cfg, "normalize_activations", None) or "none") != "none"
            if scaled or hasattr(sae.cfg, "d_out"):
                raise  # its decoder rescales by what its encoder last saw, or writes elsewhere than it reads (transcoders)
            metadata = sae.cfg.metadata  # an architecture that this project lacks runs as it is
            hook, model_name = metadata.hook_name or hook or "", metadata.model_name or ""
    if hook is None or lm is None:
        raise UserError(f"{type(sae).__name__} does not say which hook it reads: give hook=, e.g. blocks.8.hook_resid_post")
    return ForeignSAE.around(sae, sample_activations(lm, hook), hook, model_name)


@torch.no_grad()
def sample_activations(lm: LanguageModel, hook: str) -> Tensor:
    """Activations of the model on a little English text, float32 [4, 32, d_in]; of random tokens where the tokenizer makes
    too few of it."""
    ids = lm.tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    wanted = _SEQUENCES * (_TOKENS - 1)
    if len(ids) < wanted:
        ids = torch.randint(lm.vocab_size, (wanted,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = torch.tensor(ids[:wanted]).reshape(_SEQUENCES, _TOKENS - 1)
    tokens = torch.cat([torch.full((_SEQUENCES, 1), lm.separator_id), rows], dim=1)
    return lm.activations(tokens.to(lm.device), hook).float()


class ForeignSAE(SparseAutoencoder):
    """Another library's SAE behind this project's contract. `per_token`, `causal` and `signed` are what the object says of
    itself, and what trying shows where it says nothing."""

    form = "foreign"
    tensor_names = ("W_dec", "b_dec")

    def __init__(self, cfg: SAEConfig, inner: Any, flat: Sequence[str] = (), **tensors: Tensor) -> None:
        super().__init__(cfg, **tensors)
        self.inner, self.flat = inner, tuple(flat)
        self.unidentified: str | None = None
        """Stands for an inner object without identity: nothing is found again under it."""

    @classmethod
    @torch.no_grad()
    def around(cls, inner: Any, x: Tensor, hook_name: str, model_name: str = "") -> ForeignSAE:
        """Wrap `inner`. x: activations of the model at the hook [batch, seq, d_in].

        Raises `UserError` when it does not go from [batch, seq, d_in] or [tokens, d_in] to latents and back, returns
        anything but a tensor, or its decoder is not affine.
        """
        before = _identity(inner)
        d_in, flat = x.shape[-1], []
        z = _shaped(inner, "encode", x, flat, f"activations at {hook_name}")
        d_sae = z.shape[-1]
        zero = torch.zeros(1, 1, d_sae, device=x.device)
        b_dec = _shaped(inner, "decode", zero, flat, "its own latents")[0, 0]
        if b_dec.shape != (d_in,):
            raise UserError(f"{_name(inner)}.decode returns {len(b_dec)} dimensions, the model has {d_in} at {hook_name}")
        W_dec = _decoder_rows(inner, b_dec, d_sae, flat)
        _check_affine(inner, z, W_dec, b_dec, flat)
        sae = cls(
            SAEConfig(form="foreign", d_in=d_in, d_sae=d_sae, hook_name=hook_name, model_name=model_name),
            inner,
            flat,
            W_dec=W_dec,
            b_dec=b_dec,
        )
        for name, seen in _properties(inner, x, z, flat).items():
            said = getattr(inner, name, None)
            # set on the object: these are this SAE's properties, not the class's
            setattr(sae, name, said if isinstance(said, bool) else seen)
        # an object that encoding changes is not the same from one call to the next
        if before is None or _identity(inner) != before:
            sae.unidentified = uuid.uuid4().hex
        return sae

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.keep(_called(self.inner, "encode", x, "encode" in self.flat), mask)

    def decode(self, z: Tensor) -> Tensor:
        return _called(self.inner, "decode", z, "decode" in self.flat)

    def weights_fingerprint(self) -> str:
        """Over all that decides what the inner object computes."""
        return fingerprint(
            [
                super().weights_fingerprint(),
                self.flat,
                self.per_token,
                self.causal,
                self.signed,
                self.unidentified or _identity(self.inner) or uuid.uuid4().hex,
            ]
        )


def _identity(inner: Any) -> str | None:
    try:
        return identity(inner)
    except Unidentified:
        return None


def _name(inner: Any) -> str:
    return type(inner).__name__


# --- calls -----------------------------------------------------------------------------------


def _called(inner: Any, method: str, values: Tensor, flat: bool) -> Tensor:
    """What a method makes of `values` [batch, seq, width], computed in the object's own precision and on its own device;
    float32 where `values` are. flat: it takes [tokens, width]. Raises `UserError` for what is no answer."""
    own = _own_tensor(inner)
    given = values if own is None else values.to(own.device, own.dtype)
    given = (given.flatten(0, 1) if flat else given).clone()  # it may change what it is given in place
    try:
        found = getattr(inner, method)(given)
    except _USER_CODE as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{_name(inner)}.{method} fails on {tuple(given.shape)}: {type(error).__name__}: {why}") from error
    if not isinstance(found, Tensor) or found.is_complex():
        kind = "a complex tensor" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise UserError(
            f"{_name(inner)}.{method} returns {kind}, expected one tensor of real numbers: wrap it in an object "
            f"whose {method} returns that tensor alone"
        )
    found = found.to(values.device, torch.float32)
    return found.unflatten(0, values.shape[:-1]) if found.ndim == 2 and len(found) == values[..., 0].numel() else found


def _own_tensor(inner: Any) -> Tensor | None:
    """A tensor that shows the object's precision and device; None where it has none to show."""
    registered = chain(inner.parameters(), inner.buffers()) if isinstance(inner, torch.nn.Module) else ()
    return next(
        (
            one
            for one in chain(registered, getattr(inner, "__dict__", {}).values())
            if isinstance(one, Tensor) and one.is_floating_point()
        ),
        None,
    )


def _shaped(inner: Any, method: str, values: Tensor, flat: list[str], what: str) -> Tensor:
    """The method's answer [batch, seq, width], having tried both shapes; `flat` gets the names of those that take
    [tokens, width]."""
    problem = ""
    for is_flat in (False, True):
        try:
            found = _called(inner, method, values, is_flat)
        except UserError as error:
            if " fails on " not in str(error):
                raise
            problem = problem or str(error)
            continue
        if found.ndim == 3 and found.shape[:-1] == values.shape[:-1]:
            flat += [method] if is_flat else []
            return found
        problem = problem or f"{_name(inner)}.{method} returns {tuple(found.shape)} for {tuple(values.shape)}"
    raise UserError(f"{problem}; {what} are [batch, seq, {values.shape[-1]}]")


# --- what it is ------------------------------------------------------------------------------


def _decoder_rows(inner: Any, b_dec: Tensor, d_sae: int, flat: list[str]) -> Tensor:
    """What each latent adds to the reconstruction [d_sae, d_in]. In half precision a row of 1 beside a bias of 100 would be
    lost to rounding: the latents are then as large as the bias asks for."""

    def rows(size: float) -> Tensor:
        parts = []
        for start in range(0, d_sae, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, d_sae - start)
            one_hot = torch.zeros(1, count, d_sae, device=b_dec.device)
            one_hot[0, torch.arange(count), torch.arange(start, start + count)] = size
            parts.append((_called(inner, "decode", one_hot, "decode" in flat)[0] - b_dec) / size)
        return torch.cat(parts)

    found, own = rows(1.0), _own_tensor(inner)
    if own is not None and torch.finfo(own.dtype).bits < 32:
        largest = float(found.abs().max())
        wanted = min(8 * float(b_dec.abs().max()) / max(largest, 1e-6), 1e4 / max(largest, 1e-6))
        if 1 < wanted < float("inf"):
            found = rows(2.0 ** int(torch.tensor(wanted).log2().ceil()))
    return found


def _tolerance(inner: Any) -> float:
    own = _own_tensor(inner)
    return 1e-3 if own is None or torch.finfo(own.dtype).bits >= 32 else 3e-2


def _check_affine(inner: Any, z: Tensor, W_dec: Tensor, b_dec: Tensor, flat: list[str]) -> None:
    """Raises `UserError` where latents together do not decode to the sum of what each decodes to."""
    drawn = torch.rand(1, 8, z.shape[-1], generator=torch.Generator().manual_seed(0)).to(z.device)
    for latents in (z, drawn * (drawn > 0.5)):
        found, expected = _called(inner, "decode", latents, "decode" in flat), latents @ W_dec + b_dec
        off, size = (found - expected).norm(), expected.norm()
        # an encoder that overflows is for the evaluations to report, which list it and go on
        if torch.isfinite(size) and torch.isfinite(off) and off > _tolerance(inner) * size.clamp_min(1e-6):
            raise UserError(f"{_name(inner)}: its decoder is not affine, so a latent has no direction of its own")


def _properties(inner: Any, x: Tensor, z: Tensor, flat: list[str]) -> dict[str, bool]:
    """Whether latents depend on their own token alone, on no later one, and may be negative. Where nothing fires at the
    activations' own scale, larger ones are tried; where nothing fires at all, nothing is ruled out."""

    def encoded(part: Tensor) -> Tensor:
        return _called(inner, "encode", part, "encode" in flat)

    for _ in range(3):
        if not torch.isfinite(z).all():
            break
        if (z != 0).any():
            half = x.shape[1] // 2
            picked = torch.arange(_ALONE) * (x.shape[0] * x.shape[1] // _ALONE)
            at = picked // x.shape[1], picked % x.shape[1]
            alone = torch.cat(
                [encoded(x[i : i + 1, j : j + 1]) for i, j in zip(*(part.tolist() for part in at), strict=True)]
            )
            return {
                "per_token": _same(inner, alone[:, 0], z[at]),
                "causal": _same(inner, encoded(x[:, :half]), z[:, :half]),
                "signed": bool((z < 0).any()),
            }
        x = 10 * x
        z = encoded(x)
    return {"per_token": False, "causal": False, "signed": True}


def _same(inner: Any, one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding, which in half precision moves a latent across a threshold now and then."""
    off = (one - other).abs() > _tolerance(inner) * other.abs().max().clamp_min(1e-6)
    allowed = 0 if _tolerance(inner) < 1e-2 else 0.02 * int((other != 0).sum())
    return int(off.sum()) <= allowed
