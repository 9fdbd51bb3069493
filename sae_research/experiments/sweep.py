"""A sweep from its flags to its end: read, expand, leave out what is finished, run as few streams as possible through DVC's
queue onto the devices there are, report."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import signal
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from sae_research.config.params import check_params, read_params
from sae_research.config.yaml_files import parse as parse_yaml
from sae_research.config.yaml_files import read_mapping
from sae_research.experiments import dvc_queue, processes
from sae_research.experiments.config_files import PARAMS, Values, write_yaml
from sae_research.experiments.dvc_queue import DVCQueue, Entry, Experiment
from sae_research.experiments.grid import Job, expand, make_jobs, sae_keys, set_params, without, write_wandb_sweep
from sae_research.experiments.processes import Lease, Slot, parse_devices
from sae_research.experiments.sae_interpretability import Changes
from sae_research.experiments.single import scales_over
from sae_research.runtime.cache import cache_dir, writable_cache_dir
from sae_research.runtime.errors import Interrupted, UserError
from sae_research.runtime.files import project_root, write_json, write_text
from sae_research.runtime.formatting import csv_text, text_table
from sae_research.training.checkpoints import progress_path


def carry_out(options: argparse.Namespace, changes: Changes) -> int:
    """The sweep that the flags describe. Returns 1 where a job failed."""
    for flag in ("limit", "saes_per_run"):
        if (number := getattr(options, flag)) is not None and number < 1:
            raise UserError(f"--{flag} must be above 0")
    root = project_root()
    params_yaml = read_params(root / PARAMS)
    name = re.sub(r"[^a-zA-Z0-9_-]+", "-", options.name or options.sweep_config.stem).strip("-") or "sweep"
    base = read_mapping(options.base_config) if options.base_config else {}
    where = (str(options.base_config or PARAMS), str(options.sweep_config))
    slots = parse_devices(options.devices)[: 1 if options.sequential else None]
    grid = expand(
        base,
        read_mapping(options.sweep_config),
        params_yaml,
        changes,
        scales_over(params_yaml, slots[0].device),
        options.limit,
        where,
    )
    for line in grid.notes:
        print(f"note: {line}")
    if options.wandb_sweep:
        flags = [
            part
            for flag, value in (("--model", changes.model), ("--text", changes.text), ("--tokens", changes.tokens))
            if value is not None
            for part in (flag, str(value))
        ]
        write_wandb_sweep(options.wandb_sweep, grid.points, grid.total, options.base_config, flags, options.wandb_project)
        print(f"wrote {options.wandb_sweep}: wandb sweep {options.wandb_sweep}, then wandb agent on each machine")
        return 0
    stages = list(dict.fromkeys(["core", *(part.strip() for part in options.stages.split(",") if part.strip())]))
    jobs = make_jobs(grid.points, stages, name, where[1], options.saes_per_run)
    finished = finished_saes(root)
    left = remaining(jobs, finished, stages, name)
    _say(grid.total, len(grid.points), jobs, left, [slot.device for slot in slots])
    if options.dry_run:
        return 0
    if options.output_dir:
        _make(options.output_dir)
    outcome = Runner(name, left, slots, options.sequential).run() if left else None
    finished = finished_saes(root)
    print(f"\n{results_table(jobs, finished)}")
    if options.output_dir:
        write_copies(options.output_dir, left or jobs, finished, outcome)
    if outcome and outcome.failed:
        print(f"\n{len(outcome.failed)} of {len(left)} jobs failed:")
        for job, why in outcome.failed.items():
            print(f"  {job}: {why}\n    dvc queue logs {job}; the same call tries again")
        return 1
    print(
        "\nalso: dvc exp show --only-changed; python -m sae_research apply NAME brings an "
        "experiment's SAEs into trained_saes/"
    )
    return 0


def _make(folder: Path) -> None:
    """The folder for copies, before hours are spent. Raises `UserError` where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {folder}: no permission to write there")


