"""What dictionaries read and what their reconstructions stand for, on the same sequences from one pass of the model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sae_research.config.params import Params
from sae_research.config.recipes import PLUS
from sae_research.lm.activations import ActivationPool, HookActivations, collect_hooks
from sae_research.lm.model import LanguageModel


class PairedBatch(NamedTuple):
    """Some sequences, padded on the right."""

    index: Tensor
    """Which sequences [batch]."""
    tokens: Tensor
    """Ids [batch, seq]."""
    acts: Tensor
    """What is read [batch, seq, d_in], in the model's units, float32."""
    written: Tensor
    """What a reconstruction stands for [batch, seq, d_out]; `acts` itself where the hooks are one."""
    rest: Tensor | None
    """What the stream holds beside `written`, for `LanguageModel.resume`; None where it is not wanted."""
    lab_mask: Tensor
    """Tokens that count in our definitions, bool [batch, seq]."""
    sae_bench_mask: Tensor
    """Tokens that SAE Bench counts, bool [batch, seq]."""


class PairedActivations(HookActivations):
    """Activations at `hook`, which is read, and at `hook_out`, which is written; the two may be one. A crosscoder's `hook`
    is `A + B`, and so is its `hook_out`: its activations are those of all, side by side. A cross-layer transcoder's
    `hook_out` is `C + D`.

    In our definitions a token counts where at no hook it is an outlier by its norm: what is read after a norm has none.
    Other arguments as for `HookActivations`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hook: str,
        hook_out: str,
        tokens: Sequence[Tensor] | Tensor,
        params: Params,
        counted: Tensor | None = None,
    ) -> None:
        super().__init__(lm, hook, tokens, params, counted)
        self.hook_out = hook_out
        self.hooks = hook.split(PLUS)
        """What is read."""
        self.hooks_out = hook_out.split(PLUS)
        """What is written."""
        several = len(self.hooks) > 1
        every = dict.fromkeys([*self.hooks, *self.hooks_out]) if several else []
        self._sides = {one: HookActivations(lm, one, tokens, params, counted) for one in every}
        self.written = self if several or hook_out == hook else HookActivations(lm, hook_out, tokens, params, counted)
        self._stream = None if self.written is self or not lm.can_resume else lm.added_to(hook_out)

    @cached_property
    def pool(self) -> ActivationPool:
        return self._pools[self.hook]

    def shown(self, index: Sequence[int], resumed: bool = False) -> PairedBatch:
        """The sequences `index`. resumed: the model is to resume from them, so that `rest` is wanted."""
        if self._sides:
            return self._side_by_side(index)
        batch = self.pool.batch(index)
        lab, bench = self.lab_mask(batch), self.sae_bench_mask(batch)
        if self.written is self:
            return PairedBatch(batch.index, batch.tokens, batch.acts, batch.acts, None, lab, bench)
        written, rest = self.written.pool.batch(index), None
        if resumed and self._stream is not None:
            rest = self._pools[self._stream].batch(index).acts - written.acts
        lab = lab & self.written.lab_mask(written)
        return PairedBatch(batch.index, batch.tokens, batch.acts, written.acts, rest, lab, bench)

    def _side_by_side(self, index: Sequence[int]) -> PairedBatch:
        pools = self._pools
        batches = {hook: pools[hook].batch(index) for hook in self._sides}
        first = batches[self.hooks[0]]
        acts = torch.cat([batches[hook].acts for hook in self.hooks], dim=-1)
        written = acts
        if self.hooks_out != self.hooks:
            written = torch.cat([batches[hook].acts for hook in self.hooks_out], dim=-1)
        lab, bench = self._sides[self.hooks[0]].lab_mask(first), self._sides[self.hooks[0]].sae_bench_mask(first)
        for hook, side in self._sides.items():
            lab = lab & side.lab_mask(batches[hook])
        return PairedBatch(first.index, first.tokens, acts, written, None, lab, bench)

    @cached_property
    def _pools(self) -> dict[str, ActivationPool]:
        """By hook, from one pass: what is read, what is written, and the stream that holds the latter."""
        written = self._sides or [self.hook_out]
        hooks = dict.fromkeys([*self.hooks, *written, *([] if self._stream is None else [self._stream])])
        pools = collect_hooks(
            self.lm,
            list(hooks),
            self.tokens,
            self.params.model.llm_batch_size,
            self.params.activation_caching,
            "activations",
        )
        for hook, side in self._sides.items():
            side.pool = pools[hook]
        if self.written is not self:
            self.written.pool = pools[self.hook_out]
        return pools
