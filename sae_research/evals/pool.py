"""Activations of token sequences at one hook, and which tokens count: what every evaluation on text starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

from torch import Tensor
from tqdm import tqdm

from sae_research.lm.mask import median_activation_norm, sae_bench_mask, token_mask
from sae_research.lm.model import LanguageModel
from sae_research.lm.pool import ActivationPool, Batch, collect
from sae_research.params import Params

SAMPLE = 64
"""Sequences that the median norm is measured on."""


class HookActivations:
    """Sequences, their activations at `hook`, and both definitions' masks.

    tokens: 1-D tensors of ids, or one [n, seq] tensor. The outlier rule compares with one median norm for all
    sequences, so that no mask depends on how sequences are batched.
    """

    def __init__(self, lm: LanguageModel, hook: str, tokens: Sequence[Tensor] | Tensor, params: Params) -> None:
        self.lm, self.hook, self.tokens, self.params = lm, hook, tokens, params

    @cached_property
    def pool(self) -> ActivationPool:
        """Made, or read and checked, when the first asks: where every result is kept nobody does."""
        return collect(self.lm, self.hook, self.tokens, self.params.model.llm_batch_size, self.params.activation_caching,
                       "activations")

    @cached_property
    def median_norm(self) -> float:
        """Over the first sequences' ordinary tokens."""
        sample = self.pool.batch(range(min(len(self), SAMPLE)))
        return median_activation_norm(self.lm, sample.tokens, sample.acts)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def d_in(self) -> int:
        return self.lm.d_in(self.hook)

    def lab_mask(self, batch: Batch) -> Tensor:
        """Tokens that count in our definitions. bool [batch, seq]"""
        return token_mask(self.lm, batch.tokens, batch.acts, self.params.token_mask, self.median_norm) & batch.real

    def sae_bench_mask(self, batch: Batch) -> Tensor:
        """Tokens that SAE Bench counts: all but BOS, EOS and padding. bool [batch, seq]"""
        return sae_bench_mask(self.lm, batch.tokens) & batch.real

    def batches(self) -> Iterator[Batch]:
        """All sequences, of like length together; on a terminal a passing bar shows how far one SAE or family is."""
        size = self.params.model.llm_batch_size
        return iter(tqdm(self.pool.batches(size), "encode", -(-len(self) // size), unit="batch", leave=False, disable=None,
                         dynamic_ncols=True))
