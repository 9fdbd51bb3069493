"""Patching an entity's token with another entity's latents: the pairs of prompts, the mask over latents, the patched runs.

For attribute A, cause pairs ask A of two entities that differ in it: the source's answer should take the place of the
base's. Isolation pairs ask another attribute B of two entities that differ in B: patching what carries A should leave B
alone.

The mask is a differential binary mask (MDBM), as in SAE Bench 0.6.0: one number per latent, from 0; sigmoid of it over a
temperature that falls from 1 to 1e-4 in equal ratios, step by step; Adam; cross-entropy of the target answer's first token
over cause and isolation pairs alike; in the end a latent is in where its number is above 0. SAE Bench drops an incomplete
last batch; here it is used.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_research.config.evaluation_params import Ravel as Config
from sae_research.config.params import Params
from sae_research.evals.ravel.prompts import Known, Prompt, answer_text, by_length, names, rows_at_once
from sae_research.lm import LanguageModel
from sae_research.lm.activations import HookActivations
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder, encode_each


class Pair(NamedTuple):
    """Two prompts about the same attribute, by their rows among the known ones."""

    base: int
    source: int
    cause: bool

    @property
    def target(self) -> int:
        """The prompt whose answer is right after patching."""
        return self.source if self.cause else self.base


class Plan(NamedTuple):
    """What a mask is learnt on, and what it is scored on."""

    train: list[Pair]
    test: list[Pair]


class Task(NamedTuple):
    """One attribute whose latents are sought, in both definitions."""

    entity_class: str
    attribute: str
    sae_bench: Plan
    lab: Plan

    @property
    def name(self) -> str:
        """As SAE Bench keys it."""
        return f"{self.entity_class}_{self.attribute}"


Differ = Callable[[Prompt, Prompt], bool]


def build_tasks(known: Sequence[Known], rows: Sequence[int], params: Params, stage: StageFolder) -> list[Task]:
    """A task for every attribute among `rows` of the known prompts; those without pairs of both kinds to learn from
    and to score are skipped with that reason."""
    tasks, config = [], params.ravel
    for entity_class, attribute in dict.fromkeys(
        (known[row].prompt.entity_class, known[row].prompt.attribute) for row in rows
    ):
        mine = [row for row in rows if known[row].prompt.entity_class == entity_class]
        others = list(dict.fromkeys(known[row].prompt.attribute for row in mine))
        others.remove(attribute)
        prompts = [one.prompt for one in known]
        sizes = config.num_pairs_per_attribute, config.train_test_split
        seed = f"{params.random_seed} {entity_class} {attribute}"
        task = Task(
            entity_class,
            attribute,
            sae_bench_plan(random.Random(seed), prompts, mine, attribute, others, *sizes),
            lab_plan(random.Random(f"{seed} lab"), prompts, mine, attribute, others, *sizes),
        )
        if _scorable(task, known):
            tasks.append(task)
        else:
            stage.skip(f"{entity_class}/{attribute}", "too few pairs of prompts to learn from and to score")
    return tasks


def seems_isolation(known: Sequence[Known], pair: Pair) -> bool:
    """How SAE Bench tells the kinds apart when it scores: by the target's first token being the base's. A cause pair
    whose values begin alike, South Africa and South Korea say, counts as isolation there."""
    return known[pair.base].first == known[pair.target].first


def sae_bench_plan(
    rng: random.Random,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    attribute: str,
    others: Sequence[str],
    n_pairs: int,
    train_share: float,
) -> Plan:
    """SAE Bench's pairs, drawn in its order, split at random: an entity, even a prompt, may stand on both sides."""
    pairs = _draw(rng, prompts, rows, attribute, others, n_pairs, lambda a, b: a.label != b.label)
    n_train = int(len(pairs) * train_share)
    return Plan(pairs[:n_train], pairs[n_train:])


def lab_plan(
    rng: random.Random,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    attribute: str,
    others: Sequence[str],
    n_pairs: int,
    train_share: float,
) -> Plan:
    """As many pairs, those to learn from and those to score about different entities."""
    n_train = max(1, int(n_pairs * train_share))
    parts = []
    for held_out, size in ((False, n_train), (True, max(1, n_pairs - n_train))):
        part = [row for row in rows if prompts[row].held_out == held_out]
        parts.append(_draw(rng, prompts, part, attribute, others, size, lambda a, b: not names(a.label) & names(b.label)))
    return Plan(*parts)


def _draw(
    rng: random.Random,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    attribute: str,
    others: Sequence[str],
    n_pairs: int,
    differ: Differ,
) -> list[Pair]:
    """`n_pairs` cause pairs and as many isolation pairs, spread over the other attributes, shuffled."""
    cause = _pairs(rng, prompts, rows, attribute, n_pairs, differ, True)
    isolation = [pair for other in others for pair in _pairs(rng, prompts, rows, other, n_pairs, differ, False)]
    rng.shuffle(isolation)
    pairs = cause + isolation[: len(cause)]
    rng.shuffle(pairs)
    return pairs


def _pairs(
    rng: random.Random,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    attribute: str,
    n_pairs: int,
    differ: Differ,
    cause: bool,
) -> list[Pair]:
    """Prompts about `attribute`, none of them twice as base, each with a source of another value."""
    mine = [row for row in rows if prompts[row].attribute == attribute]
    bases = mine if len(mine) < n_pairs else rng.sample(mine, n_pairs)
    pairs = []
    for base in bases:
        sources = [row for row in mine if differ(prompts[base], prompts[row])]
        if sources:
            pairs.append(Pair(base, rng.choice(sources), cause))
    return pairs


def _scorable(task: Task, known: Sequence[Known]) -> bool:
    kinds = [{pair.cause for pair in part} for part in (task.sae_bench.train, *task.lab)]
    kinds.append({not seems_isolation(known, pair) for pair in task.sae_bench.test})
    return all(kind == {True, False} for kind in kinds)


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
        bases = [pair.base for pair in rows]
        batch = self.pool.batch(bases)
        index = torch.arange(len(bases), device=self.lm.device)
        acts = batch.acts.index_put((index, self.position[bases]), patched.to(batch.acts.dtype))
        last, which = (batch.real.sum(1) - 1).unique(return_inverse=True)
        logits = self.lm.resume(self.hook, acts, batch.tokens, last)[index, which]
        targets = self.first[[pair.target for pair in rows]]
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")

    def answers(self, rows: Sequence[Pair], patched: Tensor) -> list[str]:
        """Greedy answers to the bases with `patched` [pairs, d_in] in place of their entity tokens."""
        texts = [""] * len(rows)
        for chosen in by_length([self.length(pair) for pair in rows], self.params):
            bases = [rows[i].base for i in chosen]
            tokens = torch.stack([self.known[base].prompt.tokens for base in bases])
            index, at = torch.arange(len(bases), device=self.lm.device), self.position[bases]
            values = patched[chosen]

            def edit(acts: Tensor, index: Tensor = index, at: Tensor = at, values: Tensor = values) -> Tensor:
                return acts.index_put((index, at), values.to(acts.dtype))

            generated = self.lm.generate(tokens, self.params.ravel.n_generated_tokens, self.hook, edit)
            for i, ids in zip(chosen, generated.tolist(), strict=True):
                texts[i] = answer_text(self.lm, ids)
        return texts


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
