"""The text both models read, batch by batch: the same ids, or each tokenizer's own with tokens matched by their place.

Everything is generated as it is needed: nothing here grows with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.config.params import Text
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.text.chat import Reader
from sae_research.text.corpus import Document, documents

SPLIT = "core_eval"
HEAD_DOCUMENTS = 512
"""Documents of a source that stay in memory: about 200,000 tokens of the packaged text."""
MAX_STRETCH = 4
"""With tokenizers of their own, the other model's window may be this many times as long in tokens; beyond it is cut."""


class Side(NamedTuple):
    """What one model reads."""

    tokens: Tensor
    """Ids [batch, seq], padded on the right."""
    real: Tensor
    """True where a token is no padding [batch, seq]."""


class PairBatch(NamedTuple):
    """The same text for both models."""

    base: Side
    finetuned: Side
    pairs: tuple[Tensor, Tensor]
    """Flat positions in `base` and `finetuned` of tokens that stand for the same piece of text [n], [n]."""
    text_bytes: Tensor | None
    """UTF-8 bytes of each row's text [batch], with tokenizers of their own."""
    n_tokens: int
    """Base tokens, without padding."""

    @property
    def sides(self) -> dict[str, Side]:
        return {"base": self.base, "finetuned": self.finetuned}


class TextSource(NamedTuple):
    """Where text comes from and how it is cut."""

    text: Text
    split: str
    own: bool
    """Each model its own tokenizer."""
    kind: str | None = None
    """Documents of this source alone."""


