"""A grid: every combination of the values that a sweep file lists, each as complete parameters, and as jobs.

Points that share model, text and schedule train in one pass; each job is one DVC experiment. A grid can also be written as a
Weights & Biases sweep file: `wandb sweep FILE`, `wandb agent ID`.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sae_research.config.evaluations import EVALUATIONS, EvalTypes
from sae_research.config.inputs import BaselineSAE, Comparison
from sae_research.config.params import Params, check_params
from sae_research.experiments import sae_interpretability as foreign
from sae_research.experiments.config_files import Values, flatten, names_sections, over, with_values, write_yaml
from sae_research.experiments.sae_interpretability import NOTES, Changes, Measure, translate
from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.files import fingerprint, slugify
from sae_research.runtime.former_names import elsewhere
from sae_research.training.checkpoints import OPERATIONAL

LIMIT_KEY = "max_experiments"
MOST_POINTS = 2_000
"""Combinations that are worked out unless a limit says how many are meant: each is a whole set of parameters."""
_SHARED = {"train.learning_rate": "learning_rate", "train.hook_name": "hook_name"}
"""Settings of the run that an SAE may have of its own."""
_IDLE = {key for key, text in NOTES.items() if text.startswith(("changes no result", "not used"))} | {
    "save_dir",
    "wandb_run_name",
    "data.n_eval_samples",
}
"""Settings of SAE-Interpretability whose values would all give the same SAE."""


_SHORT = {
    "dict_size_to_input_ratio": "ratio",
    "sparsity_coeff": "sparsity",
    "n_train_samples": "samples",
    "gradient_accumulation_steps": "accumulation",
    "learning_rate": "lr",
    "l1_coefficient": "l1",
    "l0_coefficient": "l0",
}
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


def expand(
    base: Values,
    sweep: Values,
    params_yaml: Values,
    changes: Changes,
    measure: Measure,
    limit: int | None = None,
    where: tuple[str, str] = ("base config", "sweep config"),
) -> Grid:
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
        raise UserError(
            f"{where[1]}: {wanted:,} points, more than the {MOST_POINTS:,} that are worked out without asking; "
            f"shorten the lists, or set {LIMIT_KEY} there (or --limit) to the number you mean"
        )
    chosen = [
        dict(zip(axes, values, strict=True))
        for values in itertools.islice(itertools.product(*axes.values()), limit or file_limit)
    ]
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
        raise UserError(
            f"{where[1]} sweeps keys of params.yaml, {where[0]} is in SAE-Interpretability's format; write both in one"
        )
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
            raise UserError(f"{where[1]}: unknown key {key}{elsewhere(key, 'parameter') or did_you_mean(key, known)}")
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
                raise UserError(f"{where}: {key}: no SAE of that name is trained{did_you_mean(name, known)}")
            if key in several:
                named.setdefault(name, {})[setting] = value
    for key, value in shared.items():
        takers = [name for name, sae in saes.items() if sae.get(_SHARED[key]) is None]
        if not takers:
            raise UserError(
                f"{where}: {key} is for SAEs without a {_SHARED[key]} of their own, and all have one; sweep "
                f"train.saes.NAME.{_SHARED[key]}"
            )
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
        raise UserError(
            "--model, --text and --tokens are for SAE-Interpretability's files; override params.yaml itself "
            "with model.name=…, text.dataset=… and train.tokens=…"
        )
    return ()


def checked(point: Point, where: str) -> Params:
    """A point's parameters. Raises `UserError` in one line, with the point, for what params.yaml would refuse."""
    return check_params(copy.deepcopy(point.values), f"{where}, {point.label}")


_SECTIONS = {"model", "text", "token_mask", "train", "random_seed", "eval_types"}
"""What a trained and evaluated SAE depends on, beside the sections of its evaluations."""
_ASIDE = {"model": {"device", "llm_batch_size"}, "train": OPERATIONAL | {"saes", "hook_name", "learning_rate", "device"}}
"""But not on these; its own hook and learning rate stand in its recipe."""


