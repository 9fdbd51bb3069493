"""A discrete-event simulation of evaluations and of training on 1 to 1,000 workers, some of which fail.

Units and their order are those that `sae_research.evals.units` and `runtime.workers` would choose; only what a unit takes is
computed, from unit costs, in place of being run. Nothing here is tuned: the same function gives every row of docs/scale.md.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sae_research.evals.units import plan_units
from sae_research.planning.costs import UnitShares
from sae_research.runtime.workers import Unit, Waiting, by_cost

NEVER = math.inf


class SimulatedPhase(NamedTuple):
    """What the driver hands out at one time, and waits for."""

    kind: str
    parts: int
    driver: float
    """Seconds of the driver alone before it."""
    once: float
    """Seconds of a unit however many SAEs it holds."""
    each: float
    """Seconds for one SAE more."""
    opening: float
    """Seconds of `each` in which the SAE is opened: a worker whose last unit had the same SAEs spends none."""
    stage: str
    """Whose workers load the model when it begins."""


class Faults(NamedTuple):
    """How workers fail."""

    mean_seconds: float = NEVER
    """Between failures of one worker, exponentially distributed."""
    restart: float = 0.0
    """Seconds until a failed worker is back, its model loaded."""
    lost: tuple[int, float] | None = None
    """(worker, second): one that goes then and never comes back."""
    max_retries: int = 2


RELIABLE = Faults()


class Outcome(NamedTuple):
    """Of one simulated run."""

    seconds: float
    idle: float
    """Share of all workers' time in which they had no unit, or were away."""
    tail: float
    """Share of the run in which no unit waited and some worker had nothing to do."""
    redone: float
    """Seconds of units that were lost with their worker."""
    units: int
    failed: int
    """Units that were lost more often than they are retried."""


def simulate(
    phases: Sequence[SimulatedPhase],
    saes: int,
    workers: int,
    faults: Faults = RELIABLE,
    start: float = 0.0,
    seed: int = 0,
    room: float = math.inf,
) -> Outcome:
    """Phases one after another, as DVC runs stages and a stage waits for its units. start: seconds in which workers load the
    model, at every stage; room: SAEs that a worker keeps open."""
    rng = np.random.default_rng(seed)
    pool = _Pool(workers, faults, rng)
    names = [[f"sae_{number}"] for number in range(saes)]
    now = busy = redone = tail = 0.0
    done = failed = size = 0
    stage = ""
    for phase in phases:
        if phase.stage != stage:  # a stage starts workers wherever there are nodes
            stage, now = phase.stage, now + start
            size = pool.there(now)
        now += phase.driver
        scoring = phase.each - phase.opening
        shares = UnitShares(phase.once / scoring, phase.opening / scoring)
        missing = {name: range(phase.parts) for (name,) in names}
        planned = plan_units(names, missing, range(phase.parts), size, shares, room)
        units = [Unit(f"{number}", b"", float(len(group)), group[0]) for number, (group, _) in enumerate(planned)]
        durations = {
            unit.name: _Takes(
                phase.once + len(group) * phase.each, len(group) * phase.opening if len(group) <= room else 0.0
            )
            for unit, (group, _) in zip(units, planned, strict=True)
        }
        ran = pool.run(units, durations, now)
        tail += ran.end - ran.first_idle
        now, busy, redone = ran.end, busy + ran.busy, redone + ran.redone
        done, failed = done + len(units), failed + ran.failed
    return Outcome(now, 1 - busy / (workers * now), tail / now, redone, done, failed)


class _Takes(NamedTuple):
    """Seconds of a unit."""

    whole: float
    opening: float
    """Of them, those that a worker is spared whose last unit had the same SAEs."""


class _Ran(NamedTuple):
    end: float
    first_idle: float
    """When a worker first had nothing to do."""
    busy: float
    redone: float
    failed: int


