"""What the section `ground_truth` of `params.yaml` may say: synthetic activations whose true features are known."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from sae_research.config.recipes import SAERecipe, TrainedSAE, recipe_model
from sae_research.config.section import (
    MOST,
    MOST_TOKENS,
    Above0,
    ClassName,
    Count,
    Fraction,
    LocalName,
    Name,
    NonNegative,
    Positive,
    Section,
    Seed,
    Whole,
    Width,
)
from sae_research.runtime.files import slugify

SETTINGS: dict[str, dict[str, Any]] = {
    "small": {
        "num_features": 1024,
        "hidden_dim": 128,
        "zipf_exponent": 0.5,
        "max_probability": 0.3,
        "min_probability": 0.002,
        "correlation_rank": 25,
        "correlation_scale": 0.1,
        "hierarchy_roots": 64,
        "hierarchy_branching": 3,
        "hierarchy_depth": 2,
        "mutually_exclusive": 1.0,
        "scale_by_parent": True,
        "first_magnitude": 5.0,
        "last_magnitude": 4.0,
        "magnitude_std": 0.5,
        "magnitude_std_spread": 0.5,
        "bias_norm": 0.5,
        "orthogonal_steps": 0,
        "noise": 0.0,
        "d_sae": 256,
    },
    # SynthSAEBench-16k as its authors make it (arXiv 2602.14687; width 4096 is what they train)
    "synth_sae_bench_16k": {
        "num_features": 16384,
        "hidden_dim": 768,
        "zipf_exponent": 0.5,
        "max_probability": 0.4,
        "min_probability": 5e-4,
        "correlation_rank": 25,
        "correlation_scale": 0.1,
        "hierarchy_roots": 128,
        "hierarchy_branching": 4,
        "hierarchy_depth": 3,
        "mutually_exclusive": 1.0,
        "scale_by_parent": True,
        "first_magnitude": 5.0,
        "last_magnitude": 4.0,
        "magnitude_std": 0.5,
        "magnitude_std_spread": 0.5,
        "bias_norm": 0.5,
        "orthogonal_steps": 100,
        "noise": 0.0,
        "d_sae": 4096,
        "world_seed": 42,
    },
}
"""Named settings of the synthetic data; what `ground_truth.data` gives itself replaces a value of these."""
PURSUITS = ("ihtp", "mpsae", "omp", "topk_refit", "nn_mpsae", "nn_omp")
DICTIONARIES = ("truth", "trained", "untrained")
Probability = Annotated[float, Field(gt=0, le=1)]
Pursuit = Literal["ihtp", "mpsae", "omp", "topk_refit", "nn_mpsae", "nn_omp"]


class SyntheticData(Section):
    """Sums of sparse true features, made by SAELens; null: the named setting's value."""

    setting: Literal["small", "synth_sae_bench_16k"] = "small"
    """small (1,024 features, 128 dimensions) or synth_sae_bench_16k (arXiv 2602.14687)."""
    num_features: Annotated[Whole, Field(ge=2, le=2**20)] | None = None
    """True features, unit directions in `hidden_dim` dimensions."""
    hidden_dim: Annotated[Whole, Field(ge=2, le=2**20)] | None = None
    """Fewer than the features: they overlap (superposition)."""
    zipf_exponent: Above0 | None = None
    """How fast probabilities of firing fall with a feature's rank r: as r^-exponent. They are then scaled to lie between the
    two probabilities below."""
    max_probability: Probability | None = None
    """Of the most frequent feature to fire on a sample."""
    min_probability: Probability | None = None
    """Of the rarest feature to fire on a sample."""
    correlation_rank: Count | None = None
    """Rank of the correlations between features' firing (a Gaussian copula); 0: none."""
    correlation_scale: NonNegative | None = None
    """Size of the random loadings behind these correlations; 0: independent features."""
    hierarchy_roots: Count | None = None
    """Trees of features: a child fires only where its parent does; 0: none."""
    hierarchy_branching: Annotated[Whole, Field(ge=2, le=2**20)] | None = None
    """Children of each parent."""
    hierarchy_depth: Positive | None = None
    """Levels of children below a root."""
    mutually_exclusive: Fraction | None = None
    """Share of parents of whose children one fires at a time."""
    scale_by_parent: bool | None = None
    """A child's magnitude grows with its parent's."""
    first_magnitude: Above0 | None = None
    """Mean magnitude of the most frequent feature; linear down to the last."""
    last_magnitude: Above0 | None = None
    """Mean magnitude of the rarest feature."""
    magnitude_std: NonNegative | None = None
    """Centre of the features' standard deviations of magnitude, a folded normal distribution."""
    magnitude_std_spread: NonNegative | None = None
    """Spread of that distribution; 0: all features have the same standard deviation."""
    bias_norm: NonNegative | None = None
    """Length of a constant vector that is added to every sample."""
    orthogonal_steps: Count | None = None
    """Steps that push true features apart; 0: random directions."""
    noise: NonNegative | None = None
    """Standard deviation, in every dimension, of Gaussian noise beside the features."""
    world_seed: Seed | None = None
    """One set of true features for all seeds; null: each seed draws its own. Intervals then hold that too."""

    def whole(self) -> dict[str, Any]:
        """Every value, the setting's where none is given here; without `d_sae`."""
        own = {key: value for key, value in self.model_dump(exclude={"setting"}).items() if value is not None}
        named = {key: value for key, value in SETTINGS[self.setting].items() if key != "d_sae"}
        return {"world_seed": None, **named, **own}

    @model_validator(mode="after")
    def _sound(self) -> SyntheticData:
        values = self.whole()
        if not values["min_probability"] < values["max_probability"]:
            raise ValueError(
                f"min_probability {values['min_probability']} must be below max_probability {values['max_probability']}"
            )
        if values["hierarchy_roots"] > values["num_features"]:
            raise ValueError(f"hierarchy_roots {values['hierarchy_roots']} exceeds num_features {values['num_features']}")
        return self


