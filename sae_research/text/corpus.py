"""Running text for SAE training and core evaluation, one document at a time, each in exactly one split.

Training leaves out near copies of text that core evaluation reads; the index of that text is kept under `.cache/held_out/`.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_research.config.params import Text
from sae_research.runtime.cache import cache_dir, new_entry, prune, usable
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import find_local, fingerprint
from sae_research.runtime.sources import sources_fingerprint
from sae_research.text.chat import Content, ContentsOnly, Ranges, Reader
from sae_research.text.hub import hub_revision, stream_rows
from sae_research.text.local import (
    as_text,
    check_columns,
    local_files,
    local_fingerprint,
    looks_local,
    read_rows,
)
from sae_research.text.packaged import packaged_version, read_packaged
from sae_research.text.split import (
    DEFINITION,
    SHARES,
    SPLITS,
    NearIndex,
    ShingleSets,
    shingle_sets,
    split_of_hash,
    text_hash,
)

PACKAGED = "packaged"
MIN_CHARACTERS = 200
"""Packaged rows shorter than this are no documents."""
MAX_CHARACTERS = 4_000
"""Packaged documents are cut here, so that no single one fills a batch."""
DOC_ID_DIGITS = 12
HASHES_IN_MEMORY = 2**18
"""About 25 MB; the packaged text has fewer."""
TRAINING, HELD_OUT = "sae_train", "core_eval"
"""Training text that is a near copy of held-out text is left out."""
_COMPARED = 64
"""Training documents looked up together."""


class Document(NamedTuple):
    """One text: `doc_id` is the start of the `text_hash` of what is compared, `source` the file or data set it came from."""

    text: str
    doc_id: str
    source: str
    said: str | None = None
    """Of a conversation: what stands in its messages, by which it is compared with others."""
    counted: Ranges | None = None
    """Parts of `text` whose tokens count; None for all of it."""

    @property
    def compared(self) -> str:
        """What decides its split, and is held against others to find copies."""
        return self.text if self.said is None else self.said


class PackagedSource(NamedTuple):
    """Packaged files that count as one voice in the round robin.

    `target` keeps only rows with that label (the negatives of `agnews` and `code` files are other people's
    code); `limit` bounds the number of documents over all splits; the source speaks in one round out of
    `every`.
    """

    name: str
    files: tuple[str, ...]
    target: Any = None
    limit: int | None = None
    every: int = 1


# `every` holds back code and whole papers, which would make up 18 % of the tokens each.
# Left out: 112_amzn_rev, a copy of 111_yelp_data; 86_social_iqa, one template 5,000 times over.
PACKAGED_SOURCES: tuple[PackagedSource, ...] = (
    PackagedSource("news_articles", ("100_news_fake",)),
    PackagedSource("medical_abstracts", ("101_disease_class",)),
    PackagedSource("restaurant_reviews", ("111_yelp_data",)),
    PackagedSource("stories_and_answers", ("45_context_ans",)),
    PackagedSource("confessions", ("48_cm_correct", "49_cm_isshort")),
    PackagedSource("essays", ("94_ai_gen",)),
    PackagedSource("biographies", ("56_wikidatasex_or_gender", "57_wikidatais_alive", "58_wikidatapolitical_party")),
    PackagedSource("news_wire", ("161_agnews_0", "162_agnews_1", "163_agnews_2"), target=1),
    PackagedSource(
        "occupations",
        tuple(
            f"{number}_wikidata_occupation_is{job}"
            for number, job in enumerate(("journalist", "athlete", "actor", "politician", "singer", "researcher"), 59)
        ),
    ),
    PackagedSource("product_reviews", ("157_amazon_5star",)),
    PackagedSource("cancer_papers", ("98_cancer_cat",), every=3),
    PackagedSource("practical_questions", ("44_phys_tf",)),
    PackagedSource("encyclopedia", ("90_glue_qnli",)),
    PackagedSource("news_pairs", ("88_glue_mnli", "89_glue_mrpc")),
    PackagedSource("research_questions", ("110_aimade_humangpt3",)),
    PackagedSource("headlines", ("97_news_class",)),
    PackagedSource("tickets", ("103_it_tick",)),
    PackagedSource("science_comments", ("99_sci_cat",)),
    PackagedSource("questions", ("91_glue_qqp",)),
    PackagedSource("films", ("113_movie_sent",)),
    PackagedSource("code", ("158_code_C", "159_code_Python", "160_code_HTML"), target=1, limit=1_500, every=3),
)


def documents(text: Text, split: str, reader: Reader | None = None) -> Documents:
    """The documents of one split, without duplicates, in an order that never changes.

    The packaged sources take turns; local files come in order of their names, hub rows as the hub streams
    them. The iterator ends when the text does: `stream.token_contexts` is the caller that says when that was
    too soon. `core_eval` also ends at `text.held_out_characters`; it is indexed before the first document of `sae_train`
    is given, so that near copies of it (`text.near_copies`) are left out there. `sae_train` is read `text.training_passes`
    times, in the same order: what a pass leaves of a context the next fills, so that contexts are cut elsewhere.

    Raises `UserError` at the first document asked for: no such folder, no readable file, no such column, hub
    out of reach; and at the end if the data set held no document in any split. Where the column holds lists of token
    ids or conversations, `reader` makes text of them, so that they are split and packed as any text is.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    return Documents(text, split, reader)


