"""RAVEL's prompts: templates about an entity, filled in, tokenised, with the place of the entity's last token.

Files as SAE Bench reads them (`artifacts/ravel/base/`), four to an entity class, of which three are needed:

    ravel_city_entity_attributes.json     {"Paris": {"Country": "France", ...}, ...}
    ravel_city_attribute_to_prompts.json  {"Country": ["The city of %s is located in the country of", ...], ...}
    ravel_city_entity_to_split.json       {"Paris": "train", ...}; all but "train" are held out

Packaged beside this module: some fifty well-known cities, for small models without a hub. They are ours, not RAVEL's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_research.errors import UserError
from sae_research.lm import LanguageModel
from sae_research.store import read_json
from sae_research.store_stages import StageFolder
from sae_research.text.hub import hub_errors
from sae_research.text.local import find_local, looks_local

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
        raise UserError(f"ravel.entity_attribute_selection: {name} has no attribute {unknown[0]!r} in {folder}; "
                        f"available: {', '.join(templates)}")
    return EntityClass(
        name, {entity: {key: str(value) for key, value in known.items()} for entity, known in values.items()},
        {attribute: list(_usable(name, templates[attribute], stage)) for attribute in attributes},
        frozenset(entity for entity in values if splits.get(entity, "train") != "train"))


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
    return [Prompt(entities.name, entity, attribute, text, entities.values[entity][attribute],
                   entity in entities.held_out, (lm.separator_id, *ids), 1 + _token_before(offsets, end))
            for ((attribute, text), (entity, end)), ids, offsets in zip(
                asked.items(), encoded["input_ids"], encoded["offset_mapping"], strict=True)]


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
        there = sorted({file.name.removeprefix("ravel_").removesuffix("_attribute_to_prompts.json")
                        for file in folder.rglob("ravel_*_attribute_to_prompts.json")})
        raise UserError(f"ravel.prompts: {folder} holds no {file_name}; entity classes there: {', '.join(there) or 'none'}")
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(value, of) for value in content.values()):
        raise UserError(f"{path}: expected an object whose values are of type {of.__name__}")
    return content
