"""What the section `dashboards` of `params.yaml` may say."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sae_research.section import LocalName, Name, Positive, Section, Whole

Pair = Annotated[list[Name], Field(min_length=2, max_length=2)]


class Dashboards(Section):
    saes: list[Name] | None = None
    """Names in downloaded_saes/; null takes the baseline."""
    compare: list[Pair] = []
    """Pairs of these names, shown side by side."""
    other_model: LocalName | None = None
    """A second model, e.g. a finetuned one: every SAE is shown on it too, beside itself on the first."""
    window: Annotated[Whole, Field(ge=1, le=2048)] = 24
    """Tokens of text on either side of the one that fires."""
    logits: Annotated[Whole, Field(ge=1, le=100)] = 10
    """Tokens listed that a latent raises and lowers."""
    neighbours: Annotated[Whole, Field(ge=1, le=100)] = 10
    """Nearest latents listed, by decoder cosine."""
    explain: bool = True
    """Describe and score latents without labels; off saves some milliseconds a latent."""
    latents_per_file: Positive = 16
    """A page loads one file of this many latents."""
    neuronpedia: bool = False
    """Write Neuronpedia's JSON beside the site too."""
