"""Sections of `params.yaml` about what is shown: `visualization`, `analysis`, `dashboards`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from sae_research.config.section import Above0, LocalName, Name, Section, Tokens, Whole
from sae_research.config.yaml_files import read_mapping
from sae_research.runtime.errors import UserError

Inches = Annotated[float, Field(gt=1, le=60)]


class Style(Section):
    """Your own markers and colours, e.g. my_sae: {marker: P, color: teal}."""

    marker: Name
    """A marker of matplotlib, e.g. o, s, P."""
    color: Name
    """A colour of matplotlib, by name or as #rrggbb."""


class Visualization(Section):
    """Of all figures."""

    dpi: Annotated[Whole, Field(ge=30, le=600)] = 110
    """Resolution of a figure, dots per inch."""
    width_inches: Inches = 7.0
    """Width of a figure of one image, in inches; others are shares or multiples of it."""
    height_inches: Inches = 4.6
    """Height of the same."""
    architectures: dict[Name, Style] = {}


def load_visualization(path: str | Path = "params.yaml") -> Visualization:
    """The section alone: building every section's checks would take longer than half the drawing. Raises `UserError` as
    `load_params` does."""
    try:
        values = read_mapping(path)["visualization"]
        section = Visualization.model_validate(values)
        whole = not Visualization.left_out(values)
    except (UserError, KeyError, ValidationError):
        whole = False
    if not whole:
        from sae_research.config.params import load_params  # it says what is wrong, or fills in defaults

        return load_params(path).visualization
    return section


class Analysis(Section):
    """`python -m sae_research analyze ...` (docs/analysis.md)."""

    tokens: Tokens = 65_536
    """Tokens that `analyze stats` reads."""
    split: Literal["sae_train", "core_eval", "probe_train", "probe_test"] = "core_eval"
    """Which part of the text; `core_eval` holds no document that SAEs are trained on."""
    top_contexts: Annotated[Whole, Field(ge=1, le=1000)] = 20
    """Top contexts kept of each latent, no two from one document."""
    max_gb: Above0 = 10.0
    """Size limit of .cache/latents; the least recently used stores go first."""


Pair = Annotated[list[Name], Field(min_length=2, max_length=2)]


class Dashboards(Section):
    """From the statistics that `analysis` says how to collect (docs/dashboards.md)."""

    saes: list[Name] | None = None
    """Names in downloaded_saes/; null takes the baseline."""
    compare: list[Pair] = []
    """Pairs of them to show side by side, e.g. [[standard, topk]]."""
    other_model: LocalName | None = None
    """Every SAE on this model too, e.g. a finetuned one, beside itself on the first."""
    window: Annotated[Whole, Field(ge=1, le=2048)] = 24
    """Tokens of text on either side of the one that fires."""
    logits: Annotated[Whole, Field(ge=1, le=100)] = 10
    """Tokens listed that a latent raises and lowers."""
    neighbours: Annotated[Whole, Field(ge=1, le=100)] = 10
    """Nearest latents listed, by decoder cosine."""
    explain: bool = True
    """Describe and score latents without labels; off saves some milliseconds a latent."""
    neuronpedia: bool = False
    """Write Neuronpedia's JSON beside the site too."""