def _say(total: int, chosen: int, jobs: list[Job], left: list[Job], devices: list[str]) -> None:
    n_saes, n_left = (sum(len(job.saes) for job in group) for group in (jobs, left))
    print(
        f"{chosen} of {total} points, {n_saes} SAEs in {len(jobs)} runs; "
        f"{n_saes - n_left} SAEs are finished, {n_left} to train in {len(left)} runs on {', '.join(devices)}"
    )
    for job in left:
        print(
            f"  {job.name}: {len(job.saes)} SAE{'s' * (len(job.saes) > 1)}, {job.params.train.tokens:,} tokens, "
            f"{job.params.model.name}, {', '.join(job.params.train.hooks)}"
        )
        for point in job.points:
            print(f"    {point.label}")


CODE = ("sae_research", "scripts", "custom_saes", "dvc.yaml")
"""What an experiment's metrics depend on beside its parameters."""
METRICS = "metrics/core.json"
COLUMNS = ("l0", "variance_explained", "loss_recovered", "fraction_alive")
SECONDS = 2.0
MAX_STARTS = 3
"""A worker that ends while jobs wait is started again, but no more often than this in all."""


class Finished(NamedTuple):
    """An SAE that an earlier experiment trained and evaluated with the present code."""

    experiment: str
    figures: dict[str, Any]


class Outcome(NamedTuple):
    """How a sweep ended."""

    done: list[str]
    failed: dict[str, str]
    """Job -> the last line it said."""


def finished_saes(root: Path) -> dict[str, Finished]:
    """By `jobs.sae_keys`: what the experiments on the last commit hold. Experiments whose parameters no longer make sense
    to this code, or that other code made, hold nothing."""
    found: dict[str, Finished] = {}
    for experiment in dvc_queue.experiments(root):
        if not dvc_queue.same_code(root, experiment.revision, CODE):
            continue
        figures, keys = _figures(root, experiment), _keys(root, experiment)
        found |= {key: Finished(experiment.name, figures[name]) for name, key in keys.items() if name in figures}
    return found


def _figures(root: Path, experiment: Experiment) -> dict[str, Any]:
    text = dvc_queue.file_at(root, experiment.revision, METRICS)
    return json.loads(text) if text else {}


def _keys(root: Path, experiment: Experiment) -> dict[str, str]:
    text = dvc_queue.file_at(root, experiment.revision, str(PARAMS))
    try:
        return sae_keys(check_params(parse_yaml(text, experiment.name), experiment.name)) if text else {}
    except UserError:  # made when params.yaml had other keys
        return {}


def remaining(jobs: list[Job], finished: dict[str, Finished], stages: list[str], sweep: str) -> list[Job]:
    """The jobs less what is finished."""
    left = []
    for job in jobs:
        done = [name for name, key in sae_keys(job.params).items() if key in finished]
        rest = without(job, done, stages, sweep, sweep)
        left += [rest] if rest else []
    return left


# --- running ---------------------------------------------------------------------------------


