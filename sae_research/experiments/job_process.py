"""One job of a sweep: a DVC experiment that `dvc exp run` makes in a clone of the repository, in a process of its own.

In clones experiments run side by side, sharing neither git's references nor DVC's locks nor a workspace. A clone holds the
commit and the uncommitted changes that the sweep started from; DVC's cache and `.cache` are the repository's own. What comes
back is the experiment as a git bundle.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sae_research.runtime import processes
from sae_research.runtime.cache import cache_dir, writable_cache_dir
from sae_research.runtime.errors import Interrupted, UserError, run_main
from sae_research.runtime.files import ROOT_VARIABLE, project_root
from sae_research.runtime.given_device import DEVICE_VARIABLE
from sae_research.runtime.workers import Job


def log_path(name: str) -> Path:
    """What a job of this name prints."""
    return cache_dir("jobs") / f"{name}.log"


def why_it_failed(log: Path | None) -> str:
    """The error that a job printed, else its last line."""
    lines = [line.strip() for line in processes.tail(log).replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("error:", "interrupted:"))]
    for said in ("ERROR:", "Error"):  # DVC's own, and Python's
        errors = errors or [line for line in lines if said in line]
    return (errors or lines or ["it ended before it said anything"])[-1]


# --- in the worker -------------------------------------------------------------------------------


class Base(NamedTuple):
    """What all jobs of a sweep start from."""

    commit: str
    changes: str
    """A commit of the workspace's uncommitted changes; empty where there are none."""


def experiment_job(base: Base) -> Job:
    """Workers that run experiments."""
    return Job(f"{__name__}:ExperimentWorker", json.dumps(base._asdict()).encode())


class ExperimentWorker:
    """Runs one experiment after the other."""

    def __init__(
        self, argument: bytes, environment: Mapping[str, str] | None = None, descriptors: Iterable[int] = ()
    ) -> None:
        """environment: variables that name the device, where this process has not been given it; descriptors: open files
        that a job keeps open."""
        self._base, self._environment, self._descriptors = json.loads(argument), dict(environment or {}), descriptors
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()

    def __call__(self, payload: bytes, shared: bytes) -> bytes:
        """The experiment `payload["name"]` of stages `payload["targets"]` with parameters `payload["overrides"]`, as a git
        bundle. Raises `UserError` where it fails and `RuntimeError` where its process dies."""
        asked = json.loads(payload)
        writable_cache_dir("jobs")
        task = json.dumps({**self._base, **asked, "bundle": str(log_path(asked["name"]).with_suffix(".bundle"))})
        log = log_path(asked["name"])
        self._child = child = processes.start_child(
            __name__, task.encode(), log, self._environment, answers=True, descriptors=self._descriptors
        )
        if self._stopped.is_set():
            processes.end_child(child)
        assert child.stdout is not None
        answer = child.stdout.read()
        child.wait()
        if answer:
            return _taken(Path(json.loads(answer)["bundle"]))
        left = processes.in_session(child.pid)
        processes.stop_all_but_callers(left)
        if child.returncode < 0 and not self._stopped.is_set():
            raise RuntimeError(f"the process of {asked['name']} was killed (signal {-child.returncode})")
        raise UserError(why_it_failed(log))

    def stop(self) -> None:
        """End the job at work, which may keep a checkpoint; from another thread."""
        self._stopped.set()
        if self._child is not None:
            processes.end_child(self._child)


def _taken(path: Path) -> bytes:
    value = path.read_bytes()
    path.unlink()
    return value


# --- the job's own process -----------------------------------------------------------------------


def main() -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    task = json.loads(processes.task_of_parent(lambda: os.kill(os.getpid(), signal.SIGTERM)))
    answers = os.dup(1)
    os.dup2(2, 1)  # what is printed from here on is the log's
    run_main(lambda: _answer(task, answers))
    return 0


class _Failed(Exception):
    """A command failed, and has said why."""


