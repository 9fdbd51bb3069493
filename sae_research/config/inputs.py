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
    Positive,
    Section,
    Sizes,
    Slug,
    Tokens,
)


class Model(Section):
    name: LocalName = "smollm2-135m-instruct"
    """Packaged name, hub name (`pythia-70m-deduped`, `google/gemma-2-2b`, `pythia-70m-deduped@step3000` for a revision) or
    a local folder."""
    same_as: list[Name] | None = None
    """Further names that SAEs may give this model, e.g. a hub name where `name` is a folder."""
    llm_batch_size: Positive = 16
    """Sequences per forward pass of the language model."""
    torch_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"


class Text(Section):
    dataset: LocalName = "packaged"
    """`packaged`, a local folder of .txt/.jsonl/.csv/.parquet files, or a hub data set's name."""
    column_name: Name = "text"
    context_size: Annotated[Positive, Field(ge=8)] = 128
    """Tokens per context, the leading separator included."""
    held_out_characters: Positive = 20_000_000
    """Where the core_eval split ends, after 5 million tokens or so. It is read and indexed before training starts, since
    training text near it is left out: ten times as much is then streamed of a hub's data, once."""


class TokenMask(Section):
    """Which tokens count: special and padding tokens never do."""

    drop_first_position: bool = True
    outlier_norm_multiple: Above1 | None = 3.0
    """Tokens whose activation norm exceeds this many times the median are sinks; null keeps them."""


class ActivationCaching(Section):
    enabled: bool = True
    max_gb: Above0 = 10.0
    """Size limit of .cache/activations, of .cache/tokens (long texts) and of .cache/train (checkpoints of interrupted runs),
    each; the least recently used go first."""


class BaselineSAE(FromOneSource):
    NEEDS: ClassVar = {"trained": (), "hub": ("repo_id", "filename"), "sae_lens": ("release", "sae_id"), "folder": ("path",)}
    may_be_left_out: ClassVar = frozenset({"source", "name", "repo_id", "filename", "release", "sae_id", "path"})

    source: Literal["trained", "hub", "sae_lens", "folder"] = "trained"
    name: Slug = "standard"
    """The baseline's name in every table; with `source: trained`, also its folder in trained_saes/."""
    repo_id: Name | None = None
    filename: Name | None = None
    release: Name | None = None
    sae_id: Name | None = None
    path: LocalName | None = None
    hook_layer: Count = 8


class IHTP(Section):
    enabled: bool = True
    k_values: list[Positive] = [1, 2, 5, 10]
    iterations: Count = 0
    """Rounds of choosing again by what the fit leaves, at most; 0 keeps the first choice."""


class MPSAE(Section):
    enabled: bool = True
    s_values: list[Positive] = [10, 32, 50, 100]
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """A token stops once its residual norm is at most this share of its own; 0 never does."""
    gram_dtype: Literal["float32", "bfloat16"] = "float32"
    refresh: Count = 0
    """Steps after which correlations are computed afresh, for bfloat16; 0 never."""


class OMP(Section):
    enabled: bool = True
    s_values: list[Positive] = [10]
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0


class TopKRefit(Section):
    enabled: bool = False
    k_values: list[Positive] = [10, 50]
    iterations: Count = 0


class NonNegativeMPSAE(MPSAE):
    enabled: bool = False
    s_values: list[Positive] = [10, 50]


class NonNegativeOMP(OMP):
    enabled: bool = False
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
    trained: list[Name] = ["topk"]
    """Names in trained_saes/."""
    folders: list[LocalName] = []
    """Local SAE folders or globs."""
    python: list[ClassName] = []
    """Classes of one's own, `custom_saes.my_module:MySAE`."""
    sae_regex_pattern: Name | None = None
    """Pattern for SAELens releases; goes with `sae_block_pattern`."""
    sae_block_pattern: Name | None = None

    @model_validator(mode="after")
    def _pair(self) -> Comparison:
        if (self.sae_regex_pattern is None) != (self.sae_block_pattern is None):
            raise ValueError("sae_regex_pattern and sae_block_pattern go together")
        for key in ("sae_regex_pattern", "sae_block_pattern"):
            try:
                re.compile(getattr(self, key) or "")
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{key}: not a regular expression: {error}") from None
        return self


class Controls(Section):
    names: list[Literal["random", "data_rows", "pca"]] = ["random", "data_rows", "pca"]
    s: Sizes = [32, 64]
    """Matching-pursuit steps over the untrained dictionaries, one control each: between two of them SAEs of any L0 are
    compared with untrained rows at their own."""
    pca_components: Sizes = [32, 64]


class Preflight(Section):
    tokens: Tokens = 1024
    max_norm_ratio: Above1 = 3.0
    """Stop when activations are this many times larger or smaller than the SAE's card says."""
    min_variance_explained: Annotated[float, Field(ge=-1_000, le=1)] | None = None
    """Stop when the baseline explains less than this; null only reports."""
