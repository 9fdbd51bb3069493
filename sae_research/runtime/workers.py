"""Workers: who computes the units that a stage is cut into. In this process, or actors on a Ray cluster (`ray_workers`).

The driver, which is the stage's process, cuts its work into `Unit`s and hands them to `Workers.run`; that gives each
unit's value back as bytes, in the order in which they end. A worker is made once from a `Job` (it loads the language model
there) and then computes one unit after another. Units are idempotent: one that is lost with its worker is computed again by
another. Only the driver writes outputs.
"""

from __future__ import annotations

import importlib
import platform
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol

import psutil

from sae_research.runtime.errors import UserError
from sae_research.runtime.sources import sources_fingerprint


class Cluster(Protocol):
    """Section `cluster` of `params.yaml`, which says what each value means."""

    @property
    def address(self) -> str | None: ...
    @property
    def gpus_per_worker(self) -> float | None: ...
    @property
    def cpus_per_worker(self) -> int: ...
    @property
    def max_retries(self) -> int: ...


class Unit(NamedTuple):
    """One piece of work."""

    name: str
    """Shown where it fails."""
    payload: bytes
    """What the worker is asked for."""
    cost: float = 1.0
    """Relative to the other units: the longest start first."""
    needs: str = ""
    """What a worker prepares for it; units with the same go to the same worker where they can."""


class Job(NamedTuple):
    """How a worker is made: `target`, as `module:Class`, called with `argument`. The object is called with each unit's
    payload and what all units of a run share, and gives the unit's value."""

    target: str
    argument: bytes
    memory: str = ""
    """`module:function` that gives the bytes of the device that a worker computes on; empty: main memory's."""

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]


class Outcome(NamedTuple):
    """How a unit ended."""

    unit: Unit
    value: bytes | None
    failure: str = ""
    """Why there is no value, with the end of the worker's log."""


class Workers(Protocol):
    """What runs units."""

    size: int
    """Units that run at the same time."""
    memory: int
    """Bytes that each worker has, of its device or of its share of main memory."""

    def run(self, units: Sequence[Unit], shared: bytes = b"") -> Iterator[Outcome]:
        """Every unit's outcome, in the order in which they end. A unit that raised, or whose worker died, is tried again as
        often as `cluster.max_retries` says; a `UserError` is not tried again. Raises `UserError` when no worker is left."""
        ...

    def close(self) -> None:
        """Let the workers go; what they compute is lost."""
        ...


def _named(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def worker(job: Job) -> Callable[[bytes, bytes], bytes]:
    """The object that computes a job's units."""
    return _named(job.target)(job.argument)


def memory(job: Job) -> int:
    """Bytes of the device that this process computes on."""
    return _named(job.memory)() if job.memory else psutil.virtual_memory().total


def versions(job: Job) -> dict[str, str]:
    """What the driver and a worker must have alike for equal numbers."""
    return {
        "Python": platform.python_version(),
        "torch": version("torch"),
        "the project's code or libraries": sources_fingerprint(job.module)[:12],
    }


def by_cost(units: Sequence[Unit]) -> list[Unit]:
    """The longest first; what costs alike in the order given."""
    return sorted(units, key=lambda unit: -unit.cost)


class Waiting:
    """Units that no worker has yet, the longest first, and what each worker has prepared."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._by_need: dict[str, deque[tuple[Unit, int]]] = {}
        self._prepared: dict[Any, str] = {}
        self._count = len(units)
        for unit in by_cost(units):
            self._by_need.setdefault(unit.needs, deque()).append((unit, 1))

    def __len__(self) -> int:
        return self._count

    def take(self, worker: Any) -> tuple[Unit, int]:
        """(unit, turn) for a worker: one that needs what it has prepared; else one that needs what no other has; else one of
        those of which most wait."""
        need = self._prepared.pop(worker, None)
        if need not in self._by_need:
            theirs = set(self._prepared.values())
            mine = next((other for other in self._by_need if other not in theirs), None)
            need = max(self._by_need, key=lambda one: len(self._by_need[one])) if mine is None else mine
        units = self._by_need[need]
        taken = units.popleft()
        if not units:
            del self._by_need[need]
        self._prepared[worker], self._count = need, self._count - 1
        return taken

    def put_back(self, unit: Unit, turn: int) -> None:
        """A unit that was lost: the next to be taken of those that need the same."""
        self._by_need = {unit.needs: self._by_need.pop(unit.needs, deque()), **self._by_need}
        self._by_need[unit.needs].appendleft((unit, turn))
        self._count += 1

    def forget(self, worker: Any) -> None:
        """What a worker that died had prepared."""
        self._prepared.pop(worker, None)


class InProcess:
    """Units computed one after another, here."""

    size = 1

    def __init__(self, job: Job, compute: Callable[[bytes, bytes], bytes] | None = None) -> None:
        """compute: the job's object where this process has one."""
        self.memory = memory(job)
        self._compute = worker(job) if compute is None else compute

    def run(self, units: Sequence[Unit], shared: bytes = b"") -> Iterator[Outcome]:
        for unit in by_cost(units):
            try:
                value = self._compute(unit.payload, shared)
            except UserError as error:
                yield Outcome(unit, None, str(error))
            except Exception as error:  # noqa: BLE001 (a unit that fails takes no other with it)
                yield Outcome(unit, None, "".join(traceback.format_exception_only(error)).strip())
            else:
                yield Outcome(unit, value)

    def close(self) -> None:
        pass


def start_workers(cluster: Cluster, job: Job, compute: Callable[[bytes, bytes], bytes] | None = None) -> Workers:
    """Workers where `cluster.address` says; compute: of `InProcess`. Raises `UserError` where there are none, or they run
    other versions."""
    if cluster.address is None:
        return InProcess(job, compute)
    from sae_research.runtime.ray_workers import RayWorkers

    return RayWorkers(cluster, job)
