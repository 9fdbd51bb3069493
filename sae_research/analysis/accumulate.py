"""Statistics of latents gathered batch by batch: memory grows with the number of latents, never with that of tokens.

Everything works on the non-zero activations of a batch, listed by latent and then by token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from torch import Tensor

from sae_research.analysis.store import BINS_PER_OCTAVE, LOWEST_OCTAVE, N_BINS, histogram_edges, histogram_quantile


class Firings(NamedTuple):
    """Non-zero activations of consecutive contexts, by latent and then by token."""

    start: np.ndarray
    """Entries `start[f]:start[f + 1]` are latent f's [F + 1]."""
    token: np.ndarray
    """context * S + position, counted from the first context of these [entries]"""
    value: np.ndarray
    """float32 [entries]"""

    @property
    def latent(self) -> np.ndarray:
        """[entries]"""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))


def firings(z: Tensor) -> Firings:
    """The non-zero activations of z [contexts, S, F]."""
    flat = z.reshape(-1, z.shape[-1])
    token, latent = flat.nonzero(as_tuple=True)
    value = flat[token, latent].float().cpu().numpy()
    start = np.zeros(len(flat) + 1, np.int64)
    np.cumsum(np.bincount(token.cpu().numpy(), minlength=len(flat)), out=start[1:])
    by_latent = csr_matrix((value, latent.cpu().numpy(), start), shape=tuple(flat.shape)).tocsc()
    return Firings(by_latent.indptr.astype(np.int64), by_latent.indices.astype(np.int64), by_latent.data)


def joined(parts: list[Firings], offsets: list[int]) -> Firings:
    """Firings of batches that follow each other as one; `offsets` are the tokens before each."""
    counts = np.stack([np.diff(part.start) for part in parts])
    start = np.concatenate([[0], np.cumsum(counts.sum(0))])
    token, value = np.empty(start[-1], np.int64), np.empty(start[-1], np.float32)
    begins = start[:-1] + np.concatenate([np.zeros((1, counts.shape[1]), np.int64), np.cumsum(counts[:-1], axis=0)])
    for part, begin, offset in zip(parts, begins, offsets, strict=True):
        place = np.arange(len(part.token)) + np.repeat(begin - part.start[:-1], np.diff(part.start))
        token[place], value[place] = part.token + offset, part.value
    return Firings(start, token, value)


