"""Schedules as functions of progress, the fraction of the run that is done (0 at its start, 1 at its end).

Literature gives warm-ups and decays in absolute steps for runs of 10^5 steps; a short run would never leave
them.
"""

from __future__ import annotations


def warmup(progress: float, fraction: float) -> float:
    """Linear from 0 to 1 over the first `fraction` of the run, then 1."""
    return 1.0 if fraction <= 0 else min(1.0, progress / fraction)


def warmup_then_decay(progress: float, warmup_fraction: float, decay_fraction: float) -> float:
    """Linear from 0 to 1, flat, then linear to 0 over the last `decay_fraction` of the run."""
    return min(warmup(progress, warmup_fraction), warmup(1.0 - progress, decay_fraction))
