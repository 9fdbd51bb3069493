"""SAEs of moments on the way, spaced evenly in the logarithm of progress: how features form."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from sae_research.saes import SparseAutoencoder, save_sae
from sae_research.training.member import Member

FOLDER = "checkpoints"
"""Below an SAE's own folder, where nothing looks for SAEs unasked."""


def snapshot_fractions(n: int) -> list[float]:
    """The start, and the last n - 1 of ..., 0.001, 10^-2.5, 0.01, 10^-1.5, 0.1, 10^-0.5 of the run."""
    return [0.0, *(10 ** (-k / 2) for k in range(n - 1, 0, -1))] if n else []


class Snapshots:
    """Saves every member's SAE below `folder` when a moment has come; `fraction` of the run is done already."""

    def __init__(self, folder: Path, n: int, members: list[Member], export: Callable[[Member], SparseAutoencoder],
                 resumed_at: float | None) -> None:
        self.folder, self.members, self.export = folder, members, export
        self.left = [f for f in snapshot_fractions(n) if resumed_at is None or f > resumed_at]

    def at_step(self, fraction: float) -> None:
        """Save if the run has just come past a moment."""
        if not self.left or fraction < self.left[0]:
            return
        self.left = [f for f in self.left if f > fraction]
        for member in self.members:
            save_sae(self.export(member), self.folder / member.name / f"step_{member.step}")

    def move_into(self, output: Path) -> None:
        """Put what was saved, in this process or one before it, below each SAE's folder in `output`."""
        for member in self.members:
            if (self.folder / member.name).is_dir():
                shutil.copytree(self.folder / member.name, output / member.name / FOLDER)