class PursuitRows(Section):
    """Pursuit encoders over known dictionaries."""

    encoders: list[Pursuit] = list(PURSUITS)
    """Pursuit encoders, as in `sae_variants`, each over every dictionary of `over`."""
    over: list[Literal["truth", "trained", "untrained"]] = list(DICTIONARIES)
    """The true features, one trained SAE's decoder, and as many activations scaled to unit length."""
    trained: Name | None = None
    """The recipe whose decoder is `trained`, at its first sparsity; null: the first recipe."""
    sizes: list[Positive] = [8]
    """Atoms a token; one size inside the recipes' range of L0 compares with them."""
    ihtp_sizes: list[Positive] = [1]
    """Atoms that each token of a sequence names for the sequence's support."""


class GridPoint(NamedTuple):
    """One SAE of the grid, for every seed."""

    recipe: str
    """Name of its entry."""
    sparsity: str
    """What of the grid it has, e.g. `k 8`; empty where the entry has one point."""
    settings: SAERecipe

    @property
    def name(self) -> str:
        return slugify(f"{self.recipe} {self.sparsity}")


_RECIPE: TypeAdapter[Any] = TypeAdapter(TrainedSAE)


class GroundTruth(Section):
    """SAEs on synthetic activations whose true features are known: no language model, no text."""

    data: SyntheticData = SyntheticData()
    recipes: dict[str, dict[str, Any]] | None = {
        "standard": {"recipe": "standard", "l1_coefficient": [0.4, 0.2]},
        "batch_top_k": {"recipe": "batch_top_k", "k": [6, 10]},
        "matching_pursuit": {"recipe": "matching_pursuit", "s": [6, 10]},
    }
    """As train.saes; a list in place of a number is a grid; null: those of train.saes."""
    d_sae: Width | None = None
    """Of SAEs that give none; null: the setting's, a quarter of the true features. No SAE of a language model is as wide as
    what it stands for, and latents for the rarest features would need far longer training."""
    learning_rate: Above0 = 0.01
    """Of SAEs that give none."""
    samples: Annotated[Whole, Field(ge=1024, le=MOST_TOKENS)] = 32_768
    """Activations that every SAE is trained on."""
    batch_size: Annotated[Whole, Field(ge=16, le=MOST)] = 256
    """Samples per optimiser step."""
    test_samples: Annotated[Whole, Field(ge=512, le=MOST)] = 2_048
    """Fresh activations that everything is measured on; half of them choose the probes' latents."""
    sequence_length: Positive = 128
    """Samples that an encoder of whole sequences sees together; they are drawn independently."""
    n_seeds: Positive = 3
    """Each draws features (unless data.world_seed), samples and initial weights anew. One gives no intervals."""
    pursuit: PursuitRows = PursuitRows()
    python: list[ClassName] = []
    """Classes of your own, built from the decoder that pursuit calls `trained` (`from_baseline`)."""
    folders: list[LocalName] = []
    """SAE folders of width hidden_dim (scripts.run_ground_truth --save-worlds)."""

    def grid(self, saes: Mapping[str, SAERecipe]) -> list[GridPoint]:
        """Every SAE to train for each seed. saes: `train.saes`, for `recipes: null`."""
        width = self.width
        if self.recipes is None:
            found = []
            for name, sae in saes.items():
                values = sae.model_dump() | {"d_sae": width, "hook_name": None, "seed": None}  # its own rates and sparsity
                found.append(GridPoint(name, "", _checked(name, values)))
            return found
        shared = {"d_sae": width, "learning_rate": self.learning_rate}
        return [point for name, values in self.recipes.items() for point in _points(name, {**shared, **values})]

    @property
    def width(self) -> int:
        if self.d_sae is not None:
            return self.d_sae
        same = self.data.num_features in (None, SETTINGS[self.data.setting]["num_features"])
        return SETTINGS[self.data.setting]["d_sae"] if same else self.data.whole()["num_features"]

    @model_validator(mode="after")
    def _sound(self) -> GroundTruth:
        points = self.grid({}) if self.recipes is not None else []
        names = [point.name for point in points]
        if len(set(names)) < len(names):
            raise ValueError("recipes: two entries give SAEs of one name; rename one")
        if self.pursuit.trained is not None and self.recipes is not None and self.pursuit.trained not in self.recipes:
            raise ValueError(f"pursuit.trained: no recipe {self.pursuit.trained!r}; known: {', '.join(self.recipes)}")
        if self.samples < 2 * self.batch_size:
            raise ValueError(f"samples {self.samples} make no two batches of {self.batch_size}")
        if self.test_samples % self.sequence_length:
            raise ValueError(
                f"test_samples {self.test_samples} must be a multiple of sequence_length {self.sequence_length}"
            )
        return self


