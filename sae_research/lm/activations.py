"""Activations of many sequences at hooks: computed once, kept in a memory-mapped cache, shared by every SAE.

`collect_hooks` fills pools for several hooks in one pass. Sequences that open alike run their opening through the model
once. `HookActivations` adds which tokens count.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.config.params import ActivationCaching, Params
from sae_research.lm.mask import median_activation_norm, sae_bench_mask, token_mask
from sae_research.lm.model import LanguageModel
from sae_research.runtime.cache import cache_dir, new_entry, prune, usable
from sae_research.runtime.files import fingerprint, user_path, write_json
from sae_research.runtime.sources import sources_fingerprint

if TYPE_CHECKING:
    from transformers import DynamicCache


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
        self.lengths = torch.tensor([len(s) for s in sequences], dtype=torch.long)
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.long), self.lengths.cumsum(0)])

    def __len__(self) -> int:
        return len(self.sequences)

    @cached_property
    def ids(self) -> Tensor:
        """All sequences' ids end to end [total tokens]."""
        return torch.cat([*self.sequences]) if len(self) else torch.zeros(0, dtype=torch.long)

    def batch(self, index: Sequence[int]) -> Batch:
        """The sequences `index`, padded to the longest of them, on the model's device."""
        chosen = torch.tensor(list(index))
        lengths, longest = self.lengths[chosen], int(self.lengths[chosen].max())
        real = torch.arange(longest) < lengths[:, None]
        # one look-up of all rows; padding reads any row, and is overwritten
        places = torch.where(real, self.offsets[chosen][:, None] + torch.arange(longest), 0).flatten()
        acts = self._moved(self.flat, places).float()
        tokens, real = self._moved(self.ids, places), self._sent(real.flatten())
        if not bool((lengths == longest).all()):
            acts.masked_fill_(~real[:, None], 0.0)
            tokens = tokens.masked_fill(~real, self.pad_id)
        shape = (len(chosen), longest)
        return Batch(chosen, tokens.view(shape), real.view(shape), acts.view(*shape, self.flat.shape[1]))

    def _moved(self, rows: Tensor, places: Tensor) -> Tensor:
        """Some rows on the model's device. For CUDA they are collected in pinned memory, from where the copy goes on while
        the computer does."""
        if self.device.type != "cuda" or rows.is_cuda:
            return rows.index_select(0, places.to(rows.device)).to(self.device)
        pinned = torch.empty(len(places), *rows.shape[1:], dtype=rows.dtype, pin_memory=True)
        return torch.index_select(rows, 0, places, out=pinned).to(self.device, non_blocking=True)

    def _sent(self, values: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return values.to(self.device)
        return values.pin_memory().to(self.device, non_blocking=True)

    def batches(self, batch_size: int, index: Sequence[int] | None = None) -> Iterator[Batch]:
        """All sequences (or those of `index`), of like length together so that little is padding."""
        chosen = range(len(self)) if index is None else index
        ordered = sorted(chosen, key=lambda i: (len(self.sequences[i]), i))
        for start in range(0, len(ordered), batch_size):
            yield self.batch(ordered[start : start + batch_size])


def collect(
    lm: LanguageModel,
    hook: str,
    sequences: Sequence[Tensor] | Tensor,
    batch_size: int,
    caching: ActivationCaching,
    progress: str | None = None,
    prefixes: SharedPrefixes | None = None,
) -> ActivationPool:
    """Run the model up to `hook` over all sequences (1-D tensors of ids, or one [n, seq] tensor), or read the cache.

    Kept under `.cache/activations/`, in the model's precision, by the content of model, hook and tokens.
    `progress` names a progress bar. With `prefixes` the sequences continue those, which run once each; the pool holds
    the sequences' own tokens only. Raises `UserError` for a hook the model lacks.
    """
    return collect_hooks(lm, [hook], sequences, batch_size, caching, progress, prefixes)[hook]


def collect_hooks(
    lm: LanguageModel,
    hooks: Sequence[str],
    sequences: Sequence[Tensor] | Tensor,
    batch_size: int,
    caching: ActivationCaching,
    progress: str | None = None,
    prefixes: SharedPrefixes | None = None,
    shards: Path | None = None,
    on_device: bool = False,
) -> dict[str, ActivationPool]:
    """As `collect`, at several hooks: one pass of the model for all whose activations are not in the cache.

    A hook's entry is the one that `collect` makes and reads. With `prefixes` the model runs once for each hook. Entries in
    the folders of `activation_caching.shards` are read too. shards: a folder to write to in place of the cache. on_device:
    where they are not cached, activations stay where the model is.
    """
    rows = [row.to("cpu") for row in sequences]
    widths, total = {hook: lm.d_in(hook) for hook in hooks}, sum(len(row) for row in rows)

    def pools(flats: dict[str, Tensor]) -> dict[str, ActivationPool]:
        return {hook: ActivationPool(rows, flat, lm.separator_id, lm.device) for hook, flat in flats.items()}

    if not caching.enabled:
        place = lm.device if on_device else "cpu"
        flats = {hook: torch.empty(total, width, dtype=lm.dtype, device=place) for hook, width in widths.items()}
        _fill(lm, rows, batch_size, flats, progress, prefixes)
        return pools(flats)
    root = shards or cache_dir("activations")
    names = entry_names(lm, hooks, rows, prefixes)
    width_bytes = torch.empty(0, dtype=lm.dtype).element_size()
    with ExitStack() as stack:
        folders, temporaries = {}, {}
        for hook, name in names.items():
            lengths = {_FILE: total * widths[hook] * width_bytes}
            places = [root / name, *(user_path(folder) / name for folder in caching.shards)]
            found = next((place for place in places if usable(place, lengths)), None)
            folders[hook] = found or places[0]
            if found is None:
                temporaries[hook] = stack.enter_context(new_entry(places[0]))
        flats = {
            hook: _mapped(temporary / _FILE, total, widths[hook], lm.dtype, "w+") for hook, temporary in temporaries.items()
        }
        _fill(lm, rows, batch_size, flats, progress, prefixes)
        for hook, temporary in temporaries.items():
            write_json(temporary / "about.json", {"model": lm.name, "hook": hook, "tokens": total, "d_in": widths[hook]})
        flats.clear()
    if temporaries and shards is None:
        prune(root, caching.max_gb, keep=list(folders.values()))
    # copy on write: files are opened for reading alone, and no tensor over one can change it
    return pools({hook: _mapped(folder / _FILE, total, widths[hook], lm.dtype, "c") for hook, folder in folders.items()})


def entry_names(
    lm: LanguageModel, hooks: Sequence[str], rows: Sequence[Tensor], prefixes: SharedPrefixes | None = None
) -> dict[str, str]:
    """By hook the name of these sequences' entry: of model, hook, precision, kind of device, code and tokens."""
    about_rows = fingerprint([row.tolist() for row in rows])
    return {
        hook: fingerprint(
            [
                lm.fingerprint,
                hook,
                str(lm.dtype),
                lm.device.type,
                sources_fingerprint(__name__),
                about_rows,
                *([] if prefixes is None else [[row.tolist() for row in prefixes.tokens], list(prefixes.of)]),
            ]
        )[:32]
        for hook in hooks
    }


def _mapped(path: Path, total: int, d_in: int, dtype: torch.dtype, mode: Literal["c", "w+"]) -> Tensor:
    """A tensor over a file. numpy knows no bfloat16, so 16-bit types travel as integers."""
    plain = np.float32 if dtype == torch.float32 else np.int16
    mapped = np.memmap(path, dtype=plain, mode=mode, shape=(total, d_in))
    if mode == "w+" and hasattr(os, "posix_fallocate"):
        with path.open("r+b") as handle:  # a disk that fills up while a map is written ends the process without a word
            os.posix_fallocate(handle.fileno(), 0, max(1, mapped.nbytes))
    tensor = torch.from_numpy(mapped)
    return tensor if dtype == torch.float32 else tensor.view(dtype)


def _fill(
    lm: LanguageModel,
    rows: Sequence[Tensor],
    batch_size: int,
    flats: dict[str, Tensor],
    progress: str | None,
    prefixes: SharedPrefixes | None,
) -> None:
    """Compute activations into the tensors `flats`, by hook."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    if not flats:
        return
    passes = (
        [_plain(lm, list(flats), rows, batch_size)]
        if prefixes is None
        else [_continued(lm, hook, rows, batch_size, prefixes) for hook in flats]
    )
    with tqdm(
        total=int(offsets[-1]) * len(passes),
        desc=progress,
        unit="tok",
        unit_scale=True,
        disable=progress is None,
        mininterval=2,
        dynamic_ncols=True,
    ) as bar:
        for chosen, found in itertools.chain.from_iterable(passes):
            for hook, acts in found.items():
                there = acts.to(flats[hook].device)
                in_order = chosen == list(range(chosen[0], chosen[-1] + 1))
                if in_order and all(len(rows[i]) == there.shape[1] for i in chosen):
                    flats[hook][offsets[chosen[0]] : offsets[chosen[-1] + 1]] = there.flatten(0, 1)
                    continue
                for row, i in enumerate(chosen):
                    flats[hook][offsets[i] : offsets[i + 1]] = there[row, : len(rows[i])]
            bar.update(sum(len(rows[i]) for i in chosen))


def _plain(
    lm: LanguageModel, hooks: Sequence[str], rows: Sequence[Tensor], batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """(which rows, their activations [batch, seq, d_in] by hook), rows of like length together."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        tokens = torch.nn.utils.rnn.pad_sequence(
            [rows[i] for i in chosen], batch_first=True, padding_value=lm.separator_id
        ).to(lm.device)
        if len(hooks) == 1:
            yield chosen, {hooks[0]: lm.activations(tokens, hooks[0])}
        else:
            yield chosen, lm.activations_at(tokens, hooks)


