"""Activations of many sequences at one hook: computed once, kept in a memory-mapped cache, shared by every SAE."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.lm.continuation import Openings, continued
from sae_research.lm.model import LanguageModel
from sae_research.params import ActivationCaching
from sae_research.store import cache_dir, fingerprint, keep_first, prune, write_json

_FILE = "activations.bin"


class Batch(NamedTuple):
    """Some sequences, padded on the right."""

    index: Tensor
    """Which sequences [batch]."""
    tokens: Tensor
    """Ids [batch, seq]; padding holds the separator's id."""
    real: Tensor
    """True where a token is no padding [batch, seq]."""
    acts: Tensor
    """Activations [batch, seq, d_in] in the model's units, float32; zero at padding."""


class ActivationPool:
    """Activations of sequences of any lengths, stored end to end.

    `flat` [total tokens, d_in] may be memory-mapped: it does not count against memory until it is read.
    """

    def __init__(self, sequences: Sequence[Tensor], flat: Tensor, pad_id: int, device: torch.device) -> None:
        self.sequences, self.flat, self.pad_id, self.device = sequences, flat, pad_id, device
        lengths = torch.tensor([len(s) for s in sequences])
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])

    def __len__(self) -> int:
        return len(self.sequences)

    def batch(self, index: Sequence[int]) -> Batch:
        """The sequences `index`, padded to the longest of them, on the model's device."""
        longest = max(len(self.sequences[i]) for i in index)
        tokens = torch.full((len(index), longest), self.pad_id)
        real = torch.zeros(len(index), longest, dtype=torch.bool)
        acts = torch.zeros(len(index), longest, self.flat.shape[1])
        for row, i in enumerate(index):
            length = len(self.sequences[i])
            tokens[row, :length] = self.sequences[i]
            real[row, :length] = True
            acts[row, :length] = self.flat[self.offsets[i]:self.offsets[i + 1]].float()
        to = self.device
        return Batch(torch.tensor(list(index)), tokens.to(to), real.to(to), acts.to(to))

    def batches(self, batch_size: int, index: Sequence[int] | None = None) -> Iterator[Batch]:
        """All sequences (or those of `index`), of like length together so that little is padding."""
        chosen = range(len(self)) if index is None else index
        ordered = sorted(chosen, key=lambda i: (len(self.sequences[i]), i))
        for start in range(0, len(ordered), batch_size):
            yield self.batch(ordered[start:start + batch_size])


def collect(lm: LanguageModel, hook: str, sequences: Sequence[Tensor] | Tensor, batch_size: int,
            caching: ActivationCaching, progress: str | None = None, openings: Openings | None = None) -> ActivationPool:
    """Run the model up to `hook` over all sequences (1-D tensors of ids, or one [n, seq] tensor), or read the cache.

    Kept under `.cache/activations/`, in the model's precision, by the content of model, hook and tokens.
    `progress` names a progress bar. With `openings` the sequences continue those, which run once each; the pool holds
    the sequences' own tokens only. Raises `UserError` for a hook the model lacks.
    """
    rows = [row.to("cpu") for row in sequences]
    d_in, total = lm.d_in(hook), sum(len(row) for row in rows)
    key = fingerprint([lm.fingerprint, hook, str(lm.dtype), lm.device.type, torch.__version__,
                       fingerprint([row.tolist() for row in rows]),
                       *([] if openings is None else [[row.tolist() for row in openings.tokens], list(openings.of)])])[:32]
    if not caching.enabled:
        flat = torch.empty(total, d_in, dtype=lm.dtype)
        _fill(lm, hook, rows, batch_size, flat, progress, openings)
        return ActivationPool(rows, flat, lm.separator_id, lm.device)
    root = cache_dir("activations")
    folder = root / key
    if folder.is_dir():
        (folder / _FILE).touch()  # the most recently used stay when the cache is pruned
    else:
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{key}."))
        try:
            flat = _mapped(temporary / _FILE, total, d_in, lm.dtype, "w+")
            _fill(lm, hook, rows, batch_size, flat, progress, openings)
            write_json(temporary / "about.json", {"model": lm.name, "hook": hook, "tokens": total, "d_in": d_in})
            del flat
            keep_first(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        prune(root, caching.max_gb, keep=[folder])
    return ActivationPool(rows, _mapped(folder / _FILE, total, d_in, lm.dtype, "r+"), lm.separator_id, lm.device)


def _mapped(path: Path, total: int, d_in: int, dtype: torch.dtype, mode: str) -> Tensor:
    """A tensor over a file. numpy knows no bfloat16, so 16-bit types travel as integers."""
    plain = np.float32 if dtype == torch.float32 else np.int16
    mapped = np.memmap(path, dtype=plain, mode=mode, shape=(total, d_in))
    tensor = torch.from_numpy(mapped)
    return tensor if dtype == torch.float32 else tensor.view(dtype)


def _fill(lm: LanguageModel, hook: str, rows: Sequence[Tensor], batch_size: int, flat: Tensor,
          progress: str | None, openings: Openings | None) -> None:
    """Compute activations into `flat`."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    batches = (_plain(lm, hook, rows, batch_size) if openings is None
               else continued(lm, hook, rows, openings, batch_size))
    with tqdm(total=int(offsets[-1]), desc=progress, unit="tok", unit_scale=True, disable=progress is None,
              mininterval=2, dynamic_ncols=True) as bar:
        for chosen, acts in batches:
            acts = acts.to("cpu")
            for row, i in enumerate(chosen):
                flat[offsets[i]:offsets[i + 1]] = acts[row, :len(rows[i])]
            bar.update(sum(len(rows[i]) for i in chosen))


def _plain(lm: LanguageModel, hook: str, rows: Sequence[Tensor], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """(which rows, their activations [batch, seq, d_in]), rows of like length together."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        tokens = torch.nn.utils.rnn.pad_sequence([rows[i] for i in chosen], batch_first=True,
                                                 padding_value=lm.separator_id)
        yield chosen, lm.activations(tokens.to(lm.device), hook)