def _interrupt(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # once: its callers' end would interrupt the keeping of a checkpoint
    raise Interrupted("the sweep that this job belongs to has ended, or it was asked to end", number)


def _answer(task: Mapping[str, Any], answers: int) -> int:
    try:
        run_experiment(task)
    except _Failed:
        return 1
    os.write(answers, json.dumps({"bundle": task["bundle"]}).encode())
    return 0


def run_experiment(task: Mapping[str, Any]) -> None:
    """Run a job's experiment and write it to `task["bundle"]`. Raises `UserError` where it is at work already."""
    root, name = project_root(), task["name"]
    with (writable_cache_dir("jobs") / f"{name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{name} is at work already; watch it with python -m scripts.monitor_experiments") from None
        _end_what_was_left(name)
        device = os.environ.get(DEVICE_VARIABLE, "auto")
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
            device = f"{device}:{visible}"
        processes.record("job", name, os.getpid(), device=device, log=str(log_path(name)))
        clone = cache_dir("jobs") / "clones" / name
        try:
            work = _cloned(root, clone, task["commit"], task["changes"])
            overrides = [part for override in task["overrides"] for part in ("-S", override)]
            _run(work, "dvc", "exp", "run", "--name", name, *overrides, *task["targets"], **{ROOT_VARIABLE: str(root)})
            reference = f"refs/exps/{task['commit'][:2]}/{task['commit'][2:]}/{name}"
            _run(work, "git", "bundle", "create", "--quiet", task["bundle"], reference, f"^{task['commit']}")
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is left to do takes a moment
            if clone.exists():
                shutil.rmtree(clone)


def _end_what_was_left(name: str) -> None:
    """A job whose own process was killed leaves DVC at work."""
    for earlier in processes.records("job"):
        if earlier.name == name and earlier.host == os.uname().nodename and earlier.process is None:
            left = [one for one in processes.in_session(earlier.pid) if one.create_time() >= earlier.started]
            processes.stop_all_but_callers(left)


def _cloned(root: Path, clone: Path, commit: str, changes: str) -> Path:
    """A clone at a commit with uncommitted changes of a project in `root`; returns the project's folder there."""
    if clone.exists():
        shutil.rmtree(clone)
    clone.parent.mkdir(parents=True, exist_ok=True)
    repository = Path(_said(root, "git", "rev-parse", "--show-toplevel"))
    _run(root, "git", "clone", "--quiet", "--shared", "--no-checkout", str(repository), str(clone))
    for wanted in filter(None, (commit, changes)):
        if subprocess.run(["git", "cat-file", "-e", wanted], cwd=clone, check=False, stderr=subprocess.DEVNULL).returncode:
            raise UserError(
                f"{os.uname().nodename}: git has no commit {wanted[:10]} here: every node needs the folder that the sweep "
                "was started in, or the same commit without uncommitted changes"
            )
    _run(clone, "git", "checkout", "--quiet", "--detach", commit)
    if changes:
        _run(clone, "git", "checkout", "--quiet", "--no-overlay", changes, "--", ".")
    for key in ("user.name", "user.email"):
        value = subprocess.run(["git", "config", key], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
        if value:
            _run(clone, "git", "config", key, value)
    work = clone / root.resolve().relative_to(repository.resolve())
    private = root / ".dvc" / "config.local"
    if private.is_file():
        shutil.copy2(private, work / ".dvc" / "config.local")
    _run(work, "dvc", "cache", "dir", "--local", _said(root, "dvc", "cache", "dir"))
    _run(work, "dvc", "checkout", "--quiet", "--allow-missing", "--force")
    return work


def _environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # stages call plain `python`
    paths = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    here = str(Path(__file__).parents[2])
    kept = os.pathsep.join(part for part in paths if part != here)  # stages import the clone's code
    return {**os.environ, "PATH": path, "PYTHONPATH": kept, "DVC_NO_ANALYTICS": "1", **more}


def _said(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, env=_environment(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise _Failed
    return done.stdout.strip()


def _run(folder: Path, *command: str, **environment: str) -> None:
    """Run a command, which says itself why it fails; what it started ends where this process is interrupted."""
    try:
        failed = subprocess.run(
            command, cwd=folder, env=_environment(**environment), stdin=subprocess.DEVNULL, check=False
        ).returncode
    except BaseException:
        processes.stop_all_but_callers([one for one in processes.in_session(os.getpid()) if one.pid != os.getpid()])
        raise
    if failed:
        raise _Failed
