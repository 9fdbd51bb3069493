"""Factors of learning rates and penalties: functions of progress, the fraction of the run that is done."""

from __future__ import annotations

import math
from typing import Literal


def warmup(progress: float, fraction: float) -> float:
    """Linear from 0 to 1 over the first `fraction` of the run, then 1."""
    return 1.0 if fraction <= 0 else min(1.0, progress / fraction)


def warmup_then_decay(
    progress: float,
    warmup_fraction: float,
    decay_fraction: float,
    schedule: Literal["linear", "cosine", "constant"] = "linear",
    lowest: float = 0.0,
) -> float:
    """Linear from 0 to 1, flat, then from 1 to `lowest` over the last `decay_fraction` of the run, along a line or half a
    period of the cosine (Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5); `constant` stays flat to the end."""
    risen = warmup(progress, warmup_fraction)
    if schedule == "constant":
        return risen
    left = warmup(1.0 - progress, decay_fraction)
    if schedule == "cosine":
        left = (1.0 - math.cos(math.pi * left)) / 2
    return min(risen, lowest + (1.0 - lowest) * left)
