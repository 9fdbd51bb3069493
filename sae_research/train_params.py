"""What the section `train` of `params.yaml` may say; its SAEs, recipe by recipe, stand in `recipe_params.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sae_research.recipe_params import StandardRecipe, TopKRecipe, TrainedSAE
from sae_research.section import Above0, Count, Fraction, Name, Positive, Section, Slug, Tokens, Whole


class Train(Section):
    enabled: bool = True
    """Whether the pipeline trains SAEs of its own; a baseline from elsewhere needs none."""
    hook_name: Name = "blocks.8.hook_resid_post"
    tokens: Tokens = 240_000
    """Tokens of text that the language model reads; those that count are trained on."""
    batch_size: Positive = 512
    """Activations per optimiser step."""
    accumulation_steps: Positive = 1
    """A step's batch goes through in this many equal parts whose gradients add up: the same step in less memory. What
    a recipe takes over a batch (BatchTopK's limit, JumpReLU's L0, the auxiliary loss's variance) it takes over a part."""
    buffer_tokens: Positive = 65_536
    """Activations held and shuffled at a time, for each hook."""
    llm_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    held_out_tokens: Positive = 8_192
    evaluate_tokens: Count = 1_024
    """Held-out tokens on which predictions are compared with the reconstruction in place; 0 leaves that out."""
    learning_rate: Above0 | None = 3.0e-3
    """Of every SAE that gives none of its own; null: its recipe's default."""
    warmup_fraction: Fraction = 0.05
    sparsity_warmup_fraction: Fraction = 0.1
    decay_fraction: Fraction = 0.3
    dead_fraction: Fraction = 0.05
    """A latent silent for this fraction of the run counts as dead (auxiliary loss of the TopK family)."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] | None = None
    """Where SAEs and the shuffled activations live; null: where the language model is (`model.device`)."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of matrix products; parameters, moments and losses stay float32."""
    stack: Literal["auto", "always", "never"] = "auto"
    """SAEs of one hook, recipe and width step together, in batched products; auto: on CUDA, where single ones leave the
    device waiting."""
    checkpoint_seconds: Above0 | None = 60.0
    """Time between checkpoints under .cache/train/, from which an interrupted run goes on; null: none by time."""
    checkpoint_steps: Positive | None = None
    """The same in optimiser steps."""
    saved_checkpoints: Annotated[Whole, Field(ge=0, le=20)] = 0
    """SAEs of this many moments are kept beside the finished one, in checkpoints/step_N/: the first step's start, then
    fractions of the run half a decade apart that end at 10^-0.5 (7: 0, 0.1 %, 0.3 %, 1 %, 3 %, 10 % and 32 %)."""
    saes: dict[Slug, TrainedSAE] = {
        "standard": StandardRecipe(recipe="standard", d_sae=2304, learning_rate=4.0e-3, l1_coefficient=0.06),
        "topk": TopKRecipe(recipe="top_k", d_sae=2304, k=32, inference="top_k")}

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
        return {**values, "saes": {name: {"learning_rate": rate} | sae if isinstance(sae, dict) else sae
                                   for name, sae in given.items()}}

    @model_validator(mode="after")
    def _sound(self) -> Train:
        if self.enabled and self.batch_size > self.tokens:
            raise ValueError(f"batch_size {self.batch_size:,} exceeds tokens {self.tokens:,}: not one step could be taken")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(f"batch_size {self.batch_size} does not divide into accumulation_steps "
                             f"{self.accumulation_steps} equal parts")
        return self

    def hook_of(self, name: str) -> str:
        """The hook that an SAE of `saes` is trained at."""
        return self.saes[name].hook_name or self.hook_name

    @property
    def hooks(self) -> list[str]:
        """Every hook an SAE is trained at, in order of first use."""
        return list(dict.fromkeys(self.hook_of(name) for name in self.saes))
