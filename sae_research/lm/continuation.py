"""Activations of many sequences that open alike: every opening runs through the model once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_research.lm.model import LanguageModel

if TYPE_CHECKING:
    from transformers import DynamicCache

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference between continuing and a whole run that counts as rounding."""


class Openings(NamedTuple):
    """What sequences continue."""

    tokens: Sequence[Tensor]
    """The openings, 1-D tensors of ids."""
    of: Sequence[int]
    """Which opening each sequence continues."""


def continued(lm: LanguageModel, hook: str, rows: Sequence[Tensor], openings: Openings,
              batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """(which rows, activations at `hook` [batch, seq, d_in] of their own tokens, padded on the right) until all ran.

    Sequences of one opening reuse its keys and values; attention is causal, so this is what a whole run gives. That
    is checked on the first sequence: an architecture that cannot continue runs whole sequences instead.
    """
    if not rows:
        return
    resumable = _can_continue(lm, hook, openings.tokens[openings.of[0]], rows[0])
    for number, opening in enumerate(openings.tokens):
        members = sorted((i for i in range(len(rows)) if openings.of[i] == number), key=lambda i: (len(rows[i]), i))
        past = _read(lm, hook, opening) if members and resumable else None
        for start in range(0, len(members), batch_size):
            chosen = members[start:start + batch_size]
            tails = torch.nn.utils.rnn.pad_sequence([rows[i] for i in chosen], batch_first=True,
                                                    padding_value=lm.separator_id)
            yield chosen, _continue(lm, hook, past, tails) if past is not None else _whole(lm, hook, opening, tails)


def _read(lm: LanguageModel, hook: str, opening: Tensor) -> DynamicCache:
    from transformers import DynamicCache

    past = DynamicCache(config=lm.model.config.get_text_config())
    lm.activations(opening[None].to(lm.device), hook, past)
    return past


def _continue(lm: LanguageModel, hook: str, past: DynamicCache, tails: Tensor) -> Tensor:
    own = copy.deepcopy(past)  # a run adds to its cache
    own.batch_repeat_interleave(len(tails))
    return lm.activations(tails.to(lm.device), hook, own)


def _whole(lm: LanguageModel, hook: str, opening: Tensor, tails: Tensor) -> Tensor:
    tokens = torch.cat([opening.expand(len(tails), -1), tails], dim=1)
    return lm.activations(tokens.to(lm.device), hook)[:, len(opening):]


def _can_continue(lm: LanguageModel, hook: str, opening: Tensor, tail: Tensor) -> bool:
    try:
        got = _continue(lm, hook, _read(lm, hook, opening), tail[None]).float()
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        print(f"{lm.name} cannot continue a sequence from its keys and values ({type(error).__name__}): "
              "whole sequences run instead, which takes longer", flush=True)
        return False
    want = _whole(lm, hook, opening, tail[None]).float()
    return bool((got - want).norm() <= _TOLERANCE[lm.dtype] * want.norm())
