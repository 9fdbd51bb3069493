"""What the section `visualization` of `params.yaml` may say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError
from ruamel.yaml import YAML, YAMLError

from sae_research.section import Section


class Style(Section):
    marker: str
    color: str


class Visualization(Section):
    dpi: Annotated[int, Field(ge=30, le=600)] = 110
    width_inches: Annotated[float, Field(gt=1)] = 7.0
    height_inches: Annotated[float, Field(gt=1)] = 4.6
    architectures: dict[str, Style] = {}


def load_visualization(path: str | Path = "params.yaml") -> Visualization:
    """The section alone: building every section's checks would take longer than half the drawing. Raises `UserError` as
    `load_params` does."""
    try:
        return Visualization.model_validate(YAML(typ="safe").load(Path(path).read_text())["visualization"])
    except (OSError, YAMLError, TypeError, KeyError, ValidationError):
        from sae_research.params import load_params  # it says what is wrong, or fills in defaults

        return load_params(path).visualization
