"""Points of a grid as jobs: what shares model, text and schedule trains in one pass; each job is one DVC experiment."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from sae_research.errors import UserError
from sae_research.experiments.config_files import Values, flatten, nearest, with_values
from sae_research.experiments.grid import Point, checked, label
from sae_research.params import EvalTypes, Params, check_params
from sae_research.sae_params import BaselineSAE, Comparison
from sae_research.store import fingerprint
from sae_research.training.progress import OPERATIONAL

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
        return label({key: value for key, value in self.points[0].swept.items()
                      if all(point.swept.get(key) == value for point in self.points)})


def make_jobs(points: list[Point], stages: list[str], sweep_name: str, where: str, saes_per_run: int = 32) -> list[Job]:
    """Jobs in the order of the points. stages: evaluations asked for, `core` among them.

    saes_per_run: a stream serves no more SAEs than this, so that their weights fit in memory; further ones make another
    job. Raises `UserError` where two different SAEs would have one name, a swept key changes nothing, or an evaluation is
    unknown.
    """
    known = set(EvalTypes.model_fields)
    for stage in stages:
        if stage not in known:
            raise UserError(f"--stages: unknown evaluation {stage}{nearest(stage, known)}")
    groups: dict[str, tuple[dict[str, Any], list[Point]]] = {}
    for point in points:
        checked(point, where)
        if not point.values["train"]["saes"]:
            raise UserError(f"{where}, {point.label}: train.saes names no SAE to train")
        saes, members = groups.setdefault(_stream_key(point.values), ({}, []))
        for name, sae in point.values["train"]["saes"].items():
            if saes.setdefault(name, sae) != sae:
                raise UserError(f"{where}: two different SAEs would be called {name}; sweep fewer keys, or values that "
                                "differ more")
        members.append(point)
    jobs = [_job(members[0].values, dict(part), members, stages, sweep_name, where)
            for saes, members in groups.values() for part in _parts(list(saes.items()), saes_per_run)]
    _check_distinct(jobs, where)
    return jobs


def _check_distinct(jobs: list[Job], where: str) -> None:
    """Raises `UserError` where two runs would train and measure the same, and so have one name."""
    first: dict[str, Job] = {}
    for job in jobs:
        one, other = (each.points[0].swept for each in (first.setdefault(job.name, job), job))
        idle = [key for key in one if one[key] != other[key]]
        if idle:
            raise UserError(f"{where}: {', '.join(idle)} changes no SAE and no figure of the evaluations asked for; leave "
                            "it out, or name its evaluation with --stages")


def _stream_key(values: Values) -> str:
    """What points must share to be trained in one pass: everything but the SAEs themselves."""
    train = {key: value for key, value in values["train"].items() if key not in ("saes", "hook_name")}
    return fingerprint({**values, "train": train})


def _parts(saes: list[tuple[str, Any]], most: int) -> list[list[tuple[str, Any]]]:
    """As few parts as possible, of equal size."""
    n_parts = math.ceil(len(saes) / most)
    size = math.ceil(len(saes) / n_parts)
    return [saes[start:start + size] for start in range(0, len(saes), size)]


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
    values["sae_variants"] = {name: {**section, "enabled": False} if isinstance(section, dict) else section
                              for name, section in variants.items()}
    values = with_values(values, {"model.device": "auto"})  # a worker's environment says which
    enabled = [name for name, on in check_params(values, where).eval_types.model_dump().items()
               if on and name != "dashboards"]  # a site has no metrics
    values["eval_types"] = {**values.get("eval_types", {}), **dict.fromkeys(enabled, False), **dict.fromkeys(stages, True)}
    # stages switched off run too, in seconds: figures of the commit below would stand in the experiment's row
    targets = [f"{name}_metrics" for name in dict.fromkeys([*stages, *enabled])]
    params = check_params(values, where)
    key = fingerprint([sorted(sae_keys(params).values()), targets])[:8]
    stem = re.sub(r"[^a-zA-Z0-9_-]+", "-", sweep_name).strip("-") or "sweep"
    return Job(f"{stem}-{key}", values, params, points, targets)


def sae_keys(params: Params) -> dict[str, str]:
    """What each SAE of a job and its figures depend on, as one fingerprint: equal keys are the same finished point."""
    evaluations = {"core_eval" if name == "core" else name for name, on in params.eval_types.model_dump().items() if on}
    sections = params.model_dump(include=_SECTIONS | evaluations)
    for name, keys in _ASIDE.items():
        sections[name] = {key: value for key, value in sections[name].items() if key not in keys}
    return {name: fingerprint({**sections, "sae": [name, params.train.hook_of(name), sae.model_dump(exclude={"hook_name"})]})
            for name, sae in params.train.saes.items()}


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
