"""Sections of `params.yaml` that name what is studied: model, text, token mask, and the SAEs to evaluate."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sae_research.config.section import (
    Above0,
    Above1,
    ClassName,
    Count,
    FromOneSource,
    LocalName,
    Name,
    Packaged,
    PackagedName,
    Positive,
    Section,
    Sizes,
    Slug,
    Tokens,
)


class Model(Section):
    """The language model that SAEs are trained on and evaluated in."""

    name: LocalName = "smollm2-135m-instruct"
    """Packaged name, hub name or local folder. On the hub e.g. `pythia-70m-deduped`, `google/gemma-2-2b`, or
    `pythia-70m-deduped@step3000` for a revision."""
    same_as: list[Name] | None = None
    """Further names that SAEs may give this model, e.g. a hub name where `name` is a folder."""
    llm_batch_size: Positive = 16
    """Sequences per forward pass of the language model."""
    torch_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of weights and activations."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """auto, cpu, cuda, cuda:1 or mps; auto takes a GPU where there is one."""
    placement: Literal["one", "auto"] = "one"
    """one (on `device`), or auto: in parts on all GPUs, then in main memory, then on disk. Accelerate divides it. With
    `device: cuda:1` or `cpu` no other GPU is used. Parts off the GPUs are computed there too; results do not change."""
    max_memory: dict[Name, Name] | None = None
    """Most of each device that parts may take, {"0": 60GiB, cpu: 100GiB}; null is what is free. So it is of a device that
    is not named."""
    quantization: Literal["bnb_8bit", "bnb_4bit"] | None = None
    """bnb_8bit or bnb_4bit: weights rounded by bitsandbytes, on CUDA, untested; null keeps them. `torch_dtype` is
    then the precision of activations."""


class Text(Section):
    """What SAEs are trained on and core evaluation reads (disjoint splits)."""

    dataset: LocalName = "packaged"
    """`packaged`, a local folder of .txt/.jsonl/.csv/.parquet files, or a hub data set's name."""
    column_name: Name = "text"
    """Column of a table or hub data set that holds text or conversations. These are lists of `{role, content}`; the
    tokenizer's chat template makes text of them."""
    roles: Annotated[list[Name], Field(min_length=1)] | None = None
    """Whose messages' tokens count in conversations, e.g. [assistant]; null counts all. What the template adds then does
    not."""
    context_size: Annotated[Positive, Field(ge=8)] = 128
    """Tokens per context, the leading separator included."""
    held_out_characters: Positive = 20_000_000
    """Most that core evaluation can read; training text near it is left out. 20 million are some 5 million tokens. They are
    read and indexed before training starts; ten times as much is then streamed of a hub's data, once."""
    training_passes: Positive = 1
    """How often training reads its split of the text before the text counts as ended."""


class TokenMask(Section):
    """Which tokens count: special and padding tokens never do."""

    drop_first_position: bool = True
    """Position 0 is an attention sink."""
    outlier_norm_multiple: Above1 | None = 3.0
    """Tokens whose activation norm exceeds this many times the median are sinks; null keeps them."""


class ActivationCaching(Section):
    """Activations kept in .cache."""

    enabled: bool = True
    """Whether activations are kept there; off computes them again in every stage."""
    max_gb: Above0 = 10.0
    """Of .cache/activations, tokens and train each; the least recently used go first. train holds checkpoints of interrupted
    runs."""
    shards: list[Name] = []
    """Folders that `sae-research extract` wrote: read where the cache lacks something."""


class BaselineSAE(FromOneSource):
    """The SAE whose dictionary the pursuit variants read; keys of sources not chosen are null."""

    NEEDS: ClassVar = {
        "trained": (),
        "packaged": (),
        "hub": ("repo_id", "filename"),
        "sae_lens": ("release", "sae_id"),
        "folder": ("path",),
    }
    may_be_left_out: ClassVar = frozenset({"source", "name", "repo_id", "filename", "release", "sae_id", "path"})

    source: Literal["trained", "packaged", "hub", "sae_lens", "folder"] = "trained"
    """trained, packaged, hub (repo_id, filename), sae_lens (release, sae_id) or folder (path)."""
    name: Annotated[Slug, Packaged()] = "standard"
    """Its name in every table, by which trained and packaged ones (smollm2_135m_l8) are found."""
    repo_id: Name | None = None
    """Repository on the Hugging Face hub, e.g. canrager/lm_sae; null unless `source` is hub."""
    filename: Name | None = None
    """The SAE's weights in that repository, a path; null unless `source` is hub."""
    release: Name | None = None
    """Release of SAELens' directory, e.g. gemma-scope-2b-pt-res; null unless `source` is sae_lens."""
    sae_id: Name | None = None
    """Its id there, e.g. layer_12/width_16k/average_l0_82; null unless `source` is sae_lens."""
    path: LocalName | None = None
    """A local SAE folder; null unless `source` is folder."""
    hook_layer: Count = 8
    """The layer whose residual stream an SAE that names no hook reads."""


