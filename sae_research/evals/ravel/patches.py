"""Patching an entity's token with another entity's latents: the mask over latents, the patched runs.

The mask is a differential binary mask (MDBM), as in SAE Bench 0.6.0: one number per latent, from 0; sigmoid of it over a
temperature that falls from 1 to 1e-4 in equal ratios, step by step; Adam; cross-entropy of the target answer's first token
over cause and isolation pairs alike; in the end a latent is in where its number is above 0. SAE Bench drops an incomplete
last batch; here it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_research.config.evaluation_params import Ravel as Config
from sae_research.config.params import Params
from sae_research.evals.ravel.pairs import Pair
from sae_research.evals.ravel.prompts import Known, answer_text, by_length, rows_at_once
from sae_research.lm import LanguageModel
from sae_research.lm.activations import HookActivations
from sae_research.lm.past import Beginnings, Past
from sae_research.saes import SparseAutoencoder, encode_each

HOT, COLD = 1.0, 1e-4


class Problem(NamedTuple):
    """One mask to learn."""

    pairs: list[Pair]
    keeps_error: bool


def temperatures(n_steps: int) -> Tensor:
    """Of every step [n_steps]."""
    return torch.logspace(torch.log10(torch.tensor(HOT)), torch.log10(torch.tensor(COLD)), n_steps)


def learn(problems: Sequence[Problem], swap: Swap, params: Params) -> list[Tensor]:
    """The numbers of one mask [d_sae] per problem; a latent is in where its number is above 0.

    All problems take their steps side by side, because one pass over many rows is faster than many over few; each has
    its own pairs, temperature and optimiser, and the model is frozen, so none depends on another.
    """
    config = params.ravel
    numbers = [torch.zeros(swap.sae.cfg.d_sae, device=swap.group.lm.device, requires_grad=True) for _ in problems]
    optimisers = [torch.optim.Adam([number], lr=config.learning_rate) for number in numbers]
    batches = [_batches(problem.pairs, config) for problem in problems]
    schedules = [temperatures(len(steps)) for steps in batches]
    for step in range(max(map(len, batches))):
        rows = [
            _Row(pair, problem.keeps_error, numbers[p], float(schedules[p][step]), 1 / len(batches[p][step]))
            for p, problem in enumerate(problems)
            if step < len(batches[p])
            for pair in batches[p][step]
        ]
        for part in _like_length(rows, swap, params):
            _loss(part, swap).backward()
        for p, optimiser in enumerate(optimisers):
            if step < len(batches[p]):
                optimiser.step()
                optimiser.zero_grad()
    return [number.detach() for number in numbers]


class _Row(NamedTuple):
    """One pair of one problem's batch."""

    pair: Pair
    keeps_error: bool
    number: Tensor
    """The problem's numbers [d_sae]."""
    temperature: float
    share: float
    """Of the batch's mean."""


def _loss(rows: Sequence[_Row], swap: Swap) -> Tensor:
    """The rows' part in the sum over problems of their batches' mean cross-entropy."""
    device = swap.group.lm.device
    mask = torch.stack([torch.sigmoid(row.number / row.temperature) for row in rows])
    keeps_error = torch.tensor([row.keeps_error for row in rows], device=device)
    pairs = [row.pair for row in rows]
    losses = swap.group.loss(pairs, swap.patched(pairs, mask, keeps_error))
    return (losses * torch.tensor([row.share for row in rows], device=device)).sum()


def _batches(pairs: list[Pair], config: Config) -> list[list[Pair]]:
    """The batch of every step: the same in every epoch, as in SAE Bench, the last one as large as is left."""
    epoch = [pairs[start : start + config.batch_size] for start in range(0, len(pairs), config.batch_size)]
    return epoch * config.num_epochs


def _like_length(rows: list[_Row], swap: Swap, params: Params) -> Iterator[list[_Row]]:
    """Rows in parts that fit one pass, of like length together so that little is padding."""
    ordered = sorted(rows, key=lambda row: swap.group.length(row.pair))
    size = rows_at_once(params, swap.group.length(ordered[-1].pair))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


MOST_UNLIKE = 1.5
"""Most that the tokens from the entity on differ in one pass, as a ratio: those of fewer are run with some before them."""


