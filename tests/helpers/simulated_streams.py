"""Streams and events of the simulated device: vector clocks say which operations are known to be done."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

CUDA = torch.device("cuda", 0)


class Stream:
    """A queue of operations: how many it has taken, and how many of every other stream it has waited for."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = CUDA
        self.clock: dict[Stream, int] = {self: 0}
        _STREAMS.add(self)

    def __deepcopy__(self, _: Any) -> Stream:
        return self

    def tick(self) -> int:
        self.clock[self] += 1
        return self.clock[self]

    def _after(self, clock: dict[Stream, int]) -> None:
        for stream, time in clock.items():
            self.clock[stream] = max(time, self.clock.get(stream, 0))

    def wait_stream(self, other: Stream) -> None:
        self._after(other.clock)

    def wait_event(self, event: Event) -> None:
        self._after(event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """The computer waits: whatever any stream is given from here on comes after."""
        for stream in _STREAMS:
            stream.wait_stream(self)

    def query(self) -> bool:
        return True


class Event:
    """A moment of a stream."""

    def __init__(self, **_: Any) -> None:
        self.clock: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = {**(stream or current_stream()).clock}

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        for stream in _STREAMS:
            stream.wait_event(self)

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Event) -> float:
        return 1.0


_STREAMS: weakref.WeakSet[Stream] = weakref.WeakSet()
DEFAULT = Stream()
_host = threading.local()
"""Of each thread its current stream."""


def current_stream(_: Any = None) -> Stream:
    return getattr(_host, "stream", DEFAULT)


@contextmanager
def stream_context(stream: Stream | None) -> Generator[None]:
    before = current_stream()
    _host.stream = stream or before
    try:
        yield
    finally:
        _host.stream = before
