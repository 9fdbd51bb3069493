"""What the section `transfer` of `params.yaml` may say: a base model, a finetuned one, and an SAE of the base model."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sae_research.config.recipes import BatchTopKRecipe, SAERecipe, StandardNewRecipe
from sae_research.config.section import (
    Above0,
    Above1,
    Count,
    FromOneSource,
    Interval,
    LocalName,
    Name,
    NonNegative,
    Positive,
    Section,
    Tokens,
    Width,
)

Control = Literal["self", "perturbed"]


class TransferSAE(FromOneSource):
    """An SAE by where it comes from; keys of sources not chosen are null."""

    NEEDS: ClassVar = {"prepared": (), "sae_lens": ("release", "sae_id"), "folder": ("path",)}
    may_be_left_out: ClassVar = frozenset({"source", "name", "release", "sae_id", "path"})

    source: Literal["prepared", "sae_lens", "folder"] = "prepared"
    """`prepared`: a folder of downloaded_saes/; `sae_lens`: a release and id; `folder`: a path."""
    name: Name = "standard"
    """Its folder's name in downloaded_saes/, where `source` is prepared."""
    release: Name | None = None
    """Release of SAELens' directory, e.g. gpt2-small-res-jb; null unless `source` is sae_lens."""
    sae_id: Name | None = None
    """Its id there, e.g. blocks.8.hook_resid_pre; null unless `source` is sae_lens."""
    path: LocalName | None = None
    """A local SAE folder; null unless `source` is folder."""


class OwnFinetune(Section):
    """How the stage finetunes the base model where `finetuned_model` is null."""

    source: Name | None = "code"
    """One source of the text (packaged: `sae_research/text/corpus.py` lists them); null takes all."""
    steps: Positive = 20
    """Optimiser steps."""
    batch_size: Positive = 4
    """Contexts per optimiser step."""
    learning_rate: Above0 = 3.0e-4
    """Of Adam; it rises linearly over the first steps."""
    moved_tokens: Positive = 1024
    """Tokens on which it is measured how far outputs moved."""


class Outliers(Section):
    """Which activations are outliers: those above a norm, told by one of three rules. The base model's limit holds for both
    models, as in the published comparison."""

    rule: Literal["median", "relative", "absolute", "none"] = "median"
    """median, relative (to the mean), absolute (a norm) or none."""
    median_multiple: Above1 = 3.0
    """Times the base model's median norm. The mean of `relative` is raised by the very outliers it should find."""
    relative_multiple: Above1 = 2.0
    """Times the base model's mean norm, where `config_file` holds none of the model's own."""
    absolute_threshold: Above0 | None = None
    """A norm; null takes the model's from `config_file`."""
    config_file: LocalName = "outlier_cfg.json"
    """Known models' scales, multiples and thresholds."""
    listed: Count = 40
    """Outlier tokens written down, those of largest norm."""


class Sampling(Section):
    """The samples of latents of the published comparison."""

    dense: Positive = 1000
    """Of latents whose density lies in an interval of `intervals` in both models."""
    intervals: Annotated[list[Interval], Field(min_length=1)] | None = None
    """From low to high, each with a sample of its own; null: one, 1e-5 to 0.1, as published. [[1e-5, 1e-3], [1e-3, 0.1]] are
    two. Both ends belong to an interval, but for an end where the next one begins."""
    dead: Positive = 100
    """Of latents dead in one model alone."""

    @model_validator(mode="after")
    def _in_order(self) -> Sampling:
        ends = [end for interval in self.intervals or [] for end in interval]
        if ends != sorted(ends) or any(low >= high for low, high in self.intervals or []):
            raise ValueError(f"intervals: from low to high, none over another: {self.intervals}")
        if ends and not (0 < ends[0] and ends[-1] <= 1):
            raise ValueError(f"intervals: densities lie above 0 and reach to 1: {self.intervals}")
        return self

    @property
    def dense_intervals(self) -> dict[str, tuple[float, float]]:
        """Densities of the samples of dense latents, by the sample's name: `dense` where there is one."""
        chosen = self.intervals or [(1e-5, 0.1)]
        if len(chosen) == 1:
            return {"dense": chosen[0]}
        return {f"dense_{low:g}_to_{high:g}": (low, high) for low, high in chosen}


class Repair(Section):
    """A short finetune of the base SAE on the other model's activations."""

    enabled: bool = True
    """Whether the base SAE is trained further."""
    tokens: Tokens = 16_384
    """Read by the finetuned model, and as many by the base model, as a control. From text that SAEs are trained on."""
    held_out_tokens: Positive = 4096
    """Held-out tokens on which it is measured after every batch of text."""
    batch_size: Positive = 256
    """Activations per optimiser step."""
    learning_rate: Above0 = 3.0e-4
    """Of Adam."""


