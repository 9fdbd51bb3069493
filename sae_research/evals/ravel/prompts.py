"""RAVEL's prompts: templates about an entity, filled in and tokenised, and which of them the model answers rightly.

Files as SAE Bench reads them (`artifacts/ravel/base/`), four to an entity class, of which three are needed:

    ravel_city_entity_attributes.json     {"Paris": {"Country": "France", ...}, ...}
    ravel_city_attribute_to_prompts.json  {"Country": ["The city of %s is located in the country of", ...], ...}
    ravel_city_entity_to_split.json       {"Paris": "train", ...}; all but "train" are held out

Packaged beside this module: some fifty well-known cities, for small models without a hub. They are ours, not RAVEL's.

Only what the model knows can be patched, so prompts that it answers wrongly are left out. `right_sae_bench` is SAE Bench's
own function: it lets the answer be any beginning of the label ("S" for Spain) and any continuation of it ("Nigeria" for
Niger). Ours (`right`) compares whole words.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.config.params import Params
from sae_research.evals.harness import made_once, model_key
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import NotApplicable, UserError
from sae_research.runtime.files import find_local, read_json
from sae_research.runtime.stages import StageFolder
from sae_research.text.hub import hub_errors
from sae_research.text.local import looks_local

_ALIASES = {
    "united states": ("usa", "us", "u.s", "america"),
    "united kingdom": ("uk", "u.k", "great britain", "britain", "england"),
    "south korea": ("korea",),
    "czech republic": ("czechia",),
    "chinese": ("mandarin",),
    "mandarin": ("chinese",),
    "persian": ("farsi",),
    "north america": ("america",),
}
"""Other names of a value that models answer with."""


def names(label: str) -> frozenset[str]:
    """All names of a value, in lower case: its alternatives (`Hindi,English`) and their aliases."""
    own = [part.strip() for part in label.lower().split(",")]
    return frozenset(name for part in own for name in (part, *_ALIASES.get(part, ())) if name)


def right(label: str, answer: str) -> bool:
    """Whether the answer opens with one of the label's names as whole words."""
    said = answer.strip(' "\n').split('"')[0].strip().lower().removeprefix("the ")
    return any(said.startswith(name) and not said[len(name) : len(name) + 1].isalnum() for name in names(label))


def right_sae_bench(prompt: str, label: str, answer: str) -> bool:
    """SAE Bench's `evaluate_completion`."""
    from sae_bench.evals.ravel.validation import evaluate_completion

    return bool(evaluate_completion(prompt, label, answer))


PACKAGED = "packaged"
_DATA = Path(__file__).parent / "data"


class EntityClass(NamedTuple):
    """One kind of entity: what is known of each, and how it is asked."""

    name: str
    values: dict[str, dict[str, str]]
    """entity -> attribute -> value"""
    templates: dict[str, list[str]]
    """attribute -> texts with one `%s`"""
    held_out: frozenset[str]
    """Entities that `lab_v1` learns nothing from."""


class Prompt(NamedTuple):
    """One question about one entity."""

    entity_class: str
    entity: str
    attribute: str
    text: str
    label: str
    """The right answer."""
    held_out: bool
    ids: tuple[int, ...]
    """The separator, then the text."""
    position: int
    """Index of the entity's last token in `ids`."""

    @property
    def tokens(self) -> Tensor:
        return torch.tensor(self.ids)


def load_class(source: str, name: str, attributes: list[str], stage: StageFolder) -> EntityClass:
    """The files of one entity class. source: `packaged`, a local folder, or a hub data set.

    A template that does not name its entity exactly once is skipped with that reason. Raises `UserError` for missing
    or malformed files and for attributes they do not hold.
    """
    folder = _folder(source, name)
    values = _read(folder, name, "entity_attributes", dict)
    templates = _read(folder, name, "attribute_to_prompts", list)
    splits = _read(folder, name, "entity_to_split", str)
    unknown = [attribute for attribute in attributes if attribute not in templates]
    if unknown:
        raise UserError(
            f"ravel.entity_attribute_selection: {name} has no attribute {unknown[0]!r} in {folder}; "
            f"available: {', '.join(templates)}"
        )
    return EntityClass(
        name,
        {entity: {key: str(value) for key, value in known.items()} for entity, known in values.items()},
        {attribute: list(_usable(name, templates[attribute], stage)) for attribute in attributes},
        frozenset(entity for entity in values if splits.get(entity, "train") != "train"),
    )


def build_prompts(lm: LanguageModel, entities: EntityClass) -> list[Prompt]:
    """Every template with every entity that has the attribute, entity by entity; equal texts once.

    Raises `UserError` when the tokenizer cannot say which tokens an entity became.
    """
    asked: dict[tuple[str, str], tuple[str, int]] = {}
    for entity, known in entities.values.items():
        for attribute, templates in entities.templates.items():
            for template in templates if known.get(attribute) else ():
                text = template.replace("%s", entity)
                asked.setdefault((attribute, text), (entity, template.index("%s") + len(entity)))
    if not asked:
        return []
    if not lm.tokenizer.is_fast:
        raise UserError(f"{lm.name}: its tokenizer does not say where tokens stand in a text; RAVEL needs a fast one")
    encoded = lm.tokenizer([text for _, text in asked], add_special_tokens=False, return_offsets_mapping=True)
    return [
        Prompt(
            entities.name,
            entity,
            attribute,
            text,
            entities.values[entity][attribute],
            entity in entities.held_out,
            (lm.separator_id, *ids),
            1 + _token_before(offsets, end),
        )
        for ((attribute, text), (entity, end)), ids, offsets in zip(
            asked.items(), encoded["input_ids"], encoded["offset_mapping"], strict=True
        )
    ]


