"""The contract of a sparse autoencoder: weights, configuration, `encode` with a mask, `decode`; and the guard that keeps one
SAE's failure from the others.

Every evaluation scores its SAEs through a `Guard`: one that cannot be scored is skipped with its reason. What counts as an
SAE's own failure: what encoders and the checks on them refuse (`UserError`: NaN, infinity, another shape, nothing that
fires), numbers that a solver or JSON refuses (`ValueError`, `ArithmeticError`, `LinAlgError`), and memory that one SAE alone
is too large for. Any other exception is a defect of the program and ends the stage with its traceback.
"""

from __future__ import annotations

import hashlib
import math
import traceback
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from sae_research.runtime.errors import NotApplicable, UserError
from sae_research.saes.config import SAEConfig
from sae_research.saes.identity import Unidentified, identity, own_data
from sae_research.saes.reading import check_shapes

OPEN_BYTES = 512 * 2**20
"""SAEs are open together while their weights take no more than this; a family over one dictionary always is."""
ROOM = 3
"""Of an SAE's weights: what encoding with it takes beside (a Gram matrix, activations)."""


@dataclass(frozen=True)
class SAEInfo:
    """What is known of an SAE while it is closed: all that results and cache keys need."""

    cfg: SAEConfig
    options: dict[str, Any]
    per_token: bool
    causal: bool
    signed: bool
    kind: type[SparseAutoencoder]
    family: object
    """Equal for SAEs that share the work of encoding; None for one that shares it with nobody."""
    fingerprint: str
    """Of weights and options."""
    nbytes: int
    """Memory that its tensors take."""


