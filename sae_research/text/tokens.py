"""Documents packed into token contexts of one length, each token knowing its document.

Long runs keep their contexts in a file under `.cache/tokens/`, of which only what is asked for is in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sae_research.config.params import Text
from sae_research.runtime.cache import cache_dir, damage, new_entry, prune, remove_unheld, usable
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint
from sae_research.runtime.sources import sources_fingerprint
from sae_research.text.corpus import Decode, Document, Documents, documents

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


def token_contexts(tokenizer: PreTrainedTokenizerBase, separator_id: int, text: Text, split: str, n_tokens: int) -> Contexts:
    """At least `n_tokens` tokens of one split, in contexts of `text.context_size`, separators included.

    The documents' tokens form one stream with `separator_id` between documents; each context is one separator
    and the next `context_size - 1` tokens of the stream. Raises `TextRunsOut` when the text does, with how
    many tokens there were, and whatever `corpus.documents` raises.
    """
    n_contexts, size = -(-n_tokens // text.context_size), text.context_size - 1
    texts = documents(text, split, decoder(tokenizer))
    tokens, docs, used = _token_stream(tokenizer, separator_id, texts, n_contexts * size)
    if len(tokens) < n_contexts * size:
        raise _runs_out(texts, n_tokens, len(tokens), len(used))
    return _contexts(tokens, docs, used, separator_id, size)


def reorder_evenly(contexts: Contexts, n: int) -> Contexts:
    """The same contexts in another order: first `n` that are spread evenly over the text, then the others.

    Contexts that follow one another are often of one document; what is costly is better measured on many documents.
    """
    chosen = np.linspace(0, len(contexts.tokens) - 1, n).round().astype(int)
    order = np.concatenate([chosen, np.setdiff1d(np.arange(len(contexts.tokens)), chosen)])
    return contexts._replace(tokens=contexts.tokens[order], doc_ids=contexts.doc_ids[order])


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
    texts = documents(text, split, decoder(tokenizer))
    held_tokens, held_docs = np.empty(0, np.int64), np.empty(0, np.int64)
    while made < wanted:
        rows = min(chunk_contexts, wanted - made)
        parts = [(held_tokens, held_docs)]
        missing = rows * size - len(held_tokens)
        while missing > 0 and (batch := list(islice(texts, TOKENIZER_BATCH))):
            for part in _encoded(tokenizer, separator_id, batch, met):
                parts.append(part)
                missing -= len(part[0])
            met += len(batch)
            if keep_names:
                names += [document.doc_id for document in batch]
                sources += [document.source for document in batch]
        if len(parts) > 1:
            held_tokens, held_docs = (np.concatenate(column) for column in zip(*parts, strict=True))
        whole = min(len(held_tokens) // size, rows)
        if whole:
            cut = whole * size
            yield Contexts(
                _pack(held_tokens[:cut], separator_id, size),
                _pack(held_docs[:cut], SEPARATOR_DOC, size).int(),
                names,
                sources,
            )
            held_tokens, held_docs = held_tokens[cut:], held_docs[cut:]
            made += whole
        if whole < rows:
            raise _runs_out(texts, n_tokens, made * size + len(held_tokens), met)


def decoder(tokenizer: Any) -> Decode:
    """What makes text of a tokenised data set's rows; separators and other special tokens are left out."""
    size = len(tokenizer)

    def decode(ids: list[int]) -> str:
        if ids and not (min(ids) >= 0 and max(ids) < size):
            raise ValueError(f"ids {min(ids)} to {max(ids)}, the vocabulary has {size}")
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return decode


def pack_documents(
    tokenizer: PreTrainedTokenizerBase, separator_id: int, texts: Iterator[Document], context_size: int, n_contexts: int
) -> Contexts:
    """Contexts of the documents' tokens: `n_contexts`, or as many whole ones as the documents fill."""
    size = context_size - 1
    return _contexts(*_token_stream(tokenizer, separator_id, texts, n_contexts * size), separator_id, size)


def _contexts(tokens: np.ndarray, docs: np.ndarray, used: list[Document], separator_id: int, size: int) -> Contexts:
    """Whole contexts of a stream; what is left over falls away."""
    whole = len(tokens) // size * size
    return Contexts(
        _pack(tokens[:whole], separator_id, size),
        _pack(docs[:whole], SEPARATOR_DOC, size).int(),
        [document.doc_id for document in used],
        [document.source for document in used],
    )


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
    return TextRunsOut(f"{ends}; ask for fewer tokens or give more text")