class Job(NamedTuple):
    """One experiment: one run of training, one of each evaluation asked for."""

    name: str
    values: Values
    """All of its `params.yaml`, nested."""
    params: Params
    points: list[Point]
    """What it covers."""
    targets: list[str]
    """Stages that DVC is asked for."""

    @property
    def saes(self) -> list[str]:
        return list(self.params.train.saes)

    @property
    def label(self) -> str:
        """The swept values that all of its points have."""
        return label(
            {
                key: value
                for key, value in self.points[0].swept.items()
                if all(point.swept.get(key) == value for point in self.points)
            }
        )


def make_jobs(points: list[Point], stages: list[str], sweep_name: str, where: str, saes_per_run: int = 32) -> list[Job]:
    """Jobs in the order of the points. stages: evaluations asked for, `core` among them.

    saes_per_run: a stream serves no more SAEs than this, so that their weights fit in memory; further ones make another
    job. Raises `UserError` where two different SAEs would have one name, a swept key changes nothing, or an evaluation is
    unknown.
    """
    known = set(EvalTypes.model_fields)
    for stage in stages:
        if stage not in known:
            raise UserError(f"--stages: unknown evaluation {stage}{elsewhere(stage, 'value') or did_you_mean(stage, known)}")
    groups: dict[str, tuple[dict[str, Any], list[Point]]] = {}
    for point in points:
        checked(point, where)
        if not point.values["train"]["saes"]:
            raise UserError(f"{where}, {point.label}: train.saes names no SAE to train")
        saes, members = groups.setdefault(_stream_key(point.values), ({}, []))
        for name, sae in point.values["train"]["saes"].items():
            if saes.setdefault(name, sae) != sae:
                raise UserError(
                    f"{where}: two different SAEs would be called {name}; sweep fewer keys, or values that differ more"
                )
        members.append(point)
    jobs = [
        _job(members[0].values, dict(part), members, stages, sweep_name, where)
        for saes, members in groups.values()
        for part in _parts(list(saes.items()), saes_per_run)
    ]
    _check_distinct(jobs, where)
    return jobs


def _check_distinct(jobs: list[Job], where: str) -> None:
    """Raises `UserError` where two runs would train and measure the same, and so have one name."""
    first: dict[str, Job] = {}
    for job in jobs:
        one, other = (each.points[0].swept for each in (first.setdefault(job.name, job), job))
        idle = [key for key in one if one[key] != other[key]]
        if idle:
            raise UserError(
                f"{where}: {', '.join(idle)} changes no SAE and no figure of the evaluations asked for; leave "
                "it out, or name its evaluation with --stages"
            )


def _stream_key(values: Values) -> str:
    """What points must share to be trained in one pass: everything but the SAEs themselves."""
    train = {key: value for key, value in values["train"].items() if key not in ("saes", "hook_name")}
    return fingerprint({**values, "train": train})


def _parts(saes: list[tuple[str, Any]], most: int) -> list[list[tuple[str, Any]]]:
    """As few parts as possible, of equal size."""
    n_parts = math.ceil(len(saes) / most)
    size = math.ceil(len(saes) / n_parts)
    return [saes[start : start + size] for start in range(0, len(saes), size)]


def _job(values: Values, saes: dict[str, Any], points: list[Point], stages: list[str], sweep_name: str, where: str) -> Job:
    """Complete parameters: the first SAE is the baseline, all others are compared with it, and of the evaluations only
    those asked for run. Pursuit variants and SAEs from elsewhere are left out: a sweep compares what it trains."""
    values = copy.deepcopy(values)
    values["train"] |= {"enabled": True, "saes": saes}
    baseline = values.get("baseline_sae", {})
    if not (baseline.get("source", "trained") == "trained" and baseline.get("name") in saes):
        values["baseline_sae"] = {**baseline, **BaselineSAE.only("trained", name=next(iter(saes)))}
    values["comparison_saes"] = Comparison(trained=["all"]).model_dump()
    variants = values.get("sae_variants", {})
    values["sae_variants"] = {
        name: {**section, "enabled": False} if isinstance(section, dict) else section for name, section in variants.items()
    }
    values = with_values(values, {"model.device": "auto"})  # a worker's environment says which
    enabled = [
        name for name, on in check_params(values, where).eval_types.model_dump().items() if on and name in EVALUATIONS
    ]  # dashboards have no metrics
    values["eval_types"] = {**values.get("eval_types", {}), **dict.fromkeys(enabled, False), **dict.fromkeys(stages, True)}
    # stages switched off run too, in seconds: figures of the commit below would stand in the experiment's row
    targets = [f"{name}_metrics" for name in dict.fromkeys([*stages, *enabled])]
    params = check_params(values, where)
    key = fingerprint([sorted(sae_keys(params).values()), targets])[:8]
    stem = re.sub(r"[^a-zA-Z0-9_-]+", "-", sweep_name).strip("-") or "sweep"
    return Job(f"{stem}-{key}", values, params, points, targets)


