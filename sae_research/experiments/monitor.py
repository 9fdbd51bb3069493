"""What runs and sweeps of this project are doing: shown, followed, ended."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from sae_research.experiments.job_process import why_it_failed
from sae_research.runtime import processes
from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.files import read_json
from sae_research.runtime.formatting import duration, number

SECONDS = 3.0
STOP_SECONDS = 100.0
"""How long a sweep may take to stop its jobs."""
MAX_LINE = 200


class Row(NamedTuple):
    """One job or run."""

    name: str
    state: str
    """`queued`, `running`, `done`, `failed`, or `ended`: its process is gone, and nobody waited for how it ended."""
    device: str
    progress: dict[str, Any]
    """As in `training.progress`; empty before training starts."""
    log: Path | None
    said: str
    """What it said last; of a failed job, why."""
    processes: list[psutil.Process]
    """Ours, the outermost first: what is stopped to end it."""

    @property
    def text(self) -> list[str]:
        """Metrics on the first line, the log's last line on the second."""
        now = self.progress
        step = ""
        if now:
            total, left = now.get("total_steps"), now.get("seconds_left")
            step = f"step {now['step']:,}" + (f" of {total:,.0f}" if total else "")
            step += f", {duration(left)} left" if left is not None and self.state == "running" else ""
        lines = [f"{self.state:8s} {self.name}  {self.device}  {step}".rstrip()]
        saes = [
            f"{name} loss {number(sae.get('loss'))} L0 {number(sae.get('l0'))}" for name, sae in now.get("saes", {}).items()
        ]
        if saes:
            lines.append("         " + "; ".join(saes[:4]) + (f"; and {len(saes) - 4} more" if len(saes) > 4 else ""))
        return [*lines, *([f"         {self.said[:MAX_LINE]}"] if self.said else [])]


def rows() -> list[Row]:
    """Runs, the jobs of sweeps and evaluations at work on workers, in the order of their names; those of the past as long
    as they are on record."""
    jobs = {job.name: job for job in processes.records("job")}
    found = [_run_row(run) for run in processes.records("run")]
    for sweep in processes.records("sweep"):
        made = [_job_row(name, given, jobs.get(name), sweep) for name, given in sorted(sweep.jobs.items())]
        found += [row for row in made if row is not None]
    return found + [_units_row(units) for units in processes.records("units") if units.process]


def _run_row(record: processes.Record) -> Row:
    process, progress = record.process, _progress(record.progress)
    of_this_run = progress.get("updated", 0) >= int(record.started)  # else an earlier run of the same settings left it
    ended = {"finished": "done", "failed": "failed", "interrupted": "failed"}.get(progress.get("state", ""))
    state = (ended if of_this_run else None) or ("running" if process else "ended")
    device = progress.get("device") or record.device
    return Row(record.name, state, device, progress, None, progress.get("message", ""), [process] if process else [])


def _job_row(name: str, given: dict[str, Any], job: processes.Record | None, sweep: processes.Record) -> Row | None:
    """A job of a sweep; None for one that was not begun when its sweep ended."""
    process = job.process if job else None
    begun = job is not None and job.started >= sweep.started
    state = given["state"]
    if process or (begun and state == "queued"):
        elsewhere = job is not None and job.host != socket.gethostname()
        state = "running" if process or elsewhere and sweep.process else "ended"
    if state == "queued" and not sweep.process:
        return None
    log = Path(job.log) if job and (begun or process) else None
    progress = _progress(given["progress"]) if state != "queued" else {}
    said = {
        "running": processes.last_line(log),
        "failed": given["reason"].partition("\n")[0],
        "ended": why_it_failed(log),
    }.get(state, "")
    device = job.device if job and state == "running" else ""
    return Row(name, state, device, progress, log, said, processes.in_session(process.pid) if process else [])


def _units_row(record: processes.Record) -> Row:
    process = record.process
    left = duration(record.seconds_left) + " left" if record.seconds_left is not None else ""
    said = f"{record.done} of {record.units} units on {record.workers} workers, {record.failed} failed, {left}".rstrip(", ")
    return Row(record.name, "running", "", {}, None, said, [process] if process else [])


def _progress(path: str) -> dict[str, Any]:
    try:
        return read_json(Path(path))
    except UserError:  # not there yet
        return {}


def show(watch: bool) -> int:
    """Print every row; with `watch` again and again, until Ctrl-C."""
    while True:
        lines = [line for row in rows() for line in row.text]
        sweeps = [sweep for sweep in processes.records("sweep") if sweep.process]
        head = [f"sweep {sweep.name}, {len(sweep.jobs)} jobs (process {sweep.pid})" for sweep in sweeps]
        text = "\n".join([*head, *lines]) or "nothing on record: no run or sweep was started in this project"
        print(f"\033[2J\033[H{time.strftime('%H:%M:%S')}\n{text}" if watch else text, flush=True)
        if not watch:
            return 0
        try:
            time.sleep(SECONDS)
        except KeyboardInterrupt:
            return 0


def attach(name: str) -> int:
    """Follow a job's log until it ends; Ctrl-C leaves it running. Raises `UserError` when there is no such job."""
    running = [row for row in rows() if row.log and row.state in ("running", *(["done", "failed"] if name else []))]
    row = _chosen(running, name, "has a log")
    if row.log is None:
        raise UserError(f"{row.name} has no log")

    def alive() -> bool:
        return any(process.is_running() for process in row.processes)

    try:
        for text in processes.follow(row.log, alive):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print(f"\n{row.name} goes on")
    return 0


def kill(name: str) -> int:
    """End one job or run; `all`: every sweep with its jobs, and every run. Only processes that are on record, or below one
    that is, each told by number and start time."""
    if name == "all":
        sweeps, jobs, runs = (
            [process for record in processes.records(kind) if (process := record.process)]
            for kind in ("sweep", "job", "run")
        )
        if not sweeps + jobs + runs:
            print("nothing of ours is running")
            return 0
        processes.stop(sweeps, STOP_SECONDS)  # they stop their own jobs, keep what was finished
        processes.stop(runs)
        left = [process for job in jobs if job.is_running() for process in processes.in_session(job.pid)]
        processes.stop_all_but_callers(left)
        print(f"ended {len(sweeps)} sweeps and {len(runs)} runs; checkpoints and finished experiments are kept")
        return 0
    row = _chosen([row for row in rows() if row.processes], name, "is running here")
    # the deepest are the stages themselves: they keep a checkpoint, and what called them then ends by itself
    processes.stop([process for process in row.processes if not processes.descendants(process)])
    print(f"ended {row.name}; the same call goes on from its checkpoint")
    return 0


def _chosen(candidates: list[Row], name: str, what: str) -> Row:
    if not name and len(candidates) == 1:
        return candidates[0]
    found = [row for row in candidates if row.name == name]
    if not found:
        names = [row.name for row in candidates]
        if not names:
            raise UserError(f"nothing of this project {what}")
        if not name:
            raise UserError(f"name one of {', '.join(names)}")
        raise UserError(f"no job {name!r} of this project {what}{did_you_mean(name, names)}")
    return found[0]
