"""What one SAE of `train.saes` may say, recipe by recipe. Defaults hold for activations of unit mean square norm.

Everything that literature gives in steps is a fraction of the run here.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from sae_research.section import Above0, Fraction, Interval, Name, NonNegative, Positive, Section, Seed, Width


class SAERecipe(Section):
    """What every recipe has."""

    recipe: Name
    d_sae: Width
    hook_name: Name | None = None
    """Where in the model; null takes `train.hook_name`. All hooks of a run are read in one pass."""
    learning_rate: Above0 = 3.0e-3
    """Adam's at its height: some ten times the literature's, because a run of minutes has some hundred steps."""
    init: Literal["data_rows", "random"] = "data_rows"
    """Decoder rows at the start: activations less their mean, or random directions."""
    seed: Seed | None = None
    """Null takes `random_seed`. Entries that differ in name and seed alone are one recipe, and the report gives their
    mean and spread; the text and its order are the run's."""


class L1Recipe(SAERecipe):
    """Recipes whose penalty grows with activations: dead latents are resampled, if at all."""

    l1_coefficient: NonNegative
    resample_every: Fraction = 0.0
    """Resample dead latents each time this fraction of the run has passed, in its first half; 0 never does."""
    resample_window: Fraction = 0.1
    """A latent is dead for resampling when it was silent for this fraction of the run."""


class StandardRecipe(L1Recipe):
    recipe: Literal["standard"]


class StandardNewRecipe(L1Recipe):
    recipe: Literal["standard_new"]


class ReluRecipe(L1Recipe):
    recipe: Literal["relu"]


class PAnnealRecipe(L1Recipe):
    recipe: Literal["p_anneal"]
    p_end: Annotated[float, Field(gt=0, le=1)] = 0.2
    anneal_start: Fraction = 0.2
    anneal_end: Fraction = 0.9
    sparsity_updates: Positive = 10
    """How often p is lowered on the way."""
    queue_length: Positive = 10
    """Batches over which the coefficient is matched when p changes."""

    @model_validator(mode="after")
    def _ordered(self) -> PAnnealRecipe:
        if self.anneal_start > self.anneal_end:
            raise ValueError(f"anneal_start = {self.anneal_start} is above anneal_end = {self.anneal_end}")
        return self


class GatedRecipe(L1Recipe):
    recipe: Literal["gated", "gated_rajamanoharan"]
    aux_coefficient: NonNegative = 1.0


class HardConcreteRecipe(SAERecipe):
    recipe: Literal["hard_concrete", "gated_hard_concrete"]
    l0_coefficient: NonNegative
    """Weight of the expected L0."""
    aux_coefficient: NonNegative = 1.0
    """Of the gate's own reconstruction; `gated_hard_concrete` only."""
    initial_beta: Above0 = 0.5
    final_beta: Above0 | None = None
    """Where `beta_annealing` ends; null: half of `initial_beta`, as in SAE-Interpretability's own sweep (1.0 to 0.5), which
    has no default for it."""
    beta_annealing: bool = False
    stretch: Interval = (-0.1, 1.1)
    """Limits the concrete distribution is stretched to before clipping to [0, 1]."""
    input_dependent_gates: bool = True
    """False: one gate a latent, the same for every token; `hard_concrete` only."""

    @model_validator(mode="after")
    def _sound(self) -> HardConcreteRecipe:
        if not (self.stretch[0] < 0 and self.stretch[1] > 1):
            raise ValueError(f"stretch must reach below 0 and above 1, or no gate ever closes or opens: {self.stretch}")
        if self.recipe == "gated_hard_concrete" and not self.input_dependent_gates:
            raise ValueError("gated_hard_concrete has input-dependent gates by construction")
        return self

    @property
    def last_beta(self) -> float:
        """Beta at the end of the run."""
        if not self.beta_annealing:
            return self.initial_beta
        return self.initial_beta / 2 if self.final_beta is None else self.final_beta


class JumpReLURecipe(SAERecipe):
    recipe: Literal["jump_relu"]
    target_l0: Above0
    sparsity_coefficient: NonNegative = 1.0
    bandwidth: Above0 = 0.05
    """Width of the window in which pre-activations move their threshold, in normalised activations."""
    initial_threshold: Above0 = 0.02

    @model_validator(mode="after")
    def _fits(self) -> JumpReLURecipe:
        if self.target_l0 > self.d_sae:
            raise ValueError(f"target_l0 = {self.target_l0:g} exceeds d_sae = {self.d_sae}")
        return self


class KRecipe(SAERecipe):
    """The TopK family."""

    k: Positive
    aux_k_coefficient: NonNegative = 1 / 32
    inference: Literal["threshold", "top_k"] = "threshold"
    """How the trained SAE encodes: pre-activations above the recorded threshold (any subset of latents, each for
    itself), or the k largest."""

    @model_validator(mode="after")
    def _fits(self) -> KRecipe:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k} exceeds d_sae = {self.d_sae}")
        return self


class TopKRecipe(KRecipe):
    recipe: Literal["top_k"]


class BatchTopKRecipe(KRecipe):
    recipe: Literal["batch_top_k"]
    inference: Literal["threshold"] = "threshold"


class MatryoshkaRecipe(KRecipe):
    recipe: Literal["matryoshka_batch_top_k"]
    inference: Literal["threshold"] = "threshold"
    group_fractions: list[Annotated[float, Field(gt=0, le=1)]] = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]
    """Shares of the dictionary, each group nested in the next."""

    @model_validator(mode="after")
    def _whole(self) -> MatryoshkaRecipe:
        if abs(sum(self.group_fractions) - 1) > 1e-6:
            raise ValueError(f"group_fractions must add up to 1, not {sum(self.group_fractions):.4g}")
        return self


class MatchingPursuitRecipe(SAERecipe):
    recipe: Literal["matching_pursuit"]
    s: Positive
    """Greedy steps a token."""

    @model_validator(mode="after")
    def _fits(self) -> MatchingPursuitRecipe:
        if self.s > self.d_sae:
            raise ValueError(f"s = {self.s} exceeds d_sae = {self.d_sae}")
        return self


AnyRecipe = (StandardRecipe | StandardNewRecipe | ReluRecipe | PAnnealRecipe | GatedRecipe | HardConcreteRecipe
             | JumpReLURecipe | TopKRecipe | BatchTopKRecipe | MatryoshkaRecipe | MatchingPursuitRecipe)
TrainedSAE = Annotated[AnyRecipe, Field(discriminator="recipe")]


def recipe_model(name: str) -> type[SAERecipe]:
    """The settings of a recipe. Raises `KeyError` for an unknown one."""
    return {recipe: model for model in get_args(AnyRecipe)
            for recipe in get_args(model.model_fields["recipe"].annotation)}[name]
