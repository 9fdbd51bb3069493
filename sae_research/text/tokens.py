"""Documents packed into token contexts of one length, each token knowing its document.

Long runs keep their contexts in a file under `.cache/tokens/`, of which only what is asked for is in memory.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sae_research.config.params import Text
from sae_research.runtime.cache import cache_dir, damage, new_entry, prune, remove_unheld, usable
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint
from sae_research.runtime.sources import sources_fingerprint
from sae_research.text.chat import Ranges, Reader
from sae_research.text.corpus import TRAINING, Document, Documents, documents
from sae_research.text.local import listed

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SENTENCEPIECE_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def token_strings(tokenizer: PreTrainedTokenizerBase, n: int | None = None) -> list[str]:
    """The text of ids 0 to n - 1 (default: the whole vocabulary), leading spaces kept; ids without a token are empty.

    A token that is part of a character only, and so no text of its own, shows as the tokenizer's name for it.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    texts = tokenizer.batch_decode([[i] for i in range(len(pieces))], clean_up_tokenization_spaces=False)
    shown = [_shown(piece or "", text) for piece, text in zip(pieces, texts, strict=True)]
    n = len(shown) if n is None else n
    return (shown + [""] * (n - len(shown)))[:n]


def _shown(piece: str, text: str) -> str:
    if _SENTENCEPIECE_SPACE in piece:  # a decoder drops the space that leads a text
        return piece.replace(_SENTENCEPIECE_SPACE, " ")
    return piece if _REPLACEMENT in text else text


TOKENIZER_BATCH = 64
"""Documents per tokenizer call: enough for a fast tokenizer to use its threads, few enough to stay lazy."""
SEPARATOR_DOC = -1
FEW_DOCUMENTS = 20
"""With fewer in a split it is chance whether each split gets any."""


class TextRunsOut(UserError):
    """A split holds fewer tokens than were asked for."""


class Contexts(NamedTuple):
    """Packed tokens. `doc_ids` holds indices into `documents` and `sources`, -1 at separators."""

    tokens: torch.Tensor
    """int64 [n, context_size]"""
    doc_ids: torch.Tensor
    """int32 [n, context_size]"""
    documents: list[str]
    """`Document.doc_id` by index"""
    sources: list[str]
    """`Document.source` by index"""
    counted: torch.Tensor | None = None
    """Where tokens of `text.roles` stand, bool [n, context_size]; None where all count"""


class _Stream(NamedTuple):
    """Tokens one after another [n]: ids, indices of documents, and which are of messages that count."""

    tokens: np.ndarray
    docs: np.ndarray
    counted: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[_Stream]) -> _Stream:
        empty = cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool))
        return cls(*(np.concatenate(column) for column in zip(empty, *parts, strict=True)))

    def cut(self, start: int, end: int | None) -> _Stream:
        return _Stream(*(column[start:end] for column in self))


