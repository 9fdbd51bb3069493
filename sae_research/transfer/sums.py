"""Statistics that are sums: what is kept apart while reading can be added up afterwards. And how figures are written."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_FIXED = ("shift", "dtype")


def together(kept: T, removed: T) -> T:
    """The statistics over both sets of tokens: every number and tensor of `removed` added to a copy of `kept`.

    For classes all of whose numbers and tensors are sums over tokens, but for those named in `_FIXED`; they may hold others
    of their kind.
    """
    total = copy.copy(kept)
    for name, value in vars(removed).items():
        if name not in _FIXED:
            own = getattr(kept, name)
            setattr(total, name, own + value if isinstance(value, Tensor | int | float) else together(own, value))
    return total


def rounded_list(values: Any) -> list[float]:
    """Floats of a tensor with 6 significant digits, for files that are read by people and plots."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def sums_dtype(device: torch.device) -> torch.dtype:
    """Precision of sums: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def counted(values: Tensor, edges: list[float]) -> Tensor:
    """How many values fall into each bin between `edges` [bins]; those outside count in the outermost."""
    bins = torch.bucketize(values, torch.tensor(edges[1:-1], dtype=values.dtype, device=values.device), right=True)
    return torch.bincount(bins, minlength=len(edges) - 1).to(sums_dtype(values.device))
