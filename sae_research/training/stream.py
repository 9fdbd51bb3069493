"""The activation stream: contexts through the language model, in chunks, shuffled in a bounded buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sae_research.errors import UserError
from sae_research.lm import LanguageModel, collect, median_activation_norm, token_mask
from sae_research.params import Params, TokenMask
from sae_research.store import fingerprint
from sae_research.training.pca import StreamingPCA

CHUNK_TOKENS = 16_384
"""Tokens per entry of the activation cache: an interrupted run loses at most this much work, and a longer run
reuses a shorter one's chunks."""


class Calibration(NamedTuple):
    """What is measured once, on the first chunk of the stream."""

    median_norm: float
    """Median activation norm of tokens neither special nor first, model units: what the norm rule compares
    with."""
    scale: float
    """Factor to normalised activations: `scale^2 * mean |x|^2 = 1` over counted tokens (the convention of
    dictionary_learning, whose L1 coefficients therefore carry over)."""
    rows: Tensor
    """The chunk's counted activations, normalised [n, d_in]: for initialisation."""


class StreamBatch(NamedTuple):
    acts: Tensor
    """Normalised activations of counted tokens [batch_size, d_in], float32."""
    progress: float
    """Fraction of the run done at the middle of this batch: above 0, below 1, so no step has a zero rate."""


class ActivationStream:
    """Batches of normalised activations, each counted token once. Deterministic from `params.random_seed`.

    tokens: contexts [n, context_size]. How many tokens the norm rule drops is only known at the end, so
    progress is measured against an estimate: tokens kept so far plus the rest of the text at the same rate.
    It is exact once the last chunk is read.
    """

    def __init__(self, lm: LanguageModel, tokens: Tensor, params: Params) -> None:
        self.lm, self.tokens, self.params = lm, tokens, params
        chunk_tokens = min(CHUNK_TOKENS, params.train.buffer_tokens // 2)
        self.chunk_contexts = max(1, chunk_tokens // tokens.shape[1])
        self.d_in = lm.d_in(params.train.hook_name)
        self.tokens_read = self.rows_read = self.rows_served = 0
        self.calibration = self._calibrate()
        self.pca = StreamingPCA(self.d_in, lm.device)

    @property
    def fraction_kept(self) -> float:
        """Fraction of the tokens read so far that count."""
        return self.rows_read / max(1, self.tokens_read)

    @property
    def expected_rows(self) -> float:
        """Counted tokens of the whole run, as far as can be told by now."""
        return self.rows_read + self.fraction_kept * (self.tokens.numel() - self.tokens_read)

    def __iter__(self) -> Iterator[StreamBatch]:
        """Fill the buffer, serve a random half, refill; at the end serve what is left in whole batches."""
        train = self.params.train
        self.tokens_read = self.rows_read = self.rows_served = 0
        self.pca = StreamingPCA(self.d_in, self.lm.device)
        generator = torch.Generator().manual_seed(
            int(fingerprint([self.params.random_seed, "stream"])[:12], 16)
        )
        full = max(train.buffer_tokens, 2 * train.batch_size)
        capacity = full + self.chunk_contexts * self.tokens.shape[1]
        # In the model's precision: half the memory in bfloat16, and nothing is lost.
        bank = torch.empty(capacity, self.d_in, dtype=self.lm.dtype, device=self.lm.device)
        held = 0
        for start in range(0, len(self.tokens), self.chunk_contexts):
            rows = self._read(start)
            bank[held : held + len(rows)] = rows.to(bank.device)
            held += len(rows)
            if held >= full:
                order = torch.randperm(held, generator=generator).to(bank.device)
                served = held // 2 // train.batch_size * train.batch_size
                yield from self._serve(bank, order[:served])
                rest = bank[order[served:]]
                held = len(rest)
                bank[:held] = rest
        yield from self._serve(bank, torch.randperm(held, generator=generator).to(bank.device))
        if self.rows_served == 0:
            raise UserError(
                f"train.tokens: only {self.rows_read:,} of {self.tokens_read:,} tokens count, fewer than "
                f"one batch of {train.batch_size:,}; raise train.tokens or lower train.batch_size"
            )

    def _read(self, start: int) -> Tensor:
        """Counted activations of the chunk that begins at context `start` [n, d_in], model units."""
        if start == 0:
            rows, n_tokens = self._first_rows, self.tokens[: self.chunk_contexts].numel()
        else:
            tokens, acts = self._chunk(start)
            mask = token_mask(self.lm, tokens, acts, self.params.token_mask, self.calibration.median_norm)
            rows, n_tokens = acts[mask], tokens.numel()
        self.tokens_read += n_tokens
        self.rows_read += len(rows)
        return rows

    def _serve(self, bank: Tensor, order: Tensor) -> Iterator[StreamBatch]:
        size = self.params.train.batch_size
        for start in range(0, len(order) - size + 1, size):
            acts = bank[order[start : start + size]].float().mul_(self.calibration.scale)
            self.pca.update(acts)
            progress = (self.rows_served + size / 2) / self.expected_rows
            self.rows_served += size
            yield StreamBatch(acts, progress)

    def _chunk(self, start: int) -> tuple[Tensor, Tensor]:
        tokens = self.tokens[start : start + self.chunk_contexts]
        pool = collect(
            self.lm,
            self.params.train.hook_name,
            tokens,
            self.params.model.llm_batch_size,
            self.params.activation_caching,
        )
        return tokens, pool.flat.view(*tokens.shape, -1)

    def _calibrate(self) -> Calibration:
        """Raises `UserError` when no token of the first chunk counts or the hook gives zeros there."""
        tokens, acts = self._chunk(0)
        if not token_mask(self.lm, tokens, acts, TokenMask(outlier_norm_multiple=None)).any():
            raise UserError(
                "train.tokens: no token of the first contexts counts; give more text or longer contexts"
            )
        median = median_activation_norm(self.lm, tokens, acts)
        self._first_rows = acts[token_mask(self.lm, tokens, acts, self.params.token_mask, median)]
        rows = self._first_rows.to(self.lm.device).float()
        mean_square = float(rows.square().sum(1).mean())
        if not 0 < mean_square < float("inf"):
            raise UserError(
                f"{self.params.train.hook_name}: the mean squared activation norm is {mean_square}; the "
                "model's activations are damaged (try train.llm_dtype: float32)"
            )
        scale = mean_square**-0.5
        return Calibration(median, scale, rows * scale)
