"""What the training loop asks of the processes that go through it together: `Alone` here, `ranks.Together` for several."""

from __future__ import annotations

from typing import Protocol

from sae_research.training.buffer import StreamBatch
from sae_research.training.training_sae import TrainingSAE

GO, SAVE, STOP = range(3)
"""What rank 0 says between two steps."""


class Peers(Protocol):
    """The ranks that go through the loop together, each with steps of its own SAEs alone."""

    leads: bool
    """Whether this is rank 0, which hears of signals and writes what a run leaves."""

    def owns(self, sae: TrainingSAE) -> bool:
        """Whether this rank takes the steps of this SAE."""
        ...

    def word(self, word: int) -> int:
        """Rank 0's word."""
        ...

    def stop(self) -> None:
        """Rank 0 says `STOP`; the others are at `word`, or will be before their next step."""
        ...

    def stepped(self, batches: dict[str, StreamBatch], logged: list[TrainingSAE]) -> bool:
        """A step was taken, and these of this rank's SAEs have a new row in their curves. Rank 0 counts the steps of the
        others' and takes their rows. Returns whether a curve that this rank holds is longer now."""
        ...

    def gather(self) -> None:
        """Bring the SAEs that rank 0 holds for others to where their owners are."""
        ...


class Alone:
    """A group of one."""

    leads = True

    def owns(self, sae: TrainingSAE) -> bool:
        return True

    def word(self, word: int) -> int:
        return word

    def stop(self) -> None:
        pass

    def stepped(self, batches: dict[str, StreamBatch], logged: list[TrainingSAE]) -> bool:
        return bool(logged)

    def gather(self) -> None:
        pass
