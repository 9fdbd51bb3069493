"""Documents packed into token contexts of one length, each token knowing its document."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from sae_research.errors import UserError
from sae_research.params import Text
from sae_research.text.corpus import Decode, Document, Documents, documents

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


def token_contexts(tokenizer: PreTrainedTokenizerBase, separator_id: int, text: Text, split: str,
                   n_tokens: int) -> Contexts:
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


def spread(contexts: Contexts, n: int) -> Contexts:
    """The same contexts in another order: first `n` that are spread evenly over the text, then the others.

    Contexts that follow one another are often of one document; what is costly is better measured on many documents.
    """
    chosen = np.linspace(0, len(contexts.tokens) - 1, n).round().astype(int)
    order = np.concatenate([chosen, np.setdiff1d(np.arange(len(contexts.tokens)), chosen)])
    return contexts._replace(tokens=contexts.tokens[order], doc_ids=contexts.doc_ids[order])


def context_chunks(tokenizer: PreTrainedTokenizerBase, separator_id: int, text: Text, split: str, n_tokens: int,
                   chunk_contexts: int, keep_names: bool = True) -> Iterator[Contexts]:
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
            yield Contexts(_pack(held_tokens[:cut], separator_id, size),
                           _pack(held_docs[:cut], SEPARATOR_DOC, size).int(), names, sources)
            held_tokens, held_docs = held_tokens[cut:], held_docs[cut:]
            made += whole
        if whole < rows:
            raise _runs_out(texts, n_tokens, made * size + len(held_tokens), met)


def decoder(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """What makes text of a tokenised data set's rows; separators and other special tokens are left out."""
    size = len(tokenizer)

    def decode(ids: list[int]) -> str:
        if ids and not (min(ids) >= 0 and max(ids) < size):
            raise ValueError(f"ids {min(ids)} to {max(ids)}, the vocabulary has {size}")
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return decode


def pack_documents(tokenizer: PreTrainedTokenizerBase, separator_id: int, texts: Iterator[Document], context_size: int,
                   n_contexts: int) -> Contexts:
    """Contexts of the documents' tokens: `n_contexts`, or as many whole ones as the documents fill."""
    size = context_size - 1
    return _contexts(*_token_stream(tokenizer, separator_id, texts, n_contexts * size), separator_id, size)


def _contexts(tokens: np.ndarray, docs: np.ndarray, used: list[Document], separator_id: int, size: int) -> Contexts:
    """Whole contexts of a stream; what is left over falls away."""
    whole = len(tokens) // size * size
    return Contexts(_pack(tokens[:whole], separator_id, size), _pack(docs[:whole], SEPARATOR_DOC, size).int(),
                    [document.doc_id for document in used], [document.source for document in used])


def _runs_out(texts: Documents, wanted: int, found: int, n_documents: int) -> TextRunsOut:
    """What there is (`found` tokens of the stream), and which of the causes to mend."""
    text, size = texts.text, texts.text.context_size - 1
    whole = found // size * text.context_size
    ends = (f"text.dataset {text.dataset}: the split {texts.split} ends after {whole:,} of {wanted:,} tokens "
            f"({whole / wanted:.1%}, {n_documents:,} documents{texts.why_no_more()})")
    if n_documents < FEW_DOCUMENTS:
        return TextRunsOut(f"{ends}; every document stands in one split as a whole: give more documents, long ones cut into "
                           "many rows or files")
    if not whole:
        return TextRunsOut(f"{ends}: its {found:,} tokens do not fill one context; lower text.context_size "
                           f"({text.context_size:,}) or give more text")
    return TextRunsOut(f"{ends}; ask for fewer tokens or give more text")


def _token_stream(tokenizer: PreTrainedTokenizerBase, separator_id: int, texts: Iterator[Document],
                  length: int) -> tuple[np.ndarray, np.ndarray, list[Document]]:
    """The first `length` tokens of the stream (fewer if it ends), their document indices, the documents."""
    tokens: list[np.ndarray] = []
    docs: list[np.ndarray] = []
    used: list[Document] = []
    total = 0
    while batch := list(islice(texts, TOKENIZER_BATCH)):
        for document, (ids, ids_of_docs) in zip(
                batch, _encoded(tokenizer, separator_id, batch, len(used)), strict=True):
            tokens.append(ids)
            docs.append(ids_of_docs)
            used.append(document)
            total += len(ids)
            if total >= length:
                return np.concatenate(tokens)[:length], np.concatenate(docs)[:length], used
    empty = np.empty(0, np.int64)
    return np.concatenate([empty, *tokens]), np.concatenate([empty, *docs]), used


def _encoded(tokenizer: PreTrainedTokenizerBase, separator_id: int, batch: list[Document],
             first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, document indices) of documents numbered from `first` on, each but document 0 led by a separator."""
    encoded = tokenizer([document.text for document in batch], add_special_tokens=False,
                        return_attention_mask=False, verbose=False)["input_ids"]
    for number, ids in enumerate(encoded, first):
        lead = [separator_id] if number else []
        docs = np.full(len(lead) + len(ids), number, np.int64)
        docs[:len(lead)] = SEPARATOR_DOC
        yield np.asarray([*lead, *ids], np.int64), docs


def _pack(stream: np.ndarray, first: int, size: int) -> torch.Tensor:
    """[n * size] -> [n, size + 1], with `first` in front of every row."""
    rows = stream.reshape(len(stream) // size, size)
    return torch.from_numpy(np.concatenate([np.full((len(rows), 1), first, np.int64), rows], axis=1))
