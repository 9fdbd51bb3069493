"""What the section `transfer` of `params.yaml` may say: a base model, a finetuned one, and an SAE of the base model."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sae_research.config.section import (
    Above0,
    Above1,
    Count,
    Fraction,
    FromOneSource,
    Interval,
    LocalName,
    Name,
    Positive,
    Real,
    Section,
    Tokens,
)

Control = Literal["self", "perturbed"]


class TransferSAE(FromOneSource):
    """An SAE by where it comes from."""

    NEEDS: ClassVar = {"prepared": (), "sae_lens": ("release", "sae_id"), "folder": ("path",)}
    may_be_left_out: ClassVar = frozenset({"source", "name", "release", "sae_id", "path"})

    source: Literal["prepared", "sae_lens", "folder"] = "prepared"
    """`prepared`: a folder of downloaded_saes/; `sae_lens`: a release and id; `folder`: a path."""
    name: Name = "standard"
    release: Name | None = None
    sae_id: Name | None = None
    path: LocalName | None = None


class OwnFinetune(Section):
    """How the stage finetunes the base model where `finetuned_model` is null."""

    source: Name | None = "code"
    """One source of the text (packaged: `sae_research/text/corpus.py` lists them); null takes all."""
    steps: Positive = 20
    batch_size: Positive = 4
    """Contexts per optimiser step."""
    learning_rate: Above0 = 3.0e-4
    train_layers: Positive | None = None
    """Layers from the first on that are trained; null trains those up to the SAE's hook."""
    moved_tokens: Positive = 1024
    """Tokens on which it is measured how far outputs moved."""


class Outliers(Section):
    """Which activations are outliers: those above a norm, told by one of three rules. The base model's limit holds for both
    models, as in the published comparison."""

    rule: Literal["median", "relative", "absolute", "none"] = "median"
    median_multiple: Above1 = 3.0
    """Times the base model's median norm: the mean of `relative` is raised by the very outliers it should find."""
    relative_multiple: Above1 = 2.0
    """Times the base model's mean norm, where `config_file` holds none of the model's own."""
    absolute_threshold: Above0 | None = None
    """A norm; null takes the model's from `config_file`."""
    config_file: LocalName = "outlier_cfg.json"
    """Known models' scales, multiples and thresholds."""
    listed: Count = 40
    """Outlier tokens written down, those of largest norm."""


class Sampling(Section):
    """The published comparison's samples of latents, by intervals of density."""

    dense: Positive = 1000
    dead: Positive = 100
    dense_interval: Interval = (-5.0, -1.0)
    """log10 of the density in both models."""
    dead_below: Real = -8.0
    """log10 of the density."""

    @model_validator(mode="after")
    def _ordered(self) -> Sampling:
        if not self.dense_interval[0] < self.dense_interval[1]:
            raise ValueError(f"dense_interval: {list(self.dense_interval)} holds no density; write the lower bound first")
        return self


class Repair(Section):
    """A short finetune of the base SAE on the other model's activations."""

    enabled: bool = True
    tokens: Tokens = 16_384
    """Read by the finetuned model, from text that SAEs are trained on; the same number by the base model, as a control."""
    held_out_tokens: Positive = 4096
    batch_size: Positive = 256
    learning_rate: Above0 = 3.0e-4


class Controls(Section):
    names: list[Control] = ["self", "perturbed"]
    """`self`: the base model against itself; `perturbed`: against itself with noise on every weight up to the hook."""
    tokens: Tokens = 4096
    patched_tokens: Positive = 512
    noise: Above0 = 0.5
    """Standard deviation of the noise over that of the tensor's own weights."""


class Transfer(Section):
    base_model: LocalName | None = None
    """null takes `model.name`."""
    finetuned_model: LocalName | None = None
    """A hub name or local folder; null finetunes the base model here (`own_finetune`)."""
    tokenizer: LocalName | None = None
    """The base model's, by hub name or folder; null takes the one beside its weights."""
    tokenize: Literal["auto", "base", "own"] = "auto"
    """`base`: the base tokenizer's ids for both models; `own`: each model its own tokenizer, tokens matched by their
    place in the text; `auto`: `base` where the tokenizers agree."""
    min_usable_fraction: Fraction = 0.9
    """Of tokens that mean the same in both vocabularies; with fewer, one tokenizer for both makes no sense."""
    min_aligned_fraction: Fraction = 0.05
    """With `own`: stop when fewer tokens than this stand in the same place in both."""
    sae: TransferSAE = TransferSAE()
    finetuned_sae: TransferSAE | None = None
    """The finetuned model's own, for the reverse direction."""
    hooks: list[Name] = ["blocks.2.hook_resid_post", "blocks.5.hook_resid_post"]
    """Where activations are compared besides the SAE's own hook; deeper ones cost a longer pass."""
    dataset: LocalName | None = None
    """As `text.dataset`; null takes the text the SAE was trained on where it is known, else `text.dataset`."""
    column_name: Name = "text"
    context_size: Annotated[Positive, Field(ge=8)] | None = None
    """null takes the SAE's own."""
    tokens: Tokens = 131_072
    """For all statistics."""
    patched_tokens: Positive = 16_384
    """For losses with the reconstruction in place."""
    ablate_every: Positive = 4
    """Zero- and mean-ablation, which loss recovered is scaled by, run on one context out of this many."""
    batch_size: Positive = 16
    """Contexts per pass."""
    patched_batch_size: Positive = 8
    outliers: Outliers = Outliers()
    own_finetune: OwnFinetune = OwnFinetune()
    controls: Controls = Controls()
    sampling: Sampling = Sampling()
    repair: Repair = Repair()
