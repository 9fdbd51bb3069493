"""A sweep from its flags to its end: read, expand, leave out what is finished, run as few streams as possible as DVC
experiments on the workers there are, report."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sae_research.config.cluster import Cluster
from sae_research.config.params import check_params, read_params
from sae_research.config.yaml_files import read_mapping
from sae_research.experiments.config_files import PARAMS, Values, write_yaml
from sae_research.experiments.devices import Slot, parse_devices
from sae_research.experiments.grid import Job, expand, make_jobs, sae_keys, set_params, without, write_wandb_sweep
from sae_research.experiments.history import Finished, base_of, finished_saes, keep, untracked_code
from sae_research.experiments.job_process import Base, experiment_job, log_path
from sae_research.experiments.sae_interpretability import Changes
from sae_research.experiments.single import scales_over
from sae_research.experiments.slots import DeviceSlots
from sae_research.runtime import processes
from sae_research.runtime.errors import Interrupted, UserError
from sae_research.runtime.files import project_root, write_json, write_text
from sae_research.runtime.formatting import csv_text, text_table
from sae_research.runtime.workers import Outcome, Unit, Workers, start_workers
from sae_research.training.checkpoints import progress_path

COLUMNS = ("l0", "variance_explained", "loss_recovered", "fraction_alive")


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
    cluster = _cluster(params_yaml, options)
    slots = parse_devices("cpu" if cluster else options.devices)[: 1 if options.sequential else None]
    grid = expand(
        base,
        read_mapping(options.sweep_config),
        params_yaml,
        changes,
        scales_over(params_yaml, None if cluster else slots[0].device),
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
    _check_hooks(jobs, where[1])
    base_state = _base(root, options.dry_run)
    finished = finished_saes(root, base_state)
    left = remaining(jobs, finished, stages, name)
    where_to = f"the Ray cluster {cluster.address}" if cluster else ", ".join(slot.device for slot in slots)
    _say(grid.total, len(grid.points), jobs, left, where_to)
    for path in untracked_code(root)[:3]:
        print(f"note: {path} is not in git, and so not in the experiments; git add it if they need it")
    if options.dry_run:
        return 0
    if options.output_dir:
        _make(options.output_dir)
    workers = _workers(name, left, slots, cluster, check_params(params_yaml, str(PARAMS)).cluster.max_retries)
    outcome = Runner(name, left, base_state, workers, options.sequential).run() if left else None
    finished = finished_saes(root, base_state)
    print(f"\n{results_table(jobs, finished)}")
    if options.output_dir:
        write_copies(options.output_dir, left or jobs, finished, outcome)
    if outcome and outcome.failed:
        print(f"\n{len(outcome.failed)} of {len(left)} jobs failed:")
        for job, why in outcome.failed.items():
            print(f"  {job}: {why}\n    {log_path(job)} has all it said; the same call tries again")
        return 1
    print(
        "\nalso: dvc exp show --only-changed; python -m sae_research apply NAME brings an "
        "experiment's SAEs into trained_saes/"
    )
    return 0


def _base(root: Path, dry_run: bool) -> Base:
    try:
        return base_of(root)
    except UserError:
        if not dry_run:  # a plan needs no repository
            raise
        return Base("", "")


def _check_hooks(jobs: Iterable[Job], where: str) -> None:
    """Raises `UserError` for a hook of a layer that the model lacks. A model whose configuration cannot be had here is left
    to its run."""
    from sae_research.lm.hooks import parse_hook  # imports take seconds that --help need not wait
    from sae_research.lm.shape import model_config

    n_layers: dict[str, int | None] = {}
    for job in jobs:
        name = job.params.model.name
        if name not in n_layers:
            try:
                n_layers[name] = model_config(name).get_text_config().num_hidden_layers
            except UserError as error:
                n_layers[name] = None
                print(f"note: hooks are not checked: {error}")
        for hook in job.params.train.hooks:
            layer, _ = parse_hook(hook)
            if (most := n_layers[name]) is not None and layer >= most:
                raise UserError(f"{where}, {job.label}: hook {hook}: {name} has layers 0 to {most - 1}")


def _cluster(params_yaml: Values, options: argparse.Namespace) -> Cluster | None:
    """The Ray cluster that jobs go to: that of `cluster.address`, unless devices are named."""
    cluster = check_params(params_yaml, str(PARAMS)).cluster
    return None if cluster.address is None or options.sequential or options.devices != "auto" else cluster


def _workers(
    name: str, jobs: list[Job], slots: list[Slot], cluster: Cluster | None, max_retries: int
) -> Callable[[Base], Workers]:
    if cluster is not None:
        return lambda base: start_workers(cluster, experiment_job(base))
    owner = f"sweep {name} (process {os.getpid()})"
    return lambda base: DeviceSlots(slots[: len(jobs)], experiment_job(base), owner, max_retries)


def _make(folder: Path) -> None:
    """The folder for copies, before hours are spent. Raises `UserError` where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {folder}: no permission to write there")


