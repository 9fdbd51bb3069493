"""What the section `analysis` of `params.yaml` may say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sae_research.section import Above0, Section, Tokens, Whole


class Analysis(Section):
    tokens: Tokens = 65_536
    """Tokens that `analyze stats` reads."""
    split: Literal["sae_train", "core_eval", "probe_train", "probe_test"] = "core_eval"
    """Which part of the text; `core_eval` holds no document that SAEs are trained on."""
    top_contexts: Annotated[Whole, Field(ge=1, le=1000)] = 20
    """Top contexts kept of each latent, no two from one document."""
    sample_levels: Annotated[Whole, Field(ge=1, le=20)] = 5
    """Levels of activation that contexts are sampled from, each an equal part of a latent's firings."""
    samples_per_level: Annotated[Whole, Field(ge=1, le=100)] = 5
    max_gb: Above0 = 10.0
    """Size limit of .cache/latents; the least recently used stores go first."""
