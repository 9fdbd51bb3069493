"""Before DVC runs: whether another of its processes is at work in the workspace, and what killed ones left damaged.

DVC writes its files in place: `.dvc/tmp/rwlock` and `dvc.lock` are empty or cut short when SIGKILL, or a machine out of
memory, meets it in that moment, and every later command fails. No torch here, and no DVC, which takes a second to import.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML, YAMLError

from sae_research.runtime.errors import UserError
from sae_research.runtime.stages import APART

PATIENCE = 3.0
"""Seconds that a short command of DVC (`dvc status`) may hold its lock before we give up; DVC itself waits as long."""
RWLOCKS = ("rwlock", "exps/rwlock")
"""Below `.dvc/tmp`: which process reads or writes which output; the same of experiments' git references."""


# --- one DVC run for a workspace ------------------------------------------------------------------


def prepare(root: Path) -> list[str]:
    """Make sure that DVC can run in the workspace `root`; a line for everything that was mended.

    Raises `UserError` where another DVC process is at work there.
    """
    if not (root / ".dvc").is_dir():
        raise UserError(f"{root}: no DVC project; run from the project's folder")
    at_work = _at_work(root)
    if at_work:
        raise UserError(f"{at_work[0]} is at work in this workspace; wait for it, or end it; {APART}")
    return [*_mended_rwlocks(root), *_mended_lock_file(root), *_mended_index(root), *_mended_branch(root)]


def _at_work(root: Path) -> list[str]:
    """DVC processes that hold outputs of the workspace, or its lock for longer than a short command does."""
    until = time.monotonic() + PATIENCE
    while True:
        holders = _holders(root / ".dvc/tmp/rwlock")
        if holders or not _held(root / ".dvc/tmp/lock"):
            return holders
        if time.monotonic() > until:
            return _dvc_processes(root) or ["a DVC process"]
        time.sleep(0.1)


def _held(path: Path) -> bool:
    """Whether a process has locked the file. DVC's lock is the system's, and goes with its process; the file stays."""
    with suppress(FileNotFoundError), path.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _holders(rwlock: Path) -> list[str]:
    """Live DVC processes in a file of locks; none in a file that is damaged."""
    entries = _entries(_read_rwlock(rwlock) or {})
    written = rwlock.stat().st_mtime if rwlock.is_file() else 0.0
    return sorted({f"`{_command(entry['cmd'])}` (process {entry['pid']})" for entry in entries if _alive(entry, written)})


def _entries(locks: dict[str, Any]) -> list[dict[str, Any]]:
    readers = [entry for entries in locks.get("read", {}).values() for entry in entries]
    return [*locks.get("write", {}).values(), *readers]


def _alive(entry: dict[str, Any], written: float) -> bool:
    """Whether the process that made an entry still lives. Its number alone says little: numbers are used again, and one
    that nobody waits for keeps its number when it has ended.

    written: when the file of locks was last written, seconds since 1970; a younger process is another.
    """
    try:
        process = psutil.Process(entry["pid"])
        if process.status() == psutil.STATUS_ZOMBIE or process.create_time() > written + 1:
            return False
        command = process.cmdline()
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's: believe the entry
        return True
    arguments = entry["cmd"].split()[1:]
    return _is_dvc(command) or bool(arguments) and command[-len(arguments) :] == arguments


def _is_dvc(command: list[str]) -> bool:
    return "dvc" in (Path(part).name for part in command[:3])


def _command(line: str) -> str:
    program, _, arguments = line.partition(" ")
    return f"{Path(program).name} {arguments}".strip()


def _dvc_processes(root: Path) -> list[str]:
    """DVC processes that were started in the workspace or below it, as far as the system lets us see."""
    found, root = [], root.resolve()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = process.cmdline()
            if _is_dvc(command) and process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(root):
                found.append(f"`{' '.join(Path(part).name for part in command[:4])}` (process {process.pid})")
    return found


# --- what a killed run leaves ---------------------------------------------------------------------


def _read_rwlock(path: Path) -> dict[str, Any] | None:
    """A file of locks, empty where there is none; None where it is damaged."""
    try:
        locks = json.loads(path.read_text())
        shaped = isinstance(locks, dict) and all(
            isinstance(entry["pid"], int) and isinstance(entry["cmd"], str) for entry in _entries(locks)
        )
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError, KeyError):
        return None
    return locks if shaped else None


