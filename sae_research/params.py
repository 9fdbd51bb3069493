"""What `params.yaml` may say. Unknown keys, wrong types and impossible values are refused in one line."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from ruamel.yaml import YAML, YAMLError

from sae_research.analysis_params import Analysis
from sae_research.dashboard_params import Dashboards
from sae_research.errors import UserError
from sae_research.recipe_params import TrainedSAE, recipe_model
from sae_research.section import Fraction, Positive, Section
from sae_research.store import SLUG
from sae_research.tracking_params import Tracking
from sae_research.transfer_params import Transfer


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
    accumulation_steps: Positive = 1
    """A step's batch goes through in this many equal parts whose gradients add up: the same step in less memory. What
    a recipe takes over a batch (BatchTopK's limit, JumpReLU's L0, the auxiliary loss's variance) it takes over a part."""
    buffer_tokens: Positive = 65_536
    """Activations held and shuffled at a time, for each hook."""
    llm_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    held_out_tokens: Positive = 8_192
    evaluate_tokens: Annotated[int, Field(ge=0)] = 1_024
    """Held-out tokens on which predictions are compared with the reconstruction in place; 0 leaves that out."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of every SAE that gives none of its own; null: its recipe's default."""
    warmup_fraction: Fraction = 0.05
    sparsity_warmup_fraction: Fraction = 0.1
    decay_fraction: Fraction = 0.3
    dead_fraction: Fraction = 0.05
    """A latent silent for this fraction of the run counts as dead (auxiliary loss of the TopK family)."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] | None = None
    """Where SAEs and the shuffled activations live; null: where the language model is (`model.device`)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products; parameters, moments and losses stay float32."""
    checkpoint_seconds: Annotated[float, Field(gt=0)] | None = 60.0
    """Time between checkpoints under .cache/train/, from which an interrupted run goes on; null: none by time."""
    checkpoint_steps: Positive | None = None
    """The same in optimiser steps."""
    saved_checkpoints: Annotated[int, Field(ge=0, le=20)] = 0
    """SAEs of this many moments are kept beside the finished one, in checkpoints/step_N/: the first step's start, then
    fractions of the run half a decade apart that end at 10^-0.5 (7: 0, 0.1 %, 0.3 %, 1 %, 3 %, 10 % and 32 %)."""
    saes: dict[str, TrainedSAE] = {}

    @model_validator(mode="before")
    @classmethod
    def _share_learning_rate(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("learning_rate") is not None and isinstance(values.get("saes"), dict):
            shared = {"learning_rate": values["learning_rate"]}
            saes = {name: shared | sae if isinstance(sae, dict) else sae for name, sae in values["saes"].items()}
            return {**values, "saes": saes}
        return values

    @model_validator(mode="after")
    def _sound(self) -> Train:
        for name in self.saes:
            if not SLUG.match(name):
                raise ValueError(f"saes: the name {name!r} must be made of a-z, 0-9 and _")
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
    iterations: Annotated[int, Field(ge=0)] = 0
    """Rounds of choosing again by what the fit leaves, at most; 0 keeps the first choice."""


class MPSAE(Section):
    enabled: bool = True
    s_values: list[Positive] = [10, 50, 100]
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """A token stops once its residual norm is at most this share of its own; 0 never does."""
    gram_dtype: Literal["float32", "bfloat16"] = "float32"
    refresh: Annotated[int, Field(ge=0)] = 0
    """Steps after which correlations are computed afresh, for bfloat16; 0 never."""


class OMP(Section):
    enabled: bool = False
    s_values: list[Positive] = [10]
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0


class TopKRefit(Section):
    enabled: bool = False
    k_values: list[Positive] = [10, 50]
    iterations: Annotated[int, Field(ge=0)] = 0


class NonNegativeMPSAE(MPSAE):
    enabled: bool = False
    s_values: list[Positive] = [10, 50]


class NonNegativeOMP(OMP):
    s_values: list[Positive] = [10, 50]


class Variants(Section):
    normalise: Literal["note", "refuse"] = "note"
    """What to do with atoms that are not of unit norm: scale them and say so, or stop."""
    ihtp: IHTP = IHTP()
    mpsae: MPSAE = MPSAE()
    omp: OMP = OMP()
    topk_refit: TopKRefit = TopKRefit()
    nn_mpsae: NonNegativeMPSAE = NonNegativeMPSAE()
    nn_omp: NonNegativeOMP = NonNegativeOMP()


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
    sparse_probing_sae_probes: bool = False
    meta_sae: bool = False
    autointerp: bool = False
    ravel: bool = False
    transfer: bool = False
    dashboards: bool = False
    """A site to look at latents with, in dashboards/."""


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
    dataset_names: list[str] = ["film_or_restaurant_by_sentiment", "film_or_product_by_sentiment",
                                "restaurant_or_product_by_sentiment"]
    """Two-attribute tasks: packaged, local files, or SAE Bench's hub data sets by name."""
    train_set_size: Annotated[int, Field(ge=16)] = 160
    """Texts of one balanced data set: a quarter with each pair of attributes."""
    test_set_size: Annotated[int, Field(ge=16)] = 120
    context_length: Annotated[int, Field(ge=4)] = 128
    n_values: Annotated[list[Positive], Field(min_length=1)] = [2, 5, 10, 20, 50, 100, 500]
    """How many latents are ablated."""
    probe_epochs: Positive = 20


class TPP(Section):
    """Where a task, size or length is null it is sparse probing's, whose texts and activations then serve both."""

    dataset_names: list[str] | None = None
    train_set_size: Annotated[int, Field(ge=4)] | None = None
    """Texts of one class's probe: half of the class, half of the others."""
    test_set_size: Annotated[int, Field(ge=4)] | None = None
    context_length: Annotated[int, Field(ge=4)] | None = None
    n_values: Annotated[list[Positive], Field(min_length=1)] = [2, 5, 10, 20, 50, 100, 500]
    """How many latents are ablated."""
    probe_epochs: Positive = 20


class Absorption(Section):
    prompt_template: str = "{word} has the first letter:"
    """Read at the last token of the word, wherever the template puts it."""
    icl_examples: Annotated[int, Field(ge=0)] = 10
    """Solved examples before every word, from the same split."""
    icl_prompts: Positive = 16
    """Lists of examples in each split. Words share them, and each list runs through the model once."""
    max_words: Positive | None = 3_000
    """Words drawn from the tokenizer's alphabetic tokens; null takes all."""
    max_k_value: Positive = 10
    """Most latents that a letter's main latents may be."""
    f1_jump_threshold: Fraction = 0.03
    """A further latent counts as a split of the letter when it adds more than this to the probe's F1."""
    min_ground_truth_probe_f1: Fraction = 0.6
    """Letters whose probe on the model's own activations stays at or below this on test words are skipped."""
    min_feats_for_eval: Positive = 20
    """SAE Bench reports nothing with fewer letters; here that is a note."""
    k_sparse_probe_l1_decay: Annotated[float, Field(ge=0)] = 0.01

    @model_validator(mode="after")
    def _template(self) -> Absorption:
        if self.prompt_template.count("{word}") != 1:
            raise ValueError(f"prompt_template must hold {{word}} once, got {self.prompt_template!r}")
        return self


class Unlearning(Section):
    forget_corpus: str = "packaged_biomedical"
    """Text whose latents are to be clamped: a packaged topic, a local file or folder, `wmdp-bio-forget`, or
    `owner/data[:config[:split]]` on the hub."""
    retain_corpus: str = "packaged_general"
    """Text whose latents are spared; by hub name `wikitext` in SAE Bench."""
    corpus_column: str = "text"
    dataset_size: Positive = 128
    """Contexts of each corpus that densities are measured on (SAE Bench: 1024)."""
    seq_len: Annotated[int, Field(ge=8)] = 128
    """Tokens per context (SAE Bench: 1024)."""
    forget_questions: Annotated[list[str], Field(min_length=1)] = ["packaged_biomedical"]
    """Question sets: packaged, local files with question, choices and answer, or `cais/wmdp:wmdp-bio` on the hub."""
    retain_questions: Annotated[list[str], Field(min_length=1)] = ["packaged_other_science"]
    """The same for what must be kept, e.g. `cais/mmlu:human_aging`."""
    prompt_format: Literal["auto", "chat", "plain"] = "auto"
    """`chat` asks through the tokenizer's chat template, `plain` without; `auto` takes the template where there is one."""
    max_known_questions: Positive | None = 40
    """No more questions of a set than these are asked of an edited model; null takes all that are known."""
    min_known_questions: Positive = 20
    """Not applicable below this number of known questions, on either side."""
    retain_thresholds: Annotated[list[Fraction], Field(min_length=1)] = [0.001, 0.01]
    """Latents that fire on this fraction of the retain corpus or more are spared."""
    n_features_list: Annotated[list[Positive], Field(min_length=1)] = [10, 20]
    multipliers: Annotated[list[Positive], Field(min_length=1)] = [25, 50, 100, 200]
    """A chosen latent is set to minus this where it is active."""
    min_retain_accuracy: Fraction = 0.99
    """A configuration counts only if it keeps this accuracy on the retain questions."""


class SparseProbingSaeProbes(Section):
    dataset_names: Literal["all"] | Annotated[list[str], Field(min_length=1)] = [
        "5_hist_fig_ismale", "21_headline_istrump", "65_high-school", "87_glue_cola", "92_glue_sst2", "96_spam_is",
        "105_click_bait", "114_nyc_borough_Manhattan", "124_world_country_United_States", "126_art_type_book",
        "139_news_class_Politics", "158_code_C", "161_agnews_0"]
    """Names of the 113 binary tasks of sae-probes, or `all` of them."""
    k_values: Annotated[list[Positive], Field(min_length=1)] = [1, 2, 5]
    context_length: Annotated[int, Field(ge=4)] = 64
    """Tokens of a text, counted from its end, the separator in front included (sae-probes: 1024)."""
    max_texts: Annotated[int, Field(ge=132)] | None = 300
    """Rows of a task that SAE Bench's split draws from, half of either class: 99 to test on, at most 1024 to train on.
    null takes all (up to 5000), as stock does."""
    probe_train_set_size: Annotated[int, Field(ge=32)] = 140
    """Distinct texts in our split, half of either class; fewer where a task has no more."""
    probe_test_set_size: Annotated[int, Field(ge=16)] = 70


class MetaSAE(Section):
    train_steps: Annotated[int, Field(ge=1, le=2000)] = 1500
    """Steps of `train_batch_size` decoder rows. From 2001 on SAE Bench would revive dead latents; here nothing does."""
    k: Positive = 4
    """Mean number of meta-latents for each latent of the SAE."""
    width_ratio: Annotated[float, Field(gt=0)] = 0.25
    """Meta-latents for each latent of the SAE."""
    train_batch_size: Positive = 1024
    learning_rate: Annotated[float, Field(gt=0)] = 5.0e-4
    n_seeds: Positive = 1
    """Meta-SAEs trained for each dictionary; the figures are their means."""


class ChatEndpoint(Section):
    """An OpenAI-compatible service (`POST {base_url}/chat/completions`) and what may be asked of it."""

    base_url: str | None = None
    """Up to and without `/chat/completions`, e.g. `https://api.openai.com/v1` or `http://localhost:8000/v1`."""
    model: str | None = None
    """The model's name at that endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; empty sends no key. The key itself stands nowhere."""
    temperature: Annotated[float, Field(ge=0)] | None = 0.0
    """null leaves it to the endpoint, as SAE Bench does."""
    completion_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How this endpoint calls the limit on an answer's length."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Questions under way at once."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    max_retries: Annotated[int, Field(ge=0)] = 4
    """After a time-out, a lost connection, 408, 409, 425, 429 or 5xx."""
    backoff_seconds: Annotated[float, Field(ge=0)] = 1.0
    """Pause before the first retry; it doubles with each, and `Retry-After` is respected."""
    max_requests: Positive | None = 2_000
    """Ask nothing at all when more new requests than this would be needed; null sets no limit."""
    max_tokens: Positive | None = 2_000_000
    """The same for the estimated tokens, prompts and answers together."""
    prompt_price_per_million: Annotated[float, Field(ge=0)] | None = None
    """Price of a million prompt tokens, in any currency: the estimate then names the cost."""
    completion_price_per_million: Annotated[float, Field(ge=0)] | None = None


class Autointerp(ChatEndpoint):
    n_latents: Positive = 30
    override_latents: list[Annotated[int, Field(ge=0)]] | None = None
    """These latents in place of `n_latents` random ones."""
    total_tokens: Positive = 65_536
    """Tokens of the core_eval split that windows are taken from."""
    dead_latent_threshold: Annotated[float, Field(ge=0)] = 15
    """A latent that is non-zero on no more tokens than this is passed over."""
    buffer: Positive = 10
    """Tokens shown on either side of the one a window is about."""
    act_threshold_frac: Fraction = 0.01
    """A token counts as active above this fraction of the latent's largest activation."""
    max_tokens_in_explanation: Positive = 30
    max_tokens_in_prediction: Positive | None = None
    """null is SAE Bench's 2 per example + 5; a model that thinks aloud needs more."""
    use_demos_in_explanation: bool = True
    n_top_ex_for_generation: Positive = 10
    n_iw_sampled_ex_for_generation: Positive = 5
    n_top_ex_for_scoring: Positive = 2
    n_iw_sampled_ex_for_scoring: Positive = 2
    n_random_ex_for_scoring: Positive = 10
    max_failed_fraction: Fraction = 0.05
    """The stage fails when more of the latents than this stay without an answer; what was scored is written."""


class Ravel(Section):
    prompts: str = "packaged"
    """`packaged`, a local folder of SAE Bench's layout, or a hub data set (`adamkarvonen/ravel_prompts`)."""
    entity_attribute_selection: dict[str, Annotated[list[str], Field(min_length=2)]] = {
        "city": ["Country", "Continent", "Language"]}
    top_n_entities: Positive = 500
    """Entities kept of each class: those about which the model answers most prompts."""
    full_dataset_downsample: Positive | None = None
    """Prompts of a class that the model is asked, at random; null asks all."""
    min_known_entities: Annotated[int, Field(ge=4)] = 10
    """An attribute that the model knows of fewer entities is skipped."""
    num_pairs_per_attribute: Annotated[int, Field(ge=4)] = 40
    """Pairs of prompts of either kind, cause and isolation."""
    train_test_split: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Fraction of pairs that masks are learnt on."""
    batch_size: Positive = 8
    """Pairs per optimiser step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1.0e-3
    num_epochs: Positive = 2
    n_generated_tokens: Positive = 6


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
    sparse_probing_sae_probes: SparseProbingSaeProbes = SparseProbingSaeProbes()
    meta_sae: MetaSAE = MetaSAE()
    autointerp: Autointerp = Autointerp()
    ravel: Ravel = Ravel()
    transfer: Transfer = Transfer()
    analysis: Analysis = Analysis()
    dashboards: Dashboards = Dashboards()
    tracking: Tracking = Tracking()
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
    return check_params(values, str(path))


def check_params(values: dict[str, Any], where: str) -> Params:
    """Parameters from nested values. Raises `UserError` that begins with `where` and names the key that is wrong."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise UserError(f"{where}: " + "; ".join(lines)) from None


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