def _token_before(offsets: list[tuple[int, int]], end: int) -> int:
    """Index of the token that holds the character before `end`."""
    return max(i for i, (start, stop) in enumerate(offsets) if start < end and stop > start)


def _usable(name: str, templates: list[Any], stage: StageFolder) -> Iterator[str]:
    for template in dict.fromkeys(templates):
        if not isinstance(template, str) or template.count("%s") != 1:
            stage.skip(f"{name}: {template!r}", "a template names its entity exactly once, as %s")
        else:
            yield template


# --- files -----------------------------------------------------------------------------------


def _folder(source: str, name: str) -> Path:
    if source == PACKAGED:
        return _DATA
    local = find_local(source)
    if local is not None:
        return local
    if looks_local(source):
        raise UserError(f"ravel.prompts: no such folder: {source}")
    with hub_errors(source, f"set `ravel.prompts: {PACKAGED}`"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=f"*ravel_{name}_*.json"))


def _read(folder: Path, name: str, kind: str, of: type) -> dict[str, Any]:
    file_name = f"ravel_{name}_{kind}.json"
    path = next(iter(sorted(folder.rglob(file_name))), None)
    if path is None:
        there = sorted(
            {
                file.name.removeprefix("ravel_").removesuffix("_attribute_to_prompts.json")
                for file in folder.rglob("ravel_*_attribute_to_prompts.json")
            }
        )
        raise UserError(f"ravel.prompts: {folder} holds no {file_name}; entity classes there: {', '.join(there) or 'none'}")
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(value, of) for value in content.values()):
        raise UserError(f"{path}: expected an object whose values are of type {of.__name__}")
    return content


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
        known = _most_known(
            [
                Known(prompt, ids[0])
                for prompt, ids in zip(prompts, _answers(lm, prompts, params), strict=True)
                if _is_right(lm, prompt, ids)
            ],
            config.top_n_entities,
        )
        counts[name] = {attribute: _count(prompts, known, attribute) for attribute in attributes}
        usable = [a for a in attributes if _qualifies(known, a, counts[name][a], name, config.min_known_entities, stage)]
        if len(usable) < 2:
            stage.skip(name, f"isolation needs two attributes that the model knows; it knows {len(usable)}")
            continue
        kept += [one for one in known if one.prompt.attribute in usable]
    stage.notes["known"] = counts
    if not kept:
        raise NotApplicable(
            f"{lm.name} knows too few of the asked facts for RAVEL: "
            + "; ".join(f"{what}: {why}" for what, why in stage.skipped.items())
        )
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
            yield same[start : start + size]


def _answers(lm: LanguageModel, prompts: list[Prompt], params: Params) -> list[list[int]]:
    """Greedy answers [n_generated_tokens] to all prompts, kept in the result cache."""
    n_tokens = params.ravel.n_generated_tokens

    def generate() -> list[list[int]]:
        found: list[list[int]] = [[]] * len(prompts)
        with tqdm(total=len(prompts), desc="what the model knows", unit="prompt", dynamic_ncols=True) as bar:
            for rows in by_length([len(prompt.ids) for prompt in prompts], params):
                tokens: Tensor = torch.stack([prompts[row].tokens for row in rows])
                for row, ids in zip(rows, lm.generate(tokens, n_tokens).tolist(), strict=True):
                    found[row] = ids
                bar.update(len(rows))
        return found

    key = model_key(lm, ["answers", n_tokens, [prompt.ids for prompt in prompts]], __name__)
    return made_once("ravel", key, generate)


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
    return {
        "prompts": sum(prompt.attribute == attribute for prompt in prompts),
        "known_prompts": len(mine),
        "known_entities": len({prompt.entity for prompt in mine}),
        "known_values": len({p.label for p in mine}),
    }


def _qualifies(known: list[Known], attribute: str, count: dict[str, int], name: str, least: int, stage: StageFolder) -> bool:
    if count["known_entities"] < least:
        stage.skip(
            f"{name}/{attribute}",
            f"the model answers {count['known_prompts']} of {count['prompts']} prompts, "
            f"about {count['known_entities']} entities; {least} are needed (ravel.min_known_entities)",
        )
        return False
    for part, held_out in (("train", False), ("held-out", True)):
        labels = {one.prompt.label for one in known if one.prompt.attribute == attribute and one.prompt.held_out == held_out}
        if len(labels) < 2:
            stage.skip(
                f"{name}/{attribute}",
                f"known {part} entities differ in {len(labels)} values of it; patching one for another needs two",
            )
            return False
    return True
