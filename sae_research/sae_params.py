"""What the sections that name the SAEs to evaluate may say: baseline, pursuit variants, comparisons, controls, checks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sae_research.section import ClassName, LocalName, Positive, Section
from sae_research.store import SLUG


class BaselineSAE(Section):
    source: Literal["trained", "hub", "sae_lens", "folder"] = "trained"
    name: Annotated[str, Field(pattern=SLUG.pattern)] = "standard"
    """The baseline's name in every table; with `source: trained`, also its folder in trained_saes/."""
    repo_id: str | None = None
    filename: str | None = None
    release: str | None = None
    sae_id: str | None = None
    path: LocalName | None = None
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
    s_values: list[Positive] = [10, 32, 50, 100]
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
    folders: list[LocalName] = []
    """Local SAE folders or globs."""
    python: list[ClassName] = []
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
