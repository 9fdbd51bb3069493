"""Device slots, leases on GPUs so that no two jobs meet on one, and this project's processes on record.

A process is found again by number and start time, so that no other is ever taken for one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from sae_research.runtime.cache import cache_dir, writable_cache_dir
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import write_json

DEVICE_VARIABLE = "SAE_RESEARCH_DEVICE"
"""What `model.device: auto` means to a worker's processes (see `lm.load.pick_device`)."""
_NAME = re.compile(r"^(cpu|mps|cuda(:\d+)?)$")


class Slot(NamedTuple):
    """Room for one job at a time."""

    device: str
    number: int
    """Counts slots on the same device from 0."""

    @property
    def name(self) -> str:
        """`cuda_1`, `cpu`, `cpu_2`: fit for a file's name."""
        return self.device.replace(":", "_") + (f"_{self.number + 1}" if self.number else "")

    def environment(self, n_cpu_slots: int) -> dict[str, str]:
        """Variables by which a worker sees this device alone. CPU workers share the cores."""
        if self.device.startswith("cuda"):
            visible = _physical(int(self.device.partition(":")[2] or 0))
            return {"CUDA_VISIBLE_DEVICES": visible, DEVICE_VARIABLE: "cuda"}
        values = {"CUDA_VISIBLE_DEVICES": "", DEVICE_VARIABLE: self.device}
        if self.device == "cpu" and n_cpu_slots > 1:
            threads = str(max(1, (os.cpu_count() or 1) // n_cpu_slots))
            values |= {name: os.environ.get(name, threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
        return values


def _physical(index: int) -> str:
    """The device's own number, where CUDA_VISIBLE_DEVICES already chooses among them."""
    visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    return visible[index] if index < len(visible) else str(index)


class Found(NamedTuple):
    """One device of this machine."""

    device: str
    description: str


def available() -> list[Found]:
    """Every device that PyTorch can use here, the fastest first."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            Found(
                f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
            )
        )
    if torch.backends.mps.is_available():
        found.append(Found("mps", "Apple GPU"))
    return [*found, Found("cpu", f"{os.cpu_count()} cores")]


def parse_devices(text: str, found: list[Found] | None = None) -> list[Slot]:
    """Slots from `auto` or names with commas; a name given twice is two slots.

    `auto` is every CUDA device that no job of this project holds, else MPS, else one CPU slot. Raises `UserError` for
    a name that is none and for a device that is not there.
    """
    there = [device.device for device in found or available()]
    if text.strip() == "auto":
        gpus = [name for name in there if name != "cpu"]
        free = [name for name in gpus if holder(Slot(name, 0)) is None]
        if gpus and not free:
            raise UserError(
                f"--devices auto: all of {', '.join(gpus)} are busy with jobs of this project; wait, or name devices"
            )
        names = free or ["cpu"]
    else:
        names = [name.strip() for name in text.split(",") if name.strip()]
        names = ["cuda:0" if name == "cuda" else name for name in names]
    for name in names:
        if not _NAME.match(name):
            raise UserError(f"--devices: {name!r} is no device; known here: {', '.join(there)}")
        if name not in there:
            raise UserError(f"--devices: {name} is not there; found {', '.join(there)}")
    if not names:
        raise UserError(f"--devices: names no device; known here: {', '.join(there)}")
    seen: Counter[str] = Counter()
    slots = []
    for name in names:
        slots.append(Slot(name, seen[name]))
        seen[name] += 1
    return slots


# --- leases ------------------------------------------------------------------------------------


class Lease:
    """A slot held by this process and by those that inherit `descriptor`; the system frees it when all have ended."""

    def __init__(self, slot: Slot, owner: str) -> None:
        """Raises `UserError` when another job holds the slot. CPU slots are never refused."""
        self.slot, self.descriptor = slot, -1
        if slot.device == "cpu":
            return
        self.descriptor = os.open(writable_cache_dir("leases") / _lease_file(slot).name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.descriptor)
            raise UserError(
                f"{slot.device} is busy with {holder(slot) or 'another job'}; wait for it (python -m "
                "scripts.monitor_experiments), or name other devices"
            ) from None
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, json.dumps({"owner": owner}).encode())

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def holder(slot: Slot) -> str | None:
    """Who holds a slot; None when it is free."""
    path = _lease_file(slot)
    if not path.is_file():
        return None
    with path.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = handle.read()
            return str(json.loads(text)["owner"]) if text else "another job"
    return None


def _lease_file(slot: Slot) -> Path:
    return cache_dir("leases") / f"{slot.name}.lock"


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
