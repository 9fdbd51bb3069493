"""Workers as actors of a Ray cluster: of this machine, of one that runs already, or of one whose head is named.

Each actor takes `cpus_per_worker` cores and `gpus_per_worker` GPUs, wherever the cluster has them, and is started again by
Ray when it dies. A unit that was lost with its actor goes to whichever is free next. Everything an actor prints goes to a
log of its own under `.cache/logs`, whose end is shown where a unit fails.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from sae_research.runtime.cache import writable_cache_dir
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import project_root
from sae_research.runtime.given_device import DEVICE_VARIABLE
from sae_research.runtime.workers import Cluster, Job, Outcome, Unit, Waiting, memory, versions, worker

START_SECONDS = 180.0
"""How long the first worker may take to come up."""
AWAY_SECONDS = 120.0
"""How long all workers may be away, with units left, before the run gives up."""
LOG_LINES = 15
"""Of a worker's log, shown where a unit fails."""
LOGS_KEPT = 64
_OBJECT_STORE_BYTES = 256 * 2**20
"""Of a cluster started here: units carry paths and results, not tensors."""


class _Here(NamedTuple):
    """What a worker says of itself when it is up."""

    host: str
    versions: dict[str, str]
    memory: int


class _Reply(NamedTuple):
    """Of one unit."""

    value: bytes | None
    failure: str
    final: bool
    """Whether trying again elsewhere is of no use."""


class _Actor:
    """One worker. Made anew, it has the same number and goes on with its log."""

    def __init__(self, job: Job, number: int, run: str, root: str) -> None:
        if os.path.isdir(root):
            os.chdir(root)
        self._job, self._compute = job, None
        self._log = _log(run, number)
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)

    def here(self, cpus: float, gpus: float) -> _Here:
        """cpus, gpus: its share of the node."""
        share = gpus or min(1.0, cpus / (os.cpu_count() or 1))
        return _Here(socket.gethostname(), versions(self._job), int(min(1.0, share) * memory(self._job)))

    def compute(self, payload: bytes, shared: bytes) -> _Reply:
        try:
            if self._compute is None:
                self._compute = worker(self._job)
            return _Reply(self._compute(payload, shared), "", False)
        except UserError as error:
            return _Reply(None, str(error), True)
        except Exception as error:  # noqa: BLE001 (reported with its traceback; the worker goes on)
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            return _Reply(None, f"{traceback.format_exception_only(error)[-1].strip()}\n{end_of_log(self._log)}", False)


def _log(run: str, number: int) -> Path:
    return writable_cache_dir("logs") / f"{run}-worker{number}.log"


def end_of_log(path: Path, lines: int = LOG_LINES) -> str:
    """The last lines of a worker's log, of progress bars their last state."""
    text = path.read_text(errors="replace")
    kept = [line.rpartition("\r")[2] for line in text.splitlines() if line.strip()][-lines:]
    return f"{path}:\n" + "\n".join(f"    {line}" for line in kept)


