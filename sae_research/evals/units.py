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
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sae_research.config.params import Params, check_params
from sae_research.evals import harness
from sae_research.evals.harness import PreparedSAEs, Scores
from sae_research.evals.run import evaluation_function
from sae_research.lm import LanguageModel, load_configured
from sae_research.lm.load import device_memory
from sae_research.planning.costs import UnitShares
from sae_research.runtime import processes
from sae_research.runtime.cache import NO_CACHE, lent_results
from sae_research.runtime.errors import UserError
from sae_research.runtime.stages import StageFolder
from sae_research.runtime.workers import Job, Outcome, Unit, Workers
from sae_research.saes.base import OPEN_BYTES, ROOM, SAEInfo, SparseAutoencoder
from sae_research.saes.sources import PREPARED

SLACK = 1.03
"""Units are made smaller while the least time that they could take grows by no more than this factor."""

KEPT_OF_A_GPU = 8
"""A worker keeps SAEs open in at most one part in so many of a GPU's memory, else in `OPEN_BYTES`."""

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

    def __init__(self, workers: Workers, device: str, shares: Mapping[str, UnitShares] | None = None) -> None:
        """workers: of an `evaluation_job`; not this object's to close. device: the kind that this process computes on.
        shares: by kind, as `plan_units` has them."""
        self._workers, self._device, self._shares = workers, device, shares or {}
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
        largest = max(scores.group.infos[name].nbytes for name in missing)
        planned = plan_units(
            scores.group.families(missing),
            missing,
            parts,
            self._workers.size,
            self._shares.get(scores.kind, UnitShares()),
            kept_bytes(self._device, self._workers.memory) // max(largest, 1),
        )
        units = {self._unit(scores, names, number, parts[number]): (names, parts[number]) for names, number in planned}
        with _on_record(scores.kind, len(units), self._workers.size) as ended:
            for outcome in self._workers.run(list(units), json.dumps(self._made).encode()):
                _take(scores, outcome, *units[outcome.unit], bar, each)
                ended(outcome)

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
        return Unit(f"{scores.kind} of {_listed(names)}{about}", json.dumps(payload).encode(), float(size), ",".join(names))


def plan_units(
    together: Sequence[Sequence[str]],
    missing: Mapping[str, Sequence[Any]],
    parts: Sequence[Any],
    workers: int,
    shares: UnitShares,
    room: float = math.inf,
) -> list[tuple[list[str], int]]:
    """(SAEs, number of the part) of every unit: one for every group of SAEs and part. Families stay together. room: SAEs
    that a worker keeps open."""
    parted = max(sum(any(part in missing[name] for name in missing) for part in parts), 1)
    groups = _split(together, missing, _groups(parted, len(together), workers, shares, room))
    return [
        (names, number)
        for group in groups
        for number, part in enumerate(parts)
        if (names := [name for name in group if part in missing[name]])
    ]


def kept_bytes(device: str, memory: int) -> int:
    """Bytes of the SAEs that a worker keeps open for its next unit. memory: bytes of its device."""
    return memory // KEPT_OF_A_GPU if device == "cuda" else OPEN_BYTES


def _groups(parts: int, families_: int, workers: int, shares: UnitShares, room: float = math.inf) -> int:
    """Into how many groups SAEs are split: with one worker as few as take the least time, else as many as still end within
    `SLACK` of it: a smaller unit is lost with less, and shares out better where units take longer than foreseen."""
    if not families_:
        return 1
    times = {groups: _seconds(parts, families_, groups, workers, shares, room) for groups in range(1, families_ + 1)}
    least = min(times.values())
    best = [groups for groups, time in times.items() if time <= (SLACK if workers > 1 else 1.0) * least]
    return best[-1] if workers > 1 else best[0]


