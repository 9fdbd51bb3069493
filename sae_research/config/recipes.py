"""Settings of the SAEs of `train.saes`, one class for each recipe, and the places in the model that they belong to.

Each recipe of `training/recipes` has its settings here, in a class that its annotation `config` names, rather than in the
file of its loss: every command reads `params.yaml`, and those that draw, report or queue must not import torch.

Defaults hold for activations of unit mean square norm.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from sae_research.config.section import (
    Above0,
    Betas,
    Fraction,
    Interval,
    Name,
    NonNegative,
    Positive,
    Section,
    Seed,
    Width,
)

ARROW = " -> "
"""Between the hooks of a transcoder."""
PLUS = " + "
"""Between those of a crosscoder, and those on either side of a cross-layer transcoder."""


def hooks_at(place: str) -> list[str]:
    """The hooks of a place (`Train.place_of`), in the order in which their activations lie side by side."""
    return [hook for side in place.split(ARROW) for hook in side.split(PLUS)]


class SAERecipe(Section):
    """What every recipe has."""

    crosscoders: ClassVar[bool] = False
    """Whether it weighs sparsity by decoder norms of several hooks."""

    sparsity: ClassVar[tuple[str, Literal["raises", "lowers"]] | None] = None
    """The setting that decides how sparse the SAE becomes, and what a larger value does to L0."""
    few_active: ClassVar[bool] = False
    """Few latents are active from the first step on: on a CPU its steps compute those alone."""
    free_norms: ClassVar[bool] = False
    """Whether decoder rows may start at another norm than 1 (`init_norm`)."""
    whitens: ClassVar[bool] = True
    """Whether it has an encoder that a linear map of the input can go into."""

    recipe: Name
    """How the SAE is trained: a name of `training.RECIPES`."""
    d_sae: Width
    """Latents."""
    hook_name: Name | None = None
    """Where in the model; null takes `train.hook_name`. All hooks of a run are read in one pass."""
    learning_rate: Above0 = 3.0e-3
    """Adam's at its height, in place of `train.learning_rate`. Some ten times the literature's: a run of minutes has some
    hundred steps."""
    init: Literal["data_rows", "random", "orthogonal"] = "data_rows"
    """Decoder rows at the start: activations less their mean, random directions, or those of a random matrix of
    orthonormal columns."""
    init_norm: Above0 | None = None
    """Their norm; null: 1. Recipe `standard_new` alone."""
    betas: Betas | None = None
    """Adam's two; null: the recipe's, (0, 0.999) of `gated_rajamanoharan` and `jump_relu`, else (0.9, 0.999)."""
    lr_schedule: Literal["linear", "cosine", "constant"] | None = None
    """How the learning rate falls over `train.decay_fraction`: along a line (null too), half a cosine, or not at all. A
    cosine over the whole run after its warm-up takes decay_fraction = 1 - warmup_fraction."""
    min_lr_factor: Fraction | None = None
    """Where it ends, as a share of its height; null: 0."""
    seed: Seed | None = None
    """Null takes `random_seed`. Entries that differ in name and seed alone are one recipe, and the report gives their
    mean and spread; the text and its order are the run's."""
    hook_out: Name | None = None
    """A transcoder's: the hook that its reconstruction stands for, such as blocks.8.hook_mlp_out for what
    blocks.8.mlp.hook_in reads. Null: the hook it reads."""
    skip: bool | None = None
    """true gives a transcoder a linear skip, learned with the rest from zero."""
    whiten: bool | None = None
    """true trains on whitened activations: of equal variance in all directions, and uncorrelated (arXiv 2511.13981). The SAE
    that comes out reads plain ones."""
    hook_names: Annotated[list[Name], Field(min_length=1)] | None = None
    """A crosscoder's: the hooks of one width that it reads and writes together. In place of `hook_name`; recipes
    `standard_new` (L1) and `batch_top_k`."""

    @property
    def written(self) -> str | None:
        """What its reconstruction stands for, several hooks joined by `PLUS`; None where that is what it reads."""
        return self.hook_out

    def n_weights(self, width: int) -> int:
        """Of its encoder and decoder. width: dimensions that it reads."""
        return 2 * width * self.d_sae

    @property
    def schedule(self) -> Literal["linear", "cosine", "constant"]:
        """Of the learning rate."""
        return self.lr_schedule or "linear"

    @model_validator(mode="after")
    def _scheduled(self) -> SAERecipe:
        if self.schedule == "constant" and self.min_lr_factor is not None:
            raise ValueError("min_lr_factor belongs to a learning rate that falls: lr_schedule linear or cosine")
        if self.init_norm is not None and not self.free_norms:
            raise ValueError(
                f"init_norm: {self.recipe} starts from decoder rows of norm 1; standard_new may start from others"
            )
        return self

    @model_validator(mode="after")
    def _crosscoder(self) -> SAERecipe:
        names = self.hook_names
        if names is None:
            return self
        if len(names) == 1:
            raise ValueError(f"hook_names: a crosscoder has several hooks; for one write hook_name: {names[0]}")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"hook_names: {', '.join(twice)} stands there twice")
        for key in ("hook_name", "hook_out"):
            if getattr(self, key) is not None:
                raise ValueError(f"hook_names and {key} exclude each other: a crosscoder reads and writes its hook_names")
        if not self.crosscoders:
            raise ValueError(f"hook_names: {self.recipe} trains no crosscoders; standard_new (L1) and batch_top_k do")
        return self

    @model_validator(mode="after")
    def _transcoder(self) -> SAERecipe:
        if self.skip and self.written is None:
            raise ValueError("skip: true belongs to a transcoder: say which hook it writes (hook_out)")
        return self

    @model_validator(mode="after")
    def _whitened(self) -> SAERecipe:
        if not self.whiten:
            return self
        if not self.whitens:
            raise ValueError(
                f"whiten: {self.recipe} has no encoder: atoms chosen in whitened activations are others in plain ones"
            )
        if self.hook_out is not None or self.hook_names is not None:
            raise ValueError("whiten: true belongs to SAEs, which write the hook they read")
        return self


