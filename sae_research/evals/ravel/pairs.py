"""Pairs of prompts about two entities, of which one is patched with the other.

For attribute A, cause pairs ask A of two entities that differ in it: the source's answer should take the place of the
base's. Isolation pairs ask another attribute B of two entities that differ in B: patching what carries A should leave B
alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sae_research.config.params import Params
from sae_research.evals.ravel.prompts import Known, Prompt, names
from sae_research.runtime.stages import StageFolder


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
