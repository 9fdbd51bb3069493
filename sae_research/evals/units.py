"""Evaluations over workers: what an evaluation lacks of its SAEs is cut into units of SAEs x parts, which workers score.

The driver runs an evaluation as always. Where `Scores.fill` would score what the result cache lacks, it hands units to the
workers instead. A worker runs the same evaluation on the unit's SAEs alone, up to the same `fill`, scores the unit's parts
there and gives the values back. What the driver knew by then travels along, so that a worker repeats none of it and needs
no shared result cache. The driver keeps the values and goes on as if it had scored them: the same bytes as in one process.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sae_research.config.params import Params, check_params
from sae_research.evals import harness
from sae_research.evals.harness import PreparedSAEs, Scores
from sae_research.evals.run import evaluation_function
from sae_research.lm import load_configured
from sae_research.runtime.cache import NO_CACHE, lent_results
from sae_research.runtime.errors import UserError
from sae_research.runtime.stages import StageFolder
from sae_research.runtime.workers import Job, Outcome, Unit, Workers
from sae_research.saes.base import ROOM
from sae_research.saes.sources import PREPARED

SLACK = 1.03
"""Units are made smaller while the least time that they could take grows by no more than this factor."""

Score = Callable[..., Iterator[tuple[str, Any]]]


def evaluation_job(evaluation: str, params: Params) -> Job:
    """Workers that score units of an evaluation of the prepared SAEs."""
    argument = {
        "evaluation": evaluation,
        "params": params.model_dump(mode="json"),
        "no_cache": os.environ.get(NO_CACHE, ""),
    }
    return Job(f"{__name__}:EvaluationWorker", json.dumps(argument).encode(), "sae_research.lm.load:device_memory")


# --- the driver ------------------------------------------------------------------------------


class Distribution:
    """Stands in for the scoring of `Scores.fill` while it is the harness' `delegate`."""

    def __init__(self, workers: Workers, device: str, once: Mapping[str, float] | None = None) -> None:
        """workers: of an `evaluation_job`; not this object's to close. device: the kind that this process computes on.
        once: by kind, as `plan_units` has it."""
        self._workers, self._device, self._once = workers, device, once or {}
        self._seen: list[Scores] = []
        self._made: dict[str, Any] = {}

    def seen(self, scores: Scores) -> None:
        self._seen.append(scores)

    def made(self, kind: str, key: str, value: Any) -> None:
        self._made[f"{kind}/{key}"] = value

    def fill(self, scores: Scores, score: Score, bar: tqdm, parts: Sequence[Any], step: int) -> None:
        missing = {name: [part for part in parts if scores.found[name][part] is None] for name in scores.lacking(parts)}
        self._refuse_too_large(scores, missing)
        missing = scores.guard.left(missing)
        if not missing:
            return
        each = (bar.total or 0) // sum(value is None for found in scores.found.values() for value in found.values())
        planned = plan_units(
            scores.group.families(missing), missing, parts, self._workers.size, self._once.get(scores.kind, 0.0)
        )
        units = {self._unit(scores, names, number, parts[number]): (names, parts[number]) for names, number in planned}
        for outcome in self._workers.run(list(units), json.dumps(self._made).encode()):
            _take(scores, outcome, *units[outcome.unit], bar, each)

    def _refuse_too_large(self, scores: Scores, missing: Mapping[str, Any]) -> None:
        for name in missing:
            size = ROOM * scores.group.infos[name].nbytes
            if self._workers.memory and size > self._workers.memory:
                with scores.guard.on(name):
                    raise UserError(
                        f"it takes some {size / 1e9:.1f} GB, a worker has {self._workers.memory / 1e9:.1f}: give each more "
                        "(cluster.cpus_per_worker, cluster.gpus_per_worker)"
                    )

    def _unit(self, scores: Scores, names: Sequence[str], number: int, part: Any) -> Unit:
        payload = {
            "kind": scores.kind,
            "hooks": [scores.group.hook, scores.group.hook_out],
            "saes": list(names),
            "part": number,
            "keys": {name: scores.keys[name][part] for name in names},
            "device": self._device,
            "known": {key: value for earlier in self._seen for key, value in earlier.known(names).items()},
        }
        about = f", {part}" if part != "" else ""
        size = sum(scores.group.infos[name].nbytes for name in names)
        return Unit(f"{scores.kind} of {_listed(names)}{about}", json.dumps(payload).encode(), float(size))


def plan_units(
    together: Sequence[Sequence[str]],
    missing: Mapping[str, Sequence[Any]],
    parts: Sequence[Any],
    workers: int,
    once: float = 0.0,
) -> list[tuple[list[str], int]]:
    """(SAEs, number of the part) of every unit: one for every group of SAEs and part. Families stay together. once: what a
    unit computes however many SAEs it holds, in what one SAE more takes."""
    parted = max(sum(any(part in missing[name] for name in missing) for part in parts), 1)
    groups = _split(together, missing, _groups(parted, len(together), workers, once))
    return [
        (names, number)
        for group in groups
        for number, part in enumerate(parts)
        if (names := [name for name in group if part in missing[name]])
    ]


