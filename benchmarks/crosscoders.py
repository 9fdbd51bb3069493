"""Training steps of a crosscoder over two hooks against those of two SAEs of its width, one at each."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from sae_research.config.params import Params, Train
from sae_research.lm import LanguageModel, collect_hooks
from sae_research.saes import SparseAutoencoder
from sae_research.text.tokens import token_contexts
from sae_research.training.buffer import StreamBatch
from sae_research.training.training_sae import TrainingSAE, new_training_sae, start, train_step

HOOKS = ["blocks.4.hook_resid_post", "blocks.8.hook_resid_post"]
BATCH, TOKENS, D_SAE, UNTIMED = 512, 6_144, 2_304, 3
RECIPES: dict[str, dict[str, Any]] = {
    "BatchTopK": {"recipe": "batch_top_k", "k": 32, "d_sae": D_SAE},
    "L1": {"recipe": "standard_new", "l1_coefficient": 0.06, "d_sae": D_SAE},
}


def compare(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, model: object, params: Params, steps: int = 40
) -> dict[str, tuple[float, float]]:
    """Row -> (seconds of a crosscoder, of two SAEs), for so many steps of 512 tokens of the packaged text's activations.

    Both sides take turns on the same batches; the first three steps are not counted, nor is anything but the step. L0 is
    that which each side's settings give. `saes` and `model` are those of the other parts and not used."""
    sides = _activations(lm, params)
    rows = {}
    for name, entry in RECIPES.items():
        cross = _started({**entry, "hook_names": HOOKS}, torch.cat(sides, dim=1), params)
        pair = [_started(entry, side, params) for side in sides]
        ours = theirs = 0.0
        for step in range(steps + UNTIMED):
            at = step * BATCH % (len(sides[0]) - BATCH + 1)
            batches, progress = [side[at : at + BATCH] for side in sides], (step + 0.5) / (steps + UNTIMED)
            together = StreamBatch(torch.cat(batches, dim=1), progress)
            begin = time.perf_counter()
            train_step(cross, together)
            between = time.perf_counter()
            for sae, batch in zip(pair, batches, strict=True):
                train_step(sae, StreamBatch(batch, progress))
            if step >= UNTIMED:
                ours, theirs = ours + between - begin, theirs + time.perf_counter() - between
        rows[f"training, {name} crosscoder of two hooks, {steps} steps, against two SAEs"] = ours, theirs
    return rows


def _started(entry: dict[str, Any], rows: Tensor, params: Params) -> TrainingSAE:
    train = Train(saes={"one": entry}, precision=params.train.precision, batch_size=BATCH)  # ty: ignore[invalid-argument-type]
    sae = new_training_sae("one", train, rows.shape[1])
    start(sae, rows, params.random_seed)
    return sae


def _activations(lm: LanguageModel, params: Params) -> list[Tensor]:
    """Of each hook [TOKENS, d_in], normalised; without the first tokens of contexts."""
    contexts = token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", TOKENS * 9 // 8)
    pools = collect_hooks(lm, HOOKS, contexts.tokens, params.model.llm_batch_size, params.activation_caching)
    found = []
    for pool in pools.values():
        rows = pool.flat.float().view(*contexts.tokens.shape, -1)[:, 1:].flatten(0, 1)[:TOKENS]
        found.append(rows / rows.square().sum(1).mean().sqrt())
    return found
