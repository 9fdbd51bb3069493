"""Training steps of dictionary_learning 0.1.0, SAELens 6 and sparsify 1.3.3, from given weights on given batches."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.training.recipes import Recipe

FOLDER = Path("/tmp/dl")
HOW_TO_GET_IT = f"uv pip install --no-deps --target {FOLDER} dictionary-learning==0.1.0"
SPARSIFY = Path("/tmp/sparsify")
HOW_TO_GET_SPARSIFY = (
    f"uv pip install --no-deps --target {SPARSIFY} eai-sparsify==1.3.3 schedulefree simple-parsing natsort docstring-parser"
)
Step = Callable[[Tensor], float]
"""One training step on a batch [B, D], of a transcoder [B, 2 D]; returns the loss before it."""


def dictionary_learning(recipe: Recipe, n_steps: int) -> Step:
    """Its trainer of the same recipe, `top_k` or `standard`, at a constant rate, started from our weights.

    The package is read without running its `__init__`, which asks for libraries that training never uses. Step 0 is
    skipped: it would replace `b_dec`. Raises `UserError` where the package is not there.
    """
    if not (FOLDER / "dictionary_learning").is_dir():
        raise UserError(f"dictionary_learning is not in {FOLDER}; get it with `{HOW_TO_GET_IT}`")
    if "dictionary_learning" not in sys.modules:
        package = types.ModuleType("dictionary_learning")
        package.__path__ = [str(FOLDER / "dictionary_learning")]
        sys.modules["dictionary_learning"] = package
    config: Any = recipe.config
    F, D = recipe.W_dec.shape
    common = {
        "steps": n_steps + 2,
        "activation_dim": D,
        "dict_size": F,
        "layer": 0,
        "lm_name": "none",
        "device": "cpu",
        "warmup_steps": 0,
        "lr": config.learning_rate,
        "seed": 0,
    }
    if config.recipe == "top_k":
        module = importlib.import_module("dictionary_learning.trainers.top_k")
        trainer = module.TopKTrainer(**common, k=config.k, auxk_alpha=config.aux_k_coefficient)
        bias = trainer.ae.b_dec
    else:
        module = importlib.import_module("dictionary_learning.trainers.standard")
        trainer = module.StandardTrainer(**common, l1_penalty=config.l1_coefficient, sparsity_warmup_steps=None)
        bias = trainer.ae.bias
    with torch.no_grad():
        bias.copy_(recipe.b_dec)
        trainer.ae.encoder.weight.copy_(recipe.W_enc)
        trainer.ae.encoder.bias.copy_(recipe.b_enc)
        trainer.ae.decoder.weight.copy_(recipe.W_dec.T)
    done = 0

    def step(x_BD: Tensor) -> float:
        nonlocal done
        done += 1
        losses: list[Tensor] = []
        original = trainer.loss  # `update` of the ReLU trainer does not return it

        def loss(*given: Any, **named: Any) -> Tensor:
            losses.append(original(*given, **named))
            return losses[-1]

        trainer.loss = loss
        try:
            trainer.update(done, x_BD)
        finally:
            trainer.loss = original
        return float(losses[0].detach())

    return step


def sae_lens(recipe: Recipe, n_steps: int, batch_size: int) -> Step:
    """Its trainer of the same recipe, `top_k` or `standard_new`, started from our weights.

    SAELens keeps no decoder row at unit norm; its TopK weighs activations by the rows' norms instead.
    """
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config: Any = recipe.config
    F, D = recipe.W_dec.shape
    sae: Any
    if config.recipe == "top_k":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=F, k=config.k))
    else:
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D, d_sae=F, l1_coefficient=config.l1_coefficient))
    with torch.no_grad():
        sae.W_enc.copy_(recipe.W_enc.T)
        sae.b_enc.copy_(recipe.b_enc)
        sae.W_dec.copy_(recipe.W_dec)
        sae.b_dec.copy_(recipe.b_dec)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=(n_steps + 2) * batch_size,
            lr=config.learning_rate,
            lr_end=config.learning_rate,
            train_batch_size_samples=batch_size,
        ),
        sae,
        iter(()),
    )

    def step(x_BD: Tensor) -> float:
        return float(trainer.step(x_BD).loss.detach())

    return step


def sparsify(recipe: Recipe, optimiser: str) -> Step:
    """Its TopK transcoder, from our weights: what its `Trainer.fit` does of a step with the loss `fvu`, at our learning rate
    with `adam`, at its own with `signum`, its default.

    The loss is a fraction of the batch's variance there; given is the mean squared error, as ours is. Raises `UserError`
    where the package is not there.
    """
    found = importlib.util.find_spec("sparsify")
    if found is None or found.origin is None:  # a folder of that name is no package
        if not (SPARSIFY / "sparsify").is_dir():
            raise UserError(f"sparsify is not installed and not in {SPARSIFY}; get it with `{HOW_TO_GET_SPARSIFY}`")
        sys.path.append(str(SPARSIFY))
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoderConfig
    from sparsify.sign_sgd import SignSGD
    from sparsify.sparse_coder import SparseCoder

    config: Any = recipe.config
    F, D = recipe.W_dec.shape
    coder = SparseCoder(
        D,
        SparseCoderConfig(num_latents=F, k=config.k, transcode=True, skip_connection=bool(config.skip)),
        dtype=torch.float32,
    )
    with torch.no_grad():
        coder.encoder.weight.copy_(recipe.W_enc)
        coder.encoder.bias.copy_(recipe.b_enc)
        coder.W_dec.copy_(recipe.W_dec)
        coder.b_dec.copy_(recipe.b_dec)
    optimisers: Any = []
    if optimiser == "adam":
        optimisers = [torch.optim.Adam(coder.parameters(), lr=config.learning_rate)]
    else:
        rate = 5e-3 / (F / 2**14) ** 0.5
        optimisers = [ScheduleFreeWrapper(SignSGD([{"params": coder.parameters(), "lr": rate}]), momentum=0.95)]
        optimisers[0].train()
    did_fire, since = torch.zeros(F, dtype=torch.bool), torch.zeros(F, dtype=torch.long)

    def step(x_BD: Tensor) -> float:
        inputs, outputs = x_BD.chunk(2, dim=1)
        variance = (outputs - outputs.mean(0)).pow(2).sum()
        out = coder(x=inputs, y=outputs, dead_mask=None, total_variance=variance)
        did_fire[out.latent_indices.flatten()] = True
        loss = float(out.fvu.detach() * variance / len(outputs))
        (out.fvu + out.multi_topk_fvu / 8).backward()
        for each in optimisers:
            each.step()
            each.zero_grad()
        since.add_(len(outputs))
        since[did_fire] = 0
        did_fire.zero_()
        return loss

    return step
