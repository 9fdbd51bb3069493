"""DVC's experiment queue: what is in it, what goes in, the worker processes that empty it, and how far they are.

Queue and experiments are DVC's own (`dvc queue status`, `dvc exp show`). Its workers are started one by one here, so that
each has the environment of its device.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from sae_research.experiments import processes
from sae_research.experiments.grid import Job
from sae_research.experiments.processes import tail
from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.files import project_root, read_json
from sae_research.runtime.formatting import duration, number


class Entry(NamedTuple):
    """One experiment in the queue."""

    name: str
    state: str
    """`queued`, `running`, `failed` or `done`."""
    pid: int | None
    """Of the process that runs its stages, where one was started."""
    log: Path | None

    @property
    def reason(self) -> str:
        """Why it failed: the error it printed, else its last line."""
        lines = [line.strip() for line in tail(self.log).replace("\r", "\n").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("error:", "interrupted:"))] or [
            line for line in lines if "Error" in line
        ]
        return (errors or lines or ["it ended before it said anything; see .cache/jobs/worker-*.log"])[-1]


class DVCQueue:
    """The queue of one project."""

    def __init__(self, root: Path) -> None:
        """Raises `UserError` where there is no DVC project in a git repository with a commit."""
        self.root = root
        if not (root / ".dvc").is_dir():
            raise UserError(f"{root}: no DVC project; run from the project's folder (git init, dvc init)")
        if git(root, "rev-parse", "--verify", "-q", "HEAD").returncode:
            raise UserError(f"{root}: experiments need a git repository with a commit; git add, git commit")

    @contextlib.contextmanager
    def _repo(self) -> Generator[Any]:
        """DVC's own object, without what it prints."""
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        try:
            with contextlib.redirect_stdout(io.StringIO()), Repo(str(self.root)) as repo:
                yield repo
        except DvcException as error:
            raise UserError(f"DVC: {_reasons(error)}") from error

    def apply(self, name: str) -> list[str]:
        """Bring an experiment into the workspace; returns outputs that are in no cache here, whose folders are gone then.

        `dvc exp apply` ends with an error there, as an experiment names the outputs of all stages, those too that neither
        it nor this clone has run. Raises `UserError` for an unknown name and whatever else DVC refuses.
        """
        with self._repo() as repo:
            repo.experiments.apply(name, allow_missing=True)
            return sorted(
                os.path.relpath(out.fs_path, repo.root_dir) for out in repo.index.outs if out.use_cache and not out.exists
            )

    def entries(self) -> dict[str, Entry]:
        """Everything in the queue, by name; of several with one name the last."""
        found: dict[str, Entry] = {}
        with self._repo() as repo:
            queue = repo.experiments.celery_queue
            states = (
                ("done", (done.entry for done in queue.iter_success())),
                ("failed", (done.entry for done in queue.iter_failed())),
                ("queued", queue.iter_queued()),
                ("running", queue.iter_active()),
            )
            for state, entries in states:
                for entry in entries:
                    info = queue.proc.get(entry.stash_rev)
                    name = entry.name or entry.stash_rev[:7]
                    found[name] = Entry(name, state, info.pid if info else None, Path(info.stdout) if info else None)
        return found

    def put(self, job: Job, overrides: list[str]) -> None:
        """Queue a job as an experiment on the last commit and the workspace as it stands."""
        with self._repo() as repo:
            repo.experiments.run(targets=job.targets, queue=True, params=overrides, name=job.name)

    def remove(self, names: Iterable[str]) -> None:
        """Take queued and failed entries out."""
        names = list(names)
        if names:
            with self._repo() as repo:
                repo.experiments.celery_queue.remove(names)

    def give_up(self, names: Iterable[str]) -> None:
        """Count entries as failed whose worker died under them, which DVC would call running for ever."""
        names = list(names)
        if names:
            with self._repo() as repo:
                repo.experiments.celery_queue.kill(names)

    def start_worker(self, name: str, environment: dict[str, str], log: Path, descriptors: Iterable[int]) -> int:
        """Start a process that takes jobs from the queue, one at a time, until it has been empty for ten seconds.

        It leads a session of its own, so that Ctrl-C reaches it through us alone. Returns its number.
        """
        node = f"sae-{hashlib.sha256(str(self.root).encode()).hexdigest()[:6]}-{name}@localhost"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # stages call plain `python`
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "dvc", "exp", "queue-worker", node],
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=list(descriptors),
                env={**os.environ, **environment, "PATH": path, "DVC_NO_ANALYTICS": "1"},
            ).pid