def _points(name: str, values: Mapping[str, Any]) -> Iterator[GridPoint]:
    """The product of an entry's lists."""
    try:
        fields = recipe_model(values.get("recipe", "")).model_fields
    except KeyError:
        raise ValueError(f"recipes.{name}: unknown recipe {values.get('recipe')!r}") from None
    listed = {
        key: value
        for key, value in values.items()
        if isinstance(value, list) and key in fields and not _takes_lists(fields[key].annotation)
    }
    if any(not value for value in listed.values()):
        raise ValueError(f"recipes.{name}: an empty list")
    for chosen in itertools.product(*listed.values()):
        point = dict(zip(listed, chosen, strict=True))
        label = ", ".join(
            f"{key} {value:g}" if isinstance(value, (int, float)) else f"{key} {value}"
            for key, value in point.items()
            if len(listed[key]) > 1
        )
        yield GridPoint(name, label, _checked(name, {**values, **point}))


def _takes_lists(annotation: Any) -> bool:
    """Whether a list is one value of a setting, alone or beside null, and no grid."""
    return get_origin(annotation) in (list, tuple) or any(map(_takes_lists, get_args(annotation)))


def _checked(name: str, values: dict[str, Any]) -> SAERecipe:
    try:
        return _RECIPE.validate_python(values)
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(str(part) for part in item["loc"][1:])
        raise ValueError(f"recipes.{name}{'.' * bool(where)}{where}: {item['msg'].removeprefix('Value error, ')}") from None