class PromptActivations(HookActivations):
    """The known prompts at one hook, and where their entities stand."""

    def __init__(self, lm: LanguageModel, hook: str, known: Sequence[Known], params: Params) -> None:
        super().__init__(lm, hook, [one.prompt.tokens for one in known], params)
        self.known = known
        self.position = torch.tensor([one.prompt.position for one in known], device=lm.device)
        self.first = torch.tensor([one.first for one in known], device=lm.device)
        self.entity = torch.zeros(len(known), self.d_in, device=lm.device)
        """Activations of the entities' last tokens [prompts, d_in]."""
        counts = torch.zeros(len(known), dtype=torch.bool)
        for batch in self.batches():
            rows, at = torch.arange(len(batch.index)), self.position[batch.index]
            self.entity[batch.index] = batch.acts[rows, at]
            counts[batch.index] = self.lab_mask(batch)[rows, at].cpu()
        texts = [one.prompt for one in known]
        self.beginnings = Beginnings(lm, [text.ids for text in texts], [text.position for text in texts])
        """Of the prompts, up to their entities' last tokens: no patch changes these."""
        self.usable: list[int] = counts.nonzero()[:, 0].tolist()
        """Prompts whose entity token counts: a masked one has no latents to patch."""

    def length(self, pair: Pair) -> int:
        """Tokens of a pair's base prompt."""
        return len(self.known[pair.base].prompt.ids)

    @torch.no_grad()
    def entity_latents(self, saes: dict[str, SparseAutoencoder]) -> dict[str, Latents]:
        """Every SAE's latents of the entity tokens; whole prompts are encoded, for encoders that read sequences."""
        latents = {name: Latents(len(self.known), sae.cfg.d_sae, self.lm.device) for name, sae in saes.items()}
        for batch in self.batches():
            rows, at = torch.arange(len(batch.index)), self.position[batch.index]
            for name, z in encode_each(saes, batch.acts, self.lab_mask(batch)):
                latents[name].put(batch.index.tolist(), z[rows, at])
        return latents

    def loss(self, rows: Sequence[Pair], patched: Tensor) -> Tensor:
        """Cross-entropy of every pair's target answer's first token [pairs], with `patched` [pairs, d_in] in place of
        the bases' entity tokens. Differentiable in `patched`."""
        if not self.beginnings.usable:
            return self._whole_loss(rows, patched)
        order: list[int] = []
        losses = []
        for part in self._parts(rows):
            ends = self._ends(part, rows)
            acts = ends.activations.index_put(ends.entity, patched[part].to(ends.activations.dtype))
            logits = self.lm.resume(self.hook, acts, ends.tokens, torch.tensor([acts.shape[1] - 1]), past=ends.past)[:, -1]
            losses.append(self._cross_entropy(logits, [rows[i] for i in part]))
            order += part
        return torch.cat(losses)[torch.tensor(order, device=self.lm.device).argsort()]

    def _whole_loss(self, rows: Sequence[Pair], patched: Tensor) -> Tensor:
        """`loss` by passes over whole prompts."""
        bases = [pair.base for pair in rows]
        batch = self.pool.batch(bases)
        index = torch.arange(len(bases), device=self.lm.device)
        acts = batch.acts.index_put((index, self.position[bases]), patched.to(batch.acts.dtype))
        last, which = (batch.real.sum(1) - 1).unique(return_inverse=True)
        return self._cross_entropy(self.lm.resume(self.hook, acts, batch.tokens, last)[index, which], rows)

    def _cross_entropy(self, logits: Tensor, rows: Sequence[Pair]) -> Tensor:
        targets = self.first[[pair.target for pair in rows]]
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")

    def answers(self, rows: Sequence[Pair], patched: Tensor) -> list[str]:
        """Greedy answers to the bases with `patched` [pairs, d_in] in place of their entity tokens."""
        texts = [""] * len(rows)
        after = self.beginnings.usable
        for chosen in self._parts(rows) if after else by_length([self.length(pair) for pair in rows], self.params):
            if after:
                tokens, entity, past, _ = self._ends(chosen, rows)
            else:
                bases, past = [rows[i].base for i in chosen], None
                tokens = torch.stack([self.known[base].prompt.tokens for base in bases])
                entity = torch.arange(len(bases)), self.position[bases]

            def edit(acts: Tensor, entity: Any = entity, values: Tensor = patched[chosen]) -> Tensor:
                return acts.index_put(entity, values.to(acts.dtype))

            generated = self.lm.generate(tokens, self.params.ravel.n_generated_tokens, self.hook, edit, past)
            for i, ids in zip(chosen, generated.tolist(), strict=True):
                texts[i] = answer_text(self.lm, ids)
        return texts

    def _after(self, pair: Pair) -> int:
        """Tokens of a pair's base prompt from its entity's last one on."""
        return self.length(pair) - self.known[pair.base].prompt.position

    def _parts(self, rows: Sequence[Pair]) -> Iterator[list[int]]:
        """Rows in parts that fit one pass, about as many tokens from the entity on in each."""
        part: list[int] = []
        for i in sorted(range(len(rows)), key=lambda i: self._after(rows[i])):
            after, members = self._after(rows[i]), [rows[j] for j in (*part, i)]
            size = rows_at_once(self.params, max(map(self.length, members)))
            # a shorter prompt's tokens before its entity are run again, and at least one must come before those that run
            unlike = after > MOST_UNLIKE * self._after(members[0]) or after >= min(map(self.length, members))
            if part and (unlike or len(part) >= size):
                yield part
                part = []
            part.append(i)
        if part:
            yield part

    def _ends(self, part: Sequence[int], rows: Sequence[Pair]) -> _Ends:
        """The last tokens of these rows' bases, from the entity on, as many of each."""
        bases = [rows[i].base for i in part]
        n_tokens = max(self._after(rows[i]) for i in part)
        ids = [self.known[base].prompt.ids for base in bases]
        lengths = torch.tensor([len(text) for text in ids], device=self.lm.device)
        batch, index = self.pool.batch(bases), torch.arange(len(bases), device=self.lm.device)
        places = lengths[:, None] - n_tokens + torch.arange(n_tokens, device=self.lm.device)
        return _Ends(
            torch.tensor([text[-n_tokens:] for text in ids]),
            (index, self.position[bases] - lengths + n_tokens),
            self.beginnings.past(bases, [len(text) - n_tokens for text in ids]),
            batch.acts[index[:, None], places],
        )


