"""Training steps: ours against dictionary_learning 0.1.0 and SAELens 6, from the same weights on the same batches."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import stock_training
from benchmarks.stock_training import Step
from sae_research.config.params import Params, Train
from sae_research.lm import LanguageModel, collect, median_activation_norm, token_mask
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder
from sae_research.text.tokens import token_contexts
from sae_research.training.buffer import StreamBatch
from sae_research.training.checkpoints import ProgressFile
from sae_research.training.loop import StopSignals, ThreadPoolStepper, Trainer
from sae_research.training.stream import ActivationStream
from sae_research.training.training_sae import TrainingSAE, new_training_sae, start, train_step

BATCH, TOKENS, D_SAE = 512, 6_144, 2_304
STEPS, STEPS_TOGETHER, UNTIMED = 40, 10, 3
RATE = {"learning_rate": 0.003, "d_sae": D_SAE}
TOP_K: dict[str, Any] = {"recipe": "top_k", "k": 32, **RATE}
RELU: dict[str, Any] = {"l1_coefficient": 0.1, **RATE}
SPARSITIES = ((16, 32, 48, 64), (0.06, 0.08, 0.1, 0.12))
"""Of the eight SAEs: k of four TopK, coefficients of four ReLU."""


def compare(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, model: object, params: Params
) -> dict[str, tuple[float, float]]:
    """Row -> (our seconds, theirs) for 40 steps of 512 tokens of one SAE of 576 x 2,304, and for 10 steps of eight.

    Both sides take turns on the same batches of the packaged model's activations, normalised, from the same weights, at
    a constant learning rate; the first three steps are not counted, nor is anything but the step. How far the losses
    part is printed. No latent counts as dead in so short a run, on either side. ReLU is our `standard` against
    dictionary_learning, `standard_new` against SAELens: the forms that those have. SAELens' TopK leaves rows free, so
    that its losses part a little more. `train.precision` is that of `params`; the other sides run as they do by
    default, in float32. saes and model: unused. dictionary_learning is no dependency: the rows that need it are left
    out where it is missing, with the command that fetches it.

    The last row sets the stage's own loop over eight SAEs, model pass and all, beside the sum of that pass alone and of
    those steps alone on batches at hand: what shuffling, normalising, PCA and progress add.
    """
    x_ND = _activations(lm, params)
    relu_of: dict[str, tuple[str, Callable[[TrainingSAE, int], Step]]] = {
        "dictionary_learning": ("standard", lambda m, n: stock_training.dictionary_learning(m.recipe, n)),
        "SAELens": ("standard_new", lambda m, n: stock_training.sae_lens(m.recipe, n, BATCH)),
    }
    rows: dict[str, tuple[float, float]] = {}
    for library, (relu, stock) in relu_of.items():
        ks, coefficients = SPARSITIES
        eight = [*({**TOP_K, "k": k} for k in ks), *({**RELU, "recipe": relu, "l1_coefficient": c} for c in coefficients)]
        try:
            for name, entries, n_steps in (
                ("TopK", [TOP_K], STEPS),
                ("ReLU", [{**RELU, "recipe": relu}], STEPS),
                ("eight SAEs", eight, STEPS_TOGETHER),
            ):
                row = f"training, {name}, {n_steps} steps, against {library}"
                rows[row] = _race(row, entries, stock, x_ND, n_steps, params)
        except UserError as error:
            print(f"left out: training against {library}: {error}")
    return rows | {"training, eight SAEs on one stream, against pass and steps alone": _whole_against_parts(lm, params)}


def _whole_against_parts(lm: LanguageModel, params: Params) -> tuple[float, float]:
    ks, coefficients = SPARSITIES
    entries = {f"top_k_{k}": {**TOP_K, "k": k} for k in ks} | {
        f"relu_{i}": {**RELU, "recipe": "standard", "l1_coefficient": c} for i, c in enumerate(coefficients)
    }
    train = Train(
        **{
            **params.train.model_dump(),
            "saes": entries,
            "tokens": TOKENS,
            "buffer_tokens": TOKENS // 2,
            "batch_size": BATCH,
            "checkpoint_seconds": None,
        }
    )
    params = params.model_copy(
        update={"train": train, "activation_caching": params.activation_caching.model_copy(update={"enabled": False})}
    )
    tokens = token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", TOKENS).tokens
    stream = ActivationStream(lm, tokens, params)
    began = time.perf_counter()
    rows = stream.calibrate()[train.hook_name]
    whole = time.perf_counter() - began
    in_training = [_started(name, train, rows) for name in entries]
    with tempfile.TemporaryDirectory() as folder:
        progress = ProgressFile(Path(folder) / "progress.json", "cpu")
        began = time.perf_counter()
        Trainer(stream, in_training, train, progress, StopSignals(), lambda: None).run()
        whole += time.perf_counter() - began
    began = time.perf_counter()
    for start_row in range(0, len(tokens), params.model.llm_batch_size):
        lm.activations(tokens[start_row : start_row + params.model.llm_batch_size], train.hook_name)
    parts = time.perf_counter() - began
    fresh = [_started(name, train, rows) for name in entries]
    n_steps = in_training[0].step
    with ThreadPoolStepper(len(fresh), torch.device("cpu")) as stepper:
        for i in range(n_steps):
            batch = StreamBatch(rows[i * BATCH % (len(rows) - BATCH) :][:BATCH], (i + 0.5) / n_steps)
            began = time.perf_counter()
            stepper.map(lambda sae, batch=batch: train_step(sae, batch), fresh)
            parts += time.perf_counter() - began
    return whole, parts


def _started(name: str, train: Train, rows_ND: Tensor) -> TrainingSAE:
    sae = new_training_sae(name, train, rows_ND.shape[1])
    start(sae, rows_ND, 0)
    return sae


def _race(
    row: str,
    entries: list[dict[str, Any]],
    stock: Callable[[TrainingSAE, int], Step],
    x_ND: Tensor,
    n_steps: int,
    params: Params,
) -> tuple[float, float]:
    in_training = [_member(entry, x_ND, params) for entry in entries]
    theirs = [stock(sae, n_steps + UNTIMED) for sae in in_training]
    spent, apart, l0s = [0.0, 0.0], 0.0, [0.0] * len(in_training)
    with ThreadPoolStepper(len(in_training), torch.device("cpu")) as stepper:
        for i in range(n_steps + UNTIMED):
            first = i * BATCH % (len(x_ND) // BATCH * BATCH)
            batch = StreamBatch(x_ND[first : first + BATCH], 0.5)
            began = time.perf_counter()
            outputs = stepper.map(lambda sae, batch=batch: train_step(sae, batch), in_training)
            between = time.perf_counter()
            their_losses = [stock_step(batch.acts) for stock_step in theirs]
            ended = time.perf_counter()
            l0s = [float(output.l0) for output in outputs]
            apart = max(
                apart,
                *(abs(float(output.loss) - other) / other for output, other in zip(outputs, their_losses, strict=True)),
            )
            if i >= UNTIMED:
                spent = [spent[0] + between - began, spent[1] + ended - between]
    print(
        f"{row}: losses part by at most {apart:.2g} of themselves; last L0 "
        f"{', '.join(f'{l0:.0f}' for l0 in l0s)}; {n_steps * BATCH * len(in_training) / spent[0]:,.0f} tokens/s against "
        f"{n_steps * BATCH * len(in_training) / spent[1]:,.0f}"
    )
    return spent[0], spent[1]


def _member(entry: dict[str, Any], x_ND: Tensor, params: Params) -> TrainingSAE:
    """An SAE of ours at a constant rate and penalty, of which no latent is ever dead."""
    train = Train(
        saes={"sae": entry},
        warmup_fraction=0,
        sparsity_warmup_fraction=0,
        decay_fraction=0,
        dead_fraction=1,
        precision=params.train.precision,
    )
    return _started("sae", train, x_ND)


def _activations(lm: LanguageModel, params: Params) -> Tensor:
    """Counted activations at the training hook, normalised, in a random order [n, d_in]."""
    contexts = token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", TOKENS)
    pool = collect(lm, params.train.hook_name, contexts.tokens, params.model.llm_batch_size, params.activation_caching)
    acts = pool.flat.view(*contexts.tokens.shape, -1)
    median = median_activation_norm(lm, contexts.tokens, acts)
    rows_ND = acts[token_mask(lm, contexts.tokens, acts, params.token_mask, median)].float()
    rows_ND = rows_ND[torch.randperm(len(rows_ND), generator=torch.Generator().manual_seed(0))]
    return rows_ND / rows_ND.square().sum(1).mean().sqrt()
