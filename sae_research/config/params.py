"""All of `params.yaml`. Unknown keys, wrong types and impossible values are refused in one line."""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError, create_model

from sae_research.config.cluster import Cluster
from sae_research.config.evaluations import EVALUATIONS, EvalTypes
from sae_research.config.inputs import (
    ActivationCaching,
    BaselineSAE,
    Comparison,
    Controls,
    Model,
    Preflight,
    Text,
    TokenMask,
    Variants,
)
from sae_research.config.recipes import recipe_model
from sae_research.config.reporting import Analysis, Dashboards, Visualization
from sae_research.config.section import Section, Seed
from sae_research.config.training import Tracking, Train
from sae_research.config.yaml_files import read_mapping
from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.former_names import elsewhere


class _General(Section):
    random_seed: Seed = 42
    """Of every draw: shuffling, initial weights, controls, bootstrap."""
    model: Model = Model()
    text: Text = Text()
    token_mask: TokenMask = TokenMask()
    train: Train = Train()
    baseline_sae: BaselineSAE = BaselineSAE()
    sae_variants: Variants = Variants()
    comparison_saes: Comparison = Comparison()
    controls: Controls = Controls()
    preflight: Preflight = Preflight()
    eval_types: EvalTypes = EvalTypes()


if TYPE_CHECKING:

    class _WithEvaluations(_General):
        def __getattr__(self, section: str) -> Any: ...
else:
    _WithEvaluations = create_model(
        "_WithEvaluations",
        __base__=_General,
        **{one.section_name: (one.section, one.section()) for one in EVALUATIONS.values()},
    )


class Params(_WithEvaluations):
    """All of `params.yaml`: the general sections, one for each evaluation, and those below."""

    analysis: Analysis = Analysis()
    dashboards: Dashboards = Dashboards()
    tracking: Tracking = Tracking()
    cluster: Cluster = Cluster()
    activation_caching: ActivationCaching = ActivationCaching()
    visualization: Visualization = Visualization()


def load_params(path: str | Path = "params.yaml", partial: bool = False) -> Params:
    """Read and check the configuration. Raises `UserError` naming the key that is wrong.

    A file names every section (see `read_params`); with `partial` it may give a few, and the rest have their defaults,
    which are the values of the params.yaml that comes with the project.
    """
    return check_params(read_mapping(path) if partial else read_params(path), str(path))


def read_params(path: str | Path = "params.yaml") -> dict[str, Any]:
    """The values of a whole params.yaml, unchecked but for this: it was not cut off.

    Raises `UserError` where it lacks sections, or keys of the section it ends with; a key that another section leaves out
    has its default, and a line on stderr says so.
    """
    try:
        values = read_mapping(path)
    except UserError as error:
        hints = {
            "no such file": "; run from the project's folder",
            "not valid YAML": f"; if `dvc exp run -S KEY=[]` made it so, restore it (git checkout {path}) and write "
            "KEY=null",
        }
        hint = next((advice for words, advice in hints.items() if words in str(error)), "")
        raise UserError(f"{error}{hint}") from None
    unknown = [key for key in values if key not in Params.model_fields]
    lost = [key for key in Params.model_fields if key not in values]
    if lost and not unknown:  # an unknown key may be a section misspelt, which `check_params` says
        raise UserError(
            f"{path}: lacks {_listed(lost)}; if it was cut off, restore it (git checkout {path}), else copy "
            f"what is missing from the project's own (git show HEAD:{Path(path).name}); to read a few sections "
            "and take defaults for the rest: load_params(path, partial=True)"
        )
    left_out, last = Params.left_out(values), next(reversed(values), "")
    if cut := [key for key in left_out if key.startswith(f"{last}.")]:
        raise UserError(
            f"{path}: ends within the section {last}, without {_listed(cut)}; if it was cut off, restore it "
            f"(git checkout {path}), else add what is missing"
        )
    if left_out and not unknown:
        print(
            f"note: {path} leaves out {_listed([f'{key} ({_default(key)!r})' for key in left_out])}: defaults are taken",
            file=sys.stderr,
        )
    return values


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _default(key: str) -> Any:
    value: Any = Params()
    for part in key.split("."):
        value = getattr(value, part)
    return value.model_dump() if isinstance(value, Section) else value