class SparseAutoencoder(nn.Module):
    """Base of every inference form.

    A subclass sets `form`, lists its tensors in `tensor_names` and its scalars in `option_names`, and defines
    `encode`. An SAE of one's own needs no more than

        class MySAE(SparseAutoencoder):
            form = "my_sae"

            def encode(self, x, mask=None):
                return self.keep(torch.relu((x - self.b_dec) @ self.W_enc), mask)

    Where `cfg.hook_out` is another hook than `cfg.hook_name` it is a transcoder: it encodes what it reads, and its
    reconstruction stands for what the model has at the other. Any form may have a linear skip, `W_skip` [d_out, d_in].
    """

    form: ClassVar[str] = ""
    tensor_names: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc", "W_dec", "b_dec")
    option_names: ClassVar[tuple[str, ...]] = ()
    per_token: ClassVar[bool] = True
    """A token's latents depend on that token alone."""
    causal: ClassVar[bool] = True
    """A token's latents depend on no later token."""
    signed: ClassVar[bool] = False
    """Activations may be negative."""

    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None
    """What a transcoder adds to its reconstruction without any latent, [d_out, d_in]: x W_skip^T."""
    if TYPE_CHECKING:  # of the other tensors torch only says "Tensor or Module"

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, cfg: SAEConfig | None = None, **tensors: Tensor) -> None:
        super().__init__()
        missing = [name for name in self.tensor_names if name not in tensors]
        if missing:
            raise UserError(f"{type(self).__name__}: weights lack {', '.join(missing)}")
        for name in self.tensor_names:
            self.register_buffer(name, tensors[name].detach())
        self.register_buffer("W_skip", tensors["W_skip"].detach() if "W_skip" in tensors else None)
        if self.W_dec.dim() != 2:
            raise UserError(f"{self.form}: W_dec has shape {tuple(self.W_dec.shape)}, expected [d_sae, d_in]")
        d_sae, d_in = self.W_dec.shape
        self.cfg = cfg or SAEConfig(form=self.form, d_in=d_in, d_sae=d_sae)
        self._check_shapes()

    # --- what a form defines ---

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Activations of the latents.

        x: [batch, seq, d_in] in the model's own units. mask: [batch, seq], True where a token counts; masked
        tokens get no latents and influence no other token's. Returns [batch, seq, d_sae].
        """
        raise UserError(f"{type(self).__name__} defines no encode")

    def decode(self, z: Tensor) -> Tensor:
        """What the latents stand for, `z W_dec + b_dec`: all of the reconstruction but a skip. z: [batch, seq, d_sae].
        Returns [batch, seq, d_out]."""
        return z @ self.W_dec + self.b_dec

    def reconstruct(self, x: Tensor, mask: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """What stands for the activations at `cfg.hook_out` [batch, seq, d_out]: `decode(z) + x W_skip^T`.

        x, mask: as for `encode`. z: `encode(x, mask)` where the caller has it. Tokens that do not count get a value that
        means nothing.
        """
        decoded = self.decode(self.encode(x, mask) if z is None else z)
        return decoded if self.W_skip is None else decoded + self.read(x) @ self.W_skip.T

    @classmethod
    def encode_family(cls, members: Sequence[Self], x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """Each member's activations, in order. Forms whose members share work override this."""
        for member in members:
            yield member.encode(x, mask)

    def family_key(self) -> object:
        """Members with equal keys share work in `encode_family`; by default nobody does."""
        return id(self)

    # --- what forms share ---

    def encoder_weights(self) -> tuple[Tensor, Tensor]:
        """Encoder directions [d_in, d_sae] and biases [d_sae]; tied to the decoder where a form has none."""
        W_enc = getattr(self, "W_enc", None)
        b_enc = getattr(self, "b_enc", None)
        return (
            self.W_dec.T if W_enc is None else W_enc,
            torch.zeros(self.cfg.d_sae, device=self.W_dec.device) if b_enc is None else b_enc,
        )

    def centred(self, x: Tensor) -> Tensor:
        """x as it is read, less `b_dec` where the SAE was trained so."""
        x = self.read(x)
        return x - self.b_dec if self.cfg.apply_b_dec_to_input else x

    def read(self, x: Tensor) -> Tensor:
        """x in the weights' precision, less its mean over d_in with `center_input`."""
        x = x.to(self.W_dec.dtype)
        return x - x.mean(dim=-1, keepdim=True) if self.cfg.center_input else x

    def target(self, x: Tensor, written: Tensor | None = None) -> Tensor:
        """What the reconstruction is compared with [batch, seq, d_out]. x: activations at `cfg.hook_name`; written: those at
        `cfg.hook_out`, which are x where the two are one. Raises `UserError` for a transcoder without them.

        With `center_input` the mean over d_in is left out: a model with LayerNorm never reads it, so leaving it out when
        patching changes nothing.
        """
        if self.cfg.is_transcoder and written is None:
            raise UserError(f"it reads {self.cfg.hook_name}; what it writes is to be compared with {self.cfg.hook_out}")
        return self.read(x if written is None else written)

    @staticmethod
    def keep(z: Tensor, mask: Tensor | None) -> Tensor:
        """Zero the latents of tokens that do not count."""
        return z if mask is None else z * mask[..., None]

    def tensors(self) -> dict[str, Tensor]:
        """The form's own tensors by name, and the skip where it has one."""
        skip = {} if self.W_skip is None else {"W_skip": self.W_skip}
        return {name: getattr(self, name) for name in self.tensor_names} | skip

    def options(self) -> dict[str, Any]:
        """The form's own scalars by name."""
        return {name: getattr(self, name) for name in self.option_names}

    @classmethod
    def from_tensors(cls, cfg: SAEConfig, tensors: dict[str, Tensor]) -> Self:
        """Rebuild from what `save_sae` wrote: tensors and `cfg.options`."""
        return cls(cfg=cfg, **tensors, **cfg.options)

    @classmethod
    def from_baseline(cls, baseline: SparseAutoencoder) -> Self:
        """An SAE of one's own over the baseline's weights: what setup calls for `comparison_saes.python`."""
        W_enc, b_enc = baseline.encoder_weights()
        have = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": baseline.W_dec, "b_dec": baseline.b_dec}
        missing = [name for name in cls.tensor_names if name not in have]
        if missing:
            raise UserError(f"{cls.__name__} needs {', '.join(missing)}: define a classmethod from_baseline(baseline)")
        skip = {} if baseline.W_skip is None else {"W_skip": baseline.W_skip.clone()}
        return cls(
            cfg=baseline.cfg.replace(form=cls.form, architecture=cls.form, options={}),
            **{name: have[name].clone() for name in cls.tensor_names},
            **skip,
        )

    def weights_fingerprint(self) -> str:
        """SHA-256 over form, options and the bytes of every tensor; over what an object has in place of its class's methods;
        and of a user's own class also over its attributes."""
        digest = hashlib.sha256(
            repr(
                (
                    self.form,
                    sorted(self.options().items()),
                    self.cfg.apply_b_dec_to_input,
                    self.cfg.center_input,
                    *([self.cfg.hook_scales] if self.cfg.is_crosscoder else []),
                )
            ).encode()
        )
        for name, tensor in sorted(self.tensors().items()):
            tensor = tensor.detach().cpu().contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        if not self._is_ours():
            digest.update(self._attributes().encode())
        elif in_place_of := {name: value for name, value in vars(self).items() if hasattr(type(self), name)}:
            digest.update(_identity(in_place_of).encode())
        return digest.hexdigest()

    def info(self) -> SAEInfo:
        """What is to be known of it once it is closed."""
        fingerprint, key = self.weights_fingerprint(), self.family_key()
        return SAEInfo(
            self.cfg,
            self.options(),
            self.per_token,
            self.causal,
            self.signed,
            type(self),
            None if key == id(self) else (type(self), key),
            fingerprint,
            sum(tensor.nbytes for tensor in self.tensors().values()),
        )

    @classmethod
    def _is_ours(cls) -> bool:
        return cls.__module__.startswith("sae_research.")

    def _attributes(self) -> str:
        """What a user's class holds besides its tensors and options: in memory, nothing else tells two objects apart whose
        `threshold` differs."""
        inherited = {"cfg", "_modules", "_buffers", "_parameters"}
        own = {name: value for name, value in vars(self).items() if name not in inherited}
        tensors = {
            name: value
            for name, value in chain(self.named_parameters(), self.named_buffers())
            if name not in self.tensor_names
        }
        return _identity([own, tensors, list(self.named_children()), own_data(self)])

    def _check_shapes(self) -> None:
        self._check_own(self.tensors())

    def _check_own(self, tensors: dict[str, Tensor]) -> None:
        """Shapes by name, and no NaN; a skip only where there is somewhere to go."""
        check_shapes(tensors, self.cfg.d_in, self.cfg.d_sae, self.form, self.cfg.d_out)
        if self.W_skip is not None and not self.cfg.is_transcoder:
            raise UserError(
                f"{self.form}: W_skip from a hook to itself is no dictionary; say which hook it writes (hook_out)"
            )
        self._check_finite(tensors)

    def _check_finite(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not all_finite(tensor.detach()):
                raise UserError(f"{self.form}: {name} holds NaN or infinity; the weights are damaged or diverged")


def _identity(value: Any) -> str:
    """What cannot be looked into is another thing at every call."""
    try:
        return identity(value)
    except Unidentified:
        return uuid.uuid4().hex


def families(saes: Mapping[str, SparseAutoencoder]) -> list[list[str]]:
    """Names grouped so that each group's members share the work of encoding."""
    groups: dict[object, list[str]] = {}
    for name, sae in saes.items():
        groups.setdefault((type(sae), sae.family_key()), []).append(name)
    return list(groups.values())


def all_finite(x: Tensor) -> bool:
    """Whether no number of x is NaN or infinite. A sum tells in a twentieth of the time that a look at each takes; one
    that overflows is worth that look."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


@torch.no_grad()
def encode_each(saes: Mapping[str, SparseAutoencoder], x: Tensor, mask: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """(name, activations [batch, seq, d_sae]) of every SAE on one batch, families together.

    Raises `UserError` when an encoder returns NaN or another shape than its configuration says.
    """
    for names in families(saes):
        members = [saes[name] for name in names]
        # a user's class may change what it is given in place, and the other SAEs read it too
        given = x if members[0]._is_ours() else x.clone()
        for name, z in zip(names, type(members[0]).encode_family(members, given, mask), strict=True):
            expected = (*x.shape[:-1], saes[name].cfg.d_sae)
            if tuple(z.shape) != expected:
                raise UserError(f"SAE {name}: encode returned shape {tuple(z.shape)}, expected {expected}")
            if not all_finite(z):
                raise UserError(f"SAE {name}: encode returned NaN or infinity")
            yield name, z


FAULTS = (UserError, ValueError, ArithmeticError, torch.linalg.LinAlgError, torch.OutOfMemoryError)

Value = TypeVar("Value")
Family = dict[str, SparseAutoencoder]


class Guard:
    """Which SAEs of one evaluation failed. skip: what is told a name and a reason, a stage's `skip` say. Without it failures
    are raised: a caller who lists none wants to see them."""

    def __init__(self, skip: Callable[[str, str], None] | None) -> None:
        self.skip = skip
        self.failed: set[str] = set()

    @contextmanager
    def on(self, name: str) -> Generator[None]:
        """What happens inside concerns this SAE alone. Ends quietly where it fails."""
        try:
            yield
        except NotApplicable:
            raise
        except FAULTS as error:
            self._skip(name, error)

    def each(self, saes: Family, score: Callable[[Family], Iterator[tuple[str, Value]]]) -> Iterator[tuple[str, Value]]:
        """(name, value) of every SAE that can be scored, families together. `score` gets SAEs of one family and yields what
        it finds of each; where it fails on several, what it has not found yet is scored one by one."""
        for names in families(self.left(saes)):
            left = {name: saes[name] for name in names}
            try:
                for name, value in score(dict(left)):
                    del left[name]
                    yield name, value
            except NotApplicable:
                raise
            except FAULTS as error:
                left = self.left(left)
                if len(left) == 1:
                    self._skip(*left, error)
                    continue
                for name, sae in left.items():
                    with self.on(name):
                        yield from score({name: sae})

    def left(self, of: dict[str, Value]) -> dict[str, Value]:
        """Those of SAEs that have not failed."""
        return {name: value for name, value in of.items() if name not in self.failed}

    def _skip(self, name: str, error: BaseException) -> None:
        if self.skip is None:
            raise error
        self.failed.add(name)
        self.skip(name, why(error))


def why(error: BaseException) -> str:
    """A failure in one line; of what was not meant for users also its kind and the function it arose in."""
    if isinstance(error, UserError):
        return _one_line(error, 500)
    if isinstance(error, ValueError) and "JSON compliant" in str(error):
        return "one of its values is NaN or infinite"
    where = traceback.extract_tb(error.__traceback__)[-1].name
    return f"{type(error).__name__} in {where}: {_one_line(error, 200)}"


def check_finite(values: Any, where: str = "") -> None:
    """Raises `UserError` that names the first value, inside dicts and lists, that is NaN or infinite."""
    if isinstance(values, float) and not math.isfinite(values):
        raise UserError(f"{where or 'a value'} is NaN or infinite")
    for key, value in values.items() if isinstance(values, dict) else ():
        check_finite(value, f"{where}, {key}" if where else str(key))
    for value in values if isinstance(values, list) else ():
        check_finite(value, where)


def _one_line(error: BaseException, limit: int) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
