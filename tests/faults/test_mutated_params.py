"""`params.yaml` changed at random: one line that says what is wrong, or every parameter is what the file says.

The measure is a second reading of the file by another parser: a key that it names has the value it gives, and a key that it
does not name has its default and is named on stderr.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from sae_research.config.params import Params, check_params, load_params
from sae_research.runtime.errors import UserError
from tests.helpers.mutations import changed_bytes, changed_mapping, mappings_of

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "params.yaml").read_text()
KEYS = ["seed", "path", "k", "tokens", "tokenz", "enabled", "source", "name", "", "d_sae", "recipe", "train", "saes"]


def found_at(values: dict[str, Any], path: tuple[str, ...]) -> Any:
    inside: Any = values
    for key in path:
        inside = inside[key]
    return inside


def plain(value: Any) -> Any:
    """Lists for tuples, [] for the null that empties a list, and nothing else."""
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def leaves(values: Any) -> list[tuple[str, ...]]:
    return [path for path in mappings_of(values) if path and not isinstance(found_at(values, path), dict)]


DEFAULTS = {path: found_at(Params().model_dump(), path) for path in leaves(Params().model_dump())}


def holds(params: Params, values: dict[str, Any]) -> bool:
    """Whether the parameters are what the file says, and nothing else than defaults where it says nothing."""
    found, said = params.model_dump(), set(leaves(values))
    for path in leaves(found):
        want = found_at(values, path) if path in said else DEFAULTS.get(path, ...)
        got = plain(found_at(found, path))
        if want is ... or path[:2] == ("train", "saes") and path not in said or path[-1] == "source":
            continue  # a recipe's own defaults depend on what the file says of it, as a source does on its keys
        if got != plain(want) and not (got == [] and want is None):
            return False
    named = set(mappings_of(found))
    return all(path in named or found_at(values, path) == {} for path in said)


def check(outcome: UserError | Params, values: dict[str, Any], change: str) -> str:
    if isinstance(outcome, UserError):
        assert "\n" not in str(outcome) and len(str(outcome)) < 1500, (change, str(outcome))
        return "refused"
    assert holds(outcome, values), change
    return "same" if outcome == Params() else "as stated"


def in_values(count: int, seed: int) -> dict[str, int]:
    rng, values, seen = random.Random(seed), YAML(typ="safe").load(TEXT), dict.fromkeys(["refused", "same", "as stated"], 0)
    for _ in range(count):
        changed, change = changed_mapping(values, rng, rng.choice(["replace", "replace", "delete", "add"]), KEYS)
        try:
            outcome: UserError | Params = check_params(changed, "params.yaml")
        except UserError as error:
            outcome = error
        seen[check(outcome, changed, change)] += 1
    return seen


def in_bytes(path: Path, count: int, seed: int) -> dict[str, int]:
    rng, seen = random.Random(seed), dict.fromkeys(["refused", "same", "as stated"], 0)
    for _ in range(count):
        data, change = changed_bytes(TEXT.encode(), rng)
        path.write_bytes(data)
        try:
            outcome: UserError | Params = load_params(path)
        except UserError as error:
            outcome = error
        values = {} if isinstance(outcome, UserError) else YAML(typ="safe", pure=True).load(data.decode("utf-8-sig"))
        seen[check(outcome, values, change)] += 1
    return seen


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_changed_value_is_refused_or_used(count: int) -> None:
    seen = in_values(count, seed=count)
    assert seen["refused"] > count / 2 and seen["as stated"] > count / 100, seen
    print(seen)


@pytest.mark.parametrize("count", [2, pytest.param(300, marks=pytest.mark.slow)])
def test_changed_bytes_are_refused_or_read_as_they_stand(tmp_path: Path, count: int) -> None:
    seen = in_bytes(tmp_path / "params.yaml", count, seed=count)
    assert count < 10 or min(seen.values()) > 0, seen
    print(seen)