class RayWorkers:
    """Actors on the cluster that `cluster.address` names."""

    def __init__(self, cluster: Cluster, job: Job) -> None:
        """Raises `UserError` where there is no such cluster, no room for one worker, or other versions run there."""
        self._cluster, self._job, self._versions, self.memory = cluster, job, versions(job), 0
        self._ray = _ray()
        self._own = _connect(self._ray, cluster)
        self._run = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self._numbers: dict[Any, int] = {}
        self._waking: dict[Any, Any] = {}
        self._idle: deque[Any] = deque()
        try:
            self._gpus = _gpus_per_worker(self._ray, cluster)
            self.size = _room(self._ray, cluster.cpus_per_worker, self._gpus)
            if not self.size:
                raise self._trouble(
                    f"no node has the {cluster.cpus_per_worker} cores and {self._gpus:g} GPUs of one worker; see "
                    "`ray status`, or lower cluster.cpus_per_worker"
                )
            _prune_logs()
            self._numbers = {self._actor(number): number for number in range(self.size)}
            for actor in self._numbers:
                self._greet(actor)
            self._first_up()
        except BaseException:
            self.close()
            raise

    def _trouble(self, what: str) -> UserError:
        return UserError(f"cluster.address: {self._cluster.address}: {what}")

    def _actor(self, number: int) -> Any:
        threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        environment = dict.fromkeys(threads, str(self._cluster.cpus_per_worker))
        environment[DEVICE_VARIABLE] = "cuda" if self._gpus else "cpu"
        if not self._gpus:  # Ray shows an actor without GPUs all of them
            environment["CUDA_VISIBLE_DEVICES"] = ""
        made = self._ray.remote(_Actor).options(
            num_cpus=self._cluster.cpus_per_worker,
            num_gpus=self._gpus,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": environment},
        )
        return made.remote(self._job, number, self._run, str(project_root()))

    def _greet(self, actor: Any) -> None:
        """Ask a worker that starts, or starts again, whether it is up."""
        self._waking[actor.here.remote(self._cluster.cpus_per_worker, self._gpus)] = actor

    def _first_up(self) -> None:
        """Wait for the first worker; the others join when they are up."""
        began = time.monotonic()
        while not self._idle:
            if not self._waking:
                raise self._trouble("every worker died while it started; see `ray logs`")
            if time.monotonic() - began > START_SECONDS:
                raise self._trouble(f"no worker came up in {START_SECONDS:.0f} seconds; see `ray status`")
            self._welcome(timeout=1.0)

    def _welcome(self, timeout: float) -> None:
        """Workers that came up join those that are idle. Raises `UserError` for one of other versions."""
        for reference in self._ray.wait(list(self._waking), num_returns=len(self._waking), timeout=timeout)[0]:
            actor = self._waking.pop(reference)
            try:
                here = self._ray.get(reference)
            except self._ray.exceptions.ActorUnavailableError:
                self._greet(actor)
            except self._ray.exceptions.ActorDiedError as error:
                if "ModuleNotFoundError" in str(error) or "ImportError" in str(error):
                    raise self._trouble(
                        "a worker cannot import the project; install it on every node (make setup) and start Ray from "
                        "its environment"
                    ) from None
                del self._numbers[actor]
            else:
                _check(here, self._versions)
                self.memory = min(self.memory or here.memory, here.memory)
                self._idle.append(actor)

    def run(self, units: Sequence[Unit], shared: bytes = b"") -> Iterator[Outcome]:
        waiting = Waiting(units)
        working: dict[Any, tuple[Any, Unit, int]] = {}
        lent, last_seen = self._ray.put(shared), time.monotonic()
        while waiting or working:
            while waiting and self._idle:
                actor = self._idle.popleft()
                unit, turn = waiting.take(actor)
                working[actor.compute.remote(unit.payload, lent)] = actor, unit, turn
            if self._waking:
                self._welcome(timeout=0.0 if working else 1.0)
            if working or self._idle:
                last_seen = time.monotonic()
            elif not self._waking or time.monotonic() - last_seen > AWAY_SECONDS:
                raise self._trouble(
                    f"no worker is left for {len(waiting)} units; what is finished is kept: run it again when the cluster "
                    "is well (`ray status`)"
                )
            for done in self._ray.wait(list(working), timeout=1.0)[0] if working else ():
                actor, unit, turn = working.pop(done)
                reply = self._reply(done, actor)
                if reply.value is None and not reply.final and turn <= self._cluster.max_retries:
                    print(f"{unit.name}: tried again: {reply.failure.splitlines()[0]}", file=sys.stderr, flush=True)
                    waiting.put_back(unit, turn + 1)
                else:
                    yield Outcome(unit, reply.value, reply.failure)

    def _reply(self, done: Any, actor: Any) -> _Reply:
        """What a unit ended with. An actor that died with it is greeted: Ray starts it anew where there is room."""
        errors = self._ray.exceptions
        try:
            reply = self._ray.get(done)
        except (errors.RayActorError, errors.OutOfMemoryError) as error:
            self._greet(actor)
            why = "ran out of memory" if isinstance(error, errors.OutOfMemoryError) else "was lost"
            path = _log(self._run, self._numbers[actor])
            log = end_of_log(path) if path.is_file() else f"its log is {path} on its node"
            return _Reply(None, f"its worker {why} ({type(error).__name__})\n{log}", False)
        self._idle.append(actor)
        return reply

    def close(self) -> None:
        for actor in self._numbers:
            self._ray.kill(actor)
        if self._own:
            self._ray.shutdown()


def _ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    import ray.exceptions

    return ray


def _connect(ray: ModuleType, cluster: Cluster) -> bool:
    """Join the cluster; whether it is this process's to shut down again."""
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "ignore_reinit_error": True}
    if cluster.address == "local":
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, cluster.cpus_per_worker),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            **quiet,
        )
        return True
    try:
        ray.init(address=cluster.address, **quiet)
    except (ConnectionError, TimeoutError):
        raise UserError(
            f"cluster.address: {cluster.address}: no Ray cluster answers there; start one (`ray start --head`; "
            "docs/cluster.md), or set cluster.address to local or null"
        ) from None
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cluster.address: {cluster.address}: {str(error).splitlines()[0]}") from None
    return True


def _gpus_per_worker(ray: ModuleType, cluster: Cluster) -> float:
    if cluster.gpus_per_worker is not None:
        return cluster.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def _room(ray: ModuleType, cpus: float, gpus: float) -> int:
    """Workers that fit into the cluster's nodes."""
    total = 0
    for node in ray.nodes():
        if node["Alive"]:
            free = node["Resources"]
            total += int(min(free.get("CPU", 0) // cpus, free.get("GPU", 0) // gpus if gpus else float("inf")))
    return total


def _check(here: _Here, wanted: dict[str, str]) -> None:
    for what, value in wanted.items():
        if here.versions[what] != value:
            raise UserError(
                f"a worker on {here.host} has {what} {here.versions[what]}, this process {value}; results would differ: "
                "give every node the same checkout and environment (make setup)"
            )


def _prune_logs() -> None:
    for old in sorted(writable_cache_dir("logs").glob("*-worker*.log"))[:-LOGS_KEPT]:
        old.unlink(missing_ok=True)
