"""Windows of text for random latents of one SAE, from one pass over cached activations: the strongest, some drawn in
proportion to the squared activation, some at random. The selection is SAE Bench 0.6.0's.

Which latents are alive is known only at the end of the pass. So a random order of all latents is fixed beforehand, the
first few are followed, and the first alive ones among them are taken; only where too few are, another pass follows the
next. Memory is bounded: per latent followed, the windows that could still be chosen.

Activations are held in bfloat16, as SAE Bench holds them: three digits are enough to rank and to mark by.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.config.evaluation_params import Autointerp
from sae_research.lm.activations import HookActivations
from sae_research.saes import SparseAutoencoder, encode_each

_SPARE = 64
"""Latents followed beyond twice those wanted: seldom does a second pass become necessary."""
_LAST_POSITION = 2**32 - 1


class Windows(NamedTuple):
    """The chosen latents of one SAE [n] and their windows: strongest first, then weighted draws, then random ones."""

    latents: list[int]
    firings: list[int]
    """Tokens on which each latent is non-zero."""
    positions: Tensor
    """Where each window's centre stands: context · context size + column. int64 [n, windows]"""
    values: Tensor
    """Absolute activations. bfloat16 [n, windows, 2 · buffer + 1]"""
    alive: int
    """Latents of this SAE that fire on more than `dead_latent_threshold` tokens."""
    passed_over: int
    """Latents that were next in the order or asked for, but are dead or have too few windows of their own."""

    def to_plain(self) -> dict[str, Any]:
        """As JSON takes it; activations as hexadecimal bytes."""
        return {
            **self._asdict(),
            "positions": self.positions.tolist(),
            "values": self.values.contiguous().view(torch.int16).numpy().tobytes().hex(),
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any], config: Autointerp) -> Windows:
        n, width = len(plain["latents"]), 2 * config.buffer + 1
        each = n_top(config) + n_weighted(config) + config.n_random_ex_for_scoring
        values = np.frombuffer(bytes.fromhex(plain["values"]), dtype=np.int16).copy()
        positions = torch.tensor(plain["positions"], dtype=torch.int64).reshape(n, each)
        return cls(
            **{
                **plain,
                "positions": positions,
                "values": torch.from_numpy(values).view(torch.bfloat16).reshape(n, each, width),
            }  # ty: ignore[invalid-argument-type]
        )


def n_top(config: Autointerp) -> int:
    return config.n_top_ex_for_generation + config.n_top_ex_for_scoring


def n_weighted(config: Autointerp) -> int:
    return config.n_iw_sampled_ex_for_generation + config.n_iw_sampled_ex_for_scoring


def collect_windows(
    saes: dict[str, SparseAutoencoder], acts: HookActivations, config: Autointerp, seed: int
) -> dict[str, Windows]:
    """The windows of every SAE of one family, which encode together."""
    searches = {name: _Search(sae, config, seed) for name, sae in saes.items()}
    while unfinished := {name: saes[name] for name, search in searches.items() if search.following}:
        followers = {
            name: _Follower(searches[name].following, saes[name].cfg.d_sae, acts, config, seed) for name in unfinished
        }
        for batch in acts.batches():
            for name, z in encode_each(unfinished, batch.acts, acts.lab_mask(batch)):
                followers[name].update(z, batch.index)
        for name, follower in followers.items():
            searches[name].take(follower)
    return {name: search.windows() for name, search in searches.items()}


