"""Sampled texts of the model as it is and with SAEs in place of its activations, from equal seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_research.analysis.context import AnalysisContext
from sae_research.lm.generate import sample, until_end
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder


class Reconstruct:
    """An SAE's reconstruction in place of the activations of a run's passes, called on each in turn [batch, seq, d_in].

    Tokens of the first pass that do not count keep the model's own activations; of later passes all count. An encoder that
    looks back is given what came before.
    """

    def __init__(self, sae: SparseAutoencoder, analysis: AnalysisContext, tokens: Tensor) -> None:
        """tokens: the first pass's [1, seq]."""
        self.sae, self.analysis, self.tokens = sae, analysis, tokens
        self._past: list[tuple[Tensor, Tensor]] = []
        self._started = False

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if not self._started:
            mask = self.analysis.mask(self.tokens.expand(len(x), -1), wide)
            self._started = True
        if self.sae.per_token:
            x_hat = self.sae.reconstruct(wide, mask)
        else:
            self._past.append((wide, mask))
            whole = [torch.cat(parts, 1) for parts in zip(*self._past, strict=True)]
            x_hat = self.sae.reconstruct(*whole)[:, -x.shape[1] :]
        return torch.where(mask[..., None], x_hat, wide).to(x.dtype)


class Text(NamedTuple):
    """One seed's texts."""

    seed: int
    plain: str
    """Of the model as it is."""
    with_saes: str | None
    """Of the model with every SAE's reconstruction in place; None without SAEs."""
    agree: int | None
    """Tokens from the start on which the two agree; None without SAEs."""


@torch.no_grad()
def generate(
    analysis: AnalysisContext,
    prompt: str,
    n_tokens: int = 40,
    seeds: Sequence[int] = (0, 1, 2, 3),
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> list[Text]:
    """Continuations of a prompt, one a seed, with and without the SAEs of the analysis.

    Both meet equal noise, so that they differ by the SAEs alone. temperature 0 takes the likeliest token; top_k, then top_p
    leave the k likeliest tokens, and of them those that make up the first `top_p` of the probability. Raises `UserError` for
    an encoder that is not causal, transcoders and crosscoders, two SAEs of one hook, and settings out of range.
    """
    for wrong, says in (
        (n_tokens < 1, "length must be at least 1"),
        (not seeds, "generating needs at least one seed"),
        (temperature < 0, f"temperature {temperature:g} is negative"),
        (top_k is not None and top_k < 1, f"top_k {top_k} leaves no token"),
        (not 0 < top_p <= 1, f"top_p {top_p:g} is not above 0 and at most 1"),
    ):
        if wrong:
            raise UserError(says)
    saes = analysis.one_hook_each()
    for name, sae in analysis.saes.items():
        sae.cfg.check_one_hook("generating with the reconstruction in place")
        if not sae.causal:
            raise UserError(
                f"SAE {name} ({sae.cfg.form}) cannot generate: its encoder is not causal, so that each token would change "
                "the reconstructions of those before it"
            )
    tokens = analysis.tokens(prompt)

    def texts(in_place: bool) -> list[list[int]]:
        edits = {hook: Reconstruct(sae, analysis, tokens) for hook, sae in saes.items()} if in_place else {}
        ids = sample(analysis.lm, tokens, n_tokens, list(seeds), temperature, top_p, edits, top_k)
        return [until_end(analysis.lm, row) for row in ids]

    plain, others = texts(False), texts(True) if saes else None
    decode = analysis.lm.tokenizer.decode
    return [
        Text(
            seed,
            decode(own),
            None if others is None else decode(others[i]),
            None if others is None else _agree(own, others[i]),
        )
        for i, (seed, own) in enumerate(zip(seeds, plain, strict=True))
    ]


def _agree(first: Sequence[int], second: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