class Runner:
    """Jobs through the queue onto slots; one sweep at a time in a project, as it has one queue."""

    def __init__(self, name: str, jobs: list[Job], slots: list[Slot], follow_logs: bool = False) -> None:
        self.name, self.jobs, self.follow_logs = name, jobs, follow_logs
        self.slots = slots[: len(jobs)]
        self.root = project_root()
        self.queue = DVCQueue(self.root)
        self.n_cpu = sum(slot.device == "cpu" for slot in self.slots)
        self.leases: dict[Slot, Lease] = {}
        self.workers: dict[Slot, processes.Record] = {}
        self.starts = 0
        self.seen: dict[str, str] = {}
        self.read: dict[str, int] = {}

    def run(self) -> Outcome:
        """Queue, work, wait. On Ctrl-C or an error our own workers and their jobs are stopped, and what waits is taken
        out of the queue: the same call goes on where this one ended."""
        with _only_one() as lock, _terminated_as_interrupted():
            self._tidy()
            workspace = read_params(self.root / PARAMS)
            try:
                for slot in self.slots:
                    self.leases[slot] = Lease(slot, f"sweep {self.name} (process {os.getpid()})")
                for job in self.jobs:
                    self.queue.put(job, set_params(workspace, job.values))
                    print(f"queued   {job.name}: {len(job.saes)} SAE{'s' * (len(job.saes) > 1)}", flush=True)
                self._announce()
                return self._work(lock)
            finally:
                self._stop()

    def _tidy(self) -> None:
        """Make room in the queue. Raises `UserError` where it holds experiments of others."""
        ours = {job.name for job in self.jobs}
        entries = self.queue.entries()
        others = [
            entry.name
            for entry in entries.values()
            if entry.state == "queued" and entry.name not in ours and entry.name not in _on_record()
        ]
        if others:
            raise UserError(
                f"DVC's queue already holds {', '.join(others[:5])}{' …' * (len(others) > 5)}, which a sweep's "
                "workers would run too; run them (dvc queue start) or remove them (dvc queue remove --queued)"
            )
        dead = [entry.name for entry in entries.values() if entry.state == "running" and not _alive(entry)]
        self.queue.give_up(dead)
        self.queue.remove(
            entry.name
            for entry in entries.values()
            if entry.state == "queued" or entry.name in ours and (entry.state == "failed" or entry.name in dead)
        )

    def _announce(self) -> None:
        processes.record(
            "sweep",
            self.name,
            os.getpid(),
            jobs={
                job.name: {
                    "saes": job.saes,
                    "points": [point.label for point in job.points],
                    "progress": str(progress_path(job.params)),
                }
                for job in self.jobs
            },
        )

    def _work(self, lock: int) -> Outcome:
        names = [job.name for job in self.jobs]
        while True:
            entries = self.queue.entries()
            states = {name: entries[name].state if name in entries else "queued" for name in names}
            self._tell(states, entries)
            if all(state in ("done", "failed") for state in states.values()):
                failed = {name: entries[name].reason for name in names if states[name] == "failed"}
                return Outcome([name for name in names if states[name] == "done"], failed)
            self._keep_workers(lock, entries, names)
            time.sleep(SECONDS)

    def _keep_workers(self, lock: int, entries: dict[str, Entry], names: list[str]) -> None:
        """Start workers that are missing while jobs wait; give up jobs whose worker died under them."""
        orphans = [
            name
            for name in names
            if name in entries
            and entries[name].state == "running"
            and entries[name].pid is not None
            and not _alive(entries[name])
            and not any(worker.process for worker in self.workers.values())
        ]  # a live one may be collecting it
        abandoned = self._abandoned(entries, names)
        for name in abandoned:  # on a GPU it would meet its worker's successor
            with suppress(psutil.NoSuchProcess):
                processes.stop_tree(psutil.Process(entries[name].pid))
        self.queue.give_up([*orphans, *abandoned])
        waiting = [name for name in names if name not in entries or entries[name].state == "queued"]
        for slot in self.slots:
            worker = self.workers.get(slot)
            if not waiting or (worker and worker.process):
                continue
            if self.starts >= MAX_STARTS * len(self.slots):
                log = self.workers[slot].log
                raise UserError(f"workers keep ending while jobs wait: {processes.last_line(log)} (see {log})")
            lease, log = self.leases[slot], cache_dir("jobs") / f"worker-{slot.name}.log"
            descriptors = [lock] + ([lease.descriptor] if lease.descriptor >= 0 else [])
            pid = self.queue.start_worker(slot.name, slot.environment(self.n_cpu), log, descriptors)
            self.workers[slot] = processes.record(
                "worker", slot.name, pid, device=slot.device, sweep=self.name, log=str(log)
            )
            self.starts += 1

    def _abandoned(self, entries: dict[str, Entry], names: list[str]) -> list[str]:
        """Jobs at work whose worker was killed: no live one awaits how they end."""
        live = [process for worker in self.workers.values() if (process := worker.process)]
        if len(live) == len(self.workers):
            return []
        awaited = {child.pid for process in live for child in processes.descendants(process)}
        return [
            name
            for name in names
            if name in entries
            and entries[name].state == "running"
            and _alive(entries[name])
            and entries[name].pid not in awaited
        ]

    def _tell(self, states: dict[str, str], entries: dict[str, Entry]) -> None:
        """A line for each change; with `follow_logs` also what the jobs say."""
        for name, state in states.items():
            if self.seen.get(name, "queued") != state:
                why = f": {entries[name].reason}" if state == "failed" else ""
                print(f"{state:8s} {name}{why}", flush=True)
            self.seen[name] = state
            log = entries[name].log if name in entries else None
            if self.follow_logs and log and log.is_file():
                with log.open("rb") as handle:
                    handle.seek(self.read.get(name, 0))
                    print(handle.read().decode(errors="replace"), end="", flush=True)
                    self.read[name] = handle.tell()

    def _stop(self) -> None:
        """End our workers, their jobs first, which may keep a checkpoint; nothing of others."""
        live = [process for worker in self.workers.values() if (process := worker.process)]
        if any(processes.descendants(process) for process in live):
            print("stopping the jobs of this sweep; they keep checkpoints", flush=True)
        processes.stop_workers(live)
        for lease in self.leases.values():
            lease.close()
        waiting = [
            entry.name
            for entry in self.queue.entries().values()
            if entry.state == "queued" and entry.name in {job.name for job in self.jobs}
        ]
        self.queue.remove(waiting)