class Best:
    """For every latent the `size` entries of smallest rank, at most one of each document.

    Offered entries wait until there are many, and are then sorted in together; `settle` does so at once.
    """

    FIELDS = ("rank", "value", "token", "document")
    MIN_WAITING = 100_000

    def __init__(self, d_sae: int, size: int) -> None:
        self.size = size
        self.rank = np.full((d_sae, size), np.inf)
        self.value = np.zeros((d_sae, size), np.float32)
        self.token = np.full((d_sae, size), -1, np.int64)
        self.document = np.full((d_sae, size), -1, np.int64)
        self._waiting: list[tuple[np.ndarray, ...]] = []

    def add(self, latent: np.ndarray, rank: np.ndarray, value: np.ndarray, token: np.ndarray, document: np.ndarray) -> None:
        """Offer entries; those that do not get in cost next to nothing."""
        near = rank <= self.rank[latent, -1]
        self._waiting.append(tuple(column[near] for column in (latent, rank, value, token, document)))
        if sum(len(part[0]) for part in self._waiting) > max(self.MIN_WAITING, self.rank.size // 4):
            self.settle()

    def settle(self) -> None:
        """Sort in what waits."""
        if not self._waiting:
            return
        new, *fresh = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        self._waiting = []
        touched = np.unique(new)
        held, column = np.nonzero(np.isfinite(self.rank[touched]))
        old = touched[held]
        latents = np.concatenate([old, new])
        columns = [
            np.concatenate([getattr(self, name)[old, column], values])
            for name, values in zip(self.FIELDS, fresh, strict=True)
        ]
        ranks, _, tokens, documents = columns
        order = np.lexsort((tokens, ranks, documents, latents))
        first = _starts(latents[order], documents[order])
        order = order[first]
        order = order[np.lexsort((tokens[order], ranks[order], latents[order]))]
        begins = np.flatnonzero(_starts(latents[order]))
        place = np.arange(len(order)) - np.repeat(begins, np.diff(np.append(begins, len(order))))
        order, place = order[place < self.size], place[place < self.size]
        for name, values in zip(self.FIELDS, columns, strict=True):
            getattr(self, name)[latents[order], place] = values[order]


class Accumulator:
    """Everything `analyze stats` gathers about one SAE's latents."""

    ARRAYS = ("count", "contexts_firing", "sum", "sum_squares", "max", "min", "histogram")

    def __init__(self, d_sae: int, context_size: int, signed: bool, n_top: int, n_sampled: int, seed: int) -> None:
        self.d_sae, self.context_size, self.signed, self.seed = d_sae, context_size, signed, seed
        self.count, self.contexts_firing = np.zeros(d_sae, np.int64), np.zeros(d_sae, np.int64)
        self.sum, self.sum_squares = np.zeros(d_sae), np.zeros(d_sae)
        self.max, self.min = np.full(d_sae, -np.inf, np.float32), np.full(d_sae, np.inf, np.float32)
        self.edges = histogram_edges(signed)
        self.histogram = np.zeros((d_sae, len(self.edges) - 1), np.int32)
        self.top, self.sampled = Best(d_sae, n_top), Best(d_sae, n_sampled)

    def add(self, found: Firings, document: np.ndarray, first_context: int) -> None:
        """Add a batch. document: the documents of its tokens [contexts * S]; first_context: how many contexts came
        before."""
        if not len(found.value):
            return
        latent, value, magnitude = found.latent, found.value, np.abs(found.value)
        counts = np.diff(found.start)
        there = np.flatnonzero(counts)
        begins = found.start[:-1][there]
        self.count += counts
        wide = value.astype(np.float64)
        self.sum[there] += np.add.reduceat(wide, begins)
        self.sum_squares[there] += np.add.reduceat(wide**2, begins)
        self.max[there] = np.maximum(self.max[there], np.maximum.reduceat(value, begins))
        self.min[there] = np.minimum(self.min[there], np.minimum.reduceat(value, begins))
        fresh = _starts(latent, found.token // self.context_size)
        self.contexts_firing += np.bincount(latent[fresh], minlength=self.d_sae)
        np.add.at(self.histogram.reshape(-1), latent * self.histogram.shape[1] + self._bins(value, magnitude), 1)
        self._remember(latent, found.token + first_context * self.context_size, value, magnitude, document[found.token])

    def _bins(self, value: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        bins = np.floor((np.log2(magnitude) - LOWEST_OCTAVE) * BINS_PER_OCTAVE).astype(np.int64).clip(0, N_BINS - 1)
        return np.where(value > 0, N_BINS + 1 + bins, N_BINS - 1 - bins) if self.signed else bins

    def _remember(
        self, latent: np.ndarray, token: np.ndarray, value: np.ndarray, magnitude: np.ndarray, document: np.ndarray
    ) -> None:
        """Offer each document's strongest firing to the top contexts, and a random one to the sampled ones."""
        begins = np.flatnonzero(_starts(latent, document))
        lengths = np.diff(np.append(begins, len(latent)))
        drawn = uniform_hash(latent, token, self.seed)
        for best, rank in ((self.top, -magnitude.astype(np.float64)), (self.sampled, drawn)):
            lowest = np.minimum.reduceat(rank, begins)
            equal = np.flatnonzero(rank == np.repeat(lowest, lengths))
            chosen = equal[_starts(np.searchsorted(begins, equal, side="right"))]
            best.add(latent[chosen], rank[chosen], value[chosen], token[chosen], document[chosen])

    # --- what is kept between runs, and what is published ---

    def state(self) -> dict[str, np.ndarray]:
        """Everything, as arrays by name."""
        self.top.settle()
        self.sampled.settle()
        return {name: getattr(self, name) for name in self.ARRAYS} | {
            f"{kind}_{name}": getattr(getattr(self, kind), name) for kind in ("top", "sampled") for name in Best.FIELDS
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what `state` gave."""
        for name in self.ARRAYS:
            setattr(self, name, state[name])
        for kind in ("top", "sampled"):
            for name in Best.FIELDS:
                setattr(getattr(self, kind), name, state[f"{kind}_{name}"])

    def finished(self, levels: int, per_level: int) -> dict[str, np.ndarray]:
        """The arrays of the store (docs/analysis.md), by file name."""
        self.top.settle()
        self.sampled.settle()
        alive = self.count > 0
        low, high = np.where(alive, self.min, 0).astype(np.float32), np.where(alive, self.max, 0).astype(np.float32)
        arrays = {name: getattr(self, name) for name in self.ARRAYS} | {"max": high, "min": low, "edges": self.edges}
        arrays |= self._places("top", self.top.value, self.top.token)
        bounds = np.stack(
            [histogram_quantile(self.histogram, self.edges, (i + 1) / levels, low, high) for i in range(levels - 1)], axis=1
        )
        level = (self.sampled.value[:, :, None] > bounds[:, None, :]).sum(-1)
        level[self.sampled.token < 0] = -1
        value = np.zeros((self.d_sae, levels, per_level), np.float32)
        token = np.full(value.shape, -1, np.int64)
        for one in range(levels):
            latent, column = np.nonzero(level == one)
            place = np.arange(len(latent)) - np.searchsorted(latent, latent)
            kept = place < per_level
            value[latent[kept], one, place[kept]] = self.sampled.value[latent[kept], column[kept]]
            token[latent[kept], one, place[kept]] = self.sampled.token[latent[kept], column[kept]]
        return arrays | self._places("sample", value, token)

    def _places(self, kind: str, value: np.ndarray, token: np.ndarray) -> dict[str, np.ndarray]:
        context = np.where(token < 0, -1, token // self.context_size)
        return {
            f"{kind}_value": value,
            f"{kind}_context": context.astype(np.int32),
            f"{kind}_position": np.where(token < 0, 0, token % self.context_size).astype(np.int32),
        }


def _starts(*keys: np.ndarray) -> np.ndarray:
    """True at the first entry of every run of equal keys."""
    change = np.zeros(len(keys[0]), bool)
    change[:1] = True
    for key in keys:
        change[1:] |= key[1:] != key[:-1]
    return change


def uniform_hash(latent: np.ndarray, token: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each (latent, token), the same in every run and whatever was drawn before (SplitMix64)."""
    x = (latent.astype(np.uint64) << np.uint64(40)) ^ token.astype(np.uint64)
    x += np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53
