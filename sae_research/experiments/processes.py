"""Processes of ours, on record: found again by number and start time, so that no other is ever taken for one."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from sae_research.store import write_json
from sae_research.store_cache import cache_dir, writable_cache_dir


class Record:
    """One process in `.cache/jobs/`: what it does, where, and where it writes what it says.

    `pid` and `started` (seconds since 1970, as the system tells it) name the process: numbers are used again.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values

    @property
    def process(self) -> psutil.Process | None:
        """The process, None when it has ended."""
        return find(self.values["pid"], self.values["started"])

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None


def record(kind: str, name: str, pid: int, **values: Any) -> Record:
    """Put a process on record. kind: `run` or `worker`."""
    made = {"kind": kind, "name": name, "pid": pid, "started": psutil.Process(pid).create_time(), **values}
    path = writable_cache_dir("jobs") / f"{kind}-{name}.json"
    write_json(path, made)
    return Record(path, made)


def records(kind: str) -> list[Record]:
    """Those on record, in the order of their names; a file that another process is writing is passed over."""
    found = []
    for path in sorted(cache_dir("jobs").glob(f"{kind}-*.json")):
        try:
            found.append(Record(path, json.loads(path.read_text())))
        except (FileNotFoundError, json.JSONDecodeError):
            continue
    return found


def find(pid: int, started: float) -> psutil.Process | None:
    """The live process with this number and start time. One that has ended and waits for its parent is not alive."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 0.05
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def stop(processes: list[psutil.Process], patience: float = 30.0) -> None:
    """Ask processes to end (SIGTERM), wait, and kill what is left. A training run keeps a checkpoint meanwhile."""
    for process in processes:
        _signal(process, "terminate")
    _, left = psutil.wait_procs(processes, timeout=patience)
    for process in left:
        _signal(process, "kill")
    psutil.wait_procs(left, timeout=5)


def stop_tree(process: psutil.Process) -> None:
    """End a process and all below it, the deepest first: the stage at work keeps a checkpoint, its callers then end by
    themselves."""
    everyone = [process, *descendants(process)]
    stop([one for one in everyone if not descendants(one)])
    psutil.wait_procs(everyone, timeout=10)
    stop([one for one in everyone if one.is_running()])


def stop_workers(workers: list[psutil.Process], patience: float = 30.0) -> None:
    """End workers of DVC's queue and their jobs: they take no new one, the stages at work keep a checkpoint and end, and
    each worker notes how. Whatever has not ended in time is killed."""
    below = [child for worker in workers for child in descendants(worker)]
    for worker in workers:
        _signal(worker, "terminate")
    stop([child for child in below if not descendants(child)], patience)
    psutil.wait_procs(workers, timeout=patience)
    stop([process for process in [*below, *workers] if process.is_running()], patience=3)


def _signal(process: psutil.Process, how: str) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        getattr(process, how)()


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """All below a process, the deepest last."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


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


def follow(path: Path, alive: Any, seconds: float = 0.3) -> Iterator[str]:
    """What is written to a file from its last lines on, until `alive()` is false and all was read."""
    position = max(0, path.stat().st_size - 4096) if path.is_file() else 0
    while True:
        going = alive()
        if path.is_file():
            with path.open("rb") as handle:
                handle.seek(position)
                chunk = handle.read()
                position = handle.tell()
            if chunk:
                yield chunk.decode(errors="replace")
        if not going:
            return
        time.sleep(seconds)
