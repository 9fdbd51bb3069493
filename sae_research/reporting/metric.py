"""What one metric is: its name, meaning, source in a result file, and which way it should point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LAB = "lab_v1"
SAE_BENCH = "sae_bench_0.6.0"
STOCK_SUFFIX = "_sae_bench"
"""Marks a figure of SAE Bench's own definition where ours stands beside it."""

Definition = Literal["lab_v1", "sae_bench_0.6.0"]


@dataclass(frozen=True)
class Metric:
    """One measured quantity."""

    key: str
    """Its name in `metrics/*.json`; may hold `{k}`."""
    label: str
    """How tables and axes call it."""
    eval: str
    better: Literal["higher", "lower"] | None
    """Which way an SAE should push it; None where neither is a virtue."""
    definition: str
    """One sentence; may hold `{k}`."""
    source: str | None = None
    """`category.name` in SAE Bench's structured block; None for ours, which stands under `key` in lab_v1."""
    idle: tuple[float, str] | None = None
    """The value that is had for nothing, and by what; None where there is no such value."""

    @property
    def version(self) -> Definition:
        """Whose definition this is."""
        return LAB if self.source is None else SAE_BENCH

    @property
    def base_key(self) -> str:
        """The key without the suffix that marks SAE Bench's definition."""
        return self.key.removesuffix(STOCK_SUFFIX)

    @property
    def arrow(self) -> str:
        return {"higher": " ↑", "lower": " ↓", None: ""}[self.better]
