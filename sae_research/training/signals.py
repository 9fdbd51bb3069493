"""SIGTERM and Ctrl-C as a request: a run is left between two steps, never inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop(KeyboardInterrupt):
    """The run was asked to stop, and stands where it can: `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class StopSignals:
    """Within this context the first signal raises `Stop` at once where nothing is being changed, else at `check`.

    A second one acts as it did before: somebody is in a hurry.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._hand_back()

    def _hand_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._hand_back()
        if not self._deferred:
            raise Stop(number)

    def check(self) -> None:
        """Raises `Stop` if a signal came while stopping was deferred."""
        if self.received is not None:
            raise Stop(self.received)

    def carry_through(self) -> None:
        """From here on a first signal changes nothing: the rest is short, and leaves all done or all as it was."""
        self.check()
        self._deferred = True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A stretch in which state changes: a signal waits for the next `check`."""
        with self._set(True):
            yield

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A stretch inside a deferred one that may be left at any point."""
        with self._set(False):
            self.check()
            yield

    @contextmanager
    def _set(self, deferred: bool) -> Iterator[None]:
        before, self._deferred = self._deferred, deferred
        try:
            yield
        finally:
            self._deferred = before
