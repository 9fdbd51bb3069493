"""The activation stream: contexts through the language model in chunks, at one or more hooks, each place's activations
shuffled in a bounded buffer (`training.buffer`)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from sae_research.config.params import Params
from sae_research.lm import LanguageModel, collect_hooks
from sae_research.text.tokens import StoredContexts
from sae_research.training.buffer import HookBuffer, StreamBatch, side_by_side

CHUNK_TOKENS = 16_384
"""Tokens per entry of the activation cache: an interrupted run loses at most this much work, and a longer run
reuses a shorter one's chunks."""


def chunk_contexts(params: Params, context_size: int) -> int:
    """Contexts of a chunk."""
    return max(1, min(CHUNK_TOKENS, params.train.buffer_tokens // 2) // context_size)


class Stream(Protocol):
    """What the trainer asks of a source of activations: chunks to read and feed, rounds of batches between them."""

    device: torch.device
    next_chunk: int
    """`n_chunks` once all are fed, one more after `finish`."""

    @property
    def reads_ahead(self) -> bool:
        """Whether a chunk may be read in another thread, and on another CUDA stream of `device`, while the one before it is
        being served."""

    @property
    def n_tokens(self) -> int:
        """Tokens that will be read, whether they count or not."""

    @property
    def n_chunks(self) -> int: ...

    @property
    def fraction(self) -> float:
        """Fraction of the run that is done."""

    @property
    def expected_rows(self) -> float:
        """Activations that one SAE will be trained on, as far as can be told by now."""

    def read(self, chunk: int) -> dict[str, Tensor]:
        """A chunk's activations by hook; changes nothing."""

    def feed(self, acts: dict[str, Tensor]) -> None:
        """Take in what `read` gave of the next chunk."""

    def finish(self) -> None:
        """No more chunks."""

    def rounds(self) -> Iterator[dict[str, StreamBatch]]:
        """A batch of each hook that has one, until none has."""


class ReadAhead:
    """Chunks of a stream in order, the same whether read ahead or not. Where the stream allows it, the model runs over the
    next chunk, in a thread and on a CUDA stream of its own, while SAEs step on this one; elsewhere a chunk is read when
    asked for."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._pool = ThreadPoolExecutor(1, "read") if stream.reads_ahead else None
        self._side = torch.cuda.Stream(stream.device) if stream.reads_ahead else None
        self._begun: tuple[int, Future[tuple[dict[str, Tensor], torch.cuda.Event]]] | None = None

    def begin(self, chunk: int) -> None:
        """Start to read a chunk, if there is one and the stream reads ahead."""
        if self._pool is not None and chunk < self.stream.n_chunks:
            before = torch.cuda.current_stream(self.stream.device).record_event()
            self._begun = chunk, self._pool.submit(self._read, chunk, before)

    def read(self, chunk: int) -> dict[str, Tensor]:
        """A chunk's activations by hook. May be left by an exception at any point, and asked again."""
        if self._pool is None:
            return self.stream.read(chunk)
        if self._begun is None or self._begun[0] != chunk:
            self.begin(chunk)
        assert self._begun is not None  # begin has just set it
        acts, done = self._begun[1].result()
        self._begun = None
        here = torch.cuda.current_stream(self.stream.device)
        here.wait_event(done)
        for tensor in acts.values():
            tensor.record_stream(here)  # made on the other stream, it must not be reused there while it is read here
        return acts

    def _read(self, chunk: int, before: torch.cuda.Event) -> tuple[dict[str, Tensor], torch.cuda.Event]:
        assert self._side is not None
        with torch.cuda.device(self.stream.device), torch.cuda.stream(self._side):
            self._side.wait_event(before)
            acts = self.stream.read(chunk)
            return acts, self._side.record_event()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


class ActivationStream:
    """Chunks of text through one pass of the language model into a buffer for every hook.

    tokens: contexts [n, context_size]; counted: as `Contexts.counted`. Call `calibrate` or `restore` first; then, for each
    chunk of `chunks_left`, `read` and `feed`, and serve `rounds` before the first, after each, and after `finish`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        tokens: Tensor | StoredContexts,
        params: Params,
        device: torch.device | None = None,
        counted: Tensor | StoredContexts | None = None,
    ) -> None:
        self.lm, self.tokens, self.params, self.counted = lm, tokens, params, counted
        # "cuda" by its number, as tensors call it
        self.device = lm.device if device is None else torch.empty(0, device=device).device
        self.chunk_contexts = chunk_contexts(params, tokens.shape[1])
        self.next_chunk = 0
        self.buffers = {
            hook: HookBuffer(lm, hook, params, tokens, self.chunk_contexts * tokens.shape[1], self.device)
            for hook in params.train.places
        }
        self._first: dict[str, Tensor] | None = None

    @property
    def reads_ahead(self) -> bool:
        return self.device.type == "cuda" and self.device == self.lm.device

    @property
    def n_tokens(self) -> int:
        return self.tokens.numel()

    @property
    def expected_rows(self) -> float:
        """Of the hook that keeps most."""
        return max(buffer.expected_rows for buffer in self.buffers.values())

    @property
    def n_chunks(self) -> int:
        return -(-len(self.tokens) // self.chunk_contexts)

    @property
    def fraction(self) -> float:
        """Fraction of the run that is done, over all hooks."""
        return sum(b.rows_served / max(1.0, b.expected_rows) for b in self.buffers.values()) / len(self.buffers)

    def calibrate(self) -> dict[str, Tensor]:
        """Read the first chunk and measure every hook on it; returns normalised rows [n, d_in] by hook."""
        tokens, counted, self._first = self._chunk_tokens(0), self._chunk_counted(0), self._collect(0)
        return {hook: buffer.calibrate(tokens, self._first[hook], counted) for hook, buffer in self.buffers.items()}

    def read(self, chunk: int) -> dict[str, Tensor]:
        """Activations of a chunk by hook [n, context_size, d_in], from the cache or the model: on a CPU's memory, or on the
        device where that is CUDA. Changes nothing here."""
        return self._first if chunk == 0 and self._first is not None else self._collect(chunk)

    def _collect(self, chunk: int) -> dict[str, Tensor]:
        tokens = self._chunk_tokens(chunk)
        pools = collect_hooks(
            self.lm,
            self.params.train.hooks,
            tokens,
            self.params.model.llm_batch_size,
            self.params.activation_caching,
            on_device=self.device.type == "cuda",
        )
        flats = {
            place: side_by_side([pools[hook].flat.view(*tokens.shape, -1) for hook in buffer.hooks])
            for place, buffer in self.buffers.items()
        }
        return {hook: flat.to(self.device) for hook, flat in flats.items()} if self.device.type == "cuda" else flats

    def feed(self, acts: dict[str, Tensor]) -> None:
        """Take in what `read` gave of the next chunk."""
        tokens, counted = self._chunk_tokens(self.next_chunk), self._chunk_counted(self.next_chunk)
        for hook, buffer in self.buffers.items():
            buffer.feed(tokens, acts[hook], counted)
        self.next_chunk += 1
        self._first = None

    def finish(self) -> None:
        """No more chunks."""
        self.next_chunk = self.n_chunks + 1
        for buffer in self.buffers.values():
            buffer.finish()

    def rounds(self) -> Iterator[dict[str, StreamBatch]]:
        """A batch of each hook that has one, until none has."""
        while found := {hook: batch for hook, buffer in self.buffers.items() if (batch := buffer.next_batch()) is not None}:
            yield found

    def __iter__(self) -> Iterator[dict[str, StreamBatch]]:
        """All rounds that are left."""
        yield from self.rounds()
        while self.next_chunk < self.n_chunks:
            self.feed(self.read(self.next_chunk))
            yield from self.rounds()
        if self.next_chunk == self.n_chunks:
            self.finish()
        yield from self.rounds()

    def _chunk_tokens(self, chunk: int) -> Tensor:
        return self.tokens[chunk * self.chunk_contexts : (chunk + 1) * self.chunk_contexts]

    def _chunk_counted(self, chunk: int) -> Tensor | None:
        if self.counted is None:
            return None
        return self.counted[chunk * self.chunk_contexts : (chunk + 1) * self.chunk_contexts]

    # --- checkpoints ---

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values: dict[str, Any] = {"next_chunk": self.next_chunk, "hooks": {}}
        tensors: dict[str, Tensor] = {}
        for hook, buffer in self.buffers.items():
            values["hooks"][hook], own = buffer.state()
            tensors |= {f"{hook}/{key}": tensor for key, tensor in own.items()}
        return values, tensors

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.next_chunk = values["next_chunk"]
        for hook, buffer in self.buffers.items():
            own = {key.removeprefix(f"{hook}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{hook}/")}
            buffer.restore(values["hooks"][hook], own)
