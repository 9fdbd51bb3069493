"""The sections `train` and `tracking` of `params.yaml`: settings of the run that trains all SAEs, and where curves go.

Everything that literature gives in steps is a fraction of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sae_research.config.recipes import ARROW, PLUS, StandardRecipe, TopKRecipe, TrainedSAE, hooks_at
from sae_research.config.section import (
    Above0,
    Count,
    Fraction,
    Name,
    Positive,
    Section,
    Slug,
    Tokens,
    Whole,
)


class Tracking(Section):
    """Training curves to Weights & Biases too. It changes nothing about the SAEs: the train stage does not run again for
    it."""

    project: Name | None = None
    """null tracks nothing there. The key comes from WANDB_API_KEY, in the environment or `.env`."""
    entity: Name | None = None
    """User or team; null takes WANDB_ENTITY, else the key's own."""
    tags: list[Name] = []
    """Words that a run carries in the tracking service, to find it by."""
    name: Name = "{sae}"
    """Of a run: {sae}, {recipe}, {model}, {hook}, {seed}, {tokens}, or any parameter of the SAE. Such as {learning_rate},
    {d_sae} or {k}; empty where its recipe has none. One run for each SAE."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to wandb/ only; `wandb sync` sends it later. WANDB_MODE has the last word."""
    log_every: Positive | None = None
    """Optimiser steps between rows; null: the 60 rows of a training curve. SAEs of other ranks have those in any case."""
    histogram_every: Positive | None = None
    """Steps between histograms of latents by how often they fire; null: none. By the decimal logarithm of the fraction of
    some thousand buffered tokens; the last one is of held-out tokens."""
    checkpoints: bool = False
    """Whether the SAEs of `train.saved_checkpoints`, and the trained ones, go there as artifacts."""


FLOAT_BYTES = 4
STATE_COPIES = 3
"""A checkpoint holds every parameter and its two moments."""
SHARED = {
    "batch_size",
    "accumulation_steps",
    "buffer_tokens",
    "precision",
    "llm_dtype",
    "warmup_fraction",
    "sparsity_warmup_fraction",
    "decay_fraction",
    "dead_fraction",
}
"""Settings of a run that shape every SAE in it."""