class _Ends(NamedTuple):
    """What passes run that start at entities."""

    tokens: Tensor
    """[rows, n]"""
    entity: tuple[Tensor, Tensor]
    """Where the entities' last tokens stand in it."""
    past: Past
    """What comes before."""
    activations: Tensor
    """At the hook [rows, n, d_in]."""


class Latents:
    """Latents of one token per prompt, non-zero ones only: [prompts, d_sae] of a wide SAE would not fit."""

    def __init__(self, n_prompts: int, d_sae: int, device: torch.device) -> None:
        self.d_sae, self.device = d_sae, device
        self._kept: list[tuple[Tensor, Tensor]] = [(torch.zeros(0, dtype=torch.long), torch.zeros(0))] * n_prompts

    def put(self, rows: Sequence[int], z: Tensor) -> None:
        """Keep z [len(rows), d_sae]."""
        for row, values in zip(rows, z, strict=True):
            active = values.nonzero()[:, 0]
            self._kept[row] = active, values[active]

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """[len(rows), d_sae]"""
        z = torch.zeros(len(rows), self.d_sae, device=self.device)
        kept = [self._kept[row] for row in rows]
        counts = torch.tensor([len(active) for active, _ in kept], device=self.device)
        which = torch.arange(len(rows), device=self.device).repeat_interleave(counts)
        z[which, torch.cat([active for active, _ in kept])] = torch.cat([values for _, values in kept]).to(z.dtype)
        return z


class Swap(NamedTuple):
    """One SAE's patches: latents of base and source mixed by a mask, decoded."""

    sae: SparseAutoencoder
    latents: Latents
    group: PromptActivations

    def patched(self, pairs: Sequence[Pair], mask: Tensor, keeps_error: Tensor) -> Tensor:
        """Activations [pairs, d_in] in which mask [pairs, d_sae] says how much of each latent is the source's.

        Where keeps_error [pairs] is True, what the SAE leaves unexplained of the base stays: then an empty mask
        changes nothing. Elsewhere the reconstruction alone stands there, as in SAE Bench.
        """
        bases = [pair.base for pair in pairs]
        base, source = self.latents[bases], self.latents[[pair.source for pair in pairs]]
        with torch.no_grad():
            error = self.group.entity[bases] - self._decode(base)
        return self._decode(base + mask * (source - base)) + error * keeps_error[:, None]

    def _decode(self, z: Tensor) -> Tensor:
        return self.sae.decode(z.to(self.sae.W_dec.dtype)[:, None])[:, 0].float()
