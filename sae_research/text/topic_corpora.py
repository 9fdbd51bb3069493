"""Running text on one topic, for evaluations that set one topic against another: packaged, local, or from the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from sae_research.errors import UserError
from sae_research.text.corpus import DOC_ID_DIGITS, PACKAGED_SOURCES, Document, source_texts
from sae_research.text.hub import hub_errors, named_rows, parse_hub_name
from sae_research.text.local import as_text, check_columns, find_local, local_files, looks_local, read_rows
from sae_research.text.split import split_of_hash, text_hash

PACKAGED_TOPICS: dict[str, tuple[str, ...]] = {
    "packaged_biomedical": ("medical_abstracts", "cancer_papers"),
    "packaged_general": ("news_articles", "news_wire", "encyclopedia", "biographies", "stories_and_answers"),
}
"""Topic -> sources of `corpus.PACKAGED_SOURCES`. Only their `probe_train` part is read: no SAE was trained on it."""

HUB_NAMES = {"wikitext": "Salesforce/wikitext:wikitext-2-raw-v1:test",
             "wmdp-bio-forget": "cais/wmdp-bio-forget-corpus:default:train"}
"""Short names of what SAE Bench reads."""

MIN_CHARACTERS = 50
"""Shorter texts are left out, as in SAE Bench."""


def topic_documents(name: str, column: str, max_characters: int, seed: int) -> list[Document]:
    """Distinct documents of a corpus in an order of the seed's choice, each cut to `max_characters`.

    name: a key of `PACKAGED_TOPICS` or `HUB_NAMES`, a local file or folder, or `owner/data[:config[:split]]`. The cut
    keeps a few long papers from filling the corpus. Raises `UserError` for an unknown name, unreadable files, a missing
    column, a hub out of reach or a corpus without text.
    """
    found: dict[str, Document] = {}
    for text, source in _texts(name, column):
        if len(text) > MIN_CHARACTERS:
            digest = text_hash(text)
            if name not in PACKAGED_TOPICS or split_of_hash(digest) == "probe_train":
                found.setdefault(digest, Document(text[:max_characters], digest[:DOC_ID_DIGITS], source))
    if not found:
        raise UserError(f"unlearning: corpus {name}: no text of more than {MIN_CHARACTERS} characters in column {column!r}")
    order = sorted(found, key=lambda digest: hashlib.blake2b(f"{seed}:{digest}".encode(), digest_size=16).digest())
    return [found[digest] for digest in order]


def _texts(name: str, column: str) -> Iterator[tuple[str, str]]:
    """(text, source)"""
    local = find_local(name)
    if name in PACKAGED_TOPICS:
        wanted = PACKAGED_TOPICS[name]
        yield from ((text, source.name) for source in PACKAGED_SOURCES if source.name in wanted
                    for text in source_texts(source))
    elif local is not None:
        for file in local_files(local):
            yield from ((as_text(value, f"{file}, column {column!r}"), file.name)
                        for (value,) in read_rows(file, [column]))
    elif name not in HUB_NAMES and "/" not in name or looks_local(name.partition(":")[0]):
        raise UserError(f"unlearning: corpus {name}: no such file; known names: "
                        f"{', '.join([*PACKAGED_TOPICS, *HUB_NAMES])}, or owner/data[:config[:split]] on the hub")
    else:
        yield from _hub_texts(HUB_NAMES.get(name, name), column)


def _hub_texts(name: str, column: str) -> Iterator[tuple[str, str]]:
    where = f"hub data set {name!r}"
    with hub_errors(name, "name the packaged stand-in in `unlearning`, or a local file"):
        for row in named_rows(parse_hub_name(name, "train")):
            check_columns(where, [column], list(row))
            if row[column]:
                yield as_text(row[column], f"{where}, column {column!r}"), name
