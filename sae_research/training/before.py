"""What a run will need at its end, looked at before its first step: hours of training must not end in a refusal."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from sae_research.comparison import check_sizes
from sae_research.errors import UserError
from sae_research.folders import check_writable
from sae_research.lm import LanguageModel, token_mask
from sae_research.params import Params, TokenMask
from sae_research.store_cache import cache_dir
from sae_research.text.stream import TextRunsOut, token_contexts
from sae_research.training.held_out import HELD_OUT_SPLIT

FLOAT_BYTES = 4
STATE_COPIES = 3
"""A checkpoint holds every parameter and its two moments."""


def check_output(params: Params, output: Path) -> None:
    """Raises `UserError` or `OSError` where the SAEs could not be written: a name that the file system does not take, a
    place that is read-only or somebody else's."""
    check_writable(output, list(params.train.saes), "train.saes")


def check_comparison(params: Params, lm: LanguageModel) -> None:
    """Raises `UserError` where the setup stage would refuse the controls or variants of a baseline that is trained here."""
    name = params.baseline_sae.name
    if params.baseline_sae.source == "trained" and name in params.train.saes:
        check_sizes(params, lm.d_in(params.train.hook_of(name)), params.train.saes[name].d_sae)


def check_room(params: Params, lm: LanguageModel, output: Path) -> None:
    """Raises `UserError` where the disk does not hold the SAEs; says so where it does not hold a checkpoint, without which
    a run can be had too."""
    train = params.train
    weights = sum(2 * lm.d_in(train.hook_of(name)) * config.d_sae * FLOAT_BYTES for name, config in train.saes.items())
    buffers = sum(lm.d_in(hook) for hook in train.hooks) * max(train.buffer_tokens, 2 * train.batch_size) * lm.dtype.itemsize
    needed, free = weights * (1 + train.saved_checkpoints), shutil.disk_usage(output.resolve().parent).free
    if needed > free:
        raise UserError(f"{output}: the SAEs of train.saes take {_gigabytes(needed)}, the disk has {_gigabytes(free)} free; "
                        "make room (`make clean-cache`), or train fewer or narrower ones")
    needed, free = STATE_COPIES * weights + buffers, shutil.disk_usage(cache_dir("train")).free
    if needed > free:
        print(f"warning: a checkpoint takes {_gigabytes(needed)}, the disk of .cache has {_gigabytes(free)} free: an "
              "interrupted run will start afresh", file=sys.stderr, flush=True)


def held_out_tokens(params: Params, lm: LanguageModel) -> Tensor:
    """The held-out contexts [n, context_size] that SAEs will be measured on. Raises `UserError` where the text does not
    give them."""
    try:
        tokens = token_contexts(lm.tokenizer, lm.separator_id, params.text, HELD_OUT_SPLIT,
                                params.train.held_out_tokens).tokens
    except TextRunsOut as error:
        raise UserError(f"train.held_out_tokens: {error}") from None
    without_norms = TokenMask(drop_first_position=params.token_mask.drop_first_position, outlier_norm_multiple=None)
    if not token_mask(lm, tokens, torch.empty(0), without_norms).any():
        raise UserError("train.held_out_tokens: no held-out token counts; raise it")
    return tokens


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3g} GB"
