"""What every section of `params.yaml` is made of: strict types, and which keys a file leaves out."""

from __future__ import annotations

import unicodedata
from typing import Annotated, Any, ClassVar, Self, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sae_research.runtime.files import NAME_LIMIT

MOST = 10**9
"""Of what is counted and held in memory; a larger number is a slip of the pen."""
MOST_TOKENS = 10**13
"""Of a stream of text, which is not held."""
MOST_LATENTS = 2**24
"""As many as the widest published SAE has."""


def _whole(value: Any) -> Any:
    """1e6 is a float in YAML, and a whole number all the same."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sound(value: str) -> str:
    if not value.strip():
        raise ValueError("is blank")
    return _writable(value, allowed="")


def _writable(value: str, allowed: str = "\n\t") -> str:
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") and character not in allowed:
            raise ValueError(f"holds the control character {character!r}")
    return value


def _several(value: Any) -> Any:
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Whole = Annotated[int, BeforeValidator(_whole)]
Sizes = Annotated[list[Annotated[Whole, Field(ge=1, le=MOST)]], BeforeValidator(_several), Field(min_length=1)]
"""One number or several."""
Count = Annotated[Whole, Field(ge=0, le=MOST)]
Positive = Annotated[Whole, Field(ge=1, le=MOST)]
Tokens = Annotated[Whole, Field(ge=1, le=MOST_TOKENS)]
Width = Annotated[Whole, Field(ge=1, le=MOST_LATENTS)]
Seed = Annotated[Whole, Field(ge=0, lt=2**31)]
Real = Annotated[float, Field(ge=-MOST, le=MOST)]
NonNegative = Annotated[float, Field(ge=0, le=MOST)]
Above0 = Annotated[float, Field(gt=0, le=MOST)]
Above1 = Annotated[float, Field(gt=1, le=MOST)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[tuple[Real, Real], BeforeValidator(_pair)]
_Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[_Beta, _Beta], BeforeValidator(_pair)]
"""Adam's decay rates of its two moments."""
Name = Annotated[str, Field(max_length=4096), AfterValidator(_sound)]
"""A name, path, pattern or word: not blank, on one line."""
Prompt = Annotated[str, Field(max_length=10_000), AfterValidator(_writable)]
"""Text for a model to read: any spaces and line ends."""
Slug = Annotated[str, Field(pattern="^[a-z0-9_]+$", max_length=NAME_LIMIT)]
"""An SAE's name, which is also a folder's."""


class MayBeLocal:
    """Marks a parameter whose text may name a file or folder of this machine: what lies there is an input of every stage
    that reads the parameter."""


class PythonClass:
    """Marks a parameter that names a class of the user's own, `package.module:Class`."""


class Packaged:
    """Marks a parameter that may name a dictionary which comes with the package."""


LocalName = Annotated[Name, MayBeLocal()]
"""A name that the project, a hub or a file or folder of this machine gives a meaning."""
ClassName = Annotated[Name, PythonClass()]
PackagedName = Annotated[Name, Packaged()]


class Section(BaseModel):
    """Unknown keys are refused, values never change. Types are strict: true is no number, "8" is none, neither is NaN or
    infinity, and nothing that has a name is "".

    A list may be emptied by null: DVC's writer (ruamel.yaml) damages a file it wrote before when `dvc exp run -S` sets a
    list with a comment to `[]`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, str_min_length=1)
    may_be_left_out: ClassVar[frozenset[str]] = frozenset()
    """Keys that a whole file need not name."""

    def __hash__(self) -> int:
        """Of its content, which may hold lists: these have no hash of their own."""
        return hash(self.model_dump_json())

    @model_validator(mode="before")
    @classmethod
    def _null_empties_lists(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        lists = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is list}
        return {key: [] if value is None and key in lists else value for key, value in values.items()}

    @classmethod
    def left_out(cls, values: dict[str, Any]) -> list[str]:
        """Dotted keys that `values` does not name, of this section and of those inside it, in order; a section that is
        missing altogether is one."""
        found = []
        for key, field in cls.model_fields.items():
            if key not in values:
                found += [key] if key not in cls.may_be_left_out else []
            elif (
                isinstance(field.annotation, type)
                and issubclass(field.annotation, Section)
                and isinstance(values[key], dict)
            ):
                found += [f"{key}.{inner}" for inner in field.annotation.left_out(values[key])]
        return found


class FromOneSource(Section):
    """A section that names something by `source` and the keys which that source needs; keys of other sources are null."""

    NEEDS: ClassVar[dict[str, tuple[str, ...]]]
    """Source -> the keys it needs. The first source needs none and is the default."""

    @model_validator(mode="before")
    @classmethod
    def _source_of_the_keys_given(cls, values: Any) -> Any:
        """A block that names no source means the one whose keys it gives."""
        if not isinstance(values, dict) or values.get("source") is not None:
            return values
        sources = [source for source, keys in cls.NEEDS.items() if any(values.get(key) is not None for key in keys)]
        if len(sources) > 1:
            raise ValueError(f"names keys of several sources; add source: {' or source: '.join(sources)}")
        return {**values, "source": (sources or list(cls.NEEDS))[0]}

    @model_validator(mode="after")
    def _its_keys_and_no_others(self) -> Self:
        chosen: str = getattr(self, "source")  # noqa: B009  (each subclass names its own sources)
        if missing := [key for key in self.NEEDS[chosen] if getattr(self, key) is None]:
            raise ValueError(f"source: {chosen} needs {' and '.join(missing)}")
        for source, keys in self.NEEDS.items():
            given = [key for key in keys if getattr(self, key) is not None]
            if source != chosen and given:
                names = " and ".join(given)
                raise ValueError(f"source: {chosen} does not use {names}; write source: {source}, or null for {names}")
        return self

    @classmethod
    def only(cls, source: str, **given: Any) -> dict[str, Any]:
        """Values of a block for one source, the keys of all others null."""
        return {**{key: None for keys in cls.NEEDS.values() for key in keys}, "source": source, **given}