class Documents(Iterator[Document]):
    """What `documents` gives, and why there is no more of it."""

    def __init__(self, text: Text, split: str, reader: Reader | None) -> None:
        self.text, self.split, self.reader = text, split, reader
        self.roles: set[str] = set()
        """Whose messages were met so far, in any split."""
        self.near_copies = 0
        """Training documents left out so far, near copies of held-out ones."""
        self.limited = False
        """Whether held-out text went on after `text.held_out_characters`."""
        self._found = {TRAINING: self._passes, HELD_OUT: self._first}.get(split, self._all)()

    def __next__(self) -> Document:
        return next(self._found)

    def why_no_more(self) -> str:
        """What to say, after a comma, where the documents turn out too few; empty where the text just ends."""
        if self.near_copies:
            return f", {self.near_copies:,} others are near copies of held-out text"
        return f", text.held_out_characters is {self.text.held_out_characters:,}" if self.limited else ""

    def _all(self) -> Iterator[Document]:
        seen, empty = _Seen(), True
        for content, source in _raw_documents(self.text, self.reader):
            digest, empty = text_hash(content.compared), False
            self.roles |= content.roles
            if split_of_hash(digest) == self.split and seen.add(digest):
                kept = content.text[:MAX_CHARACTERS] if self.text.dataset == PACKAGED else content.text
                yield Document(kept, digest[:DOC_ID_DIGITS], source, content.said, content.counted)
        if empty:
            raise UserError(
                f"text.dataset {self.text.dataset}: the data set is empty; looked for text in column "
                f"{self.text.column_name!r}"
            )

    def _first(self) -> Iterator[Document]:
        characters = 0
        for document in self._all():
            if characters >= self.text.held_out_characters:
                self.limited = True
                return
            characters += len(document.compared)
            yield document

    def _passes(self) -> Iterator[Document]:
        for _ in range(self.text.training_passes):
            self.near_copies = 0
            yield from self._apart()

    def _apart(self) -> Iterator[Document]:
        index, found = None, self._all()
        while batch := list(islice(found, _COMPARED)):
            index = index or _held_out_index(self.text, self.reader)  # only of text that can be read
            near = index.near([document.compared for document in batch])
            self.near_copies += int(near.sum())
            yield from (document for document, is_near in zip(batch, near, strict=True) if not is_near)


def _held_out_index(text: Text, reader: Reader | None) -> NearIndex:
    plain = None if reader is None else ContentsOnly(reader.tokenizer, reader.roles)
    held_out = documents(text, HELD_OUT, plain)

    def kept() -> bool:
        return plain is None or not plain.decoded  # decoded text is the tokenizer's too, which the fingerprint does not know

    return held_out_index(text_fingerprint(text, HELD_OUT), (document.compared for document in held_out), kept)


class _Seen:
    """Texts met so far, by hash: up to `HASHES_IN_MEMORY`, then in a database that SQLite keeps on disk and deletes."""

    def __init__(self) -> None:
        self.recent: set[bytes] = set()
        self.older: sqlite3.Connection | None = None

    def add(self, digest: str) -> bool:
        """Whether it is new."""
        key = bytes.fromhex(digest)
        if key in self.recent or (self.older and self.older.execute("SELECT 1 FROM seen WHERE key = ?", [key]).fetchone()):
            return False
        self.recent.add(key)
        if len(self.recent) == HASHES_IN_MEMORY:
            if self.older is None:
                self.older = sqlite3.connect("", check_same_thread=False)  # a generator may end in another thread
                self.older.execute("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")
            self.older.executemany("INSERT INTO seen VALUES (?)", ([key] for key in sorted(self.recent)))
            self.older.commit()
            self.recent.clear()
        return True