class L1Recipe(SAERecipe):
    """Recipes whose penalty grows with activations: dead latents are resampled, if at all."""

    sparsity = ("l1_coefficient", "lowers")
    l1_coefficient: NonNegative
    """Weight of the penalty on activations."""
    resample_every: Fraction = 0.0
    """Resample dead latents each time this fraction of the run has passed, in its first half; 0 never does."""
    resample_window: Fraction = 0.1
    """A latent is dead for resampling when it was silent for this fraction of the run."""

    @model_validator(mode="after")
    def _resamples_what_it_reads(self) -> L1Recipe:
        if self.hook_out is not None and self.resample_every:
            raise ValueError(
                "resample_every belongs to SAEs: what is left of a transcoder's output is no encoder's direction"
            )
        if self.hook_names is not None and self.resample_every:
            raise ValueError(
                "resample_every belongs to SAEs: it gives rows unit norm, a crosscoder's share one between hooks"
            )
        return self


class StandardRecipe(L1Recipe):
    recipe: Literal["standard"]


class StandardNewRecipe(L1Recipe):
    crosscoders = free_norms = True
    recipe: Literal["standard_new"]


class ReluRecipe(L1Recipe):
    recipe: Literal["relu"]


class PAnnealRecipe(L1Recipe):
    recipe: Literal["p_anneal"]
    p_end: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The penalty's power at the end; it starts at 1."""
    anneal_start: Fraction = 0.2
    """Fraction of the run after which p falls."""
    anneal_end: Fraction = 0.9
    """Fraction of the run after which p stays at `p_end`."""
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
    """Weight of the gates' own reconstruction."""


class HardConcreteRecipe(SAERecipe):
    sparsity = ("l0_coefficient", "lowers")
    recipe: Literal["hard_concrete", "gated_hard_concrete"]
    l0_coefficient: NonNegative
    """Weight of the expected L0."""
    aux_coefficient: NonNegative = 1.0
    """Of the gate's own reconstruction; `gated_hard_concrete` only."""
    initial_beta: Above0 = 0.5
    """Temperature of the gates at the start; lower is closer to 0 or 1."""
    final_beta: Above0 | None = None
    """Where `beta_annealing` ends; null: half of `initial_beta`, as in SAE-Interpretability's own sweep (1.0 to 0.5), which
    has no default for it."""
    beta_annealing: bool = False
    """Whether beta falls, geometrically, after the learning rate's warm-up."""
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
    sparsity = ("target_l0", "raises")
    recipe: Literal["jump_relu"]
    target_l0: Above0
    """The L0 that the penalty pulls to."""
    sparsity_coefficient: NonNegative = 1.0
    """Weight of that penalty."""
    bandwidth: Above0 = 0.05
    """Width of the window in which pre-activations move their threshold, in normalised activations."""
    initial_threshold: Above0 = 0.02
    """Every latent's threshold at the start."""

    @model_validator(mode="after")
    def _fits(self) -> JumpReLURecipe:
        if self.target_l0 > self.d_sae:
            raise ValueError(f"target_l0 = {self.target_l0:g} exceeds d_sae = {self.d_sae}")
        return self


