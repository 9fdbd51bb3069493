"""Which prompts the model answers rightly: what it does not know, no patch can move."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.errors import NotApplicable
from sae_research.evals.inputs import model_key
from sae_research.evals.ravel.answers import right, right_sae_bench
from sae_research.evals.ravel.prompts import Prompt, build_prompts, load_class
from sae_research.lm import LanguageModel
from sae_research.params import Params
from sae_research.store_cache import ResultCache
from sae_research.store_stages import StageFolder


class Known(NamedTuple):
    """A prompt that the model answers rightly by either definition."""

    prompt: Prompt
    first: int
    """The first token of its answer."""


def known_prompts(lm: LanguageModel, params: Params, stage: StageFolder) -> list[Known]:
    """Prompts of all configured classes that the model answers, and in `stage.notes` how many were asked.

    An attribute of which fewer than `min_known_entities` are known, or only one value, is skipped with that reason; a
    class needs two attributes. Raises `NotApplicable` when the model knows too little of everything.
    """
    config, kept, counts = params.ravel, [], {}
    for name, attributes in config.entity_attribute_selection.items():
        entities = load_class(config.prompts, name, attributes, stage)
        prompts = _downsampled(build_prompts(lm, entities), config.full_dataset_downsample, params.random_seed)
        known = _most_known([Known(prompt, ids[0]) for prompt, ids in zip(
            prompts, _answers(lm, prompts, params), strict=True) if _is_right(lm, prompt, ids)], config.top_n_entities)
        counts[name] = {attribute: _count(prompts, known, attribute) for attribute in attributes}
        usable = [a for a in attributes if _qualifies(known, a, counts[name][a], name, config.min_known_entities, stage)]
        if len(usable) < 2:
            stage.skip(name, f"isolation needs two attributes that the model knows; it knows {len(usable)}")
            continue
        kept += [one for one in known if one.prompt.attribute in usable]
    stage.notes["known"] = counts
    if not kept:
        raise NotApplicable(f"{lm.name} knows too few of the asked facts for RAVEL: " + "; ".join(
            f"{what}: {why}" for what, why in stage.skipped.items()))
    return kept


def answer_text(lm: LanguageModel, ids: Sequence[int]) -> str:
    """Generated ids as text, up to the first special token."""
    special = set(lm.special_ids.tolist())
    end = next((i for i, token in enumerate(ids) if token in special), len(ids))
    return str(lm.tokenizer.decode(ids[:end]))


def rows_at_once(params: Params, length: int) -> int:
    """Prompts of `length` tokens in one pass: prompts are short, and half the tokens of a usual pass leave room for
    gradients."""
    return max(1, params.model.llm_batch_size * params.text.context_size // (2 * length))


def by_length(lengths: Sequence[int], params: Params) -> Iterator[list[int]]:
    """Rows in batches of equal length: what is never padded cannot depend on padding."""
    for length in sorted(set(lengths)):
        same = [row for row, other in enumerate(lengths) if other == length]
        size = rows_at_once(params, length)
        for start in range(0, len(same), size):
            yield same[start:start + size]


def _answers(lm: LanguageModel, prompts: list[Prompt], params: Params) -> list[list[int]]:
    """Greedy answers [n_generated_tokens] to all prompts, kept in the result cache."""
    n_tokens, cache = params.ravel.n_generated_tokens, ResultCache("ravel")
    key = model_key(lm, ["answers", n_tokens, [prompt.ids for prompt in prompts]], __name__)
    found: Any = cache.get(key)
    if found is None:
        found = [[]] * len(prompts)
        with tqdm(total=len(prompts), desc="what the model knows", unit="prompt", dynamic_ncols=True) as bar:
            for rows in by_length([len(prompt.ids) for prompt in prompts], params):
                tokens: Tensor = torch.stack([prompts[row].tokens for row in rows])
                for row, ids in zip(rows, lm.generate(tokens, n_tokens).tolist(), strict=True):
                    found[row] = ids
                bar.update(len(rows))
        cache.put(key, found)
    return found


def _downsampled(prompts: list[Prompt], size: int | None, seed: int) -> list[Prompt]:
    """`size` of the prompts at random, in their order."""
    if size is None or size >= len(prompts):
        return prompts
    return [prompts[row] for row in sorted(random.Random(seed).sample(range(len(prompts)), size))]


def _is_right(lm: LanguageModel, prompt: Prompt, ids: list[int]) -> bool:
    text = answer_text(lm, ids)
    return right(prompt.label, text) and right_sae_bench(prompt.text, prompt.label, text)


def _most_known(known: list[Known], n_entities: int) -> list[Known]:
    """Prompts about the entities with the most right answers; ties in the order of the files, as in SAE Bench."""
    answers = Counter(one.prompt.entity for one in known)
    best = {entity for entity, _ in answers.most_common(n_entities)}
    return [one for one in known if one.prompt.entity in best]


def _count(prompts: list[Prompt], known: list[Known], attribute: str) -> dict[str, int]:
    mine = [one.prompt for one in known if one.prompt.attribute == attribute]
    return {"prompts": sum(prompt.attribute == attribute for prompt in prompts), "known_prompts": len(mine),
            "known_entities": len({prompt.entity for prompt in mine}), "known_values": len({p.label for p in mine})}


def _qualifies(known: list[Known], attribute: str, count: dict[str, int], name: str, least: int,
               stage: StageFolder) -> bool:
    if count["known_entities"] < least:
        stage.skip(f"{name}/{attribute}", f"the model answers {count['known_prompts']} of {count['prompts']} prompts, "
                   f"about {count['known_entities']} entities; {least} are needed (ravel.min_known_entities)")
        return False
    for part, held_out in (("train", False), ("held-out", True)):
        labels = {one.prompt.label for one in known
                  if one.prompt.attribute == attribute and one.prompt.held_out == held_out}
        if len(labels) < 2:
            stage.skip(f"{name}/{attribute}", f"known {part} entities differ in {len(labels)} values of it; "
                       "patching one for another needs two")
            return False
    return True
