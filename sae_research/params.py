"""What `params.yaml` may say. Unknown keys, wrong types and impossible values are refused in one line."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from ruamel.yaml import YAML, YAMLError

from sae_research.errors import UserError
from sae_research.recipe_params import TrainedSAE, recipe_model
from sae_research.section import Fraction, Positive, Section
from sae_research.store import SLUG


class Model(Section):
    name: str = "smollm2-135m-instruct"
    """Packaged name, hub name (`pythia-70m-deduped`, `google/gemma-2-2b`) or a local folder."""
    llm_batch_size: Positive = 16
    """Sequences per forward pass of the language model."""
    torch_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"


class Text(Section):
    dataset: str = "packaged"
    """`packaged`, a local folder of .txt/.jsonl/.csv/.parquet files, or a hub data set's name."""
    column_name: str = "text"
    context_size: Annotated[int, Field(ge=8)] = 128
    """Tokens per context, the leading separator included."""


class TokenMask(Section):
    """Which tokens count: special and padding tokens never do."""

    drop_first_position: bool = True
    outlier_norm_multiple: Annotated[float, Field(gt=1)] | None = 3.0
    """Tokens whose activation norm exceeds this many times the median are sinks; null keeps them."""


class Train(Section):
    enabled: bool = True
    """Whether the pipeline trains SAEs of its own; a baseline from elsewhere needs none."""
    hook_name: str = "blocks.8.hook_resid_post"
    tokens: Positive = 240_000
    """Tokens of text that the language model reads; those that count are trained on."""
    batch_size: Positive = 512
    """Activations per optimiser step."""
    buffer_tokens: Positive = 65_536
    """Activations held and shuffled at a time."""
    llm_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    held_out_tokens: Positive = 8_192
    warmup_fraction: Fraction = 0.05
    sparsity_warmup_fraction: Fraction = 0.1
    decay_fraction: Fraction = 0.3
    dead_fraction: Fraction = 0.05
    """A latent silent for this fraction of the run counts as dead (auxiliary loss of the TopK family)."""
    saes: dict[str, TrainedSAE] = {}

    @model_validator(mode="after")
    def _slugs(self) -> Train:
        for name in self.saes:
            if not SLUG.match(name):
                raise ValueError(f"saes: the name {name!r} must be made of a-z, 0-9 and _")
        return self


class BaselineSAE(Section):
    source: Literal["trained", "hub", "sae_lens", "folder"] = "trained"
    name: Annotated[str, Field(pattern=SLUG.pattern)] = "standard"
    """The baseline's name in every table; with `source: trained`, also its folder in trained_saes/."""
    repo_id: str | None = None
    filename: str | None = None
    release: str | None = None
    sae_id: str | None = None
    path: str | None = None
    hook_layer: Annotated[int, Field(ge=0)] = 8

    @model_validator(mode="after")
    def _needs(self) -> BaselineSAE:
        needs = {"trained": (), "hub": ("repo_id", "filename"), "sae_lens": ("release", "sae_id"), "folder": ("path",)}
        for key in needs[self.source]:
            if getattr(self, key) is None:
                raise ValueError(f"source: {self.source} needs {key}")
        return self


class IHTP(Section):
    enabled: bool = True
    k_values: list[Positive] = [1, 2, 5, 10]


class MPSAE(Section):
    enabled: bool = True
    s_values: list[Positive] = [10, 50, 100]


class Variants(Section):
    ihtp: IHTP = IHTP()
    mpsae: MPSAE = MPSAE()


class Comparison(Section):
    trained: list[str] = []
    """Names in trained_saes/."""
    folders: list[str] = []
    """Local SAE folders or globs."""
    python: list[str] = []
    """Classes of one's own, `custom_saes.my_module:MySAE`."""
    sae_regex_pattern: str | None = None
    """Pattern for SAELens releases; goes with `sae_block_pattern`."""
    sae_block_pattern: str | None = None

    @model_validator(mode="after")
    def _pair(self) -> Comparison:
        if (self.sae_regex_pattern is None) != (self.sae_block_pattern is None):
            raise ValueError("sae_regex_pattern and sae_block_pattern go together")
        return self


class Controls(Section):
    names: list[Literal["random", "data_rows", "pca"]] = ["random", "data_rows", "pca"]
    s: Positive = 32
    """Matching-pursuit steps over the untrained dictionaries."""
    pca_components: Positive = 64


