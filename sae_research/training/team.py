"""Steps of several SAEs side by side on a CPU: each gets its share of the threads, rather than all threads in turn.

What a step has besides matrix products (selection, sparse products, small tensors) leaves all but one core idle however
many threads it may use. An SAE's result depends on how many threads it has, in the last digits, and on nothing that
others do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Item, Result = TypeVar("Item"), TypeVar("Result")


class Team:
    """Workers for so many items at a time; on a GPU, whose operations queue up, the calling thread alone."""

    def __init__(self, n_items: int, device: torch.device) -> None:
        self.threads = torch.get_num_threads()
        workers = min(self.threads, n_items) if device.type == "cpu" else 1
        self.each = self.threads // max(1, workers)
        self.pool = ThreadPoolExecutor(workers, "sae") if workers > 1 else None

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`function` of every item, in order; the first error, once all are done."""
        if self.pool is None:
            return [function(item) for item in items]

        def with_own_share(item: Item) -> Result:
            torch.set_num_threads(self.each)  # by every worker: torch holds part of it for each thread, part for all
            return function(item)

        futures = [self.pool.submit(with_own_share, item) for item in items]
        wait(futures)
        torch.set_num_threads(self.threads)
        return [future.result() for future in futures]

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()