class _Search:
    """Which latents of one SAE are chosen: the first qualified ones in a random order, or those asked for."""

    def __init__(self, sae: SparseAutoencoder, config: Autointerp, seed: int) -> None:
        self.config, self.d_sae = config, sae.cfg.d_sae
        if config.override_latents is not None:
            unique = list(dict.fromkeys(config.override_latents))
            self.order, self.wanted = [latent for latent in unique if latent < self.d_sae], len(unique)
            self.passed_over = self.wanted - len(self.order)
            self.following = list(self.order)
        else:
            self.order, self.wanted = np.random.default_rng(seed).permutation(self.d_sae).tolist(), config.n_latents
            self.passed_over = 0
            self.following = self.order[: 2 * self.wanted + _SPARE]
        self.found: list[tuple[int, int, Tensor, Tensor]] = []
        self.seen = 0
        self.alive: Tensor | None = None

    def take(self, follower: _Follower) -> None:
        """Choose among the latents just followed; `following` then names the next, none when the search is over."""
        self.alive = (follower.firings > self.config.dead_latent_threshold).cpu()
        firings = follower.firings.tolist()
        until = self.order.index(self.following[-1]) + 1
        place = {latent: number for number, latent in enumerate(self.following)}
        for latent in self.order[self.seen : until]:
            if len(self.found) == self.wanted:
                break
            chosen = follower.choose(place[latent]) if self.alive[latent] else None
            if chosen is None:
                self.passed_over += 1
            else:
                self.found.append((latent, firings[latent], *chosen))
        self.seen = until
        missing = self.wanted - len(self.found)
        rest = [latent for latent in self.order[until:] if self.alive[latent]]
        self.following = rest[: 2 * missing + _SPARE] if missing else []

    def windows(self) -> Windows:
        found = sorted(self.found, key=lambda record: record[0])
        latents, firings, positions, values = zip(*found, strict=True) if found else ((), (), (), ())
        return Windows(
            list(latents),
            list(firings),
            torch.stack(positions) if found else torch.zeros(0, 0, dtype=torch.int64),
            torch.stack(values) if found else torch.zeros(0, 0, 0, dtype=torch.bfloat16),
            0 if self.alive is None else int(self.alive.sum()),
            self.passed_over,
        )