class Preflight(Section):
    tokens: Positive = 1024
    max_norm_ratio: Annotated[float, Field(gt=1)] = 3.0
    """Stop when activations are this many times larger or smaller than the SAE's card says."""
    min_variance_explained: float | None = None
    """Stop when the baseline explains less than this; null only reports."""


class EvalTypes(Section):
    core: bool = True
    sparse_probing: bool = True
    scr: bool = False
    tpp: bool = False
    absorption: bool = False
    unlearning: bool = False


class CoreEval(Section):
    batch_size_prompts: Positive = 8
    n_eval_reconstruction_batches: Positive = 2
    n_eval_sparsity_variance_batches: Positive = 8


class SparseProbing(Section):
    dataset_names: list[str] = ["news_topic", "disease_area", "code_language", "film_sentiment"]
    probe_train_set_size: Annotated[int, Field(ge=4)] = 240
    probe_test_set_size: Annotated[int, Field(ge=4)] = 120
    context_length: Annotated[int, Field(ge=4)] = 128
    k_values: list[Positive] = [1, 2, 5]


class SCR(Section):
    dataset_names: list[str] = ["LabHC/bias_in_bios_class_set1", "canrager/amazon_reviews_mcauley_1and5"]
    n_values: list[Positive] = [2, 5, 10, 20, 50, 100, 500]


class TPP(SCR):
    pass


class Absorption(Section):
    max_k_value: Positive = 10
    min_ground_truth_probe_f1: Fraction = 0.6


class Unlearning(Section):
    retain_thresholds: list[Fraction] = [0.001, 0.01]
    n_features_list: list[Positive] = [10, 20]
    multipliers: list[float] = [25, 50, 100, 200]


class ActivationCaching(Section):
    enabled: bool = True
    max_gb: Annotated[float, Field(gt=0)] = 10.0
    """Size limit of .cache/activations; the least recently used go first."""


class Style(Section):
    marker: str
    color: str


class Visualization(Section):
    dpi: Annotated[int, Field(ge=30, le=600)] = 110
    width_inches: Annotated[float, Field(gt=1)] = 7.0
    height_inches: Annotated[float, Field(gt=1)] = 4.6
    architectures: dict[str, Style] = {}


class Params(Section):
    random_seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    model: Model = Model()
    text: Text = Text()
    token_mask: TokenMask = TokenMask()
    train: Train = Train()
    baseline_sae: BaselineSAE = BaselineSAE()
    sae_variants: Variants = Variants()
    comparison_saes: Comparison = Comparison()
    controls: Controls = Controls()
    preflight: Preflight = Preflight()
    eval_types: EvalTypes = EvalTypes()
    core_eval: CoreEval = CoreEval()
    sparse_probing: SparseProbing = SparseProbing()
    scr: SCR = SCR()
    tpp: TPP = TPP()
    absorption: Absorption = Absorption()
    unlearning: Unlearning = Unlearning()
    activation_caching: ActivationCaching = ActivationCaching()
    visualization: Visualization = Visualization()


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check the configuration. Raises `UserError` naming the key that is wrong.

    YAML 1.2 (ruamel), as DVC reads it: `1e-4` is a number, `on` is a word.
    """
    path = Path(path)
    try:
        values = YAML(typ="safe").load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the project's folder") from None
    except YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected sections such as `model:` and `eval_types:`")
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise UserError(f"{path}: " + "; ".join(lines)) from None


def _explain(item: dict[str, Any]) -> str:
    """One pydantic complaint as a user would say it, with the nearest known key where one is misspelt."""
    in_recipe = item["loc"][:2] == ("train", "saes") and len(item["loc"]) > 3  # its fourth part names the recipe
    where = ".".join(str(part) for i, part in enumerate(item["loc"]) if not (in_recipe and i == 3))
    if item["type"] != "extra_forbidden":
        return f"{where}: {item['msg'].removeprefix('Value error, ')}" + (
            f" (got {item['input']!r})" if not isinstance(item["input"], dict) else "")
    known = sorted(recipe_model(item["loc"][3]).model_fields) if in_recipe else _known_keys(item["loc"][:-1])
    close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
    return f"unknown key {where}" + (f", did you mean {close[0]}?" if close else f"; known: {', '.join(known)}")


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    section: Any = Params
    for part in loc:
        field = section.model_fields.get(part) if isinstance(section, type) else None
        if field is None:  # inside a mapping such as train.saes.<name>
            continue
        section = field.annotation
        for candidate in getattr(section, "__args__", ()):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return sorted(section.model_fields)
