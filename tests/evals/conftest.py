"""A tiny model, and parameters that fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sae_research.lm import LanguageModel, load_language_model
from sae_research.params import Params


@pytest.fixture(scope="session")
def lm(tiny_inputs: Path) -> LanguageModel:
    return load_language_model(str(tiny_inputs / "tiny"), "cpu")


@pytest.fixture
def make_params(tiny_inputs: Path, in_project: Path) -> Any:
    def make(**sections: Any) -> Params:
        return Params.model_validate({
            "model": {"name": str(tiny_inputs / "tiny"), "device": "cpu", "llm_batch_size": 4},
            "text": {"dataset": str(tiny_inputs / "texts"), "context_size": 24},
            "core_eval": {"batch_size_prompts": 3, "n_eval_reconstruction_batches": 2,
                          "n_eval_sparsity_variance_batches": 3}, **sections})

    return make