class IHTP(Section):
    """Iterative hard thresholding, one support for all tokens of a sequence."""

    enabled: bool = True
    """Whether this encoder is among the variants."""
    k_values: list[Positive] = [1, 2, 5, 10]
    """Atoms each token names; the support is their union over the sequence."""
    iterations: Count = 0
    """Rounds of choosing again by what the fit leaves, at most; 0 keeps the first choice."""


class MPSAE(Section):
    """Matching pursuit."""

    enabled: bool = True
    """Whether this encoder is among the variants."""
    s_values: list[Positive] = [10, 32, 50, 100]
    """Greedy steps per token; 32 is comparable with TopK-32 and the controls."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """A token stops once its residual norm is at most this share of its own; 0 never does."""


class OMP(Section):
    """Greedy steps with a least-squares refit after each."""

    enabled: bool = True
    """Whether this encoder is among the variants."""
    s_values: list[Positive] = [10]
    """Greedy steps per token, one variant each: at most so many latents."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """A token stops once its residual norm is at most this share of its own; 0 never does."""


class TopKRefit(Section):
    """Each token's k largest correlations, refitted."""

    enabled: bool = False
    """Whether this encoder is among the variants."""
    k_values: list[Positive] = [10, 50]
    """Latents of each token, one variant each."""
    iterations: Count = 0
    """Rounds of choosing again by what the fit leaves, at most; 0 keeps the first choice."""


class NonNegativeMPSAE(MPSAE):
    """Matching pursuit with activations that are never negative."""

    enabled: bool = False
    """Whether this encoder is among the variants."""
    s_values: list[Positive] = [10, 50]
    """Greedy steps per token, one variant each: at most so many latents."""


class NonNegativeOMP(OMP):
    """The same with a non-negative refit after each step."""

    enabled: bool = False
    """Whether this encoder is among the variants."""
    s_values: list[Positive] = [10, 50]
    """Greedy steps per token, one variant each: at most so many latents."""


class Variants(Section):
    """Pursuit encoders over the baseline's dictionary, and over others (docs/pursuit.md)."""

    dictionaries: list[Name] = []
    """Names of compared SAEs whose dictionaries every encoder reads too."""
    normalise: Literal["note", "refuse"] = "note"
    """Atoms not of unit norm: note (scale them and say so) or refuse."""
    ihtp: IHTP = IHTP()
    mpsae: MPSAE = MPSAE()
    omp: OMP = OMP()
    topk_refit: TopKRefit = TopKRefit()
    nn_mpsae: NonNegativeMPSAE = NonNegativeMPSAE()
    nn_omp: NonNegativeOMP = NonNegativeOMP()


class Comparison(Section):
    """Further SAEs, from elsewhere or trained here."""

    trained: list[Name] = ["topk"]
    """Names in trained_saes/; `all` takes every one."""
    packaged: list[PackagedName] = []
    """Names of dictionaries that come with the package, e.g. smollm2_135m_l8."""
    folders: list[LocalName] = []
    """Local SAE folders or globs."""
    python: list[ClassName] = []
    """Classes of your own, e.g. custom_saes.example:AbsTopK."""
    sae_regex_pattern: Name | None = None
    """SAELens releases to fetch, e.g. sae_bench_pythia70m_sweep_topk_ctx128_0730."""
    sae_block_pattern: Name | None = None
    """Their SAEs, e.g. blocks.4.hook_resid_post__trainer_(2|6|10)."""
    release: Name | None = None
    """A release of SAELens' directory, all of it, e.g. gpt2-small-res-jb. What of it cannot be opened, or does not fit the
    model, is left out with a warning."""
    match: Name | None = None
    """Of `release` only the ids in which this regular expression is found."""

    @model_validator(mode="after")
    def _pair(self) -> Comparison:
        if (self.sae_regex_pattern is None) != (self.sae_block_pattern is None):
            raise ValueError("sae_regex_pattern and sae_block_pattern go together")
        if self.match is not None and self.release is None:
            raise ValueError("match chooses among the ids of `release`, which is null")
        for key in ("sae_regex_pattern", "sae_block_pattern", "match"):
            try:
                re.compile(getattr(self, key) or "")
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{key}: not a regular expression: {error}") from None
        return self


class Controls(Section):
    """Untrained rows of every table."""

    names: list[Literal["random", "data_rows", "pca"]] = ["random", "data_rows", "pca"]
    """random (rows of random directions), data_rows (activations as rows), pca (components)."""
    s: Sizes = [32, 64]
    """Matching-pursuit steps over the untrained dictionaries, one control each. Between two of them SAEs of any L0 are
    compared with untrained rows at their own."""
    pca_components: Sizes = [32, 64]
    """Principal components, one control each."""


class Preflight(Section):
    """Checks of the baseline before anything is evaluated."""

    tokens: Tokens = 1024
    """Tokens that the checks read."""
    max_norm_ratio: Above1 = 3.0
    """Stop when activations are this many times larger or smaller than the SAE's card says."""
    min_variance_explained: Annotated[float, Field(ge=-1_000, le=1)] | None = None
    """Stop when the baseline explains less than this; null only reports."""