def _mended_rwlocks(root: Path) -> list[str]:
    """Files of locks that are damaged, or name only processes that have ended, are removed: no lock is what they say."""
    lines = []
    for path in (root / ".dvc/tmp" / name for name in RWLOCKS):
        locks = _read_rwlock(path)
        if locks is None and _dvc_processes(root):  # one of them may be writing it
            time.sleep(0.3)
            locks = _read_rwlock(path)
        if locks is None:
            _refuse_beside_others(root, path)
            what = "was damaged by a killed run"
        elif _entries(locks) and not _holders(path):
            what = "named processes that have ended"
        else:
            continue
        path.unlink(missing_ok=True)
        lines.append(f"mended: {path.relative_to(root)} {what}; removed")
    return lines


def _mended_lock_file(root: Path) -> list[str]:
    """`dvc.lock` cut short: git's index has it as of the last finished stage (`core.autostage`), else the last commit.

    What finished since is found in DVC's run cache. A merge's conflict is the user's to solve and stays.
    """
    path = root / "dvc.lock"
    text = path.read_bytes() if path.is_file() else None
    if text is None or b"\n<<<<<<< " in b"\n" + text or _is_lock_file(text):
        return []
    _refuse_beside_others(root, path)
    for revision, where in (("", "git's index"), ("HEAD", "the last commit")):
        kept = _git(root, "show", f"{revision}:./dvc.lock")
        if kept.returncode == 0 and _is_lock_file(kept.stdout):
            temporary = path.with_name(".dvc.lock.mended")
            temporary.write_bytes(kept.stdout)
            temporary.replace(path)
            return [f"mended: dvc.lock was cut short by a killed run; taken from {where}"]
    path.unlink()
    return ["mended: dvc.lock was cut short by a killed run, and git has none; removed"]


def _is_lock_file(text: bytes) -> bool:
    """Whether DVC would read it: every stage has a command, every dependency and output a path."""
    try:
        values = YAML(typ="safe").load(text)
        stages = [*values["stages"].values()] if values.get("stages") else []
        rows = [row for stage in stages for kind in ("deps", "outs") for row in stage.get(kind) or []]
        return "schema" in values and all(stage["cmd"] for stage in stages) and all(row["path"] for row in rows)
    except (YAMLError, UnicodeDecodeError, AttributeError, TypeError, KeyError):
        return False


def _mended_index(root: Path) -> list[str]:
    """The lock of git's index, left by a killed command: DVC stages `dvc.lock` after every stage."""
    name = _git(root, "rev-parse", "--git-path", "index.lock").stdout.decode().strip()
    if not name or not (root / name).is_file() or _git_processes(root) or _dvc_processes(root):
        return []
    (root / name).unlink(missing_ok=True)
    return [f"mended: {name} was left by a killed command; removed"]


def _mended_branch(root: Path) -> list[str]:
    """Git's branch after a killed `dvc exp run`, which works on a detached HEAD and keeps uncommitted changes in git's
    stash meanwhile. DVC removes its references `EXEC_*` when it ends in good order."""
    killed = _git(root, "rev-parse", "-q", "--verify", "refs/exps/exec/EXEC_BASELINE").returncode == 0
    if not killed or _dvc_processes(root):
        return []
    lines = []
    if _git(root, "symbolic-ref", "-q", "HEAD").returncode:
        here = _git(root, "for-each-ref", "--points-at", "HEAD", "--format=%(refname)", "refs/heads")
        branches = here.stdout.decode().split()
        if len(branches) == 1 and _git(root, "symbolic-ref", "HEAD", branches[0]).returncode == 0:
            name = branches[0].removeprefix("refs/heads/")
            lines.append(f"mended: a killed `dvc exp run` had left git's HEAD; back on {name}")
        else:
            lines.append("note: a killed `dvc exp run` left git on no branch; git switch BRANCH brings you back")
    if _git(root, "rev-parse", "-q", "--verify", "refs/stash").returncode == 0:
        lines.append("note: a `dvc exp run` was killed; if changes of yours are gone, see git stash list")
    for name in ("EXEC_BASELINE", "EXEC_MERGE"):
        _git(root, "update-ref", "-d", f"refs/exps/exec/{name}")
    return lines


def _refuse_beside_others(root: Path, path: Path) -> None:
    others = _dvc_processes(root)
    if others:
        raise UserError(
            f"{path.relative_to(root)} is damaged, and {others[0]} is at "
            "work in this workspace; wait for it, or end it, and run again"
        )


def _git_processes(root: Path) -> bool:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "git" and Path(process.cwd()).is_relative_to(root.resolve()):
                return True
    return False


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
