"""What the SAEs of one pair of hooks share in core evaluation: contexts, clusters, paired activations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sae_research.config.params import Params
from sae_research.evals.harness import Group
from sae_research.lm import LanguageModel
from sae_research.lm.pairs import PairedActivations, PairedBatch
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.stats.reconstruction import Clusters, clusters_by_context, clusters_of
from sae_research.text.tokens import reorder_evenly, token_contexts

Sums = dict[str, float | list[float]]
"""By quantity; lists hold one number per cluster."""


class CoreText(NamedTuple):
    """What is evaluated on."""

    tokens: Tensor
    """Ids [contexts, seq]."""
    predictions: Clusters
    """Clusters of the contexts that serve predictions."""
    sparsity: Clusters
    """Clusters of the contexts that serve sparsity and variance."""
    counted: Tensor | None = None
    """Where tokens of `text.roles` stand, bool [contexts, seq]; None: everywhere."""


class CoreGroup(PairedActivations):
    """What SAEs share that read one hook and write one hook."""

    def __init__(self, lm: LanguageModel, members: Group, text: CoreText, params: Params, lab: bool) -> None:
        super().__init__(lm, members.hook, members.hook_out, text.tokens, params, text.counted)
        self.text = text
        self.lab = lab
        """Whether our own definitions are computed beside SAE Bench's."""

    @cached_property
    def mean_activation(self) -> Tensor:
        """Mean of what is written over the counted tokens of the sparsity contexts [d_out]: what mean-ablation puts in
        place."""
        total, count = torch.zeros((), device=self.lm.device), 0
        config = self.params.core_eval
        for index in self.numbers(config.n_eval_reconstruction_batches, config.n_eval_sparsity_variance_batches):
            batch = self.shown(index)
            kept = batch.written[batch.lab_mask]
            total, count = total + kept.sum(0), count + len(kept)
        return total / max(count, 1)

    def numbers(self, first: int, count: int) -> list[list[int]]:
        """Numbers of the contexts in `count` batches from batch `first` on."""
        size = self.params.core_eval.batch_size_prompts
        return [list(range(i * size, (i + 1) * size)) for i in range(first, first + count)]


def core_text(lm: LanguageModel, params: Params, tokens: Tensor | None) -> CoreText:
    """The contexts of both parts, and what varies together in them."""
    config = params.core_eval
    first = config.batch_size_prompts * config.n_eval_reconstruction_batches
    last = first + config.batch_size_prompts * config.n_eval_sparsity_variance_batches
    if tokens is not None:
        tokens = tokens[:last]
        return CoreText(tokens, clusters_by_context(tokens, 0, first), clusters_by_context(tokens, first, len(tokens)))
    contexts = reorder_evenly(
        token_contexts(lm.tokenizer, lm.separator_id, params.text, "core_eval", last * params.text.context_size), first
    )
    return CoreText(contexts.tokens, clusters_of(contexts, 0, first), clusters_of(contexts, first, last), contexts.counted)


def encodings(
    saes: dict[str, SparseAutoencoder], x: Tensor, mask: Tensor | None
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(name, activations with every token counted, activations under the mask, or None without one).

    Token by token the second follows from the first; an encoder that sees the sequence must run twice.
    """
    masked = encode_each({n: s for n, s in saes.items() if not s.per_token}, x, mask)
    for name, z in encode_each(saes, x, None):
        sae = saes[name]
        if mask is None:
            yield name, z, None
        elif sae.per_token:
            yield name, z, sae.keep(z, mask)
        else:
            masked_name, z_masked = next(masked)
            if masked_name != name:
                raise RuntimeError(f"families came in another order: {masked_name} for {name}")
            yield name, z, z_masked


def lab_reconstruction(sae: SparseAutoencoder, batch: PairedBatch, x_hat: Tensor, z_lab: Tensor) -> Tensor:
    """For our definition, read where tokens count alone: encoded token by token it is there `x_hat` of all tokens."""
    return x_hat if sae.per_token else sae.reconstruct(batch.acts, batch.lab_mask, z_lab)
