"""Token contexts of long runs: in a file under `.cache/tokens/`, of which only what is asked for is in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sae_research.cached_files import damage, new_entry, usable
from sae_research.errors import UserError
from sae_research.params import Text
from sae_research.sources import sources_fingerprint
from sae_research.store import fingerprint
from sae_research.store_cache import cache_dir, prune, remove_unheld
from sae_research.text.stream import Contexts, context_chunks, token_contexts

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
        digest.update(contexts[start:start + rows].reshape(-1).numpy())
    return digest.hexdigest()


def long_contexts(tokenizer: PreTrainedTokenizerBase, separator_id: int, text: Text, split: str, n_tokens: int,
                  text_fingerprint: str, max_gb: float) -> torch.Tensor | StoredContexts:
    """The tokens of `stream.token_contexts`, in memory that does not grow with `n_tokens`: above `IN_MEMORY_TOKENS` they
    are written to `.cache/tokens/` bit by bit. Later calls read that file, also those that want fewer of them.

    text_fingerprint: of `corpus.text_fingerprint`. max_gb: size limit of the folder; the least recently used go first.
    Raises as `token_contexts` does, and `OSError` on a full disk.
    """
    if n_tokens <= IN_MEMORY_TOKENS:
        return token_contexts(tokenizer, separator_id, text, split, n_tokens).tokens
    folder, n = cache_dir("tokens"), -(-n_tokens // text.context_size)
    key = fingerprint([text_fingerprint, text.context_size, separator_id, _identity(tokenizer),
                       sources_fingerprint("sae_research.text.stream")])[:32]
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob(f"{key}-*")}
    row_bytes = text.context_size * _ID.itemsize
    for longer in sorted(found):
        if longer >= n and usable(found[longer], {_FILE: longer * row_bytes}):
            return StoredContexts(found[longer] / _FILE, n, text.context_size)
    entry, rows = folder / f"{key}-{n}", max(1, CHUNK_TOKENS // text.context_size)
    with new_entry(entry) as temporary:
        _write(temporary / _FILE, context_chunks(tokenizer, separator_id, text, split, n_tokens, rows, keep_names=False),
               n_tokens)
    for length, other in found.items():
        if length < n or damage(other) is not None:
            remove_unheld(other)
    prune(folder, max_gb, keep=[entry])
    return StoredContexts(entry / _FILE, n, text.context_size)


def _write(path: Path, chunks: Iterable[Contexts], n_tokens: int) -> None:
    """Write a file with a progress bar."""
    with path.open("wb") as file, tqdm(desc="tokens", total=n_tokens, unit="tok", unit_scale=True, mininterval=1,
                                       dynamic_ncols=True) as bar:
        for chunk in chunks:
            file.write(chunk.tokens.numpy().astype(_ID))
            bar.update(chunk.tokens.numel())
        file.flush()
        os.fsync(file.fileno())


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What decides which ids a tokenizer makes of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return [type(tokenizer).__name__, tokenizer.get_vocab() if backend is None else backend.to_str()]
