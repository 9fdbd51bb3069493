"""How fast a device multiplies and reads: measured here in a few seconds, or from a table of GPUs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from sae_research.lm.load import device_memory
from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.files import read_json

TABLE = Path(__file__).with_name("devices.json")
ATTAINED = 0.4
"""Share of a datasheet's product rate that a run is taken to reach. Assumed: nothing has been measured on CUDA yet."""
ATTAINED_BANDWIDTH = 0.7
"""The same of its bandwidth."""
_SIDE, _VECTOR = 1024, 2**24
_REPEATS = 5


class Device(NamedTuple):
    """One device. Rates are what a run reaches, not the datasheet's."""

    name: str
    memory: float
    """Bytes."""
    bfloat16: float | None
    """FLOP/s of dense bfloat16 products; None where bfloat16 is only emulated."""
    float32: float
    """FLOP/s of dense float32 products."""
    bandwidth: float
    """Bytes/s read and written."""
    source: str
    kind: str = "cuda"
    """Of torch's devices."""

    def rate(self, precision: str) -> float:
        """FLOP/s of products in `float32`, `bfloat16` or `float16`."""
        return self.float32 if precision == "float32" or self.bfloat16 is None else self.bfloat16


def nominal(kind: str) -> Device:
    """Some device of a kind of torch's, for ratios of what it computes."""
    if kind == "cuda":
        return known_devices()["H100"]
    return Device("a CPU core", 4e9, None, 60e9, 12e9, "nominal", kind)


def known_devices() -> dict[str, Device]:
    """The table's GPUs by name, at the share of their rates that a run is taken to reach."""
    return {
        name: Device(
            name,
            row["memory_gb"] * 1e9,
            None if row["bfloat16_tflops"] is None else ATTAINED * row["bfloat16_tflops"] * 1e12,
            ATTAINED * row["float32_tflops"] * 1e12,
            ATTAINED_BANDWIDTH * row["bandwidth_gb_s"] * 1e9,
            f"{row['source']}; {ATTAINED:.0%} of the product rates and {ATTAINED_BANDWIDTH:.0%} of the bandwidth assumed",
        )
        for name, row in read_json(TABLE).items()
    }


def device_by_name(name: str) -> Device:
    """Raises `UserError` naming the devices of the table."""
    known = known_devices()
    for key, device in known.items():
        if key.lower() == name.lower():
            return device
    raise UserError(
        f"--gpu: no device {name!r} in the table{did_you_mean(name, known, otherwise='')}; known: {', '.join(known)}"
    )


def measured_device(device: torch.device, has_bfloat16: bool, clock: Callable[[], float] = time.perf_counter) -> Device:
    """Rates of the device that this process would use: the median of a few products and copies, two seconds at most.

    has_bfloat16: whether bfloat16 products are any faster than emulated. clock: `time.process_time` with one thread counts
    what a busy machine leaves this process.
    """
    products = 2 * _SIDE**3

    def rate(dtype: torch.dtype) -> float:
        left = torch.randn(_SIDE, _SIDE, device=device).to(dtype)
        weight = torch.randn(_SIDE, _SIDE, device=device).to(dtype)
        multiply = _product(device, dtype)
        return products / _seconds(lambda: multiply(left, weight), device, clock)

    source, target = torch.zeros(_VECTOR, device=device), torch.empty(_VECTOR, device=device)
    copied = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, clock)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this machine's {device.type}"
    threads = "" if device.type == "cuda" else f" with {torch.get_num_threads()} threads"
    return Device(
        name,
        float(device_memory(device)),
        rate(torch.bfloat16) if has_bfloat16 else None,
        rate(torch.float32),
        copied,
        f"measured now{threads}: products of {_SIDE} x {_SIDE}, copies of {source.nbytes / 1e6:.0f} MB",
        device.type,
    )


def _product(device: torch.device, dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The product that the model's layers take there (`lm.model`)."""
    if device.type == "cpu" and dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.mm


def _seconds(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    def waited() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    run()
    times = []
    for _ in range(_REPEATS):
        began = waited()
        run()
        times.append(waited() - began)
    return max(statistics.median(times), 1e-9)
