"""Training steps of a transcoder against sparsify's, and against SAELens' of an SAE of its size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import stock_training
from benchmarks.stock_training import Step
from benchmarks.training import BATCH, TOKENS, TOP_K, UNTIMED
from sae_research.config.params import Params, Train
from sae_research.lm import LanguageModel, collect_hooks
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder
from sae_research.text.tokens import token_contexts
from sae_research.training.buffer import StreamBatch
from sae_research.training.recipes import Recipe
from sae_research.training.training_sae import TrainingSAE, new_training_sae, start, train_step

LAYER = 8
READ, WRITTEN = f"blocks.{LAYER}.mlp.hook_in", f"blocks.{LAYER}.hook_mlp_out"
HOOKS = {"hook_name": READ, "hook_out": WRITTEN}


def compare(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, model: object, params: Params, steps: int = 40
) -> dict[str, tuple[float, float]]:
    """Row -> (our seconds, theirs) for so many steps of 512 tokens of a TopK-32 transcoder of 576 x 2,304: the median step
    times their number.

    Both sides take turns on the same batches of what the packaged model's MLP reads and writes, normalised, from the same
    weights; the first three steps are not counted, nor is anything but the step. `train.precision` is that of `params`; the
    others run as they do by default, in float32. sparsify leaves decoder rows free, and its default optimiser takes other
    steps, so that losses part. SAELens' side is an SAE of the same width, k and batch, of what the MLP writes: it has no
    training class of transcoders. saes and model: unused. sparsify is no dependency: its rows are left out where it is
    missing, with the command that fetches it.
    """
    rows_ND = _activations(lm, params)
    rows: dict[str, tuple[float, float]] = {}
    of_sparsify: list[tuple[str, dict[str, Any], str]] = [
        ("TopK transcoder, {} steps, against sparsify with Adam", {}, "adam"),
        ("TopK transcoder, {} steps, against sparsify's default optimiser", {}, "signum"),
        ("TopK transcoder with a skip, {} steps, against sparsify's default optimiser", {"skip": True}, "signum"),
    ]
    try:
        for title, changes, optimiser in of_sparsify:
            row = title.format(steps)
            member = _member({**TOP_K, **HOOKS, **changes}, rows_ND, params)
            theirs = stock_training.sparsify(member.recipe, optimiser)
            rows[row] = _race(row, member, theirs, rows_ND, rows_ND, steps)
    except UserError as error:
        print(f"left out: training against sparsify: {error}")
    row = f"TopK transcoder, {steps} steps, against SAELens' TopK SAE of its size"
    written_ND = rows_ND[:, rows_ND.shape[1] // 2 :].contiguous()
    beside: Callable[[Recipe], Step] = lambda recipe: stock_training.sae_lens(recipe, steps + UNTIMED, BATCH)  # noqa: E731
    theirs = beside(_member(TOP_K, written_ND, params).recipe)
    rows[row] = _race(row, _member({**TOP_K, **HOOKS}, rows_ND, params), theirs, rows_ND, written_ND, steps)
    return rows


def _race(
    row: str, member: TrainingSAE, theirs: Step, ours_ND: Tensor, theirs_ND: Tensor, steps: int
) -> tuple[float, float]:
    spent: tuple[list[float], list[float]] = ([], [])
    losses = (0.0, 0.0)
    for i in range(steps + UNTIMED):
        first = i * BATCH % (len(ours_ND) // BATCH * BATCH)
        own, other = StreamBatch(ours_ND[first : first + BATCH], 0.5), theirs_ND[first : first + BATCH]
        began = time.perf_counter()
        output = train_step(member, own)
        between = time.perf_counter()
        their_loss = theirs(other)
        ended = time.perf_counter()
        losses = float(output.loss), their_loss
        if i >= UNTIMED:
            spent[0].append(between - began)
            spent[1].append(ended - between)
    print(f"{row}: last losses {losses[0]:.3g} and {losses[1]:.3g}")
    return tuple(steps * statistics.median(side) for side in spent)  # ty: ignore[invalid-return-type]


def _member(entry: dict[str, Any], rows_ND: Tensor, params: Params) -> TrainingSAE:
    """One of ours at a constant rate, of which no latent is ever dead."""
    train = Train(
        saes={"sae": entry},  # ty: ignore[invalid-argument-type]
        warmup_fraction=0,
        decay_fraction=0,
        dead_fraction=1,
        precision=params.train.precision,
    )
    sae = new_training_sae("sae", train, rows_ND.shape[1] // (2 if "hook_out" in entry else 1))
    start(sae, rows_ND, 0)
    return sae


def _activations(lm: LanguageModel, params: Params) -> Tensor:
    """What is read beside what is written, each normalised [TOKENS, 2 D]; without the first tokens of contexts."""
    contexts = token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", TOKENS * 9 // 8)
    pools = collect_hooks(lm, [READ, WRITTEN], contexts.tokens, params.model.llm_batch_size, params.activation_caching)
    sides = []
    for pool in pools.values():
        rows_ND = pool.flat.float().view(*contexts.tokens.shape, -1)[:, 1:].flatten(0, 1)[:TOKENS]
        sides.append(rows_ND / rows_ND.square().sum(1).mean().sqrt())
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    return torch.cat(sides, dim=1)[order]