def text_fingerprint(text: Text, split: str) -> str:
    """Identifies the documents that `documents(text, split)` yields, for cache keys. [64 hex digits]

    Packaged: version and selection. Local: every file's content. Hub: the commit. Reading the commit needs
    the hub: raises `UserError` if it is out of reach, as `documents` would.
    """
    data: Any
    local = None if text.dataset == PACKAGED else _local_path(text.dataset)
    if text.dataset == PACKAGED:
        data = [packaged_version(), PACKAGED_SOURCES, MIN_CHARACTERS, MAX_CHARACTERS]
    elif local is not None:
        data = [local_fingerprint(local), text.column_name]
    else:
        data = [hub_revision(text.dataset), text.column_name]
    return fingerprint(
        {
            "dataset": text.dataset,
            "data": data,
            "split": split,
            "shares": SHARES,
            "held_out": [text.held_out_characters, *DEFINITION],
            **({} if text.roles is None else {"roles": sorted(text.roles)}),
            **({"passes": text.training_passes} if split == TRAINING and text.training_passes > 1 else {}),
        }
    )


def _raw_documents(text: Text, reader: Reader | None) -> Iterator[tuple[Content, str]]:
    """(content, source) of every candidate document, duplicates included, empty ones left out."""
    if text.dataset == PACKAGED:
        if text.roles is not None:
            raise UserError("text.roles: the packaged text holds no conversations; name a text.dataset that does, or null")
        return ((Content(content), source) for content, source in _packaged_documents())
    local = _local_path(text.dataset)
    cells = _hub_cells(text) if local is None else _local_cells(local, text.column_name)
    rows = (
        (Content(as_text(value, where)) if reader is None else reader.read(value, where), source)
        for value, where, source in cells
    )
    return ((content, source) for content, source in rows if content.compared.strip())


def _local_path(dataset: str) -> Path | None:
    """The local file or folder, None for a hub name. Raises `UserError` for a path that leads nowhere."""
    local = find_local(dataset)
    if local is None and looks_local(dataset):
        raise UserError(f"text.dataset {dataset}: no such file or folder")
    return local


# --- packaged --------------------------------------------------------------------------------


def _packaged_documents() -> Iterator[tuple[str, str]]:
    """The packaged sources in turn, until the last is used up."""
    speakers = [(source, iter(source_texts(source))) for source in PACKAGED_SOURCES]
    for turn in count():
        if not speakers:
            return
        for speaker in [speaker for speaker in speakers if turn % speaker[0].every == 0]:
            content = next(speaker[1], None)
            if content is None:
                speakers.remove(speaker)
            else:
                yield content, speaker[0].name


def source_texts(source: PackagedSource) -> list[str]:
    """The source's texts that are long enough, mixed: in the order of a hash that the split does not use."""
    frames = (read_packaged(name) for name in source.files)
    kept = (
        frame["prompt"] if source.target is None else frame["prompt"][frame["target"] == source.target] for frame in frames
    )
    texts = {content for content in chain.from_iterable(kept) if len(content) >= MIN_CHARACTERS}
    return sorted(texts, key=_mixing_key)[: source.limit]


def _mixing_key(content: str) -> bytes:
    # not text_hash: normalising 60 million characters before the first document would take seconds
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


# --- local and hub ---------------------------------------------------------------------------


def _local_cells(path: Path, column: str) -> Iterator[tuple[Any, str, str]]:
    """(value, where it stands, source) of every row."""
    root = path if path.is_dir() else path.parent
    for file in local_files(path):
        for (value,) in read_rows(file, [column]):
            yield value, f"{file}, column {column!r}", file.relative_to(root).as_posix()


def _hub_cells(text: Text) -> Iterator[tuple[Any, str, str]]:
    for row in stream_rows(text.dataset):
        check_columns(f"hub data set {text.dataset!r}", [text.column_name], list(row))
        value = row[text.column_name]
        if value is not None:
            yield value, f"hub data set {text.dataset!r}, column {text.column_name!r}", text.dataset


MAX_GB = 1.0
"""Size limit of the folder; the packaged text's index has 4 MB."""
_CODES, _BOUNDS = "codes.npy", "bounds.npy"


def held_out_index(text_fingerprint: str, texts: Iterable[str], kept: Callable[[], bool]) -> NearIndex:
    """The index of held-out texts; `texts` is read only where the cache does not hold it.

    text_fingerprint: of the data that `texts` comes from. kept: whether that alone says what the texts are, so that the
    index may be cached; asked once they are read. Raises `UserError` where the cache cannot be written.
    """
    folder = cache_dir("held_out")
    entry = folder / fingerprint([text_fingerprint, sources_fingerprint(__name__)])[:32]
    if usable(entry):
        return NearIndex(ShingleSets(np.load(entry / _CODES), np.load(entry / _BOUNDS)))
    sets = shingle_sets(texts)
    if kept():
        with new_entry(entry) as temporary:
            np.save(temporary / _CODES, sets.codes)
            np.save(temporary / _BOUNDS, sets.bounds)
        prune(folder, MAX_GB, keep=[entry])
    return NearIndex(sets)
