"""The words' activations at one hook, and every SAE's latents at the words: one encode per word and SAE.

What a token-level encoder sees is the word's token alone. A sequence-level encoder sees the whole prompt, under the
lab's token mask (no separator, no first position, no sinks), and its latents at the word are taken. The word itself
always counts, whatever its norm: it is what is asked about. SAE Bench 0.6.0 hands every encoder the bare vector of the
word, so for sequence-level encoders it has no definition of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from tqdm import tqdm

from sae_research.evals.absorption.words import Words
from sae_research.evals.pool import HookActivations
from sae_research.lm import ActivationPool, Batch, LanguageModel, collect, token_mask
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder, encode_each

_BATCH_ELEMENTS = 16_000_000
"""Largest [words, seq, d_sae] block of latents held at a time (64 MB in float32)."""
_TAILS = 4
"""Prompts without their openings are short: this many times the model's batch run together."""


class _Prompts(NamedTuple):
    """Whole prompts of one opening."""

    index: Tensor
    tokens: Tensor
    real: Tensor
    acts: Tensor
    at: Tensor
    """Position of each word [batch]."""


class WordActivations:
    """Activations at `hook` of the words in their prompts."""

    def __init__(self, lm: LanguageModel, hook: str, words: Words, params: Params) -> None:
        self.lm, self.hook, self.words, self.params = lm, hook, words, params

    @cached_property
    def vectors(self) -> Tensor:
        """Activation of every word's last token [words, d_in], float32 on the CPU. What follows it does not run."""
        up_to = [tail[:at + 1] for tail, at in zip(self.words.tails, self.words.positions, strict=True)]
        found = self._run(up_to)
        return found.flat[found.offsets[1:] - 1].float()

    @cached_property
    def openings(self) -> HookActivations:
        return HookActivations(self.lm, self.hook, self.words.openings.tokens, self.params)

    @cached_property
    def tails(self) -> ActivationPool:
        """Activations of what follows the openings, whole."""
        return self._run(self.words.tails)

    def _run(self, tails: Sequence[Tensor]) -> ActivationPool:
        return collect(self.lm, self.hook, tails, self.params.model.llm_batch_size * _TAILS,
                       self.params.activation_caching, "words", self.words.openings)

    def latents(self, saes: dict[str, SparseAutoencoder]) -> dict[str, sparse.csr_matrix]:
        """Latents at the words, float32 [words, d_sae], of SAEs of one family, which encode together."""
        size = max(1, _BATCH_ELEMENTS // max(sae.cfg.d_sae for sae in saes.values()))
        encoded = self._token_level(saes, size) if all(s.per_token for s in saes.values()) else self._whole(saes, size)
        parts: dict[str, list[Any]] = {name: [] for name in saes}
        order = []
        for index, latents in tqdm(encoded, "encode", unit="batch", leave=False, disable=None, dynamic_ncols=True):
            order.append(index)
            for name, z in latents:
                parts[name].append(sparse.csr_matrix(z.float().cpu().numpy()))
        back = np.argsort(np.concatenate(order))
        return {name: sparse.vstack(rows, format="csr")[back] for name, rows in parts.items()}

    def _token_level(self, saes: dict[str, SparseAutoencoder],
                     size: int) -> Iterator[tuple[np.ndarray, Iterator[tuple[str, Tensor]]]]:
        for index in torch.arange(len(self.vectors)).split(size):
            x = self.vectors[index][:, None].to(self.lm.device)
            yield index.numpy(), ((name, z[:, 0]) for name, z in encode_each(saes, x, None))

    def _whole(self, saes: dict[str, SparseAutoencoder],
               size: int) -> Iterator[tuple[np.ndarray, Iterator[tuple[str, Tensor]]]]:
        longest = max(map(len, self.words.openings.tokens)) + max(map(len, self.words.tails))
        for batch in self._prompts(max(1, min(size // longest, self.params.model.llm_batch_size * _TAILS))):
            mask = batch.real & token_mask(self.lm, batch.tokens, batch.acts, self.params.token_mask,
                                           self.openings.median_norm)
            rows = torch.arange(len(batch.at), device=mask.device)
            mask[rows, batch.at] = True
            yield batch.index.numpy(), ((name, z[rows, batch.at]) for name, z in encode_each(saes, batch.acts, mask))

    def _prompts(self, batch_size: int) -> Iterator[_Prompts]:
        of = np.asarray(self.words.openings.of)
        for number in range(len(self.openings)):
            head = self.openings.pool.batch([number])
            for tail in self.tails.batches(batch_size, np.flatnonzero(of == number).tolist()):
                yield _joined(head, tail, torch.from_numpy(self.words.positions))


def _joined(head: Batch, tail: Batch, positions: Tensor) -> _Prompts:
    """One opening in front of every tail."""
    def join(one: Tensor, many: Tensor) -> Tensor:
        return torch.cat([one.expand(len(many), *one.shape[1:]), many], dim=1)

    at = head.tokens.shape[1] + positions[tail.index].to(tail.tokens.device)
    return _Prompts(tail.index, join(head.tokens, tail.tokens), join(head.real, tail.real), join(head.acts, tail.acts), at)