def _token_stream(
    tokenizer: PreTrainedTokenizerBase, separator_id: int, texts: Iterator[Document], length: int
) -> tuple[np.ndarray, np.ndarray, list[Document]]:
    """The first `length` tokens of the stream (fewer if it ends), their document indices, the documents."""
    tokens: list[np.ndarray] = []
    docs: list[np.ndarray] = []
    used: list[Document] = []
    total = 0
    while batch := list(islice(texts, TOKENIZER_BATCH)):
        for document, (ids, ids_of_docs) in zip(batch, _encoded(tokenizer, separator_id, batch, len(used)), strict=True):
            tokens.append(ids)
            docs.append(ids_of_docs)
            used.append(document)
            total += len(ids)
            if total >= length:
                return np.concatenate(tokens)[:length], np.concatenate(docs)[:length], used
    empty = np.empty(0, np.int64)
    return np.concatenate([empty, *tokens]), np.concatenate([empty, *docs]), used


def _encoded(
    tokenizer: PreTrainedTokenizerBase, separator_id: int, batch: list[Document], first: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, document indices) of documents numbered from `first` on, each but document 0 led by a separator."""
    encoded = tokenizer(
        [document.text for document in batch], add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    for number, ids in enumerate(encoded, first):
        lead = [separator_id] if number else []
        docs = np.full(len(lead) + len(ids), number, np.int64)
        docs[: len(lead)] = SEPARATOR_DOC
        yield np.asarray([*lead, *ids], np.int64), docs


def _pack(stream: np.ndarray, first: int, size: int) -> torch.Tensor:
    """[n * size] -> [n, size + 1], with `first` in front of every row."""
    rows = stream.reshape(len(stream) // size, size)
    return torch.from_numpy(np.concatenate([np.full((len(rows), 1), first, np.int64), rows], axis=1))


IN_MEMORY_TOKENS = 2**20
"""Longer texts go to a file."""
CHUNK_TOKENS = 2**16
"""Tokens made, written or hashed at a time."""
_ID = np.dtype("<i4")
_FILE = "tokens.int32"


class StoredContexts:
    """The first `n` contexts [n, context_size] of token ids in a file, for whoever reads a tensor of them in slices:
    `shape`, `len`, `numel()` and `contexts[start:end]`, an int64 tensor. Every slice is read afresh; what was read of a
    mapped file would stay resident."""

    def __init__(self, path: Path, n: int, context_size: int) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)  # can be read on when the cache drops the file
        self.shape = torch.Size([n, context_size])

    def __len__(self) -> int:
        return self.shape[0]

    def numel(self) -> int:
        return self.shape.numel()

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError("stored contexts are read in slices of neighbours")
        row_bytes = self.shape[1] * _ID.itemsize
        wanted, read = max(0, stop - start) * row_bytes, bytearray()
        while len(read) < wanted:
            part = os.pread(self._file.fileno(), wanted - len(read), start * row_bytes + len(read))
            if not part:
                raise UserError(f"{self._file.name} is shorter than it was when it was opened; start again")
            read += part
        return torch.from_numpy(np.frombuffer(read, _ID).astype(np.int64).reshape(-1, self.shape[1]))


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
) -> torch.Tensor | StoredContexts:
    """The tokens of `stream.token_contexts`, in memory that does not grow with `n_tokens`: above `IN_MEMORY_TOKENS` they
    are written to `.cache/tokens/` bit by bit. Later calls read that file, also those that want fewer of them.

    text_fingerprint: of `corpus.text_fingerprint`. max_gb: size limit of the folder; the least recently used go first.
    Raises as `token_contexts` does, and `OSError` on a full disk.
    """
    if n_tokens <= IN_MEMORY_TOKENS:
        return token_contexts(tokenizer, separator_id, text, split, n_tokens).tokens
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
    row_bytes = text.context_size * _ID.itemsize
    for longer in sorted(found):
        if longer >= n and usable(found[longer], {_FILE: longer * row_bytes}):
            return StoredContexts(found[longer] / _FILE, n, text.context_size)
    entry, rows = folder / f"{key}-{n}", max(1, CHUNK_TOKENS // text.context_size)
    with new_entry(entry) as temporary:
        _write(
            temporary / _FILE,
            context_chunks(tokenizer, separator_id, text, split, n_tokens, rows, keep_names=False),
            n_tokens,
        )
    for length, other in found.items():
        if length < n or damage(other) is not None:
            remove_unheld(other)
    prune(folder, max_gb, keep=[entry])
    return StoredContexts(entry / _FILE, n, text.context_size)


def _write(path: Path, chunks: Iterable[Contexts], n_tokens: int) -> None:
    """Write a file with a progress bar."""
    with (
        path.open("wb") as file,
        tqdm(desc="tokens", total=n_tokens, unit="tok", unit_scale=True, mininterval=1, dynamic_ncols=True) as bar,
    ):
        for chunk in chunks:
            file.write(chunk.tokens.numpy().astype(_ID))
            bar.update(chunk.tokens.numel())
        file.flush()
        os.fsync(file.fileno())


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What decides which ids a tokenizer makes of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return [type(tokenizer).__name__, tokenizer.get_vocab() if backend is None else backend.to_str()]