def _groups(parts: int, families_: int, workers: int, once: float = 0.0) -> int:
    """Into how many groups SAEs are split. With one worker into one. Else into as many as still end within `SLACK` of the
    least time: a smaller unit is lost with less, and shares out better where units take longer than foreseen."""
    if workers == 1 or not families_:
        return 1
    times = {
        groups: math.ceil(parts * groups / workers) * (once + math.ceil(families_ / groups))
        for groups in range(1, families_ + 1)
    }
    least = min(times.values())
    return max(groups for groups, time in times.items() if time <= SLACK * least)


def _split(together: Sequence[Sequence[str]], weight: Mapping[str, Sequence[Any]], groups: int) -> list[list[str]]:
    """Families dealt out to groups of about as many missing values, the largest first."""
    loads, found = [0] * groups, [[] for _ in range(groups)]
    for names in sorted(together, key=lambda names: -len(names)):
        least = loads.index(min(loads))
        found[least] += names
        loads[least] += sum(len(weight[name]) for name in names)
    return [group for group in found if group]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} SAEs ({names[0]}, ...)"


def _take(scores: Scores, outcome: Outcome, names: Sequence[str], part: Any, bar: tqdm, step: int) -> None:
    """Keep what a unit of these SAEs and this part found; its SAEs fail where it failed."""
    if outcome.value is None:
        bar.write(f"{outcome.unit.name} failed: {outcome.failure}", file=bar.fp)
        found: dict[str, Any] = {"failed": dict.fromkeys(names, outcome.failure.splitlines()[0]), "values": {}}
    else:
        found = json.loads(outcome.value)
    for name, reason in found["failed"].items():
        if name not in scores.guard.failed:
            with scores.guard.on(name):
                raise UserError(reason)
    for name, value in found["values"].items():
        scores.keep(name, part, value)
        bar.update(step)


# --- a worker --------------------------------------------------------------------------------


class _Scored(BaseException):
    """Ends an evaluation on a worker once the unit's part is scored."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


class _Assigned:
    """A worker's `fill`: the unit's part alone. What the evaluation asks for before that travelled along."""

    def __init__(self, unit: Mapping[str, Any]) -> None:
        self._unit = unit

    def seen(self, scores: Scores) -> None:
        pass

    def made(self, kind: str, key: str, value: Any) -> None:
        pass

    def fill(self, scores: Scores, score: Score, bar: tqdm, parts: Sequence[Any], step: int) -> None:
        earlier = not scores.lacking(parts)
        asked = self._unit["kind"], *self._unit["hooks"]
        if (scores.kind, scores.group.hook, scores.group.hook_out) != asked or earlier:
            scores.score_here(score, bar, parts, step)
            return
        part = parts[self._unit["part"]]
        for name, key in self._unit["keys"].items():
            if scores.keys[name][part] != key:
                raise UserError(
                    f"{socket.gethostname()}: SAE {name}, the model, the text or the code are not the driver's; give "
                    "every node the same files (docs/cluster.md)"
                )
        scores.score_here(score, bar, [part], step)
        raise _Scored({name: found[part] for name, found in scores.found.items() if found[part] is not None})


class EvaluationWorker:
    """Scores units of one evaluation; loads the language model once."""

    def __init__(self, argument: bytes) -> None:
        given = json.loads(argument)
        os.environ[NO_CACHE] = given["no_cache"]
        self._params = check_params(given["params"], "the driver's parameters")
        self._evaluate = evaluation_function(given["evaluation"])
        torch.manual_seed(self._params.random_seed)
        self._lm = load_configured(self._params.model)

    def __call__(self, payload: bytes, shared: bytes) -> bytes:
        """Values and failures by SAE, as JSON."""
        asked = json.loads(payload)
        if self._lm.device.type != asked["device"]:
            raise UserError(
                f"{socket.gethostname()} computes on {self._lm.device.type}, the driver on {asked['device']}: run the "
                "driver where the workers are, or set cluster.gpus_per_worker"
            )
        stage, values = StageFolder(Path(os.devnull)), {}
        with lent_results({**json.loads(shared), **asked["known"]}), harness.delegated(_Assigned(asked)):
            try:
                for _ in self._evaluate(PreparedSAEs(PREPARED, self._lm, asked["saes"]), self._lm, self._params, stage):
                    pass
            except _Scored as done:
                values = done.values
        failed = {name: stage.skipped[name] for name in asked["saes"] if name in stage.skipped}
        lost = set(asked["saes"]) - set(values) - set(failed)
        if lost:
            raise RuntimeError(f"the evaluation ended without a value of {', '.join(sorted(lost))}: {stage.skipped}")
        return json.dumps({"values": values, "failed": failed}).encode()