def sae_keys(params: Params) -> dict[str, str]:
    """What each SAE of a job and its metrics depend on, as one fingerprint: equal keys are the same finished point."""
    evaluations = {
        EVALUATIONS[name].section_name for name, on in params.eval_types.model_dump().items() if on and name in EVALUATIONS
    }
    sections = params.model_dump(include=_SECTIONS | evaluations)
    for name, keys in _ASIDE.items():
        sections[name] = {key: value for key, value in sections[name].items() if key not in keys}
    return {
        name: fingerprint({**sections, "sae": [name, params.train.hook_of(name), sae.model_dump(exclude={"hook_name"})]})
        for name, sae in params.train.saes.items()
    }


def without(job: Job, finished: Iterable[str], stages: list[str], sweep_name: str, where: str) -> Job | None:
    """The job less finished SAEs; None when nothing is left."""
    left = {name: sae for name, sae in job.values["train"]["saes"].items() if name not in set(finished)}
    if len(left) == len(job.saes):
        return job
    return _job(job.values, left, job.points, stages, sweep_name, where) if left else None


# --- DVC's overrides ---------------------------------------------------------------------------


def set_params(workspace: Values, wanted: Values) -> list[str]:
    """`-S` overrides that turn one `params.yaml` into another, in Hydra's grammar."""
    before, after = flatten(workspace), flatten(wanted)
    gone = [key for key in before if key not in after and not any(o.startswith(f"{key}.") for o in after)]
    changed = [key for key, value in after.items() if key not in before or before[key] != value]
    # an SAE that goes, goes whole: mappings that deletions would leave empty are deleted instead
    # Hydra does not see a null to delete; null and left out are the same to us
    tops = [key for key in _highest(gone, after) if before.get(key, key) is not None]
    # null empties a list too, and DVC's writer damages some files by `[]` (see `Section`)
    written = {key: hydra(None if after[key] == [] else after[key]) for key in changed}
    return [*(f"~{key}" for key in tops), *(f"++{key}={value}" for key, value in written.items())]


def _highest(gone: list[str], kept: Values) -> list[str]:
    tops: dict[str, None] = {}
    for key in gone:
        parts = key.split(".")
        for end in range(1, len(parts) + 1):
            prefix = ".".join(parts[:end])
            if prefix not in kept and not any(other.startswith(f"{prefix}.") for other in kept):
                tops[prefix] = None
                break
    return list(tops)


def hydra(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(hydra(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra(item)}" for key, item in value.items()) + "}"
    # a backslash is one unless a quote follows
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), str(value))
    return f"'{escaped}'"


def write_wandb_sweep(
    path: Path, points: list[Point], total: int, base: Path | None, arguments: list[str], project: str | None
) -> None:
    """Write the sweep file. An agent runs `scripts.run` once for each combination, in a folder of its own.

    total: combinations of the whole grid; `run_cap` carries a limit over. arguments: what `scripts.run` gets beside.
    Raises `UserError` where there is nothing to sweep or no base file that `scripts.run` could read.
    """
    if base is None:
        raise UserError("--wandb_sweep needs --base_config: agents run scripts.run, which reads one file")
    parameters: dict[str, dict[str, list[Any]]] = {}
    for point in points:
        for key, value in point.swept.items():
            values = parameters.setdefault(key, {"values": []})["values"]
            if value not in values:
                values.append(value)
    if not parameters:
        raise UserError("--wandb_sweep: the sweep file lists no value to sweep")
    sweep: dict[str, Any] = {
        "method": "grid",
        **({"project": project} if project else {}),
        "program": "scripts/run.py",
        "parameters": parameters,
        "command": ["${env}", "python", "-m", "scripts.run", "--config_path", str(base), *arguments, "${args_no_hyphens}"],
    }
    if len(points) < total:
        sweep["run_cap"] = len(points)
    write_yaml(path, sweep)