def batches(
    base: LanguageModel, finetuned: LanguageModel, source: TextSource, n_tokens: int, batch_size: int
) -> Iterator[PairBatch]:
    """Batches of contexts until `n_tokens` base tokens are read. Raises `UserError` when the text runs out before."""
    texts = documents_of(source, base.tokenizer)
    rows: Iterator[Any] = (
        windows(base, finetuned, texts, source.text.context_size)
        if source.own
        else contexts(base.tokenizer, base.separator_id, texts, source.text.context_size)
    )
    make = _own_batch if source.own else _shared_batch
    read = 0
    while read < n_tokens:
        size = min(batch_size, -(-(n_tokens - read) // source.text.context_size))
        chunk = list(islice(rows, size))
        if not chunk:
            raise UserError(
                f"transfer: {source.text.dataset} ends after {read:,} of {n_tokens:,} tokens of the split "
                f"{source.split}; ask for fewer tokens or give more text"
            )
        batch = make(base, finetuned, chunk)
        read += batch.n_tokens
        yield batch


def token_bar(total: int, label: str | None) -> tqdm:
    """A progress bar over `total` tokens; none is shown without a label."""
    return tqdm(
        total=total, desc=label, unit="tok", unit_scale=True, disable=label is None, mininterval=2, dynamic_ncols=True
    )


def documents_of(source: TextSource, tokenizer: Any) -> Iterator[Document]:
    """The source's documents: the first from memory, for opening the packaged text takes seconds and several passes read
    little of it. tokenizer: what a tokenised data set was made with."""
    parts = source.text, source.split, source.kind, tokenizer
    head = _head(*parts)
    yield from head
    if len(head) == HEAD_DOCUMENTS:
        yield from islice(_stream(*parts), HEAD_DOCUMENTS, None)


@lru_cache(maxsize=4)
def _head(text: Text, split: str, kind: str | None, tokenizer: Any) -> tuple[Document, ...]:
    return tuple(islice(_stream(text, split, kind, tokenizer), HEAD_DOCUMENTS))


def _stream(text: Text, split: str, kind: str | None, tokenizer: Any) -> Iterator[Document]:
    return (document for document in documents(text, split, Reader(tokenizer)) if kind is None or document.source == kind)


# --- one tokenizer for both ------------------------------------------------------------------


def contexts(tokenizer: Any, separator_id: int, texts: Iterable[Document], size: int) -> Iterator[list[int]]:
    """Contexts of `size` ids as `text.stream.token_contexts` packs them, one at a time."""
    held: list[int] = []
    first = True
    for document in texts:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        if document.said is not None and ids[:1] == [separator_id]:  # a chat template's own BOS
            ids = ids[1:]
        held += ids if first else [separator_id, *ids]
        first = False
        start = 0
        while len(held) - start >= size - 1:
            yield [separator_id, *held[start : start + size - 1]]
            start += size - 1
        held = held[start:]


def _shared_batch(base: LanguageModel, finetuned: LanguageModel, rows: list[list[int]]) -> PairBatch:
    tokens = torch.tensor(rows, device=base.device)
    if int(tokens.max()) >= finetuned.vocab_size:
        raise UserError(
            f"transfer: the base tokenizer makes the id {int(tokens.max())}, {finetuned.name} has embeddings "
            f"for {finetuned.vocab_size}; use transfer.tokenize: own"
        )
    side = Side(tokens, torch.ones_like(tokens, dtype=torch.bool))
    every = torch.arange(tokens.numel(), device=tokens.device)
    return PairBatch(side, side, (every, every), None, tokens.numel())


# --- each its own ----------------------------------------------------------------------------


class Window(NamedTuple):
    """A piece of a document, cut by both tokenizers."""

    ids: tuple[list[int], list[int]]
    spans: tuple[list[tuple[int, int]], list[tuple[int, int]]]
    """Each token's characters (first, one past last), outer white space left out."""
    n_bytes: int


def windows(base: LanguageModel, finetuned: LanguageModel, texts: Iterable[Document], size: int) -> Iterator[Window]:
    """Pieces of documents of at most `size - 1` base tokens, in both tokenizers' ids."""
    for document in texts:
        offsets = _encode(base.tokenizer, document.text)[1]
        for start in range(0, len(offsets), size - 1):
            part = offsets[start : start + size - 1]
            piece = document.text[part[0][0] : part[-1][1]]
            found = [_encode(lm.tokenizer, piece) for lm in (base, finetuned)]
            if not piece.strip() or not all(ids for ids, _ in found):
                continue
            yield Window(
                (found[0][0], found[1][0]), (_trimmed(found[0][1], piece), _trimmed(found[1][1], piece)), len(piece.encode())
            )


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} does not tell where its tokens stand in the text, which "
            "transfer.tokenize: own needs; use a fast tokenizer"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def _trimmed(spans: list[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    """Spans without white space at either end: tokenizers differ in whose a space is."""
    found = []
    for start, end in spans:
        word = text[start:end]
        inner = word.strip()
        lead = len(word) - len(word.lstrip())
        found.append((start + lead, start + lead + len(inner)) if inner else (start, end))
    return found


def align(spans: tuple[list[tuple[int, int]], list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """(index in the first, index in the second) of tokens that cover the same characters, each used once.

    A character cut into several byte tokens gives them all its span: the last of them pairs, for only that one has read it
    whole.
    """
    last = [{span: index for index, span in enumerate(side) if span[1] > span[0]} for side in spans]
    return [(index, last[1][span]) for span, index in last[0].items() if span in last[1]]


def _own_batch(base: LanguageModel, finetuned: LanguageModel, rows: list[Window]) -> PairBatch:
    sides = []
    for which, lm in enumerate((base, finetuned)):
        longest = max(len(row.ids[0]) for row in rows) * (1 if which == 0 else MAX_STRETCH)
        limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or longest + 1
        ids = [[lm.separator_id, *row.ids[which][: min(longest, limit - 1)]] for row in rows]
        width = max(len(row) for row in ids)
        tokens = torch.tensor([row + [lm.separator_id] * (width - len(row)) for row in ids], device=lm.device)
        real = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in ids], device=lm.device)
        sides.append(Side(tokens, real))
    widths = [side.tokens.shape[1] for side in sides]
    kept = [side.real.sum(1).tolist() for side in sides]
    index = [
        (number * widths[0] + one + 1, number * widths[1] + other + 1)
        for number, row in enumerate(rows)
        for one, other in align(row.spans)
        if one + 1 < kept[0][number] and other + 1 < kept[1][number]
    ]
    pairs = torch.tensor(index, dtype=torch.long).reshape(-1, 2)
    # a row that had to be cut gives no bits per byte
    whole = [
        len(row.ids[0]) + 1 == kept[0][number] and len(row.ids[1]) + 1 == kept[1][number] for number, row in enumerate(rows)
    ]
    n_bytes = torch.tensor([row.n_bytes if complete else 0 for row, complete in zip(rows, whole, strict=True)])
    return PairBatch(
        sides[0], sides[1], (pairs[:, 0].to(base.device), pairs[:, 1].to(base.device)), n_bytes, int(sides[0].real.sum())
    )
