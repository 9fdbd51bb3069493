"""Training on a device as the stage does it: the model's pass, the buffer, the steps of every SAE."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_models import Shape, random_tokens
from sae_research.config.params import Params
from sae_research.config.recipes import recipe_model
from sae_research.lm import LanguageModel
from sae_research.training import RECIPES
from sae_research.training.checkpoints import ProgressFile
from sae_research.training.loop import StopSignals, Trainer
from sae_research.training.stream import ActivationStream
from sae_research.training.training_sae import new_training_sae, start

_SPARSITY: dict[str, float] = {
    "l1_coefficient": 0.05,
    "l0_coefficient": 0.003,
    "k": 32,
    "target_l0": 32,
    "sparsity_coefficient": 10.0,
    "s": 10,
}
"""What decides a recipe's L0."""
RECIPES_ON = {"Gemma-2-2B": ("top_k", "jump_relu", "standard", "matryoshka_batch_top_k")}
"""Models on which only some are measured, for time."""
N_SEVERAL = 24
"""SAEs on one stream, as in dictionary_learning's demonstration."""


def recipes(d_sae: int) -> dict[str, dict[str, Any]]:
    """Every recipe's entry of `train.saes`."""
    keys = {name: recipe_model(name).sparsity[0] for name in RECIPES}
    return {name: {"recipe": name, "d_sae": d_sae, key: _SPARSITY[key]} for name, key in keys.items()}


def several(d_sae: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Many SAEs on one stream, half of them TopK and half ReLU."""
    entries = {
        f"sae_{i}": {"recipe": "top_k", "k": 20 + 4 * i, "d_sae": d_sae}
        if i % 2
        else {"recipe": "standard", "l1_coefficient": 0.02 + 0.005 * i, "d_sae": d_sae}
        for i in range(N_SEVERAL)
    }
    return {f"{N_SEVERAL} SAEs together": entries}


def measure(
    lm: LanguageModel, shape: Shape, entries: dict[str, Any], small: bool, wait: Callable[[], None]
) -> dict[str, float]:
    """Tokens a second of the second of two runs, from the first chunk to the last step, and peak memory."""
    batch, context = (64, 32) if small else (4_096, 128)
    tokens = 2_048 if small else 524_288 // (4 if len(entries) > 1 or lm.d_model > 1_000 else 1)
    params = Params.model_validate(
        {
            "model": {"llm_batch_size": 8 if small else 64},
            "text": {"context_size": context},
            "activation_caching": {"enabled": False},
            "train": {
                "hook_name": shape.hook,
                "saes": entries,
                "tokens": tokens,
                "batch_size": batch,
                "buffer_tokens": 4 * batch if small else 131_072,
                "checkpoint_seconds": None,
            },
        }
    )
    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    contexts = random_tokens(lm.vocab_size, tokens, context)
    run(lm, contexts[: max(1, len(contexts) // 4)], params, wait)
    spent, steps = run(lm, contexts, params, wait)
    peak = torch.cuda.max_memory_allocated() / 2**30 if lm.device.type == "cuda" else 0.0
    return {"tokens_per_second": contexts.numel() / spent, "steps": steps, "seconds": spent, "peak_gib": peak}


def run(lm: LanguageModel, contexts: torch.Tensor, params: Params, wait: Callable[[], None]) -> tuple[float, int]:
    """(seconds, steps) of one run over the contexts."""
    stream = ActivationStream(lm, contexts, params)
    rows = stream.calibrate()
    saes = [new_training_sae(name, params.train, lm.d_model, stream.device) for name in params.train.saes]
    for sae in saes:
        start(sae, rows[sae.hook], 0)
    del rows
    with tempfile.TemporaryDirectory() as folder:
        progress = ProgressFile(Path(folder) / "progress.json", str(stream.device))
        wait()
        began = time.perf_counter()
        Trainer(stream, saes, params.train, progress, StopSignals(), lambda: None).run()
        wait()
    return time.perf_counter() - began, max(sae.step for sae in saes)
