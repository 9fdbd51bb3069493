"""The store of latent statistics on disk, and its reader. Layout: docs/analysis.md. numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_research.runtime.cache import damage
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_json

FORMAT = 1
ABOUT, DOCUMENTS, VOCABULARY = "about.json", "documents.json", "vocabulary.json"
SHARDS = "shards"
SHARD_ARRAYS = ("start", "token", "value")

BINS_PER_OCTAVE = 16
LOWEST_OCTAVE, HIGHEST_OCTAVE = -20, 20
"""Histograms resolve magnitudes from 2^-20 to 2^20; what lies beyond falls into the outermost bins."""
N_BINS = BINS_PER_OCTAVE * (HIGHEST_OCTAVE - LOWEST_OCTAVE)

DENSE_TIMES, RARE_TIMES = 10.0, 0.01
"""Densities from which on a latent counts as dense, and below which as rare, in units of the density that all latents would
have if they shared the L0 equally. At 65,536 latents and an L0 of 64 that makes the customary 1e-2 and 1e-5."""
ALWAYS_DENSE = 0.5
"""A latent that fires on half of the tokens is dense, however often others fire."""


class Context(NamedTuple):
    """One place where a latent fires, with the text around it."""

    context: int
    """Which context of the store."""
    position: int
    """Which token of the context this is about."""
    value: float
    """The latent's activation there."""
    level: int | None
    """Of a sampled context: 0 is the lowest part of the latent's non-zero activations. None of a top context."""
    document: str
    source: str
    token_ids: np.ndarray
    """[S]"""
    tokens: list[str]
    """Text of each token [S]."""
    activations: np.ndarray
    """The latent's activations over the context [S], 0 where it does not fire or a token does not count."""


def histogram_edges(signed: bool) -> np.ndarray:
    """Bin edges, ascending [bins + 1]: of magnitudes, or with `signed` of both sides and the gap around zero."""
    positive = np.exp2(np.arange(N_BINS + 1) / BINS_PER_OCTAVE + LOWEST_OCTAVE)
    return np.concatenate([-positive[::-1], positive]) if signed else positive


def load_stats(path: str | Path) -> LatentStats:
    """Open a finished store. Raises `UserError` when it is missing, unfinished, damaged, or of another version."""
    return LatentStats(Path(path))


