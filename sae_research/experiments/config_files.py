"""Configuration files of two kinds, read and overridden: overrides of `params.yaml`, and SAE-Interpretability's own."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from ruamel.yaml import YAML

from sae_research.config.params import Params
from sae_research.config.yaml_files import parse
from sae_research.runtime.errors import UserError

Values = dict[str, Any]
PARAMS = Path("params.yaml")


def write_yaml(path: Path, values: Values) -> None:
    """Write a mapping in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yaml = YAML()
    yaml.default_flow_style = False
    with path.open("w") as handle:
        yaml.dump(values, handle)


def names_sections(values: Values) -> bool:
    """Whether a file overrides `params.yaml`: every key is a section, or starts with one and a dot."""
    return bool(values) and all(str(key).split(".")[0] in Params.model_fields for key in values)


def flatten(values: Values) -> Values:
    """Nested mappings as dotted keys; an empty mapping stays whole.

    Keys may be dotted already: `{"train.saes": {"topk": {"k": 4}}}` -> `{"train.saes.topk.k": 4}`.
    """
    flat: Values = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        flat |= {f"{key}.{inner}": item for inner, item in flatten(value).items()} if nested else {str(key): value}
    return flat


def with_values(values: Values, overrides: Values) -> Values:
    """A copy with dotted keys set, as `dvc exp run -S` sets them; mappings on the way are made where there are none."""
    touched = {key.partition(".")[0] for key in overrides}  # OmegaConf takes 60 ms for all of params.yaml
    try:
        config = OmegaConf.create({key: values[key] for key in values if key in touched}, flags={"allow_objects": True})
        for key, value in overrides.items():
            OmegaConf.update(config, key, value, merge=False, force_add=True)
    except OmegaConfBaseException as error:  # a `${` without its end
        raise UserError(f"{' '.join(str(error).split())[:200]}") from None
    return {**copy.deepcopy(values), **OmegaConf.to_container(config)}  # ty: ignore[invalid-argument-type]


def over(params_yaml: Values, overrides: Values) -> Values:
    """`params.yaml` under a file's overrides, nested or dotted. A file that defines SAEs, each by its `recipe`, trains
    those it names and no others; one that only changes settings of SAEs leaves the rest as they are."""
    flat = flatten(overrides)
    named = {key.split(".")[2]: None for key in flat if key.startswith("train.saes.")}
    if any(key.startswith("train.saes.") and key.endswith(".recipe") for key in flat):
        present = params_yaml.get("train", {}).get("saes", {})
        params_yaml = with_values(params_yaml, {"train.saes": {name: present.get(name, {}) for name in named}})
    return with_values(params_yaml, flat)


def parse_overrides(lines: Iterable[str]) -> Values:
    """`KEY=VALUE` arguments, values read as YAML: `lr=3e-4`, `saes.sae_positions=[blocks.2.hook_resid_pre]`.

    Raises `UserError` for a line without `=` or a value that is no YAML.
    """
    overrides: Values = {}
    for line in lines:
        key, sign, value = line.partition("=")
        if not (sign and key):
            raise UserError(f"{line!r}: expected KEY=VALUE, such as saes.sparsity_coeff=0.03")
        overrides[key.removeprefix("--")] = parse(value, line)
    return overrides
