"""What the section `visualization` of `params.yaml` may say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from sae_research.errors import UserError
from sae_research.section import Name, Section, Whole
from sae_research.yaml_files import read_mapping

Inches = Annotated[float, Field(gt=1, le=60)]


class Style(Section):
    marker: Name
    color: Name


class Visualization(Section):
    dpi: Annotated[Whole, Field(ge=30, le=600)] = 110
    width_inches: Inches = 7.0
    height_inches: Inches = 4.6
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
        from sae_research.params import load_params  # it says what is wrong, or fills in defaults

        return load_params(path).visualization
    return section