def _seconds(parts: int, families_: int, groups: int, workers: int, shares: UnitShares, room: float) -> float:
    """What a worker takes for its units, in what scoring one SAE takes: it goes from one part to the next with SAEs that it
    keeps open."""
    units, size = math.ceil(parts * groups / workers), math.ceil(families_ / groups)
    opened = math.ceil(units / parts) if size <= room else units
    return units * (shares.once + size) + opened * size * shares.opening


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


@contextmanager
def _on_record(kind: str, units: int, workers: int) -> Generator[Callable[[Outcome], None]]:
    """Shows the units at work to whoever watches the project (`scripts.monitor_experiments`)."""
    began, counts = time.monotonic(), {"done": 0, "failed": 0}
    record = processes.record(
        "units", f"{kind}-{os.getpid()}", os.getpid(), units=units, workers=workers, seconds_left=None, **counts
    )

    def ended(outcome: Outcome) -> None:
        counts["failed" if outcome.value is None else "done"] += 1
        over = sum(counts.values())
        record.update(**counts, seconds_left=(time.monotonic() - began) / over * (units - over))

    try:
        yield ended
    finally:
        record.path.unlink()


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


class _Kept(PreparedSAEs):
    """The SAEs of a unit, of which a worker keeps open what its next unit may ask for again."""

    def __init__(self, lm: LanguageModel, names: Sequence[str], earlier: _Kept | None) -> None:
        """earlier: of the worker's last unit."""
        self._open: dict[str, SparseAutoencoder] = {}
        self._described = dict(earlier.infos) if earlier else {}
        self._room = kept_bytes(lm.device.type, device_memory(lm.device))
        if earlier:
            self._open = {name: sae for name, sae in earlier._open.items() if name in names}
        super().__init__(PREPARED, lm, names)
        if sum(info.nbytes for info in self.infos.values()) > self._room:
            # each would be asked for again only after the others: to keep some costs their memory for little
            self._open, self._room = {}, 0

    def describe(self, name: str) -> SAEInfo:
        if name not in self._described:
            sae = super().__getitem__(name)
            self._described[name] = sae.info()
            self._keep(name, sae)
        return self._described[name]

    def __getitem__(self, name: str) -> SparseAutoencoder:
        if name not in self._open:
            sae = super().__getitem__(name)
            self._keep(name, sae)
            return sae
        return self._open[name]

    def _keep(self, name: str, sae: SparseAutoencoder) -> None:
        if sum(self._described[one].nbytes for one in {name, *self._open}) <= self._room:
            self._open[name] = sae


class EvaluationWorker:
    """Scores units of one evaluation; loads the language model once."""

    def __init__(self, argument: bytes) -> None:
        given = json.loads(argument)
        os.environ[NO_CACHE] = given["no_cache"]
        self._params = check_params(given["params"], "the driver's parameters")
        self._evaluate = evaluation_function(given["evaluation"])
        torch.manual_seed(self._params.random_seed)
        self._lm = load_configured(self._params.model)
        self._saes: _Kept | None = None

    def __call__(self, payload: bytes, shared: bytes) -> bytes:
        """Values and failures by SAE, as JSON."""
        asked = json.loads(payload)
        if self._lm.device.type != asked["device"]:
            raise UserError(
                f"{socket.gethostname()} computes on {self._lm.device.type}, the driver on {asked['device']}: run the "
                "driver where the workers are, or set cluster.gpus_per_worker"
            )
        stage, values = StageFolder(Path(os.devnull)), {}
        self._saes = _Kept(self._lm, asked["saes"], self._saes)
        with lent_results({**json.loads(shared), **asked["known"]}), harness.delegated(_Assigned(asked)):
            try:
                for _ in self._evaluate(self._saes, self._lm, self._params, stage):
                    pass
            except _Scored as done:
                values = done.values
        failed = {name: stage.skipped[name] for name in asked["saes"] if name in stage.skipped}
        lost = set(asked["saes"]) - set(values) - set(failed)
        if lost:
            raise RuntimeError(f"the evaluation ended without a value of {', '.join(sorted(lost))}: {stage.skipped}")
        return json.dumps({"values": values, "failed": failed}).encode()