def _say(total: int, chosen: int, jobs: list[Job], left: list[Job], where: str) -> None:
    n_saes, n_left = (sum(len(job.saes) for job in group) for group in (jobs, left))
    print(
        f"{chosen} of {total} points, {n_saes} SAEs in {len(jobs)} runs; "
        f"{n_saes - n_left} SAEs are finished, {n_left} to train in {len(left)} runs on {where}"
    )
    for job in left:
        print(
            f"  {job.name}: {len(job.saes)} SAE{'s' * (len(job.saes) > 1)}, {job.params.train.tokens:,} tokens, "
            f"{job.params.model.name}, {', '.join(job.params.train.hooks)}"
        )
        for point in job.points:
            print(f"    {point.label}")


SECONDS = 1.0


class Ended(NamedTuple):
    """How a sweep ended."""

    done: list[str]
    failed: dict[str, str]
    """Job -> the last line it said."""


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
    """Runs jobs on workers and keeps what they find."""

    def __init__(
        self, name: str, jobs: list[Job], base: Base, workers: Callable[[Base], Workers], follow_logs: bool = False
    ) -> None:
        """base: what jobs start from; workers: makes them."""
        self.name, self.jobs, self.base, self.follow_logs, self._workers = name, jobs, base, follow_logs, workers
        self.root = project_root()

    def run(self) -> Ended:
        """On Ctrl-C or an error the jobs at work are stopped, which keep checkpoints: the same call goes on where this one
        ended."""
        self._refuse_what_is_at_work()
        workspace = read_params(self.root / PARAMS)
        units = [self._unit(job, workspace) for job in self.jobs]
        with _terminated_as_interrupted():
            record = self._on_record()
            workers = self._workers(self.base)
            ended = threading.Event()
            teller = threading.Thread(target=self._tell, args=(record, ended), daemon=True)
            teller.start()
            try:
                return self._collect(workers.run(units), record)
            except BaseException:
                print("stopping the jobs of this sweep; they keep checkpoints", flush=True)
                raise
            finally:
                workers.close()
                ended.set()
                teller.join()

    def _unit(self, job: Job, workspace: Values) -> Unit:
        payload = {"name": job.name, "targets": job.targets, "overrides": set_params(workspace, job.values)}
        return Unit(job.name, json.dumps(payload).encode(), float(job.params.train.tokens))

    def _refuse_what_is_at_work(self) -> None:
        """Raises `UserError` where another sweep runs a job of ours."""
        ours = {job.name for job in self.jobs}
        for record in processes.records("job"):
            if record.name in ours and record.process:
                raise UserError(
                    f"{record.name} is at work already (process {record.pid}); watch it with python -m "
                    "scripts.monitor_experiments, or end it with --kill"
                )

    def _on_record(self) -> processes.Record:
        jobs = {
            job.name: {
                "state": "queued",
                "reason": "",
                "saes": job.saes,
                "points": [point.label for point in job.points],
                "progress": str(progress_path(job.params)),
            }
            for job in self.jobs
        }
        return processes.record("sweep", self.name, os.getpid(), jobs=jobs)

    def _collect(self, outcomes: Iterator[Outcome], record: processes.Record) -> Ended:
        found = Ended([], {})
        for outcome in outcomes:
            name = outcome.unit.name
            if outcome.value is None:
                found.failed[name] = outcome.failure
            else:
                keep(self.root, outcome.value)
                found.done.append(name)
            state, why = ("failed", outcome.failure) if outcome.value is None else ("done", "")
            record.jobs[name] |= {"state": state, "reason": why}
            record.update()
            print(f"{state:8s} {name}{f': {why}' if why else ''}", flush=True)
        return found

    def _tell(self, record: processes.Record, ended: threading.Event) -> None:
        """In a thread: a line for each job that starts; with `follow_logs` also what it says."""
        read: dict[str, int] = {}
        last = False
        while not last:
            last = ended.wait(SECONDS)
            for job in processes.records("job"):
                if job.name not in record.jobs or job.started < record.started:
                    continue
                if job.name not in read:
                    print(f"running  {job.name} on {job.device}", flush=True)
                    read[job.name] = 0
                if self.follow_logs:
                    text, read[job.name] = processes.read_on(Path(job.log), read[job.name])
                    print(text, end="", flush=True)


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


def write_copies(folder: Path, jobs: Iterable[Job], finished: dict[str, Finished], outcome: Ended | None) -> None:
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