@contextmanager
def _terminated_as_interrupted() -> Generator[None]:
    """SIGTERM ends the block as Ctrl-C would."""

    def interrupt(number: int, _: object) -> None:
        raise Interrupted("finished experiments are kept; the same call goes on from there", number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _only_one:
    """The right to sweep in this project, also held by workers that outlive us. The block gets its descriptor."""

    def __enter__(self) -> int:
        path = writable_cache_dir("jobs") / "sweep.lock"
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.descriptor)
            raise UserError(
                "a sweep is at work in this project, which has one queue; watch it with python -m "
                "scripts.monitor_experiments, or end it with --kill all"
            ) from None
        return self.descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def _on_record() -> set[str]:
    """Names of every job that a sweep of ours queued."""
    return {name for sweep in processes.records("sweep") for name in sweep.jobs}


def _alive(entry: Entry) -> bool:
    if entry.pid is None:
        return False
    try:  # the queue notes no start time: a number used again is told by what it runs
        process = psutil.Process(entry.pid)
        return process.status() != psutil.STATUS_ZOMBIE and "exec-run" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


# --- results ---------------------------------------------------------------------------------


def results_table(jobs: list[Job], finished: dict[str, Finished]) -> str:
    """The metrics of every SAE of the sweep, run by run, as text."""
    rows = [("SAE", "experiment", "job", *COLUMNS)]
    for job in jobs:
        for name, key in sae_keys(job.params).items():
            if done := finished.get(key):
                figures = (done.figures.get(column) for column in COLUMNS)
                rows.append((name, done.experiment, job.label, *("" if value is None else str(value) for value in figures)))
    return text_table(rows, left=3)


def write_copies(folder: Path, jobs: Iterable[Job], finished: dict[str, Finished], outcome: Outcome | None) -> None:
    """The parameters of each job, `results.csv` and, after a run, `outcome.json`."""
    rows = []
    for job in jobs:
        write_yaml(folder / f"{job.name}.yaml", _plain(job.values))
        for name, key in sae_keys(job.params).items():
            if done := finished.get(key):
                rows.append([done.experiment, name, *(done.figures.get(column) for column in COLUMNS)])
    write_text(folder / "results.csv", csv_text(["experiment", "sae", *COLUMNS], rows))
    if outcome:
        write_json(folder / "outcome.json", outcome._asdict())


def _plain(values: Values) -> Values:
    return json.loads(json.dumps(values))
