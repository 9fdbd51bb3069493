"""Devices of this machine by name, as slots for jobs, and leases on GPUs so that no two jobs meet on one."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from sae_research.runtime.cache import cache_dir, writable_cache_dir
from sae_research.runtime.errors import UserError
from sae_research.runtime.given_device import DEVICE_VARIABLE

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
        """Variables by which a job sees this device alone. CPU slots share the cores."""
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
