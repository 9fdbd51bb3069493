"""Processes of this project: started as children that end with their parent, put on record, found again, ended.

A process on record is told by its machine, number and start time, so that no other is ever taken for one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from sae_research.runtime.cache import cache_dir, writable_cache_dir
from sae_research.runtime.files import write_json

# --- children ------------------------------------------------------------------------------------


def start_child(
    module: str,
    task: bytes,
    log: Path,
    environment: Mapping[str, str],
    answers: bool = False,
    descriptors: Iterable[int] = (),
) -> subprocess.Popen[bytes]:
    """`main` of a module of this project, in a session of its own: a Ctrl-C at the terminal is for its parent.

    It reads `task` with `task_of_parent`. What it prints goes to `log`; with `answers` only what it prints as errors does,
    and its standard output is a pipe. descriptors: open files that it inherits.
    """
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"import sys; from {module} import main; sys.exit(main())"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if answers else output,
            stderr=output if answers else subprocess.STDOUT,
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
            pass_fds=list(descriptors),
        )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has died already, which whoever waits for it finds
        process.stdin.write(task + b"\n")
        process.stdin.flush()
    return process


def end_child(process: subprocess.Popen[bytes]) -> None:
    """Tell a child that its parent is done with it."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def task_of_parent(parent_ended: Callable[[], None]) -> bytes:
    """In a child: its task. `parent_ended` is called, in a thread, when the parent has ended or closed the child's input."""
    given = os.fdopen(os.dup(0), "rb", buffering=0)  # without a buffer whose lock the thread would hold at the end

    def wait() -> None:
        given.read()
        parent_ended()

    task = given.readline()
    threading.Thread(target=wait, daemon=True).start()
    return task


# --- on record -----------------------------------------------------------------------------------


class Record:
    """One process in `.cache/jobs/`: what it does, where, and where it writes what it says.

    `host`, `pid` and `started` (seconds since 1970, as the system tells it) name the process: numbers are used again.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values

    @property
    def process(self) -> psutil.Process | None:
        """The process; None when it has ended, or is another machine's."""
        return find(self.values["pid"], self.values["started"]) if self.values["host"] == socket.gethostname() else None

    def update(self, **values: Any) -> None:
        self.values |= values
        write_json(self.path, self.values)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None


def record(kind: str, name: str, pid: int, **values: Any) -> Record:
    """Put a process on record. kind: `run`, `sweep`, `job` or `units`."""
    named = {"host": socket.gethostname(), "pid": pid, "started": psutil.Process(pid).create_time()}
    made = Record(writable_cache_dir("jobs") / f"{kind}-{name}.json", {"kind": kind, "name": name, **named, **values})
    made.update()
    return made


def records(kind: str) -> list[Record]:
    """Those on record, in the order of their names; a file that another process is writing is passed over."""
    found = []
    for path in sorted(cache_dir("jobs").glob(f"{kind}-*.json")):
        try:
            values = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        found.append(Record(path, {"host": socket.gethostname(), **values}))  # older ones name no machine
    return found


def find(pid: int, started: float) -> psutil.Process | None:
    """The live process with this number and start time. One that has ended and waits for its parent is not alive."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 0.05
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


# --- ended ---------------------------------------------------------------------------------------


def stop(processes: list[psutil.Process], patience: float = 30.0) -> None:
    """Ask processes to end (SIGTERM), wait, and kill what is left. A training run keeps a checkpoint meanwhile."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    _, left = psutil.wait_procs(processes, timeout=patience)
    for process in left:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(left, timeout=5)


def stop_all_but_callers(everyone: list[psutil.Process]) -> None:
    """End processes, first those that have no child: the stage at work keeps a checkpoint, its callers then end by
    themselves, or are ended."""
    stop([one for one in everyone if not descendants(one)])
    psutil.wait_procs(everyone, timeout=10)
    stop([one for one in everyone if one.is_running()])


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """All below a process, the deepest last."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def in_session(leader: int) -> list[psutil.Process]:
    """The live processes of a session, its leader included; they stay in it when those between have died."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


# --- what they say -------------------------------------------------------------------------------


def last_line(path: str | Path | None, size: int = 8192) -> str:
    """The last line of a log that says something; of a progress bar its last state."""
    lines = [line.strip() for line in tail(path, size).replace("\r", "\n").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def tail(path: str | Path | None, size: int = 8192) -> str:
    """The last `size` bytes of a file, as text; nothing where there is none yet."""
    if not path or not Path(path).is_file():
        return ""
    with Path(path).open("rb") as handle:
        handle.seek(0, os.SEEK_END)
        handle.seek(max(0, handle.tell() - size))
        return handle.read().decode(errors="replace")


def read_on(path: Path, position: int) -> tuple[str, int]:
    """What was written to a file from a position on, and the position after it; nothing where there is no file yet."""
    if not path.is_file():
        return "", position
    with path.open("rb") as handle:
        handle.seek(position)
        return handle.read().decode(errors="replace"), handle.tell()


def follow(path: Path, alive: Callable[[], bool], seconds: float = 0.3) -> Iterator[str]:
    """What is written to a file from its last lines on, until `alive()` is false and all was read."""
    position = max(0, path.stat().st_size - 4096) if path.is_file() else 0
    while True:
        going = alive()
        text, position = read_on(path, position)
        if text:
            yield text
        if not going:
            return
        time.sleep(seconds)