class LatentStats:
    """What `analyze stats` found, read lazily. F latents, n contexts of S tokens; arrays are memory-mapped where large."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrays: dict[str, np.ndarray] = {}
        if not (folder / ABOUT).is_file():
            state = "is unfinished" if folder.is_dir() else "is not there"
            raise UserError(
                f"{folder}: the store of latent statistics {state}; run `python -m sae_research analyze stats`, "
                "which goes on where it stopped"
            )
        wrong = damage(folder)
        if wrong is not None:
            raise UserError(f"{folder}: {wrong}; delete it and run `python -m sae_research analyze stats`")
        self.about: dict[str, Any] = read_json(folder / ABOUT)
        if self.about.get("format") != FORMAT:
            raise UserError(
                f"{folder}: written in format {self.about.get('format')}, this version reads {FORMAT}; delete "
                "it and run `python -m sae_research analyze stats`"
            )
        self.d_sae: int = self.about["sae"]["d_sae"]
        self.signed: bool = self.about["sae"]["signed"]
        self.n_contexts, self.context_size = self.token_ids.shape
        self.tokens: int = self.about["counted_tokens"]
        """Tokens that count: the denominator of every density."""

    def __repr__(self) -> str:
        return f"LatentStats({self.about['sae']['name']}, {self.d_sae} latents, {self.tokens:,} tokens)"

    # --- one number per latent [F] ---

    @cached_property
    def count(self) -> np.ndarray:
        return self._array("count")

    @cached_property
    def contexts_firing(self) -> np.ndarray:
        return self._array("contexts_firing")

    @cached_property
    def max(self) -> np.ndarray:
        return self._array("max")

    @cached_property
    def min(self) -> np.ndarray:
        return self._array("min")

    @cached_property
    def mean(self) -> np.ndarray:
        """Mean of the non-zero activations; 0 for a latent that never fires."""
        return self._array("sum") / np.maximum(self.count, 1)

    @cached_property
    def standard_deviation(self) -> np.ndarray:
        """Of the non-zero activations."""
        mean_square = self._array("sum_squares") / np.maximum(self.count, 1)
        return np.sqrt(np.maximum(mean_square - self.mean**2, 0))

    @property
    def density(self) -> np.ndarray:
        """Fraction of counted tokens on which a latent fires."""
        return self.count / max(self.tokens, 1)

    @property
    def cah(self) -> np.ndarray:
        """Consistent activation heuristic: firings per context in which a latent fires; 0 for one that never does."""
        return self.count / np.maximum(self.contexts_firing, 1)

    @cached_property
    def expected_density(self) -> float:
        """L0 / d_sae: the density of every latent if all fired equally often."""
        return float(self.count.sum() / max(self.tokens, 1) / self.d_sae)

    @property
    def dense_from(self) -> float:
        """The density from which on a latent counts as dense."""
        return min(DENSE_TIMES * self.expected_density, ALWAYS_DENSE)

    @property
    def rare_below(self) -> float:
        """The density below which a latent counts as rare."""
        return RARE_TIMES * self.expected_density

    @property
    def kind(self) -> np.ndarray:
        """`dead` (never fired), `rare`, `between` or `dense`, by density relative to the expected one."""
        density = self.density
        return np.select(
            [self.count == 0, density < self.rare_below, density >= self.dense_from], ["dead", "rare", "dense"], "between"
        )

    def quantile(self, q: float, latents: Sequence[int] | None = None) -> np.ndarray:
        """The q-quantile of each latent's non-zero activations, to 2.2 % [F] or [len(latents)]; 0 where it never fires."""
        chosen = slice(None) if latents is None else np.asarray(latents)
        return histogram_quantile(self.histogram[chosen], self.edges, q, self.min[chosen], self.max[chosen])

    @cached_property
    def histogram(self) -> np.ndarray:
        """Non-zero activations in the bins of `edges` [F, bins]."""
        return self._array("histogram", mapped=True)

    @cached_property
    def edges(self) -> np.ndarray:
        """Bin edges, ascending [bins + 1]."""
        return self._array("edges")

    # --- text ---

    @cached_property
    def token_ids(self) -> np.ndarray:
        """[n, S]"""
        return self._array("token_ids", mapped=True)

    @cached_property
    def counted(self) -> np.ndarray:
        """Whether a token counts [n, S]."""
        return self._array("counted", mapped=True)

    @cached_property
    def document(self) -> np.ndarray:
        """Number of the document a token belongs to, -1 at separators [n, S]."""
        return self._array("document", mapped=True)

    @cached_property
    def documents(self) -> list[list[str]]:
        """(id, source) by document number."""
        return read_json(self.folder / DOCUMENTS)

    @cached_property
    def vocabulary(self) -> list[str]:
        """The text of every token id."""
        return read_json(self.folder / VOCABULARY)

    def strings(self, token_ids: Iterable[int]) -> list[str]:
        """The text of tokens."""
        return [self.vocabulary[int(token)] for token in token_ids]

    # --- contexts ---

    def top(self, latent: int, n: int | None = None) -> list[Context]:
        """The contexts of a latent's largest absolute activations, strongest first, no document twice."""
        self._check(latent)
        value, context, position = (
            self._array(f"top_{part}", mapped=True)[latent][:n] for part in ("value", "context", "position")
        )
        return self._contexts(latent, value, context, position, [None] * len(value))

    def samples(self, latent: int, level: int | None = None) -> list[Context]:
        """Contexts drawn at random from the levels of a latent's activations, highest level first."""
        self._check(latent)
        parts = [self._array(f"sample_{part}", mapped=True)[latent] for part in ("value", "context", "position")]
        levels = range(len(parts[0]) - 1, -1, -1) if level is None else (level,)
        found: list[Context] = []
        for one in levels:
            found += self._contexts(latent, *(part[one] for part in parts), [one] * parts[0].shape[1])
        return found

    def _contexts(
        self, latent: int, values: np.ndarray, contexts: np.ndarray, positions: np.ndarray, levels: Sequence[int | None]
    ) -> list[Context]:
        there = contexts >= 0
        rows = contexts[there].astype(int)
        acts = self.in_contexts(latent, rows)
        return [
            Context(
                int(row),
                int(at),
                float(value),
                level,
                *self.documents[int(self.document[row, at])],
                np.array(self.token_ids[row]),
                self.strings(self.token_ids[row]),
                acts[i],
            )
            for i, (row, at, value, level) in enumerate(
                zip(rows, positions[there], values[there], np.asarray(levels, object)[there], strict=True)
            )
        ]

    # --- activations ---

    def activations(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """(token numbers, ascending; activations) of all tokens on which a latent fires. A token's number is
        context * S + position."""
        self._check(latent)
        tokens, values = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for first, (start, token, value) in self._shards:
            part = slice(int(start[latent]), int(start[latent + 1]))
            tokens.append(token[part].astype(np.int64) + first * self.context_size)
            values.append(value[part])
        return np.concatenate(tokens), np.concatenate(values)

    def in_contexts(self, latent: int, contexts: Sequence[int] | np.ndarray) -> np.ndarray:
        """A latent's activations over some contexts [len(contexts), S]."""
        dense = np.zeros((len(contexts), self.context_size), np.float32)
        if not len(contexts):
            return dense
        wanted = np.asarray(contexts, np.int64) * self.context_size
        tokens, values = self.activations(latent)
        begin, end = np.searchsorted(tokens, wanted), np.searchsorted(tokens, wanted + self.context_size)
        for row, (first, last) in enumerate(zip(begin, end, strict=True)):
            dense[row, tokens[first:last] - wanted[row]] = values[first:last]
        return dense

    def of_context(self, context: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(positions, latents, activations) of everything that fires in one context, by position. Reads a whole shard."""
        if not 0 <= context < self.n_contexts:
            raise UserError(f"context {context}: the store holds 0 to {self.n_contexts - 1}")
        firsts = [first for first, _ in self._shards]
        first, (start, token, value) = self._shards[int(np.searchsorted(firsts, context, side="right")) - 1]
        begin = (context - first) * self.context_size
        inside = np.flatnonzero((token >= begin) & (token < begin + self.context_size))
        latents = np.searchsorted(start, inside, side="right") - 1
        positions = token[inside].astype(np.int64) - begin
        order = np.lexsort((latents, positions))
        return positions[order], latents[order], value[inside][order]

    @cached_property
    def _shards(self) -> list[tuple[int, tuple[np.ndarray, ...]]]:
        """(first context, (start, token, value)) of every shard."""
        return [
            (
                shard["contexts"][0],
                tuple(np.load(self.folder / SHARDS / f"{i:05d}" / f"{name}.npy", mmap_mode="r") for name in SHARD_ARRAYS),
            )
            for i, shard in enumerate(self.about["shards"])
        ]

    # --- how ---

    def _check(self, latent: int) -> None:
        check_latents([latent], self.d_sae)

    def _array(self, name: str, mapped: bool = False) -> np.ndarray:
        if name in self._arrays:
            return self._arrays[name]
        self._arrays[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r" if mapped else None)
        return self._arrays[name]


def check_latents(latents: Iterable[int], d_sae: int) -> None:
    """Raises `UserError` for a latent that an SAE of width `d_sae` does not have."""
    for latent in latents:
        if not 0 <= latent < d_sae:
            raise UserError(f"latent {latent}: the SAE has latents 0 to {d_sae - 1}")


def histogram_quantile(counts: np.ndarray, edges: np.ndarray, q: float, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """q-quantile of every row of a histogram [rows, bins], logarithmic within a bin, held to [low, high]; 0 for an empty
    row."""
    if not 0 <= q <= 1:
        raise ValueError(f"a quantile lies between 0 and 1, not {q}")
    cumulated = np.cumsum(counts, axis=1, dtype=np.int64)
    total = cumulated[:, -1]
    rank = np.maximum(q * total, 0.5)
    bin_ = np.minimum((cumulated < rank[:, None]).sum(1), counts.shape[1] - 1)
    rows = np.arange(len(counts))
    inside = counts[rows, bin_]
    share = np.clip((rank - (cumulated[rows, bin_] - inside)) / np.maximum(inside, 1), 0, 1)
    lower, upper = edges[bin_], edges[bin_ + 1]
    crosses = lower * upper < 0  # the gap around zero
    ratio = np.where(crosses, 1.0, upper / np.where(lower == 0, 1.0, lower))
    value = np.where(crosses, 0.0, lower * np.abs(ratio) ** share)
    return np.where(total == 0, 0.0, np.clip(value, low, high))