class TanhPenaltyRecipe(SAERecipe):
    """In the source's units, in which a token's mean square norm is d_in."""

    sparsity = ("sparsity_coefficient", "lowers")
    sparsity_coefficient: NonNegative
    """Weight of the saturating penalty, reached at the end of the run."""
    tanh_scale: Above0 = 4.0
    """Activations well above its inverse cost no more than those at it."""
    pre_activation_coefficient: NonNegative = 3e-6
    """Weight of what draws latents below their threshold towards it."""
    bandwidth: Above0 = 2.0
    """Width of the window in which pre-activations and thresholds move each other."""
    initial_threshold: Above0 = 0.1
    """Every latent's threshold at the start."""


class TanhJumpReLURecipe(TanhPenaltyRecipe):
    recipe: Literal["tanh_jump_relu"]


class CrossLayerRecipe(TanhPenaltyRecipe):
    """Across layers `hook_names` and `hook_outs` name what each layer's MLP reads and puts out."""

    crosscoders = True
    recipe: Literal["cross_layer"]
    hook_outs: list[Name] | None = None
    """A cross-layer transcoder's: the hooks that it writes, one for each of `hook_names`, in the order of layers. `d_sae`
    counts the latents of all layers."""

    @property
    def written(self) -> str | None:
        return self.hook_out if self.hook_outs is None else PLUS.join(self.hook_outs)

    def n_weights(self, width: int) -> int:
        n = len(self.hook_names or [""])
        return self.d_sae * width // n * (n + 3) // 2

    @model_validator(mode="after")
    def _one_a_layer(self) -> CrossLayerRecipe:
        read, written = self.hook_names, self.hook_outs
        if read is None and written is None:
            return self
        if read is None or written is None or len(read) != len(written):
            raise ValueError("hook_names and hook_outs belong together, one hook that is written for each that is read")
        if self.d_sae % len(read):
            raise ValueError(f"d_sae = {self.d_sae} latents do not divide into equal parts of {len(read)} layers")
        return self


class KRecipe(SAERecipe):
    """The TopK family."""

    few_active = True
    sparsity = ("k", "raises")
    k: Positive
    """Active latents a token."""
    aux_k_coefficient: NonNegative = 1 / 32
    """Weight of the loss that revives dead latents."""
    inference: Literal["threshold", "top_k"] = "threshold"
    """threshold: each latent for itself, k a token on average; or top_k, the k largest."""

    @model_validator(mode="after")
    def _fits(self) -> KRecipe:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k} exceeds d_sae = {self.d_sae}")
        return self


class TopKRecipe(KRecipe):
    recipe: Literal["top_k"]


class AbsTopKRecipe(KRecipe):
    recipe: Literal["abs_top_k"]
    inference: Literal["top_k"] = "top_k"


class BatchTopKRecipe(KRecipe):
    crosscoders = True
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
    whitens = False
    sparsity = ("s", "raises")
    recipe: Literal["matching_pursuit"]
    s: Positive
    """Greedy steps a token."""

    @model_validator(mode="after")
    def _fits(self) -> MatchingPursuitRecipe:
        if self.hook_out is not None:
            raise ValueError("matching_pursuit explains what it reads: it takes no hook_out")
        if self.s > self.d_sae:
            raise ValueError(f"s = {self.s} exceeds d_sae = {self.d_sae}")
        return self


AnyRecipe = (
    StandardRecipe
    | StandardNewRecipe
    | ReluRecipe
    | PAnnealRecipe
    | GatedRecipe
    | HardConcreteRecipe
    | JumpReLURecipe
    | TanhJumpReLURecipe
    | CrossLayerRecipe
    | TopKRecipe
    | AbsTopKRecipe
    | BatchTopKRecipe
    | MatryoshkaRecipe
    | MatchingPursuitRecipe
)
TrainedSAE = Annotated[AnyRecipe, Field(discriminator="recipe")]


def recipe_model(name: str) -> type[SAERecipe]:
    """The settings of a recipe. Raises `KeyError` for an unknown one."""
    return {recipe: model for model in get_args(AnyRecipe) for recipe in get_args(model.model_fields["recipe"].annotation)}[
        name
    ]