def apply_experiment(root: Path, name: str) -> list[str]:
    """`DVCQueue.apply`, with the names there are where there is none of this name."""
    queue = DVCQueue(root)
    references = git(root, "for-each-ref", "refs/exps/*/*/*", "--format=%(refname)").stdout.split()
    known = {reference.rpartition("/")[2] for reference in references}
    if name not in known and git(root, "rev-parse", "--verify", "-q", f"{name}^{{commit}}").returncode:
        raise UserError(f"no experiment {name!r}{did_you_mean(name, known) if known else '; there is none yet'}")
    return queue.apply(name)


class Experiment(NamedTuple):
    """A finished experiment on the last commit."""

    name: str
    revision: str


def experiments(root: Path) -> list[Experiment]:
    """Finished experiments on HEAD, from git alone."""
    head = git(root, "rev-parse", "HEAD").stdout.strip()
    prefix = f"refs/exps/{head[:2]}/{head[2:]}/"
    lines = git(root, "for-each-ref", prefix, "--format=%(refname) %(objectname)").stdout.splitlines()
    return [Experiment(line.split()[0].removeprefix(prefix), line.split()[1]) for line in lines]


def file_at(root: Path, revision: str, path: str) -> str | None:
    """A file as an experiment left it; None where it has none."""
    shown = git(root, "show", f"{revision}:./{path}")
    return None if shown.returncode else shown.stdout


def same_code(root: Path, revision: str, paths: Iterable[str]) -> bool:
    """Whether an experiment ran with the workspace's present code."""
    return git(root, "diff", "--quiet", revision, "--", *paths).returncode == 0


def git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)


def _reasons(error: BaseException | None) -> str:
    lines = []
    while error is not None:
        lines.append(" ".join(str(error).split()))
        error = error.__cause__
    return ": ".join(dict.fromkeys(line for line in lines if line))


SECONDS = 3.0
MAX_LINE = 200


class Row(NamedTuple):
    """One job or run."""

    name: str
    state: str
    """`queued`, `running`, `done`, `failed`, or `ended`: a run whose process is gone without a word."""
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


def rows(root: Path) -> list[Row]:
    """Runs and the jobs of sweeps, in the order of their names; those of the past as long as they are on record."""
    found = [_run_row(record) for record in processes.records("run")]
    sweeps = processes.records("sweep")
    jobs = {name: job for sweep in sweeps for name, job in sweep.jobs.items()}
    entries = DVCQueue(root).entries() if jobs else {}
    workers = [(worker, process) for worker in processes.records("worker") if (process := worker.process)]
    return found + [_job_row(name, job, entries[name], workers) for name, job in sorted(jobs.items()) if name in entries]


def _run_row(record: processes.Record) -> Row:
    process, progress = record.process, _progress(record.progress)
    of_this_run = progress.get("updated", 0) >= int(record.started)  # else an earlier run of the same settings left it
    ended = {"finished": "done", "failed": "failed", "interrupted": "failed"}.get(progress.get("state", ""))
    state = (ended if of_this_run else None) or ("running" if process else "ended")
    device = progress.get("device") or record.device
    return Row(record.name, state, device, progress, None, progress.get("message", ""), [process] if process else [])


def _job_row(name: str, job: dict[str, Any], entry: Entry, workers: list[tuple[processes.Record, psutil.Process]]) -> Row:
    device, ours = "", []
    if entry.state == "running":
        for worker, process in workers:
            below = processes.descendants(process)
            if entry.pid in [child.pid for child in below]:
                device, ours = worker.device, below
    progress = _progress(job["progress"]) if entry.state != "queued" else {}
    said = {"running": processes.last_line(entry.log), "failed": entry.reason}.get(entry.state, "")
    return Row(name, entry.state, device, progress, entry.log, said, ours)


def _progress(path: str) -> dict[str, Any]:
    try:
        return read_json(Path(path))
    except UserError:  # not there yet
        return {}


def show(watch: bool) -> int:
    """Print every row; with `watch` again and again, until Ctrl-C."""
    root = project_root()
    while True:
        lines = [line for row in rows(root) for line in row.text]
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
    root = project_root()
    running = [row for row in rows(root) if row.log and row.state in ("running", *(["done", "failed"] if name else []))]
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
    """End one job or run; `all`: sweeps with their workers, and runs. Only processes that are on record, or below one
    that is, each told by number and start time."""
    root = project_root()
    if name == "all":
        sweeps = [process for sweep in processes.records("sweep") if (process := sweep.process)]
        workers = [process for worker in processes.records("worker") if (process := worker.process)]
        runs = [process for run in processes.records("run") if (process := run.process)]
        if not sweeps + workers + runs:
            print("nothing of ours is running")
            return 0
        processes.stop(sweeps)  # stops its own workers, keeps what was finished
        processes.stop(runs)
        processes.stop_workers([process for process in workers if process.is_running()])
        print(f"ended {len(sweeps)} sweeps and {len(runs)} runs; checkpoints and finished experiments are kept")
        return 0
    row = _chosen([row for row in rows(root) if row.processes], name, "is running")
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
