"""Workers on the devices of this machine that a sweep names: one job at a time on each slot."""

from __future__ import annotations

import queue
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence

from sae_research.experiments.devices import Lease, Slot
from sae_research.experiments.job_process import ExperimentWorker
from sae_research.runtime.errors import UserError
from sae_research.runtime.workers import Job, Outcome, Unit, by_cost

STOP_SECONDS = 90.0
"""How long jobs may take to keep a checkpoint and end."""


class DeviceSlots:
    """Runs each unit, a job of `experiment_job`, in a process that sees one device alone. A GPU is leased meanwhile."""

    memory = 0
    """Not known: what a job needs is its own affair."""

    def __init__(self, slots: Sequence[Slot], job: Job, owner: str, max_retries: int) -> None:
        """owner: whom others are told that a GPU is busy with. Raises `UserError` where one is."""
        self.size, self._retries = len(slots), max_retries
        self._leases: list[Lease] = []
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        try:
            for slot in slots:
                self._leases.append(Lease(slot, owner))
        except UserError:
            self.close()
            raise
        n_cpu = sum(slot.device == "cpu" for slot in slots)
        self._workers = [
            ExperimentWorker(job.argument, lease.slot.environment(n_cpu), [lease.descriptor] * (lease.descriptor >= 0))
            for lease in self._leases
        ]

    def run(self, units: Sequence[Unit], shared: bytes = b"") -> Iterator[Outcome]:
        waiting, ended = deque(by_cost(units)), queue.Queue[Outcome | BaseException]()
        self._threads = [
            threading.Thread(target=self._work, args=(worker, waiting, shared, ended), daemon=True)
            for worker in self._workers[: len(units)]
        ]
        for thread in self._threads:
            thread.start()
        left = len(units)
        while left:
            try:
                outcome = ended.get(timeout=0.5)  # with a timeout signals are answered
            except queue.Empty:
                continue
            if isinstance(outcome, BaseException):
                raise outcome
            left -= 1
            yield outcome

    def _work(
        self, worker: ExperimentWorker, waiting: deque[Unit], shared: bytes, ended: queue.Queue[Outcome | BaseException]
    ) -> None:
        """A slot's thread: jobs until none waits. What is not a job's own failure ends the sweep."""
        try:
            while not self._stopped.is_set():
                try:
                    unit = waiting.popleft()
                except IndexError:
                    return
                ended.put(self._outcome(worker, unit, shared))
        except BaseException as error:  # noqa: BLE001 (raised by `run`)
            ended.put(error)

    def _outcome(self, worker: ExperimentWorker, unit: Unit, shared: bytes) -> Outcome:
        for turn in range(self._retries + 1):
            try:
                return Outcome(unit, worker(unit.payload, shared))
            except UserError as error:
                return Outcome(unit, None, str(error))
            except RuntimeError as error:
                failure = str(error)
                if turn < self._retries and not self._stopped.is_set():
                    print(f"{unit.name}: tried again: {failure}", file=sys.stderr, flush=True)
        return Outcome(unit, None, failure)

    def close(self) -> None:
        self._stopped.set()
        for worker in getattr(self, "_workers", []):
            worker.stop()
        for thread in self._threads:
            thread.join(STOP_SECONDS)
        for lease in self._leases:
            lease.close()