def _continued(
    lm: LanguageModel, hook: str, rows: Sequence[Tensor], batch_size: int, prefixes: SharedPrefixes
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    for chosen, acts in continued(lm, hook, rows, prefixes, batch_size):
        yield chosen, {hook: acts}


_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference between continuing and a whole run that counts as rounding."""


class SharedPrefixes(NamedTuple):
    """What sequences continue."""

    tokens: Sequence[Tensor]
    """The prefixes, 1-D tensors of ids."""
    of: Sequence[int]
    """Which prefix each sequence continues."""


def continued(
    lm: LanguageModel, hook: str, rows: Sequence[Tensor], prefixes: SharedPrefixes, batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """(which rows, activations at `hook` [batch, seq, d_in] of their own tokens, padded on the right) until all ran.

    Sequences of one prefix reuse its keys and values; attention is causal, so this is what a whole run gives. That
    is checked on the first sequence: an architecture that cannot continue runs whole sequences instead.
    """
    if not rows:
        return
    resumable = _can_continue(lm, hook, prefixes.tokens[prefixes.of[0]], rows[0])
    for number, prefix in enumerate(prefixes.tokens):
        members = sorted((i for i in range(len(rows)) if prefixes.of[i] == number), key=lambda i: (len(rows[i]), i))
        past = _read(lm, hook, prefix) if members and resumable else None
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            tails = torch.nn.utils.rnn.pad_sequence(
                [rows[i] for i in chosen], batch_first=True, padding_value=lm.separator_id
            )
            yield chosen, _continue(lm, hook, past, tails) if past is not None else _whole(lm, hook, prefix, tails)


def _read(lm: LanguageModel, hook: str, prefix: Tensor) -> DynamicCache:
    from transformers import DynamicCache

    past = DynamicCache(config=lm.model.config.get_text_config())
    lm.activations(prefix[None].to(lm.device), hook, past)
    return past


def _continue(lm: LanguageModel, hook: str, past: DynamicCache, tails: Tensor) -> Tensor:
    own = copy.deepcopy(past)  # a run adds to its cache
    own.batch_repeat_interleave(len(tails))
    return lm.activations(tails.to(lm.device), hook, own)


def _whole(lm: LanguageModel, hook: str, prefix: Tensor, tails: Tensor) -> Tensor:
    tokens = torch.cat([prefix.expand(len(tails), -1), tails], dim=1)
    return lm.activations(tokens.to(lm.device), hook)[:, len(prefix) :]


def _can_continue(lm: LanguageModel, hook: str, prefix: Tensor, tail: Tensor) -> bool:
    try:
        got = _continue(lm, hook, _read(lm, hook, prefix), tail[None]).float()
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        print(
            f"{lm.name} cannot continue a sequence from its keys and values ({type(error).__name__}): "
            "whole sequences run instead, which takes longer",
            flush=True,
        )
        return False
    want = _whole(lm, hook, prefix, tail[None]).float()
    return bool((got - want).norm() <= _TOLERANCE[lm.dtype] * want.norm())


SAMPLE = 64
"""Sequences that the median norm is measured on."""


class HookActivations:
    """Sequences, their activations at `hook`, and both definitions' masks.

    tokens: 1-D tensors of ids, or one [n, seq] tensor. counted: of the latter, where tokens of `text.roles` stand, bool
    [n, seq]; None: everywhere. The outlier rule compares with one median norm for all sequences, so that no mask depends on
    how sequences are batched.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hook: str,
        tokens: Sequence[Tensor] | Tensor,
        params: Params,
        counted: Tensor | None = None,
    ) -> None:
        self.lm, self.hook, self.tokens, self.params, self.counted = lm, hook, tokens, params, counted

    @cached_property
    def pool(self) -> ActivationPool:
        """Made, or read and checked, when the first asks: where every result is kept nobody does."""
        return collect(
            self.lm, self.hook, self.tokens, self.params.model.llm_batch_size, self.params.activation_caching, "activations"
        )

    @cached_property
    def median_norm(self) -> float:
        """Over the first sequences' ordinary tokens."""
        sample = self.pool.batch(range(min(len(self), SAMPLE)))
        return median_activation_norm(self.lm, sample.tokens, sample.acts, self._counted(sample))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def d_in(self) -> int:
        return self.lm.d_in(self.hook)

    def lab_mask(self, batch: Batch) -> Tensor:
        """Tokens that count in our definitions. bool [batch, seq]"""
        rule, counted = self.params.token_mask, self._counted(batch)
        return token_mask(self.lm, batch.tokens, batch.acts, rule, self.median_norm, counted) & batch.real

    def sae_bench_mask(self, batch: Batch) -> Tensor:
        """Tokens that SAE Bench counts: all but BOS, EOS and padding. bool [batch, seq]"""
        return sae_bench_mask(self.lm, batch.tokens, self._counted(batch)) & batch.real

    def _counted(self, batch: Batch) -> Tensor | None:
        return None if self.counted is None else self.counted[batch.index]

    def batches(self) -> Iterator[Batch]:
        """All sequences, of like length together; on a terminal a passing bar shows how far one SAE or family is."""
        size = self.params.model.llm_batch_size
        return iter(
            tqdm(
                self.pool.batches(size),
                "encode",
                -(-len(self) // size),
                unit="batch",
                leave=False,
                disable=None,
                dynamic_ncols=True,
            )
        )