class Train(Section):
    """SAEs of our own: what each is, and the run that trains all of them."""

    enabled: bool = True
    """Whether the pipeline trains SAEs of its own; a baseline from elsewhere needs none."""
    hook_name: Name = "blocks.8.hook_resid_post"
    """Where SAEs are trained that name no hook of their own."""
    tokens: Tokens = 160_000
    """Tokens of text that the language model reads; those that count are trained on."""
    batch_size: Positive = 512
    """Activations per optimiser step."""
    accumulation_steps: Positive = 1
    """Parts that a step's batch goes through in, to save memory. Their gradients add up. What a recipe takes over a batch
    (BatchTopK's limit, JumpReLU's L0, the auxiliary loss's variance) it takes over a part."""
    buffer_tokens: Positive = 65_536
    """Activations held and shuffled at a time, for each hook."""
    llm_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the language model's pass."""
    held_out_tokens: Positive = 8_192
    """Tokens of other documents on which the SAEs are measured."""
    evaluate_tokens: Count = 1_024
    """Held-out tokens that loss recovered is measured on; 0 leaves it out."""
    learning_rate: Above0 | None = 3.0e-3
    """Of every SAE that gives none of its own; null: its recipe's default."""
    warmup_fraction: Fraction = 0.05
    """The learning rate rises linearly over this fraction of the run ..."""
    sparsity_warmup_fraction: Fraction = 0.1
    """Sparsity penalties rise linearly over this fraction of the run."""
    decay_fraction: Fraction = 0.3
    """... and falls linearly to 0 over this last fraction."""
    dead_fraction: Fraction = 0.05
    """A latent silent for this fraction of the run is dead (auxiliary loss of the TopK family)."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] | None = None
    """Of SAEs and shuffled activations; null: the model's."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of dense products, where the processor has it; parameters and losses stay float32."""
    checkpoint_seconds: Above0 | None = 60.0
    """Time between checkpoints in .cache/train, from which an interrupted run goes on. null: none by time."""
    checkpoint_steps: Positive | None = None
    """The same in optimiser steps."""
    saved_checkpoints: Annotated[Whole, Field(ge=0, le=20)] = 0
    """SAEs kept of log-spaced moments, in trained_saes/<name>/checkpoints/step_N. The first step's start, then fractions of
    the run half a decade apart that end at 10^-0.5 (7: 0, 0.1 %, 0.3 %, 1 %, 3 %, 10 % and 32 %)."""
    saes: dict[Slug, TrainedSAE] = {
        "standard": StandardRecipe(recipe="standard", d_sae=2304, learning_rate=4.0e-3, l1_coefficient=0.06),
        "topk": TopKRecipe(recipe="top_k", d_sae=2304, k=32, inference="top_k"),
    }
    """By name; a copy of an entry with `seed: 1` is another training seed of its recipe."""

    @model_validator(mode="before")
    @classmethod
    def _share_learning_rate(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        defaults = {key: field.default for key, field in cls.model_fields.items()}
        rate, saes = (values.get(key, defaults[key]) for key in ("learning_rate", "saes"))
        if rate is None or not isinstance(saes, dict):
            return values
        given = {name: sae.model_dump(exclude_unset=True) if isinstance(sae, Section) else sae for name, sae in saes.items()}
        return {
            **values,
            "saes": {name: {"learning_rate": rate} | sae if isinstance(sae, dict) else sae for name, sae in given.items()},
        }

    @model_validator(mode="after")
    def _sound(self) -> Train:
        if self.enabled and self.batch_size > self.tokens:
            raise ValueError(f"batch_size {self.batch_size:,} exceeds tokens {self.tokens:,}: not one step could be taken")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into accumulation_steps {self.accumulation_steps} equal parts"
            )
        return self

    def hook_of(self, name: str) -> str:
        """The hook that an SAE of `saes` reads; of several all of them, `A + B`."""
        sae = self.saes[name]
        return PLUS.join(sae.hook_names) if sae.hook_names else sae.hook_name or self.hook_name

    def width_of(self, name: str, widths: Mapping[str, int]) -> int:
        """Dimensions that an SAE of `saes` reads. widths: by hook."""
        return sum(widths[hook] for hook in self.hook_of(name).split(PLUS))

    def place_of(self, name: str) -> str:
        """The hook that an SAE reads, `READ -> WRITTEN` of a transcoder, `A + B` of a crosscoder, `A + B -> C + D` of a
        cross-layer transcoder: SAEs of one place get the same batches."""
        written = self.saes[name].written
        return self.hook_of(name) if written is None else f"{self.hook_of(name)}{ARROW}{written}"

    @property
    def places(self) -> list[str]:
        """Every place, in order of first use."""
        return list(dict.fromkeys(self.place_of(name) for name in self.saes))

    @property
    def hooks(self) -> list[str]:
        """Every hook that an SAE reads or writes, in order of first use."""
        return list(dict.fromkeys(hook for place in self.places for hook in hooks_at(place)))

    def hyper_parameters(self, name: str) -> dict[str, Any]:
        """What shaped one SAE's training: its own settings, and those of the run that all SAEs share."""
        return {
            **self.saes[name].model_dump(
                exclude={"recipe", "seed", "hook_name", "hook_out", "hook_names", "hook_outs"}, exclude_none=True
            ),
            **self.model_dump(include=SHARED),
        }

    def weight_bytes(self, widths: Mapping[str, int]) -> int:
        """Of all SAEs. widths: by hook."""
        return sum(sae.n_weights(self.width_of(name, widths)) * FLOAT_BYTES for name, sae in self.saes.items())

    def output_bytes(self, widths: Mapping[str, int]) -> int:
        """In `trained_saes/`, with the checkpoints that are kept there."""
        return self.weight_bytes(widths) * (1 + self.saved_checkpoints)

    def checkpoint_bytes(self, widths: Mapping[str, int], itemsize: int) -> int:
        """In `.cache/train`, until the run ends. itemsize: bytes of an activation."""
        rows = max(self.buffer_tokens, 2 * self.batch_size)
        return (
            STATE_COPIES * self.weight_bytes(widths)
            + sum(2 * self.width_of(name, widths) ** 2 * FLOAT_BYTES for name, sae in self.saes.items() if sae.whiten)
            + sum(widths[hook] for place in self.places for hook in hooks_at(place)) * rows * itemsize
        )
