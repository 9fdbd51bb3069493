"""Differential binary masks (MDBM): which latents to take from the source so that one attribute moves and the others stay.

As in SAE Bench 0.6.0: one number per latent, from 0; sigmoid of it over a temperature that falls from 1 to 1e-4 in
equal ratios, step by step; Adam; cross-entropy of the target answer's first token over cause and isolation pairs alike;
in the end a latent is in where its number is above 0. SAE Bench drops an incomplete last batch; here it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_research.evals.ravel.known import rows_at_once
from sae_research.evals.ravel.pairs import Pair
from sae_research.evals.ravel.patches import Swap
from sae_research.params import Params
from sae_research.params import Ravel as Config

HOT, COLD = 1.0, 1e-4


class Problem(NamedTuple):
    """One mask to learn."""

    pairs: list[Pair]
    keeps_error: bool


def temperatures(n_steps: int) -> Tensor:
    """Of every step [n_steps]."""
    return torch.logspace(torch.log10(torch.tensor(HOT)), torch.log10(torch.tensor(COLD)), n_steps)


def learn(problems: Sequence[Problem], swap: Swap, params: Params) -> list[Tensor]:
    """The numbers of one mask [d_sae] per problem; a latent is in where its number is above 0.

    All problems take their steps side by side, because one pass over many rows is faster than many over few; each has
    its own pairs, temperature and optimiser, and the model is frozen, so none depends on another.
    """
    config = params.ravel
    numbers = [torch.zeros(swap.sae.cfg.d_sae, device=swap.group.lm.device, requires_grad=True) for _ in problems]
    optimisers = [torch.optim.Adam([number], lr=config.learning_rate) for number in numbers]
    batches = [_batches(problem.pairs, config) for problem in problems]
    schedules = [temperatures(len(steps)) for steps in batches]
    for step in range(max(map(len, batches))):
        rows = [_Row(pair, problem.keeps_error, numbers[p], float(schedules[p][step]), 1 / len(batches[p][step]))
                for p, problem in enumerate(problems) if step < len(batches[p]) for pair in batches[p][step]]
        for part in _like_length(rows, swap, params):
            _loss(part, swap).backward()
        for p, optimiser in enumerate(optimisers):
            if step < len(batches[p]):
                optimiser.step()
                optimiser.zero_grad()
    return [number.detach() for number in numbers]


class _Row(NamedTuple):
    """One pair of one problem's batch."""

    pair: Pair
    keeps_error: bool
    number: Tensor
    """The problem's numbers [d_sae]."""
    temperature: float
    share: float
    """Of the batch's mean."""


def _loss(rows: Sequence[_Row], swap: Swap) -> Tensor:
    """The rows' part in the sum over problems of their batches' mean cross-entropy."""
    device = swap.group.lm.device
    mask = torch.stack([torch.sigmoid(row.number / row.temperature) for row in rows])
    keeps_error = torch.tensor([row.keeps_error for row in rows], device=device)
    pairs = [row.pair for row in rows]
    losses = swap.group.loss(pairs, swap.patched(pairs, mask, keeps_error))
    return (losses * torch.tensor([row.share for row in rows], device=device)).sum()


def _batches(pairs: list[Pair], config: Config) -> list[list[Pair]]:
    """The batch of every step: the same in every epoch, as in SAE Bench, the last one as large as is left."""
    epoch = [pairs[start:start + config.batch_size] for start in range(0, len(pairs), config.batch_size)]
    return epoch * config.num_epochs


def _like_length(rows: list[_Row], swap: Swap, params: Params) -> Iterator[list[_Row]]:
    """Rows in parts that fit one pass, of like length together so that little is padding."""
    ordered = sorted(rows, key=lambda row: swap.group.length(row.pair))
    size = rows_at_once(params, swap.group.length(ordered[-1].pair))
    for start in range(0, len(ordered), size):
        yield ordered[start:start + size]
