"""What every section of `params.yaml` is made of."""

from __future__ import annotations

from typing import Annotated, Any, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Unknown keys are refused, values never change. A list may be emptied by null: DVC's writer (ruamel.yaml) damages a
    file it wrote before when `dvc exp run -S` sets a list with a comment to `[]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    @model_validator(mode="before")
    @classmethod
    def _null_empties_lists(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        lists = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is list}
        return {key: [] if value is None and key in lists else value for key, value in values.items()}


class MayBeLocal:
    """Marks a parameter whose text may name a file or folder of this machine: what lies there is an input of every stage
    that reads the parameter."""


class PythonClass:
    """Marks a parameter that names a class of the user's own, `package.module:Class`."""


LocalName = Annotated[str, MayBeLocal()]
"""A name that the project, a hub or a file or folder of this machine gives a meaning."""
ClassName = Annotated[str, PythonClass()]
