"""What an SAE was made for, where it reads and writes, and how it is to be fed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sae_research.config.recipes import PLUS
from sae_research.runtime.errors import UserError


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE was made for and how it is to be fed.

    A *crosscoder* reads and writes several hooks of one model: `hook_name` is their names joined by `PLUS`, its activations
    those of the hooks side by side, in that order, so that d_in is the sum of their (equal) widths.

    A *cross-layer transcoder* (`saes.cross_layer`) reads several hooks so, and writes one for each: `hook_out` is joined
    likewise.
    """

    form: str
    """Inference form: a key of `sae_research.saes.registry`."""
    d_in: int
    d_sae: int
    model_name: str = ""
    hook_name: str = ""
    dtype: str = "float32"
    context_size: int = 128
    prepend_bos: bool = True
    apply_b_dec_to_input: bool = True
    """Subtract `b_dec` before encoding."""
    center_input: bool = False
    """Trained on a residual stream whose mean over d_in was removed (TransformerLens'
    `center_writing_weights`)."""
    options: dict[str, Any] = field(default_factory=dict)
    """The form's own scalars: k, s, ..."""
    architecture: str = ""
    """Group in tables and plots; the form where empty."""
    role: str = "comparison"
    """baseline, variant, comparison or control."""
    base: str | None = None
    """Name of the SAE whose dictionary this one reads, if it has none of its own."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the weights come from, in words and hashes."""
    hook_out: str = ""
    """The hook that its reconstruction stands for; `hook_name`, which it reads, where empty."""
    d_out: int = 0
    """Width at `hook_out`; `d_in` where 0."""
    hook_scales: tuple[float, ...] = ()
    """Of a crosscoder: the factor by which each hook's activations were normalised in training. Norms of its decoders are
    compared in those units (`saes.crosscoders`)."""

    def __post_init__(self) -> None:
        for name, value in (("architecture", self.form), ("hook_out", self.hook_name), ("d_out", self.d_in)):
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        if self.is_cross_layer:
            self._check_cross_layer()
        self._check_crosscoder()
        if not self.is_transcoder:
            if self.d_out != self.d_in:
                raise UserError(f"d_in is {self.d_in} and d_out {self.d_out}, but no hook_out says where it writes")
            return
        if not self.hook_name:
            raise UserError(f"it writes {self.hook_out} and does not say which hook it reads (hook_name)")
        if self.apply_b_dec_to_input or self.center_input:
            named = "apply_b_dec_to_input" if self.apply_b_dec_to_input else "center_input"
            raise UserError(
                f"{named} must be false where a dictionary reads {self.hook_name} and writes {self.hook_out}: what belongs "
                "to the one does not belong to the other"
            )

    def _check_crosscoder(self) -> None:
        if not self.is_crosscoder:
            if self.hook_scales:
                raise UserError(
                    f"hook_scales belong to a crosscoder, which reads several hooks; this reads {self.hook_name}"
                )
            return
        names = self.hook_names
        if len(set(names)) < len(names) or not all(names):
            raise UserError(f"a crosscoder's hooks must be named, each once: {self.hook_name}")
        if self.d_in % len(names):
            raise UserError(f"{self.d_in} dimensions do not divide into those of {len(names)} hooks ({self.hook_name})")
        if self.center_input:
            raise UserError(f"center_input must be false for a crosscoder ({self.hook_name}): each hook has its own mean")
        if len(self.hook_scales) != len(names) or not all(0 < scale < float("inf") for scale in self.hook_scales):
            raise UserError(f"a crosscoder of {len(names)} hooks needs as many positive hook_scales")

    def _check_cross_layer(self) -> None:
        """Hooks of one width each, in the order of their layers: of a whole one a written hook for each that is read; of one
        layer of it (`part`) that layer's own and later ones."""
        read, written = ([layer_of(hook) for hook in hooks] for hooks in (self.hook_names, self.hooks_out))
        if len(written) == 1 and len(read) > 1:
            raise UserError(
                f"a crosscoder writes the hooks that it reads ({self.hook_name}), not {self.hook_out}; a cross-layer "
                "transcoder writes one for each that it reads"
            )
        if any(later <= earlier for layers in (read, written) for earlier, later in pairwise(layers)):
            raise UserError(
                f"a cross-layer transcoder's hooks stand in the order of their layers, one a layer: {self.hooks}"
            )
        if self.is_part and (len(read) > 1 or written[0] != read[0]):
            raise UserError(f"one layer of a cross-layer transcoder writes its own layer and later ones: {self.hooks}")
        if not self.is_part and read != written:
            raise UserError(f"a cross-layer transcoder writes one hook in every layer that it reads: {self.hooks}")
        for key, size, hooks in (("d_in", self.d_in, read), ("d_sae", self.d_sae, read), ("d_out", self.d_out, written)):
            if size % len(hooks):
                raise UserError(f"{key} = {size} does not divide into equal parts of {len(hooks)} layers ({self.hooks})")

    @property
    def hook_names(self) -> tuple[str, ...]:
        """What it reads: several hooks of a crosscoder or cross-layer transcoder, one of anything else."""
        return tuple(self.hook_name.split(PLUS))

    @property
    def hooks_out(self) -> tuple[str, ...]:
        """What its reconstruction stands for: several hooks of a crosscoder or cross-layer transcoder, one of anything
        else."""
        return tuple(self.hook_out.split(PLUS))

    @property
    def is_crosscoder(self) -> bool:
        """Whether it reads and writes several hooks, the same ones."""
        return PLUS in self.hook_name and not self.is_transcoder

    @property
    def is_cross_layer(self) -> bool:
        """Whether it is a transcoder of several layers' MLPs, or one layer of such a one."""
        return self.is_transcoder and (PLUS in self.hook_name or PLUS in self.hook_out or self.is_part)

    @property
    def is_part(self) -> bool:
        """Whether it is one layer of a cross-layer transcoder, without the others."""
        return bool(self.options.get("part", False))

    @property
    def sources(self) -> tuple[int, ...]:
        """Of a cross-layer transcoder, for each written hook how many of those that it reads write it: the ones of no later
        layer."""
        if not self.is_cross_layer:
            return (1,)
        read = [layer_of(hook) for hook in self.hook_names]
        return tuple(sum(layer <= layer_of(hook) for layer in read) for hook in self.hooks_out)

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes elsewhere than it reads."""
        return self.hook_out != self.hook_name

    @property
    def kind(self) -> str:
        """What it is called."""
        if self.is_part:
            return "cross-layer transcoder's layer"
        if self.is_cross_layer:
            return "cross-layer transcoder"
        return "crosscoder" if self.is_crosscoder else "transcoder" if self.is_transcoder else "SAE"

    @property
    def hooks(self) -> str:
        """Where it reads and writes, as tables name it."""
        return f"{self.hook_name} -> {self.hook_out}" if self.is_transcoder else self.hook_name

    @property
    def in_stream(self) -> bool:
        """Whether its decoder rows lie in the residual stream's space."""
        return not self.hook_out.endswith(("hook_z", ".hook_in", ".hook_normalized"))

    def check_one_hook(self, what: str) -> None:
        """Raises `UserError` for a transcoder or crosscoder. what: that takes none, at the start of a sentence."""
        if self.is_crosscoder or self.is_cross_layer:
            raise UserError(f"{what} takes SAEs, which read and write one hook; a {self.kind} has several ({self.hooks})")
        if self.is_transcoder:
            raise UserError(f"{what} edits the activations that an SAE reads; a transcoder ({self.hooks}) writes others")

    def replace(self, **changes: Any) -> SAEConfig:
        """A copy with changes. What reads and writes one hook goes on doing so where only `hook_name` or `d_in` changes."""
        if not self.is_transcoder:
            changes = {"hook_out": "", "d_out": 0} | changes
        return dataclasses.replace(self, **changes)

    @property
    def hook_layer(self) -> int:
        """Layer number inside `hook_name`, of several hooks the first one's. Raises `UserError` if it names none."""
        return layer_of(self.hook_name)


def layer_of(hook: str) -> int:
    """The layer that a hook's name begins with. Raises `UserError` if it names none."""
    digits = [part for part in hook.split(".") if part.isdigit()]
    if not digits:
        raise UserError(f"hook {hook!r} names no layer; expected e.g. blocks.8.hook_resid_post")
    return int(digits[0])
