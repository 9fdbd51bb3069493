"""The points of a grid: every combination of the values that a sweep file lists, each as complete parameters."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from sae_research.errors import UserError
from sae_research.experiments import sae_interpretability as foreign
from sae_research.experiments.config_files import Values, flatten, names_sections, nearest, over, with_values
from sae_research.experiments.translate import NOTES, Changes, Measure, translate
from sae_research.params import Params, check_params
from sae_research.store import slugify

LIMIT_KEY = "max_experiments"
MOST_POINTS = 2_000
"""Combinations that are worked out unless a limit says how many are meant: each is a whole set of parameters."""
_SHARED = {"train.learning_rate": "learning_rate", "train.hook_name": "hook_name"}
"""Settings of the run that an SAE may have of its own."""
_IDLE = {key for key, text in NOTES.items() if text.startswith(("changes no result", "not used"))} | {
    "save_dir", "wandb_run_name", "data.n_eval_samples"}
"""Settings of SAE-Interpretability whose values would all give the same SAE."""


_SHORT = {"dict_size_to_input_ratio": "ratio", "sparsity_coeff": "sparsity", "n_train_samples": "samples",
          "gradient_accumulation_steps": "accumulation", "learning_rate": "lr", "l1_coefficient": "l1",
          "l0_coefficient": "l0"}
"""How long names of settings appear in the names of SAEs."""


class Point(NamedTuple):
    """One combination."""

    swept: dict[str, Any]
    """Its values of the swept keys."""
    values: Values
    """All of `params.yaml`, nested."""

    @property
    def label(self) -> str:
        return label(self.swept) or "the base configuration"


def label(swept: dict[str, Any]) -> str:
    """`lr=0.001 seed=1`"""
    return " ".join(f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in swept.items())


class Grid(NamedTuple):
    points: list[Point]
    notes: list[str]
    total: int
    """Combinations before any limit."""


def expand(base: Values, sweep: Values, params_yaml: Values, changes: Changes, measure: Measure,
           limit: int | None = None, where: tuple[str, str] = ("base config", "sweep config")) -> Grid:
    """The points of `sweep` over `base`, both in either format, in the order of the file, the last key fastest.

    limit: at most so many, in place of the file's own `max_experiments`. Raises `UserError` for unknown keys, empty
    lists, keys that change nothing, and a sweep of one format over a base of the other.
    """
    sweep = dict(sweep)
    file_limit = sweep.pop(LIMIT_KEY, None)
    if file_limit is not None and (not isinstance(file_limit, int) or isinstance(file_limit, bool) or file_limit < 1):
        raise UserError(f"{where[1]}: {LIMIT_KEY} must be a whole number above 0, got {file_limit!r}")
    ours = not base or names_sections(base)
    if ours:
        base_values = over(params_yaml, base)
        axes, notes = _our_axes(base_values, sweep, where), []
    else:
        given = foreign.canonical(base, where[0])
        axes, notes = _foreign_axes(given, sweep, where)
        for key, flag in (("tlens_model_name", "model"), ("data.dataset_name", "text"), ("data.n_train_samples", "tokens")):
            if getattr(changes, flag) is not None and len(axes.get(key, [])) > 1:
                raise UserError(f"{where[1]}: {key} takes several values, --{flag} sets one for all; leave one of them out")
    total = math.prod(len(values) for values in axes.values())
    if (wanted := min(total, limit or file_limit or total)) > (limit or file_limit or MOST_POINTS):
        raise UserError(f"{where[1]}: {wanted:,} points, more than the {MOST_POINTS:,} that are worked out without asking; "
                        f"shorten the lists, or set {LIMIT_KEY} there (or --limit) to the number you mean")
    chosen = [dict(zip(axes, values, strict=True))
              for values in itertools.islice(itertools.product(*axes.values()), limit or file_limit)]
    if ours:
        several = {key for key, values in axes.items() if len(values) > 1}
        points = [Point(swept, _our_point(base_values, swept, several, where[1])) for swept in chosen]
        return Grid(points, [*notes, *_device_note(changes)], total)
    points, translated = [], []
    for swept in chosen:
        values = {**given, **swept}
        named = {key: value for key, value in swept.items() if len(axes[key]) > 1}
        name = str(given.get("saes.name") or values.get("saes.sae_type", "sae"))
        result = translate(foreign.parse(values, where[0]), values, changes, measure, _suffixed(name, named))
        translated += result.notes
        points.append(Point(swept, with_values(params_yaml, result.overrides)))
    return Grid(points, [*notes, *dict.fromkeys(translated)], total)


# --- axes ------------------------------------------------------------------------------------

def _foreign_axes(given: Values, sweep: Values, where: tuple[str, str]) -> tuple[dict[str, list[Any]], list[str]]:
    """Canonical keys with their values. Settings of other architectures under `sae_specific` are left out, and said."""
    if sweep and names_sections(sweep) and not {"data", "saes"} & set(sweep):
        raise UserError(f"{where[1]} sweeps keys of params.yaml, {where[0]} is in SAE-Interpretability's format; write both "
                        "in one")
    sae_type = given.get("saes.sae_type")
    axes: dict[str, list[Any]] = {}
    notes = []
    for key, values in flatten(sweep).items():
        name = foreign.canonical_key(key, where[1])
        field = name.removeprefix("saes.")
        if key.startswith("sae_specific.") and foreign.foreign_keys([field], str(sae_type)):
            notes.append(f"{key}: left out, {sae_type} has no such setting")
            continue
        axes[name] = _listed(key, values, where[1], pairs=name == "saes.hard_concrete_stretch_limits")
        if name in _IDLE and len(axes[name]) > 1:
            raise UserError(f"{where[1]}: {key} changes no SAE, so that its points would all be the same; leave it out")
    return axes, notes


def _our_axes(values: Values, sweep: Values, where: tuple[str, str]) -> dict[str, list[Any]]:
    """Dotted keys of `params.yaml` with their values."""
    axes: dict[str, list[Any]] = {}
    known = flatten(Params.model_validate({}).model_dump()) | flatten(values)
    for key, listed in flatten(sweep).items():
        if key.split(".")[0] not in Params.model_fields:
            raise UserError(f"{where[1]}: unknown key {key}{nearest(key, known)}")
        axes[key] = _listed(key, listed, where[1], pairs=isinstance(known.get(key), list))
    return axes


def _listed(key: str, values: Any, where: str, pairs: bool) -> list[Any]:
    """The values of one key. pairs: one value is itself a list."""
    if not isinstance(values, list) or (pairs and values and not isinstance(values[0], list)):
        values = [values]
    if not values:
        raise UserError(f"{where}: {key} lists no value")
    return values


# --- points in our own format -----------------------------------------------------------------

def _our_point(base: Values, swept: dict[str, Any], several: set[str], where: str) -> Values:
    """The base with one combination in place. An SAE is named after those of its settings that take several values; what
    it takes from the run's settings becomes its own, so that all values train in one stream."""
    shared = {key: value for key, value in swept.items() if key in _SHARED and key in several}
    values = with_values(base, {key: value for key, value in swept.items() if key not in shared})
    saes = values["train"].get("saes", {})
    named: dict[str, dict[str, Any]] = {}
    for key, value in swept.items():
        if key.startswith("train.saes.") and key.count(".") >= 3:
            _, _, name, setting = key.split(".", 3)
            if name not in base["train"].get("saes", {}):
                known = base["train"].get("saes", {})
                raise UserError(f"{where}: {key}: no SAE of that name is trained{nearest(name, known)}")
            if key in several:
                named.setdefault(name, {})[setting] = value
    for key, value in shared.items():
        takers = [name for name, sae in saes.items() if sae.get(_SHARED[key]) is None]
        if not takers:
            raise UserError(f"{where}: {key} is for SAEs without a {_SHARED[key]} of their own, and all have one; sweep "
                            f"train.saes.NAME.{_SHARED[key]}")
        for name in takers:
            saes[name][_SHARED[key]] = named.setdefault(name, {})[_SHARED[key]] = value
    values["train"]["saes"] = {_suffixed(name, named.get(name, {})): sae for name, sae in saes.items()}
    return values


def _suffixed(name: str, swept: dict[str, Any]) -> str:
    """`topk` with `{"k": 16}` -> `topk_k_16`. Tells numbers apart that differ in sign or exponent alone."""
    fields = ((key.rpartition(".")[2], value) for key, value in swept.items())
    return slugify("_".join([name, *(f"{_SHORT.get(field, field)}_{_short(value)}" for field, value in fields)]))


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("e-", "em").replace("-", "m") if isinstance(value, (int, float)) else text


def _device_note(changes: Changes) -> Iterable[str]:
    if changes != Changes():
        raise UserError("--model, --text and --tokens are for SAE-Interpretability's files; override params.yaml itself "
                        "with model.name=…, text.dataset=… and train.tokens=…")
    return ()


def checked(point: Point, where: str) -> Params:
    """A point's parameters. Raises `UserError` in one line, with the point, for what params.yaml would refuse."""
    return check_params(copy.deepcopy(point.values), f"{where}, {point.label}")
