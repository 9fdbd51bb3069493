"""The tiny model with SAEs in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_saes import D_SAE, tiny_sae

from sae_research.analysis.context import Lab
from sae_research.config.params import Params
from sae_research.lm import LanguageModel, load_language_model
from sae_research.saes import SparseAutoencoder

SIZE = 32
EARLY, LATE = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def lm(tiny_inputs: Path) -> LanguageModel:
    return load_language_model(str(tiny_inputs / "tiny"), "cpu")


@pytest.fixture
def params(tiny_inputs: Path) -> Params:
    return Params(
        text={"dataset": str(tiny_inputs / "texts"), "context_size": SIZE},
        model={"llm_batch_size": 8, "name": str(tiny_inputs / "tiny"), "device": "cpu"},
        analysis={"tokens": 4_000, "split": "sae_train", "top_contexts": 4},
    )


def biased(form: str, shift: float = 10.0, hook: str = LATE, seed: int = 0) -> SparseAutoencoder:
    """A random SAE whose first latents hardly ever fire; its reconstruction is nowhere near the activations."""
    sae = tiny_sae(form, seed=seed, hook_name=hook)
    if "b_enc" in sae.tensor_names:
        sae.b_enc.copy_(torch.linspace(-shift, 0.3, D_SAE))
    sae.b_dec.copy_(torch.linspace(-0.2, 0.2, sae.cfg.d_in))
    return sae


@pytest.fixture
def lab(lm: LanguageModel, params: Params, in_project: Path) -> Lab:
    """One SAE."""
    return Lab.of({"late": biased("standard")}, lm, params)


@pytest.fixture
def two(lm: LanguageModel, params: Params, in_project: Path) -> Lab:
    """Two SAEs at two hooks."""
    return Lab.of({"early": biased("topk", hook=EARLY, seed=1), "late": biased("standard")}, lm, params)