class _Pool:
    """Workers and when each fails next."""

    def __init__(self, workers: int, faults: Faults, rng: np.random.Generator) -> None:
        self._faults, self._rng = faults, rng
        self._back = [0.0] * workers
        """From when a worker is there."""
        self._fails = [self._next(0.0) for _ in range(workers)]
        self._gone = -1
        if faults.lost is not None:
            self._gone = faults.lost[0]

    def _next(self, now: float) -> float:
        mean = self._faults.mean_seconds
        return NEVER if mean == NEVER else now + self._rng.exponential(mean)

    def _end_of(self, worker: int) -> float:
        """When a worker fails next, or goes."""
        lost = self._faults.lost
        gone = lost[1] if lost is not None and worker == self._gone else NEVER
        return min(self._fails[worker], gone)

    def _recover(self, worker: int, at: float) -> float:
        """A worker that failed: when it is back."""
        lost = self._faults.lost
        if lost is not None and worker == self._gone and at >= lost[1]:
            return NEVER
        self._fails[worker] = self._next(at + self._faults.restart)
        return at + self._faults.restart

    def run(self, units: Sequence[Unit], durations: dict[str, _Takes], begin: float) -> _Ran:
        """As `RayWorkers.run`: whoever is idle takes the next unit; a lost one goes to the front."""
        waiting = Waiting(units)
        ready = []  # (when, worker)
        for worker in range(len(self._back)):
            heapq.heappush(ready, (self._up(worker, max(begin, self._back[worker])), worker))
        working: list[tuple[float, int, Unit, int, float, float]] = []  # (when, worker, unit, turn, began, takes)
        prepared: dict[int, str] = {}
        busy = redone = 0.0
        end, first_idle, failed = begin, NEVER, 0
        while waiting or working:
            if waiting and ready and (not working or ready[0][0] <= working[0][0]) and ready[0][0] < NEVER:
                at, worker = heapq.heappop(ready)
                before = prepared.get(worker)
                unit, turn = waiting.take(worker)
                prepared[worker] = unit.needs
                takes = durations[unit.name].whole - (durations[unit.name].opening if before == unit.needs else 0.0)
                heapq.heappush(working, (min(at + takes, self._end_of(worker)), worker, unit, turn, at, takes))
                continue
            if not waiting:
                first_idle = min(first_idle, working[0][0], ready[0][0] if ready else NEVER)
            if not working:
                raise RuntimeError("every worker is gone")
            at, worker, unit, turn, began, takes = heapq.heappop(working)
            if at >= began + takes:
                busy += takes
                end = max(end, at)
                heapq.heappush(ready, (at, worker))
                self._back[worker] = at
            else:
                redone += at - began
                prepared.pop(worker, None)
                waiting.forget(worker)
                if turn <= self._faults.max_retries:
                    waiting.put_back(unit, turn + 1)
                else:
                    failed += 1
                self._back[worker] = self._recover(worker, at)
                heapq.heappush(ready, (self._back[worker], worker))
        return _Ran(end, min(first_idle, end), busy, redone, failed)

    def there(self, now: float) -> int:
        """Workers that have not gone for good."""
        lost = self._faults.lost
        return len(self._back) - (lost is not None and lost[1] <= now)

    def _up(self, worker: int, at: float) -> float:
        """When a worker that has nothing to do can take a unit: failures meanwhile cost its restart."""
        while self._end_of(worker) <= at < NEVER:
            at = max(at, self._recover(worker, self._end_of(worker)))
        self._back[worker] = at
        return at


# --- one stream, many SAEs -------------------------------------------------------------------


class Stream(NamedTuple):
    """Training of several SAEs on one stream of activations."""

    tokens: int
    model: float
    """Seconds a token of the model's pass."""
    steps: tuple[float, ...]
    """Seconds a token of each SAE's steps."""
    token_bytes: int
    """Of a token's activations."""
    checkpoint_seconds: float
    """Between checkpoints."""


class TrainingOutcome(NamedTuple):
    """Of one simulated run."""

    seconds: float
    efficiency: float
    """One rank's seconds over the ranks' together."""
    gather: float
    """Share of the time in which activations travel."""
    received: float
    """Bytes/s that a rank with SAEs receives."""
    lost: float
    """Seconds lost to failures, the work since the last checkpoint included."""


def train(stream: Stream, ranks: int, network: float, faults: Faults = RELIABLE, seed: int = 0) -> TrainingOutcome:
    """Each rank runs the model on its share and steps the SAEs it owns, those dealt out longest first. network: bytes/s that
    a rank receives. A rank that fails ends the group, which goes on from its last checkpoint."""
    loads = [0.0] * ranks
    for unit in by_cost([Unit(f"{number}", b"", seconds) for number, seconds in enumerate(stream.steps)]):
        loads[loads.index(min(loads))] += unit.cost
    gather = 0.0 if ranks == 1 else stream.token_bytes * (ranks - 1) / ranks / network
    token = stream.model / ranks + gather + max(loads)
    alone = stream.tokens * (stream.model + sum(stream.steps))
    whole, lost = stream.tokens * token, 0.0
    rng, done, now = np.random.default_rng(seed), 0.0, 0.0
    while faults.mean_seconds < NEVER and done < whole:
        until = rng.exponential(faults.mean_seconds / ranks)
        if done + until >= whole:
            break
        kept = math.floor((done + until) / stream.checkpoint_seconds) * stream.checkpoint_seconds
        lost += done + until - kept + faults.restart
        now += until + faults.restart
        done = kept
        if now > 1_000 * whole:  # fails more often than it checkpoints
            return TrainingOutcome(NEVER, 0.0, 0.0, 0.0, NEVER)
    seconds = whole + lost
    received = stream.token_bytes * (ranks - 1) / ranks / token
    return TrainingOutcome(seconds, alone / (ranks * seconds), gather / token, received, lost)