def token_contexts(tokenizer: PreTrainedTokenizerBase, separator_id: int, text: Text, split: str, n_tokens: int) -> Contexts:
    """At least `n_tokens` tokens of one split, in contexts of `text.context_size`, separators included.

    The documents' tokens form one stream with `separator_id` between documents; each context is one separator
    and the next `context_size - 1` tokens of the stream. Raises `TextRunsOut` when the text does, with how
    many tokens there were, and whatever `corpus.documents` raises.
    """
    n_contexts, size = -(-n_tokens // text.context_size), text.context_size - 1
    texts = documents(text, split, Reader(tokenizer, text.roles))
    stream, used = _token_stream(tokenizer, separator_id, texts, n_contexts * size)
    if len(stream.tokens) < n_contexts * size:
        raise _runs_out(texts, n_tokens, len(stream.tokens), len(used))
    _check_roles(texts)
    return _contexts(stream, used, separator_id, size, text.roles is not None)


def reorder_evenly(contexts: Contexts, n: int) -> Contexts:
    """The same contexts in another order: first `n` that are spread evenly over the text, then the others.

    Contexts that follow one another are often of one document; what is costly is better measured on many documents.
    """
    chosen = np.linspace(0, len(contexts.tokens) - 1, n).round().astype(int)
    order = np.concatenate([chosen, np.setdiff1d(np.arange(len(contexts.tokens)), chosen)])
    counted = None if contexts.counted is None else contexts.counted[order]
    return contexts._replace(tokens=contexts.tokens[order], doc_ids=contexts.doc_ids[order], counted=counted)


def context_chunks(
    tokenizer: PreTrainedTokenizerBase,
    separator_id: int,
    text: Text,
    split: str,
    n_tokens: int,
    chunk_contexts: int,
    keep_names: bool = True,
) -> Iterator[Contexts]:
    """The contexts of `token_contexts`, `chunk_contexts` at a time, with memory that does not grow with `n_tokens`.

    `doc_ids` count through the whole stream; `documents` and `sources` list those met so far, which alone grows: with
    `keep_names` false they stay empty. Raises `TextRunsOut` when the text does, once all of it was handed out.
    """
    size, wanted, made, met = text.context_size - 1, -(-n_tokens // text.context_size), 0, 0
    names: list[str] = []
    sources: list[str] = []
    texts = documents(text, split, Reader(tokenizer, text.roles))
    held = _Stream.joined([])
    while made < wanted:
        rows = min(chunk_contexts, wanted - made)
        parts = [held]
        missing = rows * size - len(held.tokens)
        while missing > 0 and (batch := list(islice(texts, TOKENIZER_BATCH))):
            for part in _encoded(tokenizer, separator_id, batch, met):
                parts.append(part)
                missing -= len(part.tokens)
            met += len(batch)
            if keep_names:
                names += [document.doc_id for document in batch]
                sources += [document.source for document in batch]
        if len(parts) > 1:
            held = _Stream.joined(parts)
        whole = min(len(held.tokens) // size, rows)
        if not made:
            _check_roles(texts)
        if whole:
            cut = whole * size
            yield _packed(held.cut(0, cut), separator_id, size, text.roles is not None, names, sources)
            held = held.cut(cut, None)
            made += whole
        if whole < rows:
            raise _runs_out(texts, n_tokens, made * size + len(held.tokens), met)


def pack_documents(
    tokenizer: PreTrainedTokenizerBase, separator_id: int, texts: Iterator[Document], context_size: int, n_contexts: int
) -> Contexts:
    """Contexts of the documents' tokens: `n_contexts`, or as many whole ones as the documents fill."""
    size = context_size - 1
    return _contexts(*_token_stream(tokenizer, separator_id, texts, n_contexts * size), separator_id, size, False)


def _contexts(stream: _Stream, used: list[Document], separator_id: int, size: int, by_role: bool) -> Contexts:
    """Whole contexts of a stream; what is left over falls away."""
    whole = stream.cut(0, len(stream.tokens) // size * size)
    names, sources = [document.doc_id for document in used], [document.source for document in used]
    return _packed(whole, separator_id, size, by_role, names, sources)


def _packed(stream: _Stream, separator_id: int, size: int, by_role: bool, names: list[str], sources: list[str]) -> Contexts:
    tokens, docs = _pack(stream.tokens, separator_id, size), _pack(stream.docs, SEPARATOR_DOC, size).int()
    return Contexts(tokens, docs, names, sources, _pack(stream.counted, False, size) if by_role else None)


def _check_roles(texts: Documents) -> None:
    """Raises `UserError` where none of `text.roles` occurs in what was read; says once of one among several."""
    wanted, text = texts.text.roles or [], texts.text
    missing = [role for role in wanted if role not in texts.roles]
    if missing:
        line = f"text.roles: no message of {listed(missing)} in text.dataset {text.dataset}"
        if len(missing) == len(wanted):
            raise UserError(f"{line}; the roles there are {listed(sorted(texts.roles), 20)}")
        _say(f"{line} as far as it was read")


@cache
def _say(line: str) -> None:
    """Once a process: a corpus is read several times."""
    print(line, file=sys.stderr, flush=True)


def _runs_out(texts: Documents, wanted: int, found: int, n_documents: int) -> TextRunsOut:
    """What there is (`found` tokens of the stream), and which of the causes to mend."""
    text, size = texts.text, texts.text.context_size - 1
    whole = found // size * text.context_size
    ends = (
        f"text.dataset {text.dataset}: the split {texts.split} ends after {whole:,} of {wanted:,} tokens "
        f"({whole / wanted:.1%}, {n_documents:,} documents{texts.why_no_more()})"
    )
    if n_documents < FEW_DOCUMENTS:
        return TextRunsOut(
            f"{ends}; every document stands in one split as a whole: give more documents, long ones cut into "
            "many rows or files"
        )
    if not whole:
        return TextRunsOut(
            f"{ends}: its {found:,} tokens do not fill one context; lower text.context_size "
            f"({text.context_size:,}) or give more text"
        )
    again = f", or raise text.training_passes ({text.training_passes})" if texts.split == TRAINING else ""
    return TextRunsOut(f"{ends}; ask for fewer tokens or give more text{again}")


def _token_stream(
    tokenizer: PreTrainedTokenizerBase, separator_id: int, texts: Iterator[Document], length: int
) -> tuple[_Stream, list[Document]]:
    """The first `length` tokens of the stream (fewer if it ends), and the documents."""
    parts: list[_Stream] = []
    used: list[Document] = []
    total = 0
    while batch := list(islice(texts, TOKENIZER_BATCH)):
        for document, part in zip(batch, _encoded(tokenizer, separator_id, batch, len(used)), strict=True):
            parts.append(part)
            used.append(document)
            total += len(part.tokens)
            if total >= length:
                return _Stream.joined(parts).cut(0, length), used
    return _Stream.joined(parts), used


def _encoded(tokenizer: PreTrainedTokenizerBase, separator_id: int, batch: list[Document], first: int) -> Iterator[_Stream]:
    """The tokens of documents numbered from `first` on, each but document 0 led by a separator."""
    by_role = any(document.counted is not None for document in batch)
    if by_role and not tokenizer.is_fast:
        raise UserError(f"text.roles: {type(tokenizer).__name__} does not say where in a text its tokens stand; set null")
    encoded = tokenizer(
        [document.text for document in batch],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=by_role,
        verbose=False,
    )
    places: list[Any] = encoded["offset_mapping"] if by_role else [()] * len(batch)
    for number, (document, ids, where) in enumerate(zip(batch, encoded["input_ids"], places, strict=True), first):
        counted = np.ones(len(ids), bool) if document.counted is None else _inside(where, document.counted)
        own = 1 if document.said is not None and ids[:1] == [separator_id] else 0  # a template's own BOS is the separator
        lead = [separator_id] if number else []
        docs = np.full(len(lead) + len(ids) - own, number, np.int64)
        docs[: len(lead)] = SEPARATOR_DOC
        yield _Stream(
            np.asarray([*lead, *ids[own:]], np.int64), docs, np.concatenate([np.zeros(len(lead), bool), counted[own:]])
        )


def _inside(places: Sequence[tuple[int, int]], ranges: Ranges) -> np.ndarray:
    """Which tokens, standing at characters `places` [n], lie inside one of the ranges with all they hold. bool [n]"""
    at = np.asarray(places, np.int64).reshape(-1, 2)
    bounds = np.asarray(ranges, np.int64).reshape(-1, 2)
    if not len(bounds):
        return np.zeros(len(at), bool)
    last = np.searchsorted(bounds[:, 0], at[:, 0], side="right") - 1
    return (last >= 0) & (at[:, 1] <= bounds[last, 1]) & (at[:, 1] > at[:, 0])


def _pack(stream: np.ndarray, first: int, size: int) -> torch.Tensor:
    """[n * size] -> [n, size + 1], with `first` in front of every row."""
    rows = stream.reshape(len(stream) // size, size)
    return torch.from_numpy(np.concatenate([np.full((len(rows), 1), first, stream.dtype), rows], axis=1))


IN_MEMORY_TOKENS = 2**20
"""Longer texts go to a file."""
CHUNK_TOKENS = 2**16
"""Tokens made, written or hashed at a time."""
_ID = np.dtype("<i4")
_BOOL = np.dtype(bool)
_FILE, _COUNTED_FILE = "tokens.int32", "counted.bool"


class StoredContexts:
    """The first `n` contexts [n, context_size] of token ids in a file, or of which count, for whoever reads a tensor of them
    in slices: `shape`, `len`, `numel()` and `contexts[start:end]`, an int64 or bool tensor. Every slice is read afresh; what
    was read of a mapped file would stay resident."""

    def __init__(self, path: Path, n: int, context_size: int, stored: np.dtype = _ID) -> None:
        self.path, self.stored = path, stored
        self._file = path.open("rb", buffering=0)  # can be read on when the cache drops the file
        self.shape = torch.Size([n, context_size])
        self._stored, self._given = stored, np.dtype(np.int64) if stored == _ID else stored

    def __len__(self) -> int:
        return self.shape[0]

    def numel(self) -> int:
        return self.shape.numel()

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError("stored contexts are read in slices of neighbours")
        row_bytes = self.shape[1] * self._stored.itemsize
        wanted, read = max(0, stop - start) * row_bytes, bytearray()
        while len(read) < wanted:
            part = os.pread(self._file.fileno(), wanted - len(read), start * row_bytes + len(read))
            if not part:
                raise UserError(f"{self._file.name} is shorter than it was when it was opened; start again")
            read += part
        return torch.from_numpy(np.frombuffer(read, self._stored).astype(self._given).reshape(-1, self.shape[1]))


class LongContexts(NamedTuple):
    """Contexts of one split, in memory or in files."""

    tokens: torch.Tensor | StoredContexts
    """Ids [n, context_size]"""
    counted: torch.Tensor | StoredContexts | None = None
    """As `Contexts.counted`"""


def contexts_sha256(contexts: torch.Tensor | StoredContexts) -> str:
    """SHA-256 of the ids as int64, the same for a tensor and a file, without a copy of them all. [64 hex digits]"""
    digest = hashlib.sha256()
    rows = max(1, CHUNK_TOKENS // contexts.shape[1])
    for start in range(0, len(contexts), rows):
        digest.update(contexts[start : start + rows].reshape(-1).numpy())
    return digest.hexdigest()


def long_contexts(
    tokenizer: PreTrainedTokenizerBase,
    separator_id: int,
    text: Text,
    split: str,
    n_tokens: int,
    text_fingerprint: str,
    max_gb: float,
) -> LongContexts:
    """The contexts of `token_contexts`, in memory that does not grow with `n_tokens`: above `IN_MEMORY_TOKENS` they
    are written to `.cache/tokens/` bit by bit. Later calls read that file, also those that want fewer of them.

    text_fingerprint: of `corpus.text_fingerprint`. max_gb: size limit of the folder; the least recently used go first.
    Raises as `token_contexts` does, and `OSError` on a full disk.
    """
    if n_tokens <= IN_MEMORY_TOKENS:
        contexts = token_contexts(tokenizer, separator_id, text, split, n_tokens)
        return LongContexts(contexts.tokens, contexts.counted)
    folder, n = cache_dir("tokens"), -(-n_tokens // text.context_size)
    key = fingerprint(
        [
            text_fingerprint,
            text.context_size,
            separator_id,
            _identity(tokenizer),
            sources_fingerprint("sae_research.text.tokens"),
        ]
    )[:32]
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob(f"{key}-*")}
    files = {_FILE: _ID} if text.roles is None else {_FILE: _ID, _COUNTED_FILE: _BOOL}

    def stored(entry: Path) -> LongContexts:
        return LongContexts(*(StoredContexts(entry / name, n, text.context_size, kind) for name, kind in files.items()))

    for longer in sorted(found):
        sizes = {name: longer * text.context_size * kind.itemsize for name, kind in files.items()}
        if longer >= n and usable(found[longer], sizes):
            return stored(found[longer])
    entry, rows = folder / f"{key}-{n}", max(1, CHUNK_TOKENS // text.context_size)
    with new_entry(entry) as temporary:
        _write(
            temporary,
            context_chunks(tokenizer, separator_id, text, split, n_tokens, rows, keep_names=False),
            n_tokens,
        )
    for length, other in found.items():
        if length < n or damage(other) is not None:
            remove_unheld(other)
    prune(folder, max_gb, keep=[entry])
    return stored(entry)


def _write(folder: Path, chunks: Iterable[Contexts], n_tokens: int) -> None:
    """Write the files of an entry with a progress bar."""
    with (
        ExitStack() as stack,
        tqdm(desc="tokens", total=n_tokens, unit="tok", unit_scale=True, mininterval=1, dynamic_ncols=True) as bar,
    ):
        files: dict[str, IO[bytes]] = {}
        for chunk in chunks:
            columns = {_FILE: chunk.tokens.numpy().astype(_ID)}
            if chunk.counted is not None:
                columns[_COUNTED_FILE] = chunk.counted.numpy()
            for name, column in columns.items():
                file = files.get(name) or files.setdefault(name, stack.enter_context((folder / name).open("wb")))
                file.write(column)
            bar.update(chunk.tokens.numel())
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What decides which ids a tokenizer makes of a text or a conversation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    template = getattr(tokenizer, "chat_template", None)
    return [type(tokenizer).__name__, template, tokenizer.get_vocab() if backend is None else backend.to_str()]
