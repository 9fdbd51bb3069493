"""DVC's experiment queue: what is in it, what goes in, and the worker processes that empty it.

Queue and experiments are DVC's own (`dvc queue status`, `dvc exp show`). Its workers are started one by one here, so
that each has the environment of its device.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sae_research.experiments.grid import Job
from sae_research.experiments.processes import tail
from sae_research.runtime.errors import UserError, did_you_mean


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