def check_params(values: dict[str, Any], where: str) -> Params:
    """Parameters from nested values. Raises `UserError` that begins with `where` and names the key that is wrong."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {explained(error, _explain)}") from None


def check_trained_names(params: Params) -> None:
    """What the setup stage will look for among the trained SAEs is trained. Raises `UserError` before hours are spent."""
    wanted = [("comparison_saes.trained", name) for name in params.comparison_saes.trained if name != "all"]
    if params.baseline_sae.source == "trained":
        wanted.insert(0, ("baseline_sae.name", params.baseline_sae.name))
    for key, name in wanted:
        if params.train.enabled and name not in params.train.saes:
            raise UserError(
                f"{key}: {name} is not among train.saes ({_listed(list(params.train.saes))})"
                + did_you_mean(name, params.train.saes, otherwise="")
            )


LONGEST = 400
"""Characters of one complaint: a value or key that it quotes may be long."""


def explained(error: ValidationError, explain: Callable[[Mapping[str, Any]], str], most: int = 5) -> str:
    """All that is wrong, in one line of bearable length. explain: one complaint as a user would say it."""
    items = error.errors()
    more = [f"{len(items) - most} more"] if len(items) > most else []
    said = (" ".join(explain(item).split()) for item in items[:most])
    return "; ".join([*(one if len(one) <= LONGEST else f"{one[: LONGEST - 1]}…" for one in said), *more])


def got(item: Mapping[str, Any]) -> str:
    """` (got 3)`: what a complaint is about, unless it is a whole section, or an address, which may hold a key."""
    return "" if isinstance(item["input"], dict) or "base_url" in item["loc"] else f" (got {shortened.repr(item['input'])})"


shortened = reprlib.Repr()
shortened.maxstring = shortened.maxother = shortened.maxlong = 80


def _explain(item: Mapping[str, Any]) -> str:
    """One pydantic complaint as a user would say it, with the nearest known key where one is misspelt."""
    in_recipe = item["loc"][:2] == ("train", "saes") and len(item["loc"]) > 3  # its fourth part names the recipe
    where = ".".join(str(part) for i, part in enumerate(item["loc"]) if not (in_recipe and i == 3))
    if item["type"] == "union_tag_invalid":
        tag, known = item["ctx"]["tag"], re.findall(r"'(\w+)'", item["ctx"]["expected_tags"])
        return f"{where}: unknown recipe {tag}{elsewhere(tag, 'value') or did_you_mean(tag, known)}"
    if item["type"] != "extra_forbidden":
        message = (
            item["msg"]
            .removeprefix("Value error, ")
            .replace("String should match pattern '^[a-z0-9_]+$'", "a name is made of a-z, 0-9 and _")
        )
        return f"{where}: {message}{got(item)}"
    known = sorted(recipe_model(item["loc"][3]).model_fields) if in_recipe else _known_keys(item["loc"][:-1])
    last = str(item["loc"][-1])
    former = elsewhere(where, "parameter") or elsewhere(last, "parameter", "value")
    return f"unknown key {where}{former or did_you_mean(last, known)}"


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    section: Any = Params
    for part in loc:
        field = section.model_fields.get(part) if isinstance(section, type) else None
        if field is None:  # inside a mapping such as train.saes.<name>
            continue
        section = field.annotation
        for candidate in getattr(section, "__args__", ()):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return sorted(section.model_fields)


SIZES = ("k_values", "s_values")
"""Keys of the sections of `sae_variants` that count latents of a token or sequence."""


def check_sizes(params: Params, d_in: int, d_sae: int, transcoder: bool = False, name: str = "the baseline") -> None:
    """Raises `UserError` where a control or a pursuit variant would need more latents than the SAE called `name` has, or
    more components than its activations have dimensions. A transcoder has no variants."""
    controls = params.controls
    if {"random", "data_rows"} & set(controls.names) and max(controls.s) > d_sae:
        raise UserError(f"controls.s = {max(controls.s)} is larger than {name}'s d_sae = {d_sae}")
    if "pca" in controls.names and max(controls.pca_components) > d_in:
        raise UserError(
            f"controls.pca_components = {max(controls.pca_components)} is larger than the activations' width {d_in}"
        )
    for label, section in () if transcoder else params.sae_variants:
        for key in SIZES:
            sizes: list[int] = getattr(section, key, []) if getattr(section, "enabled", False) else []
            if max(sizes, default=0) > d_sae:
                raise UserError(f"sae_variants.{label}.{key}: {max(sizes)} is larger than {name}'s d_sae = {d_sae}")
