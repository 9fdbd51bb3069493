"""A tiny model, and parameters that fit it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_research.config.params import Params
from sae_research.lm import LanguageModel, load_language_model
from tests.helpers.autointerp_lab import BUFFER, TOP, WEIGHTED


@pytest.fixture(scope="session")
def lm(tiny_inputs: Path) -> LanguageModel:
    return load_language_model(str(tiny_inputs / "tiny"), "cpu")


@pytest.fixture
def make_params(tiny_inputs: Path, in_project: Path) -> Any:
    def make(**sections: Any) -> Params:
        return Params.model_validate(
            {
                "model": {"name": str(tiny_inputs / "tiny"), "device": "cpu", "llm_batch_size": 4},
                "text": {"dataset": str(tiny_inputs / "texts"), "context_size": 24},
                "core_eval": {
                    "batch_size_prompts": 3,
                    "n_eval_reconstruction_batches": 2,
                    "n_eval_sparsity_variance_batches": 3,
                },
                **sections,
            }
        )

    return make


@pytest.fixture
def settings(make_params: Any) -> Callable[..., Params]:
    """Parameters for autointerp; keywords are changes to its section."""

    def make(**changes: Any) -> Params:
        return make_params(
            eval_types={"autointerp": True},
            autointerp={
                "base_url": "http://127.0.0.1:1/v1",
                "model": "judge",
                "api_key_env": "",
                "n_latents": 5,
                "buffer": BUFFER,
                "total_tokens": 2_400,
                "n_top_ex_for_generation": 4,
                "n_top_ex_for_scoring": TOP - 4,
                "n_iw_sampled_ex_for_generation": 2,
                "n_iw_sampled_ex_for_scoring": WEIGHTED - 2,
                "n_random_ex_for_scoring": 5,
                "timeout_seconds": 5,
                "max_retries": 1,
                "concurrency": 2,
                **changes,
            },
        )

    return make


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    """A task file of three classes."""
    rows = [f"{label} text of words number {i},{label}" for label in ("cat", "dog", "cow") for i in range(120)]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return str(tmp_path / "mine.csv")