class PairCrosscoder(Section):
    """A crosscoder of both models at the SAE's hook."""

    recipe: Literal["batch_top_k", "standard_new"] = "batch_top_k"
    """batch_top_k takes `k`, standard_new (L1) `l1_coefficient`; the schedules are those of `train`."""
    d_sae: Width = 2304
    """Latents."""
    k: Positive | None = None
    """Active latents a token."""
    l1_coefficient: NonNegative | None = None
    """Weight of an activation times the sum of its decoders' norms in both models."""
    learning_rate: Above0 = 3.0e-3
    """Of Adam."""
    tokens: Tokens = 131_072
    """Read by both models, of text that SAEs are trained on."""
    batch_size: Positive = 512
    """Tokens per optimiser step, each with both models' activations."""
    held_out_tokens: Positive = 16_384
    """For variance explained and latent scaling."""
    checked: Positive = 8
    """Latents of each kind that are ablated."""
    checked_tokens: Positive = 1024
    """Of the text that they are ablated on."""

    @model_validator(mode="after")
    def _one_sparsity(self) -> PairCrosscoder:
        needed, other = ("k", "l1_coefficient") if self.recipe == "batch_top_k" else ("l1_coefficient", "k")
        if getattr(self, needed) is None or getattr(self, other) is not None:
            raise ValueError(f"{self.recipe} needs {needed} and takes no {other}")
        if self.k is not None and self.k > self.d_sae:
            raise ValueError(f"k = {self.k} exceeds d_sae = {self.d_sae}")
        if self.batch_size > self.tokens:
            raise ValueError(f"batch_size {self.batch_size:,} exceeds tokens {self.tokens:,}: not one step could be taken")
        return self

    def training_recipe(self, names: list[str]) -> SAERecipe:
        """As the train stage has it. names: of the two sides."""
        shared = {"d_sae": self.d_sae, "learning_rate": self.learning_rate, "hook_names": names}
        if self.recipe == "batch_top_k":
            return BatchTopKRecipe.model_validate({**shared, "recipe": "batch_top_k", "k": self.k})
        return StandardNewRecipe.model_validate({**shared, "recipe": "standard_new", "l1_coefficient": self.l1_coefficient})


class SeparateSAEs(Section):
    """Latents of the base model's SAE matched with those of the finetuned model's."""

    tokens: Positive = 16_384
    """Held-out ones, on which activations are correlated."""
    checked: Positive = 8
    """Latents of each kind that are ablated."""
    checked_tokens: Positive = 1024
    """Of the text that they are ablated on."""


class Controls(Section):
    """Pairs whose difference is known."""

    names: list[Control] = ["self", "perturbed"]
    """self, or perturbed with noise on every weight up to the hook. Each is the base model against itself."""
    tokens: Tokens = 4096
    """Read for the statistics of each control."""
    patched_tokens: Positive = 512
    """Read for each control's losses with the reconstruction in place."""
    noise: Above0 = 0.5
    """Of `perturbed`: standard deviation over that of the tensor's own weights."""


class Transfer(Section):
    """A base model's SAE on a finetuned model (docs/transfer.md)."""

    base_model: LocalName | None = None
    """null takes `model.name`."""
    finetuned_model: LocalName | None = None
    """A hub name or local folder; null finetunes the base model here (`own_finetune`)."""
    tokenizer: LocalName | None = None
    """The base model's, by hub name or folder; null takes the one beside its weights."""
    tokenize: Literal["auto", "base", "own"] = "auto"
    """base: its ids for both; own: each model its own; auto: base where they agree. With `own`, tokens are matched by their
    place in the text."""
    sae: TransferSAE = TransferSAE()
    finetuned_sae: TransferSAE | None = None
    """The finetuned model's own, as `sae`, for the reverse direction."""
    hooks: list[Name] = ["blocks.2.hook_resid_post", "blocks.5.hook_resid_post"]
    """Where activations are compared besides the SAE's own hook; deeper ones cost a longer pass."""
    dataset: LocalName | None = None
    """As text.dataset; null takes the text the SAE was trained on where it is known. Else `text.dataset`."""
    column_name: Name = "text"
    """Column that holds the text."""
    context_size: Annotated[Positive, Field(ge=8)] | None = None
    """null takes the SAE's own."""
    tokens: Tokens = 131_072
    """For all statistics."""
    patched_tokens: Positive = 16_384
    """For losses with the reconstruction in place."""
    ablate_every: Positive = 4
    """One context out of this many for zero- and mean-ablation. They are what loss recovered is scaled by."""
    batch_size: Positive = 16
    """Contexts per pass."""
    patched_batch_size: Positive = 8
    """Contexts per pass for losses and ablations."""
    outliers: Outliers = Outliers()
    own_finetune: OwnFinetune = OwnFinetune()
    controls: Controls = Controls()
    sampling: Sampling = Sampling()
    repair: Repair = Repair()
    crosscoder: PairCrosscoder | None = None
    """A crosscoder of both models at the SAE's hook; null trains none."""
    separate: SeparateSAEs | None = None
    """Matches latents of `sae` with those of the finetuned model's SAE; null does not, {} does. That SAE is
    `finetuned_sae`, or `sae` as `repair` trains it on."""