class _Reservoir:
    """For each latent the `size` windows of largest key so far."""

    def __init__(self, n_latents: int, size: int, width: int, key_dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.zeros(n_latents, size, dtype=key_dtype, device=device)
        """Zero marks a free place."""
        self.positions = torch.zeros(n_latents, size, dtype=torch.int64, device=device)
        self.values = torch.zeros(n_latents, size, width, dtype=torch.bfloat16, device=device)

    def offer(self, keys: Tensor, positions: Tensor, acts: Tensor, buffer: int) -> None:
        """keys [latents, rows · inner columns] and positions [rows · inner columns] of every possible centre of a batch;
        acts [rows, columns, latents]."""
        size, inner = self.keys.shape[1], acts.shape[1] - 2 * buffer
        new = keys.topk(min(size, keys.shape[1]), dim=1)
        together = torch.cat([self.keys, new.values], dim=1)
        stays = torch.zeros_like(together, dtype=torch.bool).scatter_(1, together.topk(size, dim=1).indices, True)
        # of each latent as many enter as leave, and both lists are in the order of the latents
        latent, place = (~stays[:, :size]).nonzero(as_tuple=True)
        _, entering = stays[:, size:].nonzero(as_tuple=True)
        source = new.indices[latent, entering]
        offsets = torch.arange(2 * buffer + 1, device=acts.device)
        self.keys[latent, place] = new.values[latent, entering]
        self.positions[latent, place] = positions[source]
        self.values[latent, place] = acts[(source // inner)[:, None], (source % inner)[:, None] + offsets, latent[:, None]]

    def ordered(self, latent: int) -> tuple[list[int], list[int]]:
        """(places, positions) of one latent's windows, largest key first."""
        order = self.keys[latent].argsort(descending=True)
        order = order[self.keys[latent, order] > 0]
        return order.tolist(), self.positions[latent, order].tolist()


class _Follower:
    """Some latents' candidate windows during one pass."""

    def __init__(self, latents: list[int], d_sae: int, acts: HookActivations, config: Autointerp, seed: int) -> None:
        device, self.config, self.seed = acts.lm.device, config, seed
        n, self.n_contexts, self.size = len(latents), len(acts), len(acts.pool.sequences[0])
        width = 2 * config.buffer + 1
        self.latents = torch.tensor(latents, device=device)
        self.firings = torch.zeros(d_sae, dtype=torch.int64, device=device)
        # each chosen top window rules out itself and its neighbours: so many candidates always hold enough of them,
        # and at most so many of the weighted candidates turn out as strong as the top ones
        suppressed = n_top(config) * width
        self.top = _Reservoir(n, suppressed, width, torch.int64, device)
        self.weighted = _Reservoir(n, suppressed + n_weighted(config), width, torch.float32, device)
        self.random_rows, self.random_columns = (
            part.to(device) for part in _random_windows(latents, self.n_contexts, self.size, config, seed)
        )
        self.random_values = torch.zeros(n, config.n_random_ex_for_scoring, width, dtype=torch.bfloat16, device=device)

    def update(self, z: Tensor, index: Tensor) -> None:
        """One batch of codes [batch, seq, d_sae] of the contexts `index` [batch]."""
        buffer = self.config.buffer
        self.firings += (z != 0).sum(dim=(0, 1))
        acts = z[..., self.latents].abs().to(torch.bfloat16)
        row, column = index.to(z.device)[:, None], torch.arange(buffer, self.size - buffer, device=z.device)
        positions = (row * self.size + column).flatten()
        centres = acts[:, buffer : self.size - buffer].flatten(0, 1).T.contiguous()  # [latents, candidates]
        # bfloat16 without its sign sorts like the integer of its bits; below them the position settles ties
        bits = centres.view(torch.int16).long()
        self.top.offer(torch.where(bits > 0, (bits << 32) | (_LAST_POSITION - positions), 0), positions, acts, buffer)
        # the largest w / e, e exponential, are draws without replacement in proportion to w
        noise = _exponential(self.seed, index.tolist(), len(column), len(self.latents)).to(z.device)
        self.weighted.offer(centres.float().square() / noise, positions, acts, buffer)
        self._keep_random(acts, index)

    def _keep_random(self, acts: Tensor, index: Tensor) -> None:
        local = torch.full((self.n_contexts,), -1, device=acts.device)
        local[index.to(acts.device)] = torch.arange(len(index), device=acts.device)
        latent, place = (local[self.random_rows] >= 0).nonzero(as_tuple=True)
        rows, columns = local[self.random_rows[latent, place]], self.random_columns[latent, place]
        offsets = torch.arange(-self.config.buffer, self.config.buffer + 1, device=acts.device)
        self.random_values[latent, place] = acts[rows[:, None], columns[:, None] + offsets, latent[:, None]]

    def choose(self, number: int) -> tuple[Tensor, Tensor] | None:
        """(positions [windows], activations [windows, width]) of one latent followed; None with too few windows."""
        top = self._strongest(number)
        if len(top) < n_top(self.config):
            return None
        centres = self.weighted.values[number, :, self.config.buffer]
        weaker = (centres < self.top.values[number, top[-1], self.config.buffer]).tolist()
        weighted = [place for place in self.weighted.ordered(number)[0] if weaker[place]][: n_weighted(self.config)]
        if len(weighted) < n_weighted(self.config):
            return None
        random = self.random_rows[number] * self.size + self.random_columns[number]
        return (
            torch.cat([self.top.positions[number, top], self.weighted.positions[number, weighted], random]).cpu(),
            torch.cat(
                [self.top.values[number, top], self.weighted.values[number, weighted], self.random_values[number]]
            ).cpu(),
        )

    def _strongest(self, number: int) -> list[int]:
        """Places of the strongest windows whose centres lie more than `buffer` tokens apart, strongest first."""
        chosen: list[tuple[int, int]] = []
        for place, position in zip(*self.top.ordered(number), strict=True):
            if len(chosen) == n_top(self.config):
                break
            if all(
                position // self.size != other // self.size or abs(position - other) > self.config.buffer
                for _, other in chosen
            ):
                chosen.append((place, position))
        return [place for place, _ in chosen]


def _random_windows(latents: list[int], n_contexts: int, size: int, config: Autointerp, seed: int) -> tuple[Tensor, Tensor]:
    """Rows and columns [latents, random windows], each latent's fixed by itself."""
    rows, columns = [], []
    for latent in latents:
        rng = np.random.default_rng([seed, latent, 0])
        rows.append(rng.integers(0, n_contexts, config.n_random_ex_for_scoring))
        columns.append(rng.integers(config.buffer, size - config.buffer, config.n_random_ex_for_scoring))
    return torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(columns))


def _exponential(seed: int, contexts: list[int], n_columns: int, n_latents: int) -> Tensor:
    """Exponential noise [latents, contexts · columns], each context's fixed by itself: batches change nothing."""
    rows = [
        torch.empty(n_columns, n_latents).exponential_(generator=torch.Generator().manual_seed(seed * 1_000_003 + context))
        for context in contexts
    ]
    return torch.cat(rows).T
